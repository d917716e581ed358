"""Changes of pictures and sounds stay within what the configuration says, and follow from the seed."""

import numpy as np
import pytest
from PIL import Image

from training.data import AugmentationConfig
from training.data.preparing.batch_tokenizer import change_picture, change_sound, generator, may_flip


STILL = {"shift": 0, "brightness": 0, "contrast": 0, "saturation": 0, "gain": 0, "speed": 0, "noise": 0, "flip": False}


@pytest.fixture
def picture():
    """A grey square in the middle of white, its left half darker."""
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[24:40, 24:32], pixels[24:40, 32:40] = 60, 160
    return Image.fromarray(pixels)


def changed(picture, record=0, flip_allowed=True, **settings):
    config = AugmentationConfig(**(STILL | settings))
    return np.asarray(change_picture(picture, config, generator(config, record, 1), flip_allowed))


@pytest.mark.parametrize("caption", ["a dog", "red apple", "a fox's tail"])
def test_ordinary_captions_may_be_mirrored(caption):
    assert may_flip(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "hand pointing left",
        "Right arrow",
        "clock showing one o'clock",
        "capital letters button",
        "flag of mali",
        "7",
        "",
    ],
)
def test_sided_captions_may_not_be_mirrored(caption):
    assert not may_flip(caption)


def test_no_settings_change_nothing(picture):
    assert np.array_equal(changed(picture), np.asarray(picture))


def test_a_shift_moves_the_picture_on_white(picture):
    offsets = set()
    for record in range(200):
        dark = np.argwhere(changed(picture, record, shift=0.05)[:, :, 0] == 60)
        assert len(dark) == 16 * 8
        offsets.add(tuple(dark.min(0) - 24))
    assert {abs(offset) for pair in offsets for offset in pair} == {0, 1, 2, 3}


def test_half_are_mirrored_where_allowed_and_none_where_not(picture):
    mirrored = [changed(picture, record, flip=True)[30, 26, 0] == 160 for record in range(400)]
    assert abs(np.mean(mirrored) - 0.5) < 0.125
    assert not any(changed(picture, record, flip_allowed=False, flip=True)[30, 26, 0] == 160 for record in range(50))


def test_white_stays_white_under_colour_changes(picture):
    for record in range(50):
        assert (changed(picture, record, brightness=0.3, contrast=0.3, saturation=0.3)[:20] == 255).all()


def test_a_change_follows_from_seed_record_and_variant(picture):
    config = AugmentationConfig()

    def pixels(seed, record, variant):
        rng = generator(AugmentationConfig(seed=seed), record, variant)
        return np.asarray(change_picture(picture, config, rng, True)).tobytes()

    assert pixels(0, 1, 1) == pixels(0, 1, 1)
    assert len({pixels(0, 1, 1), pixels(1, 1, 1), pixels(0, 2, 1), pixels(0, 1, 2)}) == 4


def test_speed_changes_length_and_pitch_together():
    config = AugmentationConfig(**(STILL | {"speed": 0.1}))
    wave = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000).astype(np.float32)
    for record in range(20):
        other = change_sound(wave, config, generator(config, record, 1))
        speed = 16_000 / len(other)
        assert 0.9 <= speed <= 1.12
        peak = np.abs(np.fft.rfft(other)).argmax() * 16_000 / len(other)
        assert peak == pytest.approx(440 * speed, abs=2)


def test_gain_stays_within_its_decibels():
    config = AugmentationConfig(**(STILL | {"gain": 6.0}))
    wave = np.full(100, 0.1, np.float32)
    levels = [20 * np.log10(change_sound(wave, config, generator(config, r, 1))[0] / 0.1) for r in range(300)]
    assert -6.01 < min(levels) < -5 and 5 < max(levels) < 6.01
