"""Helpers of all commands that write a checkpoint: arguments, errors, plans on the screen, copied files."""

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from conversion.key_maps import ConversionError
from modeling_mot import hub_trust
from modeling_mot.hub_trust import forget_code, read_json_object


DTYPE_NAMES = ("float32", "bfloat16", "float16")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


def add_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """Add SOURCE, OUT and the options of writing OUT.

    Args:
        source: says in the help what SOURCE is.
    """
    parser.add_argument("source", metavar="SOURCE", help=f"{source}: a folder, or a name on the Hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--revision", help="branch, tag or commit of a SOURCE on the Hub")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="dtype of the weights (default: the source's)")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="size of a file of weights (default: 5GB)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that OUT holds")


def exit_code(work: Callable[[], None]) -> int:
    """Run a command: 0 done, 2 a request that cannot be met, with the reason on stderr."""
    try:
        work()
    except (ConversionError, OSError) as error:  # an OSError is the system's: a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# Stands around calls of libraries that read the user's files: every error of theirs becomes a ConversionError.
reading = partial(hub_trust.reading, kind=ConversionError, passed=ConversionError)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConversionError for a missing file and for another value."""
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def read_config(stored: dict[str, Any]) -> PreTrainedConfig:
    """Read a config.json with its class in transformers. Raises ConversionError if its fields contradict each other."""
    with reading("the source's config.json cannot be read by transformers"):
        return CONFIG_MAPPING[stored["model_type"]].from_dict(stored)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Read generation_config.json; None without one. Raises ConversionError if transformers cannot read it."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    with reading(f"{path} cannot be read by transformers"):
        generation = GenerationConfig.from_pretrained(folder)
        generation.validate(strict=True)  # as it will be when it is saved
    forget_code(generation)
    return generation


def merge_layers(lines: Iterable[str]) -> list[str]:
    """Make one line of lines that differ in the number of the layer alone: `layers.{0..31}.mlp` for 0 to 31."""
    numbers: dict[str, list[int]] = {}
    # Lines of equal pattern are one; dictionaries keep the order of the first.
    for line in lines:
        found = set(_LAYER.findall(line))
        # A line that speaks of two layers, or of none, stays as it is.
        pattern = _LAYER.sub("layers.{}.", line) if len(found) == 1 else line
        numbers.setdefault(pattern, []).extend(int(number) for number in found if len(found) == 1)
    return [pattern.replace("layers.{}.", f"layers.{_span(layers)}.") for pattern, layers in numbers.items()]


def _span(layers: list[int]) -> str:
    if len(layers) < 2:
        return ",".join(map(str, layers))
    first, last = min(layers), max(layers)
    is_whole = len(layers) == last - first + 1
    return f"{{{first}..{last}}}" if is_whole else f"{{{','.join(map(str, sorted(layers)))}}}"


def check_range(option: str, value: int | None, least: int, most: int) -> None:
    """Refuse a number outside of [least, most]; None is allowed. Raises ConversionError."""
    if value is not None and value < least:
        raise ConversionError(f"{option} {value} must be at least {least}")
    if value is not None and value > most:
        raise ConversionError(f"{option} {value} must be at most {most}")


def stored_dtype(stored: dict[str, Any], fallback: torch.dtype) -> torch.dtype:
    """Return the dtype that a config.json names, else `fallback`."""
    name = stored.get("dtype") or stored.get("torch_dtype")
    return getattr(torch, name) if isinstance(name, str) and name in DTYPE_NAMES else fallback


def copy_licences(source: Path, out: Path) -> None:
    """Copy the files of a licence, if there are any."""
    for pattern in LICENCES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
