"""Who writes to a run's folder: one lock for each of its processes, which the system gives up when the process dies.

Kept free of torch, so that a second trainer is refused before it has loaded anything.
"""

import json
import os
import platform
import sys
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
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.refuse_held()
        try:
            self._own.acquire(timeout=PATIENCE_SECONDS)
        except Timeout as error:
            raise ConfigError(self._held(self._path(self.rank))) from error
        holder = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": os.path.basename(sys.argv[0]),
        }
        self._path(self.rank).with_suffix(".json").write_text(json.dumps(holder), encoding="utf-8")

    def refuse_held(self) -> None:
        """Raises ConfigError when a living process holds the folder; nothing is left locked."""
        for path in sorted(self.folder.glob("rank-*.lock")):
            try:
                with FileLock(path).acquire(timeout=PATIENCE_SECONDS):
                    pass
            except Timeout as error:
                raise ConfigError(self._held(path)) from error

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
