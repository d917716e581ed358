"""Turn a MoT into a dense checkpoint: all towers, if they are equal, or one tower.

    python -m conversion.export_dense SOURCE OUT [--tower text] [--architecture llama] [--vocab-size N]

SOURCE is a folder or a name on the Hub. transformers loads OUT as one of its own models, without any code of this
package. The dense model has the logits that the MoT gives the tokens of that tower. At most two tensors are in memory
at a time.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig

from conversion.architectures import ARCHITECTURES, Architecture, architecture_of
from conversion.checkpoints import CheckpointReader, Entry, check_output, fetch, new_folder, provenance, write_tensors
from conversion.commands import (
    add_arguments,
    copy_licences,
    exit_code,
    merge_layers,
    read_config,
    read_generation_config,
    read_json,
)
from conversion.key_maps import ConversionError, KeyMap
from conversion.sizes import check_sizes
from conversion.tokenizer_files import check_cut, copy_tokenizer
from modeling_mot import MoTConfig, MoTTransfusionConfig


MODEL_TYPES = (MoTConfig.model_type, MoTTransfusionConfig.model_type)
ROWS_ARE_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")
BESIDE_THE_TRANSFORMER = ("patchifier.", "encoders.", "position_tables.", "vae.")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked, and not yet done.

    Attributes:
        config: the dense model's configuration.
        generation: the dense model's settings of generation.
        architecture: the dense model's architecture.
        entries: the tensors to write.
        copies: dense tensor -> the MoT's tensors that are equal and become it.
        left_behind: the MoT's tensors that no dense tensor comes from.
        cut_off: special tokens that no longer have a row, such as "pad_token_id=61", and are no longer named.
        reader: reads the MoT.
    """

    config: PreTrainedConfig
    generation: GenerationConfig
    architecture: Architecture
    entries: list[Entry]
    copies: dict[str, list[str]]
    left_behind: list[str]
    cut_off: list[str]
    reader: CheckpointReader

    def describe(self) -> str:
        """List every tensor with its shape and origin, and the sums. Equal layers are one line, `layers.{0..31}`."""
        lines = [f"{' = '.join(self.copies[entry.name])} -> {entry.name} {list(entry.shape)}" for entry in self.entries]
        lines += [f"{name} stays behind" for name in self.left_behind]
        lines += [f"{token} is cut off" for token in self.cut_off]
        parameters = sum(entry.num_elements for entry in self.entries)
        size = sum(entry.num_bytes for entry in self.entries)
        sums = f"{self.config.architectures[0]}: {parameters:,} parameters, {size:,} bytes"
        return "\n".join([*merge_layers(lines), sums])


