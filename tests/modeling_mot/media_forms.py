"""Every way in which a picture or sound reaches the one reader, a server of files, and small files."""

import base64
import http.server
import io
import threading
import time
from contextlib import contextmanager

import numpy as np
from PIL import Image

from modeling_mot.media_loading import MediaError
from training.data.reading.records import decode_picture, decode_sound


COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
WAVE = np.random.default_rng(3).uniform(-0.9, 0.9, (3000, 2))


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def sound_file(wave: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


@contextmanager
def site_of(folder):
    """The folder, and the address at which a server of this machine shows it."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
            elif self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                try:
                    for _ in range(100):
                        self.wfile.write(b"x")
                        time.sleep(0.1)
                except OSError:
                    return
            elif self.path == "/short":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"x")
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def outcome(function, *arguments, **options):
    """The tokens, or the error without what names this picture or sound."""
    try:
        return list(function(*arguments, **options))
    except ValueError as error:
        assert isinstance(error, MediaError), error
        return str(error).split(": ")[0].split(" (")[0]


def chat_ids(processor, block: dict) -> list[int]:
    """The picture or sound of a chat, as tokens."""
    batch = processor.apply_chat_template(
        [{"role": "user", "content": [block]}], tokenize=True, return_dict=True, allow_urls=True
    )
    ids = batch["input_ids"][0]
    begins = {"image": "boi", "image_url": "boi", "audio": "begin_of_speech"}
    ends = {"image": "eoi", "image_url": "eoi", "audio": "end_of_speech"}
    first, last = (ids.index(processor.token_id(names[block["type"]])) for names in (begins, ends))
    return ids[first : last + 1]


def outcomes_of_file(processor, site, kind: str, content: bytes, suffix: str) -> list:
    """A file's tokens on every way that it can take."""
    folder, address = site
    path = folder / f"file{suffix}"
    path.write_bytes(content)
    spelled = base64.b64encode(content).decode()
    encode, decode = {
        "image": (processor.encode_images, decode_picture),
        "audio": (processor.encode_audio, lambda value: dict(zip(("array", "sampling_rate"), decode_sound(value)))),
    }[kind]
    one = lambda source: encode([source], allow_urls=True)[0]  # noqa: E731
    sources = [
        content, bytearray(content), path, str(path), {"bytes": content, "path": None},
        {"bytes": None, "path": str(path)}, {"base64": spelled}, f"data:image/png;base64,{spelled}",
        f"{address}/file{suffix}", {"url": f"{address}/file{suffix}"}, f"{address}/to//file{suffix}",
    ]  # fmt: skip
    blocks = [{kind: content}, {"url": f"{address}/file{suffix}"}, {"path": str(path)}, {"base64": spelled}]
    found = [outcome(one, source) for source in sources]
    found += [outcome(lambda source: one(decode(source)), source) for source in sources[:6]]
    found += [outcome(chat_ids, processor, {"type": kind} | block) for block in blocks]
    if kind == "image":
        block = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{spelled}"}}
        found.append(outcome(chat_ids, processor, block))
    segment = {"type": kind, kind: str(path)}
    found.append(outcome(lambda: processor([segment], add_eos=False)["input_ids"][1:]))
    return found
