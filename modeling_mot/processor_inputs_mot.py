"""Arguments of the processor in the shapes people pass them: checked documents, flat lists, sub-tokenizers."""

import difflib
from typing import Any

import numpy as np
from transformers.utils import cached_file


SEGMENT_TYPES = ("text", "image", "audio")


def check_document(document: list[dict], may_be_empty: bool = False) -> None:
    """Raise ValueError, with the segment's position, for anything that is not a list of well-formed segments."""
    if not isinstance(document, (list, tuple)) or (not document and not may_be_empty):
        raise ValueError(f"a document must be a non-empty list of segments, not {document!r}")
    for position, segment in enumerate(document):
        kind = segment.get("type") if isinstance(segment, dict) else None
        if kind not in SEGMENT_TYPES:
            near = difflib.get_close_matches(str(kind), [*SEGMENT_TYPES, "speech"], n=1, cutoff=0.4)
            near = ["audio" if name == "speech" else name for name in near]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"segment {position} has type {kind!r}; valid are {', '.join(SEGMENT_TYPES)}{hint}")
        if segment.get(kind) is None:
            raise ValueError(f"segment {position} of type {kind!r} has no {kind!r} entry; it has {sorted(segment)}")
        if kind == "text" and (not isinstance(segment["text"], str) or not segment["text"].strip()):
            raise ValueError(f"segment {position} is an empty text: {segment['text']!r}; leave the segment out instead")


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
    if isinstance(audio, (list, tuple)) and audio and isinstance(audio[0], (int, float)):
        return [np.asarray(audio, dtype=np.float32)]
    if isinstance(audio, (list, tuple)):
        return [sound for part in audio for sound in flatten_audio(part)]
    return flatten(audio)
