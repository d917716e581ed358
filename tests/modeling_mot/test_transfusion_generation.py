"""generate() against a recompute of the whole row at every token and every denoising step, without cache and batch."""

import pytest
import torch

from .naive_transfusion import BOI, BOS, EOI, EOS, PATCH, image, tiny_model, uncompiled_flex
from .naive_transfusion_generation import NaiveGeneration, penalised, sampler


BAGEL = {
    "image_positions": "shared",
    "markers_in_image_block": True,
    "noised_images_visible": False,
    "latent_position_table": "sincos",
    "timestep_format": "fraction",
    "prediction_type": "flow",
    "timestep_shift": 3.0,
}
# What a prompt is, and how many pictures are in it.
PROMPTS = {
    "draw": ([BOS, 10, 11, BOI], 0),
    "write": ([BOS, 12, 13], 0),
    "caption": ([BOS, *image()], 1),
    "edit": ([BOS, *image(), 14, 15, BOI], 1),
    "two in, one out": ([BOS, *image(), 16, *image(), BOI], 2),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_of(variant="mot", boi=1.0, **fields):
    """Weights with a well-behaved sampler, and a liking for BOI."""
    model = tiny_model(
        variant, **({"noise_schedule": "scaled_linear", "initializer_range": 0.15, "caption_dropout": 0.1} | fields)
    )
    with torch.no_grad():
        model.lm_head.weight[BOI] *= boi
    return model


def pictures(count, height=4, width=4):
    return torch.randn(count, 2, height, width, generator=seeded(99))


def assert_same(output, row, prompt_length, expected):
    """Tokens, and latents to 1e-4 of their size."""
    tokens, drawn = expected
    new = output.sequences[row].tolist()[prompt_length:]
    assert new[: len(tokens)] == tokens and not any(new[len(tokens) :])  # the rest is padding
    assert len(output.latents[row]) == len(drawn)
    for ours, theirs in zip(output.latents[row], drawn):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(1, theirs.abs().max().item()))


def check(model, prompt, images=0, new_tokens=12, **settings):
    """One prompt, greedy."""
    reference = {name: value for name, value in settings.items() if name in ("scheduler", "guidance_scale")}
    naive, inputs = NaiveGeneration(model, **reference), pictures(images)
    tokens, drawn = naive(prompt, inputs, new_tokens, seeded(int(torch.randint(2**62, (1,), generator=seeded()))))
    given = {"latents": inputs} if images else {}
    output = model.generate(
        torch.tensor([prompt]),
        **given,
        max_new_tokens=new_tokens,
        num_inference_steps=4,
        generator=seeded(),
        do_sample=False,
        **settings,
    )
    assert_same(output, 0, len(prompt), (tokens[len(prompt) :], drawn))
    return output


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("variant", ["dense", "mot", "hybrid"])
def test_every_kind_of_prompt_equals_recompute(variant, prompt):
    check(model_of(variant), *PROMPTS[prompt])


@pytest.mark.parametrize("prompt", ["draw", "caption", "edit"])
@pytest.mark.parametrize(
    "fields",
    [
        {"image_positions": "shared"},
        {"markers_in_image_block": True},
        {"image_positions": "shared", "markers_in_image_block": True},
        {"latent_position_table": "sincos", "timestep_format": "fraction"},
        {"noised_images_visible": False},
        {"patchifier": "unet"},
        BAGEL,
    ],
    ids=["shared", "markers", "shared-markers", "sincos", "invisible", "unet", "bagel"],
)
def test_every_relative_equals_recompute_with_guidance(fields, prompt):
    check(model_of(**fields), *PROMPTS[prompt], guidance_scale=2.5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        *[("epsilon", name) for name in ("ddpm", "ddim", "dpm", "euler", "heun")],
        *[("v_prediction", name) for name in ("ddpm", "ddim", "dpm", "euler")],
        *[("flow", name) for name in ("ddpm", "flow", "unipc", "dpm")],
        *[("flow_sample", name) for name in ("ddpm", "unipc")],
    ],
)
def test_every_scheduler_equals_recompute(kind, scheduler, guidance_scale):
    model = model_of(prediction_type=kind)
    check(model, *PROMPTS["draw"], new_tokens=6, scheduler=scheduler, guidance_scale=guidance_scale)


