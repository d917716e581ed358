"""Requests as a server runs them: prepared by `generate()` itself, then one token after another."""

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

from .checks_arguments import mask_rows, whole_rows
from .decoding_lean import DecodingCache, Prefix, is_plain_dynamic
from .decoding_loop import Sampling


# L tokens of a prompt, V vocabulary


class RequestStatus(IntEnum):
    """Where a request stands; the members are those of transformers' enumeration of this name."""

    PENDING = 0
    PREFILLING = 1
    DECODING = 2
    FINISHED = 3
    FAILED = 4


@dataclass
class MoTRequestOutput:
    """What became of a request; the attributes are those of transformers' `GenerationOutput`, and `output`.

    Attributes:
        request_id: its name.
        prompt_ids, generated_tokens: its tokens, as far as they came.
        logprobs, timestamps: of transformers' attributes; always empty.
        error: why it failed; None where it did not.
        created_time: when it was made, by `time.perf_counter()`.
        lifespan: when it began to run and when it ended; -1 where it did not.
        output: what `generate()` returns of it, for a batch of one, without the cache; also of a request that was
            cancelled or failed on its way, as far as it came. None where nothing was begun.
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
        """True if nothing more will come, be it an end or a failure."""
        return self.status >= RequestStatus.FINISHED


class Request(NamedTuple):
    """A request as `generate()` prepared it."""

    request_id: str
    created_time: float
    input_ids: torch.Tensor
    logits_processor: Any
    stopping_criteria: Any
    generation_config: Any
    streamer: Any
    model_kwargs: dict


def own_error(error: BaseException) -> BaseException:
    """The error of a request, whatever its code raised: the others go on.

    Signals arrive in the main thread. There KeyboardInterrupt and SystemExit end the process and are no request's.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)) and threading.current_thread() is threading.main_thread():
        raise error
    return error


def attempt(function: Callable, *args) -> BaseException | None:
    """Call what belongs to one request.  -> its error, or None"""
    try:
        function(*args)
    except BaseException as error:
        return own_error(error)
    return None


def said(error: BaseException | str) -> str:
    """What a result says of an error."""
    try:
        return error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    except Exception:  # of an error that cannot be printed
        return type(error).__name__


class Terms(NamedTuple):
    """What a server lets its requests do.

    Attributes:
        tokens: that a request may come to.
        limit: the name of what says so.
        allow_urls, allow_paths: whether documents may name addresses and files.
        lock: tokenizers encode for one thread at a time.
    """

    tokens: int
    limit: str
    allow_urls: bool
    allow_paths: bool
    lock: Any

    def encode(self, processor, **arguments):
        """As the processor, by the server's permissions."""
        with self.lock:
            return processor(**arguments, allow_urls=self.allow_urls, allow_paths=self.allow_paths)


def prepared(model, request_id: str, arguments: dict, terms: Terms) -> Request:
    """Everything that `generate()` does before it decodes, its refusals included.

    Raises:
        ValueError: what `generate()` refuses; several sequences; beams or assistants; what the terms do not allow.
    """
    arguments = dict(arguments)
    _refuse_what_is_not_served(model, arguments)
    ends = {
        "input_ids": (model.config.vocab_size, "vocab_size"),
        "inputs": (model.config.vocab_size, "vocab_size"),
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
    created, caught = time.perf_counter(), {}

    def catch(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        caught.update(input_ids=input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria)
        caught.update(generation_config=generation_config, model_kwargs=model_kwargs)
        return input_ids

    model.generate(**arguments, custom_generate=catch)
    _check_one(len(caught["input_ids"]))
    cache = caught["model_kwargs"].get("past_key_values")
    if cache is not None and not is_plain_dynamic(cache):
        raise ValueError(f"a request is served from a DynamicCache, not a {type(cache).__name__}: leave its cache out")
    caught["model_kwargs"]["use_cache"] = True
    request = Request(request_id, created, streamer=arguments.get("streamer"), **caught)
    _check_length(request, terms)
    return request


def _refuse_what_is_not_served(model, arguments: dict) -> None:
    """Before anything is made of a request: each of these could take memory, or another way."""
    for name in ("allow_urls", "allow_paths"):
        if name in arguments:
            raise ValueError(f"{name} came with a request; it is the server's to say: MoTServer(model, {name}=...)")
    rest = {name: value for name, value in arguments.items() if name != "generation_config"}
    config, _ = model._prepare_generation_config(arguments.get("generation_config"), **rest)
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"a request asks for {mode.value}; served are sampling and greedy search: use generate()")
    _check_one(config.num_return_sequences)
    # "paged" in a configuration is what brought `generate()` to a server; as an argument it would make another.
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


class TextSequence:
    """A request that writes tokens of any modality.

    Attributes:
        token: what is to be run next; None at its end.
        position: where it stands.
        is_drawing: whether a picture is to be drawn before the next token.
    """

    is_drawing = False

    def __init__(self, model, request: Request, decoder):
        self.request, self.decoder, self.token, self.began = request, decoder, None, time.perf_counter()
        self.sampling = Sampling(
            model,
            request.input_ids,
            request.logits_processor,
            request.stopping_criteria,
            request.generation_config,
            request.model_kwargs,
        )

    def begin(self) -> Prefix:
        """Run the prompt.  -> what is to be cached"""
        outputs = self.sampling.prefill()
        mask = self.sampling.model_kwargs.get("attention_mask")
        cache = DecodingCache.of(outputs.past_key_values, mask, self.decoder.cache_dtype)
        self.position = self.sampling.positions()[0] + 1
        self.take(outputs.logits[:, -1])
        return cache.prefix(0, self.position)

    def take(self, logits: torch.Tensor) -> None:
        """Go on from the logits (1, V) behind what was run last."""
        tokens = self.sampling.take(logits)
        self.token = None if self.sampling.is_done else int(tokens)
        if self.request.streamer is not None:
            self.request.streamer.put(tokens.cpu())  # which may write into it

    def new_tokens(self) -> list[int]:
        return self.sampling.input_ids[0, self.request.input_ids.shape[1] :].tolist()

    def output(self):
        return self.sampling.output()


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
