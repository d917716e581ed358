"""Arguments of the processor in the shapes people pass them: checked documents, flat lists, sub-tokenizers."""

import difflib
import re
from collections.abc import Iterator, Mapping
from reprlib import repr as shortened
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import _MARKED_RE
from transformers.utils import cached_file
from transformers.utils.chat_template_utils import mark_control_tokens

from .checks_fields import MOST, Maybe, OneOf, Whole, check_fields, is_whole
from .processing_vocabulary import CHAT_PARTS, SPECIAL_TOKENS


SEGMENT_TYPES = ("text", "image", "audio")
TEXT_RULES = {
    "padding": Maybe(OneOf((True, False, "longest", "max_length", "do_not_pad"))),
    "truncation": Maybe(OneOf((True, False, "longest_first", "only_first", "only_second", "do_not_truncate"))),
    "padding_side": Maybe(OneOf(("left", "right"))),
    "max_length": Maybe(Whole(0, int(1e30))),  # that of a tokenizer without a limit
    "stride": Maybe(Whole(0)),
    "pad_to_multiple_of": Maybe(Whole(1, 2**20)),
    "return_tensors": Maybe(OneOf(("pt", "np"))),
}


def check_document(document: list[dict], may_be_empty: bool = False) -> None:
    """Raise ValueError, with the segment's position, for anything that is not a list of well-formed segments."""
    if not isinstance(document, (list, tuple)) or (not document and not may_be_empty):
        raise ValueError(f"a document must be a non-empty list of segments, not {document!r}")
    for position, segment in enumerate(document):
        kind = _checked_type(segment, f"segment {position}", SEGMENT_TYPES)
        if segment.get(kind) is None:
            raise ValueError(f"segment {position} of type {kind!r} has no {kind!r} entry; it has {sorted(segment)}")
        if kind == "text" and (not isinstance(segment["text"], str) or not segment["text"].strip()):
            raise ValueError(f"segment {position} is an empty text: {segment['text']!r}; leave the segment out instead")


def check_conversation(conversation: Any) -> None:
    """Raise ValueError for what is no list of messages, or of such lists, each with a role and text or blocks.

    A block is named by its position, where it would otherwise be left out in silence.
    """
    is_batch = isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple))
    for messages in conversation if is_batch else [conversation]:
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"conversation={shortened(messages)} must be a list of messages, with one at least")
        for message in messages:
            _check_message(message)


def _check_message(message: Any) -> None:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise ValueError(
            f"a message of a conversation must be a dictionary with a role, such as {{'role': 'user', 'content': ...}}, "
            f"not {shortened(message)}"
        )
    content = message.get("content")
    if content is None or isinstance(content, str):
        check_text(content or "")
    elif not isinstance(content, (list, tuple)):
        raise ValueError(
            f"the content of a message by {role!r} must be text or a list of blocks, not {shortened(content)}"
        )
    else:
        for position, block in enumerate(content):
            where = f"block {position} of a message by {role!r}"
            kind = _checked_type(block, where, (*SEGMENT_TYPES, "image_url"))
            if kind in ("text", "image_url") and block.get(kind) is None:
                raise ValueError(f"{where} of type {kind!r} has no {kind!r} entry; it has {sorted(block)}")
            if kind == "text" and not isinstance(block["text"], str):
                raise ValueError(f"{where} has text={shortened(block['text'])}, which must be a string")


