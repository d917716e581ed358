"""The requests that run: each has a row of one cache, and in each round all of them share their forwards."""

# V vocabulary

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

from .decoding_cache_mot import DecodingCache
from .lean_decoding_mot import decoder_of
from .serving_requests_mot import Request, attempt, own_error


class Rounds:
    """Requests that run, and the steps that they take together.

    What one request's own code raises ends that request. A forward that fails for all is run for each alone, and ends
    those for which it fails again. Where nothing runs any more, `step` raises.

    Args:
        most: how many there may be.
        ended: called with a sequence that has left, and its error or None.

    Attributes:
        sequences: each in the row of the cache that is its place here.
    """

    def __init__(self, model, most: int, ended: Callable):
        self.model, self.ended = model, ended
        self.decoder, self.studio = decoder_of(model), model._studio()
        self.dtype = self.decoder.cache_dtype or model.dtype
        self.cache = DecodingCache.empty(model.config, most, self.dtype, model.device)
        self.sequences: list = []

    def begin(self, request: Request) -> None:
        """Run a prompt; what it raises is the request's own."""
        sequence = self.model._served(request, self.decoder)
        prefix = sequence.begin()
        self.cache.extend(len(self.sequences), prefix.keys, prefix.values)
        self.sequences.append(sequence)
        self._leave_finished()

    def step(self) -> None:
        """A token for all that write, then a denoising step for all that draw."""
        self._share(self._write, _go_on, [sequence for sequence in self.sequences if sequence.token is not None])
        for members in self._by_size(sequence for sequence in self.sequences if sequence.is_drawing):
            self._share(self._predict, _draw_on, members)
        done = [sequence for sequence in self.sequences if sequence.is_drawing and sequence.drawing.is_done]
        for sequence in done:
            self._try(sequence, sequence.keep)
        for members in self._by_size(x for x in done if x in self.sequences and x.is_drawing):
            self._share(self._commit, _go_on, members)
        self._leave_finished()
        if self.studio is not None:
            self.studio.forget({x.drawing.size for x in self.sequences if x.is_drawing})

    # ---------------------------------------------------------------------------------------------- shared forwards

    def _share(self, forward: Callable, go_on: Callable, sequences: list) -> None:
        """Run a forward for all of these, or for each alone where it fails; then let each go on by itself.

        Args:
            forward: sequences -> a result for each. Where it fails it leaves everything as it was.
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
        """After a forward has failed for all of these: the results of those for which it does not fail by itself."""
        results, failed = [], []
        for sequence in sequences:
            try:
                if len(sequences) == 1:
                    raise error
                results += zip([sequence], forward([sequence]))
            except BaseException as own:
                failed.append((sequence, own_error(own)))
        if not results:  # before anybody is told, since a server that has failed lets nothing in
            self._probe()
        for sequence, own in failed:
            self.leave(sequence, own)
        return results

    def _write(self, sequences: list) -> list:
        """One token for each.  -> logits (1, V) for each"""
        self._to_the_front(sequences)
        first = self.sequences[: len(sequences)]
        lengths = self.cache.lengths[: len(sequences)]
        tokens = torch.tensor([sequence.token for sequence in first], device=self.model.device)
        try:
            logits = self.decoder.step(tokens, [sequence.position for sequence in first], self.cache)
        except BaseException:
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
        """One token that no request has anything to do with: whether the requests fail, or whatever is run."""
        cache = DecodingCache.empty(self.model.config, 1, self.dtype, self.model.device)
        self.decoder.step(torch.zeros(1, dtype=torch.long, device=self.model.device), [0], cache)

    # -------------------------------------------------------------------------------------------------------- places

    def _by_size(self, drawing: Iterable) -> list[list]:
        by_size = defaultdict(list)
        for sequence in drawing:
            by_size[sequence.drawing.size].append(sequence)
        return list(by_size.values())

    def _rows(self, sequences: list) -> list[int]:
        return [self.sequences.index(sequence) for sequence in sequences]

    def _to_the_front(self, sequences: list) -> None:
        """Into the first rows of the cache, in which a decoder steps."""
        rows, count = self._rows(sequences), len(sequences)
        resting = [row for row in range(count) if row not in rows]
        for row, other in zip(resting, [row for row in rows if row >= count]):
            self._swap(row, other)

    def _swap(self, row: int, other: int) -> None:
        self.cache.swap(row, other)
        self.sequences[row], self.sequences[other] = self.sequences[other], self.sequences[row]

    # ------------------------------------------------------------------------------------------------------- endings

    def _try(self, sequence, function: Callable, *args) -> None:
        """Call what is a request's own, and end the request where that fails."""
        if (error := attempt(function, *args)) is not None:
            self.leave(sequence, error)

    def _leave_finished(self) -> None:
        for sequence in [x for x in self.sequences if x.token is None and not x.is_drawing]:
            self.leave(sequence)

    def leave(self, sequence, error: BaseException | str | None = None) -> None:
        """Free the row of a sequence, and tell that it has ended."""
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
