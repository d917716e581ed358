"""Serving: requests of text, images and speech come and go, and share their forwards (paper, section 6.3).

In each round all that write get one token from one forward, all that draw get one denoising step from another, whatever
their lengths, timesteps, guidance and settings. What a request becomes depends on its own prompt, settings and generator.
"""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from .decoding_cache_mot import DecodingCache
from .lean_decoding_mot import decoder_of
from .serving_requests_mot import Request, prepared


CANCELLED = "cancelled"


@dataclass
class MoTRequestOutput(GenerationOutput):
    """What became of a request, as transformers tells it.

    Attributes:
        output: what `generate()` returns of it, for a batch of one, without the cache; also of a request that was
            cancelled or failed on its way, as far as it came. None where nothing was begun.
    """

    output: Any = None


class MoTServer:
    """Serves requests, each as `generate()` would alone; named as transformers' `ContinuousBatchingManager` is.

    `serve()` runs a list of requests. Or they come while others run: within `with server:` a thread runs them, and
    `add_request`, `cancel_request` and `get_result` may be called from any thread.

    Args:
        model: a `MoTForCausalLM` or `MoTTransfusionModel`.
        max_requests_per_batch: how many are run at once; the others wait.
        max_batch_tokens: how many tokens those that run may come to together, prompts included; default: no bound.
        max_queue_size: how many may wait; `add_request` then waits for room. 0 is no bound.
        arguments: of `generate()`, for all requests.
    """

    def __init__(
        self,
        model,
        max_requests_per_batch: int = 16,
        max_batch_tokens: int | None = None,
        max_queue_size: int = 0,
        **arguments,
    ):
        for name, value in (("max_requests_per_batch", max_requests_per_batch), ("max_batch_tokens", max_batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model, self.max_requests, self.max_tokens = model, max_requests_per_batch, max_batch_tokens
        self.arguments = {name: value for name, value in arguments.items() if value is not None}
        self.decoder, self.studio = decoder_of(model), model._studio()
        dtype = self.decoder.cache_dtype or model.dtype
        self.cache = DecodingCache.empty(model.config, max_requests_per_batch, dtype, model.device)
        self.running: list = []  # sequences, each in the row of the cache that is its place here
        self.waiting: deque[Request] = deque()
        self.max_queue_size, self.stopping = max_queue_size or float("inf"), False
        self.names = (f"req_{number}" for number in itertools.count())
        self.known: set[str] = set()  # names of requests whose results were not taken yet
        self.cancelled: set[str] = set()
        self.results: dict[str, MoTRequestOutput] = {}
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None

    # ----------------------------------------------------------------------------------------------- what users call

    def add_request(self, inputs, request_id: str | None = None, timeout: float | None = None, **arguments) -> str:
        """Put a request in the queue.

        Args:
            inputs: (L,) tokens, or a dictionary of arguments of `generate()`.
            request_id: a name for it; default: "req_0", "req_1", ...
            timeout: seconds to wait for room in the queue; default: as long as it takes.
            arguments: of `generate()`, for this request.

        Returns:
            Its name. A request that cannot be served has a result at once, with an `error`.

        Raises:
            ValueError: a name that is taken.
            queue.Full: no room in time.
            RuntimeError: the server has failed.
        """
        self._check_failure()
        with self.changed:
            if request_id is None:
                request_id = next(name for name in self.names if name not in self.known)
            if request_id in self.known:
                raise ValueError(f"request_id={request_id!r} is taken; choose another, or leave it out")
            self.known.add(request_id)
        given = dict(inputs) if isinstance(inputs, dict) else {"input_ids": inputs}
        try:
            request = prepared(self.model, request_id, self.arguments | given | arguments)
            self._check_room(request)
        except Exception as error:
            self._deliver(MoTRequestOutput(request_id, error=_said(error), status=RequestStatus.FAILED))
            return request_id
        with self.changed:
            if not self.changed.wait_for(lambda: self._queue_has_room() or self.failure, timeout):
                self.known.discard(request_id)
                raise queue.Full(f"{len(self.waiting)} requests wait already, as many as max_queue_size lets in")
            self._check_failure()
            self.waiting.append(request)
            self.changed.notify_all()
        return request_id

    def cancel_request(self, request_id: str) -> None:
        """End a request before its next step; its result holds what it has until then."""
        with self.changed:
            if request_id in self.known and request_id not in self.results:
                self.cancelled.add(request_id)
                self.changed.notify_all()

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> MoTRequestOutput | None:
        """Take the result of one request, or of whichever is done first; None when there is none in time."""

        def is_there():
            return bool(self.results) if request_id is None else request_id in self.results

        with self.changed:
            if not self.changed.wait_for(lambda: is_there() or self.failure is not None, timeout) or not is_there():
                return None
            request_id = next(iter(self.results)) if request_id is None else request_id
            self.known.discard(request_id)
            return self.results.pop(request_id)

    def serve(self, requests: Iterable, progress_bar: bool = False) -> dict[str, MoTRequestOutput]:
        """Run requests until all are done.  -> name: result, in their order"""
        results, names, pending, more = {}, [], iter(requests), True
        with logging.tqdm(total=None, disable=not progress_bar, desc="requests") as bar:
            while more or self._has_work() or self.results:
                while more and self._queue_has_room():
                    try:
                        names.append(self.add_request(next(pending)))
                    except StopIteration:
                        more = False
                self.step()
                while self.results:
                    result = self.get_result()
                    results[result.request_id] = result
                    bar.update()
        return {name: results[name] for name in names}

    def start(self) -> None:
        """Run requests in a thread, as they come."""
        self.thread = threading.Thread(target=self._run, name="MoTServer", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Finish what came, then end the thread."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        if self.thread is not None:
            self.thread.join()

    def __enter__(self) -> "MoTServer":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def __iter__(self) -> Iterator[MoTRequestOutput]:
        """Results as they come, until there is nothing left to wait for."""
        while self._has_work() or self.results:
            if (result := self.get_result(timeout=0.1)) is not None:
                yield result

    # ------------------------------------------------------------------------------------------------------ rounds

    @torch.no_grad()
    def step(self) -> bool:
        """One round: who was cancelled leaves, who waits comes in, all get a token or a denoising step.

        Returns:
            Whether requests run or wait.
        """
        self._cancel()
        self._admit()
        self._write()
        drawing = [sequence for sequence in self.running if sequence.is_drawing]
        if drawing:
            errors = self.studio.step(drawing, self.cache, [self.running.index(sequence) for sequence in drawing])
            for sequence, error in errors.items():
                self._retire(sequence, error)
            self._retire_finished()
        return self._has_work()

    def _run(self) -> None:
        try:
            while True:
                if not self.step():
                    with self.changed:
                        if self.stopping and not self._has_work():
                            return
                        self.changed.wait_for(lambda: self.stopping or self._has_work())
        except Exception as error:  # of a forward that all share
            with self.changed:
                self.failure = error
            for sequence in list(self.running):
                self._retire(sequence, error)
            while self.waiting:
                self._refuse(self.waiting.popleft(), error)
            with self.changed:
                self.changed.notify_all()

    def _has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def _queue_has_room(self) -> bool:
        return len(self.waiting) < self.max_queue_size

    def _check_failure(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"the server has failed: {self.failure}; make a new one") from self.failure

    def _check_room(self, request: Request) -> None:
        length = request.generation_config.max_length
        if self.max_tokens is not None and length > self.max_tokens:
            raise ValueError(
                f"a request may come to {length} tokens, more than max_batch_tokens={self.max_tokens}: lower its "
                "max_new_tokens, or raise max_batch_tokens"
            )

    def _has_room(self, request: Request) -> bool:
        if len(self.running) == self.max_requests:
            return False
        lengths = [sequence.request.generation_config.max_length for sequence in self.running]
        return self.max_tokens is None or sum(lengths) + request.generation_config.max_length <= self.max_tokens

    def _admit(self) -> None:
        while self.waiting and self._has_room(self.waiting[0]):
            with self.changed:
                request = self.waiting.popleft()
                self.changed.notify_all()
            try:
                sequence = self.model._served(request, self.decoder)
                prefix = sequence.begin()
            except Exception as error:
                self._refuse(request, error)
                continue
            row = len(self.running)
            self.running.append(sequence)
            self.cache.cut(row, 0)
            self.cache.extend(row, prefix.keys, prefix.values)
            self._retire_finished()

    def _write(self) -> None:
        """One token for all that write: they stand in the first rows of the cache."""
        writing = [row for row, sequence in enumerate(self.running) if sequence.token is not None]
        count = len(writing)
        if not count:
            return
        resting = [row for row in range(count) if row not in writing]
        for row, other in zip(resting, [row for row in writing if row >= count]):
            self._swap(row, other)
        sequences = self.running[:count]
        tokens = torch.tensor([sequence.token for sequence in sequences], device=self.model.device)
        logits = self.decoder.step(tokens, [sequence.position for sequence in sequences], self.cache)
        for row, sequence in enumerate(sequences):
            sequence.position += 1
            try:
                sequence.take(logits[row : row + 1])
            except Exception as error:  # of a processor, criterion or streamer of its own
                self._retire(sequence, error)
        self._retire_finished()

    def _swap(self, row: int, other: int) -> None:
        self.cache.swap(row, other)
        self.running[row], self.running[other] = self.running[other], self.running[row]

    # ----------------------------------------------------------------------------------------------------- endings

    def _cancel(self) -> None:
        with self.changed:
            names, self.cancelled = self.cancelled, set()
            waiting = [request for request in self.waiting if request.request_id in names]
            for request in waiting:
                self.waiting.remove(request)
        for request in waiting:
            self._refuse(request, CANCELLED)
        for sequence in [sequence for sequence in self.running if sequence.request.request_id in names]:
            self._retire(sequence, CANCELLED)

    def _retire_finished(self) -> None:
        for sequence in [x for x in self.running if x.token is None and not x.is_drawing]:
            self._retire(sequence)

    def _retire(self, sequence, error: Exception | str | None = None) -> None:
        row, last = self.running.index(sequence), len(self.running) - 1
        if row != last:
            self._swap(row, last)
        self.running.pop()
        sequence.token = None
        request, failed = sequence.request, error is not None
        if request.streamer is not None:
            request.streamer.end()
        self._deliver(
            MoTRequestOutput(
                request.request_id,
                prompt_ids=request.input_ids[0].tolist(),
                generated_tokens=sequence.new_tokens(),
                error=_said(error) if failed else None,
                status=RequestStatus.FAILED if failed else RequestStatus.FINISHED,
                created_time=request.created_time,
                lifespan=(sequence.began, time.perf_counter()),
                output=sequence.output(),
            )
        )

    def _refuse(self, request: Request, error: Exception | str) -> None:
        self._deliver(
            MoTRequestOutput(
                request.request_id,
                prompt_ids=request.input_ids[0].tolist(),
                error=_said(error),
                status=RequestStatus.FAILED,
                created_time=request.created_time,
            )
        )

    def _deliver(self, result: MoTRequestOutput) -> None:
        with self.changed:
            self.results[result.request_id] = result
            self.changed.notify_all()


def _said(error: Exception | str) -> str:
    return error if isinstance(error, str) else f"{type(error).__name__}: {error}"