def check_text_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for padding and truncation that the tokenizer does not have; enumerations stand for their values."""
    check_fields({name: getattr(value, "value", value) for name, value in options.items()}, TEXT_RULES)


def check_tokens(name: str, rows: Any) -> None:
    """Raise ValueError for what is no list of token ids, or of lists of them."""
    tokens = [rows] if not isinstance(rows, (list, tuple)) else rows
    for row in tokens:
        for token in row if isinstance(row, (list, tuple)) and tokens is rows else [row]:
            if not is_whole(token, 0) or token > MOST:
                raise ValueError(f"{name} has {shortened(token)}, and must be token ids, (batch, length)")


def _checked_type(segment: Any, where: str, valid: tuple[str, ...]) -> str:
    kind = segment.get("type") if isinstance(segment, dict) else None
    if kind not in valid:
        near = difflib.get_close_matches(str(kind), [*SEGMENT_TYPES, "speech"], n=1, cutoff=0.4)
        near = ["audio" if name == "speech" else name for name in near]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where} has type {kind!r}; valid are {', '.join(valid)}{hint}")
    return kind


def check_text(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is no Unicode: {text[error.start : error.end]!a} at {error.start} is half of a surrogate pair"
        ) from None


def load_if_present(sub_class: type, config_name: str, name_or_path: Any, subfolder: str, hub_kwargs: dict) -> Any:
    """The sub-tokenizer, or None where the repository has none."""
    found = cached_file(
        str(name_or_path), config_name, subfolder=subfolder, _raise_exceptions_for_missing_entries=False, **hub_kwargs
    )
    return None if found is None else sub_class.from_pretrained(name_or_path, subfolder=subfolder, **hub_kwargs)


def flatten(values: Any) -> list[Any]:
    """Leaves of nested lists; a value that is no list is its own leaf."""
    if values is None:
        return []
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in flatten(value)]
    return [values]


def flatten_audio(audio: Any) -> list[Any]:
    """As `flatten`, but a list of numbers is one sound."""
    if isinstance(audio, (list, tuple)) and audio and isinstance(audio[0], (int, float, np.number)):
        return [np.asarray(audio)]
    if isinstance(audio, (list, tuple)):
        return [sound for part in audio for sound in flatten_audio(part)]
    return flatten(audio)


def check_placeholders(prompts: Any, image_token: str, pictures: list, audio_token: str, sounds: list) -> None:
    """Raise ValueError for prompts that are no strings, and for placeholders that do not match what is given."""
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"text= must be a string or a non-empty list of strings, not {prompts!r}")
    # A placeholder that a chat's author wrote (marked as such by apply_chat_template) is text.
    own = [_MARKED_RE.sub("", prompt) for prompt in prompts]
    for prompt in own:
        check_text(prompt)
    for name, token, given in (("images", image_token, pictures), ("audio inputs", audio_token, sounds)):
        count = sum(prompt.count(token) for prompt in own)
        if count != len(given):
            raise ValueError(
                f"the number of {token} tokens in the prompts should be the same as the number of {name} passed; "
                f"there are {count} and {len(given)}"
            )


def media_of(conversations: list[list[dict]]) -> tuple[list[list[Any]], list[Any]]:
    """The pictures of each conversation, and the sounds of all, in order."""
    images, sounds = [], []
    for conversation in conversations:
        blocks = [b for m in conversation if isinstance(m.get("content"), (list, tuple)) for b in m["content"]]
        found = {"image": [], "audio": []}
        for block in blocks:
            kind = "image" if block["type"] == "image_url" else block["type"]
            if kind in found:
                found[kind] += _medium_of(block, kind)
        images.append(found["image"])
        sounds += found["audio"]
    return images, sounds


def _medium_of(block: dict, kind: str) -> list[Any]:
    """What a block of a chat holds, in one of transformers' ways or OpenAI's; nothing for a mere placeholder."""
    for key in (kind, "url", "path", "base64", "image_url"):
        value = block.get(key)
        if value is None:
            continue
        if key == "base64":
            value = {"base64": value}
        is_array = isinstance(value, (list, tuple)) or hasattr(value, "shape")
        if kind == "audio" and is_array and block.get("sampling_rate") is not None:
            value = {"array": value, "sampling_rate": block["sampling_rate"]}
        return [value]
    return []


def tokenize_prompts(tokenizer: Any, prompts: list[str], begin: int | None, text_kwargs: dict) -> dict[str, list]:
    """What the tokenizer makes of prompts, with one begin token each, and cut at no place inside of a picture or sound.

    Args:
        begin: the token that the tokenizer puts before a text; None where it puts nothing.
        text_kwargs: of the tokenizer's call, without `return_tensors`.

    Raises:
        ValueError: what is cut off is to be returned too, where the tokenizer does not do the cutting.
    """
    adds = [text_kwargs.get("add_special_tokens", True)] * len(prompts)
    if begin is not None and "add_special_tokens" not in text_kwargs:
        adds = [not prompt.startswith(tokenizer.convert_ids_to_tokens(begin)) for prompt in prompts]
    is_cut = text_kwargs.get("truncation") not in (None, False, "do_not_truncate")
    openings = (tokenizer.boi_token, tokenizer.begin_of_speech_token)
    has_spans = any(opening in prompt for prompt in prompts for opening in openings)
    if len(set(adds)) == 1 and not (is_cut and has_spans):
        return dict(tokenizer(prompts, **text_kwargs | ({} if adds[0] else {"add_special_tokens": False})))

    # One by one: some begin by themselves, or are cut where the tokenizer would not cut.
    if is_cut and text_kwargs.get("return_overflowing_tokens"):
        raise ValueError(
            "return_overflowing_tokens=True goes neither with pictures and sounds nor with texts of which only some begin "
            "with the begin token: leave it out, or cut the texts before they are encoded"
        )
    limit = text_kwargs.get("max_length") or tokenizer.model_max_length
    names = ("padding", "max_length", "pad_to_multiple_of", "padding_side")
    padding = {"padding": False} | {name: text_kwargs[name] for name in names if name in text_kwargs}
    if padding["padding"] != "max_length":
        padding.pop("max_length", None)
    options = {name: value for name, value in text_kwargs.items() if name not in (*names, "truncation")}
    rows = []
    for prompt, add in zip(prompts, adds):
        row = dict(tokenizer(prompt, **options | {"add_special_tokens": add}))
        ids = row["input_ids"]
        if is_cut and len(ids) > limit:
            around = tokenizer.num_special_tokens_to_add() if add else 0
            before = int(begin is not None and around > 0)
            places = places_that_fit(tokenizer, ids, limit, before, around - before)
            per_token = [name for name, values in row.items() if len(values) == len(ids)]
            row |= {name: [row[name][place] for place in places] for name in per_token}
        rows.append(row)
    return dict(tokenizer.pad({name: [row[name] for row in rows] for name in rows[0]}, **padding))


def places_that_fit(tokenizer: Any, ids: list[int], limit: int, before: int, behind: int) -> list[int]:
    """The places of at most `limit` tokens, cut at the tokenizer's `truncation_side` and inside of no picture or sound.

    Args:
        before, behind: tokens at the beginning and the end that stay, as those that the tokenizer adds to a text.
    """
    closings = {
        tokenizer.boi_token_id: tokenizer.eoi_token_id,
        tokenizer.begin_of_speech_token_id: tokenizer.end_of_speech_token_id,
    }
    last = len(ids) - behind
    room = max(limit - before - behind, 0)
    start, end = (before, before + room) if tokenizer.truncation_side == "right" else (last - room, last)
    place = before
    while place < last:
        closing = closings.get(ids[place])
        first, place = place, place + 1
        if closing is None:
            continue
        place = ids.index(closing, place, last) + 1 if closing in ids[place:last] else last
        if first < end < place:
            end = first
        if first < start < place:
            start = place
    return [*range(before), *range(start, end), *range(last, len(ids))]


# What follows the comment is the template as it was. The newline ends the line, so that whitespace at the template's
# beginning is read as before; it is not part of the output.
AS_IT_WAS = "{#- The template as it was: #}\n"
PARTS_TO_STRINGS = (
    "{% set mot = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% set parts = message['content'] %}"
    "{% if parts is defined and parts is iterable and parts is not string and parts is not mapping and (CONDITION) %}"
    "{% set text %}" + CHAT_PARTS + "{% endset %}"
    "{% set mot.messages = mot.messages + [dict(message, content=text)] %}"
    "{% else %}{% set mot.messages = mot.messages + [message] %}{% endif %}"
    "{% endfor %}"
    "{% set messages = mot.messages %}"
)
HAS_MEDIA = "parts | selectattr('type', 'in', ['image', 'audio']) | list"
PROBE = "a text in parts"


def with_pictures(tokenizer: PreTrainedTokenizerBase, template: str, unnamed: list[str]) -> str:
    """The chat template of a model of text, extended for messages with pictures and sounds.

    Args:
        tokenizer: an extended one.
        template: of the tokenizer before that. A message of text parts is left to it where it can render such.
        unnamed: special tokens, such as "eos_token", that the tokenizer had no name for when the template was written;
            they stay unknown to it.
    """
    hidden = "".join(f"{{% set {name} = not_given %}}" for name in unnamed if re.search(rf"\b{name}\b", template))
    extension = PARTS_TO_STRINGS.replace("CONDITION", HAS_MEDIA if _renders_parts(tokenizer, template) else "true")
    for name in ("image_token", "audio_token"):
        extension = extension.replace(SPECIAL_TOKENS[name], getattr(tokenizer, name))
    return hidden + extension + AS_IT_WAS + template


def is_extended(template: Any) -> bool:
    return isinstance(template, str) and AS_IT_WAS in template


def as_it_was(template: str) -> str:
    """A template without what `with_pictures` put before it."""
    return template.partition(AS_IT_WAS)[2] or template


def _renders_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    chat = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
    try:
        rendered = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    except Exception:  # whatever a template of strings makes of a list
        return False
    # Quoted, it is the list as Python or JSON writes it.
    return PROBE in re.sub(f"""['"]{PROBE}['"]""", "", rendered)


def mark_added_tokens(tokenizer: PreTrainedTokenizerBase, conversation: Any) -> Any | None:
    """A conversation with marks around what spells a token that `extend_tokenizer` added: to the source it was text.

    None where nothing spells one.
    """
    added = [token for name, token in SPECIAL_TOKENS.items() if getattr(tokenizer, name, None) == token]
    pattern = re.compile("|".join([*map(re.escape, added), r"<\|(?:image|speech)_\d+\|>"]))
    if not any(map(pattern.search, _strings(conversation))):
        return None
    return mark_control_tokens(conversation, pattern)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
