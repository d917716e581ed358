"""The processor, its parts, chat templates, and the way back from ids."""

import functools
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.modeling_mot.test_continuous_processor import build_continuous
from tests.modeling_mot.test_processor import PICTURE, SOUND, build_processor

from . import files, values
from .case import Case, Place, WrongResult
from .values import INF, NAN


@functools.cache
def processors() -> tuple[Any, Any]:
    return build_processor(), build_continuous(with_speech=True)


def warm() -> None:
    processors()


def good(folder: Path) -> None:
    for processor in processors():
        processor(
            [{"type": "text", "text": "a cat"}, {"type": "image", "image": PICTURE}, {"type": "audio", "audio": SOUND}]
        )


def process(rng: Random, place: Place) -> Case:
    """Documents, prompts, conversations, pictures, sounds and ids; ids of what is accepted are in the vocabulary."""
    processor = rng.choice(processors())
    make = rng.choice([_document, _document, _document, _prompt, _conversation, _ids, _picture, _sound, _sound])
    says, call, names = make(rng, place, processor)

    def checked() -> None:
        made = call()
        ids = made.get("input_ids") if hasattr(made, "get") else None
        size = len(processor.tokenizer)
        if ids is not None and any(not 0 <= token < size for row in _rows(ids) for token in row):
            raise WrongResult("an id is outside of the vocabulary")

    kind = "codes" if processor.image_processor is None else "pixels"
    return Case(
        f"processor of {kind}, {make.__name__[1:]}: {says}",
        checked,
        (*names, "document", "segment", "picture", "sound", "array"),
    )


def _rows(ids: Any) -> list[list[int]]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return ids if ids and isinstance(ids[0], list) else [ids]


def bad_image(rng: Random) -> tuple[Any, str]:
    """Anything that may be given as a picture."""
    if rng.random() < 0.6:
        data, says = files.bad_picture(rng)
        return rng.choice([data, {"bytes": data, "path": None}]), says
    shape = rng.choice(
        [(0, 5, 3), (5, 0), (5, 5, 2), (5, 5, 5), (5,), (1, 1, 1, 3), (1, 20_000, 3), (30_000, 1), (2, 2, 4)]
    )
    dtype = rng.choice([np.uint8, np.float32, np.int64, np.complex64, bool, np.float16, "U1", object])
    fill = (
        rng.choice([0, 1])
        if dtype is np.uint8
        else rng.choice([0, 1, -1, 300, NAN, INF])
        if dtype in (np.float32, np.float16)
        else 1
    )
    array = np.full(shape, fill, dtype=dtype)
    size = rng.choice([(0, 0), (1, 30_000), (20_000, 1), (3, 0)])
    return rng.choice(
        [
            lambda: (array, f"array of {shape}, {array.dtype}"),
            lambda: (Image.new(rng.choice(["RGB", "L", "P", "F", "I", "RGBA"]), size), f"Pillow picture of {size}"),
            lambda: (torch.full((3, 4, 4), NAN), "tensor of NaN"),
            lambda: (
                (
                    value := rng.choice(
                        [
                            {},
                            {"path": None},
                            {"bytes": "x"},
                            {"bytes": 3},
                            {"path": 3},
                            b"",
                            3,
                            object(),
                            [[1, 2]],
                            "",
                            "\0",
                        ]
                    )
                ),
                values.shown(value),
            ),
            lambda: (
                (
                    name := rng.choice(
                        ["no-such.png", "a" * 300, "/dev/zero", "/proc/self/mem", ".", "data:image/png;base64,!!"]
                    )
                ),
                name[:40],
            ),
        ]
    )()


def bad_audio(rng: Random) -> tuple[Any, Any, str]:
    """(sound, its rate, what is bad) of anything that may be given as a sound."""
    if rng.random() < 0.4:
        data, says = files.bad_sound(rng)
        return rng.choice([data, {"bytes": data, "path": None}]), None, says
    rate = rng.choice([*files.RATES, -1, NAN, INF, 16_000.5, "16000", True, 10**12, [16_000], None])
    wave = rng.choice(
        [
            np.zeros(1600, np.float32), np.full(1600, NAN, np.float32), np.zeros(0, np.float32), np.zeros((2, 0), np.float32),
            np.zeros((1600, 3), np.float32), np.zeros((2, 2, 5), np.float32), np.zeros(1600, np.complex64), np.full(1600, INF),
            np.zeros(1600, bool), np.array(["a"]), np.float32(1), [[0.0], [0.0, 1.0]], [None], "no-such.wav", b"", 3, {}, {"array": None},
            np.full(1600, 1e38, np.float32), torch.zeros(0), np.full(3, -(2**63), np.int64), "/dev/zero", "\0", np.zeros(1, np.float32),
        ]
    )  # fmt: skip
    return wave, rate, f"{values.shown(wave)} at {rate!r}"


