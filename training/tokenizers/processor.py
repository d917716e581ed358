"""Assemble a MoTProcessor of tokenizers: `python -m training.tokenizers.processor --text DIR --output DIR`."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from modeling_mot.image_tokenizer_mot import ImageTokenizerConfig, MoTImageTokenizer
from modeling_mot.processing_mot import MoTProcessor
from modeling_mot.speech_tokenizer_mot import MoTSpeechTokenizer
from modeling_mot.vocabulary_mot import extend_tokenizer
from training.tokenizers.sources import add_output_arguments, check_output, publish


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.tokenizers.processor", description=__doc__)
    add_output_arguments(parser)
    parser.add_argument(
        "--text", required=True, metavar="NAME", help="a fast tokenizer: ours, or any folder or Hub name"
    )
    parser.add_argument(
        "--image", metavar="NAME", help="an image tokenizer of training.tokenizers.image, folder or Hub name"
    )
    parser.add_argument(
        "--image-backend",
        choices=("ours", "diffusers", "chameleon"),
        default="ours",
        help="what --image holds: our layout, a bare diffusers VQModel, or a ChameleonVQVAE (default: ours)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="side in pixels for a bare VQModel or ChameleonVQVAE (default: 512)",
    )
    parser.add_argument(
        "--speech", metavar="NAME", help="a speech tokenizer of training.tokenizers.speech, folder or Hub name"
    )
    parser.add_argument(
        "--no-code", action="store_true", help="leave the remote code out: loading then needs modeling_mot installed"
    )
    return parser


def load_image_tokenizer(arguments: argparse.Namespace) -> MoTImageTokenizer | None:
    if arguments.image is None:
        return None
    if arguments.image_backend == "ours":
        return MoTImageTokenizer.from_pretrained(arguments.image)
    size = arguments.image_size or 512
    return MoTImageTokenizer.from_backend(
        arguments.image, arguments.image_backend, ImageTokenizerConfig(image_size=[size, size])
    )


def main(argv: list[str] | None = None) -> dict:
    arguments = build_parser().parse_args(argv)
    check_output(arguments.output, arguments.overwrite)
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.text)
        # Where it was loaded from is no property of the tokenizer.
        for name in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(name, None)
        image = load_image_tokenizer(arguments)
        speech = MoTSpeechTokenizer.from_pretrained(arguments.speech) if arguments.speech else None
        extend_tokenizer(tokenizer, image.num_codes if image else 0, speech.num_units if speech else 0)
        processor = MoTProcessor(tokenizer, image, speech)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
        finished = Path(folder) / "processor"
        if arguments.no_code:
            processor._auto_class = None
        processor.save_pretrained(finished)
        publish(finished, arguments.output)
    figures = {"fingerprint": processor.fingerprint(), **processor.config_kwargs()}
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
