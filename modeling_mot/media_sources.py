"""Where pictures and sounds come from: bytes, files, base64, addresses, and records of any of these.

Every reader of pictures and sounds opens them here, so that the caller's word on addresses and paths counts everywhere.
"""

import base64
import io
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPSConnection
from socket import SHUT_RDWR
from threading import Timer
from typing import Any
from urllib.parse import unquote_to_bytes


# What is fetched or spelled out in text may hold this much: ten minutes of stereo sound without compression.
MAX_BYTES = 2**27
MAX_SECONDS_TO_FETCH = 30.0
# What a record may hold its content or its name under, in the order of who is believed.
CONTENT_KEYS = ("array", "bytes", "base64")
NAME_KEYS = ("path", "url")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class MediaError(ValueError):
    """A picture or sound that cannot be used. The message says which and why."""


class MissingMedia(MediaError, FileNotFoundError):
    """A picture or sound whose file is not there."""


def describe_source(source: Any) -> str:
    """A short name for error messages: that of the file where there is one."""
    if isinstance(source, dict):
        held = next(((key, source[key]) for key in (*NAME_KEYS, *CONTENT_KEYS) if source.get(key) is not None), None)
        if held is None or isinstance(held[1], dict):
            return "a record"
        return "base64" if held[0] == "base64" else describe_source(held[1])
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if hasattr(source, "getexif"):
        return getattr(source, "filename", "") or f"picture of {source.width} x {source.height} pixels"
    if hasattr(source, "shape"):
        return f"array of shape {tuple(source.shape)}"
    text = str(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"
    most = 40 if text[:5].lower() == "data:" else 200
    short = text if len(text) <= most else text[:most] + "..."
    return short.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair cannot be printed


def name_within(source: Any) -> Any:
    """The path or address that a source consists of, or that a record without content has; else None."""
    if isinstance(source, dict) and all(source.get(key) is None for key in CONTENT_KEYS):
        source = next((source[key] for key in NAME_KEYS if source.get(key) is not None), None)
    return source if isinstance(source, (str, os.PathLike)) else None


def open_source(source: Any, kind: str, allow_urls: bool = False, allow_paths: bool = True) -> Any:
    """What a decoder takes: bytes, the path (str) of a file that is there, or an object as it was given.

    Args:
        source: bytes, a path, an address (`https://`), a `data:` address, or a record: {"array"}, {"bytes"}, {"base64"},
            {"path"} or {"url"}, the first that is not None. `datasets` has {"bytes", "path"}.
        kind: "picture" or "sound", for messages.
        allow_urls: whether addresses are fetched, at most `MAX_BYTES` in `MAX_SECONDS_TO_FETCH`. `data:` and base64,
            which hold the content, are always read.
        allow_paths: whether local files are opened. Turn it off for what strangers send.

    Raises:
        MissingMedia: a file that is not there.
        MediaError: what must not be opened, cannot be fetched, or holds nothing.
    """
    if isinstance(source, dict):
        source = _of_record(source, kind)
    if source is None:
        raise MediaError(f"there is no {kind}")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not isinstance(source, (str, os.PathLike)):
        return source
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
    """Whatever a decoder raises, and memory that there is not, becomes a MediaError."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        # soundfile's own message begins with the address of an object in memory
        why = getattr(error, "error_string", None) or str(error) or type(error).__name__
        raise MediaError(f"the {kind} does not decode: {why} ({name})") from error


def _of_record(record: dict, kind: str) -> Any:
    for key in (*CONTENT_KEYS, *NAME_KEYS):
        value = record.get(key)
        if value is None:
            continue
        # An array is never a name: who confines the names of records looks at `name_within` alone.
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
    _check_length(text, kind)
    with decoding(kind, "base64"):
        # Breaks between lines are no fault; other characters are.
        return base64.b64decode(re.sub(rb"\s+", b"", text.encode() if isinstance(text, str) else text), validate=True)


def _of_data_address(text: str, kind: str) -> bytes:
    """The content of `data:[type][;base64],content`."""
    _check_length(text, kind)
    header, comma, content = text.partition(",")
    with decoding(kind, describe_source(text)):
        if not comma:
            raise ValueError("a data: address has a comma before its content")
        held = unquote_to_bytes(content)
    return _of_base64(held, kind) if header.lower().endswith(";base64") else held


def _check_length(text: str | bytes, kind: str) -> None:
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


def _fetch(address: str, seconds: float | None = None, most: int | None = None) -> bytes:
    """The body of the answer; ValueError or OSError where it is too long or too slow."""
    seconds, most = seconds or MAX_SECONDS_TO_FETCH, most or MAX_BYTES
    sockets, end = [], time.monotonic() + seconds

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

    def hang_up() -> None:
        for socket in sockets:
            try:
                socket.shutdown(SHUT_RDWR)
            except OSError:
                continue  # it is closed already

    # A time-out of sockets counts from byte to byte: a server may send one every second.
    watch = Timer(seconds, hang_up)
    watch.daemon = True
    watch.start()
    try:
        with urllib.request.build_opener(Http, Https, Redirects).open(address, timeout=seconds) as answer:
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
