"""The adapters on packages of a few files, laid out as the real ones are."""

import struct

import datasets
import numpy as np
import pytest

from training.data.adapters import amazon_queen, emoji_edits, emoji_styles, tuxpaint
from training.data.adapters.parquet_folder import by_group, write_folder
from training.data.config import carried_path

from .conftest import png, wav


@pytest.fixture
def load(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("datasets"))
    return lambda folder, config: datasets.load_dataset(str(folder), config, cache_dir=cache)


def dialogue_table(dialogue: int, joe: list[tuple[int, str]], person: list[tuple[int, str]]) -> bytes:
    def entries(lines):
        packed = b""
        for number, text in lines:
            entry = struct.pack(">HHB", 0, number, len(text)) + text.encode()
            packed += entry + bytes(-len(entry) % 4)
        return packed

    first = entries(joe)
    header = struct.pack(">5h", 1, 9, dialogue, len(joe) - 1, len(person) - 1) + bytes(12)
    header += struct.pack(">H", 32 + 96 + len(first)) + bytes(8)
    return bytes(20) + header + bytes(96) + first + entries(person)


def archive(files: dict[str, bytes]) -> bytes:
    offset = 15 + 21 * len(files)
    table, body = b"", b""
    for name, content in files.items():
        table += struct.pack(">12sBII", name.encode(), 1, offset + len(body), len(content))
        body += content
    return b"QTBLCEM10\0\0\0\1" + struct.pack(">H", len(files)) + table + body


def test_clips_are_paired_with_the_parts_of_their_lines():
    table = dialogue_table(12, [(6, "Hello there.*03How are you?*AF"), (38, "Bye.")], [(6, "*00I am well.")])
    files = {"A.DOG": table, "120006J1.SB": b"one", "120006J2.SB": b"two", "120006P2.SB": b"three", "C101.SB": b"?"}
    rows = amazon_queen.paired_clips(amazon_queen.read_archive(archive(files)))
    assert [(row["id"], row["text"], row["speaker"], row["audio"]["bytes"]) for row in rows] == [
        ("120006J1", "Hello there.", "joe", b"one"),
        ("120006J2", "How are you?", "joe", b"two"),
        ("120006P2", "I am well.", "person 12", b"three"),
    ]


def test_another_file_is_no_archive():
    with pytest.raises(ValueError, match="give the package's queen.1c"):
        amazon_queen.read_archive(b"RIFF....")


def test_the_amazon_queen_command_writes_a_data_set(tmp_path, load):
    files = {"A.DOG": dialogue_table(3, [(1, "Hi.")], [(1, "Ho.")]), "030001J1.SB": b"a", "030001P1.SB": b"b"}
    (tmp_path / "queen.1c").write_bytes(archive(files))
    amazon_queen.main([str(tmp_path), "--out", str(tmp_path / "out")])
    (rows,) = load(tmp_path / "out", "default").values()
    assert rows["text"] == ["Hi.", "Ho."]


def test_a_command_without_its_package_says_so(tmp_path, capsys):
    for command in (amazon_queen, tuxpaint):
        with pytest.raises(SystemExit):
            command.main([str(tmp_path), "--out", str(tmp_path / "out")])
        assert "holds no" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def stamps(tmp_path):
    folder = tmp_path / "stamps" / "animals"
    folder.mkdir(parents=True)
    for index in range(30):
        (folder / f"cat{index}.png").write_bytes(png((index, 0, 0), size=(40, 20)))
        (folder / f"cat{index}.txt").write_text(f"Cat {index}.\nfr.utf8=Chat {index}.\nde.utf8=\n")
        for suffix in ("desc", "desc_fr", "desc_de"):
            (folder / f"cat{index}_{suffix}.wav").write_bytes(wav(0.1))
    (folder / "ghost.txt").write_text("No picture.")
    return folder.parent


def test_stamps_are_joined_with_their_recordings_and_transcripts(stamps):
    captioned, spoken, left_out = tuxpaint.read_stamps(stamps, 32)
    assert len(captioned) == 30 and len(spoken) == 60
    row = next(row for row in spoken if row["id"] == "animals/cat7" and row["language"] == "fr")
    assert (row["text"], row["english"], row["category"]) == ("Chat 7.", "Cat 7.", "animals")
    assert left_out == {
        "captions without a picture": 1,
        "pictures that do not render": 0,
        "recordings without a transcript": 30,
    }


def test_a_stamp_is_on_one_side_in_every_language(stamps, tmp_path, load):
    tuxpaint.main([str(stamps), "--out", str(tmp_path / "out"), "--size", "32"])
    spoken, captioned = load(tmp_path / "out", "spoken"), load(tmp_path / "out", "stamps")
    assert not set(spoken["train"]["id"]) & set(spoken["validation"]["id"])
    assert set(spoken["validation"]["id"]) == set(captioned["validation"]["id"])
    assert captioned["train"][0]["image"].size == (32, 32)


