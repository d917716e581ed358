"""Fingerprints of files: another one where what is in them is another."""

import hashlib
import json
import os
from pathlib import Path


# Up to this many bytes a local source is fingerprinted by content, beyond it by file sizes and times of change.
CONTENT_FINGERPRINT_BYTES = 2**31


def local_fingerprint(path: Path) -> str:
    """Over every file's relative path, and its content or, for a large source, its size and time of change."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    by_content = sum(file.stat().st_size for file in files) <= CONTENT_FINGERPRINT_BYTES
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(os.fsencode(file.relative_to(path)) + f"\0{stat.st_size}\0".encode())
        digest.update((content_fingerprint(file) if by_content else str(stat.st_mtime_ns)).encode())
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
