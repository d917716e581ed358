"""MoTProcessor with an image processor: pictures as pixels and placeholders, in documents, prompts and back."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_mot.image_processing import MoTImageProcessor
from modeling_mot.processing_mot import MoTProcessor
from modeling_mot.processing_vocabulary import SPECIAL_TOKENS, extend_tokenizer, without_codes
from tests.modeling_mot.test_processor import AUDIO, TEXTS, build_processor, text
from tests.modeling_mot.test_remote_code import BLOCK
from tests.modeling_mot.test_speech_tokenizer import tokenizer_with_random_units
from training.tokenizers.text import train_text_tokenizer


# Twice the size of what the processor makes, so that it has something to do.
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 48, 3), dtype=np.uint8), "RGB") for i in range(3)
]
PLACEHOLDERS = ["<|boi|>", *["<|image|>"] * 6, "<|eoi|>"]


def image(number: int = 0) -> dict:
    return {"type": "image", "image": PICTURES[number]}


def build_continuous(with_speech: bool = False, **settings) -> MoTProcessor:
    speech = tokenizer_with_random_units() if with_speech else None
    tokenizer = extend_tokenizer(train_text_tokenizer(TEXTS, 320), 0, speech.num_units if speech else 0)
    pictures = MoTImageProcessor(**({"image_size": [16, 24], "downsampling": 8} | settings))
    return MoTProcessor(tokenizer, None, speech, pictures)


@pytest.fixture(scope="module")
def processor():
    return build_continuous()


def tokens(processor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(list(ids))


def expected_pixels(number: int, size=(24, 16)) -> np.ndarray:
    resized = PICTURES[number].resize(size, Image.Resampling.BICUBIC)
    return np.moveaxis(np.asarray(resized), -1, 0) / 127.5 - 1


# -- encoding ---------------------------------------------------------------------------------------------------------


def test_a_picture_is_markers_around_a_placeholder_for_each_patch(processor):
    batch = processor([text("a cat"), image(0), text("b"), image(1)])
    words = [processor.tokenizer.tokenize(value) for value in ("a cat", "b")]
    expected = ["<|bos|>", *words[0], *PLACEHOLDERS, *words[1], *PLACEHOLDERS, "<|eos|>"]
    assert tokens(processor, batch["input_ids"]) == expected
    assert batch["modality_ids"] == [int(token == "<|image|>") for token in expected]


def test_pixels_come_in_order_of_appearance(processor):
    documents = [[text("a"), image(2), image(0)], [text("b")], [image(1)]]
    values = processor(documents)["pixel_values"]
    assert values.shape == (3, 3, 16, 24) and values.dtype == np.float32
    for value, number in zip(values, (2, 0, 1), strict=True):
        assert np.allclose(value, expected_pixels(number), atol=1e-6)


@pytest.mark.parametrize("kind, expected", [("pt", torch.Tensor), ("np", np.ndarray)])
def test_return_tensors(processor, kind, expected):
    batch = processor([[image(0)], [image(1)]], return_tensors=kind)
    assert set(batch) == {"input_ids", "attention_mask", "modality_ids", "pixel_values"}
    assert all(isinstance(value, expected) for value in batch.values())
    assert "float32" in str(batch["pixel_values"].dtype)


def test_without_a_picture_there_are_no_pixels(processor):
    assert set(processor([text("a")])) == {"input_ids", "attention_mask", "modality_ids"}
    assert set(processor(text="a")) == {"input_ids", "attention_mask", "modality_ids"}


def test_pictures_of_different_sizes_are_padded_with_zeros_and_measured():
    processor = build_continuous(fit="keep")
    small = PICTURES[1].resize((16, 24))
    batch = processor([image(0), {"type": "image", "image": small}], return_tensors="pt")
    assert batch["image_sizes"].tolist() == [[32, 48], [24, 16]]
    values = batch["pixel_values"]
    assert values.shape == (2, 3, 32, 48)
    assert np.allclose(values[1, :, :24, :16], np.moveaxis(np.asarray(small), -1, 0) / 127.5 - 1, atol=1e-6)
    assert not values[1, :, 24:].any() and not values[1, :, :, 16:].any()
    assert tokens(processor, batch["input_ids"][0]).count("<|image|>") == 4 * 6 + 3 * 2


def test_placeholders_in_prompts_equal_documents(processor):
    prompt = processor(text="a<|image|> cat<|image|>", images=[PICTURES[0], PICTURES[1]])
    document = processor([text("a"), image(0), text(" cat"), image(1)], add_eos=False)
    assert prompt["input_ids"] == [document["input_ids"]]
    assert prompt["modality_ids"] == [document["modality_ids"]]
    assert np.array_equal(prompt["pixel_values"], document["pixel_values"])


def test_placeholders_and_pictures_must_match(processor):
    with pytest.raises(ValueError, match="should be the same as the number of images"):
        processor(text="a<|image|>", images=PICTURES[:2])


def test_a_truncated_prompt_with_a_picture_is_refused(processor):
    with pytest.raises(ValueError, match="[Mm]ismatch"):
        processor(text="a<|image|>", images=PICTURES[:1], truncation=True, max_length=5)


def test_a_chat_places_its_pictures_and_cannot_write_placeholders(processor):
    content = [image(0), text("what is <|image|>?"), image(1)]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    assert tokens(processor, batch["input_ids"][0]).count("<|image|>") == 12
    assert np.allclose(batch["pixel_values"][1], expected_pixels(1), atol=1e-6)
    segments = processor.decode_document(batch["input_ids"][0], images=PICTURES[:2])
    assert [s["type"] for s in segments] == ["text", "image", "text", "image", "text"]
    assert segments[2]["text"] == "what is <|image|>?"


def test_continuation_opens_a_picture(processor):
    batch = processor([image(0), text("flip it")], continue_with="image")
    assert tokens(processor, batch["input_ids"])[-1] == "<|boi|>" and batch["pixel_values"].shape[0] == 1


@pytest.mark.parametrize("value", [*SPECIAL_TOKENS.values(), "a<|boi|><|image|><|eoi|>"])
def test_special_tokens_in_text_stay_text(processor, value):
    batch = processor([text(value)])
    assert set(batch["modality_ids"]) == {0} and not set(batch["input_ids"][1:-1]) & set(
        processor.tokenizer.all_special_ids
    )
    assert processor.decode_document(batch["input_ids"]) == [text(value)]


def test_segments_equal_documents(processor):
    assert processor.encode_segment(image(0)) == processor([image(0)])["input_ids"][1:-1]
    assert processor.encode_images(PICTURES) == processor.encode_pictures(PICTURES)[0]


# -- vocabulary -------------------------------------------------------------------------------------------------------


def test_config_kwargs_make_a_transfusion_config(processor):
    from modeling_mot.configuration_mot_transfusion import MoTTransfusionConfig

    for built in (processor, build_continuous(with_speech=True)):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        kwargs = built.config_kwargs()
        modalities = kwargs.pop("modalities")
        config = MoTTransfusionConfig.from_variant("mot", modalities=modalities, **sizes, **kwargs)
        assert config.vocab_size == len(built.tokenizer) and config.image_token_id == built.image_token_id
        assert config.modalities == built.modalities


def test_speech_keeps_its_units_beside_continuous_pictures():
    processor = build_continuous(with_speech=True)
    size = processor.modality_token_ranges["text"][1]
    assert processor.modalities == ["text", "image", "speech"]
    assert processor.config_kwargs()["modality_token_ranges"] == {"text": [0, size], "speech": [size, size + 16]}
    batch = processor([text("a"), image(0), AUDIO])
    names = tokens(processor, batch["input_ids"])
    assert batch["modality_ids"] == [1 if n == "<|image|>" else 2 if "|speech_" in n else 0 for n in names]
    segments = processor.decode_document(batch["input_ids"], images=[PICTURES[0]])
    assert [s["type"] for s in segments] == ["text", "image", "audio"]


def test_modality_ids_have_the_form_of_the_ids():
    processor = build_continuous(with_speech=True)
    size = processor.modality_token_ranges["text"][1]
    ids = [[0, processor.image_token_id], [size - 1, size]]
    for made in (ids, np.array(ids), torch.tensor(ids)):
        found = processor.modality_ids_of(made)
        assert type(found) is type(made) and np.array_equal(np.asarray(found), [[0, 1], [0, 2]])


def test_the_fingerprint_notices_every_setting(processor):
    others = [
        build_continuous(**settings) for settings in ({}, {"downsampling": 4}, {"fit": "pad"}, {"image_size": [8, 8]})
    ]
    prints = [other.fingerprint() for other in others]
    assert prints[0] == processor.fingerprint() and len(set(prints)) == 4


def test_a_vocabulary_without_codes_encodes_text_the_same():
    discrete = build_processor()
    stripped = without_codes(discrete.tokenizer)
    first, size = discrete.modality_token_ranges["text"]
    assert len(stripped) == size and max(stripped.get_vocab().values()) == size - 1
    for value in ("the cat <|eos|>", "<|image_3|>", "ünïcödé"):
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        assert stripped(value, **plain)["input_ids"] == discrete.tokenizer(value, **plain)["input_ids"]
    assert stripped("a")["input_ids"] == discrete.tokenizer("a")["input_ids"]
    assert [getattr(stripped, f"{name}_id") for name in SPECIAL_TOKENS] == [
        getattr(discrete.tokenizer, f"{name}_id") for name in SPECIAL_TOKENS
    ]
    assert len(discrete.tokenizer) > size


def test_tokens_after_the_codes_are_not_lost_in_silence():
    tokenizer = build_processor().tokenizer
    tokenizer.add_tokens(["<|more|>"])
    with pytest.raises(ValueError, match="1 tokens follow the image and speech tokens"):
        without_codes(tokenizer)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_codes_and_pixels_exclude_each_other():
    discrete = build_processor()
    for tokenizer, codes in ((discrete.tokenizer, discrete.image_tokenizer), (discrete.tokenizer, None)):
        with pytest.raises(ValueError, match="either codes .* or pixels"):
            MoTProcessor(tokenizer, codes, image_processor=MoTImageProcessor([16, 16], 8))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"image_size": [16, 20]}, r"image_size=\[16, 20\].*multiples of 8"),
        ({"image_size": [16]}, r"image_size=\[16\]"),
        ({"downsampling": 0}, "downsampling=0"),
        ({"fit": "stretch"}, "fit='stretch' is not one of crop, pad, keep"),
        ({"resample": "best"}, "resample='best'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoTImageProcessor(**({"image_size": [16, 24], "downsampling": 8} | settings))


def test_a_kept_picture_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="picture of 30 x 20 pixels: 20 x 30 pixels do not divide .*fit='crop'"):
        build_continuous(fit="keep")([{"type": "image", "image": PICTURES[0].resize((30, 20))}])


# -- decoding ---------------------------------------------------------------------------------------------------------


def test_decoding_gives_the_segments_back(processor):
    document = [text("one. "), image(0), text(" two"), image(1), image(2)]
    assert processor.decode_document(processor(document)["input_ids"], images=PICTURES) == document


@pytest.mark.parametrize("given", [None, [], PICTURES[:1], PICTURES])
def test_too_few_and_too_many_pictures_are_counted(processor, given):
    ids = processor([image(0), text("a"), image(1)])["input_ids"]
    with pytest.raises(ValueError, match=f"has 2 images of placeholders but images= gives {len(given or [])}"):
        processor.decode_document(ids, images=given)


def test_an_unfinished_picture_is_refused_or_dropped(processor):
    ids = processor([text("a"), image(0)], add_eos=False)["input_ids"]
    for cut in (ids[:-1], ids[:-7]):
        with pytest.raises(ValueError, match=r"placeholders and no <\|eoi\|>"):
            processor.decode_document(cut, images=PICTURES[: cut.count(processor.image_token_id) > 0])
        assert processor.decode_document(cut, allow_incomplete=True) == [text("a")]


def test_stray_placeholders_are_refused(processor):
    with pytest.raises(ValueError, match=r"<\|image\|> at position 1 stands outside"):
        processor.decode_document([processor.tokenizer.bos_token_id, processor.image_token_id])


def test_pictures_go_with_an_image_processor_and_grids_with_a_tokenizer(processor):
    with pytest.raises(ValueError, match="images= go with an image processor"):
        discrete = build_processor()
        discrete.decode_document(discrete([text("a")])["input_ids"], images=[])
    with pytest.raises(ValueError, match="image_grids= go with an image tokenizer"):
        processor.decode_document(processor([text("a")])["input_ids"], image_grids=[(1, 1)])


def test_post_processing_reads_what_generate_returns(processor):
    documents = [[text("a"), image(0), image(1)], [text("a cat")]]
    ids = processor(documents, padding=True, return_tensors="pt")["input_ids"]
    output = SimpleNamespace(sequences=ids, images=[PICTURES[:2], []])
    assert processor.post_process_multimodal_output(output) == ["a", "a cat"]
    assert processor.post_process_multimodal_output(output, generation_mode="image") == [PICTURES[:2], []]
    assert processor.post_process_multimodal_output(output, generation_mode="document") == documents
    assert processor.post_process_multimodal_output(ids) == ["a", "a cat"]


def test_pictures_that_generate_drew_are_the_last_of_a_document(processor):
    ids = processor([image(0), text("flip it"), image(1)], return_tensors="pt")["input_ids"]
    output = SimpleNamespace(sequences=ids, images=[[PICTURES[1]]])
    expected = [text("flip it"), image(1)]
    assert processor.post_process_multimodal_output(output, generation_mode="document") == [expected]
    assert processor.post_process_multimodal_output(output, generation_mode="image") == [[PICTURES[1]]]


def test_pixels_to_pictures_and_back(processor):
    batch = processor([image(0), image(1)])
    pictures = MoTImageProcessor.to_pictures(batch["pixel_values"])
    again = processor([{"type": "image", "image": picture} for picture in pictures])
    assert np.array_equal(again["pixel_values"], batch["pixel_values"])
    assert MoTImageProcessor.to_pictures(batch["pixel_values"], [(8, 16), (16, 8)])[0].size == (16, 8)


# -- saving and loading -----------------------------------------------------------------------------------------------


def test_saved_and_loaded_processors_agree(processor, tmp_path):
    for number, built in enumerate((processor, build_continuous(with_speech=True, fit="pad", background=[0, 9, 0]))):
        built.save_pretrained(tmp_path / str(number))
        loaded = MoTProcessor.from_pretrained(tmp_path / str(number))
        assert loaded.fingerprint() == built.fingerprint() and loaded.config_kwargs() == built.config_kwargs()
        one, other = built([text("a"), image(0)]), loaded([text("a"), image(0)])
        assert one["input_ids"] == other["input_ids"] and np.array_equal(one["pixel_values"], other["pixel_values"])


CLEAN_PROCESS = (
    BLOCK
    + """
