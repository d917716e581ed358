"""Packing by length, against a literal best fit."""

import numpy as np
import pytest

from training.data.documents import pack


def naive_best_fit(lengths, row_length):
    """Large ones first, longest ahead, then the others; the fullest row with room, the earliest opened among equals."""
    large = [document for document, length in enumerate(lengths) if length > row_length / 4]
    small = [document for document, length in enumerate(lengths) if length <= row_length / 4]
    rows = []
    for document in sorted(large, key=lambda d: (-lengths[d], d)) + small:
        fitting = [row for row in rows if sum(lengths[d] for d in row) + lengths[document] <= row_length]
        if fitting:
            max(fitting, key=lambda row: sum(lengths[d] for d in row)).append(document)
        else:
            rows.append([document])
    return sorted(rows, key=lambda row: row[0])


@pytest.mark.parametrize("seed", range(20))
def test_pack_equals_a_literal_best_fit(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 100)
    rows = pack(lengths, 64)
    assert [[piece.document for piece in row] for row in rows] == naive_best_fit(lengths.tolist(), 64)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_in_exactly_one_row(seed):
    lengths = np.random.default_rng(seed).integers(1, 300, 80)
    rows = pack(lengths, 64)
    covered = [np.zeros(length, dtype=int) for length in lengths]
    for row in rows:
        assert sum(piece.stop - piece.start for piece in row) <= 64
        for piece in row:
            covered[piece.document][piece.start : piece.stop] += 1
    assert all((counts == 1).all() for counts in covered)


def test_a_document_that_fits_is_never_split():
    rows = pack(np.array([60, 200, 64, 3]), 64)
    pieces = [piece for row in rows for piece in row if piece.document != 1]
    assert sorted((piece.document, piece.start, piece.stop) for piece in pieces) == [(0, 0, 60), (2, 0, 64), (3, 0, 3)]


def test_rows_of_small_documents_are_mixed():
    """Short and middling documents, alternating: no row is made of one kind."""
    lengths = np.tile([20, 60], 200)
    for row in pack(lengths, 512)[:-1]:
        kinds = {int(lengths[piece.document]) for piece in row}
        assert kinds == {20, 60}
