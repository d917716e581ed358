"""Train a VQ image tokenizer: `python -m training.tokenizers.image --output DIR`."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from modeling_mot.image_tokenizer import PRESETS, ImageTokenizerConfig, MoTImageTokenizer
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
from training.tokenizers.vq_training import VQTrainingConfig, train_vq


def reconstruction_figures(tokenizer: MoTImageTokenizer, pictures: Sequence[torch.Tensor], limit: int = 2048) -> dict:
    """Error, code usage and how often a reconstruction's nearest picture, in pixel space, is its original."""
    originals = first_pictures(pictures, limit)
    codes, rebuilt = [], []
    for batch in originals.split(32):
        codes.append(tokenizer.encode_pixels(batch.float() / 127.5 - 1))
        with torch.no_grad():
            rebuilt.append(to_bytes(tokenizer.decode_codes(codes[-1])))
    counts = torch.bincount(torch.cat(codes).flatten(), minlength=tokenizer.num_codes).double()
    shares = counts / counts.sum()
    return {
        **compare_pictures(torch.cat(rebuilt), originals),
        "codes_used": int((counts > 0).sum()),
        "code_perplexity": round(float(torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum())), 1),
        "parameters": sum(p.numel() for p in tokenizer.model.parameters()),
    }


def build_parser() -> argparse.ArgumentParser:
    defaults = VQTrainingConfig()
    parser = argparse.ArgumentParser(prog="python -m training.tokenizers.image", description=__doc__)
    add_output_arguments(parser)
    add_source_arguments(parser, "pictures", "default: image, picture or img")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--preset", default="small-64", choices=sorted(PRESETS), help="sizes to start from (default: small-64)"
    )
    model.add_argument(
        "--image-size",
        type=number(int, ge=1, le=2**24),
        nargs="+",
        metavar="PX",
        help="side, or height and width, in pixels",
    )
    model.add_argument("--codes", type=number(int, ge=1, le=2**24), metavar="K", help="entries of the codebook")
    model.add_argument(
        "--channels",
        type=number(int, ge=1, le=2**24),
        nargs="+",
        metavar="C",
        help="channels per scale; n scales down-sample 2^(n-1) times",
    )
    model.add_argument(
        "--latent-channels", type=number(int, ge=1, le=2**24), metavar="C", help="channels of the latent"
    )
    model.add_argument("--code-dim", type=number(int, ge=1, le=2**24), metavar="C", help="length of a code vector")
    model.add_argument(
        "--patch-size", type=number(int, ge=1, le=2**24), metavar="P", help="fold P x P pixels into channels first"
    )
    add_picture_arguments(model)
    add_training_arguments(parser, defaults)
    return parser


def tokenizer_config(arguments: argparse.Namespace) -> ImageTokenizerConfig:
    model = {
        "num_vq_embeddings": arguments.codes,
        "block_out_channels": arguments.channels,
        "latent_channels": arguments.latent_channels,
        "vq_embed_dim": arguments.code_dim,
    }
    overrides = {"model": {k: v for k, v in model.items() if v is not None}, "fit": arguments.fit}
    if arguments.image_size is not None:
        overrides["image_size"] = both_sides(arguments.image_size)
    if arguments.patch_size is not None:
        overrides["patch_size"] = arguments.patch_size
    return ImageTokenizerConfig.from_preset(arguments.preset, storage_dtype=arguments.storage_dtype, **overrides)


def main(argv: list[str] | None = None) -> dict:
    arguments = build_parser().parse_args(argv)
    check_output(arguments.output, arguments.overwrite)
    check_sheet(arguments.sheet)
    torch.manual_seed(arguments.seed)
    with in_one_line():
        tokenizer = MoTImageTokenizer(tokenizer_config(arguments))
        pictures = read_pictures(arguments.source or [carried_source("emoji")], arguments, tokenizer.config)
        pictures[0]
    print(
        f"{len(pictures)} pictures, the first: {describe_source(pictures.sources[0])}; grid {tokenizer.image_grid}",
        flush=True,
    )
    training = VQTrainingConfig(**training_settings(arguments))
    with in_one_line():
        figures = train_vq(tokenizer, pictures, training, log=lambda line: print(line, flush=True))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
        tokenizer.save_pretrained(folder)
        figures |= reconstruction_figures(tokenizer, pictures)
        finished = Path(folder) / "image_tokenizer"
        finished.mkdir()
        for path in Path(folder).iterdir():
            if path != finished:
                path.rename(finished / path.name)
        publish(finished, arguments.output)
    if arguments.sheet:
        chosen = [picture.permute(1, 2, 0).numpy() for picture in spread(pictures)]
        save_sheet(chosen, [np.asarray(p) for p in tokenizer.decode(tokenizer.encode(chosen))], arguments.sheet)
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
