"""Shards: files of JSONL, parquet, text or webdataset that are read one by one, on disk or on the Hub, without a copy.

A reader gives records, and a `BadRecord` for a record that cannot be read. It never holds more than `Limits` allow.
(`datasets`' own readers of JSONL and webdataset read a line or a member of any size, decompress its content, and load
arrays and tensors; here members are text, JSON or bytes.) Folders of pictures or sounds are read here too.
"""

import logging
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath

import fsspec
from PIL import Image
from pyarrow import parquet

from modeling_mot.media_loading import PICTURE_FORMATS
from training.data.config import Limits
from training.data.reading.lines import csv_records, jsonl_records, parse_json, text_records
from training.data.reading.records import (
    NO_SUCH_NAME,
    UNREACHABLE,
    BadRecord,
    BrokenShard,
    blaming,
    printable,
    readable_rows,
    resolved,
    with_known_name,
)


logger = logging.getLogger(__name__)

SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst"),
    "parquet": (".parquet",),
    "text": (".txt", ".txt.gz", ".txt.zst"),
    "webdataset": (".tar",),
}
# These members of a webdataset record are text, and members named json are JSON. All others stay bytes.
_TEXTS = ("txt", "text", "caption", "transcript", "cls")
# The rows of a parquet file that are decompressed at once, and the most bytes of them.
_PARQUET_ROWS, _PARQUET_BYTES = 64, 2**28


@dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
        url: path, or URL of fsspec (`hf://...`).
        name: path relative to the folder of all shards.
        size: in bytes.
        stamp: changes with the content: a hash where the storage has one, else the time of change.
    """

    url: str
    name: str
    size: int
    stamp: str


def shard_format(path: str) -> str | None:
    """Find the format that a file's name, or a glob, ends with."""
    return next((kind for kind, suffixes in SUFFIXES.items() if path.lower().endswith(suffixes)), None)


def is_remote(path: str) -> bool:
    """True for a URL."""
    return "://" in path


def find_shards(path: str, kind: str) -> list[Shard]:
    """Find the shards of a file, a folder or a glob, sorted by name.

    Raises:
        ValueError: a storage or a compression whose package is not installed.
    """
    # The storage, and the files in it.
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

    # Names relative to the common folder stay the same when the folder is moved.
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
    """Shards of one format.

    Attributes:
        columns: the columns to read, if the format allows a choice; empty: all.
        texts_of: further columns, from which only texts are read, such as the names of files.
    """

    kind: str
    shards: tuple[Shard, ...]
    columns: tuple[str, ...]
    limits: Limits
    texts_of: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [shard.name for shard in self.shards]

    def open(self, number: int):
        """Open a shard as a context that gives its bytes, decompressed."""
        return fsspec.open(self.shards[number].url, "rb", compression="infer")

    def read(self, number: int, skip: int = 0) -> Iterator[dict | BadRecord]:
        """Read the records of one shard from record `skip` on.

        Raises:
            ConnectionError: the storage does not answer.
        """
        shard = self.shards[number]
        try:
            if (size := _size(shard.url)) != shard.size:
                raise ValueError(f"it has {size} bytes, and had {shard.size} when it was listed")
            with self.open(number) as file:
                if self.kind == "parquet":
                    yield from _parquet(file, self.columns, self.texts_of, self.limits, skip)
                else:
                    readers = {
                        "csv": csv_records,
                        "jsonl": jsonl_records,
                        "text": text_records,
                        "webdataset": _webdataset,
                    }
                    yield from islice(readers[self.kind](file, self.limits), skip, None)
        except MemoryError:
            raise
        except UNREACHABLE as error:
            raise ConnectionError(f"shard {shard.url} cannot be reached: {error}") from error
        except Exception as error:  # whatever a library raises over broken bytes
            yield BrokenShard(f"shard {shard.name} breaks off: {error}")


def read_file(path: Path, limits: Limits) -> Iterator[dict | BadRecord]:
    """Read the records of one JSONL or CSV file on disk, as those of a shard."""
    shard = Shard(str(path), path.name, path.stat().st_size, "")
    return ShardFiles(path.suffix[1:], (shard,), (), limits).read(0)


def _parquet(
    file, columns: Sequence[str], texts_of: Sequence[str], limits: Limits, skip: int
) -> Iterator[dict | BadRecord]:
    # The file is read column by column, in pieces: a whole row group is never in memory.
    opened = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    names = opened.schema_arrow.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two columns are named {twice[0]!r}")
    # The columns that are wanted, or the texts inside of them.
    wanted = [name for name in columns if name in names] if columns or texts_of else None
    for leaf in map(opened.schema.column, range(len(opened.schema)) if texts_of else ()):
        is_inside = any(f"{leaf.path}.".startswith(f"{name}.") for name in texts_of)  # a name may have dots, too
        if is_inside and leaf.logical_type.type == "STRING":
            wanted.append(leaf.path)
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
        for batch in opened.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False):
            passed = min(skip, len(batch))
            skip -= passed
            yield from readable_rows(batch.slice(passed))


