"""Guards against a stranger's checkpoint: it may name neither code that others run nor files outside of its folder."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file


# Fields of JSON files from which a loader runs, or looks for, code of the folder or of another repository.
NAMES_OF_CODE = frozenset({"auto_map", "custom_pipelines", "custom_generate"})
CODE_FIELDS = NAMES_OF_CODE | {"_name_or_path", "name_or_path"}
_SHOWN = 400  # characters of a library's message


def code_in(tree: Any) -> Iterator[str]:
    """Yield the names of code, such as `modeling.Model`, under `auto_map` and its like, at any depth."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if name in NAMES_OF_CODE:
            yield from _texts(value)
        else:
            yield from code_in(value)


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(value)


def without_code(tree: Any) -> Any:
    """Copy a tree of dicts and lists without `CODE_FIELDS`, at any depth."""
    if isinstance(tree, Mapping):
        return {name: without_code(value) for name, value in tree.items() if name not in CODE_FIELDS}
    if isinstance(tree, list):
        return [without_code(value) for value in tree]
    return tree


def forget_code(part: Any) -> None:
    """Remove the code that a loaded file named from a tokenizer, a configuration or generation settings, in place."""
    for name in ("_auto_map", *CODE_FIELDS):
        vars(part).pop(name, None)
    if hasattr(part, "init_kwargs"):
        part.init_kwargs = without_code(part.init_kwargs)


def load_tokenizer(name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub, running none of its code and naming none when it is saved.

    Raises:
        ValueError, OSError: no tokenizer, one that needs code of its own or has no tokens of text, or settings that
            name files outside of its folder.
    """
    check_tokenizer_files(name_or_path)
    with reading(f"the tokenizer of {str(name_or_path)!r:.200} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    check_vocabulary(tokenizer, name_or_path)
    forget_code(tokenizer)
    for name in ("is_local", "local_files_only"):  # the origin is no property of the tokenizer
        tokenizer.init_kwargs.pop(name, None)
    json.dumps(tokenizer.init_kwargs, ensure_ascii=False, default=str).encode()  # half a character could not be saved
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, name_or_path: str | os.PathLike) -> None:
    """Refuse a tokenizer that transformers made of settings alone, whose special tokens have ids of their own then.

    Raises:
        ValueError: every token is an added one.
    """
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise ValueError(
            f"the tokenizer of {str(name_or_path)!r:.200} has no tokens of text: its vocabulary is missing "
            "(tokenizer.json, or vocab.json and merges.txt)"
        )


# ---------------------------------------------------------------------------------------------------------------- files


@contextmanager
def reading(lead: str, kind: type[Exception] = ValueError, passed: type[Exception] | tuple = OSError) -> Iterator[None]:
    """Turn any exception of a library that reads a user's file into a `kind` with the message "`lead`: reason".

    `tokenizers` raises Exception itself, and other libraries raise whatever their first wrong step raises, so no list
    of types would be complete. Only calls of libraries belong inside, so that mistakes of ours stay visible.

    Args:
        lead: the beginning of the message.
        kind: the exception to raise.
        passed: exceptions that pass unchanged.
    """
    try:
        yield
    except passed:
        raise
    except Exception as error:
        name = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        said = " ".join(str(error).split())
        raise kind(f"{lead}: {name}{said[:_SHOWN]}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        ValueError: the file is not there, is not JSON or holds no object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text)
        if "\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode()  # an escape may be half a character, which is no text
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no JSON object")
    return tree


def check_tokenizer_files(name_or_path: str | os.PathLike, **hub_kwargs) -> None:
    """Refuse settings of a tokenizer that name files outside of its folder, which transformers would open.

    Raises:
        ValueError: the message names the setting and the file.
    """
    settings = cached_file(
        str(name_or_path), "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )
    if settings is None:
        return
    for name, value in read_json_object(Path(settings)).items():
        # In special_tokens_map_file transformers itself wrote paths of other machines; it opens none of them.
        if not name.endswith("_file") or name == "special_tokens_map_file" or not isinstance(value, str):
            continue
        if os.path.exists(value) and leads_outside(Path(value), Path(settings).parent):
            raise ValueError(f"{settings} has {name}={value!r}, which is outside of its folder; take it out there")


@contextmanager
def reading_weights(name_or_path: str | os.PathLike | None) -> Iterator[None]:
    """Name the checkpoint when the loading of a model fails on its files.

    Raises:
        ValueError: files of weights are damaged, or hold more than weights.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {name_or_path}, model.safetensors or its shards, are damaged: {error}"
        ) from error
    except UnpicklingError as error:
        raise ValueError(
            f"the weights of {name_or_path} are pickled, and hold objects that run code or are damaged; save them as "
            "model.safetensors"
        ) from error


def leads_outside(path: Path, folder: Path) -> bool:
    """True if `path`, its links followed, is neither in `folder` nor in the store of the Hub's cache that holds it.

    A snapshot of the cache (`snapshots/COMMIT/`) is made of links to `blobs/` beside `snapshots`.
    """
    root = folder.resolve()
    allowed = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    try:
        target = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, a null byte
        return True
    return not any(target.is_relative_to(place) for place in allowed)


def check_links(folder: Path) -> None:
    """Refuse a folder with a link that leads out of it: its target would be read, and copied, as the folder's own.

    Raises:
        ValueError: the message names the link and its target.
    """
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            if path.is_symlink() and leads_outside(path, folder):
                raise ValueError(
                    f"{path} is a link to {os.readlink(path)}, outside of {folder}; put a copy in its place"
                )


def read_weight_map(index: Path) -> dict[str, str]:
    """Read an index such as `model.safetensors.index.json`.  -> tensor: name of the file that holds it

    Raises:
        ValueError: the file is no index, or names a file outside of its folder.
    """
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index} has no weight_map from names of tensors to names of files; download it again")
    for name in sorted(set(files.values())):
        parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
        is_plain = name and "\0" not in name and ".." not in parts and not PureWindowsPath(name).anchor
        if not is_plain or leads_outside(index.parent / name, index.parent):
            raise ValueError(
                f"{index} names {name!r:.500}, which is outside of its folder; its files must lie beside it"
            )
    return files


def shard_files(index: Path) -> dict[str, str]:
    """Read an index as `read_weight_map` does, and check that its files are there.

    Raises:
        ValueError: a file is missing, or as `read_weight_map`.
    """
    files = read_weight_map(index)
    if lost := sorted({name for name in files.values() if not os.path.isfile(index.parent / name)}):
        raise ValueError(f"{index} names {', '.join(lost):.500}, which are not there; is the download complete?")
    return files


def check_index(name_or_path: str | os.PathLike | None, subfolder: str | None = None) -> None:
    """Refuse a local checkpoint whose index names files outside of its folder; the Hub gives out no such files.

    Raises:
        ValueError: the message names the index and the file.
    """
    index = Path(name_or_path or "", subfolder or "", "model.safetensors.index.json")
    if name_or_path is not None and index.is_file():
        read_weight_map(index)
