"""Documents into rows, by length alone."""

import bisect
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Tokens `start` to `stop` of document `document` (its index in the block)."""

    document: int
    start: int
    stop: int


def pack(lengths: np.ndarray, row_length: int) -> list[list[Piece]]:
    """Best fit: each document goes where it leaves the least room.

    Documents longer than a quarter of a row go first, the longest ahead; the others follow as they were drawn. (Sorting
    them all fills rows no better, and gathers documents of one length, hence of one modality, in the same rows.)
    A document longer than a row (the caller lets only text be so) fills whole rows, its rest opens the row after them,
    and other documents may fill that row up. Rows are in the order of the documents that opened them.
    """
    openers: list[tuple[int, int]] = []  # (document, which of its rows)
    rows: list[list[Piece]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted

    def open_row(document: int, turn: int, start: int, stop: int) -> None:
        openers.append((document, turn))
        rows.append([Piece(document, start, stop)])
        if room := row_length - (stop - start):
            bisect.insort(rooms, (room, len(rows) - 1))

    long = [int(document) for document in np.flatnonzero(lengths > row_length)]
    for document in long:
        for turn, start in enumerate(range(0, int(lengths[document]), row_length)):
            open_row(document, turn, start, min(start + row_length, int(lengths[document])))
    large = np.flatnonzero(4 * lengths > row_length)
    # A stable sort: equal lengths stay in the order of the documents.
    large = large[np.argsort(-lengths[large], kind="stable")]
    for document in [*large.tolist(), *np.flatnonzero(4 * lengths <= row_length).tolist()]:
        length = int(lengths[document])
        if length > row_length:
            continue
        place = bisect.bisect_left(rooms, (length, -1))
        if place == len(rooms):
            open_row(document, 0, 0, length)
            continue
        room, row = rooms.pop(place)
        rows[row].append(Piece(document, 0, length))
        if room > length:
            bisect.insort(rooms, (room - length, row))
    return [rows[row] for row in sorted(range(len(rows)), key=openers.__getitem__)]
