"""Saving and loading with a VAE inside, and as remote code in a process that has never heard of this package."""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel
from modeling_mot.latent_vae import encode_pixels

from .naive_transfusion import BOI, BOS, EOS, VAE, image, tiny_config, tiny_model
from .test_remote_code import drop_tensor, run_clean


IDS = torch.tensor([[BOS, 10, *image(), 11, EOS]])


def trained_vae():
    """Weights that no initialization makes."""
    vae = AutoencoderKL.from_config(VAE)
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vae


def model_with(vae, **fields):
    return MoTTransfusionModel(tiny_config(**fields), vae=vae).eval()


def same(ours, theirs):
    return all(torch.equal(value, theirs[name]) for name, value in ours.items()) and ours.keys() == theirs.keys()


def assert_vae_is_frozen(model, weights):
    assert not model.vae.training and all(not module.training for module in model.vae.modules())
    for name, parameter in model.vae.named_parameters():
        assert not parameter.requires_grad and parameter.dtype == torch.float32
        assert torch.equal(parameter, weights[name]), name


def forward(model, pixels):
    with torch.no_grad():
        return model(IDS, pixel_values=pixels, timesteps=torch.tensor([500]), noise=torch.ones(1, 2, 4, 4), labels=IDS)


@pytest.mark.parametrize("patchifier", ["linear", "unet"])
def test_round_trip_is_bit_for_bit(tmp_path, patchifier):
    model, pixels = model_with(trained_vae(), patchifier=patchifier), torch.rand(1, 3, 8, 8) * 2 - 1
    model.save_pretrained(tmp_path)
    loaded = MoTTransfusionModel.from_pretrained(tmp_path)
    assert same(model.state_dict(), loaded.state_dict())
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    assert torch.equal(loaded.noise_schedule.alphas_cumprod, model.noise_schedule.alphas_cumprod)
    ours, theirs = forward(model, pixels), forward(loaded, pixels)
    for name in ("logits", "prediction", "loss"):
        # Loaded tensors lie in memory as the file has them, and products of unaligned ones round differently.
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-5, atol=1e-5)
    assert not any("alphas" in name for name in load_file(tmp_path / "model.safetensors"))


def test_a_trained_vae_is_not_initialized_again_and_its_folder_is_forgotten(tmp_path):
    trained_vae().save_pretrained(tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    weights = copy.deepcopy(vae.state_dict())
    model = model_with(vae)
    assert_vae_is_frozen(model, weights)
    assert str(tmp_path) not in json.dumps(model.config.to_dict()) and model.config.vae_downsampling == 2
    model.init_weights()
    assert_vae_is_frozen(model, weights)
    model.save_pretrained(tmp_path / "model")
    assert_vae_is_frozen(MoTTransfusionModel.from_pretrained(tmp_path / "model"), weights)


def test_a_vae_in_half_precision_is_held_in_float32():
    vae = trained_vae().half()
    weights = {name: value.float() for name, value in vae.state_dict().items()}
    assert_vae_is_frozen(model_with(vae), weights)


def test_the_vae_stays_frozen_float32_and_in_evaluation_mode(tmp_path):
    model = model_with(trained_vae())
    weights = copy.deepcopy(model.vae.state_dict())
    model.save_pretrained(tmp_path)
    for kwargs in ({}, {"dtype": torch.bfloat16}, {"dtype": "auto"}, {"output_loading_info": True}):
        loaded = MoTTransfusionModel.from_pretrained(tmp_path, **kwargs)
        loaded = loaded[0] if isinstance(loaded, tuple) else loaded
        assert loaded.lm_head.weight.dtype == kwargs.get("dtype", torch.float32) or kwargs.get("dtype") == "auto"
        assert_vae_is_frozen(loaded, weights)
        assert_vae_is_frozen(loaded.train(), weights) or loaded.training
    for cast in (model.to(torch.bfloat16), model.half(), model.to("cpu", torch.float64)):
        assert_vae_is_frozen(cast, weights)
    assert model.lm_head.weight.dtype == torch.float64
    assert {parameter.device.type for parameter in model.to("meta").parameters()} == {"meta"}


def test_training_moves_everything_but_the_vae():
    model = model_with(trained_vae(), patchifier="unet").train()
    weights = copy.deepcopy(model.vae.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(IDS, pixel_values=torch.rand(1, 3, 8, 8), labels=IDS).loss.backward()
    optimizer.step()
    assert_vae_is_frozen(model, weights)
    assert all((p.grad is None) == name.startswith("vae.") for name, p in model.named_parameters())


def test_pixels_of_several_sizes_are_encoded_as_if_alone():
    """The padding of one picture must not leak into its latents: the VAE looks at all of a picture."""
    model, sizes = model_with(trained_vae()), [(8, 8), (4, 8), (8, 4)]
    pixels = torch.zeros(3, 3, 8, 8)
    for index, (height, width) in enumerate(sizes):
        pixels[index, :, :height, :width] = torch.rand(3, height, width) * 2 - 1
    for given in (sizes, torch.tensor(sizes)):
        latents, latent_sizes = model.encode_images(pixels, given)
        assert latent_sizes == [(4, 4), (2, 4), (4, 2)]
        for index, (height, width) in enumerate(sizes):
            alone = encode_pixels(model.vae, pixels[index : index + 1, :, :height, :width])
            own = latents[index : index + 1, :, : height // 2, : width // 2]
            torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-6)
    ids = torch.tensor([[BOS, *image(4, 4), *image(2, 4), *image(4, 2), EOS]])
    noise = {"timesteps": torch.tensor([1, 2, 3]), "noise": torch.randn(3, 2, 4, 4)}
    with torch.no_grad():
        of_pixels = model(ids, pixel_values=pixels, image_sizes=sizes, **noise)
        of_latents = model(ids, latents=latents, image_sizes=latent_sizes, **noise)
    assert torch.equal(of_pixels.prediction, of_latents.prediction)


def test_an_autoencoder_tiny_does_as_well(tmp_path):
    vae = AutoencoderTiny(
        latent_channels=2, encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8],
        num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1],
    )  # fmt: skip
    model, pixels = model_with(vae), torch.rand(1, 3, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = MoTTransfusionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(forward(model, pixels).loss, forward(loaded, pixels).loss)
    assert isinstance(loaded.vae, AutoencoderTiny)


@pytest.mark.parametrize(
    "name", ["patchifier.proj_in.weight", "vae.decoder.conv_out.bias", "model.norm.image.weight", "lm_head.weight"]
)
def test_a_checkpoint_with_a_missing_tensor_is_refused(tmp_path, name):
    model_with(trained_vae()).save_pretrained(tmp_path)
    drop_tensor(tmp_path, name)
    with pytest.raises(ValueError, match=f"lacks 1 tensors of MoTTransfusionModel, '{name}'"):
        MoTTransfusionModel.from_pretrained(tmp_path)


def test_generation_settings_are_saved_and_used(tmp_path):
    model = tiny_model(noise_schedule="linear", caption_dropout=0.1)
    saved = {"num_inference_steps": 3, "scheduler": "ddim", "guidance_scale": 2.0, "image_size": [2, 4]}
    saved |= {"scheduler_kwargs": {"clip_sample": True}, "max_new_tokens": 3}
    saved |= {"image_guidance_scale": 1.5, "guidance_form": "sum", "guidance_renorm": "channel"}
    saved |= {"guidance_renorm_min": 0.5, "guidance_interval": [0.2, 0.9]}
    for name, value in saved.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: written[name] for name in saved} == saved
    loaded = MoTTransfusionModel.from_pretrained(tmp_path).eval()

    def drawn(model, **kwargs):
        output = model.generate(torch.tensor([[BOS, 10, BOI]]), generator=torch.Generator().manual_seed(0), **kwargs)
        return output.latents[0][0]

    plain = tiny_model(noise_schedule="linear", caption_dropout=0.1)
    plain.load_state_dict(model.state_dict())
    assert drawn(loaded).shape == (2, 2, 4)
    torch.testing.assert_close(drawn(loaded), drawn(plain, **saved), rtol=1e-4, atol=1e-4)
    by_object = drawn(plain, generation_config=GenerationConfig(**saved))
    assert torch.equal(by_object, drawn(plain, **saved))
    other = drawn(
        loaded, guidance_scale=1.0, image_size=[2, 2], scheduler="ddpm", num_inference_steps=2, scheduler_kwargs={}
    )
    assert other.shape == (2, 2, 2)  # what the call says goes before what was saved


