"""Which split a file belongs to, by the names that `datasets` knows: of its folders and, for shards, of the file."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath


_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_APART = r"[-._ 0-9]"


def splits_of(names: Sequence[str], by_file: bool) -> list[str]:
    """The split of each file.

    Args:
        names: paths relative to the folder of all files, with `/`.
        by_file: whether a word in the name of the file tells, too, such as `validation-00000-of-00002.parquet`.
    """
    return [_split_of(PurePosixPath(name), by_file) for name in names]


def _split_of(path: PurePosixPath, by_file: bool) -> str:
    for folder in path.parts[:-1]:
        for split, words in _WORDS.items():
            if re.fullmatch(rf"(?:{words}){_APART}*", folder, re.IGNORECASE):
                return split
    if by_file:
        for split, words in _WORDS.items():
            if re.search(rf"(?:^|{_APART})(?:{words})(?:{_APART}|$)", path.name, re.IGNORECASE):
                return split
    return "train"
