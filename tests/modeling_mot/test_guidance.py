"""Guidance of pictures against recorded velocities of BAGEL's own code, and against recomputing every context.

`tests/conversion/fixtures/bagel/e_sample_*.safetensors` hold what BAGEL's code gave for a tiny random checkpoint: the
velocity of each context at each step, the guided velocity, and the latents after each step.
"""

from types import SimpleNamespace

import pytest
import torch

from modeling_mot.decoding_pictures import Denoising, DiffusionSettings, contexts_of, guided, kept_tokens
from modeling_mot.latent_images import NoiseSchedule
from modeling_mot.modeling_mot_transfusion import join_patches
from tests.conversion.bagel_sources import CASES, EDIT_CASES, drawing_arguments, numbers

from .naive_transfusion import BOI, BOS, EOS, image, tiny_config, tiny_model
from .naive_transfusion_generation import NaiveGeneration
from .test_transfusion_generation import BAGEL, pictures, seeded


# --------------------------------------------------------------------------------------------- recorded by BAGEL's code


@pytest.fixture(scope="module")
def recorded():
    return {kind: numbers(f"e_sample_{kind}") for kind in ("text", "edit")}


def as_latents(tensors, patches):
    """The patches of a recording: (N, n, 64) -> (N, 16, h, w)"""
    height, width = (2 * side for side in tensors["grid"].tolist())
    return join_patches(patches, 2, height, width)


def behind_contexts(tensors, name, settings, has_images):
    """The velocities that `guided` takes: (4, 16, h, w) each."""
    names = {"without_text": "v_no_text", "without_images": "v_no_img"}
    keys = ["v_full"] + [names[context] for context in contexts_of(settings, has_images)]
    return [as_latents(tensors, tensors[f"{name}.{key}"]) for key in keys]


@pytest.mark.parametrize(("kind", "name", "case"), CASES, ids=[f"{kind}-{name}" for kind, name, _ in CASES])
def test_four_steps_are_bagels(recorded, kind, name, case):
    """Times, the steps that are guided, guided velocities and latents, from the recorded velocities of each context."""
    tensors, settings = recorded[kind], DiffusionSettings(**drawing_arguments(case))
    latents = as_latents(tensors, tensors[f"{name}.latents"])
    config = tiny_config(prediction_type="flow", latent_channels=16, latent_size=list(latents.shape[-2:]))
    settings.validate(config)
    model = SimpleNamespace(config=config, device=torch.device("cpu"), noise_schedule=NoiseSchedule(config))
    size = tuple(latents.shape[-2:])
    drawing = Denoising(model, settings, [None], [0], has_images=kind == "edit", size=size)
    drawing.latents = latents[:1]
    torch.testing.assert_close(torch.tensor(drawing.shares), tensors["times"][:4], rtol=0, atol=1e-7)

    forwards = []
    is_whole = len(set(case[-1])) == 1  # velocities of contexts are recorded where all steps are alike
    for step in range(4):
        forwards.append(1 + len(drawing.contexts) * drawing.is_guided)
        if drawing.is_guided and is_whole:
            behind = behind_contexts(tensors, name, settings, has_images=kind == "edit")
            velocities = [velocity[step : step + 1] for velocity in behind]
        else:
            velocities = [as_latents(tensors, tensors[f"{name}.velocity"])[step : step + 1]]
            if not drawing.is_guided:
                whole = as_latents(tensors, tensors[f"{name}.v_full"])[step : step + 1]
                torch.testing.assert_close(velocities[0], whole, rtol=0, atol=1e-6)
        drawing.advance(drawing.noisy(), *velocities)
        torch.testing.assert_close(drawing.latents[0], latents[step + 1], rtol=0, atol=2e-6)
    assert forwards == case[-1]


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_norms_are_those_of_each_sample(recorded, renorm):
    """Four recorded steps as four samples of a batch, each of another size: the original would mix them in "global"."""
    name, sizes = f"s4_i2_{renorm}", torch.tensor([1.0, 100.0, 0.01, 7.0]).view(-1, 1, 1, 1)
    tensors, settings = recorded["edit"], DiffusionSettings(**drawing_arguments(EDIT_CASES[name]))
    velocities = [sizes * velocity for velocity in behind_contexts(tensors, name, settings, has_images=True)]
    expected = as_latents(tensors, tensors[f"{name}.velocity"])
    torch.testing.assert_close(guided(settings, 2, *velocities) / sizes, expected, rtol=0, atol=2e-6)