def export_dense(
    source: str,
    out: Path,
    tower: str | None = None,
    architecture: str | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Convert a checkpoint of a `MoTForCausalLM` or `MoTTransfusionModel` to one of a dense model of transformers.

    Args:
        source: a folder, or a name on the Hub.
        out: a new folder; it appears whole or not at all.
        tower: the tower to keep; None: all towers, which must then be equal, tensor by tensor.
        architecture: model type of transformers; None: the architecture of the MoT's own source, if it is recorded and
            still fits, else the first architecture that computes the same.
        vocab_size: keep the rows of tokens below this; None: keep all rows, also of images and speech.
        dtype: dtype of the weights; None: as stored.
        max_shard_size: size of a file of weights.
        revision: branch, tag or commit of a source on the Hub.
        overwrite: replace a checkpoint at `out`.
        dry_run: check, compare and plan, write nothing.

    Raises:
        ConversionError: the towers differ, no dense architecture has such layers, or the checkpoint is not what its
            configuration says; the message says what to do.
    """
    # Everything that can be refused is refused here, before a file is written.
    check_output(out, overwrite)
    folder, commit = fetch(source, revision)
    plan = _plan(folder, source, tower, architecture, vocab_size, dtype)
    if dry_run:
        return plan

    # The folder appears whole, with the record of where it came from.
    record = {
        "command": "export_dense",
        **provenance(source, folder, commit, plan.reader),
        "architecture": plan.architecture.model_type,
        "tower": tower,
    }
    with new_folder(out, overwrite) as made:
        plan.config.save_pretrained(made)
        plan.generation.save_pretrained(made)
        copy_tokenizer(folder, made, plan.config.vocab_size)
        copy_licences(folder, made)
        (made / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_tensors(made, plan.entries, max_shard_size)
    return plan


def _plan(
    folder: Path,
    source: str,
    tower: str | None,
    architecture: str | None,
    vocab_size: int | None,
    dtype: torch.dtype | None,
) -> Plan:
    """Decide everything about the conversion of the checkpoint in `folder`, which the user calls `source`."""
    stored = read_json(folder / "config.json")
    if stored.get("model_type") not in MODEL_TYPES:
        raise ConversionError(
            f"{source} has model_type={stored.get('model_type')!r} and is no MoT, which has one of "
            f"{', '.join(MODEL_TYPES)}"
        )
    reader = CheckpointReader(folder)
    check_sizes(stored, reader, folder / "config.json")

    # The configuration of the dense model, and the MoT's tensors that become each of its tensors.
    config = read_config(stored)
    modules = _modules_of(config, tower)
    row, dense = dense_architecture(_config_of(config, tower), architecture, _recorded_architecture(folder))
    copies, left_behind = _copies(reader, config, dense, row, modules, tower)
    generation = _generation_config(folder, dense)
    cut_off = [] if vocab_size is None else _cut_vocabulary(folder, dense, generation, vocab_size)

    # Tensors that are to become one must be equal; the first is written.
    first = {name: same[0] for name, same in copies.items()}
    dense.dtype = dtype or reader.dtype(first["model.embed_tokens.weight"])
    entries = [_entry(reader, name, first[name], dtype, dense.vocab_size) for name in copies]
    _check_equal(reader, copies)
    return Plan(dense, generation, row, entries, copies, left_behind, cut_off, reader)


# ------------------------------------------------------------------------------------------------------- configurations


def _modules_of(config: MoTConfig, tower: str | None) -> dict[str, list[str]]:
    """Part of a layer -> the modules of the tower, or of all towers."""
    if tower is not None and tower not in config.tower_names:
        raise ConversionError(f"--tower {tower} is none of the checkpoint's towers, {', '.join(config.tower_names)}")
    parts = {part: config.part_names(part) for part in ("query_key_value", "attention", "feed_forward", "norm")}
    if tower is not None:
        parts = {part: [tower] if tower in names else names for part, names in parts.items()}
    if mixtures := [name for name in parts["feed_forward"] if name in config.moe_towers]:
        others = [name for name in config.tower_names if name not in config.moe_towers]
        way_out = f"name another with --tower ({', '.join(others)})" if others and mixtures != ["shared"] else ""
        raise ConversionError(
            f"the feed-forward of tower {mixtures[0]!r} is a mixture of {config.num_experts} experts, which no dense "
            f"architecture has{'; ' * bool(way_out)}{way_out}"
        )
    return parts


def _config_of(config: MoTConfig, tower: str | None) -> MoTConfig:
    """Return the configuration of the tower, or of all towers, which must then be of one kind."""
    if tower is None:
        if config.tower_configs:
            raise ConversionError(
                f"the towers differ by tower_configs={config.tower_configs}; name the one to keep with --tower "
                f"({', '.join(config.tower_names)})"
            )
        return config
    own = config.tower_config(tower)
    if own.hidden_size != config.hidden_size:
        raise ConversionError(
            f"tower {tower!r} is hidden_size={own.hidden_size} wide, and the embeddings are {config.hidden_size}: it "
            f"is no language model of its own; the tower of text is {config.towers['text']!r}"
        )
    return own


def dense_architecture(
    config: MoTConfig, wanted: str | None = None, recorded: str | None = None
) -> tuple[Architecture, PreTrainedConfig]:
    """Find an architecture of transformers, and its configuration, that computes the same as a tower of `config`.

    Args:
        wanted: the model type; None: `recorded` if it fits, else the first of `ARCHITECTURES` that fits.

    Raises:
        ConversionError: none fits; each is named with the fields that it cannot express.
    """
    if wanted is not None:
        return architecture_of(wanted), _source_config(architecture_of(wanted), config)
    reasons = []
    for model_type in sorted(ARCHITECTURES, key=lambda model_type: model_type != recorded):
        try:
            return ARCHITECTURES[model_type], _source_config(ARCHITECTURES[model_type], config)
        except ConversionError as error:
            reasons.append(str(error))
    raise ConversionError("\n  ".join(["no dense architecture has the layers of this MoT:", *reasons]))


def _source_config(architecture: Architecture, config: MoTConfig) -> PreTrainedConfig:
    if "hidden_dropout" not in architecture.renamed.values():
        config = copy.deepcopy(config)
        config.hidden_dropout = 0.0  # it acts in training alone
    dense = architecture.source_config(config)
    dense.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(dense)].__name__]
    return dense


def _recorded_architecture(folder: Path) -> str | None:
    """Return the model type of the checkpoint that `conversion.upcycle` read."""
    path = folder / "conversion.json"
    return read_json(path).get("architecture") if path.is_file() else None


def _cut_vocabulary(folder: Path, dense: PreTrainedConfig, generation: GenerationConfig, vocab_size: int) -> list[str]:
    """Cut the rows from `vocab_size` on.  -> the special tokens that have lost their row, for `Plan.cut_off`"""
    if not 1 <= vocab_size <= dense.vocab_size:
        raise ConversionError(f"--vocab-size {vocab_size} must be from 1 to the checkpoint's {dense.vocab_size}")
    check_cut(folder, vocab_size)

    # A setting that names a token without a row would name another token, or none.
    dense.vocab_size = vocab_size
    cut_off = []
    for settings in (dense, generation):
        for field in SPECIAL:
            value = getattr(settings, field)
            tokens = value if isinstance(value, list) else [] if value is None else [value]
            if kept := [token for token in tokens if token < vocab_size]:
                setattr(settings, field, kept if isinstance(value, list) else value)
            else:
                setattr(settings, field, None)
            cut_off += [f"{field}={token}" for token in tokens if token not in kept]
    return list(dict.fromkeys(cut_off))


def _generation_config(source: Path, dense: PreTrainedConfig) -> GenerationConfig:
    """Return the source's settings of generation without the fields that only a MoT reads."""
    generation = read_generation_config(source)
    if generation is None:
        return GenerationConfig.from_model_config(dense)
    for name in set(vars(generation)) - set(vars(GenerationConfig())):
        delattr(generation, name)
    return generation


# -------------------------------------------------------------------------------------------------------------- tensors


def _copies(
    reader: CheckpointReader,
    config: MoTConfig,
    dense: PreTrainedConfig,
    architecture: Architecture,
    modules: dict[str, list[str]],
    tower: str | None,
) -> tuple[dict[str, list[str]], list[str]]:
    """Return (dense tensor -> the MoT's tensors that become it, the MoT's tensors that are left behind)."""
    # The tensors of the dense model, and their names in the MoT.
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in MODEL_FOR_CAUSAL_LM_MAPPING[type(dense)](dense).state_dict().items()}
    if dense.tie_word_embeddings:
        del shapes["lm_head.weight"]
    others = set(config.tower_names) - {tower} if tower is not None else set()
    key_map = KeyMap(architecture.key_map(config).rules, modules | {"mixture": [], "expert": []})
    copies = {name: key_map.forward(name) for name in shapes}
    wanted = {target: shapes[name] for name, targets in copies.items() for target in targets}

    # Other towers, patchifier and VAE stay behind; nothing else may be left over.
    left_behind = [
        name
        for name in reader.names
        if name not in wanted and (name.startswith(BESIDE_THE_TRANSFORMER) or not others.isdisjoint(name.split(".")))
    ]
    missing = [f"missing: {name}" for name in wanted if name not in reader]
    surplus = [f"not known: {name}" for name in sorted(set(reader.names) - set(wanted) - set(left_behind))]
    if missing or surplus:
        raise ConversionError(
            "\n  ".join([f"{reader.folder} does not hold the tensors that its config.json says:", *missing, *surplus])
        )
    for name, shape in wanted.items():
        reader.check(name, shape)
    return copies, left_behind


