"""Make a data set of Karpathy's split of MS-COCO, Flickr30k or Flickr8k: pictures with all of their captions.

Get dataset_coco.json or dataset_flickr30k.json ("caption_datasets.zip" of Karpathy and Fei-Fei, 2015) and the pictures:
    python -m training.data.adapters.karpathy --json dataset_coco.json --images COCO --split test --out coco-test

COCO is the folder that holds train2014 and val2014. The set is a folder of pictures with a metadata.jsonl, in which
`text` is the first caption of a picture, and `captions` has all of them. A template [text:captions, image:image] gives
CIDEr all references, and [text:text, image:image] is the pair of which held-out losses are measured. The 30,000 prompts
of the validation set are among `--split val test restval`.

A folder of your own pictures needs no adapter: name it as the `path` of a source, with a text file beside each picture
(cat.jpg, cat.txt), or a metadata.jsonl with lines such as {"file_name": "cat.jpg", "captions": ["a cat", "my cat"]}.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from training.data.adapters.parquet_folder import print_counts, refuse_full_folder
from training.data.reading.records import decode_picture
from training.data.reading.shards import METADATA, resolve_inside


CARD = """---
pretty_name: {title}
---

# {name}: pictures of Karpathy's split {splits}, with all captions

`text` is the first caption of a picture, `captions` has all of them. The split is that of Karpathy and Fei-Fei (2015);
pictures and captions are under the terms of {name}. Made by `python -m training.data.adapters.karpathy`.
"""


def read_split(path: Path, splits: Sequence[str]) -> tuple[str, list[dict]]:
    """Read the name of a data set, and the entries of its pictures in the splits.

    Raises:
        ValueError: the file is no such JSON, or no picture is in the splits.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry for entry in content["images"] if entry["split"] in splits]
        known = sorted({entry["split"] for entry in content["images"]})
        for entry in entries:
            entry["filename"], entry["captions"] = str(entry["filename"]), _captions(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--json {path} is no file of Karpathy's, with images of filename, split and sentences: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not entries:
        raise ValueError(f"--split {' '.join(splits)}: {path} has no such picture; its splits are {', '.join(known)}")
    return str(content.get("dataset", path.stem)), entries


def _captions(entry: dict) -> list[str]:
    captions = [" ".join(sentence["raw"].split()) for sentence in entry["sentences"]]
    if not any(captions):
        raise ValueError(f"{entry['filename']} has no caption")
    return [caption for caption in captions if caption]


def find_pictures(entries: Sequence[dict], images: Path) -> list[Path]:
    """Find the file of each entry, and decode each once.

    Raises:
        ValueError: a picture is missing, is outside of the folder, cannot be decoded, or has the name of another.
    """
    # All missing files are found before any is read.
    paths = [_find(entry, images) for entry in entries]
    if missing := [entry["filename"] for entry, path in zip(entries, paths, strict=True) if path is None]:
        raise ValueError(
            f"{len(missing)} of {len(entries)} pictures are not in --images {images}, the first is {missing[0]}; COCO "
            "needs the folder that holds train2014 and val2014"
        )
    if len({path.name for path in paths}) < len(paths):
        raise ValueError(f"two pictures of --images {images} have the same name; make a set of each split")
    for path in paths:
        decode_picture(str(path))
    return paths


def _find(entry: dict, images: Path) -> Path | None:
    """Find the file of an entry: in the folder that COCO names beside it, or in the folder of pictures itself."""
    names = [f"{entry.get('filepath', '')}/{entry['filename']}".lstrip("/"), entry["filename"]]
    paths = [resolve_inside(images, name) for name in names]
    return next((path for path in paths if path.is_file()), None)


def write_pictures(out: Path, split: str, entries: Sequence[dict], paths: Sequence[Path], card: str) -> None:
    """Write the folder whole or not at all; the pictures are hard links where the file system allows them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "folder"
        (folder / split).mkdir(parents=True)
        with open(folder / split / METADATA[0], "w", encoding="utf-8") as file:
            for entry, path in zip(entries, paths, strict=True):
                _link(path, folder / split / path.name)
                captions = entry["captions"]
                line = {"file_name": path.name, "id": path.stem, "text": captions[0], "captions": captions}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        (folder / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


def split_name(splits: Sequence[str]) -> str:
    """Return the split that a source names: train (of train and restval), test, or else validation."""
    if set(splits) <= {"train", "restval"}:
        return "train"
    return "test" if set(splits) == {"test"} else "validation"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.adapters.karpathy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="Karpathy's dataset_*.json")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument(
        "--split", nargs="+", default=["test"], metavar="NAME", help="test (default), val, train, restval; or several"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold anything yet")
    options = parser.parse_args(arguments)
    try:
        refuse_full_folder(options.out)
        name, entries = read_split(options.json, options.split)
        entries = entries[: options.limit]
        paths = find_pictures(entries, options.images)
        split = split_name(options.split)
        splits = ", ".join(options.split)
        card = CARD.format(name=name, splits=splits, title=json.dumps(f"{name}, Karpathy's split {splits}"))
        write_pictures(options.out, split, entries, paths, card)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print_counts(options.out, {split: len(entries)})


if __name__ == "__main__":
    main()