def test_the_sum_is_that_of_instruct_pix2pix():
    """Equation 3 of arXiv 2211.09800, number by number; without a second context both forms are one."""
    whole, without_text, nothing = torch.randn(3, 2, 2, 4, 4)
    settings = DiffusionSettings(guidance_scale=7.5, image_guidance_scale=1.5, guidance_form="sum")
    assert contexts_of(settings, True) == ("without_text", "unconditional")
    ours = guided(settings, 2, whole, without_text, nothing)
    for place in torch.cartesian_prod(*map(torch.arange, whole.shape)).tolist():
        v, of_images, of_nothing = (float(part[tuple(place)]) for part in (whole, without_text, nothing))
        expected = of_nothing + 1.5 * (of_images - of_nothing) + 7.5 * (v - of_images)
        assert float(ours[tuple(place)]) == pytest.approx(expected, abs=1e-4)
    nested = DiffusionSettings(guidance_scale=7.5, image_guidance_scale=1.0)
    assert contexts_of(nested, True) == contexts_of(settings, False) == ("without_text",)
    assert torch.equal(guided(nested, 2, whole, without_text), guided(settings, 2, whole, without_text))


# ----------------------------------------------------------------------------------------------------------- contexts


# A prompt, without its last text, and its texts. EOS ends a text within a prompt, as in BAGEL.
PARTS = [
    ([BOS, 10, 11], [BOS], [BOS, 10, 11]),
    ([BOS, *image(), 10, 11], [BOS, *image()], [BOS, 10, 11]),
    ([BOS, 10, *image()], [BOS, *image()], [BOS, 10]),
    ([BOS, 10, *image(), 11, *image(), 12, 13], [BOS, 10, *image(), 11, *image()], [BOS, 10, 11, 12, 13]),
    ([BOS, *image(), *image()], [BOS, *image(), *image()], [BOS]),
    ([20, 21, EOS, *image(), 20, 10, EOS, 20, 11, EOS], [20, 21, EOS, *image(), 20, 10, EOS],
     [20, 21, EOS, 20, 10, EOS, 20, 11, EOS]),
]  # fmt: skip


@pytest.mark.parametrize("is_drawn", [False, True])
def test_contexts_keep_what_they_are_named_for(is_drawn):
    config, end = tiny_config(), [BOI] if is_drawn else []
    prompts = [prompt + end for prompt, _, _ in PARTS]
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = (ids > 0).long()
    for row, parts in enumerate(PARTS):
        for context, expected in zip(("without_text", "without_images"), parts[1:]):
            assert ids[row, kept_tokens(config, context, ids, mask)[row]].tolist() == expected


# ------------------------------------------------------------------------------------------------ recomputed contexts


class NaiveGuidance(NaiveGeneration):
    """Each context a row of its own, computed anew at every step, and the formulas patch by patch.

    Args:
        contexts: tokens and images of the contexts of each formula: "without_text", "without_images", "unconditional".
        settings: of `generate()`.
    """

    def __init__(self, model, contexts, settings, **kwargs):
        super().__init__(model, **kwargs)
        self.contexts, self.settings = contexts, settings

    def draw(self, *args):
        # The times that `generate()` is to have: shares of noise before each step.
        self.step = 0
        return super().draw(*args)

    def guided(self, tokens, images, noisy, timestep):
        def behind(name):
            tokens, images = self.contexts[name]
            return self.denoised([*tokens, BOI], [(one, 0) for one in images], noisy, timestep)

        get = self.settings.get
        scale, images_scale, renorm = get("guidance_scale"), get("image_guidance_scale"), get("guidance_renorm", "none")
        low, high = get("guidance_interval", (0, 1))
        whole = self.denoised(tokens, images, noisy, timestep)
        share = float(timestep) / 1000 if self.config.is_flow else (float(timestep) + 1) / 1000
        if not low < share <= high:
            return whole
        free, second = behind("without_text"), None
        if images_scale != 1 and self.contexts["without_text"][1]:
            second = behind("without_images" if get("guidance_form", "nested") == "nested" else "unconditional")
        result = free + scale * (whole - free)
        if renorm == "text_channel":
            result = self.shrunk(result, whole, by_patch=True)
        if second is not None and get("guidance_form", "nested") == "nested":
            result = second + images_scale * (result - second)
        elif second is not None:
            result = second + images_scale * (free - second) + scale * (whole - free)
        if renorm in ("global", "channel"):
            result = self.shrunk(result, whole, by_patch=renorm == "channel")
        return result

    def shrunk(self, result, whole, by_patch):
        size = self.config.patch_size if by_patch else max(result.shape)
        made, least = result.clone(), self.settings.get("guidance_renorm_min", 0)
        for top in range(0, result.shape[1], size):
            for left in range(0, result.shape[2], size):
                place = slice(None), slice(top, top + size), slice(left, left + size)
                made[place] *= min(1, max(least, whole[place].norm() / (result[place].norm() + 1e-8)))
        return made


