"""Values that are mistakes or attacks: numbers, texts, containers, tensors, trees of JSON."""

import json
import reprlib
from random import Random
from typing import Any

import numpy as np
import torch


NAN, INF = float("nan"), float("inf")
NUMBERS = (
    NAN, INF, -INF, -1, 0, 1, 2.5, -0.5, -(10**12), 10**12, 2**31, 2**63, -(2**63) - 1, 10**30, 1e308, 1e-320, True,
    False, np.float32("nan"), np.int64(-3), 3 + 4j,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "a\0b", "\ud800", "a\udfffb", "\u202e\u2066x", "👩‍👩‍👧‍👦" * 50, "nan",
    "1", "-1", "null", "true", "None", "{x}", "{0.__class__}",
    "%s%n", "../../outside", "/etc/passwd", "~root", "<|image|>", "<|boi|><|eoi|>", "<|endoftext|>", "é" * 300,
    "x" * 100_000,
    "__import__('os').system('true')", "${HOME}", "a.b.c", "a/b", "\\", "\r\n", "'; --", "!!python/object:os.system",
)  # fmt: skip
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def shown(value: Any) -> str:
    """Describe any value in a few words."""
    try:
        return _short.repr(value)
    except Exception:
        return f"a {type(value).__name__}"


def number(rng: Random) -> Any:
    return rng.choice(NUMBERS)


def text(rng: Random) -> str:
    return rng.choice(TEXTS)


def nested(depth: int) -> list:
    """Lists in lists."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def recursive() -> list:
    """A list that holds itself."""
    value: list = [1]
    value.append(value)
    return value


def container(rng: Random) -> Any:
    return rng.choice(
        [
            lambda: [],
            lambda: {},
            lambda: (),
            lambda: [None],
            lambda: [number(rng), number(rng)],
            lambda: [text(rng)] * rng.randint(1, 3),
            lambda: {text(rng): number(rng)},
            lambda: {1: 2, None: 3},
            lambda: nested(rng.choice([3, 300, 3000])),
            recursive,
            lambda: [[1, 2], [3]],
            lambda: {"a": {"b": [number(rng)]}},
            lambda: set("ab"),
            lambda: iter([1]),
        ]
    )()


def foreign(rng: Random) -> Any:
    """Objects of other kinds."""
    return rng.choice(
        [None, b"\xff\xfe", bytearray(3), object(), len, int, ..., np.zeros((0,)), np.zeros((2, 3)), np.array(["a"])]
    )


def anything(rng: Random) -> Any:
    """Any value, numbers most often."""
    return rng.choices([number, text, container, foreign], [5, 3, 3, 1])[0](rng)


def json_number(rng: Random) -> Any:
    return rng.choice([value for value in NUMBERS if type(value) in (int, float, bool)])


def json_value(rng: Random) -> Any:
    """A value that JSON holds, with NaN and infinity, which Python's JSON reads and writes."""
    return rng.choices(
        [
            json_number,
            text,
            lambda rng: rng.choice([None, [], {}, [None], [[]], {"": None}, {"a": {"b": [1]}}]),
            lambda rng: nested(rng.choice([3, 100])),
            lambda rng: [json_number(rng), json_number(rng)],
            lambda rng: {text(rng)[:100]: json_number(rng)},
        ],
        [6, 3, 3, 1, 2, 1],
    )[0](rng)


def as_json(tree: dict) -> dict:
    """A mapping with the values that JSON can hold, and a description of every other value."""

    def held(value: Any) -> Any:
        try:
            return json.loads(json.dumps(value))
        except (TypeError, ValueError, RecursionError):
            return shown(value)

    return {name: held(value) for name, value in tree.items()}


def tensor(rng: Random, near: tuple[int, ...] = (2, 6)) -> torch.Tensor:
    """A tensor of a wrong shape, type or content; `near` is the right shape."""
    shape = list(near)
    change = rng.choice(["shape", "empty", "flat", "deep", "dtype", "content"])
    if change == "shape":
        place = rng.randrange(len(shape))
        shape[place] = max(0, shape[place] + rng.choice([-1, 1, 5]))
    elif change == "empty":
        shape[rng.randrange(len(shape))] = 0
    elif change == "flat":
        shape = shape[1:]
    elif change == "deep":
        shape = [*shape, rng.choice([1, 3])]
    dtype = rng.choice(
        [torch.float32, torch.bool, torch.int8, torch.complex64, torch.float64] if change == "dtype" else [torch.long]
    )
    fill = rng.choice([-1, 10**6, -(2**62), 2**62] if change == "content" else [0, 1])
    return torch.full(shape, fill, dtype=dtype)


def mutated(rng: Random, good: dict, choices: dict[str, Any], most: int = 2) -> tuple[dict, tuple[str, ...]]:
    """`good` with one or a few entries replaced, left out or misspelt.

    Args:
        choices: name -> bad values that suit this entry; other entries get values from `anything`.

    Returns:
        The changed mapping, and the names of the entries that changed.
    """
    bad, names = dict(good), []
    for _ in range(rng.randint(1, most)):
        name = rng.choice(sorted({*choices, *good}))
        way = rng.random()
        if way < 0.04:
            name += rng.choice(["s", "_", "x"])
            bad[name] = anything(rng)
        elif way < 0.08:
            bad.pop(name, None)
        elif name in choices and rng.random() < 0.75:
            bad[name] = rng.choice(choices[name])
        else:
            bad[name] = anything(rng)
        names.append(name)
    return bad, tuple(dict.fromkeys(names))


def described(bad: dict, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={shown(bad[name])}" if name in bad else f"no {name}" for name in names)
