"""The recipes of the paper's tables: sizes, modalities, tokens, steps, shares and pictures are the paper's."""

import json
import shlex
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from conversion import import_chameleon
from tests.conversion import chameleon_sources
from training import prepare, train
from training.config import ConfigError
from training.data import RowStream
from training.data.config import carried_path
from training.data.rows import prepare_sources
from training.model.building import check_image_codes, load_processor, plan_model
from training.plan import __main__ as plan
from training.recipe import check_decoder
from training.tokenizers import image as image_command
from training.tokenizers import processor as processor_command
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
        "bagel-finetune", "emoji", "smoke", "transfusion-edit", "transfusion-emoji",
    }  # fmt: skip


def test_a_preset_lacks_no_modality_of_the_data():
    speech = recipe_of("chameleon-speech-443m").data
    model = recipe_of("chameleon-443m").model
    with pytest.raises(ConfigError, match="model.preset='chameleon-443m' has text, image, but data has speech as well"):
        plan_model(model, speech)
    wider = replace(model, modalities=["text", "image", "speech"])
    assert list(plan_model(wider, speech).config.modalities) == ["text", "image", "speech"]


# ------------------------------------------------------------------------------------------------- shares of the tokens


@pytest.mark.parametrize("name", TABLES)
def test_a_recipe_states_the_papers_shares(name):
    """Sections 3.2.1 and 3.4.1: half and half. Section 3.3.1: a seventh is speech data, with Table 2's tokens."""
    speech, text = 1.2 + 1.6 + 4 + 3.2 + 4.2, 0.5 + 0.7
    expected = {"text": 0.5, "image": 0.5}
    if "speech" in name:
        part = 1 / 7 / (speech + text)
        expected = {"text": 3 / 7 + part * text, "image": 3 / 7, "speech": part * speech}
    assert recipe_of(name).data.token_shares == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["chameleon-37m", "chameleon-speech-443m", "transfusion-163m"])
def test_the_rows_that_are_drawn_reach_the_shares(tmp_path, name):
    words = [f"data.cache_dir={tmp_path}", "data.row_length=512", "data.latents=on_the_fly"]
    limits = [64, 512, 64][: 3 if "speech" in name else 2]
    recipe = recipe_of(name, *words, *(f"data.sources.{place}.limit={limit}" for place, limit in enumerate(limits)))
    planned = plan_model(recipe.model, recipe.data)
    stream = RowStream(planned.data, prepare_sources(planned.data, planned.processor))
    counts = np.zeros(len(planned.config.modalities))
    for row in islice(stream.rows(), 120):
        counts += np.bincount(row["modality_ids"][row["document_ids"] >= 0], minlength=len(counts))
    found = dict(zip(planned.config.modalities, counts / counts.sum(), strict=True))
    assert found == pytest.approx(recipe.data.token_shares, abs=0.02)


@pytest.mark.parametrize(
    ("name", "tokens_of_a_picture"),
    [("chameleon-37m", 1024), ("chameleon-speech-443m", 1024), ("transfusion-163m", 256)],
)
def test_a_plan_says_what_a_row_holds_and_spends_the_tokens_so(tmp_path, capsys, name, tokens_of_a_picture):
    words = [str(CONFIGS / f"{name}.yaml"), "model.num_hidden_layers=1"]
    assert plan.main([*words, "--json", str(tmp_path / "plan.json")]) == 0
    batch = json.loads((tmp_path / "plan.json").read_text())["batch"]
    shares, tokens = recipe_of(name).data.token_shares, batch["tokens_of_a_micro_batch"]
    assert batch["shares"] == pytest.approx(shares, abs=1e-4) and batch["tokens_of_a_picture"] == tokens_of_a_picture
    assert {key: count / sum(tokens.values()) for key, count in tokens.items()} == batch["shares"]
    pictures = 4096 * shares["image"] / tokens_of_a_picture
    shown = capsys.readouterr().out
    assert f"{pictures:.1f} pictures of {tokens_of_a_picture:,} tokens" in shown and "(data.token_shares)" in shown
    assert plan.main([*words, "data.token_shares=null"]) == 0
    assert "taken as equal" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- pictures as codes

OF_CODES = [name for name in TABLES if not name.startswith("transfusion")]


def commands_of(name: str) -> list[list[str]]:
    """The commands that a recipe's first lines give for a processor, as words behind `python -m`."""
    head = (CONFIGS / f"{name}.yaml").read_text().partition("\nmodel:")[0].replace(" \\\n#  ", "")
    return [shlex.split(line[1:])[2:] for line in head.splitlines() if line.startswith("#   python -m")]


