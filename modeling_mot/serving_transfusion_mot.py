"""Requests that write and draw, and the denoising steps that they share."""

# R sequences that draw, V vocabulary

import time
from collections import defaultdict
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

    def keep(self) -> bool:
        """The picture that is done.  -> whether the sequence goes on behind it"""
        self.decoding.keep([0], self.drawing)
        return bool(self.decoding.running)

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

    def step(self, sequences: list[PictureSequence], cache: DecodingCache, rows: list[int]) -> dict:
        """One denoising step for each, and for pictures that are done by it their way into the cache.

        Args:
            rows: of the sequences in the cache.

        Returns:
            dict: sequence -> the error of something of its own, such as a callback.
        """
        row_of, by_size, errors = dict(zip(sequences, rows)), defaultdict(list), {}
        for sequence in sequences:
            by_size[sequence.drawing.size].append(sequence)
        self.groups = {size: self.groups.get(size) for size in by_size}
        drop = int(self.model.config.markers_in_image_block)
        for size, members in by_size.items():
            prefixes = {x: cache.prefix(row_of[x], x.position, drop) for x in members}
            if self.groups[size] is None or self.groups[size].drawings != [x.drawing for x in members]:
                self.groups[size] = self._group(members, prefixes)
            self._denoise(members, self.groups[size], errors)
            self._finish([x for x in members if x not in errors and x.drawing.is_done], prefixes, cache, row_of, errors)
        return errors

    def _group(self, sequences: list[PictureSequence], prefixes: dict) -> Group:
        free = [sequence.decoding.unconditional_prefixes([0]) for sequence in sequences]
        index = [*range(len(sequences)), *(place for place, own in enumerate(free) if own)]
        behind = [*prefixes.values(), *(prefix for own in free for prefix in own)]
        forward = ImageForward(self.model, behind, sequences[0].drawing.size)
        return Group([x.drawing for x in sequences], forward, torch.tensor(index, device=self.model.device))

    def _denoise(self, sequences: list[PictureSequence], group: Group, errors: dict) -> None:
        noisy = [drawing.noisy() for drawing in group.drawings]
        timesteps = torch.stack([drawing.timestep.float() for drawing in group.drawings])
        predicted = group.forward.predict(torch.cat(noisy), timesteps, group.index).split(1)
        free = iter(predicted[len(noisy) :])
        for sequence, seen, prediction in zip(sequences, noisy, predicted):
            without = next(free) if sequence.drawing.is_guided else None
            try:
                sequence.drawing.advance(seen, prediction, without)
            except Exception as error:
                errors[sequence] = error

    def _finish(self, sequences: list, prefixes: dict, cache: DecodingCache, row_of: dict, errors: dict) -> None:
        going_on = []
        for sequence in sequences:
            try:
                if sequence.keep():
                    going_on.append(sequence)
                else:
                    sequence.drawing = None
            except Exception as error:
                errors[sequence] = error
        if not going_on:
            return
        latents = torch.cat([sequence.drawing.latents for sequence in going_on])
        behind, rows = ([of[sequence] for sequence in going_on] for of in (prefixes, row_of))
        logits, positions = commit(self.model, cache, rows, behind, latents)
        for place, sequence in enumerate(going_on):
            sequence.position = positions[place]
            try:
                sequence.take(logits[place : place + 1])
            except Exception as error:
                errors[sequence] = error
