"""Make and read the vocabulary of all modalities, and check the documents that are written in it.

The ids are text with its special tokens, then image codes, then speech units. Vocabularies of other families may hold
the codes elsewhere, in the midst of text.
"""

import difflib
import json
import re
from reprlib import repr as shortened
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .checks_fields import Maybe, OneOf, Several, check_fields


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
# The modality of what an encoder sees of a picture. Its placeholder is `vision_token`, which no vocabulary of ours has.
FEATURES = "vision"
# What every processor needs; models of other families lack the rest.
NEEDED_TOKENS = ("pad_token", "eos_token", "boi_token", "eoi_token", "image_token")
SPEECH_TOKENS = ("begin_of_speech_token", "end_of_speech_token", "audio_token")


# ------------------------------------------------------------------------------------------------ making the vocabulary


def code_token(modality: str, index: int) -> str:
    """Return the token of an image code or speech unit: `<|image_17|>`, `<|speech_3|>`."""
    return f"<|{modality}_{index}|>"


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, num_image_codes: int = 0, num_speech_units: int = 0, begins_texts: bool = True
) -> PreTrainedTokenizerBase:
    """Add our special tokens, image codes and speech units to a fast tokenizer, in place.

    An existing padding, begin or end token is kept, so that a checkpoint of another family keeps its own.

    Args:
        num_image_codes, num_speech_units: how many tokens of either kind are added behind the text.
        begins_texts: put a begin token before texts where the tokenizer puts nothing there. Pass False for the
            tokenizer of a trained model, which has not learnt to read one: texts then keep their ids.

    Returns:
        `tokenizer` itself.

    Raises:
        ValueError: the tokenizer is slow, its ids have holes, or it holds image or speech tokens already.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"cat": 0, "dog": 1}, unk_token="cat"))
        >>> tokenizer = extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words), num_image_codes=4)
        >>> tokenizer.convert_ids_to_tokens(tokenizer("dog").input_ids)
        ['<|bos|>', 'dog']
        >>> modality_ranges(tokenizer)
        {'text': [0, 13], 'image': [13, 17]}
    """
    # Refuse what cannot be extended before anything is added.
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; ours needs the `tokenizers` backend")
    if min(num_image_codes, num_speech_units) < 0:
        raise ValueError(f"num_image_codes={num_image_codes}, num_speech_units={num_speech_units} must not be negative")
    if code_token("image", 0) in tokenizer.get_vocab() or code_token("speech", 0) in tokenizer.get_vocab():
        raise ValueError("this tokenizer already holds image or speech tokens; start from the one it was made of")

    # Special tokens first: the common ones by transformers' own names, then ours.
    existing = {name: getattr(tokenizer, name, None) for name in COMMON_SPECIAL_TOKENS}
    chosen = {name: existing.get(name) or token for name, token in SPECIAL_TOKENS.items()}
    if not (begins_texts or existing["bos_token"]):
        del chosen["bos_token"]
    tokenizer.add_special_tokens({name: chosen[name] for name in COMMON_SPECIAL_TOKENS if name in chosen})
    ours = {name: token for name, token in chosen.items() if name not in COMMON_SPECIAL_TOKENS}
    tokenizer.add_tokens([special(token) for token in ours.values()], special_tokens=True)
    set_special_attributes(tokenizer, ours)

    # Codes behind them, so that each modality is one range of ids.
    for modality, count in (("image", num_image_codes), ("speech", num_speech_units)):
        # They are special, so that a text that spells one does not become it when documents are encoded.
        tokenizer.add_tokens([special(code_token(modality, i)) for i in range(count)], special_tokens=True)

    # Texts begin as documents do. Ids with holes are refused at the end, when all tokens are there.
    if begins_texts and (
        tokenizer.backend_tokenizer.post_processor is None
        or not tokenizer.backend_tokenizer.post_processor.num_special_tokens_to_add(False)
    ):
        add_bos(tokenizer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    modality_ranges(tokenizer)
    return tokenizer


def special(token: str) -> AddedToken:
    """Make an added token that is read as it is spelled, before the text is normalised."""
    return AddedToken(token, special=True, normalized=False)


def set_special_attributes(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, str]) -> None:
    """Make `tokenizer.boi_token`, `tokenizer.boi_token_id` and so on work, also after saving and loading."""
    tokenizer._set_model_specific_special_tokens(special_tokens=tokens)


