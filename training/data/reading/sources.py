"""Open a source: find its format, the files of its split and its columns, and fingerprint the files it reads."""

import difflib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NoReturn

import datasets
import yaml
from huggingface_hub import DatasetCard, HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import parquet

from modeling_mot.hub_trust import leads_outside
from modeling_mot.media_loading import name_within
from training.config import digest_of
from training.data.config import DataConfig, Limits, SourceConfig, carried_path, local_path
from training.data.reading.records import (
    UNREACHABLE,
    BadRecord,
    BrokenShard,
    LeftOut,
    OutsidePath,
    Source,
    StreamedDataset,
    check_parts,
    label_names,
    matches,
    printable,
    source_roots,
)
from training.data.reading.shards import (
    KINDS,
    SUFFIXES,
    ShardFiles,
    find_shards,
    folder_records,
    is_remote,
    read_file,
    resolve_inside,
    shard_format,
)


logger = logging.getLogger(__name__)

# Files that `datasets` reads out of a folder, but not alone.
_SUFFIXES_OF_TABLES = (".json", ".csv", ".tsv")
# A single JSONL file of up to this many bytes is read into memory: its records are known, counted and in any order.
_WHOLE_FILE_BYTES = 2**28


# -------------------------------------------------------------------------------------------------------------- opening


def open_source(config: SourceConfig, limits: Limits | None = None) -> Source:
    """Open a source for reading.

    Args:
        limits: the most that a record may take; None: the defaults.

    Raises:
        ValueError: a path, configuration, split or column that does not exist, with the nearest one that does.
    """
    path = carried_path() if config.path == "carried" else local_path(config.path, f"path of source {config.name!r}")
    try:
        kind = _format(config, path)
    except OSError as error:
        raise ValueError(f"source {config.name!r}: path {config.path:.200} cannot be read: {error}") from error
    limits = limits or Limits()
    if kind == "dataset":
        return _open_dataset(config, path)
    if kind in KINDS or (kind == "jsonl" and _is_whole_file(path)):
        return _open_whole(config, kind, path.absolute(), limits)
    return _open_shards(config, kind, limits)


def kinds_in_documents(config: SourceConfig, limits: Limits, most: int = 256) -> tuple[set[str], bool]:
    """Look at the first `most` records of a source for the types of segments in its documents.

    Returns:
        The types, and whether there were no more records.

    Raises:
        ValueError: as `open_source`, or a record that cannot be used (`on_error: raise`).
    """
    columns = [segment.column for segment in config.segments if segment.type == "document"]
    looked_at = list(islice(open_source(config, limits), most + 1))
    parts = (part for record in looked_at[:most] for column in columns for part in check_parts(record[column], column))
    return {part["type"] for part in parts}, len(looked_at) <= most


def _open_whole(config: SourceConfig, kind: str, path: Path, limits: Limits) -> Source:
    """Open a folder of files, or a small JSONL file: all records are read now, and bad ones are found."""
    folder = path if kind in KINDS else path.parent
    try:
        if kind in KINDS:
            has_text = any(column != KINDS[kind].column for column in _columns(config))
            found = list(folder_records(folder, KINDS[kind], has_text, limits))
        else:
            read = (_with_documents(record, config, folder) for record in read_file(path, limits))
            found = [(f"{path.name}, document {number}", record) for number, record in enumerate(read, start=1)]
        content = None if kind in KINDS else content_fingerprint(path)
    except OSError as error:
        raise ValueError(f"source {config.name!r}: {config.path} cannot be read: {error}") from error

    # The files of the split, and the records that match.
    if not found:
        what = f"{kind} ({', '.join(KINDS[kind].suffixes)})" if kind in KINDS else "documents"
        raise ValueError(f"source {config.name!r}: {config.path} holds no {what}; mend path or format")
    if kind in KINDS:
        found = [found[place] for place in _of_split(config, [name for name, _ in found], False, False)]
    else:
        _of_split(config, [path.name], by_file=True, is_named=True)
    columns = dict.fromkeys(column for _, record in found if isinstance(record, dict) for column in record)
    if columns:
        _check_columns(config, list(columns))
    names, records, left_out = [], [], LeftOut()
    for name, record in islice((pair for pair in found if matches(pair[1], config.match)), config.limit):
        if isinstance(record, BadRecord):
            left_out.add(config, name, record)
        else:
            names.append(name)
            records.append(record)

    # The fingerprint covers the records and the files that they name.
    described = {"format": kind, "limit": config.limit, "split": config.split, "match": config.match}
    if kind in KINDS:
        column = KINDS[kind].column
        texts = [{key: value for key, value in record.items() if key != column} for record in records]
        described |= {"names": names, "texts": texts, "left_out": left_out.lines()}
    else:
        described |= {"file": path.name, "content": content}
    source = Source(config, records, len(records), "", left_out, (folder,), names)
    return replace(source, fingerprint=digest_of(described | {"named": _fingerprint_of_named(source)}))


