"""Read pictures and sounds in any form: the one reader of training, processors, tokenizers and their commands.

Every file, array, record or address is opened here. So it gives the same pixels or samples wherever it is used, and the
caller's permissions (addresses, local paths) hold everywhere. Three sections: where the content comes from, pictures,
sounds.
"""

import base64
import io
import math
import numbers
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPSConnection
from socket import SHUT_RDWR, socket
from threading import Timer
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers.utils import logging


# (H, W) pixels of a picture, S samples of a sound, C channels of it

logger = logging.get_logger(__name__)

# ----------------------------------------------------------------------------------------- where the content comes from

# Content that is fetched or spelled out in text may hold this many bytes: ten minutes of uncompressed stereo sound.
MAX_BYTES = 2**27
MAX_SECONDS_TO_FETCH = 30.0
# The keys under which a record may hold its content or the name of its content; the first that is not None counts.
CONTENT_KEYS = ("array", "bytes", "base64")
NAME_KEYS = ("path", "url")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class MediaError(ValueError):
    """A picture or sound that cannot be used. The message says which and why."""


class MissingMedia(MediaError, FileNotFoundError):
    """A picture or sound whose file is not there."""


def describe_source(source: Any) -> str:
    """Return a short name of a picture or sound for error messages: the name of its file if it has one."""
    # A record, by the name or content that it holds.
    if isinstance(source, dict):
        held = next(((key, source[key]) for key in (*NAME_KEYS, *CONTENT_KEYS) if source.get(key) is not None), None)
        if held is None or isinstance(held[1], dict):
            return "a record"
        return "base64" if held[0] == "base64" else describe_source(held[1])

    # Content: bytes, a PIL picture, an array or tensor.
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if hasattr(source, "getexif"):
        return getattr(source, "filename", "") or f"picture of {source.width} x {source.height} pixels"
    if hasattr(source, "shape"):
        return f"array of shape {tuple(source.shape)}"

    # A path or an address, or anything else by its type.
    text = str(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"
    most = 40 if text[:5].lower() == "data:" else 200
    short = text if len(text) <= most else text[:most] + "..."
    return short.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair cannot be printed


def name_within(source: Any) -> Any:
    """Return the path or address under which a source is to be opened; None if the source holds its content."""
    if isinstance(source, dict) and all(source.get(key) is None for key in CONTENT_KEYS):
        source = next((source[key] for key in NAME_KEYS if source.get(key) is not None), None)
    return source if isinstance(source, (str, os.PathLike)) else None


def open_source(source: Any, kind: str, allow_urls: bool = False, allow_paths: bool = True) -> Any:
    """Open a source as far as a decoder needs: bytes, the path (str) of a file that is there, or the object itself.

    Args:
        source: bytes, a path, an address (`https://`), a `data:` address, or a record: {"array"}, {"bytes"},
            {"base64"}, {"path"} or {"url"}, the first that is not None. `datasets` has {"bytes", "path"}.
        kind: "picture" or "sound", for messages.
        allow_urls: True to fetch addresses, at most `MAX_BYTES` in `MAX_SECONDS_TO_FETCH`. `data:` and base64,
            which hold the content, are always read.
        allow_paths: True to open local files. Turn it off for sources that strangers send.

    Raises:
        MissingMedia: the file is not there.
        MediaError: the source must not be opened, cannot be fetched, or holds nothing.
    """
    # A source that holds its content is opened already.
    if isinstance(source, dict):
        source = _of_record(source, kind)
    if source is None:
        raise MediaError(f"there is no {kind}")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not isinstance(source, (str, os.PathLike)):
        return source

    # A name: of content that it spells out, of an address, of a local file.
    text = os.fsdecode(source)
    if text[:5].lower() == "data:":
        return _of_data_address(text, kind)
    if isinstance(source, str) and _ADDRESS.match(text):
        return _of_address(text, kind, allow_urls)
    if not allow_paths:
        raise MediaError(
            f"the {kind} is a local path, which is opened with allow_paths=True only: {describe_source(text)}"
        )
    if not os.path.isfile(text):
        raise MissingMedia(f"the {kind} file does not exist: {describe_source(text)}")
    return text


@contextmanager
def decoding(kind: str, name: str) -> Iterator[None]:
    """Turn any error of a decoder, a MemoryError too, into a MediaError."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        # The whole message of soundfile begins with the address of an object in memory.
        why = getattr(error, "error_string", None) or str(error) or type(error).__name__
        raise MediaError(f"the {kind} does not decode: {why} ({name})") from error


def _of_record(record: dict, kind: str) -> Any:
    """Return the content of a record or, if it has none, the name of its content."""
    for key in (*CONTENT_KEYS, *NAME_KEYS):
        value = record.get(key)
        if value is None:
            continue
        # An array is never a name: callers that confine the names of records look at `name_within` alone.
        spelled = isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike, dict))
        wanted = {"bytes": (bytes, bytearray, memoryview), "base64": (str, bytes)}.get(key, (str, os.PathLike))
        if spelled if key == "array" else not isinstance(value, wanted):
            raise MediaError(f"the {kind} is a record with a {type(value).__name__} under {key!r}")
        return _of_base64(value, kind) if key == "base64" else value
    raise MediaError(
        f"there is no {kind} in a record of {', '.join(map(repr, record)) or 'nothing'}; it may hold "
        f"{', '.join((*CONTENT_KEYS, *NAME_KEYS))}"
    )


def _of_base64(text: str | bytes, kind: str) -> bytes:
    if isinstance(text, str) and text[:5].lower() == "data:":
        return _of_data_address(text, kind)
    _check_spelled_length(text, kind)
    with decoding(kind, "base64"):
        # Line breaks are allowed; other foreign characters are an error.
        return base64.b64decode(re.sub(rb"\s+", b"", text.encode() if isinstance(text, str) else text), validate=True)


def _of_data_address(text: str, kind: str) -> bytes:
    """Return the content of `data:[type][;base64],content`."""
    _check_spelled_length(text, kind)
    header, comma, content = text.partition(",")
    with decoding(kind, describe_source(text)):
        if not comma:
            raise ValueError("a data: address has a comma before its content")
        held = unquote_to_bytes(content)
    return _of_base64(held, kind) if header.lower().endswith(";base64") else held


def _check_spelled_length(text: str | bytes, kind: str) -> None:
    if len(text) > MAX_BYTES * 4 // 3:
        raise MediaError(f"the {kind} is too large: {len(text)} characters that stand for more than {MAX_BYTES} bytes")


def _of_address(address: str, kind: str, allow_urls: bool) -> bytes:
    name = describe_source(address)
    if not address.lower().startswith(("http://", "https://")):
        raise MediaError(
            f"the {kind} is at an address other than http, https and data: {name}; give a file by its path"
        )
    if not allow_urls:
        raise MediaError(f"the {kind} is at an address, which is opened with allow_urls=True only: {name}")
    try:
        return _fetch(address)
    except Exception as error:
        raise MediaError(f"the {kind} cannot be fetched: {error} ({name})") from error


def _fetch(address: str) -> bytes:
    """Fetch the body of the answer; ValueError or OSError if it is too long or too slow."""
    # Both limits hold for the whole answer, not for one block of it.
    seconds, most = MAX_SECONDS_TO_FETCH, MAX_BYTES
    end = time.monotonic() + seconds
    sockets: list[socket] = []

    def hang_up() -> None:
        for connected in sockets:
            try:
                connected.shutdown(SHUT_RDWR)
            except OSError:
                continue  # it is closed already

    # A time-out of sockets counts from byte to byte, and a server may send one byte every second.
    watch = Timer(seconds, hang_up)
    watch.daemon = True
    watch.start()
    try:
        with _opener(sockets).open(address, timeout=seconds) as answer:
            body = io.BytesIO()
            while block := answer.read1(2**16):
                body.write(block)
                if body.tell() > most:
                    raise ValueError(f"it has more than {most} bytes")
            if answer.length:
                raise ValueError(f"it ends {answer.length} bytes early")
        if time.monotonic() >= end:
            raise TimeoutError
        return body.getvalue()
    except Exception as error:
        if time.monotonic() >= end:
            raise ValueError(f"it takes more than {seconds:g} seconds") from error
        raise
    finally:
        watch.cancel()


def _opener(sockets: list[socket]) -> urllib.request.OpenerDirector:
    """Open addresses of http and https, also those that they lead to, and note every connection's socket."""

    def connecting(base: type) -> type:
        class Connection(base):
            def connect(self):
                super().connect()
                sockets.append(self.sock)

        return Connection

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(connecting(HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(connecting(HTTPSConnection), request)

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request, file, code, message, headers, new):
            if not new.lower().startswith(("http://", "https://")):
                raise ValueError(f"it leads to {new[:200]}, which is neither http nor https")
            return super().redirect_request(request, file, code, message, headers, new)

    return urllib.request.build_opener(Http, Https, Redirects)


# ------------------------------------------------------------------------------------------------------------- pictures

RESAMPLING = {
    name: getattr(Image.Resampling, name.upper()) for name in ("bicubic", "bilinear", "lanczos", "nearest", "box")
}
# Formats that are decoded without another program. Pillow opens others too, PostScript by running Ghostscript.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# Most pixels of a picture whose size is kept (`fit="keep"`): 16,384 tokens of 16 x 16 pixels.
MAX_KEPT_PIXELS = 2**22
_TIFF_BITS = 258  # the tag of a TIFF that holds the bits of a sample
# A picture that would be scaled to more than this many times the pixels that are wanted is cut first.
_MOST_SCALED = 16
# Most pixels that are changed in one go, so that at most two whole copies of a picture are held.
_STRIP_PIXELS = 2**22
# EXIF orientation -> the turn that makes a picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_picture(
    source: Any,
    max_pixels: int = 89_478_485,
    limit: str = "max_pixels",
    allow_urls: bool = False,
    allow_paths: bool = True,
) -> Image.Image:
    """Read a picture in any form as an upright PIL picture: RGBA where it is transparent in places, RGB otherwise.

    Of several frames the first is read. Greys of 16 and 32 bits are scaled from [0, 65535], greys of floats from
    [0, 1]. Values of 16 bits keep the upper 8, as Pillow reads RGB.

    Args:
        source: a PIL picture, an array or tensor, or a source of `open_source`: bytes, a path, an address or a record.
            Arrays are (H, W), (H, W, 1), (H, W, 3), (H, W, 4) or have their channels first: bool, uint8, uint16
            (scaled by its range), floats in [0, 1], or other integers in [0, 255].
        max_pixels: most pixels, checked before any is decoded.
        limit: the name of the setting that gives the caller's `max_pixels`, for messages.
        allow_urls, allow_paths: see `open_source`.

    Raises:
        MissingMedia: the file is missing.
        MediaError (a ValueError): the picture does not decode, is empty, too large or out of range, or must not be
            opened.

    Example:
        >>> load_picture(np.zeros((20, 30), bool)).size
        (30, 20)
    """
    name = describe_source(source)
    content = open_source(source, "picture", allow_urls, allow_paths)
    with decoding("picture", name):
        if isinstance(content, (np.ndarray, torch.Tensor)):
            return _picture_of_array(content, name, max_pixels, limit)
        if isinstance(content, Image.Image):
            return _upright_rgb(content, name, max_pixels, limit)
        if isinstance(content, str):
            with open(content, "rb") as file:
                return _picture_of_file(file, name, max_pixels, limit)
        if isinstance(content, bytes):
            return _picture_of_file(io.BytesIO(content), name, max_pixels, limit)
    raise MediaError(f"the picture is no picture: {name}; give a PIL picture, array, bytes, path or address")


def _picture_of_file(file: Any, name: str, max_pixels: int, limit: str) -> Image.Image:
    """Read the picture of an open file; its size is checked when the header alone is read."""
    Image.init()
    try:
        picture = Image.open(file, formats=[known for known in PICTURE_FORMATS if known in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise MediaError(f"the picture is too large: {error} ({name})") from None
    except Image.UnidentifiedImageError:
        known = ", ".join(PICTURE_FORMATS)
        raise MediaError(f"the picture does not decode: it is none of {known} ({name})") from None
    checked = _upright_rgb(picture, name, max_pixels, limit)
    # A copy: the file's own object would go on to read frames when the file is closed.
    return checked.copy() if checked is picture else checked


def _upright_rgb(picture: Image.Image, name: str, max_pixels: int, limit: str) -> Image.Image:
    """Decode an opened picture, upright, RGB or RGBA; return the same object if nothing is to be changed."""
    _check_size(picture.width, picture.height, name, max_pixels, limit)
    picture.load()
    upright = _upright(picture)
    plain = _eight_bits(upright, name)
    if plain is not picture:
        plain.info = {}  # orientation and transparency are applied and must not be applied once more
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
    """Turn and mirror a picture as its EXIF or XMP data say; leave it as it is if these are broken."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return picture
    known = isinstance(orientation, int) and orientation in _UPRIGHT
    return picture.transpose(_UPRIGHT[orientation]) if known else picture


def _eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """Convert a picture of any mode of Pillow to RGB or RGBA."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _of_deep_grey(picture, name)
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    if picture.mode == mode:
        return picture
    if picture.mode == "La":  # Pillow converts it to LA alone
        picture = picture.convert("LA")
    return picture.convert(mode)


def _of_deep_grey(picture: Image.Image, name: str) -> Image.Image:
    """Convert a picture of greys of more than 8 bits to RGB or RGBA."""
    # Bring integers to 16 bits.
    values = np.asarray(picture)
    if picture.mode == "I":
        if values.min() < 0 or values.max() > 65_535:
            raise MediaError(
                f"the picture has greys out of [0, 65535]: from {values.min()} to {values.max()} ({name}); scale them "
                "to 16 bits"
            )
        values = values.astype(np.uint16)
    elif getattr(picture, "tag_v2", {}).get(_TIFF_BITS) == (12,):
        values = values << 4  # Pillow leaves the 12 bits of a TIFF at the lower end

    # One value of them may stand for transparency.
    grey = Image.fromarray(_to_uint8(values, name))
    transparent = picture.info.get("transparency")
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey.convert("RGBA")


def _picture_of_array(array: np.ndarray | torch.Tensor, name: str, max_pixels: int, limit: str) -> Image.Image:
    # Check the shape before anything is copied.
    shape = tuple(array.shape)
    channels_first = len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
    height, width, *channels = (*shape[1:], shape[0]) if channels_first else shape if len(shape) > 1 else (0, 0, 0)
    if len(channels) > 1 or (channels and channels[0] not in (1, 3, 4)):
        raise MediaError(f"the picture has a wrong shape: {shape}; give (H, W), (H, W, 3) or (H, W, 4)")
    _check_size(width, height, name, max_pixels, limit)

    # A numpy array with its channels last; numpy knows no bfloat16.
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype in (torch.bfloat16, torch.float16) else array).numpy()
    if channels_first:
        array = np.moveaxis(array, 0, -1)
    if channels == [1]:
        array = array[..., 0]
    return _eight_bits(Image.fromarray(_to_uint8(array, name)), name)


def _to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    """Scale values of any type that a picture may have to 0 to 255."""
    # Types with a range of their own.
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind not in "fiu":
        raise MediaError(f"the picture has values of a wrong type: {values.dtype} ({name}); give uint8 or floats")

    # Floats are scaled from [0, 1]. Integers of other types have no range of their own, so they must be 0 to 255.
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


def pixel_limit(config: Any, size: tuple[int, int] | None = None) -> tuple[int, str]:
    """Return the most pixels that a picture may have for `config` and `size`, and the name of that setting."""
    if config.fit == "keep" and size is None and config.max_kept_pixels < config.max_pixels:
        return config.max_kept_pixels, "max_kept_pixels"
    return config.max_pixels, "max_pixels"


def load_fitted(source: Any, config: Any, size: tuple[int, int] | None = None, **access: bool) -> np.ndarray:
    """Read a picture in any form and fit it: RGB pixels (H, W, 3), uint8. See `load_picture` and `fit_picture`."""
    return fit_picture(load_picture(source, *pixel_limit(config, size), **access), config, size)


def flatten(picture: Image.Image, background: Any = (255, 255, 255)) -> Image.Image:
    """Make a picture RGB, with the background in the place of transparent pixels."""
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")

    # In strips, so that large pictures need little memory.
    flat = Image.new("RGB", picture.size)
    rows = max(1, _STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height))).convert("RGBA")
        below = Image.new("RGBA", strip.size, (*background, 255))
        flat.paste(Image.alpha_composite(below, strip).convert("RGB"), (0, top))
    return flat


