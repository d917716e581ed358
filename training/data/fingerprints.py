"""Fingerprints of files: another one where what is in them is another."""

import hashlib
import json
import os
from pathlib import Path

from modeling_mot.hub_trust import leads_outside


# Up to this many bytes a local source is fingerprinted by content, beyond it by file sizes and times of change.
CONTENT_FINGERPRINT_BYTES = 2**31


def local_fingerprint(path: Path) -> str:
    """Over every file's relative path, and its content or, for a large source, its size and time of change.

    A link that leads out of a folder is never opened: it counts by the size and time of what it leads to.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    foreign = {file for file in files if file != path and file.is_symlink() and leads_outside(file, path)}
    by_content = sum(file.stat().st_size for file in files if file not in foreign) <= CONTENT_FINGERPRINT_BYTES
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(os.fsencode(file.relative_to(path)) + f"\0{stat.st_size}\0".encode())
        digest.update(
            (str(stat.st_mtime_ns) if file in foreign or not by_content else content_fingerprint(file)).encode()
        )
    return digest.hexdigest()


def content_fingerprint(file: Path) -> str:
    """A hash of a file; one that may not be read has none, and is named when its record is."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as opened:
            while chunk := opened.read(2**20):
                digest.update(chunk)
    except PermissionError:
        return "unreadable"
    return digest.hexdigest()


def digest_of(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
