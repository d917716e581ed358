"""Measure how near drawn pictures are to their originals, value by value."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from modeling_mot.image_tokenizer import ImageTokenizerConfig
from modeling_mot.media_loading import fit_picture


def fitting_of(processor) -> Any:
    """Return the settings by which a processor scales and cuts pictures; see `fit_picture`."""
    of_codes = getattr(getattr(processor, "image_tokenizer", None), "config", None)
    return getattr(processor, "image_processor", None) or of_codes or ImageTokenizerConfig()


def psnr(picture: Image.Image, original: Image.Image, fitting: Any) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / mean squared error) of the RGB values.

    The original is scaled and cut to the size of the picture. A picture without error counts as one that is off by a
    single grey level in one value.
    """
    found = np.asarray(picture.convert("RGB"), dtype=np.float64)
    wanted = fit_picture(original, fitting, size=found.shape[:2]).astype(np.float64)
    error = max(np.mean((found - wanted) ** 2), 1 / found.size)
    return float(10 * np.log10(255**2 / error))


def mean_psnr(pictures: Sequence[Image.Image], originals: Sequence[Image.Image], fitting: Any) -> float:
    """Return the mean of the pictures' peak signal-to-noise ratios, in dB."""
    return float(np.mean([psnr(*pair, fitting) for pair in zip(pictures, originals, strict=True)]))
