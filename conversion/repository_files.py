"""Choose the files of a checkpoint's folder that are published, by a closed list: no other file leaves the machine.

Paths are those in the repository, with forward slashes.
"""

import fnmatch
import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from conversion.commands import read_json
from conversion.contents import problem_of
from conversion.key_maps import ConversionError
from modeling_mot.hub_trust import code_in, read_weight_map


INDEX, PROCESSOR, CARD = "model.safetensors.index.json", "processor_config.json", "README.md"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", INDEX)
# Files that a save replaces as a whole; none of another save may be left beside them.
SAVED = (
    *WEIGHTS, "*.py", "config.json", "generation_config.json",
    PROCESSOR, "preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt",
    "image_tokenizer/*.json", "image_tokenizer/*.safetensors", "speech_tokenizer/*.json",
    "speech_tokenizer/*.safetensors", "image_processor/*.json", "encoder_processor/*.json",
)  # fmt: skip
BESIDE = (
    CARD, "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY.md", ".gitattributes", "conversion.json",
    "not_run.safetensors",
    "*.png", "*.jpg", "*.jpeg", "*.webp",
)  # fmt: skip
# Files that stay here: bookkeeping of git and of downloads, which the Hub's own client passes over too, and the recipe
# beside an upcycled model, since it names this machine's folders.
_STAY = (*DEFAULT_IGNORE_PATTERNS, "train.yaml")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz", "*.h5", "*.msgpack")
# Files whose auto_map, or a field like it, tells a loader which code to run.
_LOADED = ("config.json", "generation_config.json", PROCESSOR, "preprocessor_config.json", "tokenizer_config.json")
_SHOWN = 20


def matches(path: str, patterns: Iterable[str]) -> bool:
    """True if one of the patterns fits the path; `*` does not reach into folders."""
    depth = path.count("/")
    return any(pattern.count("/") == depth and fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def repository_files(folder: Path, keep_code: bool = False) -> dict[str, Path]:
    """List the files of a checkpoint's folder that go to a repository: path there -> file here.

    Args:
        keep_code: publish the folder's own code, also if it differs from this package's; it must be code that the
            folder's configuration loads.

    Raises:
        ConversionError: the folder is no checkpoint, or holds files that must not be published; all are named.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"{folder} has no config.json; give a folder that save_pretrained wrote, such as a run's final/"
        )
    files = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
    files = {path: files[path] for path in filter_repo_objects(sorted(files), ignore_patterns=list(_STAY))}

    # First names, then contents, then code: each check relies on the one before.
    problems = [f"{path}: {reason}" for path, file in files.items() if (reason := _refusal(folder, path, file))]
    if not problems:
        problems = [f"{path}: {reason}" for path, file in files.items() if (reason := problem_of(file))]
        problems += _missing_or_left(folder, files)
    if not problems:
        problems = _code_problems(folder, files, keep_code)
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ConversionError("\n  ".join([f"{folder} is not ready to be published:", *problems[:_SHOWN], *more]))
    return files


def _walk(folder: Path) -> Iterable[Path]:
    """Return all files, and the links to folders. No link is followed."""
    for root, folders, files in os.walk(folder):
        yield from (Path(root) / name for name in files)
        yield from (link for name in folders if (link := Path(root) / name).is_symlink())


def _refusal(folder: Path, path: str, file: Path) -> str | None:
    """Return the reason why a file must not be published, or None."""
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
    return None


def _missing_or_left(folder: Path, files: Mapping[str, Path]) -> list[str]:
    found = {path for path in files if matches(path, WEIGHTS[:2])}
    expected = {"model.safetensors"}
    if INDEX in files:
        try:
            expected = set(read_weight_map(files[INDEX]).values())
        except ValueError as error:
            return [f"{INDEX}: {error}"]
    problems = [f"{path}: is missing; save the model again" for path in sorted(expected - found)]
    if PROCESSOR not in files:
        problems.append(f"{PROCESSOR}: is missing, so nobody could make tokens; save a MoTProcessor to the folder")
    return problems + [
        f"{path}: is left from another save, and would be loaded instead of {min(expected)} or beside it; remove it"
        for path in sorted(found - expected)
    ]


def _code_problems(folder: Path, files: Mapping[str, Path], keep_code: bool) -> list[str]:
    """Return the reasons why the folder's code must not be published.

    Loading with `trust_remote_code` runs these files. So each must equal this package's file or, with `keep_code`, be
    code that the model loads.
    """
    # The entries of every auto_map: in this folder, and there at all.
    trees = [read_json(files[path]) for path in sorted(files) if path in _LOADED or path.endswith("/config.json")]
    if foreign := sorted({entry for tree in trees for entry in code_in(tree) if "--" in entry}):
        return [f"auto_map: {entry} is code of another repository, at no revision; save it again" for entry in foreign]
    named = {entry for tree in trees for entry in code_in({"auto_map": tree.get("auto_map")})}
    if not named:
        return ["config.json: has no auto_map, so nobody could load it; save the model with save_pretrained"]
    if missing := sorted(entry for entry in named if f"{entry.split('.')[0]}.py" not in files):
        return [f"auto_map: {entry} is not among the folder's files; save it again" for entry in missing]
    if keep_code:
        from transformers.dynamic_module_utils import get_relative_import_files

        entries = {str(folder / f"{entry.split('.')[0]}.py") for entry in named}
        loaded = entries | {file for entry in entries for file in get_relative_import_files(entry)}
        stray = sorted(path for path in files if path.endswith(".py") and str(folder / path) not in loaded)
        return [f"{path}: is code that the model does not load; remove it" for path in stray]

    # Without keep_code, only this package's own files.
    package = Path(importlib.util.find_spec("modeling_mot").origin).parent
    code = {path: package / path for path in files if path.endswith(".py")}
    others = [path for path, own in code.items() if not own.is_file() or own.read_bytes() != files[path].read_bytes()]
    if not others:
        return []
    return [
        f"{', '.join(others)}: not the code of the modeling_mot that is installed here; load the folder with "
        "modeling_mot and save it again, or publish its own code with --keep-code"
    ]
