"""Image editing: a source picture and an instruction in the prompt, and how near to the wanted picture what is drawn is.

A model that learnt nothing returns its source, which may be close to the target; so the figures say which of the two
the drawn picture is nearer to, beside how near.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from PIL import Image

from training.data.config import Segment, SourceConfig
from training.data.reading.sources import open_source
from training.data.reading.values import decode_picture, text_of
from training.evaluation.retrieval import descriptor


EDIT_KINDS = ["image", "text", "image"]


@dataclass
class Edit:
    """A picture, what is asked for, and the picture that answers it."""

    source: Image.Image
    instruction: str
    target: Image.Image


def has_edits(source: SourceConfig) -> bool:
    return any([segment.type for segment in template.parsed] == EDIT_KINDS for template in source.templates)


def find_edits(sources: Sequence[SourceConfig], limit: int) -> list[Edit]:
    """The first edits of the first source that has a template of a picture, a text and a picture, spread over its
    records: neighbours are edits of the same picture."""
    for source in sources:
        for template in source.templates:
            segments = template.parsed
            if [segment.type for segment in segments] == EDIT_KINDS:
                opened = open_source(source)
                step = max(1, (opened.num_records or 0) // max(1, limit))
                return list(islice(opened.each(partial(_edit, *segments), step), limit))
    return []


def _edit(source: Segment, text: Segment, target: Segment, record: dict) -> Edit:
    first, last = (decode_picture(record[segment.column]) for segment in (source, target))
    return Edit(first, text_of(text, record), last)


def edit_figures(edits: Sequence[Edit], drawn: Sequence[Image.Image]) -> dict[str, float | int]:
    """`edited`, their number; `nearer_to_target`, the share of drawn pictures that are nearer to their target than to
    their source (in the space of `training.evaluation.retrieval`); `distance_ratio`, the median of the distance to the
    target over that to the source, 1 for a picture between the two."""
    ratios = []
    for edit, picture in zip(edits, drawn, strict=True):
        found, wanted, given = map(descriptor, (picture, edit.target, edit.source))
        to_target, to_source = np.linalg.norm(found - wanted), np.linalg.norm(found - given)
        ratios.append(to_target / max(to_source, 1e-9))
    ratios = np.array(ratios)
    return {
        "edited": len(ratios),
        "nearer_to_target": float((ratios < 1).mean()),
        "distance_ratio": float(np.median(ratios)),
    }
