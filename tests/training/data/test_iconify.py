"""The adapter of Iconify's icons on a made-up package, laid out as the real one is."""

import hashlib
import io
import json
from collections import Counter, defaultdict

import datasets
import numpy as np
import pytest
from PIL import Image

from training.data.adapters import iconify
from training.data.config import DataConfig, SourceConfig, TemplateConfig
from training.data.reading.sources import data_cards, open_source


pytest.importorskip("resvg_py")

CONCEPTS = [
    f"{colour}-{thing}" for colour in ("red", "old", "big", "wet") for thing in ("fox", "hat", "jug", "key", "oak")
]
LICENCES = {
    "alpha": "MIT",
    "beta": "Apache-2.0",
    "gamma": "CC-BY-4.0",
    "delta": "CC0-1.0",
    "fxemoji": "MIT",
    "sharing": "CC-BY-SA-4.0",
    "gnu": "GPL-3.0-or-later",
    "untold": None,
}


def square(text: str, side: int = 16) -> str:
    """A body that is one rectangle, of a colour of its own."""
    return (
        f'<path fill="#{hashlib.sha256(text.encode()).hexdigest()[:6]}" d="M1 1h{side - 2}v{side - 2}h-{side - 2}z"/>'
    )


def info(prefix: str, **more) -> dict:
    licence = {"title": f"Licence of {prefix}", "url": f"https://licence.example/{prefix}"}
    if LICENCES.get(prefix, "MIT"):
        licence["spdx"] = LICENCES.get(prefix, "MIT")
    author = {"name": f"Author of {prefix}", "url": f"https://author.example/{prefix}"}
    return {
        "name": f"The {prefix} | set",
        "license": licence,
        "author": author,
        "palette": True,
        "category": "Emoji",
    } | more


def write_package(folder, sets: dict[str, dict], **infos) -> None:
    (folder / "json").mkdir(parents=True)
    collections = {prefix: info(prefix, **infos.get(prefix, {})) for prefix in sets}
    (folder / "collections.json").write_text(json.dumps(collections))
    for prefix, data in sets.items():
        (folder / "json" / f"{prefix}.json").write_text(json.dumps({"prefix": prefix} | data))


def icons_of(prefix: str, keys) -> dict:
    return {"icons": {key: {"body": square(f"{prefix} {key}")} for key in keys}}


@pytest.fixture
def package(tmp_path):
    """Every concept in 3 to 5 styles, spelled in several ways, beside sets that are left out by default."""
    sets = {
        prefix: icons_of(prefix, CONCEPTS) for prefix in ("alpha", "beta", "sharing", "gnu", "untold", "grey", "brand")
    }
    sets["gamma"] = icons_of("gamma", [f"{key}-1" for key in CONCEPTS] + [f"{key}-2" for key in CONCEPTS[:8]])
    sets["delta"] = icons_of("delta", CONCEPTS[:12])
    sets["fxemoji"] = icons_of("fxemoji", [key.replace("-", "") for key in CONCEPTS[:6]] + ["severalwordsinone"])
    write_package(tmp_path / "package", sets, grey={"palette": False}, brand={"category": "Logos"})
    return tmp_path / "package"


def make(package, out, *options) -> list[dict]:
    """Run the command, and return the rows of all splits, each with its split."""
    iconify.main(["--package", str(package), "--out", str(out), "--size", "8", *options])
    loaded = datasets.load_dataset(str(out), cache_dir=str(out.parent / "cache"))
    return [row | {"split": split} for split, rows in loaded.items() for row in rows]


def pixels(icon: iconify.Icon, size: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(iconify.svg_png(icon.svg(), size))).convert("RGB")).astype(int)


def read(data: dict, max_body: int = 60_000) -> tuple[dict[str, iconify.Icon], Counter]:
    left_out = Counter()
    icons = iconify.read_icons({"prefix": "set", "aliases": {}} | data, max_body, left_out)
    return {icon.key: icon for icon in icons}, left_out


