"""Every recipe runs one step to its sheet, with its sizes shrunk and nothing else changed."""

import json
import math
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

from modeling_mot import MoTConfig, MoTForCausalLM, MoTProcessor, MoTTransfusionConfig
from training.data.adapters import emoji_edits
from training.model.building import CARRIED_PROCESSOR, build_model, planned_config
from training.recipe import ModelConfig
from training.run_files.metrics import read_metrics
from training.train import main


CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"
# A key is set where the recipe has its section, a size of the model where the recipe makes the model.
SHRUNK = {
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.image_tokens": None,  # the carried processor's pictures
    "model.image_size": None,
    "model.transfusion.image_size": [64, 64],
    "model.transfusion.unet_channels": [8, 16],
    "model.transfusion.unet_layers": 1,
    "model.transfusion.unet_norm_groups": 4,
    "data.row_length": 192,
    "optimizer.warmup_steps": 1,
    "train.steps": 1,
    "train.rows": 1,
    "train.cpu": True,
    "train.cpu_threads": 1,
    "train.progress_bar": False,
    "evaluation.rows": 2,
    "evaluation.noise_levels": 1,
    "samples.measured": 2,
    "samples.held_out": 2,
    "samples.edits": 2,
    "samples.spoken": 1,
    "samples.texts": 1,
    "samples.gallery": 64,
    "samples.num_inference_steps": 2,
    "samples.max_text_tokens": 4,
    "samples.max_speech_tokens": 5,
}
RECORDS = 4  # of a source


def shrunk(recipe: dict) -> list[str]:
    """The words that shrink a recipe."""
    model, values = recipe["model"], dict(SHRUNK)
    if "tokens_per_step" in recipe["train"]:
        values["train.tokens_per_step"] = values["data.row_length"] * values["train.rows"]
    for kind in ("sources", "validation_sources"):
        values |= {f"data.{kind}.{place}.limit": RECORDS for place in range(len(recipe["data"][kind]))}
    if "held_out_names" in recipe.get("samples", {}):
        # They are named among all records.
        values = {key: value for key, value in values.items() if not key.startswith("data.validation_sources")}
    left_out = ("model.",) if "init_from" in model else () if "transfusion" in model else ("model.transfusion.",)
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if not key.startswith(left_out)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name) -> folder of the shrunk run of a recipe, which is run once; recipes that it begins from run before."""
    place, done = tmp_path_factory.mktemp("recipes"), {}
    emoji_edits.main(["--out", str(place / "runs" / "emoji-edits"), "--limit", "3", "--edits", "mirror", "grey"])

    def once(name: str) -> Path:
        if name not in done:
            path = CONFIGS / f"{name}.yaml"
            recipe = yaml.safe_load(path.read_text())
            if "init_from" in recipe["model"]:
                once(Path(recipe["model"]["init_from"]).parent.name)
            AcceleratorState._reset_state(reset_partial_state=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MOT_CACHE", str(place / "cache"))
                patch.chdir(place)
                assert main([str(path), *shrunk(recipe)]) == 0
            done[name] = place / recipe["train"]["output_dir"]
        return done[name]

    return once


# Test_bagel_recipe.py runs the one that begins from another project's checkpoint.
@pytest.mark.parametrize("name", sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {"bagel-finetune"}))
def test_a_recipe_runs_a_step_to_its_sheet(run, name):
    folder = run(name)
    (step,), _ = read_metrics(folder / "metrics.jsonl")
    assert step["step"] == 1 and math.isfinite(step["loss"])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["held_out"] and all(map(math.isfinite, summary["held_out"].values()))
    assert summary["samples"] and all(map(math.isfinite, summary["samples"].values()))
    assert "<figure>" in (folder / "samples.html").read_text()
    for made in ("samples.png", "losses.png", "final/README.md", "final/model.safetensors"):
        assert (folder / made).stat().st_size
    assert any((folder / "samples").iterdir())


@pytest.mark.parametrize("name", ["chameleon-speech-443m", "transfusion-163m", "smoke"])
def test_a_final_folder_knows_how_many_tokens_its_processor_has(run, name):
    final = run(name) / "final"
    config = (MoTTransfusionConfig if "transfusion" in name else MoTConfig).from_pretrained(final)
    tokens = MoTProcessor.from_pretrained(final).config_kwargs()["vocab_size"]
    assert (config.tokenizer_vocab_size or config.vocab_size) == tokens
    assert (config.vocab_size > tokens) == (name != "smoke")


def test_a_checkpoint_of_more_rows_than_tokens_is_told_how_many_there_are():
    processor = MoTProcessor.from_pretrained(CARRIED_PROCESSOR)
    tokens, sizes = processor.config_kwargs(), {key[6:]: SHRUNK[key] for key in list(SHRUNK)[:4]}
    initial = MoTForCausalLM(MoTConfig(**tokens | sizes | {"vocab_size": 8000, "max_position_embeddings": 64}))
    recipe = ModelConfig(init_from="checkpoint")
    planned = planned_config(recipe, processor, row_length=64, initial=initial)
    trained = build_model(recipe, planned, seed=0, initial=initial).config
    assert (trained.vocab_size, trained.tokenizer_vocab_size) == (8000, tokens["vocab_size"])
