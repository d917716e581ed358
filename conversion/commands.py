"""What the commands that write a checkpoint have in common: arguments, errors, and the files that go along."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from conversion.key_maps import ConversionError


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
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConversionError for a file that is not there or no JSON object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return tree


def read_config(stored: dict[str, Any]) -> PreTrainedConfig:
    """A config.json as its class in transformers reads it. Raises ConversionError where it is contradictory."""
    try:
        return CONFIG_MAPPING[stored["model_type"]].from_dict(stored)
    except (ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"the source's config.json cannot be read by transformers: {error}") from error


def stored_dtype(stored: dict[str, Any], fallback: torch.dtype) -> torch.dtype:
    """The dtype that a config.json names, else `fallback`."""
    name = stored.get("dtype") or stored.get("torch_dtype")
    return getattr(torch, name) if name in DTYPE_NAMES else fallback


def copy_licences(source: Path, out: Path) -> None:
    for pattern in LICENCES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
