"""Every fault that a long run meets, in its cheapest honest form; `python -m tests.faults --long` has the long one."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from tests.faults.__main__ import table
from tests.faults.bench import Outcome
from tests.faults.damage import DAMAGES, pickled, reseal
from tests.faults.stages import SAVE_STAGES, at
from training.config import ConfigError, override, read_yaml
from training.optimization import SpikeDetector, UpdateGuard
from training.run_files import folder as run_lock
from training.run_files.checkpoints import (
    DamagedError,
    find_checkpoint,
    newest_intact,
    read_tensors,
    state_tensors,
    verify,
)
from training.run_files.folder import RunLock
from training.run_files.metrics import read_metrics
from training.world import Interrupted, StopSignal

from .fault_ranks import TIMEOUT
from .ranks import lost, start_ranks
from .tiny import tiny_model, tiny_trainer


ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "training" / "configs" / "smoke.yaml")
STEPS = {"steps": 8, "save_every": 2}
TIMES = ("tokens_per_second", "mfu", "step_seconds", "data_seconds", "checkpoint_seconds", "memory_bytes")


class Killed(BaseException):
    """Nothing catches it and nothing cleans up after it."""


def rows_of(trainer) -> list[dict]:
    rows, _ = read_metrics(trainer.run.metrics)
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same(trainer, other) -> None:
    """Bit for bit: rows of the log, and parameters."""
    assert rows_of(trainer) == rows_of(other)
    for (name, value), (_, same) in zip(trainer.trained.items(), other.trained.items(), strict=True):
        assert torch.equal(value, same), name


def resumed(folder, **options):
    """A trainer that has gone on from the newest intact checkpoint to the end, and the step it went on from."""
    trainer = tiny_trainer(folder, tiny_model(seed=1), **(STEPS | {"resume": "auto"} | options))
    manifest, _ = find_checkpoint(trainer.run, "auto", trainer.accelerator)
    trainer.resume(manifest)
    trainer.fit()
    return trainer, manifest["step"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = tiny_trainer(tmp_path_factory.mktemp("undisturbed"), **STEPS, keep_checkpoints=9)
    trainer.fit()
    return trainer


# ------------------------------------------------------------------------------------------------------------- kills


# In one process, an exception that nothing catches stands for the kill; torch would catch it inside of a shard.
@pytest.mark.parametrize("stage", [stage for stage in SAVE_STAGES if stage != "half of a shard written"])
def test_a_kill_at_any_stage_of_a_save_loses_nothing(undisturbed, tmp_path, stage):
    trainer = tiny_trainer(tmp_path, **STEPS)

    def kill():
        if trainer.step == 6:
            raise Killed

    with at(stage, kill), pytest.raises(Killed):
        trainer.fit()
    again, step = resumed(tmp_path)
    stages = list(SAVE_STAGES)
    assert step == (6 if stages.index(stage) >= stages.index("just renamed") else 4)
    assert_same(again, undisturbed)
    # Nothing that was half written or half deleted is left.
    assert {path.name for path in again.run.checkpoints.iterdir()} == {"latest", "step-00000006", "step-00000008"}


def test_a_process_killed_within_a_shard_loses_nothing(undisturbed, tmp_path):
    program = f"""
import os, signal, torch
from tests.faults.stages import at
from tests.training.tiny import tiny_trainer
torch.set_num_threads(1)
trainer = tiny_trainer({str(tmp_path)!r}, **{STEPS})
with at("half of a shard written", lambda: trainer.step == 4 and os.kill(os.getpid(), signal.SIGKILL)):
    trainer.fit()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "checkpoints" / ".step-00000004.tmp" / "state").is_dir()
    again, step = resumed(tmp_path)
    assert step == 2
    assert_same(again, undisturbed)


def test_a_torn_row_of_the_log_is_no_row(undisturbed, tmp_path):
    shutil.copytree(undisturbed.run.path, tmp_path, dirs_exist_ok=True)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    with open(tmp_path / "metrics.jsonl", "rb+") as file:
        file.seek(-40, os.SEEK_END)
        file.truncate()
    again, step = resumed(tmp_path)
    assert step == 4
    assert_same(again, undisturbed)


# ------------------------------------------------------------------------------------------- one writer to a folder


