"""Turn transformers' Chameleon into a MoT with the tokens of its pictures: one tower, or a tower for each modality.

    python -m conversion.import_chameleon SOURCE OUT
    python -m conversion.import_chameleon SOURCE OUT --variant dense --image-decoder FOLDER
    python -m conversion.import_chameleon SOURCE OUT --modalities text image speech --dry-run

Ids stay Chameleon's own. Logits are equal, also those of image tokens, which transformers hides. Tensors are read and
written one by one; the VQ-VAE alone is whole in memory.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ChameleonConfig, GenerationConfig

from conversion.architectures import Architecture
from conversion.chameleon_pictures import image_tokenizer
from conversion.chameleon_vocabulary import CHAT_TEMPLATE, ImageVocabulary, convert_tokenizer
from conversion.checkpoints import CheckpointReader, Entry, check_output, fetch, new_folder, provenance, write_model
from conversion.commands import (
    add_arguments,
    check_range,
    copy_licences,
    exit_code,
    merge_layers,
    read_config,
    read_generation_config,
    read_json,
    reading,
)
from conversion.initial_values import extended, generator_of
from conversion.key_maps import ConversionError
from conversion.sizes import check_sizes
from conversion.vocabulary import MOST_CODES, SPEECH_UNITS, extend_chat_template
from modeling_mot import MoTConfig, MoTForCausalLM, MoTProcessor
from modeling_mot.image_tokenizer import MoTImageTokenizer
from modeling_mot.processing_vocabulary import COMMON_SPECIAL_TOKENS
from modeling_mot.speech_tokenizer import MoTSpeechTokenizer


VQ_VAE = "model.vqmodel."
VARIANTS = ("mot", "dense", "untied-feed-forward", "untied-feed-forward-qkv", "untied-feed-forward-attention")
ROWS_ARE_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")
CHAMELEON = Architecture(
    "chameleon",
    same=("attention_bias", "mlp_bias"),
    fixed={"qk_norm": "layer"},
    computed={"norm_position": lambda config: "post" if config.swin_norm else "pre"},
    inverse={"swin_norm": lambda config: config.norm_position == "post"},
)
# Fields that this file reads. model_parallel_size belongs to a layout that transformers' conversion has undone.
_READ = ("vq_config", "vocabulary_map", "image_token_id", "model_parallel_size")


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked, and not yet done.

    Attributes:
        model: the MoT, on `meta`.
        entries: the tensors to write.
        moves: source tensor -> its targets.
        pictures: the image tokenizer.
        processor: None if the source has no tokenizer.
        reader: reads the source.
    """

    model: MoTForCausalLM
    entries: list[Entry]
    moves: dict[str, list[str]]
    pictures: MoTImageTokenizer
    processor: MoTProcessor | None
    reader: CheckpointReader

    def describe(self) -> str:
        """List every tensor with its shape and targets, and the sums. Equal layers are one line, `layers.{0..31}`."""
        lines = [
            f"{name} {list(self.reader.shape(name))} -> {', '.join(self.moves.get(name, ['image_tokenizer/']))}"
            for name in self.reader.names
        ]
        config, size = self.model.config, sum(entry.num_bytes for entry in self.entries)
        total, active = config.num_parameters(), config.num_parameters(active=True)
        draws = "read and drawn" if self.pictures.can_decode else "read; no decoder, so none is drawn"
        return "\n".join(
            [
                *merge_layers(lines),
                f"towers {', '.join(config.tower_names)}; token ids {config.modality_token_ranges}",
                f"pictures of {' x '.join(map(str, self.pictures.config.image_size))} pixels are {draws}",
                f"{self.reader.num_bytes():,} bytes become {size:,}",
                f"{total:,} parameters, {active:,} of them active for a token",
            ]
        )


