"""The recipes of the paper's tables: sizes, modalities, tokens of a step and steps are those of the tables."""

from dataclasses import replace
from pathlib import Path

import pytest

from training.config import ConfigError
from training.data import RowStream
from training.data.rows import prepare_sources
from training.model.building import plan_model
from training.train import load_recipe


CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"

# Name: hidden size, layers, heads, rows of a GPU, GPUs, thousands of steps (Tables 1, 3, 4 and 5); then the parameters
# that these sizes make in Llama's layers, in millions: active ones, and those of all towers.
TABLES = {
    "chameleon-37m": (256, 4, 8, 12, 32, 160, 37.0, 40.4),
    "chameleon-94m": (512, 8, 8, 8, 32, 160, 94.4, 121.6),
    "chameleon-443m": (1024, 24, 16, 6, 64, 160, 442.5, 750.9),
    "chameleon-1.5b": (2048, 24, 16, 4, 128, 120, 1501.7, 2734.9),
    "chameleon-7b": (4096, 32, 32, 2, 384, 120, 7013.1, 13489.4),
    "chameleon-speech-443m": (1024, 24, 16, 6, 64, 160, 442.5, 1059.2),
    "chameleon-speech-880m": (1536, 24, 24, 4, 128, 120, 880.9, 2240.0),
    "chameleon-speech-1.5b": (2048, 24, 16, 4, 128, 120, 1501.7, 3968.1),
    "chameleon-speech-7b": (4096, 32, 32, 2, 384, 120, 7013.1, 19965.7),
    "ablation-880m": (1536, 24, 24, 4, 128, 120, 880.9, 1560.4),
    "transfusion-163m": (768, 16, 12, 4, 128, 250, None, None),
    "transfusion-760m": (1536, 24, 24, 4, 128, 250, None, None),
    "transfusion-1.4b": (2048, 24, 16, 2, 256, 250, None, None),
    "transfusion-7b": (4096, 32, 32, 2, 256, 250, None, None),
}


def recipe_of(name: str, *words: str):
    return load_recipe([str(CONFIGS / f"{name}.yaml"), *words])


@pytest.mark.parametrize("name", TABLES)
def test_a_recipe_is_the_row_of_its_table(name):
    hidden, layers, heads, rows, gpus, thousands, active, total = TABLES[name]
    recipe = recipe_of(name)
    config = plan_model(recipe.model, recipe.data).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (hidden, layers, heads)
    assert list(config.modalities) == ["text", "image", "speech"][: 3 if "speech" in name else 2]
    assert (recipe.data.row_length, recipe.train.rows, recipe.train.steps) == (4096, rows, 1000 * thousands)
    assert recipe.train.tokens_per_step == 4096 * rows * gpus and recipe.micro_batches(gpus) == 1
    if active is not None:
        assert config.num_parameters(active=True) / 1e6 == pytest.approx(active, abs=0.06)
        assert config.num_parameters() / 1e6 == pytest.approx(total, abs=0.06)


def test_every_recipe_of_the_paper_is_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - TABLES.keys() == {
        "emoji", "smoke", "transfusion-edit", "transfusion-emoji",
    }  # fmt: skip


def test_a_preset_lacks_no_modality_of_the_data():
    speech = recipe_of("chameleon-speech-443m").data
    model = recipe_of("chameleon-443m").model
    with pytest.raises(ConfigError, match="model.preset='chameleon-443m' has text, image, but data has speech as well"):
        plan_model(model, speech)
    wider = replace(model, modalities=["text", "image", "speech"])
    assert list(plan_model(wider, speech).config.modalities) == ["text", "image", "speech"]


def test_half_of_the_tokens_are_of_images(tmp_path):
    """Section 3.2.1: "roughly equal amount of text and image tokens"; captions are text, which images lack."""
    limits = ["data.sources.0.limit=64", "data.sources.1.limit=512"]
    recipe = recipe_of("chameleon-37m", *limits, f"data.cache_dir={tmp_path}", "data.row_length=512")
    planned = plan_model(recipe.model, recipe.data)
    stream = RowStream(planned.data, prepare_sources(planned.data, planned.processor))
    image = list(planned.config.modalities).index("image")
    real, images = 0, 0
    for _, row in zip(range(60), stream.rows(), strict=False):
        kept = row["document_ids"] >= 0
        real += kept.sum()
        images += (kept & (row["modality_ids"] == image)).sum()
    assert 0.4 < images / real <= 0.5
