"""Damage that disks, people and attackers do to the files of a checkpoint."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

from training.config import digest_of
from training.run_files.checkpoints import MANIFEST, _hashes


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def add_another(file: Path) -> None:
    """Add a file that does not belong to the checkpoint."""
    file.with_name(f"another-{file.name}").write_bytes(b"not of this checkpoint")


def link(file: Path) -> None:
    """Put a symbolic link to the same bytes elsewhere in the place of a file."""
    elsewhere = file.parents[file.parts[::-1].index("checkpoints")] / f"elsewhere-{file.parent.name}-{file.name}"
    os.replace(file, elsewhere)
    file.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped bit": flip_a_bit,
    "truncated file": truncate,
    "missing file": Path.unlink,
    "extra file": add_another,
    "symbolic link": link,
}


def kinds_of_file(checkpoint: Path) -> dict[str, Path]:
    """Return name -> path of a file of each kind: the shards of each rank, the model's description, the manifest."""
    state, described = sorted((checkpoint / "state").iterdir()), checkpoint / "pretrained"
    others = [described / "config.json", described / "processor_config.json", described / "configuration_mot.py"]
    others += sorted(described.glob("*/*.safetensors"))[:1]
    return {file.relative_to(checkpoint).as_posix(): file for file in [*state, *others, checkpoint / MANIFEST]}


class _Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def pickled(marker: Path) -> bytes:
    """A pickle that makes the file `marker` when something loads it."""
    return pickle.dumps(_Payload(marker))


def reseal(checkpoint: Path) -> None:
    """Make the manifest agree with changed files, as an attacker would."""
    path = checkpoint / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["sha256"]
    files = _hashes(checkpoint, "**/*")
    manifest["files"] = {name: entry for name, entry in sorted(files.items()) if name != MANIFEST}
    path.write_text(json.dumps({**manifest, "sha256": digest_of(manifest)}), encoding="utf-8")
