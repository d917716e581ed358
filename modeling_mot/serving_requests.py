"""The requests of a server: their results, how `generate()` prepares them, and the desk where they wait.

`generate()` itself prepares a request, and stops before it decodes. `TextSequence` then decodes it token by token.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.generation import GenerationMode

from .checks_arguments import CACHE, mask_rows, whole_rows
from .decoding_lean import DecodingCache, Prefix, is_plain_dynamic
from .decoding_loop import Request, Sampling


# V vocabulary


# ------------------------------------------------------------------------------------------------------------- results


class RequestStatus(IntEnum):
    """Where a request stands; the members are those of transformers' enumeration of this name."""

    PENDING = 0
    PREFILLING = 1
    DECODING = 2
    FINISHED = 3
    FAILED = 4


@dataclass
class MoTRequestOutput:
    """The result of a request; the attributes are those of transformers' `GenerationOutput`, and `output`.

    Attributes:
        request_id: the name of the request.
        prompt_ids, generated_tokens: its tokens, as far as they came.
        logprobs, timestamps: of transformers' attributes; always empty.
        error: why the request failed; None if it did not.
        created_time: when the request was made, by `time.perf_counter()`.
        lifespan: when the request began to run and when it ended; -1 for a time that never came.
        output: what `generate()` returns for a batch of this request alone, without the cache. A request that was
            cancelled or failed on its way has it as far as it came. None if the request never began.
    """

    request_id: str
    prompt_ids: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: str | None = None
    status: RequestStatus = RequestStatus.PENDING
    created_time: float = field(default_factory=time.perf_counter)
    lifespan: tuple[float, float] = (-1, -1)
    timestamps: list[float] | None = None
    output: Any = None

    def is_finished(self) -> bool:
        """True if nothing more will come, after a failure too."""
        return self.status >= RequestStatus.FINISHED


# ----------------------------------------------------------------------------------------------- errors of one request


def own_error(error: BaseException) -> BaseException:
    """Return an error that ends one request alone, and raise an error that ends the process.

    Signals arrive in the main thread. KeyboardInterrupt and SystemExit end the process there, and belong to no request.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)) and threading.current_thread() is threading.main_thread():
        raise error
    return error


def attempt(function: Callable, *args) -> BaseException | None:
    """Call a function that belongs to one request.  -> its error, or None"""
    try:
        function(*args)
    except BaseException as error:
        return own_error(error)
    return None


def said(error: BaseException | str) -> str:
    """Return the text of an error, as results hold it."""
    try:
        return error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    except Exception:  # the error cannot be printed
        return type(error).__name__


def end_stream(streamer) -> BaseException | None:
    """Tell a streamer that nothing more comes, since a reader may wait for it.  -> the streamer's error, or None"""
    return attempt(streamer.end) if callable(getattr(streamer, "end", None)) else None


# --------------------------------------------------------------------------------------------------------- preparation


class Terms(NamedTuple):
    """What a server lets its requests do.

    Attributes:
        tokens: the most tokens of a request, its prompt included.
        limit: the name of the setting that says so.
        allow_urls, allow_paths: whether documents may name addresses and files.
        lock: tokenizers encode for one thread at a time.
    """

    tokens: int
    limit: str
    allow_urls: bool
    allow_paths: bool
    lock: Any

    def encode(self, processor, **arguments):
        """Call a processor with the server's permissions."""
        with self.lock:
            return processor(**arguments, allow_urls=self.allow_urls, allow_paths=self.allow_paths)


