"""Folders of pictures and sounds: captions in files of any kind, splits, and what is left out or refused by name."""

import json
import os

import pytest
from PIL import Image

from training.data.reading.sources import open_source

from .conftest import png, wav
from .test_bad_records import PAIR, TEXT, source_of, texts_of
from .test_shards import lines, write_shards


MARK = b"\xef\xbb\xbf"


@pytest.fixture
def folder(tmp_path):
    """One good picture with its caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good.png").write_bytes(png("red"))
    (folder / "good.txt").write_text("good")
    return folder


@pytest.mark.parametrize("written", ["pictures", "./pictures", "../here/pictures", "pictures/../pictures"])
@pytest.mark.parametrize("metadata", [False, True])
def test_a_relative_path_finds_its_pictures(folder, prepare, monkeypatch, written, metadata):
    here = folder.parent / "here"
    here.mkdir()
    folder.rename(here / "pictures")
    monkeypatch.chdir(here)
    if metadata:
        (here / "pictures" / "metadata.csv").write_text("file_name,text\ngood.png,good\n")
    assert texts_of(prepare(source_of(written, PAIR, "raise"))) == ["good"]


@pytest.mark.parametrize("way", ["jsonl", "glob"])
def test_a_relative_path_of_lines_finds_its_pictures(folder, prepare, monkeypatch, way):
    (folder / "0.jsonl").write_bytes(lines({"text": "good", "image": "good.png"}))
    monkeypatch.chdir(folder.parent)
    assert len(prepare(source_of("pictures/0.jsonl" if way == "jsonl" else "pictures/*.jsonl", PAIR, "raise"))) == 1


def add_broken(folder, kind):
    """A picture or caption of a kind, which cannot be used."""
    picture, caption = folder / "bad.png", folder / "bad.txt"
    if kind not in ("latin-1", "UTF-16", "a link"):
        caption.write_text("bad")
    if kind in ("latin-1", "UTF-16", "a link", "no caption", "an empty caption"):
        picture.write_bytes(png("red"))
    match kind:
        case "latin-1" | "UTF-16":
            caption.write_bytes("café".encode(kind))
        case "a link":
            (folder.parent / "secret.txt").write_text("a secret")
            caption.symlink_to(folder.parent / "secret.txt")
        case "no caption":
            caption.unlink()
        case "an empty caption":
            caption.write_text(" ")
        case "no picture":
            picture.write_bytes(b"no picture")
        case "a broken link":
            picture.symlink_to(folder / "nowhere.png")
        case "a loop of links":
            picture.symlink_to(picture)
        case "a pipe":
            os.mkfifo(picture)
        case "an unread format":
            (folder / "bad.heic").write_bytes(b"any")


KINDS = [
    "latin-1", "UTF-16", "a link", "no caption", "an empty caption", "no picture", "a broken link", "a loop of links",
    "a pipe",
    "an unread format",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_used_is_named_by_its_file_or_left_out(folder, prepare, kind):
    add_broken(folder, kind)
    name = "bad.heic" if kind == "an unread format" else "bad.png"
    with pytest.raises(ValueError, match=f"source 'x', .*{name}.*on_error: skip"):
        prepare(source_of(folder, PAIR, "raise"))
    source = prepare(source_of(folder, PAIR))
    assert texts_of(source) == ["good"]
    assert list(source.first_skipped.values()) == [name] and list(source.skipped.values()) == [1]


def test_every_format_that_is_read_is_found(folder, prepare):
    suffixes = [".PNG", ".jpg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"]
    for number, suffix in enumerate(suffixes):
        Image.new("RGB", (8, 8), "red").save(folder / f"{number}{suffix}")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    (folder / ".hidden.png").write_bytes(b"no picture")
    assert len(prepare(source_of(folder, PAIR, "raise"))) == 1 + len(suffixes)


CSV = {
    "a byte-order mark": (MARK + b"file_name,text\ngood.png,kept\n", 0),
    "no UTF-8": (b"file_name,text\ngood.png,caf\xe9\ngood.png,kept\n", 1),
    "a null byte": (b"file_name,text\ngo\0od.png,a\ngood.png,kept\n", 1),
    "a long name": (b"file_name,text\n" + b"a" * 300 + b".png,a\ngood.png,kept\n", 1),
    "a comma": (b"file_name,text\ngood.png,a cat, sitting\ngood.png,kept\n", 1),
    "no caption": (b"file_name,text\ngood.png\ngood.png,kept\n", 1),
    "an open quote": (b'file_name,text\ngood.png,kept\ngood.png,"a\nb\n', 1),
    "a long field": (b"file_name,text\ngood.png," + b"a" * 200_000 + b"\ngood.png,kept\n", 1),
    "no such picture": (b"file_name,text\nno.png,a\ngood.png,kept\n", 1),
    "lines in quotes": (b'file_name,text\r\ngood.png,"kept"\r\n\r\n', 0),
}
JSONL = {
    "a byte-order mark": (MARK + b'{"file_name": "good.png", "text": "kept"}\n', 0),
    "a number": (b'{"file_name": 5, "text": "a"}\n{"file_name": "good.png", "text": "kept"}\n', 1),
    "no object": (b'[]\n{\n{"file_name": "good.png", "text": "kept"}\n', 2),
    "a null byte": (b'{"file_name": "a\\u0000", "text": "a"}\n{"file_name": "good.png", "text": "kept"}\n', 1),
    "a surrogate": (b'{"file_name": "\\ud800", "text": "a"}\n{"file_name": "good.png", "text": "kept"}\n', 1),
    "no caption": (b'{"file_name": "good.png"}\n{"file_name": "good.png", "caption": "kept"}\n', 1),
}
METADATA = [("metadata.csv", kind, *case) for kind, case in CSV.items()] + [
    ("metadata.jsonl", kind, *case) for kind, case in JSONL.items()
]


@pytest.mark.parametrize(("name", "kind", "data", "bad"), METADATA)
def test_bad_entries_of_metadata_are_named_or_left_out(folder, prepare, name, kind, data, bad):
    (folder / name).write_bytes(data)
    if bad:
        with pytest.raises(ValueError, match="source 'x', (metadata|record 0: .*good.png)"):
            prepare(source_of(folder, PAIR, "raise"))
    source = prepare(source_of(folder, PAIR))
    assert texts_of(source) == ["kept"] and sum(source.skipped.values()) == bad


@pytest.mark.parametrize("header", [b"file_name,text,text\n", b"file_name,caf\xe9\n"])
def test_a_header_that_is_none_is_refused(folder, header):
    (folder / "metadata.csv").write_bytes(header + b"good.png,a,b\n")
    with pytest.raises(ValueError, match="metadata.csv .*the header is no list of different names"):
        open_source(source_of(folder, PAIR, "raise"))


def test_metadata_that_is_a_link_out_of_the_folder_is_not_read(folder):
    (folder.parent / "secret.csv").write_text("file_name,text\ngood.png,secret\n")
    (folder / "metadata.csv").symlink_to(folder.parent / "secret.csv")
    with pytest.raises(ValueError, match="metadata.csv, entry 1: the path leads outside"):
        open_source(source_of(folder, PAIR, "raise"))


def test_a_caption_begins_without_a_byte_order_mark(folder, prepare):
    (folder / "good.txt").write_bytes(MARK + b"good")
    assert texts_of(prepare(source_of(folder, PAIR, "raise"))) == ["good"]


# --------------------------------------------------------------------------------------------------------------- sounds


@pytest.mark.parametrize("captioned", [True, False])
def test_a_folder_of_sounds_is_read(tmp_path, prepare, captioned):
    folder = tmp_path / "sounds"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.wav").write_bytes(wav(0.5))
        if captioned:
            (folder / f"{number}.txt").write_text(f"sound {number}")
    segments = [*TEXT, "audio:audio"] if captioned else ["audio:audio"]
    source = prepare(source_of(folder, segments, "raise"))
    assert [source[i]["audio:audio"] for i in range(3)] == [[[5, 287, 287, 6]]] * 3
    (folder / "1.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match="source 'x', record 1: column 'audio': the sound .*1.wav"):
        prepare(source_of(folder, segments, "raise"))


def test_pictures_alone_need_no_captions(folder, prepare):
    (folder / "good.txt").unlink()
    assert len(prepare(source_of(folder, ["image:image"], "raise"))) == 1


# --------------------------------------------------------------------------------------------------------------- splits


def split_pictures(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((number, 0, 0)))
        path.with_suffix(".txt").write_text(name)
    return folder


def chosen(path, split, segments=PAIR, **fields):
    return [record["text"] for record in open_source(source_of(path, segments, "raise", split=split, **fields))]


def test_folders_named_as_splits_are_splits(tmp_path):
    names = ["train/a.png", "train/cats/b.png", "cats/val/c.png", "validation/d.png", "test/e.png", "validators/f.png"]
    folder = split_pictures(tmp_path / "pictures", [*names, "test.png"])
    assert chosen(folder, "train") == ["test.png", "train/a.png", "train/cats/b.png", "validators/f.png"]
    assert chosen(folder, "validation") == ["cats/val/c.png", "validation/d.png"]
    assert chosen(folder, "test") == ["test/e.png"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("place", ["root", "each"])
def test_metadata_describes_the_splits(tmp_path, kind, place):
    folder = split_pictures(tmp_path / "pictures", ["train/a.png", "validation/b.png"])
    for split, name in (("train", "a.png"), ("validation", "b.png")):
        where, file = (folder, f"{split}/{name}") if place == "root" else (folder / split, name)
        path, is_new = where / f"metadata.{kind}", not (where / f"metadata.{kind}").exists()
        with open(path, "a") as metadata:
            if kind == "csv":
                metadata.write(("file_name,text\n" if is_new else "") + f"{file},described {name}\n")
            else:
                metadata.write(json.dumps({"file_name": file, "text": f"described {name}"}) + "\n")
    assert chosen(folder, "train") == ["described a.png"] and chosen(folder, "validation") == ["described b.png"]


@pytest.mark.parametrize("split", ["nosuch", "validation", "test"])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(folder, split, tmp_path):
    shards = write_shards("webdataset", tmp_path / "shards")
    (tmp_path / "0.jsonl").write_bytes(lines({"text": "a"}))
    for path, segments in (
        (folder, PAIR), (shards, ["text:txt"]), (f"{shards}/*.tar", ["text:txt"]), (tmp_path / "0.jsonl", TEXT)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"source 'x' .*no split '{split}'; there is 'train'"):
            open_source(source_of(path, segments, split=split))


@pytest.mark.parametrize(
    "names", [["train/0.jsonl", "validation/0.jsonl"], ["train-0.jsonl", "data-val-0.jsonl"], ["0.jsonl", "dev.jsonl"]]
)
@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl"])
def test_shards_named_as_splits_are_splits(tmp_path, names, pattern):
    for name, split in zip(names, ("train", "validation"), strict=True):
        path = tmp_path / "shards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines({"text": split}, {"text": split}))
    for split in ("train", "validation"):
        assert chosen(f"{tmp_path}/shards{pattern}", split, TEXT) == [split] * 2
    with pytest.raises(ValueError, match="no split 'test'; there is 'train', 'validation'"):
        chosen(f"{tmp_path}/shards{pattern}", "test", TEXT)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_files_that_are_named_themselves_are_taken_whatever_split_they_are_called(tmp_path, split):
    folder = tmp_path / "validation"
    folder.mkdir()
    (folder / "val-0.jsonl").write_bytes(lines({"text": "a"}))
    (folder / "0.jsonl").write_bytes(lines({"text": "b"}))
    assert chosen(f"{folder}/val*.jsonl", split, TEXT) == ["a"] and chosen(folder / "0.jsonl", split, TEXT) == ["b"]


def test_records_of_splits_are_kept_apart(tmp_path, prepare):
    folder = split_pictures(tmp_path / "pictures", ["train/a.png", "validation/b.png"])
    train, held_out = (prepare(source_of(folder, PAIR, "raise", split=split)) for split in ("train", "validation"))
    assert texts_of(train) == ["train/a.png"] and texts_of(held_out) == ["validation/b.png"]
    assert train.fingerprint != held_out.fingerprint


def test_a_bad_record_of_another_split_is_not_counted(tmp_path):
    folder = split_pictures(tmp_path / "pictures", ["train/a.png", "validation/b.png"])
    (folder / "validation" / "b.txt").unlink()
    assert chosen(folder, "train") == ["train/a.png"]


def test_the_first_records_are_the_same_in_small_and_large_files(tmp_path, prepare):
    data = lines({"text": "a"}) + b"{]\n" + lines({"text": "b"}, {"text": "c"})
    (tmp_path / "0.jsonl").write_bytes(data)
    small = prepare(source_of(tmp_path / "0.jsonl", TEXT, limit=3))
    large = prepare(source_of(f"{tmp_path}/*.jsonl", TEXT, limit=3))
    assert texts_of(small) == texts_of(large) == ["a", "b"]
    assert small.skipped == large.skipped == {"the line is not JSON": 1}
