"""`python -m training.evaluate`: its figures, its folder, its refusals, and what cards take up."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from model_cards.card import evaluation_results, model_card
from modeling_mot import MoTProcessor
from training.data import DataConfig, SourceConfig, TemplateConfig
from training.data.reading.records import Limits
from training.data.rows import prepare_held_out
from training.evaluate import main
from training.evaluation.tasks import QUALITY, records_of
from training.model.building import CARRIED_PROCESSOR, build_model, plan_model
from training.recipe import ModelConfig, SamplesConfig

from .data.conftest import png
from .ranks import lost, start_ranks


def source_of(name: str, config: str, limit: int, *segments: list[str]) -> dict:
    templates = [{"segments": one} for one in segments]
    return {"name": name, "path": "carried", "config": config, "split": "validation", "limit": limit} | {
        "templates": templates
    }


HELD_OUT = [
    source_of("emoji", "emoji", 5, ["text:name", "image:image"]),
    source_of("more emoji", "emoji", 3, ["text:name", "image:image"]),
    source_of("definitions", "definitions", 8, ["text:{word}: {definition}"]),
]
# Settings with which a picture costs little.
QUICK = ["train.cpu=true", "train.precision=float32", "samples.gallery=8", "train.progress_bar=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an untrained model and its processor, and a file that holds `data:` alone."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = {"row_length": 128, "cache_dir": str(folder / "cache"), "validation_sources": HELD_OUT}
    tree = {"data": data, "evaluation": {"rows": 6, "batch_rows": 2}, "samples": {"held_out": 2, "max_text_tokens": 3}}
    (folder / "data.yaml").write_text(yaml.safe_dump(tree))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = ModelConfig(modalities=["text", "image"], **sizes)
    planned = plan_model(settings, DataConfig(128))
    build_model(settings, planned.config, 0, None, None).save_pretrained(folder / "model")
    planned.processor.save_pretrained(folder / "model")
    return folder


def evaluate(place: Path, *words: str, model: str = "model") -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main([str(place / model), "--data", str(place / "data.yaml"), *QUICK, *words])


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def done(place):
    assert evaluate(place, "--out", str(place / "done")) == 0
    return place / "done"


# --------------------------------------------------------------------------------------------------------- the figures


def test_losses_and_perplexities_are_those_of_a_naive_recomputation(place, done):
    from training.model.building import load_model

    tasks = results_of(done)["tasks"]
    processor = MoTProcessor.from_pretrained(place / "model")
    tree = yaml.safe_load((place / "data.yaml").read_text())["data"]
    sources = [
        SourceConfig(**(one | {"templates": [TemplateConfig(**template) for template in one["templates"]]}))
        for one in tree["validation_sources"]
    ]
    data = DataConfig(128, validation_sources=sources, cache_dir=tree["cache_dir"])
    model = load_model(str(place / "model")).eval()
    for name, rows in prepare_held_out(data, processor, 6).items():
        losses = []
        for row in rows:
            inputs = ("input_ids", "modality_ids", "position_ids", "document_ids")
            with torch.no_grad():
                logits = model(**{key: torch.from_numpy(row[key])[None] for key in inputs}).logits[0].log_softmax(-1)
            target = {"image": 1}.get(name.rpartition("-to-")[2], 0)
            losses += [
                -logits[place - 1, label].item()
                for place, label in enumerate(row["labels"])
                if label != -100 and row["modality_ids"][place] == target
            ]
        mean = sum(losses) / len(losses)
        assert tasks["loss"]["figures"][f"eval/{name}/loss"] == pytest.approx(mean, rel=1e-5)
        assert tasks["perplexity"]["figures"][f"eval/{name}/perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)


def test_the_folder_has_results_a_page_and_what_was_left_out(done, place):
    results = results_of(done)
    assert {"loss", "perplexity", "retrieval", "psnr"} <= set(results["tasks"])
    assert "diffuses" in results["left_out"]["diffusion"] and "speech" in results["left_out"]["speech"]
    assert results["tasks"]["loss"]["settings"]["rows"] == 6 and results["world"]["processes"] == 1
    assert results["tasks"]["retrieval"]["figures"]["held_out_drawn"] == 2
    assert results["tasks"]["psnr"]["figures"]["held_out_drawn_psnr"] > 0
    page = (done / "results.html").read_text()
    assert "eval/more emoji/text-to-image/loss" in page and page.count("data:image/png;base64") >= 3
    assert not list(done.glob("*.tmp")) and (done / "samples.html").is_file()


def test_results_name_data_set_task_and_metric(done):
    found = results_of(done)["results"]
    losses = {r["metric_name"]: r for r in found if r["metric_type"] == "loss" and r["task_type"] == "text-to-image"}
    assert set(losses) == {f"held-out loss, text-to-image of {name}" for name in ("emoji", "more emoji")}
    assert {r["dataset_split"] for r in found} == {"validation"}
    assert {"loss", "perplexity", "accuracy", "psnr"} <= {r["metric_type"] for r in found}


def test_two_processes_find_what_one_finds(place, done):
    for attempt in range(2):
        words = ["--data", str(place / "data.yaml"), *QUICK, "--out", str(place / f"two {attempt}")]
        ranks = start_ranks("training.evaluate", [str(place / "model"), *words], fsdp=False)
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
        if attempt or not lost(outputs):
            break
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    one, two = results_of(done), results_of(place / f"two {attempt}")
    assert two["world"]["processes"] == 2 and two["tasks"].keys() == one["tasks"].keys()
    for task in one["tasks"]:
        found, expected = (of["tasks"][task]["figures"] for of in (two, one))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # A kernel distance is a difference of float32 sums near 1, and threads change their order.
            assert found[key] == (pytest.approx(value, rel=1e-5, abs=1e-7) if isinstance(value, float) else value), key


# -------------------------------------------------------------------------------------------------------- the refusals


def refused(place, capsys, *words: str, model: str = "model") -> str:
    out = place / "refused"
    assert evaluate(place, "--out", str(out), *words, model=model) == 2
    assert not out.exists()
    return capsys.readouterr().err


def test_a_model_that_diffuses_has_the_loss_of_its_training(place, tmp_path):
    from training.train import main as train

    picture = {"image_size": [64, 64], "unet_channels": [8, 16], "unet_layers": 1, "unet_norm_groups": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tree = yaml.safe_load((place / "data.yaml").read_text())
    tree["data"] |= {"row_length": 512, "sources": HELD_OUT[:1], "cache_dir": str(place / "latents")}
    tree |= {"model": sizes | {"transfusion": picture}, "train": {"steps": 1, "rows": 1, "progress_bar": False}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    words = ["train.cpu=true", "train.precision=float32"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (
        train([str(tmp_path / "recipe.yaml"), *words, f"train.output_dir={tmp_path}/run", "samples.enabled=false"]) == 0
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path / "run" / "evaluation"
    arguments = [str(tmp_path / "run" / "final"), "--data", str(tmp_path / "recipe.yaml"), *words, "--out", str(out)]
    assert main([*arguments, "--tasks", "loss,diffusion"]) == 0

    # At the end of training, and in the evaluation of what training saved.
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    figures = {task: one["figures"] for task, one in results_of(out)["tasks"].items()}
    assert figures["loss"] == pytest.approx(summary["held_out"], rel=1e-6)
    keys = {f"eval/{name}/text-to-image/loss" for name in ("emoji", "more emoji")} | {"eval/loss_image_diffusion"}
    keys |= {key for key in figures["loss"] if "/diffusion_validation_loss" in key}
    assert figures["diffusion"] == {key: figures["loss"][key] for key in keys}
    assert {"eval/more emoji/text-to-image/diffusion_validation_loss@62"} < keys


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "loss,psrn"], "there is no task 'psrn'; the tasks are loss"),
        (["--tasks", "diffusion"], "task diffusion: no held-out source has a direction to pictures"),
        (["--tasks", "speech"], "task speech: "),
        (
            [
                "--tasks",
                "features",
                "data.validation_sources.0.templates.0.segments=[text:name]",
                "data.validation_sources.1.templates.0.segments=[text:name]",
            ],
            "task features: no held-out source has",
        ),
        (["data.validation_sources=[]"], "data.validation_sources is empty"),
        (["data=null"], "has no section data:"),
        (["data.row_length=16"], "row_length=16 is shorter than"),
        (["--processor", "nowhere"], "no processor could be loaded"),
        (["evaluation.row=3"], "evaluation.row"),
        (
            ["--tasks", "loss,perplexity", "evaluation.rows=0"],
            "evaluation.rows is 0; task perplexity: evaluation.rows is",
        ),
        (
            ["data.validation_sources.0.templates.0.segments=[text:name, audio:audio]"],
            "'emoji' has speech, but the model has text, image alone; leave the source or the template out",
        ),
        (["--tasks", "retrieval", "samples.held_out_names=[nobody]"], "samples.held_out_names has 'nobody', which no"),
        (["--tasks", ","], "no task is named; the tasks are loss"),
        (["--tasks", "pictures", "--clip", "/no/clip"], "task pictures: clip='/no/clip' cannot be loaded"),
        (["--tasks", "pictures", "--feature-network", "/no/net"], "feature_network='/no/net' cannot be loaded"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(place, capsys, words, message):
    assert message in refused(place, capsys, *words)


def test_a_model_without_its_processor_or_with_another_is_refused(place, capsys):
    import shutil

    bare = place / "bare"
    shutil.copytree(place / "model", bare, ignore=lambda _, names: [n for n in names if "token" in n or "process" in n])
    assert "name one with --processor" in refused(place, capsys, model="bare")
    assert "vocab" in refused(place, capsys, "--processor", str(CARRIED_PROCESSOR)).lower()


def test_a_model_that_is_no_folder_is_refused_as_such(place, capsys):
    message = refused(place, capsys, model="mode")
    assert "mode' is no model" in message and "--processor" not in message


def test_a_folder_without_a_model_is_refused_with_the_place_of_one(place, capsys):
    (place / "run" / "final").mkdir(parents=True)
    (place / "elsewhere").mkdir()
    assert f"give {place / 'run' / 'final'}, the model of this run" in refused(place, capsys, model="run")
    assert "give a folder such as RUN/final, or a Hub name" in refused(place, capsys, model="elsewhere")


def test_results_are_not_replaced_unasked(place, done, capsys):
    before = (done / "results.json").read_bytes()
    assert evaluate(place, "--out", str(done)) == 2
    assert "--overwrite" in capsys.readouterr().err and (done / "results.json").read_bytes() == before
    again = place / "again"
    for words in ([], ["--overwrite"]):
        (again / "captions.jsonl").write_text("{}") if words else None
        assert evaluate(place, "--out", str(again), "--tasks", "loss", *words) == 0
    assert list(results_of(again)["tasks"]) == ["loss"] and not (again / "captions.jsonl").exists()


# ------------------------------------------------------------------------------------- captions and pictures, by a fake


@dataclass
class Settings:
    """The options of a made-up `training.evaluation.quality`."""

    samples: int = 4
    guidance: float = 3.0

    def described(self):
        return vars(self)

    def of_sampler(self):
        return SamplesConfig()


@pytest.fixture
def quality(monkeypatch):
    """A made-up `training.evaluation.quality` that counts what it is given; pictures fail."""

    def count(model, processor, records, settings, progress=None):
        figures = {"cider": float(len(records)), "samples": len(records)}
        texts = [{"caption": "ein Café", "references": record["texts"]} for record in records]
        return figures | {"left_out": {"spice": "no Java"}, "settings": settings.described(), "texts": texts}

    def fail(*_, **__):
        raise RuntimeError("out of paint")

    def features(model, processor, records, out, progress=None):
        Image.new("RGB", (8, 8)).save(out)
        return {"records": len(records), "settings": {"seed": 0}}

    fake = SimpleNamespace(
        QualitySettings=Settings,
        caption_quality=count,
        picture_quality=fail,
        speech_quality=fail,
        feature_space=features,
    )
    import training.evaluation

    monkeypatch.setitem(sys.modules, QUALITY, fake)
    monkeypatch.setattr(training.evaluation, "quality", fake, raising=False)


def test_a_task_that_fails_leaves_the_others_their_results(place, quality, capsys):
    out = place / "quality"
    assert evaluate(place, "--out", str(out), "--tasks", "pictures,loss,captions,features", "--samples", "2") == 1
    tasks = results_of(out)["tasks"]
    assert list(tasks) == ["loss", "captions", "pictures", "features"]
    assert (
        tasks["captions"]["figures"]["emoji/cider"] == 2.0 and tasks["captions"]["figures"]["more emoji/cider"] == 2.0
    )
    assert tasks["captions"]["settings"] == {"samples": 2, "guidance": 1.0}
    assert tasks["captions"]["left_out"] == {"emoji/spice": "no Java", "more emoji/spice": "no Java"}
    assert tasks["pictures"]["failed"] == [
        "emoji: RuntimeError: out of paint",
        "more emoji: RuntimeError: out of paint",
    ]
    assert tasks["features"]["figures"] == {"records": 3} and tasks["features"]["settings"] == {"seed": 0}
    assert "Hidden states" in (out / "results.html").read_text()
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["source"] for line in lines] == ["emoji"] * 2 + ["more emoji"] * 2
    assert lines[0]["caption"] == "ein Café" and lines[0]["references"] and "texts" not in tasks["captions"]
    printed = capsys.readouterr().err
    assert "pictures failed: emoji: RuntimeError: out of paint" in printed
    assert "captions has no emoji/spice: no Java" in printed
    found = [r for r in results_of(out)["results"] if r["metric_type"] == "cider"]
    assert [r["task_type"] for r in found] == ["image-to-text"] * 2


def test_an_interruption_leaves_the_results_and_the_page_of_what_was_done(place, quality, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[QUALITY], "picture_quality", interrupt)
    out = place / "interrupted"
    assert evaluate(place, "--out", str(out), "--tasks", "loss,captions,pictures", "--samples", "2") == 130
    assert list(results_of(out)["tasks"]) == ["loss", "captions"]
    assert "emoji/cider" in (out / "results.html").read_text()
    printed = capsys.readouterr().err
    assert f"wrote {out / 'results.html'}" in printed and "ended by SIGINT" in printed


def test_the_screen_has_figures_and_settings_within_80_columns(place, quality, capsys):
    assert evaluate(place, "--out", str(place / "screen"), "--tasks", "loss,captions,pictures", "--samples", "2") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if str(place) not in line]
    table = lines[lines.index("loss: held-out losses by modality, and by data set and direction") :]
    assert max(map(len, table)) <= 80
    assert "  settings: rows 6, batch_rows 2, noise_levels 8" in table and "  settings: samples 2, guidance 1" in table


def test_records_that_cannot_be_decoded_are_left_out_as_the_source_says(tmp_path):
    for name, content in (("a", png("red")), ("b", png("red")[:40]), ("c", png("blue"))):
        (tmp_path / f"{name}.png").write_bytes(content)
    lines = [("a.png", "one"), ("b.png", "two"), ("b.png", "three"), ("c.png", "four")]
    text = "".join(json.dumps({"image": file, "caption": caption}) + "\n" for file, caption in lines)
    (tmp_path / "records.jsonl").write_text(text)
    source = SourceConfig("r", str(tmp_path / "records.jsonl"), [TemplateConfig(["text:caption", "image:image"])])
    with pytest.raises(ValueError, match="record 1"):
        list(records_of(source, "image", Limits()))
    source.on_error = "skip"
    found = list(records_of(source, "image", Limits()))
    assert [record["texts"] for record in found] == [["one"], ["four"]]
    assert [record["image"].getpixel((0, 0)) for record in found] == [(255, 0, 0), (0, 0, 255)]


def test_records_with_the_same_picture_have_several_references(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png("red"))
    lines = [("a.png", "one"), ("a.png", "two"), ("b.png", ["three", "four"])]
    text = "".join(json.dumps({"image": file, "caption": caption}) + "\n" for file, caption in lines)
    (tmp_path / "records.jsonl").write_text(text)
    source = SourceConfig("r", str(tmp_path / "records.jsonl"), [TemplateConfig(["text:caption", "image:image"])])
    found = list(records_of(source, "image", Limits()))
    assert [record["texts"] for record in found] == [["one", "two"], ["three", "four"]]
    assert found[0]["image"].size == (8, 8) and found[0]["audio"] is None


# ----------------------------------------------------------------------------------------------------------- the cards


def test_the_card_takes_up_the_results_of_its_weights(place, done):
    card = model_card(place / "model", evaluation=done)
    by_name = {result.metric_name: result.metric_value for result in card.data.eval_results}
    loss = results_of(done)["tasks"]["loss"]["figures"]["eval/more emoji/text-to-image/loss"]
    assert by_name["held-out loss, text-to-image of more emoji"] == pytest.approx(loss, rel=1e-5)
    assert "held-out perplexity, image-to-text of emoji" in card.text

    # Beside the checkpoint they are found, unless they are of other weights.
    assert model_card(place / "model").data.eval_results is None
    beside = place / "evaluation" / "results.json"
    beside.parent.mkdir()
    beside.write_text((done / "results.json").read_text())
    assert len(model_card(place / "model").data.eval_results) == len(card.data.eval_results)
    beside.write_text(json.dumps(results_of(done) | {"weights": "other"}))
    assert model_card(place / "model").data.eval_results is None
    with pytest.raises(ValueError, match=r"has no results.json"):
        model_card(place / "model", evaluation=place / "model")
    beside.write_text('{"loss": 1}')
    with pytest.raises(ValueError, match="has no tasks and data; training.evaluate did not write it"):
        model_card(place / "model", evaluation=beside.parent)


def test_word_error_rates_are_results_of_hearing_and_of_speaking():
    figures = {"emoji/heard_wer": 0.5, "emoji/heard_cer": 0.25, "emoji/spoken_wer": 0.75, "emoji/samples": 3}
    held_out = [{"name": "emoji", "path": "/home/me/sounds", "split": "validation"}]
    results = {"data": {"sources": [], "validation_sources": held_out}, "tasks": {"speech": {"figures": figures}}}
    found = [result for result, _ in evaluation_results(results)]
    assert [(one.task_type, one.metric_type, one.metric_value) for one in found] == [
        ("automatic-speech-recognition", "wer", 0.5),
        ("automatic-speech-recognition", "cer", 0.25),
        ("text-to-speech", "wer", 0.75),
    ]
    # Strangers read a card, so the folders of a machine are not in it.
    assert found[0].metric_name == "heard wer of emoji, held out" and found[0].dataset_name == "sounds"


def test_help_names_every_task():
    done = subprocess.run(
        [sys.executable, "-m", "training.evaluate", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "features" in done.stdout and "accelerate launch" in done.stdout
