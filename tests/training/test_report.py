"""The report: what it reads from run folders, what it reckons, and what it writes."""

import base64
import hashlib
import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from training.config import ConfigError
from training.evaluation.sheet import thinned
from training.report.__main__ import main
from training.report.figures import View, mark_events
from training.report.output import ReportFolder
from training.report.runs import read_runs
from training.report.step_matching import first_steps, match_steps, whole_windows
from training.report.tables import compare, count, hours_in_words


PEAK = 1e12


def training_row(step: int, loss: float = 1.0, **more) -> dict:
    row = {"step": step, "loss": loss, "loss_text": loss, "loss_image": 2 * loss, "tokens_text": 5, "tokens_image": 5}
    row |= {"grad_norm": 1.0, "grad_norm_text": 0.6, "grad_norm_image": 0.7, "grad_norm_shared": 0.4, "lr": 1e-3}
    row |= {"tokens_per_second": 100.0, "mfu": 0.5, "step_seconds": 2.0, "data_seconds": 0.5, "checkpoint_seconds": 0.0}
    return row | {"memory_bytes": 2**30, "skipped_steps": 0, "event": None} | more


def evaluation_row(step: int, loss: float) -> dict:
    return {"step": step, "eval/loss_text": loss, "eval/loss_image": 2 * loss, "eval/text/loss": loss}


