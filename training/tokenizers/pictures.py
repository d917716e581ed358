"""Pictures as the training commands of image tokenizers and VAEs read them, and as they are compared and shown."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modeling_mot.image_tokenizer import ImageTokenizerConfig
from modeling_mot.media_loading import load_fitted
from training.tokenizers.sources import PICTURE_SUFFIXES, check_writable, read_media


PICTURE_COLUMNS = ["image", "picture", "img"]


def add_picture_arguments(group: argparse._ArgumentGroup) -> None:
    """How pictures are fitted, and weights stored."""
    group.add_argument(
        "--fit", choices=("crop", "pad"), default="crop", help="how other shapes are fitted (default: crop)"
    )
    group.add_argument(
        "--storage-dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float16",
        help="of saved weights (default: float16)",
    )


def both_sides(size: list[int]) -> list[int]:
    """[height, width] of one side or both."""
    return size * 2 if len(size) == 1 else size


class Pictures(Sequence):
    """uint8 pictures (3, H, W), prepared as the tokenizer prepares them; kept in memory up to `memory` bytes."""

    def __init__(self, sources: Sequence, config: ImageTokenizerConfig, memory: int = 2 << 30):
        self.sources, self.config = sources, config
        height, width = config.image_size
        self.cache = {} if 3 * height * width * len(sources) <= memory else None

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        pixels = load_fitted(self.sources[index], self.config)
        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        if self.cache is not None:
            self.cache[index] = picture
        return picture


def read_pictures(where: list[str], arguments: argparse.Namespace, config: ImageTokenizerConfig) -> Pictures:
    """The pictures of the sources a command names; it ends with an error where there are none."""
    sources = list(read_media(where, arguments.column or PICTURE_COLUMNS, arguments.limit, PICTURE_SUFFIXES))
    if not sources:
        raise SystemExit(f"error: no pictures in {', '.join(where)}")
    return Pictures(sources, config)


def check_sheet(path: Path | None) -> None:
    """End the command, before any work, where `save_sheet` could not write."""
    if path is None:
        return
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise SystemExit(f"error: --sheet {str(path)!r:.200} has no suffix of a picture; name a .png")
    check_writable("--sheet", path)


def first_pictures(pictures: Sequence[torch.Tensor], limit: int) -> torch.Tensor:
    """(N, 3, H, W), uint8"""
    return torch.stack([pictures[i] for i in range(min(len(pictures), limit))])


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to what a picture file holds: whole numbers from 0 to 255, as uint8."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def compare_pictures(rebuilt: torch.Tensor, originals: torch.Tensor) -> dict[str, float]:
    """Figures of uint8 reconstructions (N, 3, H, W) and their originals.

    `psnr` is the mean of the pictures' own, in dB, one without error counted as one of a single grey level in one
    value; `nearest_is_original` the share whose nearest picture, in pixel space, is their original.
    """
    found, wanted = rebuilt.flatten(1).float(), originals.flatten(1).float()
    least = 1 / found.shape[1]
    errors = (found - wanted).square().mean(1).clamp(min=least)
    distances = torch.cdist(found, wanted, compute_mode="donot_use_mm_for_euclid_dist")
    return {
        "pictures": len(found),
        "mean_absolute_error": round(float((found - wanted).abs().mean()), 3),
        "psnr": round(float((10 * torch.log10(255**2 / errors)).mean()), 2),
        "nearest_is_original": round(float((distances.diagonal() <= distances.min(1).values).double().mean()), 4),
    }


def save_sheet(originals: Sequence[np.ndarray], rebuilt: Sequence[np.ndarray], path: Path) -> None:
    """Originals (H, W, 3) above their reconstructions, 16 to a row, the last row filled up with white."""
    rows, across = [], min(16, len(originals))
    for start in range(0, len(originals), across):
        for pictures in (originals, rebuilt):
            row = list(pictures[start : start + across])
            row += [np.full_like(row[0], 255)] * (across - len(row))
            rows.append(np.concatenate(row, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def spread(pictures: Sequence[torch.Tensor], count: int = 64) -> list[torch.Tensor]:
    """Up to `count` pictures from the whole length of a sequence."""
    return [pictures[i] for i in range(0, len(pictures), max(1, len(pictures) // count))][:count]
