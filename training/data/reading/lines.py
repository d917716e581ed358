"""Lines, JSON and CSV from files that others wrote.

A file is bounded and in UTF-8. One broken line costs that line alone.
"""

import csv
import io
import json
from collections.abc import Iterator

from training.data.config import Limits
from training.data.reading.records import BadRecord, is_unicode


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The deepest nesting of JSON: deeper values could exceed Python's recursion.
_MOST_DEPTH = 64


def bounded_lines(file, limits: Limits) -> Iterator[tuple[int, bytes | BadRecord]]:
    """Number the lines of a binary file, without its byte-order mark; an error stands for a line that is too long.

    Raises:
        ValueError: a line so long that its end is not looked for.
    """
    lines = io.BufferedReader(file)
    number = 0
    most = limits.max_record_bytes
    while line := lines.readline(most + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) <= most:
            yield number, line
            continue
        # The rest of a line that is too long is passed over.
        message = f"line {number} is longer than data.max_record_bytes={most}"
        passed = len(line)
        while line and not line.endswith(b"\n"):
            if passed > limits.max_group_bytes:
                raise ValueError(f"{message}, and does not end within data.max_group_bytes={limits.max_group_bytes}")
            line = lines.readline(2**20)
            passed += len(line)
        yield number, BadRecord(f"the line is too long: {message}")


def jsonl_records(file, limits: Limits) -> Iterator[dict | BadRecord]:
    """Read the object of every line that is not empty; an error stands for a line that is no object.

    Raises:
        ValueError: the file ends within a line.
    """
    for number, line in bounded_lines(file, limits):
        if isinstance(line, BadRecord):
            yield line
        elif line.strip():
            try:
                record = parse_json(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    raise ValueError(f"line {number} is cut short: {error}") from error
                yield BadRecord(f"the line is not JSON: line {number} is not JSON: {error}")
                continue
            is_object = isinstance(record, dict)
            yield record if is_object else BadRecord(f"the line is no JSON object: line {number}")


def text_records(file, limits: Limits) -> Iterator[dict | BadRecord]:
    """Give `{"text": line}` for every line that is not empty; an error stands for a line that is not UTF-8."""
    for number, line in bounded_lines(file, limits):
        if isinstance(line, BadRecord):
            yield line
        elif line.strip():
            try:
                yield {"text": line.decode("utf-8").rstrip("\r\n")}
            except UnicodeDecodeError as error:
                yield BadRecord(f"the line is not UTF-8: line {number}: {error}")


def parse_json(data: bytes) -> object:
    """Read the value of a JSON text in UTF-8.

    Raises:
        ValueError: it is not UTF-8, not JSON, names a key twice, or is nested too deep.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    # Most texts have so few brackets that the depth need not be measured.
    if data.count(b"[") + data.count(b"{") > _MOST_DEPTH and is_deeper(value, _MOST_DEPTH):
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")
    return value


def is_deeper(value, most: int) -> bool:
    """True if lists and mappings are nested more than `most` deep."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def _object(pairs: list[tuple[str, object]]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return made


def csv_records(file, limits: Limits) -> Iterator[dict | BadRecord]:
    """Read the row of every entry of a CSV file with a header; an error stands for an entry that is broken.

    Raises:
        ValueError: the first line is no header.
    """
    problems: list[BadRecord] = []

    def texts() -> Iterator[str]:
        for _, line in bounded_lines(file, limits):
            if isinstance(line, BadRecord):
                problems.append(line)
            # Bytes that are not UTF-8 stay recognisable, as an entry may go over several lines.
            yield "\n" if isinstance(line, BadRecord) else line.decode("utf-8", "surrogateescape")

    reader = csv.reader(texts(), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise ValueError(f"the header is not CSV: {error}") from error
    if problems or len(set(header)) < len(header) or not is_unicode("".join(header)):
        raise ValueError(f"the header is no list of different names: {', '.join(header)[:200]!r}")
    while True:
        try:
            fields = next(reader, None)
            if fields is None:
                return
            problem = _problem_of_entry(fields, header)
        except csv.Error as error:
            problem = f"the entry is not CSV: {error}"
        if problems:
            yield problems.pop()
            problems.clear()
        elif problem is not None:
            yield BadRecord(f"{problem}, line {reader.line_num}")
        elif fields:
            yield dict(zip(header, fields, strict=False))


def _problem_of_entry(fields: list[str], header: list[str]) -> str | None:
    if len(fields) > len(header):
        return f"the entry has too many fields: {len(fields)} for {len(header)} columns; put quotes around commas"
    return None if is_unicode("".join(fields)) else "the entry is not UTF-8: a byte of it"
