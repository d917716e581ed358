"""Pictures and sounds as they stand in a record, to decoded ones.

They are read by the one reader of pictures and sounds, that of the processors, which holds their headers against limits
before anything is decoded. What is training's own: the limits' names, and `confined`, which keeps a record from naming
files outside the folder of its source. Addresses are never fetched.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_mot.image_loading import load_picture
from modeling_mot.media_sources import MediaError, name_within
from modeling_mot.speech_loading import load_sound

from .config import Limits


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
    name = name_within(value)
    if name is None:
        return value
    name = os.fsdecode(name)
    for root in roots:
        try:
            path = (root / name).resolve()
            path.is_file()  # which says that a name is too long
        except (OSError, ValueError, RuntimeError):  # too long a name, a null byte, a loop of links
            break
        if path.is_relative_to(root.resolve()):
            return str(path)
    return OutsidePath(name)


def decode_picture(value, limits: Limits | None = None) -> Image.Image:
    """An upright picture, RGB or (where it is transparent in places) RGBA; see `load_picture`.

    Raises:
        ValueError: nothing there, a missing file, bytes that are no picture, or more pixels than the limit.
    """
    _check_inside(value, "picture")
    return load_picture(value, (limits or Limits()).max_pixels, "data.max_pixels")


def decode_sound(value, limits: Limits | None = None) -> tuple[np.ndarray, int]:
    """A mono float32 wave and its sampling rate; see `load_sound`.

    Raises:
        ValueError: nothing there, a missing file, bytes that are no sound, an array without its sampling rate, or a
            sound longer than the limit.
    """
    _check_inside(value, "sound")
    most = (limits or Limits()).max_audio_seconds
    return load_sound(value, max_seconds=most, limit="data.max_audio_seconds")


def _check_inside(value, kind: str) -> None:
    if isinstance(value, OutsidePath):
        raise MediaError(f"the {kind} file leads outside the folder of its source: {str(value)!r}")