def _with_documents(record: dict | BadRecord, config: SourceConfig, folder: Path) -> dict | BadRecord:
    """Check the documents of a record: their form, and that their files exist."""
    columns = [segment.column for segment in config.segments if segment.type == "document"]
    if isinstance(record, BadRecord):
        return record
    try:
        for column in columns:
            for part in check_parts(record.get(column), column):
                name = part.get(part["type"])
                if part["type"] != "text" and isinstance(name, str) and not resolve_inside(folder, name).is_file():
                    raise BadRecord(f"missing file: {part['type']} file {folder / name} does not exist")
    except BadRecord as error:
        return error
    return record


def _is_whole_file(path: Path) -> bool:
    return path.suffix == ".jsonl" and path.is_file() and path.stat().st_size <= _WHOLE_FILE_BYTES


def _format(config: SourceConfig, path: Path) -> str:
    if config.path == "carried":
        return "dataset"
    # A format that the recipe names.
    remote, globbed = is_remote(config.path), bool(re.search(r"[*?\[]", config.path))
    if config.format != "auto":
        if config.format != "dataset" and not remote and not globbed and not path.exists():
            raise ValueError(f"source {config.name!r}: path {config.path} does not exist")
        return config.format

    # Remote files and globs show their format by their ending, local ones by what lies there.
    if remote or globbed:
        if kind := shard_format(config.path):
            return kind
        raise ValueError(
            f"source {config.name!r}: path {config.path} does not end as shards do; end it with .jsonl, .jsonl.gz, "
            ".jsonl.zst, .parquet, .txt or .tar, or set format"
        )
    if path.is_dir():
        return _format_of_folder(config, path)
    if path.exists():
        return shard_format(path.name) or _refuse_file(config, path)

    # Nothing lies there: a name on the Hub, unless it looks like a path.
    if (
        config.path.startswith(("/", ".", "~"))
        or config.path.count("/") > 1
        or path.suffix.lower() in (*_SUFFIXES_OF_TABLES, *(suffix for kind in SUFFIXES.values() for suffix in kind))
    ):
        raise ValueError(f"source {config.name!r}: path {config.path} does not exist")
    return "dataset"


def _format_of_folder(config: SourceConfig, path: Path) -> str:
    if is_saved(path) or (path / "README.md").is_file() or any(path.rglob("*.parquet")):
        return "dataset"
    files = [file for file in path.rglob("*") if file.is_file()]
    if not files:
        raise ValueError(f"source {config.name!r}: path {config.path} is an empty folder; mend path")
    suffixes = {file.suffix.lower() for file in files}
    if found := next((kind for kind in KINDS if suffixes & set(KINDS[kind].suffixes)), None):
        return found
    shards = {shard_format(file.name) for file in files}
    return shards.pop() if len(shards) == 1 and None not in shards else "dataset"


def _refuse_file(config: SourceConfig, path: Path) -> NoReturn:
    """Say what a single file is that is no source, and what would work."""
    suffix = path.suffix.lower()
    media = next((kind for kind in KINDS.values() if suffix in kind.suffixes + kind.others), None)
    if media is not None:
        found = f"is a single {media.name[:-1]}; give the folder that it lies in, with captions beside its {media.name}"
    elif suffix in _SUFFIXES_OF_TABLES:
        found = f"is a {suffix} file; give the folder that it lies in, or write its records as JSONL"
    else:
        found = (
            "is a file of no format that is read; a source is a folder, or a file of .jsonl, .parquet, .txt or .tar; "
            "for one of another name set format"
        )
    raise ValueError(f"source {config.name!r}: path {config.path} {found}")


