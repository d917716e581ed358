"""Hostile files: pictures and sounds of extreme sizes, pickles under other names, damaged copies, links."""

import gzip
import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from .case import Place


SECRET = "Zqxjkv the secret that nobody may read. " * 8


def write_secrets(folder: Path) -> None:
    """Write a file of each kind that no case may open."""
    folder.mkdir()
    (folder / "secret.txt").write_text(SECRET)
    (folder / "secret.json").write_text(json.dumps({"text": SECRET}))
    (folder / "secret.png").write_bytes(picture(Random(0), "PNG"))
    (folder / "secret.wav").write_bytes(sound(Random(0)))
    (folder / "secret.py").write_text("SECRET = 1\n")
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "secret.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def outside_path(rng: Random, inside: Path, outside: Path, name: str) -> str:
    """Write the path of a secret as a file or a record may name it; some ways make a link inside."""
    target = outside / name
    link = inside / f"link-{name}"
    if not link.is_symlink():
        link.symlink_to(target)
    return rng.choice([str(target), f"../outside/{name}", link.name, f"a/../../outside/{name}", f"file://{target}"])


_ADDRESSES = (
    "http://outside.invalid/a", "https://169.254.169.254/latest", "ftp://outside.invalid/a", "HTTP://outside.invalid/a",
    "http://outside.invalid@127.0.0.1:9/a", "//outside.invalid/a", "data:image/png;base64,AA",
)  # fmt: skip


def anywhere(rng: Random, place: Place, name: str) -> Any:
    """Name a secret or an address in the place of a picture or sound, as strangers may."""
    named = rng.choice([outside_path(rng, place.inside, place.outside, name), rng.choice(_ADDRESSES)])
    return rng.choice([named, named, {"path": named}, {"bytes": None, "path": named}, Path(named)])


# -------------------------------------------------------------------------------------------------------- code inside


class _Payload:
    def __init__(self, ran: Path):
        self.ran = ran

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.ran),)


def pickled(ran: Path) -> bytes:
    """Return bytes that make the folder `ran` when they are unpickled."""
    return pickle.dumps(_Payload(ran), protocol=2)


def code(ran: Path) -> str:
    """Return Python code that makes the folder `ran` when it is imported."""
    return f"import os\nos.makedirs({str(ran)!r}, exist_ok=True)\nclass Evil:\n    pass\n"


# -------------------------------------------------------------------------------------------------------------- damage


def damaged(rng: Random, data: bytes) -> bytes:
    """Cut, flip, overwrite, double or extend bytes."""
    way = rng.choice(["cut", "flip", "zero", "insert", "double", "empty", "swap"])
    if way == "empty" or not data:
        return b""
    if way == "cut":
        return data[: rng.randrange(len(data))]
    if way == "double":
        return data + data
    changed = bytearray(data)
    if way == "insert":
        place = rng.randrange(len(data))
        changed[place:place] = rng.randbytes(rng.choice([1, 16, 1000]))
    elif way == "swap":
        changed = changed[len(data) // 2 :] + changed[: len(data) // 2]
    else:
        # Half of the changes are in the header, where lengths stand.
        most = len(data) if rng.random() < 0.5 else min(len(data), 64)
        for _ in range(rng.choice([1, 3, 30])):
            place = rng.randrange(most)
            changed[place] = 0 if way == "zero" else changed[place] ^ 1 << rng.randrange(8)
    return bytes(changed)


# ------------------------------------------------------------------------------------------------------------ pictures


def picture(rng: Random, kind: str = "PNG", size: tuple[int, int] = (24, 20), mode: str = "RGB") -> bytes:
    """Make a good picture of noise."""
    buffer = io.BytesIO()
    noise = np.frombuffer(rng.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size[1], size[0], 4)
    Image.fromarray(noise, "RGBA").convert(mode).save(buffer, kind)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bool = True, before: bytes = b"") -> bytes:
    """Make a grey picture of any size in a few bytes; without rows, it only has the header of one."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer, body = zlib.compressobj(9), b""
    if rows:
        row, many = bytes(width + 1), max(1, 2**20 // (width + 1))
        for first in range(0, height, many):
            body += packer.compress(row * min(many, height - first))
    body += packer.flush()
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + before + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def text_bomb(size: int) -> bytes:
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(2**20)) for _ in range(size // 2**20)) + packer.flush()
    return _chunk(b"zTXt", b"Comment\0\0" + body)


SIDES = ((1, 20_000), (20_000, 1), (1, 300_000), (2_000_000, 1), (1, 2**31 - 1), (3, 60_000), (5000, 5000), (65_535, 2))


def bad_picture(rng: Random) -> tuple[bytes, str]:
    """(bytes, what they are)"""
    return rng.choice(
        [
            lambda: _sized(*rng.choice(SIDES)),
            lambda: (
                png(*rng.choice([(40_000, 30_000), (10_000, 10_000), (0, 5), (5, 0)]), rows=False),
                "PNG without rows",
            ),
            lambda: (png(8, 8, before=text_bomb(2**24)), "PNG with a text of 16 MB"),
            lambda: _damaged_picture(rng),
            lambda: _damaged_picture(rng),
            lambda: (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "EPS"),
            lambda: (picture(rng, "TIFF", mode="CMYK"), "TIFF in CMYK"),
            lambda: (picture(rng, "PNG", mode="I;16" if rng.random() < 0.5 else "1"), "PNG of 16 or 1 bits"),
            lambda: (_frames(rng), "GIF of 300 frames"),
            lambda: (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "SVG"),
            lambda: (b"P6\n100000 100000\n255\n", "PPM of a header"),
            lambda: (rng.randbytes(rng.choice([0, 1, 100])), "noise"),
        ]
    )()


def _sized(width: int, height: int) -> tuple[bytes, str]:
    return png(width, height, rows=width * height < 2**26), f"PNG of {width} x {height}"


def _damaged_picture(rng: Random) -> tuple[bytes, str]:
    kind = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    return damaged(rng, picture(rng, kind)), f"damaged {kind}"


def _frames(rng: Random) -> bytes:
    buffer, frames = io.BytesIO(), [Image.new("L", (64, 64), number % 256) for number in range(300)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- sounds


def sound(rng: Random, rate: int = 16_000, seconds: float = 0.5, kind: str = "WAV") -> bytes:
    """Make a good sound of noise."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(rng.getrandbits(32)).uniform(-0.5, 0.5, int(rate * seconds)).astype(np.float32)
    soundfile.write(buffer, noise, rate, format=kind)
    return buffer.getvalue()


