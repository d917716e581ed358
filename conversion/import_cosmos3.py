"""Turn Cosmos 3 into a Transfusion model of two towers, a reasoner of text and a generator of latents.

    python -m conversion.import_cosmos3 SOURCE OUT
    python -m conversion.import_cosmos3 SOURCE OUT --dtype bfloat16 --dry-run
    python -m conversion.import_cosmos3 SOURCE OUT --token-ids eos=3 vision_start=4 vision_end=5

SOURCE is a pipeline of diffusers, its `transformer/`, or a checkpoint of the training with the same fields in its
config.json. Every tensor is accounted for. Those of sound and action are kept in `not_run.safetensors`, for
`python -m conversion.export_cosmos3`. Tensors are read and written one by one.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from conversion.checkpoints import (
    CheckpointReader,
    Entry,
    check_output,
    fetch,
    new_folder,
    provenance,
    write_model,
    write_tensors,
)
from conversion.commands import add_arguments, copy_licences, exit_code, merge_layers, read_json, reading
from conversion.cosmos3_layout import (
    PIPELINE,
    SCHEDULER,
    TOKENIZER,
    TRANSFORMER,
    Layout,
    find_layout,
    mot_fields,
    not_run_of,
    read_fields,
    sampling_settings,
)
from conversion.key_maps import ConversionError
from conversion.sizes import check_sizes
from conversion.tokenizer_files import copy_tokenizer
from conversion.vocabulary import has_tokenizer
from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel
from modeling_mot.hub_trust import load_tokenizer


NOT_RUN = "not_run.safetensors"
# The tokens that a model needs to know, and what Qwen's tokenizers call them.
TOKENS = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>"}
SOURCE_HELP = "a pipeline of Cosmos 3, its transformer, or a checkpoint of its training"


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked, and not yet done.

    Attributes:
        model: on `meta`.
        entries: the tensors to write.
        moves: source tensor -> its name in the model.
        not_run: the tensors that are kept beside the model.
        layout: of the source.
        reader: reads the source.
        stored: the content of its config.json.
        tokenizer: the folder of its tokenizer; None without one.
    """

    model: MoTTransfusionModel
    entries: list[Entry]
    moves: dict[str, str]
    not_run: list[Entry]
    layout: Layout
    reader: CheckpointReader
    stored: dict[str, Any]
    tokenizer: Path | None

    def describe(self) -> str:
        """List every tensor with its shape and target, and the sums. Equal layers are one line, `layers.{0..35}`."""
        lines = [f"{there} {list(self.reader.shape(there))} -> {here}" for there, here in self.moves.items()]
        lines += [f"{entry.name} {list(entry.shape)} is kept in {NOT_RUN}" for entry in self.not_run]
        config, size = self.model.config, sum(entry.num_bytes for entry in (*self.entries, *self.not_run))
        return "\n".join(
            [
                *merge_layers(lines),
                f"{self.layout.name} layout; towers {', '.join(config.tower_names)}; pictures are drawn as latents",
                f"{config.num_parameters():,} parameters, {config.num_parameters(active=True):,} of them active for a "
                f"token; {size:,} bytes",
            ]
        )


