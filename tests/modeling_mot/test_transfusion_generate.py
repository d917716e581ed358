"""What generate() of a Transfusion model takes, gives, counts and refuses."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from modeling_mot.decoding_lean import Prefix
from modeling_mot.decoding_pictures import ImageForward, ScratchLayer
from modeling_mot.latent_vae import decode_latents

from .naive_transfusion import BOI, BOS, EOI, EOS, PATCH, VAE, image, tiny_model


DRAW, WRITE = torch.tensor([[BOS, 10, BOI]]), torch.tensor([[BOS, 10, 11]])
BOTH = torch.tensor([[0, BOS, 10, BOI], [BOS, 10, 11, 12]])


def model_of(variant="mot", **fields):
    return tiny_model(
        variant, **({"noise_schedule": "linear", "initializer_range": 0.2, "caption_dropout": 0.1} | fields)
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return model_of()


@pytest.fixture(scope="module")
def painter():
    """A model with a VAE: 8 x 8 pixels are 4 x 4 latents, four patches."""
    torch.manual_seed(0)
    return model_of(vae_config=VAE)


def generate(model, prompt, **kwargs):
    defaults = {"num_inference_steps": 3, "do_sample": False, "generator": torch.Generator().manual_seed(0)}
    return model.generate(prompt, **(defaults | kwargs))


def new_tokens(output, prompt, row=0):
    return output.sequences[row].tolist()[prompt.shape[1] :]


# ------------------------------------------------------------------------------------------------- budgets and stops


@pytest.mark.parametrize("budget", [5, 6, 9])
def test_a_picture_counts_as_its_patches_and_eoi(model, budget):
    tokens = new_tokens(generate(model, DRAW, max_new_tokens=budget, eos_token_id=[]), DRAW)
    assert tokens[:5] == [PATCH] * 4 + [EOI] and len(tokens) == budget


def test_by_default_there_is_room_for_a_picture_and_twenty_tokens(model):
    assert len(new_tokens(generate(model, DRAW, eos_token_id=[]), DRAW)) == 25
    assert len(new_tokens(generate(model, DRAW, eos_token_id=[], image_size=[4, 8]), DRAW)) == 29
    assert len(new_tokens(generate(model, DRAW, eos_token_id=[], max_length=12), DRAW)) == 9


@pytest.mark.parametrize("budget", [5, 6, 7])
def test_boi_is_sampled_only_where_a_picture_has_room(model, budget):
    tokens = new_tokens(generate(model, WRITE, max_new_tokens=budget, sequence_bias={(BOI,): 100.0}), WRITE)
    assert len(tokens) == budget and (BOI in tokens) == (budget >= 6)
    assert tokens.count(PATCH) == 4 * tokens.count(BOI)


@pytest.mark.parametrize("budget", [2, 3, 9])
def test_speech_begins_only_where_it_fits(budget):
    speaker = tiny_model(modalities=["text", "image", "speech"], noise_schedule="linear")
    bias = {(6,): 100.0, (7,): -100.0, (BOI,): -100.0}
    tokens = new_tokens(generate(speaker, WRITE, max_new_tokens=budget, sequence_bias=bias, eos_token_id=[]), WRITE)
    assert len(tokens) == budget and tokens.count(6) == tokens.count(7) and (6 in tokens) == (budget >= 3)


def test_placeholders_and_eoi_are_never_sampled(model):
    tokens = new_tokens(generate(model, WRITE, max_new_tokens=5, sequence_bias={(PATCH,): 100.0, (EOI,): 100.0}), WRITE)
    assert PATCH not in tokens and EOI not in tokens


@pytest.mark.parametrize("modalities", [("text", "image"), ("text", "image", "speech")], ids=["no ranges", "ranges"])
@pytest.mark.parametrize("way", ["greedy", "sampling", "server"])
def test_ids_of_no_token_are_never_sampled(modalities, way):
    model = model_of(modalities=modalities, vocab_size=80, tokenizer_vocab_size=60)
    with torch.no_grad():
        model.lm_head.weight[60:] *= 30

    def sampled():
        settings = {"do_sample": way == "sampling", "max_new_tokens": 12, "num_inference_steps": 2, "top_k": 0}
        if way == "server":
            return model.generate_batch([WRITE[0].tolist()], **settings)["req_0"].generated_tokens
        return new_tokens(generate(model, WRITE, **settings), WRITE)

    assert max(sampled()) < 60
    model.config.tokenizer_vocab_size = None
    assert max(sampled()) >= 60


def test_eos_ends_a_sequence_and_padding_follows(model):
    prompt = BOTH[:, :3]
    output = generate(
        model, prompt, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), max_new_tokens=8,
        prefix_allowed_tokens_fn=lambda row, ids: [EOS] if row == 0 else [20 + row],
    )  # fmt: skip
    assert output.sequences[:, 3:].tolist() == [[EOS] + [0] * 7, [21] * 8]


def test_eoi_may_be_what_ends_a_sequence(model):
    assert new_tokens(generate(model, DRAW, eos_token_id=EOI), DRAW) == [PATCH] * 4 + [EOI]


def test_stopping_criteria_see_each_sequence_by_itself(model):
    """One draws and so has five tokens more than the other; each stops at a length of nine."""
    criteria = StoppingCriteriaList([MaxLengthCriteria(9)])
    output = generate(
        model, BOTH, attention_mask=(BOTH > 0).long(), eos_token_id=[], max_new_tokens=30, stopping_criteria=criteria
    )
    assert output.sequences.shape[1] == 9 and PATCH in output.sequences[0]
    assert (output.sequences[1] > 0).all()


def test_prefix_functions_know_the_number_of_the_sequence(model):
    """Also when sequences differ in length because one draws."""
    output = generate(
        model, BOTH, attention_mask=(BOTH > 0).long(), max_new_tokens=8,
        prefix_allowed_tokens_fn=lambda row, ids: [30 + row],
    )  # fmt: skip
    assert new_tokens(output, BOTH, 0) == [PATCH] * 4 + [EOI] + [30] * 3
    assert new_tokens(output, BOTH, 1) == [31] * 8


def test_image_mode_draws_one_picture_each_and_nothing_more(model):
    prompt = torch.tensor([[0, BOS, 10], [BOS, 11, 12]])
    for budget in ({}, {"max_new_tokens": 2}, {"max_new_tokens": 256}):
        output = generate(model, prompt, attention_mask=(prompt > 0).long(), generation_mode="image", **budget)
        assert output.sequences[:, 3:].tolist() == [[BOI, *[PATCH] * 4, EOI]] * 2
        assert [len(drawn) for drawn in output.latents] == [1, 1]
    same = generate(model, torch.nn.functional.pad(prompt, (0, 1), value=BOI), generation_mode="image")
    by_object = generate(model, prompt, generation_config=GenerationConfig(generation_mode="image"))
    assert torch.equal(same.latents[0][0], output.latents[0][0]) and by_object.sequences.equal(same.sequences)


def test_text_mode_draws_nothing(model):
    output = generate(model, WRITE, generation_mode="text", max_new_tokens=20, sequence_bias={(BOI,): 100.0})
    assert output.latents == [[]] and not torch.isin(output.sequences, torch.tensor([BOI, PATCH])).any()


# ---------------------------------------------------------------------------------------------------------- outputs


def test_outputs_of_every_type(painter):
    drawn = {kind: generate(painter, DRAW, output_type=kind, max_new_tokens=5) for kind in ("pil", "pt", "latent")}
    (latents,), ((picture,),) = drawn["pt"].latents, drawn["pt"].images
    expected = (decode_latents(painter.vae, latents[0][None])[0] + 1) / 2
    assert torch.equal(picture, expected) and picture.shape == (3, 8, 8) and 0 <= picture.min() <= picture.max() <= 1
    ((pil,),) = drawn["pil"].images
    assert pil.size == (8, 8) and pil.mode == "RGB"
    assert np.abs(np.asarray(pil) / 255 - expected.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    assert drawn["latent"].images is None
    for output in drawn.values():
        assert torch.equal(output.latents[0][0], latents[0]) and latents[0].shape == (2, 4, 4)


def test_sizes_are_in_pixels_and_need_not_be_square(painter):
    output = generate(painter, DRAW, image_size=[4, 12], output_type="pil", max_new_tokens=4)
    assert output.latents[0][0].shape == (2, 2, 6) and output.images[0][0].size == (12, 4)
    assert generate(painter, DRAW, image_size=4, max_new_tokens=2).images[0][0].size == (4, 4)


def test_without_a_vae_there_are_latents_alone(model):
    output = generate(model, DRAW, max_new_tokens=5, intermediate_every=1)
    assert output.images is None and output.latents[0][0].shape == (2, 4, 4)
    assert [along.shape for along in output.intermediates[0][0]] == [(2, 4, 4)] * 3


def test_sequences_without_a_picture_have_an_empty_list(painter):
    output = generate(painter, BOTH, attention_mask=(BOTH > 0).long(), max_new_tokens=5)
    assert [len(own) for own in output.images] == [len(own) for own in output.latents] == [1, 0]


def test_pictures_of_a_prompt_may_be_pixels(painter):
    pixels, prompt = torch.rand(1, 3, 8, 8) * 2 - 1, torch.tensor([[BOS, *image(), 10, BOI]])
    latents, _ = painter.encode_images(pixels)
    ours = generate(painter, prompt, pixel_values=pixels, max_new_tokens=5)
    assert torch.equal(ours.latents[0][0], generate(painter, prompt, latents=latents, max_new_tokens=5).latents[0][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_draw(dtype):
    for fields in ({"patchifier": "unet"}, {"latent_position_table": "sincos", "markers_in_image_block": True}):
        painter = model_of(vae_config=VAE, initializer_range=0.02, **fields).to(dtype)
        output = generate(painter, DRAW, max_new_tokens=8, output_type="pt", guidance_scale=2.0)
        assert output.latents[0][0].dtype == output.images[0][0].dtype == torch.float32
        assert torch.isfinite(output.images[0][0]).all()


def test_the_prefill_uses_up_no_randomness(model):
    """Pictures in a prompt are clean: whoever seeds globally gets the same text with and without them."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(
        model, torch.tensor([[BOS, *image(), 10]]), latents=torch.ones(1, 2, 4, 4), max_new_tokens=2, generator=None
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_scores_and_logits_are_those_of_sampled_tokens(model):
    output = generate(model, DRAW, max_new_tokens=8, output_scores=True, output_logits=True, eos_token_id=[])
    assert len(output.scores) == len(output.logits) == 3 and output.scores[0].shape == (1, 60)
    assert [int(step.argmax()) for step in output.scores] == new_tokens(output, DRAW)[5:]
    assert output.scores[0][0, EOI] == -float("inf") < output.logits[0][0, EOI]