A, B = pictures(2)
EDIT = ([BOS, *image(), 14, 15, BOI], [A])
EDIT_CONTEXTS = {
    "without_text": ([BOS, *image()], [A]), "without_images": ([BOS, 14, 15], []), "unconditional": ([BOS], []),
}  # fmt: skip
AGAIN = ([BOS, *image(), 12, *image(), 14, BOI], [A, B])
AGAIN_CONTEXTS = {
    "without_text": ([BOS, *image(), 12, *image()], [A, B]), "without_images": ([BOS, 12, 14], []),
    "unconditional": ([BOS], []),
}  # fmt: skip
DRAW = ([BOS, 10, 11, BOI], [])
DRAW_CONTEXTS = {"without_text": ([BOS], [])}
ARGUMENTS = {"max_new_tokens": 5, "num_inference_steps": 4, "do_sample": False}


def model_of(**fields):
    shared = {"noise_schedule": "scaled_linear", "initializer_range": 0.15, "caption_dropout": 0.1}
    return tiny_model(**(shared | fields))


def inputs_of(*prompts):
    """Prompts, padded on the left, with their images."""
    length = max(len(tokens) for tokens, _ in prompts)
    ids = torch.tensor([[0] * (length - len(tokens)) + tokens for tokens, _ in prompts])
    images = [image for _, images in prompts for image in images]
    return {"input_ids": ids, "attention_mask": (ids > 0).long()} | ({"latents": torch.stack(images)} if images else {})


def assert_draws(model, prompts, contexts, settings):
    """Each row of a batch is what recomputing its contexts gives, to 1e-4 of its size."""
    generators = [seeded(row) for row in range(len(prompts))]
    output = model.generate(**inputs_of(*prompts), **ARGUMENTS, **settings, generator=generators)
    for row, ((tokens, images), own) in enumerate(zip(prompts, contexts)):
        naive = NaiveGuidance(model, own, settings)
        _, (expected,) = naive(tokens, images, 5, seeded(row))
        (drawn,) = output.latents[row]
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("fields", [{}, {"prediction_type": "flow"}, BAGEL], ids=["transfusion", "flow", "bagel"])
@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 3.0, "image_guidance_scale": 1.0},
        {"guidance_scale": 3.0, "image_guidance_scale": 2.0},
        {"guidance_scale": 3.0, "image_guidance_scale": 1.5, "guidance_form": "sum"},
        {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "guidance_renorm": "global"},
        {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "guidance_renorm": "channel", "guidance_renorm_min": 0.7},
        {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "guidance_renorm": "text_channel"},
        {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "guidance_form": "sum", "guidance_renorm": "channel"},
        {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "guidance_interval": [0.3, 0.9]},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_guidance_equals_recompute(fields, settings):
    """Rows with one, two and no pictures in their prompts, in one call."""
    prompts, contexts = [EDIT, DRAW, AGAIN], [EDIT_CONTEXTS, DRAW_CONTEXTS, AGAIN_CONTEXTS]
    assert_draws(model_of(**fields), prompts, contexts, settings)


def test_a_context_may_be_empty():
    """Without BOS, and BOI in the image's block, nothing stands before the picture (BAGEL)."""
    prompt = ([10, 11, BOI], [])
    model = model_of(**BAGEL, bos_token_id=None)
    for settings in ({"image_guidance_scale": 1.0}, {}):
        assert_draws(model, [prompt], [{"without_text": ([], [])}], {"guidance_scale": 3.0} | settings)


def test_contexts_of_a_batch_may_differ_in_length_and_one_may_be_empty():
    """What a row does not keep is padding: no placeholder stays in it, and a row of padding alone is no prefix."""
    edit = ([*image(), 14, 15, 12, 13, BOI], [A])
    contexts = [{"without_text": ([], [])}, {"without_text": (image(), [A]), "without_images": ([14, 15, 12, 13], [])}]
    more = ([*image(), 14, BOI], [B]), {"without_text": (image(), [B]), "without_images": ([14], [])}
    prompts, contexts = [([10, 11, BOI], []), edit, more[0]], [*contexts, more[1]]
    settings = {"guidance_scale": 3.0, "image_guidance_scale": 2.0}
    assert_draws(model_of(**BAGEL, bos_token_id=None), prompts, contexts, settings)


