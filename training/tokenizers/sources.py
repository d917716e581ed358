"""The sources of the tokenizer commands: data sets, parquet folders, and files of text, pictures or sound."""

import argparse
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling_mot.hub_trust import leads_outside, reading
from training.config import Range, one_line


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
TEXT_SUFFIXES = (".txt", ".md", ".rst")


def number(kind: type, **bounds: float) -> Callable[[str], Any]:
    """Make the `type` of an argparse option: a finite `int` or `float` within the bounds of a `Range`."""
    allowed = Range(**bounds)

    def read(text: str) -> Any:
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} must be a finite number")
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text} must be {allowed}")
        return value

    read.__name__ = kind.__name__  # argparse says `invalid int value`
    return read


@contextmanager
def in_one_line(lead: str = "") -> Iterator[None]:
    """Turn an error about the user's files and options into one line that ends the command, after `lead`."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {lead}{one_line(error)}") from None


def add_source_arguments(parser: argparse.ArgumentParser, what: str, columns: str) -> None:
    """Add the options that name a source: --source, --column and --limit."""
    group = parser.add_argument_group("source")
    group.add_argument(
        "--source",
        action="append",
        metavar="WHERE",
        help=f"where {what} come from: a file, a folder of files, a folder or Hub name that `datasets` loads, with the "
        "configuration and split behind colons (path:config:split). May be given several times. "
        "Default: the train split of the carried data",
    )
    group.add_argument("--column", action="append", metavar="NAME", help=f"column to read; may be repeated ({columns})")
    group.add_argument("--limit", type=number(int, ge=1), metavar="N", help="read at most N records of every source")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --output, --overwrite and --seed."""
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument(
        "--seed", type=number(int, ge=0, lt=2**63), default=0, help="seed of everything random (default: 0)"
    )


def check_output(output: Path, overwrite: bool) -> None:
    """End the command, before any work, if the output exists or cannot be written."""
    check_writable("--output", output)
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(f"error: {output} exists; choose another --output or pass --overwrite to replace it")


def check_writable(option: str, path: Path) -> None:
    """End the command, before any work, if a file or folder cannot be made at `path`."""
    try:
        if "\0" in str(path):
            raise ValueError("it holds a null byte")
        there = next(folder for folder in path.absolute().parents if folder.exists())
        tempfile.TemporaryFile(dir=there).close()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {option} {str(path)!r:.200} cannot be written: {error}") from None


def publish(temporary: Path, output: Path) -> None:
    """Move a finished folder to its place, so that nobody ever sees a half-written one."""
    if output.exists():
        shutil.rmtree(output) if output.is_dir() and not output.is_symlink() else output.unlink()
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(str(temporary), str(output))


def read_column_values(
    sources: list[str], columns: list[str], limit: int | None, suffixes: tuple[str, ...]
) -> Iterator[Any]:
    """Yield the values of `columns` from every source in order.

    Lists of texts are flattened. Plain files give their paths, as `Path`.
    """
    for source in sources:
        # Plain files need no columns.
        files = matching_files(source, suffixes)
        if files:
            yield from files[:limit]
            continue

        # A data set gives the columns that it has of those asked for.
        records = load_records(source)
        present = [name for name in columns if name in records.column_names]
        if not present:
            raise SystemExit(
                f"error: {source} has no column {' or '.join(columns)}; it has {', '.join(records.column_names)} "
                "(choose with --column)"
            )
        records = records.select_columns(present)
        for index in range(min(len(records), limit or len(records))):
            record = records[index]
            for name in present:
                value = record[name]
                yield from value if isinstance(value, list) and value and isinstance(value[0], str) else [value]


def read_media(sources: list[str], columns: list[str], limit: int | None, suffixes: tuple[str, ...]) -> Iterator[Any]:
    """Yield pictures or sounds, as `read_column_values` does.

    A record may name a file only in the folder of its source; any other ends the command.
    """
    from training.data.reading.records import OutsidePath, confined, source_roots

    for source in sources:
        roots = source_roots(Path(source.split(":")[0]))
        for value in read_column_values([source], columns, limit, suffixes):
            value = value if isinstance(value, Path) else confined(value, roots)
            if isinstance(value, OutsidePath):
                raise SystemExit(
                    f"error: {source} names {str(value)!r}, which is outside of its folder; put the file there"
                )
            yield value


def matching_files(source: str, suffixes: tuple[str, ...]) -> list[Path]:
    """List `source` itself, or the files under it that have one of `suffixes`, sorted; nothing for a data set."""
    path = Path(source)
    if path.is_file():
        return [path] if path.suffix.lower() in suffixes else []
    if not path.is_dir():
        return []
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.name != "README.md")
    if outside := [file for file in files if leads_outside(file, path)]:
        raise SystemExit(f"error: {outside[0]} is a link that leads outside of {path}; put a copy in its place")
    return [file for file in files if not file.is_dir()]


def load_records(source: str):
    """Load a `datasets.Dataset` from `path[:config[:split]]`, with pictures and sounds left encoded."""
    from datasets import Audio, Image, load_dataset
    from datasets.exceptions import DatasetGenerationError

    parts = source.split(":")
    path, config = parts[0], parts[1] if len(parts) > 1 and parts[1] else None
    split = parts[2] if len(parts) > 2 else "train"
    with in_one_line(), reading(f"cannot read {source:.500}", passed=()):
        try:
            if path.endswith((".parquet", ".jsonl", ".json", ".csv")) and Path(path).is_file():
                kind = {"jsonl": "json"}.get(path.rsplit(".", 1)[1], path.rsplit(".", 1)[1])
                records = load_dataset(kind, data_files=path, split="train")
            else:
                records = load_dataset(path, config, split=split)
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
    for name, feature in records.features.items():
        if isinstance(feature, (Image, Audio)):
            records = records.cast_column(name, type(feature)(decode=False))
    return records


def carried_source(config: str, split: str = "train") -> str:
    """Name a split of a configuration of the carried data, as --source takes it."""
    from training.data.config import carried_path

    return f"{carried_path()}:{config}:{split}"
