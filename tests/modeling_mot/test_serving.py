"""Requests that are served together against the same requests one by one."""

import queue
import threading

import pytest
import torch
from transformers import ContinuousBatchingConfig, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from modeling_mot.decoding_lean import ForwardDecoder, LeanDecoder
from modeling_mot.serving_mot import MoTServer
from modeling_mot.serving_requests import RequestStatus

from .naive_transfusion import BOI, BOS, image
from .naive_transfusion import tiny_model as tiny_transfusion


# Of text, images and speech, of several lengths and settings; a seed stands for a generator of its own.
REQUESTS = [
    {"input_ids": [1, 9, 12, 7], "max_new_tokens": 9},
    {"input_ids": [1, 9, 3, 31, 40], "max_new_tokens": 17},
    {"input_ids": [1, 8, 5], "max_new_tokens": 14, "do_sample": True, "temperature": 2.0, "generator": 3},
    {"input_ids": [1, 9, 3], "max_new_tokens": 3, "image_grid": (1, 2)},
    {"input_ids": [0, 0, 1, 10, 11], "attention_mask": [0, 0, 1, 1, 1], "max_new_tokens": 12},
    {"input_ids": [1, 9, 10, 11, 12, 13, 14], "max_new_tokens": 1},
    {"input_ids": [1, 8, 5], "max_new_tokens": 14, "do_sample": True, "top_k": 5, "generator": 4},
    {"input_ids": [1, 9, 3, 31, 40], "max_new_tokens": 30, "eos_token_id": 4},
]


def arguments_of(request, **kwargs):
    request = {"do_sample": False} | kwargs | request
    if isinstance(request.get("generator"), int):
        request["generator"] = torch.Generator().manual_seed(request["generator"])
    return request


def alone(model, request, **kwargs):
    """What `generate()` makes of it."""
    request = arguments_of(request, **kwargs)
    rows = {name: torch.tensor([request.pop(name)]) for name in ("input_ids", "attention_mask") if name in request}
    return model.generate(**rows, **request)


def together(model, requests, limits=None, **kwargs):
    config = ContinuousBatchingConfig(**(limits or {}))
    return model.generate_batch(
        [arguments_of(request, **kwargs) for request in requests], continuous_batching_config=config
    )


def assert_served_as_alone(model, requests, **limits):
    results = together(model, requests, limits)
    assert list(results) == [f"req_{number}" for number in range(len(requests))]
    for request, result in zip(requests, results.values(), strict=True):
        assert result.error is None and result.status == RequestStatus.FINISHED
        assert result.prompt_ids == request["input_ids"]
        assert result.prompt_ids + result.generated_tokens == alone(model, request)[0].tolist()


@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize("variant", ["mot", "dense", "hybrid"])
def test_tokens_equal_those_of_each_request_alone(tiny_model, variant, at_once):
    assert_served_as_alone(tiny_model(variant), REQUESTS, max_requests_per_batch=at_once)


def test_a_model_that_is_run_by_its_forward_is_served_as_well(tiny_model):
    model = tiny_model()
    model.set_attn_implementation("eager")
    assert LeanDecoder.of(model) is None
    assert_served_as_alone(model, REQUESTS, max_requests_per_batch=3)


def test_in_bfloat16_tokens_are_the_likeliest_to_its_rounding(tiny_model):
    model, spans = tiny_model().bfloat16(), {"constrain_spans": False}
    requests = [request | spans for request in REQUESTS if "do_sample" not in request and "eos_token_id" not in request]
    for result in together(model, requests).values():
        tokens, first = torch.tensor([result.prompt_ids + result.generated_tokens]), len(result.prompt_ids)
        mask = (torch.arange(tokens.shape[1]) >= result.prompt_ids.count(0)).long()[None]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask, position_ids=positions).logits[0, first - 1 : -1].float()
        chosen = logits.gather(1, tokens[0, first:, None]).squeeze(1)
        assert (logits.amax(dim=1) - chosen).max() < 0.2