def import_chameleon(
    source: str,
    out: Path,
    *,
    variant: str = "mot",
    image_decoder: Path | None = None,
    speech_units: int = 0,
    speech_tokenizer: MoTSpeechTokenizer | None = None,
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
        variant: `mot` (towers that start as copies), `dense`, or a variant that unties a part of the layers.
        image_decoder: safetensors of a VQGAN with a decoder, for a source without one; see
            `chameleon_pictures.read_decoder`. Without a decoder the processor reads pictures and draws none.
        speech_units: adds a third modality of so many tokens; their rows stand behind the vocabulary and start as in
            `conversion.upcycle`.
        speech_tokenizer: makes these tokens and decides their number.
        dtype: dtype of the transformer; None: as stored.
        max_shard_size: size of a file of weights.
        revision: branch, tag or commit of a source on the Hub.
        overwrite: replace a checkpoint at `out`.
        dry_run: check and plan, write nothing.

    Raises:
        ConversionError: the source is no Chameleon or has what a MoT cannot express; the message says what to do.
    """
    check_output(out, overwrite)
    folder, commit = fetch(source, revision)
    try:
        plan = _plan(folder, variant, image_decoder, speech_units, speech_tokenizer, dtype)
    except ConversionError:
        raise
    except ValueError as error:  # a configuration or a processor contradicts itself
        raise ConversionError(f"{source} cannot be converted: {error}") from error
    if dry_run:
        return plan
    record = {
        "command": "import_chameleon",
        **provenance(source, folder, commit, plan.reader),
        "architecture": CHAMELEON.model_type,
        "variant": variant,
    }
    with new_folder(out, overwrite) as made:
        write_model(made, plan.model, plan.entries, max_shard_size, plan.processor)
        if plan.processor is None:
            plan.pictures.save_pretrained(made / "image_tokenizer")
        copy_licences(folder, made)
        (made / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return plan


def _plan(
    folder: Path,
    variant: str,
    image_decoder: Path | None,
    speech_units: int,
    speech: MoTSpeechTokenizer | None,
    dtype: torch.dtype | None,
) -> Plan:
    stored = read_json(folder / "config.json")
    if stored.get("model_type") != CHAMELEON.model_type:
        raise ConversionError(
            f"{folder} has model_type={stored.get('model_type')!r}, not 'chameleon'; python -m conversion.upcycle "
            "converts dense language models"
        )
    reader = CheckpointReader(folder)
    for part in (stored, stored.get("vq_config")):
        check_sizes(part if isinstance(part, dict) else {}, reader, folder / "config.json")
    source = read_config(stored)
    source.vq_config.model_type = type(source.vq_config).model_type  # which names the class when it is saved
    CHAMELEON.check(source, stored, ignored=_READ)

    # The image tokenizer and the processor.
    vocabulary = ImageVocabulary.of(source.vocabulary_map, source.vq_config.num_embeddings)
    images = [name.removeprefix(VQ_VAE) for name in reader.names if name.startswith(VQ_VAE)]
    pictures = image_tokenizer(
        folder, lambda name: reader.read(VQ_VAE + name), images, source.vq_config, vocabulary, image_decoder
    )
    tokenizer = convert_tokenizer(folder, vocabulary, speech.num_units if speech else speech_units)
    processor = None
    if tokenizer is not None:
        # The source's configuration names all of them, see `OWN_TOKENS`.
        template = extend_chat_template(tokenizer, named=list(COMMON_SPECIAL_TOKENS)) or CHAT_TEMPLATE
        processor = MoTProcessor(tokenizer, pictures, speech, chat_template=template)
    elif speech is not None or speech_units:
        raise ConversionError(f"{folder} has no tokenizer.json, to which tokens of speech could be added")

    # A model that takes no memory, and the origin of each of its tensors.
    config = _mot_config(source, vocabulary, pictures, processor, variant)
    names = [name for name in reader.names if not name.startswith(VQ_VAE)]
    config.dtype = dtype or reader.dtype(names[0])
    with torch.device("meta"):
        model = MoTForCausalLM(config)
    model.generation_config = _generation_config(folder, config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    entries, moves = [], {}
    for name, (origin, _) in CHAMELEON.key_map(config).origins(names, wanted).items():
        entries.append(_entry(reader, name, origin, wanted[name], source.vocab_size, dtype))
        moves.setdefault(origin, []).append(name)
    return Plan(model, entries, moves, pictures, processor, reader)


def _mot_config(
    source: ChameleonConfig,
    vocabulary: ImageVocabulary,
    pictures: MoTImageTokenizer,
    processor: MoTProcessor | None,
    variant: str,
) -> MoTConfig:
    tokens: dict[str, Any] = {
        "modalities": ["text", "image"],
        "modality_token_ranges": {"text": [0, source.vocab_size], "image": vocabulary.token_range},
        "image_grid": pictures.image_grid,
    } | {f"{name}_id": token for name, token in vocabulary.special.items() if name != "image_token"}
    if processor is not None:
        tokens = processor.config_kwargs()
        tokens["vocab_size"] = max(tokens["vocab_size"], source.vocab_size)
    with reading("no MoT is what the source's config.json says"):
        return MoTConfig.from_variant(variant, **CHAMELEON.mot_fields(source) | tokens)


def _generation_config(folder: Path, config: MoTConfig) -> GenerationConfig:
    """Return the source's settings of generation, with the tokens that its tokenizer begins, ends and pads with."""
    generation = read_generation_config(folder)
    if generation is None:
        return GenerationConfig.from_model_config(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(generation, name, getattr(config, name))
    return generation


def _entry(
    reader: CheckpointReader,
    name: str,
    origin: str,
    shape: tuple[int, ...],
    source_rows: int,
    dtype: torch.dtype | None,
) -> Entry:
    before = (source_rows, *shape[1:]) if name in ROWS_ARE_TOKENS else shape
    reader.check(origin, before)
    target = dtype or reader.dtype(origin)

    def make() -> torch.Tensor:
        tensor = reader.read(origin)
        if before != shape:
            tensor = extended(tensor, shape[0], generator_of(0, name))
        return tensor.to(target)

    return Entry(name, shape, target, make)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.import_chameleon",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "a ChameleonForConditionalGeneration of transformers")
    parser.add_argument("--variant", choices=VARIANTS, default="mot", help="(default: %(default)s)")
    parser.add_argument(
        "--image-decoder", type=Path, metavar="PATH", help="safetensors of a VQGAN with the decoder that SOURCE lacks"
    )
    parser.add_argument(
        "--modalities", nargs="+", choices=("text", "image", "speech"), default=["text", "image"], metavar="NAME"
    )
    parser.add_argument(
        "--speech-units", type=int, metavar="N", help=f"with speech: tokens of it (default: {SPEECH_UNITS})"
    )
    parser.add_argument("--speech-tokenizer", metavar="FOLDER", help="with speech: what makes its tokens")
    options = parser.parse_args(arguments)

    def work() -> None:
        units, speech = _speech(options)
        plan = import_chameleon(
            options.source,
            options.out,
            variant=options.variant,
            image_decoder=options.image_decoder,
            speech_units=units,
            speech_tokenizer=speech,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            max_shard_size=options.max_shard_size,
            revision=options.revision,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
        )
        print(plan.describe() if options.dry_run else options.out)

    return exit_code(work)


def _speech(options: argparse.Namespace) -> tuple[int, MoTSpeechTokenizer | None]:
    """Return (number of units, their tokenizer). Raises ConversionError for options that contradict each other."""
    units, folder = options.speech_units, options.speech_tokenizer
    if not {"text", "image"} <= set(options.modalities):
        raise ConversionError(f"--modalities {' '.join(options.modalities)}: a Chameleon has text and image")
    if "speech" not in options.modalities:
        if units is not None or folder is not None:
            raise ConversionError("--speech-units and --speech-tokenizer go with --modalities text image speech")
        return 0, None
    if folder is None:
        check_range("--speech-units", units, 1, MOST_CODES)
        return units or SPEECH_UNITS, None
    if units is not None:
        raise ConversionError("--speech-units follows from --speech-tokenizer; leave it out")
    with reading(f"--speech-tokenizer {folder} cannot be read"):
        speech = MoTSpeechTokenizer.from_pretrained(folder)
    return speech.num_units, speech


if __name__ == "__main__":
    sys.exit(main())
