"""A study: the shares that it reckons, and runs that are killed, gone on with, skipped, refused, or fail."""

import json
import os
import shutil
import signal
import sys
import time
from multiprocessing import Process, get_context
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from training.config import read_yaml
from training.run_files.metrics import read_metrics
from training.study.__main__ import main
from training.study.results import _name, read_trained, spread, study_results
from training.study.specification import read_study, runs_of


STEPS = 24
SOURCES = [
    {
        "name": "emoji",
        "path": "carried",
        "config": "emoji",
        "weight": 0.7,
        "limit": 2,
        "templates": [{"segments": ["text:name", "image:image"]}],
    },
    {
        "name": "definitions",
        "path": "carried",
        "config": "definitions",
        "weight": 0.3,
        "limit": 8,
        "templates": [{"segments": ["text:{word}: {definition}"]}],
    },
]
RECIPE = {
    "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "data": {
        "row_length": 96,
        "sources": SOURCES,
        "validation_sources": [{**source, "split": "validation", "limit": 2} for source in SOURCES],
    },
    "optimizer": {"lr": 1e-2, "warmup_steps": 2},
    "train": {"steps": STEPS, "rows": 1, "cpu": True, "precision": "float32", "save_every": 6},
    "evaluation": {"every": 4, "rows": 2},
    "samples": {"enabled": False},
}
STUDY = {
    "base": "base.yaml",
    "baseline": "dense",
    "variants": {"dense": {"model.variant": "dense"}, "mot": {"model.variant": "mot"}},
    "seeds": 1,
    "paper": [{"variant": "mot", "objective": "image", "share": [0.348], "source": "section 3.2"}],
}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder with `base.yaml`; it becomes the working directory, and holds the data's cache."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "base.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOT_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(folder)
        yield folder


def write_study(name: str = "tiny.yaml", **changes) -> str:
    Path(name).write_text(yaml.safe_dump(STUDY | changes))
    return name


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """The folder of a study that nothing disturbed."""
    assert main([write_study(), "--out", "whole", "--workers", "2"]) == 0
    return place / "whole"


# ----------------------------------------------------------------------------------------------------- made-up curves


def curves(seed: int, variant: str, step: int) -> tuple[float, float]:
    """(loss of text, loss of image) at a step: falling, with noise that follows from the arguments."""
    noise = np.random.default_rng([seed, len(variant), step]).normal(size=2) * 0.02
    time = {"dense": 30, "mot": 18, "bad": 60}[variant]
    return tuple(2 * np.exp(-step / time) + noise + 3)


@pytest.fixture
def made_up(tmp_path):
    """(study, its runs): three variants and three seeds whose folders hold made-up curves."""
    path = tmp_path / "made-up.yaml"
    variants = STUDY["variants"] | {"bad": {"optimizer.lr": 1e-3}}
    overrides = {"train.steps": 60, "evaluation.every": 5}
    path.write_text(yaml.safe_dump(STUDY | {"seeds": 3, "overrides": overrides, "variants": variants}))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RECIPE))
    study = read_study(path)
    runs = runs_of(study, path, tmp_path)
    for run in runs:
        run.folder.path.mkdir(parents=True)
        rows = []
        for step in range(1, 61):
            text, image = curves(run.seed, run.variant, step)
            losses = {"loss": (text + 3 * image) / 4, "loss_text": text, "loss_image": image}
            seconds = {"step_seconds": 1 + 0.1 * len(run.variant), "data_seconds": 0.0, "tokens_per_second": 1.0}
            rows.append({"step": step, **losses, "tokens_text": 5, "tokens_image": 15, **seconds})
            if step % 5 == 0:
                held_out = {"eval/loss_text": text, "eval/loss_image": image, "eval/text-to-image/loss": image + 1}
                rows.append({"step": step, **held_out, "eval/text/loss": text + 1, "eval/perplexity_text": 1.0})
        run.folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run.folder.summary.write_text(json.dumps({"step": 60}))
    return study, runs


def naive_share(seed, variant, value, steps, window, at):
    """The share of steps, searched step by step; `value` is of (text, image)."""

    def loss(name, step):
        means = [value(*curves(seed, name, s)) for s in range(step - window + 1, step + 1)]
        return sum(means) / len(means)

    steps = [step for step in steps if step >= window]
    goal_step = max(step for step in steps if step <= at)
    goal = loss("dense", goal_step)
    return next((step / goal_step for step in steps if loss(variant, step) <= goal + 1e-12), None)


