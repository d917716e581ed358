"""Pictures and sounds as they stand in a record, to decoded ones.

A picture may be encoded bytes, a path, a PIL picture or an array; a sound likewise, or an array with its sampling rate.
`datasets`' own decoding is switched off, so that neither torchvision nor torchcodec is needed. What is not ours may be
hostile: sizes are read from headers and held against `Limits` before anything is decoded, and `confined` keeps a record
from naming files outside the folder of its source.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .config import Limits


# Those that are decoded without another program: Pillow opens others too, PostScript by running Ghostscript.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# Samples of all channels in a second of sound, at most: 48 kHz in stereo, twice over.
_SAMPLES_PER_SECOND = 192_000


class OutsidePath(str):
    """A file's name that leads outside the folder of its source. It is never opened."""


def source_roots(path: Path) -> list[Path]:
    """The folders in which files that records name must lie: that of a local source, or the caches for one of the Hub."""
    if path.exists():
        return [path if path.is_dir() else path.parent]
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]


def confined(value, roots: Sequence[Path]):
    """A picture or sound of a record with its file's name, if it has one, made a path inside one of some folders.

    Relative names are taken from the first folder. A name that leads outside (by `..`, an absolute path or a link)
    becomes an `OutsidePath`, which does not decode.
    """
    if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), (str, Path)):
        return confined(value["path"], roots)
    if not isinstance(value, (str, Path)):
        return value
    for root in roots:
        try:
            path = (root / value).resolve()
        except (OSError, ValueError, RuntimeError):  # too long a name, a null byte, a loop of links
            break
        if path.is_relative_to(root.resolve()):
            return str(path)
    return OutsidePath(value)


def decode_picture(value, limits: Limits | None = None) -> Image.Image:
    """An upright RGB picture, transparency replaced by white.

    Raises:
        ValueError: nothing there, a missing file, bytes that are no picture, or more pixels than the limit.
    """
    value, most = _bytes_or_path(value, "picture"), (limits or Limits()).max_pixels
    try:
        if isinstance(value, Image.Image):
            picture = value
        elif isinstance(value, np.ndarray):
            picture = Image.fromarray(value)
        else:
            # Reads the header alone.
            Image.init()
            formats = [name for name in PICTURE_FORMATS if name in Image.OPEN]
            picture = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value, formats=formats)
        small_enough = picture.width * picture.height <= most
        # Pillow raises ValueError for text chunks that decompress to too much.
        upright = ImageOps.exif_transpose(picture).convert("RGBA") if small_enough else None
    except Image.DecompressionBombError as error:
        raise ValueError(f"the picture is too large: {error}") from error
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"the picture does not decode: {error}") from error
    if upright is None:
        raise ValueError(
            f"the picture is too large: {picture.width} x {picture.height} pixels; data.max_pixels is {most}"
        )
    white = Image.new("RGBA", upright.size, "white")
    white.alpha_composite(upright)
    return white.convert("RGB")


def decode_sound(value, limits: Limits | None = None) -> tuple[np.ndarray, int]:
    """A mono float32 wave and its sampling rate.

    Raises:
        ValueError: nothing there, a missing file, bytes that are no sound, or a sound longer than the limit.
    """
    most = (limits or Limits()).max_audio_seconds
    if isinstance(value, dict) and value.get("array") is not None:
        wave, rate = np.asarray(value["array"], dtype=np.float32), value.get("sampling_rate")
        if not rate:
            raise ValueError("the sound is an array without its sampling_rate")
        _check_sound(len(wave), 1, rate, most)
    else:
        try:
            import soundfile
        except ImportError as error:
            raise ImportError("reading sound needs soundfile: pip install soundfile") from error
        value = _bytes_or_path(value, "sound")
        try:
            with soundfile.SoundFile(io.BytesIO(value) if isinstance(value, bytes) else str(value)) as sound:
                rate = sound.samplerate
                _check_sound(sound.frames, sound.channels, rate, most)
                wave = sound.read(dtype="float32")
        except (soundfile.LibsndfileError, TypeError) as error:
            raise ValueError(f"the sound does not decode: {error}") from error
    wave = wave.mean(axis=1) if wave.ndim == 2 else wave
    if not wave.size:
        raise ValueError("the sound holds no samples")
    return np.ascontiguousarray(wave, dtype=np.float32), int(rate)


def _check_sound(frames: int, channels: int, rate: int, most: float) -> None:
    """What the header promises is refused before room is made for it; frames of an unknown number are 2**63 - 1."""
    if frames > most * rate or frames * channels > most * _SAMPLES_PER_SECOND:
        raise ValueError(
            f"the sound is too long: {frames / rate:,.0f} seconds of {channels} channels at {rate} Hz; "
            f"data.max_audio_seconds is {most:g}"
        )


def _bytes_or_path(value, kind: str):
    """What `datasets` gives for a file ({"bytes", "path"}), bytes and paths, to bytes or an existing path."""
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ValueError(f"there is no {kind}")
    if isinstance(value, OutsidePath):
        raise ValueError(f"the {kind} file leads outside the folder of its source: {str(value)!r}")
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (str, Path)) and not Path(value).is_file():
        raise ValueError(f"the {kind} file does not exist: {value}")
    return value
