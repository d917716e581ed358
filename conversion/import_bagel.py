"""Turn BAGEL's own folder into a Transfusion model that reads, looks at and draws pictures.

    python -m conversion.import_bagel SOURCE OUT
    python -m conversion.import_bagel SOURCE OUT --vae FOLDER --dtype bfloat16
    python -m conversion.import_bagel SOURCE OUT --token-ids im_start=150 im_end=151 vision_start=152 vision_end=153

SOURCE holds `ema.safetensors`, `ae.safetensors`, `llm_config.json`, `vit_config.json` and a tokenizer, as
`ByteDance-Seed/BAGEL-7B-MoT` and models that were fine-tuned from it do. Every tensor is accounted for. Tensors are
read and written one by one; `python -m conversion.export_bagel` gives the same tensors back.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from conversion.bagel_layout import LLM_CONFIG, VAE, VIT_CONFIG, bagel_map, checkpoint_reader, mot_config
from conversion.bagel_processor import (
    PLACEHOLDERS,
    SETTINGS_FILES,
    THINKING_PROMPTS,
    TOKENS,
    bagel_generation_config,
    bagel_processor,
    bagel_tokenizer,
)
from conversion.checkpoints import CheckpointReader, Entry, check_output, fetch, new_folder, provenance, write_model
from conversion.commands import add_arguments, copy_licences, exit_code, merge_layers, read_json
from conversion.flux_vae import WEIGHTS as VAE_WEIGHTS
from conversion.flux_vae import flux_vae_config, flux_vae_map, is_pointwise
from conversion.key_maps import ConversionError
from conversion.tokenizer_files import copy_tokenizer
from conversion.vae import read_vae
from modeling_mot import MoTProcessor, MoTTransfusionModel
from modeling_mot.latent_vae import vae_config_of


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked, and not yet done.

    Attributes:
        model: on `meta`.
        entries: the tensors to write.
        moves: source tensor -> its name in the model, for all but the autoencoder.
        vae_tensors: how many tensors the autoencoder has.
        reader: reads the weights without the autoencoder.
        vae_reader: reads FLUX's autoencoder, if there is one.
        token_ids: name -> id of the tokens that the model knows.
        processor: of documents; None for a source without a tokenizer.
        tokenizer_size: how many tokens the source's tokenizer has.
    """

    model: MoTTransfusionModel
    entries: list[Entry]
    moves: dict[str, str]
    vae_tensors: int
    reader: CheckpointReader
    vae_reader: CheckpointReader | None
    token_ids: dict[str, int]
    processor: MoTProcessor | None
    tokenizer_size: int

    def describe(self) -> str:
        """List every tensor with its shape and target, and the sums. Equal layers are one line, `layers.{0..27}`."""
        shapes = {entry.name: list(entry.shape) for entry in self.entries}
        lines = [f"{there} -> {here} {shapes[here]}" for there, here in self.moves.items()]
        config, size = self.model.config, sum(entry.num_bytes for entry in self.entries)
        lines.append(f"{self.vae_tensors} tensors of the autoencoder -> {VAE}")
        pictures = "latents alone, for lack of an autoencoder" if config.vae_config is None else "pixels"
        return "\n".join(
            [
                *merge_layers(lines),
                f"towers {', '.join(config.tower_names)}; tokens {self.token_ids}; pictures are drawn as {pictures}; "
                f"{'no processor, for lack of a tokenizer' if self.processor is None else 'with a processor'}",
                f"{config.num_parameters():,} parameters, {config.num_parameters(active=True):,} of them active for a "
                f"token; {size:,} bytes",
            ]
        )


