"""Assemble a MoTProcessor of tokenizers: `python -m training.tokenizers.processor --text DIR --output DIR`.

With `--downsampling`, pictures stay pixels, for a model that diffuses them. `--text` may name a processor's folder: the
new processor has its text and special tokens with the same ids, and image and speech tokens of its own.
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modeling_mot.hub_trust import load_tokenizer
from modeling_mot.image_processing import MoTImageProcessor
from modeling_mot.image_tokenizer import ImageTokenizerConfig, MoTImageTokenizer
from modeling_mot.processing_mot import MoTProcessor
from modeling_mot.processing_vocabulary import SPECIAL_TOKENS, code_token, extend_tokenizer, without_codes
from modeling_mot.speech_tokenizer import MoTSpeechTokenizer
from training.tokenizers.sources import add_output_arguments, check_output, in_one_line, number, publish


def continuous_processor(
    source: MoTProcessor | PreTrainedTokenizerBase,
    image_size: int | list[int],
    downsampling: int,
    *,
    keep_speech: bool = False,
    **image_settings,
) -> MoTProcessor:
    """Make a processor of the same text whose pictures are pixels, for a model that diffuses them.

    Args:
        source: a processor, or a fast tokenizer. It is not changed; the new processor lacks its image tokens.
        image_size: side, or [height, width], of the pictures in pixels.
        downsampling: pixels along the side of a token: the VAE's factor times the patch size.
        keep_speech: whether to keep the speech units of a processor.
        image_settings: `fit`, `resample`, `background` and `max_pixels` of `MoTImageProcessor`.

    Raises:
        ValueError: `downsampling` does not divide the size, or there is no speech to keep.
    """
    # The parts of the source that the new processor keeps.
    tokenizer, speech, template = source, None, None
    if isinstance(source, MoTProcessor):
        tokenizer, template = source.tokenizer, source.chat_template
        speech = source.speech_tokenizer if keep_speech else None
    if keep_speech and speech is None:
        raise ValueError("keep_speech=True needs a MoTProcessor with a speech tokenizer; pass one, or leave it out")

    # A tokenizer of ours loses its codes; a foreign one gets our special tokens. A converted model may have no BOS.
    is_extended = all(getattr(tokenizer, name, None) is not None for name in SPECIAL_TOKENS if name != "bos_token")
    tokenizer = without_codes(tokenizer) if is_extended else copy.deepcopy(tokenizer)
    if speech is not None or getattr(tokenizer, "image_token", None) is None:
        extend_tokenizer(tokenizer, 0, speech.num_units if speech else 0, begins_texts=not is_extended)
    pictures = MoTImageProcessor(image_size, downsampling, **image_settings)
    return MoTProcessor(tokenizer, None, speech, pictures, chat_template=template)


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
        help="the format of --image: our layout, a bare diffusers VQModel, or a ChameleonVQVAE (default: ours)",
    )
    parser.add_argument(
        "--image-size",
        type=number(int, ge=1, le=2**16),
        metavar="PX",
        help="side in pixels for a bare VQModel or ChameleonVQVAE (default: 512), or with --downsampling (default: 64)",
    )
    parser.add_argument(
        "--downsampling",
        type=number(int, ge=1, le=2**16),
        metavar="PX",
        help="pictures stay pixels, a token of so many pixels a side: the VAE's factor times the model's patch size",
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
    """Run the command; return the figures that it prints."""
    # Everything that can be refused is refused before anything is written.
    arguments = build_parser().parse_args(argv)
    check_output(arguments.output, arguments.overwrite)
    if arguments.downsampling is not None and (arguments.image or arguments.speech):
        raise SystemExit(
            "error: --downsampling keeps pictures as pixels, without speech: leave --image and --speech out"
        )

    # Load the parts and assemble them; an error names the option that it came from.
    with in_one_line("--text: "):
        tokenizer = load_tokenizer(arguments.text)
    with in_one_line("--image: "):
        image = load_image_tokenizer(arguments)
    with in_one_line("--speech: "):
        speech = MoTSpeechTokenizer.from_pretrained(arguments.speech) if arguments.speech else None
    with in_one_line():
        if arguments.downsampling is not None:
            processor = continuous_processor(tokenizer, arguments.image_size or 64, arguments.downsampling)
        else:
            if any(code_token(kind, 0) in tokenizer.get_vocab() for kind in ("image", "speech")):
                tokenizer = without_codes(tokenizer)
            extend_tokenizer(tokenizer, image.num_codes if image else 0, speech.num_units if speech else 0)
            processor = MoTProcessor(tokenizer, image, speech)

    # The folder appears when it is complete.
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
