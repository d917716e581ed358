"""What a prepared source holds: its vocabulary, and columns of ids and of images in the memory-mapped file."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from modeling_mot.processing_vocabulary import stretches


@dataclass(frozen=True)
class Vocabulary:
    """What packing needs to know of the processor.

    Attributes:
        modalities: names in the order of `modality_ids`, text first.
        bounds: first ids of the stretches of one modality, ascending, and the size of the vocabulary.
        begins, ends: the markers that open and close a picture or a sound.
        bos: what documents begin with; None where that is nothing.
        image_token: the placeholder of images that stay continuous, which then have no range; None where pictures are
            codes.
        stretch_modalities: that of each stretch, where text goes on behind other tokens (an imported vocabulary); else
            there is one for each modality that has tokens, in their order.
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

    @classmethod
    def of(cls, processor) -> "Vocabulary":
        ranges = processor.modality_token_ranges
        bounds = [ranges[name][0] for name in ranges] + [list(ranges.values())[-1][1]]
        stretch_names: list[str] = []
        if any(ranges[name][1] != bounds[i + 1] for i, name in enumerate(ranges)) or bounds[0] != 0:
            firsts, stretch_names = stretches(ranges)
            bounds = [*firsts, max(end for _, end in ranges.values())]
        tokenizer = processor.tokenizer
        pad, bos, eos = tokenizer.pad_token_id, processor.bos_token_id, tokenizer.eos_token_id
        # Those of images first: `boi` and `eoi` rely on it.
        begins, ends = (
            tuple(getattr(tokenizer, f"{name}_token_id", None) for name in names)
            for names in (("boi", "begin_of_speech"), ("eoi", "end_of_speech"))
        )
        modalities, image_token = tuple(ranges), None
        if getattr(processor, "image_processor", None) is not None:
            modalities, image_token = tuple(processor.modalities), processor.image_token_id
        places = tuple(modalities.index(name) for name in stretch_names)
        return cls(modalities, tuple(bounds), pad, bos, eos, begins, ends, image_token, places)

    @classmethod
    def from_dict(cls, values: dict) -> "Vocabulary":
        """From `dataclasses.asdict`, lists for tuples allowed."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @property
    def beginning(self) -> np.ndarray:
        """The ids that documents begin with.  (0 or 1,) int64"""
        return np.array([token for token in (self.bos,) if token is not None], dtype=np.int64)

    @property
    def frame_length(self) -> int:
        """Tokens of a document beside its segments: its begin, where it has one, and its end."""
        return len(self.beginning) + 1

    @property
    def boi(self) -> int:
        return self.begins[0]

    @property
    def eoi(self) -> int:
        return self.ends[0]

    @property
    def token_modalities(self) -> list[int]:
        """For each range of `bounds` the index of its modality."""
        if self.stretch_modalities:
            return list(self.stretch_modalities)
        continuous = [] if self.image_token is None else [self.modalities.index("image")]
        return [index for index in range(len(self.modalities)) if index not in continuous]

    def modality_ids(self, input_ids: np.ndarray) -> np.ndarray:
        """The index of each token's modality."""
        ranges = np.searchsorted(self.bounds, input_ids, side="right") - 1
        if self.image_token is None and not self.stretch_modalities:
            return ranges
        ids = np.asarray(self.token_modalities)[ranges]
        if self.image_token is None:
            return ids
        return np.where(input_ids == self.image_token, self.modalities.index("image"), ids)

    def is_text(self, input_ids: np.ndarray) -> np.ndarray:
        """Where there is text proper, not a marker or the begin, end or padding of a document."""
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
        self._starts, self._bounds, self._values, lengths = [0], [], [], []
        for chunk in chunks:
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
        """Token ids of one version of one record.  (n,) int32"""
        chunk = bisect_right(self._starts, record) - 1
        place = (record - self._starts[chunk]) * self.variants + variant % self.variants
        bounds = self._bounds[chunk]
        return self._values[chunk][bounds[place] : bounds[place + 1]]

    def tokens_of_images(self, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, markers included, of all images of each version, and of the one it ends with, if it ends with one.

        Returns:
            Two arrays (records, variants).
        """
        inside, last = [], []
        for bounds, values in zip(self._bounds, self._values):
            begin, end = values == vocabulary.boi, values == vocabulary.eoi
            counted = np.concatenate([[0], np.cumsum(begin | end | (values == vocabulary.image_token))])
            opened = np.concatenate([[0], np.maximum.accumulate(np.where(begin, np.arange(len(values)), 0))])
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
        self._values, self._sizes, self.channels = values, sizes, channels

    def images(self, record: int, variant: int) -> list[np.ndarray]:
        """Images of one version of one record in order.  n x (C, h, w), uint8 pixels or float16 latents"""
        values, sizes = self._values.ids(record, variant), self._sizes.ids(record, variant).reshape(-1, 2)
        images, start = [], 0
        for height, width in sizes.tolist():
            stop = start + self.channels * height * width
            images.append(values[start:stop].reshape(self.channels, height, width))
            start = stop
        return images
