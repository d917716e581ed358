"""diffusers-style and transformers' pipelines around a Transfusion model with its processor."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from transformers import pipeline

from modeling_mot import MoTTransfusionPipeline

from .naive_transfusion import TINY, VAE, tiny_model
from .test_continuous_processor import build_continuous


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8), "RGB")
OWN_TOKENS = [name for name in TINY if name.endswith("_token_id")]


@pytest.fixture(scope="module")
def parts():
    """A processor whose pictures are 8 x 8 pixels, four patches, and a model of its vocabulary."""
    torch.manual_seed(0)
    processor = build_continuous(image_size=[8, 8], downsampling=4)
    fields = {"vae_config": VAE, "noise_schedule": "linear", "initializer_range": 0.2, "caption_dropout": 0.1}
    return tiny_model(**(fields | processor.config_kwargs())), processor


@pytest.fixture
def pipe(parts):
    pipe = MoTTransfusionPipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(parts, segments, **kwargs):
    """By generate()."""
    model, processor = parts
    inputs = processor(documents=[segments], continue_with="image", return_tensors="pt")
    return model.generate(**inputs, num_inference_steps=3, max_new_tokens=5, output_type="pt", **kwargs).images[0][0]


def text(value):
    return {"type": "text", "text": value}


# -------------------------------------------------------------------------------------------------------- diffusers


def test_a_prompt_gives_what_generate_gives(parts, pipe):
    assert isinstance(pipe, DiffusionPipeline)
    output = pipe("a cat", num_inference_steps=3, generator=[seeded()], output_type="pt")
    assert isinstance(output, ImagePipelineOutput) and output.images.shape == (1, 3, 8, 8)
    assert torch.equal(output.images[0], drawn(parts, [text("a cat")], generator=[seeded()]))


def test_outputs_of_every_type(pipe):
    made = {
        kind: pipe("a cat", num_inference_steps=2, generator=[seeded()], output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert made["pil"][0].size == (8, 8) and made["latent"].shape == (1, 2, 4, 4)
    assert np.array_equal(made["np"], made["pt"].permute(0, 2, 3, 1).numpy())
    (as_tuple,) = pipe("a cat", num_inference_steps=2, generator=[seeded()], output_type="pt", return_dict=False)
    assert torch.equal(as_tuple, made["pt"])


def test_several_prompts_and_pictures_stand_in_order(parts, pipe):
    generators = [seeded(number) for number in range(4)]
    output = pipe(
        ["a cat", "the hat of a dog"],
        num_inference_steps=3,
        num_images_per_prompt=2,
        generator=generators,
        output_type="pt",
    )
    assert len(output.images) == 4
    for number, prompt in enumerate(["a cat", "a cat", "the hat of a dog", "the hat of a dog"]):
        alone = drawn(parts, [text(prompt)], generator=[seeded(number)])
        torch.testing.assert_close(output.images[number], alone, rtol=1e-3, atol=1e-3)


def test_sizes_guidance_and_negative_prompts_reach_generate(parts, pipe):
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "scheduler": "ddim", "output_type": "pt"}
    output = pipe(
        ["a", "the cat"], negative_prompt=["b", "a dog"], height=4, width=12, generator=[seeded(), seeded()], **settings
    )
    assert output.images.shape == (2, 3, 4, 12)
    for number, (prompt, negative) in enumerate([("a", "b"), ("the cat", "a dog")]):
        ids = torch.tensor(parts[1]([text(negative)], add_eos=False)["input_ids"])
        alone = drawn(
            parts,
            [text(prompt)],
            negative_prompt_ids=ids,
            image_size=[4, 12],
            guidance_scale=3.0,
            scheduler="ddim",
            generator=[seeded()],
        )
        torch.testing.assert_close(output.images[number], alone, rtol=1e-3, atol=1e-3)
    assert pipe("a", height=12, num_inference_steps=1).images[0].size == (8, 12)
    assert pipe("a", image_size=4, num_inference_steps=1).images[0].size == (4, 4)


def test_a_picture_to_edit_stands_before_the_prompt(parts, pipe):
    output = pipe("a cat", image=PICTURE, num_inference_steps=3, generator=[seeded()], output_type="pt")
    source = {"type": "image", "image": PICTURE}
    assert torch.equal(output.images[0], drawn(parts, [source, text("a cat")], generator=[seeded()]))
    both = pipe(
        ["a cat", "a cat"],
        image=[None, PICTURE],
        num_inference_steps=3,
        generator=[seeded(), seeded()],
        output_type="pt",
    )
    torch.testing.assert_close(both.images[1], output.images[0], rtol=1e-3, atol=1e-3)


def test_guidance_by_the_picture_reaches_generate(parts, pipe):
    settings = {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "guidance_renorm": "channel"}
    output = pipe("a cat", image=PICTURE, num_inference_steps=3, generator=[seeded()], output_type="pt", **settings)
    document = [{"type": "image", "image": PICTURE}, text("a cat")]
    assert torch.equal(output.images[0], drawn(parts, document, generator=[seeded()], **settings))
    without = drawn(parts, document, generator=[seeded()], **(settings | {"image_guidance_scale": 1.0}))
    assert not torch.allclose(output.images[0], without, atol=1e-3)


def test_an_empty_prompt_draws_from_nothing(parts, pipe):
    output = pipe("", num_inference_steps=3, generator=[seeded()], output_type="pt")
    assert torch.equal(output.images[0], drawn(parts, [], generator=[seeded()]))


def test_callbacks_get_the_pipeline(pipe):
    seen = []
    pipe(
        "a",
        num_inference_steps=2,
        callback_on_step_end=lambda given, step, t, state: seen.append((given is pipe, step)),
    )
    assert seen == [(True, 0), (True, 1)]


def test_it_goes_through_a_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = MoTTransfusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    ours, theirs = (
        one("a cat", num_inference_steps=2, generator=[seeded()], output_type="pt").images for one in (pipe, loaded)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert loaded.to(torch.bfloat16).model.dtype == torch.bfloat16 and loaded.model.vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": []}, "0 images came for 0 prompts"),
        ({"image": [PICTURE, PICTURE]}, "2 images came for 1 prompts"),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"height": 8, "image_size": 8}, "either image_size=8 or height=8"),
        ({"height": 7}, "image_size=\\[7, 8\\] must be"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts came for 1 prompts"),
    ],
)
def test_bad_input_is_refused_by_name(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": "a", "num_inference_steps": 1} | kwargs))


def test_pictures_need_a_vae(parts):
    pipe = MoTTransfusionPipeline(tiny_model(**parts[1].config_kwargs()), parts[1])
    with pytest.raises(ValueError, match="no VAE"):
        pipe("a", num_inference_steps=1)
    assert pipe("a", num_inference_steps=1, output_type="latent").images.shape == (1, 2, 4, 4)


# ----------------------------------------------------------------------------------------------------- transformers


@pytest.fixture
def any_to_any(parts):
    return pipeline("any-to-any", model=parts[0], processor=parts[1])


def test_any_to_any_draws(parts, any_to_any):
    settings = {"num_inference_steps": 3, "generator": [seeded()]}
    (made,) = any_to_any("a cat", generation_mode="image", generate_kwargs=settings)
    (picture,) = made["generated_image"]
    assert made["input_text"] == "a cat"
    expected = drawn(parts, [text("a cat")], generator=[seeded()])
    assert np.abs(np.asarray(picture) / 255 - expected.permute(1, 2, 0).numpy()).max() < 0.01


def test_any_to_any_writes(parts, any_to_any):
    model, processor = parts
    settings = {"do_sample": False, "max_new_tokens": 6, "generation_mode": "text"}
    (made,) = any_to_any(text="the cat", return_full_text=False, generate_kwargs=settings)
    ids = processor([text("the cat")], continue_with="text", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, **settings).sequences[:, ids.shape[1] :]
    assert made["generated_text"].strip() == processor.decode(expected[0], skip_special_tokens=True).strip()


def test_any_to_any_reads_pictures(any_to_any):
    (made,) = any_to_any(text="<|image|>the", images=PICTURE, max_new_tokens=4, generate_kwargs={"do_sample": False})
    assert made["generated_text"].startswith("<|image|>the")


def test_any_to_any_takes_chats(any_to_any):
    chat = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "a cat"}]}]
    (made,) = any_to_any(
        text=chat,
        return_full_text=False,
        max_new_tokens=4,
        generate_kwargs={"do_sample": False, "generation_mode": "text"},
    )
    assert isinstance(made["generated_text"], str)
