"""Run requests in rounds: each request has a row of one cache, and in each round they share their forwards.

`Rounds` takes the steps. Its sequences are `TextSequence` for models of tokens and `PictureSequence` for models that
draw; a `Studio` runs the forwards over pictures (paper, section 6.3).
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from .decoding_lean import DecodingCache, Prefix, decoder_of
from .decoding_loop import InterleavedDecoding, Request
from .decoding_pictures import Denoising, ImageForward, commit
from .serving_requests import attempt, own_error


# R sequences that draw, V vocabulary


class Rounds:
    """Requests that run, and the steps that they take together.

    An error of one request's own code ends that request. A forward that fails for all is run for each alone, and ends
    the requests for which it fails again. If nothing at all runs any more, `step` raises.

    Args:
        most: the most sequences that run at once.
        ended: called with a sequence that has left, and its error or None.

    Attributes:
        sequences: the sequences that run. A sequence's place in the list is its row of the cache.
    """

    def __init__(self, model, most: int, ended: Callable):
        self.model = model
        self.ended = ended
        self.decoder = decoder_of(model)
        self.studio = model._studio()
        self.dtype = self.decoder.cache_dtype or model.dtype
        self.cache = DecodingCache.empty(model.config, most, self.dtype, model.device)
        self.sequences: list = []

    def begin(self, request: Request) -> None:
        """Run a prompt, and give its sequence a row. An error that this raises is the request's own."""
        sequence = self.model._served(request, self.decoder)
        prefix = sequence.begin()
        self.cache.extend(len(self.sequences), prefix.keys, prefix.values, prefix.hidden)
        self.sequences.append(sequence)
        self._leave_finished()

    def step(self) -> None:
        """Take one step with each sequence: a token for all that write, then a denoising step for all that draw."""
        # Tokens, then denoising steps, for pictures of one size together.
        self._share(self._write, _go_on, [sequence for sequence in self.sequences if sequence.token is not None])
        for members in self._by_size(sequence for sequence in self.sequences if sequence.is_drawing):
            self._share(self._predict, _draw_on, members)

        # Finished pictures go into the cache, and the text behind them begins.
        done = [sequence for sequence in self.sequences if sequence.is_drawing and sequence.drawing.is_done]
        for sequence in done:
            self._try(sequence, sequence.keep)
        for members in self._by_size(x for x in done if x in self.sequences and x.is_drawing):
            self._share(self._commit, _go_on, members)
        self._leave_finished()

        # Prefixes of pictures that nobody draws any more are freed.
        if self.studio is not None:
            self.studio.forget({x.drawing.size for x in self.sequences if x.is_drawing})

    # ------------------------------------------------------------------------------------------------- shared forwards

    def _share(self, forward: Callable, go_on: Callable, sequences: list) -> None:
        """Run a forward for all of these, or for each alone if it fails; then let each go on by itself.

        Args:
            forward: sequences -> a result for each. If it fails, it leaves everything as it was.
            go_on: called with a sequence and its result.
        """
        if not sequences:
            return
        try:
            results = list(zip(sequences, forward(sequences)))
        except BaseException as error:
            results = self._alone(forward, sequences, own_error(error))
        for sequence, result in results:
            self._try(sequence, go_on, sequence, result)

    def _alone(self, forward: Callable, sequences: list, error: BaseException) -> list[tuple]:
        """Run a forward that has failed for all of these for each alone, and end those for which it fails again.

        Returns:
            the others, each with its result.
        """
        results, failed = [], []
        for sequence in sequences:
            try:
                if len(sequences) == 1:
                    raise error
                results += zip([sequence], forward([sequence]))
            except BaseException as own:
                failed.append((sequence, own_error(own)))
        # The server may have failed, and not the requests. It must know before it tells anybody.
        if not results:
            self._probe()
        for sequence, own in failed:
            self.leave(sequence, own)
        return results

    def _write(self, sequences: list) -> list:
        """Run one token of each.  -> logits (1, V) for each"""
        # A decoder steps in the first rows of the cache.
        self._to_the_front(sequences)
        first = self.sequences[: len(sequences)]
        lengths = self.cache.lengths[: len(sequences)]
        tokens = torch.tensor([sequence.token for sequence in first], device=self.model.device)
        try:
            logits = self.decoder.step(tokens, [sequence.position for sequence in first], self.cache)
        except BaseException:
            # The columns that the step began are cut off again.
            for row, length in enumerate(lengths):
                self.cache.cut(row, length)
            raise
        for sequence in first:
            sequence.position += 1
        return [logits[row : row + 1] for row in self._rows(sequences)]

    def _predict(self, sequences: list) -> list[tuple]:
        return self.studio.predictions(sequences, self.cache, self._rows(sequences))

    def _commit(self, sequences: list) -> list:
        return self.studio.commit(sequences, self.cache, self._rows(sequences)).split(1)

    def _probe(self) -> None:
        """Run a token that belongs to no request. An error that this raises is the server's."""
        cache = DecodingCache.empty(self.model.config, 1, self.dtype, self.model.device)
        self.decoder.step(torch.zeros(1, dtype=torch.long, device=self.model.device), [0], cache)

    # ---------------------------------------------------------------------------------------------------------- places

    def _by_size(self, drawing: Iterable) -> list[list]:
        """Group sequences by the size of the picture that they draw."""
        by_size = defaultdict(list)
        for sequence in drawing:
            by_size[sequence.drawing.size].append(sequence)
        return list(by_size.values())

    def _rows(self, sequences: list) -> list[int]:
        return [self.sequences.index(sequence) for sequence in sequences]

    def _to_the_front(self, sequences: list) -> None:
        """Move sequences into the first rows of the cache, in which a decoder steps."""
        rows, count = self._rows(sequences), len(sequences)
        resting = [row for row in range(count) if row not in rows]
        for row, other in zip(resting, [row for row in rows if row >= count]):
            self._swap(row, other)

    def _swap(self, row: int, other: int) -> None:
        self.cache.swap(row, other)
        self.sequences[row], self.sequences[other] = self.sequences[other], self.sequences[row]

    # --------------------------------------------------------------------------------------------------------- endings

    def _try(self, sequence, function: Callable, *args) -> None:
        """Call a request's own code, and end the request if that fails."""
        if (error := attempt(function, *args)) is not None:
            self.leave(sequence, error)

    def _leave_finished(self) -> None:
        for sequence in [x for x in self.sequences if x.token is None and not x.is_drawing]:
            self.leave(sequence)

    def leave(self, sequence, error: BaseException | str | None = None) -> None:
        """Free the row of a sequence, and tell that the sequence has ended."""
        # The last sequence takes the free row.
        row, last = self.sequences.index(sequence), len(self.sequences) - 1
        if row != last:
            self._swap(row, last)
        self.sequences.pop()
        self.cache.cut(last, 0)
        sequence.token = None
        self.ended(sequence, error)


