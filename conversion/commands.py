"""What the commands that write a checkpoint have in common: arguments, errors, and the files that go along."""

import argparse
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from conversion.key_maps import ConversionError
from modeling_mot import hub_trust
from modeling_mot.hub_trust import forget_code, read_json_object


DTYPE_NAMES = ("float32", "bfloat16", "float16")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


def add_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """SOURCE, OUT and how OUT is written.

    Args:
        source: what SOURCE is.
    """
    parser.add_argument("source", metavar="SOURCE", help=f"{source}: a folder, or a name on the Hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--revision", help="branch, tag or commit of a SOURCE on the Hub")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of the weights (default: the source's)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that OUT holds")


def exit_code(work: Callable[[], None]) -> int:
    """Run a command: 0 done, 2 a request that cannot be met, with the reason on stderr."""
    try:
        work()
    except (
        ConversionError,
        OSError,
    ) as error:  # of the system: a disk that is full, a folder that is not to be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# Around calls of libraries that read what the user names: whatever they raise becomes a ConversionError.
reading = partial(hub_trust.reading, kind=ConversionError, passed=ConversionError)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConversionError for a file that is not there or no JSON object."""
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def read_config(stored: dict[str, Any]) -> PreTrainedConfig:
    """A config.json as its class in transformers reads it. Raises ConversionError where it is contradictory."""
    with reading("the source's config.json cannot be read by transformers"):
        return CONFIG_MAPPING[stored["model_type"]].from_dict(stored)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """None where the folder has none. Raises ConversionError for one that transformers cannot read."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    with reading(f"{path} cannot be read by transformers"):
        generation = GenerationConfig.from_pretrained(folder)
        generation.validate(strict=True)  # as it will be when it is saved
    forget_code(generation)
    return generation


def check_range(option: str, value: int | None, least: int, most: int) -> None:
    """Refuse a number that is too small or too large; None is no number. Raises ConversionError."""
    if value is not None and value < least:
        raise ConversionError(f"{option} {value} must be at least {least}")
    if value is not None and value > most:
        raise ConversionError(f"{option} {value} must be at most {most}")


def stored_dtype(stored: dict[str, Any], fallback: torch.dtype) -> torch.dtype:
    """The dtype that a config.json names, else `fallback`."""
    name = stored.get("dtype") or stored.get("torch_dtype")
    return getattr(torch, name) if isinstance(name, str) and name in DTYPE_NAMES else fallback


def copy_licences(source: Path, out: Path) -> None:
    for pattern in LICENCES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
