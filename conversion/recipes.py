"""Write a recipe of the trainer that leaves the text of an upcycled checkpoint as it is."""

import json
import shlex
from pathlib import Path

import yaml

from conversion.key_maps import ConversionError
from modeling_mot import MoTConfig, MoTProcessor, MoTTransfusionConfig
from modeling_mot.configuration_mot import UNTIED_PARTS


_HEAD = """\
# The dense model's part is held: its tower, and its rows of the embeddings and of the output layer. Everything else is
# trained, on the pictures that the project carries; put your own data in their place.
#
#   {command}
"""
_TEXT_TOKENS = 64  # about what a caption needs


def train_command(out: Path) -> str:
    """Return the command that trains with the recipe in `out`."""
    return f"python training/train.py {shlex.quote(str(out / 'train.yaml'))}"


def frozen_text_recipe(out: Path, config: MoTConfig, processor: MoTProcessor | None, held_rows: int) -> str:
    """Make the text of `train.yaml`.

    Args:
        out: the folder that the checkpoint will be in.
        held_rows: number of rows of the source's vocabulary.

    Raises:
        ConversionError: nothing encodes pictures or sound, so nothing could be trained.
    """
    # Something must encode what is trained.
    parts = (
        [] if processor is None else [processor.image_tokenizer, processor.image_processor, processor.speech_tokenizer]
    )
    if not any(part is not None for part in parts):
        raise ConversionError(
            "--freeze-text writes a recipe, which needs a tokenizer beside SOURCE, and --image-tokenizer, "
            "--transfusion or --speech-tokenizer to encode what is trained"
        )

    # Captions of the carried pictures, and their sounds if there is a speech tokenizer.
    has_pictures = processor.image_tokenizer is not None or processor.image_processor is not None
    segments = [["text:name", "image:image"]] if has_pictures else []
    segments += [["text:name", "audio:audio"]] if processor.speech_tokenizer is not None else []
    templates = [{"segments": of_row, "caption_first": 0.8} for of_row in segments]
    source = {"name": "emoji", "path": "carried", "config": "emoji"}
    recipe = {
        "model": {"init_from": str(out)},
        "data": {
            "row_length": min(config.max_position_embeddings, _picture_tokens(config) + _TEXT_TOKENS),
            "sources": [source | {"templates": templates}],
            "validation_sources": [
                source | {"split": "validation", "templates": [{"segments": of_row} for of_row in segments]}
            ],
        },
        "optimizer": {"lr": 1e-4, "min_lr": 1e-5},
        "train": {
            "frozen_towers": ["text", *(["shared"] if not set(UNTIED_PARTS) <= set(config.untied) else [])],
            "frozen_vocabulary": held_rows,
            "steps": 1000,
            "rows": 8,
            "output_dir": f"runs/{out.name}-trained",  # not OUT itself, which may lie in runs/
        },
    }
    plain = json.loads(json.dumps(recipe))  # or YAML would refer to lists that stand in it twice
    return _HEAD.format(command=train_command(out)) + yaml.safe_dump(plain, sort_keys=False, width=120)


def _picture_tokens(config: MoTConfig) -> int:
    if isinstance(config, MoTTransfusionConfig):
        return config.image_length(*config.latent_size)
    rows, columns = config.image_grid or (0, 0)
    return rows * columns