@pytest.mark.parametrize("decoder", [LeanDecoder, ForwardDecoder])
def test_text_steps_of_all_share_one_forward(tiny_model, monkeypatch, decoder):
    model, sizes, step = tiny_model(), [], decoder.step
    monkeypatch.setattr(decoder, "step", lambda self, *args: sizes.append(len(args[1])) or step(self, *args))
    if decoder is ForwardDecoder:
        model.set_attn_implementation("eager")
    together(model, [{"input_ids": [1, 9], "max_new_tokens": count} for count in (2, 5, 9)])
    assert sizes == [3] + 3 * [2] + 4 * [1]


# ------------------------------------------------------------------------------------------------------- pictures


DRAWINGS = [
    {"input_ids": [BOS, 10, 11, BOI], "generator": 1},
    {"input_ids": [BOS, 12], "max_new_tokens": 5},
    {"input_ids": [BOS, 12, 13, 14, 15, BOI], "generator": 2, "guidance_scale": 3.0, "num_inference_steps": 6},
    {"input_ids": [BOS, 10, 11, BOI], "generator": 5, "image_size": (2, 6)},
    {"input_ids": [BOS, *image(), 14, 15, BOI], "latents": 9, "generator": 3, "guidance_scale": 2.0},
    {"input_ids": [BOS, 16], "max_new_tokens": 13, "do_sample": True, "generator": 6, "guidance_scale": 1.5},
    {"input_ids": [BOS, 17, BOI], "generator": 7, "scheduler": "ddim", "num_inference_steps": 3},
    {"input_ids": [BOS, 18, BOI], "generator": 8, "generation_mode": "image", "negative_prompt_ids": [[BOS, 19]],
     "guidance_scale": 4.0},
    {"input_ids": [BOS, *image(), 14, 15, BOI], "latents": 9, "generator": 9, "guidance_scale": 3.0,
     "image_guidance_scale": 2.0, "guidance_renorm": "channel", "guidance_interval": (0.3, 0.8)},
    {"input_ids": [BOS, *image(), 14, BOI], "latents": 9, "generator": 10, "guidance_scale": 3.0,
     "image_guidance_scale": 1.5, "guidance_form": "sum", "num_inference_steps": 5},
]  # fmt: skip
BAGEL = {"image_positions": "shared", "markers_in_image_block": True, "prediction_type": "flow"}


def painting_model(**fields):
    model = tiny_transfusion(
        **({"noise_schedule": "scaled_linear", "initializer_range": 0.15, "caption_dropout": 0.1} | fields)
    )
    with torch.no_grad():
        model.lm_head.weight[BOI] *= 4  # which it likes to say
    return model


def drawings(**fields):
    made = [{"num_inference_steps": 4, "max_new_tokens": 14, "eos_token_id": []} | drawing for drawing in DRAWINGS]
    for drawing in made:
        if "latents" in drawing:
            generator = torch.Generator().manual_seed(drawing["latents"])
            drawing["latents"] = torch.randn(1, 2, 4, 4, generator=generator)
        if fields.get("prediction_type") == "flow":
            drawing.pop("scheduler", None)
    return made


@pytest.mark.parametrize("at_once", [3, 8])
@pytest.mark.parametrize("fields", [{}, BAGEL], ids=["transfusion", "bagel"])
def test_pictures_and_text_equal_those_of_each_request_alone(fields, at_once):
    model, requests = painting_model(**fields), drawings(**fields)
    results = together(model, requests, {"max_requests_per_batch": at_once})
    drawn = 0
    for request, result in zip(requests, results.values(), strict=True):
        expected = alone(model, request)
        assert result.error is None
        assert torch.equal(result.output.sequences, expected.sequences)
        assert len(result.output.latents[0]) == len(expected.latents[0])
        for latents, wanted in zip(result.output.latents[0], expected.latents[0]):
            torch.testing.assert_close(latents, wanted, rtol=0, atol=1e-4 * max(1, wanted.abs().max().item()))
            drawn += 1
    assert drawn > len(requests)  # some of them of the model's own accord