def _open_shards(config: SourceConfig, kind: str, limits: Limits) -> Source:
    # The files of the split.
    path = config.path if is_remote(config.path) else str(local_path(config.path, "path").absolute())
    try:
        shards = find_shards(path, kind)
    except (OSError, ValueError, *UNREACHABLE) as error:
        raise ValueError(f"source {config.name!r}: {config.path} cannot be listed: {error}") from error
    if not shards:
        raise ValueError(f"source {config.name!r}: {config.path} holds no {kind} shards; mend path or format")
    root = Path(shards[0].url).parents[shards[0].name.count("/")]
    is_folder = not is_remote(path) and Path(path).is_dir()
    shards = [shards[place] for place in _of_split(config, [shard.name for shard in shards], True, not is_folder)]

    # The fingerprint covers the shards by content or, where they are remote or large, by the storage's stamps.
    files = ShardFiles(kind, tuple(shards), tuple(_columns(config)), limits)
    described = {"format": kind, "limit": config.limit, "match": config.match, "names": files.names}
    described["sizes"] = [shard.size for shard in shards]
    if is_remote(path) or sum(described["sizes"]) > CONTENT_FINGERPRINT_BYTES:
        described["stamps"] = [shard.stamp for shard in shards]
    else:
        described["content"] = [content_fingerprint(Path(shard.url)) for shard in shards]

    # Records name pictures and sounds in the folder of all shards; those of a webdataset are in its shards.
    roots = (root,) if not is_remote(path) and kind != "webdataset" else ()
    labels = _labels_of_parquet(files) if kind == "parquet" else {}
    source = Source(config, files, None, "", roots=roots, labels=labels)
    _check_first_columns(source)
    if roots:
        # Of parquet only the names are read, not the pictures beside them.
        media = {segment.column: None for segment in config.segments if segment.type != "text"}
        named = replace(files, columns=tuple(config.match or ()), texts_of=tuple(media))
        if found := _fingerprint_of_named(replace(source, records=named)):
            described["named"] = found
    return replace(source, fingerprint=digest_of(described))


def _columns(config: SourceConfig) -> dict[str, None]:
    """List the columns that are read."""
    return dict.fromkeys([*(config.match or {}), *(c for segment in config.prepared_segments for c in segment.columns)])


def _of_split(config: SourceConfig, names: list[str], by_file: bool, is_named: bool) -> list[int]:
    """Find the places of the files that are of the split.

    Args:
        names: paths of the files relative to the folder of all.
        by_file: the name of a file may tell its split, too.
        is_named: the path names the files themselves; files of one split are then taken as they are.
    """
    splits = splits_of(names, by_file)
    known = sorted(set(splits))
    if (is_named and len(known) == 1 and config.split == "train") or (
        known == ["train"] and [config.split] == splits_of([config.path], by_file=True)
    ):
        return list(range(len(names)))
    if config.split not in known:
        raise ValueError(_unknown(config, "split", config.split, known))
    return [place for place, split in enumerate(splits) if split == config.split]


def _labels_of_parquet(files: ShardFiles) -> dict[str, list[str]]:
    """Read the names of labels, which `datasets` writes beside the columns of a parquet file."""
    for number in range(len(files.shards)):
        try:
            with files.open(number) as file:
                return label_names(datasets.Features.from_arrow_schema(parquet.read_schema(file)))
        except UNREACHABLE:
            raise
        except Exception:  # a broken shard, which is named when its records are read
            continue
    return {}


def _check_first_columns(source: Source) -> None:
    """Check that the first records have the columns. A single record may lack some."""
    files = replace(source.records, columns=())
    items = (item for shard in range(len(files.shards)) for item in islice(files.read(shard), 16))
    first = list(islice((item for item in items if not isinstance(item, BrokenShard)), 16))
    columns = dict.fromkeys(name for record in first if isinstance(record, dict) for name in record)
    if columns:
        _check_columns(source.config, list(columns))


