"""MoTProcessor: documents to tokens and back, prompts with placeholders, padding, saving, bad input."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoProcessor

from modeling_mot.image_tokenizer import ImageTokenizerConfig, MoTImageTokenizer
from modeling_mot.processing_mot import MoTProcessor
from modeling_mot.processing_vocabulary import SPECIAL_TOKENS, code_token, extend_tokenizer
from tests.modeling_mot.test_image_tokenizer import TINY
from tests.modeling_mot.test_remote_code import BLOCK
from tests.modeling_mot.test_speech_tokenizer import tokenizer_with_random_units
from training.tokenizers.text import train_text_tokenizer


TEXTS = ["a red apple on a green table", "the cat sat on the mat", "what is this? a picture of a cat."] * 4
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
SOUND = np.sin(np.arange(8000) * 0.1).astype(np.float32)


def text(value: str) -> dict:
    return {"type": "text", "text": value}


IMAGE = {"type": "image", "image": PICTURE}
AUDIO = {"type": "audio", "audio": SOUND, "sampling_rate": 16_000}


def build_processor(**image_settings) -> MoTProcessor:
    torch.manual_seed(0)
    image = MoTImageTokenizer(ImageTokenizerConfig(image_size=[16, 16], patch_size=2, model=TINY, **image_settings))
    image.codebook.data.normal_()
    speech = tokenizer_with_random_units()
    tokenizer = extend_tokenizer(train_text_tokenizer(TEXTS, 320), image.num_codes, speech.num_units)
    return MoTProcessor(tokenizer, image, speech)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def tokens(processor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(list(ids))


# -- the vocabulary ---------------------------------------------------------------------------------------------------


def test_ranges_are_contiguous_and_named(processor):
    ranges = processor.modality_token_ranges
    text_size = ranges["text"][1]
    assert ranges == {
        "text": [0, text_size],
        "image": [text_size, text_size + 32],
        "speech": [text_size + 32, text_size + 48],
    }
    vocabulary = processor.tokenizer.get_vocab()
    assert vocabulary[code_token("image", 5)] == text_size + 5
    assert vocabulary[code_token("speech", 5)] == text_size + 37
    assert all(vocabulary[token] < text_size for token in SPECIAL_TOKENS.values())


def test_config_kwargs_make_a_config(processor):
    from modeling_mot import MoTConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    kwargs = processor.config_kwargs()
    modalities = kwargs.pop("modalities")
    config = MoTConfig.from_variant("mot", modalities=modalities, **sizes, **kwargs)
    assert config.vocab_size == len(processor.tokenizer) and config.image_grid == [4, 4]
    assert config.modality_token_ranges == processor.modality_token_ranges


def test_an_extended_tokenizer_keeps_its_own_tokens():
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(
        tokenizer_object=train_text_tokenizer(TEXTS, 320).backend_tokenizer, bos_token="<|turn|>", eos_token="<|eoi|>"
    )
    before = len(other)
    extend_tokenizer(other, 4, 3)
    assert (other.bos_token, other.eos_token, other.pad_token) == ("<|turn|>", "<|eoi|>", "<|pad|>")
    assert MoTProcessor(other).modality_token_ranges == {
        "text": [0, before],
        "image": [before, before + 4],
        "speech": [before + 4, before + 7],
    }


def test_extending_twice_is_refused(processor):
    with pytest.raises(ValueError, match="already holds"):
        extend_tokenizer(processor.tokenizer, 4, 3)


def test_a_tokenizer_that_was_not_extended_is_refused():
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=train_text_tokenizer(TEXTS, 320).backend_tokenizer)
    with pytest.raises(ValueError, match="extend_tokenizer"):
        MoTProcessor(plain)


def test_sub_tokenizers_of_another_size_are_refused(processor):
    with pytest.raises(ValueError, match="holds 16 speech tokens"):
        MoTProcessor(processor.tokenizer, processor.image_tokenizer, tokenizer_with_random_units(8))


# -- documents --------------------------------------------------------------------------------------------------------


def test_document_is_bos_segments_eos(processor):
    ids = processor([text("a cat"), IMAGE, AUDIO])["input_ids"]
    codes = processor.image_tokenizer.encode([PICTURE])[0].flatten().tolist()
    units = processor.speech_tokenizer.encode([SOUND])[0].tolist()
    expected = ["<|bos|>", *processor.tokenizer.tokenize("a cat"), "<|boi|>", *(code_token("image", c) for c in codes)]
    expected += ["<|eoi|>", "<|bos_speech|>", *(code_token("speech", u) for u in units), "<|eos_speech|>", "<|eos|>"]
    assert tokens(processor, ids) == expected


def test_modality_ids_follow_the_tokens(processor):
    batch = processor([text("a"), IMAGE, AUDIO])
    expected = [1 if "|image_" in t else 2 if "|speech_" in t else 0 for t in tokens(processor, batch["input_ids"])]
    assert batch["modality_ids"] == expected and set(expected) == {0, 1, 2}


def test_decoding_gives_the_segments_back(processor):
    document = [text("one. "), IMAGE, text(" two"), AUDIO, text("three")]
    segments = processor.decode_document(processor(document)["input_ids"])
    assert [s["type"] for s in segments] == ["text", "image", "text", "audio", "text"]
    assert [s["text"] for s in segments if s["type"] == "text"] == ["one. ", " two", "three"]
    expected = processor.image_tokenizer.decode(processor.image_tokenizer.encode([PICTURE]))[0]
    assert np.array_equal(np.asarray(segments[1]["image"]), np.asarray(expected))
    assert segments[3]["audio"].shape == (13 * 640,) and segments[3]["sampling_rate"] == 16_000


@pytest.mark.parametrize("value", ["ünïcödé 漢字 🍎", "a\n\tb  c ", " leading", "x" * 300, "\x00\x7f"])
def test_any_text_survives(processor, value):
    assert processor.decode_document(processor([text(value)])["input_ids"]) == [text(value)]


@pytest.mark.parametrize(
    "value", [*SPECIAL_TOKENS.values(), "<|image_3|>", "<|speech_3|>", "a<|eos|>b<|boi|><|image_0|>"]
)
def test_special_tokens_in_text_stay_text(processor, value):
    ids = processor([text(value)])["input_ids"]
    assert not set(ids[1:-1]) & set(processor.tokenizer.all_special_ids)
    assert max(processor([text(value)])["modality_ids"]) == 0
    assert processor.decode_document(ids) == [text(value)]


@pytest.mark.parametrize("modality, opening", [("image", ["<|boi|>"]), ("audio", ["<|bos_speech|>"]), ("text", [])])
def test_continuation_opens_the_next_segment(processor, modality, opening):
    ids = processor([text("a cat")], continue_with=modality)["input_ids"]
    assert tokens(processor, ids) == ["<|bos|>", *processor.tokenizer.tokenize("a cat"), *opening]


def test_continuation_of_nothing_is_unconditional(processor):
    assert tokens(processor, processor([[]], continue_with="image")["input_ids"][0]) == ["<|bos|>", "<|boi|>"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stands_on_the_asked_side(processor, side):
    short, long = [text("a")], [text("a"), IMAGE]
    batch = processor([short, long], padding=True, padding_side=side, return_tensors="pt")
    alone = torch.tensor(processor(short)["input_ids"])
    width = batch["input_ids"].shape[1]
    place = slice(width - len(alone), width) if side == "left" else slice(0, len(alone))
    assert torch.equal(batch["input_ids"][0, place], alone)
    assert batch["attention_mask"][0].sum() == len(alone) and batch["attention_mask"][0, place].all()
    padding = batch["input_ids"][0][batch["attention_mask"][0] == 0]
    assert (padding == processor.tokenizer.pad_token_id).all() and len(padding) == width - len(alone)


@pytest.mark.parametrize("kind, expected", [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_return_tensors(processor, kind, expected):
    batch = processor([[text("a")], [text("a")]], return_tensors=kind)
    assert set(batch) == {"input_ids", "attention_mask", "modality_ids"}
    assert all(isinstance(value, expected) for value in batch.values())


def test_segments_equal_batches_of_the_data_cache(processor):
    assert processor.encode_segment(IMAGE) == processor.encode_images([PICTURE])[0]
    assert processor.encode_segment(AUDIO) == processor.encode_audio([SOUND], 16_000)[0]
    assert processor.encode_segment(text("a cat")) == processor([text("a cat")])["input_ids"][1:-1]


def test_pictures_of_other_sizes_decode_with_their_grids():
    processor = build_processor(fit="keep")
    wide = np.concatenate([PICTURE, PICTURE], axis=1)
    ids = processor([IMAGE, {"type": "image", "image": wide}])["input_ids"]
    segments = processor.decode_document(ids, image_grids=[(4, 4), (4, 8)])
    assert [s["image"].size for s in segments] == [(16, 16), (32, 16)]


def test_text_alone_needs_no_other_tokenizer():
    processor = MoTProcessor(extend_tokenizer(train_text_tokenizer(TEXTS, 320)))
    assert processor.modalities == ["text"]
    assert processor.decode_document(processor([text("a cat")])["input_ids"]) == [text("a cat")]
    with pytest.raises(ValueError, match="no image tokenizer"):
        processor([IMAGE])


# -- bad documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document, message",
    [
        ([{"type": "imgae", "image": PICTURE}], "did you mean 'image'"),
        ([{"type": "adio", "audio": SOUND}], "did you mean 'audio'"),
        ([{"type": "spech", "speech": SOUND}], "did you mean 'speech'"),
        ([{"type": "speech", "speech": None}], "has no 'audio' entry"),
        ([text("")], "segment 0 is an empty text"),
        ([text("a"), text(" \n")], "segment 1 is an empty text"),
        ([{"type": "image"}], "has no 'image' entry"),
        ([{"type": "text", "image": PICTURE}], "has no 'text' entry"),
        ([[]], "non-empty list"),
        ([], "non-empty list"),
    ],
)
def test_malformed_documents_are_refused(processor, document, message):
    with pytest.raises(ValueError, match=message):
        processor(document)


SPEECH = [
    {"type": "speech", "speech": SOUND, "sampling_rate": 16_000},
    {"type": "speech", "audio": SOUND, "sampling_rate": 16_000},
    {"type": "audio", "speech": SOUND, "sampling_rate": 16_000},
    {"type": "speech", "speech": {"array": SOUND, "sampling_rate": 16_000}, "audio": None},
]


@pytest.mark.parametrize("segment", SPEECH, ids=["speech", "type", "entry", "record"])
def test_speech_is_another_name_of_audio(processor, segment):
    given = dict(segment)
    assert processor([text("a"), segment]) == processor([text("a"), AUDIO])
    assert processor.encode_segment(segment) == processor.encode_segment(AUDIO)
    chats = [[{"role": "user", "content": [text("a"), block]}] for block in (segment, AUDIO)]
    spoken, heard = (processor.apply_chat_template(chat, tokenize=True, return_dict=True) for chat in chats)
    assert spoken == heard
    rendered = [processor.apply_chat_template(chat, tokenize=False) for chat in chats]
    assert rendered[0] == rendered[1] and rendered[0].count("<|audio|>") == 1
    assert segment.keys() == given.keys() and segment["type"] == given["type"]


def test_generated_speech_is_found_under_either_name(processor):
    ids = [processor([AUDIO])["input_ids"]]
    (spoken,), (heard,) = (
        processor.post_process_multimodal_output(ids, generation_mode=m) for m in ("speech", "audio")
    )
    assert len(spoken) == 1 and np.array_equal(spoken[0], heard[0])
    assert processor([text("a")], continue_with="speech") == processor([text("a")], continue_with="audio")


def test_generate_opens_speech_under_either_name(tiny_model):
    prompt = torch.tensor([[1, 10, 11]])
    model = tiny_model()
    spoken, heard = (
        model.generate(prompt, generation_mode=mode, max_new_tokens=6, do_sample=False) for mode in ("speech", "audio")
    )
    assert torch.equal(spoken, heard) and spoken[0, 3] == 5


def test_missing_and_broken_files_are_named(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        processor([{"type": "image", "image": str(tmp_path / "nowhere.png")}])
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="broken.png"):
        processor([{"type": "image", "image": tmp_path / "broken.png"}])


def test_contradictory_endings_are_refused(processor):
    with pytest.raises(ValueError, match="cannot continue"):
        processor([text("a")], add_eos=True, continue_with="image")
    with pytest.raises(ValueError, match="not one of"):
        processor([text("a")], continue_with="video")


def test_documents_are_not_truncated(processor):
    with pytest.raises(ValueError, match="more than max_length=5"):
        processor([text("a"), IMAGE], max_length=5)


def test_documents_of_different_lengths_need_padding(processor):
    with pytest.raises(ValueError, match="padding=True"):
        processor([[text("a")], [IMAGE]], return_tensors="pt")


def test_ids_outside_the_vocabulary_are_refused(processor):
    size = len(processor.tokenizer)
    for bad in (size, -1):
        with pytest.raises(ValueError, match=f"token id {bad} at position 1"):
            processor.decode_document([1, bad])


@pytest.mark.parametrize("mode", ["text", "image", "audio", "document"])
def test_outputs_with_ids_of_no_token_are_refused(processor, mode):
    size = len(processor.tokenizer)
    with pytest.raises(ValueError, match=f"has {size}, and must be token ids, .* in \\[0, {size}\\)"):
        processor.post_process_multimodal_output(torch.tensor([[1, size]]), generation_mode=mode)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_decoding_to_text_is_the_tokenizers_and_refuses_ids_of_no_token(processor, form):
    tokenizer, size = processor.tokenizer, len(processor.tokenizer)
    rows = tokenizer(TEXTS[:1] * 2).input_ids
    single, several = form(rows[0]), form(rows)
    skip = {"skip_special_tokens": True}
    assert processor.decode(single) == processor.decode(token_ids=single) == tokenizer.decode(rows[0])
    assert processor.decode(several, **skip) == tokenizer.batch_decode(rows, **skip) == TEXTS[:1] * 2
    assert (
        processor.batch_decode(several, **skip) == processor.post_process_image_text_to_text(several) == TEXTS[:1] * 2
    )
    assert processor.decode(rows[0][1]) == tokenizer.decode(rows[0][1])
    for decode in (processor.decode, processor.batch_decode, processor.post_process_image_text_to_text):
        for wrong in (size, -100):
            with pytest.raises(
                ValueError, match=rf"has {wrong}, and must be token ids, \(batch, length\), in \[0, {size}"
            ):
                decode(form([rows[0][:3] + [wrong], rows[0][:4]]))


def test_truncated_image_is_refused_or_filled_up(processor):
    ids = processor([text("a"), IMAGE])["input_ids"][:-8]
    with pytest.raises(ValueError, match="an image has 10 codes.*needs 16"):
        processor.decode_document(ids)
    segments = processor.decode_document(ids, allow_incomplete=True)
    assert segments[1]["image"].size == (16, 16)


def test_stray_codes_are_refused_or_dropped(processor):
    stray = [processor.tokenizer.bos_token_id, processor.modality_token_ranges["image"][0]]
    with pytest.raises(ValueError, match="outside its begin and end markers"):
        processor.decode_document(stray)
    assert processor.decode_document(stray, allow_incomplete=True) == []


def test_truncated_speech_is_refused_or_decoded_as_far_as_it_goes(processor):
    ids = processor([AUDIO])["input_ids"][:-4]
    with pytest.raises(ValueError, match="a sound has 11 units"):
        processor.decode_document(ids)
    assert processor.decode_document(ids, allow_incomplete=True)[0]["audio"].shape == (11 * 640,)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_placeholders_equal_documents(processor):
    prompt = processor(text="a<|image|> cat<|audio|>", images=[PICTURE], audio=[SOUND])
    document = processor([text("a"), IMAGE, text(" cat"), AUDIO], add_eos=False)
    assert prompt["input_ids"] == [document["input_ids"]]
    assert prompt["modality_ids"] == [document["modality_ids"]]


def test_plain_text_equals_the_tokenizer(processor):
    assert processor(text="the cat")["input_ids"] == processor.tokenizer("the cat")["input_ids"]


def test_nested_images_are_spread_over_the_batch(processor):
    batch = processor(text=["a<|image|>", "b", "c<|image|>"], images=[[PICTURE], [], [PICTURE]], padding=True)
    assert [sum(row) for row in batch["modality_ids"]] == [16, 0, 16]


@pytest.mark.parametrize(
    "inputs",
    [
        {"text": "<|image|>"},
        {"text": "a", "images": [PICTURE]},
        {"text": ["<|image|>", "<|image|>"], "images": [PICTURE]},
        {"text": "<|audio|><|audio|>", "audio": [SOUND]},
        {},
    ],
)
def test_placeholders_must_match(processor, inputs):
    with pytest.raises(ValueError, match="should be the same as the number of|nothing to process"):
        processor(**inputs)


def test_documents_and_text_exclude_each_other(processor):
    with pytest.raises(ValueError, match="not both"):
        processor([text("a")], text="a")


def conversation(words: str) -> list[dict]:
    content = [{"type": "image", "image": PICTURE}, text(words), {"type": "audio", "audio": SOUND}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]


def test_chat_template_places_pictures_and_sounds(processor):
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(conversation("what is it?"), **options)
    segments = processor.decode_document(batch["input_ids"][0])
    assert [s["type"] for s in segments] == ["text", "image", "text", "audio", "text"]
    assert segments[4]["text"] == "<|end_turn|><|turn|>assistant\na cat<|end_turn|><|turn|>assistant\n"


def test_chat_text_cannot_write_control_tokens(processor):
    batch = processor.apply_chat_template(conversation("<|eos|><|image|>"), tokenize=True, return_dict=True)
    ids = batch["input_ids"][0]
    assert processor.tokenizer.eos_token_id not in ids and sum(t == "<|boi|>" for t in tokens(processor, ids)) == 1
    assert processor.decode_document(ids)[2]["text"] == "<|eos|><|image|>"


def test_a_rendered_chat_gets_no_second_begin_token(processor):
    chat, media = conversation("what is it?"), {"images": [PICTURE], "audio": [SOUND]}
    rendered = processor.apply_chat_template(chat, tokenize=False)
    expected = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert processor(text=rendered, **media)["input_ids"] == expected["input_ids"]
    assert processor(text=rendered, **media, add_special_tokens=True)["input_ids"][0][:2] == [1, 1]  # as it is told


@pytest.mark.parametrize("options", [{}, {"return_tensors": "pt"}, {"truncation": True, "max_length": 2}])
def test_each_prompt_of_a_batch_gets_one_begin_token(processor, options):
    prompts = ["<|bos|>the cat sat", "the cat sat", "<|bos|>", ""]
    batch = processor(text=prompts, padding=True, padding_side="left", **options)
    rows = [[int(token) for token in row if token != processor.tokenizer.pad_token_id] for row in batch["input_ids"]]
    assert rows[0] == rows[1] and rows[2] == rows[3] == [processor.bos_token_id]
    assert [sum(map(int, mask)) for mask in batch["attention_mask"]] == [len(row) for row in rows]
    assert rows[0] == processor([text("the cat sat")], add_eos=False)["input_ids"][: options.get("max_length")]


def spans(processor):
    """Text, a picture, text, a sound, text: the tokens, and where picture and sound begin and end."""
    prompt = {"text": "the cat<|image|> sat on<|audio|> a mat", "images": [PICTURE], "audio": [SOUND]}
    ids = processor(**prompt)["input_ids"][0]
    names = tokens(processor, ids)
    bounds = [(names.index(first), names.index(last) + 1) for first, last in
              (("<|boi|>", "<|eoi|>"), ("<|bos_speech|>", "<|eos_speech|>"))]  # fmt: skip
    return prompt, ids, bounds


@pytest.mark.parametrize("padding", [False, "max_length"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_cuts_no_picture_and_no_sound(processor, monkeypatch, side, padding):
    monkeypatch.setattr(processor.tokenizer, "truncation_side", side)
    prompt, ids, bounds = spans(processor)
    for limit in range(1, len(ids) + 3):
        batch = processor(**prompt, truncation=True, max_length=limit, padding=padding)
        kept = [i for i, mask in zip(batch["input_ids"][0], batch["attention_mask"][0]) if mask]
        # By hand: one token after another, or a whole span, from one end on, as long as it fits.
        pieces, place = [], 1
        while place < len(ids):
            end = next((last for first, last in bounds if first == place), place + 1)
            pieces.append(ids[place:end])
            place = end
        expected, pieces = [], pieces if side == "right" else pieces[::-1]
        for piece in pieces:
            if 1 + len(expected) + len(piece) > limit:
                break
            expected = expected + piece if side == "right" else piece + expected
        assert kept == [processor.bos_token_id, *expected]
        assert len(batch["input_ids"][0]) == (limit if padding else len(kept))
        assert len(batch["modality_ids"][0]) == len(batch["input_ids"][0])


def test_a_truncated_chat_has_whole_pictures(processor):
    chat = conversation("what is it?")
    whole = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
    inside = tokens(processor, whole).index("<|boi|>") + 5
    options = {"truncation": True, "max_length": inside}
    cut = processor.apply_chat_template(chat, tokenize=True, return_dict=True, processor_kwargs=options)
    assert cut["input_ids"][0] == whole[: inside - 5]


def test_what_is_cut_off_is_not_returned_where_there_are_pictures(processor):
    prompt, _, _ = spans(processor)
    with pytest.raises(ValueError, match="return_overflowing_tokens=True"):
        processor(**prompt, truncation=True, max_length=5, return_overflowing_tokens=True)


def test_text_that_fits_or_is_alone_is_truncated_by_the_tokenizer(processor):
    for options in ({"max_length": 3}, {"max_length": 30}, {"max_length": 3, "stride": 1}):
        expected = processor.tokenizer(["the cat sat on the mat"], truncation=True, **options)
        assert (
            processor(text=["the cat sat on the mat"], truncation=True, **options)["input_ids"] == expected["input_ids"]
        )


def test_a_tokenizer_that_begins_with_several_tokens_is_refused():
    tokenizer = extend_tokenizer(train_text_tokenizer(TEXTS, 320))
    twice = processors.TemplateProcessing(
        single="<|bos|> <|turn|> $A", special_tokens=[("<|bos|>", 1), ("<|turn|>", 9)]
    )
    tokenizer.backend_tokenizer.post_processor = twice
    with pytest.raises(ValueError, match="documents begin with one token or none"):
        MoTProcessor(tokenizer)([text("a")])


# -- saving and loading -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    return folder


def test_saved_and_loaded_processors_agree(processor, saved):
    loaded = MoTProcessor.from_pretrained(saved)
    document = [text("a cat <|eos|>"), IMAGE, AUDIO]
    assert loaded(document)["input_ids"] == processor(document)["input_ids"]
    assert loaded.fingerprint() == processor.fingerprint()
    assert loaded.config_kwargs() == processor.config_kwargs()


def test_how_the_last_call_cut_and_padded_is_not_saved(tmp_path):
    processor = build_processor()
    processor(text=["the cat", "a"], truncation=True, max_length=2, padding="max_length")
    processor.save_pretrained(tmp_path)
    for document in ([text("a red apple on a green table")], [text("a")]):
        assert MoTProcessor.from_pretrained(tmp_path)(document)["input_ids"] == processor(document)["input_ids"]


def test_fingerprint_ignores_calls_and_notices_weights():
    processor = build_processor()
    before = processor.fingerprint()
    processor(text=["a", "the cat"], padding=True)
    assert processor.fingerprint() == before
    processor.speech_tokenizer.centroids[0, 0] += 1
    assert processor.fingerprint() != before


def test_a_part_can_be_left_out_when_loading(saved):
    assert MoTProcessor.from_pretrained(saved, speech_tokenizer=None).speech_tokenizer is None


def test_processors_without_a_part_load(processor, tmp_path):
    tokenizer = extend_tokenizer(train_text_tokenizer(TEXTS, 320), num_speech_units=16)
    MoTProcessor(tokenizer, None, processor.speech_tokenizer).save_pretrained(tmp_path)
    loaded = MoTProcessor.from_pretrained(tmp_path)
    assert loaded.image_tokenizer is None and loaded.modalities == ["text", "speech"]


CLEAN_PROCESS = (
    BLOCK
    + """
