"""The folder that a report is written to. A report replaces only files that a report wrote.

`report.json` holds, beside the figures, the sha256 of every file as it was written. A file belongs to the report while
it has that sha256. A file that somebody changed or put there stays, unless `--overwrite` is given.
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
    """A folder for reports, with the record of the report that it holds already.

    Args:
        path: the folder; it need not exist.
        overwrite: also replace files that no report wrote.
    """

    def __init__(self, path: str | Path, overwrite: bool = False):
        self.path = Path(path)
        self.overwrite = overwrite
        self.written = self._written_before()

    def write(self, files: Mapping[str, bytes], figures: Mapping[str, Any]) -> None:
        """Write the files and the record of them, and remove files that only an earlier report had.

        Raises:
            ConfigError: the folder cannot be written, or a file of these names is not a report's.
        """
        # Files that no report wrote stop the report before it has changed anything.
        foreign = [name for name in files if os.path.lexists(self.path / name) and not self._is_own(name)]
        if os.path.lexists(self.path / RECORD) and self.written is None:
            foreign.append(RECORD)
        if foreign and not self.overwrite:
            raise ConfigError(
                f"{self.path} holds {', '.join(foreign)}, which no report wrote or somebody changed since; choose "
                "another --output, or replace with --overwrite"
            )

        # Each file appears whole or not at all; the record comes last.
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
        """Return file name -> sha256 of the report that the folder holds; None if it holds none."""
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("written_by") != _WRITER:
            return None
        files = record.get("files")
        # Only names of files in the folder itself: a record that was made up must not reach files elsewhere.
        known = files.items() if isinstance(files, dict) else ()
        return {name: sha256 for name, sha256 in known if Path(name).name == name}

    def _is_own(self, name: str) -> bool:
        path = self.path / name
        if path.is_symlink() or not path.is_file() or name not in (self.written or {}):
            return False
        return hashlib.sha256(path.read_bytes()).hexdigest() == self.written[name]
