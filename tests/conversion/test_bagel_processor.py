"""BAGEL reads documents, answers, draws, edits and thinks, as its own code puts these together."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, Qwen2Tokenizer

from conversion.bagel_processor import (
    MOST_PIXELS,
    SHORTEST_FEATURES,
    SHORTEST_LATENTS,
    THINKING_PROMPTS,
    scaling_of_table,
)
from conversion.export_bagel import export_bagel
from conversion.import_bagel import import_bagel, main
from conversion.key_maps import ConversionError
from modeling_mot import MoTProcessor, MoTTransfusionModel, MoTTransfusionPipeline
from modeling_mot.image_processing import MoTImageProcessor
from tests.conversion.bagel_sources import FIXTURES, features_at, latents_at, numbers, write_checkpoint
from tests.conversion.tokenizer_sources import CHATML, bytes_backend, of_class


NAMES = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>")


def picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(values)}


def text(words):
    return {"type": "text", "text": words}


# A picture of 50 x 30 becomes 24 x 16 for the autoencoder (units of 4), and of that 28 x 14 for the encoder (of 7).
WIDE, SQUARE = picture(50, 30), picture(20, 20, seed=1)


def write_source(folder, **sizes):
    """Write a random checkpoint with a tokenizer of its vocabulary."""
    source = write_checkpoint(folder, vocab=400, **sizes)
    backend = bytes_backend(specials=["<|endoftext|>", *NAMES])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": list(NAMES)}
    tokenizer = of_class(Qwen2Tokenizer, backend, **names)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(source)
    return source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = write_source(tmp_path_factory.mktemp("bagel") / "source")
    import_bagel(str(source), source.parent / "mot")
    return source.parent / "mot"


@pytest.fixture(scope="module")
def model(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def framed(processor, words):
    start, end = map(processor.tokenizer.convert_tokens_to_ids, ("<|im_start|>", "<|im_end|>"))
    return [start, *processor.tokenizer(words, add_special_tokens=False)["input_ids"], end]


# ------------------------------------------------------------------------------------------------------------- pictures


def scaling(limits):
    return MoTImageProcessor(
        downsampling=limits["stride"], fit="scale", longest_side=limits["long_max"], shortest_side=limits["short_min"],
        most_scaled_pixels=limits["max_pixels"],
    )  # fmt: skip


def test_sizes_of_pictures_equal_bagel():
    recorded = json.loads((FIXTURES / "i_resize.json").read_text())
    assert recorded["vae"]["max_pixels"] == MOST_PIXELS
    latents, features = scaling(recorded["vae"]), scaling(recorded["vit"])
    for row in recorded["rows"]:
        assert latents.scaled_size(*row["input"]) == tuple(row["vae"])
        assert features.scaled_size(*row["vae"]) == tuple(row["vit_of_vae"])
        assert features.scaled_size(*row["input"]) == tuple(row["vit_alone"])


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("vae_small", {"stride": 16, "long_max": 64, "short_min": 32, "max_pixels": MOST_PIXELS}),
        ("vit_small", {"stride": 14, "long_max": 56, "short_min": 28, "max_pixels": MOST_PIXELS}),
    ],
)
def test_pixels_equal_bagel(name, limits):
    want = numbers("i_resize_pixels")
    made = scaling(limits)([Image.fromarray(want["picture"].numpy())])["pixel_values"][0]
    torch.testing.assert_close(torch.from_numpy(made), want[name], rtol=0, atol=1e-6)


def test_limits_follow_from_the_tables(processor):
    """Tables of 64 and 70 patches, as the published model has them, hold what BAGEL's code takes as its limits."""
    recorded = json.loads((FIXTURES / "i_resize.json").read_text())
    assert scaling_of_table(16, 64, SHORTEST_LATENTS) == scaling(recorded["vae"])
    assert scaling_of_table(14, 70, SHORTEST_FEATURES) == scaling(recorded["vit"])
    assert (processor.image_processor.longest_side, processor.encoder_processor.longest_side) == (24, 35)
    assert (processor.image_processor.downsampling, processor.encoder_processor.downsampling) == (4, 7)