def test_spellings_of_a_concept_have_one_name(package, tmp_path):
    rows = make(package, tmp_path / "out")
    styles = defaultdict(Counter)
    for row in rows:
        styles[row["name"]][row["style"]] += 1
    assert set(styles) == {key.replace("-", " ") for key in CONCEPTS}
    for place, key in enumerate(CONCEPTS):
        expected = {"alpha": 1, "beta": 1, "gamma": 2 if place < 8 else 1}
        expected |= {"delta": 1} if place < 12 else {}
        expected |= {"fxemoji": 1} if place < 6 else {}
        assert styles[key.replace("-", " ")] == expected
    row = next(row for row in rows if row["id"] == "fxemoji:redfox")
    assert (row["name"], row["style"], row["caption"]) == ("red fox", "fxemoji", "red fox, fxemoji")


def test_splits_hold_out_what_they_say(package, tmp_path, monkeypatch):
    monkeypatch.setattr(iconify, "UNSEEN_CONCEPTS", 0.25)
    rows = make(package, tmp_path / "out")
    assert len({row["id"] for row in rows}) == len(rows) == 20 + 20 + 28 + 12 + 6
    splits = defaultdict(set)
    for row in rows:
        splits[row["name"], row["style"]].add(row["split"])
    assert all(len(found) == 1 for found in splits.values())  # variants of a pair stay together
    for name in {row["name"] for row in rows}:
        found = {style: next(iter(split)) for (other, style), split in splits.items() if other == name}
        is_unseen = int(hashlib.sha256(f"icons {name}".encode()).hexdigest()[:8], 16) / 2**32 < 0.25
        pairs = [style for style, split in found.items() if split == "unseen_pairs"]
        if is_unseen:
            assert set(found.values()) == {"unseen_concepts"}
        else:
            assert len(pairs) == (len(found) >= 4) and set(found.values()) <= {"unseen_pairs", "train"}
    assert {row["split"] for row in rows} == {"train", "unseen_pairs", "unseen_concepts"}
    held = {style for (_, style), split in splits.items() if split == {"unseen_pairs"}}
    assert len(held) > 1  # not always the same style


def test_rows_of_a_concept_stand_together_so_that_a_limit_keeps_its_styles(package, tmp_path):
    names = [row["name"] for row in make(package, tmp_path / "out") if row["split"] == "train"]
    changes = sum(one != other for one, other in zip(names, names[1:]))
    assert changes == len(set(names)) - 1 and names != sorted(names)


def test_other_licences_and_other_kinds_of_sets_are_taken_by_name_only(package, tmp_path):
    rows = make(package, tmp_path / "all")
    assert {row["id"].partition(":")[0] for row in rows} == {"alpha", "beta", "gamma", "delta", "fxemoji"}
    rows = make(package, tmp_path / "some", "--sets", "gnu", "sharing", "untold", "alpha")
    found = {(row["style"], row["license"], row["author"]) for row in rows}
    assert found == {
        ("alpha", "MIT", "Author of alpha"),
        ("gnu", "GPL-3.0-or-later", "Author of gnu"),
        ("sharing", "CC-BY-SA-4.0", "Author of sharing"),
        ("untold", "Licence of untold", "Author of untold"),
    }


def test_the_card_states_every_set_and_every_split(package, tmp_path):
    rows = make(package, tmp_path / "out")
    template = TemplateConfig(segments=["text:name"])
    config = DataConfig(sources=[SourceConfig(name="icons", path=str(tmp_path / "out"), templates=[template])])
    card = data_cards(config)[str(tmp_path / "out")]
    assert (card["license"], card["license_name"]) == ("other", "by-set")
    counts = Counter(row["id"].partition(":")[0] for row in rows)
    for prefix, count in counts.items():
        assert (
            f"| `{prefix}` | The {prefix} \\| set | {count} | {LICENCES[prefix]}, https://licence.example/{prefix} "
            f"| Author of {prefix}, https://author.example/{prefix} |"
        ) in card["attribution"]
    text = (tmp_path / "out" / "README.md").read_text()
    for split in iconify.SPLITS:
        of_split = [row["name"] for row in rows if row["split"] == split]
        assert not of_split or f"| `{split}` | {len(of_split)} | {len(set(of_split))} |" in text
    assert "- 1 with several words written as one" in text and "sharing" not in text


