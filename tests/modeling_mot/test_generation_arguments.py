"""Numbers that are none: what generate() and the pipeline refuse, as requests of a server do."""

import math
import re

import numpy as np
import pytest
import torch

from modeling_mot.checks_fields import is_real, is_whole

from .naive_transfusion import BOI, BOS, image
from .naive_transfusion import tiny_model as tiny_transfusion


NAN, INFINITY = math.nan, math.inf
NO_WHOLE = [NAN, INFINITY, 2.5, True, "3", [1], -1, np.float32(2), np.bool_(True), torch.tensor(2.5)]
NO_REAL = [NAN, INFINITY, -INFINITY, True, "1.5", [1.0], 10**400, np.float64(NAN), 1j]


@pytest.mark.parametrize("value", NO_WHOLE, ids=repr)
def test_whole_numbers_are_no_others(value):
    assert not is_whole(value) and is_whole(1) and is_whole(np.int64(7)) and not is_whole(0) and is_whole(0, 0)


@pytest.mark.parametrize("value", NO_REAL, ids=lambda value: repr(value)[:20])
def test_real_numbers_are_finite(value):
    assert not is_real(value) and is_real(-3) and is_real(0.5) and is_real(np.float32(2))


def each(name, values):
    # Without addresses of objects, so that every process calls a test by the same name.
    return [pytest.param(name, value, id=re.sub(r" at 0x\w+", "", f"{name}={value!r}")[:40]) for value in values]


PROMPT = torch.tensor([[1, 9, 12, 7]])
OF_TOKENS = [
    *each("image_grid", [[NAN, 2], [2.5, 2], [True, True], [2], [2, 3, 4], "23", 4, [0, 2], {1: 2}, [INFINITY, 1]]),
    *each("max_speech_tokens", [value for value in NO_WHOLE if not isinstance(value, torch.Tensor)]),
    *each("max_new_tokens", [NAN, 2.5, True, INFINITY, "5", -1]),
    *each("max_length", [NAN, 7.5, INFINITY]),
    *each("min_new_tokens", [NAN, 0.5]),
    *each("num_return_sequences", [NAN, 1.5]),
    *each("constrain_spans", ["no", 0, 1.0]),
    *each("guidance_scale", [*NO_REAL, 1e308]),
    *each("temperature", [*NO_REAL, 1e308, 1e-320]),
    *each("logits_processor", [3, "x", {}, [3]]),
    *each("stopping_criteria", [3, [None]]),
    *each("generation_config", [{}, 3]),
    *each("top_p", ["1", NAN, 2]),
    *each("num_beams", [NAN, 0]),
    *each("generator", [7, "seed", [None, torch.Generator()], np.random.default_rng()]),
    *each("negative_prompt_ids", [[60], [-1], [[1], [2], [3]], [], "text", [1.0], [True], 5, [[[1]]], None]),
    *each("streamer", [5, {}]),
]


@pytest.mark.parametrize(("name", "value"), OF_TOKENS)
def test_tokens_are_made_by_arguments_that_mean_something(tiny_model, name, value):
    kwargs = {"max_new_tokens": 5} if not name.startswith("max_") else {}
    if name == "negative_prompt_ids":
        kwargs |= {"guidance_scale": 2.0, "negative_prompt_attention_mask": [1]}
    with pytest.raises(ValueError, match=name):
        tiny_model().generate(PROMPT, **({"do_sample": False} | kwargs | {name: value}))


def test_a_grid_is_checked_before_a_picture_is_begun(tiny_model):
    for grid in ([NAN, 2], "ab"):
        with pytest.raises(ValueError, match="image_grid"):
            tiny_model().generate(PROMPT, generation_mode="image", image_grid=grid)


@pytest.mark.parametrize("field", ["image_grid", "max_speech_tokens"])
def test_a_configuration_has_no_such_numbers_either(tiny_config, field):
    with pytest.raises(Exception, match=field):
        tiny_config(**{field: [2.5, 2] if field == "image_grid" else 2.5})


