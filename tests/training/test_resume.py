"""What a run goes on from: the newest checkpoint that is whole, of a run that is the same."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from training.config import ConfigError, flatten, without_secrets
from training.consolidate import main
from training.run_files.checkpoints import find_checkpoint, refuse_changes, verify
from training.run_files.folder import RunFolder, RunLock
from training.run_files.metrics import MetricsLog, Trackers, check_tracker, read_metrics
from training.world import StopSignal

from .tiny import tiny_trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 1 to 4."""
    trainer = tiny_trainer(tmp_path_factory.mktemp("run"), save_every=1, keep_checkpoints=4)
    trainer.fit()
    return trainer.run.path


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return RunFolder(tmp_path / "run")


PRESENT = {
    "config": {
        "model": {"hidden_size": 64},
        "train": {"seed": 0, "save_every": 5, "rows": 8},
        "optimizer": {"lr": 1.0},
    },
    "data_fingerprint": "a" * 64,
    "rows_in_a_step": 8,
}


def changed(**values):
    tree = json.loads(json.dumps(PRESENT))
    for key, value in values.items():
        section, _, name = key.partition("__")
        tree.update({key: value}) if not name else tree["config"][section].update({name: value})
    return tree


def test_a_run_that_is_the_same_goes_on():
    assert refuse_changes(PRESENT, changed(), []) == []
    assert refuse_changes(PRESENT, changed(train__save_every=9, train__rows=4), []) == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"model__hidden_size": 32}, "model.hidden_size was 64, is 32"),
        ({"optimizer__lr": 2.0}, "optimizer.lr was 1.0, is 2.0"),
        ({"optimizer__new": 2.0}, "optimizer.new was None, is 2.0"),
        ({"train__seed": 1}, "train.seed was 0, is 1"),
        ({"rows_in_a_step": 4}, "train.rows was '8 rows in a step'"),
        ({"data_fingerprint": "b" * 64}, "data was 'aaaaaaaaaaaa', is 'bbbbbbbbbbbb'"),
    ],
)
def test_a_run_that_is_another_is_refused_unless_its_change_is_allowed_by_name(values, key):
    with pytest.raises(ConfigError, match=key):
        refuse_changes(PRESENT, changed(**values), [])
    name = key.partition(" was ")[0]
    with pytest.raises(ConfigError, match=rf"train\.resume_despite=\[{name}\]"):
        refuse_changes(PRESENT, changed(**values), [])
    assert refuse_changes(PRESENT, changed(**values), [name])[0].startswith(key.partition("'")[0])


def test_a_value_that_follows_from_another_is_allowed_with_it():
    def run_of(steps, warmup):
        return changed(train__steps=steps, optimizer__warmup_steps=warmup)

    assert refuse_changes(run_of(10, 1), run_of(20, 2), ["train.steps"]) == [
        "train.steps was 10, is 20",
        "optimizer.warmup_steps was 1, is 2",
    ]
    with pytest.raises(ConfigError, match=r"resume_despite=\[train\.steps\]$"):
        refuse_changes(run_of(10, 1), run_of(20, 2), [])
    with pytest.raises(ConfigError, match=r"resume_despite=\[train\.steps, optimizer\.warmup_steps\]$"):
        refuse_changes(run_of(10, 1), run_of(20, 5), ["train.steps"])


def test_an_allowed_change_that_is_no_key_is_refused():
    with pytest.raises(ConfigError, match=r"did you mean optimizer\.lr"):
        refuse_changes(PRESENT, changed(), ["optimizer.ll"])


def test_flat_keys_are_those_of_the_command_line():
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}}) == {"a.b.c": 1, "a.d": [1, 2]}


def test_damaged_checkpoints_are_passed_over_by_name_and_kept(run):
    weights = next((run.checkpoint(4) / "state").iterdir())
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    (run.checkpoint(3) / "pretrained" / "config.json").unlink()
    manifest, said = find_checkpoint(run, "auto", Accelerator(cpu=True))
    assert manifest["step"] == 2
    assert said == [
        f"step-00000004 is passed over: state/{weights.name} does not have the sha256 that was written",
        "step-00000003 is passed over: pretrained/config.json is missing",
    ]
    assert run.saved_steps() == [1, 2]
    assert (run.checkpoints / "damaged-step-00000004" / "state" / weights.name).read_bytes() == data


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left(run):
    for step in run.saved_steps():
        (run.checkpoint(step) / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="no checkpoint .* is intact .*step-00000001"):
        find_checkpoint(run, "auto", Accelerator(cpu=True))
    assert run.saved_steps() == [1, 2, 3, 4]


def test_the_manifest_says_where_the_run_stood(run):
    manifest = verify(run.checkpoint(3))
    assert (manifest["step"], manifest["rows"], manifest["stream"]) == (3, 6, {"row": 6})
    assert manifest["optimizer"] == {"tensors": ["exp_avg", "exp_avg_sq"], "scalars": {"step": 3.0}}
    assert (run.checkpoints / "latest").read_text() == "step-00000004\n"


