"""Records that cannot be used: one exception for them, and one place where they are refused by name or counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .config import SourceConfig


# Reasons that are counted apart; a file of nothing but different faults must not fill the report.
_MOST_REASONS = 50


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
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

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
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, printable(file or name))

    def join(self, other: "LeftOut") -> None:
        """Add what was left out elsewhere, after what is here."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.first.setdefault(reason, other.first[reason])


def printable(text: str) -> str:
    """A text that any terminal and file takes, however the names in it are encoded."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
