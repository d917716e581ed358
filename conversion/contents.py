"""Look into a file before it is published: is it of the format that its name says, free of secrets and of pickles?"""

import io
import json
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open


_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# The form of tokens and keys, from each provider's documentation.
_SECRETS = {
    "a token of the Hub": rb"\bhf_[A-Za-z0-9]{30,}",
    "a key of AWS": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|aws_secret_access_key[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}",
    "a token of GitHub": rb"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{22,}",
    "a token of GitLab": rb"\bglpat-[A-Za-z0-9_-]{20,}",
    "a key of a model's provider": rb"\bsk-(?=[A-Za-z_-]*[0-9])(?=[a-z0-9_-]*[A-Z])[A-Za-z0-9_-]{20,}",
    "a token of Slack": rb"\bxox[a-z]-[A-Za-z0-9-]{10,}",
    "a key of Google": rb"\bAIza[A-Za-z0-9_-]{35}",
    "a token of PyPI": rb"\bpypi-[A-Za-z0-9_-]{50,}",
    "a token of npm": rb"\bnpm_[A-Za-z0-9]{36}",
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY",
    "a password": rb"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S+|\bhttps?://[^\s/:@\"']+:[^\s/:@\"']+@[\w.-]+",
}
_SECRET = {kind: re.compile(pattern) for kind, pattern in _SECRETS.items()}
_SHOWN = 4  # characters of a secret: enough to find it, too few to use it
_MOST_TEXT = 1 << 22  # bytes of a compressed text that are searched
# The chunks of pictures. Private chunks are not among them, since they could hold anything.
_PNG_CHUNKS = frozenset(
    b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCv cLLi tEXt zTXt iTXt bKGD hIST pHYs sPLT eXIf tIME "
    b"acTL fcTL fdAT".split()
)
_WEBP_CHUNKS = frozenset((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF", b"XMP "))
_PIXELS = {b"IDAT", b"fdAT", b"VP8 ", b"VP8L", b"ALPH", b"ANMF"}
# The first bytes of a pickle in newer protocols, and the instructions that find, call or build something.
_PROTOCOL = re.compile(rb"\x80[\x02-\x05]")
_CALLS = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4"}


def problem_of(file: Path) -> str | None:
    """Return the reason why a file must not be published, or None. Of a secret only the first characters are told."""
    suffix = file.suffix.lower()
    try:
        parts = list(_weights(file) if suffix == ".safetensors" else _parts(suffix, file.read_bytes()))
    except SafetensorError as error:
        return f"is no whole file of safetensors ({error}); save it again"
    except (ValueError, OSError, RecursionError, SyntaxError, struct.error, zlib.error) as error:
        return f"is not what its name says: {error}"
    except Image.DecompressionBombError as error:
        return f"is too large a picture to be looked at: {error}"

    # A file of a known format may hold an archive, a pickle or a secret all the same.
    if zipfile.is_zipfile(file):
        return "is an archive as well, which may hold anything; write it anew"
    for part in parts:
        if _holds_pickle(part):
            return "holds a pickle, which runs code when it is loaded; remove it"
        for kind, pattern in _SECRET.items():
            if found := pattern.search(part):
                shown = found[0][:_SHOWN].decode(errors="replace")
                return f"holds what looks like {kind} ({shown}...); remove it, and revoke it"
    return None


def _parts(suffix: str, content: bytes) -> Iterator[bytes]:
    """Return the parts of a file in which something could be hidden. Raises ValueError for a file of another format."""
    if suffix in _PICTURES:
        yield from _picture(content, _PICTURES[suffix])
        return
    yield content
    if suffix == ".json":
        # Once more with what was escaped.
        yield json.dumps(json.loads(content.decode("utf-8")), ensure_ascii=False).encode("utf-8", "surrogatepass")
    elif suffix != ".model" and "\0" in content.decode("utf-8"):  # tokenizer.model may be of sentencepiece
        raise ValueError("a text has no null bytes")


def _weights(file: Path) -> Iterator[bytes]:
    """Return the header of a file of safetensors, without escapes. Tensors hold numbers alone."""
    with safe_open(file, framework="np") as opened:  # which compares the header with the file's size
        yield json.dumps(opened.metadata() or {}, ensure_ascii=False).encode("utf-8", "surrogatepass")
        yield "\n".join(opened.keys()).encode("utf-8", "surrogatepass")


def _picture(content: bytes, name: str) -> Iterator[bytes]:
    """Return a picture's parts beside its pixels. Raises ValueError for another format, or bytes behind its end."""
    with Image.open(io.BytesIO(content), formats=[name]) as picture:
        picture.verify()
    for part in {"PNG": _of_png, "JPEG": _of_jpeg, "WEBP": _of_webp}[name](content):
        if b"PK\x05\x06" in part or b"PK\x03\x04" in part:
            raise ValueError("an archive stands in it")
        yield part


def _of_png(content: bytes) -> Iterator[bytes]:
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, at)
        if kind not in _PNG_CHUNKS:
            raise ValueError(f"it holds a private chunk {kind!r}")
        if kind not in _PIXELS:
            yield from _png_texts(kind, content[at + 8 : at + 8 + length])
        at += 12 + length
    _check_end(content, at)


def _png_texts(kind: bytes, chunk: bytes) -> Iterator[bytes]:
    """Return a chunk beside the pixels, and the text that is compressed in it."""
    yield chunk
    _, _, rest = chunk.partition(b"\0")  # behind the keyword
    if kind == b"iTXt" and rest[:1] == b"\1":
        rest = b"\0" + rest[2:].split(b"\0", 2)[-1]  # its method, language and translated keyword
    elif kind not in (b"zTXt", b"iCCP"):
        return
    yield zlib.decompressobj().decompress(rest[1:], _MOST_TEXT)


def _of_webp(content: bytes) -> Iterator[bytes]:
    end, at = 8 + struct.unpack_from("<I", content, 4)[0], 12
    while at < end:
        kind, length = struct.unpack_from("<4sI", content, at)
        if kind not in _WEBP_CHUNKS:
            raise ValueError(f"it holds a private chunk {kind!r}")
        if kind not in _PIXELS:
            yield content[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    _check_end(content, at)


def _of_jpeg(content: bytes) -> Iterator[bytes]:
    at, marker = 2, 0
    while marker != 0xD9:
        marker = content[at + 1] if content[at : at + 1] == b"\xff" and at + 1 < len(content) else -1
        if marker == -1:
            raise ValueError("it breaks off")
        at += 2
        if marker in (0xFF, 0xD9, *range(0xD0, 0xD8)):  # filling, the end, and marks between pixels have no content
            at -= marker == 0xFF
            continue
        (length,) = struct.unpack_from(">H", content, at)
        yield content[at + 2 : at + length]
        at += length
        if marker == 0xDA:  # pixels, up to a mark that is none of theirs
            found = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]").search(content, at)
            at = found.start() if found else len(content)
    _check_end(content, at)


def _check_end(content: bytes, at: int) -> None:
    if content[at:].strip(b"\0"):
        raise ValueError(f"{len(content) - at} bytes follow behind the picture's end")


def _holds_pickle(content: bytes) -> bool:
    """True if the bytes, or those from a place that a pickle could begin at, read as one that calls something."""
    return any(_is_pickle(content[at:]) for at in (0, *(found.start() for found in _PROTOCOL.finditer(content))))


def _is_pickle(content: bytes) -> bool:
    calls = False
    try:
        for opcode, _, _ in pickletools.genops(content):
            calls = calls or opcode.name in _CALLS
    except Exception:  # whatever the first wrong instruction makes pickletools raise: no pickle
        return False
    return calls
