"""Records from plain files: a folder of pictures with captions, and interleaved documents in JSONL."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from .config import Limits


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def picture_records(
    folder: Path, skipped: dict[str, int] | None = None, max_record_bytes: int = Limits.max_record_bytes
) -> list[dict]:
    """`{"image": path, "text": caption, ...}` for every picture in a folder, sorted by path.

    Captions stand in `metadata.jsonl` or `metadata.csv` (a `file_name` column, as `datasets`' imagefolder has it; every
    other column becomes a column of the record, and `caption` is also given as `text`), or in a text file beside each
    picture (`cat.png`, `cat.txt`).

    Args:
        skipped: counts the pictures without a caption, which are then left out; None: they are errors.

    Raises:
        ValueError: a picture that is named but missing, a picture without a caption, or no pictures at all.
    """
    folder = Path(folder)
    for name, read in (("metadata.jsonl", _read_jsonl), ("metadata.csv", _read_csv)):
        if (folder / name).is_file():
            metadata = resolve_inside(folder, name, str(folder))
            return _from_metadata(folder, name, read(metadata, max_record_bytes), skipped)
    records = []
    for picture in sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES):
        caption = picture.with_suffix(".txt")
        if not caption.is_file():
            message = f"{picture} has no caption: no {caption.name} beside it, no metadata.jsonl or .csv in {folder}"
            _refuse(message, "picture without a caption", skipped)
            continue
        caption = resolve_inside(folder, caption.relative_to(folder), str(folder))
        records.append({"image": str(picture), "text": caption.read_text(encoding="utf-8").strip()})
    if not records:
        raise ValueError(f"{folder} holds no pictures with captions ({', '.join(PICTURE_SUFFIXES)})")
    return records


def _from_metadata(folder: Path, name: str, rows: list[dict], skipped: dict[str, int] | None) -> list[dict]:
    records = []
    for number, row in enumerate(rows, start=1):
        where = f"{folder / name}, entry {number}"
        if not isinstance(row, dict) or not row.get("file_name"):
            raise ValueError(f"{where} has no file_name; give the picture's path relative to {folder}")
        picture = resolve_inside(folder, row["file_name"], where)
        if not picture.is_file():
            _refuse(f"{where}: picture {picture} does not exist", "missing picture", skipped)
            continue
        record = {key: value for key, value in row.items() if key != "file_name"} | {"image": str(picture)}
        record.setdefault("text", record.get("caption"))
        records.append(record)
    return records


def interleaved_documents(
    path: Path, skipped: dict[str, int] | None = None, max_record_bytes: int = Limits.max_record_bytes
) -> list[dict]:
    """The object of every line of a JSONL file, `{"segments": [...]}` for every line of a JSONL file; paths of pictures and sounds are resolved in its folder.

    A line is `{"segments": [{"type": "text", "text": "a cat"}, {"type": "image", "image": "cat.png"}, ...]}` with types
    text, image and audio.

    Raises:
        ValueError: a line that is not of this form, or a file that is missing or outside the folder.
    """
    path, documents = Path(path), []
    for number, row in enumerate(_read_jsonl(path, max_record_bytes), start=1):
        where = f"{path}, document {number}"
        if isinstance(row, dict) and "segments" not in row:
            documents.append(row)
            continue
        if not isinstance(row, dict) or not isinstance(row["segments"], list) or not row["segments"]:
            raise ValueError(
                f'{where} has no segments; a line is {{"segments": [{{"type": "text", "text": "..."}}, ...]}}'
            )
        try:
            segments = [_segment(segment, path.parent, where) for segment in row["segments"]]
        except FileNotFoundError as error:
            _refuse(str(error), "missing file", skipped)
            continue
        documents.append({**row, "segments": segments})
    if not documents:
        raise ValueError(f"{path} holds no documents")
    return documents


def _segment(segment: dict, folder: Path, where: str) -> dict:
    kind = segment.get("type") if isinstance(segment, dict) else None
    if kind not in ("text", "image", "audio") or not isinstance(segment.get(kind), str):
        raise ValueError(
            f"{where}: segment {segment!r:.200} must have a type of text, image or audio and a value under that name"
        )
    if kind == "text":
        return {"type": "text", "text": segment["text"]}
    file = resolve_inside(folder, segment[kind], where)
    if not file.is_file():
        raise FileNotFoundError(f"{where}: {kind} file {file} does not exist")
    return {"type": kind, kind: str(file)}


def resolve_inside(folder: Path, name: str | Path, where: str) -> Path:
    """`folder / name`, refused when it leaves the folder (by `..`, an absolute path or a link)."""
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{where}: path {str(name)!r} leads outside {folder}; use paths relative to that folder")
    return path


def _lines(path: Path, most: int) -> Iterator[str]:
    with open(path, "rb") as lines:
        number = 0
        while line := lines.readline(most + 1):
            number += 1
            if len(line) > most:
                raise ValueError(f"{path}, line {number} is longer than data.max_record_bytes={most}")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} is not UTF-8: {error}") from error


def _read_jsonl(path: Path, max_record_bytes: int) -> list[dict]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    rows = []
    for number, line in enumerate(_lines(path, max_record_bytes), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def _read_csv(path: Path, max_record_bytes: int) -> list[dict]:
    try:
        return list(csv.DictReader(_lines(path, max_record_bytes)))
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}") from error


def _refuse(message: str, reason: str, skipped: dict[str, int] | None) -> None:
    if skipped is None:
        raise ValueError(f"{message}; add it, or set on_error: skip to leave such records out")
    skipped[reason] = skipped.get(reason, 0) + 1
