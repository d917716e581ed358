"""Bad requests among good ones: each ends by itself, and what is good equals what it becomes alone."""

import asyncio
import inspect
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, TextIteratorStreamer

from modeling_mot import MoTProcessor
from modeling_mot.decoding_lean import DecodingCache, LeanDecoder
from modeling_mot.decoding_pictures import ImageForward
from modeling_mot.serving_mot import MoTServer
from modeling_mot.serving_requests import RequestStatus

from .naive_transfusion import BOI, BOS, VAE, image
from .naive_transfusion import tiny_model as tiny_transfusion
from .test_continuous_processor import build_continuous
from .test_serving import BAGEL, REQUESTS, alone, arguments_of, drawings, painting_model


NAN, INFINITY = math.nan, math.inf


class BadWords(Exception):
    def __str__(self):
        raise RuntimeError("this error cannot be printed")


ERRORS = [RuntimeError("enough"), asyncio.CancelledError(), GeneratorExit(), BadWords(), MemoryError()]
OF_THREADS = [KeyboardInterrupt(), SystemExit(3)]


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


class Stream:
    """A streamer of which one method does something else."""

    def __init__(self, **methods):
        self.put = self.end = lambda *args: None
        self.__dict__.update(methods)


def late(function):
    """What a processor or criterion does once two tokens were written; before that it does nothing."""

    def call(input_ids, scores):
        if input_ids.shape[1] > 5:
            return function(input_ids, scores)
        return scores if scores is not None and scores.dim() == 2 else torch.zeros(len(input_ids), dtype=torch.bool)

    return call


def filled_cache(heads, value):
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.full((1, heads, 3, 8), value), torch.full((1, heads, 3, 8), value), layer)
    return cache


def of_processor(function):
    return {"logits_processor": [late(function)]}


def of_criterion(answer):
    return {"stopping_criteria": [lambda input_ids, scores: answer]}


WRITING = [
    ({"negative_prompt_ids": [10_000], "guidance_scale": 2.0}, "negative_prompt_ids holds numbers .* vocab_size=60"),
    ({"max_new_tokens": 10**12}, "max_position_embeddings=128"),
    ({"max_new_tokens": NAN}, "max_new_tokens=nan"),
    ({"num_return_sequences": 10**9, "do_sample": True}, "1000000000 sequences"),
    ({"num_beams": 10**9}, "beam_search"),
    ({"position_ids": [10**12] * 4}, "position_ids"),
    ({"modality_ids": [7] * 4}, "modality_ids"),
    ({"input_ids": [1.5, 2.0]}, "whole numbers"),
    ({"input_ids": [True, False]}, "torch.bool"),
    ({"input_ids": "text"}, "is text"),
    ({"input_ids": []}, "input_ids has shape"),
    ({"input_ids": [2**70]}, "input_ids makes no tensor"),
    ({"cache_implementation": "paged"}, "cache_implementation"),
    ({"custom_generate": "attacker/evil", "trust_remote_code": True}, "custom_generate"),
    ({"allow_urls": True}, "MoTServer\\(model, allow_urls="),
    ({"allow_paths": False}, "MoTServer\\(model, allow_paths="),
    ({"past_key_values": filled_cache(2, NAN)}, "NaN"),
    ({"past_key_values": filled_cache(3, 1.0)}, "Error"),
    ({"streamer": SimpleNamespace(put=print)}, "no method end"),
    ({"streamer": 5}, "no method put"),
    ({"streamer": Stream(end=failing(ValueError("cannot end")))}, "cannot end"),
    (of_processor(lambda ids, scores: torch.cat([scores, scores + 99], dim=1)), "60"),
    (of_processor(lambda ids, scores: scores.repeat(3, 1)), "logits_processor made \\(3, 60\\)"),
    (of_processor(lambda ids, scores: scores * NAN), "NaN"),
    (of_processor(lambda ids, scores: scores - INFINITY) | {"do_sample": True}, "none can be chosen"),
    (of_processor(lambda ids, scores: None), "Error"),
    (of_criterion(torch.zeros(5, dtype=torch.bool)), "stopping_criteria answered torch.bool of shape \\(5,\\)"),
    (of_criterion(None), "stopping_criteria answered NoneType"),
    (of_criterion(torch.zeros(1)), "stopping_criteria answered torch.float32"),
    (of_criterion(torch.zeros(1, 1, dtype=torch.bool)), "stopping_criteria"),
    (of_criterion(None), "Error"),
    *((of_processor(failing(error)), type(error).__name__) for error in ERRORS),
    *(({"streamer": Stream(put=failing(error))}, type(error).__name__) for error in ERRORS),
    *(({"streamer": Stream(end=failing(error))}, type(error).__name__) for error in ERRORS),
]  # fmt: skip


