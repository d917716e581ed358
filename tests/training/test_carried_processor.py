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


def test_the_fingerprint_is_that_of_the_data_that_were_prepared_with_it(carried):
    assert carried.fingerprint() == "3d8f55f57d40139147adcfb22541fb6a8d892648f705e6db556d9b77c51c8f79"


def test_carried_reconstructions_are_nearest_to_their_held_out_originals(carried):
    from training.tokenizers.pictures import Pictures
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


def test_a_continuous_processor_reads_text_as_the_carried_one(carried):
    from training.tokenizers.processor import continuous_processor

    made = continuous_processor(carried, 64, 16)
    assert made.modalities == ["text", "image"] and made.modality_token_ranges == {"text": [0, 4096]}
    document = [
        {"type": "text", "text": "a red apple <|image_3|>"},
        {"type": "image", "image": Image.new("RGB", (64, 64))},
    ]
    ids, before = (processor(document[:1])["input_ids"] for processor in (made, carried))
    assert ids == before
    assert made(document)["pixel_values"].shape == (1, 3, 64, 64)
    assert made(document)["input_ids"].count(made.image_token_id) == 16
    assert carried.modality_token_ranges["image"] == [4096, 5120]
    assert continuous_processor(made, 64, 16).fingerprint() == made.fingerprint()


def test_a_continuous_processor_keeps_speech_where_asked(carried):
    from training.tokenizers.processor import continuous_processor

    made = continuous_processor(carried, [32, 64], 8, keep_speech=True, fit="pad")
    assert made.modality_token_ranges == {"text": [0, 4096], "speech": [4096, 4596]}
    assert made.image_processor.image_size == [32, 64] and made.image_processor.fit == "pad"
    with pytest.raises(ValueError, match="keep_speech=True needs"):
        continuous_processor(continuous_processor(carried, 64, 16), 64, 16, keep_speech=True)
    with pytest.raises(ValueError, match=r"image_size=\[60, 60\]"):
        continuous_processor(carried, 60, 16)


def test_the_command_makes_a_continuous_processor(tmp_path):
    from training.tokenizers.processor import continuous_processor, main

    main(["--text", str(CARRIED), "--downsampling", "16", "--output", str(tmp_path / "made"), "--no-code"])
    made = MoTProcessor.from_pretrained(tmp_path / "made")
    carried = MoTProcessor.from_pretrained(CARRIED)
    assert made.fingerprint() == continuous_processor(carried, 64, 16).fingerprint()
    with pytest.raises(SystemExit, match="--downsampling keeps pictures as pixels"):
        main(["--text", str(CARRIED), "--downsampling", "16", "--image", "x", "--output", str(tmp_path / "other")])
