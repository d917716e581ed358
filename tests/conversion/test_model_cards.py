"""Model cards say what the files say, nothing else, and what they tell to type works."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard, EvalResult, ModelCard
from PIL import Image

from conversion.card import main, write_card
from conversion.key_maps import ConversionError
from conversion.upcycle import main as upcycle
from model_cards.card import is_generated, model_card
from modeling_mot import MoTForCausalLM, MoTTransfusionConfig
from tests.conversion.sources import save_source
from tests.modeling_mot.naive_transfusion import VAE, tiny_model
from tests.modeling_mot.test_continuous_processor import build_continuous
from tests.modeling_mot.test_processor import build_processor
from training.config import flatten, to_tree
from training.data.config import carried_path
from training.data.reading.sources import data_cards
from training.plan.parameters import meta_model
from training.train import load_recipe


ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ("emoji", "transfusion-emoji")
CONFIG = {
    "model": {"variant": "mot"},
    "data": {
        "row_length": 10,
        "sources": [
            {"name": "pets", "path": "/home/someone/pets", "split": "train", "weight": 3.0, "templates": []},
            {"name": "hubs", "path": "someone/names", "split": "train", "weight": 1.0, "templates": [], "limit": 7},
        ],
        "validation_sources": [],
    },
    "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2, "weight_decay": 0.1},
    "train": {"steps": 3, "rows": 2, "accumulation": 1, "ema_decay": 0.9},
}
SUMMARY = {
    "step": 3,
    "training": {"loss_text": 1.5, "loss_image": 2.0},
    "held_out": {"eval/loss_text": 1.6, "eval/loss_image": 4.0, "eval/text-to-image/loss": 4.25},
    "note": None,
    "training_seconds": 6.0,
    "tokens_per_second": 15.0,
    "mfu": 0.25,
    "samples": {"gallery_size": 9, "drawn": 4, "drawn_right": 0.75, "held_out_drawn": 2, "held_out_drawn_right": 0.5},
}


def metrics_row(step, **more):
    return {"step": step, "loss_text": 3.0, "flops": 1e12, "tokens_per_second": 10.0, "step_seconds": 2.0, **more}


@pytest.fixture
def run(tmp_path, tiny_model):
    """A finished run of three steps, the second of which was done twice."""
    folder = tmp_path / "pets-run"
    tiny_model().save_pretrained(folder / "final")
    rows = [
        metrics_row(1),
        metrics_row(2, flops=5e12),
        metrics_row(2),
        {"step": 2, "eval/loss_text": 2.5},
        metrics_row(3),
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "los')
    manifest = {
        "config": CONFIG,
        "data_cards": {"/home/someone/pets": {"license": "cc-by-4.0", "language": "en", "attribution": "By someone."}},
        "forward_flops_per_token": {"text": 2_000_000, "image": 2_000_000, "speech": 2_000_000},
    }
    for name, tree in (("manifest.json", manifest), ("summary.json", SUMMARY)):
        (folder / name).write_text(json.dumps(tree))
    for name in ("samples.png", "losses.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    return folder


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------- published


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cards_are_what_their_files_make(name):
    """`python -m conversion.card model_cards/NAME --output model_cards/NAME/README.md` writes them."""
    text = (ROOT / "model_cards" / name / "README.md").read_text(encoding="utf-8")
    assert is_generated(text)
    assert text == str(model_card(ROOT / "model_cards" / name, ROOT / "model_cards" / name))
    for picture in re.findall(r"!\[[^\]]*\]\((.*?)\)", text):
        assert (ROOT / "model_cards" / name / picture).is_file()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_facts_are_those_of_the_recipe(name):
    manifest = json.loads((ROOT / "model_cards" / name / "manifest.json").read_text())
    recipe = load_recipe([str(ROOT / "training" / "configs" / f"{name}.yaml")])
    resolved, written = flatten(json.loads(json.dumps(to_tree(recipe)))), flatten(manifest["config"])
    del written["model.attn_implementation"]  # the Transfusion run was made when the recipe still chose one
    # Keys that came later are not in it.
    assert written == {key: _as_written(resolved[key], value) for key, value in written.items()}
    assert manifest["data_cards"] == data_cards(recipe.data)


def _as_written(value, written):
    """A value of a recipe without the keys that a manifest does not have."""
    if isinstance(value, list) and isinstance(written, list) and len(value) == len(written):
        return [_as_written(*pair) for pair in zip(value, written, strict=True)]
    if isinstance(value, dict) and isinstance(written, dict):
        return {key: _as_written(value[key], written[key]) for key in value if key in written}
    return value


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_are_those_of_the_model(name):
    folder = ROOT / "model_cards" / name
    kind = MoTTransfusionConfig if name.startswith("transfusion") else MoTForCausalLM.config_class
    model = meta_model(kind.from_pretrained(folder))
    total = sum(parameter.numel() for key, parameter in model.named_parameters() if not key.startswith("vae."))
    assert re.search(rf"\| total parameters[^|]* \| {total / 1e6:,.1f} M \|", (folder / "README.md").read_text())
    assert json.loads((folder / "manifest.json").read_text())["total_parameters"] == total


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_hub_reads_licence_and_results_from_the_head(name):
    data = ModelCard.load(ROOT / "model_cards" / name / "README.md").data
    carried = DatasetCard.load(carried_path() / "README.md").data
    assert (data.license, data.license_name) == (carried.license, carried.license_name)
    assert {"custom_code", "mixture-of-transformers"} <= set(data.tags) and data.library_name == "transformers"
    samples = json.loads((ROOT / "model_cards" / name / "summary.json").read_text())["samples"]
    found = {
        (result.task_type, result.metric_type, result.dataset_split == "train"): result.metric_value
        for result in data.eval_results
        if isinstance(result, EvalResult)
    }
    for key, measure, is_learnt in (
        (("text-to-image", "accuracy"), "drawn_right", True),
        (("text-to-image", "accuracy"), "held_out_drawn_right", False),
        (("image-to-text", "exact_match"), "read_right", True),
    ):
        assert found[(*key, is_learnt)] == pytest.approx(samples[measure], rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- a run


def test_a_run_that_draws_concepts_says_so(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["samples"]["drawn_same"] = 0.25
    (run / "summary.json").write_text(json.dumps(summary))
    card = model_card(run / "final", run).text
    assert "| pictures drawn from 4 learnt names whose nearest of 9 pictures shows what was named | 75.0% |" in card
    assert "| the same, where it must be the very picture | 25.0% |" in card


def test_figures_are_those_of_the_files(run):
    card = model_card(run / "final", run)
    for line in (
        "| text | 1.5 | 1.6 |",
        "| image | 2 | 4 |",
        "| tokens | 60 |",  # 3 x 10 a second x 2 s, the repeated step once
        "| training FLOPs | 3e+12 |",
        "| training time | 0.1 min |",
        "| weights | their moving average (0.9) |",
        "| pictures drawn from 4 learnt names whose nearest of 9 pictures is the named one | 75.0% |",
        "losses of image are far higher on held-out data",
        "| `hubs` | [someone/names](https://huggingface.co/datasets/someone/names) | train | the first 7 | 25% |",
        "By someone.",
        "![Losses over steps, training and held out](losses.png)",
    ):
        assert line in card.text
    assert card.data.datasets == ["someone/names"] and card.data.language == ["en"]
    assert {result.metric_value for result in card.data.eval_results} == {1.6, 4.0, 4.25, 0.75, 0.5}


def test_folders_of_a_machine_are_not_told(run):
    text = str(model_card(run / "final", run))
    assert "/home/someone" not in text and "`pets`" in text


def of_folders(run, monkeypatch, **summary):
    """The run as one on two local folders, one of which is read by its relative path; both are named as on the Hub."""
    start = run.parent / "start"
    (start / "my" / "pics_split").mkdir(parents=True)
    source = {"split": "train", "weight": 1.0, "templates": []}
    sources = [source | {"name": "pics", "path": "my/pics_split"}, source | {"name": "lines", "path": "my/lines.jsonl"}]
    data = CONFIG["data"] | {"sources": sources, "validation_sources": []}
    rewrite(run / "manifest.json", config=CONFIG | {"data": data}, data_cards={})
    rewrite(run / "summary.json", **summary)
    monkeypatch.chdir(start)


def test_local_folders_are_not_named_as_data_sets_of_the_hub(run, monkeypatch):
    of_folders(run, monkeypatch)
    card = model_card(run / "final", run)
    assert "datasets" not in card.data.to_dict()
    types = {result.dataset_type for result in card.data.eval_results}
    assert types == {"local files (my/pics_split) and local files (my/lines.jsonl)"}
    assert "| `pics` | local files, `my/pics_split` |" in card.text and "huggingface.co/datasets" not in card.text


def test_a_run_that_lies_where_its_recipe_says_finds_its_folders_from_anywhere(run, monkeypatch):
    of_folders(run, monkeypatch)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["train"] = CONFIG["train"] | {"output_dir": f"runs/{run.name}"}
    moved = shutil.copytree(run, run.parent / "start" / "runs" / run.name)
    (moved / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir("/")
    assert "datasets" not in model_card(moved / "final", moved).data.to_dict()


def test_a_short_run_has_its_last_losses_and_what_was_not_measured_is_said(run):
    rows = [metrics_row(step, tokens_text=4, tokens_image=0, loss_image=None) for step in (1, 2, 3)]
    rows[0] |= {"loss_image": 7.0, "tokens_image": 2}
    rows[2] |= {"loss_text": 5.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewrite(run / "summary.json", training={}, held_out={})
    text = model_card(run / "final", run).text
    assert "| text | 5 | not measured |" in text and "| image | 7 | not measured |" in text


def test_the_diffusion_validation_loss_is_one_result_without_its_levels(run):
    name = "eval/text-to-image/diffusion_validation_loss"
    rewrite(run / "summary.json", held_out=SUMMARY["held_out"] | {name: 0.5, f"{name}@250": 0.4, f"{name}@750": 0.6})
    card = model_card(run / "final", run)
    found = {(result.task_type, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found["text-to-image", "diffusion_validation_loss"] == 0.5 and found["text-to-image", "loss"] == 4.25
    assert not any("@" in metric for _, metric in found)


def test_no_section_leaves_two_blank_lines(run, monkeypatch):
    of_folders(run, monkeypatch, samples={}, training={"loss_text": 1.6}, held_out={"eval/loss_text": 1.6})
    for card in (model_card(run / "final", run), model_card(run / "final")):
        assert "\n\n\n" not in card.text and not re.search(r"\n\n\n|\S\n## ", card.content)


def test_the_example_draws_a_caption_that_the_run_was_trained_on(run):
    rewrite(run / "final" / "config.json", image_grid=[2, 3])
    names = run / "samples" / "names.tsv"
    names.parent.mkdir()
    names.write_text('name\tread off\tnearer\na "big" cat\tcat\t0\na dog\tdog\t0\n', encoding="utf-8")
    assert r"""caption = "a \"big\" cat"  # a caption that it was trained on""" in model_card(run / "final", run).text
    (run / "summary.json").unlink()  # the samples may be of another step
    assert 'caption = "umbrella"  # write a caption like those' in model_card(run / "final", run).text


