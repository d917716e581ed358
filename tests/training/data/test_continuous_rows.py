"""Rows with continuous images, against documents written out token by token."""

import json
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest

from training.data import (
    AugmentationConfig,
    DataConfig,
    Preparing,
    RowStream,
    SourceConfig,
    TemplateConfig,
    TokenizedSource,
)
from training.data.rows import directions_of
from training.data.stream import mean_document_length

from .conftest import continuous, png, small_vae, wav


RECORDS = 12


@pytest.fixture(scope="module")
def processor():
    return continuous()


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """A data set of sources, instructions of different lengths, targets; every picture has a colour of its own."""
    binary = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features(source=binary, instruction=datasets.Value("string"), target=binary)

    def picture(number, blue):
        return {"bytes": png((20 * number, 255 - 20 * number, blue)), "path": f"{number}.png"}

    rows = {
        "source": [picture(i, 0) for i in range(RECORDS)],
        "instruction": ["flip it" + "!" * i for i in range(RECORDS)],
        "target": [picture(i, 255) for i in range(RECORDS)],
    }
    folder = tmp_path_factory.mktemp("edits")
    table = datasets.Dataset.from_dict(rows, features=features)
    table = table.cast_column("source", datasets.Image()).cast_column("target", datasets.Image())
    table.to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def prepared(edits, cache, processor):
    """prepared(segments, **template fields) -> TokenizedSource"""

    def make(segments, source=None, augmentation=None, vae=None, **template):
        config = SourceConfig("edits", str(edits), [TemplateConfig(list(segments), **template)], **(source or {}))
        return TokenizedSource.prepare(config, Preparing(processor, cache, augmentation=augmentation, vae=vae))

    return make


def stream_of(source, **fields):
    return RowStream(DataConfig(**({"row_length": 64, "block_documents": 36, "seed": 1} | fields)), [source])


# -- documents written out naively ------------------------------------------------------------------------------------


def written_out(segments, processor, targets="all", clean_copies=False):
    """(ids, labels, positions, images) of [(kind, ids, values)], token by token."""
    tokenizer = processor.tokenizer
    tokens, images, position = [(tokenizer.bos_token_id, False, 0)], [], 1
    for number, (kind, ids, values) in enumerate(segments):
        is_last = number == len(segments) - 1
        learnt = targets == "all" or is_last
        if kind == "text":
            tokens += [(token, learnt, position + place) for place, token in enumerate(ids)]
        else:
            text_before = any(other == "text" for other, _, _ in segments[:number])
            text_after = any(other == "text" for other, _, _ in segments[number + 1 :])
            first = text_after and not text_before
            for place, token in enumerate(ids):
                is_label = learnt and token not in (processor.image_token_id, tokenizer.eoi_token_id)
                tokens.append((token, is_label, position + place))
            images.append((values.tobytes(), not learnt, first))
            if clean_copies and learnt and not is_last:
                tokens += [(token, False, position + place) for place, token in enumerate(ids)]
                images.append((values.tobytes(), True, first))
        position += len(ids)
    tokens.append((tokenizer.eos_token_id, True, position))
    ids, is_label, positions = zip(*tokens, strict=True)
    labels = tuple(token if label else -100 for token, label in zip(ids, is_label, strict=True))
    return ids, labels, positions, tuple(images)


def documents_of(rows, processor):
    """The documents of rows in the same form; the images are dealt out by counting BOI."""
    found = []
    for row in rows:
        images = iter(row["images"])
        for number in range(row["document_ids"].max() + 1):
            inside = row["document_ids"] == number
            ids, labels, positions = (
                tuple(row[name][inside].tolist()) for name in ("input_ids", "labels", "position_ids")
            )
            own = [next(images) for _ in range(ids.count(processor.tokenizer.boi_token_id))]
            found.append((ids, labels, positions, tuple((i["values"].tobytes(), i["clean"], i["first"]) for i in own)))
            assert np.array_equal(row["modality_ids"][inside], processor.modality_ids_of(row["input_ids"][inside]))
        assert next(images, None) is None
    return found


