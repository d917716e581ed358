"""Whole runs of training/train.py on the carried data with a Transfusion model and a small untrained VAE."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_mot import MoTConfig, MoTForCausalLM, MoTProcessor
from modeling_mot.latent_vae import build_vae
from training.model.building import CARRIED_PROCESSOR, load_frame, load_model
from training.run_files.metrics import read_metrics
from training.tokenizers.processor import continuous_processor
from training.train import main


PAIR = {"segments": ["text:name", "image:image"], "caption_first": 0.8}
RECIPE = {
    "model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "transfusion": {
            "vae": "vae",
            "image_size": [32, 32],
            "unet_channels": [8, 16],
            "unet_layers": 1,
            "unet_norm_groups": 4,
        },
    },
    "data": {
        "row_length": 64,
        "cache_dir": "cache",
        "sources": [
            {
                "name": "emoji",
                "path": "carried",
                "config": "emoji",
                "limit": 6,
                "templates": [PAIR | {"caption_dropout": 0.2}],
            }
        ],
        "validation_sources": [
            {
                "name": "emoji",
                "path": "carried",
                "config": "emoji",
                "split": "validation",
                "limit": 4,
                "templates": [PAIR],
            }
        ],
    },
    "optimizer": {"lr": 1e-2, "warmup_steps": 1},
    "train": {
        "steps": 3,
        "rows": 2,
        "accumulation": 2,
        "ema_decay": 0.5,
        "save_every": 1,
        "keep_checkpoints": 5,
        "progress_bar": False,
        "cpu": True,
        "cpu_threads": 1,
    },
    "evaluation": {"every": 2, "rows": 2},
    "samples": {"held_out": 2, "gallery": 16, "num_inference_steps": 3, "max_text_tokens": 4, "guidance_scale": 2.0},
}
QUICK = ("samples.enabled=false", "evaluation.rows=0", "train.save_every=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder that runs begin in: a recipe, a VAE of 4 pixels to a latent, the data's cache."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes = {"block_out_channels": [8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    vae = build_vae({"_class_name": "AutoencoderKL", "scaling_factor": 3.0, "shift_factor": 0.1} | blocks | sizes)
    vae.save_pretrained(folder / "vae")
    vae.register_to_config(scaling_factor=2.0)
    vae.save_pretrained(folder / "other-vae")
    return folder


def train(place: Path, *words: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return main(["recipe.yaml", *words])


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder / "metrics.jsonl")[0]]


@pytest.fixture(scope="module")
def finished(place):
    assert train(place, "train.output_dir=whole") == 0
    return place / "whole"


# --------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_the_promised_files(finished):
    expected = {
        "config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "final", "samples", "samples.html",
        "samples.png", "losses.png", "summary.json",
    }  # fmt: skip
    assert {entry.name for entry in finished.iterdir()} == expected
    drawn = sorted((finished / "samples").glob("drawn-*.png"))
    assert len(drawn) == 6 and len(list((finished / "samples").glob("held-out-drawn-*.png"))) == 2
    assert Image.open(drawn[0]).size == (32, 32)
    assert Image.open(finished / "losses.png").width > 600  # text, and diffusion beside it


def test_the_summary_has_figures_of_both_objectives_and_of_the_samples(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["training"]) == {"loss_text", "loss_image_diffusion"}
    keys = {"loss_text", "perplexity_text", "loss_image_diffusion", "text-to-image/loss", "image-to-text/loss"}
    keys |= {"emoji/text-to-image/loss", "emoji/image-to-text/loss"}
    levels = ("", *(f"@{level}" for level in (62, 187, 312, 437, 562, 687, 812, 937)))
    keys |= {f"{of}text-to-image/diffusion_validation_loss{level}" for of in ("", "emoji/") for level in levels}
    assert set(summary["held_out"]) == {f"eval/{key}" for key in keys}
    samples = summary["samples"]
    assert samples["drawn"] == 6 and samples["held_out_drawn"] == 2 and samples["gallery_size"] == 2 * 16
    for key in ("drawn_psnr", "reconstructed_psnr", "held_out_drawn_psnr", "held_out_reconstructed_psnr"):
        assert 0 < samples[key] < 60
    facts = json.loads((finished / "manifest.json").read_text())
    assert facts["total_parameters"] > facts["active_parameters"]
    assert facts["forward_flops_per_token"]["image"] > facts["forward_flops_per_token"]["text"]


def stored_tensors(checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    """What one process has written of a checkpoint: model, optimizer and average, each by the parameters' names."""
    tensors = {"model": {}, "optimizer": {}, "average": {}}
    for file in (checkpoint / "state").iterdir():
        for name, value in load_file(file).items():
            kind, _, rest = name.partition(".")
            tensors[kind][rest] = value
    return tensors


