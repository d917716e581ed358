"""Pictures and sounds as they stand in a record, to decoded ones.

A picture may be encoded bytes, a path, a PIL picture or an array; a sound likewise, or an array with its sampling rate.
`datasets`' own decoding is switched off, so that neither torchvision nor torchcodec is needed.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def decode_picture(value) -> Image.Image:
    """An upright RGB picture, transparency replaced by white.

    Raises:
        ValueError: nothing there, a missing file, or bytes that are no picture.
    """
    value = _bytes_or_path(value, "picture")
    try:
        if isinstance(value, Image.Image):
            picture = value
        elif isinstance(value, np.ndarray):
            picture = Image.fromarray(value)
        else:
            picture = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, UnidentifiedImageError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture does not decode: {error}") from error
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def decode_sound(value) -> tuple[np.ndarray, int]:
    """A mono float32 wave and its sampling rate.

    Raises:
        ValueError: nothing there, a missing file, or bytes that are no sound.
    """
    if isinstance(value, dict) and value.get("array") is not None:
        wave, rate = np.asarray(value["array"], dtype=np.float32), value.get("sampling_rate")
        if not rate:
            raise ValueError("the sound is an array without its sampling_rate")
    else:
        try:
            import soundfile
        except ImportError as error:
            raise ImportError("reading sound needs soundfile: pip install soundfile") from error
        value = _bytes_or_path(value, "sound")
        try:
            opened = io.BytesIO(value) if isinstance(value, bytes) else str(value)
            wave, rate = soundfile.read(opened, dtype="float32")
        except (soundfile.LibsndfileError, TypeError) as error:
            raise ValueError(f"the sound does not decode: {error}") from error
    wave = wave.mean(axis=1) if wave.ndim == 2 else wave
    if not wave.size:
        raise ValueError("the sound holds no samples")
    return np.ascontiguousarray(wave, dtype=np.float32), int(rate)


def _bytes_or_path(value, kind: str):
    """What `datasets` gives for a file ({"bytes", "path"}), bytes and paths, to bytes or an existing path."""
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ValueError(f"there is no {kind}")
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (str, Path)) and not Path(value).is_file():
        raise ValueError(f"the {kind} file {value} does not exist")
    return value