def test_consolidating_copies_the_weights_bit_for_bit_and_writes_nothing_over(saved, tmp_path, capsys, monkeypatch):
    class Kept:
        @classmethod
        def from_pretrained(cls, folder):
            return cls()

        def save_pretrained(self, folder):
            (folder / "processor_config.json").write_text("{}")

    monkeypatch.setattr("training.consolidate.MoTProcessor", Kept)
    half = tmp_path / "half"
    assert main([str(saved), "--step", "2", "--output", str(half), "--dtype", "bfloat16"]) == 0
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    halves = load_file(half / "model.safetensors")
    output = str(tmp_path / "folder")
    assert main([str(saved), "--step", "2", "--output", output]) == 0
    stored = {}
    for file in (RunFolder(saved).checkpoint(2) / "state").iterdir():
        stored |= {name.removeprefix("model."): v for name, v in load_file(file).items() if name.startswith("model.")}
    written = load_file(tmp_path / "folder" / "model.safetensors")
    assert set(written) == set(stored) and all(torch.equal(value, stored[name]) for name, value in written.items())
    assert all(torch.equal(value, stored[name].bfloat16()) for name, value in halves.items()) and len(halves) == len(
        stored
    )
    for words, said in (
        ([str(saved), "--step", "2", "--output", output], "exists"),
        ([str(saved), "--step", "9"], "no checkpoint of step 9; there are [1, 2, 3, 4]"),
        ([str(saved), "--weights", "average"], "--weights trained"),
        ([str(tmp_path)], "no intact checkpoint (there is none)"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- watching it


@pytest.mark.parametrize(
    ("name", "said"),
    [("nosuch", "there are none, all"), ("tensorbord", "did you mean tensorboard"), ("wandb", "pip install wandb")],
)
def test_a_tracker_that_would_be_left_out_is_refused(monkeypatch, name, said):
    monkeypatch.setattr("training.run_files.metrics.get_available_trackers", lambda: ["tensorboard"])
    check_tracker("tensorboard")
    check_tracker("none")
    with pytest.raises(ConfigError, match=f"train.tracker='{name}'.*{said}"):
        check_tracker(name)


@pytest.mark.parametrize("is_file", [True, False], ids=["a file where the folder of locks is", "a folder as a lock"])
def test_a_folder_whose_locks_cannot_be_made_is_refused_by_name(tmp_path, is_file):
    if is_file:
        (tmp_path / "locks").write_text("")
    else:
        (tmp_path / "locks" / "rank-00000.lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match="train.output_dir=.* cannot be written"):
        RunLock(tmp_path).acquire()


def test_tensorboard_gets_the_rows(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    trackers = Trackers(accelerator)
    trackers.start("project", {"model.variant": "mot", "train.rows": 2})
    for step in (1, 2, 3):
        trackers.log({"step": step, "loss": 1 / step, "event": None}, step)
    trackers.finish()
    events = EventAccumulator(str(tmp_path / "project")).Reload()
    points = {event.step: event.value for event in events.Scalars("loss")}
    assert points == pytest.approx({1: 1, 2: 0.5, 3: 1 / 3})


def test_rows_wait_for_room_on_a_full_disk(tmp_path, monkeypatch):
    log, there_is_room = MetricsLog(tmp_path / "metrics.jsonl"), True
    really_open = open

    def open_if_there_is_room(path, mode="r", **options):
        if mode == "a" and not there_is_room:
            raise OSError(28, "No space left on device")
        return really_open(path, mode, **options)

    monkeypatch.setattr("builtins.open", open_if_there_is_room)
    for step, there_is_room in ((1, True), (2, False), (3, False), (4, True)):  # noqa: B007
        log.append({"step": step, "loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")[0]] == [1, 2, 3, 4]


def test_a_trace_is_written_when_it_is_asked_for(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=6)
    with StopSignal() as signals:
        trainer.stop_signal = signals
        step = trainer.train_step

        def ask(batches):
            if trainer.step == 1:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGUSR1)
            return step(batches)

        trainer.train_step = ask
        trainer.fit()
    (trace,) = trainer.run.profiles.iterdir()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names or "aten::addmm" in names


def test_secrets_do_not_reach_what_is_written():
    tree = {
        "command": [
            "train.py",
            "hf_abcdefghij0123456789",
            "data.sources.0.path=https://me:secret@host/set",
            "--token=abc",
        ],
        "config": {"wandb": "api_key=12345", "path": "/data/tokens/of-words"},
    }
    written = json.dumps(without_secrets(tree))
    for secret in ("hf_abc", "secret", "abc", "12345"):
        assert secret not in written.replace("[removed]", "")
    assert "/data/tokens/of-words" in written