def _document(rng: Random, place: Place, processor: Any):
    good = [
        {"type": "text", "text": "a cat"},
        {"type": "image", "image": PICTURE},
        {"type": "audio", "audio": SOUND, "sampling_rate": 16_000},
    ]
    options = {"return_tensors": "pt", "padding": True}
    way = rng.choice(["segment", "image", "audio", "text", "shape", "option", "option"])
    document, names, says = list(good), ("documents", "document"), ""
    if way == "segment":
        segment = rng.choice(
            [
                {},
                {"type": "nope"},
                {"type": None},
                {"type": ["text"]},
                {"text": "a"},
                None,
                3,
                {"type": "text"},
                {"type": "image"},
                {"type": "text", "text": b"a"},
                {"type": "text", "text": ["a"]},
                {"type": "document", "document": good},
                values.anything(rng),
            ]
        )
        document[rng.randrange(3)] = segment
        says, names = f"segment {values.shown(segment)}", ("segment", "document")
    elif way == "image":
        image, says = bad_image(rng)
        document[1], names = {"type": "image", "image": image}, ("picture", "image", "images", "array")
    elif way == "audio":
        audio, rate, says = bad_audio(rng)
        document[2], names = (
            {"type": "audio", "audio": audio, "sampling_rate": rate},
            ("sound", "audio", "sampling_rate"),
        )
    elif way == "text":
        text = rng.choice(
            [values.text(rng), values.text(rng) * 50, "a" * 1_000_000, "\ud800 b", "a\0b", "<|eos|>" * 1000]
        )
        document[0], says = {"type": "text", "text": text}, f"text {values.shown(text)}"
    elif way == "shape":
        document = rng.choice(
            [
                [],
                [[]],
                [good, []],
                [[good]],
                {"type": "text", "text": "a"},
                None,
                "text",
                3,
                [good, None],
                values.recursive(),
                values.nested(2000),
                iter(good),
            ]
        )
        says = f"documents={values.shown(document)}"
    else:
        name, value = rng.choice([("max_length", -1), ("max_length", 0), ("max_length", NAN), ("max_length", "3"), ("padding", "nope"), ("padding", 3),
                                  ("return_tensors", "tf"), ("return_tensors", "nope"), ("return_tensors", 3), ("padding_side", "middle"), ("pad_to_multiple_of", 0),
                                  ("pad_to_multiple_of", -3), ("pad_to_multiple_of", 10**9), ("add_eos", "x"), ("continue_with", "nope"), ("continue_with", 3), ("truncation", "nope"),
                                  ("nope", 1), ("documents_", 1), ("stride", -1), ("images", [PICTURE]), ("text", "a")])  # fmt: skip
        options[name], says, names = value, f"{name}={value!r}", (name,)
    return says, lambda: processor(documents=document, **options), names


def _prompt(rng: Random, place: Place, processor: Any):
    image, image_says = rng.choice([(PICTURE, ""), bad_image(rng)])
    audio, rate, audio_says = rng.choice([(SOUND, 16_000, ""), bad_audio(rng)])
    text = rng.choice(
        [
            "<|image|> <|audio|>",
            "<|image|><|image|>",
            "<|audio|>",
            "",
            None,
            3,
            ["<|image|>", 3],
            [],
            b"<|image|>",
            values.text(rng),
            [values.text(rng)] * 3,
        ]
    )
    arguments = {
        "text": text,
        "images": rng.choice([image, [image], [[image]], None]),
        "audio": rng.choice([audio, [audio], None]),
    }
    if rate is not None:
        arguments["audio_kwargs"] = {"sampling_rate": rate}
    if rng.random() < 0.2:
        arguments[rng.choice(["image", "videos", "padding", "max_length", "truncation"])] = values.anything(rng)
    says = f"text={values.shown(text)} {image_says} {audio_says}"
    return says, lambda: processor(**arguments), ("text", "images", "audio", "sampling_rate", "tokens", *arguments)


