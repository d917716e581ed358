"""The folder of a run: its files, and the locks that say who may write there.

config.yaml      the resolved configuration                  metrics.jsonl   one object a step
manifest.json    versions, command, data, world, seeds       checkpoints/    step-00000100/, ..., latest: to resume from
final/           the model as a Hub repository               samples/, samples.html, samples.png, losses.png
summary.json     the figures of the end of the run           locks/          who writes here
profile/         traces, where one was asked for             trackers/       what Accelerate's trackers keep here
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from training.config import ConfigError, without_secrets


_MARK = "config.yaml"
_OWN_ENTRIES = (
    _MARK, "manifest.json", "metrics.jsonl", "checkpoints", "final", "samples", "samples.html", "samples.png",
    "losses.png", "summary.json", "trackers", "profile",
)  # fmt: skip
_PACKAGES = ("torch", "transformers", "accelerate", "diffusers", "datasets", "tokenizers", "safetensors", "numpy")


class RunFolder:
    """Paths of one run. `check` refuses a folder that holds anything else; `claim` makes it this run's."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / _MARK
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.samples = self.path / "samples"
        self.profiles = self.path / "profile"
        self.summary = self.path / "summary.json"

    def check(self, resume: bool | str, overwrite: bool) -> None:
        """Refuse a folder that this run may not or cannot use; nothing is changed.

        Raises:
            ConfigError: it cannot be written, or holds another run and neither `resume` nor `overwrite` is set, or
                holds files that no run made (these are never removed), or `resume` is true and there is nothing to
                resume (with "auto" a new run begins then).
        """
        if resume and overwrite:
            raise ConfigError("train.resume and train.overwrite exclude each other")
        # Whether it can be written, and what is there.
        try:
            existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            with tempfile.TemporaryFile(dir=existing):
                pass
            entries = {entry.name for entry in self.path.iterdir()} - {"locks"} if self.path.exists() else set()
        except OSError as error:
            raise ConfigError(f"train.output_dir={str(self.path)!r} cannot be written: {error}") from error

        # Whether this run may go on there, begin there, or replace what is there.
        if resume is True and not self.saved_steps():
            raise ConfigError(
                f"train.resume=true, but train.output_dir={str(self.path)!r} has no checkpoint; train.resume=auto "
                "begins anew where there is none"
            )
        if not entries or (resume and (self.saved_steps() or entries & {_MARK, "checkpoints", "metrics.jsonl"})):
            return
        if not entries & {_MARK, "checkpoints", "metrics.jsonl"}:
            raise ConfigError(
                f"train.output_dir={str(self.path)!r} is not empty and holds no run; choose another folder"
            )
        if not overwrite:
            raise ConfigError(
                f"train.output_dir={str(self.path)!r} holds another run; set train.resume=auto to go on with it, "
                "train.overwrite=true to replace it, or choose another folder"
            )
        if foreign := sorted(entries - set(_OWN_ENTRIES)):
            raise ConfigError(
                f"train.overwrite=true, but {str(self.path)!r} also holds {', '.join(foreign[:5])}, which no run "
                "writes; move it away or choose another folder"
            )

    def claim(self, resume: bool | str, overwrite: bool) -> None:
        """Make the folder ready for this run, after `check`; `overwrite` removes what the earlier run wrote."""
        self.check(resume, overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"train.output_dir={str(self.path)!r} cannot be made: {error}") from error
        for name in _OWN_ENTRIES if overwrite else ():
            entry = self.path / name
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def saved_steps(self) -> list[int]:
        """List the steps of the finished checkpoints, ascending. `checkpoints.verify` tells if they are as written."""
        if not self.checkpoints.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def point_latest(self, name: str) -> None:
        """Let `checkpoints/latest` name a checkpoint that is on the disk."""
        target = self.checkpoints / "latest"
        temporary = target.with_name(".latest.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(name + "\n")
            _flush(file)
        os.replace(temporary, target)
        sync_folder(self.checkpoints)


def write_json(path: Path, tree: Any) -> None:
    """Write JSON so that the file is there whole or not at all, also after a loss of power."""
    write_whole(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write text so that the file is there whole or not at all, also after a loss of power."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        _flush(file)
    os.replace(temporary, path)


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk (not on Windows, where a folder cannot be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below a folder, and itself, to the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def environment(**more: Any) -> dict[str, Any]:
    """Collect the circumstances of a run: versions, command, commit, machine and `more`; no environment variables."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": without_secrets([sys.executable, *sys.argv]),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu_threads": torch.get_num_threads(),
        **more,
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this file is in, with `-dirty` if files differ from it."""
    try:
        root = Path(__file__).resolve().parents[1]
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("-dirty" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# How long a killed process may take to die; a folder that is held longer is refused.
PATIENCE_SECONDS = 2.0


class RunLock:
    """The locks in `<run>/locks/`: the run is held while any of its processes lives, even without its launcher.

    They work on local disks and on network file systems that pass on `flock` (NFS 4, Lustre with the option, GPFS).
    """

    def __init__(self, run: Path, rank: int = 0):
        self.folder = Path(run) / "locks"
        self.rank = rank
        self._own = FileLock(self._path(rank))

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.lock"

    def acquire(self) -> None:
        """Hold the folder. The main process goes first, and looks for living processes of an earlier run.

        Raises:
            ConfigError: the folder is held, naming the holder.
        """
        if self.rank == 0:
            self.refuse_held()
        with self._writable():
            self._lock(self._own, self._path(self.rank))
        holder = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": os.path.basename(sys.argv[0]),
        }
        with self._writable():
            self._path(self.rank).with_suffix(".json").write_text(json.dumps(holder), encoding="utf-8")

    def refuse_held(self) -> None:
        """Raises ConfigError if a living process holds the folder or it cannot be written; leaves nothing locked."""
        with self._writable():
            for path in sorted(self.folder.glob("rank-*.lock")):
                lock = FileLock(path)
                self._lock(lock, path)
                lock.release()

    def _lock(self, lock: FileLock, path: Path) -> None:
        for attempt in range(3):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=PATIENCE_SECONDS)
                return
            except Timeout as error:  # an OSError, of another meaning
                raise ConfigError(self._held(path)) from error
            except FileNotFoundError:  # the holder is giving the folder back
                if attempt == 2:
                    raise

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"train.output_dir={str(self.folder.parent)!r} cannot be written: {error}; choose another folder"
            ) from error

    def release(self) -> None:
        """Give the folder back if this process holds it; an otherwise empty folder is removed with its last lock."""
        if not self._own.is_locked:
            return
        self._path(self.rank).with_suffix(".json").unlink(missing_ok=True)
        # Removed while it is held: a process that waits for the file then sees that it is gone, and makes a new one.
        self._path(self.rank).unlink(missing_ok=True)
        self._own.release()
        for folder in (self.folder, self.folder.parent):
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone
                return

    def _held(self, path: Path) -> str:
        try:
            holder = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError):
            who = "a process that has left no name"
        return (
            f"train.output_dir={str(self.folder.parent)!r} is being written by {who} ({path.stem}); wait for it, "
            "stop it (a launcher that was killed leaves its workers behind), or choose another folder"
        )
