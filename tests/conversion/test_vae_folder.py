"""The VAE of a Transfusion model as a folder of diffusers, and such a folder in its place."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from conversion.vae import main
from modeling_mot import MoTTransfusionModel

from ..modeling_mot.naive_transfusion import VAE, tiny_config
from ..modeling_mot.test_remote_code import run_clean


TINY = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
    "latent_channels": VAE["latent_channels"],
}


def kl(seed=1, **fields):
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_config(VAE | fields).eval()
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return same_kernels(vae)


def tiny(seed=1, **fields):
    torch.manual_seed(seed)
    return same_kernels(AutoencoderTiny(**TINY | fields))


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def model_folder(folder, vae=None, **fields):
    return saved(MoTTransfusionModel(tiny_config(**fields), vae=vae).eval(), folder)


def same_kernels(vae):
    """Loaded tensors lie in memory as the file has them, and products of unaligned ones round differently; so do, in
    their last bit, those of weights that need no gradient."""
    for parameter in vae.parameters():
        parameter.data = parameter.data.clone()
    return vae.eval().requires_grad_(False)


def described(vae):
    return json.loads(json.dumps({name: value for name, value in vae.config.items() if not name.startswith("_")}))


def run(*arguments):
    return main([str(argument) for argument in arguments])


def pixels():
    return torch.rand(2, 3, 16, 16) * 2 - 1


def latents_of(vae, values):
    """By diffusers' own calls, scaled as its pipelines do."""
    encoded = vae.encode(values)
    latents = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


@pytest.mark.parametrize("make", [kl, tiny])
@torch.no_grad()
def test_an_exported_vae_computes_the_same_bit_for_bit(tmp_path, make):
    vae = make(scaling_factor=0.7)
    assert run("export", model_folder(tmp_path / "model", vae), tmp_path / "vae") == 0
    loaded = same_kernels(type(vae).from_pretrained(tmp_path / "vae"))
    assert described(loaded) == described(vae)
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    values = pixels()
    assert torch.equal(latents_of(loaded, values), latents_of(vae, values))
    assert torch.equal(loaded.decode(latents_of(vae, values)).sample, vae.decode(latents_of(vae, values)).sample)


