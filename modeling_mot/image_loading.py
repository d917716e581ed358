"""Pictures in any form to RGB arrays of a given size, with Pillow and numpy only: the one reader of pictures.

Training, processors, tokenizers and their commands all read here, so that a picture has the same pixels for all of them.
Shapes: (H, W) pixels.
"""

import io
import math
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from .media_sources import MediaError, decoding, describe_source, open_source


RESAMPLING = {
    name: getattr(Image.Resampling, name.upper()) for name in ("bicubic", "bilinear", "lanczos", "nearest", "box")
}
# Those that are decoded without another program: Pillow opens others too, PostScript by running Ghostscript.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# Most pixels of a picture whose size is kept (`fit="keep"`): 16,384 tokens of 16 x 16 pixels.
MAX_KEPT_PIXELS = 2**22
_TIFF_BITS = 258
# A picture that would be scaled to more than this many times the pixels that are wanted is cut first.
_MOST_SCALED = 16
# Most pixels that are changed in one go, so that no more than two whole copies of a picture are held.
_STRIP_PIXELS = 2**22
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# -- reading ----------------------------------------------------------------------------------------------------------


def load_picture(
    source: Any,
    max_pixels: int = 89_478_485,
    limit: str = "max_pixels",
    allow_urls: bool = False,
    allow_paths: bool = True,
) -> Image.Image:
    """An upright PIL picture, RGB or (where it is transparent in places) RGBA, of one in any form.

    Takes a PIL picture, an array or tensor, and what `open_source` takes: bytes, a path, an address or a record. Of
    several frames the first is read. Arrays are (H, W), (H, W, 1), (H, W, 3), (H, W, 4) or have their channels first:
    bool, uint8, uint16 (scaled by its range), floats in [0, 1], or other integers in [0, 255]. Greys of 16 and 32 bits
    are scaled from [0, 65535], those of floats from [0, 1]. What has 16 bits keeps the upper 8, as Pillow reads RGB.

    Args:
        max_pixels: most pixels, checked before any is decoded.
        limit: what the caller's users call `max_pixels`.
        allow_urls, allow_paths: see `open_source`.

    Raises:
        MissingMedia: a missing file.
        MediaError (a ValueError): what does not decode, is empty, too large, out of range, or must not be opened.
    """
    name = describe_source(source)
    content = open_source(source, "picture", allow_urls, allow_paths)
    with decoding("picture", name):
        if isinstance(content, (np.ndarray, torch.Tensor)):
            return _from_array(content, name, max_pixels, limit)
        if isinstance(content, Image.Image):
            return _checked(content, name, max_pixels, limit)
        if isinstance(content, str):
            with open(content, "rb") as file:
                return _decoded(file, name, max_pixels, limit)
        if isinstance(content, bytes):
            return _decoded(io.BytesIO(content), name, max_pixels, limit)
    raise MediaError(f"the picture is no picture: {name}; give a PIL picture, array, bytes, path or address")