@pytest.mark.parametrize("fields", [{}, BAGEL], ids=["transfusion", "bagel"])
@pytest.mark.parametrize("variant", ["dense", "mot"])
def test_pictures_that_the_model_begins_equal_recompute(variant, fields):
    model, prompt, choose = model_of(variant, **fields), [BOS, 10, 11], sampler(generator := seeded(1))

    def likes_boi(logits, tokens):
        logits[BOI] += 6
        return choose(logits, tokens)

    naive = NaiveGeneration(model, guidance_scale=2.0, choose=likes_boi)
    expected, drawn = naive(prompt, (), 40, generator)
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=40, num_inference_steps=4, guidance_scale=2.0, do_sample=True, top_k=0,
        sequence_bias={(BOI,): 6.0}, generator=[seeded(1)],
    )  # fmt: skip
    assert_same(output, 0, len(prompt), (expected[len(prompt) :], drawn))
    assert len(drawn) > 1  # several pictures in one sequence, text between and behind them
    tokens = output.sequences[0].tolist()
    assert tokens.count(BOI) == tokens.count(EOI) == len(drawn) and tokens.count(PATCH) == 4 * len(drawn)
    assert torch.equal(output.modality_ids, (output.sequences == PATCH).long())


def mixed_rows():
    """Left-padded prompts of all kinds with their pictures, and the same one by one."""
    prompts = [tokens for tokens, _ in PROMPTS.values()]
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    images = pictures(sum(count for _, count in PROMPTS.values()))
    own = images.split([count for _, count in PROMPTS.values()])
    return {"input_ids": ids, "attention_mask": mask, "latents": images}, list(zip(prompts, own))


@pytest.mark.parametrize("fields", [{}, BAGEL], ids=["transfusion", "bagel"])
@pytest.mark.parametrize("variant", ["dense", "mot", "hybrid"])
def test_each_row_of_a_mixed_batch_equals_recompute_of_it_alone(variant, fields):
    """Rows switch at different steps, some draw more than once, some end early; each has its own generator."""
    model = model_of(variant, boi=3.0, **fields)
    inputs, alone = mixed_rows()
    output = model.generate(
        **inputs, max_new_tokens=24, num_inference_steps=4, guidance_scale=2.0, do_sample=True, temperature=1.5,
        top_k=0,
        generator=[seeded(row) for row in range(len(alone))],
    )  # fmt: skip
    lengths = set()
    for row, (prompt, images) in enumerate(alone):
        generator = seeded(row)
        naive = NaiveGeneration(model, guidance_scale=2.0, choose=sampler(generator, temperature=1.5))
        tokens, drawn = naive(prompt, images, 24, generator)
        assert_same(output, row, inputs["input_ids"].shape[1], (tokens[len(prompt) :], drawn))
        lengths.add(len(drawn))
    assert len(lengths) > 1


def test_each_row_of_a_mixed_batch_equals_its_solo_run_whatever_the_processors():
    """Processors that count tokens, or look at what was said, see each sequence by itself."""
    model = model_of(boi=3.0)
    inputs, alone = mixed_rows()
    settings = {
        "max_new_tokens": 24, "min_new_tokens": 20, "num_inference_steps": 3, "do_sample": True,
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "top_p": 0.95,
        "exponential_decay_length_penalty": (8, 1.1),
    }  # fmt: skip
    together = model.generate(**inputs, **settings, generator=[seeded(row) for row in range(len(alone))])
    for row, (prompt, images) in enumerate(alone):
        given = {"latents": images} if len(images) else {}
        solo = model.generate(torch.tensor([prompt]), **given, **settings, generator=[seeded(row)])
        tokens = solo.sequences[0].tolist()[len(prompt) :]
        assert_same(together, row, inputs["input_ids"].shape[1], (tokens, solo.latents[0]))


def test_repetition_penalty_equals_recompute():
    model, (prompt, _) = model_of(boi=3.0), PROMPTS["write"]
    expected, drawn = NaiveGeneration(model, choose=penalised(1.5))(prompt, (), 20, seeded(5))
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=20,
        num_inference_steps=4,
        repetition_penalty=1.5,
        do_sample=False,
        generator=[seeded(5)],
    )
    assert_same(output, 0, len(prompt), (expected[len(prompt) :], drawn))


def test_text_from_the_global_seed_is_sampled_as_transformers_does():
    """One draw for the whole batch at each step."""
    model, prompts = model_of(), [[BOS, 12, 13], [BOS, 20, 21]]
    torch.manual_seed(3)
    output = model.generate(
        torch.tensor(prompts), max_new_tokens=6, do_sample=True, top_k=0, generation_mode="text", eos_token_id=[]
    )
    torch.manual_seed(3)
    naive, rows = NaiveGeneration(model), [list(prompt) for prompt in prompts]
    for _ in range(6):
        logits = torch.stack([naive.naive(row)[0][-1].float() for row in rows])
        logits[:, [PATCH, EOI, BOI]] = -float("inf")
        rows = [[*row, int(token)] for row, token in zip(rows, torch.multinomial(logits.softmax(-1), 1))]
    assert output.sequences.tolist() == rows


