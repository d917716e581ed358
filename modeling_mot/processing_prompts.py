"""Encode prompts and chats, written as everywhere in transformers, and extend the templates of chats.

A prompt is text with a placeholder for each picture and sound. A chat is a list of messages, which a template writes
as a prompt. The chat template of a model of text is extended, so that messages may hold pictures and sounds.
"""

import re
from collections.abc import Iterator, Mapping
from reprlib import repr as shortened
from typing import Any

import numpy as np
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import _MARKED_RE
from transformers.utils.chat_template_utils import mark_control_tokens

from .checks_fields import Maybe, OneOf, Whole, check_fields
from .processing_vocabulary import OTHER_NAMES, SEGMENT_TYPES, SPECIAL_TOKENS, check_text, with_known_type


TEXT_RULES = {
    "padding": Maybe(OneOf((True, False, "longest", "max_length", "do_not_pad"))),
    "truncation": Maybe(OneOf((True, False, "longest_first", "only_first", "only_second", "do_not_truncate"))),
    "padding_side": Maybe(OneOf(("left", "right"))),
    "max_length": Maybe(Whole(0, int(1e30))),  # the maximum of a tokenizer without a limit
    "stride": Maybe(Whole(0)),
    "pad_to_multiple_of": Maybe(Whole(1, 2**20)),
    "return_tensors": Maybe(OneOf(("pt", "np"))),
}
PADDING_OPTIONS = ("padding", "max_length", "pad_to_multiple_of", "padding_side")


