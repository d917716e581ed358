"""Make a data set of colour icons with names, in many styles, from the icon sets of Iconify.

Get the package (104 MB) and resvg-py (pip install resvg-py):
    npm pack @iconify/json@2.2.535 && tar -xzf iconify-json-2.2.535.tgz
    python -m training.data.adapters.iconify --package package --out DIR

The name of an icon is its concept, and its set is its style. Two of the three splits are held out:
    train             all other pictures
    unseen_pairs      one style of each concept that stands in four styles or more. The concept is known from other
                      styles, and the style from other concepts.
    unseen_concepts   5 % of all concepts, in every style

A recipe reads a split by its name:
    validation_sources:
      - name: unseen pairs
        path: DIR
        split: unseen_pairs
        templates:
          - {segments: ["text:caption", "image:image"]}   # or a caption of one's own: "text:{name}, {style}"
"""

import argparse
import difflib
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Features, Image, Value
from tqdm import tqdm

from training.data.adapters.parquet_folder import held_out, print_counts, refuse_full_folder, write_folder
from training.data.adapters.pictures import svg_png


FEATURES = Features(
    id=Value("string"),
    name=Value("string"),
    style=Value("string"),
    caption=Value("string"),
    license=Value("string"),
    author=Value("string"),
    image=Image(),
)
# Licences that let a changed picture be passed on under another licence.
PERMISSIVE = {"Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "Unlicense"}
# Categories of sets whose names do not say what is to be seen: brands, file types, codes of countries.
NAMES_WITHOUT_MEANING = {"Logos", "Programming", "Flags / Maps"}
# Sets that write a name of several words as one word. Their icons are taken if another set has the name.
WITHOUT_SPACES = {"fxemoji"}
UNSEEN_CONCEPTS = 0.05
STYLES_OF_A_PAIR = 4
SPLITS = {
    "train": "all other pictures",
    "unseen_pairs": f"one style of each concept that stands in {STYLES_OF_A_PAIR} styles or more",
    "unseen_concepts": f"{100 * UNSEEN_CONCEPTS:g} % of all concepts, in every style",
}
_SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
# A number at the end of a name counts drawings of one concept, but not after these words.
_COUNT = re.compile(r"(?<!keycap)(?<!index)(?<!beaufort)(?<!battery)(?<!sorting)-\d{1,2}$")
_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}
HEAD = (
    "license: other\nlicense_name: by-set\nlicense_link: README.md\nlanguage: en\n"
    "pretty_name: Colour icons in many styles\ntags: [image, text, icons, emoji]"
)
CARD = """# Colour icons in many styles

Pictures of {size} x {size} pixels on white, with `name` (the concept), `style` (the set, with the suffix of a variant),
`caption` (name and style), `license` and `author`. The order of the rows is that of a hash of the concept.

| split | pictures | concepts | |
|---|---|---|---|
{splits}

Sets spell a concept in different ways. Names are one concept if they differ in spaces only, or if an emoji set has both
for one drawing. Icons that were left out:

{left_out}

## Licences and authors

The pictures are the sets' SVG, rendered and otherwise unchanged.

| set | title | pictures | licence | author |
|---|---|---|---|---|
{sets}

From the npm package `@iconify/json`; made by `python -m training.data.adapters.iconify`.
"""


# ------------------------------------------------------------------------------------------------------------- the sets