def _go_on(sequence, logits: torch.Tensor) -> None:
    sequence.take(logits)


def _draw_on(sequence, prediction: tuple) -> None:
    sequence.drawing.advance(*prediction)


# ------------------------------------------------------------------------------------------------ pictures of requests


class PictureSequence:
    """A request that writes and draws: `TextSequence` with pictures.

    Attributes:
        token, position: the token to run next and its position; None while a picture is drawn, and at the end.
        drawing: the picture that is drawn now, or None.
    """

    def __init__(self, model, request: Request, decoder):
        self.model = model
        self.request = request
        self.decoder = decoder
        self.token: int | None = None
        self.drawing: Denoising | None = None
        self.began = time.perf_counter()

    @property
    def is_drawing(self) -> bool:
        return self.drawing is not None

    def begin(self) -> Prefix:
        """Run the prompt, and choose the first token or begin a picture.  -> the keys and values to cache"""
        self.decoding = InterleavedDecoding(self.model, self.request, self.decoder)
        (self.position,) = self.decoding.positions
        prefix = self.decoding.cache.prefix(0, self.position)
        self.decoding.cache = None  # the server keeps it
        self.take(self.decoding.logits)
        return prefix

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token from the logits (1, V) of the last one, or begin a picture behind BOI."""
        self.token = None
        self.drawing = None
        if self.decoding.last_token(0) == self.model.config.boi_token_id:
            self.drawing = self.decoding.drawing([0])
            return
        self.decoding.choose(logits.float())
        if self.decoding.running:
            self.token = self.decoding.last_token(0)

    def keep(self) -> None:
        """Append the finished picture. The sequence goes on behind it, or ends."""
        self.decoding.keep([0], self.drawing)
        if not self.decoding.running:
            self.drawing = None

    def new_tokens(self) -> list[int]:
        return list(self.decoding.new_tokens[0])

    def output(self):
        return self.decoding.output()


class Group(NamedTuple):
    """Pictures of one size that are drawn together, each from its own timestep.

    Attributes:
        guided: of each picture, whether its next step is guided.
        index: the place among the pictures of each row of the forward: R, then the contexts of those that are guided.
    """

    drawings: list[Denoising]
    guided: list[bool]
    forward: ImageForward
    index: torch.Tensor


class Studio:
    """Runs the forwards over the pictures of a server's requests.

    Prefixes are copied when a picture begins or ends, not for each step.
    """

    def __init__(self, model):
        self.model = model
        self.groups: dict[tuple[int, int], Group] = {}

    def predictions(self, sequences: list[PictureSequence], cache: DecodingCache, rows: list[int]) -> list[tuple]:
        """Predict pictures of one size by one forward, which changes nothing.

        Args:
            rows: the sequences' rows of the cache.

        Returns:
            list: the arguments of `Denoising.advance` for each sequence.
        """
        # The pictures that are drawn together are usually those of the last round.
        size = sequences[0].drawing.size
        drawings = [sequence.drawing for sequence in sequences]
        group = self.groups.get(size)
        guided = [drawing.is_guided for drawing in drawings]
        if group is None or group.drawings != drawings or group.guided != guided:
            group = self.groups[size] = self._group(sequences, cache, rows, guided)

        # The predictions behind other contexts stand behind the others, for guided pictures alone.
        noisy = [drawing.noisy() for drawing in drawings]
        timesteps = torch.stack([drawing.timestep.float() for drawing in drawings])
        predicted = group.forward.predict(torch.cat(noisy), timesteps, group.index).split(1)
        contexts = iter(predicted[len(noisy) :])
        return [
            (own, whole, *(next(contexts) for _ in drawing.contexts if drawing.is_guided))
            for drawing, own, whole in zip(drawings, noisy, predicted)
        ]

    def _group(
        self, sequences: list[PictureSequence], cache: DecodingCache, rows: list[int], guided: list[bool]
    ) -> Group:
        """Copy the prefixes of sequences, and of the contexts of their guidance, for a forward over their pictures."""
        prefixes, places = self._prefixes(sequences, cache, rows), [*range(len(sequences))]
        for place, sequence in enumerate(sequences):
            if guided[place]:
                contexts = sequence.decoding.context_prefixes([0])
                prefixes += contexts
                places += [place] * len(contexts)
        return Group(
            drawings=[sequence.drawing for sequence in sequences],
            guided=guided,
            forward=ImageForward(self.model, prefixes, sequences[0].drawing.size),
            index=torch.tensor(places, device=self.model.device),
        )

    def _prefixes(self, sequences: list[PictureSequence], cache: DecodingCache, rows: list[int]) -> list[Prefix]:
        drop = int(self.model.config.markers_in_image_block)
        return [cache.prefix(row, sequence.position, drop) for sequence, row in zip(sequences, rows)]

    def commit(self, sequences: list[PictureSequence], cache: DecodingCache, rows: list[int]) -> torch.Tensor:
        """Put finished pictures of one size into the cache by one forward. A failure changes nothing.

        -> the next logits (R, V)
        """
        latents = torch.cat([sequence.drawing.latents for sequence in sequences])
        prefixes = self._prefixes(sequences, cache, rows)
        logits, positions = commit(self.model, cache, rows, prefixes, latents, sequences[0].drawing.size)
        for sequence, position in zip(sequences, positions):
            sequence.position = position
        return logits

    def forget(self, sizes: set) -> None:
        """Free the prefixes of pictures of other sizes than these."""
        self.groups = {size: group for size, group in self.groups.items() if size in sizes}
