"""The records of one source, part by part, numbered and named. An error stands for a record that cannot be used."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import datasets
from datasets import ClassLabel, Features

from training.data.config import SourceConfig
from training.data.reading.shards import UNREACHABLE
from training.data.reading.values import BadRecord, BrokenShard, LeftOut, blaming, confined, readable_rows


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
            for part in value
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
    """True if a record is wanted. One that cannot be read is wanted, so that it is not passed over in silence."""
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