@pytest.mark.parametrize("at", ["two thirds", "end"])
def test_shares_equal_a_search_step_by_step(made_up, at):
    study, runs = made_up
    window = 3
    results = study_results(study, "made-up", runs, read_trained(runs, window), window)
    part = {"two thirds": 40, "end": 60}[at]
    values = {
        "text": lambda text, image: text,
        "image": lambda text, image: image,
        "total": lambda text, image: (text + 3 * image) / 4,
        "text-to-image": lambda text, image: image,
        "text only": lambda text, image: text,
    }
    found = [row for row in results["step_shares"] if row["at"] == at]
    assert len(found) == 2 * (3 + 5)
    for row in found:
        held_out = row["split"] == "held out"
        steps, mean = (range(5, 61, 5), 1) if held_out else (range(1, 61), window)
        for seed in range(3):
            expected = naive_share(seed, row["variant"], values[row["objective"]], steps, mean, part)
            assert row["seeds"][str(seed)] == pytest.approx(expected), row
    assert {row["variant"] for row in found if row["mean"] is None} == {"bad"}


def test_directions_are_named_after_what_is_measured():
    directions = ["text", "a/speech", "text-to-image", "a/image+text-to-image", "text-to-b/interleaved"]
    names = ["text only", "a/speech only", *directions[2:]]
    assert [_name(direction, "loss") for direction in directions] == names


def test_losses_before_the_end_and_hours_equal_their_definition(made_up):
    study, runs = made_up
    results = study_results(study, "made-up", runs, read_trained(runs, 1), 1)
    (ahead,) = (
        row
        for row in results["ahead"]
        if (row["variant"], row["objective"], row["split"], row["at"]) == ("mot", "image", "held out", 0.558)
    )
    for seed in range(3):
        difference = curves(seed, "mot", 30)[1] - curves(seed, "dense", 60)[1]
        assert ahead["seeds"][str(seed)] == pytest.approx(difference, abs=1e-6)  # of losses of seven digits
    # A step of `dense` takes 1.5 s, one of `mot` 1.3 s.
    for steps, hours in zip(results["step_shares"], results["wall_clock"], strict=True):
        if steps["variant"] == "mot":
            assert hours["mean"] == pytest.approx(steps["mean"] * 1.3 / 1.5)


def test_a_share_is_left_out_while_its_runs_cannot_tell(made_up):
    study, runs = made_up
    dense = next(run for run in runs if (run.variant, run.seed) == ("dense", 0))
    mot = next(run for run in runs if (run.variant, run.seed) == ("mot", 1))
    for run, kept in ((dense, 45), (mot, 2)):
        rows = [row for row in map(json.loads, run.folder.metrics.read_text().splitlines()) if row["step"] <= kept]
        run.folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run.folder.summary.unlink()
    results = study_results(study, "made-up", runs, read_trained(runs, 1), 1)
    seeds = {
        row["at"]: set(row["seeds"])
        for row in results["step_shares"]
        if (row["variant"], row["objective"], row["split"]) == ("mot", "total", "training")
    }
    assert seeds == {"two thirds": {"0", "2"}, "end": {"2"}}


