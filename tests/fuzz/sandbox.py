"""Run one case in a process of its own, with a deadline and a bound on memory, and watch the files that it opens.

The process is forked from one that has imported everything. So a case takes milliseconds, and each begins from the same
state. Only its `Outcome` stays.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import datasets

from . import files, verdicts
from .case import Area, Case, Place


CPU_SECONDS, WALL_SECONDS = 20, 60  # wall time is longer, for cases that wait and for busy machines
GIGABYTE = 2**30
_ADDRESSES = 4 * GIGABYTE  # address space beyond what is mapped already; threads reserve part of it
# Programs that our commands and their libraries start by design; an input must not start any other.
_PROGRAMS = {
    Path(sys.executable).name,
    "python",
    "python3",
    "git",
    "uname",
    "ldconfig",
    "gcc",
    "cc",
    "lscpu",
    "nvidia-smi",
}


@dataclass
class Outcome:
    """How a case ended."""

    area: str
    seed: int
    verdict: str
    says: str = ""
    detail: str = ""
    seconds: float = 0.0
    grown: int = 0  # peak memory in bytes, above that of the process at its start

    def worse(self, verdict: str, detail: str) -> None:
        """Replace the verdict of the case's own process, and keep its detail."""
        self.verdict = verdict
        self.detail = f"{detail}; {self.detail}" if self.detail else detail


def run_case(name: str, area: Area, seed: int, folder: Path, loud: bool = False) -> Outcome:
    """Run a case and judge it.

    Args:
        folder: the case's own folder is made here, and removed at the end.
        loud: whether tracebacks and printed text go to stderr.
    """
    area.warm()
    root = Path(tempfile.mkdtemp(prefix="case-", dir=folder))
    place = Place(root / "inside", root / "outside", root / "ran")
    try:
        place.inside.mkdir()
        files.write_secrets(place.outside)
        with Watch(place.outside) as watch:
            begin = time.perf_counter()
            pid = os.fork()
            if not pid:
                _child(area, f"{name}/{seed}", place, root)
            outcome = _wait(pid, root, Outcome(name, seed, verdicts.ACCEPTED))
            outcome.seconds = round(time.perf_counter() - begin, 2)
            opened = watch.opened()
        if opened:
            outcome.worse(verdicts.OUTSIDE, f"opened {', '.join(sorted(opened))}")
        if place.ran.exists():
            outcome.worse(verdicts.CODE, "code in the input was run")
        if loud:
            for file in ("traceback", "printed"):
                if (root / file).is_file():
                    print((root / file).read_text(errors="replace"), file=sys.stderr)
        return outcome
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _wait(pid: int, root: Path, outcome: Outcome) -> Outcome:
    """Return the child's report or, if it left none, how it ended."""
    handle = os.pidfd_open(pid)
    ended, _, _ = select.select([handle], [], [], WALL_SECONDS)
    os.close(handle)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # programs that it started
    report = json.loads(_read(root / "report") or "{}")
    for field, value in report.items():
        setattr(outcome, field, value)
    outcome.grown = max(0, usage.ru_maxrss * 1024 - outcome.grown)
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if not ended or killed_by == signal.SIGXCPU:
        outcome.worse(verdicts.HANG, f"not done after {CPU_SECONDS} s of CPU or {WALL_SECONDS} s")
    elif killed_by or "verdict" not in report:
        name = signal.Signals(killed_by).name if killed_by else f"exit code {os.waitstatus_to_exitcode(status)}"
        outcome.worse(verdicts.CRASH, f"the process ended with {name}: {_read(root / 'printed')[-300:]}")
    if outcome.grown > GIGABYTE and outcome.verdict not in (verdicts.HANG, verdicts.BROKEN):
        outcome.worse(verdicts.MEMORY, f"took {outcome.grown / 2**20:,.0f} MiB")
    return outcome


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


# ------------------------------------------------------------------------------------------------ in the case's process


