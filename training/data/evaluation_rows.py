"""Rows for evaluation in one direction: documents in a fixed order, labels on the target alone."""

import numpy as np

from .config import MODALITY_OF_TYPE, Segment
from .documents import IGNORED, build_row, compose, images_of
from .packing import pack
from .tokenized import TokenizedSource


MODALITIES = tuple(MODALITY_OF_TYPE.values())


def single_direction_rows(
    source: TokenizedSource,
    direction: str,
    row_length: int,
    segments: tuple[str, ...] | None = None,
    limit: int | None = None,
    start: int = 0,
) -> list[dict]:
    """Pack the records of a source as documents of one direction.

    Args:
        source: a tokenised source; variant 0, the unchanged one, is used.
        direction: `text-to-image`, `image-to-text`, `text-to-speech` and so on, one modality alone: `text`, or several
            that are given: `image+text-to-image`.
        row_length: tokens of a row.
        segments: which segments to take, such as `("text:name", "image:image")`, in the order of the direction; by
            default the first segment of each modality.
        limit: number of records; None: all.
        start: first record.

    Returns:
        Rows as of a `RowStream`. Labels are -100 except on the target: the codes of a picture or the units of a sound
        without the markers around them, the tokens of a text and, where it ends the document, the end of document.
        A continuous image that is the target has no labels at all, it is diffused; one that is given is clean.

    Raises:
        ValueError: a direction the source has no segments for, or a document that is longer than a row.
    """
    chosen = _choose(source, direction, segments)
    columns = [source.columns[segment] for segment in chosen]
    stop = len(source) if limit is None else min(len(source), start + limit)
    vocabulary = source.vocabulary
    lengths = sum(column.lengths[start:stop, 0].astype(np.int64) for column in columns) + vocabulary.frame_length
    if not len(lengths):
        raise ValueError(
            f"start={start} and limit={limit} leave no record of the {len(source)} of {source.config.name!r}"
        )
    longest = int(lengths.max())
    if longest > row_length and (len(chosen) > 1 or chosen[0].type != "text"):
        raise ValueError(
            f"row_length={row_length} is shorter than a {direction} document of {longest} tokens of source "
            f"{source.config.name!r}; set row_length to {longest} or more"
        )
    rows = []
    for pieces in pack(lengths, row_length):
        documents = []
        for piece in pieces:
            record = start + piece.document
            spans = [column.ids(record, 0) for column in columns]
            images = images_of(source.image_columns, chosen, record, 0)
            document = compose(spans, images, vocabulary, targets="last")
            if chosen[-1].type != "text":
                document.labels[vocabulary.modality_ids(document.ids) == 0] = IGNORED
            documents.append(document.cut(piece.start, piece.stop))
        rows.append(build_row(documents, row_length, vocabulary))
    return rows


def _choose(source: TokenizedSource, direction: str, segments: tuple[str, ...] | None) -> list[Segment]:
    given, _, target = direction.rpartition("-to-")
    wanted = [*(given.split("+") if given else []), target]
    if any(name not in MODALITIES for name in wanted):
        raise ValueError(
            f"direction={direction!r} is not a modality or two joined by -to-, of which the first may be several joined "
            f"by +; the modalities are {MODALITIES}"
        )
    if segments is not None:
        chosen = [Segment.parse(written) for written in segments]
        kinds = [MODALITY_OF_TYPE.get(segment.type) for segment in chosen]
        if kinds != wanted or any(segment not in source.columns for segment in chosen):
            raise ValueError(
                f"segments={segments} do not make {direction!r} of source {source.config.name!r}, "
                f"which has {[str(segment) for segment in source.columns]}"
            )
        return chosen
    chosen = []
    for name in wanted:
        fitting = [segment for segment in source.columns if MODALITY_OF_TYPE.get(segment.type) == name]
        if not fitting:
            raise ValueError(
                f"direction={direction!r} needs {name}, but source {source.config.name!r} has "
                f"{[str(segment) for segment in source.columns]}; add a template with such a segment"
            )
        # The first that is not taken yet, so that an image may be made of another.
        chosen.append(next((segment for segment in fitting if segment not in chosen), fitting[0]))
    return chosen
