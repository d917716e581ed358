"""What a record holds for a text or for an interleaved document, and what in it is none."""

import datetime
import math
import reprlib
from decimal import Decimal

import numpy as np

from .bad_records import BadRecord
from .config import Segment
from .lines import is_unicode


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
