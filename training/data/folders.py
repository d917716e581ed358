"""A folder of pictures, or of sounds, with captions: its records, and errors in the place of those that cannot be."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from modeling_mot.image_loading import PICTURE_FORMATS

from .bad_records import BadRecord, blaming
from .config import Limits
from .shards import read_file


Image.init()


@dataclass(frozen=True)
class FileKind:
    """Files that are read from a folder.

    Attributes:
        column: of a record, which holds the file.
        suffixes: of the files that can be read.
        others: suffixes of files of their kind that cannot, which are not passed over in silence.
    """

    column: str
    suffixes: tuple[str, ...]
    others: tuple[str, ...]


KINDS = {
    "pictures": FileKind(
        "image",
        tuple(sorted(suffix for suffix, name in Image.EXTENSION.items() if name in PICTURE_FORMATS)),
        (".arw", ".cr2", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico", ".jxl", ".nef", ".psd", ".svg", ".tga"),
    ),
    "sounds": FileKind(
        "audio",
        (".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav"),
        (".aac", ".amr", ".ape", ".m4a", ".mid", ".mka", ".wma"),
    ),
}  # fmt: skip
METADATA = ("metadata.jsonl", "metadata.csv")


def folder_records(
    folder: Path, kind: FileKind, has_text: bool, limits: Limits
) -> Iterator[tuple[str, dict | BadRecord]]:
    """`{"image": path, "text": caption, ...}` for every picture in a folder (`"audio"` for sounds), with its name there.

    Captions stand in `metadata.jsonl` or `metadata.csv` (a `file_name` column, as `datasets`' imagefolder has it; every
    other column becomes a column of the record, and `caption` is also given as `text`), which describes all of its
    folder; or in a text file beside each picture (`cat.png`, `cat.txt`). Hidden files are passed over.

    Args:
        has_text: whether captions are needed; if not, those beside the pictures are not read.
        limits: what a line of metadata, or a caption, may take.
    """
    files = sorted(path for path in folder.rglob("*") if not _is_hidden(path.relative_to(folder)))
    described: dict[Path, Path] = {}
    for path in (path for name in METADATA for path in files if path.name == name):
        if described.keys().isdisjoint([path.parent, *path.parent.parents]):
            described[path.parent] = path
    for path in described.values():
        yield from _from_metadata(folder, path, kind.column, limits)
    for path in files:
        suffix = path.suffix.lower()
        if suffix in kind.suffixes + kind.others and not path.is_dir() and described.keys().isdisjoint(path.parents):
            record = (
                _with_caption(folder, path, kind.column, has_text, limits)
                if suffix in kind.suffixes
                else BadRecord(f"no format that is read: {path.name}; the formats are {', '.join(kind.suffixes)}")
            )
            yield path.relative_to(folder).as_posix(), record


def resolve_inside(folder: Path, name: str) -> Path:
    """`folder / name`.

    Raises:
        BadRecord: it leaves the folder (by `..`, an absolute path or a link), or no file has such a name.
    """
    root = folder.resolve()
    try:
        path = (root / name).resolve()
        path.is_file()  # which says that a name is too long
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a null byte, a loop of links
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