def read_json(path: Path) -> dict:
    """Read a file of the package.

    Raises:
        ValueError: the file is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; give --package the folder of the unpacked @iconify/json") from error
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); unpack the package again") from error


def choose_sets(collections: dict[str, dict], named: list[str] | None) -> list[str]:
    """Return the named sets; by default those in colour that have a permissive licence and names with a meaning.

    Raises:
        ValueError: there is no set of a name.
    """
    for name in named or []:
        if name not in collections:
            near = difflib.get_close_matches(name, collections, n=1)
            hint = f"did you mean {near[0]}?" if near else "its collections.json lists all sets"
            raise ValueError(f"--sets names {name!r}, which is no set of the package; {hint}")
    if named:
        return sorted(set(named))
    return [
        name
        for name, info in sorted(collections.items())
        if info.get("palette")
        and info["license"].get("spdx") in PERMISSIVE
        and info.get("category") not in NAMES_WITHOUT_MEANING
    ]


# ------------------------------------------------------------------------------------------------------------ the icons


@dataclass(frozen=True)
class Icon:
    """A drawing of a set. Flips come before quarter turns, which are clockwise."""

    set: str
    key: str
    style: str
    name: str
    body: str
    left: float
    top: float
    width: float
    height: float
    turns: int
    flip_x: bool
    flip_y: bool

    def svg(self) -> str:
        """Return the SVG of the icon, flipped and turned about its middle, in the middle of a square."""
        x, y = self.left + self.width / 2, self.top + self.height / 2
        width, height = (self.height, self.width) if self.turns % 2 else (self.width, self.height)
        body = self.body
        if self.turns or self.flip_x or self.flip_y:
            flip = f"scale({-1 if self.flip_x else 1} {-1 if self.flip_y else 1})"
            moves = f"translate({x} {y}) rotate({90 * self.turns}) {flip} translate({-x} {-y})"
            body = f'<g transform="{moves}">{body}</g>'
        box = f"{x - width / 2} {y - height / 2} {width} {height}"
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {names} width="1" height="1" viewBox="{box}">{body}</svg>'


def resolve(data: dict, key: str) -> dict | None:
    """Merge the properties of an icon or alias with its parents'; None if there is no parent with a drawing.

    A child's box replaces its parents'. Turns add up, and two flips undo each other.
    """
    merged, seen = {}, set()
    turns, flip_x, flip_y = 0, False, False
    while "body" not in merged:
        entry = data["icons"].get(key) or data["aliases"].get(key)
        if entry is None or key in seen:
            return None
        seen.add(key)
        merged = entry | merged
        turns += entry.get("rotate", 0)
        flip_x ^= entry.get("hFlip", False)
        flip_y ^= entry.get("vFlip", False)
        key = entry.get("parent")
    return merged | {"turns": turns % 4, "flip_x": flip_x, "flip_y": flip_y}


def synonyms(data: dict) -> list[tuple[str, str]]:
    """List (alias, its parent) of the aliases that change nothing: other names of a drawing."""
    aliases = sorted(data["aliases"].items())
    return [(key, entry["parent"]) for key, entry in aliases if set(entry) == {"parent"} and key not in data["icons"]]


def read_icons(data: dict, max_body: int, left_out: Counter) -> Iterator[Icon]:
    """Yield the icons of a set in the order of their keys, and count those that are left out."""
    keys = set(data["icons"]) | set(data["aliases"])
    for key in sorted(keys):
        entry = resolve(data, key)
        if reason := why_left_out(data, key, keys, entry, max_body):
            left_out[reason] += 1
            continue
        stem, suffix = split_suffix(key, data.get("suffixes", {}))
        yield Icon(
            set=data["prefix"],
            key=key,
            style=data["prefix"] if suffix.isdigit() or not suffix else f"{data['prefix']}-{suffix}",
            name=spell(stem),
            body=entry["body"],
            **{side: entry.get(side, data.get(side, default)) for side, default in _BOX.items()},
            **{change: entry[change] for change in ("turns", "flip_x", "flip_y")},
        )


def why_left_out(data: dict, key: str, keys: set[str], entry: dict | None, max_body: int) -> str:
    """Return the reason for which an icon is not taken, "" if it is taken; `entry` is what `resolve` returned."""
    if is_skin_tone(key, keys):
        return "skin tones"
    if key not in data["icons"] and set(data["aliases"][key]) == {"parent"}:
        return "other names of an icon"
    if entry is None or entry.get("hidden"):
        return "hidden by their set or without a drawing"
    if is_smaller(key, data.get("suffixes", {}), keys):
        return "smaller sizes of an icon"
    return "longer than --max-body" if len(entry["body"]) > max_body else ""


def split_suffix(key: str, suffixes: dict[str, str]) -> tuple[str, str]:
    """Cut the suffix of a variant off a key: a size (`24`) or a style within the set (`flat`); "" if it has none."""
    suffix = max((suffix for suffix in suffixes if suffix and key.endswith(f"-{suffix}")), key=len, default="")
    return (key.removesuffix(f"-{suffix}"), suffix) if suffix else (key, "")


def is_smaller(key: str, suffixes: dict[str, str], keys: set[str]) -> bool:
    """True if the set has the same icon in a larger size."""
    stem, suffix = split_suffix(key, suffixes)
    sizes = [int(other) for other in suffixes if other.isdigit() and f"{stem}-{other}" in keys]
    return suffix.isdigit() and int(suffix) < max(sizes)


def is_skin_tone(key: str, keys: set[str]) -> bool:
    """True if a key ends with a skin tone, or is one of five that end with the words for skin tones."""
    if re.search(r"skin-tone|-tone[1-5]$", key):
        return True
    stems = [key.removesuffix(f"-{tone}") for tone in _SKIN_TONES if key.endswith(f"-{tone}")]
    return any(all(f"{stem}-{tone}" in keys for tone in _SKIN_TONES) for stem in stems)


# --------------------------------------------------------------------------------------------------------- the concepts


def spell(key: str) -> str:
    """Return a key in words: `flag-for-flag-chad` is "flag chad", `wrapped-gift-2` is "wrapped gift"."""
    return _COUNT.sub("", re.sub(r"^flag-for-(flag-)?", "flag-", key.lower())).replace("-", " ")


def letters(name: str) -> str:
    """Return a name without spaces: "alarm clock" and "alarmclock" are one."""
    return name.replace(" ", "")


def name_concepts(icons: list[Icon], same: list[tuple[str, str]]) -> dict[str, str]:
    """Join the spellings of each concept.

    Args:
        same: pairs of names that an emoji set has for one drawing. They are joined unless some set draws both.

    Returns:
        letters of a name -> name of its concept: the spelling of most styles, then that of most words.
    """
    # Groups of spellings. A group is one object, which all of its spellings share.
    groups = {letters(icon.name): {letters(icon.name)} for icon in icons}
    sets_of = defaultdict(set)
    for icon in icons:
        sets_of[letters(icon.name)].add(icon.set)
    for pair in same:
        one, other = (groups.setdefault(letters(name), {letters(name)}) for name in pair)
        drawn_by = [set().union(*(sets_of[spelling] for spelling in group)) for group in (one, other)]
        if one is not other and not drawn_by[0] & drawn_by[1]:
            one |= other
            groups |= dict.fromkeys(other, one)

    # The name of each group.
    spellings = defaultdict(set)
    for icon in icons:
        spellings[icon.name].add(icon.style)
    best = {}
    for name in sorted(spellings, key=lambda name: (-len(spellings[name]), -name.count(" "), name)):
        for spelling in groups[letters(name)]:
            best.setdefault(spelling, name)
    return best


def readable(icons: list[Icon]) -> list[Icon]:
    """Leave out icons whose name is several words written as one, as far as one can tell: no other set has it."""
    known = {letters(icon.name) for icon in icons if icon.set not in WITHOUT_SPACES}
    return [icon for icon in icons if letters(icon.name) in known]


# --------------------------------------------------------------------------------------------------------- the pictures


def draw(icons: Iterable[Icon], size: int, left_out: Counter) -> Iterator[tuple[Icon, bytes]]:
    """Yield (icon, PNG) of the icons that render, are not all white, and do not look as an icon before them."""
    empty = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
    seen = {svg_png(empty, size, optimize=False): "all white"}
    for icon in icons:
        try:
            picture = svg_png(icon.svg(), size, optimize=False)
        except ValueError:
            left_out["that do not render"] += 1
            continue
        if picture in seen:
            left_out[seen[picture]] += 1
            continue
        seen[picture] = "that look as another icon"
        yield icon, picture


def digest(text: str) -> str:
    """Hash a text: a fixed pseudo-random order."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_rows(rows: list[dict]) -> dict[str, list[dict]]:
    """Put each row into a split by its name and style."""
    styles = defaultdict(set)
    for row in rows:
        styles[row["name"]].add(row["style"])
    splits = {split: [] for split in SPLITS}
    for row in sorted(rows, key=lambda row: (digest(row["name"]), row["id"])):
        name, known = row["name"], styles[row["name"]]
        if held_out(name, UNSEEN_CONCEPTS, "icons"):
            splits["unseen_concepts"].append(row)
        elif len(known) >= STYLES_OF_A_PAIR and row["style"] == min(known, key=lambda style: digest(f"{name} {style}")):
            splits["unseen_pairs"].append(row)
        else:
            splits["train"].append(row)
    return splits