@pytest.fixture
def holder(tmp_path):
    """A living process that holds a run's folder, as workers do whose launcher was killed."""
    program = f"""
import time
from contextlib import nullcontext
from pathlib import Path
from training.run_files.folder import RunLock
lock = RunLock(Path({str(tmp_path)!r}), rank=1)
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_trainer_is_refused_within_five_seconds_by_the_name_of_the_holder(holder, tmp_path):
    command = [sys.executable, str(ROOT / "training" / "train.py"), SMOKE, f"train.output_dir={tmp_path}"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert time.perf_counter() - begin < 5
    assert done.returncode == 2 and f"process {holder.pid} on " in done.stderr
    holder.kill()
    holder.wait()
    RunLock(tmp_path).acquire()


def test_who_was_refused_gives_nothing_back(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.2)
    for rank in (0, 1):
        refused = RunLock(tmp_path, rank)
        with pytest.raises(ConfigError, match=f"process {holder.pid} "):
            refused.acquire()
        refused.release()
    with pytest.raises(ConfigError, match=f"process {holder.pid} "):
        RunLock(tmp_path).refuse_held()


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["step", "after the shards", "data", "evaluation"])
def test_a_signal_saves_within_a_step_and_the_resumed_run_is_the_same(undisturbed, tmp_path, moment, number):
    came: list[int] = []
    released = threading.Event()

    def signal_once():
        if trainer.step >= 3 and not came:
            came.append(trainer.step)
            os.kill(os.getpid(), number)
            if moment == "data":
                released.wait(60)  # a source that has stalled

    def evaluate(model, stops):
        signal_once()
        return None if stops() else {"eval/loss_text": 1.0}

    begin = time.perf_counter()
    with StopSignal() as stop_signal:
        trainer = tiny_trainer(tmp_path, **STEPS)
        trainer.stop_signal = stop_signal
        if moment == "evaluation":
            trainer.evaluate, trainer.evaluate_every = evaluate, 1
        there = nullcontext() if moment == "evaluation" else at(moment, signal_once)
        with there, pytest.raises(Interrupted) as interrupted:
            trainer.fit()
    released.set()
    assert time.perf_counter() - begin < 10
    assert interrupted.value.exit_code == 128 + number
    assert came[0] <= trainer.run.saved_steps()[-1] <= came[0] + 1
    again, step = resumed(tmp_path)
    assert step == trainer.step
    assert_same(again, undisturbed)


# --------------------------------------------------------------------------------------------------------- full disks


class Limit:
    """Files of this process cannot grow beyond so many bytes; `lift` ends it."""

    def __init__(self, size: int):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.before[1]))

    def lift(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_the_run_goes_on(undisturbed, tmp_path, asynchronous):
    trainer = tiny_trainer(tmp_path, **STEPS, save_asynchronously=asynchronous)
    train_step, seen = trainer.train_step, {}

    def step_on_a_full_disk(batches):
        if trainer.step == 3:
            trainer.note_failed_save(wait=True)
            seen["limit"] = Limit(100_000)
        if trainer.step == 5:
            trainer.note_failed_save(wait=True)
            seen["limit"].lift()
            seen["failed"], seen["steps"] = trainer.save_failed, trainer.run.saved_steps()
            seen["names"] = {path.name for path in trainer.run.checkpoints.iterdir()}
        return train_step(batches)

    trainer.train_step = step_on_a_full_disk
    trainer.fit()
    assert seen["failed"] and seen["steps"] == [2] and seen["names"] == {"latest", "step-00000002"}
    assert not trainer.save_failed and trainer.run.saved_steps() == [6, 8]
    assert_same(trainer, undisturbed)


def test_rows_that_find_no_room_are_written_later(undisturbed, tmp_path):
    trainer = tiny_trainer(tmp_path, steps=8)
    train_step = trainer.train_step

    def step_on_a_full_disk(batches):
        if trainer.step == 2:
            trainer.limit = Limit(trainer.run.metrics.stat().st_size + 30)  # half a row
        if trainer.step == 6:
            trainer.limit.lift()
        return train_step(batches)

    trainer.train_step = step_on_a_full_disk
    trainer.fit()
    assert rows_of(trainer) == rows_of(undisturbed)


# ------------------------------------------------------------------------------------------------ damaged checkpoints


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_any_file_of_a_checkpoint_is_seen_and_named(undisturbed, tmp_path, kind):
    source = undisturbed.run.checkpoint(8)
    names = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    assert len(names) == 10
    for number, name in enumerate(names):
        checkpoint = tmp_path / "checkpoints" / f"step-{number:08d}"
        shutil.copytree(source, checkpoint)
        assert verify(checkpoint)["step"] == 8
        DAMAGES[kind](checkpoint / name)
        with pytest.raises(DamagedError, match=name.name):
            verify(checkpoint)


def test_damaged_checkpoints_are_passed_over_by_name_and_kept(undisturbed, tmp_path):
    shutil.copytree(undisturbed.run.path, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "checkpoints"
    DAMAGES["flipped bit"](next((checkpoints / "step-00000008" / "state").iterdir()))
    DAMAGES["missing file"](checkpoints / "step-00000006" / "manifest.json")
    trainer = tiny_trainer(tmp_path, tiny_model(seed=1), **STEPS, resume="auto")
    manifest, said = find_checkpoint(trainer.run, "auto", trainer.accelerator)
    assert manifest["step"] == 4 and "step-00000008 is passed over: state/shard-" in said[0]
    assert said[1] == "step-00000006 is passed over: manifest.json is missing"
    trainer.resume(manifest)
    trainer.fit()
    assert_same(trainer, undisturbed)
    assert (checkpoints / "damaged-step-00000008").is_dir() and (checkpoints / "damaged-step-00000006").is_dir()


def test_where_all_checkpoints_are_damaged_the_run_is_refused_and_nothing_deleted(undisturbed, tmp_path):
    shutil.copytree(undisturbed.run.path, tmp_path, dirs_exist_ok=True)
    for step in undisturbed.run.saved_steps():
        DAMAGES["truncated file"](tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json")
    files = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}  # noqa: E731
    before = files()
    trainer = tiny_trainer(tmp_path, **STEPS, resume="auto")
    with pytest.raises(ConfigError, match="no checkpoint in .* is intact .*step-00000002 is passed over"):
        find_checkpoint(trainer.run, "auto", trainer.accelerator)
    assert before == files()


@pytest.mark.parametrize("place", ["state/.metadata", "state/weights.pt", "a shard", "pretrained/pytorch_model.bin"])
def test_a_pickle_in_a_checkpoint_that_states_its_hash_is_not_executed(undisturbed, tmp_path, place):
    shutil.copytree(undisturbed.run.path, tmp_path, dirs_exist_ok=True)
    trainer = tiny_trainer(tmp_path, tiny_model(seed=1), **STEPS, resume="auto")
    checkpoint, marker = trainer.run.checkpoint(8), tmp_path / "executed"
    shard = next((checkpoint / "state").iterdir())
    (shard if place == "a shard" else checkpoint / place).write_bytes(pickled(marker))
    reseal(checkpoint)
    manifest, skipped = newest_intact(trainer.run)
    assert manifest["step"] == 8 and not skipped  # as far as hashes can tell
    if place == "a shard":
        with pytest.raises(ConfigError, match="does not fit this model"):
            trainer.resume(manifest)
        with pytest.raises(ConfigError, match="does not fit this model"):
            read_tensors(checkpoint, state_tensors(trainer.raw_model, trainer.raw_optimizer))
    else:
        trainer.resume(manifest)
        assert_same(trainer, undisturbed)
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir", "python/object/new:os.mkdir", "python/name:os.mkdir"])
def test_python_tags_in_a_recipe_are_refused(tmp_path, tag):
    made = tmp_path / "made"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train: !!{tag} [{str(made)!r}]\n")
    with pytest.raises(ConfigError, match="python"):
        read_yaml(recipe)
    with pytest.raises(ConfigError, match="python"):
        override({}, [f"train=!!{tag} [{str(made)!r}]"])
    assert not made.exists()


# ------------------------------------------------------------------------------------------------------------- spikes


def spikes_in(losses) -> list[int]:
    detector = SpikeDetector(8.0)
    return [place for place, loss in enumerate(losses) if detector.sees(float(loss))]


def test_the_losses_of_a_real_run_are_no_spikes():
    losses = json.loads((Path(__file__).parent / "losses_of_a_run.json").read_text())
    assert len(losses) == 1000 and spikes_in(losses) == []
    # And each of these is one, once, however long it lasts.
    for begin, length in ((300, 1), (500, 5), (900, 20)):
        spiked = list(losses)
        spiked[begin : begin + length] = [loss + 2 for loss in losses[begin : begin + length]]
        assert spikes_in(spiked) == [begin]


NOISE = {
    "normal": lambda random: random.normal(0, 1, 1000),
    # Each loss the mean over so few independent targets that it is skewed: exponential negative log-likelihoods.
    "few_targets": lambda random: 4 * random.exponential(1, (1000, 16)).mean(1),
    "lognormal": lambda random: 3 * random.lognormal(0, 0.3, 1000),
    # A third of the steps has no picture.
    "two_levels": lambda random: 0.3 * random.normal(0, 1, 1000) + 10 * (random.random(1000) < 0.33),
}


@pytest.mark.parametrize("noise", NOISE)
def test_noisy_losses_are_no_spikes_in_a_thousand_steps(noise):
    for seed in range(5):
        losses = 2 + 6 * np.exp(-np.arange(1000) / 150) + 0.1 * NOISE[noise](np.random.default_rng(seed))
        assert spikes_in(losses) == [], seed


def test_a_new_level_of_the_loss_is_one_spike():
    random = np.random.default_rng(0)
    losses = 2 + 0.05 * random.normal(0, 1, 600)
    losses[300:] += 3
    assert spikes_in(losses) == [300]


def test_updates_of_a_spike_are_left_out_when_asked_for(tmp_path):
    for skips in (False, True):
        guard = UpdateGuard(not_finite_limit=0, spike_threshold=8.0, skip_spikes=skips)
        judged = [guard.judge(loss, 1.0) for loss in [*np.linspace(2, 2.1, 50), 9.0, 9.0, 2.0]][-3:]
        event = "spike_skipped" if skips else "spike"
        assert judged == [(not skips, event), (not skips, event if skips else None), (True, None)]
        assert guard.skipped == (2 if skips else 0)


# ----------------------------------------------------------------------------------------------------------- trackers


@pytest.mark.parametrize("call", ["init_trackers", "log"])
def test_a_tracker_that_is_down_does_not_end_the_run(undisturbed, tmp_path, call, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path, **STEPS)

    def down(*arguments, **options):
        raise ConnectionError("the tracker is down")

    monkeypatch.setattr(trainer.accelerator, call, down)
    trainer.metrics.trackers.start("project", {})
    trainer.fit()
    assert_same(trainer, undisturbed)
    assert caplog.text.count("the tracker failed") == 1


# ---------------------------------------------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder of what two sharded ranks have met, rank 0's exit code, seconds until it noticed that rank 1 stands)."""
    for attempt in range(2):
        folder = tmp_path_factory.mktemp("ranks")
        both = start_ranks("tests.training.fault_ranks", [str(folder)])
        try:
            _, status = os.waitpid(both[1].pid, os.WUNTRACED)
            begin = time.perf_counter()
            if not os.WIFSTOPPED(status):
                both[0].kill()
                outputs = [process.communicate()[0] for process in both]
                if attempt == 0 and lost(outputs):
                    continue
                pytest.fail("\n".join(outputs))
            printed, _ = both[0].communicate(timeout=60)
            seconds = time.perf_counter() - begin
            break
        finally:
            for process in both:
                process.kill()
                process.wait()
    return folder, both[0].returncode, seconds, printed


