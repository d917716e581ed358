"""Synthesise speech with Debian's flite, and write Ogg files whose bytes depend on their content alone."""

import ctypes
import io
import shutil
import struct
import subprocess
import tempfile
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np


# N samples

SAMPLING_RATE = 16_000
VOICES = ("awb", "kal16", "rms", "slt")
_NOT_INSTALLED = "flite is not installed; on Debian: apt-get install flite"


def synthesise(text: str, voice: str) -> np.ndarray:
    """Speak `text` with a flite `voice`.  -> float32 mono at 16 kHz, silence trimmed, peak 0.7

    Raises:
        RuntimeError: flite is not installed.
        ValueError: the voice does not speak at 16 kHz.
    """
    import soundfile

    if shutil.which("flite") is None:
        raise RuntimeError(_NOT_INSTALLED)
    spoken = plain_letters(text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        subprocess.run(["flite", "-voice", voice, "-t", spoken, "-o", str(path)], check=True, capture_output=True)
        wave, rate = soundfile.read(path, dtype="float32")
    if rate != SAMPLING_RATE:
        raise ValueError(f"voice {voice!r} speaks at {rate} Hz; choose one of 16 kHz: {', '.join(VOICES)}")
    return wave[loud_part(wave)] * (0.7 / max(float(np.abs(wave).max()), 1e-6))


def plain_letters(text: str) -> str:
    """Leave out accents, and characters that are not ASCII, which the voices do not know."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def loud_part(wave: np.ndarray, threshold: float = 0.01, margin: int = 480) -> slice:
    """Find the part without the ends that are quieter than `threshold` of the peak, but with `margin` of each."""
    loud = np.flatnonzero(np.abs(wave) > threshold * np.abs(wave).max())
    if not len(loud):
        return slice(0, len(wave))
    return slice(max(0, int(loud[0]) - margin), min(len(wave), int(loud[-1]) + margin))


# ---------------------------------------------------------------------------------------------------- timings of words


class _Wave(ctypes.Structure):
    """flite's `cst_wave`."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


# The functions of libflite that are used: name -> the types of the result and of the arguments.
_POINTER, _NAME = ctypes.c_void_p, ctypes.c_char_p
_FUNCTIONS = {
    "flite_init": (ctypes.c_int,),
    "flite_synth_text": (_POINTER, _NAME, _POINTER),
    "utt_wave": (ctypes.POINTER(_Wave), _POINTER),
    "utt_relation": (_POINTER, _POINTER, _NAME),
    "relation_head": (_POINTER, _POINTER),
    "item_next": (_POINTER, _POINTER),
    "item_as": (_POINTER, _POINTER, _NAME),
    "item_parent": (_POINTER, _POINTER),
    "ffeature_string": (_NAME, _POINTER, _NAME),
    "ffeature_float": (ctypes.c_float, _POINTER, _NAME),
    "delete_utterance": (None, _POINTER),
}


@lru_cache
def _flite(voice: str) -> tuple[ctypes.CDLL, int]:
    """Load libflite and one of its voices."""
    try:
        of_voice, flite = ctypes.CDLL(f"libflite_cmu_us_{voice}.so.1"), ctypes.CDLL("libflite.so.1")
    except OSError as error:
        raise RuntimeError(f"{_NOT_INSTALLED} ({error})") from error
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(flite, name)
        function.restype, function.argtypes = result, arguments
    flite.flite_init()
    register = getattr(of_voice, f"register_cmu_us_{voice}")
    register.restype, register.argtypes = _POINTER, (_NAME,)
    return flite, register(None)


def synthesise_words(text: str, voice: str) -> tuple[np.ndarray, list[dict]]:
    """Speak `text` with a flite `voice`, and say when each of its words is spoken.

    Words are those that white space parts, as they are written: "24" is one. The times are those of flite's own
    segments, so they are exact.

    Returns:
        Mono float32 at 16 kHz, silence trimmed, peak 0.7, (N,); {"word", "start", "end"} of each word, in seconds.

    Raises:
        RuntimeError: flite is not installed.
        ValueError: the voice does not speak at 16 kHz, or no word is spoken.
    """
    if voice not in VOICES:
        raise ValueError(f"voice {voice!r} is not one of 16 kHz: {', '.join(VOICES)}")
    flite, speaker = _flite(voice)
    utterance = flite.flite_synth_text(plain_letters(text).encode(), speaker)
    try:
        found = flite.utt_wave(utterance).contents
        wave = np.ctypeslib.as_array(found.samples, (found.num_samples,)).astype(np.float32) / 2**15
        words = _spoken_words(flite, utterance)
    finally:
        flite.delete_utterance(utterance)
    if not words or not wave.any():
        raise ValueError(f"flite speaks no word of {text!r:.80}")

    # The silence around the words goes, and their times with it.
    part = loud_part(wave)
    first, last = part.start / SAMPLING_RATE, part.stop / SAMPLING_RATE
    times = [[min(max(time, first), last) - first for time in (start, end)] for _, start, end in words]
    timings = [
        {"word": word, "start": round(start, 4), "end": round(end, 4)}
        for (word, _, _), (start, end) in zip(words, times, strict=True)
    ]
    return wave[part] * (0.7 / float(np.abs(wave).max())), timings


def _spoken_words(flite: ctypes.CDLL, utterance: int) -> list[tuple[str, float, float]]:
    """List (word, start, end) of an utterance. A word as written ("24") may be several spoken ones."""
    words: list[tuple[str, float, float]] = []
    item, last_token = flite.relation_head(flite.utt_relation(utterance, b"Word")), None
    while item:
        token = flite.item_parent(flite.item_as(item, b"Token"))
        start = flite.ffeature_float(item, b"R:SylStructure.daughter1.daughter1.R:Segment.p.end")
        end = flite.ffeature_float(item, b"R:SylStructure.daughtern.daughtern.R:Segment.end")
        if end > 0:  # marks without a sound have no segments
            written = flite.ffeature_string(item, b"R:Token.parent.name").decode()
            if token == last_token:
                start = words.pop()[1]
            words.append((written, start, end))
            last_token = token
        item = flite.item_next(item)
    return words


# ------------------------------------------------------------------------------------------------------------ Ogg files


def encode_opus(wave: np.ndarray, compression_level: float) -> bytes:
    """Encode a 16 kHz wave as Ogg Opus. The library gives a stream a random serial number; we set it to 1."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLING_RATE, format="OGG", subtype="OPUS", compression_level=compression_level)
    return with_ogg_serial(buffer.getvalue(), 1)


def with_ogg_serial(data: bytes, serial: int) -> bytes:
    """Give an Ogg stream another serial number, and its pages new checksums (RFC 3533)."""
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
    """Return the CRC-32 of each byte with Ogg's polynomial, most significant bit first."""
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