def test_the_vae_is_neither_trained_nor_averaged_and_saved_with_the_model(finished, place):
    vae = load_file(place / "vae" / "diffusion_pytorch_model.safetensors")
    saved = load_file(finished / "final" / "model.safetensors")
    assert {name for name in saved if name.startswith("vae.")} == {f"vae.{name}" for name in vae}
    assert all(torch.equal(saved[f"vae.{name}"], value) for name, value in vae.items())
    stored = stored_tensors(finished / "checkpoints" / "step-00000003")
    assert {kind for kind, names in stored.items() if any("vae." in name for name in names)} == {"model"}
    loaded = load_model(str(finished / "final"))
    assert all(torch.equal(loaded.vae.state_dict()[name], value) for name, value in vae.items())
    assert not any(parameter.requires_grad for parameter in loaded.vae.parameters())


def test_ranks_that_get_their_weights_from_others_load_the_vae_alone(finished, place):
    frame = load_frame(str(finished / "final"))
    vae = load_file(place / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(frame.vae.state_dict()[name], value) for name, value in vae.items())
    assert all(value.is_meta for name, value in frame.named_parameters() if not name.startswith("vae."))
    assert frame.config.to_diff_dict() | {"_name_or_path": ""} == load_model(
        str(finished / "final")
    ).config.to_diff_dict() | {"_name_or_path": ""}


def test_the_saved_configuration_knows_the_vae_and_the_caption_dropout(finished):
    for folder in (finished / "checkpoints" / "step-00000001" / "pretrained", finished / "final"):
        config = json.loads((folder / "config.json").read_text())
        assert config["vae_config"]["_class_name"] == "AutoencoderKL" and config["vae_config"]["scaling_factor"] == 3.0
        assert config["caption_dropout"] == 0.2 and config["latent_size"] == [8, 8]
        assert str(finished.parent) not in json.dumps(config)


def test_the_final_folder_holds_the_average(finished):
    final = load_file(finished / "final" / "model.safetensors")
    stored = stored_tensors(finished / "checkpoints" / "step-00000003")
    averages, weights = stored["average"], stored["model"]
    assert {name for name in final if not name.startswith("vae.")} == set(averages)
    for name, average in averages.items():
        assert torch.equal(final[name], average) and not torch.equal(average, weights[name])


def test_evaluation_and_samples_are_of_the_average(finished, place):
    """Asked for again from the final folder, whose weights are the average, they are the same."""
    words = ("model.transfusion=null", "model.init_from=whole/final", "train.ema_decay=null", "optimizer.lr=1e-12")
    assert train(place, *words, "optimizer.min_lr=0", "train.steps=1", "train.output_dir=again") == 0
    one, other = (json.loads((place / name / "summary.json").read_text()) for name in ("whole", "again"))
    assert one["held_out"] == pytest.approx(other["held_out"], rel=1e-5)
    assert one["samples"] == pytest.approx(other["samples"], abs=0.02)
    assert other["held_out"]["eval/loss_text"] > 0


