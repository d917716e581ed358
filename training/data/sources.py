"""Data sets to records: mappings from column to value in a fixed order, with a fingerprint of their origin."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from .config import SourceConfig
from .folders import PICTURE_SUFFIXES, interleaved_documents, picture_records


# Up to this many bytes a local source is fingerprinted by content, beyond it by file sizes and times of change.
CONTENT_FINGERPRINT_BYTES = 2**31


@dataclass
class Source:
    """Records of one `SourceConfig`, pictures and sound still encoded.

    Attributes:
        records: anything that iterates over mappings; a `datasets.Dataset` where it is one.
        num_records: their number, None when it is not known before the end (streaming).
        fingerprint: changes when the records do.
        skipped: reasons and numbers of records that were left out while reading (only with `on_error: skip`).
    """

    config: SourceConfig
    records: object
    num_records: int | None
    fingerprint: str
    skipped: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict]:
        return iter(self.records)


def open_source(config: SourceConfig) -> Source:
    """Open a source for reading.

    Raises:
        ValueError: a path, configuration, split or column that does not exist, with the nearest one that does.
    """
    if config.path == "carried":
        from . import carried_path

        path = carried_path()
    else:
        path = Path(config.path).expanduser()
    kind = _format(config, path)
    if kind == "dataset":
        return _open_dataset(config, path)
    read = interleaved_documents if kind == "jsonl" else picture_records
    skipped: dict[str, int] = {}
    records = read(path, None if config.on_error == "raise" else skipped)
    _check_columns(config, list(records[0]) if records else [])
    records = [record for record in records if _matches(record, config.match)][: config.limit]
    folder = path if path.is_dir() else path.parent
    described = {"path": _local_fingerprint(folder), "file": path.name, "format": kind, "limit": config.limit}
    described |= {"match": config.match} if config.match else {}
    return Source(config, records, len(records), _digest(described), skipped)


def _format(config: SourceConfig, path: Path) -> str:
    if config.format != "auto":
        if config.format != "dataset" and not path.exists():
            raise ValueError(f"source {config.name!r}: path {config.path} does not exist")
        return config.format
    if path.suffix == ".jsonl" and path.is_file():
        return "jsonl"
    if path.is_dir() and not (path / "README.md").is_file() and not any(path.rglob("*.parquet")):
        suffixes = {file.suffix.lower() for file in path.rglob("*")}
        if suffixes & set(PICTURE_SUFFIXES):
            return "pictures"
    looks_local = (
        config.path.startswith(("/", ".", "~")) or config.path.count("/") > 1 or path.suffix in (".jsonl", ".json")
    )
    if not path.exists() and looks_local:
        raise ValueError(f"source {config.name!r}: path {config.path} does not exist")
    return "dataset"


def _open_dataset(config: SourceConfig, path: Path) -> Source:
    records = _load(config, path)
    if config.match:
        if records.features is not None:
            _check_columns(config, list(records.features))
        columns = list(config.match)
        records = records.filter(
            lambda *values: _matches(dict(zip(columns, values, strict=True)), config.match), input_columns=columns
        )
    if config.limit is not None:
        if isinstance(records, datasets.Dataset):
            records = records.select(range(min(config.limit, len(records))))
        else:
            records = records.take(config.limit)
    if records.features is not None:
        _check_columns(config, list(records.features))
        for name, feature in records.features.items():
            if isinstance(feature, datasets.Image):
                records = records.cast_column(name, datasets.Image(mode=feature.mode, decode=False))
            if isinstance(feature, datasets.Audio):
                records = records.cast_column(name, datasets.Audio(sampling_rate=feature.sampling_rate, decode=False))
    described = {"config": config.config, "split": config.split, "limit": config.limit}
    described |= {"match": config.match} if config.match else {}
    if path.exists():
        described["files"] = _local_fingerprint(path)
    elif isinstance(records, datasets.Dataset):
        described["dataset"] = records._fingerprint
    else:
        described["repository"] = [config.path, _hub_commit(config)]
    number = len(records) if isinstance(records, datasets.Dataset) else None
    return Source(config, records, number, _digest(described))


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
        if by_content:
            with open(file, "rb") as opened:
                while chunk := opened.read(2**20):
                    digest.update(chunk)
        else:
            digest.update(str(stat.st_mtime_ns).encode())
    return digest.hexdigest()


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