def make_run(path: Path, rows: list[dict], manifest: dict | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if manifest is not None:
        (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def manifest_of(variant: str = "mot", **more) -> dict:
    world = {"processes": 2, "mesh": {"dp_shard": 2}, "distributed": "FSDP"}
    config = {"model": {"variant": variant}, "train": {"steps": 60}}
    return {"peak_flops": PEAK, "precision": "bf16", "world": world, "config": config, "command": ["train.py"], **more}


def decaying_run(path: Path, time: float, steps: int = 60, **manifest) -> Path:
    """Losses exp(-step / time): k times the time needs k times the steps, for every loss."""
    rows = [training_row(step, float(np.exp(-step / time))) for step in range(1, steps + 1)]
    rows += [evaluation_row(step, float(1 + np.exp(-step / time))) for step in range(5, steps + 1, 5)]
    return make_run(path, rows, manifest_of(**manifest))


def report(*arguments) -> int:
    return main([str(argument) for argument in arguments])


class Page(html.parser.HTMLParser):
    """The tags, addresses and text of a page, as a browser takes it apart."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.addresses, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        if data.strip():  # a browser shows no white space between tags
            self.cells.append(data)

    def pictures(self) -> list[bytes]:
        return [base64.b64decode(address.partition("base64,")[2]) for address in self.addresses]


# ------------------------------------------------------------------------------------------------------ step matching


def test_first_steps_equal_a_search_step_by_step():
    random = np.random.default_rng(0)
    steps, losses = np.arange(3, 203, 2), np.exp(-np.arange(100) / 40) + 0.1 * random.normal(size=100)
    targets = np.concatenate([random.uniform(-0.5, 1.5, 50), losses[:20]])
    found = first_steps((steps, losses), targets)
    for target, step in zip(targets, found, strict=True):
        expected = next((s for s, loss in zip(steps, losses, strict=True) if loss <= target), None)
        assert np.isnan(step) if expected is None else step == expected


def test_whole_windows_equal_means_one_by_one():
    steps, losses = np.arange(10), np.random.default_rng(0).normal(size=10)
    ends, means = whole_windows((steps, losses), 4)
    assert ends.tolist() == [3, 4, 5, 6, 7, 8, 9]
    np.testing.assert_allclose(means, [losses[end - 3 : end + 1].mean() for end in ends])


def test_a_curve_shorter_than_the_window_is_its_mean():
    ends, means = whole_windows((np.array([4, 8]), np.array([1.0, 2.0])), 5)
    assert ends.tolist() == [8] and means.tolist() == [1.5]


def test_step_matching_of_exponential_curves_is_the_ratio_of_their_times(tmp_path):
    dense, mot = decaying_run(tmp_path / "dense", 40.0), decaying_run(tmp_path / "mot", 20.0)
    matches = match_steps(read_runs([dense, mot]), window=1)
    assert {(match.objective, match.split): match.share for match in matches} == {
        ("text", "training"): 0.5,
        ("text", "held out"): 0.5,
        ("image", "training"): 0.5,
        ("image", "held out"): 0.5,
    }


def test_a_loss_that_was_not_reached_has_no_share(tmp_path):
    mot, dense = decaying_run(tmp_path / "mot", 20.0), decaying_run(tmp_path / "dense", 40.0)
    match = match_steps(read_runs([mot, dense]), window=1)[0]
    assert match.share is None and match.lowest == pytest.approx(np.exp(-60 / 40))


# ------------------------------------------------------------------------------------------------- reading run folders


def test_a_resumed_run_counts_the_later_row_of_a_step(tmp_path):
    rows = [training_row(1), training_row(2, 9.0), training_row(3, 9.0), training_row(2, 4.0), training_row(3, 3.0)]
    launches = [{"from_step": 0}, {"from_step": 1}]
    (run,) = read_runs([make_run(tmp_path / "run", rows, manifest_of(launches=launches))])
    assert run.column("loss_text").tolist() == [1.0, 4.0, 3.0] and run.repeated == 2
    assert run.events == [(1, "resumed")]


def test_axes_are_what_was_spent_by_the_end_of_each_step(tmp_path):
    rows = [training_row(1), training_row(2, step_seconds=4.0), training_row(4, checkpoint_seconds=3.0)]
    (run,) = read_runs([make_run(tmp_path / "run", rows, manifest_of())])
    steps = np.array([0, 1, 2, 3, 4])
    assert run.places("step", steps).tolist() == [0, 1, 2, 3, 4]
    assert run.places("tokens", steps).tolist() == [0, 200, 600, 600, 800]
    assert run.places("hours", steps) * 3600 == pytest.approx([0, 2, 6, 6, 11])
    # Half of the peak of two processes.
    assert run.places("flops", steps) / PEAK == pytest.approx([0, 2, 6, 6, 8])


def test_flops_follow_the_processes_of_each_launch(tmp_path):
    launches = [{"from_step": 0, "world": {"processes": 4}}, {"from_step": 1, "world": {"processes": 2}}]
    rows = [training_row(1), training_row(2)]
    (run,) = read_runs([make_run(tmp_path / "run", rows, manifest_of(launches=launches))])
    assert run.flops.tolist() == [4 * PEAK, 2 * PEAK]


def test_totals_are_weighted_by_time(tmp_path):
    rows = [training_row(1), training_row(2, step_seconds=6.0, mfu=0.1, data_seconds=1.5, checkpoint_seconds=2.0)]
    (run,) = read_runs([make_run(tmp_path / "run", rows, manifest_of())])
    totals = run.totals()
    assert totals["tokens"] == 800 and totals["hours"] * 3600 == pytest.approx(10)
    assert totals["mfu"] == pytest.approx((0.5 * 2 + 0.1 * 6) / 8) and totals["data_share"] == pytest.approx(2 / 8)
    assert totals["saving_share"] == pytest.approx(2 / 10) and totals["seconds_per_save"] == 2


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / seed / "mot", [training_row(1)]) for seed in ("a", "b")]
    paths.append(make_run(tmp_path / "dense", [training_row(1)]))
    assert [run.name for run in read_runs(paths)] == ["a/mot", "b/mot", "dense"]


@pytest.mark.parametrize(
    "folders, words",
    [
        (["missing"], "is not a folder"),
        (["empty"], "is not the folder of a run"),
        (["."], "the runs in it are .*begun.*run"),
        (["begun"], "no training step yet"),
        (["run", "run"], "given twice"),
    ],
)
def test_what_is_no_run_is_refused_by_name(tmp_path, monkeypatch, capsys, folders, words):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", [training_row(1)])
    make_run(tmp_path / "begun", [])
    (tmp_path / "empty").mkdir()
    assert report(*folders) == 2
    message = capsys.readouterr().err
    assert re.search(words, message) and str((tmp_path / folders[0]).resolve()) in message
    assert not (tmp_path / "report").exists()


# ------------------------------------------------------------------------------------------------------------- tables


def test_runs_are_compared_at_the_last_step_all_have_reached(tmp_path):
    short, long = decaying_run(tmp_path / "a", 40.0, steps=33), decaying_run(tmp_path / "b", 20.0, steps=60)
    figures = compare(read_runs([short, long]), window=1)
    assert (figures["same_step"], figures["same_step_held_out"]) == (33, 30)
    losses = [run["at_same_step"]["text"] for run in figures["runs"]]
    assert [of["training"] for of in losses] == pytest.approx([np.exp(-33 / 40), np.exp(-33 / 20)])
    assert [of["held_out"] for of in losses] == pytest.approx([1 + np.exp(-30 / 40), 1 + np.exp(-30 / 20)])
    assert figures["runs"][1]["at_end"]["text"]["training"] == pytest.approx(np.exp(-60 / 20))


@pytest.mark.parametrize(
    "value, words",
    [
        (None, ""),
        (0, "0"),
        (999, "999"),
        (999.7, "1.00 k"),
        (13_400_000, "13.4 M"),
        (1.25e18, "1.25 E"),
        (443e6, "443 M"),
    ],
)
def test_counts_have_three_digits(value, words):
    assert count(value) == words


@pytest.mark.parametrize(
    "hours, words", [(None, ""), (0.01, "36 s"), (0.5, "30 min"), (3.25, "3.25 h"), (240, "10 days")]
)
def test_durations_have_the_unit_of_their_size(hours, words):
    assert hours_in_words(hours) == words


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_report_is_one_self_contained_file_with_the_pictures_beside_it(tmp_path):
    runs = [decaying_run(tmp_path / "dense", 40.0), decaying_run(tmp_path / "mot", 20.0)]
    Image.new("RGB", (3, 2), "red").save(runs[1] / "samples.png")
    assert report(*runs, "--output", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags) and "://" not in text
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    # Nothing was saved or left out, but memory is known.
    assert set(files) == {f"{name}.png" for name in ("losses", "step_matching", "gradients", "speed", "resources")}
    assert set(page.pictures()) == {*files.values(), (runs[1] / "samples.png").read_bytes()}
    assert all(Image.open(io.BytesIO(picture)).width > 900 for picture in files.values())
    matched = page.cells[page.cells.index("Step matching") :]
    assert matched.count("50.0 %") == 4  # two objectives, in training and held out


def test_names_and_manifests_cannot_write_html(tmp_path):
    name = "<script>alert(1)</script>$x_"
    run = decaying_run(tmp_path / "a" / name.replace("/", "|"), 20.0, commit="<img src=x>", device="&amp;")
    (run / "config.yaml").write_text("a: <b>\n")
    assert report(run, "--output", tmp_path / "out") == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "script" not in page.tags and all(address.startswith("data:") for address in page.addresses)
    assert "<img src=x>" in page.cells and "&amp;" in page.cells


@pytest.fixture
def flagged_run(tmp_path):
    rows = [training_row(step, 1.0 / step) for step in range(1, 11)]
    rows[3] |= {"event": "not_finite", "loss": None, "loss_text": None, "loss_image": None, "grad_norm": None}
    rows[6] |= {"event": "spike_skipped", "loss_text": 50.0}
    for row in rows[3:]:
        row["skipped_steps"] = 1 + (row["step"] >= 7)
    return make_run(tmp_path / "flagged", rows, manifest_of(launches=[{"from_step": 0}, {"from_step": 5}]))


def test_flagged_steps_are_listed(tmp_path, flagged_run):
    assert report(flagged_run, "--output", tmp_path / "out") == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    listed = page.cells[page.cells.index("Events") + 1 :][:8]
    events = ["4", "not finite, update left out", "5", "resumed", "7", "loss spike, update left out"]
    assert listed == ["step", "what", *events]


def test_flagged_steps_are_marked_where_they_lie_on_the_axis(flagged_run):
    axes = Figure().subplots()
    mark_events(axes, read_runs([flagged_run]), View("tokens", window=1))
    # 200 tokens a step; along the top of the panel, whatever the loss was.
    assert sorted(line.get_xdata().tolist() for line in axes.lines) == [[800], [1000], [1400]]
    assert all(0.9 < line.get_ydata()[0] < 1 for line in axes.lines)


def test_an_old_run_of_one_step_without_manifest_or_evaluation_is_drawn(tmp_path):
    run = make_run(tmp_path / "run", [{"step": 1, "loss": 3.0, "lr": 1e-3}])
    assert report(run, "--output", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        "report.json",
        "losses.png",
        "gradients.png",
    }
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert figures["runs"][0]["tokens"] is None and figures["runs"][0]["skipped_steps"] is None


def test_runs_that_share_nothing_but_steps_are_drawn(tmp_path):
    old = make_run(tmp_path / "old", [{"step": 1, "loss_speech": 3.0}, {"step": 2, "loss_speech": None}])
    new = decaying_run(tmp_path / "new", 20.0)
    assert report(old, new, "--output", tmp_path / "out") == 0


def test_a_manifest_that_cannot_be_read_is_a_line_in_the_report(tmp_path):
    run = make_run(tmp_path / "run", [training_row(1)])
    (run / "manifest.json").write_text('{"precision": "bf')
    (run / "environment.json").write_text('{"precision": "float32"}')
    assert report(run, "--output", tmp_path / "out") == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert any("manifest.json cannot be read" in cell for cell in page.cells) and "float32" in page.cells


def test_an_axis_that_a_run_does_not_record_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run", [training_row(1)])
    assert report(run, "--output", tmp_path / "out", "--x", "flops") == 2
    assert "peak_flops" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_thinned_lines_keep_the_ends_of_each_stretch():
    places, values = np.arange(10_007), np.random.default_rng(0).normal(size=10_007)
    few_places, few = thinned(places, values, count=100)
    assert len(few) == len(few_places) == 200 and (few.min(), few.max()) == (values.min(), values.max())
    stretches = [values[a:b] for a, b in zip(few_places[::2], [*few_places[2::2], len(values)], strict=True)]
    assert few.reshape(-1, 2).tolist() == [[stretch.min(), stretch.max()] for stretch in stretches]


# ------------------------------------------------------------------------------------------------ what may be replaced


def test_a_report_replaces_its_own_files_and_removes_what_it_has_no_more(tmp_path):
    dense, mot = decaying_run(tmp_path / "dense", 40.0), decaying_run(tmp_path / "mot", 20.0)
    assert report(dense, mot, "--output", tmp_path / "out") == 0
    assert (tmp_path / "out" / "step_matching.png").exists()
    assert report(mot, "--output", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "step_matching.png").exists()
    record = json.loads((tmp_path / "out" / "report.json").read_text())["files"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "report.json"}
    assert record == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@pytest.mark.parametrize("existing", ["losses.png", "report.html", "report.json"])
def test_files_of_others_stand_unless_overwriting(tmp_path, existing):
    out = tmp_path / "out"
    out.mkdir()
    (out / existing).write_text("{}")
    files = {"report.html": b"page", "losses.png": b"picture"}
    with pytest.raises(ConfigError, match=f"{existing}.*--overwrite"):
        ReportFolder(out).write(files, {})
    assert [path.name for path in out.iterdir()] == [existing] and (out / existing).read_text() == "{}"
    ReportFolder(out, overwrite=True).write(files, {})
    assert (out / "report.html").read_bytes() == b"page" and (out / "losses.png").read_bytes() == b"picture"


def test_a_report_that_was_edited_stands(tmp_path):
    files = {"report.html": b"page"}
    ReportFolder(tmp_path / "out").write(files, {})
    ReportFolder(tmp_path / "out").write(files, {})
    (tmp_path / "out" / "report.html").write_bytes(b"page with a remark")
    with pytest.raises(ConfigError, match="report.html"):
        ReportFolder(tmp_path / "out").write(files, {})
    assert (tmp_path / "out" / "report.html").read_bytes() == b"page with a remark"


def test_a_record_cannot_have_files_outside_removed(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    out = tmp_path / "out"
    ReportFolder(out).write({"report.html": b"page"}, {})
    record = json.loads((out / "report.json").read_text())
    record["files"]["../mine"] = hashlib.sha256(b"mine").hexdigest()
    (out / "report.json").write_text(json.dumps(record))
    ReportFolder(out).write({"report.html": b"page"}, {})
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_the_folder_of_a_run_is_not_written_to(tmp_path, capsys):
    run = make_run(tmp_path / "run", [training_row(1)])
    assert report(run, "--output", run) == 2 and "folder of a run" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_the_command_line_draws_a_report(tmp_path):
    run = decaying_run(tmp_path / "run", 20.0)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "training.report", str(run), "--output", str(tmp_path / "out"), "--x", "hours"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "run: step 60" in done.stdout and (tmp_path / "out" / "report.html").is_file()