DRAW = torch.tensor([[BOS, 10, BOI]])
OF_PICTURES = [
    *each("guidance_scale", [*NO_REAL, -1, 1e308]),
    *each("image_guidance_scale", [*NO_REAL, -1, 1e308]),
    *each("guidance_form", ["product", 5, ["sum"]]),
    *each("guidance_renorm", ["norm", 5, True, ["global"]]),
    *each("guidance_renorm_min", [*NO_REAL, -1, 1.5]),
    *each("guidance_interval", [NAN, 0.5, "ab", [0.4], [0, 2], [0.8, 0.4], [0.4, NAN], [True, False], {0: 1}]),
    *each("time_spacing", ["linear", 5, ["steps"], "steps"]),
    *each("timestep_shift", [*NO_REAL, 0, -1, 3.0]),
    *each("latent_bound", [NAN, -INFINITY, 0, -1, True, "6", [6.0], 1e308]),
    *each("num_inference_steps", [*NO_WHOLE, 1001]),
    *each("intermediate_every", NO_WHOLE),
    *each("image_size", [NAN, 2.0, True, "ab", [4, NAN], [4.0, 4], [True, True], [4, 4, 4], [-4, 4], 0, {4: 4}]),
    *each("scheduler", [5, ["ddim"], None.__class__]),
    *each("scheduler_kwargs", ["x", 5, {"solver_order": 10**9}, {"num_train_timesteps": 10**12}, {"beta_end": NAN}]),
    *each("output_type", ["np", 5, [], torch.ones(3)]),
    *each("callback_on_step_end", [5, "print"]),
    *each("progress_bar", ["yes", 1]),
    *each("generator", [7, "seed", [None]]),
    *each("negative_prompt_ids", [[60], [[1]] * 3, [], "text", [BOS, *image()], [1.0], [True], np.ones((1, 2))]),
]  # fmt: skip


@pytest.fixture(scope="module")
def painter():
    torch.manual_seed(0)
    return tiny_transfusion(caption_dropout=0.1)


@pytest.mark.parametrize(("name", "value"), OF_PICTURES)
def test_pictures_are_made_by_arguments_that_mean_something(painter, name, value):
    kwargs = {"num_inference_steps": 2, "max_new_tokens": 5} | {name: value}
    with pytest.raises(ValueError, match=name):
        painter.generate(DRAW, **kwargs)


def test_numbers_of_numpy_and_no_bound_are_taken_as_before(painter):
    def draw(**kwargs):
        return painter.generate(DRAW, generator=torch.Generator().manual_seed(0), **kwargs).latents[0][0]

    plain = draw(num_inference_steps=3, max_new_tokens=5, guidance_scale=2.0, image_size=[4, 4], latent_bound=INFINITY)
    numpy = draw(num_inference_steps=np.int64(3), max_new_tokens=np.int32(5), guidance_scale=np.float32(2),
                 image_size=np.int64(4), latent_bound=np.float64(INFINITY))  # fmt: skip
    assert torch.equal(plain, numpy)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_negative_prompts_come_in_any_form(painter, form):
    def draw(ids, **kwargs):
        kwargs |= {"num_inference_steps": 2, "max_new_tokens": 5, "guidance_scale": 3.0, "negative_prompt_ids": ids}
        return painter.generate(DRAW, generator=torch.Generator().manual_seed(0), **kwargs).latents[0][0]

    expected = draw(torch.tensor([[BOS, 20]]))
    assert torch.equal(draw(form([BOS, 20])), expected)
    padded = draw([[0, BOS, 20]], negative_prompt_attention_mask=form([False, True, True]))
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-4)


def test_latents_that_are_not_finite_are_no_picture(painter):
    latents = torch.full((1, 2, 4, 4), NAN)
    prompt = torch.tensor([[BOS, *image(), BOI]])
    with pytest.raises(ValueError, match="latents are not finite after 2 steps"):
        painter.generate(prompt, latents=latents, num_inference_steps=2, max_new_tokens=5)