@pytest.mark.parametrize("size", [(2, 2), (2, 6), (6, 4)])
def test_other_sizes_than_the_usual_equal_recompute(size):
    model, prompt = model_of(), PROMPTS["draw"][0]
    length = size[0] * size[1] // 4
    expected, drawn = NaiveGeneration(model, size=size)(prompt, (), length + 3, seeded(1))
    output = model.generate(
        torch.tensor([prompt]),
        image_size=size,
        num_inference_steps=4,
        max_new_tokens=length + 3,
        do_sample=False,
        generator=[seeded(1)],
    )
    assert_same(output, 0, len(prompt), (expected[len(prompt) :], drawn))


def test_prompts_with_pictures_of_several_sizes_equal_recompute():
    model = model_of(image_positions="shared")
    prompt = [BOS, *image(4, 2), 10, *image(2, 6), 11, BOI]
    latents = pictures(2, 4, 6)
    own = [latents[0, :, :4, :2], latents[1, :, :2, :6]]
    expected, drawn = NaiveGeneration(model)(prompt, own, 8, seeded(1))
    for sizes in ([(4, 2), (2, 6)], torch.tensor([[4, 2], [2, 6]])):
        output = model.generate(
            torch.tensor([prompt]),
            latents=latents,
            image_sizes=sizes,
            num_inference_steps=4,
            max_new_tokens=8,
            do_sample=False,
            generator=[seeded(1)],
        )
        assert_same(output, 0, len(prompt), (expected[len(prompt) :], drawn))


def test_negative_prompts_equal_recompute():
    model, prompts = model_of(), [[BOS, 10, 11, BOI], [BOS, 12, 13, BOI]]
    negatives = [[BOS, 30], [BOS, 31, 32]]
    padded, mask = torch.tensor([[0, BOS, 30], [BOS, 31, 32]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    settings = {"num_inference_steps": 4, "max_new_tokens": 5, "guidance_scale": 4.0, "do_sample": False}
    one = model.generate(
        torch.tensor(prompts),
        negative_prompt_ids=torch.tensor(negatives[0]),
        generator=[seeded(1), seeded(2)],
        **settings,
    )
    each = model.generate(
        torch.tensor(prompts), negative_prompt_ids=padded, negative_prompt_attention_mask=mask, num_return_sequences=1,
        generator=[seeded(1), seeded(2)], **settings,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        for output, negative in ((one, negatives[0]), (each, negatives[row])):
            naive = NaiveGeneration(model, guidance_scale=4.0, negative=negative)
            tokens, drawn = naive(prompt, (), 5, seeded(row + 1))
            assert_same(output, row, len(prompt), (tokens[len(prompt) :], drawn))


def test_num_return_sequences_draws_each_as_its_own_row():
    model = model_of()
    inputs, alone = mixed_rows()
    output = model.generate(
        **inputs, num_return_sequences=2, max_new_tokens=8, num_inference_steps=3, do_sample=True, top_k=0,
        negative_prompt_ids=torch.stack([torch.tensor([BOS, 30 + row]) for row in range(len(alone))]),
        guidance_scale=2.0, generator=[seeded(row) for row in range(2 * len(alone))],
    )  # fmt: skip
    for row, (prompt, images) in enumerate(alone):
        for copy in (2 * row, 2 * row + 1):
            choose, negative = sampler(generator := seeded(copy)), [BOS, 30 + row]
            naive = NaiveGeneration(model, steps=3, guidance_scale=2.0, negative=negative, choose=choose)
            tokens, drawn = naive(prompt, images, 8, generator)
            assert_same(output, copy, inputs["input_ids"].shape[1], (tokens[len(prompt) :], drawn))


def test_one_generator_gives_each_sequence_one_of_its_own():
    model, prompt = model_of(), torch.tensor([PROMPTS["draw"][0]] * 2)
    settings = {"num_inference_steps": 2, "max_new_tokens": 5, "do_sample": False}
    first, again = (model.generate(prompt, generator=seeded(4), **settings).latents for _ in range(2))
    assert torch.equal(first[0][0], again[0][0]) and not torch.equal(first[0][0], first[1][0])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_draw_the_same(attention, monkeypatch):
    uncompiled_flex(monkeypatch)
    check(model_of(attn_implementation=attention, **BAGEL), *PROMPTS["edit"], guidance_scale=2.0)


def test_a_text_modality_beside_pictures_is_generated_too():
    """Speech opens at its marker, which constrains what may follow."""
    model = model_of(modalities=("text", "image", "speech"))
    output = model.generate(torch.tensor([[BOS, 10, 6]]), max_new_tokens=8, do_sample=False)
    spoken = output.sequences[0, 3 : output.sequences[0].tolist().index(7)]
    assert 1 <= len(spoken) <= 4 and (spoken >= 40).all()
    assert (
        output.modality_ids[0, 3 : 3 + len(spoken)].tolist() == [2] * len(spoken) and model.config.eos_token_id == EOS
    )
