"""The moments of a run at which something can go wrong, among them every stage of a save, and a way to act at them."""

import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed.checkpoint.filesystem import FileSystem

from training import run
from training.data.stream import StepBatches
from training.run_files import checkpoints
from training.run_files import folder as run_folder
from training.run_files.checkpoints import Checkpointer
from training.trainer import Trainer


@dataclass(frozen=True)
class Moment:
    """The moment before or after a call of `owner.name`.

    Attributes:
        after: whether the moment is after the call; else it is before.
        matches: tells by the arguments whether a call counts.
        main_only: whether only the main process makes the call.
    """

    owner: Any
    name: str
    after: bool = False
    matches: Callable[..., bool] = lambda *arguments, **options: True
    main_only: bool = False


def _renames(pattern: str) -> Callable[..., bool]:
    return lambda source, target: re.fullmatch(f"(.*/)?{pattern}", Path(target).as_posix()) is not None


# The stages of a save, in order.
SAVE_STAGES = {
    "before anything is written": Moment(Checkpointer, "_begin"),
    "after the description": Moment(Checkpointer, "_begin", after=True),
    "half of a shard written": Moment(FileSystem, "create_stream"),
    "after the shards": Moment(Checkpointer, "_write_tensors", after=True),
    "after the hashes": Moment(checkpoints, "_hashes", after=True),
    "manifest not yet named": Moment(
        os, "replace", matches=_renames(r"\.step-\d+\.tmp/manifest\.json"), main_only=True
    ),
    "after the manifest": Moment(checkpoints, "write_json", after=True, main_only=True),
    "flushed, not renamed": Moment(checkpoints, "sync_tree", after=True, main_only=True),
    "just renamed": Moment(os, "rename", after=True, matches=_renames(r"step-\d{8}"), main_only=True),
    "latest not yet moved": Moment(os, "replace", matches=_renames("latest"), main_only=True),
    "after latest": Moment(run_folder.RunFolder, "point_latest", after=True, main_only=True),
    "old one renamed": Moment(os, "rename", after=True, matches=_renames(r"\.step-\d+\.removed"), main_only=True),
    "old one half deleted": Moment(shutil, "rmtree", main_only=True),
}
OTHER_MOMENTS = {
    "step": Moment(Trainer, "seed_forward"),
    "evaluation": Moment(run, "evaluate_losses"),
    "data": Moment(StepBatches, "micro_batches"),
}
MOMENTS = SAVE_STAGES | OTHER_MOMENTS


@contextmanager
def at(moment: str, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` whenever this process comes to the moment, as long as the block lasts."""
    point = MOMENTS[moment]
    original = getattr(point.owner, point.name)
    special = {"half of a shard written": _half_written, "old one half deleted": _half_deleted}
    if moment in special:
        replacement = special[moment](original, action)
    else:

        def replacement(*arguments, **options):
            if not point.matches(*arguments, **options):
                return original(*arguments, **options)
            if not point.after:
                action()
            result = original(*arguments, **options)
            if point.after:
                action()
            return result

    with mock.patch.object(point.owner, point.name, replacement):
        yield


class _Halting:
    """A stream that calls `action` in the middle of every write."""

    def __init__(self, stream: io.IOBase, action: Callable[[], None]):
        self._stream = stream
        self._action = action

    def write(self, data: bytes) -> int:
        half = len(data) // 2
        written = self._stream.write(data[:half])
        self._stream.flush()
        self._action()
        return written + self._stream.write(data[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _half_written(original: Callable, action: Callable[[], None]) -> Callable:
    @contextmanager
    def create_stream(self, path, mode):
        with original(self, path, mode) as stream:
            yield _Halting(stream, action) if "w" in mode else stream

    return create_stream


def _half_deleted(original: Callable, action: Callable[[], None]) -> Callable:
    def rmtree(path, *arguments, **options):
        if str(path).endswith(".removed") and Path(path).is_dir():
            next(file for file in sorted(Path(path).rglob("*")) if file.is_file()).unlink()
            action()
        return original(path, *arguments, **options)

    return rmtree
