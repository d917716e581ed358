"""The processor that the project carries: what it is made of, and how good it is on held-out pictures and sounds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_mot.processing_mot import MoTProcessor


CARRIED = Path(__file__).parents[2] / "training" / "assets" / "processor"


@pytest.fixture(scope="module")
def carried():
    return MoTProcessor.from_pretrained(CARRIED)


def test_carried_processor_is_small_and_whole(carried):
    assert sum(p.stat().st_size for p in CARRIED.rglob("*") if p.is_file()) <= 5_500_000
    assert carried.modality_token_ranges["text"] == [0, 4096]
    assert carried.speech_tokenizer.num_units == 500 and carried.speech_tokenizer.units_per_second == 25
    assert carried.image_tokenizer.image_grid == [8, 8]


def test_carried_reconstructions_are_nearest_to_their_held_out_originals(carried):
    from training.tokenizers.image import Pictures
    from training.tokenizers.sources import carried_source, read_column_values

    where = [carried_source("emoji"), carried_source("emoji").replace(":train", ":validation")]
    pictures = Pictures(list(read_column_values(where, ["image"], None, ())), carried.image_tokenizer.config)
    originals = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    held_out = originals[1719:]
    rebuilt = carried.image_tokenizer.decode(carried.image_tokenizer.encode(held_out))
    flat = lambda images: torch.stack([torch.from_numpy(np.array(i)).flatten().float() for i in images])  # noqa: E731
    distances = torch.cdist(flat(rebuilt), flat(originals))
    nearest = distances.argmin(1)
    assert (nearest == torch.arange(1719, len(originals))).double().mean() >= 0.97


def test_carried_units_survive_a_trip_through_sound(carried):
    """Griffin-Lim keeps enough of the spectrum that most units are heard again as themselves or as a near one."""
    from training.tokenizers.sources import carried_source, read_column_values

    sounds = list(read_column_values([carried_source("emoji")], ["audio"], 4, ()))
    tokenizer = carried.speech_tokenizer
    for units in tokenizer.encode(sounds):
        again = tokenizer.encode([tokenizer.decode([units])[0]])[0]
        distances = torch.cdist(tokenizer.centroids, tokenizer.centroids)
        shuffled = units[torch.randperm(len(units), generator=torch.Generator().manual_seed(0))]
        assert distances[units, again].mean() < 0.7 * distances[units, shuffled].mean()
