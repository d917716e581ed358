"""Columns of tokens and images, documents composed from them, and documents packed into rows."""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from modeling_mot.processing_vocabulary import stretches
from training.data.config import Segment, TemplateConfig


# n tokens of a document; (C, h, w) a continuous image as latents or pixels

# The label of a token that is no target.
IGNORED = -100


# --------------------------------------------------------------------------------------------------- tokens and columns


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a processor, as far as documents and rows depend on them.

    Attributes:
        modalities: names in the order of `modality_ids`, text first.
        bounds: first ids of the stretches of one modality, ascending, and the size of the vocabulary.
        begins, ends: the markers that open and close a picture or a sound.
        bos: the token that documents begin with, None for none.
        image_token: the placeholder of continuous images, which have no range of ids; None where pictures are codes.
        features_token, features_modality: the placeholder of pictures that an encoder reads, and the index of their
            modality; None where pictures have no roles, see training/data/roles.py.
        stretch_modalities: the modality of each stretch, where text goes on behind other tokens (an imported
            vocabulary); empty where each modality that has tokens has one stretch, in their order.
    """

    modalities: tuple[str, ...]
    bounds: tuple[int, ...]
    pad: int
    bos: int | None
    eos: int
    begins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    image_token: int | None = None
    stretch_modalities: tuple[int, ...] = ()
    features_token: int | None = None
    features_modality: int = 0

    @classmethod
    def of(cls, processor) -> "Vocabulary":
        """Read the vocabulary of a processor."""
        # The stretches of ids, one for each modality unless text goes on behind the others.
        ranges = processor.modality_token_ranges
        bounds = [ranges[name][0] for name in ranges] + [list(ranges.values())[-1][1]]
        stretch_names: list[str] = []
        if any(ranges[name][1] != bounds[i + 1] for i, name in enumerate(ranges)) or bounds[0] != 0:
            firsts, stretch_names = stretches(ranges)
            bounds = [*firsts, max(end for _, end in ranges.values())]
        tokenizer = processor.tokenizer
        pad, bos, eos = tokenizer.pad_token_id, processor.bos_token_id, tokenizer.eos_token_id
        # The markers of images come first: `boi` and `eoi` rely on it.
        begins, ends = (
            tuple(getattr(tokenizer, f"{name}_token_id", None) for name in names)
            for names in (("boi", "begin_of_speech"), ("eoi", "end_of_speech"))
        )
        # Continuous images have a placeholder instead of ids.
        modalities, image_token = tuple(ranges), None
        if getattr(processor, "image_processor", None) is not None:
            modalities, image_token = tuple(processor.modalities), processor.image_token_id
        places = tuple(modalities.index(name) for name in stretch_names)
        # So have pictures for an encoder.
        others = {
            name: token for name, token in getattr(processor, "placeholder_token_ids", {}).items() if name != "image"
        }
        if len(others) > 1:
            raise ValueError(
                f"the processor has encoders for {', '.join(others)}; training data are made for one alone"
            )
        (features, token), *_ = others.items() if others else [("text", None)]
        found = token, modalities.index(features)
        return cls(modalities, tuple(bounds), pad, bos, eos, begins, ends, image_token, places, *found)

    @classmethod
    def from_dict(cls, values: dict) -> "Vocabulary":
        """Build a vocabulary from `dataclasses.asdict`; lists may stand for tuples."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @property
    def beginning(self) -> np.ndarray:
        """The ids that documents begin with.  (0 or 1,) int64"""
        return np.array([token for token in (self.bos,) if token is not None], dtype=np.int64)

    @property
    def frame_length(self) -> int:
        """The number of tokens beside the segments of a document: its begin, where it has one, and its end."""
        return len(self.beginning) + 1

    @property
    def boi(self) -> int:
        return self.begins[0]

    @property
    def eoi(self) -> int:
        return self.ends[0]

    @property
    def image_modality(self) -> int:
        return self.modalities.index("image")

    @property
    def has_roles(self) -> bool:
        """True if a picture may stand in several roles, see training/data/roles.py."""
        return self.features_token is not None

    @property
    def placeholders(self) -> dict[int, int]:
        """Placeholder -> the index of its modality."""
        found = {self.image_token: self.image_modality} if self.image_token is not None else {}
        return found | ({self.features_token: self.features_modality} if self.has_roles else {})

    @property
    def token_modalities(self) -> list[int]:
        """The index of the modality of each range of `bounds`."""
        if self.stretch_modalities:
            return list(self.stretch_modalities)
        continuous = self.placeholders.values()
        return [index for index in range(len(self.modalities)) if index not in continuous]

    def modality_ids(self, input_ids: np.ndarray) -> np.ndarray:
        """Find the index of each token's modality."""
        ranges = np.searchsorted(self.bounds, input_ids, side="right") - 1
        if self.image_token is None and not self.stretch_modalities:
            return ranges
        # Placeholders may have ids behind the vocabulary.
        of_ranges = np.asarray(self.token_modalities)
        ids = of_ranges[np.minimum(ranges, len(of_ranges) - 1)]
        for token, modality in self.placeholders.items():
            ids = np.where(input_ids == token, modality, ids)
        return ids

    def is_text(self, input_ids: np.ndarray) -> np.ndarray:
        """Mark the tokens of text proper: no markers, no begin, end or padding of a document."""
        special = [token for token in (*self.begins, *self.ends, self.pad, self.bos, self.eos) if token is not None]
        text = self.modality_ids(input_ids) == 0
        for token in special:
            text &= input_ids != token
        return text


