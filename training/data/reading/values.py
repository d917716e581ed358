"""The values of a record: pictures, sounds and texts; and what becomes of a record that cannot be used.

A record that cannot be used is refused by name, or counted (`on_error: skip`).
"""

import datetime
import math
import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from huggingface_hub import constants
from PIL import Image

from modeling_mot.media_loading import MediaError, load_picture, load_sound, name_within
from training.data.config import Limits, Segment, SourceConfig


# ------------------------------------------------------------------------------------------ records that cannot be used

# Reasons that are counted apart; a file of nothing but different faults must not fill the report.
_MOST_REASONS = 50
# The records that are named for each reason.
_MOST_NAMES = 5


class BadRecord(ValueError):
    """A record that cannot become a document, for a reason that lies in the record.

    A reader gives the error in the place of the record. The message begins with a reason that many records may share,
    then ": " and the particulars of this record.
    """

    way_out = "mend or remove it, or set on_error: skip to leave such records out"

    @property
    def reason(self) -> str:
        """The message without the particulars: records that are left out are counted by it."""
        where, *rest = str(self).split(": ")
        return ": ".join([where.split(",")[0], *rest[:1]] if where.startswith("column") else [where])[:100]


class BrokenShard(BadRecord):
    """A shard that cannot be read to its end. It is the last item that the shard's reader gives."""

    way_out = "fetch it again or remove it, or set on_error: skip to leave the rest of it out"

    @property
    def reason(self) -> str:
        return str(self)


@contextmanager
def blaming(where: str, file: str | None = None) -> Iterator[None]:
    """A context in which a `ValueError` becomes a `BadRecord` of the place `where`.

    Args:
        file: the file to blame, if there is one.
    """
    try:
        yield
    except ValueError as error:
        named = f": file {file}" if file and file not in str(error) else ""
        raise BadRecord(f"{where}: {error}{named}") from error


@dataclass
class LeftOut:
    """Records that were left out.

    Attributes:
        counts: reason -> number of records.
        first: reason -> name of the first of them.
        more: reason -> names of a few that came next, so that several can be mended at once.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    more: dict[str, list[str]] = field(default_factory=dict)

    def add(self, config: SourceConfig, name: str, error: BadRecord, file: str | None = None) -> None:
        """Count a record that cannot be used, or refuse it, as the source's `on_error` says.

        Args:
            name: the name of the record.
            file: the file or the place in a file that holds it, if there is one.

        Raises:
            ValueError: source, record, reason and way out, with `on_error: raise`.
        """
        if config.on_error == "raise":
            place = f" ({file})" if file and file not in str(error) else ""
            raise ValueError(printable(f"source {config.name!r}, {name}: {error}{place}; {error.way_out}")) from error
        reason = printable(error.reason)
        if reason not in self.counts and len(self.counts) >= _MOST_REASONS:
            reason = "other reasons"
        self._count(reason, 1, [printable(file or name)])

    def join(self, other: "LeftOut") -> None:
        """Add the records that were left out elsewhere, after the records that are here."""
        for reason, count in other.counts.items():
            self._count(reason, count, other.names(reason))

    def names(self, reason: str) -> list[str]:
        """The names of the first few records of a reason."""
        return [self.first[reason], *self.more.get(reason, ())]

    def lines(self) -> list[str]:
        """Say for each reason how many records were left out, and name the first few."""
        return [
            f"{count:,} x {reason} (first: {'; '.join(self.names(reason))})" for reason, count in self.counts.items()
        ]

    def _count(self, reason: str, count: int, names: list[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        if reason not in self.first:
            self.first[reason], *names = names
        more = self.more.get(reason, []) + names
        if more:
            self.more[reason] = more[: _MOST_NAMES - 1]


def printable(text: str) -> str:
    """Escape a text so that any terminal and file takes it, however the names in it are encoded."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def readable_rows(rows: pa.RecordBatch | pa.Table) -> Iterator[dict | BadRecord]:
    """Read rows as mappings; an error stands for a row with a value that Python cannot hold."""
    try:
        yield from rows.to_pylist()
    except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a time out of range
        if len(rows) > 1:
            for place in range(len(rows)):
                yield from readable_rows(rows.slice(place, 1))
        else:
            yield BadRecord(f"the row cannot be read: {error}")


# -------------------------------------------------------------------------------------------------- pictures and sounds


class OutsidePath(str):
    """The name of a file outside of the folder of its source. The file is never opened."""


