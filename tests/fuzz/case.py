"""What a case of the fuzz is: one bad input and the call that it goes to."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any


class Hung(Exception):
    """Something that was waited for did not come."""


class WrongResult(Exception):
    """The input was accepted, and what came of it is not what it has to be."""


@dataclass(frozen=True)
class Place:
    """Folders of one case.

    Attributes:
        inside: what the case may read and write.
        outside: files that nothing may open: `secret.txt`, `.json`, `.png`, `.wav`, `.safetensors`, `.py`. Each is watched.
        ran: code that stands in an input makes this folder when it is run.
    """

    inside: Path
    outside: Path
    ran: Path


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        says: what is bad about it, for the reader of a finding.
        call: hands it to the entry point; raises WrongResult where the input is taken and should not be, or where the
            result is not what it has to be. A command's `call` returns its exit code.
        names: fields, values and files, one of which an error has to name.
        is_command: errors are exit codes and lines of stderr.
    """

    says: str
    call: Callable[[], Any]
    names: tuple[str, ...]
    is_command: bool = False


@dataclass(frozen=True)
class Area:
    """A group of entry points.

    Attributes:
        make: a case from what it draws.
        good: calls the entry points with good inputs in a folder; without it a fuzz that never gets anywhere looks well.
        warm: builds once what all cases share, in the process that the cases' own are forked from.
    """

    make: Callable[[Random, Place], Case]
    good: Callable[[Path], Any]
    warm: Callable[[], Any] = lambda: None

    @property
    def control(self) -> "Area":
        """The same with its good inputs in the place of each case."""
        return replace(self, make=lambda rng, place: Case("good inputs", lambda: self.good(place.inside), ()))