def outcomes(ranks, name: str) -> list[dict]:
    return [json.loads((ranks[0] / name / f"outcome-{rank}.json").read_text()) for rank in range(2)]


def test_what_is_not_finite_on_one_rank_changes_no_parameter_on_any(ranks):
    assert outcomes(ranks, "not_finite") == [{"unchanged": [2, 4], "skipped": 2}] * 2
    rows, _ = read_metrics(ranks[0] / "not_finite" / "metrics.jsonl")
    assert [row["event"] for row in rows] == [None, "not_finite", None, "not_finite", None, None]
    assert rows[1]["loss"] is None and rows[3]["grad_norm"] is None


def test_too_many_steps_that_are_not_finite_end_all_ranks_with_a_checkpoint(ranks):
    for outcome in outcomes(ranks, "never_finite"):
        assert outcome["step"] == 5 and outcome["saved"] == [5]
        assert "not finite for 4 steps in a row, up to step 5" in outcome["error"]


def test_a_signal_that_one_rank_sees_late_ends_both_after_the_same_step(ranks):
    first, second = outcomes(ranks, "late_signal")
    assert first == second == {"step": first["step"], "saved": [first["step"]], "code": 143}
    assert first["step"] in (4, 5)


def test_a_disk_that_is_full_for_one_rank_fails_the_save_of_both_and_no_other(ranks):
    for outcome in outcomes(ranks, "full_disk"):
        assert outcome["saved"] == [2, 6] and outcome["left"] == ["latest", "step-00000002", "step-00000006"]
        assert len(outcome["failed"]) == 1 and "No space left on device" in outcome["failed"][0]
        assert "(rank 1)" in outcome["failed"][0]


