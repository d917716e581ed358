"""Read Chameleon's vocabulary, in which image codes stand in the midst of text, and convert its tokenizer."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

from conversion.commands import reading
from conversion.key_maps import ConversionError
from modeling_mot.hub_trust import load_tokenizer
from modeling_mot.processing_vocabulary import SPECIAL_TOKENS, code_token, set_special_attributes, special


# Chameleon's own names, which transformers' processor has fixed too.
OWN_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "boi_token": "<racm3:break>",
    "eoi_token": "<eoss>",
    "image_token": "<image>",
}
END_OF_TURN = "<reserved08706>"
RESERVED = re.compile(r"<reserved\d+>")

# As transformers' processor and Meta's own code write a conversation: every turn ends with the separator.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] or [] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<reserved08706>' }}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class ImageVocabulary:
    """Say which tokens are image codes, and which code each of them is.

    Attributes:
        first: id of the first image token; the others follow without a hole.
        codes: the VQ-VAE's code of each image token, in the order of the ids.
        special: attribute of a tokenizer -> token id, of `OWN_TOKENS`.
    """

    first: int
    codes: tuple[int, ...]
    special: dict[str, int]

    @property
    def token_range(self) -> list[int]:
        return [self.first, self.first + len(self.codes)]

    @classmethod
    def of(cls, vocabulary_map: dict[str, int] | None, num_codes: int) -> "ImageVocabulary":
        """Read a Chameleon configuration's `vocabulary_map`, in the way of transformers.

        Raises:
            ConversionError: tokens are missing, image tokens are not one range of ids, or do not name each of the
                `num_codes` codes of the VQ-VAE once.
        """
        if missing := [name for name in OWN_TOKENS.values() if name not in (vocabulary_map or {})]:
            raise ConversionError(
                f"vocabulary_map in the source's config.json lacks {', '.join(missing)}; without it nobody knows which "
                "tokens are images. Take the checkpoint that transformers converted, such as facebook/chameleon-7b"
            )
        code_of = ChameleonImageVocabularyMapping(vocabulary_map).bpe2img
        ids = sorted(code_of)
        if not ids or ids != list(range(ids[0], ids[0] + len(ids))):
            raise ConversionError(
                f"vocabulary_map has {len(ids)} image tokens (IMGIMG...) that are not one range of ids; a modality's "
                "tokens must be one, and renumbering them would change the checkpoint"
            )
        codes = tuple(code_of[token] for token in ids)
        if sorted(codes) != list(range(num_codes)):
            raise ConversionError(
                f"vocabulary_map names {len(set(codes))} image codes up to {max(codes)}, the VQ-VAE has {num_codes} "
                "(vq_config.num_embeddings): each needs one token"
            )
        return cls(ids[0], codes, {name: vocabulary_map[token] for name, token in OWN_TOKENS.items()})


def convert_tokenizer(
    folder: Path, vocabulary: ImageVocabulary, num_speech_units: int = 0
) -> PreTrainedTokenizerBase | None:
    """Rename the image tokens of the source's tokenizer to `<|image_0|>`, `<|image_1|>` and so on; all ids stay.

    Chameleon has no tokens for turns and for the begin and end of sound. Reserved tokens, which no training has seen,
    take their places. Speech units get ids of their own behind the others. A source without a tokenizer gives None.

    Raises:
        ConversionError: the tokenizer is not that of the configuration, or has no reserved tokens left.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    with reading(f"the tokenizer of {folder} cannot be read"):
        source = load_tokenizer(folder)

    # The image tokens get our names. Padding and truncation belong to a call, not to the tokenizer.
    backend = json.loads(source.backend_tokenizer.to_str())
    names = source.convert_ids_to_tokens(list(range(*vocabulary.token_range)))
    renamed = {name: code_token("image", index) for index, name in enumerate(names)}
    if other := [name for name in names if not str(name).startswith("IMGIMG")]:
        raise ConversionError(
            f"the tokenizer has {other[0]!r} where vocabulary_map has image tokens; are both of one checkpoint?"
        )
    backend["model"]["vocab"] = {renamed.get(name, name): index for name, index in backend["model"]["vocab"].items()}
    for token in backend["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    backend["padding"] = backend["truncation"] = None

    # Special tokens: Chameleon's own, then reserved ones for the rest.
    own = {name: source.convert_ids_to_tokens(index) for name, index in vocabulary.special.items()}
    if own != OWN_TOKENS:
        raise ConversionError(
            f"the tokenizer has {own} where vocabulary_map has {OWN_TOKENS}; are both of one checkpoint?"
        )
    own |= _from_reserved(source.get_vocab())

    kept = {
        name: getattr(source, name) for name in ("model_max_length", "clean_up_tokenization_spaces", "chat_template")
    }
    common = {name: own.pop(name) for name in ("pad_token", "bos_token", "eos_token")}
    unknown = {} if source.unk_token is None else {"unk_token": source.unk_token}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **common, **unknown, **kept
    )
    # Special, so that text which spells such a token is not taken for it when documents are encoded.
    tokenizer.add_tokens([special(token) for token in (*own.values(), *renamed.values())], special_tokens=True)
    set_special_attributes(tokenizer, own)

    # The ids are as they were; speech units come behind them.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if tokenizer.get_vocab() != {renamed.get(name, name): index for name, index in source.get_vocab().items()}:
        raise ConversionError("the tokenizer's ids changed while its image tokens were renamed; it cannot be converted")
    units = [code_token("speech", index) for index in range(num_speech_units)]
    tokenizer.add_tokens([special(token) for token in units], special_tokens=True)
    return tokenizer


def _from_reserved(vocabulary: dict[str, int]) -> dict[str, str]:
    """Choose a token for each of our special tokens that Chameleon lacks: the separator, then reserved ones by id."""
    reserved = sorted((name for name in vocabulary if RESERVED.fullmatch(name)), key=vocabulary.__getitem__)
    wanted = [name for name in SPECIAL_TOKENS if name not in OWN_TOKENS and name != "end_of_turn_token"]
    free = [name for name in reserved if name != END_OF_TURN]
    if END_OF_TURN not in reserved or len(free) < len(wanted):
        raise ConversionError(
            f"the tokenizer needs {END_OF_TURN} and {len(wanted)} more reserved tokens for {', '.join(wanted)}; it has "
            f"{len(reserved)}"
        )
    return {"end_of_turn_token": END_OF_TURN} | dict(zip(wanted, free))
