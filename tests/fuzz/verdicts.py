"""Judge how a case ended: an error is clear only if our code raised it on purpose, or if it names the input."""

import dis
import re
import traceback
from pathlib import Path
from types import TracebackType

from huggingface_hub.errors import StrictDataclassError

import conversion
import modeling_mot
import training

from .case import Case, Hung, WrongResult


CLEAR, LIBRARY, ACCEPTED = "clear error", "library traceback", "accepted"
WRONG, HANG, CRASH, MEMORY, CODE, OUTSIDE = "wrong result", "hang", "crash", "memory", "code run", "outside read"
BROKEN = "broken case"  # the fuzz's own fault
VERDICTS = (CLEAR, LIBRARY, ACCEPTED, WRONG, HANG, CRASH, MEMORY, CODE, OUTSIDE)
FATAL = (WRONG, HANG, CRASH, MEMORY, CODE, OUTSIDE, BROKEN)

_OURS = tuple(str(Path(package.__file__).parent) for package in (conversion, modeling_mot, training))
# The errors that a caller expects for a bad argument; any other is an accident, whatever it says.
_EXPECTED = (ValueError, TypeError, LookupError, OSError, ImportError, RuntimeError, StrictDataclassError)
_NO_MEMORY = re.compile(r"can't allocate memory|[Cc]annot allocate memory|Unable to allocate|bad_alloc|malloc of size")


def judge_error(error: BaseException, case: Case) -> tuple[str, str]:
    """Return (verdict, message) of an exception that came out of a call."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, WrongResult):
        return WRONG, str(error)
    if isinstance(error, Hung):
        return HANG, str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(said):
        return MEMORY, said
    last = _last_frame(error.__traceback__)
    where = f"{said} (raised at {last.tb_frame.f_code.co_filename}:{last.tb_lineno})"
    if not isinstance(error, _EXPECTED) or not str(error).strip():
        return LIBRARY, where
    on_purpose = last.tb_frame.f_code.co_filename.startswith(_OURS) and _is_raise(last)
    return (CLEAR if on_purpose or _names_input(said, case) and not _is_accident(error, last) else LIBRARY), where


def judge_command(code: object, printed: str, case: Case) -> tuple[str, str]:
    """Return (verdict, message) of a command, from its exit code or the text that it ended with."""
    if isinstance(code, str):
        printed, code = f"{printed}\n{code}", 1
    if not code:
        return ACCEPTED, ""
    errors = [line for line in printed.splitlines() if re.match(r"error\b|.*: error: ", line)]
    said = f"exit code {code}: {' '.join(errors) or printed[-300:]}"
    is_clear = errors and "Traceback (most recent call last)" not in printed and _names_input(printed, case)
    return (CLEAR if is_clear else LIBRARY), said


def _names_input(said: str, case: Case) -> bool:
    names = {form for name in case.names if name for form in (name, name.replace("_", " "), name.replace("-", "_"))}
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said) for name in names)


def _last_frame(trace: TracebackType) -> TracebackType:
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _is_raise(trace: TracebackType) -> bool:
    """True if the frame ended in a `raise`, and not in an operation that failed."""
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _is_accident(error: BaseException, last: TracebackType) -> bool:
    """True if an operation of Python failed in our code; a call with an unknown keyword is no accident."""
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return False
    return last.tb_frame.f_code.co_filename.startswith(_OURS) and not _is_raise(last)


def full_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
