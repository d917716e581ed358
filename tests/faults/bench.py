"""Launch runs, disturb them, and compare them with a run that was not disturbed."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from training.run_files.checkpoints import DamagedError, verify
from training.run_files.folder import RunFolder
from training.run_files.metrics import read_metrics


ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "training" / "configs" / "smoke.yaml"
TRAIN = ROOT / "training" / "train.py"
# Each rank takes one row a step, arithmetic is exact, and nothing is drawn at the end.
WORDS = (
    "model.hidden_size=32", "model.intermediate_size=64", "train.rows=1", "train.accumulation=1",
    "train.precision=float32", "train.cpu_threads=1", "train.progress_bar=false", "samples.enabled=false",
    "evaluation.every=0", "train.save_every=1",
)  # fmt: skip
COMPARED = re.compile(r"step|loss.*|tokens_(?!per_second).*|grad_norm.*|lr|event|skipped_steps")


@dataclass
class Outcome:
    """A row of the table; `wrong` lists what went wrong."""

    times: int = 0
    rows_changed: int = 0
    checkpoints_lost: int = 0
    remarks: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def expect(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            self.wrong.append(otherwise)

    def injected(self, ended: "Ended") -> None:
        """Count a fault of the victim, if it happened."""
        if ended.note is None:
            self.wrong.append(f"nothing happened; the launcher ended with {ended.code}: {ended.printed[-1500:]}")
        else:
            self.times += 1


@dataclass
class Ended:
    """A launch that has ended.

    Attributes:
        code: exit code of the launcher.
        codes: rank -> exit code, of the ranks that ended by themselves.
        printed: everything that was printed.
        seconds: how long the launch took.
        note: when, and after which step, the fault happened; None if it did not happen.
    """

    code: int
    codes: dict[int, int]
    printed: str
    seconds: float
    note: dict | None

    @property
    def seconds_after(self) -> float:
        return self.seconds if self.note is None else self.note["ended"] - self.note["time"]


class Bench:
    """A folder for runs, with the undisturbed run of `steps` steps that they are compared with."""

    def __init__(self, folder: Path, ranks: int, steps: int, times: int):
        self.folder = folder.resolve()
        self.ranks = ranks
        self.steps = steps
        self.times = times
        self.folder.mkdir(parents=True, exist_ok=True)
        self.launches = 0
        self._references: dict[int, Path] = {}

    def reference(self, ranks: int | None = None) -> Path:
        """Return the folder of the undisturbed run, which keeps all its checkpoints; it runs at the first call."""
        ranks = ranks or self.ranks
        if ranks not in self._references:
            run = self.folder / f"undisturbed-{ranks}"
            ended = self.launch(run, f"train.keep_checkpoints={self.steps}", ranks=ranks)
            if ended.code:
                raise RuntimeError(f"the undisturbed run failed: {ended.printed}")
            self._references[ranks] = run
        return self._references[ranks]

    # --------------------------------------------------------------------------------------------------- launching

    def start(
        self, run: Path, *words: str, faults: Sequence[dict] = (), ranks: int | None = None, options: Sequence[str] = ()
    ) -> subprocess.Popen:
        """Launch a training in a session of its own, with `faults` that happen to it (see victim.py)."""
        # The victim writes its notes, and we write what it prints, into a folder of this launch.
        self.launches += 1
        notes = self.folder / f"notes-{self.launches:03d}"
        notes.mkdir()
        faults = [{"run": str(run), "notes": str(notes), **fault} for fault in faults]

        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", launcher_file(ranks or self.ranks)]
        command += [*options, *(["-m", "tests.faults.victim"] if faults else [str(TRAIN)]), str(CONFIG), *WORDS]
        command += [f"train.steps={self.steps}", f"train.output_dir={run}", "train.resume=auto", *words]
        environment = os.environ | {
            "MOT_FAULT": json.dumps(faults), "MOT_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with open(notes / "printed", "wb") as printed:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=printed, stderr=printed, start_new_session=True
            )
        process.notes, process.begin = notes, time.time()
        return process

    def end(self, process: subprocess.Popen, timeout: float = 300) -> Ended:
        """Wait for a launch and its workers. A launch that hangs is killed, and its code is then -9."""
        # The launcher first; its workers are remembered, since they may outlive it.
        workers = []
        try:
            while process.poll() is None:
                workers = psutil.Process(process.pid).children(recursive=True) or workers
                if time.time() - process.begin > timeout:
                    raise subprocess.TimeoutExpired(process.args, timeout)
                time.sleep(0.05)
        except (psutil.Error, subprocess.TimeoutExpired):
            if process.poll() is None and time.time() - process.begin > timeout:
                process.kill()
        process.wait()
        ended = time.time()
        for worker in psutil.wait_procs(workers, timeout=5)[1]:
            worker.kill()

        # Collect what the ranks noted.
        note = process.notes / "note.json"
        codes = {int(path.name[5:]): int(path.read_text()) for path in process.notes.glob("code-*")}
        note = json.loads(note.read_text(encoding="utf-8")) | {"ended": ended} if note.is_file() else None
        printed = (process.notes / "printed").read_text(encoding="utf-8", errors="replace")
        return Ended(process.returncode, codes, printed, ended - process.begin, note)

    def launch(self, run: Path, *words: str, timeout: float = 300, **how) -> Ended:
        return self.end(self.start(run, *words, **how), timeout)

    def new(self, name: str) -> Path:
        """Return a folder for a new run."""
        return self.folder / name

    def copy(self, name: str, newest: int = 6) -> Path:
        """Copy the undisturbed run with `newest` checkpoints, as if it had been cut off before its last steps."""
        source, run = self.reference(), self.new(name)
        shutil.copytree(source, run, ignore=shutil.ignore_patterns("step-*", "final", "latest"))
        steps = RunFolder(source).saved_steps()[-newest - 2 : -2]
        for step in steps:
            shutil.copytree(RunFolder(source).checkpoint(step), RunFolder(run).checkpoint(step))
        RunFolder(run).point_latest(RunFolder(run).checkpoint(steps[-1]).name)
        return run

    # --------------------------------------------------------------------------------------------------- comparing

    def finish(self, run: Path, outcome: Outcome, *words: str, **how) -> Ended:
        """Resume to the end without faults, and compare the log and the weights with the undisturbed run's."""
        ended = self.launch(run, *words, **how)
        outcome.expect(ended.code == 0, f"the resumed run ended with {ended.code}: {ended.printed[-1500:]}")
        self.compare(run, outcome, how.get("ranks"))
        return ended

    def compare(self, run: Path, outcome: Outcome, ranks: int | None = None) -> None:
        """Note every row of the log, and the final weights, that differ from the undisturbed run's."""
        expected, found = (rows_by_step(folder) for folder in (self.reference(ranks), run))
        changed = [step for step in sorted(expected.keys() | found.keys()) if expected.get(step) != found.get(step)]
        outcome.rows_changed += len(changed)
        outcome.expect(not changed, f"rows {changed[:5]} differ")
        same = weights_hash(self.reference(ranks)) == weights_hash(run)
        outcome.expect(same, "the final weights differ")

    def check_checkpoints(self, run: Path, outcome: Outcome, at_least: int) -> int:
        """Count checkpoints that are damaged or gone; return the step of the newest one."""
        intact = []
        for step in RunFolder(run).saved_steps():
            try:
                verify(RunFolder(run).checkpoint(step))
                intact.append(step)
            except DamagedError as error:
                outcome.checkpoints_lost += 1
                outcome.wrong.append(f"step {step}: {error}")
        newest = max(intact, default=0)
        if newest < at_least:
            outcome.checkpoints_lost += 1
            outcome.wrong.append(f"step {at_least} was there, {newest} is the newest now")
        return newest


def launcher_file(ranks: int) -> str:
    """Return the path of Accelerate's configuration for so many processes on CPUs."""
    return str(ROOT / "training" / "configs" / "accelerate" / {1: "cpu.yaml", 2: "cpu-2-fsdp.yaml"}[ranks])


def rows_by_step(run: Path) -> dict[int, dict]:
    rows, _ = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else ([], [])
    return {row["step"]: {key: value for key, value in row.items() if COMPARED.fullmatch(key)} for row in rows}


def weights_hash(run: Path) -> str | None:
    path = run / "final" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