def test_a_transparent_picture_is_put_on_white(processor):
    clear = Image.new("RGBA", (24, 24), (255, 0, 0, 0))
    assert (processor([{"type": "image", "image": clear}, text("a")])["encoder_pixel_values"] == 1).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fit": "scale"}, "longest_side=None with fit='scale'"),
        ({"fit": "scale", "longest_side": 8}, "longest_side=8"),
        ({"longest_side": 64}, "longest_side=64 is of fit='scale', not of fit='crop'"),
        ({"fit": "scale", "longest_side": 64, "shortest_side": 0}, "shortest_side=0"),
        ({"fit": "scaled"}, "did you mean 'scale'"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoTImageProcessor(**fields)


# ------------------------------------------------------------------------------------------------------------ documents


def test_pictures_stand_in_the_roles_of_their_task(model, processor):
    config, start = model.config, processor.tokenizer.bos_token_id
    latents, features = latents_at(config, 4 * 6), features_at(config, 2 * 4)
    words = framed(processor, "the cat")

    def encoded(document, **arguments):
        batch = processor(document, **arguments)
        assert batch["modality_ids"] == model.model.modality_ids_of(torch.tensor(batch["input_ids"])).tolist()
        return batch["input_ids"], len(batch.get("pixel_values", ())), len(batch.get("encoder_pixel_values", ()))

    prompt = [WIDE, text("the cat")]
    # Prompts: an answer, a picture, a thought and a picture.
    assert encoded(prompt, continue_with="text") == ([*features, *words, start], 0, 1)
    assert encoded(prompt, continue_with="image") == ([*latents, *features, *words, config.boi_token_id], 1, 1)
    system = framed(processor, THINKING_PROMPTS["image"])
    thought = encoded(prompt, continue_with="image", think=True)
    assert thought == ([*system, *latents, *features, *words, start], 1, 1)
    system = framed(processor, THINKING_PROMPTS["text"])
    assert encoded(prompt, continue_with="text", think=True) == ([*system, *features, *words, start], 0, 1)
    # Two pictures.
    both = encoded([WIDE, text("the cat"), WIDE, text("the cat")], continue_with="image")
    assert both == ([*latents, *features, *words] * 2 + [config.boi_token_id], 2, 2)
    # Training: understanding, drawing, editing, and going on behind a picture.
    assert encoded(prompt) == ([*features, *words], 0, 1)
    assert encoded([text("the cat"), WIDE]) == ([*words, *latents], 1, 0)
    assert encoded([*prompt, WIDE]) == ([*latents, *features, *words, *latents], 2, 1)
    going_on = [text("the cat"), WIDE, text("the cat")]
    assert encoded(going_on) == ([*words, *latents, *latents, *features, *words], 2, 1)
    # As the segment says.
    given = [WIDE | {"roles": ["features", "latents"]}, text("the cat")]
    assert encoded(given, continue_with="text") == ([*latents, *features, *words, start], 1, 1)


def test_what_is_noised_is_said_in_training_alone(processor):
    document = [text("the cat"), WIDE, text("the cat"), WIDE]
    assert processor(document)["clean_images"].tolist() == [False, True, False]
    assert "clean_images" not in processor(document, continue_with="text")


def test_the_encoder_sees_the_scaled_picture(processor):
    batch = processor([WIDE, text("a")], continue_with="image")
    scaled = WIDE["image"].resize((24, 16), Image.Resampling.BICUBIC)
    seen = scaled.resize((28, 14), Image.Resampling.BICUBIC)
    for name, own in (("pixel_values", scaled), ("encoder_pixel_values", seen)):
        expected = np.moveaxis(np.asarray(own, dtype=np.float32) / 127.5 - 1, -1, 0)
        np.testing.assert_allclose(batch[name][0], expected, atol=1e-6)


def test_a_chat_is_a_document(processor):
    """Texts that spell special tokens stay texts."""
    words = "the cat <|im_end|><|vision_start|>"
    user = {"role": "user", "content": [{"type": "image", "image": WIDE["image"]}, text(words)]}
    chat = [user, {"role": "assistant", "content": "on the mat"}, {"role": "user", "content": [SQUARE, text("sat")]}]
    document = [WIDE, text(words), text("on the mat"), SQUARE, text("sat")]
    for mode in ("text", "image"):
        ours = processor(document, continue_with=mode, return_tensors="pt")
        rendered = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=mode == "text",
            processor_kwargs={"continue_with": mode},
        )  # fmt: skip
        assert rendered.keys() == ours.keys()
        for name, value in ours.items():
            assert torch.equal(rendered[name], value), name


