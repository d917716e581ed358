"""What a checkpoint's folder may hold to be published: a closed list, so that nothing else leaves a machine by accident.

Paths are those in the repository, with forward slashes.
"""

import fnmatch
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from safetensors import SafetensorError, safe_open

from conversion.key_maps import ConversionError


INDEX, PROCESSOR, CARD = "model.safetensors.index.json", "processor_config.json", "README.md"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", INDEX)
# What a save replaces as a whole: of another save nothing may be left beside it.
SAVED = (
    *WEIGHTS, "*.py", "config.json", "generation_config.json",
    PROCESSOR, "preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt",
    "image_tokenizer/*.json", "image_tokenizer/*.safetensors", "speech_tokenizer/*.json",
    "speech_tokenizer/*.safetensors", "image_processor/*.json",
)  # fmt: skip
BESIDE = (
    CARD, "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY.md", ".gitattributes", "conversion.json",
    "*.png", "*.jpg", "*.jpeg", "*.webp",
)  # fmt: skip
# Left where they are: bookkeeping of git and of downloads, which the Hub's own client passes over too, and the recipe
# beside an upcycled model, which names this machine's folders.
_STAY = (*DEFAULT_IGNORE_PATTERNS, "train.yaml")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz", "*.h5", "*.msgpack")
_TEXTS = (".json", ".md", ".py", ".yaml", ".jinja", ".txt", "")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_SHOWN = 20


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is of this path; `*` does not reach into folders."""
    depth = path.count("/")
    return any(pattern.count("/") == depth and fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def repository_files(folder: Path, keep_code: bool = False) -> dict[str, Path]:
    """The files of a checkpoint's folder that go to a repository: path there -> file here.

    Args:
        keep_code: take the folder's own code although it is not that of this package, where its configuration loads it.

    Raises:
        ConversionError: the folder is no checkpoint, or holds something that is not to be published; all of it is named.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"{folder} has no config.json; give a folder that save_pretrained wrote, such as a run's final/"
        )
    files = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
    files = {path: files[path] for path in filter_repo_objects(sorted(files), ignore_patterns=list(_STAY))}
    problems = [f"{path}: {reason}" for path, file in files.items() if (reason := _refusal(folder, path, file))]
    if not problems:
        problems = [*_missing_or_left(folder, files), *_code_problems(folder, files, keep_code)]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ConversionError("\n  ".join([f"{folder} is not ready to be published:", *problems[:_SHOWN], *more]))
    return files


def _walk(folder: Path) -> Iterable[Path]:
    """All files, and links to folders, which are not followed."""
    for root, folders, files in os.walk(folder):
        yield from (Path(root) / name for name in files)
        yield from (link for name in folders if (link := Path(root) / name).is_symlink())


def _refusal(folder: Path, path: str, file: Path) -> str | None:
    """Why a file must not be published, or None."""
    if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
        if file.is_symlink():
            return f"a link to {os.readlink(file)}, outside the folder; put a copy in its place"
        return "is no regular file; remove it"
    if matches(file.name.lower(), PICKLED):
        return (
            "may hold pickled objects, which run code when they are loaded; weights are published as safetensors only"
        )
    if not matches(path, (*SAVED, *BESIDE)):
        return "is no part of a checkpoint; move it out of the folder"
    if file.suffix in _TEXTS and (found := _TOKEN.search(file.read_bytes())):
        return f"holds what looks like a token of the Hub ({found[0][:5].decode()}...); remove it, and revoke the token"
    return None


def _missing_or_left(folder: Path, files: Mapping[str, Path]) -> list[str]:
    found = {path for path in files if matches(path, WEIGHTS[:2])}
    expected = {"model.safetensors"}
    if INDEX in files:
        expected = set(_read_json(files[INDEX])["weight_map"].values())
    problems = [f"{path}: is missing; save the model again" for path in sorted(expected - found)]
    if PROCESSOR not in files:
        problems.append(f"{PROCESSOR}: is missing, so nobody could make tokens; save a MoTProcessor to the folder")
    for path, file in files.items():
        if path.endswith(".safetensors"):
            try:
                with safe_open(file, framework="np"):  # which compares the header with the size
                    pass
            except SafetensorError as error:
                problems.append(f"{path}: is no whole file of safetensors ({error}); save it again")
    return problems + [
        f"{path}: is left from another save, and would be loaded in the place of, or beside, {min(expected)}; remove it"
        for path in sorted(found - expected)
    ]


def _code_problems(folder: Path, files: Mapping[str, Path], keep_code: bool) -> list[str]:
    """Whoever loads with `trust_remote_code` runs these files, so each must be one that somebody answers for: it equals
    that of this package, or the caller says that the folder's own is meant, and then it is code that the model loads."""
    maps = [
        _read_json(files[name]).get("auto_map", {})
        for name in ("config.json", PROCESSOR, "tokenizer_config.json")
        if name in files
    ]
    values = [value if isinstance(value, list) else [value] for found in maps for value in found.values()]
    named = {entry for value in values for entry in value if entry}
    if not named:
        return ["config.json: has no auto_map, so nobody could load it; save the model with save_pretrained"]
    if foreign := sorted(entry for entry in named if "--" in entry):
        return [f"auto_map: {entry} is code of another repository, at no revision; save it again" for entry in foreign]
    if keep_code:
        from transformers.dynamic_module_utils import get_relative_import_files

        entries = {str(folder / f"{entry.split('.')[0]}.py") for entry in named}
        loaded = entries | {file for entry in entries for file in get_relative_import_files(entry)}
        stray = sorted(path for path in files if path.endswith(".py") and str(folder / path) not in loaded)
        return [f"{path}: is code that the model does not load; remove it" for path in stray]
    package = Path(importlib.util.find_spec("modeling_mot").origin).parent
    code = {path: package / path for path in files if path.endswith(".py")}
    others = [path for path, own in code.items() if not own.is_file() or own.read_bytes() != files[path].read_bytes()]
    if not others:
        return []
    return [
        f"{', '.join(others)}: not the code of the modeling_mot that is installed here; load the folder with modeling_mot and "
        "save it again, or publish its own code with --keep-code"
    ]


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{file} is no JSON ({error}); save it again") from error