def source_roots(path: Path) -> list[Path]:
    """List the folders of the files that records may name: a local source's own, or the caches for one of the Hub."""
    if path.exists():
        return [path if path.is_dir() else path.parent]
    return [Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)]


def confined(value, roots: Sequence[Path]):
    """Replace the file's name of a picture or sound, if it has one, by a path inside one of some folders.

    A relative name is taken from the first folder. A name that leads outside (by `..`, an absolute path or a link)
    becomes an `OutsidePath`, which does not decode.
    """
    name = name_within(value)
    if name is None:
        return value
    name = os.fsdecode(name)
    for root in roots:
        try:
            path = (root / name).resolve()
            path.is_file()  # which says that a name is too long
        except (OSError, ValueError, RuntimeError):  # too long a name, a null byte, a loop of links
            break
        if path.is_relative_to(root.resolve()):
            return str(path)
    return OutsidePath(name)


def decode_picture(value, limits: Limits | None = None) -> Image.Image:
    """Decode an upright picture, RGB or (where it is transparent in places) RGBA; see `load_picture`.

    Raises:
        ValueError: no value, a missing file, bytes that are no picture, or more pixels than the limit.
    """
    _check_inside(value, "picture")
    return load_picture(value, (limits or Limits()).max_pixels, "data.max_pixels")


def decode_sound(value, limits: Limits | None = None) -> tuple[np.ndarray, int]:
    """Decode a mono float32 wave and its sampling rate in Hz; see `load_sound`.

    Raises:
        ValueError: no value, a missing file, bytes that are no sound, an array without its sampling rate, or a
            sound longer than the limit.
    """
    _check_inside(value, "sound")
    most = (limits or Limits()).max_audio_seconds
    return load_sound(value, max_seconds=most, limit="data.max_audio_seconds")


def _check_inside(value, kind: str) -> None:
    if isinstance(value, OutsidePath):
        raise MediaError(f"the {kind} file leads outside the folder of its source: {str(value)!r}")


# ----------------------------------------------------------------------------------------------------- texts, documents

_PLAIN = (bool, int, float, Decimal, datetime.date, datetime.time, datetime.timedelta)


def text_of(segment: Segment, record: dict) -> str:
    """Fill the text of a segment: a column (a list is joined by commas), or a format over columns.

    Raises:
        BadRecord: the text is empty, a column that the format needs is missing, or a value is no text.
    """
    values = {name: _plain(record.get(name), name) for name in segment.columns}
    for name, value in values.items():
        if not value.strip() and name not in segment.dispensable:
            what = "empty" if len(segment.parts) == 1 else f"without a value: column {name!r}"
            raise BadRecord(f"the text of {segment} is {what}")
    text = segment.fill(values).strip()
    if not text:
        raise BadRecord(f"the text of {segment} is empty")
    if not is_unicode(text):
        raise BadRecord(f"the text of {segment} is no Unicode: a lone surrogate in {reprlib.repr(text)}")
    return text


def check_parts(parts, column: str) -> list[dict]:
    """Check the parts of an interleaved document: each a mapping with a type and, if it is a text, a text.

    Raises:
        BadRecord: the value is no such list.
    """
    if not isinstance(parts, list) or not parts:
        raise BadRecord(f"column {column!r}: it has no segments: {reprlib.repr(parts)}")
    for place, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in ("text", "image", "audio"):
            raise BadRecord(
                f"column {column!r}: a segment must have a type of text, image or audio: segment {place} is "
                f"{reprlib.repr(part)}"
            )
        text = part.get("text")
        if kind == "text" and (not isinstance(text, str) or not text.strip()):
            raise BadRecord(f"column {column!r}: the text of a segment is empty: segment {place}")
        if kind == "text" and not is_unicode(text):
            raise BadRecord(f"column {column!r}: the text of a segment is no Unicode: a lone surrogate in {place}")
    return parts


def _plain(value, column: str) -> str:
    """Write a value as a text; a missing value is empty."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, (list, tuple)) for item in value):
            raise BadRecord(f"the column of a text holds lists in a list: {column!r}")
        return ", ".join(text for text in (_plain(item, column) for item in value) if text.strip())
    if not isinstance(value, _PLAIN):
        raise BadRecord(f"the column of a text holds {type(value).__name__}: {column!r}")
    if value != value:  # NaN and NaT mark missing values
        return ""
    if isinstance(value, (float, Decimal)) and math.isinf(value):
        raise BadRecord(f"the column of a text holds a number that is not finite: {column!r}")
    return str(value)


def is_unicode(text: str) -> bool:
    """True if a text can be written in UTF-8; a lone surrogate, half a character of UTF-16, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