LOAD = """
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
)
folder = sys.argv[1]
expected = load_file(folder + "/expected.safetensors")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.vae_downsampling == 2 and config.patchifier_parameters() == int(expected["patchifier"])
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == "MoTTransfusionModel" and not model.vae.training
    with torch.no_grad():
        output = model(
            expected["input_ids"], pixel_values=expected["pixels"], timesteps=torch.tensor([500]),
            noise=torch.ones(1, 2, 4, 4), labels=expected["input_ids"],
        )
    assert torch.equal(output.logits, expected["logits"]) and torch.equal(output.loss, expected["loss"])
    drawn = model.generate(
        expected["prompt"], num_inference_steps=3, max_new_tokens=8, do_sample=False, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(drawn.sequences, expected["sequences"]) and torch.equal(drawn.images[0][0], expected["picture"])
new = AutoModel.from_config(config, trust_remote_code=True)
weight = new.patchifier.conv_in.weight
assert weight.std() > 0.05, "the patchifier has the initialization of the transformer"
print("loaded")
"""


def test_export_loads_and_generates_in_a_clean_process_bit_for_bit(tmp_path):
    model = model_with(trained_vae(), patchifier="unet", initializer_range=0.01, noise_schedule="linear")
    pixels, prompt = torch.rand(1, 3, 8, 8) * 2 - 1, torch.tensor([[BOS, 10, BOI]])
    model.save_pretrained(tmp_path / "model")
    model = MoTTransfusionModel.from_pretrained(tmp_path / "model")
    output = forward(model, pixels)
    generated = model.generate(
        prompt, num_inference_steps=3, max_new_tokens=8, do_sample=False, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    save_file(
        {
            "input_ids": IDS,
            "pixels": pixels,
            "prompt": prompt,
            "logits": output.logits,
            "loss": output.loss,
            "sequences": generated.sequences,
            "picture": generated.images[0][0].contiguous(),
            "patchifier": torch.tensor(model.config.patchifier_parameters()),
        },
        tmp_path / "model" / "expected.safetensors",
    )
    assert "loaded" in run_clean(LOAD, tmp_path / "model", tmp_path)


def test_export_is_flat_and_names_the_auto_classes(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == MoTTransfusionConfig.auto_classes
    files = {path.name for path in tmp_path.glob("*.py")}
    needed = {"latent_images", "latent_vae", "decoding_loop", "decoding_pictures"}
    assert {f"{name}.py" for name in needed} <= files and not list(tmp_path.glob("*/"))
