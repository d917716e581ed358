"""Who may open what, what a chat may hold, and how much memory and time small files take."""

import base64
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from modeling_mot import media_loading
from modeling_mot.image_processing import MoTImageProcessor
from modeling_mot.media_loading import load_picture

from .media_forms import COLOURS, WAVE, encoded, sound_file


soundfile = pytest.importorskip("soundfile")
ROOT = Path(__file__).parents[2]


def ways_in(processor, kind: str, source) -> list:
    """Calls of the processor and its parts that take `allow_urls` and `allow_paths`."""
    part, name = (processor.image_tokenizer, "images") if kind == "image" else (processor.speech_tokenizer, "audio")
    encode = processor.encode_images if kind == "image" else processor.encode_audio
    chat = [{"role": "user", "content": [{"type": kind, "url": source}]}]
    return [
        lambda **access: processor([{"type": kind, kind: source}], **access),
        lambda **access: processor(text=f"<|{kind}|>", **{name: [source]}, **access),
        lambda **access: processor.apply_chat_template(chat, tokenize=True, **access),
        lambda **access: processor.apply_chat_template(chat, tokenize=True, processor_kwargs=access),
        lambda **access: encode([source], **access),
        lambda **access: part.encode([source], **access),
    ]


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_addresses_and_paths_are_opened_as_the_caller_allows(processor, site, kind):
    folder, address = site
    content = encoded(Image.fromarray(COLOURS)) if kind == "image" else sound_file(WAVE, 16_000)
    (folder / "allowed").write_bytes(content)
    for call in ways_in(processor, kind, f"{address}/allowed"):
        call(allow_urls=True)
        for access in ({}, {"allow_urls": False}, {"allow_paths": True}):
            with pytest.raises(ValueError, match="at an address, which is opened with allow_urls=True only: http"):
                call(**access)
    for call in ways_in(processor, kind, str(folder / "allowed")):
        call()
        with pytest.raises(ValueError, match="a local path, which is opened with allow_paths=True only"):
            call(allow_paths=False, allow_urls=True)
    for record in ({"path": str(folder / "allowed")}, {"url": str(folder / "allowed")}, folder / "allowed"):
        with pytest.raises(ValueError, match="allow_paths=True only"):
            processor([{"type": kind, kind: record}], allow_paths=False)
    for record in (content, {"bytes": content, "path": "/etc/passwd"}, {"base64": base64.b64encode(content).decode()}):
        processor([{"type": kind, kind: record}], allow_paths=False)


def test_the_image_processor_asks_too(site):
    processor = MoTImageProcessor([16, 16], 4)
    with pytest.raises(ValueError, match="allow_paths=True only"):
        processor(["a.png"], allow_paths=False)
    with pytest.raises(ValueError, match="allow_urls=True only"):
        processor([site[1]])


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/a", "FILE:///etc/passwd", "s3://a/b"])
def test_only_http_is_fetched(site, address):
    with pytest.raises(ValueError, match="at an address other than http"):
        load_picture(address, allow_urls=True)
    with pytest.raises(ValueError, match="cannot be fetched: .*(is not allowed|is neither http nor https)"):
        load_picture(f"{site[1]}/to/{address}", allow_urls=True)


def test_what_is_fetched_is_bounded_in_bytes_and_time(site, monkeypatch):
    folder, address = site
    monkeypatch.setattr(media_loading, "MAX_BYTES", 1_000)
    (folder / "large").write_bytes(bytes(1_001))
    with pytest.raises(ValueError, match="cannot be fetched: it has more than 1000 bytes"):
        load_picture(f"{address}/large", allow_urls=True)
    with pytest.raises(ValueError, match="stand for more than 1000 bytes"):
        load_picture({"base64": "A" * 2_000})
    with pytest.raises(ValueError, match="cannot be fetched: it ends 999 bytes early"):
        load_picture(f"{address}/short", allow_urls=True)
    monkeypatch.setattr(media_loading, "MAX_SECONDS_TO_FETCH", 0.5)
    started = time.monotonic()
    with pytest.raises(ValueError, match="cannot be fetched: it takes more than 0.5 seconds"):
        load_picture(f"{address}/slow", allow_urls=True)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "block", [{"type": "img"}, {"type": "input_audio"}, {"type": "video"}, {"type": None}, "text", {}]
)
def test_unknown_blocks_of_a_chat_are_refused(processor, block):
    for content in ([block], [{"type": "text", "text": "a"}, block]):
        chat = [{"role": "user", "content": content}]
        for conversation in (chat, [chat, chat]):
            with pytest.raises(ValueError, match="valid are text, image, audio"):
                processor.apply_chat_template(conversation, tokenize=True)


def test_a_block_of_text_without_text_is_refused(processor):
    with pytest.raises(ValueError, match="block 0 of a message by 'user' of type 'text' has no 'text' entry"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "content": "a"}]}], tokenize=True)


@pytest.mark.parametrize("way", ["document", "segment", "text", "chat"])
def test_half_a_surrogate_pair_is_named(processor, way):
    segment = {"type": "text", "text": "a \ud800 b"}
    calls = {
        "document": lambda: processor([segment]),
        "segment": lambda: processor.encode_segment(segment),
        "text": lambda: processor(text="a \ud800 b"),
        "chat": lambda: processor.apply_chat_template([{"role": "user", "content": [segment]}], tokenize=True),
    }
    with pytest.raises(ValueError, match=r"'\\ud800' at .* is half of a surrogate pair"):
        calls[way]()


SMALL_BOMBS = """
import io, resource, sys, time
import numpy as np, soundfile
from PIL import Image
from modeling_mot.image_tokenizer import ImageTokenizerConfig
from modeling_mot.media_loading import load_fitted, load_sound
from modeling_mot.speech_tokenizer import resample
import torch
torch.set_num_threads(1)

def picture(width, height):
    buffer = io.BytesIO()
    Image.new("L", (width, height), 77).save(buffer, "PNG")
    return buffer.getvalue()

def sound(rate):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(rate // 10), rate, format="WAV")
    return buffer.getvalue()

def hear(data):
    wave, rate = load_sound(data)
    return resample(torch.from_numpy(wave), rate, 16_000)

sizes = [(1, 20_000), (1, 300_000), (2_000_000, 1), (300_000, 1)]
pictures, sounds = [picture(*size) for size in sizes], [sound(rate) for rate in (11_127, 192_001, 767_999)]
load_fitted(picture(9, 9), ImageTokenizerConfig(image_size=512)), hear(sound(8_000))
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
for fit in ("crop", "pad"):
    for data in pictures:
        fitted = load_fitted(data, ImageTokenizerConfig(image_size=512, fit=fit))
        assert (fitted[256, 256] == (77 if fit == "crop" else 255)).any()
for data in sounds:
    hear(data)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, time.monotonic() - started)
"""


def test_files_of_a_few_bytes_take_megabytes_and_no_time():
    done = subprocess.run([sys.executable, "-c", SMALL_BOMBS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    mebibytes, seconds = map(float, done.stdout.split())
    assert mebibytes < 150 and seconds < 20