# -------------------------------------------------------------------------------------------- callbacks and streamers


def test_callbacks_come_with_every_step_and_may_change_the_latents(model):
    seen = []

    def watch(given, step, timestep, state):
        seen.append((given is model, step, int(timestep), state["rows"], state["latents"].shape))
        return {"latents": torch.ones_like(state["latents"])} if step == 2 else None

    output = generate(model, BOTH, attention_mask=(BOTH > 0).long(), max_new_tokens=5, callback_on_step_end=watch)
    assert seen == [(True, step, t, [0], (1, 2, 4, 4)) for step, t in enumerate((999, 666, 332))]
    assert torch.equal(output.latents[0][0], torch.ones(2, 4, 4))


def test_intermediate_pictures_end_in_the_picture(painter):
    output = generate(painter, DRAW, max_new_tokens=5, intermediate_every=2, num_inference_steps=4, output_type="pt")
    ((along,),) = output.intermediates
    assert len(along) == 2
    # The last step of a DDPM goes all the way to its estimate of what is clean.
    torch.testing.assert_close(along[1], output.images[0][0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(along[0], along[1], atol=1e-3)
    assert generate(painter, DRAW, max_new_tokens=5).intermediates is None


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.pictures, self.ended = [], [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def put_image(self, picture):
        self.pictures.append((len(self.tokens), picture))

    def end(self):
        self.ended = True


def test_streamers_get_tokens_and_pictures_in_order(painter):
    streamer = Collect()
    output = generate(painter, DRAW, max_new_tokens=8, streamer=streamer, eos_token_id=[])
    assert streamer.ended and streamer.tokens == output.sequences[0].tolist()
    assert streamer.pictures == [(8, output.images[0][0])]


def test_a_progress_bar_is_shown_on_request(model, capsys):
    generate(model, DRAW, max_new_tokens=5, progress_bar=True)
    assert "denoising: 100%" in capsys.readouterr().err
    generate(model, DRAW, max_new_tokens=5)
    assert "denoising" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- work


@pytest.mark.parametrize(("markers", "guidance"), [(False, 1.0), (False, 3.0), (True, 3.0)])
def test_denoising_steps_run_image_tokens_alone_and_guidance_is_one_batch(monkeypatch, markers, guidance):
    model, copies, shapes = model_of(markers_in_image_block=markers), Counter(), []
    scratch = ScratchLayer.__init__
    monkeypatch.setattr(ScratchLayer, "__init__", lambda self, *args: copies.update(["prefix"]) or scratch(self, *args))
    handle = model.model.layers[0].register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[2][0].shape[:2]))  # of the rotary embedding: (B, L)
    )
    prompt = torch.tensor([[BOS, *range(10, 40), BOI]])
    generate(model, prompt, max_new_tokens=6, guidance_scale=guidance, num_inference_steps=7, eos_token_id=[])
    handle.remove()
    inside = 2 if markers else 0
    guided = [(1, 2)] if guidance != 1 else []  # bos and BOI, once
    steps = [(2 if guided else 1, 4 + inside)] * 7
    commit = [(1, 6 if markers else 5)]
    assert shapes == [(1, 32), *guided, *steps, *commit]  # and one token sampled, from which nothing follows
    # Once for each layer to draw, and once to commit the picture, not for each step.
    assert copies["prefix"] == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("fields", [{}, {"markers_in_image_block": True}], ids=["transfusion", "bagel"])
