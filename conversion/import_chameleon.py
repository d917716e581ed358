"""Make a MoT of transformers' Chameleon: its dense self, or a tower for each modality, with its pictures' tokens.

    python -m conversion.import_chameleon SOURCE OUT [--variant dense|mot] [--image-decoder PATH] [--dtype TYPE]

SOURCE is a folder or a name on the Hub. Ids stay Chameleon's own, and logits are equal, image tokens included, which
transformers hides. One tensor is in memory at a time, beside the VQ-VAE.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import ChameleonConfig, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from conversion.architectures import Architecture
from conversion.chameleon_pictures import image_tokenizer, picture_settings
from conversion.chameleon_vocabulary import CHAT_TEMPLATE, ImageVocabulary, convert_tokenizer
from conversion.checkpoints import CheckpointReader, Entry, check_output, fetch, new_folder, write_tensors
from conversion.key_maps import ConversionError
from modeling_mot import MoTConfig, MoTForCausalLM, MoTProcessor


VQ_VAE = "model.vqmodel."
VARIANTS = ("mot", "dense", "untied-feed-forward", "untied-feed-forward-attention")
CHAMELEON = Architecture(
    "chameleon",
    same=("attention_bias", "mlp_bias"),
    fixed={"qk_norm": "layer"},
    computed={"norm_position": lambda config: "post" if config.swin_norm else "pre"},
    inverse={"swin_norm": lambda config: config.norm_position == "post"},
)
# Read here; model_parallel_size is of a layout that transformers' conversion has undone: each head has its own weights.
_READ = ("vq_config", "vocabulary_map", "image_token_id", "model_parallel_size")


@dataclass(frozen=True)
class Plan:
    """What is to be written, before anything is.

    Attributes:
        config: of the MoT.
        entries: its tensors.
        picture_names: the source's tensors of the VQ-VAE.
        moves: source tensor -> its targets.
    """

    config: MoTConfig
    entries: list[Entry]
    picture_names: list[str]
    moves: dict[str, list[str]]

    def describe(self) -> str:
        """Every tensor with its shape and place, and the sums."""
        by_name = {entry.name: entry for entry in self.entries}
        lines = []
        for source, targets in self.moves.items():
            entry = by_name[targets[0]]
            lines.append(f"{source} {list(entry.shape)} -> {', '.join(targets)}")
        lines.append(f"{VQ_VAE}* ({len(self.picture_names)} tensors) -> image_tokenizer/")
        total, active = self.config.num_parameters(), self.config.num_parameters(active=True)
        size = sum(entry.num_bytes for entry in self.entries)
        lines.append(f"{total:,} parameters, {active:,} active, {size:,} bytes, towers {self.config.tower_names}")
        return "\n".join(lines)


def import_chameleon(
    source: str,
    out: Path,
    variant: str = "mot",
    image_decoder: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Convert a checkpoint of `ChameleonForConditionalGeneration` to a folder that `AutoModelForCausalLM` loads.

    Args:
        source: a folder, or a name on the Hub.
        out: a new folder; it appears whole or not at all.
        variant: `mot` (towers that start as copies), `dense`, or one that unties a part of the layers.
        image_decoder: safetensors of a VQGAN that has the decoder, for a source without one; see
            `chameleon_pictures.read_decoder`. Without any, the processor reads pictures and draws none.
        dtype: of the transformer; None: as stored.
        max_shard_size: of a file of weights.
        revision: of a source on the Hub.
        overwrite: replace a checkpoint at `out`.
        dry_run: check and plan, write nothing.

    Raises:
        ConversionError: the source is no Chameleon or has what a MoT cannot express; the message says what to do.
    """
    check_output(out, overwrite)
    folder, commit = fetch(source, revision)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if stored.get("model_type") != "chameleon":
        raise ConversionError(
            f"{source} has model_type={stored.get('model_type')!r}, not 'chameleon'; python -m conversion.upcycle converts "
            "dense language models"
        )
    config = ChameleonConfig.from_dict(stored)
    CHAMELEON.check(config, stored, ignored=_READ)
    vocabulary = ImageVocabulary.of(config.vocabulary_map, config.vq_config.num_embeddings)
    reader = CheckpointReader(folder)
    plan = _plan(reader, config, _mot_config(folder, config, vocabulary, variant, dtype), dtype)
    pictures = image_tokenizer(
        folder,
        lambda name: reader.read(VQ_VAE + name),
        [name.removeprefix(VQ_VAE) for name in plan.picture_names],
        config.vq_config,
        vocabulary,
        image_decoder,
    )
    tokenizer = convert_tokenizer(folder, vocabulary) if (folder / "tokenizer.json").is_file() else None
    if dry_run:
        return plan
    record = {
        "command": "import_chameleon", "source": source, "revision": commit, "sha256": reader.fingerprints(),
        "variant": variant,
    }  # fmt: skip
    with new_folder(out, overwrite) as made:
        _describe_model(plan.config, folder, made)
        if tokenizer is None:
            pictures.save_pretrained(made / "image_tokenizer")
        else:
            template = tokenizer.chat_template or CHAT_TEMPLATE
            MoTProcessor(tokenizer, pictures, chat_template=template).save_pretrained(made)
        (made / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_tensors(made, plan.entries, max_shard_size)
    return plan


def _mot_config(
    folder: Path, config: ChameleonConfig, vocabulary: ImageVocabulary, variant: str, dtype: torch.dtype | None
) -> MoTConfig:
    size = picture_settings(folder, config.vq_config)["crop_size"]
    pixels = 2 ** (len(config.vq_config.channel_multiplier) - 1)
    special = {f"{name}_id": token for name, token in vocabulary.special.items() if name != "image_token"}
    return MoTConfig.from_variant(
        variant,
        ["text", "image"],
        **CHAMELEON.mot_fields(config) | special,
        modality_token_ranges={"text": [0, config.vocab_size], "image": vocabulary.token_range},
        image_grid=[size["height"] // pixels, size["width"] // pixels],
        architectures=["MoTForCausalLM"],
        dtype=dtype or config.dtype,
    )


def _plan(reader: CheckpointReader, source: ChameleonConfig, config: MoTConfig, dtype: torch.dtype | None) -> Plan:
    pictures = [name for name in reader.names if name.startswith(VQ_VAE)]
    with torch.device("meta"):
        wanted = MoTForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    names = [name for name in reader.names if name not in set(pictures)]
    origins = CHAMELEON.key_map(config).origins(names, wanted)
    entries, moves = [], {}
    for name, (origin, _) in origins.items():
        if reader.shape(origin) != tuple(wanted[name].shape):
            raise ConversionError(
                f"{origin} has shape {reader.shape(origin)}, where config.json says {tuple(wanted[name].shape)}"
            )
        target = dtype or reader.dtype(origin)
        entries.append(Entry(name, reader.shape(origin), target, partial(_read, reader, origin, target)))
        moves.setdefault(origin, []).append(name)
    return Plan(config, entries, pictures, moves)


def _read(reader: CheckpointReader, name: str, dtype: torch.dtype) -> torch.Tensor:
    return reader.read(name).to(dtype)


def _describe_model(config: MoTConfig, source: Path, folder: Path) -> None:
    """Configurations and code, as `save_pretrained` writes them."""
    generation = GenerationConfig.from_model_config(config)
    if (source / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(source)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(generation, name, getattr(config, name))
    generation._from_model_config = None
    with torch.device("meta"):
        custom_object_save(MoTForCausalLM(config), folder, config=config)
    config.save_pretrained(folder)
    generation.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m conversion.import_chameleon", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder or Hub name of a ChameleonForConditionalGeneration")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--variant", choices=VARIANTS, default="mot", help="(default: %(default)s)")
    parser.add_argument(
        "--image-decoder", type=Path, help="safetensors of a VQGAN with its decoder, without which no picture is drawn"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the transformer (default: as stored)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of a file of weights (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of a source on the Hub")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.add_argument("--dry-run", action="store_true", help="print what would become of every tensor, write nothing")
    options = vars(parser.parse_args(arguments))
    if options["dtype"] is not None:
        options["dtype"] = getattr(torch, options["dtype"])
    try:
        plan = import_chameleon(**options)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(plan.describe() if options["dry_run"] else options["out"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
