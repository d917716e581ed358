"""Turn a dense language model into a Mixture-of-Transformers; text keeps the dense model's logits.

    python -m conversion.upcycle SOURCE OUT --modalities text image
    python -m conversion.upcycle SOURCE OUT --image-tokenizer FOLDER
    python -m conversion.upcycle SOURCE OUT --transfusion --vae FOLDER --freeze-text
    python -m conversion.upcycle SOURCE OUT --image-codes 8192 --init image=perturbed:0.02 --dry-run

SOURCE is a checkpoint of transformers: Llama, Arcee, Mistral, Ministral, Qwen2, Qwen3, SmolLM3, OLMo 2, Gemma or
Seed-OSS. Its tensors are read and written one by one.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from conversion.checkpoints import check_output, fetch, new_folder, provenance, write_model
from conversion.commands import add_arguments, check_range, copy_licences, exit_code, reading
from conversion.initial_values import Start
from conversion.key_maps import ConversionError
from conversion.recipes import frozen_text_recipe, train_command
from conversion.sizes import check_part
from conversion.towers import Plan, Wishes, plan_upcycle
from conversion.vae import read_vae
from conversion.vocabulary import MOST_CODES, SPEECH_UNITS, Media
from modeling_mot import MoTConfig, MoTTransfusionConfig
from modeling_mot.configuration_mot import UNTIED_PARTS
from modeling_mot.image_processing import MoTImageProcessor
from modeling_mot.image_tokenizer import MoTImageTokenizer
from modeling_mot.latent_vae import downsampling, vae_config_of
from modeling_mot.speech_tokenizer import MoTSpeechTokenizer


IMAGE_CODES, IMAGE_GRID = 8192, [32, 32]  # of Chameleon's image tokenizer

# Fields that --set may change: neither the source nor another option decides them.
SETTABLE = {
    "attention_dropout", "hidden_dropout", "z_loss_coefficient", "max_speech_tokens", "initializer_range",
    "tower_configs",
}  # fmt: skip
SETTABLE_TRANSFUSION = (
    {known.name for known in fields(MoTTransfusionConfig)}
    - {known.name for known in fields(MoTConfig)}
    - {"image_token_id", "latent_channels", "latent_size", "vae_config"}
)


def upcycle(
    source: str,
    out: Path,
    wishes: Wishes,
    *,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    freeze_text: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Convert a checkpoint.

    Args:
        source: a folder, or a name on the Hub.
        out: a new folder, which appears whole or not at all.
        revision: branch, tag or commit of a name on the Hub.
        max_shard_size: size of a file of weights.
        freeze_text: write `train.yaml`, a recipe that holds the source's weights and trains everything else.
        dry_run: plan and write nothing.
        overwrite: replace the checkpoint that `out` holds.

    Raises:
        ConversionError: the conversion cannot be done, and nothing was written; the message names the reason and the
            way out.
    """
    # Every refusal comes before anything is written.
    check_output(out, overwrite)
    folder, commit = fetch(source, revision)
    plan = plan_upcycle(folder, wishes)
    recipe = frozen_text_recipe(out, plan.model.config, plan.processor, plan.source_vocabulary) if freeze_text else None
    if dry_run:
        return plan

    # The folder appears whole or not at all.
    record = {
        "command": "upcycle",
        **provenance(source, folder, commit, plan.reader),
        "architecture": plan.architecture.model_type,
        "vocab_size": plan.source_vocabulary,
        "starts": {tower: str(wishes.starts.get(tower, Start())) for tower in plan.model.config.tower_names},
        "seed": wishes.seed,
    }
    with new_folder(out, overwrite) as made:
        write_model(made, plan.model, plan.entries, max_shard_size, plan.processor)
        copy_licences(folder, made)
        (made / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if recipe is not None:
            (made / "train.yaml").write_text(recipe, encoding="utf-8")
    return plan


# -------------------------------------------------------------------------------------------------------------- options


def wishes_of(options: argparse.Namespace) -> Wishes:
    """Read the options. Raises ConversionError for contradictions, and for parts that cannot be loaded."""
    # Pictures are diffused, or codes; the modalities follow from this and must be those that the user named.
    vae = None
    if options.transfusion:
        if options.vae is None:
            raise ConversionError("--transfusion needs --vae, a folder of diffusers (AutoencoderKL or AutoencoderTiny)")
        vae = read_vae(options.vae)
    elif options.vae is not None or options.image_size is not None:
        raise ConversionError("--vae and --image-size are of pictures that are diffused; add --transfusion")
    settings = parse_settings(options.set, is_transfusion=vae is not None)
    make_space(options)
    media = media_of(options, vae, settings)
    if media.modalities != [name for name in ("text", "image", "speech") if name in options.modalities]:
        raise ConversionError(
            f"--modalities {' '.join(options.modalities)}, but the other options make {' '.join(media.modalities)}; "
            "name these, or leave the options out"
        )

    # How each tower begins.
    starts = {}
    for text in options.init:
        tower, separator, start = text.partition("=")
        if not separator:
            raise ConversionError(f"--init {text!r} is not TOWER=START, such as image=fresh")
        if tower in starts:
            raise ConversionError(f"--init names {tower!r} twice; say once how it begins")
        starts[tower] = Start.parse(start)
    return Wishes(
        media=media,
        share=options.share,
        starts=starts,
        text_experts=options.moe_text,
        vae=vae,
        settings=settings,
        max_length=options.max_length,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        seed=options.seed,
        ignored_fields=options.ignore_fields,
        use_tokenizer=not options.no_tokenizer,
    )


def make_space(options: argparse.Namespace) -> None:
    """Give pictures and sound as many tokens as the usual tokenizers have, if no option says more; tell the user."""
    asked = (options.transfusion, options.image_tokenizer, options.image_codes)
    if "image" in options.modalities and not any(one is not None and one is not False for one in asked):
        options.image_codes, options.image_grid = IMAGE_CODES, options.image_grid or IMAGE_GRID
        print(
            f"room for {IMAGE_CODES:,} image codes, {' x '.join(map(str, options.image_grid))} a picture; others by "
            "--image-tokenizer or --image-codes, diffused pictures by --transfusion",
            file=sys.stderr,
        )
    if "speech" in options.modalities and options.speech_tokenizer is None and options.speech_units is None:
        options.speech_units = SPEECH_UNITS
        print(f"room for {SPEECH_UNITS} speech units; others by --speech-tokenizer or --speech-units", file=sys.stderr)


def media_of(options: argparse.Namespace, vae: torch.nn.Module | None, settings: dict[str, Any]) -> Media:
    """Decide how pictures and sound become tokens. Raises ConversionError if options contradict each other."""
    # Room for codes is asked for by a number, or follows from a tokenizer, never both.
    media = Media(options.image_codes or 0, options.speech_units or 0, image_grid=options.image_grid)
    if options.image_grid is not None and options.image_codes is None:
        raise ConversionError("--image-grid is of --image-codes; an image tokenizer has its own")
    for modality, folder, count in (
        ("image", options.image_tokenizer, options.image_codes),
        ("speech", options.speech_tokenizer, options.speech_units),
    ):
        counted = "--image-codes" if modality == "image" else "--speech-units"
        if folder is not None and count is not None:
            raise ConversionError(f"{counted} follows from --{modality}-tokenizer; leave it out")
        check_range(counted, count, 1, MOST_CODES)

    # The tokenizers, and the processor of pictures that are diffused.
    if options.image_tokenizer is not None:
        media.image_tokenizer = _image_tokenizer(options.image_tokenizer)
        media.image_codes, media.image_grid = media.image_tokenizer.num_codes, media.image_tokenizer.image_grid
    if options.speech_tokenizer is not None:
        with reading(f"pictures or sound: --speech-tokenizer {options.speech_tokenizer} cannot be read"):
            media.speech_tokenizer = MoTSpeechTokenizer.from_pretrained(options.speech_tokenizer)
        media.speech_units = media.speech_tokenizer.num_units
    if vae is not None:
        if media.image_codes:
            raise ConversionError("--transfusion diffuses pictures; leave --image-tokenizer and --image-codes out")
        try:
            side = downsampling(vae_config_of(vae)) * settings.get("patch_size", MoTTransfusionConfig.patch_size)
            media.image_processor = MoTImageProcessor(options.image_size or [256, 256], side)
        except (ValueError, TypeError) as error:
            raise ConversionError(f"pictures or sound: {error}") from error
    return media


def _image_tokenizer(folder: str) -> MoTImageTokenizer:
    check_part(folder)
    with reading(f"pictures or sound: --image-tokenizer {folder} cannot be read"):
        return MoTImageTokenizer.from_pretrained(folder)


def parse_settings(words: Sequence[str], is_transfusion: bool) -> dict[str, Any]:
    """Read `field=value` words, with values as JSON or text. Raises ConversionError for fields that cannot be set."""
    allowed = SETTABLE | (SETTABLE_TRANSFUSION if is_transfusion else set())
    settings = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator or name not in allowed:
            raise ConversionError(f"--set {word!r} is not FIELD=VALUE of one of {', '.join(sorted(allowed))}")
        if name in settings:
            raise ConversionError(f"--set names {name!r} twice; say once what it is")
        try:
            settings[name] = json.loads(text)
        except (ValueError, RecursionError):
            settings[name] = text
    return settings


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.upcycle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, "a dense language model of transformers")
    _add_media(parser.add_argument_group("pictures and sound").add_argument)
    _add_towers(parser.add_argument_group("towers").add_argument)
    _add_rest(parser.add_argument_group("configuration").add_argument)
    return parser


