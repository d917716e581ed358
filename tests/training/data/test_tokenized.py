"""The tokenised cache: what it holds, when it is made again, and that it is whole or absent."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Value

from training.data import AugmentationConfig, Preparing, SourceConfig, TemplateConfig, TokenizedSource

from .conftest import ToyProcessor, png


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_cache_holds_the_processors_ids(prepare, pair_source, processor):
    source = prepare(pair_source(("text:name", "image:picture", "audio:sound")))
    assert len(source) == 40
    record = source[7]
    assert record["text:name"] == [processor.encode_segment({"type": "text", "text": "thing hh"})]
    assert record["image:picture"][0][0] == ToyProcessor.BOI and len(record["image:picture"][0]) == 6
    # 0.675 s are 10,800 samples: two whole units.
    assert record["audio:sound"][0] == [5, 279 + int(7 / 40 * 16), 279 + int(7 / 40 * 16), 6]


def test_columns_equal_the_data_set(prepare, pair_source):
    source = prepare(pair_source(), augmentation=AugmentationConfig(variants=3))
    for segment, column in source.columns.items():
        for record in range(40):
            for variant in range(3):
                ids = source[record][str(segment)]
                assert column.ids(record, variant).tolist() == ids[variant % len(ids)]
                assert column.lengths[record].tolist() == [len(version) for version in ids]


def test_columns_are_right_when_the_file_has_many_chunks(prepare, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    Dataset.from_dict({"text": [str(number) for number in range(3000)]}).to_parquet(str(folder / "train.parquet"))
    source = prepare(SourceConfig("many", str(folder), [TemplateConfig(["text:text"])]))
    column = next(iter(source.columns.values()))
    assert all(bytes(int(t) - 7 for t in column.ids(i, 0)).decode() == str(i) for i in range(3000))


def test_second_preparation_reads_the_cache(pair_source, processor, cache):
    first = TokenizedSource.prepare(pair_source(), Preparing(processor, cache))
    encoded = processor.images_encoded
    second = TokenizedSource.prepare(pair_source(), Preparing(processor, cache))
    assert processor.images_encoded == encoded and second.folder == first.folder


def test_what_changes_tokens_changes_the_fingerprint(pair_source, processor, cache, trimodal_folder):
    def fingerprint(source=None, chosen=processor, augmentation=None):
        return TokenizedSource.prepare(
            source or pair_source(), Preparing(chosen, cache, augmentation=augmentation)
        ).fingerprint

    prints = [
        fingerprint(),
        fingerprint(chosen=ToyProcessor("other")),
        fingerprint(pair_source(("text:name", "audio:sound"))),
        fingerprint(pair_source(source={"limit": 5})),
        fingerprint(augmentation=AugmentationConfig(variants=2)),
        fingerprint(augmentation=AugmentationConfig(variants=2, seed=1)),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(pair_source(caption_first=0.1, weight=3.0)) == prints[0]


def test_changed_files_change_the_fingerprint(pair_source, processor, cache, trimodal_folder):
    before = TokenizedSource.prepare(pair_source(), Preparing(processor, cache))
    path = trimodal_folder / "train.parquet"
    Dataset.from_parquet(str(path)).select(range(10)).to_parquet(str(path))
    after = TokenizedSource.prepare(pair_source(), Preparing(processor, cache))
    assert after.fingerprint != before.fingerprint and len(after) == 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_preparation_leaves_nothing_that_is_read(pair_source, cache, error):
    class Interrupted(ToyProcessor):
        def encode_images(self, pictures):
            raise error

    with pytest.raises(error):
        TokenizedSource.prepare(pair_source(), Preparing(Interrupted(), cache))
    assert not list(cache.rglob("meta.json"))
    assert len(TokenizedSource.prepare(pair_source(), Preparing(ToyProcessor(), cache))) == 40


def test_several_processes_give_the_same_tokens(pair_source, processor, tmp_path):
    one = TokenizedSource.prepare(pair_source(), Preparing(processor, tmp_path / "one"))
    two = TokenizedSource.prepare(pair_source(), Preparing(processor, tmp_path / "two", workers=2))
    assert [one[i] for i in range(40)] == [two[i] for i in range(40)]


def test_meta_states_the_fingerprint(prepare, pair_source):
    source = prepare(pair_source())
    meta = json.loads((source.folder / "meta.json").read_text())
    assert meta["fingerprint"] == source.fingerprint and meta["records"] == 40


def test_lists_of_words_are_joined_and_formats_filled(prepare, tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    table = Dataset.from_dict({"word": ["dog"], "about": ["a pet"], "more": [["hound", "cur"]], "note": [None]})
    table.to_parquet(str(folder / "train.parquet"))
    source = prepare(SourceConfig("words", str(folder), [TemplateConfig(["text:{word}: {about} ({more}). {note}"])]))
    (ids,) = next(iter(source[0].values()))
    assert bytes(token - 7 for token in ids).decode() == "dog: a pet (hound, cur)."


@pytest.fixture
def broken_folder(tmp_path):
    """Four records: a good one, an empty caption, a picture that does not decode, a picture that is not there."""
    binary = {"bytes": Value("binary"), "path": Value("string")}
    pictures = [png("red"), png("red"), b"not a picture", None]
    rows = {"name": ["good", " ", "bad", "none"], "picture": [{"bytes": p, "path": None} for p in pictures]}
    rows["picture"][3]["path"] = str(tmp_path / "missing.png")
    table = Dataset.from_dict(rows, features=Features(name=Value("string"), picture=binary))
    folder = tmp_path / "broken"
    folder.mkdir()
    table.to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (["text:name"], r"source 'x', record 1: the text of text:name is empty.*on_error: skip"),
        (["image:picture"], r"source 'x', record 2: column 'picture': the picture does not decode"),
    ],
)
def test_a_bad_record_is_refused_by_name(broken_folder, processor, cache, segments, message):
    config = SourceConfig("x", str(broken_folder), [TemplateConfig(segments)])
    with pytest.raises(ValueError, match=message):
        TokenizedSource.prepare(config, Preparing(processor, cache))
    assert not list(cache.rglob("meta.json"))


def test_a_missing_file_is_refused_by_name(broken_folder, processor, cache):
    rows = {"picture": [{"bytes": None, "path": "missing.png"}]}
    features = Features(picture={"bytes": Value("binary"), "path": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(str(broken_folder / "train.parquet"))
    config = SourceConfig("x", str(broken_folder), [TemplateConfig(["image:picture"])])
    with pytest.raises(ValueError, match=r"column 'picture': the picture file does not exist: .*missing.png"):
        TokenizedSource.prepare(config, Preparing(processor, cache))


def test_bad_records_are_skipped_and_counted(broken_folder, prepare):
    template = TemplateConfig(["text:name", "image:picture"])
    source = prepare(SourceConfig("x", str(broken_folder), [template], on_error="skip"))
    assert len(source) == 1 and source.records.tolist() == [0]
    assert source.skipped == {
        "the text of text:name is empty": 1,
        "column 'picture': the picture does not decode": 1,
        "column 'picture': the picture file leads outside the folder of its source": 1,
    }


def test_what_was_finished_before_a_bad_record_is_kept_when_it_is_skipped(tmp_path, processor, monkeypatch):
    monkeypatch.setattr("training.data.preparing.preparation.CHUNK_BYTES", 1)
    (tmp_path / "0.jsonl").write_text('{"text": "a"}\n' * 200 + '{"text": " "}\n')
    config = SourceConfig("x", f"{tmp_path}/*.jsonl", [TemplateConfig(["text:text"])])
    with pytest.raises(ValueError, match="shard 0.jsonl, record 200: the text of text:text is empty"):
        TokenizedSource.prepare(config, Preparing(processor, tmp_path / "cache"))
    config.on_error, encoded = "skip", []
    monkeypatch.setattr(processor, "encode_segment", lambda segment: encoded.append(segment) or [9])
    source = TokenizedSource.prepare(config, Preparing(processor, tmp_path / "cache"))
    assert len(source) == 200 and source.skipped == {"the text of text:text is empty": 1}
    # Three batches of 64 were whole.
    assert len(encoded) == 200 - 3 * 64
    config.on_error = "raise"
    with pytest.raises(ValueError, match="was prepared with on_error: skip, and left out"):
        TokenizedSource.prepare(config, Preparing(processor, tmp_path / "cache"))


def test_a_source_without_a_usable_record_is_refused(broken_folder, processor, cache):
    table = Dataset.from_parquet(str(broken_folder / "train.parquet")).select([1])
    table.to_parquet(str(broken_folder / "train.parquet"))
    config = SourceConfig("x", str(broken_folder), [TemplateConfig(["text:name"])], on_error="skip")
    with pytest.raises(ValueError, match="no usable record"):
        TokenizedSource.prepare(config, Preparing(processor, cache))


def test_variant_zero_is_the_record_as_it_is(prepare, pair_source):
    plain = prepare(pair_source(("image:picture", "audio:sound"), caption_first=None))
    changed = prepare(pair_source(("image:picture", "audio:sound"), caption_first=None), AugmentationConfig(variants=4))
    for record in range(40):
        for segment in ("image:picture", "audio:sound"):
            assert changed[record][segment][0] == plain[record][segment][0]
            assert len(changed[record][segment]) == 4
    sounds = [changed[record]["audio:sound"] for record in range(40)]
    assert np.mean([len({tuple(ids) for ids in versions}) > 1 for versions in sounds]) > 0.5