def _check_equal(reader: CheckpointReader, copies: dict[str, list[str]]) -> None:
    """Refuse towers that differ, and name the first two tensors that do."""
    differing = []
    for same in copies.values():
        tensors = (reader.read(name) for name in same)
        first = next(tensors)
        for name, tensor in zip(same[1:], tensors):
            if not torch.equal(first, tensor):
                largest = (first.double() - tensor.double()).abs().max()
                differing.append(f"{same[0]} and {name} by up to {largest:.3g}")
    if differing:
        raise ConversionError(
            f"the towers differ in {len(differing)} tensors: first {differing[0]}. Name the tower to keep with --tower"
        )


def _entry(reader: CheckpointReader, name: str, origin: str, dtype: torch.dtype | None, vocab_size: int) -> Entry:
    shape, dtype = reader.shape(origin), dtype or reader.dtype(origin)
    if name in ROWS_ARE_TOKENS:
        shape = (vocab_size, *shape[1:])
    return Entry(name, shape, dtype, partial(_read, reader, origin, shape[0], dtype))


def _read(reader: CheckpointReader, name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return reader.read(name)[:rows].to(dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.export_dense",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "a MoT")
    parser.add_argument("--tower", metavar="NAME", help="the tower to keep (default: all, which must be equal)")
    parser.add_argument(
        "--architecture",
        choices=tuple(ARCHITECTURES),
        help="(default: that of the checkpoint SOURCE was made of, or the first that computes the same)",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="keep the rows of tokens below N (default: all)")
    options = vars(parser.parse_args(arguments))
    if options["dtype"] is not None:
        options["dtype"] = getattr(torch, options["dtype"])

    def work() -> None:
        plan = export_dense(**options)
        print(plan.describe() if options["dry_run"] else options["out"])
        for token in plan.cut_off if not options["dry_run"] else ():
            print(f"note: {token} is cut off", file=sys.stderr)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
