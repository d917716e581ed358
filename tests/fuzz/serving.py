"""Bad requests to a server, beside good requests, whose results must be the same as alone."""

import asyncio
import builtins
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from modeling_mot import MoTTransfusionModel
from modeling_mot.serving_mot import MoTServer
from tests.modeling_mot.naive_transfusion import VAE
from tests.modeling_mot.naive_transfusion import tiny_model as transfusion
from tests.modeling_mot.test_continuous_processor import build_continuous

from . import files, values
from .case import Case, Hung, Place, WrongResult
from .models import bad_settings, check_made, picture_model, token_model
from .values import INF, NAN


WAIT = 12  # seconds for any answer of a server


@functools.cache
def documents_model() -> tuple[MoTTransfusionModel, Any]:
    """Make a model that is served documents, and its processor."""
    torch.manual_seed(0)
    processor = build_continuous(image_size=[8, 8], downsampling=4)
    fields = {"vae_config": VAE, "noise_schedule": "linear", "caption_dropout": 0.1}
    return transfusion(**fields | processor.config_kwargs()), processor


def good_request(model: Any) -> dict[str, Any]:
    request = {
        "input_ids": [1, 9, 8, 3],
        "max_new_tokens": 8,
        "do_sample": True,
        "generator": torch.Generator().manual_seed(3),
    }
    return request | ({"num_inference_steps": 2} if isinstance(model, MoTTransfusionModel) else {})


@functools.cache
def alone(model: Any) -> list[int]:
    """Return the tokens that `generate()` makes of the good request."""
    request = good_request(model)
    made = model.generate(torch.tensor([request.pop("input_ids")]), **request)
    return getattr(made, "sequences", made)[0].tolist()


def warm() -> None:
    for model in (token_model(), picture_model(), documents_model()[0]):
        alone(model)


def serve(rng: Random, place: Place) -> Case:
    """Make a bad request beside good ones, in a list or in a running server; or calls of a server in a bad order."""
    if rng.random() < 0.15:
        return _calls(rng)
    if rng.random() < 0.2:
        (model, processor), (bad, says) = documents_model(), _bad_document(rng, place)
        request = good_request(model) | {"documents": bad, "processor": processor}
        request.pop("input_ids")
        names = ("documents", "document", "segment", "picture", "image", "array", "address", "path")
    else:
        model = rng.choice([token_model, picture_model])()
        request, names, says = _bad_request(rng, model)
    # Our own refusals begin with the first; images and their placeholders are named for what holds them.
    names = (*names, "a request", "placeholders")
    run = rng.choice([_served_in_a_list, _served_by_a_thread])
    return Case(f"{type(model).__name__}, {run.__name__[1:]}: {says}", lambda: run(model, request), names)


def good(folder: Path) -> None:
    for model in (token_model(), picture_model()):
        for run in (_served_in_a_list, _served_by_a_thread):
            run(model, good_request(model))
    model, processor = documents_model()
    request = good_request(model) | {"documents": [{"type": "text", "text": "a cat"}], "processor": processor}
    request.pop("input_ids")
    _served_in_a_list(model, request)


# ----------------------------------------------------------------------------------------------------------- bad inputs


class Streamer:
    """A streamer that fails in the method named `failing`."""

    def __init__(self, failing: str, error: BaseException):
        self.failing = failing
        self.error = error

    def put(self, value: Any) -> None:
        if self.failing == "put":
            raise self.error

    def put_image(self, image: Any) -> None:
        if self.failing == "put_image":
            raise self.error

    def end(self) -> None:
        if self.failing == "end":
            raise self.error


class NoEnd:
    def put(self, value: Any) -> None:
        pass


