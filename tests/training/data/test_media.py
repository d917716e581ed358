"""Training reads pictures and sounds as the processor does, and leaves out or names what it cannot use."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.modeling_mot.media_forms import COLOURS, WAVE, encoded, sound_file
from tests.modeling_mot.test_processor import build_processor
from training.data import AugmentationConfig, Preparing, SourceConfig, TemplateConfig, TokenizedSource
from training.data.reading.records import OutsidePath, confined, decode_picture, decode_sound


@pytest.fixture(scope="module")
def processor():
    return build_processor(background=[10, 200, 30])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(COLOURS), "JPEG", exif=exif)


GOOD = {
    "turned.jpg": ("image", turned()),
    "deep.png": ("image", encoded(Image.fromarray(np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)))),
    "clear.png": ("image", encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 99)))),
    "thin.png": ("image", encoded(Image.new("L", (1, 50_000), 99))),
    "stereo.wav": ("audio", sound_file(WAVE, 48_000)),
    "odd.wav": ("audio", sound_file(WAVE, 11_127)),
    "bytes.wav": ("audio", sound_file(WAVE, 16_000, subtype="PCM_U8")),
    "tagless.mp3": ("audio", sound_file(WAVE, 44_100, "MP3")),
}
BAD = {
    "nan.wav": ("audio", sound_file(np.array([np.nan] * 99), 16_000, subtype="FLOAT")),
    "slow.wav": ("audio", sound_file(WAVE, 400)),
    "over.tiff": ("image", encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")),
    "broken.png": ("image", b"not a picture"),
}


def documents(folder, files: dict) -> str:
    folder.mkdir(exist_ok=True)
    lines = []
    for name, (kind, content) in files.items():
        (folder / name).write_bytes(content)
        lines.append(json.dumps({"segments": [{"type": "text", "text": "the cat"}, {"type": kind, kind: name}]}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return str(folder / "documents.jsonl")


def prepared(processor, tmp_path, files, augmentation=None, **options) -> TokenizedSource:
    path = documents(tmp_path / "files", files)
    config = SourceConfig("x", path, [TemplateConfig(["document:segments"])], **options)
    return TokenizedSource.prepare(config, Preparing(processor, tmp_path / "cache", augmentation=augmentation))


def test_prepared_tokens_equal_the_processors(processor, tmp_path):
    source = prepared(processor, tmp_path, GOOD)
    for number, (name, (kind, content)) in enumerate(GOOD.items()):
        document = [{"type": "text", "text": "the cat"}, {"type": kind, kind: content}]
        ids = processor(document, add_eos=False)["input_ids"][1:]
        assert source[number]["document:segments"][0] == ids, name


def test_what_cannot_be_used_is_left_out_and_counted(processor, tmp_path):
    source = prepared(processor, tmp_path, BAD | GOOD, on_error="skip")
    assert len(source) == len(GOOD) and sum(source.skipped.values()) == len(BAD)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named_as_the_processor_names_it(processor, tmp_path, name):
    kind, content = BAD[name]
    with pytest.raises(ValueError) as expected:
        processor([{"type": kind, kind: content}])
    reason = str(expected.value).split(" (")[0].split("; ")[0]
    with pytest.raises(ValueError, match="record 0: column 'segments', segment 1: ") as found:
        prepared(processor, tmp_path, {name: BAD[name]})
    assert reason in str(found.value) and name in str(found.value)


def test_changed_copies_of_what_is_transparent_show_the_processors_background(processor, tmp_path):
    still = AugmentationConfig(variants=2, shift=0.0, brightness=0.0, contrast=0.0, saturation=0.0, flip=False)
    source = prepared(processor, tmp_path, {"clear.png": GOOD["clear.png"]}, still)
    first, second = source[0]["document:segments"]
    assert first == second


@pytest.mark.parametrize("key", ["path", "url"])
@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.png", "http://127.0.0.1:9/a.png", "file:///etc/passwd"])
def test_no_record_names_what_is_outside_its_folder(tmp_path, key, name):
    for value in ({key: name}, {"bytes": None, key: name}, name):
        found = confined(value, [tmp_path])
        inside = isinstance(found, str) and not isinstance(found, OutsidePath) and found.startswith(str(tmp_path))
        assert inside or isinstance(found, OutsidePath)
        with pytest.raises(ValueError, match="leads outside the folder of its source|does not exist"):
            decode_picture(found)


@pytest.mark.parametrize("key", ["array", "bytes", "base64"])
def test_no_record_hides_a_name_where_content_belongs(tmp_path, key):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(Image.fromarray(COLOURS)))
    for name in (str(secret), secret, {"path": str(secret)}):
        for decode in (decode_picture, decode_sound):
            with pytest.raises(ValueError, match=f"under '{key}'|does not decode"):
                decode(confined({key: name, "sampling_rate": 16_000}, [tmp_path / "inside"]))


def test_a_picture_that_is_decoded_twice_stays_as_it_is():
    once = decode_picture(io.BytesIO(turned()).getvalue())
    assert once.size == (20, 30) and decode_picture(once) is once