@pytest.mark.parametrize("make", [kl, tiny])
@torch.no_grad()
def test_latents_of_an_imported_vae_equal_those_of_diffusers(tmp_path, make):
    before = model_folder(tmp_path / "model", make(scaling_factor=0.7))
    vae = make(seed=2, scaling_factor=0.7)
    assert run("import", before, saved(vae, tmp_path / "vae"), tmp_path / "out", "--max-shard-size", "20KB") == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = MoTTransfusionModel.from_pretrained(tmp_path / "out")
    same_kernels(loaded.vae)
    values = pixels()
    assert torch.equal(loaded.encode_images(values)[0], latents_of(vae, values))
    old = load_file(before / "model.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert name.startswith("vae.") or torch.equal(tensor, old[name])


def test_there_and_back_is_the_same_checkpoint(tmp_path):
    before = model_folder(tmp_path / "model", kl())
    assert run("export", before, tmp_path / "vae") == 0
    assert run("import", before, tmp_path / "vae", tmp_path / "out") == 0
    old, new = (load_file(folder / "model.safetensors") for folder in (before, tmp_path / "out"))
    assert old.keys() == new.keys() and all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (before, tmp_path / "out"))
    assert old == new
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (record["source"], record["vae"]) == ("model", "vae") and str(tmp_path) not in json.dumps(record)
    assert run("import", tmp_path / "out", tmp_path / "vae", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again" / "conversion.json").read_text())["earlier"] == record


def test_a_model_without_a_vae_can_be_given_one(tmp_path):
    before = model_folder(tmp_path / "model")
    assert json.loads((before / "config.json").read_text())["vae_config"] is None
    assert run("import", before, saved(kl(), tmp_path / "vae"), tmp_path / "out") == 0
    vae = MoTTransfusionModel.from_pretrained(tmp_path / "out").vae
    assert all(torch.equal(tensor, kl().state_dict()[name]) for name, tensor in vae.state_dict().items())


def test_a_vae_in_half_precision_and_with_older_names_is_read(tmp_path):
    vae = kl()
    folder = saved(vae.half(), tmp_path / "vae")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, then in old.items():
        tensors = {name.replace(f".{now}.", f".{then}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert run("import", model_folder(tmp_path / "model"), folder, tmp_path / "out") == 0
    loaded = MoTTransfusionModel.from_pretrained(tmp_path / "out").vae.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in vae.state_dict().items())


LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model.vae).__name__)
"""


def test_the_result_loads_in_a_clean_process(tmp_path):
    before = model_folder(tmp_path / "model", kl())
    assert (
        run("import", before, saved(tiny(scaling_factor=0.5, shift_factor=0.1), tmp_path / "vae"), tmp_path / "out")
        == 0
    )
    assert "AutoencoderTiny" in run_clean(LOAD, tmp_path / "out", tmp_path)


def test_a_dry_run_writes_nothing_and_nothing_is_overwritten_unless_told(tmp_path, capsys):
    before, vae = model_folder(tmp_path / "model", kl()), saved(kl(), tmp_path / "vae")
    for name, command in (("vae", ["export", before]), ("model", ["import", before, vae])):
        command.append(out := tmp_path / f"new-{name}")
        assert run(*command, "--dry-run") == 0 and not out.exists()
        assert "AutoencoderKL: " in capsys.readouterr().out
        assert run(*command) == 0
        assert run(*command) == 2 and "--overwrite" in capsys.readouterr().err
        assert run(*command, "--overwrite") == 0


def test_what_does_not_fit_is_refused_by_name(tmp_path, capsys):
    before = model_folder(tmp_path / "model", kl())
    bare = model_folder(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    pickled = saved(kl(), tmp_path / "pickled")
    (pickled / "diffusion_pytorch_model.safetensors").rename(pickled / "diffusion_pytorch_model.bin")
    other = saved(kl(), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    out = tmp_path / "out"
    cases = [
        (["export", bare, out], "holds no VAE"),
        (["export", tmp_path / "empty", out], "holds no config.json"),
        (["export", pickled, out], "model_type=None"),
        (["import", before, tmp_path / "empty", out], "no VAE could be read"),
        (["import", before, tmp_path / "pipeline", out], "give its folder vae"),
        (["import", before, pickled, out], "safetensors"),
        (["import", before, other, out], "_class_name='VQModel'"),
        (["import", before, saved(kl(latent_channels=3), tmp_path / "channels"), out], "latent_channels=3"),
        (["import", before, saved(tiny(scaling_factor=2.0), tmp_path / "scale"), out], "scaling_factor=2.0"),
        (["import", before, saved(kl(shift_factor=0.5), tmp_path / "shift"), out], "shift_factor=0.5"),
    ]
    for command, message in cases:
        assert run(*command) == 2
        error = capsys.readouterr().err
        assert "error: " in error and message in error
        assert not out.exists()
    assert run("import", before, tmp_path / "shift", out, "--other-latents") == 0


def test_a_vae_of_other_pixels_is_refused(tmp_path, capsys):
    before = model_folder(tmp_path / "model", kl())
    one_more = tiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip
    folder = saved(one_more, tmp_path / "vae")
    assert run("import", before, folder, tmp_path / "out") == 2
    assert "4 x 4 pixels" in capsys.readouterr().err
    # A model without a VAE has a processor that says how many pixels a token is.
    bare = model_folder(tmp_path / "bare")
    (bare / "image_processor").mkdir()
    (bare / "image_processor" / "image_processor_config.json").write_text(json.dumps({"downsampling": 4}))
    assert run("import", bare, folder, tmp_path / "out") == 2
    assert "image_processor.downsampling" in capsys.readouterr().err


def test_tensors_that_are_missing_or_too_many_are_listed(tmp_path, capsys):
    before = model_folder(tmp_path / "model", kl())
    tensors = load_file(before / "model.safetensors")
    del tensors["vae.encoder.conv_in.bias"]
    save_file(tensors | {"vae.extra": torch.zeros(1)}, before / "model.safetensors", metadata={"format": "pt"})
    assert run("export", before, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "encoder.conv_in.bias" in error and "extra" in error
    folder = saved(kl(), tmp_path / "vae")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    del tensors["decoder.conv_in.bias"]
    save_file(tensors | {"extra": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert run("import", model_folder(tmp_path / "bare"), folder, tmp_path / "out") == 2
    assert "missing: decoder.conv_in.bias; too many: extra" in capsys.readouterr().err
