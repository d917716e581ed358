"""Train a tokenizer of speech units by k-means: `python -m training.tokenizers.speech --output DIR`."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from modeling_mot.speech_tokenizer import MoTSpeechTokenizer, SpeechTokenizerConfig
from training.tokenizers.kmeans import assign, kmeans
from training.tokenizers.sources import (
    SOUND_SUFFIXES,
    add_output_arguments,
    add_source_arguments,
    carried_source,
    check_output,
    in_one_line,
    number,
    publish,
    read_media,
)


def fit_speech_tokenizer(
    config: SpeechTokenizerConfig, sounds: Iterable[Any], iterations: int = 40, seed: int = 0
) -> tuple[MoTSpeechTokenizer, dict]:
    """Fit the units to the features of `sounds`, and give each unit the mean log-mel spectrogram of its sounds.

    Returns:
        The tokenizer, and figures.

    Raises:
        ValueError: there is too little sound for `num_units`.
    """
    # Features decide the units; spectra are kept to make units audible again.
    tokenizer = MoTSpeechTokenizer(config)
    features, spectra = [], []
    for sound in sounds:
        samples = tokenizer.preprocess(sound)
        features.append(tokenizer.features(samples))
        spectra.append(tokenizer.front_end.log_mel(samples).view(len(features[-1]), tokenizer.frames_per_unit, -1))
    if not features:
        raise ValueError("there is no sound to learn units from")

    # The units are the clusters of the scaled features.
    points = torch.cat(features)
    tokenizer.mean, tokenizer.scale = points.mean(0), points.std(0).clamp(min=1e-5)
    scaled = (points - tokenizer.mean) / tokenizer.scale
    tokenizer.centroids = kmeans(scaled, config.num_units, iterations, seed)
    units, distances = assign(scaled, tokenizer.centroids)

    # Each unit sounds like the mean of its frames; an unused unit like the mean of all.
    counts = torch.bincount(units, minlength=config.num_units)
    frames = torch.cat(spectra)
    sums = torch.zeros(config.num_units, *frames.shape[1:]).index_add_(0, units, frames)
    tokenizer.templates = torch.where(
        counts[:, None, None] > 0, sums / counts.clamp(min=1)[:, None, None], frames.mean(0)
    ).contiguous()
    return tokenizer, {
        "sounds": len(features),
        "seconds": round(len(points) / config.units_per_second, 1),
        "units_used": int((counts > 0).sum()),
        "variance_explained": round(float(1 - distances.mean() / scaled.var(0, correction=0).sum()), 4),
    }


def build_parser() -> argparse.ArgumentParser:
    defaults = SpeechTokenizerConfig()
    parser = argparse.ArgumentParser(prog="python -m training.tokenizers.speech", description=__doc__)
    add_output_arguments(parser)
    add_source_arguments(parser, "sounds", "default: audio, sound or speech")
    parser.add_argument(
        "--units",
        type=number(int, ge=1, le=2**24),
        default=defaults.num_units,
        help=f"clusters (default: {defaults.num_units})",
    )
    parser.add_argument(
        "--units-per-second",
        type=int,
        default=defaults.units_per_second,
        help=f"a divisor of 100 (default: {defaults.units_per_second})",
    )
    parser.add_argument(
        "--encoder",
        metavar="NAME",
        help="features from this speech encoder of transformers (HuBERT, Whisper, ...; Hub name or folder), not MFCC",
    )
    parser.add_argument(
        "--encoder-layer",
        type=int,
        default=-1,
        help="its hidden state to use; 0 is the first layer's input (default: -1, the last)",
    )
    parser.add_argument("--deduplicate", action="store_true", help="write runs of one unit once")
    parser.add_argument(
        "--iterations", type=number(int, ge=0, le=2**31), default=40, help="of k-means at most (default: 40)"
    )
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Run the command; return the figures that it prints."""
    arguments = build_parser().parse_args(argv)
    check_output(arguments.output, arguments.overwrite)

    # Sounds are read while units are fitted.
    where = arguments.source or [carried_source("emoji")]
    columns = arguments.column or ["audio", "sound", "speech"]
    sounds = read_media(where, columns, arguments.limit, SOUND_SUFFIXES)
    with in_one_line():
        config = SpeechTokenizerConfig(
            num_units=arguments.units,
            units_per_second=arguments.units_per_second,
            features="encoder" if arguments.encoder else "mfcc",
            encoder=arguments.encoder,
            encoder_layer=arguments.encoder_layer,
            deduplicate=arguments.deduplicate,
        )
        tokenizer, figures = fit_speech_tokenizer(config, sounds, arguments.iterations, arguments.seed)

    # The folder appears when it is complete.
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
        tokenizer.save_pretrained(Path(folder) / "speech")
        publish(Path(folder) / "speech", arguments.output)
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