def wav(rate: int, frames: int = 1600, channels: int = 1, promised: int | None = None) -> bytes:
    """Make a WAV with the header that is asked for."""
    data = bytes(2 * frames * min(channels, 8))
    size = len(data) if promised is None else promised
    form = struct.pack(
        "<HHIIHH", 1, channels, rate & 0xFFFFFFFF, rate * 2 * channels & 0xFFFFFFFF, 2 * channels & 0xFFFF, 16
    )
    return (
        b"RIFF" + struct.pack("<I", size + 36 & 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<I", 16) + form
        + b"data" + struct.pack("<I", size & 0xFFFFFFFF) + data
    )  # fmt: skip


RATES = (11_127, 192_001, 1, 0, 2, 7, 15_999, 16_001, 44_100, 2**31 - 1, 2**32 - 1, 999_983)


def bad_sound(rng: Random) -> tuple[bytes, str]:
    """(bytes, what they are)"""
    rate = rng.choice(RATES)
    return rng.choice(
        [
            lambda: (wav(rate, rng.choice([0, 1, 1600])), f"WAV at {rate} Hz"),
            lambda: (wav(rate, rng.choice([0, 1, 1600])), f"WAV at {rate} Hz"),
            lambda: (wav(16_000, promised=2**32 - 40), "WAV that promises 4 GB"),
            lambda: (wav(16_000, channels=rng.choice([0, 2, 1024, 65_535])), "WAV of many or no channels"),
            lambda: (wav(16_000, frames=0), "WAV without samples"),
            lambda: (_flac_of_days(rng), "FLAC that promises days"),
            lambda: _damaged_sound(rng),
            lambda: _damaged_sound(rng),
            lambda: (rng.randbytes(rng.choice([0, 1, 100])), "noise"),
        ]
    )()


def _flac_of_days(rng: Random) -> bytes:
    data = bytearray(sound(rng, kind="FLAC"))
    # The last 36 bits of the 8 bytes from byte 18 of a FLAC file are the number of samples.
    data[18:26] = struct.pack(">Q", int.from_bytes(data[18:26], "big") | 2**36 - 1)
    return bytes(data)


def _damaged_sound(rng: Random) -> tuple[bytes, str]:
    kind = rng.choice(["WAV", "FLAC", "OGG"])
    return damaged(rng, sound(rng, kind=kind)), f"damaged {kind}"


# --------------------------------------------------------------------------------------------------------------- texts


def bad_json(rng: Random, good: object) -> tuple[bytes, str]:
    """Return (bytes, description) to put in the place of a file of JSON."""
    whole = json.dumps(good).encode()
    return rng.choice(
        [
            lambda: (damaged(rng, whole), "damaged JSON"),
            lambda: (b"[" * 100_000, "100,000 nested lists"),
            lambda: (b'{"a":' * 100_000, "100,000 nested objects"),
            lambda: (b"\xef\xbb\xbf" + whole, "JSON behind a byte-order mark"),
            lambda: (whole.decode().encode("utf-16"), "JSON in UTF-16"),
            lambda: (rng.choice([b"null", b"[]", b"1", b'"a"', b"{}", b"NaN", b"[null]"]), "another kind of JSON"),
            lambda: (b'{"a": 1' + b"0" * 100_000 + b"}", "a number of 100,000 digits"),
            lambda: (b'{"\\ud800": "\\udfff"}', "lone surrogates"),
            lambda: (b"\xff\xfe\x00", "no text"),
        ]
    )()


def zipped_bomb() -> bytes:
    """Make a line of JSON of a gigabyte in a megabyte, as gzip members that follow one another."""
    return gzip.compress(b'{"text": "') + gzip.compress(b"a" * 2**24) * 64