def prepared(model, request_id: str, arguments: dict, terms: Terms) -> Request:
    """Do everything that `generate()` does before it decodes, its refusals included.

    Args:
        arguments: of `generate()`, for one sequence.

    Raises:
        ValueError: `generate()` refuses the arguments; they ask for several sequences, for beams or for assistants; or
            the terms do not allow them.
    """
    arguments = dict(arguments)
    _refuse_what_is_not_served(model, arguments)

    # Requests come from strangers: their numbers become tensors of one row, inside of what the model has room for.
    behind = getattr(model.config, "num_placeholder_tokens", 0)  # ids of placeholders, of a Transfusion model
    vocabulary = (model.config.vocab_size + behind, "vocab_size + num_placeholder_tokens" if behind else "vocab_size")
    ends = {
        "input_ids": vocabulary,
        "inputs": vocabulary,
        "modality_ids": (len(model.config.modalities), "number of modalities"),
        "position_ids": (terms.tokens, terms.limit),
    }
    for name, end in ends.items():
        if arguments.get(name) is not None:
            arguments[name] = whole_rows(name, arguments[name], *end).to(model.device)
    if arguments.get("attention_mask") is not None:
        arguments["attention_mask"] = mask_rows("attention_mask", arguments["attention_mask"]).to(model.device)
    if arguments.get("documents") is not None and arguments.get("processor") is not None:
        arguments["processor"] = partial(terms.encode, arguments["processor"])

    # `generate()` calls a decoding method of ours, which decodes nothing and keeps its arguments.
    caught: list[Request] = []
    ours = {"streamer": arguments.get("streamer"), "request_id": request_id, "created_time": time.perf_counter()}

    def catch(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        caught.append(Request(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, **ours))
        return input_ids

    model.generate(**arguments, custom_generate=catch)
    (request,) = caught

    # The server runs one sequence for each request, with a cache that it can copy.
    _check_one(len(request.input_ids))
    cache = request.model_kwargs.get(CACHE)
    if cache is not None and not is_plain_dynamic(cache):
        raise ValueError(f"a request is served from a DynamicCache, not a {type(cache).__name__}: leave its cache out")
    request.model_kwargs["use_cache"] = True
    _check_length(request, terms)
    return request


def _refuse_what_is_not_served(model, arguments: dict) -> None:
    """Refuse before anything is made of a request, because preparing one of these could already take much memory."""
    for name in ("allow_urls", "allow_paths"):
        if name in arguments:
            raise ValueError(f"{name} came with a request; it is the server's to say: MoTServer(model, {name}=...)")

    # Beams and assistants decode in another way.
    rest = {name: value for name, value in arguments.items() if name != "generation_config"}
    config, _ = model._prepare_generation_config(arguments.get("generation_config"), **rest)
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"a request asks for {mode.value}; served are sampling and greedy search: use generate()")
    _check_one(config.num_return_sequences)

    # "paged" in a configuration has brought `generate()` to a server; as an argument it would make another server.
    served = (None, "dynamic") if "cache_implementation" in arguments else (None, "dynamic", "paged")
    if config.cache_implementation not in served:
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r}: a request is served from a DynamicCache, not from "
            "a StaticCache or another: leave it out"
        )


def _check_one(count: int) -> None:
    if count != 1:
        raise ValueError(f"a request makes {count} sequences; it may make one: send as many requests")


def _check_length(request: Request, terms: Terms) -> None:
    # The unconditional prompt of guidance is cached as well.
    diffusion = getattr(request.generation_config, "diffusion", None)
    negative = getattr(diffusion, "unconditional_prompt", None)
    lengths = {"max_new_tokens": request.generation_config.max_length}
    if negative is not None:
        lengths["negative_prompt_ids"] = negative[0].shape[1]
    for name, length in lengths.items():
        if length > terms.tokens:
            raise ValueError(
                f"a request may come to {length} tokens, more than {terms.limit}={terms.tokens}: lower its {name}, or "
                "raise max_batch_tokens of the server"
            )


# ------------------------------------------------------------------------------------------------- a request that runs


