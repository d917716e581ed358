"""transformers' pipelines over saved folders of models whose modalities are all tokens."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, pipeline

from modeling_mot import MoTForCausalLM, MoTProcessor
from tests.modeling_mot.test_remote_code import run_clean


TEXTS = ["a cat", "the hat of a dog"]


@pytest.fixture(scope="module")
def parts(saved_tokens):
    """(model, processor)"""
    return MoTForCausalLM.from_pretrained(saved_tokens), MoTProcessor.from_pretrained(saved_tokens)


@pytest.fixture(scope="module")
def any_to_any(saved_tokens):
    return pipeline("any-to-any", model=str(saved_tokens), trust_remote_code=True)


def text(value):
    return [{"type": "text", "text": value}]


def generated(parts, prompt, modality, **settings):
    model, processor = parts
    inputs = processor(prompt, continue_with=modality, return_tensors="pt")
    return model.generate(**inputs, do_sample=False, **settings)[0]


def test_text_generation_continues_text(parts, saved_tokens):
    made = pipeline("text-generation", model=str(saved_tokens), trust_remote_code=True)(
        TEXTS, max_new_tokens=6, do_sample=False, return_tensors=True
    )
    for value, (one,) in zip(TEXTS, made, strict=True):
        assert one["generated_token_ids"] == generated(parts, text(value), "text", max_new_tokens=6).tolist()


def test_text_generation_takes_batches(parts):
    model, processor = parts
    pipe = pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    alone = [pipe(value, max_new_tokens=6, do_sample=False) for value in TEXTS]
    assert pipe(TEXTS, batch_size=2, max_new_tokens=6, do_sample=False) == alone


def test_any_to_any_writes(parts, any_to_any):
    (made,) = any_to_any("a cat", max_new_tokens=6, generate_kwargs={"do_sample": False}, return_full_text=False)
    ids = generated(parts, text("a cat"), "text", max_new_tokens=6)
    assert made["generated_text"] == parts[1].decode(ids, skip_special_tokens=True).removeprefix("a cat")


def test_any_to_any_draws(parts, any_to_any):
    model, processor = parts
    (made,) = any_to_any("a cat", generation_mode="image", generate_kwargs={"do_sample": False})
    (picture,) = made["generated_image"]
    rows, columns = model.config.image_grid
    ids = generated(parts, text("a cat"), "image", max_new_tokens=rows * columns + 1)
    expected = next(segment["image"] for segment in processor.decode_document(ids) if segment["type"] == "image")
    assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_any_to_any_speaks(any_to_any):
    (made,) = any_to_any("a cat", generation_mode="audio", max_new_tokens=12, generate_kwargs={"do_sample": False})
    (waveform,) = made["generated_audio"]
    assert np.asarray(waveform).ndim == 1 and len(waveform)


def test_any_to_any_reads_pictures(any_to_any):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8), "RGB")
    (made,) = any_to_any(text="<|image|>the", images=picture, max_new_tokens=4, generate_kwargs={"do_sample": False})
    assert "the" in made["generated_text"]


CLEAN = """
from transformers import pipeline
pipe = pipeline("any-to-any", model=sys.argv[1], trust_remote_code=True)
print(pipe("a cat", generation_mode="image", generate_kwargs={"do_sample": False}))
"""


def test_any_to_any_draws_in_a_clean_process(saved_tokens, tmp_path):
    assert "'generated_image': [<PIL.Image" in run_clean(CLEAN, saved_tokens, tmp_path)


def test_the_auto_class_of_multimodal_models_finds_the_model(saved_tokens):
    assert type(AutoModelForMultimodalLM.from_pretrained(saved_tokens)).__name__ == "MoTForCausalLM"


@pytest.mark.parametrize(
    ("ids", "mode", "message"),
    [
        ([[1, 9], [1, 3]], "image", "some prompts end with boi_token_id"),
        ([[1, 9]], "video", "is not one of text, image"),
    ],
)
def test_modes_that_cannot_be_are_refused_by_name(parts, ids, mode, message):
    ids = torch.tensor(ids)
    ids[ids == 3] = parts[0].config.boi_token_id
    with pytest.raises(ValueError, match=message):
        parts[0].generate(ids, generation_mode=mode)
