"""The one vocabulary: text with its specials, then image codes, then speech units; and the chat template.

Vocabularies of other families may hold the codes elsewhere, in the midst of text.
"""

import json
import re
from reprlib import repr as shortened
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


# name of the tokenizer attribute -> token
SPECIAL_TOKENS = {
    "pad_token": "<|pad|>",
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "boi_token": "<|boi|>",
    "eoi_token": "<|eoi|>",
    "begin_of_speech_token": "<|bos_speech|>",
    "end_of_speech_token": "<|eos_speech|>",
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "begin_of_turn_token": "<|turn|>",
    "end_of_turn_token": "<|end_turn|>",
}
COMMON_SPECIAL_TOKENS = ("pad_token", "bos_token", "eos_token")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ render(message) }}{% endgeneration %}"
    "{% else %}{{ render(message) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
)
# What a message of parts says; templates of other families have it too, see `processing_inputs`.
CHAT_PARTS = (
    "{% for part in message['content'] or [] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif part['type'] == 'audio' %}{{ '<|audio|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
# Jinja macros must stand before their use; a macro cannot hold the generation block.
CHAT_TEMPLATE = (
    "{% macro render(message) %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    + CHAT_PARTS
    + "{% endif %}{{ '<|end_turn|>' }}"
    "{% endmacro %}" + CHAT_TEMPLATE
)


def code_token(modality: str, index: int) -> str:
    """Token of an image code or speech unit: `<|image_17|>`, `<|speech_3|>`."""
    return f"<|{modality}_{index}|>"


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, num_image_codes: int = 0, num_speech_units: int = 0, begins_texts: bool = True
) -> PreTrainedTokenizerBase:
    """Add what is missing of our special tokens, then image codes, then speech units, to a fast tokenizer, in place.

    An existing padding, begin or end token is kept, so a checkpoint of another family keeps its own.

    Args:
        begins_texts: put a begin token before texts where the tokenizer puts nothing there. False for the tokenizer of a
            trained model, which has not learnt to read one: texts keep their ids.

    Raises:
        ValueError: a slow tokenizer, ids with holes, or other codes that are already there.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; ours needs the `tokenizers` backend")
    if min(num_image_codes, num_speech_units) < 0:
        raise ValueError(f"num_image_codes={num_image_codes}, num_speech_units={num_speech_units} must not be negative")
    if code_token("image", 0) in tokenizer.get_vocab() or code_token("speech", 0) in tokenizer.get_vocab():
        raise ValueError("this tokenizer already holds image or speech tokens; start from the one it was made of")
    existing = {name: getattr(tokenizer, name, None) for name in COMMON_SPECIAL_TOKENS}
    chosen = {name: existing.get(name) or token for name, token in SPECIAL_TOKENS.items()}
    if not (begins_texts or existing["bos_token"]):
        del chosen["bos_token"]
    tokenizer.add_special_tokens({name: chosen[name] for name in COMMON_SPECIAL_TOKENS if name in chosen})
    ours = {name: token for name, token in chosen.items() if name not in COMMON_SPECIAL_TOKENS}
    tokenizer.add_tokens([special(token) for token in ours.values()], special_tokens=True)
    set_special_attributes(tokenizer, ours)
    for modality, count in (("image", num_image_codes), ("speech", num_speech_units)):
        # Special, so that text which spells such a token is not taken for it when documents are encoded.
        tokenizer.add_tokens([special(code_token(modality, i)) for i in range(count)], special_tokens=True)
    if begins_texts and (
        tokenizer.backend_tokenizer.post_processor is None
        or not tokenizer.backend_tokenizer.post_processor.num_special_tokens_to_add(False)
    ):
        add_bos(tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    modality_ranges(tokenizer)
    return tokenizer


def special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def set_special_attributes(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, str]) -> None:
    """Make `tokenizer.boi_token`, `tokenizer.boi_token_id` and so on work, also after saving and loading."""
    tokenizer._set_model_specific_special_tokens(special_tokens=tokens)


def add_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """`tokenizer(text)` starts with bos, as the documents do."""
    bos = tokenizer.bos_token
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = template


def begin_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before a text, with which documents begin too; None where it puts nothing.

    Raises:
        ValueError: it puts several tokens there.
    """
    template = tokenizer.backend_tokenizer.post_processor
    if template is None:
        return None
    # What is put around a text does not depend on it.
    text = Tokenizer(models.WordLevel({"text": 0}, unk_token="text")).encode("text")
    framed = template.process(text, None, True)
    before = framed.ids[: framed.special_tokens_mask.index(0)]
    if len(before) > 1:
        raise ValueError(
            f"the tokenizer puts {tokenizer.convert_ids_to_tokens(before)} before a text; documents begin with one token "
            "or none: change its post_processor"
        )
    return before[0] if before else None