def test_an_earlier_step_has_no_figures_of_the_last(run):
    card = model_card(run / "final", run, step=2, weights="trained")
    assert "| step | 2 of 3 |" in card.text and "| training FLOPs | 2e+12 |" in card.text
    assert "| weights | of the last step, no average |" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [2.5]
    assert "samples.png" not in card.text and "losses.png" not in card.text
    card.save(run / "final" / "README.md")
    # Another card of the folder remembers of what it is.
    assert model_card(run / "final", run).text == card.text


def test_what_no_file_tells_is_left_out(run):
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    card = model_card(run / "final", run)
    assert card.data.eval_results is None and "## Figures" not in card.text and "FLOPs |" not in card.text
    bare = model_card(run / "final")
    for heading in ("## Training", "## Data", "## Figures"):
        assert heading not in bare.text
    assert "license" not in bare.data.to_dict() and "| total parameters |" in bare.text


def test_licences_are_claimed_only_where_all_data_declare_one(run):
    assert "license" not in model_card(run / "final", run).data.to_dict()  # that of someone/names is not known here
    both = {"/home/someone/pets": {"license": "cc-by-4.0"}, "someone/names": {"license": "mit"}}
    rewrite(run / "manifest.json", data_cards=both)
    data = model_card(run / "final", run).data
    assert (data.license, data.license_name) == ("other", "cc-by-4.0-and-mit")
    both["someone/names"] = both["/home/someone/pets"]
    rewrite(run / "manifest.json", data_cards=both)
    assert model_card(run / "final", run).data.license == "cc-by-4.0"
    assert model_card(run / "final", run, license="mit", base_model="a/b").data.to_dict()["license"] == "mit"