def test_in_half_precision_a_plan_of_ranges_shows_what_the_mask_shows(monkeypatch, fields):
    """Of prefixes of different lengths, to draw and to commit."""
    model, plain = model_of(**fields).bfloat16(), model_of(**fields).bfloat16()
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("sdpa")
    latents = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(3)).bfloat16()
    prefixes = [
        Prefix(*([torch.randn(2, length, 8) for _ in model.model.layers] for _ in range(2)), length)
        for length in (9, 3)
    ]
    for with_end in (False, True):
        forwards = [ImageForward(each, prefixes, (4, 4), with_end) for each in (model, plain)]
        assert "attention_plan" in forwards[0].seen and "attention_mask" in forwards[1].seen
        with torch.no_grad():
            ours, theirs = (forward(latents, 500)[0].float() for forward in forwards)
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_nothing_runs_behind_a_picture_that_ends_its_sequence(model):
    lengths = []
    handle = model.model.register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[1]))
    generate(model, DRAW, generation_mode="image")
    handle.remove()
    assert lengths == [3, 4, 4, 4]


def test_behind_a_prompt_of_padding_a_picture_sees_only_tokens(model, monkeypatch):
    lengths, forward = [], ImageForward.__init__
    monkeypatch.setattr(
        ImageForward,
        "__init__",
        lambda self, model, prefixes, *args, **kwargs: (
            lengths.append([prefix.length for prefix in prefixes]) or forward(self, model, prefixes, *args, **kwargs)
        ),
    )
    prompt = torch.tensor([[0, 0, BOS, 10, BOI], [BOS, 11, 12, 13, 14]])
    generate(
        model, prompt, max_new_tokens=12, eos_token_id=[], attention_mask=(prompt > 0).long(),
        prefix_allowed_tokens_fn=lambda row, ids: [BOI] if row == 1 and ids.shape[0] == 7 and BOI not in ids else [20],
    )  # fmt: skip
    assert lengths == [[3], [3], [8], [8]]  # to draw and to commit, each