def test_denoising_steps_of_all_share_one_forward_each_from_its_own_timestep():
    model, rows, timesteps = painting_model(), [], []
    model.model.layers[0].register_forward_hook(lambda module, args, output: rows.append(tuple(args[2][0].shape[:2])))
    model.patchifier.time_encoder.register_forward_hook(lambda module, args, output: timesteps.append(args[0].tolist()))
    image_only = {"generation_mode": "image", "generator": 1, "eos_token_id": []}
    requests = [
        {"input_ids": [BOS, 10, BOI], "num_inference_steps": 2, **image_only},
        {"input_ids": [BOS, 11, 12, BOI], "num_inference_steps": 4, "guidance_scale": 2.0, **image_only},
    ]
    together(model, requests)
    prompts = [(1, 3), (1, 4), (1, 2), (1, 2)]  # the unconditional one once for each group that it is in
    assert [shape for shape in rows if shape not in prompts] == [(3, 4), (3, 4), (2, 4), (2, 4)]
    noisy = [steps for steps in timesteps if min(steps) > 0]  # prompts and pictures that are done are clean
    assert [len(steps) for steps in noisy] == [2, 2, 1, 1]
    assert len(set(noisy[1])) == 2


# ------------------------------------------------------------------------------------------ what is one request's own


class Faulty(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 4:
            raise RuntimeError("no more")
        return scores


BAD = [
    ({"input_ids": [1, 99]}, "vocab_size=60"),
    ({"input_ids": [1, 9], "num_beams": 2, "max_new_tokens": 2}, "beam_search"),
    ({"input_ids": [1, 9], "do_sample": True, "num_return_sequences": 2, "max_new_tokens": 2}, "2 sequences"),
    ({"input_ids": [1, 9], "colour": "red"}, "colour"),
    ({"input_ids": [1, 9], "cache_implementation": "static"}, "StaticCache"),
    ({"input_ids": [[1, 9], [1, 9]]}, "2 sequences"),
    ({"input_ids": [1, 9], "image_grid": (0, 3)}, "image_grid"),
    ({"input_ids": [1, 9], "max_new_tokens": 500}, "max_batch_tokens=60"),
    ({"input_ids": [1, 9, 7], "logits_processor": [Faulty()]}, "no more"),
]


def test_a_bad_request_has_an_error_and_the_others_are_served(tiny_model):
    model = tiny_model()
    requests = [request for bad, good in zip(BAD, [*REQUESTS, REQUESTS[0]]) for request in (bad[0], good)]
    results = list(together(model, requests, {"max_batch_tokens": 60}).values())
    for (_, message), result in zip(BAD, results[::2], strict=True):
        assert message in result.error and result.status == RequestStatus.FAILED
    assert len(results[-2].generated_tokens) == 2  # as far as it came
    for request, result in zip(REQUESTS, results[1::2]):
        assert result.prompt_ids + result.generated_tokens == alone(model, request)[0].tolist()


def test_a_callback_that_fails_ends_its_own_picture():
    model = painting_model()

    def fail(model, step, *_):
        if step == 1:
            raise RuntimeError("enough")

    requests = drawings()[:3]
    requests[0]["callback_on_step_end"] = fail
    first, *others = together(model, requests).values()
    assert "enough" in first.error and not first.output.latents[0]
    for request, result in zip(requests[1:], others):
        assert torch.equal(result.output.sequences, alone(model, request).sequences)


class Collect(BaseStreamer):
    def __init__(self, then=None):
        self.tokens, self.ended, self.then = [], False, then

    def put(self, value):
        self.tokens += value.flatten().tolist()
        if self.then is not None and len(self.tokens) == 6:
            self.then()

    def end(self):
        self.ended = True


def test_each_request_has_its_own_streamer(tiny_model):
    model, streamers = tiny_model(), [Collect() for _ in REQUESTS]
    requests = [request | {"streamer": streamer} for request, streamer in zip(REQUESTS, streamers)]
    results = together(model, requests, {"max_requests_per_batch": 3})
    for result, streamer in zip(results.values(), streamers):
        assert streamer.ended and streamer.tokens == result.prompt_ids + result.generated_tokens


def test_requests_are_cancelled_while_they_run_and_while_they_wait(tiny_model):
    model = tiny_model()
    server = MoTServer(model, max_requests_per_batch=2, do_sample=False)
    cancel = Collect(then=lambda: server.cancel_request("running"))
    server.add_request([1, 9], "running", max_new_tokens=30, streamer=cancel)
    server.add_request([1, 9, 12], "kept", max_new_tokens=9)
    server.add_request([1, 9, 12, 7], "waiting", max_new_tokens=9)
    server.cancel_request("waiting")
    server.cancel_request("unknown")
    while server.step():
        pass
    running, kept, waiting = (server.get_result(name) for name in ("running", "kept", "waiting"))
    assert running.error == waiting.error == "cancelled" and len(running.generated_tokens) == 4
    assert waiting.output is None
    assert kept.output[0].tolist() == alone(model, {"input_ids": [1, 9, 12], "max_new_tokens": 9})[0].tolist()


# --------------------------------------------------------------------------------------------------------- the queue


def test_no_more_tokens_run_at_once_than_are_allowed(tiny_model, monkeypatch):
    model, most, step = tiny_model(), [], LeanDecoder.step

    def watched(self, tokens, positions, cache):
        most.append(sum(positions) + len(positions))
        return step(self, tokens, positions, cache)

    monkeypatch.setattr(LeanDecoder, "step", watched)
    assert_served_as_alone(model, REQUESTS, max_batch_tokens=40)
    assert 30 < max(most) <= 40


def test_the_queue_is_bounded(tiny_model):
    server = MoTServer(tiny_model(), max_requests_per_batch=1, max_queue_size=1, max_new_tokens=3, do_sample=False)
    server.add_request([1, 9])
    with pytest.raises(queue.Full, match="max_queue_size"):
        server.add_request([1, 9], timeout=0.01)
    server.step()  # the first runs now
    server.add_request([1, 9])
    with pytest.raises(ValueError, match="req_0"):
        server.add_request([1, 9], "req_0")


def test_names_are_free_again_when_their_results_are_taken(tiny_model):
    server = MoTServer(tiny_model(), max_new_tokens=2, do_sample=False)
    assert [server.add_request([1, 9], name) for name in ("req_1", None, None)] == ["req_1", "req_0", "req_2"]
    while server.step():
        pass
    assert server.get_result("req_1").request_id == "req_1"
    with pytest.raises(KeyError, match="req_1"):
        server.get_result("req_1")
    assert server.add_request([1, 9], "req_1") == "req_1"


def test_requests_come_from_several_threads_while_others_run(tiny_model):
    model, results = tiny_model(), {}
    limits = {"max_requests_per_batch": 3, "max_queue_size": 2}
    with model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(**limits)) as server:

        def client(number):
            for turn, request in enumerate(REQUESTS[number::4]):
                name = server.add_request(arguments_of(request), f"{number}-{turn}")
                results[number + 4 * turn] = server.get_result(name)

        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(timeout=60)
    for number, request in enumerate(REQUESTS):
        assert results[number].prompt_ids + results[number].generated_tokens == alone(model, request)[0].tolist()


