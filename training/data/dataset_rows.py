"""Records of a set that `datasets` opened: row by row, pictures and sounds left as they are encoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import datasets
from datasets import ClassLabel, Features

from .bad_records import BadRecord, BrokenShard, blaming
from .shards import UNREACHABLE, readable_rows


# Rows that are in memory at once.
_ROWS = 8
_MEDIA_TYPES = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")


def dataset_rows(dataset: "datasets.Dataset | datasets.IterableDataset") -> Iterator[dict | BadRecord]:
    """The records of a set, and an error in the place of one that cannot be read."""
    if dataset.features is None:
        yield from dataset
        return
    described = _undecoded(dataset.features.to_dict())
    # Nothing but texts of JSON is left to be decoded.
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
        """As `ShardFiles.read`."""
        try:
            yield from islice(dataset_rows(self.dataset.shard(self.dataset.num_shards, number)), skip, None)
        except (*UNREACHABLE, MemoryError):
            raise
        except Exception as error:  # whatever a library raises over broken bytes
            yield BrokenShard(f"shard {self.names[number]} breaks off: {error}")


def label_names(features: Features | None) -> dict[str, list[str]]:
    """Column -> the names that its numbers stand for, of columns of labels and of lists of labels."""
    named = {}
    for column, feature in (features or {}).items():
        label = getattr(feature, "feature", feature)
        if isinstance(label, ClassLabel):
            named[column] = list(label.names)
    return named


def with_label_names(record: dict, names: dict[str, list[str]]) -> dict:
    """A record whose labels are names; one that has none (null, -1) is None.

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
    """Features as plain values with the decoding of media switched off, wherever they stand."""
    if isinstance(described, list):
        return [_undecoded(inner) for inner in described]
    if not isinstance(described, dict):
        return described
    inner = {name: _undecoded(value) for name, value in described.items()}
    return inner | {"decode": False} if described.get("_type") in _MEDIA_TYPES else inner