def serve_mixed(model, good, bad, **limits):
    """Serve bad requests with a good one before each third.

    -> pairs of a good one's number and its result; results of the bad
    """
    with MoTServer(model, **limits) as server:
        names = []
        for number, request in enumerate(bad):
            if number % 3 == 0:
                chosen = number // 3 % len(good)
                names.append((chosen, server.add_request(arguments_of(good[chosen]))))
            names.append((None, server.add_request(request)))
        results = [(chosen, server.get_result(name, timeout=60)) for chosen, name in names]
    return [pair for pair in results if pair[0] is not None], [result for chosen, result in results if chosen is None]


def assert_failed(result, message):
    assert result.status == RequestStatus.FAILED and result.is_finished()
    pytest.raises(ValueError, failing(ValueError(result.error))).match(message)


def assert_writes(result, expected):
    assert result.error is None and result.prompt_ids + result.generated_tokens == expected[0].tolist()


def test_whatever_a_request_that_writes_holds_the_others_are_served(tiny_model):
    model = tiny_model(initializer_range=0.3)
    bad = [{"input_ids": [1, 9, 12, 7], "max_new_tokens": 9} | request for request, _ in WRITING]
    served, refused = serve_mixed(model, REQUESTS, bad, max_requests_per_batch=4)
    expected = [alone(model, request) for request in REQUESTS]
    for number, result in served:
        assert_writes(result, expected[number])
    for (_, message), result in zip(WRITING, refused, strict=True):
        assert_failed(result, message)


def of_callback(function):
    return {"callback_on_step_end": lambda model, step, timestep, state: function(state["latents"])}


def returning(change):
    return of_callback(lambda latents: {"latents": change(latents)})


DRAWING = [
    *(({"guidance_scale": 2.0, "negative_prompt_ids": ids}, "negative_prompt_ids") for ids in
      ([10_000], [-1], [[BOS]] * 3, [], [[]], "text", [BOS, *image()], [1.0, 2.0], [True, False], [BOS] * 300)),
    *(({"negative_prompt_ids": [BOS, 9], "negative_prompt_attention_mask": mask}, "negative_prompt_attention_mask")
      for mask in ([1] * 5, [[1, 1]] * 2, [1, 0], [0, 0], [2, 1], [NAN, 1.0], "11")),
    ({"negative_prompt_attention_mask": [1]}, "without negative_prompt_ids"),
    ({"unconditional_prompt": "x"}, "pass negative_prompt_ids"),
    ({"image_size": [10**9, 10**9]}, "max_position_embeddings=256"),
    ({"scheduler": "dpm", "scheduler_kwargs": {"solver_order": 10**9}}, "solver_order"),
    ({"scheduler": "RePaintScheduler"}, "Error"),
    (returning(lambda latents: latents[:, :, :2]), "must stay floats of \\(1, 2, 4, 4\\)"),
    (returning(lambda latents: latents.repeat(3, 1, 1, 1)), "must stay floats"),
    (returning(lambda latents: latents.long()), "torch.int64"),
    (returning(lambda latents: latents.double() * 1e300), "not finite"),
    (returning(lambda latents: latents * NAN), "not finite"),
    (returning(lambda latents: None), "NoneType, not a tensor"),
    (of_callback(lambda latents: torch.ones(3)), "returned Tensor"),
    (of_callback(lambda latents: {"other": latents.fill_(NAN)}), "not finite"),
    (of_callback(lambda latents: {"other": latents.resize_(1, 1, 1, 1)}), "must stay floats"),
    ({"latents": torch.full((1, 2, 4, 4), NAN), "input_ids": [BOS, *image(), BOI]}, "not finite"),
    ({"latents": torch.full((1, 2, 4, 4), NAN), "input_ids": [BOS, *image(), 9], "generation_mode": "text",
      "max_new_tokens": 4}, "NaN"),
    ({"latents": torch.zeros(3, 2, 4, 4), "input_ids": [BOS, *image(), BOI]}, "3 images"),
    ({"streamer": Stream(put_image=failing(RuntimeError("no paper")))}, "no paper"),
    *((of_callback(failing(error)), type(error).__name__) for error in (*ERRORS, *OF_THREADS)),
]  # fmt: skip