# ---------------------------------------------------------------------------------------------------------- the command


def read_sets(package: Path, sets: dict[str, dict], max_body: int, left_out: Counter) -> tuple[list[Icon], dict]:
    """Read the icons of all sets, and join their names.

    Returns:
        The icons, and letters of a name -> name of its concept.
    """
    icons, same = [], []
    for name, info in sets.items():
        file = package / "json" / f"{name}.json"
        data = {"aliases": {}} | read_json(file)
        if data.get("prefix") != name or not isinstance(data.get("icons"), dict):
            raise ValueError(f"{file} is no icon set {name!r}; unpack the package again")
        icons += read_icons(data, max_body, left_out)
        if info.get("category") == "Emoji":
            same += [(spell(one), spell(other)) for one, other in synonyms(data)]
    taken = readable(icons)
    if len(taken) < len(icons):
        left_out["with several words written as one"] += len(icons) - len(taken)
    return taken, name_concepts(taken, same)


def make_card(sets: dict[str, dict], splits: dict[str, list[dict]], left_out: Counter, size: int) -> str:
    """Write the data card: the splits, and the licence and author of each set."""
    split_lines = [
        f"| `{split}` | {len(rows):,} | {len({row['name'] for row in rows}):,} | {SPLITS[split]} |"
        for split, rows in splits.items()
    ]

    return CARD.format(
        size=size,
        splits="\n".join(split_lines),
        left_out="\n".join(f"- {count:,} {reason}" for reason, count in sorted(left_out.items())),
        sets=set_lines(sets, [row for rows in splits.values() for row in rows]),
    )


