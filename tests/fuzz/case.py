"""A case of the fuzz: one bad input, and the call that receives it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any


class Hung(Exception):
    """The case waited for something that did not come."""


class WrongResult(Exception):
    """The input was accepted, and the result is not the right one."""


@dataclass(frozen=True)
class Place:
    """Folders of one case.

    Attributes:
        inside: files that the case may read and write.
        outside: files that nothing may open: `secret.txt`, `.json`, `.png`, `.wav`, `.safetensors`, `.py`. Each is
            watched.
        ran: a folder that does not exist; code that stands in an input makes it when the code is run.
    """

    inside: Path
    outside: Path
    ran: Path


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        says: what is bad about the input, for the reader of a finding.
        call: hands the input to the entry point. It raises WrongResult if the input is accepted and should not be, or
            if the result is wrong. The `call` of a command returns the exit code.
        names: fields, values and files; an error has to name one of them.
        is_command: whether errors are exit codes and lines of stderr.
    """

    says: str
    call: Callable[[], Any]
    names: tuple[str, ...]
    is_command: bool = False


@dataclass(frozen=True)
class Area:
    """A group of entry points.

    Attributes:
        make: draws a case.
        good: calls the entry points with good inputs in a folder. It shows that the cases reach the code at all.
        warm: builds once the objects that all cases share, in the process from which those of the cases are forked.
    """

    make: Callable[[Random, Place], Case]
    good: Callable[[Path], Any]
    warm: Callable[[], Any] = lambda: None

    @property
    def control(self) -> "Area":
        """The area with its good inputs in place of each case."""
        return replace(self, make=lambda rng, place: Case("good inputs", lambda: self.good(place.inside), ()))
