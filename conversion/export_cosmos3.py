"""Turn an imported Cosmos 3 back into a checkpoint that diffusers loads, or that its training reads.

    python -m conversion.export_cosmos3 SOURCE OUT
    python -m conversion.export_cosmos3 SOURCE OUT --layout training

SOURCE is a folder or a name on the Hub. `Cosmos3OmniTransformer.from_pretrained(OUT)` loads OUT; in a pipeline it
stands in the place of `transformer/`. What `python -m conversion.import_cosmos3` kept comes back with it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.checkpoints import CheckpointReader, Entry, check_output, fetch, new_folder, provenance, write_tensors
from conversion.commands import add_arguments, copy_licences, exit_code, merge_layers, read_json, reading
from conversion.cosmos3_layout import DIFFUSERS, LAYOUTS, Layout, cosmos3_fields, renamed
from conversion.import_cosmos3 import NOT_RUN
from conversion.key_maps import ConversionError, KeyMap, Rule
from conversion.sizes import check_sizes
from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked, and not yet done.

    Attributes:
        fields: the content of diffusers' config.json.
        entries: the tensors to write.
        moves: our tensor -> its name there.
        layout: the layout of the target.
        reader: reads the model.
    """

    fields: dict[str, Any]
    entries: list[Entry]
    moves: dict[str, str]
    layout: Layout
    reader: CheckpointReader

    def describe(self) -> str:
        """List every tensor with its shape and origin, and the sums. Equal layers are one line, `layers.{0..35}`."""
        shapes = {entry.name: list(entry.shape) for entry in self.entries}
        lines = [f"{here} {shapes[there]} -> {there}" for here, there in self.moves.items()]
        size = sum(entry.num_bytes for entry in self.entries)
        return "\n".join([*merge_layers(lines), f"{self.layout.name} layout; {size:,} bytes"])


def export_cosmos3(
    source: str,
    out: Path,
    *,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Convert a model with the towers of Cosmos 3 to its own layout.

    Args:
        source: a folder, or a name on the Hub.
        out: a new folder; it appears whole or not at all.
        layout: `diffusers` or `training`; None: that of the import.
        dtype: of the weights; None: as stored.
        max_shard_size: size of a file of weights.
        revision: branch, tag or commit of a source on the Hub.
        overwrite: replace a checkpoint at `out`.
        dry_run: check and plan, write nothing.

    Raises:
        ConversionError: Cosmos 3 has no such model, or the checkpoint is not whole; the message says what to do.
    """
    check_output(out, overwrite)
    folder, commit = fetch(source, revision)
    plan = _plan(folder, source, layout, dtype)
    if dry_run:
        return plan
    record = {"command": "export_cosmos3", **provenance(source, folder, commit, plan.reader)}
    with new_folder(out, overwrite) as made:
        (made / "config.json").write_text(json.dumps(plan.fields, indent=2) + "\n", encoding="utf-8")
        copy_licences(folder, made)
        (made / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_tensors(made, plan.entries, max_shard_size, weights=plan.layout.weights)
    return plan


def _plan(folder: Path, source: str, wanted_layout: str | None, dtype: torch.dtype | None) -> Plan:
    # The configuration, and what the import has read.
    stored = read_json(folder / "config.json")
    if stored.get("model_type") != MoTTransfusionConfig.model_type:
        raise ConversionError(
            f"{source} has model_type={stored.get('model_type')!r}, not {MoTTransfusionConfig.model_type!r}"
        )
    reader = CheckpointReader(folder)
    check_sizes(stored, reader, folder / "config.json")
    with reading(f"{folder / 'config.json'} cannot be read"):
        config = MoTTransfusionConfig.from_dict(stored)
    path = folder / "conversion.json"
    record = read_json(path) if path.is_file() else {}
    record = record if record.get("architecture") == "cosmos3" else {}
    origin = LAYOUTS[record.get("layout", DIFFUSERS.name)]
    layout = origin if wanted_layout is None else LAYOUTS[wanted_layout]
    kept = CheckpointReader(folder, NOT_RUN) if (folder / NOT_RUN).is_file() else None
    fields = cosmos3_fields(config, record.get("transformer", {}))
    if kept is None:
        fields |= {"action_gen": False, "sound_gen": False}

    # The tensors: those of the model, and those that were kept.
    with torch.device("meta"):
        model = MoTTransfusionModel(config)
    back = KeyMap([Rule(rule.target, rule.source) for rule in layout.rules])
    entries, moves = [], {}
    for name, tensor in model.state_dict().items():
        (there,) = back.forward(name)
        if name not in reader:
            raise ConversionError(f"{folder} does not hold {name}, which its config.json says")
        reader.check(name, tuple(tensor.shape))
        entries.append(reader.entry(name, there, dtype))
        moves[name] = there
    if surplus := sorted(set(reader.names) - set(moves)):
        raise ConversionError(f"{folder} holds {surplus[0]} and {len(surplus) - 1} more that Cosmos 3 does not have")
    for name in kept.names if kept is not None else ():
        there = renamed(name, origin, layout)
        if there is None:
            raise ConversionError(f"{name} has no place in the {layout.name} layout; take --layout {origin.name}")
        entries.append(kept.entry(name, there, dtype))
        moves[name] = there
    return Plan(fields, entries, moves, layout, reader)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.export_cosmos3",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "a model that import_cosmos3 made, or one like it")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="(default: that of the import)")
    options = parser.parse_args(arguments)

    def work() -> None:
        plan = export_cosmos3(
            options.source,
            options.out,
            layout=options.layout,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            max_shard_size=options.max_shard_size,
            revision=options.revision,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
        )
        print(plan.describe() if options.dry_run else options.out)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