def set_lines(sets: dict[str, dict], rows: list[dict]) -> str:
    """Write a line of a table for each set: its title, the number of its pictures, its licence and its author."""
    counts = Counter(row["id"].partition(":")[0] for row in rows)
    lines = []
    for name, info in sets.items():
        licence, author = info["license"], info["author"]
        cells = [
            f"`{name}`",
            info["name"],
            f"{counts[name]:,}",
            f"{licence_of(info)}, {licence.get('url', '')}".removesuffix(", "),
            f"{author['name']}, {author.get('url', '')}".removesuffix(", "),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def licence_of(info: dict) -> str:
    """Return the licence of a set: its SPDX identifier, or else its title."""
    return info["license"].get("spdx") or info["license"]["title"]


def picture_rows(package: Path, sets: dict[str, dict], size: int, max_body: int, left_out: Counter) -> list[dict]:
    """Render the icons of `sets` (name -> its entry in collections.json); return a row of each picture.

    Icons that are left out are counted by their reason.

    Raises:
        ValueError: a set's file cannot be used.
        ImportError: resvg-py is not installed.
    """
    icons, concepts = read_sets(package, sets, max_body, left_out)
    rows = []
    for icon, picture in draw(tqdm(icons, unit=" icons", disable=None), size, left_out):
        name, info = concepts[letters(icon.name)], sets[icon.set]
        rows.append(
            {
                "id": f"{icon.set}:{icon.key}",
                "name": name,
                "style": icon.style,
                "caption": f"{name}, {icon.style.replace('-', ' ')}",
                "license": licence_of(info),
                "author": info["author"]["name"],
                "image": {"bytes": picture, "path": f"{icon.set}-{icon.key}.png"},
            }
        )
    return rows


def make(options: argparse.Namespace) -> tuple[dict[str, int], Counter]:
    """Make the data set; return the rows of each split, and reason -> icons that were left out.

    Raises:
        ValueError: a file, a set or a folder that cannot be used, or no icon is left.
        ImportError: resvg-py is not installed.
    """
    # All that can be refused is refused before the first icon is rendered.
    refuse_full_folder(options.out)
    collections = read_json(options.package / "collections.json")
    sets = {name: collections[name] for name in choose_sets(collections, options.sets)}

    left_out: Counter = Counter()
    rows = picture_rows(options.package, sets, options.size, options.max_body, left_out)
    if not rows:
        raise ValueError(f"no icon of --sets {' '.join(sets)} is left ({dict(left_out)}); name other sets")
    splits = split_rows(rows)
    card = make_card(sets, splits, left_out, options.size)
    return write_folder(options.out, {"default": (FEATURES, splits)}, card, head=HEAD), left_out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.adapters.iconify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--package", type=Path, required=True, help="folder of the unpacked package")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything yet")
    parser.add_argument(
        "--sets",
        nargs="+",
        metavar="SET",
        help="sets to take, of any licence; default: those in colour that have a permissive licence, "
        "but for brands, file types and flags of countries",
    )
    parser.add_argument("--size", type=int, default=64, help="pixels of a side of the pictures (default 64)")
    parser.add_argument("--max-body", type=int, default=60_000, help="longest drawing in characters (default 60,000)")
    options = parser.parse_args(arguments)
    if not 1 <= options.size <= 1024:
        parser.error(f"--size {options.size} must be 1 to 1024")
    try:
        counts, left_out = make(options)
    except (ValueError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")
    print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items())))
    print_counts(options.out, counts)


if __name__ == "__main__":
    main()
