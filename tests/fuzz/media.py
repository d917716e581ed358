"""Bad inputs of the processor, its parts and chat templates, and bad ids to decode."""

import functools
from collections.abc import Callable
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


Made = tuple[str, Callable[[], Any], tuple[str, ...]]  # description, call and names of a case

TEXT = {"type": "text", "text": "a cat"}
DOCUMENT = [TEXT, {"type": "image", "image": PICTURE}, {"type": "audio", "audio": SOUND, "sampling_rate": 16_000}]


@functools.cache
def processors() -> tuple[Any, Any]:
    """Make a processor of pictures as codes, and one of pictures as pixels."""
    return build_processor(), build_continuous(with_speech=True)


def warm() -> None:
    processors()


def good(folder: Path) -> None:
    for processor in processors():
        processor(DOCUMENT)


def process(rng: Random, place: Place) -> Case:
    """Make a bad document, prompt, conversation, picture, sound or list of ids. Accepted ids are in the vocabulary."""
    processor = rng.choice(processors())
    make = rng.choice([_document, _document, _prompt, _conversation, _ids, _picture, _sound, _sound, _from_strangers])
    says, call, names = make(rng, processor, *([place] if make is _from_strangers else []))

    def checked() -> None:
        made = call()
        ids, size = made.get("input_ids") if hasattr(made, "get") else None, len(processor.tokenizer)
        if ids is not None and any(not 0 <= token < size for row in _rows(ids) for token in row):
            raise WrongResult("an id is outside of the vocabulary")

    kind = "codes" if processor.image_processor is None else "pixels"
    names = (*names, "document", "segment", "picture", "sound", "array")
    return Case(f"processor of {kind}, {make.__name__[1:]}: {says}", checked, names)


def _rows(ids: Any) -> list[list[int]]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return ids if ids and isinstance(ids[0], list) else [ids]


# ---------------------------------------------------------------------------------------------------- pictures, sounds

_SHAPES = ((0, 5, 3), (5, 0), (5, 5, 2), (5, 5, 5), (5,), (1, 1, 1, 3), (1, 20_000, 3), (30_000, 1), (2, 2, 4))
_NO_PICTURES = (
    {}, {"path": None}, {"bytes": "x"}, {"bytes": 3}, {"path": 3}, b"", 3, object(), [[1, 2]], "", "\0", "no-such.png",
    "a" * 300, "/dev/zero", "/proc/self/mem", ".", "data:image/png;base64,!!", torch.full((3, 4, 4), NAN),
)  # fmt: skip
_WAVES = (
    np.zeros(1600, np.float32), np.full(1600, NAN, np.float32), np.zeros(0, np.float32), np.zeros((2, 0), np.float32),
    np.zeros((1600, 3), np.float32), np.zeros((2, 2, 5), np.float32), np.zeros(1600, np.complex64), np.full(1600, INF),
    np.zeros(1600, bool), np.array(["a"]), np.float32(1), [[0.0], [0.0, 1.0]], [None], "no-such.wav", b"", 3, {},
    {"array": None}, np.full(1600, 1e38, np.float32), torch.zeros(0), np.full(3, -(2**63), np.int64), "/dev/zero", "\0",
    np.zeros(1, np.float32),
)  # fmt: skip
_RATES = (*files.RATES, -1, NAN, INF, 16_000.5, "16000", True, 10**12, [16_000], None)


def bad_image(rng: Random) -> tuple[Any, str]:
    """Make a bad picture.  -> (picture, description)"""
    way = rng.choice(["file", "file", "file", "array", "pillow", "nothing"])
    if way == "file":
        data, says = files.bad_picture(rng)
        return rng.choice([data, {"bytes": data, "path": None}]), says
    if way == "array":
        dtype = rng.choice([np.uint8, np.float32, np.int64, np.complex64, bool, np.float16, "U1", object])
        fill = rng.choice([0, 1, -1, 300, NAN, INF]) if dtype in (np.float32, np.float16) else 1
        array = np.full(rng.choice(_SHAPES), fill, dtype=dtype)
        return array, f"array of {array.shape}, {array.dtype}, all {fill}"
    if way == "pillow":
        mode, size = (
            rng.choice(["RGB", "L", "P", "F", "I", "RGBA"]),
            rng.choice([(0, 0), (1, 30_000), (20_000, 1), (3, 0)]),
        )
        return Image.new(mode, size), f"Pillow picture of {size}, {mode}"
    image = rng.choice(_NO_PICTURES)
    return image, values.shown(image)