def test_a_forward_that_fails_ends_the_server_and_tells_all(tiny_model, monkeypatch):
    def fail(self, *args):
        raise MemoryError("too much")

    monkeypatch.setattr(LeanDecoder, "step", fail)
    with MoTServer(tiny_model(), max_requests_per_batch=1, max_new_tokens=3) as server:
        names = [server.add_request([1, 9])]
        assert "too much" in server.get_result(names[0], timeout=60).error
        with pytest.raises(RuntimeError, match="too much"):
            server.add_request([1, 9])


def test_transformers_paged_generation_is_served(tiny_model):
    model, prompt = tiny_model(), torch.tensor([[1, 9, 3]])
    out = model.generate(prompt, max_new_tokens=9, do_sample=False, cache_implementation="paged")
    assert out[0].tolist() == model.generate(prompt, max_new_tokens=9, do_sample=False).tolist()


@pytest.mark.parametrize("limit", ["max_requests_per_batch", "max_batch_tokens", "max_queue_size"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 2.5, True, "8"])
def test_limits_that_let_nothing_in_or_are_no_whole_numbers_are_refused(tiny_model, limit, value):
    if (limit, value) != ("max_queue_size", 0):  # which is no bound
        with pytest.raises(ValueError, match=limit):
            MoTServer(tiny_model(), **{limit: value})
