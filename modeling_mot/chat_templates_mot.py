"""Chat templates of models of text, with room for pictures and sounds.

Such a template joins strings, or passes over what is none. Before it is rendered, messages with pictures or sounds become
strings with placeholders. All other messages reach it as they are, so a chat of text alone stays what it was.
"""

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import mark_control_tokens

from .vocabulary_mot import CHAT_PARTS, SPECIAL_TOKENS


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
