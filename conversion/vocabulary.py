"""Extend the vocabulary of a dense model by markers, image codes and speech units, and build the processor.

The source's rows keep their ids. Behind them come special tokens that it lacks, then image codes, then speech units, in
the order of `modeling_mot.processing_vocabulary`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from conversion.commands import check_range, reading
from conversion.key_maps import ConversionError
from modeling_mot import MoTProcessor
from modeling_mot.hub_trust import load_tokenizer
from modeling_mot.image_processing import MoTImageProcessor
from modeling_mot.image_tokenizer import MoTImageTokenizer
from modeling_mot.processing_prompts import with_pictures
from modeling_mot.processing_vocabulary import COMMON_SPECIAL_TOKENS, SPECIAL_TOKENS, extend_tokenizer, special
from modeling_mot.speech_tokenizer import MoTSpeechTokenizer


# More tokens than any tokenizer of pictures or sound has; each takes about a kilobyte of the text tokenizer.
MOST_CODES = 1 << 20
SPEECH_UNITS = 500  # of HuBERT's k-means, as in the paper's trimodal models
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
MARKERS = ("boi_token", "eoi_token", "begin_of_speech_token", "end_of_speech_token")


@dataclass
class Media:
    """The tokens of pictures and sound in the new vocabulary.

    Attributes:
        image_codes, speech_units: numbers of their tokens; 0 for none.
        image_tokenizer, speech_tokenizer: make these tokens, if they are known already.
        image_grid: rows and columns of codes of a picture.
        image_processor: prepares pictures for a model that diffuses them; they have no tokens then.
    """

    image_codes: int = 0
    speech_units: int = 0
    image_tokenizer: MoTImageTokenizer | None = None
    speech_tokenizer: MoTSpeechTokenizer | None = None
    image_grid: list[int] | None = None
    image_processor: MoTImageProcessor | None = None

    @property
    def modalities(self) -> list[str]:
        has_images = self.image_codes > 0 or self.image_processor is not None
        return ["text", *(["image"] if has_images else []), *(["speech"] if self.speech_units else [])]


@dataclass
class Vocabulary:
    """The fields of a MoTConfig that the vocabulary decides, and the processor, if the source has a tokenizer."""

    fields: dict[str, Any]
    processor: MoTProcessor | None


def has_tokenizer(folder: Path) -> bool:
    """True if a folder holds a file of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def extend_vocabulary(folder: Path, config: PreTrainedConfig, media: Media, use_tokenizer: bool = True) -> Vocabulary:
    """Extend the vocabulary of the checkpoint in `folder` by the tokens of `media`.

    Args:
        config: the source's configuration.
        use_tokenizer: take the source's tokenizer along, if there is one.

    Raises:
        ConversionError: the tokenizer cannot be loaded or extended.
    """
    check_range("--image-codes", media.image_codes, 0, MOST_CODES)
    check_range("--speech-units", media.speech_units, 0, MOST_CODES)
    if not (use_tokenizer and has_tokenizer(folder)):
        return Vocabulary(laid_out(config, media), None)

    # The tokenizer gets a token for every row of the source, then the new tokens.
    try:
        with reading("it cannot be loaded"):
            tokenizer = load_tokenizer(folder)
        named = [name for name in COMMON_SPECIAL_TOKENS if getattr(tokenizer, name, None) is not None]
        fill_up(tokenizer, config)
        # The model has not learnt to read a begin token where its tokenizer writes none.
        extend_tokenizer(tokenizer, media.image_codes, media.speech_units, begins_texts=False)
        processor = MoTProcessor(
            tokenizer,
            media.image_tokenizer,
            media.speech_tokenizer,
            media.image_processor,
            chat_template=extend_chat_template(tokenizer, named),
        )
        fields = processor.config_kwargs()
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise ConversionError(f"the tokenizer in {folder}: {error}. To go on without it: --no-tokenizer") from error
    return Vocabulary(fields | ({"image_grid": media.image_grid} if media.image_codes else {}), processor)


def fill_up(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give a token to every row of the source, in place, so that new tokens come behind them.

    Many checkpoints have more rows than tokens, for round sizes. If the tokenizer names no padding or end of text, but
    the configuration names a special token, the tokenizer gets this one, since the model was trained with it. A
    tokenizer without a begin token (Qwen) stays without one.
    """
    missing = config.vocab_size - len(tokenizer)
    tokenizer.add_tokens([special(f"<|unused_{index}|>") for index in range(missing)], special_tokens=True)
    for name in ("pad_token", "eos_token"):
        token_id = _first(getattr(config, f"{name}_id", None))
        if getattr(tokenizer, name, None) is None and token_id in tokenizer.added_tokens_decoder:
            tokenizer.add_special_tokens({name: tokenizer.convert_ids_to_tokens(token_id)})


def extend_chat_template(tokenizer: PreTrainedTokenizerBase, named: list[str]) -> str | dict[str, str] | None:
    """Give the chat templates of an extended tokenizer room for pictures and sounds.

    Args:
        named: the common special tokens that the tokenizer had before.

    Returns:
        The template, or name -> template if it has several; None if it has none.
    """
    template = tokenizer.chat_template
    unnamed = [name for name in COMMON_SPECIAL_TOKENS if name not in named]
    if isinstance(template, dict):
        return {name: with_pictures(tokenizer, one, unnamed) for name, one in template.items()}
    return None if template is None else with_pictures(tokenizer, template, unnamed)


def laid_out(config: PreTrainedConfig, media: Media) -> dict[str, Any]:
    """Lay out the ids for a source without a tokenizer; a tokenizer that is extended later has the same ids."""
    # Special tokens keep the source's ids, or come behind its rows.
    ids, end = {}, config.vocab_size
    for name in SPECIAL_TOKENS:
        ids[name] = _first(getattr(config, f"{name}_id", None)) if name in COMMON_SPECIAL_TOKENS else None
        # A tokenizer that begins its texts with no token is extended by none.
        if ids[name] is None and name != "bos_token":
            ids[name], end = end, end + 1

    # Image codes and speech units come behind them.
    ranges = {"text": [0, end]}
    for modality, count in (("image", media.image_codes), ("speech", media.speech_units)):
        if count:
            ranges[modality], end = [end, end + count], end + count
    fields = {f"{name}_id": ids[name] for name in (*COMMON_SPECIAL_TOKENS, *MARKERS)}
    fields |= {"vocab_size": end, "modalities": media.modalities, "modality_token_ranges": ranges}
    if media.image_codes:
        fields["image_grid"] = media.image_grid
    if media.image_processor is not None:
        fields["image_token_id"] = ids["image_token"]
        if len(ranges) == 1:
            fields["modality_token_ranges"] = None
    return fields


def _first(token_id: int | list[int] | None) -> int | None:
    return (token_id or [None])[0] if isinstance(token_id, list) else token_id