def test_a_recipe_reads_a_split_by_its_name(package, tmp_path):
    rows = make(package, tmp_path / "out")
    for split in ("train", "unseen_pairs"):
        template = TemplateConfig(segments=["text:{name}, {style}", "image:image"])
        source = open_source(SourceConfig(name="x", path=str(tmp_path / "out"), split=split, templates=[template]))
        assert [record["id"] for record in source] == [row["id"] for row in rows if row["split"] == split]


def test_the_data_set_is_the_same_each_time(package, tmp_path):
    for number in range(2):
        make(package, tmp_path / str(number))
    files = [
        {path.relative_to(tmp_path / str(number)): path.read_bytes() for path in (tmp_path / str(number)).rglob("*.*")}
        for number in range(2)
    ]
    assert files[0] == files[1] and len(files[0]) >= 3


def test_names_that_an_emoji_set_has_for_one_drawing_are_one_concept():
    def icon(style, name):
        return iconify.Icon(style, name, style, name, "", 0, 0, 16, 16, 0, False, False)

    icons = [icon("a", "wolf"), icon("b", "wolf face"), icon("c", "wolf"), icon("a", "bell"), icon("a", "gong")]
    joined = iconify.name_concepts(icons, [("wolf face", "wolf"), ("lupus", "wolf"), ("bell", "gong")])
    assert joined["wolfface"] == joined["wolf"] == "wolf"
    assert joined["bell"] == "bell" and joined["gong"] == "gong"  # one set draws both
    icons = [icon("a", "e mail"), icon("b", "email"), icon("c", "mail")]
    assert iconify.name_concepts(icons, [])["email"] == "e mail"  # of equally many styles, more words


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("wrapped-gift-2", "wrapped gift"),
        ("keycap-7", "keycap 7"),
        ("flag-for-flag-chad", "flag chad"),
        ("flag-for-chad", "flag chad"),
        ("flag-in-hole", "flag in hole"),
        ("2", "2"),
    ],
)
def test_keys_become_words(key, name):
    assert iconify.spell(key) == name


# A body of four rectangles without any symmetry, on 4 x 2 units that do not begin at 0.
BODY = (
    '<path fill="#f00" d="M3 5h1v1h-1z"/><path fill="#0f0" d="M4 5h2v1h-2z"/>'
    '<path fill="#00f" d="M6 5h1v2h-1z"/><path fill="#ff0" d="M3 6h2v1h-2z"/>'
)
BOX = {"left": 3, "top": 5, "width": 4, "height": 2}


def naive(turns: int, flip_x: bool, flip_y: bool) -> np.ndarray:
    """The drawing as an array of 8 pixels a unit, flipped and then turned clockwise, in the middle of white."""
    red, lime, blue, yellow, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)
    drawing = np.array([[red, lime, lime, blue], [yellow, yellow, white, blue]])
    drawing = drawing[:, ::-1] if flip_x else drawing
    drawing = drawing[::-1] if flip_y else drawing
    drawing = np.rot90(drawing, -turns).repeat(8, axis=0).repeat(8, axis=1)
    square = np.full((32, 32, 3), 255)
    top, left = (32 - drawing.shape[0]) // 2, (32 - drawing.shape[1]) // 2
    square[top : top + drawing.shape[0], left : left + drawing.shape[1]] = drawing
    return square


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("flip_y", [False, True])
def test_flips_and_turns_are_those_of_a_naive_drawing(turns, flip_x, flip_y):
    change = {"rotate": turns, "hFlip": flip_x, "vFlip": flip_y}
    icons, _ = read({"icons": {"own": {"body": BODY} | BOX | change}})
    assert np.array_equal(pixels(icons["own"], 32), naive(turns, flip_x, flip_y))
    # The same by an alias, in a set that has the box.
    icons, _ = read({"icons": {"own": {"body": BODY}}, "aliases": {"other": {"parent": "own"} | change}} | BOX)
    assert np.array_equal(pixels(icons["other"], 32), naive(turns, flip_x, flip_y))