def _decoded(file: Any, name: str, max_pixels: int, limit: str) -> Image.Image:
    """Of an open file, whose header alone is read before the size is checked."""
    Image.init()
    try:
        picture = Image.open(file, formats=[known for known in PICTURE_FORMATS if known in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise MediaError(f"the picture is too large: {error} ({name})") from None
    except Image.UnidentifiedImageError:
        known = ", ".join(PICTURE_FORMATS)
        raise MediaError(f"the picture does not decode: it is none of {known} ({name})") from None
    checked = _checked(picture, name, max_pixels, limit)
    # Not the file's own object, which would go on to read frames from a file that is closed.
    return checked.copy() if checked is picture else checked


def _checked(picture: Image.Image, name: str, max_pixels: int, limit: str) -> Image.Image:
    _check_size(picture.width, picture.height, name, max_pixels, limit)
    picture.load()
    upright = _upright(picture)
    plain = _eight_bits(upright, name)
    if plain is not picture:
        plain.info = {}  # orientation and transparency are applied; they would be once more
    return plain


def _check_size(width: int, height: int, name: str, max_pixels: int, limit: str) -> None:
    if width < 1 or height < 1:
        raise MediaError(f"the picture has no pixels: {width} x {height} ({name})")
    if width * height > max_pixels:
        raise MediaError(
            f"the picture is too large: {width} x {height} pixels; {limit} is {max_pixels} ({name}); scale it down, or "
            "raise the limit"
        )


def _upright(picture: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF or XMP data say; a picture whose data are broken stays as it is."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return picture
    known = isinstance(orientation, int) and orientation in _UPRIGHT
    return picture.transpose(_UPRIGHT[orientation]) if known else picture


def _eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """RGB or RGBA of any mode of Pillow."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _of_deep_grey(picture, name)
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    if picture.mode == mode:
        return picture
    if picture.mode == "La":  # Pillow knows one way from it
        picture = picture.convert("LA")
    return picture.convert(mode)


def _of_deep_grey(picture: Image.Image, name: str) -> Image.Image:
    values = np.asarray(picture)
    if picture.mode == "I":
        if values.min() < 0 or values.max() > 65_535:
            raise MediaError(
                f"the picture has greys out of [0, 65535]: from {values.min()} to {values.max()} ({name}); scale them to "
                "16 bits"
            )
        values = values.astype(np.uint16)
    elif getattr(picture, "tag_v2", {}).get(_TIFF_BITS) == (12,):
        values = values << 4  # Pillow leaves the 12 bits of a TIFF at the lower end
    grey = Image.fromarray(_to_uint8(values, name))
    transparent = picture.info.get("transparency")
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey.convert("RGBA")


def _from_array(array: np.ndarray | torch.Tensor, name: str, max_pixels: int, limit: str) -> Image.Image:
    shape = tuple(array.shape)
    channels_first = len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
    height, width, *channels = (*shape[1:], shape[0]) if channels_first else shape if len(shape) > 1 else (0, 0, 0)
    if len(channels) > 1 or (channels and channels[0] not in (1, 3, 4)):
        raise MediaError(f"the picture has a wrong shape: {shape}; give (H, W), (H, W, 3) or (H, W, 4)")
    _check_size(width, height, name, max_pixels, limit)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype in (torch.bfloat16, torch.float16) else array).numpy()
    if channels_first:
        array = np.moveaxis(array, 0, -1)
    if channels == [1]:
        array = array[..., 0]
    return _eight_bits(Image.fromarray(_to_uint8(array, name)), name)


def _to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    """Values of any type that a picture may have, scaled to 0 to 255."""
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind not in "fiu":
        raise MediaError(f"the picture has values of a wrong type: {values.dtype} ({name}); give uint8 or floats")
    least, most = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (least >= 0 and most <= 1):  # so that NaN is refused too
            raise MediaError(
                f"the picture has floats out of [0, 1]: from {least:g} to {most:g} ({name}); give uint8 for 0 to 255"
            )
        exact = values.astype(np.float32) if values.dtype.itemsize < 4 else values
        return np.rint(exact * 255).astype(np.uint8)
    if least < 0 or most > 255:
        raise MediaError(
            f"the picture has {values.dtype} out of [0, 255]: from {least} to {most} ({name}); give uint16 for 0 to "
            "65535, or floats from 0 to 1"
        )
    return values.astype(np.uint8)


# -- fitting ----------------------------------------------------------------------------------------------------------


def pixel_limit(config: Any, size: tuple[int, int] | None = None) -> tuple[int, str]:
    """The most pixels of a picture that is read for `config` and made `size`, and what the setting is called."""
    if config.fit == "keep" and size is None and config.max_kept_pixels < config.max_pixels:
        return config.max_kept_pixels, "max_kept_pixels"
    return config.max_pixels, "max_pixels"


def load_fitted(source: Any, config: Any, size: tuple[int, int] | None = None, **access: bool) -> np.ndarray:
    """`load_picture`, then `fit_picture`: RGB pixels (H, W, 3), uint8, of a picture in any form."""
    return fit_picture(load_picture(source, *pixel_limit(config, size), **access), config, size)


def flatten(picture: Image.Image, background: Any = (255, 255, 255)) -> Image.Image:
    """RGB: what is transparent shows the background."""
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    flat, rows = Image.new("RGB", picture.size), max(1, _STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height))).convert("RGBA")
        below = Image.new("RGBA", strip.size, (*background, 255))
        flat.paste(Image.alpha_composite(below, strip).convert("RGB"), (0, top))
    return flat


def fit_picture(picture: Image.Image, config: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """RGB pixels (H, W, 3), uint8: alpha flattened on the background, then scaled and cut.

    `config` has the fields `background`, `fit`, `resample` and `image_size` of an `ImageTokenizerConfig`; `size` stands
    in for the last.
    """
    picture = flatten(picture, tuple(config.background))
    if config.fit == "keep" and size is None:
        return np.asarray(picture)
    height, width = size or config.image_size
    choose = max if config.fit != "pad" else min
    scale = choose(width / picture.width, height / picture.height)
    scaled = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if scaled[0] * scaled[1] > _MOST_SCALED * width * height:
        return np.asarray(_scaled_middle(picture, scaled, (width, height), RESAMPLING[config.resample]))
    if scaled != picture.size:
        picture = picture.resize(scaled, RESAMPLING[config.resample])
    if picture.size != (width, height):
        canvas = Image.new("RGB", (width, height), tuple(config.background))
        canvas.paste(picture, ((width - scaled[0]) // 2, (height - scaled[1]) // 2))
        picture = canvas
    return np.asarray(picture)


def cut_long_side(picture: Image.Image) -> Image.Image:
    """The middle of a picture whose one side is many times the other: whoever scales before cutting needs no more."""
    left, top = (max(0, (side - _MOST_SCALED * other) // 2) for side, other in (picture.size, picture.size[::-1]))
    return picture.crop((left, top, picture.width - left, picture.height - top)) if left or top else picture


def _scaled_middle(
    picture: Image.Image, scaled: tuple[int, int], wanted: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """The middle, `wanted` (width, height), of a picture scaled to `scaled`, of which no more than that is made."""
    cuts, boxes = [], []
    for side, full, want in zip(picture.size, scaled, wanted, strict=True):
        first = (full - want + 1) // 2
        start, end = first * side / full, (first + want) * side / full
        # Whole pixels first, as Pillow's boxes are of single precision: all that the filter reaches (Lanczos: 3).
        reach = math.ceil(3 * max(1, side / full)) + 1
        cut = max(0, math.floor(start) - reach), min(side, math.ceil(end) + reach)
        cuts.append(cut)
        boxes.append((start - cut[0], end - cut[0]))
    (left, right), (top, bottom) = cuts
    (start_x, end_x), (start_y, end_y) = boxes
    return picture.crop((left, top, right, bottom)).resize(wanted, resample, box=(start_x, start_y, end_x, end_y))
