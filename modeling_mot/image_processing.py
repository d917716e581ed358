"""Make pictures the pixels that a model diffuses, all of one size or each of its own, and count their tokens."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .checks_fields import Maybe, OneOf, Whole, check_fields
from .image_tokenizer import FITS, PICTURE_RULES, from_known_fields, read_hub_json, without_defaults
from .media_loading import MAX_KEPT_PIXELS, describe_source, load_fitted


# N pictures of (H, W) pixels

SCALE_FIELDS = ("longest_side", "shortest_side", "most_scaled_pixels")
CONFIG_RULES = PICTURE_RULES | {
    "downsampling": Whole(),
    "fit": OneOf((*FITS, "scale")),
    **dict.fromkeys(SCALE_FIELDS, Maybe(Whole(1, 2**31))),
}
IMAGE_PROCESSOR_CONFIG_NAME = "image_processor_config.json"


@dataclass
class MoTImageProcessor:
    """How a picture becomes pixels, and how many placeholder tokens stand for it.

    `image_size` is [height, width] in pixels, or one number for both. `fit`: "crop" scales the shorter side and cuts
    the middle out, "pad" scales the longer side and fills with `background`, "keep" takes pictures as they are, "scale"
    keeps their shape: sides become multiples of `downsampling`, the longer one at most `longest_side`, and, where these
    are given, the shorter one at least `shortest_side`, with at most `most_scaled_pixels`; see `scaled_size`.
    `downsampling` is the number of pixels along the side of one token: the VAE's factor times the patch size; it must
    divide both sides. Pictures of more than `max_pixels`, or of more than `max_kept_pixels` with "keep", are refused
    before they are decoded.

    Raises:
        ValueError: a field with an impossible value, by name.

    Example:
        >>> processor = MoTImageProcessor([32, 48], downsampling=16)
        >>> processor.grid(32, 48)
        (2, 3)
        >>> processor([np.zeros((100, 80, 3), np.uint8)])["pixel_values"].shape
        (1, 3, 32, 48)
    """

    image_size: list[int] = field(default_factory=lambda: [64, 64])
    downsampling: int = 16
    fit: str = "crop"
    resample: str = "bicubic"
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    max_pixels: int = 89_478_485
    max_kept_pixels: int = MAX_KEPT_PIXELS
    longest_side: int | None = None
    shortest_side: int | None = None
    most_scaled_pixels: int | None = None

    def __post_init__(self):
        if isinstance(self.image_size, Integral):
            self.image_size = [self.image_size, self.image_size]
        check_fields(self, CONFIG_RULES)
        self._check_scale()
        self.image_size = [int(side) for side in self.image_size]
        self.background = [int(value) for value in self.background]
        if self.fit not in ("keep", "scale"):
            self.grid(*self.image_size, name=f"image_size={self.image_size}")

    def _check_scale(self) -> None:
        """Refuse bounds of "scale" with another `fit`, and bounds that contradict each other."""
        given = {name: value for name in SCALE_FIELDS if (value := getattr(self, name)) is not None}
        if given and self.fit != "scale":
            name = next(iter(given))
            raise ValueError(f"{name}={given[name]} is of fit='scale', not of fit={self.fit!r}; leave it out")
        if self.fit == "scale" and (self.longest_side or 0) < self.downsampling:
            raise ValueError(
                f"longest_side={self.longest_side} with fit='scale': give one of at least downsampling="
                f"{self.downsampling}, the side of a token"
            )

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that `fit="scale"` gives a picture.

        The shape of the picture is kept as well as multiples of `downsampling` allow. The longer side counts more than
        the shorter one, and halves are rounded to even, as in BAGEL's preparation of pictures.

        Example:
            >>> MoTImageProcessor(downsampling=16, fit="scale", longest_side=64, shortest_side=32).scaled_size(91, 61)
            (64, 48)
        """
        unit, longest, most = self.downsampling, self.longest_side, self.most_scaled_pixels

        def scaled(sides, scale):
            return tuple(max(unit, round(round(side * scale) / unit) * unit) for side in sides)

        scale = min(longest / max(width, height), 1.0)
        if self.shortest_side is not None:
            scale = max(scale, self.shortest_side / min(width, height))
        size = scaled((width, height), scale)
        if most is not None and size[0] * size[1] > most:
            size = scaled(size, most / (size[0] * size[1]))  # linear in the pixels, as in BAGEL
        if max(size) > longest:
            size = scaled(size, longest / max(size))
        return size

    def grid(self, height: int, width: int, name: str = "a picture") -> tuple[int, int]:
        """Return (rows, columns) of the tokens of a picture of height x width pixels.

        Raises:
            ValueError: `downsampling` does not divide a side.
        """
        if height % self.downsampling or width % self.downsampling or min(height, width) < 1:
            raise ValueError(
                f"{name}: {height} x {width} pixels do not divide into tokens of downsampling={self.downsampling} "
                f"pixels a side; use fit='crop' or 'pad', or sides that are multiples of {self.downsampling}"
            )
        return height // self.downsampling, width // self.downsampling

    def fit_pictures(self, images: list[Any], **access: bool) -> list[np.ndarray]:
        """Read and fit pictures: RGB pixels (3, H, W), uint8, of each.

        Args:
            images: pictures in any form that `load_picture` takes.
            access: `allow_urls` and `allow_paths` of `load_picture`.

        Raises:
            ValueError: `images` is no list, or a picture cannot be read or has sides that do not divide.
        """
        if not isinstance(images, (list, tuple)):
            raise ValueError(f"images is a {type(images).__name__}; give a list of pictures")
        fitted = []
        for image in images:
            pixels = load_fitted(image, self, **access)
            # Refuse a kept picture whose sides do not divide, by its name.
            self.grid(*pixels.shape[:2], name=describe_source(image))
            fitted.append(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))
        return fitted

    def __call__(self, images: list[Any], **access: bool) -> dict[str, np.ndarray]:
        """Fit pictures and stack them: `pixel_values`, and `image_sizes` where they differ; see `stack`."""
        return self.stack(self.fit_pictures(images, **access))

    @staticmethod
    def stack(fitted: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Stack fitted pictures as arguments of a model; an empty dictionary without pictures.

        Returns:
            `pixel_values` (N, 3, H, W) float32 in [-1, 1]. Where sizes differ, they are padded with zeros at the bottom
            and on the right, and `image_sizes` (N, 2) int64 has height and width in pixels.
        """
        if not fitted:
            return {}

        # One array of the largest height and width.
        sizes = np.array([pixels.shape[1:] for pixels in fitted], dtype=np.int64)
        values = np.zeros((len(fitted), 3, *sizes.max(axis=0)), dtype=np.float32)
        for target, pixels in zip(values, fitted):
            target[:, : pixels.shape[1], : pixels.shape[2]] = pixels.astype(np.float32) / 127.5 - 1

        # The sizes tell the model what is padding; without padding it needs none.
        same = (sizes == sizes[0]).all()
        return {"pixel_values": values} | ({} if same else {"image_sizes": sizes})

    @staticmethod
    def to_pictures(pixel_values: Any, image_sizes: Any = None) -> list[Image.Image]:
        """Make PIL pictures of pixels (N, 3, H, W) in [-1, 1], cut to `image_sizes` (N, 2) if these are given."""
        # The inverse of `stack`, with values rounded to the nearest of 256.
        values = torch.as_tensor(pixel_values).detach().float().cpu()
        pixels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        sizes = [value.shape[:2] for value in pixels] if image_sizes is None else torch.as_tensor(image_sizes).tolist()
        return [Image.fromarray(value[:height, :width]) for value, (height, width) in zip(pixels, sizes)]

    # ----------------------------------------------------------------------------------------------- saving and loading

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `image_processor_config.json`."""
        return without_defaults(self, "max_kept_pixels", *SCALE_FIELDS)

    def fingerprint(self) -> str:
        """Return the sha256 of all settings."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def save_pretrained(self, directory: str | os.PathLike, **kwargs) -> None:
        """Write `image_processor_config.json` to a folder, which is made where it is missing."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (directory / IMAGE_PROCESSOR_CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, subfolder: str = "", **hub_kwargs) -> "MoTImageProcessor":
        """Load a folder or Hub repository that `save_pretrained` wrote."""
        values = read_hub_json(name_or_path, IMAGE_PROCESSOR_CONFIG_NAME, subfolder, **hub_kwargs)
        return from_known_fields(cls, values, "image processor")