# --------------------------------------------------------------------------------------------------------- refusals


LATENTS = torch.zeros(1, 2, 4, 4)
IMAGE_PROMPT = torch.tensor([[BOS, *image(), 10]])


@pytest.mark.parametrize(
    ("prompt", "kwargs", "message"),
    [
        (WRITE, {"latents": LATENTS}, "1 images came, but the placeholders .* stand in 0 places"),
        (IMAGE_PROMPT, {}, "input_ids holds 4 placeholders .* but neither latents nor pixel_values came"),
        (IMAGE_PROMPT, {"latents": LATENTS.repeat(2, 1, 1, 1)}, "2 images came, but .* in 1 places"),
        (
            IMAGE_PROMPT,
            {"latents": LATENTS[:, :, :2]},
            "image 0 of 2 x 4 latents makes 2 patches, but input_ids holds 4",
        ),
        (IMAGE_PROMPT, {"pixel_values": torch.zeros(1, 3, 8, 8)}, "this model has no VAE"),
        (IMAGE_PROMPT[:, :4], {"latents": LATENTS[:, :, :2]}, "a prompt ends inside of an image"),
        (DRAW, {"image_size": [3, 4]}, "image_size=\\[3, 4\\] must be \\[height, width\\].* multiple of 2"),
        (DRAW, {"image_size": [4]}, "image_size=\\[4\\] must be"),
        (DRAW, {"scheduler": "magic"}, "scheduler='magic' is unknown"),
        (DRAW, {"scheduler_kwargs": {"etaa": 1}}, "scheduler_kwargs has 'etaa'"),
        (DRAW, {"num_inference_steps": 0}, "num_inference_steps=0 must lie in \\[1, num_train_timesteps=1000\\]"),
        (DRAW, {"num_inference_steps": 1001}, "num_inference_steps=1001"),
        (DRAW, {"guidance_scale": -1.0}, "guidance_scale=-1.0 must not be negative"),
        (DRAW, {"intermediate_every": 0}, "intermediate_every=0"),
        (DRAW, {"latent_bound": 0.0}, "latent_bound=0.0 must be positive"),
        (DRAW, {"output_type": "np"}, "output_type='np' is not one of"),
        (DRAW, {"generation_mode": "audio"}, "generation_mode='audio' is not one of"),
        (DRAW, {"max_new_tokens": 4}, "max_new_tokens=4 is shorter than the picture .* at least 5"),
        (DRAW, {"generator": [torch.Generator()] * 2}, "generator has 2 entries for 1 sequences"),
        (DRAW, {"num_beams": 2}, "beam search and assisted decoding cannot go through pictures"),
        (DRAW, {"prompt_lookup_num_tokens": 2}, "beam search and assisted decoding"),
        (DRAW, {"cache_implementation": "static"}, "cache_implementation='static'"),
        (DRAW, {"use_cache": False}, "use_cache=False"),
        (DRAW, {"prefill_chunk_size": 2}, "prefill_chunk_size"),
        (DRAW, {"document_ids": torch.zeros(1, 3)}, "generate\\(\\) got document_ids"),
        (DRAW, {"attention_mask": torch.tensor([[1, 1, 0]])}, "padding on the right"),
        (DRAW, {"attention_mask": torch.tensor([[1, 0, 1]])}, "padding on the right"),
        (torch.tensor([[BOS, 10, 0]]), {"generation_mode": "image"}, "padding on the right"),
        (torch.tensor([[10, BOI], [10, 11]]), {"generation_mode": "image"}, "some prompts end with boi_token_id"),
        (BOTH, {"streamer": Collect()}, "a streamer follows one sequence, not 2"),
        (
            BOTH,
            {"negative_prompt_ids": torch.ones(3, 1), "guidance_scale": 2.0},
            "negative_prompt_ids has 3 rows for 2",
        ),
        (DRAW[:, :0], {}, "generate\\(\\) needs prompts"),
        (None, {}, "generate\\(\\) needs prompts"),
        (None, {"documents": [{"type": "text", "text": "a"}]}, "documents= needs processor="),
        (DRAW, {"num_inference_step": 5}, "num_inference_step"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(model, prompt, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"timesteps": torch.tensor([1000])}, "timesteps run from 1000 to 1000; .* less than num_train_timesteps=1000"),
        ({"timesteps": torch.tensor([-1])}, "timesteps run from -1"),
        ({"timesteps": torch.tensor([0.5])}, "timesteps are torch.float32, .* pass integers"),
        ({"timesteps": torch.tensor([1, 2])}, "timesteps has shape \\(2,\\), but the images need \\(1,\\)"),
        ({"noise": LATENTS[:, :, :2]}, "noise has shape"),
        ({"clean_images": torch.ones(2).bool()}, "clean_images has shape"),
        ({"latents": LATENTS[0]}, "latents has shape \\(2, 4, 4\\); it must be \\(N, latent_channels=2, h, w\\)"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, "latents has shape"),
        ({"image_sizes": [(4, 6)]}, "image_sizes=.* within the 4 x 4"),
        ({"image_sizes": torch.tensor([[4, 4], [4, 4]])}, "each of 1 images"),
        ({"image_sizes": [(3, 4)]}, "3 x 4 latents cannot be cut into patches of patch_size=2"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, "either latents or pixel_values"),
        ({"past_key_values": "filled"}, "images came with a filled past_key_values"),
        ({"input_ids": None}, "input_ids is needed"),
    ],
)
def test_forward_refuses_bad_images_by_name(model, kwargs, message):
    if kwargs.get("past_key_values"):
        kwargs = {"past_key_values": model(torch.tensor([[BOS]]), use_cache=True).past_key_values}
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": IMAGE_PROMPT, "latents": LATENTS} | kwargs))
    flow = tiny_model(prediction_type="flow")
    flow(IMAGE_PROMPT, latents=LATENTS, timesteps=torch.tensor([1000.0]))
    with pytest.raises(ValueError, match="at most num_train_timesteps=1000"):
        flow(IMAGE_PROMPT, latents=LATENTS, timesteps=torch.tensor([1000.5]))