def segment_of(source, name, record, variant=0):
    segment = next(segment for segment in source.columns if str(segment) == name)
    ids = source.columns[segment].ids(record, variant).tolist()
    images = source.image_columns[segment].images(record, variant) if segment in source.image_columns else [None]
    return segment.type, ids, images[0]


PAIR, EDIT = ("text:instruction", "image:source"), ("image:source", "text:instruction", "image:target")
# How each template may be arranged: (text_first, dropped) -> names of segments.
ARRANGED = {
    PAIR: {(True, False): PAIR, (True, True): PAIR[1:], (False, False): PAIR[::-1]},
    EDIT: {(True, False): EDIT, (True, True): (EDIT[0], EDIT[2])},
}


@pytest.mark.parametrize("clean_copies", [False, True])
@pytest.mark.parametrize("targets", ["all", "last"])
@pytest.mark.parametrize("segments", [PAIR, EDIT])
def test_rows_hold_the_documents_written_out(prepared, processor, segments, targets, clean_copies):
    # Nothing stands before the first picture of an edit where all is learnt, so nothing can be dropped there.
    dropout = 0.0 if (segments, targets) == (EDIT, "all") else 0.3
    template = {"targets": targets, "caption_first": 0.5 if segments == PAIR else None, "caption_dropout": dropout}
    source = prepared(segments, augmentation=AugmentationConfig(variants=2), **template)
    stream = stream_of(source, clean_copies=clean_copies, block_documents=60)
    draws, expected = stream.draws(0), Counter()
    for number in range(60):
        names = ARRANGED[segments][bool(draws.text_first[number]), bool(draws.dropped[number])]
        parts = [segment_of(source, name, int(draws.record[number]), int(draws.variant[number])) for name in names]
        document = written_out(parts, processor, targets, clean_copies)
        assert draws.length[number] == len(document[0])
        expected[document] += 1
    assert Counter(documents_of(stream.block(0), processor)) == expected
    assert len({(bool(f), bool(d)) for f, d in zip(draws.text_first, draws.dropped, strict=True)}) == len(
        ARRANGED[segments]
    ) - (dropout == 0)


def test_latents_stand_in_rows_as_pixels_do(prepared, processor):
    pixels = stream_of(prepared(EDIT, caption_first=None, targets="last")).row(0)
    latents = stream_of(prepared(EDIT, caption_first=None, targets="last", vae=small_vae())).row(0)
    for name in ("input_ids", "labels", "position_ids", "document_ids", "modality_ids"):
        assert np.array_equal(pixels[name], latents[name])
    for picture, image in zip(pixels["images"], latents["images"], strict=True):
        assert picture["values"].shape == (3, 8, 8) and image["values"].shape == (4, 4, 4)
        assert (picture["clean"], picture["first"]) == (image["clean"], image["first"])


def test_an_instruction_is_dropped_with_its_probability(prepared, processor):
    source = prepared(EDIT, caption_first=None, targets="last", caption_dropout=0.2)
    documents = documents_of(stream_of(source, block_documents=2000).block(0), processor)
    dropped = sum(len(ids) == 2 + 2 * 6 for ids, *_ in documents)
    # Five standard deviations are 0.045.
    assert abs(dropped / 2000 - 0.2) < 0.045
    assert all([clean for _, clean, _ in images] == [True, False] for *_, images in documents)


@pytest.fixture
def interleaved(tmp_path):
    """A picture, a text, a picture, a text; a text alone that is long; and a text with a picture at its end."""
    for number, name in enumerate("abcd"):
        (tmp_path / f"{name}.png").write_bytes(png((60 * number, 0, 9)))
    text, long = {"type": "text", "text": "so it is"}, {"type": "text", "text": "flip it " * 40}
    images = [{"type": "image", "image": f"{name}.png"} for name in "abcd"]
    documents = [[images[0], text, images[1], text], [long], [images[2], text, images[3]]]
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"segments": document}) for document in documents))
    return path