def _add_media(add: Callable) -> None:
    add("--modalities", nargs="+", choices=("text", "image", "speech"), default=["text", "image"], metavar="NAME")
    add("--image-tokenizer", metavar="FOLDER", help="pictures are its codes; a folder that MoTImageTokenizer saved")
    add("--image-codes", type=int, metavar="N", help="room for the codes of an image tokenizer that comes later")
    add("--image-grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="with --image-codes: codes of a picture")
    add("--speech-tokenizer", metavar="FOLDER", help="sound is its units; a folder that MoTSpeechTokenizer saved")
    add("--speech-units", type=int, metavar="N", help="room for the units of a speech tokenizer that comes later")
    add("--transfusion", action="store_true", help="pictures are diffused: OUT is a MoTTransfusionModel")
    add("--vae", metavar="FOLDER", help="with --transfusion: an autoencoder of diffusers, folder or Hub name")
    size = "with --transfusion: the pictures' size (default: 256 256)"
    add("--image-size", type=int, nargs=2, metavar=("H", "W"), help=size)


def _add_towers(add: Callable) -> None:
    shared = "attention, feed_forward, norm: the towers share this part of a layer"
    add("--share", nargs="+", choices=UNTIED_PARTS, default=[], metavar="PART", help=shared)
    start = "copy (default), fresh, or perturbed:STD, noise of STD times each tensor's root mean square"
    add("--init", nargs="+", default=[], metavar="TOWER=START", help=start)
    experts = "the text tower's feed-forward becomes N experts, all copies; the text's logits change"
    add("--moe-text", type=int, metavar="N", help=experts)
    held = "write OUT/train.yaml, a recipe that holds the weights of SOURCE and trains the rest"
    add("--freeze-text", action="store_true", help=held)


def _add_rest(add: Callable) -> None:
    settings = "fields of the configuration, such as patch_size=2 patchifier=linear prediction_type=flow"
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help=settings)
    add("--max-length", type=int, metavar="N", help="longest sequence (default: the source's)")
    ignored = "fields of SOURCE's config.json that change nothing, on your word"
    add("--ignore-fields", nargs="+", default=[], metavar="FIELD", help=ignored)
    add("--no-tokenizer", action="store_true", help="leave SOURCE's tokenizer behind")
    add("--seed", type=int, default=0, help="seed of everything that is drawn (default: 0)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    options = build_parser().parse_args(arguments)

    def work() -> None:
        check_output(options.out, options.overwrite)
        plan = upcycle(
            options.source,
            options.out,
            wishes_of(options),
            revision=options.revision,
            max_shard_size=options.max_shard_size,
            freeze_text=options.freeze_text,
            dry_run=options.dry_run,
            overwrite=options.overwrite,
        )
        print(plan.describe() if options.dry_run else options.out)
        if options.freeze_text and not options.dry_run:
            print(f"train.yaml in it holds the text and trains the rest: {train_command(options.out)}")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