def test_whatever_a_request_that_draws_holds_the_others_are_served():
    model, good = painting_model(), drawings()
    picture = {"input_ids": [BOS, 10, BOI], "num_inference_steps": 2, "generation_mode": "image", "generator": 1}
    bad = [arguments_of(picture | request) for request, _ in DRAWING]
    served, refused = serve_mixed(model, good, bad, max_requests_per_batch=6)
    expected = [alone(model, request) for request in good]
    for number, result in served:
        assert_drawn(result, expected[number])
    for (_, message), result in zip(DRAWING, refused, strict=True):
        assert_failed(result, message)


def assert_drawn(result, expected):
    assert result.error is None and torch.equal(result.output.sequences, expected.sequences)
    for latents, wanted in zip(result.output.latents[0], expected.latents[0], strict=True):
        torch.testing.assert_close(latents, wanted, rtol=0, atol=1e-4 * max(1, wanted.abs().max().item()))


def test_what_one_request_left_in_the_cache_does_not_reach_the_next(tiny_model):
    """A NaN that a mask hides is still multiplied by 0, which makes a NaN."""
    model = tiny_model()
    server = MoTServer(model, max_requests_per_batch=2, do_sample=False)
    server.add_request(REQUESTS[1], "long")
    poison = {"input_ids": [1, 9, 12, 7], "past_key_values": filled_cache(2, NAN), "max_new_tokens": 3}
    quiet = of_processor(lambda ids, scores: scores) | {"logits_processor": [lambda ids, scores: scores.nan_to_num()]}
    server.add_request(poison | quiet, "poison")
    server.add_request(REQUESTS[2] | {"generator": torch.Generator().manual_seed(3)}, "next")
    while server.step():
        pass
    assert_writes(server.get_result("next"), alone(model, REQUESTS[2]))
    assert_writes(server.get_result("long"), alone(model, REQUESTS[1]))


@pytest.mark.parametrize("error", OF_THREADS, ids=lambda error: type(error).__name__)
def test_in_the_main_thread_what_ends_the_process_does(tiny_model, error):
    server = MoTServer(tiny_model(), do_sample=False)
    server.add_request([1, 9, 12, 7], max_new_tokens=9, **of_processor(failing(error)))
    with pytest.raises(type(error)):
        server.serve([[1, 9]])
    assert type(error).__name__ in server.get_result("req_0").error


def test_a_streamer_that_writes_into_what_it_is_given_changes_nothing(tiny_model):
    model, prompt = tiny_model(), REQUESTS[0]["input_ids"]
    stream = Stream(put=lambda tokens: tokens.fill_(10_000) if tokens.numel() == 1 else None)
    (result,) = model.generate_batch([arguments_of(REQUESTS[0]) | {"streamer": stream}]).values()
    assert_writes(result, alone(model, REQUESTS[0]))
    assert result.prompt_ids == prompt