def _open_dataset(config: SourceConfig, path: Path) -> Source:
    # The records of the split that match, and the first N of them.
    records = _load(config, path)
    streamed = not isinstance(records, datasets.Dataset)
    if records.features is not None:
        _check_columns(config, list(records.features))
    if not streamed and config.match:
        columns = list(config.match)
        records = records.filter(
            lambda *values: matches(dict(zip(columns, values, strict=True)), config.match), input_columns=columns
        )
    if not streamed and config.limit is not None:
        records = records.select(range(min(config.limit, len(records))))

    # The fingerprint covers the files of a local data set, and the name and commit of one on the Hub.
    described = {"config": config.config, "split": config.split, "limit": config.limit}
    described |= {"match": config.match} if config.match else {}
    source = Source(
        config,
        StreamedDataset(records) if streamed else records,
        None if streamed else len(records),
        "",
        roots=source_roots(path),
        labels=label_names(records.features),
    )
    if config.path == "carried":  # nothing else is ever put into its folder
        described["files"] = local_fingerprint(path)
    elif path.exists():
        described["files"] = files_fingerprint(path.resolve(), _data_files(config, path))
        described["labels"] = source.labels
        described["named"] = _fingerprint_of_named(source, records.features)
    else:
        described["dataset"] = [config.path, _hub_commit(config)] if streamed else records._fingerprint
    if streamed:
        described["shards"] = records.num_shards  # records have other numbers
    return replace(source, fingerprint=digest_of(described))


def _data_files(config: SourceConfig, path: Path) -> list[Path]:
    """List the files of a local data set that its split is read from."""
    if is_saved(path):
        folder = path / config.split if (path / "dataset_dict.json").is_file() else path
        state = json.loads((folder / "state.json").read_bytes())
        return [folder / name for name in ("dataset_info.json", *(file["filename"] for file in state["_data_files"]))]
    files = _files_by_split(config, path)
    return files.get(config.split) or [file for of_split in files.values() for file in of_split]


def _files_by_split(config: SourceConfig, path: Path) -> dict[str, list[Path]]:
    """Return split -> files of a folder that `datasets` knows how to read."""
    found = datasets.load_dataset_builder(str(path), config.config).config.data_files
    return {split: [Path(file) for file in files] for split, files in found.items()}


def _cache_of(config: SourceConfig, path: Path) -> str:
    """Return the cache of a local folder as it is now: `datasets` does not notice new files behind the same card."""
    files = [file for of_split in _files_by_split(config, path).values() for file in of_split]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "local" / files_fingerprint(path.resolve(), files)[:16])


