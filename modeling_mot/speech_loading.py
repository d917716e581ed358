"""Sounds in any form to mono samples and their rate: the one reader of sounds.

Training, processors, tokenizers and their commands all read here, so that a sound has the same samples for all of them.
Shapes: S samples, C channels.
"""

import io
import numbers
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .media_sources import MAX_BYTES, MediaError, decoding, describe_source, open_source


MIN_RATE, MAX_RATE = 1_000, 768_000
# Samples of all channels in a second of sound, at most: 48 kHz in stereo, twice over.
_SAMPLES_PER_SECOND = 192_000
# Samples of all channels that are decoded in one go.
_BLOCK_SAMPLES = 2**22
# Beyond 32 bits nothing is sound.
_LARGEST = 2.0**31

logger = logging.get_logger(__name__)


def check_rate(rate: Any, name: str = "sampling_rate") -> int:
    """A sampling rate in Hz as an int; ValueError for what is none: out of [1000, 768000], fractions, bool."""
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
    """Mono samples (S,), float32, and their rate, of a sound in any form.

    Takes an array, tensor or list of numbers, and what `open_source` takes: bytes, a path, an address or a record, such
    as `datasets`' {"array", "sampling_rate"}. Arrays are (S,), or (S, C) or (C, S) with fewer channels than samples:
    floats, or integers of up to 32 bits, scaled by the range of their type (unsigned ones have their middle at silence).
    Channels are averaged.

    Args:
        sampling_rate: that of an array; a record with one of its own is believed, and files say theirs.
        default_rate: that of an array without any, which is then warned of; None: such an array is refused.
        max_seconds: longest sound, checked before it is decoded.
        limit: what the caller's users call `max_seconds`.
        allow_urls, allow_paths: see `open_source`.

    Raises:
        ImportError: a file is to be decoded and soundfile is not installed.
        MissingMedia: a missing file.
        MediaError (a ValueError): what does not decode, is empty, too long, not finite, or must not be opened; a
            sampling rate that is none.
    """
    name = describe_source(source)
    if isinstance(source, dict) and source.get("array") is not None and source.get("sampling_rate") is not None:
        sampling_rate = source["sampling_rate"]
    content = open_source(source, "sound", allow_urls, allow_paths)
    if isinstance(content, (bytes, str)):
        samples, rate = _of_file(content, name, max_seconds, limit)
    elif isinstance(content, (np.ndarray, torch.Tensor, list, tuple)):
        rate = _rate_of_array(sampling_rate, default_rate, name)
        with decoding("sound", name):
            samples = _of_array(content, rate, name, max_seconds, limit)
    else:
        raise MediaError(f"the sound is no sound: {name}; give an array, bytes, a path or an address")
    if not samples.size:
        raise MediaError(f"the sound holds no samples ({name})")
    if not np.isfinite(samples).all():
        raise MediaError(f"the sound holds values that are not finite ({name})")
    if np.abs(samples).max() > _LARGEST:
        raise MediaError(f"the sound is out of range: up to {np.abs(samples).max():g} ({name}); scale it to [-1, 1]")
    return samples, rate


def _rate_of_array(sampling_rate: Any, default_rate: int | None, name: str) -> int:
    if sampling_rate is not None:
        return check_rate(sampling_rate)
    if default_rate is None:
        raise MediaError(f"the sound is an array without its sampling_rate ({name})")
    logger.warning_once(
        f"a sound is an array without its sampling_rate and is taken to have {default_rate} Hz; pass sampling_rate=, or "
        '{"array": ..., "sampling_rate": ...}'
    )
    return default_rate


def _of_file(content: bytes | str, name: str, max_seconds: float, limit: str) -> tuple[np.ndarray, int]:
    """Of WAV, FLAC, OGG, MP3 and whatever else libsndfile reads, in blocks, so that all channels are never held."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("decoding sound files needs soundfile: pip install soundfile (or pass arrays)") from error
    with (
        decoding("sound", name),
        open(content, "rb", buffering=0) if isinstance(content, str) else io.BytesIO(content) as file,
        soundfile.SoundFile(_recognised(file), closefd=False) as sound,
    ):
        rate = sound.samplerate
        if not MIN_RATE <= rate <= MAX_RATE:
            raise MediaError(
                f"the sound has a wrong sampling rate: {rate} Hz is out of [{MIN_RATE}, {MAX_RATE}] ({name})"
            )
        _check_length(sound.frames, sound.channels, rate, name, max_seconds, limit)
        samples, filled = np.empty(sound.frames, dtype=np.float32), 0
        while filled < len(samples):
            block = sound.read(max(1, _BLOCK_SAMPLES // sound.channels), dtype="float32", always_2d=True)
            if not len(block):
                break
            samples[filled : filled + len(block)] = block.mean(axis=1)
            filled += len(block)
    return samples[:filled], rate


def _recognised(file: Any) -> Any:
    """What libsndfile takes of an open file, so that it goes by the content alone and never by a name."""
    first = file.read(2)
    file.seek(0)
    if len(first) == 2 and first[0] == 0xFF and first[1] >= 0xE0:
        # It knows MP3 without a name by its tag alone, so the file gets one, of nothing.
        return io.BytesIO(b"ID3\3\0\0\0\0\0\n" + bytes(10) + file.read(MAX_BYTES))
    return file if isinstance(file, io.BytesIO) else file.fileno()


def _of_array(values: Any, rate: int, name: str, max_seconds: float, limit: str) -> np.ndarray:
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
    # There are fewer channels than samples.
    channel_axis = int(values.ndim == 2 and values.shape[0] > values.shape[1])
    channels = values.shape[channel_axis] if values.ndim == 2 else 1
    _check_length(values.size // max(1, channels), channels, rate, name, max_seconds, limit)
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind not in "fiu" or (kind in "iu" and size > 4):
        raise MediaError(
            f"the sound has values of a wrong type: {values.dtype} ({name}), which has no range of its own; give floats "
            "in [-1, 1], or integers of the type they were recorded in, such as int16"
        )
    if kind in "iu":
        half = 2.0 ** (8 * size - 1)
        values = (values.astype(np.float64 if size == 4 else np.float32) - half * (kind == "u")) / half
    with np.errstate(over="ignore"):  # beyond single precision is infinity, which is refused
        values = np.asarray(values, dtype=np.float32)
    return np.ascontiguousarray(values.mean(axis=channel_axis) if values.ndim == 2 else values)


def _check_length(frames: int, channels: int, rate: int, name: str, max_seconds: float, limit: str) -> None:
    """What a header promises is refused before room is made for it; frames of an unknown number are 2**63 - 1."""
    if frames > max_seconds * rate or frames * channels > max_seconds * _SAMPLES_PER_SECOND:
        raise MediaError(
            f"the sound is too long: {frames / rate:,.0f} seconds of {channels} channels at {rate} Hz; {limit} is "
            f"{max_seconds:g} ({name})"
        )