def add_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `tokenizer(text)` begin with the begin token, as documents do."""
    bos = tokenizer.bos_token
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = template


def without_codes(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make a new tokenizer without the image and speech tokens of an extended one; special tokens stay.

    `extend_tokenizer` can then add other codes.

    Raises:
        ValueError: tokens of text follow the codes, and their ids would change.
    """
    # Without the codes, every other token must keep its id.
    ranges = modality_ranges(tokenizer)
    text_size = ranges["text"][1]
    if any(first < text_size for name, (first, _) in ranges.items() if name != "text"):
        raise ValueError(
            f"the codes lie in the midst of text, {ranges}: without them other tokens would change their ids"
        )

    # Leave the codes out of the tokenizer's own file, and the settings of the last call with them.
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    code = re.compile(r"<\|(image|speech)_\d+\|>")
    backend["added_tokens"] = [token for token in backend["added_tokens"] if not code.fullmatch(token["content"])]
    backend["padding"] = backend["truncation"] = None

    # Take over the settings that transformers keeps beside that file.
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


# ----------------------------------------------------------------------------------------------- reading the vocabulary


def begin_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that the tokenizer puts before a text, and documents begin with; None if it puts none there.

    Raises:
        ValueError: it puts several tokens there.
    """
    template = tokenizer.backend_tokenizer.post_processor
    if template is None:
        return None
    # Any text will do, since the tokens around it do not depend on it.
    text = Tokenizer(models.WordLevel({"text": 0}, unk_token="text")).encode("text")
    framed = template.process(text, None, True)
    before = framed.ids[: framed.special_tokens_mask.index(0)]
    if len(before) > 1:
        raise ValueError(
            f"the tokenizer puts {tokenizer.convert_ids_to_tokens(before)} before a text; documents begin with one "
            "token or none: change its post_processor"
        )
    return before[0] if before else None


def modality_ranges(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Return [first, last + 1] of the token ids of each modality.

    Tokens that were added behind the codes stand outside all ranges. Where special tokens of text follow the codes, as
    in Chameleon's vocabulary, the range of text is the whole vocabulary and encloses the others.

    Raises:
        ValueError: special tokens are missing, ids have holes, or codes are not in their order.
    """
    vocabulary = tokenizer.get_vocab()

    # Every special token that is needed, and those of speech all or none.
    named = [name for name in (*SPECIAL_TOKENS, "vision_token") if getattr(tokenizer, name, None) is not None]
    needed = NEEDED_TOKENS + (SPEECH_TOKENS if any(name in named for name in SPEECH_TOKENS) else ())
    missing = [name for name in needed if name not in named]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}; extend_tokenizer adds them")
    if len(vocabulary) != max(vocabulary.values()) + 1:
        raise ValueError(
            f"the vocabulary has {len(vocabulary)} tokens but its highest id is {max(vocabulary.values())}: ids with "
            "holes cannot be laid out in ranges"
        )

    # The ids of the codes, in the order of their numbers.
    ranges: dict[str, list[int]] = {}
    for modality in ("image", "speech"):
        ids = []
        while (token_id := vocabulary.get(code_token(modality, len(ids)))) is not None:
            ids.append(token_id)
        if ids and ids != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError(f"the {modality} tokens are not one range of ids in their order; use extend_tokenizer")
        if ids:
            ranges[modality] = [ids[0], ids[-1] + 1]

    # The range of text ends where the codes begin, or is the whole vocabulary.
    first = min((start for start, _ in ranges.values()), default=len(vocabulary))
    if max(getattr(tokenizer, f"{name}_id") for name in named) > first:
        return {"text": [0, len(vocabulary)], **ranges}
    if len(ranges) == 2 and ranges["image"][1] != ranges["speech"][0]:
        raise ValueError(f"speech tokens must follow image tokens, but the ranges are {ranges}; use extend_tokenizer")
    return {"text": [0, first], **ranges}


def stretches(ranges: dict[str, list[int]]) -> tuple[list[int], list[str]]:
    """Return the first ids of all stretches of one modality, ascending from 0, and the modality of each.

    Ids that lie in no range are text, as they are for the model.
    """
    firsts, names = [0], ["text"]
    for first, end, name in sorted((first, end, name) for name, (first, end) in ranges.items() if name != "text"):
        if firsts[-1] == first:
            del firsts[-1], names[-1]
        firsts += [first, end]
        names += [name, "text"]
    return firsts, names