def test_a_stopped_rank_is_noticed_within_the_timeout_and_leaves_an_intact_checkpoint(ranks):
    folder, code, seconds, printed = ranks
    assert code != 0 and seconds < TIMEOUT + 5, printed
    assert verify(folder / "stopped_rank" / "checkpoints" / "step-00000002")["step"] == 2


# --------------------------------------------------------------------------------------------------------- whole runs


def train(place, *words) -> int:
    """training/train.py in this process."""
    from training.train import main

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOT_CACHE", str(place / "cache"))
        patch.chdir(place)
        common = ["train.cpu=true", "train.cpu_threads=1", "train.progress_bar=false", "train.precision=float32"]
        return main([SMOKE, *common, "samples.enabled=false", "evaluation.every=0", *words])


SECRETS = ("hf_AbCdEfGhIjKlMnOp", "pa55w0rd", "s3cretkey")


@pytest.fixture(scope="module")
def failed_run(tmp_path_factory):
    """(place, exit code, what was printed) of a run whose disk is full from its third step on."""
    place, steps = tmp_path_factory.mktemp("place"), []

    def fill():
        steps.append(1)
        if len(steps) == 5:  # two micro-batches a step
            steps.append(Limit(200_000))

    segment = f"text:{{word}} {SECRETS[0]} https://user:{SECRETS[1]}@hub/ api_key={SECRETS[2]}"
    words = [f"data.sources.1.templates.0.segments.0='{segment}'"]
    try:
        with at("step", fill):
            code = train(place, "train.output_dir=run", *words)
    finally:
        steps[5].lift()
    return place, code, words