def _child(area: Area, drawn_from: str, place: Place, root: Path) -> None:
    """Make and run the case in the forked process, and end the process."""
    try:
        os.setsid()
        faulthandler.disable()  # a pytest that it was forked from has it on
        _redirect(root / "printed")
        os.chdir(place.inside)
        for name in ("MOT_CACHE", "HOME"):
            os.environ[name] = str(place.inside / ".home")
        datasets.config.HF_DATASETS_CACHE = place.inside / ".home" / "datasets"
        report = Outcome("", 0, verdicts.BROKEN)
        try:
            case = area.make(Random(drawn_from), place)
            report.says = case.says
            _bound(root, report)
            report.verdict, report.detail = _called(case, root)
        except BaseException as error:
            (root / "traceback").write_text(verdicts.full_text(error), errors="replace")
            report.detail = f"{type(error).__name__}: {error}"
        _note(root, report, "verdict", "says", "detail", "grown")
    finally:
        os._exit(0)


def _note(root: Path, report: Outcome, *fields: str) -> None:
    text = json.dumps({name: asdict(report)[name] for name in fields})
    (root / "report.new").write_text(text)
    os.replace(root / "report.new", root / "report")


def _redirect(path: Path) -> None:
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _bound(root: Path, report: Outcome) -> None:
    """Bound memory and time from here on, and watch what Python opens and starts."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of memory
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    report.grown = int(fields["VmRSS"].split()[0]) * 1024
    _note(root, report, "says", "grown")  # for a case that never returns
    mapped = int(fields["VmSize"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESSES,) * 2)
    used = int(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, used + CPU_SECONDS + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _called(case: Case, root: Path) -> tuple[str, str]:
    seen: list[tuple[str, str]] = []
    sys.addaudithook(_auditor(seen))
    try:
        code = case.call()
        verdict = (verdicts.ACCEPTED, "")
        if case.is_command:
            verdict = verdicts.judge_command(code if isinstance(code, (int, str)) else 0, _printed(root), case)
    except SystemExit as ended:
        verdict = verdicts.judge_command(ended.code, _printed(root), case)
    except BaseException as error:
        (root / "traceback").write_text(verdicts.full_text(error), errors="replace")
        verdict = verdicts.judge_error(error, case)
        if case.is_command and verdict[0] == verdicts.CLEAR:
            verdict = (verdicts.LIBRARY, f"a traceback of {verdict[1]}")
    return seen[0] if seen else verdict


def _printed(root: Path) -> str:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return (root / "printed").read_text(errors="replace")


def _auditor(seen: list[tuple[str, str]]):
    """Note programs that are started and addresses that are asked for, and refuse the addresses."""

    def audit(event: str, arguments: tuple) -> None:
        if event in ("subprocess.Popen", "os.posix_spawn", "os.exec"):
            program = Path(os.fsdecode(arguments[0])).name if arguments[0] else ""
            if program not in _PROGRAMS:
                seen.append((verdicts.CODE, f"{program!r} was started"))
        elif event == "os.system":
            seen.append((verdicts.CODE, f"os.system({arguments[0]!r})"))
        elif event in ("socket.connect", "socket.getaddrinfo"):
            address = arguments[1] if event == "socket.connect" else arguments
            host = address[0] if isinstance(address, tuple) else None
            if host is not None and not str(host).startswith(("127.", "localhost", "::1", "0.0.0.0")):
                seen.append((verdicts.OUTSIDE, f"an address was opened: {host}"))
                raise ConnectionRefusedError("there is no network in the fuzz")
        elif event == "open" and str(arguments[0]) in ("/etc/passwd", "/etc/shadow", "/etc/hostname"):
            seen.append((verdicts.OUTSIDE, f"opened {arguments[0]}"))

    return audit


# ----------------------------------------------------------------------------------------------- files that are watched


class Watch:
    """Tells which files of a folder any process opens, by Linux's inotify."""

    _OPENED = 0x20

    def __init__(self, folder: Path):
        self.folder = folder
        self.libc = ctypes.CDLL(None, use_errno=True)

    def __enter__(self) -> "Watch":
        self.handle = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self.names = {
            self.libc.inotify_add_watch(self.handle, os.fsencode(path), self._OPENED): path.name
            for path in self.folder.iterdir()
        }
        if self.handle < 0 or min(self.names) < 0:
            raise OSError(ctypes.get_errno(), "inotify does not watch the files of a case")
        return self

    def opened(self) -> set[str]:
        try:
            events = os.read(self.handle, 2**16)
        except BlockingIOError:
            return set()
        names = set()
        while events:
            watched, length = int.from_bytes(events[:4], sys.byteorder), int.from_bytes(events[12:16], sys.byteorder)
            names.add(self.names[watched])
            events = events[16 + length :]
        return names

    def __exit__(self, *_) -> None:
        os.close(self.handle)
