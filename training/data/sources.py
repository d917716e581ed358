"""Data sets to records: mappings from column to value in a fixed order, with a fingerprint of their origin."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import datasets

from .config import Limits, SourceConfig
from .folders import PICTURE_SUFFIXES, interleaved_documents, picture_records
from .media import confined, source_roots
from .shards import UNREACHABLE, BrokenShard, ShardFiles, StreamedDataset, find_shards, is_remote, shard_format


# Up to this many bytes a local source is fingerprinted by content, beyond it by file sizes and times of change.
CONTENT_FINGERPRINT_BYTES = 2**31
# A single JSONL file of up to this many bytes is read into memory: its records are known, counted and in any order.
_WHOLE_FILE_BYTES = 2**28
# Where records have numbers of their own they are prepared in parts of this many, or in as many parts as this at most.
_PART_RECORDS, _MOST_PARTS = 256, 4096
# The number of a record of a shard is its place there, and this for each shard before.
SHARD_RECORDS = 2**32


@dataclass
class Source:
    """Records of one `SourceConfig`, pictures and sound still encoded. Can go to other processes.

    Iterating gives the records; those that cannot be read are errors or, with `on_error: skip`, passed over. `read` gives
    one part, such as a shard, with the records' numbers.

    Attributes:
        records: a sequence of mappings, `ShardFiles` or a `StreamedDataset`.
        num_records: their number, None when it is not known before the end (shards).
        fingerprint: changes when the records do.
        skipped: reasons and numbers of records that were left out when it was opened (only with `on_error: skip`).
        roots: folders whose files the records may name.
    """

    config: SourceConfig
    records: object
    num_records: int | None
    fingerprint: str
    skipped: dict[str, int] = field(default_factory=dict)
    roots: Sequence[Path] = ()

    def __iter__(self) -> Iterator[dict]:
        for part in range(self.num_parts):
            for number, record in self.read(part):
                if not isinstance(record, ValueError):
                    yield record
                elif self.config.on_error == "raise":
                    raise ValueError(f"source {self.config.name!r}, {self.name_of(number)}: {record}") from record

    @property
    def shards(self) -> list[str]:
        """The names of the shards, none where records are numbered throughout."""
        return self.records.names if self.num_records is None else []

    @property
    def num_parts(self) -> int:
        """Parts can be read in any order. The first N records are one part, as where they end is not known before."""
        if self.num_records is None:
            return len(self.shards) if self.config.limit is None else 1
        return max(1, -(-self.num_records // self._part_records))

    @property
    def _part_records(self) -> int:
        return max(_PART_RECORDS, -(-self.num_records // _MOST_PARTS))

    def read(self, part: int, skip: int = 0) -> Iterator[tuple[int, dict | ValueError]]:
        """The numbered records of one part but for the first `skip`, errors in the place of those that cannot be read."""
        if self.num_records is not None:
            start = part * self._part_records
            chosen = range(start + skip, min(start + self._part_records, self.num_records))
            records = self.records.select(chosen) if isinstance(self.records, datasets.Dataset) else None
            numbered = zip(chosen, (self.records[i] for i in chosen) if records is None else records, strict=True)
        elif self.config.limit is None and not self.config.match:
            numbered = enumerate(self.records.read(part, skip), part * SHARD_RECORDS + skip)
        else:
            numbered = islice(self._selected(part), skip, None)
        for number, record in numbered:
            yield number, record if isinstance(record, ValueError) else self._confined(record)

    def _selected(self, part: int) -> Iterator[tuple[int, dict | ValueError]]:
        """The records of a shard that match, or the first N of all shards."""
        shards = [part] if self.config.limit is None else range(len(self.shards))
        numbered = (pair for shard in shards for pair in enumerate(self.records.read(shard), shard * SHARD_RECORDS))
        return islice(
            (pair for pair in numbered if isinstance(pair[1], ValueError) or _matches(pair[1], self.config.match)),
            self.config.limit,
        )

    def _confined(self, record: dict) -> dict:
        record = dict(record)
        for segment in self.config.segments:
            value = record.get(segment.column)
            if segment.type in ("image", "audio"):
                record[segment.column] = confined(value, self.roots)
            elif segment.type == "document" and isinstance(value, list):
                record[segment.column] = [
                    part | {kind: confined(part.get(kind), self.roots) for kind in ("image", "audio") if kind in part}
                    if isinstance(part, dict)
                    else part
                    for part in value
                ]
        return record

    def name_of(self, number: int) -> str:
        """How a message calls record `number`."""
        if self.num_records is not None:
            return f"record {number}"
        shard, place = divmod(number, SHARD_RECORDS)
        return f"shard {self.shards[shard]}, record {place}"


def open_source(config: SourceConfig, limits: Limits | None = None) -> Source:
    """Open a source for reading.

    Args:
        limits: what a record may take; None: the defaults.

    Raises:
        ValueError: a path, configuration, split or column that does not exist, with the nearest one that does.
    """
    if config.path == "carried":
        from . import carried_path

        path = carried_path()
    else:
        path = Path(config.path).expanduser()
    kind = _format(config, path)
    limits = limits or Limits()
    if kind == "dataset":
        return _open_dataset(config, path)
    if kind in ("parquet", "webdataset") or (kind == "jsonl" and not _is_whole_file(path)):
        return _open_shards(config, kind, limits)
    skipped: dict[str, int] = {}
    counted = None if config.on_error == "raise" else skipped
    if kind == "jsonl":
        records = interleaved_documents(path, counted, limits.max_record_bytes)
    else:
        records = picture_records(path, counted, limits.max_record_bytes)
    _check_columns(config, list(records[0]) if records else [])
    records = [record for record in records if _matches(record, config.match)][: config.limit]
    folder = path if path.is_dir() else path.parent
    described = {"path": _local_fingerprint(folder), "file": path.name, "format": kind, "limit": config.limit}
    described |= {"match": config.match} if config.match else {}
    return Source(config, records, len(records), _digest(described), skipped, (folder,))


def _is_whole_file(path: Path) -> bool:
    return path.suffix == ".jsonl" and path.is_file() and path.stat().st_size <= _WHOLE_FILE_BYTES


def _format(config: SourceConfig, path: Path) -> str:
    remote, globbed = is_remote(config.path), bool(re.search(r"[*?\[]", config.path))
    if config.format != "auto":
        if config.format != "dataset" and not remote and not globbed and not path.exists():
            raise ValueError(f"source {config.name!r}: path {config.path} does not exist")
        return config.format
    if remote or globbed or path.is_file():
        if kind := shard_format(config.path):
            return kind
        if remote or globbed:
            raise ValueError(
                f"source {config.name!r}: path {config.path} does not end as shards do; end it with .jsonl, .jsonl.gz, "
                ".jsonl.zst, .parquet or .tar, or set format"
            )
    if path.is_dir() and not (path / "README.md").is_file() and not any(path.rglob("*.parquet")):
        suffixes = {file.suffix.lower() for file in path.rglob("*")}
        if suffixes & set(PICTURE_SUFFIXES):
            return "pictures"
        shards = {shard_format(file.name) for file in path.rglob("*") if file.is_file()}
        if len(shards) == 1 and None not in shards:
            return shards.pop()
    looks_local = (
        config.path.startswith(("/", ".", "~")) or config.path.count("/") > 1 or path.suffix in (".jsonl", ".json")
    )
    if not path.exists() and looks_local:
        raise ValueError(f"source {config.name!r}: path {config.path} does not exist")
    return "dataset"


def _open_shards(config: SourceConfig, kind: str, limits: Limits) -> Source:
    path = config.path if is_remote(config.path) else str(Path(config.path).expanduser().absolute())
    try:
        shards = find_shards(path, kind)
    except (OSError, ValueError, *UNREACHABLE) as error:
        raise ValueError(f"source {config.name!r}: {config.path} cannot be listed: {error}") from error
    if not shards:
        raise ValueError(f"source {config.name!r}: {config.path} holds no {kind} shards; mend path or format")
    columns = dict.fromkeys([*(config.match or {}), *(c for segment in config.segments for c in segment.columns)])
    files = ShardFiles(kind, tuple(shards), tuple(columns), limits)
    described = {"format": kind, "limit": config.limit, "match": config.match, "names": files.names}
    described["sizes"] = [shard.size for shard in shards]
    if is_remote(path) or sum(described["sizes"]) > CONTENT_FINGERPRINT_BYTES:
        described["stamps"] = [shard.stamp for shard in shards]
    else:
        described["content"] = [_content(Path(shard.url)) for shard in shards]
    # Pictures and sounds that records name stand in the folder of all shards, those of a webdataset in its shards.
    in_folder = not is_remote(path) and kind != "webdataset"
    roots = (Path(shards[0].url).parents[shards[0].name.count("/")],) if in_folder else ()
    source = Source(config, files, None, _digest(described), roots=roots)
    _check_first_columns(source)
    return source


def _check_first_columns(source: Source) -> None:
    """That the first records have the columns; one of them may lack some."""
    files = replace(source.records, columns=())
    items = (item for shard in range(len(files.shards)) for item in islice(files.read(shard), 16))
    first = list(islice((item for item in items if not isinstance(item, BrokenShard)), 16))
    columns = dict.fromkeys(name for record in first if isinstance(record, dict) for name in record)
    if columns:
        _check_columns(source.config, list(columns))


def _open_dataset(config: SourceConfig, path: Path) -> Source:
    records = _load(config, path)
    streamed = not isinstance(records, datasets.Dataset)
    if records.features is not None:
        _check_columns(config, list(records.features))
        for name, feature in records.features.items():
            if isinstance(feature, datasets.Image):
                records = records.cast_column(name, datasets.Image(mode=feature.mode, decode=False))
            if isinstance(feature, datasets.Audio):
                records = records.cast_column(name, datasets.Audio(sampling_rate=feature.sampling_rate, decode=False))
    if not streamed and config.match:
        columns = list(config.match)
        records = records.filter(
            lambda *values: _matches(dict(zip(columns, values, strict=True)), config.match), input_columns=columns
        )
    if not streamed and config.limit is not None:
        records = records.select(range(min(config.limit, len(records))))
    described = {"config": config.config, "split": config.split, "limit": config.limit}
    described |= {"match": config.match} if config.match else {}
    if path.exists():
        described["files"] = _local_fingerprint(path)
    else:
        described["dataset"] = [config.path, _hub_commit(config)] if streamed else records._fingerprint
    roots = source_roots(path)
    if streamed:
        described["shards"] = records.num_shards  # records have other numbers
        return Source(config, StreamedDataset(records), None, _digest(described), roots=roots)
    return Source(config, records, len(records), _digest(described), roots=roots)


def _load(config: SourceConfig, path: Path):
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(path))
        if config.split not in splits:
            raise ValueError(_unknown(config, "split", config.split, list(splits)))
        return splits[config.split]
    local = str(path) if path.exists() else config.path
    try:
        names = datasets.get_dataset_config_names(local, revision=config.revision)
        if config.config is not None and config.config not in names:
            raise ValueError(_unknown(config, "config", config.config, names))
        return datasets.load_dataset(
            local, config.config, split=config.split, revision=config.revision, streaming=config.streaming
        )
    except ValueError as error:
        if "split" in str(error).lower() and "source" not in str(error):
            splits = datasets.get_dataset_split_names(local, config.config, revision=config.revision)
            raise ValueError(_unknown(config, "split", config.split, splits)) from error
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(
            f"source {config.name!r}: {config.path} cannot be read: {error.__cause__ or error}; fetch it again, or set "
            "format to that of its files, which names the broken one"
        ) from error
    except (FileNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(
            f"source {config.name!r}: {config.path!r} is neither a local path nor a reachable data set: {error}"
        ) from error


def _hub_commit(config: SourceConfig) -> str:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(config.path, revision=config.revision).sha


def _matches(record: dict, match: dict[str, str] | None) -> bool:
    return all(re.search(expression, str(record.get(column, ""))) for column, expression in (match or {}).items())


def _check_columns(config: SourceConfig, columns: list[str]) -> None:
    for column in config.match or {}:
        if column not in columns:
            raise ValueError(_unknown(config, "column of match", column, columns))
    for segment in config.segments:
        for column in segment.columns:
            if column not in columns:
                raise ValueError(_unknown(config, f"column of {segment}", column, columns))


def _unknown(config: SourceConfig, what: str, value: str, known: list[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(map(repr, known)) or 'nothing'}"
    return f"source {config.name!r} ({config.path}): no {what} {value!r}; {hint}"


def _local_fingerprint(path: Path) -> str:
    """Over every file's relative path, and its content or, for a large source, its size and time of change."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    by_content = sum(file.stat().st_size for file in files) <= CONTENT_FINGERPRINT_BYTES
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(path)}\0{stat.st_size}\0".encode())
        digest.update((_content(file) if by_content else str(stat.st_mtime_ns)).encode())
    return digest.hexdigest()


def _content(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
