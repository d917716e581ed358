"""Rows of a vocabulary whose image codes lie in the midst of text, as an imported Chameleon's do."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from training.config import ConfigError
from training.data.documents import Vocabulary
from training.data.stream import replace_codes
from training.recipe import SamplesConfig, check_decoder

from .conftest import ToyProcessor


RANGES = {
    "image inside": {"text": [0, 40], "image": [4, 20]},
    "and speech behind": {"text": [0, 46], "image": [4, 20], "speech": [40, 46]},
}


class Imported(ToyProcessor):
    def __init__(self, ranges):
        super().__init__()
        self.modality_token_ranges, self.modalities = ranges, list(ranges)


def naive(ranges, token):
    others = [name for name, (first, end) in ranges.items() if name != "text" and first <= token < end]
    return list(ranges).index(others[0] if others else "text")


@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_modality_ids_are_those_of_the_innermost_range(ranges):
    vocabulary = Vocabulary.of(Imported(ranges))
    ids = np.arange(ranges["text"][1])
    assert vocabulary.modality_ids(ids).tolist() == [naive(ranges, token) for token in ids]
    assert Vocabulary.from_dict(asdict(vocabulary)) == vocabulary


@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_codes_are_replaced_by_codes_of_their_range(ranges):
    vocabulary = Vocabulary.of(Imported(ranges))
    ids = np.tile(np.arange(ranges["text"][1]), 50)
    row = {
        "input_ids": ids.copy(),
        "modality_ids": vocabulary.modality_ids(ids),
        "document_ids": np.zeros(len(ids), dtype=np.int64),
    }
    replace_codes(row, 1.0, vocabulary, np.random.default_rng(0))
    changed = row["input_ids"] != ids
    assert changed.any() and not changed[row["modality_ids"] == 0].any()
    assert np.array_equal(vocabulary.modality_ids(row["input_ids"]), row["modality_ids"])


def test_a_run_that_cannot_draw_its_samples_is_not_started():
    processor = Imported(RANGES["image inside"])
    processor.image_tokenizer = SimpleNamespace(can_decode=False)
    with pytest.raises(ConfigError, match="samples.enabled=false"):
        check_decoder(processor, SamplesConfig())
    check_decoder(processor, SamplesConfig(enabled=False))
    processor.image_tokenizer.can_decode = True
    check_decoder(processor, SamplesConfig())