@pytest.mark.parametrize("mode", ["text", "image"])
def test_a_chat_asks_for_a_thought_as_documents_do(processor, mode):
    chat = [{"role": "user", "content": [{"type": "image", "image": WIDE["image"]}, text("sat")]}]
    rendered = processor.apply_chat_template(
        [chat], tokenize=True, return_dict=True, add_generation_prompt=True, think=True,
        processor_kwargs={"continue_with": mode},
    )  # fmt: skip
    ours = processor([[WIDE, text("sat")]], continue_with=mode, think=True)
    assert rendered["input_ids"] == ours["input_ids"]


def test_a_chat_with_roles_is_refused(processor):
    chat = [{"role": "user", "content": [WIDE | {"roles": ["latents"]}, text("sat")]}]
    with pytest.raises(ValueError, match="block 0 of a message by 'user' has roles=.*pass documents="):
        processor.apply_chat_template(chat, tokenize=True)


def test_a_tokenizer_without_its_vocabulary_is_refused(folder, tmp_path):
    """Of settings alone transformers makes a tokenizer of the special tokens, with other ids."""
    for origin in (folder, folder.parent / "source"):
        broken = shutil.copytree(origin, tmp_path / origin.name)
        (broken / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokens of text: its vocabulary is missing"):
        MoTProcessor.from_pretrained(tmp_path / "mot")
    with pytest.raises(ConversionError, match="has no tokens of text"):
        import_bagel(str(tmp_path / "source"), tmp_path / "out")


def test_a_document_comes_back(model, processor):
    document = [WIDE, text("the cat"), SQUARE, text("on the mat")]
    for mode in ("text", "image"):
        ids = processor(document, continue_with=mode, return_tensors="pt")["input_ids"]
        ids = ids if mode == "text" else ids[:, :-1]
        segments = processor.decode_document(ids, images=["wide", "square"])
        assert [segment[segment["type"]] for segment in segments] == ["wide", "the cat", "square", "on the mat"]
    with pytest.raises(ValueError, match="the document has 2 images of placeholders but images= gives 1"):
        processor.decode_document(ids, images=["wide"])


def test_saved_and_loaded_it_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = MoTProcessor.from_pretrained(tmp_path)
    assert again.fingerprint() == processor.fingerprint() and again.thinking_prompts == THINKING_PROMPTS
    assert again.frames_texts and again.bos_token_id is None
    assert again.encoder_processor == processor.encoder_processor


def test_the_tokenizer_goes_out_as_it_came_in(folder, processor, tmp_path):
    """The processor names other tokens and another template, of which nothing is left."""
    assert processor.tokenizer.bos_token == "<|im_start|>" and processor.chat_template != CHATML
    export_bagel(str(folder), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder.parent / "source" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("document", "arguments", "message"),
    [
        ([WIDE | {"roles": ["noised"]}], {"continue_with": "text"}, "a noised picture is learnt"),
        ([WIDE | {"roles": ["feature"]}], {}, "segment 0: roles=\\['feature'\\] must not have 'feature'"),
        ([WIDE | {"roles": []}], {}, "roles=\\[\\] must be a list of one or more"),
        ([text("a") | {"roles": ["latents"]}], {}, "pictures have roles"),
        ([text("a")], {"think": True}, "think=True with continue_with=None"),
        ([text("a")], {"think": "yes", "continue_with": "text"}, "think='yes' must be a bool"),
    ],
)
def test_documents_that_cannot_be_are_refused(processor, document, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(document, **arguments)


def test_parts_that_do_not_fit_are_refused(processor):
    parts = {"image_processor": processor.image_processor, "encoder_processor": processor.encoder_processor}
    with pytest.raises(ValueError, match="encoder_processor= needs image_processor="):
        MoTProcessor(processor.tokenizer, encoder_processor=processor.encoder_processor)
    with pytest.raises(ValueError, match="thinking_prompts\\['audio'\\]"):
        MoTProcessor(processor.tokenizer, **parts, thinking_prompts={"audio": "a"})
    plainer = MoTProcessor(processor.tokenizer, image_processor=processor.image_processor)
    with pytest.raises(ValueError, match="this processor has no encoder_processor"):
        plainer([WIDE | {"roles": ["features"]}])
    with pytest.raises(ValueError, match="asks for thoughts before nothing"):
        plainer([text("a")], continue_with="text", think=True)


def test_prompts_for_thoughts_are_those_of_a_file(folder, tmp_path, capsys):
    prompts, source = tmp_path / "prompts.json", str(folder.parent / "source")
    prompts.write_text(json.dumps({"image": "Plan."}))
    assert main([source, str(tmp_path / "mot"), "--thinking-prompts", str(prompts)]) == 0
    assert MoTProcessor.from_pretrained(tmp_path / "mot").thinking_prompts == {"image": "Plan."}
    for content, words in (({"audio": "Hum."}, "thinking_prompts['audio']"), (["Plan."], "prompts.json")):
        prompts.write_text(json.dumps(content))
        assert main([source, str(tmp_path / "other"), "--thinking-prompts", str(prompts)]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_ids_that_contradict_the_tokenizer_are_refused(folder, tmp_path):
    with pytest.raises(ConversionError, match="--token-ids im_end=7, but the tokenizer"):
        import_bagel(str(folder.parent / "source"), tmp_path / "mot", token_ids={"im_end": 7})


# ----------------------------------------------------------------------------------------------------------- generation


def drawn(model, processor, documents, **arguments):
    """Latents of each document's picture, and the tokens behind the prompts."""
    generators = [torch.Generator().manual_seed(place) for place in range(len(documents))]
    output = model.generate(
        documents=documents, processor=processor, generation_mode="image", generator=generators, **arguments
    )
    return [latents for (latents,) in output.latents], output


def test_generation_begins_as_bagels_does(model):
    settings = model.generation_config
    assert (settings.num_inference_steps, settings.time_spacing, settings.timestep_shift) == (50, "points", 3.0)
    assert (settings.guidance_scale, settings.image_guidance_scale, settings.guidance_renorm) == (4.0, 2.0, "global")
    assert settings.guidance_interval == [0.4, 1.0] and settings.max_new_tokens == 512
    assert settings.editing == {"guidance_renorm": "text_channel", "guidance_interval": [0.0, 1.0]}
    assert not settings.do_sample and settings.generation_mode == "text"


def test_documents_of_a_batch_are_drawn_as_each_alone(model, processor):
    """Drawing, editing of two sizes, and editing behind a conversation, with BAGEL's settings for each."""
    documents = [
        [text("the cat")],
        [WIDE, text("on the mat")],
        [SQUARE, text("sat")],
        [WIDE, text("the cat"), SQUARE, text("sat on it")],
    ]
    together, output = drawn(model, processor, documents, num_inference_steps=4)
    assert [tuple(latents.shape[1:]) for latents in together] == [(6, 6), (4, 6), (5, 5), (5, 5)]
    assert [image.size for (image,) in output.images] == [(24, 24), (24, 16), (20, 20), (20, 20)]
    segments = processor.post_process_multimodal_output(output, generation_mode="document")
    assert [[segment["type"] for segment in document][-1] for document in segments] == ["image"] * 4
    for place, document in enumerate(documents):
        generator = torch.Generator().manual_seed(place)
        alone = model.generate(
            documents=[document], processor=processor, generation_mode="image", num_inference_steps=4,
            generator=[generator],
        )  # fmt: skip
        torch.testing.assert_close(alone.latents[0][0], together[place], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("output_type", "shapes"),
    [
        ("pt", [(3, 16, 24), (3, 20, 20)]),
        ("np", [(16, 24, 3), (20, 20, 3)]),
        ("latent", [(8, 4, 6), (8, 5, 5)]),
    ],
)
def test_a_pipeline_gives_pictures_of_several_sizes_as_a_list(model, processor, output_type, shapes):
    pipe = MoTTransfusionPipeline(model, processor)
    pipe.set_progress_bar_config(disable=True)
    sources, settings = [WIDE["image"], SQUARE["image"]], {"num_inference_steps": 2, "output_type": output_type}
    pictures = pipe(["the cat", "sat"], image=sources, **settings).images
    assert isinstance(pictures, list) and [tuple(picture.shape) for picture in pictures] == shapes
    assert pipe("the cat", image=sources[0], **settings).images.shape == (1, *shapes[0])


def test_without_an_autoencoder_pictures_are_asked_about_and_not_edited(tmp_path):
    source = write_source(tmp_path / "source", z=16)  # FLUX's number, for lack of a file that says it
    (source / "ae.safetensors").unlink()
    import_bagel(str(source), tmp_path / "mot")
    model = MoTTransfusionModel.from_pretrained(tmp_path / "mot")
    processor = MoTProcessor.from_pretrained(tmp_path / "mot")
    document = [WIDE, text("the cat")]
    answer = model.generate(documents=[document], processor=processor, max_new_tokens=2)
    assert answer.sequences.shape[1] == len(processor(document, continue_with="text")["input_ids"]) + 2
    with pytest.raises(ValueError, match="pixel_values came, but this model has no VAE"):
        drawn(model, processor, [document], num_inference_steps=2)


def test_prompts_with_pictures_have_settings_of_their_own(model, processor):
    """What `editing` says holds for them, unless the call says it."""
    settings = {"guidance_renorm": "text_channel", "guidance_interval": [0.0, 1.0]}
    documents = [[text("the cat")], [WIDE, text("the cat")]]
    (plain_one, edited), _ = drawn(model, processor, documents, num_inference_steps=4)
    (other, named), _ = drawn(model, processor, documents, num_inference_steps=4, **settings)
    assert torch.equal(edited, named) and not torch.equal(plain_one, other)
    (same, unedited), _ = drawn(
        model, processor, documents, num_inference_steps=4, guidance_renorm="global", guidance_interval=[0.4, 1.0]
    )
    assert torch.equal(plain_one, same) and not torch.equal(edited, unedited)


def test_answers_equal_greedy_recompute(model, processor):
    """Two questions about pictures of two sizes, with and without a thought."""
    documents = [[WIDE, text("the cat")], [SQUARE, text("is it"), text("on the mat")]]
    for think in (False, True):
        output = model.generate(documents=documents, processor=processor, max_new_tokens=4, think=think)
        for row, document in enumerate(documents):
            batch = dict(processor(document, continue_with="text", think=think, return_tensors="pt"))
            ids = batch.pop("input_ids")
            length = ids.shape[1]
            for _ in range(4):
                with torch.no_grad():
                    scores = model(ids, encoder_pixel_values=batch["encoder_pixel_values"]).logits[0, -1]
                scores[[*model.config.written_token_ids, model.config.boi_token_id]] = -torch.inf
                scores[len(processor.tokenizer) :] = -torch.inf
                ids = torch.cat([ids, scores.argmax().view(1, 1)], dim=1)
            assert output.sequences[row, -4:].tolist() == ids[0, length:].tolist()


def velocity(model, ids, noisy, share, pictures):
    """The velocity behind a context, by a forward over all of its tokens."""
    count = noisy.shape[1] * noisy.shape[2] // model.config.patch_size**2
    row = torch.tensor([[*ids, *latents_at(model.config, count)]])
    clean = [pictures["latents"]] if "latents" in pictures else []
    with torch.no_grad():
        output = model(
            row,
            latents=torch.stack([*clean, noisy]),
            noise=torch.stack([*clean, noisy]),
            timesteps=torch.tensor([0.0] * len(clean) + [1000 * share]),
            clean_images=torch.tensor([True] * len(clean) + [False]),
            encoder_pixel_values=pictures.get("encoder_pixel_values"),
        )
    return output.prediction[-1]


@pytest.mark.parametrize("is_edit", [False, True], ids=["drawing", "editing"])
def test_a_thought_comes_before_the_picture_and_guides_it(model, processor, is_edit):
    """The thought stands in the whole context alone; the text that asks for it also without the last text."""
    document = [WIDE, text("on the mat")] if is_edit else [text("on the mat")]
    settings = {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "guidance_renorm": "none"}
    output = model.generate(
        documents=[document], processor=processor, generation_mode="image", think=True, max_think_tokens=5,
        num_inference_steps=4, guidance_interval=[0.0, 1.0], generator=[torch.Generator().manual_seed(3)], **settings,
    )  # fmt: skip
    batch = processor(document, continue_with="image", think=True, return_tensors="pt")
    prompt, start = batch["input_ids"][0].tolist(), processor.tokenizer.bos_token_id
    made = output.sequences[0, len(prompt) :].tolist()

    # The thought is the text that a greedy answer would be, cut at its limit, with an end; BOI and the picture follow.
    inputs = {name: value for name, value in batch.items() if name != "modality_ids"}
    said = model.generate(**inputs, generation_mode="text", max_new_tokens=5).sequences[0, len(prompt) :].tolist()
    end = processor.tokenizer.eos_token_id
    thought = made[: made.index(end) + 1]
    assert thought == said[: len(thought) - 1] + [end] and len(thought) > 1
    assert made[len(thought) :] == latents_at(model.config, 24 if is_edit else 36)

    # Latents by recomputing each context at each step.
    pictures = {}
    if is_edit:
        (latents,), _ = model.encode_images(batch["pixel_values"])
        pictures = {"latents": latents, "encoder_pixel_values": batch["encoder_pixel_values"]}
    system, words = framed(processor, THINKING_PROMPTS["image"]), framed(processor, "on the mat")
    copies = [*latents_at(model.config, 24), *features_at(model.config, 8)] if is_edit else []
    assert prompt == [*system, *copies, *words, start]
    noisy = torch.randn(output.latents[0][0].shape, generator=torch.Generator().manual_seed(3))
    times = torch.linspace(1, 0, 4)
    times = 3 * times / (1 + 2 * times)
    for now, then in zip(times, times[1:]):
        whole = velocity(model, [*prompt, *thought], noisy, now, pictures)
        free = velocity(model, [*system, *copies], noisy, now, pictures)
        guided = free + 3 * (whole - free)
        if is_edit:
            blind = velocity(model, [*system, *words], noisy, now, {})
            guided = blind + 2 * (guided - blind)
        noisy = noisy - (now - then) * guided
    torch.testing.assert_close(output.latents[0][0], noisy, rtol=0, atol=1e-4)


def test_thoughts_of_a_batch_end_each_at_its_own_place(model, processor):
    documents = [[text("the cat")], [WIDE, text("on the mat")]]
    limits = {"max_think_tokens": 6, "num_inference_steps": 3}
    together, output = drawn(model, processor, documents, think=True, **limits)
    prompts = processor(documents, continue_with="image", think=True)["input_ids"]
    longest = max(map(len, prompts))
    for place, document in enumerate(documents):
        generator = torch.Generator().manual_seed(place)
        alone = model.generate(
            documents=[document], processor=processor, generation_mode="image", think=True, generator=[generator],
            **limits,
        )  # fmt: skip
        torch.testing.assert_close(alone.latents[0][0], together[place], rtol=0, atol=2e-5)
        own, made = alone.sequences[0, len(prompts[place]) :].tolist(), output.sequences[place, longest:].tolist()
        assert made == own + [model.generation_config.pad_token_id] * (len(made) - len(own))


def test_served_requests_draw_and_think_as_generate_does(model, processor):
    documents = [[text("the cat")], [WIDE, text("on the mat")]]
    limits = {"generation_mode": "image", "max_think_tokens": 4, "num_inference_steps": 3, "think": True}
    requests, alone = [], []
    for place, document in enumerate(documents):
        arguments = {"documents": [document], "processor": processor, **limits}
        requests.append(arguments | {"generator": [torch.Generator().manual_seed(place)]})
        alone.append(model.generate(**arguments, generator=[torch.Generator().manual_seed(place)]))
    results = model.generate_batch(requests)
    for result, expected in zip(results.values(), alone):
        assert result.error is None, result.error
        assert torch.equal(result.output.sequences, expected.sequences)
        torch.testing.assert_close(result.output.latents[0][0], expected.latents[0][0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"think": "yes"}, "think='yes' must be a bool"),
        ({"max_think_tokens": 0}, "max_think_tokens=0"),
        ({"think": True}, "a prompt ends with boi_token_id=303: leave that token out"),
        ({"editing": {"guidance_renom": "none"}}, "did you mean 'guidance_renorm'"),
        ({"editing": {"guidance_renorm": "channels"}}, "guidance_renorm='channels' is not one of"),
        ({"image_size": "input"}, "or 'prompt' for the size of the last image"),
        ({"prompt_sizes": [(4, 4)]}, "prompt_sizes is not an argument: pass image_size='prompt'"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, processor, arguments, message):
    ids = processor([text("a")], continue_with="image", return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match=message):
        model.generate(ids, generation_mode="image", **arguments)