def test_spread_is_the_sample_deviation_and_a_missed_goal_has_none():
    figures = spread({0: 0.5, 1: 0.7, 2: 0.9})
    assert figures["mean"] == pytest.approx(0.7) and figures["deviation"] == pytest.approx(0.2)
    assert (figures["least"], figures["greatest"]) == (0.5, 0.9)
    assert spread({0: 0.5, 1: None}) == {
        "seeds": {"0": 0.5, "1": None}, "mean": None, "deviation": None, "least": None, "greatest": None,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------- whole studies


def test_a_study_leaves_its_page_and_results(finished):
    assert {path.name for path in finished.iterdir()} >= {"index.html", "results.json", "curves.png", "runs"}
    page = (finished / "index.html").read_text()
    assert "34.8 % (section 3.2)" in page and "2 of 2 runs are finished" in page
    results = results_of(finished)
    objectives = {(row["objective"], row["split"]) for row in results["step_shares"]}
    assert {
        ("total", "training"),
        ("image", "training"),
        ("total", "held out"),
        ("text-to-image", "held out"),
    } <= objectives
    assert results["problems"] == [] and all(run["finished"] for run in results["runs"])


def test_variants_of_a_seed_see_the_same_rows(finished):
    dense, mot = (read_metrics(finished / "runs" / f"{name}-seed0" / "metrics.jsonl")[0] for name in ("dense", "mot"))
    keys = ("tokens_text", "tokens_image", "lr")
    assert [[row[key] for key in keys] for row in dense] == [[row[key] for key in keys] for row in mot]
    manifests = [
        json.loads((finished / "runs" / f"{name}-seed0" / "manifest.json").read_text()) for name in ("dense", "mot")
    ]
    for key in ("data_fingerprint", "rows_in_a_step", "seeds"):
        assert manifests[0][key] == manifests[1][key]


def start_study(out: str) -> Process:
    """Run the study in a process forked from this one, which saves the imports."""
    process = get_context("fork").Process(target=lambda: sys.exit(main(["tiny.yaml", "--out", out])))
    process.start()
    return process


def wait_for_steps(process: Process, run: Path, steps: int) -> None:
    """Wait until a run has done so many steps and saved a checkpoint."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and len(read_metrics(metrics)[0]) >= steps and any(run.glob("checkpoints/step-*"))):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_study_that_is_interrupted_and_killed_ends_as_an_undisturbed_one(finished, place):
    # One run is finished; a signal lets the other write its checkpoint.
    shutil.copytree(finished, place / "killed", ignore=shutil.ignore_patterns("mot-*", "results.json"))
    run = place / "killed" / "runs" / "mot-seed0"
    process = start_study("killed")
    wait_for_steps(process, run, 7)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode == 130
    steps = read_metrics(run / "metrics.jsonl")[0][-1]["step"]
    assert 7 <= steps < STEPS and (run / "checkpoints" / f"step-{steps:08d}").is_dir()

    # SIGKILL of the whole tree leaves what it leaves.
    process = start_study("killed")
    wait_for_steps(process, run, steps + 2)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    process.join(120)
    assert not (run / "summary.json").exists()

    # The same command goes on to the same results, times apart.
    assert main(["tiny.yaml", "--out", "killed"]) == 0
    launches = json.loads((run / "manifest.json").read_text())["launches"]
    assert len(launches) == 3 and launches[1]["from_step"] == steps
    expected, found = results_of(finished), results_of(place / "killed")
    for results in (expected, found):
        del results["wall_clock"]
    assert found == expected | {"study": found["study"]}


def test_records_stand_for_the_folders_of_finished_runs(finished, place, capfd):
    shutil.copytree(finished, place / "carried", ignore=shutil.ignore_patterns("runs", "logs", "recipes", "*.png"))
    (place / "carried" / "results.json").unlink()
    before = {path.name: path.read_bytes() for path in (place / "carried" / "records").iterdir()}
    assert sorted(before) == ["dense-seed0.json", "mot-seed0.json"]

    # Nothing is started, and the figures are those of the folders, hours too.
    assert main(["tiny.yaml", "--out", "carried"]) == 0
    assert "2 runs, 2 of them finished" in capfd.readouterr().out
    assert not (place / "carried" / "runs").exists()
    assert results_of(place / "carried") == results_of(finished)
    assert before == {path.name: path.read_bytes() for path in (place / "carried" / "records").iterdir()}
    assert main(["tiny.yaml", "--out", "carried", "--plan"]) == 0
    assert "mot: 1 runs of 24 steps, 1 finished" in (printed := capfd.readouterr().out) and "(measured)" in printed

    # A record holds for its own recipe alone, keys that are newer than it apart.
    record = place / "carried" / "records" / "mot-seed0.json"
    tree = json.loads(record.read_text())
    del tree["recipe"]["samples"]["concept"]
    record.write_text(json.dumps(tree))
    assert main(["tiny.yaml", "--out", "carried"]) == 0
    assert main([write_study("other.yaml", overrides={"optimizer.lr": 2e-2}), "--out", "carried"]) == 2
    assert "optimizer.lr was 0.01, is 0.02" in (printed := capfd.readouterr().err) and "records" in printed


def test_equal_runs_of_another_study_are_not_done_again(finished, place, capfd):
    variants = {"plain": {"model.variant": "dense"}, "untied": {"model.variant": "untied-feed-forward"}}
    study = write_study("rows.yaml", baseline="plain", variants=variants, paper=[])
    assert main([study, "--out", "rows", "--records", str(finished / "records")]) == 0
    printed = capfd.readouterr().out
    assert "plain-seed0: an equal run has been done" in printed and "2 runs, 1 of them finished" in printed
    assert {path.name for path in (place / "rows" / "runs").iterdir()} == {"untied-seed0"}
    losses = {run["name"]: run["losses"] for run in results_of(place / "rows")["runs"]}
    assert losses["plain-seed0"] == {run["name"]: run["losses"] for run in results_of(finished)["runs"]}["dense-seed0"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": 3}'])
def test_a_record_that_is_none_is_named(finished, place, capfd, text):
    shutil.rmtree(place / "broken", ignore_errors=True)
    shutil.copytree(finished / "records", place / "broken" / "records")
    (place / "broken" / "records" / "mot-seed0.json").write_text(text)
    assert main(["tiny.yaml", "--out", "broken"]) == 2
    printed = capfd.readouterr().err
    assert "mot-seed0.json is no record of a run" in printed and "remove it" in printed


TRAINER = """# In the place of the trainer: a run of the variant `moe-4x` fails, all others are finished at once.
import json, pathlib, sys, yaml
recipe = yaml.safe_load(open(sys.argv[2]))
if recipe["model"]["variant"] == "moe-4x":
    sys.exit("error: no room for experts")
folder = pathlib.Path(recipe["train"]["output_dir"])
folder.mkdir(parents=True)
rows = [{"step": s, "loss": 1 / s, "loss_text": 1 / s, "tokens_text": 1, "step_seconds": 1.0} for s in range(1, 25)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
(folder / "summary.json").write_text(json.dumps({"step": 24}))
"""


def test_a_failed_run_is_named_and_touches_no_other_and_finished_runs_are_skipped(place, capfd):
    (place / "trainer.py").write_text(TRAINER)
    variants = {"moe-4x": {"model.variant": "moe-4x"}} | STUDY["variants"]
    words = [write_study("fails.yaml", variants=variants, launcher=[sys.executable, "trainer.py"]), "--out", "fails"]
    assert main(words) == 1
    printed = capfd.readouterr()
    assert "failed: moe-4x-seed0, code 1: error: no room for experts" in printed.err
    finished = {run["name"]: run["finished"] for run in results_of(place / "fails")["runs"]}
    assert finished == {"moe-4x-seed0": False, "dense-seed0": True, "mot-seed0": True}

    # The same command tries the failed run again, and no other: this trainer would fail in a folder that exists.
    before = {path: path.stat().st_mtime_ns for path in (place / "fails" / "runs").rglob("*")}
    assert main(words) == 1
    assert "3 runs, 2 of them finished" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_changed_recipe_is_refused_by_name(finished, capfd):
    study = write_study("changed.yaml", overrides={"optimizer.lr": 2e-2})
    assert main([study, "--out", str(finished)]) == 2
    printed = capfd.readouterr().err
    assert "dense-seed0" in printed and "optimizer.lr was 0.01, is 0.02" in printed
    assert read_yaml(finished / "recipes" / "dense-seed0.yaml")["optimizer"]["lr"] == 1e-2


def test_the_plan_starts_nothing(place, capfd):
    sizes = {"small": {}, "large": {"model.hidden_size": 32}}
    assert main([write_study("sizes.yaml", sizes=sizes), "--out", "planned", "--seeds", "2", "--plan"]) == 0
    printed = capfd.readouterr().out
    assert "mot large: 2 runs of 24 steps, 0 finished" in printed and "in all: 8 runs" in printed
    assert "estimated" in printed and "GiB" in printed and not (place / "planned").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "densest"}, ["'densest' is no variant"]),
        ({"variants": STUDY["variants"] | {"a/b": {}}}, ["'a/b'", "letters"]),
        ({"overrides": {"train.seed": 3}}, ["train.seed", "set by the study"]),
        ({"variants": STUDY["variants"] | {"long": {"train.steps": 9}}}, ["long-seed0", "train.steps is 9, but 24"]),
        ({"overrides": {"model.hiden_size": 3}}, ["dense-seed0", "model.hidden_size"]),
        ({"variant": {}}, ["unknown key variant", "variants"]),
    ],
)
def test_a_study_that_cannot_be_is_refused(place, capfd, changes, words):
    assert main([write_study("wrong.yaml", **changes), "--out", "wrong"]) == 2
    printed = capfd.readouterr().err
    assert all(word in printed for word in words) and not os.path.exists("wrong")


def test_an_unknown_name_lists_the_studies(capfd):
    assert main(["smoky"]) == 2
    assert "the studies are" in capfd.readouterr().err