def fit_picture(picture: Image.Image, config: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """Flatten a picture on the background, then scale and cut it: RGB pixels (H, W, 3), uint8.

    Args:
        config: has the fields `background`, `fit`, `resample` and `image_size` of an `ImageTokenizerConfig`, and with
            `fit="scale"` the method `scaled_size` of a `MoTImageProcessor`.
        size: (height, width) in the place of `image_size`.
    """
    # A kept picture is neither scaled nor cut.
    picture = flatten(picture, tuple(config.background))
    if config.fit == "keep" and size is None:
        return np.asarray(picture)
    if config.fit == "scale" and size is None:
        return np.asarray(picture.resize(config.scaled_size(*picture.size), RESAMPLING[config.resample]))

    # "crop" scales the shorter side to the size, "pad" the longer one.
    height, width = size or config.image_size
    choose = max if config.fit != "pad" else min
    scale = choose(width / picture.width, height / picture.height)
    scaled = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if scaled[0] * scaled[1] > _MOST_SCALED * width * height:
        return np.asarray(_scaled_middle(picture, scaled, (width, height), RESAMPLING[config.resample]))
    if scaled != picture.size:
        picture = picture.resize(scaled, RESAMPLING[config.resample])

    # Cut the middle out, or put the picture in the middle.
    if picture.size != (width, height):
        canvas = Image.new("RGB", (width, height), tuple(config.background))
        canvas.paste(picture, ((width - scaled[0]) // 2, (height - scaled[1]) // 2))
        picture = canvas
    return np.asarray(picture)


def cut_long_side(picture: Image.Image) -> Image.Image:
    """Cut the middle out of a picture whose one side is many times the other, before the picture is scaled."""
    left, top = (max(0, (side - _MOST_SCALED * other) // 2) for side, other in (picture.size, picture.size[::-1]))
    return picture.crop((left, top, picture.width - left, picture.height - top)) if left or top else picture


def _scaled_middle(
    picture: Image.Image, scaled: tuple[int, int], wanted: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """Make the middle, `wanted` (width, height), of a picture scaled to `scaled`, and no other part of it."""
    # The part of each side that the middle is made of.
    cuts, boxes = [], []
    for side, full, want in zip(picture.size, scaled, wanted, strict=True):
        first = (full - want + 1) // 2
        start, end = first * side / full, (first + want) * side / full
        # Cut whole pixels first, all that the filter reaches (Lanczos: 3): Pillow's boxes are of single precision.
        reach = math.ceil(3 * max(1, side / full)) + 1
        cut = max(0, math.floor(start) - reach), min(side, math.ceil(end) + reach)
        cuts.append(cut)
        boxes.append((start - cut[0], end - cut[0]))

    # One cut of whole pixels, and one scaled box within it.
    (left, right), (top, bottom) = cuts
    (start_x, end_x), (start_y, end_y) = boxes
    return picture.crop((left, top, right, bottom)).resize(wanted, resample, box=(start_x, start_y, end_x, end_y))


# --------------------------------------------------------------------------------------------------------------- sounds

MIN_RATE, MAX_RATE = 1_000, 768_000
# Most samples of all channels in a second of sound: twice 48 kHz in stereo.
_SAMPLES_PER_SECOND = 192_000
# Most samples of all channels that are decoded in one go.
_BLOCK_SAMPLES = 2**22
# Larger samples are no sound in any format.
_LARGEST = 2.0**31


def check_rate(rate: Any, name: str = "sampling_rate") -> int:
    """Return a sampling rate in Hz as an int; MediaError for fractions, bool, and rates out of [1000, 768000]."""
    is_number = isinstance(rate, numbers.Real) and not isinstance(rate, (bool, np.bool_))
    if not is_number or not MIN_RATE <= rate <= MAX_RATE or rate != int(rate):
        raise MediaError(
            f"{name}={rate!r:.40} is no sampling rate; give a whole number of Hz from {MIN_RATE} to {MAX_RATE}"
        )
    return int(rate)


def load_sound(
    source: Any,
    sampling_rate: int | None = None,
    default_rate: int | None = None,
    max_seconds: float = 600.0,
    limit: str = "max_seconds",
    allow_urls: bool = False,
    allow_paths: bool = True,
) -> tuple[np.ndarray, int]:
    """Read a sound in any form: mono samples (S,), float32, and their rate in Hz. Channels are averaged.

    Args:
        source: an array, tensor or list of numbers, or a source of `open_source`: bytes, a path, an address or a
            record, such as `datasets`' {"array", "sampling_rate"}. Arrays are (S,), or (S, C) or (C, S) with fewer
            channels than samples: floats, or integers of up to 32 bits, scaled by the range of their type (for unsigned
            ones its middle is silence).
        sampling_rate: the rate of an array. A record with a rate of its own is believed, and files have theirs.
        default_rate: the rate of an array without any, of which a warning is given; None refuses such an array.
        max_seconds: longest sound, checked before it is decoded.
        limit: the name of the setting that gives the caller's `max_seconds`, for messages.
        allow_urls, allow_paths: see `open_source`.

    Raises:
        ImportError: a file is to be decoded and soundfile is not installed.
        MissingMedia: the file is missing.
        MediaError (a ValueError): the sound does not decode, is empty, too long or not finite, or must not be opened;
            or the sampling rate is none.

    Example:
        >>> samples, rate = load_sound({"array": np.array([[0, 2**14]], np.int16), "sampling_rate": 8_000})
        >>> samples.tolist(), rate
        ([0.0, 0.5], 8000)
    """
    # The rate of a record comes before that of the call.
    name = describe_source(source)
    if isinstance(source, dict) and source.get("array") is not None and source.get("sampling_rate") is not None:
        sampling_rate = source["sampling_rate"]

    # A file is decoded, an array is scaled.
    content = open_source(source, "sound", allow_urls, allow_paths)
    if isinstance(content, (bytes, str)):
        samples, rate = _sound_of_file(content, name, max_seconds, limit)
    elif isinstance(content, (np.ndarray, torch.Tensor, list, tuple)):
        rate = _rate_of_array(sampling_rate, default_rate, name)
        with decoding("sound", name):
            samples = _sound_of_array(content, rate, name, max_seconds, limit)
    else:
        raise MediaError(f"the sound is no sound: {name}; give an array, bytes, a path or an address")

    # Refuse samples that no tokenizer can use.
    if not samples.size:
        raise MediaError(f"the sound holds no samples ({name})")
    if not np.isfinite(samples).all():
        raise MediaError(f"the sound holds values that are not finite ({name})")
    if np.abs(samples).max() > _LARGEST:
        raise MediaError(f"the sound is out of range: up to {np.abs(samples).max():g} ({name}); scale it to [-1, 1]")
    return samples, rate


def _rate_of_array(sampling_rate: Any, default_rate: int | None, name: str) -> int:
    """Return the rate that an array comes with, or the default with a warning."""
    if sampling_rate is not None:
        return check_rate(sampling_rate)
    if default_rate is None:
        raise MediaError(f"the sound is an array without its sampling_rate ({name})")
    logger.warning_once(
        f"a sound is an array without its sampling_rate and is taken to have {default_rate} Hz; pass sampling_rate=, "
        'or {"array": ..., "sampling_rate": ...}'
    )
    return default_rate


def _sound_of_file(content: bytes | str, name: str, max_seconds: float, limit: str) -> tuple[np.ndarray, int]:
    """Decode a file that libsndfile reads: WAV, FLAC, OGG, MP3 and others.  -> samples, rate"""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("decoding sound files needs soundfile: pip install soundfile (or pass arrays)") from error
    with (
        decoding("sound", name),
        open(content, "rb", buffering=0) if isinstance(content, str) else io.BytesIO(content) as file,
        soundfile.SoundFile(_recognised(file), closefd=False) as sound,
    ):
        # The header says the rate and the length.
        rate = sound.samplerate
        if not MIN_RATE <= rate <= MAX_RATE:
            raise MediaError(
                f"the sound has a wrong sampling rate: {rate} Hz is out of [{MIN_RATE}, {MAX_RATE}] ({name})"
            )
        _check_duration(sound.frames, sound.channels, rate, name, max_seconds, limit)

        # In blocks, so that all channels of the whole sound are never held.
        samples = np.empty(sound.frames, dtype=np.float32)
        filled = 0
        while filled < len(samples):
            block = sound.read(max(1, _BLOCK_SAMPLES // sound.channels), dtype="float32", always_2d=True)
            if not len(block):
                break
            samples[filled : filled + len(block)] = block.mean(axis=1)
            filled += len(block)
    return samples[:filled], rate


def _recognised(file: Any) -> Any:
    """Return an open file in a form that libsndfile recognises by the content alone, never by a name."""
    first = file.read(2)
    file.seek(0)
    if len(first) == 2 and first[0] == 0xFF and first[1] >= 0xE0:
        # libsndfile recognises an MP3 without a name by its tag alone, so the file gets an empty tag.
        return io.BytesIO(b"ID3\3\0\0\0\0\0\n" + bytes(10) + file.read(MAX_BYTES))
    return file if isinstance(file, io.BytesIO) else file.fileno()


def _sound_of_array(values: Any, rate: int, name: str, max_seconds: float, limit: str) -> np.ndarray:
    """Make mono samples of an array, tensor or list of numbers."""
    # A numpy array of one or two axes; numpy knows no bfloat16.
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    values = np.asarray(values)
    if not values.size:
        return np.empty(0, dtype=np.float32)
    if values.ndim not in (1, 2):
        raise MediaError(
            f"the sound has a wrong shape: {values.shape}; give (samples,), (samples, channels) or (channels, samples)"
        )

    # Of two axes the shorter one is that of the channels.
    channel_axis = int(values.ndim == 2 and values.shape[0] > values.shape[1])
    channels = values.shape[channel_axis] if values.ndim == 2 else 1
    _check_duration(values.size // max(1, channels), channels, rate, name, max_seconds, limit)

    # Scale integers by the range of their type.
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind not in "fiu" or (kind in "iu" and size > 4):
        raise MediaError(
            f"the sound has values of a wrong type: {values.dtype} ({name}), which has no range of its own; give "
            "floats in [-1, 1], or integers of the type they were recorded in, such as int16"
        )
    if kind in "iu":
        half = 2.0 ** (8 * size - 1)
        values = (values.astype(np.float64 if size == 4 else np.float32) - half * (kind == "u")) / half
    with np.errstate(over="ignore"):  # values beyond single precision become infinite, and are refused later
        values = np.asarray(values, dtype=np.float32)
    return np.ascontiguousarray(values.mean(axis=channel_axis) if values.ndim == 2 else values)


def _check_duration(frames: int, channels: int, rate: int, name: str, max_seconds: float, limit: str) -> None:
    """Refuse a sound that is too long before memory is allocated; a file of unknown length has 2**63 - 1 frames."""
    if frames > max_seconds * rate or frames * channels > max_seconds * _SAMPLES_PER_SECOND:
        raise MediaError(
            f"the sound is too long: {frames / rate:,.0f} seconds of {channels} channels at {rate} Hz; {limit} is "
            f"{max_seconds:g} ({name})"
        )