def import_cosmos3(
    source: str,
    out: Path,
    *,
    token_ids: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    ignored_fields: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Convert a checkpoint of Cosmos 3 to a folder that `AutoModel` loads.

    Args:
        source: a folder, or a name on the Hub.
        out: a new folder; it appears whole or not at all.
        token_ids: ids of `eos` and of some of `TOKENS`; the tokenizer says the others.
        dtype: of the weights; None: as stored.
        max_shard_size: size of a file of weights.
        revision: branch, tag or commit of a source on the Hub.
        ignored_fields: fields of its config.json that change nothing, on the user's word.
        overwrite: replace a checkpoint at `out`.
        dry_run: check and plan, write nothing.

    Raises:
        ConversionError: the source is no Cosmos 3, or not whole; the message says what to do.
    """
    check_output(out, overwrite)
    folder, commit = fetch(source, revision)
    plan = _plan(folder, token_ids or {}, dtype, ignored_fields)
    if dry_run:
        return plan
    record = {
        "command": "import_cosmos3",
        **provenance(source, folder, commit, plan.reader),
        "architecture": "cosmos3",
        "layout": plan.layout.name,
        "transformer": plan.stored,
    }
    with new_folder(out, overwrite) as made:
        write_model(made, plan.model, plan.entries, max_shard_size)
        if plan.not_run:
            write_tensors(made, plan.not_run, sys.maxsize, weights=NOT_RUN)
        if plan.tokenizer is not None:
            copy_tokenizer(plan.tokenizer, made, plan.model.config.vocab_size)
        copy_licences(folder, made)
        (made / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return plan


def _plan(folder: Path, token_ids: Mapping[str, int], dtype: torch.dtype | None, ignored: Sequence[str]) -> Plan:
    # The transformer of a pipeline, or the folder itself.
    is_pipeline = (folder / TRANSFORMER / "config.json").is_file()
    of_weights = folder / TRANSFORMER if is_pipeline else folder
    stored = read_json(of_weights / "config.json")
    layout, reader = find_layout(of_weights)
    check_sizes(stored, reader, of_weights / "config.json")
    fields = read_fields(stored, ignored)
    scheduler = _read_if_there(folder / SCHEDULER / "scheduler_config.json")
    tokenizer = next((place for place in (folder / TOKENIZER, folder) if has_tokenizer(place)), None)
    tokens = _tokens(tokenizer, token_ids, fields["vocab_size"], folder)
    with reading("no model of ours is what config.json says"):
        config = MoTTransfusionConfig(**mot_fields(fields), **tokens, timestep_shift=scheduler.get("flow_shift", 1.0))
    config.dtype = dtype or reader.dtype(layout.rules[0].source)

    # A model that takes no memory, and the origin of each of its tensors.
    with torch.device("meta"):
        model = MoTTransfusionModel(config)
    settings = sampling_settings(scheduler, _read_if_there(folder / PIPELINE))
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, **settings)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    entries, moves = [], {}
    for name, (origin, _) in layout.key_map.origins(reader.names, wanted).items():
        reader.check(origin, wanted[name])
        entries.append(reader.entry(origin, name, dtype))
        moves[origin] = name
    not_run = [reader.entry(name, name, dtype) for name in not_run_of(layout, reader.names)]
    return Plan(model, entries, moves, not_run, layout, reader, stored, tokenizer)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _tokens(tokenizer: Path | None, given: Mapping[str, int], vocab_size: int, folder: Path) -> dict[str, Any]:
    """Find the ids of EOS, of the markers and of the placeholder: as given, or of the tokenizer."""
    found = dict(given)
    if tokenizer is not None:
        with reading(f"the tokenizer in {tokenizer} cannot be loaded"):
            loaded = load_tokenizer(tokenizer)
        vocabulary = loaded.get_vocab()
        found = {name: vocabulary[token] for name, token in TOKENS.items() if token in vocabulary} | found
        found.setdefault("eos", loaded.eos_token_id)
    if missing := [name for name in ("eos", "vision_start", "vision_end") if found.get(name) is None]:
        raise ConversionError(
            f"{folder} has no tokenizer that says the ids of {', '.join(missing)}; name them: --token-ids "
            + " ".join(f"{name}=ID" for name in missing)
        )
    # A patch needs a token that no text has; without one it gets an id that has no row in the vocabulary.
    placeholder = found.get("image", vocab_size)
    return {
        "eos_token_id": found["eos"],
        "boi_token_id": found["vision_start"],
        "eoi_token_id": found["vision_end"],
        "image_token_id": placeholder,
        "num_placeholder_tokens": max(placeholder + 1 - vocab_size, 0),
    }


def parse_token_ids(words: Sequence[str]) -> dict[str, int]:
    """Read NAME=ID words. Raises ConversionError for unknown names and for what is no number."""
    known, found = ("eos", *TOKENS), {}
    for word in words:
        name, separator, number = word.partition("=")
        if not separator or name not in known or not number.isdecimal():
            raise ConversionError(f"--token-ids {word!r} is not NAME=ID with one of {', '.join(known)}")
        found[name] = int(number)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.import_cosmos3",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, SOURCE_HELP)
    ids = "ids of tokens, for a SOURCE without a tokenizer: eos, vision_start, vision_end, and the placeholder image "
    ids += "(default: Qwen's, or an id behind the vocabulary)"
    parser.add_argument("--token-ids", nargs="+", default=[], metavar="NAME=ID", help=ids)
    ignored = "fields of config.json that change nothing, on your word"
    parser.add_argument("--ignore-fields", nargs="+", default=[], metavar="FIELD", help=ignored)
    options = parser.parse_args(arguments)

    def work() -> None:
        plan = import_cosmos3(
            options.source,
            options.out,
            token_ids=parse_token_ids(options.token_ids),
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            max_shard_size=options.max_shard_size,
            revision=options.revision,
            ignored_fields=options.ignore_fields,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
        )
        print(plan.describe() if options.dry_run else options.out)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
