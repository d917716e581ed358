"""Files made to harm: none executes, leaves its folder or fills the memory; each is named, or skipped and counted."""

import gzip
import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from pyarrow import parquet

from training.data import SourceConfig, TemplateConfig
from training.data.config import Limits
from training.data.reading.records import decode_picture, decode_sound
from training.data.reading.sources import open_source

from .conftest import png, wav
from .test_shards import lines, tar


PAIRS = [TemplateConfig(["text:txt", "image:png"])]
TEXTS = [TemplateConfig(["text:txt"])]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    """A picture of any size in a few bytes: the rows are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def png_with_text_bomb() -> bytes:
    whole = png("red")
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**28), 1))
    return whole[:33] + bomb + whole[33:]


def flac_of_days() -> bytes:
    """A sound of a second whose header promises 2**36 - 1 samples."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(16_000, dtype=np.float32), 16_000, format="FLAC")
    data = bytearray(buffer.getvalue())
    # The last 36 bits of the 8 bytes from byte 18 of a FLAC file are the number of samples.
    (packed,) = struct.unpack(">Q", data[18:26])
    data[18:26] = struct.pack(">Q", packed | (2**36 - 1))
    return bytes(data)


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


def write_hostile(folder: Path) -> dict[str, tuple[str, list[str], str]]:
    """name -> (path, segments, what the error says) of sources that ask for more memory than there is."""
    folder.mkdir()
    pairs, texts = ["text:txt", "image:png"], ["text:txt"]

    def tar_of_picture(name, picture):
        return str(tar(folder / f"{name}.tar", [("0.txt", b"a"), ("0.png", picture)]))

    # Members of gzip follow one another: a line of a gigabyte in a few megabytes.
    (folder / "line.jsonl.gz").write_bytes(gzip.compress(b'{"txt": "') + gzip.compress(b"a" * 2**24) * 64)
    (folder / "size.tar").write_bytes(tar_header("0.txt", 2**40) + b"a" * 512)
    (folder / "pax.tar").write_bytes(tar_header("0.txt", 2**40, tarfile.XHDTYPE) + b"a" * 512)
    (folder / "longname.tar").write_bytes(tar_header("0.txt", 2**40, tarfile.GNUTYPE_LONGNAME) + b"a" * 512)
    (folder / "deep.jsonl.gz").write_bytes(gzip.compress(b'{"txt": ' + b"[" * 10**6 + b"\n"))
    return {
        "a billion pixels": (
            tar_of_picture("pixels", huge_png(40_000, 30_000)),
            pairs,
            "too large: .*1200000000 pixels",
        ),
        "a hundred million": (
            tar_of_picture("many", huge_png(10_000, 10_000)),
            pairs,
            "too large: 10000 x 10000 pixels",
        ),
        "a text chunk": (
            tar_of_picture("chunk", png_with_text_bomb()),
            pairs,
            "does not decode: Decompressed data too large",
        ),
        "a sound of days": (
            str(tar(folder / "sound.tar", [("0.flac", flac_of_days())])),
            ["audio:flac"],
            "the sound is too long",
        ),
        "a line of a gigabyte": (str(folder / "line.jsonl.gz"), texts, "line 1 is longer than data.max_record_bytes"),
        "a member of a terabyte": (str(folder / "size.tar"), texts, "members are too large|breaks off"),
        "a header of a terabyte": (str(folder / "pax.tar"), texts, "an entry asks for"),
        "a name of a terabyte": (str(folder / "longname.tar"), texts, "an entry asks for"),
        "lists in lists": (str(folder / "deep.jsonl.gz"), texts, "the line is not JSON"),
    }


_READ = """
import json, resource, sys
from training.data import Preparing, SourceConfig, TemplateConfig, TokenizedSource
from training.data.reading.sources import open_source
from tests.training.data.conftest import ToyProcessor
import soundfile

cases, cache, dictionary = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
said = {}
for name, (path, segments, _) in cases.items():
    templates = [TemplateConfig(segments)]
    for on_error in ("raise", "skip"):
        try:
            source = SourceConfig("x", path, templates, on_error=on_error)
            TokenizedSource.prepare(source, Preparing(ToyProcessor(), cache))
        except ValueError as error:
            said[f"{name}, {on_error}"] = str(error)
# A value of 8 MB that a dictionary repeats in each of 100,000 rows.
rows = iter(open_source(SourceConfig("x", dictionary, [TemplateConfig(["text:txt"])])))
said["lengths"] = [len(next(rows)["txt"]) for _ in range(200)]
print(json.dumps(said))
"""