def _conversation(rng: Random, place: Place, processor: Any):
    content = rng.choice([
        values.anything(rng), [{"type": "text"}], [{"type": "nope", "nope": 1}], [{}], [3], [{"type": "image"}], [{"type": "image", "url": 3}],
        [{"type": "image", "base64": "!!"}], [{"type": "audio", "path": "no-such.wav"}], [{"text": "a"}], [{"type": "text", "text": None}],
        [{"type": "text", "text": "<|eos|><|boi|>{{ 7 * 7 }}{% for x in range(10**9) %}x{% endfor %}"}], [{"type": "image", "image": bad_image(rng)[0]}],
    ])  # fmt: skip
    message = {"role": rng.choice(["user", "user", "system", "nope", None, 3, "user\0"]), "content": content}
    conversation = rng.choice(
        [
            [message],
            [message],
            [[message]],
            [],
            None,
            {},
            "hi",
            [message, None],
            [{"role": "user"}],
            [{}],
            [[], [message]],
        ]
    )
    options = {"tokenize": True, "return_dict": True}
    if rng.random() < 0.3:
        options |= rng.choice([{"chat_template": "{{ nope.nope.nope }}"}, {"chat_template": "{% for x in range(999999999) %}{% endfor %}"}, {"chat_template": 3},
                               {"chat_template": "{{ ''.__class__.__mro__ }}"}, {"add_generation_prompt": "x"}, {"tools": 3}, {"documents": 3}, {"continue_final_message": True}])  # fmt: skip
    names = (
        "conversation",
        "content",
        "role",
        "message",
        "messages",
        "type",
        "block",
        "chat_template",
        "image",
        "audio",
        "tools",
        "documents",
    )
    return (
        f"{values.shown(conversation)} {values.shown(options)}",
        lambda: processor.apply_chat_template(conversation, **options),
        names,
    )


def _ids(rng: Random, place: Place, processor: Any):
    size, ranges = len(processor.tokenizer), processor.modality_token_ranges
    token = processor.token_id
    codes = [ranges.get("image", [0, 1])[0]] * rng.choice([0, 1, 15, 16, 17])
    ids = rng.choice([
        [], None, 3, "ids", [size], [-1], [10**12], [NAN], [1.5], [None], [[1, 2]], [token("boi"), *codes, token("eoi")], [token("boi"), *codes], [token("eoi")],
        [token("boi"), token("boi"), *codes, token("eoi")], [token("begin_of_speech"), 3, token("end_of_speech")], [token("begin_of_speech"), token("end_of_speech")],
        torch.zeros(0), torch.zeros(2, 3), torch.tensor([1.5]), np.array(["a"]), [token("boi"), size - 1, token("eoi")], list(range(size)),
    ])  # fmt: skip
    options = rng.choice(
        [
            {},
            {},
            {"images": 3},
            {"images": [None]},
            {"image_grids": [[NAN, 2]]},
            {"image_grids": [[10**9, 10**9]]},
            {"allow_incomplete": True},
        ]
    )
    way = rng.choice(["decode_document", "post_process_multimodal_output", "modality_ids_of"])
    call = {
        "decode_document": lambda: processor.decode_document(ids, **options),
        "post_process_multimodal_output": lambda: processor.post_process_multimodal_output(
            ids, generation_mode=rng.choice([None, "image", "audio", "document", "nope", 3])
        ),
        "modality_ids_of": lambda: processor.modality_ids_of(ids),
    }[way]
    names = (
        "ids",
        "id",
        "token",
        "tokens",
        "images",
        "image_grids",
        "generation_mode",
        "generated_outputs",
        "boi",
        "eoi",
        "codes",
    )
    return f"{way} of {values.shown(ids)} {options or ''}", call, names


def _picture(rng: Random, place: Place, processor: Any):
    image, says = bad_image(rng)
    images = rng.choice([[image], [image], image, [PICTURE, image], [], None, "x", [None]])
    encoder = processor.image_processor or processor.image_tokenizer.encode
    return f"{says} as {values.shown(images)}", lambda: encoder(images), ("images", "picture", "array")


def _sound(rng: Random, place: Place, processor: Any):
    audio, rate, says = bad_audio(rng)
    sounds = rng.choice([[audio], [audio], [SOUND, audio], audio])
    return says, lambda: processor.speech_tokenizer.encode(sounds, rate), ("audio", "sound", "sampling_rate", "rate")
