"""The records of one source, part by part, numbered and named, and their values: pictures, sounds and texts.

A record that cannot be used is refused by name, or counted (`on_error: skip`). An error stands in its place.
"""

import datetime
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Features
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from modeling_mot.media_loading import MediaError, load_picture, load_sound, name_within
from modeling_mot.processing_vocabulary import SEGMENT_TYPES, with_known_type
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
    """Make a context in which a `ValueError` becomes a `BadRecord` of the place `where`.

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
        """Return the names of the first few records of a reason."""
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


# What `resolved` raises of names that no file can have: too long, with a null byte, or a loop of links.
NO_SUCH_NAME = (OSError, ValueError, RuntimeError)


def resolved(root: Path, name: str) -> Path:
    """Resolve `root / name`, links included.

    Raises:
        OSError, ValueError, RuntimeError: no file can have such a name.
    """
    path = (root / name).resolve()
    path.is_file()  # raises for a name that is too long
    return path


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
            path = resolved(root, name)
        except NO_SUCH_NAME:
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
    parts = [with_known_name(part) for part in parts]
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


def with_known_name(part):
    """Return a part of a document with "audio" for "speech", as the processors do; anything unknown as it is."""
    try:
        return with_known_type(part, "", SEGMENT_TYPES)
    except ValueError:
        return part


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


# -------------------------------------------------------------------------------------------------- records of a source

# Errors that are no fault of a shard; the last is the base of all errors of the HTTP library under huggingface_hub.
UNREACHABLE = (ConnectionError, TimeoutError, HfHubHTTPError.__bases__[0])


# Records that are numbered throughout are prepared in parts of this many, or in this many parts at most.
_PART_RECORDS, _MOST_PARTS = 256, 4096
# The number of a record of a shard is its place in the shard, plus this for each shard before.
SHARD_RECORDS = 2**32

T = TypeVar("T")


@dataclass
class Source:
    """The records of one `SourceConfig`, pictures and sounds still encoded. It can be sent to other processes.

    Iterating gives the records; one that cannot be read is an error or, with `on_error: skip`, passed over. `read`
    gives one part, such as a shard, with the records' numbers.

    Attributes:
        records: a sequence of mappings, `ShardFiles` or a `StreamedDataset`.
        num_records: the number of records, None when it is not known before the end (shards).
        fingerprint: changes when the records do.
        left_out: records that were left out when it was opened (only with `on_error: skip`).
        roots: folders whose files the records may name.
        names: files, or places in a file, of the records that are known when it is opened.
        labels: column -> the names that its numbers stand for.
    """

    config: SourceConfig
    records: object
    num_records: int | None
    fingerprint: str
    left_out: LeftOut = field(default_factory=LeftOut)
    roots: Sequence[Path] = ()
    names: Sequence[str] = ()
    labels: dict[str, list[str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict]:
        return self.each(lambda record: record)

    def each(self, use: Callable[[dict], T], step: int = 1) -> Iterator[T]:
        """Give `use(record)` of every record, or of every `step`-th; a `ValueError` leaves the record out."""
        left_out = LeftOut()
        numbered = (pair for part in range(self.num_parts) for pair in self.read(part))
        for number, record in islice(numbered, 0, None, step):
            try:
                if isinstance(record, BadRecord):
                    raise record
                used = use(record)
            except ValueError as error:
                bad = error if isinstance(error, BadRecord) else BadRecord(str(error))
                self.leave_out(number, bad, left_out)
            else:
                yield used

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> number of records that were left out when the source was opened."""
        return self.left_out.counts

    @property
    def shards(self) -> list[str]:
        """The names of the shards, none where records are numbered throughout."""
        return self.records.names if self.num_records is None else []

    @property
    def num_parts(self) -> int:
        """The number of parts, which can be read in any order. The first N records of shards are one part."""
        if self.num_records is None:
            return len(self.shards) if self.config.limit is None else 1
        return max(1, -(-self.num_records // self._part_records))

    @property
    def _part_records(self) -> int:
        return max(_PART_RECORDS, -(-self.num_records // _MOST_PARTS))

    def read(self, part: int, skip: int = 0) -> Iterator[tuple[int, dict | BadRecord]]:
        """Read the numbered records of one part from record `skip` on; an error stands for one that cannot be read."""
        if self.num_records is not None:
            start = part * self._part_records
            chosen = range(start + skip, min(start + self._part_records, self.num_records))
            is_set = isinstance(self.records, datasets.Dataset)
            numbered = zip(
                chosen,
                dataset_rows(self.records.select(chosen)) if is_set else (self.records[i] for i in chosen),
                strict=True,
            )
        elif self.config.limit is None and not self.config.match:
            numbered = enumerate(self.records.read(part, skip), part * SHARD_RECORDS + skip)
        else:
            numbered = islice(self._selected(part), skip, None)
        for number, record in numbered:
            yield number, self._ready(record)

    def _selected(self, part: int) -> Iterator[tuple[int, dict | BadRecord]]:
        """Read the records of a shard that match, or the first N of all shards."""
        shards = [part] if self.config.limit is None else range(len(self.shards))
        numbered = (pair for shard in shards for pair in enumerate(self.records.read(shard), shard * SHARD_RECORDS))
        return islice((pair for pair in numbered if matches(pair[1], self.config.match)), self.config.limit)

    def _ready(self, record: dict | BadRecord) -> dict | BadRecord:
        """Put names for labels into a record, and paths inside the source's folders for its files."""
        if isinstance(record, BadRecord):
            return record
        try:
            record = with_label_names(record, self.labels)
            for segment in self.config.segments:
                if segment.type != "text":
                    with blaming(f"column {segment.column!r}"):
                        record[segment.column] = self._confined(segment.type, record.get(segment.column))
        except BadRecord as error:
            return error
        return record

    def _confined(self, kind: str, value):
        if kind in ("image", "audio"):
            return confined(value, self.roots)
        if not isinstance(value, list):
            return value
        return [
            part | {kind: confined(part.get(kind), self.roots) for kind in ("image", "audio") if kind in part}
            if isinstance(part, dict)
            else part
            for part in map(with_known_name, value)
        ]

    def leave_out(self, number: int, error: BadRecord, left_out: LeftOut) -> None:
        """Count record `number`, or refuse it by name, see `LeftOut.add`."""
        left_out.add(self.config, self.name_of(number), error, self.names[number] if self.names else None)

    def name_of(self, number: int) -> str:
        """Name record `number` for a message."""
        if self.num_records is not None:
            return f"record {number}"
        shard, place = divmod(number, SHARD_RECORDS)
        return f"shard {self.shards[shard]}, record {place}"


def matches(record: dict | BadRecord, match: dict[str, str] | None) -> bool:
    """True if a record matches. A record that cannot be read counts as a match, so that it is reported."""
    return isinstance(record, BadRecord) or all(
        re.search(expression, str(record.get(column, ""))) for column, expression in (match or {}).items()
    )


# The rows that are in memory at once.
_ROWS = 8
_MEDIA_TYPES = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")


def dataset_rows(dataset: "datasets.Dataset | datasets.IterableDataset") -> Iterator[dict | BadRecord]:
    """Read the records of a data set; an error stands for a record that cannot be read."""
    if dataset.features is None:
        yield from dataset
        return
    described = _undecoded(dataset.features.to_dict())
    # Only texts of JSON are left to be decoded.
    features = Features.from_dict(described) if "'_type': 'Json'" in repr(described) else None
    for rows in dataset.with_format("arrow").iter(_ROWS):
        for row in readable_rows(rows):
            yield row if features is None or isinstance(row, BadRecord) else _decoded(features, row)


@dataclass(frozen=True)
class StreamedDataset:
    """A `datasets.IterableDataset`, shard by shard."""

    dataset: object

    @property
    def names(self) -> list[str]:
        return [f"{number + 1} of {self.dataset.num_shards}" for number in range(self.dataset.num_shards)]

    def read(self, number: int, skip: int = 0) -> Iterator[dict | BadRecord]:
        """Read one shard, as `ShardFiles.read` does."""
        try:
            yield from islice(dataset_rows(self.dataset.shard(self.dataset.num_shards, number)), skip, None)
        except (*UNREACHABLE, MemoryError):
            raise
        except Exception as error:  # whatever a library raises over broken bytes
            yield BrokenShard(f"shard {self.names[number]} breaks off: {error}")


def label_names(features: Features | None) -> dict[str, list[str]]:
    """Find the names of labels: column -> the names that its numbers stand for, also in lists."""
    named = {}
    for column, feature in (features or {}).items():
        label = getattr(feature, "feature", feature)
        if isinstance(label, ClassLabel):
            named[column] = list(label.names)
    return named


def with_label_names(record: dict, names: dict[str, list[str]]) -> dict:
    """Replace the labels of a record by their names; a missing label (null, -1) is None.

    Raises:
        BadRecord: a number without a name.
    """

    def name(column: str, value):
        if isinstance(value, list):
            return [name(column, item) for item in value]
        if value is None or value == -1:
            return None
        if not 0 <= value < len(names[column]):
            raise BadRecord(f"column {column!r}: the label has no name: {value} of {len(names[column])}")
        return names[column][value]

    return record | {column: name(column, record[column]) for column in names if column in record}


def _decoded(features: Features, row: dict) -> dict | BadRecord:
    try:
        with blaming("the row does not decode"):
            return features.decode_example(row)
    except BadRecord as error:
        return error


def _undecoded(described):
    """Switch off the decoding of media in features that are described as plain values, wherever they stand."""
    if isinstance(described, list):
        return [_undecoded(inner) for inner in described]
    if not isinstance(described, dict):
        return described
    inner = {name: _undecoded(value) for name, value in described.items()}
    return inner | {"decode": False} if described.get("_type") in _MEDIA_TYPES else inner