def test_a_converted_model_names_what_it_was_made_of(tmp_path):
    save_source(tmp_path / "dense", "qwen3")
    words = ["--modalities", "text", "image", "--image-codes", "10", "--image-grid", "2", "3"]
    assert upcycle([str(tmp_path / "dense"), str(tmp_path / "made"), *words]) == 0
    card = model_card(tmp_path / "made")
    assert "Made from `dense` (qwen3) by\n`python -m conversion.upcycle`" in card.text
    assert "| tower image began as | copy |" in card.text and "base_model" not in card.data.to_dict()
    record = tmp_path / "made" / "conversion.json"
    rewrite(record, source="someone/dense", revision="0123abc")
    card = model_card(tmp_path / "made")
    assert card.data.base_model == "someone/dense" and "revision `0123abc`" in card.text


def test_damaged_files_and_other_models_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        model_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type='llama'"):
        model_card(tmp_path)
    (run / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json cannot be read"):
        model_card(run / "final", run)


# ------------------------------------------------------------------------------------------------- what it says to type


def example(card):
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]


def test_the_example_of_tokens_runs(tmp_path, tiny_config, monkeypatch, capsys):
    processor = build_processor()
    MoTForCausalLM(tiny_config(**processor.config_kwargs())).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(example(model_card(tmp_path)), {})
    assert "'image': <PIL.Image" in capsys.readouterr().out


