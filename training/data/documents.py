"""Documents as they stand in rows: tokens, what of them is learnt, and their images."""

from dataclasses import dataclass, field

import numpy as np

from .columns import ImageColumn, TokenColumn, Vocabulary
from .config import Segment, TemplateConfig


IGNORED = -100


@dataclass(frozen=True)
class Document:
    """One document of n tokens.

    Attributes:
        ids: (n,)
        labels: (n,) ids where a token is a target, else -100.
        position_ids: (n,) from 0; a clean copy has those of the image it repeats.
        images: {"values": (C, h, w), "clean": bool, "first": bool} in order of appearance, see `compose`.
    """

    ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    images: list[dict] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> "Document":
        """Tokens `start` to `stop` as a document of its own; only documents without images are cut."""
        if (start, stop) == (0, len(self)):
            return self
        assert not self.images
        labels = self.labels[start:stop].copy()
        labels[0] = IGNORED  # nothing before it predicts it
        return Document(self.ids[start:stop], labels, np.arange(stop - start))


def arrange(template: TemplateConfig, text_first: bool, dropped: bool) -> list[Segment]:
    """The segments of a document of this template, in order.

    Args:
        text_first: whether the texts stand before the others, where `caption_first` lets that be drawn.
        dropped: leaves out the texts that stand before the first other segment; where the order is as written and only
            the last segment is learnt, all texts before the last segment.
    """
    segments = template.parsed
    if not template.has_both:
        return segments
    if template.caption_first is not None:
        texts = [segment for segment in segments if segment.type == "text"]
        others = [segment for segment in segments if segment.type != "text"]
        if not text_first:
            return others + texts
        segments = texts + others
    if not dropped:
        return segments
    if template.caption_first is None and template.targets == "last":
        return [segment for segment in segments[:-1] if segment.type != "text"] + segments[-1:]
    first_other = next(place for place, segment in enumerate(segments) if segment.type != "text")
    return segments[first_other:]


def orders(template: TemplateConfig) -> list[tuple[bool, bool, float]]:
    """(text_first, dropped, probability) of every way a template may be arranged."""
    first = 1.0 if template.caption_first is None else template.caption_first
    drop = template.caption_dropout if template.has_both else 0.0
    ways = [(True, False, first * (1 - drop)), (True, True, first * drop), (False, False, 1 - first)]
    return [way for way in ways if way[2] > 0]


def document_lengths(
    columns: dict[Segment, TokenColumn],
    vocabulary: Vocabulary,
    template: TemplateConfig,
    text_first: bool,
    dropped: bool,
    clean_copies: bool = False,
) -> np.ndarray:
    """Tokens of every document of a template in one arrangement.  (records, variants) int64"""
    segments = arrange(template, text_first, dropped)
    lengths = vocabulary.frame_length + sum(columns[segment].lengths.astype(np.int64) for segment in segments)
    if clean_copies and template.targets == "all" and vocabulary.image_token is not None:
        for segment in segments:
            if segment.type in ("image", "document"):
                inside, last = columns[segment].tokens_of_images(vocabulary)
                lengths = lengths + inside - (last if segment is segments[-1] else 0)
    return lengths


