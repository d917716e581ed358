"""Synthetic speech from Debian's flite, and Ogg files whose bytes depend on their content alone."""

import io
import shutil
import struct
import subprocess
import tempfile
import unicodedata
from pathlib import Path

import numpy as np


SAMPLING_RATE = 16_000


def synthesise(text: str, voice: str) -> np.ndarray:
    """Speak `text` with a flite `voice`: float32 mono at 16 kHz, silence trimmed, peak 0.7."""
    import soundfile

    if shutil.which("flite") is None:
        raise RuntimeError("flite is not installed; on Debian: apt-get install flite")
    spoken = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        subprocess.run(["flite", "-voice", voice, "-t", spoken, "-o", str(path)], check=True, capture_output=True)
        wave, rate = soundfile.read(path, dtype="float32")
    if rate != SAMPLING_RATE:
        raise ValueError(f"voice {voice!r} speaks at {rate} Hz; choose one of 16 kHz: awb, kal16, rms, slt")
    return trim_silence(wave) * (0.7 / max(float(np.abs(wave).max()), 1e-6))


def trim_silence(wave: np.ndarray, threshold: float = 0.01, margin: int = 480) -> np.ndarray:
    """Cut both ends that stay under `threshold` of the peak, except for `margin` samples."""
    loud = np.flatnonzero(np.abs(wave) > threshold * np.abs(wave).max())
    if not len(loud):
        return wave
    return wave[max(0, loud[0] - margin) : loud[-1] + margin]


def encode_opus(wave: np.ndarray, compression_level: float) -> bytes:
    """Encode a 16 kHz wave as Ogg Opus. The stream's serial number, random in the library, is set to 1."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLING_RATE, format="OGG", subtype="OPUS", compression_level=compression_level)
    return with_ogg_serial(buffer.getvalue(), 1)


def with_ogg_serial(data: bytes, serial: int) -> bytes:
    """Give an Ogg stream another serial number, and renew the checksums of its pages (RFC 3533)."""
    pages, start = [], 0
    while start < len(data):
        if data[start : start + 4] != b"OggS":
            raise ValueError(f"no Ogg page at byte {start} of {len(data)}")
        segments = data[start + 26]
        end = start + 27 + segments + sum(data[start + 27 : start + 27 + segments])
        page = bytearray(data[start:end])
        page[14:18] = struct.pack("<I", serial)
        page[22:26] = bytes(4)
        page[22:26] = struct.pack("<I", _ogg_checksum(page))
        pages.append(bytes(page))
        start = end
    return b"".join(pages)


def _checksum_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = ((value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


_CHECKSUM_TABLE = _checksum_table()


def _ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value = ((value << 8) & 0xFFFFFFFF) ^ _CHECKSUM_TABLE[(value >> 24) ^ byte]
    return value