def test_a_picture_that_the_vae_cannot_divide_is_refused(painter):
    for pixels, sizes in ((torch.zeros(1, 3, 7, 8), None), (torch.zeros(1, 3, 8, 8), [(7, 8)])):
        with pytest.raises(ValueError, match="7 x 8 pixels cannot be encoded.* multiples of 2"):
            painter(IMAGE_PROMPT, pixel_values=pixels, image_sizes=sizes)


def test_guidance_without_dropout_is_warned_of(caplog, model):
    logging.getLogger("transformers").propagate = True
    try:
        generate(model_of(caption_dropout=0.0), DRAW, max_new_tokens=5, guidance_scale=2.0)
        assert "guidance_scale=2.0 with a model of caption_dropout=0" in caplog.text
        caplog.clear()
        generate(model, DRAW, max_new_tokens=5, guidance_scale=2.0)
        generate(model_of(caption_dropout=0.0), DRAW, max_new_tokens=5)
        assert "caption_dropout" not in caplog.text
    finally:
        logging.getLogger("transformers").propagate = False


def test_a_generation_configuration_may_be_passed_as_an_object(model):
    settings = {"num_inference_steps": 2, "max_new_tokens": 5, "scheduler": "ddim"}
    seeded = {"generator": torch.Generator().manual_seed(0)}
    by_object = model.generate(DRAW, GenerationConfig(**settings), generator=torch.Generator().manual_seed(0))
    assert torch.equal(by_object.latents[0][0], model.generate(DRAW, **settings, **seeded).latents[0][0])