@pytest.mark.parametrize("name", OF_CODES)
def test_a_recipe_of_codes_refuses_pictures_that_are_not_the_papers(name):
    model = recipe_of(name).model
    assert (model.image_tokens, model.image_size) == (1024, [512, 512])
    processor = load_processor(model)
    with pytest.raises(
        ConfigError, match="model.image_tokens=1024, but the carried processor makes 64 tokens of 64 x 64"
    ):
        check_image_codes(model, processor)
    with pytest.raises(ConfigError) as refused:
        check_image_codes(replace(model, image_tokens=64), processor)
    assert str(refused.value).startswith("model.image_size=[512, 512], but ")
    for command in commands_of("chameleon-speech-7b")[:2]:
        assert " ".join(command) in str(refused.value)
    check_image_codes(recipe_of(name, "model.image_tokens=64", "model.image_size=[64,64]").model, processor)
    check_image_codes(recipe_of(name, "model.image_tokens=null", "model.image_size=null").model, processor)


def test_the_refusal_comes_before_data_are_tokenised(tmp_path, capsys):
    words = [str(CONFIGS / "chameleon-37m.yaml"), f"data.cache_dir={tmp_path / 'cache'}"]
    assert prepare.main([*words, "--workers", "1"]) == 2
    assert "model.image_tokens=1024" in capsys.readouterr().err
    words += ["train.tokens_per_step=null", "train.cpu=true", f"train.output_dir={tmp_path / 'run'}"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.main([*words, "model.num_hidden_layers=1", "train.rows=1"]) == 2
    assert "model.image_tokens=1024" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_pictures_that_are_diffused_have_no_number_of_codes():
    with pytest.raises(ConfigError, match="model.image_tokens=64 is of pictures that are codes"):
        recipe_of("transfusion-163m", "model.image_tokens=64")


def test_all_recipes_of_codes_name_the_same_commands():
    for name in OF_CODES:
        assert commands_of(name) == commands_of("chameleon-speech-7b" if "speech" in name else "chameleon-37m")


@pytest.mark.parametrize("name", ["chameleon-37m", "chameleon-speech-443m"])
def test_the_named_commands_make_a_processor_that_the_recipe_takes(tmp_path, monkeypatch, name):
    """The tokenizer is small and not trained; its pictures are those of the named preset."""
    image, assemble, _ = commands_of(name)
    assert [image[0], assemble[0]] == ["training.tokenizers.image", "training.tokenizers.processor"]
    place = {"PICTURES": f"{carried_path()}:emoji:train", "runs/image": str(tmp_path / "image")}
    place |= {"runs/processor": str(tmp_path / "processor")}
    monkeypatch.chdir(CONFIGS.parents[1])
    small = "--channels 32 32 32 --patch-size 4 --latent-channels 4 --code-dim 4 --steps 1 --batch-size 1 --limit 2"
    image_command.main([*(place.get(word, word) for word in image[1:]), *small.split()])
    processor_command.main([place.get(word, word) for word in assemble[1:]])

    recipe = recipe_of(name, f"model.processor={tmp_path / 'processor'}")
    planned = plan_model(recipe.model, recipe.data)
    check_image_codes(recipe.model, planned.processor)
    check_decoder(planned.processor, recipe.samples)
    codes, ids = planned.processor.image_tokenizer, load_processor(recipe_of("smoke").model)
    assert (codes.num_codes, codes.image_grid, planned.config.vocab_size) == (8192, [32, 32], 65536)
    assert planned.processor.tokenizer("a red apple").input_ids == ids.tokenizer("a red apple").input_ids
    picture = planned.processor.encode_images([np.zeros((64, 64, 3), np.uint8)])[0]
    assert len(picture) == 1024 + 2


@pytest.mark.parametrize("name", ["chameleon-37m", "chameleon-speech-443m"])
def test_an_imported_chameleon_is_a_processor_for_the_recipe(tmp_path, monkeypatch, name):
    """The real one has 1,024 codes of 512 pixels; the tests' has 16 pixels, so it is refused by its size alone."""
    _, _, words = commands_of(name)
    chameleon_sources.save_source(
        chameleon_sources.chameleon_model(**chameleon_sources.LAYOUTS["7b"]), tmp_path / "source"
    )
    place = {"facebook/chameleon-7b": str(tmp_path / "source"), "runs/chameleon": str(tmp_path / "made")}
    monkeypatch.chdir(CONFIGS.parents[1])
    assert words[0] == "conversion.import_chameleon"
    assert import_chameleon.main([place.get(word, word) for word in words[1:]]) == 0

    recipe = recipe_of(name, f"model.processor={tmp_path / 'made'}")
    planned = plan_model(recipe.model, recipe.data)
    with pytest.raises(ConfigError, match="made makes [0-9]+ tokens of 16 x 16 pixels"):
        check_image_codes(recipe.model, planned.processor)
    grid = planned.processor.image_tokenizer.image_grid
    check_image_codes(replace(recipe.model, image_tokens=grid[0] * grid[1], image_size=[16, 16]), planned.processor)
    # It has no decoder, as the recipe says.
    with pytest.raises(ConfigError, match="samples.enabled=true, but the processor's image tokenizer has no decoder"):
        check_decoder(planned.processor, recipe.samples)
    head = (CONFIGS / f"{name}.yaml").read_text().partition("\nmodel:")[0]
    assert "without a decoder" in head and "set samples.enabled=false" in head
    check_decoder(planned.processor, recipe_of(name, "samples.enabled=false").samples)