def bad_audio(rng: Random) -> tuple[Any, Any, str]:
    """Make a bad sound.  -> (sound, rate, description)"""
    if rng.random() < 0.4:
        data, says = files.bad_sound(rng)
        return rng.choice([data, {"bytes": data, "path": None}]), None, says
    wave, rate = rng.choice(_WAVES), rng.choice(_RATES)
    return wave, rate, f"{values.shown(wave)} at {rate!r}"


def _picture(rng: Random, processor: Any) -> Made:
    image, says = bad_image(rng)
    images = rng.choice([[image], [image], image, [PICTURE, image], [], None, "x", [None]])
    encode = processor.image_processor or processor.image_tokenizer.encode
    return f"{says} as {values.shown(images)}", lambda: encode(images), ("images", "picture", "array")


def _sound(rng: Random, processor: Any) -> Made:
    audio, rate, says = bad_audio(rng)
    sounds = rng.choice([[audio], [audio], [SOUND, audio], audio])
    return says, lambda: processor.speech_tokenizer.encode(sounds, rate), ("audio", "sound", "sampling_rate", "rate")


# ----------------------------------------------------------------------------------------------- documents and prompts

_SEGMENTS = (
    {}, {"type": "nope"}, {"type": None}, {"type": ["text"]}, {"text": "a"}, None, 3, {"type": "text"},
    {"type": "image"},
    {"type": "text", "text": b"a"}, {"type": "text", "text": ["a"]}, {"type": "document", "document": DOCUMENT},
)  # fmt: skip
_DOCUMENTS = (
    [], [[]], [DOCUMENT, []], [[DOCUMENT]], TEXT, None, "text", 3, [DOCUMENT, None], values.recursive(),
    values.nested(2000),
)  # fmt: skip
_OPTIONS = {
    "max_length": (-1, 0, NAN, "3"),
    "padding": ("nope", 3),
    "return_tensors": ("tf", "nope", 3),
    "padding_side": ("middle",),
    "pad_to_multiple_of": (0, -3, 10**9),
    "add_eos": ("x",),
    "continue_with": ("nope", 3),
    "truncation": ("nope",),
    "nope": (1,),
    "documents_": (1,),
    "stride": (-1,),
    "images": ([PICTURE],),
    "text": ("a",),
}


def _document(rng: Random, processor: Any) -> Made:
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
    document: Any = list(DOCUMENT)
    names: tuple[str, ...] = ("documents", "document", "segment")
    way = rng.choice(["segment", "image", "audio", "text", "shape", "option", "option"])
    if way == "segment":
        segment = rng.choice(_SEGMENTS) if rng.random() < 0.8 else values.anything(rng)
        document[rng.randrange(3)], says = segment, values.shown(segment)
    elif way == "image":
        image, says = bad_image(rng)
        document[1], names = {"type": "image", "image": image}, ("picture", "image", "images", "array")
    elif way == "audio":
        audio, rate, says = bad_audio(rng)
        document[2] = {"type": "audio", "audio": audio, "sampling_rate": rate}
        names = ("sound", "audio", "sampling_rate")
    elif way == "text":
        text = rng.choice([values.text(rng), values.text(rng) * 50, "a" * 1_000_000, "\ud800 b", "<|eos|>" * 1000])
        document[0], says = {"type": "text", "text": text}, values.shown(text)
    elif way == "shape":
        document = rng.choice(_DOCUMENTS)
        says = f"documents={values.shown(document)}"
    else:
        name = rng.choice(list(_OPTIONS))
        options[name] = rng.choice(_OPTIONS[name])
        says, names = f"{name}={options[name]!r}", (name,)
    return f"{way} {says}", lambda: processor(documents=document, **options), names


