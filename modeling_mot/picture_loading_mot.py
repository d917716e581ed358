"""Pictures in any form to RGB arrays of a given size, with Pillow and numpy only.

Shapes: (H, W) pixels.
"""

import base64
import io
import os
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


RESAMPLING = {
    name: getattr(Image.Resampling, name.upper()) for name in ("bicubic", "bilinear", "lanczos", "nearest", "box")
}


def load_picture(source: Any, max_pixels: int = 89_478_485) -> Image.Image:
    """A decoded PIL picture from a PIL picture, path, URL, bytes, array or `datasets` {"bytes", "path"} record.

    Raises FileNotFoundError for a missing file and ValueError, naming the picture, for what does not decode, is
    empty, or has more than `max_pixels` pixels (checked before any pixel is decoded).
    """
    name = describe_source(source)
    try:
        picture = _open_picture(source)
        if picture.width * picture.height > max_pixels:
            raise ValueError(
                f"{name} has {picture.width} x {picture.height} pixels, more than max_pixels={max_pixels}; "
                "scale it down first, or raise max_pixels in the image tokenizer's configuration"
            )
        if not isinstance(source, Image.Image):
            picture.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"no such picture: {name}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be decoded safely (max_pixels={max_pixels}): {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name} does not decode as a picture: {error}") from error
    return picture


def describe_source(source: Any) -> str:
    """A short name for error messages: the path where there is one."""
    if isinstance(source, dict):
        return describe_source(source.get("path") or source.get("bytes"))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"picture of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"picture of {source.width} x {source.height} pixels"
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return f"array of shape {tuple(source.shape)}"
    text = str(source)
    return text if len(text) <= 200 else text[:200] + "..."


def _open_picture(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, dict):
        return _open_picture(source["bytes"] if source.get("bytes") is not None else source.get("path"))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(source))
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().float().numpy() if source.is_floating_point() else source.cpu().numpy()
    if isinstance(source, np.ndarray):
        return _picture_from_array(source)
    if isinstance(source, str) and source.startswith("data:image/"):
        return Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        from transformers.image_utils import load_image

        return load_image(source)
    if isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            raise FileNotFoundError(source)
        return Image.open(source)
    raise ValueError(
        f"a picture cannot be made from {type(source).__name__}; give a PIL picture, path, URL, bytes or array"
    )


def _picture_from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"an array of shape {array.shape} is not a picture; give (H, W), (H, W, 3) or (H, W, 4)")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError("a picture of floats must lie in [0, 1]; give uint8 for 0 to 255")
        array = np.rint(array * 255)
    elif array.min() < 0 or array.max() > 255:
        raise ValueError(f"a picture of integers must lie in [0, 255], not [{array.min()}, {array.max()}]")
    return Image.fromarray(array.astype(np.uint8))


def fit_picture(picture: Image.Image, config: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """RGB pixels (H, W, 3), uint8: alpha flattened on the background, then scaled and cut.

    `config` has the fields `background`, `fit`, `resample` and `image_size` of an `ImageTokenizerConfig`; `size` stands
    in for the last.
    """
    background = tuple(config.background)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        flat = Image.new("RGBA", rgba.size, (*background, 255))
        picture = Image.alpha_composite(flat, rgba)
    picture = picture.convert("RGB")
    if config.fit == "keep" and size is None:
        return np.asarray(picture)
    height, width = size or config.image_size
    choose = max if config.fit != "pad" else min
    scale = choose(width / picture.width, height / picture.height)
    scaled = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if scaled != picture.size:
        picture = picture.resize(scaled, RESAMPLING[config.resample])
    if picture.size != (width, height):
        canvas = Image.new("RGB", (width, height), background)
        canvas.paste(picture, ((width - scaled[0]) // 2, (height - scaled[1]) // 2))
        picture = canvas
    return np.asarray(picture)