def test_the_example_of_diffusion_runs(tmp_path, monkeypatch):
    processor = build_continuous(image_size=[8, 8], downsampling=4)
    model = tiny_model(**({"vae_config": VAE, "noise_schedule": "linear"} | processor.config_kwargs()))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {"samples": {"num_inference_steps": 2}}}))
    monkeypatch.chdir(tmp_path)
    exec(example(model_card(tmp_path, tmp_path)), {})
    assert np.asarray(Image.open("drawn.png")).shape == (8, 8, 3)


def test_the_example_from_the_hub_pins_a_revision(run):
    text = model_card(run / "final", run, repo="someone/pets").text
    assert text.count("revision=revision, trust_remote_code=True") == 2 and "the commit that you have read" in text
    assert (
        'repo, revision = "someone/pets", "0123abc"'
        in model_card(run / "final", repo="someone/pets", revision="0123abc").text
    )


# -------------------------------------------------------------------------------------------------------- the command


def test_a_card_is_written_with_its_pictures_and_one_that_was_changed_is_kept(run, tmp_path, capsys):
    output = tmp_path / "published" / "README.md"
    output.parent.mkdir()
    assert main([str(run), "--repo", "someone/pets", "--output", str(output)]) == 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["README.md", "losses.png", "samples.png"]
    assert main([str(run), "--output", str(output)]) == 0  # nobody has changed it
    output.write_text(output.read_text().replace("For research", "For pets"))
    assert main([str(run), "--output", str(output)]) == 2
    assert "changed by hand" in capsys.readouterr().err and "For pets" in output.read_text()
    assert main([str(run), "--output", str(output), "--overwrite"]) == 0
    assert is_generated(output.read_text())


def test_the_command_finds_the_run_of_a_checkpoint(run, tmp_path, capsys):
    assert main([str(run / "final")]) == 0
    assert "## Training" in capsys.readouterr().out
    shutil.copytree(run / "final", tmp_path / "elsewhere" / "deep" / "model")
    assert main([str(tmp_path / "elsewhere" / "deep" / "model")]) == 0
    assert "## Training" not in capsys.readouterr().out
    assert main([str(tmp_path / "elsewhere")]) == 2
    assert "neither config.json nor final/config.json" in capsys.readouterr().err


def test_cards_that_somebody_wrote_are_not_overwritten(run):
    (run / "final" / "README.md").write_text("# Mine\n")
    with pytest.raises(ConversionError, match="--overwrite"):
        write_card(run / "final", run, run / "final" / "README.md")