def test_changes_of_aliases_add_up():
    aliases = {
        "b": {"parent": "a", "rotate": 3, "hFlip": True},
        "c": {"parent": "b", "rotate": 2, "hFlip": True, "vFlip": True},
    }
    icons, _ = read({"icons": {"a": {"body": BODY, "rotate": 1} | BOX}, "aliases": aliases})
    assert (icons["c"].turns, icons["c"].flip_x, icons["c"].flip_y) == ((1 + 3 + 2) % 4, False, True)
    assert np.array_equal(pixels(icons["c"], 32), naive(2, False, True))


def test_boxes_come_from_the_icon_then_the_set_then_16_pixels():
    icons, _ = read({"icons": {"a": {"body": "", "width": 4}, "b": {"body": "", "left": 2}}, "height": 32})
    assert [(icon.left, icon.top, icon.width, icon.height) for icon in icons.values()] == [
        (0, 0, 4, 32),
        (2, 0, 16, 32),
    ]


def test_icons_that_are_not_taken_are_counted():
    icons = dict.fromkeys(["hand", "hand-medium-light-skin-tone", "baby-tone3", "battery-medium"], {"body": "x"})
    icons |= {f"arm-{tone}": {"body": "x"} for tone in ("light", "medium-light", "medium", "medium-dark", "dark")}
    icons |= {"gone": {"body": "x", "hidden": True}, "huge": {"body": "x" * 11}}
    icons |= {f"cup-{size}": {"body": "x"} for size in (16, 24, 48)} | {"cup-flat": {"body": "x"}}
    aliases = {"palm": {"parent": "hand"}, "lost": {"parent": "none", "hFlip": True}}
    aliases |= {"one": {"parent": "two", "hFlip": True}, "two": {"parent": "one", "hFlip": True}}
    suffixes = {"": "Line", "flat": "Flat", "16": "16", "24": "24", "48": "48"}
    taken, left_out = read({"icons": icons, "aliases": aliases, "suffixes": suffixes}, max_body=10)
    assert {key: (icon.style, icon.name) for key, icon in taken.items()} == {
        "hand": ("set", "hand"),
        "battery-medium": ("set", "battery medium"),
        "cup-48": ("set", "cup"),
        "cup-flat": ("set-flat", "cup"),
    }
    assert left_out == {
        "skin tones": 7,
        "other names of an icon": 1,
        "hidden by their set or without a drawing": 4,
        "smaller sizes of an icon": 2,
        "longer than --max-body": 1,
    }


def test_pictures_that_show_nothing_new_are_left_out(tmp_path):
    white = '<path fill="#fff" d="M0 0h16v16h-16z"/>'
    bodies = {"a": square("a"), "b": square("a"), "c": white, "d": "<broken", "e": square("e")}
    sets = {"alpha": {"icons": {key: {"body": body} for key, body in bodies.items()}}}
    write_package(tmp_path / "package", sets)
    assert {row["name"] for row in make(tmp_path / "package", tmp_path / "out")} == {"a", "e"}
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\n- 1 all white\n- 1 that do not render\n- 1 that look as another icon\n" in text


def refusal(capsys, *options) -> str:
    with pytest.raises(SystemExit):
        iconify.main([str(option) for option in options])
    return capsys.readouterr().err


def test_a_folder_that_holds_something_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not an empty folder" in refusal(capsys, "--package", tmp_path / "none", "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_cannot_be_used_is_named(package, tmp_path, capsys):
    ways = ["--package", package, "--out", tmp_path / "out"]
    assert "collections.json does not exist" in refusal(capsys, "--package", tmp_path, "--out", tmp_path / "out")
    assert "'gama', which is no set of the package; did you mean gamma?" in refusal(capsys, *ways, "--sets", "gama")
    assert "--size 0 must be" in refusal(capsys, *ways, "--size", "0")
    assert "no icon of --sets fxemoji is left" in refusal(capsys, *ways, "--sets", "fxemoji")
    (package / "json" / "beta.json").write_text('{"prefix": "beta", "icons"')
    assert "beta.json is broken" in refusal(capsys, *ways)
    (package / "json" / "beta.json").write_text('{"prefix": "alpha"}')
    assert "beta.json is no icon set 'beta'" in refusal(capsys, *ways)
    (package / "json" / "beta.json").unlink()
    assert "beta.json does not exist" in refusal(capsys, *ways)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package"]
