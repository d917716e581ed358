"""Make a data set of edits of the carried emoji: a picture, an instruction, and the picture that it asks for.

    python -m training.data.adapters.emoji_edits --out DIR

Every edit is exact: the target is computed from the source, so a model can be measured against it. Pairs whose two
pictures look alike (a symmetric picture flipped, a green one made green) are left out. A concept is in the same split
as in the carried set. Use the data set with a template that learns the target alone:

    - {segments: ["image:source", "text:instruction", "image:target"], caption_first: null, targets: last}
"""

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from datasets import Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from pyarrow import parquet

from modeling_mot.media_loading import flatten
from training.data.adapters.parquet_folder import print_counts, write_folder
from training.data.config import carried_path
from training.data.reading.records import decode_picture


FEATURES = Features(
    id=Value("string"),
    name=Value("string"),
    edit=Value("string"),
    instruction=Value("string"),
    source=ImageFeature(),
    target=ImageFeature(),
)
# Hues in degrees.
COLOURS = {"red": 0, "yellow": 52, "green": 120, "blue": 220, "purple": 280}
# Smallest mean absolute difference of the two pictures, of 255, at which an edit counts as visible.
NOTICEABLE = 10.0
HEAD = "license: apache-2.0\nlanguage: en\npretty_name: Exact edits of emoji\ntags: [image, text, image-editing]"
CARD = """# Exact edits of emoji

`source`, `instruction`, `target`, with the `id` and `name` of the emoji and the `edit`: 64 x 64 RGB PNG on white.

| edit | instruction | target |
|---|---|---|
{table}

Hues are those of Pillow's HSV; the hue that is turned to the named colour is the one with most saturated pixels. Pairs
that differ by less than {noticeable} of 255 in the mean are left out. Splits are those of the carried set: a concept is
on the same side here and there.

Pictures: Noto Emoji, Copyright Google Inc., Apache-2.0, changed as the table says. Names: the npm package
`emoji-datasource-google`, MIT (`licenses/emoji-data.txt`). Made by `python -m training.data.adapters.emoji_edits`.
"""


def turn_hue(picture: Image.Image, degrees: int) -> Image.Image:
    """Turn all hues by one angle that brings the most frequent hue to `degrees`; white, grey and black stay."""
    # The most frequent hue, by saturation and value.
    hue, saturation, value = (np.asarray(band) for band in picture.convert("HSV").split())
    weights = saturation.astype(np.int64) * value
    counts = np.bincount(hue.ravel(), weights.ravel(), minlength=256)
    # Hues near each other on the circle count together, the nearer the more.
    smooth = sum((9 - abs(shift)) * np.roll(counts, shift) for shift in range(-8, 9))
    shift = round(degrees * 256 / 360) - int(smooth.argmax())

    turned = ((hue.astype(np.int64) + shift) % 256).astype(np.uint8)
    bands = [Image.fromarray(band) for band in (turned, saturation, value)]
    return Image.merge("HSV", bands).convert("RGB")


def gamma(picture: Image.Image, exponent: float) -> Image.Image:
    """Raise every channel c / 255 to a power; white and black stay."""
    return picture.point([round(255 * (level / 255) ** exponent) for level in range(256)] * 3)


def shrink(picture: Image.Image) -> Image.Image:
    """Halve the size, and paste the picture into the middle of white."""
    width, height = picture.size
    small = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    canvas = Image.new("RGB", picture.size, "white")
    canvas.paste(small, (width // 4, height // 4))
    return canvas


# edit -> (instruction, words of the card for the target, function)
EDITS: dict[str, tuple[str, str, Callable[[Image.Image], Image.Image]]] = {
    "mirror": ("flip it", "left and right exchanged", ImageOps.mirror),
    "upside-down": ("turn it upside down", "turned by 180 degrees", lambda p: p.transpose(Image.Transpose.ROTATE_180)),
    "quarter-turn": (
        "turn it to the right",
        "turned by 90 degrees, clockwise",
        lambda p: p.transpose(Image.Transpose.ROTATE_270),
    ),
    "grey": ("make it grey", "luminance (ITU-R 601-2)", lambda p: p.convert("L").convert("RGB")),
    "darker": ("make it darker", "channels squared, of 1", lambda p: gamma(p, 2.0)),
    "lighter": ("make it lighter", "square root of the channels, of 1", lambda p: gamma(p, 0.5)),
    "smaller": ("make it smaller", "half the size, in the middle", shrink),
} | {
    colour: (
        f"make it {colour}",
        f"hues turned, the most frequent to {degrees} degrees",
        lambda p, d=degrees: turn_hue(p, d),
    )
    for colour, degrees in COLOURS.items()
}


def difference(one: Image.Image, other: Image.Image) -> float:
    """Return the mean absolute difference of two pictures of one size, of 255."""
    return float(np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).mean())


def edited(record: dict, edits: list[str]) -> Iterator[dict]:
    """Yield a row for each edit of a carried record that is visible."""
    source = flatten(decode_picture(record["image"]))
    for edit in edits:
        instruction, _, change = EDITS[edit]
        target = change(source)
        if difference(source, target) >= NOTICEABLE:
            yield {
                "id": record["id"],
                "name": record["name"],
                "edit": edit,
                "instruction": instruction,
                "source": record["image"],
                "target": {"bytes": png(target), "path": f"{record['id']}-{edit}.png"},
            }


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.adapters.emoji_edits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything yet")
    parser.add_argument(
        "--edits", nargs="+", choices=EDITS, default=list(EDITS), metavar="EDIT", help=f"of {', '.join(EDITS)}"
    )
    parser.add_argument("--limit", type=int, help="only the first so many concepts of each split")
    options = parser.parse_args(arguments)

    # Every edit of every concept, in the split of the concept.
    chosen = [edit for edit in EDITS if edit in options.edits]
    splits = {}
    for split in ("train", "validation"):
        table = parquet.read_table(carried_path() / "emoji" / f"{split}.parquet", columns=["id", "name", "image"])
        records = table.to_pylist()[: options.limit]
        splits[split] = [row for record in records for row in edited(record, chosen)]

    # The card lists the edits that were made.
    table = "\n".join(f"| `{edit}` | {EDITS[edit][0]} | {EDITS[edit][1]} |" for edit in chosen)
    licence = "licenses/emoji-data.txt"
    try:
        counts = write_folder(
            options.out,
            {"default": (FEATURES, splits)},
            CARD.format(table=table, noticeable=NOTICEABLE),
            {licence: (carried_path() / licence).read_bytes()},
            HEAD,
        )
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print_counts(options.out, counts)


if __name__ == "__main__":
    main()
