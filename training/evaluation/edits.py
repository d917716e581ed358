"""Edits of pictures: a source and an instruction to be answered, and how near the drawn picture comes to the target.

A model that has learnt nothing returns its source, which may be close to the target. So the figures tell which of the
two the drawn picture is nearer to, and how much nearer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from PIL import Image

from training.data.config import Segment, SourceConfig
from training.data.reading.records import decode_picture, text_of
from training.data.reading.sources import open_source
from training.evaluation.retrieval import descriptor
from training.recipe import EDIT_KINDS


@dataclass
class Edit:
    """A picture, an instruction, and the picture that follows from both."""

    source: Image.Image
    instruction: str
    target: Image.Image


def find_edits(sources: Sequence[SourceConfig], limit: int) -> list[Edit]:
    """Read edits of the first source that `has_edits`, spread over its records: neighbours edit the same picture."""
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
    """Measure drawn edits in the space of `training.evaluation.retrieval`.

    Returns:
        `edited`: the number of edits; `nearer_to_target`: the share of drawn pictures that are nearer to their target
        than to their source; `distance_ratio`: the median of the distance to the target over the distance to the
        source, which is 1 for a picture between the two.
    """
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