def test_the_final_folder_loads_and_draws_in_a_process_that_does_not_know_us(finished, place):
    program = """
import sys
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
documents = [[{"type": "text", "text": "rocket"}]]
mode = {"generation_mode": "image", "num_inference_steps": 2, "guidance_scale": 2.0}
output = model.generate(documents=documents, processor=processor, **mode)
segments = processor.decode_document(output.sequences[0], images=output.images[0])
print([segment["type"] for segment in segments], output.images[0][0].size)
assert "training" not in sys.modules and "/modeling_mot/" not in sys.modules[type(model).__module__].__file__
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", program, str(finished / "final")]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['text', 'image'] (32, 32)"


# -------------------------------------------------------------------------------------------- going on, starting from


def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(finished, place):
    folder = place / "resumed"
    shutil.copytree(finished, folder)
    for name in ("final", "checkpoints/step-00000003", "samples"):
        shutil.rmtree(folder / name)
    assert train(place, "train.output_dir=resumed", "train.resume=true", "samples.enabled=false") == 0
    one, other = (load_file(run / "final" / "model.safetensors") for run in (finished, folder))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for key in ("loss", "loss_text", "loss_image_diffusion", "grad_norm"):
        assert losses(folder, key) == losses(finished, key)


def test_another_vae_ends_a_resumed_run_before_it_goes_on(finished, place, capsys):
    words = ("train.output_dir=whole", "train.resume=true", "train.steps=4", "model.transfusion.vae=other-vae")
    assert train(place, *words) == 2
    assert "model.transfusion.vae was 'vae', is 'other-vae'" in capsys.readouterr().err


def test_fine_tuning_begins_with_the_weights_and_the_vae_of_the_checkpoint(finished, place):
    words = ("model.transfusion=null", "model.init_from=whole/final", "train.output_dir=tuned", "train.steps=1")
    more = ("optimizer.lr=1e-9", "optimizer.min_lr=0", "data.sources.0.templates.0.caption_dropout=0")
    assert train(place, *words, *more, *QUICK) == 0
    before, after = (load_file(place / run / "final" / "model.safetensors") for run in ("whole", "tuned"))
    assert set(before) == set(after)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-7)
    # What the checkpoint has learnt to do without captions, it keeps.
    assert json.loads((place / "tuned" / "final" / "config.json").read_text())["caption_dropout"] == 0.2


def test_latents_on_the_fly_give_the_steps_of_cached_ones(finished, place):
    assert train(place, "train.output_dir=fly", "data.latents=on_the_fly", *QUICK) == 0
    for key in ("loss", "loss_text", "loss_image_diffusion"):
        assert losses(place / "fly", key) == pytest.approx(losses(finished, key), rel=2e-3)
        assert losses(place / "fly", key) != losses(finished, key)  # float16


def test_a_model_that_does_not_see_noised_images_gets_clean_copies(place):
    hidden = ("model.transfusion.noised_images_visible=false", "model.transfusion.image_positions=shared")
    assert train(place, "train.output_dir=hidden", *hidden, *QUICK) == 0
    assert yaml.safe_load((place / "hidden" / "config.yaml").read_text())["data"]["clean_copies"] is True
    # So does one that is tuned further, whose recipe need not say it again.
    words = ("model.transfusion=null", "model.init_from=hidden/final", "train.output_dir=hidden-tuned", "train.steps=1")
    assert train(place, *words, *QUICK) == 0
    assert yaml.safe_load((place / "hidden-tuned" / "config.yaml").read_text())["data"]["clean_copies"] is True


@pytest.mark.parametrize(
    "words", [("model.variant=dense", "model.transfusion.patchifier=linear"), ("model.variant=moe-4x",)]
)
def test_variants_run(place, words):
    assert train(place, f"train.output_dir={words[0].replace('=', '-')}", "train.steps=1", *words, *QUICK) == 0


def test_gradient_checkpointing_changes_nothing_but_memory(finished, place):
    assert train(place, "train.output_dir=checkpointing", "model.gradient_checkpointing=true", *QUICK) == 0
    for key in ("loss", "grad_norm"):
        assert losses(place / "checkpointing", key) == pytest.approx(losses(finished, key), rel=1e-4)


def test_speech_stays_beside_pictures_that_are_diffused_where_the_recipe_has_sounds(place):
    both = "[{segments: [text:name, image:image]}, {segments: [text:name, audio:audio], weight: 3}]"
    words = (f"data.sources.0.templates={both}", "data.row_length=128", "train.steps=1", "train.output_dir=speech")
    assert train(place, *words, *QUICK) == 0
    (row,), _ = read_metrics(place / "speech" / "metrics.jsonl")
    assert row["tokens_text"] and row["tokens_speech"] and row["elements_image_diffusion"]
    config = json.loads((place / "speech" / "final" / "config.json").read_text())
    assert config["modalities"] == ["text", "image", "speech"]


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def others(finished, place):
    """Processors and checkpoints that do not fit: `coarse` has tokens of 16 pixels, `wide` other pictures."""
    processor = MoTProcessor.from_pretrained(finished / "final")
    for name, size, downsampling in (("coarse", 32, 16), ("wide", 64, 8)):
        continuous_processor(processor, size, downsampling).save_pretrained(place / name)
    torch.manual_seed(0)
    tokens = MoTProcessor.from_pretrained(CARRIED_PROCESSOR)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MoTForCausalLM(MoTConfig(**tokens.config_kwargs(), **sizes, max_position_embeddings=128))
    model.save_pretrained(place / "tokens")
    tokens.save_pretrained(place / "tokens")


FROM_FINAL = ["model.transfusion=null", "model.init_from=whole/final"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.transfusion.vae=/nowhere"], "model.transfusion.vae='/nowhere'"),
        (["model.transfusion.image_size=[36, 32]"], "model.transfusion.image_size=[36, 32]"),
        (["model.transfusion.image_size=[32]"], "model.transfusion.image_size=[32]"),
        (["model.transfusion.patch_size=4"], "patch_size=4 with unet_channels=[8, 16]"),
        (["model.transfusion.noise_schedule=cosine"], "noise_schedule='cosine'"),
        (["model.transfusion.prediction_type=velocity"], "model.transfusion.prediction_type='velocity'"),
        (["model.transfusion.patchify=unet"], "did you mean model.transfusion.patchifier"),
        (["model.transfusion.image_first_max_timestep=1000"], "image_first_max_timestep=1000"),
        (["model.preset=chameleon-37m"], "chameleon-37m"),
        (["model.processor=coarse"], "a token stands for 16 pixels a side, but for 8 in the model"),
        (["model.processor=wide"], "model.transfusion.image_size=[32, 32]"),
        (["model.processor=wide", "model.transfusion=null"], "set model.transfusion"),
        (["train.modality_weights={image: 2}"], "diffusion_loss_weight"),
        (["train.ema_decay=1"], "ema_decay=1"),
        (["data.row_length=16"], "row_length=16"),
        (["samples.num_inference_steps=0"], "num_inference_steps=0"),
        (["model.init_from=tokens"], "model.init_from='tokens' is a model of tokens alone"),
        ([*FROM_FINAL, "model.processor=coarse"], "a token stands for 16 pixels a side, but for 8 in the model"),
        ([*FROM_FINAL, "model.processor=tokens"], "model.processor: its pictures are codes"),
        (["model.transfusion=null", "model.init_from=tokens", "model.processor=wide"], "its pictures are pixels"),
        (["model.init_from=whole/final", "model.transfusion.prediction_type=flow"], "prediction_type='flow'"),
        (["model.init_from=whole/final", "model.transfusion.image_size=[64, 64]"], "image_size=[64, 64]"),
        (["model.init_from=whole/final", "model.transfusion.vae=other-vae"], "vae='other-vae' is not the VAE"),
    ],
)
def test_what_cannot_be_is_refused_at_once_and_by_name(others, place, words, named, capsys):
    assert train(place, "train.output_dir=refused", *words) == 2
    assert named in capsys.readouterr().err
    assert not (place / "refused").exists()


def test_a_vae_without_some_of_its_weights_is_refused(place, capsys):
    shutil.copytree(place / "vae", place / "torn-vae")
    path = place / "torn-vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert train(place, "train.output_dir=refused", "model.transfusion.vae=torn-vae") == 2
    assert "decoder.conv_out.weight" in capsys.readouterr().err


def test_the_objective_of_a_checkpoint_may_change(finished, place):
    words = ("model.init_from=whole/final", "model.transfusion.diffusion_loss_weight=0.5", "train.steps=1")
    assert train(place, *words, "train.output_dir=weighted", *QUICK) == 0
    (row,), _ = read_metrics(place / "weighted" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(row["loss_text"] + 0.5 * row["loss_image_diffusion"], rel=1e-5)
    assert json.loads((place / "weighted" / "final" / "config.json").read_text())["diffusion_loss_weight"] == 0.5
