"""Requests that write and draw, and the denoising steps that they share."""

# R sequences that draw, V vocabulary

import time
from typing import NamedTuple

import torch

from .decoding_cache_mot import DecodingCache, Prefix
from .denoising_mot import Denoising, ImageForward, commit
from .interleaved_decoding_mot import InterleavedDecoding
from .serving_requests_mot import Request


class PictureSequence:
    """A request that writes and draws: `TextSequence` with pictures.

    Attributes:
        drawing: the picture that is drawn now.
    """

    def __init__(self, model, request: Request, decoder):
        self.model, self.request, self.decoder = model, request, decoder
        self.token, self.drawing, self.began = None, None, time.perf_counter()

    @property
    def is_drawing(self) -> bool:
        return self.drawing is not None

    def begin(self) -> Prefix:
        request = self.request
        self.decoding = InterleavedDecoding(
            self.model,
            request.input_ids,
            request.model_kwargs,
            request.generation_config,
            request.logits_processor,
            request.stopping_criteria,
            request.streamer,
            self.decoder,
        )
        (self.position,) = self.decoding.positions
        prefix = self.decoding.cache.prefix(0, self.position)
        self.decoding.cache = None  # the server keeps it
        self.take(self.decoding.logits)
        return prefix

    def take(self, logits: torch.Tensor) -> None:
        self.token, self.drawing, self.decoding.logits = None, None, logits.float()
        if self.decoding.last_token(0) == self.model.config.boi_token_id:
            self.drawing = Denoising(self.model, self.decoding.settings, self.decoding.generators, [0])
            return
        (token,) = self.decoding.choose()
        self.token = token if self.decoding.running else None

    def keep(self) -> None:
        """The picture that is done; behind it the sequence goes on, or does not and draws no more."""
        self.decoding.keep([0], self.drawing)
        if not self.decoding.running:
            self.drawing = None

    def new_tokens(self) -> list[int]:
        return list(self.decoding.new_tokens[0])

    def output(self):
        return self.decoding.output()


class Group(NamedTuple):
    """Pictures of one size that are drawn together, each from its own timestep."""

    drawings: list[Denoising]
    forward: ImageForward
    index: torch.Tensor


class Studio:
    """Where the pictures of a server's requests are drawn.

    Prefixes are copied when who draws changes, not for each step.
    """

    def __init__(self, model):
        self.model, self.groups = model, {}

    def predictions(self, sequences: list[PictureSequence], cache: DecodingCache, rows: list[int]) -> list[tuple]:
        """What the model says of pictures of one size, by one forward; nothing is changed by it.

        Args:
            rows: of the sequences in the cache.

        Returns:
            list: arguments of `Denoising.advance` for each sequence.
        """
        size, drawings = sequences[0].drawing.size, [sequence.drawing for sequence in sequences]
        group = self.groups.get(size)
        if group is None or group.drawings != drawings:
            group = self.groups[size] = self._group(sequences, cache, rows)
        noisy = [drawing.noisy() for drawing in drawings]
        timesteps = torch.stack([drawing.timestep.float() for drawing in drawings])
        predicted = group.forward.predict(torch.cat(noisy), timesteps, group.index).split(1)
        free = iter(predicted[len(noisy) :])
        without = [next(free) if drawing.is_guided else None for drawing in drawings]
        return list(zip(noisy, predicted, without))

    def _group(self, sequences: list[PictureSequence], cache: DecodingCache, rows: list[int]) -> Group:
        free = [sequence.decoding.unconditional_prefixes([0]) for sequence in sequences]
        index = [*range(len(sequences)), *(place for place, own in enumerate(free) if own)]
        behind = [*self._prefixes(sequences, cache, rows), *(prefix for own in free for prefix in own)]
        forward = ImageForward(self.model, behind, sequences[0].drawing.size)
        return Group([x.drawing for x in sequences], forward, torch.tensor(index, device=self.model.device))

    def _prefixes(self, sequences: list[PictureSequence], cache: DecodingCache, rows: list[int]) -> list[Prefix]:
        drop = int(self.model.config.markers_in_image_block)
        return [cache.prefix(row, sequence.position, drop) for sequence, row in zip(sequences, rows)]

    def commit(self, sequences: list[PictureSequence], cache: DecodingCache, rows: list[int]) -> torch.Tensor:
        """Pictures of one size that are done into the cache, by one forward; a failure changes nothing.

        -> the next logits (R, V)
        """
        latents = torch.cat([sequence.drawing.latents for sequence in sequences])
        prefixes = self._prefixes(sequences, cache, rows)
        logits, positions = commit(self.model, cache, rows, prefixes, latents)
        for sequence, position in zip(sequences, positions):
            sequence.position = position
        return logits

    def forget(self, sizes: set) -> None:
        """Free what was kept for other sizes than these."""
        self.groups = {size: group for size, group in self.groups.items() if size in sizes}