def test_image_guidance_alone_is_of_the_sum():
    model, prompts, contexts = model_of(prediction_type="flow"), [EDIT], [EDIT_CONTEXTS]
    settings = {"guidance_scale": 1.0, "image_guidance_scale": 2.0}
    assert_draws(model, prompts, contexts, settings | {"guidance_form": "sum"})
    drawn = [
        model.generate(**inputs_of(EDIT), **ARGUMENTS, generator=[seeded()], **given).latents[0][0]
        for given in (settings, {})
    ]
    assert torch.equal(*drawn)


def test_by_default_pictures_are_led_away_from_nothing_at_all():
    """As before there was guidance by images: neither text nor pictures."""
    contexts = {"without_text": ([BOS], [])}
    naive = NaiveGuidance(model := model_of(), contexts, {"guidance_scale": 3.0, "image_guidance_scale": None})
    _, (expected,) = naive(*EDIT, 5, seeded())
    output = model.generate(**inputs_of(EDIT), **ARGUMENTS, guidance_scale=3.0, generator=[seeded()])
    torch.testing.assert_close(output.latents[0][0], expected, rtol=0, atol=1e-4 * max(1, expected.abs().max().item()))


def test_several_sequences_of_a_prompt_share_its_contexts():
    settings = {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "num_return_sequences": 2}
    model = model_of(prediction_type="flow")
    generators = [seeded(row) for row in range(4)]
    output = model.generate(
        **inputs_of(EDIT, DRAW), **(ARGUMENTS | {"do_sample": True}), **settings, generator=generators
    )
    for row, (prompt, contexts) in enumerate([(EDIT, EDIT_CONTEXTS)] * 2 + [(DRAW, DRAW_CONTEXTS)] * 2):
        _, (expected,) = NaiveGuidance(model, contexts, settings)(*prompt, 5, seeded(row))
        torch.testing.assert_close(output.latents[row][0], expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- work


def test_contexts_run_once_and_share_a_batch_at_the_steps_that_are_guided():
    model, shapes = model_of(**BAGEL), []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[2][0].shape[:2]))  # of the rotary embedding: (B, L)
    )
    model.generate(
        **inputs_of(EDIT), generation_mode="image", num_inference_steps=5, time_spacing="points", timestep_shift=3.0,
        guidance_scale=4.0, image_guidance_scale=2.0, guidance_interval=[0.825, 1.0],
    )  # fmt: skip
    handle.remove()
    prompt, without_text, without_images = (1, 10), (1, 8), (1, 4)
    assert shapes == [prompt, without_text, without_images, (3, 6), (3, 6), (1, 6), (1, 6)]


@pytest.mark.parametrize(("images_scale", "groups"), [(None, 1), (1.0, 1), (2.0, 2)])
def test_sequences_are_drawn_together_if_their_contexts_are_alike(images_scale, groups):
    model, rows = model_of(prediction_type="flow"), []
    model.generate(
        **inputs_of(EDIT, DRAW, AGAIN), **ARGUMENTS, guidance_scale=3.0, image_guidance_scale=images_scale,
        callback_on_step_end=lambda model, step, t, state: rows.append(state["rows"]),
    )  # fmt: skip
    assert rows[::4] == ([[0, 1, 2]] if groups == 1 else [[0, 2], [1]])


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_guidance_scale": -1.0}, "image_guidance_scale=-1.0 must be in"),
        ({"image_guidance_scale": float("nan")}, "image_guidance_scale=nan must be in"),
        ({"guidance_form": "product"}, "guidance_form='product' is not one of nested, sum"),
        ({"guidance_renorm": "chanel"}, "did you mean 'channel'"),
        ({"guidance_renorm_min": 1.5}, "guidance_renorm_min=1.5"),
        ({"guidance_interval": [0.4]}, "guidance_interval=\\[0.4\\] must be a list of 2"),
        ({"guidance_interval": [0.8, 0.4]}, "must be \\[low, high\\] with low < high"),
        ({"guidance_renorm": "text_channel", "guidance_form": "sum"}, "take 'global' or 'channel'"),
        ({"image_guidance_scale": 2.0, "negative_prompt_ids": [1]}, "negative_prompt_ids came with image_guidance"),
        ({"timestep_shift": 0.0}, "timestep_shift=0.0 must be in"),
        ({"timestep_shift": 3.0}, "timestep_shift=3.0 shifts the times of flow matching"),
        ({"time_spacing": "linear"}, "time_spacing='linear' is not one of"),
        ({"time_spacing": "steps"}, "time_spacing='steps' needs a scheduler of flow matching"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        model_of().generate(torch.tensor([DRAW[0]]), **ARGUMENTS, **settings)
