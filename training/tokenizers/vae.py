"""Train a small VAE for continuous images: `python -m training.tokenizers.vae --output DIR`."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from modeling_mot.image_tokenizer import ImageTokenizerConfig
from modeling_mot.latent_vae import build_vae, check_divisible, decode_latents, downsampling, encode_pixels
from modeling_mot.media_loading import describe_source
from training.tokenizers.autoencoder_training import add_training_arguments, training_settings
from training.tokenizers.pictures import (
    add_picture_arguments,
    both_sides,
    check_sheet,
    compare_pictures,
    first_pictures,
    read_pictures,
    save_sheet,
    spread,
    to_bytes,
)
from training.tokenizers.sources import (
    add_output_arguments,
    add_source_arguments,
    carried_source,
    check_output,
    in_one_line,
    number,
    publish,
)
from training.tokenizers.vae_training import VAETrainingConfig, scale_latents, train_vae


CHANNELS = [16, 32, 96, 112]
LATENT_CHANNELS = 8
NORM_GROUPS = 8


def build_parser() -> argparse.ArgumentParser:
    defaults = VAETrainingConfig()
    parser = argparse.ArgumentParser(prog="python -m training.tokenizers.vae", description=__doc__)
    add_output_arguments(parser)
    add_source_arguments(parser, "pictures", "default: image, picture or img")
    parser.add_argument(
        "--held-out",
        action="append",
        metavar="WHERE",
        help="pictures to report figures of, not trained on, given as --source is "
        "(default: the validation split of the carried data, when --source is not given)",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--image-size",
        type=number(int, ge=1, le=2**24),
        nargs="+",
        default=[64],
        metavar="PX",
        help="side, or height and width, of training pictures in pixels (default: 64); the VAE takes others too",
    )
    model.add_argument(
        "--channels",
        type=number(int, ge=1, le=2**24),
        nargs="+",
        default=CHANNELS,
        metavar="C",
        help="channels per scale, multiples of 8; n scales down-sample 2^(n-1) times "
        f"(default: {' '.join(map(str, CHANNELS))})",
    )
    model.add_argument(
        "--layers",
        type=number(int, ge=1, le=2**24),
        default=1,
        metavar="N",
        help="residual blocks per scale (default: 1)",
    )
    model.add_argument(
        "--latent-channels",
        type=number(int, ge=1, le=2**24),
        default=LATENT_CHANNELS,
        metavar="C",
        help=f"channels of the latent (default: {LATENT_CHANNELS})",
    )
    add_picture_arguments(model)
    training = add_training_arguments(parser, defaults)
    training.add_argument(
        "--matrix-lr",
        type=number(float, ge=0),
        default=defaults.matrix_lr,
        help=f"peak rate of Muon, for kernels of convolutions; --lr is AdamW's, for the rest (default: {defaults.matrix_lr})",
    )
    training.add_argument(
        "--kl",
        type=number(float, ge=0),
        default=defaults.kl,
        help="weight of the divergence of latents from a standard normal, in nats per latent element "
        f"(default: {defaults.kl})",
    )
    return parser


def vae_config(arguments: argparse.Namespace) -> dict:
    """The diffusers configuration; convolutions only, so that any multiple of the down-sampling is a size."""
    scales = len(arguments.channels)
    for channels in arguments.channels:
        if channels < 1 or channels % NORM_GROUPS:
            raise ValueError(f"--channels {channels} is no multiple of {NORM_GROUPS}, the groups of the norms")
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": arguments.channels,
        "layers_per_block": arguments.layers,
        "down_block_types": ["DownEncoderBlock2D"] * scales,
        "up_block_types": ["UpDecoderBlock2D"] * scales,
        "latent_channels": arguments.latent_channels,
        "norm_num_groups": NORM_GROUPS,
        "mid_block_add_attention": False,
        "sample_size": max(arguments.image_size),
    }


def rebuild(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Through the latents and back.  (N, 3, H, W) -> (N, 3, H, W), uint8"""
    parts = [decode_latents(vae, encode_pixels(vae, part.float() / 127.5 - 1)) for part in pictures.split(64)]
    return to_bytes(torch.cat(parts))


def reconstruction_figures(vae: AutoencoderKL, pictures: Sequence[torch.Tensor], limit: int = 2048) -> dict:
    originals = first_pictures(pictures, limit)
    return compare_pictures(rebuild(vae, originals), originals)


def save_vae(vae: AutoencoderKL, output: Path, storage_dtype: str) -> None:
    """Weights that already are representable in `storage_dtype`, so that what is loaded is what was measured."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        finished = Path(folder) / "vae"
        nn.Module.to(vae, getattr(torch, storage_dtype))  # diffusers' own `to` warns of layers that there are not
        vae.save_pretrained(finished)
        vae.float()
        publish(finished, output)


def main(argv: list[str] | None = None) -> dict:
    arguments = build_parser().parse_args(argv)
    check_output(arguments.output, arguments.overwrite)
    check_sheet(arguments.sheet)
    torch.manual_seed(arguments.seed)
    where = arguments.source or [carried_source("emoji")]
    held_out = arguments.held_out or ([] if arguments.source else [carried_source("emoji", "validation")])
    with in_one_line():
        config = vae_config(arguments)
        picture_config = ImageTokenizerConfig(image_size=both_sides(arguments.image_size), fit=arguments.fit)
        check_divisible(*picture_config.image_size, downsampling(config))
        pictures = read_pictures(where, arguments, picture_config)
        others = read_pictures(held_out, arguments, picture_config) if held_out else None
        pictures[0]
    vae = build_vae(config)
    print(f"{len(pictures)} pictures, the first: {describe_source(pictures.sources[0])}", flush=True)
    training = VAETrainingConfig(**training_settings(arguments), matrix_lr=arguments.matrix_lr, kl=arguments.kl)
    with in_one_line():
        figures = train_vae(vae, pictures, training, log=lambda line: print(line, flush=True))
    nn.Module.to(vae, getattr(torch, arguments.storage_dtype)).float()
    figures |= scale_latents(vae, pictures)
    figures["parameters"] = sum(p.numel() for p in vae.parameters())
    figures["train"] = reconstruction_figures(vae, pictures)
    if others:
        figures["held_out"] = reconstruction_figures(vae, others)
    save_vae(vae, arguments.output, arguments.storage_dtype)
    if arguments.sheet:
        chosen = torch.stack(spread(others or pictures))
        originals, rebuilt = (p.permute(0, 2, 3, 1).numpy() for p in (chosen, rebuild(vae, chosen)))
        save_sheet(originals, rebuilt, arguments.sheet)
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
