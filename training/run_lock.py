"""Who writes to a run's folder: one lock for each of its processes, which the system gives up when the process dies.

Kept free of torch, so that a second trainer is refused before it has loaded anything.
"""

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from training.config import ConfigError


# A killed process is given so long to die; a folder that is held longer is refused.
PATIENCE_SECONDS = 2.0


class RunLock:
    """The locks in `<run>/locks/`; the run is held while any of its processes lives, its launcher or not.

    They work on local disks and on network file systems that pass on `flock` (NFS 4, Lustre with the option, GPFS).
    """

    def __init__(self, run: Path, rank: int = 0):
        self.folder, self.rank = Path(run) / "locks", rank
        self._own = FileLock(self._path(rank))

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.lock"

    def acquire(self) -> None:
        """Hold the folder. The main process first, which looks for processes of an earlier run; then the others.

        Raises:
            ConfigError: it is held, naming the holder.
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
        """Raises ConfigError when a living process holds the folder, or it cannot be written; nothing is left locked."""
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
            except FileNotFoundError:  # whoever held it gives the folder back
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
        """Give the folder back, if it was got; one that held nothing but locks is removed with the last of them."""
        if not self._own.is_locked:
            return
        self._path(self.rank).with_suffix(".json").unlink(missing_ok=True)
        # While it is held: a process that waits for the file sees then that it is gone, and makes a new one.
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
            f"train.output_dir={str(self.folder.parent)!r} is being written by {who} ({path.stem}); wait for it, stop it "
            "(a launcher that was killed leaves its workers behind), or choose another folder"
        )
