"""The desk of a server: which requests came, which of them wait or run, and what became of them."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

from .serving_requests_mot import MoTRequestOutput, Request, RequestStatus, attempt, said


class Desk:
    """Requests by their names. Whoever reads or changes it holds `changed`; the methods do so themselves.

    Attributes:
        known: names of requests whose results were not taken yet.
        accepted: requests that wait or run.
        waiting: those of them that wait, in their order.
        cancelled: names of requests that are to end.
        results: what became of those that have ended.
    """

    def __init__(self):
        self.changed = threading.Condition()
        self.numbered = (f"req_{number}" for number in itertools.count())
        self.known: set[str] = set()
        self.accepted: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.cancelled: set[str] = set()
        self.results: dict[str, MoTRequestOutput] = {}

    def open(self, name: str | None) -> str:
        """A name for a new request: this one, or the next number.

        Raises:
            ValueError: it is taken or no string.
        """
        if name is not None and not isinstance(name, str):
            raise ValueError(f"request_id={name!r} must be a string")
        with self.changed:
            if name is None:
                name = next(name for name in self.numbered if name not in self.known)
            if name in self.known:
                raise ValueError(f"request_id={name!r} is taken; choose another, or leave it out")
            self.known.add(name)
        return name

    def drop(self, name: str) -> None:
        """Forget a request that was not let in."""
        with self.changed:
            self.known.discard(name)
            self.cancelled.discard(name)
            self.changed.notify_all()

    def accept(self, request: Request) -> None:
        """Let a request wait."""
        with self.changed:
            self.accepted[request.request_id] = request
            self.waiting.append(request)
            self.changed.notify_all()

    def next(self, fits: Callable[[Request], bool]) -> Request | None:
        """Whoever waits first, if it fits."""
        with self.changed:
            if not self.waiting or not fits(self.waiting[0]):
                return None
            self.changed.notify_all()
            return self.waiting.popleft()

    def cancel(self, name: str) -> None:
        """Mark a request that has no result yet."""
        with self.changed:
            if name in self.known and name not in self.results:
                self.cancelled.add(name)
                self.changed.notify_all()

    def take_cancelled(self) -> tuple[list[Request], set[str]]:
        """Those that waited, which wait no more, and the names of all that are to end."""
        with self.changed:
            names = set(self.cancelled)
            gone = [request for request in self.waiting if request.request_id in names]
            if gone:
                self.waiting = deque(request for request in self.waiting if request.request_id not in names)
                self.changed.notify_all()
        return gone, names

    def take(self, name: str | None) -> MoTRequestOutput:
        """A result that is there, or the first of all."""
        with self.changed:
            name = next(iter(self.results)) if name is None else name
            self.known.discard(name)
            return self.results.pop(name)

    # ------------------------------------------------------------------------------------------------------- results

    def ended(self, sequence, error: BaseException | str | None) -> None:
        """The result of a sequence that ran."""
        request = sequence.request
        result = MoTRequestOutput(request.request_id, created_time=request.created_time)
        result.lifespan = (sequence.began, time.perf_counter())

        def fill() -> None:
            result.prompt_ids, result.generated_tokens = request.input_ids[0].tolist(), sequence.new_tokens()
            result.output = sequence.output()

        for trouble in (attempt(fill), end_stream(request.streamer)):
            error = trouble if error is None else error
        self.deliver(result, error)

    def refuse(self, request: Request, error: BaseException | str) -> None:
        """The result of a request of which nothing was begun."""
        result = MoTRequestOutput(request.request_id, created_time=request.created_time)
        attempt(lambda: result.prompt_ids.extend(request.input_ids[0].tolist()))
        end_stream(request.streamer)
        self.deliver(result, error)

    def deliver(self, result: MoTRequestOutput, error: BaseException | str | None) -> None:
        """Lay a result out; with an error it says that the request failed."""
        result.error = None if error is None else said(error)
        result.status = RequestStatus.FINISHED if error is None else RequestStatus.FAILED
        with self.changed:
            self.results[result.request_id] = result
            self.accepted.pop(result.request_id, None)
            self.cancelled.discard(result.request_id)
            self.changed.notify_all()


def end_stream(streamer) -> BaseException | None:
    """Whoever reads a stream waits for its end, also where a request failed.  -> what it raised"""
    return attempt(streamer.end) if callable(getattr(streamer, "end", None)) else None