def test_what_asks_for_all_memory_is_named_or_skipped_within_half_a_gigabyte(tmp_path):
    cases = write_hostile(tmp_path / "hostile")
    column = pa.DictionaryArray.from_arrays(np.zeros(100_000, dtype=np.int32), ["a" * 2**23])
    path = tmp_path / "dictionary.parquet"
    parquet.write_table(pa.table({"txt": column}), path, dictionary_pagesize_limit=2**30)
    assert path.stat().st_size < 2**21
    result = subprocess.run(
        [sys.executable, "-c", _READ, json.dumps(cases), str(tmp_path / "cache"), str(path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    said = json.loads(result.stdout)
    assert said.pop("lengths") == [2**23] * 200
    for name, (_, _, expected) in cases.items():
        assert re.search(expected, said[f"{name}, raise"]), said[f"{name}, raise"]
        assert "no usable record; left out: " in said[f"{name}, skip"]


def test_a_row_group_that_would_decompress_to_too_much_is_named_by_its_footer(tmp_path, prepare):
    path = tmp_path / "zeros.parquet"
    parquet.write_table(pa.table({"txt": ["0" * 100_000] * 100}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    config = SourceConfig("x", str(path), TEXTS, format="parquet")
    with pytest.raises(ValueError, match=r"row group 0 takes 1000\d+ bytes, more than data.max_group_bytes=5000000"):
        prepare(config, limits=Limits(max_group_bytes=5_000_000))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", ["pkl", "pyd", "pickle", "pt", "pth", "npy", "npz", "txt", "json", "png", "flac"])
def test_pickled_members_never_run(tmp_path, prepare, suffix):
    payload, marker = pickle.dumps(Payload(tmp_path / "ran")), tmp_path / "ran"
    path = tar(tmp_path / "0.tar", [(f"0.{suffix}", payload), ("1.cls", b"7"), (f"1.{suffix}", payload)])
    kinds = {"png": "image", "flac": "audio"}
    config = SourceConfig("x", str(path), [TemplateConfig([f"{kinds.get(suffix, 'text')}:{suffix}"])], on_error="skip")
    with pytest.raises(ValueError, match="no usable record|no column of text:json"):
        prepare(config)
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()


@pytest.mark.parametrize("name", ["../../outside.txt", "/etc/outside.txt", "a/../../outside.txt"])
def test_members_named_outside_are_refused_or_skipped(tmp_path, prepare, name):
    path = tar(tmp_path / "0.tar", [("0.txt", b"good"), (name, b"bad"), ("2.txt", b"good")])
    with pytest.raises(ValueError, match="record 1: the member leads outside"):
        prepare(SourceConfig("x", str(path), TEXTS))
    source = prepare(SourceConfig("x", str(path), TEXTS, on_error="skip"))
    assert len(source) == 2 and source.skipped == {"the member leads outside": 1}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_links_or_devices_are_refused(tmp_path, prepare, kind):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        member = tarfile.TarInfo("0.txt")
        member.type, member.linkname = kind, "/etc/hostname"
        archive.addfile(member)
    with pytest.raises(ValueError, match="the member is no regular file: '0.txt'"):
        prepare(SourceConfig("x", str(tmp_path / "0.tar"), TEXTS))


@pytest.fixture
def secret(tmp_path):
    """A picture and a sound beside the folder of a source, and links to them inside."""
    folder = tmp_path / "source"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png("red"))
    (tmp_path / "secret.wav").write_bytes(wav(0.5))
    for name in ("secret.png", "secret.wav"):
        (folder / f"link-{name}").symlink_to(tmp_path / name)
    return folder


def paths_outside(folder, name):
    return [f"../{name}", str(folder.parent / name), f"link-{name}", f"a/../../{name}", f"{name}\0"]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("manifest", ["shards", "documents", "documents of speech", "parquet"])
def test_records_cannot_name_files_outside_their_folder(secret, prepare, number, manifest):
    picture, sound = (paths_outside(secret, f"secret.{kind}")[number] for kind in ("png", "wav"))
    template, good = ["image:png"], {"png": "good.png"}
    (secret / "good.png").write_bytes(png("blue"))
    pattern = f"{secret}/*.jsonl"
    if manifest == "shards":
        (secret / "0.jsonl").write_bytes(lines(good, {"png": picture}))
    elif manifest.startswith("documents"):
        template = ["document:segments"]
        name = "speech" if manifest.endswith("speech") else "audio"
        bad = [{"type": "text", "text": "a"}, {"type": name, name: sound}]
        (secret / "0.jsonl").write_bytes(
            lines({"segments": [{"type": "image", "image": "good.png"}]}, {"segments": bad})
        )
    else:
        rows = [{"bytes": None, "path": path} for path in ("good.png", picture)]
        parquet.write_table(pa.table({"png": rows}), secret / "0.parquet")
        pattern = f"{secret}/*.parquet"
    config = SourceConfig("x", pattern, [TemplateConfig(template)])
    with pytest.raises(ValueError, match="shard 0.*, record 1: .*leads outside the folder of its source"):
        prepare(config)
    config.on_error = "skip"
    assert len(prepare(config)) == 1


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("manifest", ["metadata.jsonl", "metadata.csv"])
def test_metadata_cannot_name_files_outside_their_folder(secret, number, manifest):
    name = paths_outside(secret, "secret.png")[number]
    if manifest.endswith("csv"):
        (secret / manifest).write_text(f"file_name,txt\n{name},a\n")
    else:
        (secret / manifest).write_text(json.dumps({"file_name": name, "txt": "a"}))
    with pytest.raises(ValueError, match="leads outside|null byte|not CSV"):
        open_source(SourceConfig("x", str(secret), [TemplateConfig(["text:txt", "image:image"])], format="pictures"))


def test_a_picture_folder_does_not_follow_links_out_of_it(secret, prepare):
    (secret / "link-secret.txt").write_text("a secret")
    with pytest.raises(ValueError, match="leads outside the folder of its source"):
        prepare(SourceConfig("x", str(secret), [TemplateConfig(["text:text", "image:image"])]))


def test_limits_are_those_of_the_configuration(data_config):
    with pytest.raises(ValueError, match="too large: 8 x 8 pixels; data.max_pixels is 63"):
        decode_picture(png("red"), Limits(max_pixels=63))
    assert decode_picture(png("red"), Limits(max_pixels=64)).size == (8, 8)
    with pytest.raises(
        ValueError, match="too long: 1 seconds of 1 channels at 16000 Hz; data.max_audio_seconds is 0.5"
    ):
        decode_sound(wav(1.0), Limits(max_audio_seconds=0.5))
    assert data_config(max_pixels=5, max_audio_seconds=2.5).limits == Limits(max_pixels=5, max_audio_seconds=2.5)
    with pytest.raises(ValueError, match="max_pixels=0 must be above 0"):
        data_config(max_pixels=0, sources=[SourceConfig("x", "carried", TEXTS)]).validate()


def test_postscript_is_not_a_picture():
    with pytest.raises(ValueError, match="the picture does not decode"):
        decode_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "wav", "flac", "ogg"])
def test_any_cut_or_flipped_media_is_decoded_or_named(kind):
    """No other error than the named one comes out of the decoders."""
    random, buffer = np.random.default_rng(0), io.BytesIO()
    sound = kind in ("wav", "flac", "ogg")
    if sound:
        soundfile.write(buffer, random.uniform(-0.5, 0.5, 4000).astype(np.float32), 16_000, format=kind.upper())
    else:
        from PIL import Image

        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    whole = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    refused = 0
    for _ in range(60):
        broken = whole[: random.integers(1, len(whole) + 1)].copy()
        places = random.integers(0, min(len(broken), 200), size=random.integers(0, 4))
        broken[places] = random.integers(0, 256, size=len(places))
        try:
            (decode_sound if sound else decode_picture)(broken.tobytes())
        except ValueError as error:
            assert "the sound" in str(error) or "the picture" in str(error)
            refused += 1
    assert refused > 5
