"""What the values of a record are: pictures, sounds and texts."""

import datetime
import math
import os
import reprlib
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_mot.media_loading import MediaError, load_picture, load_sound, name_within
from training.data.config import Limits, Segment
from training.data.reading.lines import BadRecord, is_unicode


class OutsidePath(str):
    """A file's name that leads outside the folder of its source. It is never opened."""


def source_roots(path: Path) -> list[Path]:
    """The folders in which files that records name must lie: that of a local source, or the caches for one of the Hub."""
    if path.exists():
        return [path if path.is_dir() else path.parent]
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]


def confined(value, roots: Sequence[Path]):
    """A picture or sound of a record with its file's name, if it has one, made a path inside one of some folders.

    Relative names are taken from the first folder. A name that leads outside (by `..`, an absolute path or a link)
    becomes an `OutsidePath`, which does not decode.
    """
    name = name_within(value)
    if name is None:
        return value
    name = os.fsdecode(name)
    for root in roots:
        try:
            path = (root / name).resolve()
            path.is_file()  # which says that a name is too long
        except (OSError, ValueError, RuntimeError):  # too long a name, a null byte, a loop of links
            break
        if path.is_relative_to(root.resolve()):
            return str(path)
    return OutsidePath(name)


def decode_picture(value, limits: Limits | None = None) -> Image.Image:
    """An upright picture, RGB or (where it is transparent in places) RGBA; see `load_picture`.

    Raises:
        ValueError: nothing there, a missing file, bytes that are no picture, or more pixels than the limit.
    """
    _check_inside(value, "picture")
    return load_picture(value, (limits or Limits()).max_pixels, "data.max_pixels")


def decode_sound(value, limits: Limits | None = None) -> tuple[np.ndarray, int]:
    """A mono float32 wave and its sampling rate; see `load_sound`.

    Raises:
        ValueError: nothing there, a missing file, bytes that are no sound, an array without its sampling rate, or a
            sound longer than the limit.
    """
    _check_inside(value, "sound")
    most = (limits or Limits()).max_audio_seconds
    return load_sound(value, max_seconds=most, limit="data.max_audio_seconds")


def _check_inside(value, kind: str) -> None:
    if isinstance(value, OutsidePath):
        raise MediaError(f"the {kind} file leads outside the folder of its source: {str(value)!r}")


_PLAIN = (bool, int, float, Decimal, datetime.date, datetime.time, datetime.timedelta)


def text_of(segment: Segment, record: dict) -> str:
    """The text of a segment: a column (a list is joined by commas), or a format over columns.

    Raises:
        BadRecord: nothing is left of it, a column that the format cannot do without is missing, or a value is no text.
    """
    values = {name: _plain(record.get(name), name) for name in segment.columns}
    for name, value in values.items():
        if not value.strip() and name not in segment.dispensable:
            what = "empty" if len(segment.parts) == 1 else f"without a value: column {name!r}"
            raise BadRecord(f"the text of {segment} is {what}")
    text = segment.fill(values).strip()
    if not text:
        raise BadRecord(f"the text of {segment} is empty")
    if not is_unicode(text):
        raise BadRecord(f"the text of {segment} is no Unicode: a lone surrogate in {reprlib.repr(text)}")
    return text


def check_parts(parts, column: str) -> list[dict]:
    """The parts of an interleaved document, each a mapping with a type and, if it is a text, a text.

    Raises:
        BadRecord: it is no such list.
    """
    if not isinstance(parts, list) or not parts:
        raise BadRecord(f"column {column!r}: it has no segments: {reprlib.repr(parts)}")
    for place, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in ("text", "image", "audio"):
            raise BadRecord(
                f"column {column!r}: a segment must have a type of text, image or audio: segment {place} is "
                f"{reprlib.repr(part)}"
            )
        text = part.get("text")
        if kind == "text" and (not isinstance(text, str) or not text.strip()):
            raise BadRecord(f"column {column!r}: the text of a segment is empty: segment {place}")
        if kind == "text" and not is_unicode(text):
            raise BadRecord(f"column {column!r}: the text of a segment is no Unicode: a lone surrogate in {place}")
    return parts


def _plain(value, column: str) -> str:
    """A value as a text; nothing for what is missing."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, (list, tuple)) for item in value):
            raise BadRecord(f"the column of a text holds lists in a list: {column!r}")
        return ", ".join(text for text in (_plain(item, column) for item in value) if text.strip())
    if not isinstance(value, _PLAIN):
        raise BadRecord(f"the column of a text holds {type(value).__name__}: {column!r}")
    if value != value:  # NaN, and what else marks what is missing
        return ""
    if isinstance(value, (float, Decimal)) and math.isinf(value):
        raise BadRecord(f"the column of a text holds a number that is not finite: {column!r}")
    return str(value)
