"""Lines, JSON and CSV from files that others wrote, and one exception for records that cannot be used.

Files are bounded and in UTF-8; one broken line costs that line alone. A record that cannot be used is refused by name, or
counted (`on_error: skip`).
"""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from training.data.config import Limits, SourceConfig


# Reasons that are counted apart; a file of nothing but different faults must not fill the report.
_MOST_REASONS = 50
# The records that are named for each reason.
_MOST_NAMES = 5


class BadRecord(ValueError):
    """A record that cannot become a document, for a reason that lies in the record.

    A reader gives it in the place of the record. Its message begins with a reason that many records may share, then
    ": " and what is particular to this one.
    """

    way_out = "mend or remove it, or set on_error: skip to leave such records out"

    @property
    def reason(self) -> str:
        """What records left out are counted under: the message without what differs from record to record."""
        where, *rest = str(self).split(": ")
        return ": ".join([where.split(",")[0], *rest[:1]] if where.startswith("column") else [where])[:100]


class BrokenShard(BadRecord):
    """A shard that cannot be read to its end; the last that its reader gives."""

    way_out = "fetch it again or remove it, or set on_error: skip to leave the rest of it out"

    @property
    def reason(self) -> str:
        return str(self)


@contextmanager
def blaming(where: str, file: str | None = None) -> Iterator[None]:
    """A context in which a `ValueError` says that the record cannot be used: it becomes a `BadRecord`, of `where`.

    Args:
        file: the file to blame, if there is one.
    """
    try:
        yield
    except ValueError as error:
        named = f": file {file}" if file and file not in str(error) else ""
        raise BadRecord(f"{where}: {error}{named}") from error


@dataclass
class LeftOut:
    """Records that were left out.

    Attributes:
        counts: reason -> number of records.
        first: reason -> name of the first of them.
        more: reason -> names of a few that came next, so that several can be mended at once.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    more: dict[str, list[str]] = field(default_factory=dict)

    def add(self, config: SourceConfig, name: str, error: BadRecord, file: str | None = None) -> None:
        """Count a record that cannot be used, or refuse it, as the source's `on_error` says.

        Args:
            name: what the record is called.
            file: where it stands, if that is another name.

        Raises:
            ValueError: source, record, reason and way out, with `on_error: raise`.
        """
        if config.on_error == "raise":
            place = f" ({file})" if file and file not in str(error) else ""
            raise ValueError(printable(f"source {config.name!r}, {name}: {error}{place}; {error.way_out}")) from error
        reason = printable(error.reason)
        if reason not in self.counts and len(self.counts) >= _MOST_REASONS:
            reason = "other reasons"
        self._count(reason, 1, [printable(file or name)])

    def join(self, other: "LeftOut") -> None:
        """Add what was left out elsewhere, after what is here."""
        for reason, count in other.counts.items():
            self._count(reason, count, other.names(reason))

    def names(self, reason: str) -> list[str]:
        """The names of the first few records of a reason."""
        return [self.first[reason], *self.more.get(reason, ())]

    def lines(self) -> list[str]:
        """Say for each reason how many records were left out, and name the first few."""
        return [
            f"{count:,} x {reason} (first: {'; '.join(self.names(reason))})" for reason, count in self.counts.items()
        ]

    def _count(self, reason: str, count: int, names: list[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        if reason not in self.first:
            self.first[reason], *names = names
        more = self.more.get(reason, []) + names
        if more:
            self.more[reason] = more[: _MOST_NAMES - 1]


def printable(text: str) -> str:
    """A text that any terminal and file takes, however the names in it are encoded."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How deep JSON may be nested; what is nested deeper cannot be handled by Python's own recursion.
_MOST_DEPTH = 64


def bounded_lines(file, limits: Limits) -> Iterator[tuple[int, bytes | BadRecord]]:
    """The numbered lines of a binary file, without its byte-order mark; an error in the place of one that is too long.

    Raises:
        ValueError: a line so long that its end is not looked for.
    """
    lines, number, most = io.BufferedReader(file), 0, limits.max_record_bytes
    while line := lines.readline(most + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) <= most:
            yield number, line
            continue
        message = f"line {number} is longer than data.max_record_bytes={most}"
        passed = len(line)
        while line and not line.endswith(b"\n"):
            if passed > limits.max_group_bytes:
                raise ValueError(f"{message}, and does not end within data.max_group_bytes={limits.max_group_bytes}")
            line = lines.readline(2**20)
            passed += len(line)
        yield number, BadRecord(f"the line is too long: {message}")


def jsonl_records(file, limits: Limits) -> Iterator[dict | BadRecord]:
    """The object of every line that is not empty, and an error in the place of one that is none.

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
    """Give `{"text": line}` for every line that is not empty, and an error in the place of one that is not UTF-8."""
    for number, line in bounded_lines(file, limits):
        if isinstance(line, BadRecord):
            yield line
        elif line.strip():
            try:
                yield {"text": line.decode("utf-8").rstrip("\r\n")}
            except UnicodeDecodeError as error:
                yield BadRecord(f"the line is not UTF-8: line {number}: {error}")


def parse_json(data: bytes) -> object:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is not UTF-8, not JSON, names a key twice, or is nested too deep.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    # Most have so few brackets that the depth need not be looked at.
    if data.count(b"[") + data.count(b"{") > _MOST_DEPTH and is_deeper(value, _MOST_DEPTH):
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")
    return value


def is_deeper(value, most: int) -> bool:
    """Whether lists and mappings are nested more than `most` deep."""
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
    """The row of every entry of a CSV file with a header, and an error in the place of one that is broken.

    Raises:
        ValueError: a header that is no header.
    """
    problems: list[BadRecord] = []

    def texts() -> Iterator[str]:
        for _, line in bounded_lines(file, limits):
            if isinstance(line, BadRecord):
                problems.append(line)
            # What is not UTF-8 stays recognisable, as an entry may go over several lines.
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


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8: half a character of UTF-16, a lone surrogate, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _problem_of_entry(fields: list[str], header: list[str]) -> str | None:
    if len(fields) > len(header):
        return f"the entry has too many fields: {len(fields)} for {len(header)} columns; put quotes around commas"
    return None if is_unicode("".join(fields)) else "the entry is not UTF-8: a byte of it"