class _Bounded:
    """A file that reads at most so many bytes at once, as the headers of a tar may ask for any number."""

    def __init__(self, file, most: int):
        self.file = file
        self.most = most
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.most + tarfile.RECORDSIZE:
            raise tarfile.ReadError(f"an entry asks for {size} bytes; data.max_record_bytes is {self.most}")
        return self.file.read(size)


def _webdataset(file, limits: Limits) -> Iterator[dict | BadRecord]:
    """Read the records of a webdataset.

    Members that follow one another and have the same name up to the first dot are one record. The rest of the name is
    the name of a column. The keys of a member named json are columns too, and its `segments` name pictures and sounds
    by their columns.
    """
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
        # A new name up to the dot begins a new record.
        if match[1] != key:
            if key is not None:
                yield _webdataset_record(key, members, problem)
            key, members, problem, size = match[1], {}, None, 0
        # Members of a record with a problem are not read.
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
    # tarfile takes a header that is cut short for the end of the archive; the last record may then lack members.
    file.seek(archive.offset)
    if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the archive has no end")
    if key is not None:
        yield _webdataset_record(key, members, problem)


def _escape(member: tarfile.TarInfo) -> str | None:
    """Say why a member is not to be trusted. Nothing is ever extracted, but a name that leads outside is an attack."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return f"the member leads outside: {member.name!r}"
    return None if member.isreg() else f"the member is no regular file: {member.name!r}"


def _webdataset_record(key: str, members: dict[str, bytes], problem: str | None) -> dict | BadRecord:
    if problem is not None:
        return BadRecord(problem)
    # A column for each member: bytes, or text and JSON as values.
    columns: dict = dict(members)
    try:
        for name, value in members.items():
            suffix = name.rsplit(".", 1)[-1]
            if suffix in _TEXTS:
                columns[name] = value.decode("utf-8-sig")
            elif suffix == "json":
                columns[name] = parse_json(value)
        # The keys of the JSON are columns too. The segments of a document in it name other members.
        described = columns.get("json")
        if isinstance(described, dict):
            columns = {**described, **{name: value for name, value in columns.items() if name != "json"}}
            if columns.get("segments"):
                columns["segments"] = [with_known_name(part) for part in columns["segments"]]
            for part in columns.get("segments") or []:
                if part["type"] != "text":
                    part[part["type"]] = members[part[part["type"]].lower()]
    except ValueError as error:
        return BadRecord(f"a member does not decode: {key}: {error}")
    except (LookupError, TypeError, AttributeError) as error:
        return BadRecord(f"the segments name no member: {key}: {error!r}")
    return {"__key__": key, **columns}


# ------------------------------------------------------------------------------------------ folders of pictures, sounds

# Pillow then knows the endings of all formats that it reads.
Image.init()


@dataclass(frozen=True)
class FileKind:
    """A kind of files that are read from a folder.

    Attributes:
        name: the name of the kind in messages.
        column: the column of a record that holds the file.
        suffixes: suffixes of files that can be read.
        others: suffixes of files of the kind that cannot be read, and are not passed over in silence.
    """

    name: str
    column: str
    suffixes: tuple[str, ...]
    others: tuple[str, ...]


KINDS = {
    "pictures": FileKind(
        "pictures",
        "image",
        tuple(sorted(suffix for suffix, name in Image.EXTENSION.items() if name in PICTURE_FORMATS)),
        (".arw", ".cr2", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico", ".jxl", ".nef", ".psd", ".svg",
         ".tga"),
    ),
    "sounds": FileKind(
        "sounds",
        "audio",
        (".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav"),
        (".aac", ".amr", ".ape", ".m4a", ".mid", ".mka", ".wma"),
    ),
}  # fmt: skip
METADATA = ("metadata.jsonl", "metadata.csv")


def folder_records(
    folder: Path, kind: FileKind, has_text: bool, limits: Limits
) -> Iterator[tuple[str, dict | BadRecord]]:
    """Give `(name, {"image": path, "text": caption, ...})` for every picture in a folder (`"audio"` for sounds).

    Captions stand in `metadata.jsonl` or `metadata.csv`, or in a text file beside each picture (`cat.png`, `cat.txt`).
    A file of metadata describes all of its folder. It has a `file_name` column, as in `datasets`' imagefolder; every
    other column becomes a column of the record, and `caption` is also given as `text`. Hidden files are passed over.

    Args:
        has_text: captions are needed; if not, text files beside the pictures are not read.
        limits: the most that a line of metadata, or a caption, may take.
    """
    # The outermost file of metadata describes a folder.
    files = sorted(path for path in folder.rglob("*") if not _is_hidden(path.relative_to(folder)))
    described: dict[Path, Path] = {}
    for path in (path for name in METADATA for path in files if path.name == name):
        if described.keys().isdisjoint([path.parent, *path.parent.parents]):
            described[path.parent] = path

    # Described files, and a warning of those that no line names.
    named = set()
    for path in described.values():
        for name, record in _from_metadata(folder, path, kind.column, limits):
            named.add(name)
            yield name, record
    unnamed = [
        path
        for path in files
        if path.suffix.lower() in kind.suffixes and path.is_file() and not described.keys().isdisjoint(path.parents)
    ]
    if unnamed := [path for path in unnamed if os.path.relpath(path.resolve(), folder.resolve()) not in named]:
        _warn_of_unnamed(str(folder), kind.name, tuple(printable(path.name) for path in unnamed[:5]), len(unnamed))

    # Files with captions beside them.
    for path in files:
        suffix = path.suffix.lower()
        if suffix in kind.suffixes + kind.others and not path.is_dir() and described.keys().isdisjoint(path.parents):
            record = (
                _with_caption(folder, path, kind.column, has_text, limits)
                if suffix in kind.suffixes
                else BadRecord(f"no format that is read: {path.name}; the formats are {', '.join(kind.suffixes)}")
            )
            yield path.relative_to(folder).as_posix(), record


@cache  # a source is opened more than once in a run
def _warn_of_unnamed(folder: str, kind: str, first: tuple[str, ...], count: int) -> None:
    logger.warning(
        "%s: %d %s are left out, as no line of %s names them (first: %s)",
        folder,
        count,
        kind,
        " or ".join(METADATA),
        "; ".join(first),
    )


def resolve_inside(folder: Path, name: str) -> Path:
    """Resolve `folder / name`.

    Raises:
        BadRecord: it leaves the folder (by `..`, an absolute path or a link), or no file has such a name.
    """
    root = folder.resolve()
    try:
        path = resolved(root, name)
    except NO_SUCH_NAME as error:
        raise BadRecord(f"no file has such a name: {name[:80]!r}: {error}") from error
    if not path.is_relative_to(root):
        raise BadRecord(f"the path leads outside: {name!r} of {folder}; use paths relative to that folder")
    return path


def _with_caption(folder: Path, path: Path, column: str, has_text: bool, limits: Limits) -> dict | BadRecord:
    if not has_text:
        return {column: str(path)}
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        missing = f"{path.name} has no caption: no {caption.name} beside it, no {' or '.join(METADATA)} in {folder}"
        return BadRecord(f"picture without a caption: {missing}" if column == "image" else missing)
    try:
        with open(resolve_inside(folder, str(caption)), "rb") as file:
            data = file.read(limits.max_record_bytes + 1)
        if len(data) > limits.max_record_bytes:
            raise BadRecord(f"the caption is too long: more than data.max_record_bytes={limits.max_record_bytes}")
        with blaming(f"the caption is not UTF-8: {caption.name}"):
            return {column: str(path), "text": data.decode("utf-8-sig").strip()}
    except BadRecord as error:
        return error
    except OSError as error:
        return BadRecord(f"the caption cannot be read: {error}")


def _from_metadata(folder: Path, path: Path, column: str, limits: Limits) -> Iterator[tuple[str, dict | BadRecord]]:
    try:
        rows = read_file(resolve_inside(folder, str(path)), limits)
    except BadRecord as error:
        rows = [error]
    for number, row in enumerate(rows, start=1):
        name = f"{path.relative_to(folder).as_posix()}, entry {number}"
        if isinstance(row, BadRecord):
            yield name, row
            continue
        try:
            if not isinstance(file_name := row.get("file_name"), str) or not file_name:
                raise BadRecord(f"the entry has no file_name: give the file's path relative to {path.parent}")
            file = resolve_inside(path.parent, file_name)
            if not file.is_file():
                raise BadRecord(f"missing {'picture' if column == 'image' else 'sound'}: {file} does not exist")
        except BadRecord as error:
            yield name, error
            continue
        record = {key: value for key, value in row.items() if key != "file_name"} | {column: str(file)}
        record.setdefault("text", record.get("caption"))
        yield file.relative_to(folder.resolve()).as_posix(), record


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
