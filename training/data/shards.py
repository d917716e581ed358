"""Shards: files of JSONL, parquet or webdataset that are read one by one, on disk or on the Hub, without a copy.

A reader gives records, and a `BadRecord` in the place of a record that cannot be read, so that what becomes of it is
decided in one place. It never holds more than `Limits` allow: `datasets`' own readers of JSONL and webdataset read a line
or a member of any size, decompress what is in it, and load arrays and tensors; here members are text, JSON or bytes.
"""

import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import fsspec
import pyarrow as pa
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import parquet

from .bad_records import BadRecord, BrokenShard
from .config import Limits
from .lines import csv_records, jsonl_records, parse_json


SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst"),
    "parquet": (".parquet",),
    "webdataset": (".tar",),
}
# Members of a webdataset record that are text; those named json are JSON; all others stay bytes.
_TEXTS = ("txt", "text", "caption", "transcript", "cls")
# Rows of a parquet file that are decompressed at once, and the bytes they may then take.
_PARQUET_ROWS, _PARQUET_BYTES = 64, 2**28
# Of these a shard is not to blame; the last is the base of all errors of the HTTP library under huggingface_hub.
UNREACHABLE = (ConnectionError, TimeoutError, HfHubHTTPError.__bases__[0])


@dataclass(frozen=True)
class Shard:
    """A file.

    Attributes:
        url: path, or URL of fsspec (`hf://...`).
        name: relative to the folder of all shards.
        size: in bytes.
        stamp: changes with the content: a hash where the storage knows one, else the time of change.
    """

    url: str
    name: str
    size: int
    stamp: str


def shard_format(path: str) -> str | None:
    """The format that a file's name, or a glob, ends with."""
    return next((kind for kind, suffixes in SUFFIXES.items() if path.lower().endswith(suffixes)), None)


def is_remote(path: str) -> bool:
    return "://" in path


def find_shards(path: str, kind: str) -> list[Shard]:
    """The shards of a file, a folder or a glob, sorted by name.

    Raises:
        ValueError: a storage or a compression whose package is not installed.
    """
    try:
        storage, place = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ValueError(f"reading {path.partition('://')[0]}:// needs another package: {error}") from error
    if re.search(r"[*?\[]", place):
        found = storage.glob(place, detail=True)
    elif storage.isdir(place):
        found = {name: info for name, info in storage.find(place, detail=True).items() if shard_format(name) == kind}
    else:
        found = {place: storage.info(place)}
    files = {name: info for name, info in found.items() if info["type"] == "file"}
    if not files:
        return []
    if any(name.endswith(".zst") for name in files) and "zstd" not in fsspec.compression.compr:
        raise ValueError("reading .zst needs zstandard: pip install zstandard")
    root = posixpath.commonpath([posixpath.dirname(name) for name in files])
    return [
        Shard(
            storage.unstrip_protocol(name) if is_remote(path) else name,
            posixpath.relpath(name, root),
            info["size"],
            _stamp(info),
        )
        for name, info in sorted(files.items())
    ]


def _size(url: str) -> int:
    storage, place = fsspec.core.url_to_fs(url)
    return storage.info(place)["size"] if storage.exists(place) else 0


def _stamp(info: dict) -> str:
    return str(
        (info.get("lfs") or {}).get("sha256")
        or info.get("blob_id")
        or info.get("ETag")
        or info.get("mtime")
        or info.get("created")
    )


@dataclass(frozen=True)
class ShardFiles:
    """Shards of one format, of which only some columns (none named: all) are read where the format allows."""

    kind: str
    shards: tuple[Shard, ...]
    columns: tuple[str, ...]
    limits: Limits

    @property
    def names(self) -> list[str]:
        return [shard.name for shard in self.shards]

    def open(self, number: int):
        """A shard's bytes, decompressed, as a context."""
        return fsspec.open(self.shards[number].url, "rb", compression="infer")

    def read(self, number: int, skip: int = 0) -> Iterator[dict | BadRecord]:
        """The records of one shard from record `skip` on.

        Raises:
            ConnectionError: the storage does not answer.
        """
        shard = self.shards[number]
        try:
            if (size := _size(shard.url)) != shard.size:
                raise ValueError(f"it has {size} bytes, and had {shard.size} when it was listed")
            with self.open(number) as file:
                if self.kind == "parquet":
                    yield from _parquet(file, self.columns, self.limits, skip)
                else:
                    readers = {"jsonl": jsonl_records, "csv": csv_records, "webdataset": _webdataset}
                    yield from islice(readers[self.kind](file, self.limits), skip, None)
        except MemoryError:
            raise
        except UNREACHABLE as error:
            raise ConnectionError(f"shard {shard.url} cannot be reached: {error}") from error
        except Exception as error:  # whatever a library raises over broken bytes
            yield BrokenShard(f"shard {shard.name} breaks off: {error}")