class PromptMixin:
    """The methods of `MoTProcessor` for prompts and chats."""

    def encode_prompts(
        self,
        text: Any,
        images: Any,
        audio: Any,
        merged: dict[str, dict],
        continue_with: str | None = None,
        **access: bool,
    ) -> BatchFeature:
        """Encode prompts as a batch; their placeholders become the tokens of the given pictures and sounds.

        Args:
            merged: transformers' arguments, sorted into those of text, pictures and sounds.
            continue_with: what the prompts are to be continued with, which says the roles of pictures.
        """
        # Without a text, pictures and sounds make one of placeholders.
        pictures, sounds = leaves_of(images), sounds_of(audio)
        if text is None and not pictures and not sounds:
            raise ValueError("there is nothing to process: give documents=, text=, images= or audio=")
        if text is None:
            text = self.image_token * len(pictures) + (self.audio_token or "") * len(sounds)
        prompts = [text] if isinstance(text, str) else text
        check_placeholders(prompts, self.image_token, pictures, self.audio_token, sounds)

        # Transformers passes some of its options among those of text.
        text_kwargs = dict(merged["text_kwargs"])
        with_offsets = text_kwargs.pop("return_text_replacement_offsets", merged.get("return_text_replacement_offsets"))
        with_types = text_kwargs.pop("return_mm_token_type_ids", merged.get("return_mm_token_type_ids"))
        return_tensors = text_kwargs.pop("return_tensors", None)

        # Write pictures and sounds into the text, as tokens that the tokenizer reads back.
        sampling_rate = merged["audio_kwargs"].get("sampling_rate")
        mode = OTHER_NAMES.get(continue_with, continue_with) or "text"
        roles = self.roles_of([{"type": "image"}] * len(pictures), mode)
        spans, inputs = self.encode_copies(pictures, roles, **access)
        if mode != "text":
            # A prompt that begins a text at its end, as rendered chats do, is to be continued with a thought first.
            opening = self.tokenizer.boi_token if mode == "image" else self.tokenizer.begin_of_speech_token
            begin = self.tokenizer.bos_token if self.frames_texts else opening
            prompts = [prompt if prompt.endswith(begin) else prompt + opening for prompt in prompts]
        prompts, offsets = self.get_text_with_replacements(
            list(prompts),
            images_replacements=[self.spelled(ids) for ids in spans],
            audio_replacements=[self.spelled(ids) for ids in self.encode_audio(sounds, sampling_rate, **access)],
        )
        encoded = tokenize_prompts(self.tokenizer, prompts, self.bos_token_id, text_kwargs)
        encoded.pop("token_type_ids", None)
        self._check_special_mm_tokens(prompts, encoded, modalities=["image", "audio"])

        # Add what goes with the ids; a prompt of text alone has no axis of prompts unless it is a tensor.
        encoded["modality_ids"] = self.modality_ids_of(encoded["input_ids"])
        if with_types:
            encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        if with_offsets:
            encoded["text_replacement_offsets"] = offsets
        if isinstance(text, str) and return_tensors is None and not (pictures or sounds):
            encoded = {name: values[0] for name, values in encoded.items()}
        encoded |= inputs.stacked()
        return BatchFeature(encoded, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def spelled(self, ids: list[int]) -> str:
        """Spell token ids as a text that the tokenizer reads back to the same ids."""
        return "".join(self.tokenizer.convert_ids_to_tokens(ids))

    def apply_chat_template(
        self, conversation, chat_template=None, tools=None, documents=None, processor_kwargs=None, **kwargs
    ):
        """Write a chat as a prompt or, with `tokenize=True`, as tokens; the arguments are those of transformers.

        With our own template nothing that users write becomes control tokens or placeholders. With the template of the
        model that this one was made of, a chat of text alone has the ids that the tokenizer of that model gives it: the
        template writes all special tokens, and the tokens that were added here are text to it.

        `allow_urls` and `allow_paths` are those of `__call__`. A block of a sound is of type "audio" or "speech". The
        rate of a sound given as an array is its block's `sampling_rate`, or else that of `processor_kwargs`. With an
        encoder processor, `processor_kwargs={"continue_with": "image"}` is for a picture as the answer, and
        `think=True` begins the chat with the text that asks for a thought; see `__call__`. A thought before a picture
        needs `add_generation_prompt=True`.

        Raises:
            ValueError: a message or block that the template would leave out in silence.

        Example, from the root of the repository:
            >>> from modeling_mot import MoTProcessor
            >>> processor = MoTProcessor.from_pretrained("training/assets/processor")
            >>> picture = {"type": "image", "image": np.zeros((64, 64, 3), np.uint8)}
            >>> chat = [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]
            >>> processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            '<|bos|><|turn|>user\\n<|image|>What is it?<|end_turn|><|turn|>assistant\\n'
            >>> batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
            >>> (batch["modality_ids"] == processor.modalities.index("image")).sum().item()
            64
        """
        # Check the arguments before a template hides what is wrong with them.
        access = {name: kwargs.pop(name) for name in ("allow_urls", "allow_paths") if name in kwargs}
        if access:
            processor_kwargs = (processor_kwargs or {}) | access
        conversation = checked_conversation(conversation)
        if kwargs.pop("think", False):
            asked = self.thinking_prompt((processor_kwargs or {}).get("continue_with") or "text")
            system = {"role": "system", "content": asked["text"]}
            is_one = isinstance(conversation[0], Mapping)
            chats = [[system, *messages] for messages in ([conversation] if is_one else conversation)]
            conversation = chats[0] if is_one else chats
        if not isinstance(chat_template, (str, type(None))):
            raise ValueError(f"chat_template={chat_template!r} must be a template of Jinja, or the name of one")
        for name, values in (("tools", tools), ("documents", documents)):
            if not isinstance(values, (list, tuple, type(None))):
                raise ValueError(f"{name}={values!r} must be a list")

        # With our own template, spellings of special tokens stay text. Transformers cannot do that and mask too.
        masked = kwargs.get("return_assistant_tokens_mask", False)
        sanitizes = kwargs.get("tokenize") and not masked
        if kwargs.get("sanitize_control_tokens") is None:
            own = framed_chat_template(self.tokenizer) if self.frames_texts else CHAT_TEMPLATE
            ours = chat_template is None and self.chat_template == own
            kwargs["sanitize_control_tokens"] = bool(ours and sanitizes)

        # With another model's template, spellings of the tokens that were added here stay text.
        if kwargs.get("tokenize") and is_extended(self._resolve_chat_template(chat_template)):
            processor_kwargs = {"add_special_tokens": False} | (processor_kwargs or {})
            marked = mark_added_tokens(self.tokenizer, conversation) if sanitizes else None
            if marked is not None and not kwargs["sanitize_control_tokens"]:
                conversation = marked
                processor_kwargs["sanitize_control_tokens"] = True
        return super().apply_chat_template(
            conversation, chat_template, tools, documents, processor_kwargs=processor_kwargs, **kwargs
        )

    def _resolve_audio_loading_params(self, processor_kwargs: dict) -> dict:
        # Transformers assumes 16 kHz for sounds without a rate; our own reader warns of them instead.
        of_audio = processor_kwargs.get("audio_kwargs", {}).get("sampling_rate")
        return {"sampling_rate": processor_kwargs.get("sampling_rate", of_audio)}

    def _multimodal_inputs_from_conversations(self, conversations, audio_loading_params, load_audio_from_video=False):
        """Return the pictures and sounds of conversations, in order; the tokenizers of both decode them."""
        images, sounds = media_of(conversations)
        return images, [], sounds, {}


# -------------------------------------------------------------------------------------------------------------- prompts


def check_text_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for padding and truncation that the tokenizer does not have."""
    # Members of transformers' enumerations stand for their values.
    check_fields({name: getattr(value, "value", value) for name, value in options.items()}, TEXT_RULES)


def leaves_of(values: Any) -> list[Any]:
    """Return the leaves of nested lists; a value that is no list is its own leaf."""
    if values is None:
        return []
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in leaves_of(value)]
    return [values]


def sounds_of(audio: Any) -> list[Any]:
    """Return the sounds in nested lists; a list of numbers is one sound."""
    if isinstance(audio, (list, tuple)) and audio and isinstance(audio[0], (int, float, np.number)):
        return [np.asarray(audio)]
    if isinstance(audio, (list, tuple)):
        return [sound for part in audio for sound in sounds_of(part)]
    return leaves_of(audio)


def check_placeholders(prompts: Any, image_token: str, pictures: list, audio_token: str, sounds: list) -> None:
    """Raise ValueError for prompts that are no strings, and for placeholders that do not match what is given."""
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"text= must be a string or a non-empty list of strings, not {prompts!r}")

    # A placeholder that a chat's author wrote is text; apply_chat_template has marked it as such.
    own = [_MARKED_RE.sub("", prompt) for prompt in prompts]
    for prompt in own:
        check_text(prompt)
    for name, token, given in (("images", image_token, pictures), ("audio inputs", audio_token, sounds)):
        count = sum(prompt.count(token) for prompt in own) if token is not None else 0
        if count != len(given):
            raise ValueError(
                f"the number of {token} tokens in the prompts should be the same as the number of {name} passed; "
                f"there are {count} and {len(given)}"
            )


def tokenize_prompts(tokenizer: Any, prompts: list[str], begin: int | None, text_kwargs: dict) -> dict[str, list]:
    """Tokenize prompts, with one begin token each.  -> token ids, and all else that the tokenizer returns

    A prompt that is too long is cut, but never inside of a picture or sound.

    Args:
        begin: the token that the tokenizer puts before a text; None if it puts none there.
        text_kwargs: arguments of the tokenizer's call, without `return_tensors`.

    Raises:
        ValueError: the caller asks for the overflow too, but the tokenizer does not do the cutting.
    """
    # A prompt that begins with the begin token, as rendered chats do, gets no second one.
    adds = [text_kwargs.get("add_special_tokens", True)] * len(prompts)
    if begin is not None and "add_special_tokens" not in text_kwargs:
        adds = [not prompt.startswith(tokenizer.convert_ids_to_tokens(begin)) for prompt in prompts]
    is_cut = text_kwargs.get("truncation") not in (None, False, "do_not_truncate")
    openings = [tokenizer.convert_ids_to_tokens(token) for token in closings_of(tokenizer)]
    has_spans = any(opening in prompt for prompt in prompts for opening in openings)
    if len(set(adds)) == 1 and not (is_cut and has_spans):
        return dict(tokenizer(prompts, **text_kwargs | ({} if adds[0] else {"add_special_tokens": False})))

    # Otherwise one by one: some prompts begin by themselves, or are cut where the tokenizer would not cut.
    if is_cut and text_kwargs.get("return_overflowing_tokens"):
        raise ValueError(
            "return_overflowing_tokens=True goes neither with pictures and sounds nor with texts of which only some "
            "begin with the begin token: leave it out, or cut the texts before they are encoded"
        )
    limit = text_kwargs.get("max_length") or tokenizer.model_max_length
    options = {name: value for name, value in text_kwargs.items() if name not in (*PADDING_OPTIONS, "truncation")}
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

    # Pad as the tokenizer would have done; to a length of the caller's only where the caller asks for it.
    padding = {"padding": False} | {name: text_kwargs[name] for name in PADDING_OPTIONS if name in text_kwargs}
    if padding["padding"] != "max_length":
        padding.pop("max_length", None)
    return dict(tokenizer.pad({name: [row[name] for row in rows] for name in rows[0]}, **padding))


def closings_of(tokenizer: Any) -> dict[int, int]:
    """Return begin token of a picture or sound -> its end token; a vocabulary may have none of sounds."""
    pairs = [
        tuple(getattr(tokenizer, f"{name}_token_id", None) for name in names)
        for names in (("boi", "eoi"), ("begin_of_speech", "end_of_speech"))
    ]
    return {begin: end for begin, end in pairs if begin is not None}


def places_that_fit(tokenizer: Any, ids: list[int], limit: int, before: int, behind: int) -> list[int]:
    """Return the places of at most `limit` tokens, cut at the tokenizer's `truncation_side`, in no picture or sound.

    Args:
        before, behind: how many tokens stay at the beginning and at the end, those that the tokenizer adds to a text.
    """
    closings = closings_of(tokenizer)

    # The cut that the tokenizer would make.
    last = len(ids) - behind
    room = max(limit - before - behind, 0)
    start, end = (before, before + room) if tokenizer.truncation_side == "right" else (last - room, last)

    # A picture or sound that it would cut is left out whole.
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


def pad_documents(tokenizer: Any, rows: list[list[int]], text_kwargs: dict) -> dict[str, list]:
    """Pad documents as the caller asks.  -> `input_ids` and `attention_mask`

    Raises:
        ValueError: a document is longer than `max_length`.
    """
    max_length, longest = text_kwargs.get("max_length"), max(map(len, rows))
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"a document has {longest} tokens, more than max_length={max_length}; documents are not truncated, since a "
            "cut picture or sound is not a document: shorten it or raise max_length"
        )
    options = {name: text_kwargs[name] for name in PADDING_OPTIONS if text_kwargs.get(name) is not None}
    batch = tokenizer.pad({"input_ids": rows}, **{"padding": False, **options}, return_attention_mask=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


# ---------------------------------------------------------------------------------------------------------------- chats


def checked_conversation(conversation: Any) -> list:
    """Check a list of messages, or of such lists; the blocks of each message get the names that templates know.

    Raises:
        ValueError: something else, or a message without a role and text or blocks. The error names the position of a
            block that a template would leave out in silence.
    """
    if isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple)):
        return [_checked_messages(messages) for messages in conversation]
    return _checked_messages(conversation)


def _checked_messages(messages: Any) -> list:
    """Check the messages of one conversation one by one."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"conversation={shortened(messages)} must be a list of messages, with one at least")
    return [_checked_message(message) for message in messages]


def _checked_message(message: Any) -> Mapping:
    """Check that a message has a role, and text or known blocks."""
    # A message of text needs no more than a role.
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise ValueError(
            "a message of a conversation must be a dictionary with a role, such as {'role': 'user', 'content': ...}, "
            f"not {shortened(message)}"
        )
    content = message.get("content")
    if content is None or isinstance(content, str):
        check_text(content or "")
        return message

    # Blocks that a template does not know would vanish, so each is checked.
    if not isinstance(content, (list, tuple)):
        raise ValueError(
            f"the content of a message by {role!r} must be text or a list of blocks, not {shortened(content)}"
        )
    blocks = [_checked_block(block, f"block {place} of a message by {role!r}") for place, block in enumerate(content)]
    # A message that has nothing to be renamed stays the caller's own object, of its own type.
    same = all(block is given for block, given in zip(blocks, content))
    return message if same else {**message, "content": blocks}


def _checked_block(block: Any, where: str) -> dict:
    """Return a text, picture or sound of a message under its usual type; `where` names it in errors."""
    block = with_known_type(block, where, (*SEGMENT_TYPES, "image_url"))
    kind = block["type"]
    if kind in ("text", "image_url") and block.get(kind) is None:
        raise ValueError(f"{where} of type {kind!r} has no {kind!r} entry; it has {sorted(block)}")
    if kind == "text" and not isinstance(block["text"], str):
        raise ValueError(f"{where} has text={shortened(block['text'])}, which must be a string")
    if block.get("roles") is not None:
        raise ValueError(
            f"{where} has roles={shortened(block['roles'])}, which segments of documents have; pass documents= to the "
            "processor or to generate()"
        )
    return block


def media_of(conversations: list[list[dict]]) -> tuple[list[list[Any]], list[Any]]:
    """Return the pictures of each conversation, and the sounds of all, in order."""
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
    """Return the picture or sound of a block, in transformers' forms or OpenAI's; none for a mere placeholder."""
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


# --------------------------------------------------------------------------------------------------- templates of chats

# What a message of parts says; extended templates of other families say it too, see `with_pictures`.
CHAT_PARTS = (
    "{% for part in message['content'] or [] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif part['type'] == 'audio' %}{{ '<|audio|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
# Our own template. Jinja macros must stand before their use; a macro cannot hold the generation block.
CHAT_TEMPLATE = (
    "{% macro render(message) %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    + CHAT_PARTS
    + "{% endif %}{{ '<|end_turn|>' }}"
    "{% endmacro %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ render(message) }}{% endgeneration %}"
    "{% else %}{{ render(message) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
)


def framed_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Make the template of a model whose texts stand between the begin and the end token, without names of roles."""
    template = (
        "{% for message in messages %}{% set content = message['content'] or [] %}"
        "{% for part in ([{'type': 'text', 'text': content}] if content is string else content) %}"
        "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ 'BEGIN' + part['text'] + 'END' }}{% endif %}"
        "{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'BEGIN' }}{% endif %}"
    )
    tokens = {"IMAGE": tokenizer.image_token, "BEGIN": tokenizer.bos_token, "END": tokenizer.eos_token}
    for name, token in tokens.items():
        template = template.replace(name, token)
    return template


# An extended template is the extension, this comment, and the template as it was. The newline ends the comment's line,
# so that whitespace at the beginning of the template is read as before; it is not part of the output.
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
    """Extend the chat template of a model of text for messages with pictures and sounds.

    Args:
        tokenizer: a tokenizer that `extend_tokenizer` returned.
        template: the template that it had before. Messages of text parts are left to it where it can render them.
        unnamed: special tokens, such as "eos_token", that the tokenizer had no name for when the template was written;
            the template does not see them now either.
    """
    hidden = "".join(f"{{% set {name} = not_given %}}" for name in unnamed if re.search(rf"\b{name}\b", template))
    extension = PARTS_TO_STRINGS.replace("CONDITION", HAS_MEDIA if _renders_parts(tokenizer, template) else "true")
    for name in ("image_token", "audio_token"):
        extension = extension.replace(SPECIAL_TOKENS[name], getattr(tokenizer, name))
    return hidden + extension + AS_IT_WAS + template


def is_extended(template: Any) -> bool:
    """True if `with_pictures` returned the template."""
    return isinstance(template, str) and AS_IT_WAS in template


def as_it_was(template: str) -> str:
    """Return a template without the extension that `with_pictures` put before it."""
    return template.partition(AS_IT_WAS)[2] or template


def _renders_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """True if the template writes the text of a message that is a list of parts."""
    chat = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
    try:
        rendered = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    except Exception:  # a template of strings may raise anything over a list
        return False
    # A text in quotes is the whole list, as Python or JSON writes it.
    return PROBE in re.sub(f"""['"]{PROBE}['"]""", "", rendered)


def mark_added_tokens(tokenizer: PreTrainedTokenizerBase, conversation: Any) -> Any | None:
    """Mark the spellings of tokens that `extend_tokenizer` added; None if a conversation has no such spelling.

    To the model that the tokenizer was made of, such a spelling was text.
    """
    added = [token for name, token in SPECIAL_TOKENS.items() if getattr(tokenizer, name, None) == token]
    pattern = re.compile("|".join([*map(re.escape, added), r"<\|(?:image|speech)_\d+\|>"]))
    if not any(map(pattern.search, _strings(conversation))):
        return None
    return mark_control_tokens(conversation, pattern)


def _strings(value: Any) -> Iterator[str]:
    """Yield all texts of a tree of dictionaries and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
