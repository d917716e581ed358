"""Serve requests of text, images and speech that come and go, and share their forwards (paper, section 6.3).

A round runs one forward for all requests that write: each gets a token. It runs one forward for each picture size: each
request that draws that size gets a denoising step. Lengths, timesteps, guidance and settings may differ within a
forward. The result of a request depends on its own prompt, settings and generator alone.

`MoTServer` is the front: its queue, its thread, its errors. `serving_requests` prepares requests and holds their
results, `serving_rounds` runs them.
"""

import atexit
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from transformers.utils import logging

from .checks_fields import Maybe, Typed, Whole, check_fields, is_real
from .serving_requests import Desk, MoTRequestOutput, Request, Terms, attempt, end_stream, own_error, prepared, said
from .serving_rounds import Rounds


logger = logging.get_logger(__name__)

CANCELLED = "cancelled"
NOBODY = "nobody runs the server, so no result will come: start() it, or step() until it is there"
GRACE = 10.0  # seconds for a round to end when the interpreter does
SERVER_RULES = {
    "max_requests_per_batch": Whole(1, 2**16),
    "max_batch_tokens": Maybe(Whole()),
    "max_queue_size": Whole(0),
    "allow_urls": Typed(bool),
    "allow_paths": Typed(bool),
}


class MoTServer:
    """Serves requests together; each gets what `generate()` would have given it alone.

    `serve()` runs a list of requests. Or requests come while others run: within `with server:` a thread runs them, and
    `add_request`, `cancel_request` and `get_result` may be called from any thread. A request that holds something
    wrong, or whose own code (callback, streamer, logits processor, stopping criterion) raises an error, ends alone. If
    a request's code never returns, it holds up all. The methods have the names of transformers'
    `ContinuousBatchingManager`.

    Args:
        model: a `MoTForCausalLM` or `MoTTransfusionModel`.
        max_requests_per_batch: the most requests that run at once; the others wait.
        max_batch_tokens: the most tokens of all requests that run together, prompts included. Default: each request may
            come to the model's `max_position_embeddings`.
        max_queue_size: the most requests that wait; `add_request` then waits for room. 0 is no bound.
        allow_urls, allow_paths: True if the `documents` of requests may name addresses and files to be opened.
        arguments: of `generate()`, for all requests.

    Raises:
        ValueError: a limit that is not a whole number, or lets nothing in.

    Example:

        >>> from modeling_mot import MoTConfig, MoTForCausalLM
        >>> ranges = {"text": [0, 24], "image": [24, 32]}
        >>> config = MoTConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                    num_attention_heads=2, modality_token_ranges=ranges)
        >>> model = MoTForCausalLM(config).eval()
        >>> with MoTServer(model, do_sample=False) as server:
        ...     name = server.add_request([1, 9, 12], max_new_tokens=4)
        ...     result = server.get_result(name)
        >>> len(result.generated_tokens)
        4
    """

    def __init__(
        self,
        model,
        max_requests_per_batch: int = 16,
        max_batch_tokens: int | None = None,
        max_queue_size: int = 0,
        allow_urls: bool = False,
        allow_paths: bool = False,
        **arguments,
    ):
        check_fields(
            {
                "max_requests_per_batch": max_requests_per_batch,
                "max_batch_tokens": max_batch_tokens,
                "max_queue_size": max_queue_size,
                "allow_urls": allow_urls,
                "allow_paths": allow_paths,
            },
            SERVER_RULES,
        )
        self.model = model
        self.max_requests = max_requests_per_batch
        self.max_tokens = max_batch_tokens
        self.max_queue_size = max_queue_size or math.inf
        bound = (max_batch_tokens, "max_batch_tokens")
        if max_batch_tokens is None:
            bound = (model.config.max_position_embeddings, "max_position_embeddings")
        self.terms = Terms(*bound, allow_urls, allow_paths, threading.Lock())
        self.arguments = {name: value for name, value in arguments.items() if value is not None}
        self.desk = Desk()
        self.rounds = Rounds(model, max_requests_per_batch, self.desk.ended)

        # A thread that holds `stepping` runs a round. The attributes below are read and changed under `changed`.
        self.stepping = threading.Lock()
        self.changed = self.desk.changed
        self.thread: threading.Thread | None = None  # the server's own
        self.runner: threading.Thread | None = None  # the thread that ran the last round
        self.stopping = False
        self.exiting = False
        self.failure: BaseException | None = None

    # ------------------------------------------------------------------------------------------------- called by users

    def add_request(self, inputs, request_id: str | None = None, timeout: float | None = None, **arguments) -> str:
        """Put a request in the queue.

        Args:
            inputs: (L,) tokens, or a dictionary of arguments of `generate()`.
            request_id: a name for the request; default: "req_0", "req_1", ...
            timeout: seconds to wait for room in the queue; default: as long as somebody runs the server.
            arguments: of `generate()`, for this request.

        Returns:
            The name of the request. A request that cannot be served has a result at once, with an `error`.

        Raises:
            ValueError: the name is taken or no string; or the timeout is no number.
            queue.Full: there was no room in time, or never will be because nobody runs the server.
            RuntimeError: the server was stopped, or has failed.
        """
        _check_timeout(timeout)
        # The name is taken at once; preparing a request takes time, for which `changed` is not held.
        with self.changed:
            self._check_open()
            request_id = self.desk.open(request_id)
        try:
            request = self._prepared(request_id, inputs, arguments)
            if request is not None:
                self._enqueue(request, timeout)
        except BaseException:
            self.desk.drop(request_id)
            raise
        return request_id

    def cancel_request(self, request_id: str) -> None:
        """End a request before its next step. Its result holds the tokens and pictures that it has until then."""
        self.desk.cancel(request_id)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> MoTRequestOutput | None:
        """Take the result of a request, and wait for it.

        Args:
            request_id: the name of the request; None for the first result of all.
            timeout: seconds to wait; default: as long as somebody runs the server.

        Returns:
            The result; None if there is none in time.

        Raises:
            KeyError: no request has this name, or its result was taken.
            ValueError: the timeout is no number.
            RuntimeError: the result will never come: the server has failed, or nobody runs it.
        """
        _check_timeout(timeout)
        desk = self.desk

        def is_settled() -> bool:
            if request_id is None:
                return bool(desk.results)
            return request_id in desk.results or request_id not in desk.known

        with self.changed:
            # After a failure the results of all that were in are still to come.
            self._wait(lambda: is_settled() or self.failure is not None and not desk.accepted, timeout)

            # The result is there, will be there, or never comes.
            if request_id is not None and request_id not in desk.known:
                raise KeyError(f"no request is called {request_id!r}, or its result was taken already")
            if is_settled():
                return desk.take(request_id)
            if not desk.accepted:
                self._check_failure()
            if timeout is None and not (request_id is None and self.stopping):
                raise RuntimeError(NOBODY)
            return None

    def serve(self, requests: Iterable, progress_bar: bool = False) -> dict[str, MoTRequestOutput]:
        """Run requests until all are done.

        Args:
            requests: for each request (L,) tokens, or a dictionary of arguments of `generate()`. They may come from a
                generator, which is asked for more as the queue has room.
            progress_bar: show one that counts requests.

        Returns:
            dict: "req_0", "req_1", ... -> `MoTRequestOutput`, in the order of the requests.

        Raises:
            RuntimeError: the server was stopped, has failed before, or is run by another thread.
        """
        self._check_open()
        self._check_mine()
        pending, more = iter(requests), True
        names: list[str] = []
        missing: set[str] = set()  # names without a result
        results: dict[str, MoTRequestOutput] = {}
        with logging.tqdm(total=None, disable=not progress_bar, desc="requests") as bar:
            while more or missing:
                # Requests come in as there is room.
                while more and (self._queue_has_room() or self.failure is not None):
                    try:
                        inputs = next(pending)
                    except StopIteration:
                        more = False
                        break
                    names.append(self._serve_one(inputs))
                    missing.add(names[-1])

                # One round. If the server fails, each request's result says so.
                trouble = None if self.failure is not None else attempt(self.step)
                if trouble is not None and self.failure is None:
                    raise trouble

                # Results are taken as they come; another thread may have taken one.
                with self.changed:
                    missing &= self.desk.known
                    for name in missing & self.desk.results.keys():
                        results[name] = self.desk.take(name)
                        missing.discard(name)
                        bar.update()
        return {name: results[name] for name in names if name in results}

    def start(self) -> None:
        """Start a thread that runs requests as they come.

        Raises:
            RuntimeError: a thread runs the server already, or the server has failed.
        """
        with self.changed:
            self._check_failure()
            if self.thread is not None or self.stepping.locked():
                raise RuntimeError("the server runs already; stop() it before it starts again")
            self.stopping = False
            # The thread is a daemon, so that the interpreter may end while it works; `_exit` waits for its round.
            thread = threading.Thread(target=self._run, name="MoTServer", daemon=True)
            thread.start()
            self.thread = thread
            self.runner = thread
            atexit.register(self._exit)

    def stop(self) -> None:
        """Finish all requests, then end the thread. No more requests are let in until the server starts again."""
        with self.changed:
            self.stopping = True
            thread = self.thread
            self.changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> "MoTServer":
        self.start()
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is not None:  # nobody is left to read results
            with self.changed:
                for name in self.desk.known:
                    self.desk.cancel(name)
        self.stop()

    def __iter__(self) -> Iterator[MoTRequestOutput]:
        """Yield results as they come, until all requests have ended.

        Raises:
            RuntimeError: there are requests, but nobody runs the server.
        """
        while self.desk.accepted or self.desk.results:
            if (result := self.get_result(timeout=0.1)) is not None:
                yield result
            else:
                with self.changed:
                    if self.desk.accepted and not self.desk.results and not self._is_run():
                        raise RuntimeError(NOBODY)

    # ---------------------------------------------------------------------------------------------------------- rounds

    @torch.no_grad()
    def step(self) -> bool:
        """Run one round: cancelled requests leave, waiting ones come in, all get a token or a denoising step.

        Returns:
            True if requests run or wait.

        Raises:
            RuntimeError: another thread runs the server, or a request's own code called this; the server has failed.
        """
        with self.changed:
            self._check_failure()
            self._check_mine()
            if not self.stepping.acquire(blocking=False):
                raise RuntimeError("a round is under way already; only one thread may run the server, and no callback")
            self.runner = threading.current_thread()

        # Errors of single requests stay within these calls. Any other error is the server's.
        try:
            self._cancel()
            self._admit()
            self.rounds.step()
            return bool(self.desk.accepted)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self.stepping.release()

    def _run(self) -> None:
        """Run rounds, and sleep while there are no requests: the server's own thread."""
        try:
            while not self.exiting:
                if not self.step():
                    with self.changed:
                        if self.stopping and not self.desk.accepted:
                            return
                        self.changed.wait_for(lambda: self.stopping or self.exiting or self.desk.accepted)
        except BaseException as error:  # everybody was told
            logger.error(f"the server has failed: {said(error)}")
        finally:
            with self.changed:
                atexit.unregister(self._exit)
                self.thread = None
                self.changed.notify_all()

    def _exit(self) -> None:
        """Wait for the last round when the interpreter ends: a thread inside of torch would abort the interpreter."""
        with self.changed:
            self.exiting = True
            thread = self.thread
            self.changed.notify_all()
        if thread is not None:
            thread.join(GRACE)

    def _cancel(self) -> None:
        """End the requests that were cancelled."""
        gone, names = self.desk.take_cancelled()
        for request in gone:
            self.desk.refuse(request, CANCELLED)
        for sequence in [x for x in self.rounds.sequences if x.request.request_id in names]:
            self.rounds.leave(sequence, CANCELLED)

    def _admit(self) -> None:
        """Begin the requests that wait, as far as there is room."""
        while not self.exiting and (request := self.desk.next(self._has_room)) is not None:
            if (error := attempt(self.rounds.begin, request)) is not None:
                self.desk.refuse(request, error)

    def _has_room(self, request: Request) -> bool:
        if len(self.rounds.sequences) == self.max_requests:
            return False
        lengths = [sequence.request.generation_config.max_length for sequence in self.rounds.sequences]
        return self.max_tokens is None or sum(lengths) + request.generation_config.max_length <= self.max_tokens

    def _fail(self, error: BaseException) -> None:
        """Let no more requests in, and give every request a result that tells of the failure."""
        # From here on no request is let in, and none begins.
        with self.changed:
            self.failure = error
            self.desk.waiting.clear()

        # Requests that ran keep the tokens and pictures that they have.
        try:
            for sequence in list(self.rounds.sequences):
                self.desk.ended(sequence, error)
            for request in list(self.desk.accepted.values()):
                self.desk.refuse(request, error)
        finally:
            with self.changed:
                self.rounds.sequences.clear()
                self.desk.accepted.clear()
                self.changed.notify_all()

    # ---------------------------------------------------------------------------------------------------- a request in

    def _prepared(self, name: str, inputs, arguments: dict) -> Request | None:
        """Prepare a request.  -> None if it cannot be served; its result then says why"""
        # The server's arguments come first, those of the request overrule them.
        streamer = None
        try:
            given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
            given = self.arguments | given | arguments
            streamer = given.get("streamer")
            return prepared(self.model, name, given, self.terms)
        except BaseException as error:
            own = own_error(error)
        end_stream(streamer)
        self.desk.deliver(MoTRequestOutput(name), own)
        return None

    def _serve_one(self, inputs) -> str:
        """Let in a request of `serve`, which has looked for room.  -> its name

        If the server has failed, the request's result says so.
        """
        name = self.desk.open(None)
        if self.failure is not None:
            self.desk.deliver(MoTRequestOutput(name), self.failure)
        elif (request := self._prepared(name, inputs, {})) is not None:
            self.desk.accept(request)
        return name

    def _enqueue(self, request: Request, timeout: float | None) -> None:
        """Wait for room in the queue, and let a request in."""
        name = request.request_id

        def is_settled() -> bool:
            return self._queue_has_room() or self._is_cancelled(name) or self.stopping or self.failure is not None

        # Wait, and let the request in. A request that was cancelled meanwhile needs no room.
        with self.changed:
            came = self._wait(is_settled, timeout)
            self._check_open()
            if not came:
                raise queue.Full(
                    f"{len(self.desk.waiting)} requests wait already, as many as max_queue_size lets in"
                    + ("" if timeout is not None else "; nobody runs the server: start() it, or call step()")
                )
            is_cancelled = self._is_cancelled(name)
            if not is_cancelled:
                self.desk.accept(request)
        if is_cancelled:
            self.desk.refuse(request, CANCELLED)

    def _is_cancelled(self, name: str) -> bool:
        return name in self.desk.cancelled

    def _queue_has_room(self) -> bool:
        return len(self.desk.waiting) < self.max_queue_size

    def _wait(self, is_so: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until a condition holds, with `changed` held.  -> False if it never does, or not in time"""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not is_so():
            left = end - time.monotonic()
            if left <= 0 or timeout is None and not self._is_run() and not self._is_frozen_soon():
                return False
            self.changed.wait(min(left, 1.0))  # not for longer: a thread that dies notifies nobody
        return True

    def _is_run(self) -> bool:
        """True if another thread runs rounds. Code that waits within a round would wait for itself."""
        return self.runner is not None and self.runner.is_alive() and self.runner is not threading.current_thread()

    def _is_frozen_soon(self) -> bool:
        """True in a daemon thread while the interpreter ends, which stops such a thread before it could raise."""
        return self.exiting and threading.current_thread().daemon

    def _check_failure(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"the server has failed: {said(self.failure)}; make a new one") from self.failure

    def _check_open(self) -> None:
        self._check_failure()
        if self.stopping:
            raise RuntimeError("the server was stopped; start() it again, or make a new one")

    def _check_mine(self) -> None:
        if self.thread is not None and self.thread is not threading.current_thread():
            raise RuntimeError("a thread runs the server; add_request() and get_result(), or stop() it first")


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not (is_real(timeout) and timeout >= 0):
        raise ValueError(f"timeout={timeout!r} must be a number of seconds, or None to wait as long as it takes")