@pytest.mark.parametrize("clean_copies", [False, True])
@pytest.mark.parametrize("targets", ["all", "last"])
def test_document_columns_are_written_out_alike(interleaved, tmp_path, processor, targets, clean_copies):
    config = SourceConfig("d", str(interleaved), [TemplateConfig(["document:segments"], targets=targets)])
    source = TokenizedSource.prepare(config, Preparing(processor, tmp_path / "cache"))
    stream = stream_of(source, block_documents=3, row_length=48, clean_copies=clean_copies)
    ((segment, column),) = source.image_columns.items()
    text = processor.encode_text("so it is")
    expected = []
    for record, kinds in ((0, "image text image text"), (2, "image text image")):
        images = column.images(record, 0)
        parts = []
        for kind in kinds.split():
            values = images[sum(other == "image" for other, _, _ in parts)] if kind == "image" else None
            parts.append((kind, processor.placeholder_ids(8, 8) if kind == "image" else text, values))
        expected.append(written_out(parts, processor, targets, clean_copies))
    found = documents_of(stream.block(0), processor)
    assert sorted(document for document in found if document[3]) == sorted(expected)
    long = source.columns[segment].ids(1, 0)
    assert sum(len(ids) for ids, *_, images in found if not images) == len(long) + 2
    assert all(
        labels[0] == -100 and positions == tuple(range(len(ids))) for ids, labels, positions, i in found if not i
    )


# -- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean_copies", [False, True])
def test_a_row_shorter_than_the_longest_document_is_refused_with_a_way_out(prepared, processor, clean_copies):
    source = prepared(PAIR, caption_first=0.5)
    parts = [segment_of(source, name, RECORDS - 1) for name in PAIR[::-1]]
    longest = len(written_out(parts, processor, "all", clean_copies)[0])
    with pytest.raises(ValueError, match=rf"row_length={longest - 1} .*set row_length to {longest} or more"):
        stream_of(source, row_length=longest - 1, clean_copies=clean_copies)
    stream_of(source, row_length=longest, clean_copies=clean_copies)


@pytest.mark.parametrize("clean_copies", [False, True])
@pytest.mark.parametrize("segments", [PAIR, EDIT])
def test_the_mean_length_weighs_all_that_can_be_drawn(prepared, processor, segments, clean_copies):
    caption_first = 0.6 if segments == PAIR else None
    targets = "all" if segments == PAIR else "last"
    source = prepared(segments, caption_first=caption_first, caption_dropout=0.3, targets=targets)
    first = 1.0 if caption_first is None else caption_first
    shares = {(True, False): first * 0.7, (True, True): first * 0.3, (False, False): 1 - first}
    total = 0.0
    for way, names in ARRANGED[segments].items():
        for record in range(RECORDS):
            parts = [segment_of(source, name, record) for name in names]
            total += shares[way] * len(written_out(parts, processor, targets, clean_copies)[0]) / RECORDS
    assert mean_document_length(source, clean_copies) == pytest.approx(total)


# -- rows and streams -------------------------------------------------------------------------------------------------


def test_a_row_depends_on_seed_and_index_alone(prepared):
    source = prepared(PAIR, caption_first=0.5, caption_dropout=0.2)
    walked = list(islice(stream_of(source).rows(), 20))
    for index in (0, 7, 19):
        row = stream_of(source).row(index)
        assert np.array_equal(row["input_ids"], walked[index]["input_ids"])
        for one, other in zip(row["images"], walked[index]["images"], strict=True):
            assert np.array_equal(one["values"], other["values"]) and one["first"] == other["first"]


def test_images_kept_in_different_ways_do_not_mix(prepared):
    pixels, latents = prepared(PAIR), prepared(PAIR, vae=small_vae())
    with pytest.raises(ValueError, match="as pixels of 3 channels.*as latents of 4"):
        RowStream(DataConfig(row_length=64), [pixels, latents])


def test_text_alone_mixes_with_either(prepared):
    text = prepared(["text:instruction"])
    for vae in (None, small_vae()):
        source = prepared(PAIR, vae=vae)
        rows = list(RowStream(DataConfig(row_length=64, block_documents=40), [source, text]).block(0))
        assert all("images" in row for row in rows) and sum(len(row["images"]) for row in rows) == 20