def _failing(error: BaseException, then: int, answer: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that answers `then` times and then fails."""
    left = [None] * then

    def fail(*arguments: Any, **_: Any) -> Any:
        if not left:
            raise error
        left.pop()
        return answer(*arguments)

    return fail


# Bad values that logits processors, stopping criteria and callbacks return.
ANSWERS: dict[str, Callable[..., Any]] = {
    "logits_processor": lambda ids, scores: scores,
    "stopping_criteria": lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool),
    "callback_on_step_end": lambda *_: None,
}


ERRORS = (
    ValueError, RuntimeError, KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit, MemoryError,
    StopIteration,
)  # fmt: skip
PROMPTS = ([], [10**6], [-1], "abc", [[1, 2], [3, 4]], [1.5, 2], None, [1] * 3000, [NAN], [None], 5, {}, [[]], b"a")


def _bad_request(rng: Random, model: Any) -> tuple[Any, tuple[str, ...], str]:
    """Make a bad request.  -> (request, names, description)"""
    good, way = good_request(model), rng.random()
    if way < 0.5:
        own = {"max_new_tokens": (10**12, 0, -1, NAN, "3"), "input_ids": PROMPTS}
        bad, names = values.mutated(rng, good, bad_settings(rng, model) | own, most=1)
        return bad, names, values.described(bad, names)
    if way < 0.6:
        bad = rng.choice(PROMPTS) if rng.random() < 0.5 else values.anything(rng)
        return bad, ("input_ids", "inputs", "request", "prompts"), f"inputs={values.shown(bad)}"
    return _with_code(rng, good)


def _with_code(rng: Random, good: dict) -> tuple[dict, tuple[str, ...], str]:
    """Make a request with code of the caller that fails or returns a bad value."""
    error, then = rng.choice(ERRORS)("of the caller"), rng.choice([0, 1, 3])
    name = rng.choice(["streamer", *ANSWERS])
    own: Any = None
    says = f"{name} raises {error!r} after {then} calls"
    if name in ANSWERS:
        own = _failing(error, then, ANSWERS[name])
    if name == "streamer":
        own = rng.choice([*(Streamer(method, error) for method in ("put", "end", "put_image")), NoEnd(), object()])
        says = f"{name} of {type(own).__name__}, which may raise {error!r} in {getattr(own, 'failing', None)}"
    elif name == "logits_processor":
        changes: list = [
            lambda scores: torch.nn.functional.pad(scores.fill_(-INF), (0, 50), value=1.0), lambda scores: scores[:0],
            lambda scores: None, lambda scores: scores.fill_(NAN), lambda scores: scores[:, :3],
        ]  # fmt: skip
        number = rng.randrange(-3, len(changes))
        if number >= 0:
            own, says = (lambda ids, scores: changes[number](scores)), f"{name} that gives back bad scores, {number}"
        own = [own]
    elif name == "stopping_criteria":
        if rng.random() < 0.4:
            answer = rng.choice([None, "no", torch.tensor([True, False]), torch.zeros(0)])
            own, says = (lambda *_, **__: answer), f"{name} that says {answer!r}"
        own = [own]
    return good | {name: own}, (name, "of the caller", "vocabulary", "latents", "end", "put", "scores", "ids"), says


def _bad_document(rng: Random, place: Place) -> tuple[Any, str]:
    """Make a bad document.  -> (document, description)"""
    image, says = files.bad_picture(rng)
    if rng.random() < 0.6:
        image = files.anywhere(rng, place, "secret.png")
        says = values.shown(image)
    return [{"type": "text", "text": "a cat"}, {"type": "image", "image": image}], f"picture {says}"


# ------------------------------------------------------------------------------------------------------ ways of serving


def _served_in_a_list(model: Any, bad: Any) -> None:
    try:
        results = list(model.generate_batch([good_request(model), bad, good_request(model)]).values())
    except (KeyboardInterrupt, SystemExit) as error:
        raise RuntimeError(f"who interrupts from within ends the list: {error}") from error
    except BaseException as error:
        raise WrongResult(f"the good requests are lost: {type(error).__name__}: {error}") from error
    for place in (0, 2):
        _check_good(results[place], model)
    _raise_error(results[1], model)


def _served_by_a_thread(model: Any, bad: Any) -> None:
    server = model.init_continuous_batching()
    server.start()
    try:
        first = server.add_request(good_request(model))
        try:
            name = server.add_request(bad)
        except BaseException as error:  # from a streamer, which gets the prompt at once
            name, refused = None, error if isinstance(error, Exception) else RuntimeError(str(error))
        last = server.add_request(good_request(model))
        for good in (first, last):
            _check_good(_result(server, good), model)
        if name is None:
            raise refused
        _raise_error(_result(server, name), model)
    finally:
        _stop(server)


def _result(server: MoTServer, name: str) -> Any:
    result = server.get_result(name, timeout=WAIT)
    if result is None:
        raise Hung(f"{name} has no result after {WAIT} s")
    return result


def _stop(server: MoTServer) -> None:
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    stopping.join(WAIT)
    if stopping.is_alive():
        raise Hung(f"stop() did not come back in {WAIT} s")


def _check_good(result: Any, model: Any) -> None:
    if result.error is not None:
        raise WrongResult(f"a good request failed: {result.error}")
    if result.prompt_ids + result.generated_tokens != alone(model):
        raise WrongResult("a good request became something else than it is alone")


def _raise_error(result: Any, model: Any) -> None:
    """Raise the error of a result, or check the output if there is none."""
    if result.error is None:
        check_made(result.output, model)
        return
    kind, _, message = result.error.partition(": ")
    kind = RuntimeError if "of the caller" in message else getattr(builtins, kind, RuntimeError)
    raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(message or result.error)


# ------------------------------------------------------------------------------------------------- calls in a bad order


def _calls(rng: Random) -> Case:
    """Call a server before its start, after its end, twice, or with unknown names."""
    model = rng.choice([token_model, picture_model])()
    limits = {}
    if rng.random() < 0.4:
        name = rng.choice(["max_requests_per_batch", "max_batch_tokens", "max_queue_size"])
        limits = {name: rng.choice([0, -1, NAN, INF, 2.5, "3", True, 10**12, []])}
    known = [
        "start",
        "stop",
        "add",
        "add",
        "get",
        "get again",
        "get unknown",
        "cancel",
        "cancel unknown",
        "same name",
        "iterate",
        "serve",
        "bad name",
    ]
    order = [rng.choice(known) for _ in range(rng.randint(1, 7))]

    def call() -> None:
        server, names = MoTServer(model, **limits), []
        steps = {
            "start": server.start,
            "stop": lambda: _stop(server),
            "add": lambda: names.append(server.add_request(good_request(model), timeout=WAIT)),
            "get": lambda: names and server.get_result(names[-1], timeout=1),
            "get again": lambda: names and server.get_result(names[-1], timeout=1),
            "get unknown": lambda: server.get_result("nope", timeout=1),
            "cancel": lambda: names and server.cancel_request(names[-1]),
            "cancel unknown": lambda: server.cancel_request(values.number(rng)),
            "same name": lambda: names and server.add_request(good_request(model), request_id=names[-1], timeout=WAIT),
            "iterate": lambda: next(iter(server), None),
            "serve": lambda: server.serve([good_request(model)]),
            "bad name": lambda: server.add_request(good_request(model), request_id=values.anything(rng), timeout=WAIT),
        }
        error = None
        for step in order:
            worker = threading.Thread(target=_kept, args=(steps[step], found := []), daemon=True)
            worker.start()
            worker.join(WAIT + 3)
            if worker.is_alive():
                raise Hung(f"{step} of {order} did not come back")
            error = error or (found[0] if found else None)
        _stop(server)
        if error is not None:
            raise error

    names = ("server", "request_id", "max_requests_per_batch", "max_batch_tokens", "max_queue_size", "unhashable")
    return Case(f"calls in the order {', '.join(order)} {limits or ''}", call, names)


def _kept(step: Callable[[], Any], found: list) -> None:
    try:
        step()
    except BaseException as error:
        found.append(error)
