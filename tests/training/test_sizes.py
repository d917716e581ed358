"""What a recipe leaves open follows from the data and the machine."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from training.config import ConfigError, build, load
from training.model.building import load_processor, modalities_of, plan_model
from training.model.costs import SIZES, Budget, describe_choice, leaves_size_open
from training.recipe import ModelConfig, Recipe


CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"
PLENTY = Budget(
    memory=1e15, flops=1e18, shards=1, tokens_of_forward=1, tokens_of_step=1, tokens_of_run=10**15, state_bytes=16
)


def recipe_of(*templates: list[str], **model) -> Recipe:
    sources = [{"name": "a", "path": "carried", "config": "emoji", "templates": [{"segments": t} for t in templates]}]
    return build(Recipe, {"data": {"row_length": 256, "sources": sources}, "model": model})


PICTURES, SOUNDS, TEXT = ["text:name", "image:image"], ["text:name", "audio:audio"], ["text:name"]


@pytest.mark.parametrize(
    ("templates", "modalities"),
    [
        ([PICTURES], ["text", "image"]),
        ([SOUNDS], ["text", "speech"]),
        ([TEXT], ["text"]),
        ([SOUNDS, PICTURES], ["text", "image", "speech"]),
        ([["document:document"]], None),
    ],
)
def test_a_model_without_a_size_has_the_modalities_of_the_data(templates, modalities):
    recipe = recipe_of(*templates)
    plan = plan_model(recipe.model, recipe.data)
    planned, processor = plan.config, plan.processor
    assert plan.model.modalities == modalities_of(recipe.data) == modalities
    assert recipe.model.modalities is None
    assert planned.modalities == processor.modalities == (modalities or ["text", "image", "speech"])
    whole = load_processor(ModelConfig())
    assert processor.tokenizer("a red apple").input_ids == whole.tokenizer("a red apple").input_ids
    assert planned.vocab_size == max(last for _, last in processor.modality_token_ranges.values())


@pytest.mark.parametrize(
    ("kinds", "modalities"),
    [(["image"], ["text", "image"]), (["audio", "image"], ["text", "image", "speech"]), ([], ["text"])],
)
@pytest.mark.parametrize("name", ["0.jsonl", "*.jsonl"])
def test_the_modalities_of_documents_are_those_of_their_records(tmp_path, kinds, modalities, name):
    for kind in ("image", "audio"):
        (tmp_path / f"file.{kind}").write_bytes(b"0")
    parts = [{"type": "text", "text": "a"}, *({"type": kind, kind: f"file.{kind}"} for kind in kinds)]
    (tmp_path / "0.jsonl").write_text(json.dumps({"parts": parts}) + "\n")
    sources = [{"name": "a", "path": str(tmp_path / name), "templates": [{"segments": ["document:parts"]}]}]
    recipe = build(Recipe, {"data": {"row_length": 256, "sources": sources}})
    planned = plan_model(recipe.model, recipe.data)
    assert planned.config.modalities == planned.model.modalities == modalities


def test_documents_of_which_only_some_were_looked_at_say_so(tmp_path, caplog):
    text = json.dumps({"parts": [{"type": "text", "text": "a"}]}) + "\n"
    (tmp_path / "0.jsonl").write_text(300 * text)
    sources = [{"name": "a", "path": str(tmp_path / "0.jsonl"), "templates": [{"segments": ["document:parts"]}]}]
    recipe = build(Recipe, {"data": {"row_length": 256, "sources": sources}})
    with caplog.at_level(logging.WARNING):
        assert modalities_of(recipe.data) == ["text"]
    assert "source 'a': its first records have text; if later ones have more, set model.modalities" in caplog.text


def test_a_model_with_a_size_keeps_the_modalities_of_its_processor():
    recipe = recipe_of(PICTURES, hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
    plan = plan_model(recipe.model, recipe.data)
    assert plan.config.modalities == ["text", "image", "speech"]
    assert plan.model.modalities is None


def test_modalities_that_data_has_and_the_model_has_not_are_refused():
    recipe = recipe_of(PICTURES, modalities=["text"])
    with pytest.raises(ConfigError, match="model.modalities=.'text'. lack image"):
        plan_model(recipe.model, recipe.data)


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        ({}, "chameleon-7b"),
        ({"tokens_of_run": 40_000_000}, "chameleon-94m"),  # a token for each active parameter
        ({"tokens_of_run": 1}, "chameleon-37m"),  # the smallest, whatever there is
        ({"memory": 24e9}, "chameleon-443m"),  # 16 bytes of a parameter, in 7 tenths of it
        ({"flops": 1e9, "tokens_of_step": 200}, "chameleon-37m"),  # 10 s a step
    ],
)
def test_the_largest_size_that_memory_time_and_tokens_allow_is_taken(limits, size):
    recipe = recipe_of(PICTURES)
    budget = replace(PLENTY, **limits)
    plan = plan_model(recipe.model, recipe.data, budget=budget)
    config = plan.config
    assert {name: getattr(config, name) for name in SIZES[size]} == SIZES[size]
    assert {name: getattr(plan.model, name) for name in SIZES[size]} == SIZES[size]
    assert not leaves_size_open(plan.model) and leaves_size_open(recipe.model)
    assert f"{SIZES[size]['hidden_size']} wide" in describe_choice(config, budget)
    assert "model.preset" in describe_choice(config, budget)


def test_the_resolved_recipe_makes_the_same_model():
    recipe = recipe_of(PICTURES)
    first = plan_model(recipe.model, recipe.data, budget=PLENTY)
    again = plan_model(first.model, first.data, budget=replace(PLENTY, tokens_of_run=1))
    assert first.config.to_dict() == again.config.to_dict()


@pytest.mark.parametrize("fields", [{"hidden_size": 512}, {"preset": "chameleon-37m"}, {"init_from": "x"}])
def test_a_recipe_that_names_a_size_keeps_it(fields):
    assert not leaves_size_open(ModelConfig(**fields))


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"memory": 1e6}, "parameters with what the optimizer keeps"),
        ({"tokens_of_forward": 10**14}, "train.rows x data.row_length"),
        ({"tokens_of_step": 10**14}, "train.rows x train.accumulation x data.row_length"),
    ],
)
def test_what_no_memory_holds_is_refused_before_it_is_made(limits, named):
    recipe = recipe_of(PICTURES, hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=re.escape(named)):
        plan_model(recipe.model, recipe.data, budget=replace(PLENTY, **limits))


def test_a_recipe_gives_towers_sizes_of_their_own():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "gated_mlp": False}
    recipe = recipe_of(PICTURES, **sizes, tower_configs={"image": {"hidden_size": 24}}, hidden_act="relu2")
    config = plan_model(recipe.model, recipe.data).config
    assert config.tower_widths == {"text": 32, "image": 24, "speech": 32}
    assert config.tower_config("image").hidden_act == "relu2" and not config.tower_config("image").gated_mlp
    assert not leaves_size_open(recipe_of(PICTURES, tower_configs={"image": {"hidden_size": 24}}).model)
    for towers, message in (
        ({"picture": {}}, "model: unknown tower of tower_configs picture; known are image"),
        ({"image": {"hidden_size": 0}}, "hidden_size.*=0 must be at least 1"),
    ):
        recipe = recipe_of(PICTURES, **sizes, tower_configs=towers)
        with pytest.raises(ConfigError, match=message):
            plan_model(recipe.model, recipe.data)


def test_every_recipe_of_the_project_names_its_size():
    assert not any(leaves_size_open(load(Recipe, path).model) for path in CONFIGS.glob("*.yaml"))


def test_a_picture_longer_than_a_row_is_refused_before_anything_is_encoded():
    recipe = load(Recipe, CONFIGS / "transfusion-emoji.yaml", ["model.transfusion.image_size=[100000, 100000]"])
    with pytest.raises(ConfigError, match="image_size"):
        plan_model(recipe.model, recipe.data)


def test_a_recipe_takes_chameleons_options_whole():
    recipe = recipe_of(PICTURES, preset="chameleon-37m", style="chameleon-7b")
    planned = plan_model(recipe.model, recipe.data).config
    found = (planned.qk_norm, planned.norm_position, planned.hidden_dropout, planned.z_loss_coefficient)
    assert found == ("layer", "pre", 0.1, 1e-5)
    recipe = recipe_of(PICTURES, preset="chameleon-37m", style="chameleon-34b", z_loss_coefficient=0)
    with pytest.raises(ConfigError, match="style='chameleon-34b' has z_loss_coefficient=1e-05"):
        plan_model(recipe.model, recipe.data)
    with pytest.raises(ConfigError, match="model.style='chameleon-7b'.*model.init_from='somewhere'"):
        recipe_of(PICTURES, init_from="somewhere", style="chameleon-7b")