import json, sys
from PIL import Image
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
batch = processor([{"type": "text", "text": "a cat"}, {"type": "image", "image": Image.new("RGB", (40, 40), "red")}])
print(json.dumps([batch["input_ids"], list(batch["pixel_values"].shape), processor.fingerprint()]))
"""
)


def test_saved_folder_loads_in_a_clean_process(processor, tmp_path):
    import json

    processor.save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", CLEAN_PROCESS, str(tmp_path / "saved")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ids, shape, fingerprint = json.loads(result.stdout.strip().splitlines()[-1])
    document = [text("a cat"), {"type": "image", "image": Image.new("RGB", (40, 40), "red")}]
    assert ids == processor(document)["input_ids"] and shape == [1, 3, 16, 24]
    assert fingerprint == processor.fingerprint()


def test_an_unknown_setting_in_a_saved_folder_is_named(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "image_processor" / "image_processor_config.json").write_text('{"image_sise": [16, 16]}')
    with pytest.raises(ValueError, match="unknown image processor setting image_sise"):
        MoTProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", np.int64(-3)), ("image_size", 2.5), ("image_size", [16]), ("image_size", None),
        ("downsampling", 0), ("downsampling", "16"),
        ("fit", np.zeros(0)), ("background", 3), ("background", [300, 0, 0]), ("max_pixels", 0),
    ],
)  # fmt: skip
def test_settings_of_pictures_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        MoTImageProcessor(**{name: value})


def test_sizes_of_numpy_are_taken():
    assert MoTImageProcessor(image_size=np.int64(32)) == MoTImageProcessor(image_size=[32, 32])
