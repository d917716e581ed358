"""Give a model that was imported from BAGEL back in BAGEL's own layout, for its own code and whoever reads it.

    python -m conversion.export_bagel SOURCE OUT

SOURCE is what `python -m conversion.import_bagel` wrote, or that model after further training. OUT holds
`ema.safetensors`, `ae.safetensors`, `llm_config.json`, `vit_config.json` and the tokenizer. A tensor that was not
trained is the original's, byte for byte.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conversion.bagel_layout import (
    LLM_CONFIG,
    VAE,
    VIT_CONFIG,
    WEIGHTS,
    bagel_configs,
    bagel_map,
    check_expressible,
)
from conversion.bagel_processor import SETTINGS_FILES
from conversion.checkpoints import CheckpointReader, Entry, check_output, fetch, new_folder, write_tensors
from conversion.commands import copy_licences, exit_code, merge_layers, read_json, reading
from conversion.flux_vae import WEIGHTS as VAE_WEIGHTS
from conversion.flux_vae import flux_vae_map, is_pointwise
from conversion.key_maps import ConversionError, KeyMap
from conversion.tokenizer_files import copy_tokenizer
from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked, and not yet done.

    Attributes:
        config: of the model.
        files: name of a file of weights -> its tensors.
        configs: name of a file -> its content.
        record: what an import has written down; empty without one.
    """

    config: MoTTransfusionConfig
    files: dict[str, list[Entry]]
    configs: dict[str, dict[str, Any]]
    record: dict[str, Any]

    def describe(self) -> str:
        """List every tensor with its shape, and the sums. Equal layers are one line, `layers.{0..27}`."""
        lines = []
        for file, entries in self.files.items():
            lines += merge_layers(f"{file}: {entry.name} {list(entry.shape)}" for entry in entries)
            lines.append(f"{file}: {len(entries)} tensors, {sum(entry.num_bytes for entry in entries):,} bytes")
        return "\n".join([*lines, *self.configs])


def export_bagel(source: str, out: Path, overwrite: bool = False, dry_run: bool = False) -> Plan:
    """Write a model in BAGEL's layout.

    Args:
        source: a folder, or a name on the Hub.
        out: a new folder; it appears whole or not at all.
        overwrite: replace a folder of BAGEL at `out`.
        dry_run: check and plan, write nothing.

    Raises:
        ConversionError: the model is none that BAGEL's loader builds, or its checkpoint is not whole.
    """
    check_output(out, overwrite, known_by=LLM_CONFIG)
    folder, _ = fetch(source)
    plan = _plan(folder)
    if dry_run:
        return plan
    with new_folder(out, overwrite, known_by=LLM_CONFIG) as made:
        for file, entries in plan.files.items():
            size = sum(entry.num_bytes for entry in entries) + 1  # one file, as its loader reads it
            write_tensors(made, entries, size, weights=file)
        for file, content in plan.configs.items():
            (made / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _write_tokenizer(folder, made, plan)
        copy_licences(folder, made)
    return plan


def _write_tokenizer(folder: Path, made: Path, plan: Plan) -> None:
    """Write the tokenizer without what an import added to it, and with the settings that it had before."""
    size = plan.record.get("tokenizer_size", plan.config.vocab_size)
    copy_tokenizer(folder, made, min(size, plan.config.vocab_size))
    if (kept := plan.record.get("tokenizer_files")) is not None:
        for name in SETTINGS_FILES:
            (made / name).unlink(missing_ok=True)
            if name in kept:
                (made / name).write_text(kept[name], encoding="utf-8")


def _plan(folder: Path) -> Plan:
    # The configuration, with what an import has read beside it.
    stored = read_json(folder / "config.json")
    if stored.get("model_type") != MoTTransfusionConfig.model_type:
        raise ConversionError(
            f"{folder} has model_type={stored.get('model_type')!r}; only a {MoTTransfusionConfig.model_type!r} with "
            "the parts of BAGEL can go back"
        )
    with reading(f"{folder / 'config.json'} cannot be read"):
        config = MoTTransfusionConfig.from_dict(stored)
    check_expressible(config)
    record = read_json(folder / "conversion.json") if (folder / "conversion.json").is_file() else {}
    names = (LLM_CONFIG, VIT_CONFIG)
    read = [record.get(name.removesuffix(".json"), {}) for name in names]

    # Every tensor of the model has a place in one of the two files.
    reader = CheckpointReader(folder)
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in MoTTransfusionModel(config).state_dict().items()}
    if lacking := [name for name in wanted if name not in reader]:
        raise ConversionError(f"{folder} lacks {lacking[0]} and {len(lacking) - 1} more tensors; is it whole?")
    own = [name for name in reader.names if not name.startswith(VAE)]
    files = {WEIGHTS: _entries(reader, own, wanted, bagel_map())}
    if config.vae_config is not None:
        depth = len(config.vae_config["block_out_channels"])
        vae = [name for name in reader.names if name.startswith(VAE)]
        files[VAE_WEIGHTS] = _entries(reader, vae, wanted, flux_vae_map(depth, VAE))
    return Plan(config, files, dict(zip(names, bagel_configs(config, *read), strict=True)), record)


def _entries(reader: CheckpointReader, names: list[str], wanted: dict[str, tuple], key_map: KeyMap) -> list[Entry]:
    """Return the tensors of one file under their names there, as they are stored."""
    entries = []
    for name in names:
        origin = key_map.backward(name)
        if origin is None or name not in wanted:
            raise ConversionError(f"{reader.folder} has {name}, which has no place in BAGEL")
        reader.check(name, wanted[name])
        shape = (*wanted[name], 1, 1) if is_pointwise(origin.name) else wanted[name]
        entries.append(Entry(origin.name, shape, reader.dtype(name), partial(_shaped, reader, name, shape)))
    return sorted(entries, key=lambda entry: entry.name)


def _shaped(reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return reader.read(name).view(shape)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.export_bagel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="what import_bagel wrote: a folder, or a name on the Hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of BAGEL that OUT is")
    options = parser.parse_args(arguments)

    def work() -> None:
        plan = export_bagel(options.source, options.out, options.overwrite, options.dry_run)
        print(plan.describe() if options.dry_run else options.out)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