def _prompt(rng: Random, processor: Any) -> Made:
    image, image_says = bad_image(rng) if rng.random() < 0.5 else (PICTURE, "")
    audio, rate, audio_says = bad_audio(rng) if rng.random() < 0.5 else (SOUND, 16_000, "")
    text = rng.choice(
        ["<|image|> <|audio|>", "<|image|><|image|>", "<|audio|>", "", None, 3, ["<|image|>", 3], [], b"<|image|>"]
        + [values.text(rng), [values.text(rng)] * 3]
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


# ------------------------------------------------------------------------------------------------------- conversations

_CONTENTS = (
    [{"type": "text"}], [{"type": "nope", "nope": 1}], [{}], [3], [{"type": "image"}], [{"type": "image", "url": 3}],
    [{"type": "image", "base64": "!!"}], [{"type": "audio", "path": "no-such.wav"}], [{"text": "a"}], "<|image|>",
    [{"type": "text", "text": None}],
    [{"type": "text", "text": "<|eos|>{{ 7 * 7 }}{% for x in range(10**9) %}x{% endfor %}"}],
)  # fmt: skip
_TEMPLATES = (
    {"chat_template": "{{ nope.nope.nope }}"}, {"chat_template": "{{ ''.__class__.__mro__ }}"}, {"chat_template": 3},
    {"chat_template": "{% for x in range(999999999) %}{% endfor %}"}, {"add_generation_prompt": "x"}, {"tools": 3},
    {"documents": 3}, {"continue_final_message": True},
)  # fmt: skip


def _conversation(rng: Random, processor: Any) -> Made:
    content = rng.choice([rng.choice(_CONTENTS), [{"type": "image", "image": bad_image(rng)[0]}], values.anything(rng)])
    message = {"role": rng.choice(["user", "user", "system", "nope", None, 3, "user\0"]), "content": content}
    conversation = rng.choice(
        [[message]] * 4 + [[[message]], [], None, "hi", [message, None], [{"role": "user"}], [{}], [[], [message]]]
    )
    options = {"tokenize": True, "return_dict": True} | (rng.choice(_TEMPLATES) if rng.random() < 0.3 else {})
    names = ("conversation", "content", "role", "message", "messages", "type", "block", "image", "audio", *options)
    says = f"{values.shown(conversation)} {values.shown(options)}"
    return says, lambda: processor.apply_chat_template(conversation, **options), names


def _from_strangers(rng: Random, processor: Any, place: Place) -> Made:
    """Give paths where they are not allowed, and addresses, which are allowed only if the caller says so."""
    kind, secret = rng.choice([("image", "secret.png"), ("audio", "secret.wav")])
    where, names = (
        files.anywhere(rng, place, secret),
        (kind, "picture", "sound", "path", "address", "allow_paths", "allow_urls"),
    )
    way, call = rng.choice(
        [
            ("document", lambda: processor([TEXT, {"type": kind, kind: where}], allow_paths=False)),
            ("prompt", lambda: processor(text=f"<|{kind}|>", allow_paths=False, **{_ARGUMENTS[kind]: [where]})),
            ("conversation", lambda: _chat(processor, [{"type": kind, _key(where): _plain(where)}])),
        ]
    )
    return f"{way} of {values.shown(where)}", call, names


_ARGUMENTS = {"image": "images", "audio": "audio"}


def _plain(where: Any) -> Any:
    return where.get("path") if isinstance(where, dict) else where


def _key(where: Any) -> str:
    return "url" if "://" in str(_plain(where)) else "path"


def _chat(processor: Any, content: list[dict]) -> Any:
    conversation = [{"role": "user", "content": content}]
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, allow_paths=False)


# ------------------------------------------------------------------------------------------------------------- decoding

_NO_IDS = (
    [], None, 3, "ids", [-1], [10**12], [NAN], [1.5], [None], [[1, 2]], torch.zeros(0), torch.zeros(2, 3),
    torch.tensor([1.5]), np.array(["a"]),
)  # fmt: skip
_DECODING = (
    {}, {}, {"images": 3}, {"images": [None]}, {"image_grids": [[NAN, 2]]}, {"image_grids": [[10**9, 10**9]]},
    {"allow_incomplete": True},
)  # fmt: skip


def _ids(rng: Random, processor: Any) -> Made:
    size, token = len(processor.tokenizer), processor.token_id
    codes = [processor.modality_token_ranges.get("image", [0, 1])[0]] * rng.choice([0, 1, 15, 16, 17])
    boi, eoi, begin, end = map(token, ("boi", "eoi", "begin_of_speech", "end_of_speech"))
    spans = (
        [boi, *codes, eoi], [boi, *codes], [eoi], [boi, boi, *codes, eoi], [begin, 3, end], [begin, end],
        [boi, size - 1, eoi],
        list(range(size)), [size],
    )  # fmt: skip
    ids, options = rng.choice(_NO_IDS if rng.random() < 0.5 else spans), rng.choice(_DECODING)
    mode = rng.choice([None, "image", "audio", "document", "nope", 3])
    way, call = rng.choice(
        [
            (f"decode_document {options or ''}", lambda: processor.decode_document(ids, **options)),
            (f"output as {mode}", lambda: processor.post_process_multimodal_output(ids, generation_mode=mode)),
            ("modality_ids_of", lambda: processor.modality_ids_of(ids)),
        ]
    )
    names = ("ids", "id", "token", "tokens", "images", "image_grids", "generation_mode", "boi", "eoi", "codes")
    return f"{way} of {values.shown(ids)}", call, names