def _load(config: SourceConfig, path: Path):
    # What `save_to_disk` wrote.
    if is_saved(path):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.Dataset):
            return saved
        if config.split not in saved:
            raise ValueError(_unknown(config, "split", config.split, list(saved)))
        return saved[config.split]
    if path.is_file():
        raise ValueError(f"source {config.name!r}: path {config.path} is a file; format: dataset is of a folder")

    # A folder that `datasets` knows how to read, or a name on the Hub. Without an answer of the Hub its cache serves.
    local = str(path) if path.exists() else config.path
    try:
        with nullcontext() if path.exists() or _hub_answers(config) else _without_hub():
            names = datasets.get_dataset_config_names(local, revision=config.revision)
            if config.config is not None and config.config not in names:
                raise ValueError(_unknown(config, "config", config.config, names))
            options = {"split": config.split, "revision": config.revision, "streaming": config.streaming}
            if path.exists() and not config.streaming:
                options["cache_dir"] = _cache_of(config, path)
            return datasets.load_dataset(local, config.config, **options)
    except ValueError as error:
        if "split" in str(error).lower() and "source" not in str(error):
            splits = datasets.get_dataset_split_names(local, config.config, revision=config.revision)
            raise ValueError(_unknown(config, "split", config.split, splits)) from error
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        way_out = "fetch it again, or set format to that of its files, which names the broken one"
        if isinstance(error.__cause__, ImportError):
            way_out = "set format: sounds for a folder of sounds, which are then read without that package"
        raise ValueError(
            f"source {config.name!r}: {config.path} cannot be read: {error.__cause__ or error}; {way_out}"
        ) from error
    except (FileNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(f"source {config.name!r}: {_not_found(config, path, error)}") from error


def _not_found(config: SourceConfig, path: Path, error: Exception | str) -> str:
    """Say why nothing was loaded. Causes on this machine come before causes on the Hub."""
    if path.exists():
        # `datasets` goes on with each of the 150 extensions that it reads.
        missing = str(error).partition(" with any supported extension")[0]
        return f"path {config.path} is a folder without files of a format that is read: {missing}; mend path or format"
    if isinstance(error, ConnectionError):
        error = "the Hub is out of reach, and this machine keeps no copy"
    first = Path(path.parts[0])
    if len(path.parts) > 1 and first.is_dir():
        there = sorted(printable(file.name) for file in first.iterdir())
        listed = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
        return (
            f"path {config.path} does not exist here (the folder {first} does, and holds {listed or 'nothing'}), "
            f"nor can a data set of this name be reached: {error}"
        )
    here = [printable(file.name) for file in Path().iterdir()] if len(path.parts) == 1 else []
    near = difflib.get_close_matches(config.path, here, n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{config.path!r} is neither a local path nor a reachable data set: {error}{hint}"


def _hub_answers(config: SourceConfig) -> bool:
    """Ask the Hub for a data set, twice at most; `datasets` itself would try for 25 s and print every attempt."""
    for _ in range(0 if is_offline_mode() else 2):
        try:
            HfApi().dataset_info(config.path, revision=config.revision, timeout=10)
            return True
        except HfHubHTTPError:  # such as a name that it does not have: `datasets` says which
            return True
        except UNREACHABLE:
            time.sleep(0.5)
    return False


@contextmanager
def _without_hub() -> Iterator[None]:
    """Make a context in which `datasets` takes what it has loaded before, and asks nobody."""
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def is_saved(path: Path) -> bool:
    """True for a folder that `save_to_disk` of a `Dataset` or a `DatasetDict` wrote."""
    files = ("state.json", "dataset_info.json")
    return (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in files)


def _hub_commit(config: SourceConfig) -> str:
    return HfApi().dataset_info(config.path, revision=config.revision).sha


def _check_columns(config: SourceConfig, columns: list[str]) -> None:
    for column in config.match or {}:
        if column not in columns:
            raise ValueError(_unknown(config, "column of match", column, columns))
    for segment in config.prepared_segments:
        for column in segment.columns:
            if column not in columns:
                raise ValueError(_unknown(config, f"column of {segment}", column, columns))


def _unknown(config: SourceConfig, what: str, value: str, known: list[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(map(repr, known)) or 'nothing'}"
    return f"source {config.name!r} ({config.path}): no {what} {value!r}; {hint}"


# --------------------------------------------------------------------------------------------------------------- splits

_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_APART = r"[-._ 0-9]"


def splits_of(names: Sequence[str], by_file: bool) -> list[str]:
    """Find the split of each file.

    Args:
        names: paths relative to the folder of all files, with `/`.
        by_file: a word in the name of a file may tell its split, too, such as `validation-00000-of-00002.parquet`.
    """
    return [_split_of(PurePosixPath(name), by_file) for name in names]


def _split_of(path: PurePosixPath, by_file: bool) -> str:
    for folder in path.parts[:-1]:
        for split, words in _WORDS.items():
            if re.fullmatch(rf"(?:{words}){_APART}*", folder, re.IGNORECASE):
                return split
    if by_file:
        for split, words in _WORDS.items():
            if re.search(rf"(?:^|{_APART})(?:{words})(?:{_APART}|$)", path.name, re.IGNORECASE):
                return split
    return "train"


# --------------------------------------------------------------------------------------------------------- fingerprints

# Up to this many bytes a local source is fingerprinted by content, beyond it by file sizes and times of change.
CONTENT_FINGERPRINT_BYTES = 2**31


def local_fingerprint(path: Path) -> str:
    """Hash every file of a folder, see `files_fingerprint`."""
    return files_fingerprint(path, sorted(file for file in path.rglob("*") if file.is_file()))


def files_fingerprint(root: Path, files: Sequence[Path]) -> str:
    """Hash every file: its path relative to `root`, and its content or, for a large source, its size and time.

    A link that leads out of the folder is never opened: it counts by the size and time of what it leads to. A file that
    is not there counts as missing.
    """
    stats = {file: file.stat() for file in files if file.is_file()}
    foreign = {file for file in stats if file.is_symlink() and leads_outside(file, root)}
    by_content = sum(stats[file].st_size for file in stats if file not in foreign) <= CONTENT_FINGERPRINT_BYTES
    digest = hashlib.sha256()
    for file in files:
        size = stats[file].st_size if file in stats else "missing"
        digest.update(os.fsencode(os.path.relpath(file, root)) + f"\0{size}\0".encode())
        if file in stats:
            is_read = by_content and file not in foreign
            digest.update((content_fingerprint(file) if is_read else str(stats[file].st_mtime_ns)).encode())
    return digest.hexdigest()


def content_fingerprint(file: Path) -> str:
    """Hash a file, and hash it again only after a change; "unreadable" stands for a file that may not be read."""
    stat = file.stat()
    try:
        return file_digest(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except PermissionError:
        return "unreadable"


@lru_cache(maxsize=2**16)
def file_digest(file: Path, size: int, changed: int, inode: int) -> str:
    """Hash a file. The arguments beside its path make a changed file be hashed again."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _fingerprint_of_named(source: Source, features: datasets.Features | None = None) -> str | None:
    """Hash the pictures and sounds in files that the records of a source name; None where no record can name any.

    The names are collected by reading the records' columns of pictures and sounds. That costs no more than the look at
    each file, which follows.

    Args:
        features: the features of a data set. Its columns of pictures or sounds hold them, or are its own files.
    """
    segments = [
        segment
        for segment in source.config.segments
        if segment.type != "text" and not re.search(r"\b(Image|Audio)\(", repr((features or {}).get(segment.column)))
    ]
    if not segments:
        return None
    if isinstance(source.records, datasets.Dataset):
        source = replace(source, records=source.records.select_columns([segment.column for segment in segments]))
    names = set()
    for part in range(source.num_parts):
        for _, record in source.read(part):
            if not isinstance(record, BadRecord):
                names.update(name for segment in segments for name in _names_in(segment.type, record[segment.column]))
    root = source.roots[0].resolve()
    return files_fingerprint(root, [root / name for name in sorted(names)])


def _names_in(kind: str, value: object) -> list[str]:
    """List the files that a picture, a sound or a document of a record names."""
    values = [value]
    if kind == "document":
        parts = value if isinstance(value, list) else []
        values = [part[key] for part in parts if isinstance(part, dict) for key in ("image", "audio") if key in part]
    names = [name_within(value) for value in values]
    return [str(name) for name in names if name is not None and not isinstance(name, OutsidePath)]


# ----------------------------------------------------------------------------------------------------------- data cards

KEYS = ("pretty_name", "license", "license_name", "license_link", "language")


def data_cards(config: DataConfig) -> dict[str, dict]:
    """Read what the README.md in a source's folder declares, for each local source whose folder has one.

    Returns:
        `path` of a source -> the declared entries of `KEYS`, and `attribution`, the section with the word licence in
        its heading. Data sets on the Hub have their cards there.
    """
    cards = {}
    for path in dict.fromkeys(source.path for source in (*config.sources, *config.validation_sources)):
        file = (carried_path() if path == "carried" else Path(path).expanduser()) / "README.md"
        if file.is_file():
            try:
                cards[path] = _declared(DatasetCard(file.read_text(encoding="utf-8")))
            except (ValueError, yaml.YAMLError) as error:
                logger.warning("%s is not read, its licence is not in the manifest: %s", file, error)
    return cards


def _declared(card: DatasetCard) -> dict:
    found = {key: card.data.get(key) for key in KEYS if card.data.get(key) is not None}
    section = re.search(
        r"^##+[^\n]*licen[cs]e[^\n]*\n(.*?)(?=^#|\Z)", card.text, re.IGNORECASE | re.MULTILINE | re.DOTALL
    )
    return found | ({"attribution": section[1].strip()} if section else {})