class TokenColumn:
    """The ids of one segment of every record, in `variants` versions, read from the memory-mapped file.

    Attributes:
        lengths: (records, variants) number of tokens.
    """

    def __init__(self, chunks: Iterable):
        self._starts = [0]
        self._bounds: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        lengths = []
        for chunk in chunks:
            # A list per record of a list per variant of ids.
            outer = np.asarray(chunk.offsets)
            inner = np.asarray(chunk.values.offsets)
            counts = np.diff(outer)
            self.variants = int(counts[0])
            assert (counts == self.variants).all()
            bounds = inner[outer[0] : outer[-1] + 1]
            self._bounds.append(bounds)
            self._values.append(np.asarray(chunk.values.values))
            self._starts.append(self._starts[-1] + len(counts))
            lengths.append(np.diff(bounds).reshape(-1, self.variants))
        self.lengths = np.concatenate(lengths)

    def ids(self, record: int, variant: int) -> np.ndarray:
        """Give the token ids of one version of one record.  (n,) int32"""
        chunk = bisect.bisect_right(self._starts, record) - 1
        place = (record - self._starts[chunk]) * self.variants + variant % self.variants
        bounds = self._bounds[chunk]
        return self._values[chunk][bounds[place] : bounds[place + 1]]

    def tokens_of_images(self, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
        """Count the tokens of the continuous images of each version, markers included.

        Returns:
            Two arrays (records, variants): tokens of all images, and of the image that ends the version, if one does.
        """
        inside, last = [], []
        for bounds, values in zip(self._bounds, self._values):
            begin, end = values == vocabulary.boi, values == vocabulary.eoi
            counted = np.concatenate([[0], np.cumsum(begin | end | (values == vocabulary.image_token))])
            opened = np.concatenate([[0], np.maximum.accumulate(np.where(begin, np.arange(len(values)), 0))])
            # For each version, what is counted at its end less what is counted at its start.
            starts, stops = bounds[:-1], bounds[1:]
            inside.append(counted[stops] - counted[starts])
            ends_with_image = (stops > starts) & end[np.maximum(stops - 1, 0)]
            last.append(np.where(ends_with_image, stops - opened[stops], 0))
        return tuple(np.concatenate(parts).reshape(-1, self.variants) for parts in (inside, last))


class ImageColumn:
    """The images of one segment of every record, in `variants` versions, read from the memory-mapped file.

    Args:
        values, sizes: columns of flat values, and of heights and widths by turns.
        channels: of every image.
    """

    def __init__(self, values: TokenColumn, sizes: TokenColumn, channels: int):
        self._values = values
        self._sizes = sizes
        self.channels = channels

    def images(self, record: int, variant: int) -> list[np.ndarray]:
        """Give the images of one version of one record in order.  n x (C, h, w), uint8 pixels or float16 latents"""
        values, sizes = self._values.ids(record, variant), self._sizes.ids(record, variant).reshape(-1, 2)
        images, start = [], 0
        for height, width in sizes.tolist():
            stop = start + self.channels * height * width
            images.append(values[start:stop].reshape(self.channels, height, width))
            start = stop
        return images


# ------------------------------------------------------------------------------------------------------------ documents


@dataclass(frozen=True)
class Document:
    """One document of n tokens.

    Attributes:
        ids: (n,)
        labels: (n,) ids where a token is a target, else -100.
        position_ids: (n,) from 0; a clean copy has the positions of the image that it repeats.
        images: {"values": (C, h, w), "clean": bool, "first": bool} in order of appearance, see `compose`.
        pictures: (3, H, W) uint8, for an encoder, in order of appearance, see training/data/roles.py.
    """

    ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    images: list[dict] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> "Document":
        """Cut out tokens `start` to `stop` as a document of its own. Only documents without images are cut."""
        if (start, stop) == (0, len(self)):
            return self
        assert not (self.images or self.pictures)
        labels = self.labels[start:stop].copy()
        labels[0] = IGNORED  # nothing before it predicts it
        return Document(self.ids[start:stop], labels, np.arange(stop - start))


def arrange(template: TemplateConfig, text_first: bool, dropped: bool) -> list[Segment]:
    """Put the segments of a document of a template in order.

    Args:
        text_first: the texts stand before the others, where `caption_first` lets the order be drawn.
        dropped: the texts before the first other segment are left out; where the order is as written and only the last
            segment is learnt, all texts before the last segment.
    """
    segments = template.parsed
    if template.interleaved is not None:
        return [template.interleaved]
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


class Way(NamedTuple):
    """One way in which the segments of a template may be arranged, see `arrange`."""

    text_first: bool
    dropped: bool
    share: float
    segments: list[Segment]


def ways_of(template: TemplateConfig) -> list[Way]:
    """List the ways in which a template may be arranged, each with its probability."""
    first = 1.0 if template.caption_first is None else template.caption_first
    drop = template.caption_dropout if template.has_both else 0.0
    ways = [(True, False, first * (1 - drop)), (True, True, first * drop), (False, False, 1 - first)]
    return [Way(*way, arrange(template, *way[:2])) for way in ways if way[2] > 0]


def document_lengths(
    columns: dict[Segment, TokenColumn],
    vocabulary: Vocabulary,
    segments: list[Segment],
    targets: str = "all",
    clean_copies: bool = False,
) -> np.ndarray:
    """Count the tokens of every document of some segments.  (records, variants) int64

    Args:
        targets, clean_copies: as in `compose`.
    """
    lengths = vocabulary.frame_length + sum(columns[segment].lengths.astype(np.int64) for segment in segments)
    if clean_copies and targets == "all" and vocabulary.image_token is not None:
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
    """Compose a document from the ids of its segments and the images in them.

    Labels are the ids, with three exceptions, which have -100: the first token, which nothing predicts; placeholders of
    continuous images, which have the diffusion loss; and EOI, which the sampler appends. BOI is a target, or the model
    would never begin an image. With `targets` "last" only the last segment is learnt, with the BOI that it may begin
    with and the end of the document. The last segment of a document column is the text after its last picture or sound
    or, where no text follows, that picture or sound.

    An image before the first learnt token is `clean`: context without noise and loss. An image is `first` where text
    follows it and no text precedes it; Transfusion limits the noise of such pairs (arXiv 2408.11039). A document that
    lost its caption has no `first` image, since its image is drawn from nothing.

    Args:
        spans: ids of each segment.
        images: (C, h, w) of each continuous image; none where images are codes.
        clean_copies: after each learnt image that another segment follows, repeat the image, clean, without labels, and
            at the same positions.
    """
    # Tokens and labels.
    ids = np.concatenate([vocabulary.beginning, *spans, [vocabulary.eos]])
    labels = ids.astype(np.int64)
    learnt = 1 if targets == "all" else max(1, len(ids) - 1 - last_length(spans, vocabulary))
    labels[:learnt] = IGNORED
    positions = np.arange(len(ids))
    if vocabulary.image_token is None or not images:
        return Document(ids, labels, positions)
    labels[(ids == vocabulary.image_token) | (ids == vocabulary.eoi)] = IGNORED

    # Every image and, where one is asked for, its clean copy.
    begins, ends = np.flatnonzero(ids == vocabulary.boi), np.flatnonzero(ids == vocabulary.eoi)
    texts = np.flatnonzero(vocabulary.is_text(ids))
    first_text = texts[0] if len(texts) else -1
    entries: list[dict] = []
    order: list[np.ndarray] = []  # the positions that stand in the document, one after another
    copied: list[np.ndarray] = []  # whether each of them is of a copy
    start = 0
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

    # The document with its copies, which have no labels.
    order = np.concatenate([*order, positions[start:]])
    labels = labels[order]
    copied = np.concatenate(copied)
    labels[: len(copied)][copied] = IGNORED
    return Document(ids[order], labels, order, entries)


def last_length(spans: list[np.ndarray], vocabulary: Vocabulary) -> int:
    """Count the tokens of the last segment; of a document in one span, see `compose`."""
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


def images_of(image_columns: dict[Segment, ImageColumn], segments: list[Segment], record: int, variant: int) -> list:
    """Give the continuous images of a record in the order of its segments."""
    return [
        values
        for segment in segments
        if segment in image_columns
        for values in image_columns[segment].images(record, variant)
    ]


# ----------------------------------------------------------------------------------------------------------------- rows


def build_row(documents: list[Document], row_length: int, vocabulary: Vocabulary) -> dict:
    """Build one packed row: documents one after another, then padding.  Each array (row_length,) int64

    `labels` are -100 and `document_ids` -1 in the padding. Where images are continuous, `images` holds those of the
    row in order of appearance; where pictures have roles, `pictures` holds those for the encoder.
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
    if vocabulary.has_roles:
        row["pictures"] = [picture for document in documents for picture in document.pictures]
    return row


class Piece(NamedTuple):
    """Tokens `start` to `stop` of document `document` (its index in the block)."""

    document: int
    start: int
    stop: int


def pack(lengths: np.ndarray, row_length: int) -> list[list[Piece]]:
    """Pack documents into rows by best fit: each document goes where it leaves the least room.

    Documents longer than a quarter of a row go first, the longest ahead. The others keep the order in which they were
    drawn. Sorting them does not fill rows better, and puts documents of one length, and so of one modality, together.
    A document longer than a row is text: the caller refuses others. It fills whole rows, and its last tokens open a row
    that other documents may fill. Rows are in the order of the documents that opened them.
    """
    openers: list[tuple[int, int]] = []  # (document, which of its rows)
    rows: list[list[Piece]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted

    def open_row(document: int, turn: int, start: int, stop: int) -> None:
        openers.append((document, turn))
        rows.append([Piece(document, start, stop)])
        if room := row_length - (stop - start):
            bisect.insort(rooms, (room, len(rows) - 1))

    # Documents longer than a row.
    long = [int(document) for document in np.flatnonzero(lengths > row_length)]
    for document in long:
        for turn, start in enumerate(range(0, int(lengths[document]), row_length)):
            open_row(document, turn, start, min(start + row_length, int(lengths[document])))
    # All others, the large ones first. A stable sort keeps equal lengths in the order of the documents.
    large = np.flatnonzero(4 * lengths > row_length)
    large = large[np.argsort(-lengths[large], kind="stable")]
    for document in [*large.tolist(), *np.flatnonzero(4 * lengths <= row_length).tolist()]:
        length = int(lengths[document])
        if length > row_length:
            continue
        place = bisect.bisect_left(rooms, (length, -1))
        if place == len(rooms):
            open_row(document, 0, 0, length)
            continue
        room, row = rooms.pop(place)
        rows[row].append(Piece(document, 0, length))
        if room > length:
            bisect.insort(rooms, (room - length, row))
    return [rows[row] for row in sorted(range(len(rows)), key=openers.__getitem__)]


def is_transfusion(config) -> bool:
    """True if a configuration is of a model that diffuses images."""
    return getattr(config, "latent_channels", None) is not None
