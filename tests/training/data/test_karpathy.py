"""Karpathy's JSON with its pictures, laid out as the real files are, becomes a set that a source reads."""

import json

import datasets
import pytest
from huggingface_hub import DatasetCard

from training.data import SourceConfig, TemplateConfig
from training.data.adapters import karpathy
from training.data.reading.records import decode_picture, text_of
from training.data.reading.sources import open_source

from .conftest import png


def entry(number, split, filepath="val2014", captions=("A cat.", "the cat\nsits")):
    sentences = [{"raw": caption, "tokens": caption.split(), "imgid": number} for caption in captions]
    entry = {"filename": f"COCO_{number:012d}.png", "split": split, "sentences": sentences, "imgid": number}
    return entry | ({"filepath": filepath} if filepath else {})


@pytest.fixture
def coco(tmp_path):
    """(folder of pictures, JSON) of two pictures for the test, one for validation and one for training."""
    entries = [entry(1, "test"), entry(2, "restval", "train2014"), entry(3, "test"), entry(4, "val")]
    for one in entries:
        folder = tmp_path / "images" / one["filepath"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / one["filename"]).write_bytes(png("red", size=(10 + one["imgid"], 8)))
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": entries}))
    return tmp_path / "images", tmp_path / "dataset_coco.json"


def run(coco, out, *words):
    karpathy.main(["--images", str(coco[0]), "--json", str(coco[1]), "--out", str(out), *words])


def test_a_source_reads_the_pictures_with_all_captions(coco, tmp_path, capsys):
    run(coco, tmp_path / "out", "--split", "test")
    assert "test: 2 rows" in capsys.readouterr().out
    templates = [TemplateConfig(["text:captions", "image:image"]), TemplateConfig(["text:text", "image:image"])]
    source = SourceConfig("coco", str(tmp_path / "out"), templates, split="test")
    found = list(open_source(source))
    assert [record["id"] for record in found] == ["COCO_000000000001", "COCO_000000000003"]
    assert [record["captions"] for record in found] == [["A cat.", "the cat sits"]] * 2
    assert [decode_picture(record["image"]).size for record in found] == [(11, 8), (13, 8)]
    assert text_of(templates[1].parsed[0], found[0]) == "A cat."
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert "terms of coco" in card.text and card.data.pretty_name == "coco, Karpathy's split test"


def test_several_splits_become_one_and_a_limit_cuts(coco, tmp_path):
    run(coco, tmp_path / "out", "--split", "val", "restval", "--limit", "1")
    source = SourceConfig("c", str(tmp_path / "out"), [TemplateConfig(["image:image"])], split="validation")
    assert [record["id"] for record in open_source(source)] == ["COCO_000000000002"]


def test_pictures_of_flickr_stand_in_one_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "COCO_000000000005.png").write_bytes(png("blue"))
    listed = tmp_path / "dataset_flickr30k.json"
    listed.write_text(json.dumps({"dataset": "flickr30k", "images": [entry(5, "test", filepath=None)]}))
    run((tmp_path / "images", listed), tmp_path / "out")
    assert (tmp_path / "out" / "test" / "COCO_000000000005.png").read_bytes() == png("blue")


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (lambda e: e[0].update(filename="gone.png"), (), "1 of 2 pictures are not in --images"),
        (lambda e: e[0].update(filename="../../secret.png"), (), "leads outside"),
        (lambda e: e[0].update(sentences=[{"raw": " "}]), (), "has no caption"),
        (lambda e: e[0].pop("sentences"), (), "no file of Karpathy's"),
        (lambda e: None, ("--split", "tset"), "its splits are restval, test, val"),
    ],
)
def test_other_files_are_refused_and_nothing_is_written(coco, tmp_path, capsys, spoil, words, message):
    content = json.loads(coco[1].read_text())
    spoil(content["images"])
    coco[1].write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        run(coco, tmp_path / "out", *words)
    assert ended.value.code == 1 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_picture_that_does_not_decode_is_refused(coco, tmp_path, capsys):
    (coco[0] / "val2014" / "COCO_000000000003.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        run(coco, tmp_path / "out")
    assert "COCO_000000000003.png" in capsys.readouterr().err


def test_a_folder_of_ones_own_may_have_several_captions_of_a_picture(tmp_path):
    (tmp_path / "cat.png").write_bytes(png("red"))
    line = {"file_name": "cat.png", "caption": "a cat", "captions": ["a cat", "my cat"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    source = SourceConfig("own", str(tmp_path), [TemplateConfig(["text:captions", "image:image"])])
    (found,) = open_source(source)
    assert found["captions"] == ["a cat", "my cat"] and decode_picture(found["image"]).size == (8, 8)


def test_the_set_loads_with_datasets_too(coco, tmp_path):
    run(coco, tmp_path / "out")
    found = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert found["test"][0]["captions"] == ["A cat.", "the cat sits"] and found["test"][0]["image"].size == (11, 8)