def compose(
    spans: list[np.ndarray],
    images: list[np.ndarray],
    vocabulary: Vocabulary,
    targets: str = "all",
    clean_copies: bool = False,
) -> Document:
    """A document from the ids of its segments and the images in them.

    Labels are the ids, but -100 at the first token, which nothing predicts, and where images are continuous at their
    placeholders (the diffusion loss is theirs) and at EOI (which the sampler appends); BOI is a target, or the model
    would never begin an image. With `targets` "last" only the last segment is learnt, the BOI it may begin with and
    the end of the document included; a document column counts as the text after its last picture or sound, or as that.

    An image is `clean`, context without noise and loss, where it stands before what is learnt. It is `first` where text
    follows but none precedes it, as in the pairs whose noise Transfusion limits (a document that lost its caption has
    no such image: its image is to be drawn from nothing).

    Args:
        spans: ids of each segment.
        images: (C, h, w) of each continuous image; none where images are codes.
        clean_copies: put after each learnt image that another segment follows the same image again, clean, without
            labels, and at the same positions.
    """
    ids = np.concatenate([vocabulary.beginning, *spans, [vocabulary.eos]])
    labels = ids.astype(np.int64)
    learnt = 1 if targets == "all" else max(1, len(ids) - 1 - last_length(spans, vocabulary))
    labels[:learnt] = IGNORED
    positions = np.arange(len(ids))
    if vocabulary.image_token is None or not images:
        return Document(ids, labels, positions)
    labels[(ids == vocabulary.image_token) | (ids == vocabulary.eoi)] = IGNORED
    begins, ends = np.flatnonzero(ids == vocabulary.boi), np.flatnonzero(ids == vocabulary.eoi)
    texts = np.flatnonzero(vocabulary.is_text(ids))
    first_text = texts[0] if len(texts) else -1
    entries, order, copied, start = [], [], [], 0
    for begin, end, values in zip(begins, ends, images, strict=True):
        first = bool(begin < first_text)
        entries.append({"values": values, "clean": bool(begin < learnt), "first": first})
        if clean_copies and begin >= learnt and end < len(ids) - 2:
            entries.append({"values": values, "clean": True, "first": first})
            order += [positions[start : end + 1], positions[begin : end + 1]]
            copied += [np.zeros(end + 1 - start, bool), np.ones(end + 1 - begin, bool)]
            start = end + 1
    if not copied:
        return Document(ids, labels, positions, entries)
    order = np.concatenate([*order, positions[start:]])
    labels = labels[order]
    copied = np.concatenate(copied)
    labels[: len(copied)][copied] = IGNORED
    return Document(ids[order], labels, order, entries)


def last_length(spans: list[np.ndarray], vocabulary: Vocabulary) -> int:
    """Tokens of the last segment; of a document in one span, of its last picture or sound or of the text after it."""
    last = spans[-1]
    if len(spans) > 1:
        return len(last)
    ends = np.flatnonzero(np.isin(last, [token for token in vocabulary.ends if token is not None]))
    if not len(ends):
        return len(last)
    if ends[-1] < len(last) - 1:
        return len(last) - 1 - int(ends[-1])
    begins = np.flatnonzero(np.isin(last, [token for token in vocabulary.begins if token is not None]))
    return len(last) - int(begins[-1])


def build_row(documents: list[Document], row_length: int, vocabulary: Vocabulary) -> dict:
    """One packed row: documents one after another, then padding.  Each array (row_length,) int64

    `labels` are -100 and `document_ids` -1 in the padding. Where images are continuous, `images` holds those of the
    row in order of appearance.
    """
    row = {
        "input_ids": np.full(row_length, vocabulary.pad, dtype=np.int64),
        "position_ids": np.zeros(row_length, dtype=np.int64),
        "document_ids": np.full(row_length, -1, dtype=np.int64),
        "labels": np.full(row_length, IGNORED, dtype=np.int64),
    }
    start = 0
    for number, document in enumerate(documents):
        stop = start + len(document)
        row["input_ids"][start:stop] = document.ids
        row["position_ids"][start:stop] = document.position_ids
        row["document_ids"][start:stop] = number
        row["labels"][start:stop] = document.labels
        start = stop
    row["modality_ids"] = vocabulary.modality_ids(row["input_ids"])
    if vocabulary.image_token is not None:
        row["images"] = [image for document in documents for image in document.images]
    return row


def images_of(image_columns: dict[Segment, ImageColumn], segments: list[Segment], record: int, variant: int) -> list:
    """The continuous images of a record in the order of its segments."""
    return [
        values
        for segment in segments
        if segment in image_columns
        for values in image_columns[segment].images(record, variant)
    ]
