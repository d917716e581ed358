"""Tux Paint's stamps: pictures with captions, and the captions spoken by people in many languages, as a data set.

Get the package (161 MB, GPL-2):
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb unpacked
    python -m training.data.adapters.tuxpaint unpacked --out DIR

Two configurations: `stamps`, every captioned stamp once with its English caption, and `spoken`, every spoken
description with its transcript and picture. Stamps drawn as SVG need resvg-py (pip install resvg-py).
"""

import argparse
import re
from pathlib import Path

from datasets import Audio, Features, Image, Value

from training.data.adapters.parquet_folder import by_group, print_counts, write_folder

from .pictures import square_png, svg_png


STAMP_FEATURES = Features(id=Value("string"), text=Value("string"), category=Value("string"), image=Image())
SPOKEN_FEATURES = Features(
    id=Value("string"),
    language=Value("string"),
    text=Value("string"),
    english=Value("string"),
    category=Value("string"),
    image=Image(),
    audio=Audio(decode=False),
)
_LEFT_OUT = ("captions without a picture", "pictures that do not render", "recordings without a transcript")
CARD = """# Tux Paint's stamps with captions and spoken descriptions

`stamps`: picture and English caption. `spoken`: the description read by a person (`audio`), its transcript (`text`) in
`language`, the English caption and the picture. A stamp is in the same split in every language and in both
configurations. GPL-2, from the Debian package `tuxpaint-stamps-default`; made by
`python -m training.data.adapters.tuxpaint`.
"""


def read_captions(path: Path) -> dict[str, str]:
    """Read captions: language -> caption. The first line is English, the others are `xx.utf8=caption`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    captions = {"en": lines[0].strip()} if lines else {}
    for line in lines[1:]:
        if match := re.match(r"([\w@]+)\.utf8=(.+)", line):
            captions[match[1]] = match[2].strip()
    return {language: caption for language, caption in captions.items() if caption}


def recordings(stamp: Path) -> dict[str, Path]:
    """Find recordings of a stamp: language -> file (`name_desc.ogg` is English, `name_desc_xx.ogg` another)."""
    found = {}
    for path in sorted(stamp.parent.glob(f"{stamp.name}_desc*")):
        match = re.fullmatch(re.escape(stamp.name) + r"_desc(?:_([\w@]+))?\.(ogg|wav)", path.name)
        if match:
            found.setdefault(match[1] or "en", path)
    return found


def read_stamps(root: Path, size: int) -> tuple[list[dict], list[dict], dict[str, int]]:
    """Make rows of `stamps` and rows of `spoken`, and count the stamps that were left out by reason."""
    stamps, spoken, left_out = [], [], dict.fromkeys(_LEFT_OUT, 0)
    for file in sorted(root.rglob("*.txt")):
        stem = file.with_suffix("")
        captions = read_captions(file)
        png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
        if not captions.get("en") or not (png.is_file() or svg.is_file()):
            left_out[_LEFT_OUT[0]] += 1
            continue
        try:
            picture = svg_png(svg.read_text(encoding="utf-8"), size) if svg.is_file() else square_png(str(png), size)
        except ValueError:
            left_out[_LEFT_OUT[1]] += 1
            continue
        shared = {
            "id": str(stem.relative_to(root)),
            "category": str(stem.parent.relative_to(root)),
            "image": {"bytes": picture, "path": f"{stem.name}.png"},
        }
        stamps.append(shared | {"text": captions["en"]})
        for language, path in recordings(stem).items():
            if language not in captions:
                left_out[_LEFT_OUT[2]] += 1
                continue
            sound = {"bytes": path.read_bytes(), "path": path.name}
            texts = {"language": language, "text": captions[language], "english": captions["en"]}
            spoken.append(shared | texts | {"audio": sound})
    return stamps, spoken, left_out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.adapters.tuxpaint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("package", type=Path, help="folder of the unpacked package, or its stamps folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything yet")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side of the pictures (default 128)")
    options = parser.parse_args(arguments)
    root = options.package / "usr/share/tuxpaint/stamps"
    root = root if root.is_dir() else options.package
    try:
        stamps, spoken, left_out = read_stamps(root, options.size)
        if not stamps:
            raise ValueError(f"{options.package} holds no stamps (captions in .txt beside .png or .svg)")
        configs = {
            "stamps": (STAMP_FEATURES, by_group(stamps, "id")),
            "spoken": (SPOKEN_FEATURES, by_group(spoken, "id")),
        }
        counts = write_folder(options.out, configs, CARD)
    except (ValueError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")
    print(", ".join(f"{count} {reason}" for reason, count in left_out.items()))
    print_counts(options.out, counts)


if __name__ == "__main__":
    main()