def test_a_last_checkpoint_that_cannot_be_written_is_an_exit_code(failed_run):
    place, code, _ = failed_run
    assert code == 3
    assert newest_intact_step(place / "run") == 2 and not (place / "run" / "final").exists()


def newest_intact_step(run: Path) -> int:
    from training.run_files.folder import RunFolder

    manifest, skipped = newest_intact(RunFolder(run))
    assert not skipped
    return manifest["step"]


def test_a_source_that_shrank_is_refused_and_a_restored_one_goes_on(failed_run, capsys):
    place, _, words = failed_run
    resume = ["train.output_dir=run", "train.resume=auto", *words]
    assert train(place, *resume, "data.sources.0.limit=5") == 2
    assert "data was" in capsys.readouterr().err
    assert train(place, *resume) == 0
    steps = [row["step"] for row in read_metrics(place / "run" / "metrics.jsonl")[0]]
    assert steps == [1, 2, 3, 4]
    printed = capsys.readouterr()
    assert not any(secret in printed.err + printed.out for secret in SECRETS)
    texts = [p for p in (place / "run").rglob("*") if p.suffix in (".json", ".jsonl", ".yaml", ".md")]
    assert {"manifest.json", "config.yaml", "metrics.jsonl"} <= {path.name for path in texts}
    for path in texts:
        assert not any(secret in path.read_text(encoding="utf-8") for secret in SECRETS), path


def test_credentials_in_an_address_that_does_not_answer_are_not_printed(tmp_path, capsys):
    address = f"https://user:{SECRETS[1]}@127.0.0.1:9/processor"
    assert train(tmp_path, "train.output_dir=run", f"model.processor={address}") == 2
    printed = capsys.readouterr().err
    assert "127.0.0.1:9" in printed and SECRETS[1] not in printed


# ---------------------------------------------------------------------------------------------------------- long form


@pytest.mark.slow
def test_the_long_form_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.faults", "--long", "--json", str(tmp_path / "table.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["kills"]["times"] >= 20
    assert all(row["rows_changed"] == row["checkpoints_lost"] == 0 for row in table.values())


def test_a_table_says_what_was_lost_and_what_is_wrong():
    outcome = Outcome(times=3, rows_changed=1, checkpoints_lost=2, remarks=["in 4 s"], wrong=["row 7 differs\nlong"])
    row = table({"kills": outcome}).splitlines()[-1]
    assert row.endswith("at random moments | 3 | 1 | 2 | in 4 s; **row 7 differs** |")
