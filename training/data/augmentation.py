"""Changed copies of pictures and sounds. Every change is a function of (seed, record, variant) and nothing else."""

import re

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from .config import AugmentationConfig


# Mirroring would contradict captions with these words: directions, what is read, and what is known by its sides.
_SIDED = re.compile(
    r"(left|right|east|west|clock|counter|watch|letter|word|number|digit|text|writ|alphabet|key|button|sign|symbol|flag|"
    r"map|globe|calendar|arrow|question|exclamation|note|ruler|score|book|newspaper|page|moon|quarter|hundred|medal|"
    r"facing|plus|zodiac|mirror|logo|label|card|banknote|receipt|japan|\d)"
)


def may_flip(caption: str) -> bool:
    """Whether a picture with this caption stays true to it in a mirror.

    No, when there is no caption, or when it names a direction, something that is read (letters, numbers, signs, clocks,
    books), or something known by its sides (flags, maps, phases of the moon). The rule looks for parts of words and
    is meant to refuse too much rather than too little.
    """
    return bool(caption.strip()) and _SIDED.search(caption.lower()) is None


def change_picture(
    picture: Image.Image, config: AugmentationConfig, rng: np.random.Generator, flip_allowed: bool
) -> Image.Image:
    """One changed copy: mirrored or not, shifted on white, colours changed.  Same size, RGB."""
    flip, across, down, brightness, contrast, saturation = rng.uniform(-1, 1, 6)
    if config.flip and flip_allowed and flip > 0:
        picture = ImageOps.mirror(picture)
    offset = round(across * config.shift * picture.width), round(down * config.shift * picture.height)
    if offset != (0, 0):
        canvas = Image.new("RGB", picture.size, "white")
        canvas.paste(picture, offset)
        picture = canvas
    # Contrast about white and brightness as an exponent both leave white white.
    picture = ImageEnhance.Color(picture).enhance(1 + saturation * config.saturation)
    pixels = np.asarray(picture, dtype=np.float32) / 255
    pixels = (1 - (1 - pixels) * (1 + contrast * config.contrast)).clip(0, 1)
    pixels = pixels ** (1 + brightness * config.brightness)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def change_sound(wave: np.ndarray, config: AugmentationConfig, rng: np.random.Generator) -> np.ndarray:
    """One changed copy: faster or slower (and higher or lower), louder or softer, with noise.  (N,) -> (M,) float32"""
    speed, gain, noise = rng.uniform(-1, 1, 3)
    speed = 1 + speed * config.speed
    positions = np.arange(max(1, round(len(wave) / speed))) * speed
    wave = np.interp(positions, np.arange(len(wave)), wave)
    wave = wave * 10 ** (gain * config.gain / 20)
    wave = wave + rng.standard_normal(len(wave)) * abs(noise) * config.noise
    return wave.clip(-1, 1).astype(np.float32)


def generator(config: AugmentationConfig, record: int, variant: int, segment: int = 0) -> np.random.Generator:
    """The random numbers of one variant of one segment of one record."""
    return np.random.default_rng([config.seed, record, variant, segment])
