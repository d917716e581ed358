"""Run training/train.py and let faults happen to it; `python -m tests.faults` launches this in place of train.py.

The variable MOT_FAULT holds JSON. Each fault has `do`, a key of `ACTIONS` or `CHANGES`; `at` and `nth`: it happens when
the process comes to this moment of stages.py for the nth time (a step has one micro-batch here); `rank`, the rank that
it happens to; and `notes`, a folder. The fault is noted there, so that it happens once, even if the run is restarted.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import psutil
from accelerate import Accelerator

from tests.faults.stages import at
from training import train, trainer
from training.run_files.metrics import iterate_rows


RANK = int(os.environ.get("RANK", 0))


def _kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def _kill_tree() -> None:
    launcher = psutil.Process().parent()
    others = [process.pid for process in launcher.children(recursive=True) if process.pid != os.getpid()]
    for process in (launcher.pid, *others, os.getpid()):
        _kill(process)


def _signal_all(number: int) -> None:
    launcher = psutil.Process().parent()
    for process in (launcher, *launcher.children(recursive=True)):
        process.send_signal(number)


def _fill(fault: dict) -> None:
    """Leave no room on the run's small disk; without one, for any file of this process."""
    if fault["filler"] is None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return
    with open(fault["filler"], "wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            return


def _make_room(fault: dict) -> None:
    if fault["filler"] is None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        Path(fault["filler"]).unlink()


ACTIONS = {
    "kill": lambda fault: _kill(os.getpid()),
    "kill tree": lambda fault: _kill_tree(),
    "kill launcher": lambda fault: _kill(os.getppid()),
    "stop": lambda fault: os.kill(os.getpid(), signal.SIGSTOP),
    "fill": _fill,
    "SIGTERM launcher": lambda fault: os.kill(os.getppid(), signal.SIGTERM),
    "SIGINT launcher": lambda fault: os.kill(os.getppid(), signal.SIGINT),
    "SIGTERM all": lambda fault: _signal_all(signal.SIGTERM),
    "SIGINT all": lambda fault: _signal_all(signal.SIGINT),
}


class Happening:
    """A fault that is to happen in this process, and how often the process has come to its moment."""

    def __init__(self, fault: dict):
        self.fault = fault
        self.times = 0
        self.notes = Path(fault["notes"])
        self.mine = fault.get("rank") in (None, RANK)

    def __call__(self) -> None:
        """The process has come to the moment once more."""
        fault = self.fault
        self.times += 1
        if fault["do"] == "kill launcher" and self.times == fault["nth"] + 1:
            while not (self.notes / "go").exists():  # an orphan stays until the bench has looked at it
                time.sleep(0.1)
        if fault["do"] == "fill" and self.times == fault.get("until"):
            _make_room(fault)
        if self.times != fault["nth"] or (self.notes / "note.json").exists():
            return

        # Note the fault first, since it may end the process.
        run = Path(fault["run"])
        rows = list(iterate_rows(run / "metrics.jsonl")) if (run / "metrics.jsonl").is_file() else []
        step = max((row["step"] for row in rows), default=0)
        (self.notes / "note.json").write_text(json.dumps({"time": time.time(), "step": step}), encoding="utf-8")
        ACTIONS[fault["do"]](fault)
        if fault["at"] == "data":
            threading.Event().wait()  # a source that has stalled


def _change_loss(fault: dict):
    """Change the loss or its gradient on one rank, from step `nth` on, for `steps` steps."""
    combine, calls = trainer.combine, []
    is_mine = fault.get("rank") in (None, RANK)

    def changed(*arguments):
        loss = combine(*arguments)
        calls.append(1)
        if not is_mine or not fault["nth"] <= len(calls) < fault["nth"] + fault.get("steps", 1):
            return loss
        if fault["do"] == "infinite gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss
        return loss * (float("nan") if fault["do"] == "nan loss" else 5.0)

    return mock.patch.object(trainer, "combine", changed)


def _take_tracker_down(fault: dict):
    def down(self, *arguments, **options):
        raise ConnectionError("the tracker is down")

    return mock.patch.object(Accelerator, fault["call"], down)


CHANGES = {
    "nan loss": _change_loss,
    "infinite gradient": _change_loss,
    "high loss": _change_loss,
    "tracker down": _take_tracker_down,
}


def main() -> int:
    faults = json.loads(os.environ.get("MOT_FAULT", "[]"))
    with ExitStack() as stack:
        for fault in faults:
            happening = Happening(fault)
            if fault["do"] in CHANGES:
                stack.enter_context(CHANGES[fault["do"]](fault))
            elif happening.mine:
                stack.enter_context(at(fault["at"], happening))
        code = train.main()
    for fault in faults[:1]:
        (Path(fault["notes"]) / f"code-{RANK}").write_text(str(code), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
