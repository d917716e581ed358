"""The folder that a report is written to, in which nothing is replaced that the report did not write itself.

`report.json` holds, beside the figures, the sha256 of every file as it was written. A file is the report's own as long
as it still is what that says; one that somebody changed or put there is not, and stands until `--overwrite`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.config import ConfigError
from training.run_files.folder import write_json


RECORD = "report.json"
_WRITER = "python -m training.report"


class ReportFolder:
    """Raises ConfigError when the folder cannot be written, or holds a file of these names that is not a report's."""

    def __init__(self, path: str | Path, overwrite: bool = False):
        self.path, self.overwrite = Path(path), overwrite
        self.written = self._written_before()

    def write(self, files: Mapping[str, bytes], figures: Mapping[str, Any]) -> None:
        """Write files and the record of them; those of an earlier report that this one has no more are removed."""
        foreign = [name for name in files if os.path.lexists(self.path / name) and not self._is_own(name)]
        if os.path.lexists(self.path / RECORD) and self.written is None:
            foreign.append(RECORD)
        if foreign and not self.overwrite:
            raise ConfigError(
                f"{self.path} holds {', '.join(foreign)}, not as a report left it; choose another --output, or replace "
                "with --overwrite"
            )
        outdated = [name for name in self.written or {} if name not in files and self._is_own(name)]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in outdated:
                (self.path / name).unlink()
            for name, content in files.items():
                temporary = self.path / f"{name}.tmp"
                temporary.write_bytes(content)
                os.replace(temporary, self.path / name)
            hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
            write_json(self.path / RECORD, {"written_by": _WRITER, "files": hashes, **figures})
        except OSError as error:
            raise ConfigError(f"--output {self.path} cannot be written: {error}") from error

    def _written_before(self) -> dict[str, str] | None:
        """sha256 by file name of the report that is there; None where there is none."""
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("written_by") != _WRITER:
            return None
        files = record.get("files")
        # Only names of files in the folder itself: a record that was made up must not reach others.
        return {name: of for name, of in files.items() if Path(name).name == name} if isinstance(files, dict) else {}

    def _is_own(self, name: str) -> bool:
        path = self.path / name
        if path.is_symlink() or not path.is_file() or name not in (self.written or {}):
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == self.written[name]