def modality_ranges(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """modality -> [first, last + 1] of its token ids. Raises ValueError when codes are missing or not in their order.

    Tokens that someone added after the codes stand outside all ranges. Where special tokens of text follow the codes, as
    in Chameleon's vocabulary, the range of text is the whole of it, and encloses the others.
    """
    vocabulary = tokenizer.get_vocab()
    named = [name for name in SPECIAL_TOKENS if getattr(tokenizer, name, None) is not None]
    # Models of other families may do without a begin token.
    missing = [name for name in SPECIAL_TOKENS if name not in (*named, "bos_token")]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}; extend_tokenizer adds them")
    if len(vocabulary) != max(vocabulary.values()) + 1:
        raise ValueError(
            f"the vocabulary has {len(vocabulary)} tokens but its highest id is {max(vocabulary.values())}: ids with "
            "holes cannot be laid out in ranges"
        )
    ranges: dict[str, list[int]] = {}
    for modality in ("image", "speech"):
        ids = []
        while (token_id := vocabulary.get(code_token(modality, len(ids)))) is not None:
            ids.append(token_id)
        if ids and ids != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError(f"the {modality} tokens are not one range of ids in their order; use extend_tokenizer")
        if ids:
            ranges[modality] = [ids[0], ids[-1] + 1]
    first = min((start for start, _ in ranges.values()), default=len(vocabulary))
    if max(getattr(tokenizer, f"{name}_id") for name in named) > first:
        return {"text": [0, len(vocabulary)], **ranges}
    if len(ranges) == 2 and ranges["image"][1] != ranges["speech"][0]:
        raise ValueError(f"speech tokens must follow image tokens, but the ranges are {ranges}; use extend_tokenizer")
    return {"text": [0, first], **ranges}


def stretches(ranges: dict[str, list[int]]) -> tuple[list[int], list[str]]:
    """First ids of all stretches of one modality, ascending from 0, and their modalities.

    What lies in no range but that of text is text, as it is for the model.
    """
    firsts, names = [0], ["text"]
    for first, end, name in sorted((first, end, name) for name, (first, end) in ranges.items() if name != "text"):
        if firsts[-1] == first:
            del firsts[-1], names[-1]
        firsts += [first, end]
        names += [name, "text"]
    return firsts, names


def modality_ids_of(input_ids: Any, firsts: list[int], indices: list[int], placeholder: tuple[int, int] | None) -> Any:
    """Index of each token's modality, in the form (list, array, tensor) of `input_ids`.

    Args:
        firsts: first id of each range of tokens, ascending.
        indices: for each range the index of its modality.
        placeholder: (token id, index of its modality) of a token that stands for what is not in the vocabulary.

    Raises:
        ValueError: `input_ids` are no token ids.
    """
    if isinstance(input_ids, torch.Tensor):
        places = torch.bucketize(input_ids, torch.tensor(firsts[1:], device=input_ids.device), right=True)
        ids = torch.tensor(indices, device=input_ids.device)[places]
        return ids if placeholder is None else ids.masked_fill(input_ids == placeholder[0], placeholder[1])
    if isinstance(input_ids, np.ndarray):
        if not np.issubdtype(input_ids.dtype, np.number):
            raise ValueError(f"input_ids={shortened(input_ids)} must be token ids")
        ids = np.asarray(indices)[np.digitize(input_ids, firsts[1:])]
        return ids if placeholder is None else np.where(input_ids == placeholder[0], placeholder[1], ids)
    if (
        isinstance(input_ids, (list, tuple))
        and input_ids
        and isinstance(input_ids[0], (list, tuple, np.ndarray, torch.Tensor))
    ):
        return [modality_ids_of(row, firsts, indices, placeholder) for row in input_ids]
    try:
        array = np.asarray(input_ids, dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"input_ids={shortened(input_ids)} must be token ids: {error}") from None
    return modality_ids_of(array, firsts, indices, placeholder).tolist()


def without_codes(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A new tokenizer of the text part of an extended one: the special tokens stay, image and speech tokens go.

    `extend_tokenizer` can then add other codes. Raises ValueError where tokens follow the codes, whose ids would change.
    """
    ranges = modality_ranges(tokenizer)
    text_size = ranges["text"][1]
    if any(first < text_size for name, (first, _) in ranges.items() if name != "text"):
        raise ValueError(
            f"the codes lie in the midst of text, {ranges}: without them other tokens would change their ids"
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    code = re.compile(r"<\|(image|speech)_\d+\|>")
    backend["added_tokens"] = [token for token in backend["added_tokens"] if not code.fullmatch(token["content"])]
    backend["padding"] = backend["truncation"] = None
    kept = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
    settings = {name: getattr(tokenizer, name) for name in (*COMMON_SPECIAL_TOKENS, *kept)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **settings)
    if len(made) != text_size:
        raise ValueError(
            f"{len(made) - text_size} tokens follow the image and speech tokens; start from the tokenizer before "
            "extend_tokenizer"
        )
    set_special_attributes(made, {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS if name not in settings})
    made.model_input_names = list(tokenizer.model_input_names)
    return made