def test_styles_take_name_and_split_of_the_carried_concept(tmp_path, load):
    folder = tmp_path / "img/twitter/64"
    folder.mkdir(parents=True)
    split_of = {}
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_parquet(
            str(carried_path() / "emoji" / f"{split}.parquet"), columns=["id", "name"], cache_dir=str(tmp_path / "c")
        )
        for row in rows.select(range(3)):
            (folder / f"{row['id'].lower()}.png").write_bytes(png("red"))
            split_of[row["id"]] = (split, row["name"])
    (folder / "ffff.png").write_bytes(png("red"))
    emoji_styles.main(["--twitter", str(tmp_path), "--out", str(tmp_path / "out")])
    found = {
        row["id"]: (split, row["name"]) for split, rows in load(tmp_path / "out", "default").items() for row in rows
    }
    assert found == split_of


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    emoji_edits.main(["--out", str(folder / "out"), "--limit", "12"])
    return datasets.load_dataset(str(folder / "out"), cache_dir=str(folder / "cache"))


def test_every_edit_is_what_it_says(edits):
    seen = set()
    for row in edits["train"]:
        source, target = (np.asarray(row[name]).astype(float) for name in ("source", "target"))
        assert np.abs(source - target).mean() >= emoji_edits.NOTICEABLE
        exact = {
            "mirror": source[:, ::-1],
            "upside-down": source[::-1, ::-1],
            "quarter-turn": np.rot90(source, -1),
            "darker": 255 * (source / 255) ** 2,
            "lighter": 255 * (source / 255) ** 0.5,
            "grey": np.repeat(source @ [[0.299], [0.587], [0.114]], 3, axis=2),
        }
        if row["edit"] in exact:
            assert np.abs(target - exact[row["edit"]]).max() <= 1
        elif row["edit"] == "smaller":
            halved = source.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
            assert np.abs(target[16:48, 16:48] - halved).max() <= 1
            assert (np.delete(target, range(16, 48), axis=0) == 255).all()
        else:
            hue, saturation, value = np.moveaxis(np.asarray(row["target"].convert("HSV")).astype(int), -1, 0)
            away = (hue - emoji_edits.COLOURS[row["edit"]] * 256 / 360 + 128) % 256 - 128
            weights = saturation * value
            assert weights[np.abs(away) <= 10].sum() > 0.2 * weights.sum()
            assert np.array_equal(np.asarray(row["source"].convert("HSV"))[..., 2], value)
        assert row["instruction"] == emoji_edits.EDITS[row["edit"]][0]
        seen.add(row["edit"])
    assert seen == set(emoji_edits.EDITS)


def test_edits_keep_the_carried_splits(edits, carried):
    for split in ("train", "validation"):
        names = datasets.load_dataset(carried, "emoji", split=split)["name"][:12]
        assert set(edits[split]["name"]) <= set(names) and len(set(edits[split]["name"])) == 12


def test_edits_of_symmetric_and_grey_pictures_are_left_out():
    every = list(emoji_edits.EDITS)

    def made(picture):
        return {row["edit"] for row in emoji_edits.edited({"id": "x", "name": "x", "image": picture}, every)}

    disc = np.full((64, 64, 3), 255, np.uint8)
    disc[16:48, 16:48] = (60, 160, 60)
    turned = {"mirror", "upside-down", "quarter-turn"}
    assert made(disc) == set(every) - turned - {"green", "yellow"}  # olive is too near
    disc[16:48, 16:48] = 120
    assert made(disc) == {"darker", "lighter", "smaller"}


def test_edits_are_the_same_each_time(tmp_path):
    files = []
    for number in range(2):
        emoji_edits.main(["--out", str(tmp_path / str(number)), "--limit", "3", "--edits", "mirror", "blue"])
        folder = tmp_path / str(number)
        files.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert files[0] == files[1]
    assert {str(path) for path in files[0]} >= {"README.md", "licenses/emoji-data.txt", "default/train.parquet"}
    assert "license: apache-2.0" in files[0][next(path for path in files[0] if path.name == "README.md")].decode()


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ("1f44d-1f3fb", ("1F44D", "light skin tone")),
        ("0023-fe0f-20e3", ("0023-20E3", "")),
        ("1F3FD", ("1F3FD", "")),
        ("1F469-1F3FF-200D-1F680", ("1F469-200D-1F680", "dark skin tone")),
    ],
)
def test_skin_tones_are_told_from_the_concept(points, expected):
    assert emoji_styles.base_concept(points) == expected


def test_groups_stay_whole():
    rows = [{"group": str(index % 40)} for index in range(400)]
    splits = by_group(rows, "group", share=0.25)
    sides = {split: {row["group"] for row in rows} for split, rows in splits.items()}
    assert not sides["train"] & sides["validation"] and sides["validation"]
    assert len(splits["train"]) + len(splits["validation"]) == 400


def test_nothing_is_left_when_writing_fails(tmp_path):
    features = datasets.Features(a=datasets.Value("int64"))
    with pytest.raises(Exception, match="convert"):
        write_folder(tmp_path / "out", {"default": (features, {"train": [{"a": "x"}]})}, "card")
    assert list(tmp_path.iterdir()) == []