def test_replaced_codes_are_units_of_speech_and_never_placeholders(tmp_path, trimodal_folder):
    processor = continuous(with_speech=True)
    template = TemplateConfig(["image:picture", "audio:sound"])
    config = SourceConfig("pairs", str(trimodal_folder), [template])
    source = TokenizedSource.prepare(config, Preparing(processor, tmp_path / "cache"))
    clean, noisy = (list(stream_of(source, row_length=128, replaced_codes=share).block(0)) for share in (0.0, 1.0))
    first, last = processor.modality_token_ranges["speech"]
    changed = 0
    for before, after in zip(clean, noisy, strict=True):
        differs = before["input_ids"] != after["input_ids"]
        assert (before["modality_ids"][differs] == 2).all()
        assert ((after["input_ids"][differs] >= first) & (after["input_ids"][differs] < last)).all()
        assert np.array_equal(before["labels"], after["labels"])
        changed += differs.sum()
    assert changed > 20


# -- one direction ----------------------------------------------------------------------------------------------------


def directed(source, direction, processor, segments=None, row_length=64):
    from training.data import single_direction_rows

    return documents_of(single_direction_rows(source, direction, row_length, segments), processor)


@pytest.mark.parametrize(
    "direction, names",
    [
        ("text-to-image", ("text:instruction", "image:source")),
        ("image-to-text", ("image:source", "text:instruction")),
        ("image", ("image:source",)),
        ("text", ("text:instruction",)),
        ("image+text-to-image", EDIT),
    ],
)
def test_directions_learn_the_last_segment_alone(prepared, processor, direction, names):
    source = prepared(EDIT, caption_first=None, targets="last")
    expected = []
    for record in range(RECORDS):
        parts = [segment_of(source, name, record) for name in names]
        ids, labels, positions, images = written_out(parts, processor, "last")
        if names[-1].startswith("image"):  # neither the BOI nor the end of the document, only the diffusion
            labels = (-100,) * len(ids)
        expected.append((ids, labels, positions, images))
    assert sorted(directed(source, direction, processor)) == sorted(expected)
    assert sorted(directed(source, direction, processor, names)) == sorted(expected)


def test_directions_of_templates_that_learn_the_last_segment(edits):
    def directions(segments, **fields):
        return directions_of(SourceConfig("edits", str(edits), [TemplateConfig(list(segments), **fields)]))

    assert directions(EDIT, caption_first=None, targets="last") == {"image+text-to-image": EDIT}
    assert directions(PAIR[::-1], caption_first=None, targets="last") == {"image-to-text": PAIR[::-1]}
    both = {"text-to-image": PAIR, "image-to-text": PAIR[::-1]}
    assert directions(PAIR, caption_first=0.8, targets="last") == directions(PAIR) == both


def test_speech_beside_continuous_images_has_its_directions(tmp_path, trimodal_folder):
    from training.data import single_direction_rows

    processor = continuous(with_speech=True)
    template = TemplateConfig(["image:picture", "audio:sound"])
    config = SourceConfig("pairs", str(trimodal_folder), [template])
    source = TokenizedSource.prepare(config, Preparing(processor, tmp_path / "cache"))
    for row in single_direction_rows(source, "image-to-speech", 64):
        assert np.array_equal(row["labels"] != -100, row["modality_ids"] == 2)
        assert all(image["clean"] for image in row["images"])
    for row in single_direction_rows(source, "speech-to-image", 64):
        assert (row["labels"] == -100).all() and not any(image["clean"] for image in row["images"])


def test_sounds_are_no_continuous_images(tmp_path):
    """A document of a sound and a picture: the sound's markers open nothing that is drawn."""
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "a.wav").write_bytes(wav(0.4))
    document = [{"type": "audio", "audio": "a.wav"}, {"type": "image", "image": "a.png"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"segments": document}))
    processor = continuous(with_speech=True)
    for targets in ("all", "last"):
        template = TemplateConfig(["document:segments"], targets=targets)
        source = TokenizedSource.prepare(
            SourceConfig("d", str(tmp_path / "d.jsonl"), [template]), Preparing(processor, tmp_path / "cache")
        )
        row = stream_of(source, block_documents=1).row(0)
        (image,) = row["images"]
        assert (image["clean"], image["first"]) == (False, False)
        speech = row["modality_ids"] == 2
        assert (row["labels"][speech] != -100).all() == (targets == "all")
