"""Rows of one direction: every record once, in order, labels on the target alone."""

import json

import numpy as np
import pytest

from training.config import ConfigError
from training.data import DataConfig, SourceConfig, TemplateConfig, single_direction_rows
from training.data.rows import interleaved_rows, prepare_held_out, prepare_rows

from .conftest import ToyProcessor


BOS, EOS = ToyProcessor.BOS, ToyProcessor.EOS


@pytest.fixture
def source(prepare, pair_source):
    return prepare(pair_source(("text:name", "image:picture", "audio:sound")))


def documents_of(rows):
    """(ids, labels) of every document, sorted."""
    return sorted(
        (row["input_ids"][row["document_ids"] == n].tolist(), row["labels"][row["document_ids"] == n].tolist())
        for row in rows
        for n in range(row["document_ids"].max() + 1)
    )


SEGMENTS = {"text": "text:name", "image": "image:picture", "speech": "audio:sound"}


@pytest.mark.parametrize("given", SEGMENTS)
@pytest.mark.parametrize("target", SEGMENTS)
def test_labels_are_on_the_target_alone(source, given, target):
    if given == target:
        return
    expected = []
    for record in range(40):
        first, last = (source[record][SEGMENTS[name]][0] for name in (given, target))
        ids = [BOS, *first, *last, EOS]
        masked = [-100] * (1 + len(first))
        if target == "text":
            expected.append((ids, [*masked, *last, EOS]))
        else:
            expected.append((ids, [*masked, -100, *last[1:-1], -100, -100]))
    assert documents_of(single_direction_rows(source, f"{given}-to-{target}", 128)) == sorted(expected)


def test_one_modality_alone_predicts_all_of_it(source):
    expected = []
    for record in range(40):
        ids = [BOS, *source[record]["text:name"][0], EOS]
        expected.append((ids, [-100, *ids[1:]]))
    assert documents_of(single_direction_rows(source, "text", 64)) == sorted(expected)


def test_a_range_of_records(source):
    rows = single_direction_rows(source, "text-to-image", 64, limit=3, start=5)
    ids = [ids for ids, _ in documents_of(rows)]
    expected = [[BOS, *source[i]["text:name"][0], *source[i]["image:picture"][0], EOS] for i in (5, 6, 7)]
    assert ids == sorted(expected)


def test_segments_can_be_chosen(prepare, pair_source):
    source = prepare(pair_source(("text:name", "text:so it is {name}", "image:picture")))
    rows = single_direction_rows(
        source, "text-to-image", 64, segments=("text:so it is {name}", "image:picture"), limit=1
    )
    words = bytes(int(token) - 7 for token in rows[0]["input_ids"] if 7 <= token < 263).decode()
    assert words == "so it is thing a"


def test_long_texts_are_split_with_nothing_lost(prepare, text_source):
    source = prepare(text_source())
    rows = single_direction_rows(source, "text", 16)
    assert sum((row["document_ids"] >= 0).sum() for row in rows) == sum(3 * i + 3 for i in range(30))


@pytest.mark.parametrize(
    ("direction", "options", "message"),
    [
        ("text-to-video", {}, "direction='text-to-video' is not"),
        ("text-to-image", {"row_length": 9}, "row_length=9 is shorter than a text-to-image document"),
        ("text-to-image", {"segments": ("text:name", "audio:sound")}, "do not make 'text-to-image'"),
        ("text", {"start": 40}, "leave no record"),
    ],
)
def test_bad_directions_are_refused(source, direction, options, message):
    with pytest.raises(ValueError, match=message):
        single_direction_rows(source, direction, **({"row_length": 128} | options))


def test_a_direction_without_its_segment_is_refused(prepare, text_source):
    with pytest.raises(ValueError, match="needs image, but source 'texts' has"):
        single_direction_rows(prepare(text_source()), "text-to-image", 128)


def test_rows_are_int64_and_padded(source):
    for row in single_direction_rows(source, "image-to-text", 100):
        assert all(value.shape == (100,) and value.dtype == np.int64 for value in row.values())


# -------------------------------------------------------------------------------------- by source, and interleaved


@pytest.fixture
def interleaved(tmp_path):
    """A source of three documents of words and pictures by turns."""
    from .conftest import png

    (tmp_path / "a.png").write_bytes(png("red"))
    picture = {"type": "image", "image": "a.png"}
    documents = [[{"type": "text", "text": "ab" * n}, picture, {"type": "text", "text": "c"}] for n in (1, 2, 3)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"segments": document}) + "\n" for document in documents))
    return SourceConfig("documents", str(path), [TemplateConfig(["document:segments"])])


def test_every_held_out_source_has_rows_of_each_of_its_directions(pair_source, interleaved, processor, tmp_path):
    template = [TemplateConfig(["text:name", "image:picture"])]
    pairs = pair_source(("text:name", "image:picture"))
    others = SourceConfig("others", pairs.path, template, limit=4)
    data = DataConfig(64, sources=[pairs], validation_sources=[pairs, others, interleaved], cache_dir=str(tmp_path))
    held_out = prepare_held_out(data, processor, 3)
    directions = [f"{name}/{way}" for name in (pairs.name, "others") for way in ("text-to-image", "image-to-text")]
    assert list(held_out) == [*directions, "documents/interleaved"]
    assert all(0 < len(rows) <= 3 for rows in held_out.values())
    assert list(prepare_rows(data, processor, 3)[1]) == list(held_out)
    assert prepare_held_out(data, processor, 0) == {}


def test_interleaved_rows_learn_what_training_learns(interleaved, prepare):
    source = prepare(interleaved)
    expected = [[BOS, *source[i]["document:segments"][0], EOS] for i in range(3)]
    rows = interleaved_rows(source, interleaved.templates[0], 64)
    assert documents_of(rows) == sorted((ids, [-100, *ids[1:]]) for ids in expected)


def test_an_interleaved_document_that_is_longer_than_a_row_is_refused_by_name(interleaved, processor, tmp_path):
    short = [TemplateConfig(["text:segments"])]
    sources = [SourceConfig("texts", interleaved.path, short)]
    data = DataConfig(8, sources=sources, validation_sources=[interleaved], cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="data: row_length=8 is shorter than the document of .*'documents'"):
        prepare_held_out(data, processor, 3)
