"""Rows for evaluation in one direction: documents in a fixed order, labels on the target alone."""

import numpy as np

from .config import MODALITY_OF_TYPE, Segment
from .packing import pack
from .stream import build_row
from .tokenized import TokenizedSource


MODALITIES = tuple(MODALITY_OF_TYPE.values())


def single_direction_rows(
    source: TokenizedSource,
    direction: str,
    row_length: int,
    segments: tuple[str, ...] | None = None,
    limit: int | None = None,
    start: int = 0,
) -> list[dict[str, np.ndarray]]:
    """Pack the records of a source as documents of one direction.

    Args:
        source: a tokenised source; variant 0, the unchanged one, is used.
        direction: `text-to-image`, `image-to-text`, `text-to-speech` and so on, or one modality alone: `text`.
        row_length: tokens of a row.
        segments: which segments to take, such as `("text:name", "image:image")`, in the order of the direction; by
            default the first segment of each modality.
        limit: number of records; None: all.
        start: first record.

    Returns:
        Rows as of a `RowStream`. Labels are -100 except on the target: the codes of a picture or the units of a sound
        without the markers around them, the tokens of a text and, where it ends the document, the end of document.

    Raises:
        ValueError: a direction the source has no segments for, or a document that is longer than a row.
    """
    chosen = _choose(source, direction, segments)
    columns = [source.columns[segment] for segment in chosen]
    stop = len(source) if limit is None else min(len(source), start + limit)
    lengths = sum(column.lengths[start:stop, 0].astype(np.int64) for column in columns) + 2
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
    vocabulary = source.vocabulary
    rows = []
    for pieces in pack(lengths, row_length):
        documents, targets = [], []
        for piece in pieces:
            spans = [column.ids(start + piece.document, 0) for column in columns]
            ids = np.concatenate([[vocabulary.bos], *spans, [vocabulary.eos]])
            is_target = np.zeros(len(ids), dtype=bool)
            first = len(ids) - 1 - len(spans[-1])
            if chosen[-1].type == "text":
                is_target[first:] = True
            else:
                is_target[first:-1] = vocabulary.modality_ids(ids[first:-1]) != 0
            documents.append(ids[piece.start : piece.stop])
            targets.append(is_target[piece.start : piece.stop])
        row = build_row(documents, row_length, vocabulary)
        marked = np.concatenate(targets)
        row["labels"][: len(marked)][~marked] = -100
        rows.append(row)
    return rows


def _choose(source: TokenizedSource, direction: str, segments: tuple[str, ...] | None) -> list[Segment]:
    wanted = direction.split("-to-")
    if not 1 <= len(wanted) <= 2 or any(name not in MODALITIES for name in wanted):
        raise ValueError(
            f"direction={direction!r} is not a modality or two joined by -to-; the modalities are {MODALITIES}"
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
        chosen.append(fitting[0])
    return chosen
