"""Run the runs of a study: several at once, each a process of its own, which a failure of another does not touch."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from training.study.specification import StudyRun
from training.world import StopSignal


TRAIN = Path(__file__).parents[1] / "train.py"
_POLL_SECONDS = 0.2
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def run_all(
    runs: Sequence[StudyRun],
    workers: int,
    launcher: Sequence[str],
    logs: Path,
    stop_signal: StopSignal,
    say: Callable[[str], None],
    after_each: Callable[[], None],
) -> dict[str, str]:
    """Start the runs in order, `workers` at a time, and wait for them; return name -> why it failed, of those that did.

    A signal is passed on once to all living runs, which then write their checkpoints; no further run is started.

    Args:
        logs: folder that gets what each run prints, appended to `<name>.log`.
        after_each: called after each run that has ended by itself, while others are left.

    Raises:
        KeyboardInterrupt: a second signal came; the living runs have got one too, and end at once.
    """
    waiting, failed = list(runs), {}
    living: dict[str, tuple[StudyRun, subprocess.Popen]] = {}
    logs.mkdir(parents=True, exist_ok=True)
    passed_on = False
    try:
        while living or (waiting and not stop_signal.number):
            # Start runs while there is room, or end those that live.
            while waiting and len(living) < workers and not stop_signal.number:
                run = waiting.pop(0)
                living[run.name] = run, _start(run, launcher, logs)
                say(f"{run.name}: started")
            if stop_signal.number and not passed_on:
                passed_on = True
                _signal(living, stop_signal.number)

            # Look after those that have ended.
            time.sleep(_POLL_SECONDS)
            for run, process in list(living.values()):
                if process.poll() is None:
                    continue
                del living[run.name]
                if process.returncode == 0 and run.is_finished():
                    say(f"{run.name}: finished; {len(waiting) + len(living)} to go")
                elif stop_signal.number:
                    say(f"{run.name}: ended with code {process.returncode}; the same command goes on with it")
                else:
                    failed[run.name] = f"code {process.returncode}: {_last_line(logs / f'{run.name}.log')}"
                    say(f"{run.name}: failed, {failed[run.name]}")
                if (waiting or living) and not stop_signal.number:
                    after_each()
    except BaseException:
        _signal(living, stop_signal.number or signal.SIGTERM)
        raise
    return failed


def _start(run: StudyRun, launcher: Sequence[str], logs: Path) -> subprocess.Popen:
    run.write_recipe()
    with open(logs / f"{run.name}.log", "ab") as log:
        return subprocess.Popen(
            [*(launcher or [sys.executable]), str(TRAIN), str(run.recipe_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            # A terminal's Ctrl-C would reach the run beside the signal that is passed on.
            start_new_session=True,
            preexec_fn=None if _LIBC is None else _end_with_the_study,
        )


def _end_with_the_study() -> None:
    """On Linux, let this process get SIGTERM when the study dies, so that a killed study leaves no run behind."""
    pr_set_pdeathsig = 1
    _LIBC.prctl(pr_set_pdeathsig, signal.SIGTERM)


def _signal(living: dict[str, tuple[StudyRun, subprocess.Popen]], number: int) -> None:
    for _, process in living.values():
        if process.poll() is None:
            process.send_signal(number)


def _last_line(log: Path) -> str:
    """Return the last line that a run has printed; an error of the trainer is one line."""
    lines = log.read_bytes()[-10_000:].decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