def import_bagel(
    source: str,
    out: Path,
    *,
    vae: str | None = None,
    token_ids: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    ignored_fields: Sequence[str] = (),
    thinking_prompts: Mapping[str, str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Convert a folder of BAGEL to a folder that `AutoModel` loads.

    Args:
        source: a folder, or a name on the Hub.
        out: a new folder; it appears whole or not at all.
        vae: folder or Hub name of a diffusers autoencoder, instead of `ae.safetensors`.
        token_ids: ids of some of `TOKENS` and `PLACEHOLDERS`; the tokenizer says the others.
        dtype: of the weights, the autoencoder's excepted; None: as stored.
        max_shard_size: size of a file of weights.
        revision: branch, tag or commit of a source on the Hub.
        ignored_fields: fields of `llm_config.json` that change nothing, on the user's word.
        thinking_prompts: "text" and "image" -> the text that asks for a thought; default: texts of ours.
        overwrite: replace a checkpoint at `out`.
        dry_run: check and plan, write nothing.

    Raises:
        ConversionError: the source is no BAGEL, or not whole; the message says what to do.
    """
    check_output(out, overwrite)
    folder, commit = fetch(source, revision)
    stored = {name: read_json(folder / name) for name in (LLM_CONFIG, VIT_CONFIG)}
    prompts = THINKING_PROMPTS if thinking_prompts is None else thinking_prompts
    plan = _plan(folder, stored, vae, token_ids or {}, dtype, ignored_fields, prompts)
    if dry_run:
        return plan
    record = {
        "command": "import_bagel",
        **provenance(source, folder, commit, plan.reader),
        "architecture": "bagel",
        "token_ids": plan.token_ids,
        **{name.removesuffix(".json"): content for name, content in stored.items()},
    }
    if plan.vae_reader is not None:
        record["sha256"] |= plan.vae_reader.fingerprints()
    if plan.processor is not None:
        settings = {name: folder / name for name in SETTINGS_FILES if (folder / name).is_file()}
        record["tokenizer_files"] = {name: path.read_text(encoding="utf-8") for name, path in settings.items()}
        record["tokenizer_size"] = plan.tokenizer_size
    with new_folder(out, overwrite) as made:
        if plan.processor is not None:
            copy_tokenizer(folder, made, plan.model.config.vocab_size)
            for name in SETTINGS_FILES:
                (made / name).unlink(missing_ok=True)
        write_model(made, plan.model, plan.entries, max_shard_size, plan.processor)
        copy_licences(folder, made)
        (made / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return plan


def _plan(
    folder: Path,
    stored: Mapping[str, dict],
    vae: str | None,
    given_ids: Mapping[str, int],
    dtype: torch.dtype | None,
    ignored_fields: Sequence[str],
    thinking_prompts: Mapping[str, str],
) -> Plan:
    # The autoencoder, and the configuration of the whole.
    reader = checkpoint_reader(folder)
    autoencoder = _Autoencoder.of(folder, vae)
    tokenizer, tokenizer_size = bagel_tokenizer(folder)
    tokens = _token_ids(folder, given_ids, reader, tokenizer)
    config = mot_config(reader, stored[LLM_CONFIG], stored[VIT_CONFIG], autoencoder.config, tokens, ignored_fields)
    config.dtype = dtype or reader.dtype("language_model.model.embed_tokens.weight")
    processor = None if tokenizer is None else bagel_processor(tokenizer, config, thinking_prompts)
    if tokenizer is not None and len(tokenizer) < config.vocab_size:
        config.tokenizer_vocab_size = len(tokenizer)  # rows behind it stand for no token

    # A model that takes no memory, and the origin of each of its tensors.
    with torch.device("meta"):
        model = MoTTransfusionModel(config)
    model.generation_config = bagel_generation_config(tokens)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    entries, moves = [], {}
    for name, (origin, _) in bagel_map().origins(reader.names, [n for n in wanted if not n.startswith(VAE)]).items():
        reader.check(origin, wanted[name])
        entries.append(reader.entry(origin, name, dtype))
        moves[origin] = name
    own = {name: shape for name, shape in wanted.items() if name.startswith(VAE)}
    entries += autoencoder.entries(own)
    return Plan(model, entries, moves, len(own), reader, autoencoder.reader, tokens, processor, tokenizer_size)


# ------------------------------------------------------------------------------------------------------ the autoencoder


@dataclass(frozen=True)
class _Autoencoder:
    """The autoencoder of FLUX in a file, one of diffusers in memory, or none.

    Attributes:
        config: its fields; None for none.
        reader: reads FLUX's.
        tensors: of diffusers'.
    """

    config: dict[str, Any] | None = None
    reader: CheckpointReader | None = None
    tensors: dict[str, torch.Tensor] | None = None

    @classmethod
    def of(cls, folder: Path, vae: str | None) -> "_Autoencoder":
        if vae is not None:
            read = read_vae(vae)
            return cls(vae_config_of(read), tensors=read.state_dict())
        if not (folder / VAE_WEIGHTS).is_file():
            return cls()
        reader = CheckpointReader(folder, VAE_WEIGHTS)
        return cls(flux_vae_config(reader), reader)

    def entries(self, wanted: Mapping[str, tuple[int, ...]]) -> list[Entry]:
        """Return the tensors to write; every tensor of FLUX's file is one of them."""
        if self.tensors is not None:
            made = {f"{VAE}{name}": tensor for name, tensor in self.tensors.items()}
            return [Entry(name, shape, made[name].dtype, made[name].contiguous) for name, shape in wanted.items()]
        if self.reader is None:
            return []
        entries = []
        key_map = flux_vae_map(len(self.config["block_out_channels"]), VAE)
        for name, (origin, _) in key_map.origins(self.reader.names, wanted).items():
            shape = wanted[name]
            self.reader.check(origin, (*shape, 1, 1) if is_pointwise(origin) else shape)
            entries.append(Entry(name, shape, self.reader.dtype(origin), partial(self._shaped, origin, shape)))
        return entries

    def _shaped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.reader.read(name).view(shape)


# ----------------------------------------------------------------------------------------------------------- the tokens


def _token_ids(
    folder: Path, given: Mapping[str, int], reader: CheckpointReader, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, int]:
    """Find the ids of `TOKENS` and `PLACEHOLDERS`: of the tokenizer, or as given."""
    if tokenizer is not None:
        found = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (TOKENS | PLACEHOLDERS).items()}
        for name, token in given.items():
            if token != found[name]:
                raise ConversionError(f"--token-ids {name}={token}, but the tokenizer in {folder} says {found[name]}")
        return found
    found = dict(given)
    if missing := [name for name in TOKENS if name not in found]:
        raise ConversionError(
            f"{folder} has no tokenizer, which would say the ids of {', '.join(TOKENS)}; name them: --token-ids "
            + " ".join(f"{name}=ID" for name in missing)
        )

    # A patch needs a token that no text has: an id that has no row in the vocabulary.
    size = reader.shape("language_model.model.embed_tokens.weight")[0] if _is_bagel(reader) else 0
    for name in PLACEHOLDERS:
        if name not in found:
            found[name] = next(token for token in count(size) if token not in found.values())

    # The configuration checks the other tokens; it does not hold the one that begins texts.
    start = found["im_start"]
    if twins := [name for name, token in found.items() if token == start and name != "im_start"]:
        raise ConversionError(
            f"--token-ids im_start={start} and {twins[0]}={start} must differ: a token has one meaning"
        )
    if _is_bagel(reader) and start >= size:
        raise ConversionError(f"--token-ids im_start={start} must be a text token, in [0, {size})")
    return found


def _is_bagel(reader: CheckpointReader) -> bool:
    return "language_model.model.embed_tokens.weight" in reader


def parse_token_ids(words: Sequence[str]) -> dict[str, int]:
    """Read NAME=ID words. Raises ConversionError for unknown names and for what is no number."""
    known, found = (*TOKENS, *PLACEHOLDERS), {}
    for word in words:
        name, separator, number = word.partition("=")
        name = next((short for short, token in TOKENS.items() if name == token), name)
        if not separator or name not in known or not number.isdecimal():
            raise ConversionError(f"--token-ids {word!r} is not NAME=ID with one of {', '.join(known)}")
        if name in found:
            raise ConversionError(f"--token-ids names {name!r} twice; say once which id it has")
        found[name] = int(number)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.import_bagel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "BAGEL's own folder, or that of a model fine-tuned from it")
    parser.add_argument(
        "--vae", metavar="FOLDER", help="an autoencoder of diffusers, folder or Hub name, instead of ae.safetensors"
    )
    ids = "ids of tokens, for a SOURCE without a tokenizer: im_start, im_end, vision_start and vision_end; and of the "
    ids += "placeholders image and vision (default: Qwen's, or ids behind the vocabulary)"
    parser.add_argument("--token-ids", nargs="+", default=[], metavar="NAME=ID", help=ids)
    ignored = "fields of llm_config.json that change nothing, on your word"
    parser.add_argument("--ignore-fields", nargs="+", default=[], metavar="FIELD", help=ignored)
    asked = "a JSON file of the texts that ask for a thought before a text and before an image, "
    asked += '{"text": ..., "image": ...}: those that the checkpoint was trained with (default: texts of ours)'
    parser.add_argument("--thinking-prompts", type=Path, metavar="FILE", help=asked)
    options = parser.parse_args(arguments)

    def work() -> None:
        prompts = None if options.thinking_prompts is None else read_json(options.thinking_prompts)
        plan = import_bagel(
            options.source,
            options.out,
            vae=options.vae,
            token_ids=parse_token_ids(options.token_ids),
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            max_shard_size=options.max_shard_size,
            revision=options.revision,
            ignored_fields=options.ignore_fields,
            thinking_prompts=prompts,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
        )
        print(plan.describe() if options.dry_run else options.out)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