def modality_ids_of(input_ids: Any, firsts: list[int], indices: list[int], placeholders: dict[int, int]) -> Any:
    """Return the index of each token's modality, in the form (list, array, tensor) of `input_ids`.

    Args:
        firsts: first id of each stretch of tokens, ascending from 0; see `stretches`.
        indices: the index of each stretch's modality.
        placeholders: token id -> index of its modality, of the tokens that stand for patches of pictures.

    Raises:
        ValueError: `input_ids` are no token ids.
    """
    # A tensor stays on its device.
    if isinstance(input_ids, torch.Tensor):
        places = torch.bucketize(input_ids, torch.tensor(firsts[1:], device=input_ids.device), right=True)
        ids = torch.tensor(indices, device=input_ids.device)[places]
        for token, index in placeholders.items():
            ids = ids.masked_fill(input_ids == token, index)
        return ids

    # Lists become arrays, row by row where they are nested: rows may differ in length.
    if isinstance(input_ids, np.ndarray):
        if not np.issubdtype(input_ids.dtype, np.number):
            raise ValueError(f"input_ids={shortened(input_ids)} must be token ids")
        ids = np.asarray(indices)[np.digitize(input_ids, firsts[1:])]
        for token, index in placeholders.items():
            ids = np.where(input_ids == token, index, ids)
        return ids
    nested = (list, tuple, np.ndarray, torch.Tensor)
    if isinstance(input_ids, (list, tuple)) and input_ids and isinstance(input_ids[0], nested):
        return [modality_ids_of(row, firsts, indices, placeholders) for row in input_ids]
    try:
        array = np.asarray(input_ids, dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"input_ids={shortened(input_ids)} must be token ids: {error}") from None
    return modality_ids_of(array, firsts, indices, placeholders).tolist()


# ------------------------------------------------------------------------------------------------------------ documents

# The types of a document's segments. The model calls the modality speech, transformers calls the medium audio: users
# may write either.
SEGMENT_TYPES = ("text", "image", "audio")
OTHER_NAMES = {"speech": "audio"}
# The roles in which a picture may stand, one copy after another: noised latents that are learnt, clean latents, and
# features of an encoder.
ROLES = ("noised", "latents", "features")
ROLES_RULE = Maybe(Several(OneOf(ROLES)))


def checked_document(document: list[dict], may_be_empty: bool = False) -> list[dict]:
    """Check a document, and return its segments, each with one of `SEGMENT_TYPES`.

    Raises:
        ValueError: not a list of well-formed segments; the segment is named by its position.
    """
    if not isinstance(document, (list, tuple)) or (not document and not may_be_empty):
        raise ValueError(f"a document must be a non-empty list of segments, not {document!r}")
    return [_checked_segment(segment, position) for position, segment in enumerate(document)]


def _checked_segment(segment: Any, position: int) -> dict:
    """Return a segment under its usual type, with content under the name of that type."""
    segment = with_known_type(segment, f"segment {position}", SEGMENT_TYPES)
    kind = segment["type"]
    if segment.get(kind) is None:
        raise ValueError(f"segment {position} of type {kind!r} has no {kind!r} entry; it has {sorted(segment)}")
    if kind == "text" and (not isinstance(segment["text"], str) or not segment["text"].strip()):
        raise ValueError(f"segment {position} is an empty text: {segment['text']!r}; leave the segment out instead")
    if "roles" in segment:
        check_fields({"roles": segment["roles"]}, {"roles": ROLES_RULE}, f"segment {position}: ")
        if kind != "image":
            raise ValueError(f"segment {position} of type {kind!r} has roles={segment['roles']!r}; pictures have roles")
    return segment


def with_known_type(segment: Any, where: str, valid: tuple[str, ...]) -> dict:
    """Return a segment of a document or a block of a chat under the names of `valid`: "speech" becomes "audio".

    Raises:
        ValueError: its type is not one of `valid`; `where` names it.
    """
    # The type, by either of its names.
    kind = segment.get("type") if isinstance(segment, dict) else None
    kind = OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in valid:
        near = difflib.get_close_matches(str(kind), [*SEGMENT_TYPES, *OTHER_NAMES], n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where} has type {kind!r}; valid are {', '.join(valid)}, and speech for audio{hint}")
    if kind == segment["type"] and not (kind == "audio" and "speech" in segment):
        return segment

    # The content may stand under either name as well.
    named = {name: value for name, value in segment.items() if name != "speech"} | {"type": kind}
    return named if segment.get("speech") is None else named | {"audio": segment["speech"]}


def check_text(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is no Unicode: {text[error.start : error.end]!a} at {error.start} is half of a surrogate pair"
        ) from None