import json, sys
import numpy as np
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
sound = np.sin(np.arange(8000) * 0.1).astype(np.float32)
ids = processor([{"type": "text", "text": "a cat"}, {"type": "audio", "audio": sound}])["input_ids"]
processor.save_pretrained(sys.argv[2])
print(json.dumps([ids, processor.fingerprint()]))
"""
)


def test_saved_folder_loads_in_a_clean_process(processor, saved, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    again = tmp_path / "again"
    command = [sys.executable, "-c", CLEAN_PROCESS, str(saved), str(again)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ids, fingerprint = json.loads(result.stdout.strip().splitlines()[-1])
    assert ids == processor([text("a cat"), AUDIO])["input_ids"] and fingerprint == processor.fingerprint()
    assert {p.name for p in saved.iterdir()} == {p.name for p in again.iterdir()}


def test_auto_processor_finds_a_local_folder(processor, saved):
    loaded = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
    assert loaded.fingerprint() == processor.fingerprint()


def test_post_processing_returns_the_asked_modality(processor):
    ids = [processor([text("a"), IMAGE, AUDIO])["input_ids"]]
    assert processor.post_process_multimodal_output(ids)[0] == "a"
    assert processor.post_process_multimodal_output(ids, generation_mode="image")[0][0].size == (16, 16)
    assert len(processor.post_process_multimodal_output(ids, generation_mode="audio")[0]) == 1


TALK = {"role": "user", "content": "hi"}
NO_CONVERSATIONS = [
    None, "hi", 3, [], [[]], [{}], [None], [{"content": "hi"}], [{"role": 3, "content": "hi"}], [TALK, None],
    [[TALK], []], [{"role": "user", "content": 3}], [{"role": "user", "content": [{"type": "text", "text": 3}]}],
]  # fmt: skip


@pytest.mark.parametrize("conversation", NO_CONVERSATIONS, ids=repr)
def test_a_conversation_is_a_list_of_messages_with_a_role(processor, conversation):
    with pytest.raises(ValueError, match="conversation|message"):
        processor.apply_chat_template(conversation, tokenize=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("padding", "nope"), ("padding", 3), ("truncation", "nope"), ("padding_side", "middle"), ("max_length", "3"),
        ("max_length", math.nan), ("pad_to_multiple_of", 0), ("pad_to_multiple_of", 10**9), ("return_tensors", "tf"),
        ("continue_with", []), ("allow_paths", "no"),
    ],
)  # fmt: skip
def test_options_of_the_processor_are_refused_by_name(processor, name, value):
    for inputs in ({"documents": [{"type": "text", "text": "a cat"}]}, {"text": "a cat"}):
        with pytest.raises((ValueError, TypeError), match=name):
            processor(**inputs, **{name: value})


@pytest.mark.parametrize("ids", [None, "ids", 3.5, [None], [[1.5]], [-1], [10**12], ["a"]], ids=repr)
def test_what_is_no_sequence_of_tokens_is_not_decoded(processor, ids):
    with pytest.raises(ValueError, match="generated_outputs"):
        processor.post_process_multimodal_output(ids)
    with pytest.raises(ValueError, match="ids|id|token"):
        processor.decode_document(ids)


def test_a_segment_is_no_document(processor):
    with pytest.raises(ValueError, match="documents= must be"):
        processor(documents={"type": "text", "text": "a cat"})