def read_file(path: Path, limits: Limits) -> Iterator[dict | BadRecord]:
    """The records of one JSONL or CSV file on disk, as a shard's."""
    shard = Shard(str(path), path.name, path.stat().st_size, "")
    return ShardFiles(path.suffix[1:], (shard,), (), limits).read(0)


def _parquet(file, columns: Sequence[str], limits: Limits, skip: int) -> Iterator[dict | BadRecord]:
    # Column by column in pieces: a whole row group is never in memory.
    opened = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    names = opened.schema_arrow.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two columns are named {twice[0]!r}")
    for group in range(opened.num_row_groups):
        described = opened.metadata.row_group(group)
        if described.total_byte_size > limits.max_group_bytes:
            raise ValueError(
                f"row group {group} takes {described.total_byte_size} bytes, more than data.max_group_bytes="
                f"{limits.max_group_bytes}"
            )
        if skip >= described.num_rows:
            skip -= described.num_rows
            continue
        # A column of a dictionary may repeat its largest value in every row.
        largest = max((described.column(i).total_uncompressed_size for i in range(described.num_columns)), default=1)
        rows = min(_PARQUET_ROWS, max(1, _PARQUET_BYTES // max(1, largest)))
        wanted = [name for name in columns if name in names] if columns else None
        for batch in opened.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False):
            passed = min(skip, len(batch))
            skip -= passed
            yield from readable_rows(batch.slice(passed))


def readable_rows(rows: pa.RecordBatch | pa.Table) -> Iterator[dict | BadRecord]:
    """Rows as mappings, and an error in the place of one that holds what Python has no value for."""
    try:
        yield from rows.to_pylist()
    except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a time out of range
        if len(rows) > 1:
            for place in range(len(rows)):
                yield from readable_rows(rows.slice(place, 1))
        else:
            yield BadRecord(f"the row cannot be read: {error}")


class _Bounded:
    """A file of which no more than so many bytes are read at once, as headers of a tar may ask for any number."""

    def __init__(self, file, most: int):
        self.most, self.file, self.seek, self.tell = most, file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.most + tarfile.RECORDSIZE:
            raise tarfile.ReadError(f"an entry asks for {size} bytes; data.max_record_bytes is {self.most}")
        return self.file.read(size)


def _webdataset(file, limits: Limits) -> Iterator[dict | BadRecord]:
    """Members that follow one another and have the same name up to the first dot are one record, and what follows the
    dot names a column. The keys of a member named json are columns too; pictures and sounds of its `segments` are named
    by their columns."""
    archive = tarfile.TarFile(fileobj=_Bounded(file, limits.max_record_bytes))
    key, members, problem, size = None, {}, None, 0
    while member := archive.next():
        archive.members.clear()
        if member.size < 0:
            raise tarfile.ReadError(f"member {member.name!r} has a size of {member.size}")
        if member.isdir() or not (match := re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)):
            if not member.isdir() and (outside := _escape(member)):
                yield BadRecord(outside)
            continue
        if match[1] != key:
            if key is not None:
                yield _webdataset_record(key, members, problem)
            key, members, problem, size = match[1], {}, None, 0
        size += member.size
        problem = problem or _escape(member)
        if size > limits.max_record_bytes:
            problem = (
                f"the members are too large: {size} bytes of {key}; data.max_record_bytes is {limits.max_record_bytes}"
            )
        if match[2].lower() in members:
            problem = f"two members have the same name: {member.name!r}"
        if problem is None:
            members[match[2].lower()] = archive.extractfile(member).read()
        else:
            members.clear()
    # tarfile takes a header that is cut short for the end; what came last may then lack members.
    file.seek(archive.offset)
    if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the archive has no end")
    if key is not None:
        yield _webdataset_record(key, members, problem)


def _escape(member: tarfile.TarInfo) -> str | None:
    """Why a member is not to be trusted; nothing is ever extracted, but what leads outside was made to harm."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return f"the member leads outside: {member.name!r}"
    return None if member.isreg() else f"the member is no regular file: {member.name!r}"


def _webdataset_record(key: str, members: dict[str, bytes], problem: str | None) -> dict | BadRecord:
    if problem is not None:
        return BadRecord(problem)
    columns: dict = dict(members)
    try:
        for name, value in members.items():
            suffix = name.rsplit(".", 1)[-1]
            if suffix in _TEXTS:
                columns[name] = value.decode("utf-8-sig")
            elif suffix == "json":
                columns[name] = parse_json(value)
        described = columns.get("json")
        if isinstance(described, dict):
            columns = {**described, **{name: value for name, value in columns.items() if name != "json"}}
            for part in columns.get("segments") or []:
                if part["type"] != "text":
                    part[part["type"]] = members[part[part["type"]].lower()]
    except ValueError as error:
        return BadRecord(f"a member does not decode: {key}: {error}")
    except (LookupError, TypeError, AttributeError) as error:
        return BadRecord(f"the segments name no member: {key}: {error!r}")
    return {"__key__": key, **columns}
