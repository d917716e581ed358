"""Interleave a text with its sound at words, as SpiRit-LM does (arXiv 2402.05755, section 3.1).

The timings of the words say where the text and the sound of a record can be cut. A document then changes between text
and speech at cuts that are drawn: "the cat sat on the mat" becomes "the cat", the units of "sat on", " the mat".
"""

import reprlib
import unicodedata
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from training.data.config import InterleavingConfig
from training.data.reading.records import BadRecord


# N samples, U units of a sound

# Aligners count whole frames: a word may end this much behind its sound.
SLACK_SECONDS = 0.05


class Cut(NamedTuple):
    """A place between two words: a character of the text, and a time of the sound in seconds."""

    character: int
    seconds: float


class Span(NamedTuple):
    """Words that stay together: characters `start` to `stop` of the text, or these units of the sound."""

    is_speech: bool
    start: int
    stop: int


class Timed(NamedTuple):
    """A text with the places at which it and its sound can be cut, in order."""

    text: str
    cuts: list[Cut]


# ---------------------------------------------------------------------------------------------------- timings of words


def timed(text: str, words, seconds: float, column: str) -> Timed:
    """Find the places between the words of a text.

    Letters and digits tell which word of the text a timing is of; case, accents, punctuation and white space do not
    count, and a timing without a letter is passed over. The text is cut before the white space between two words, so
    that no character is lost, and the sound in the middle of the pause between them.

    Args:
        words: mappings with `word`, and its `start` and `end` in seconds.
        seconds: length of the sound.
        column: the name of the column of the words, for errors.

    Raises:
        BadRecord: timings that are none, or not in order within the sound, or of other words than those of the text.
    """
    letters = [(letter, place) for place, character in enumerate(text) for letter in letters_of(character)]
    cuts: list[Cut] = []
    used, last_end = 0, None
    for number, (word, start, end) in enumerate(_checked(words, seconds, column)):
        # The letters that come next in the text must be those of the word.
        wanted = letters_of(word)
        if not wanted:
            continue
        found = letters[used : used + len(wanted)]
        first = found[0][1] if found else len(text)
        before = letters[used - 1][1] if used else -1
        if [letter for letter, _ in found] != wanted or first == before:
            raise BadRecord(
                f"column {column!r}: the words are not those of the text: word {number} is {word!r:.40}, where the "
                f"text goes on with {text[before + 1 :]!r:.40}"
            )
        # A cut between this word and the one before it.
        if last_end is not None:
            between = text[before + 1 : first]
            blank = next((place for place, character in enumerate(between) if character.isspace()), len(between))
            cuts.append(Cut(before + 1 + blank, (last_end + start) / 2))
        used, last_end = used + len(wanted), end
    if used < len(letters):
        rest = text[letters[used][1] :]
        raise BadRecord(f"column {column!r}: the words are not those of the text: none is left for {rest!r:.40}")
    return Timed(text, cuts)


def letters_of(text: str) -> list[str]:
    """List the letters and digits of a text without case and accents, by which words are compared."""
    return [letter for letter in unicodedata.normalize("NFKD", text).casefold() if letter.isalnum()]


def _checked(words, seconds: float, column: str) -> list[tuple[str, float, float]]:
    """Check the timings of a record: (word, start, end), in order, within the sound."""
    if not isinstance(words, list) or not words:
        raise BadRecord(f"column {column!r}: it has no timings of words: {reprlib.repr(words)}")
    checked, last = [], 0.0
    for number, timing in enumerate(words):
        word, *times = [timing.get(name) for name in ("word", "start", "end")] if isinstance(timing, dict) else [None]
        if not isinstance(word, str) or not all(_is_time(time) for time in times):
            raise BadRecord(
                f"column {column!r}: a timing must have a word, and its start and end in seconds: timing {number} is "
                f"{reprlib.repr(timing)}"
            )
        start, end = times
        if start < 0 or end > seconds + SLACK_SECONDS:
            raise BadRecord(
                f"column {column!r}: a word is outside of the sound: word {number}, {word!r:.40}, lasts from {start} "
                f"to {end} of {seconds:.3f} seconds"
            )
        if start < last or end < start:
            raise BadRecord(
                f"column {column!r}: the words are not one after another: word {number}, {word!r:.40}, lasts from "
                f"{start} to {end}, and the word before it to {last}"
            )
        checked.append((word, start, end))
        last = end
    return checked


def _is_time(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


# --------------------------------------------------------------------------------------------------------------- spans


def spans_of(
    source: Timed, units: int, units_per_second: float, settings: InterleavingConfig, random: np.random.Generator
) -> list[Span]:
    """Draw the spans of one document: text and speech by turns, from the first word to the last.

    The first modality is drawn, then the number of words of each span; the last span has the words that are left. Words
    that are too short to have a unit of their own stay with the word before them. All spans of text together are the
    text, and all spans of speech would be the sound.

    Args:
        units: U, the length of the sound.
        units_per_second: by which times become places between units.
    """
    # The words as (character, unit) of their starts, and the end of the last one.
    starts = [(0, 0)]
    for cut in source.cuts:
        unit = round(cut.seconds * units_per_second)
        if starts[-1][1] < unit < units:
            starts.append((cut.character, unit))
    words, bounds = len(starts), [*starts, (len(source.text), units)]

    # The words at which the modality changes.
    speech_is_next = bool(random.integers(2))
    spans, word = [], 0
    while word < words:
        fewest, most = settings.speech_words if speech_is_next else settings.text_words
        stop = min(words, word + int(random.integers(fewest, most + 1)))
        start_place, stop_place = bounds[word][speech_is_next], bounds[stop][speech_is_next]
        spans.append(Span(speech_is_next, start_place, stop_place))
        speech_is_next, word = not speech_is_next, stop
    return spans


def without_runs(units: list[int]) -> list[int]:
    """Make runs of one unit a single one, as a speech tokenizer with `deduplicate` does."""
    return units[:1] + [unit for before, unit in pairwise(units) if unit != before]
