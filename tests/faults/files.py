"""Faults of files: full disks, damaged checkpoints, and checkpoints that an attacker made."""

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from tests.faults.bench import Bench, Outcome
from tests.faults.damage import DAMAGES, kinds_of_file, pickled, reseal
from training.config import ConfigError
from training.consolidate import consolidate
from training.run_files.checkpoints import DamagedError, verify
from training.run_files.folder import RunFolder


@contextmanager
def small_disk(folder: Path, megabytes: int):
    """Mount a file system in memory, in a namespace of its own; gives None if this user may not."""
    folder.mkdir()
    command = f"mount -t tmpfs -o size={megabytes}m tmpfs '{folder}' && echo mounted && exec sleep 100000"
    process = subprocess.Popen(["unshare", "-rm", "sh", "-c", command], stdout=subprocess.PIPE, text=True)
    try:
        is_mounted = process.stdout.readline() == "mounted\n"
        yield Path(f"/proc/{process.pid}/root{folder}") if is_mounted else None
    finally:
        process.kill()
        process.wait()


def full_disk(bench: Bench) -> Outcome:
    """The disk is full during saves, for a while and then for good, saved at once and asynchronously."""
    outcome = Outcome()
    for asynchronous in ("false", "true"):
        with small_disk(bench.folder / f"disk-{asynchronous}", 96) as disk:
            filler = None if disk is None else str(disk / "filler")
            run = (disk or bench.folder / f"full-{asynchronous}") / "run"
            words = [f"train.save_asynchronously={asynchronous}"]
            rank = None if disk is None else 0

            # Full for a while: saves fail, the run goes on and ends like the undisturbed one.
            fault = {"do": "fill", "at": "step", "filler": filler, "rank": rank}
            ended = bench.launch(run, *words, faults=[fault | {"nth": 5, "until": 9}])
            outcome.injected(ended)
            outcome.expect(ended.code == 0, f"with room again the run ended with {ended.code}: {ended.printed[-1500:]}")
            outcome.expect("could not be written" in ended.printed, "no failed save was reported")
            bench.compare(run, outcome)

            # Full for good: the last save fails, and so does the run. With room again it can be resumed.
            for name in ("final", "checkpoints", "metrics.jsonl"):
                entry = run / name
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            ended = bench.launch(run, *words, faults=[fault | {"nth": 5}])
            outcome.injected(ended)
            outcome.expect(set(ended.codes.values()) == {3}, f"without room the ranks ended with {ended.codes}")
            bench.check_checkpoints(run, outcome, 3)
            if filler is not None:
                os.unlink(filler)
            bench.finish(run, outcome)
            how = "RLIMIT_FSIZE" if disk is None else "a tmpfs"
    outcome.remarks = [f"{how}; the run goes on, and ends with code 3 where the last save failed"]
    return outcome


def damage(bench: Bench) -> Outcome:
    """A flipped bit, a truncated, missing, extra or linked file, in every kind of file of a checkpoint."""
    # Every damage of every kind of file is noticed, and the file is named.
    outcome, source = Outcome(), RunFolder(bench.reference())
    newest = source.checkpoint(source.saved_steps()[-1])
    for name in kinds_of_file(newest):
        for kind, do in DAMAGES.items():
            copy = bench.folder / "damaged" / "checkpoints" / newest.name
            shutil.rmtree(copy.parent, ignore_errors=True)
            shutil.copytree(newest, copy)
            do(copy / name)
            outcome.times += 1
            try:
                verify(copy)
                outcome.wrong.append(f"{kind}, {name}: not noticed")
            except DamagedError as error:
                outcome.expect(Path(name).name in str(error), f"{kind}, {name}: {error}")

    # A run whose newest checkpoints are damaged passes over them, keeps them aside, and goes on from an older one.
    run = RunFolder(bench.copy("passed-over", newest=len(DAMAGES) + 1))
    steps, names = run.saved_steps()[1:], list(kinds_of_file(newest))
    for number, (step, do) in enumerate(zip(steps, DAMAGES.values(), strict=True)):
        do(run.checkpoint(step) / names[2 * number % len(names)])
    ended = bench.finish(run.path, outcome)
    for step in steps:
        said = f"{run.checkpoint(step).name} is passed over: " in ended.printed
        outcome.expect(said, f"step {step} was not passed over by name")
        kept = (run.checkpoints / f"damaged-{run.checkpoint(step).name}").is_dir()
        outcome.expect(kept, f"the damaged checkpoint of step {step} is gone")
    outcome.remarks = [f"all named; a run whose newest {len(steps)} were damaged went on from the one before them"]
    return outcome


def all_damaged(bench: Bench) -> Outcome:
    """Every checkpoint is damaged: refused, and nothing is deleted."""
    outcome, run = Outcome(), RunFolder(bench.copy("all-damaged", newest=3))
    for step in run.saved_steps():
        DAMAGES["truncated file"](next(iter(kinds_of_file(run.checkpoint(step)).values())))
        outcome.times += 1
    before = _contents(run.path)
    begin = time.perf_counter()
    ended = bench.launch(run.path, faults=[{"do": "kill", "at": "step", "nth": -1}])
    outcome.expect(set(ended.codes.values()) == {2}, f"the ranks ended with {ended.codes}")
    named = all(f"{run.checkpoint(step).name} is passed over" in ended.printed for step in run.saved_steps())
    outcome.expect("no checkpoint in" in ended.printed and named, f"not said: {ended.printed[-800:]}")
    outcome.expect(_contents(run.path) == before, "the folder is another than before")
    outcome.remarks = [f"code 2 after {time.perf_counter() - begin:.0f} s, nothing deleted"]
    return outcome


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "locks" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def pickles(bench: Bench) -> Outcome:
    """A pickle in a checkpoint whose manifest vouches for it: .metadata, .pt, .bin, and one called .safetensors."""
    # Pickles beside the shards are not read at all.
    outcome, marker = Outcome(), bench.folder / "executed"
    run = RunFolder(bench.copy("pickles", newest=2))
    for step in run.saved_steps():
        for name in ("state/.metadata", "state/weights.pt", "pretrained/pytorch_model.bin", "pretrained/optimizer.pkl"):
            (run.checkpoint(step) / name).write_bytes(pickled(marker))
            outcome.times += 1
        reseal(run.checkpoint(step))
    bench.finish(run.path, outcome)

    # A pickle in the place of a shard is refused, by the trainer and by consolidate.
    run = RunFolder(bench.copy("pickled-shard", newest=2))
    for step in run.saved_steps():
        next(iter(kinds_of_file(run.checkpoint(step)).values())).write_bytes(pickled(marker))
        reseal(run.checkpoint(step))
        outcome.times += 1
    ended = bench.launch(run.path, faults=[{"do": "kill", "at": "step", "nth": -1}])
    outcome.expect(set(ended.codes.values()) == {2}, f"ranks ended with {ended.codes}: {ended.printed[-800:]}")
    try:
        consolidate(run, output=bench.folder / "consolidated")
        outcome.wrong.append("a pickled shard was consolidated")
    except ConfigError:
        pass
    outcome.expect(not marker.exists(), "a pickle was executed")
    outcome.remarks = ["none executed; a pickled shard is refused with code 2"]
    return outcome
