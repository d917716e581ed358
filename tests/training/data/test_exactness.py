"""Over kills, resumes and other numbers of ranks, every row and every document is consumed as often as it should be."""

import json
from collections import Counter

import numpy as np
import pytest

from training.data import RowStream
from training.data.stream import StepBatches

from .test_stream import documents_of


ROWS_IN_A_STEP = 8
# (ranks, rows, accumulation) with one global batch.
WORLDS = [(2, 4, 1), (4, 1, 2), (2, 1, 4), (4, 2, 1), (1, 4, 2)]


def consume(sources, config, world, first_step, steps, position):
    """(number, row) of all ranks in some steps, each rank with a stream of its own that begins at a position."""
    ranks, rows, accumulation = world
    consumed = []
    for rank in range(ranks):
        stream = RowStream(config, sources)
        if position is not None:
            stream.restore(json.loads(position))
        pairs = StepBatches(
            stream, lambda rows, row_numbers: list(zip(row_numbers, rows, strict=True)), rows, accumulation, rank, ranks
        )
        for batches in pairs.from_step(first_step, first_step + steps):
            consumed += [pair for batch in batches for pair in batch]
    return consumed


@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_kills_and_resumes_lose_nothing_and_give_nothing_twice(
    prepare, pair_source, text_source, data_config, seed
):
    sources = [
        prepare(pair_source(caption_first=1.0, source={"weight": 4.0})),
        prepare(text_source(weight=3.0)),
    ]
    # A block is one epoch of both: 40 pairs and 30 texts.
    config = data_config(block_documents=70, seed=seed)
    random = np.random.default_rng(seed)
    step, position, kept = 0, None, []
    for _ in range(20):
        steps = int(random.integers(1, 5))
        consumed = consume(sources, config, WORLDS[random.integers(len(WORLDS))], step, steps, position)
        # What came after the last checkpoint before the kill is done again.
        step += int(random.integers(0, steps + 1))
        kept += [pair for pair in consumed if pair[0] < step * ROWS_IN_A_STEP]
        position = json.dumps(RowStream(config, sources).position(step * ROWS_IN_A_STEP))
    assert sorted(number for number, _ in kept) == list(range(step * ROWS_IN_A_STEP))

    # What there is, read off the sources: begin, text and picture, end.
    pairs = [
        (1, *source["text:name"][0], *source["image:picture"][0], 2)
        for source in map(sources[0].__getitem__, range(40))
    ]
    texts = [(1, *source["text:text"][0], 2) for source in map(sources[1].__getitem__, range(30))]
    counts = Counter(documents_of(row for _, row in kept))
    assert set(counts) == {*pairs, *texts} and len(counts) == 70
    # Whole epochs hold each once; of the last one, which ends anywhere, each has come or not.
    epochs = min(counts.values())
    assert epochs >= 3 and max(counts.values()) <= epochs + 1
    # And they are those of a stream that nobody ever stopped.
    undisturbed = RowStream(config, sources).rows()
    assert counts == Counter(documents_of(next(undisturbed) for _ in range(step * ROWS_IN_A_STEP)))