def test_whoever_reads_a_stream_is_told_of_its_end_also_when_the_request_fails(tiny_model):
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "")
    server = MoTServer(tiny_model(), max_new_tokens=3)
    streams = [TextIteratorStreamer(tokenizer, timeout=5) for _ in range(3)]
    server.add_request([1, 99], streamer=streams[0])
    server.add_request([1, 9], "cancelled", streamer=streams[1])
    server.add_request([1, 9, 12, 7, 8], streamer=streams[2], **of_processor(failing(RuntimeError("no"))))
    server.cancel_request("cancelled")
    while server.step():
        pass
    for stream in streams:
        list(stream)  # raises queue.Empty where no end comes


# --------------------------------------------------------------------------------------------------- shared forwards


def guilty_forward(forward, is_guilty):
    """A forward that fails wherever a request takes part that is to blame, after all of it was done."""

    def run(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        if is_guilty(self, *args):
            raise RuntimeError("a poisonous forward")
        return result

    return run


def test_a_forward_over_tokens_that_fails_is_run_for_each_alone(tiny_model, monkeypatch):
    model = tiny_model()
    guilty = {"input_ids": [1, 20, 21, 22, 23, 24], "max_new_tokens": 9, "do_sample": False, "constrain_spans": False,
              "prefix_allowed_tokens_fn": lambda row, ids: [29]}  # fmt: skip
    expected = [alone(model, request | {"suppress_tokens": [29]}) for request in REQUESTS]
    monkeypatch.setattr(LeanDecoder, "step", guilty_forward(LeanDecoder.step, lambda self, tokens, *_: 29 in tokens))
    requests = [arguments_of(request | {"suppress_tokens": [29]}) for request in REQUESTS]
    results = list(model.generate_batch([*requests[:3], guilty, *requests[3:]]).values())
    assert_failed(results.pop(3), "RuntimeError: a poisonous forward")
    for result, tokens in zip(results, expected, strict=True):
        assert_writes(result, tokens)


SKETCH = {"num_inference_steps": 3, "max_new_tokens": 9, "eos_token_id": []}


def test_a_denoising_step_that_fails_is_run_for_each_alone(monkeypatch):
    model = painting_model()
    requests = [SKETCH | {"input_ids": [BOS, 10 + seed, BOI], "generator": seed} for seed in range(4)]
    requests[2]["num_inference_steps"] = 4  # and so has steps that the others do not have
    expected = [alone(model, request) for request in requests]

    def is_guilty(self, latents, timesteps, *_):
        return 749 in timesteps.tolist()

    monkeypatch.setattr(ImageForward, "predict", guilty_forward(ImageForward.predict, is_guilty))
    results = list(model.generate_batch([arguments_of(request) for request in requests]).values())
    assert_failed(results.pop(2), "a poisonous forward")
    for result, wanted in zip(results, [*expected[:2], expected[3]], strict=True):
        assert_drawn(result, wanted)


@pytest.mark.parametrize("fields", [{}, BAGEL], ids=["transfusion", "bagel"])
def test_a_forward_that_fails_to_put_pictures_into_the_cache_is_run_for_each_alone(monkeypatch, fields):
    model = painting_model(**fields)
    requests = [SKETCH | {"input_ids": [BOS, 10 + seed, BOI], "generator": seed} for seed in range(4)]
    expected = [alone(model, request) for request in requests]
    guilty = expected[2].latents[0][0]

    def is_guilty(self, latents, timestep, *_):
        return not isinstance(timestep, torch.Tensor) and any(torch.allclose(x, guilty, atol=1e-2) for x in latents)

    monkeypatch.setattr(ImageForward, "__call__", guilty_forward(ImageForward.__call__, is_guilty))
    results = list(model.generate_batch([arguments_of(request) for request in requests]).values())
    assert_failed(results[2], "a poisonous forward")
    torch.testing.assert_close(results[2].output.latents[0][0], guilty, rtol=0, atol=1e-3)  # as far as it came
    for number in (0, 1, 3):
        assert_drawn(results[number], expected[number])


def test_memory_that_runs_out_midway_ends_the_longest_request_alone(tiny_model, monkeypatch):
    model, reserve = tiny_model(), DecodingCache.reserve
    expected = alone(model, REQUESTS[0])

    def bounded(self, columns):
        if columns > 20:
            self.keys[0] = torch.cat([self.keys[0], torch.zeros_like(self.keys[0][:, :, :1])], dim=2)  # half done
            raise MemoryError("no room for more columns")
        reserve(self, columns)

    server = MoTServer(model, max_requests_per_batch=3, do_sample=False)
    monkeypatch.setattr(DecodingCache, "reserve", bounded)
    names = [server.add_request(request) for request in (REQUESTS[1] | {"max_new_tokens": 40}, REQUESTS[0])]
    while server.step():
        pass
    assert_failed(server.get_result(names[0]), "no room for more columns")
    assert_writes(server.get_result(names[1]), expected)
    monkeypatch.setattr(DecodingCache, "reserve", reserve)
    (result,) = server.serve([REQUESTS[1] | {"max_new_tokens": 60}]).values()
    assert_writes(result, alone(model, REQUESTS[1] | {"max_new_tokens": 60}))


def test_when_nothing_runs_any_more_all_are_told_before_the_failure_is(tiny_model, monkeypatch):
    model, calls, step = tiny_model(), [], LeanDecoder.step

    def breaks(self, *args):
        calls.append(args)
        if len(calls) > 3:
            raise RuntimeError("the device is gone")
        return step(self, *args)

    monkeypatch.setattr(LeanDecoder, "step", breaks)
    requests = [{"input_ids": [1, 9], "max_new_tokens": count, "do_sample": False} for count in (2, 9, 9, 9)]
    results = list(model.generate_batch(requests).values())
    assert results[0].error is None and len(results[0].generated_tokens) == 2
    for result in results[1:]:
        assert_failed(result, "the device is gone")
        assert len(result.generated_tokens) == 4  # as far as it came


def test_documents_name_no_files_and_addresses_unless_the_server_allows_it():
    model, seen = painting_model(), []

    def processor(**arguments):
        seen.append((arguments["allow_urls"], arguments["allow_paths"], threading.current_thread().name))
        return {"input_ids": torch.tensor([[BOS, 9]])}

    request = {"documents": [{"type": "text", "text": "a"}], "processor": processor, "max_new_tokens": 2}
    for allowed in ({}, {"allow_urls": True}, {"allow_paths": True}):
        (result,) = model.generate_batch([dict(request)], **allowed).values()
        assert result.error is None
        assert seen.pop()[:2] == (allowed.get("allow_urls", False), allowed.get("allow_paths", False))
    with pytest.raises(ValueError, match="allow_urls='yes'"):
        MoTServer(model, allow_urls="yes")


@pytest.mark.skipif("allow_paths" not in inspect.signature(MoTProcessor.__call__).parameters, reason="no permissions")
def test_a_picture_comes_from_a_file_only_where_the_server_allows_it(tmp_path):
    processor = build_continuous(image_size=[8, 8], downsampling=4)
    fields = {"vae_config": VAE, "caption_dropout": 0.1}
    model = tiny_transfusion(**(fields | processor.config_kwargs()))
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(tmp_path / "secret.png")
    requests = [
        {"documents": [{"type": "image", "image": source}], "processor": processor, "max_new_tokens": 3}
        for source in (picture, str(tmp_path / "secret.png"), "http://localhost:9/secret.png")
    ]
    inside, path, address = (r.error for r in model.generate_batch(requests, do_sample=False).values())
    assert inside is None and "allow_paths" in path and "allow_urls" in address
    results = list(model.generate_batch(requests[:2], do_sample=False, allow_paths=True).values())
    assert results[0].error is None and results[0].generated_tokens == results[1].generated_tokens