class TextSequence:
    """A request that writes tokens of any modality.

    Attributes:
        token: the token to run next; None once the sequence has ended.
        position: the position of that token.
        is_drawing: True if a picture is to be drawn before the next token.
    """

    is_drawing = False

    def __init__(self, model, request: Request, decoder):
        self.request = request
        self.decoder = decoder
        self.sampling = Sampling(model, request)
        self.token: int | None = None
        self.began = time.perf_counter()

    def begin(self) -> Prefix:
        """Run the prompt, and choose the first token.  -> the keys and values to cache"""
        outputs = self.sampling.prefill()
        mask = self.request.model_kwargs.get("attention_mask")
        cache = DecodingCache.of(getattr(outputs, CACHE), mask, self.decoder.cache_dtype)
        self.position = self.sampling.positions()[0] + 1
        self.take(outputs.logits[:, -1])
        return cache.prefix(0, self.position)

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token from the logits (1, V) of the last one."""
        self.token = None  # unless a next one is chosen
        self.sampling.take(logits)
        if not self.sampling.is_done:
            self.token = int(self.sampling.input_ids[0, -1])

    def new_tokens(self) -> list[int]:
        return self.sampling.input_ids[0, self.request.input_ids.shape[1] :].tolist()

    def output(self):
        return self.sampling.output()


# ---------------------------------------------------------------------------------------------------------------- desk


class Desk:
    """Holds a server's requests and results by their names.

    Code that reads or changes an attribute holds `changed`. The methods take it themselves.

    Attributes:
        known: names of requests whose results were not taken yet.
        accepted: requests that wait or run.
        waiting: the accepted requests that wait, in their order.
        cancelled: names of requests that are to end.
        results: results of requests that have ended.
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
        """Take a name for a new request: this one, or the next number.

        Raises:
            ValueError: the name is taken, or is no string.
        """
        if name is not None and not isinstance(name, str):
            raise ValueError(f"request_id={name!r} must be a string")
        # A number may have been taken as a name.
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
        """Take the request that has waited longest, if it fits."""
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
        """Remove cancelled requests from the queue.  -> the removed ones, and the names of all that are to end"""
        with self.changed:
            names = set(self.cancelled)
            gone = [request for request in self.waiting if request.request_id in names]
            if gone:
                self.waiting = deque(request for request in self.waiting if request.request_id not in names)
                self.changed.notify_all()
        return gone, names

    def take(self, name: str | None) -> MoTRequestOutput:
        """Remove and return a result that is there; the first one for None."""
        with self.changed:
            name = next(iter(self.results)) if name is None else name
            self.known.discard(name)
            return self.results.pop(name)

    # ------------------------------------------------------------------------------------------------- results come in

    def ended(self, sequence, error: BaseException | str | None) -> None:
        """Lay out the result of a sequence that ran."""
        request = sequence.request
        result = MoTRequestOutput(request.request_id, created_time=request.created_time)
        result.lifespan = (sequence.began, time.perf_counter())

        def fill() -> None:
            result.prompt_ids = request.input_ids[0].tolist()
            result.generated_tokens = sequence.new_tokens()
            result.output = sequence.output()

        # The first error is the one that ended the sequence.
        for trouble in (attempt(fill), end_stream(request.streamer)):
            error = trouble if error is None else error
        self.deliver(result, error)

    def refuse(self, request: Request, error: BaseException | str) -> None:
        """Lay out the result of a request that never began."""
        result = MoTRequestOutput(request.request_id, created_time=request.created_time)
        attempt(lambda: result.prompt_ids.extend(request.input_ids[0].tolist()))
        end_stream(request.streamer)
        self.deliver(result, error)

    def deliver(self, result: MoTRequestOutput, error: BaseException | str | None) -> None:
        """Lay out a result. With an error it says that the request failed."""
        result.error = None if error is None else said(error)
        result.status = RequestStatus.FINISHED if error is None else RequestStatus.FAILED
        with self.changed:
            self.results[result.request_id] = result
            self.accepted.pop(result.request_id, None)
            self.cancelled.discard(result.request_id)
            self.changed.notify_all()
