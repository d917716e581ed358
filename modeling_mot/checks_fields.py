"""Checks of configurations: rules as data, a table of them for each configuration, and one check for all tables.

A rule says what a field may be. `check_fields` refuses the first field that breaks its rule, by field, value and way
out.
"""

import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters


MOST = 2**31 - 1  # the largest number that indexes memory


# --------------------------------------------------------------------------------------------------------------- rules


def is_whole(value: Any, least: int = 1) -> bool:
    """True for a whole number of at least `least`, also of NumPy's types; booleans do not count as numbers."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def is_real(value: Any) -> bool:
    """True for a finite number that a float can hold; booleans and NaN do not count as numbers."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class Rule(Protocol):
    """What a field may be."""

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value, to be read behind "field=value"; None for a good value."""


class Whole(NamedTuple):
    """Whole numbers from `low` to `high`; booleans do not count as numbers."""

    low: int = 1
    high: int = MOST

    def problem(self, value: Any) -> str | None:
        if is_whole(value, self.low) and value <= self.high:
            return None
        return f"must be at least {self.low}, and a whole number of at most {self.high}"


class Number(NamedTuple):
    """Finite numbers from `low` to `high`, without the end that is `open`."""

    low: float = 0.0
    high: float = math.inf
    open: str = ""  # "low" or "high": that end itself is excluded

    def problem(self, value: Any) -> str | None:
        if is_real(value):
            above = value > self.low if self.open == "low" else value >= self.low
            below = value < self.high if self.open == "high" else value <= self.high
            if above and below:
                return None
        if (self.low, self.high, self.open) == (0, 1, ""):
            return "is a probability, from 0 to 1"
        opening = "(" if self.open == "low" else "["
        closing = ")" if self.open == "high" or self.high == math.inf else "]"
        return f"must be in {opening}{self.low:g}, {self.high:g}{closing}"


class OneOf(NamedTuple):
    """One of these names."""

    names: tuple

    def problem(self, value: Any) -> str | None:
        if any(type(value) is type(name) and value == name for name in self.names):
            return None
        return f"is not one of {', '.join(map(str, self.names))}{did_you_mean(value, self.names)}"


class Several(NamedTuple):
    """A list of `count` values, or of one or more, each as another rule says."""

    each: Rule
    count: int | None = None

    def problem(self, value: Any) -> str | None:
        if not isinstance(value, (list, tuple)) or not len(value) == (self.count or len(value)) > 0:
            return f"must be a list of {self.count or 'one or more'} values"
        problems = ((one, self.each.problem(one)) for one in value)
        return next((f"must not have {one!r}, which {found}" for one, found in problems if found), None)


class Typed(NamedTuple):
    """Values of one type."""

    type: type

    def problem(self, value: Any) -> str | None:
        return None if isinstance(value, self.type) else f"must be a {self.type.__name__}"


class Dtype(NamedTuple):
    """A dtype of torch, or its name."""

    def problem(self, value: Any) -> str | None:
        dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
        return None if isinstance(dtype, torch.dtype) else "must be a dtype of torch, such as float32 or bfloat16"


class Maybe(NamedTuple):
    """None, or values that obey another rule."""

    rule: Rule

    def problem(self, value: Any) -> str | None:
        found = None if value is None else self.rule.problem(value)
        return found and f"{found}, or None"


class Either(NamedTuple):
    """Lists as one rule says, and other values as another says."""

    other: Rule
    of_lists: Rule

    def problem(self, value: Any) -> str | None:
        return (self.of_lists if isinstance(value, (list, tuple)) else self.other).problem(value)


def check_fields(values: Any, rules: Mapping[str, Rule], where: str = "") -> None:
    """Check the fields of an object, or the entries that a mapping has, in the order of the table.

    Args:
        values: the object or mapping.
        rules: name -> its rule.
        where: a prefix of the names in messages: "model." makes "model.patch_size=0 must ...".

    Raises:
        ValueError: the first value that breaks its rule, with its name and what it may be.
    """
    for name, rule in rules.items():
        if isinstance(values, Mapping) and name not in values:
            continue
        value = values[name] if isinstance(values, Mapping) else getattr(values, name)
        if found := rule.problem(value):
            raise ValueError(f"{where}{name}={value!r} {found}")


def check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse unknown names, and suggest the nearest known one.

    Args:
        what: what the names are, for the message: "unknown {what} {name}".

    Raises:
        ValueError: the first unknown name.
    """
    known = sorted(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name}{did_you_mean(name, known)}; known are {', '.join(known)}")


def did_you_mean(name: Any, known: Iterable, cutoff: float = 0.6) -> str:
    """Return the nearest known name as the end of a sentence, or "" if no name is near.

    Args:
        cutoff: how alike the names must be, from 0 to 1.
    """
    close = difflib.get_close_matches(str(name), [one for one in known if isinstance(one, str)], n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def strict_configuration(cls: type) -> type:
    """Check the types of a configuration's fields by huggingface_hub's `strict`; a wrong type raises TypeError."""
    cls = strict(cls)
    checked = cls.__setattr__

    def __setattr__(self, name, value):
        try:
            checked(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise TypeError(f"{type(self).__name__}: {error.__cause__}") from error

    cls.__setattr__ = __setattr__
    return cls


# ----------------------------------------------------------------------------------------------------- tables of rules


SPAN_RULES = {
    "image_grid": Maybe(Several(Whole(1, 2**16), count=2)),  # rows and columns
    "max_speech_tokens": Maybe(Whole()),
}
# The largest sizes are far above those of any model: a larger one is a slip, refused before memory is asked for.
CONFIG_RULES = SPAN_RULES | {
    "vocab_size": Whole(1, 2**26),
    "tokenizer_vocab_size": Maybe(Whole(1, 2**26)),
    "hidden_size": Whole(1, 2**20),
    "intermediate_size": Whole(1, 2**22),
    "num_hidden_layers": Whole(1, 2**14),
    "num_attention_heads": Whole(1, 2**16),
    "num_key_value_heads": Whole(1, 2**16),
    "head_dim": Whole(1, 2**16),
    "max_position_embeddings": Whole(),
    "num_experts": Whole(1, 2**12),
    "initializer_range": Number(),
    "rms_norm_eps": Number(),
    "embedding_multiplier": Number(open="low"),
    "attention_dropout": Number(0, 1, open="high"),
    "hidden_dropout": Number(0, 1, open="high"),
    "z_loss_coefficient": Number(),
    "norm_position": OneOf(("pre", "post")),
    "qk_norm": OneOf((None, "rms", "rms_all_heads", "layer")),
    "hidden_act": OneOf(tuple(ACT2FN)),
}
# Fields of one tower.
TOWER_RULES = {
    name: CONFIG_RULES[name] for name in ("hidden_size", "intermediate_size", "hidden_act", "rms_norm_eps", "qk_norm")
} | {"gated_mlp": Typed(bool), "norm_offset": Typed(bool)}
ROPE_RULES = {
    "rope_type": OneOf(("default", *ROPE_INIT_FUNCTIONS)),
    "rope_theta": Number(open="low"),
    "factor": Number(1),
    "partial_rotary_factor": Number(1, 1),  # RoPE turns whole heads
    "original_max_position_embeddings": Whole(),
    "attention_factor": Maybe(Number(open="low")),
    "beta_fast": Maybe(Number(open="low")),
    "beta_slow": Maybe(Number(open="low")),
    "low_freq_factor": Number(open="low"),
    "high_freq_factor": Number(open="low"),
    "mscale": Maybe(Number()),
    "mscale_all_dim": Maybe(Number()),
    "truncate": Typed(bool),
    "mrope_section": Several(Whole(0, 2**16), count=3),  # frequencies of time, rows and columns
    "mrope_interleaved": OneOf((True,)),  # in turns; Qwen2-VL's bands of neighbours are another layout
}
# Fields of transformers' own configuration, which it does not check.
INHERITED_RULES = {"dtype": Maybe(Dtype()), "id2label": Maybe(Typed(dict))}


def check_rope_parameters(parameters: dict, head_dim: int) -> None:
    """Refuse meaningless settings of RoPE; transformers only warns.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value that breaks its rule.
    """
    # Keys, then values, then keys that do not go together.
    mrope = ("mrope_section", "mrope_interleaved")
    check_names(parameters, {*RopeParameters.__annotations__, *mrope, "type"}, "key of rope_parameters")
    of_frequencies = dict.fromkeys(("short_factor", "long_factor"), Several(Number(open="low"), head_dim // 2))
    check_fields(parameters, ROPE_RULES | of_frequencies, "rope_parameters.")
    if parameters["rope_type"] == "default":
        known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *mrope)
        check_names(parameters, known, "key of rope_parameters for rope_type='default'")
    _check_mrope(parameters, head_dim)
    low, high = (parameters.get(f"{end}_freq_factor") for end in ("low", "high"))
    if None not in (low, high) and low >= high:
        raise ValueError(f"rope_parameters.low_freq_factor={low} must be less than high_freq_factor={high}")


def _check_mrope(parameters: dict, head_dim: int) -> None:
    """Check the division of the frequencies among three axes, where there is one."""
    given = [name for name in ("mrope_section", "mrope_interleaved") if name in parameters]
    if not given:
        return
    if len(given) == 1 or parameters["rope_type"] != "default":
        raise ValueError(
            f"rope_parameters={parameters}: mrope_section=[time, rows, columns] and mrope_interleaved=True go "
            "together, with rope_type='default'"
        )
    time, rows, columns = parameters["mrope_section"]
    half = head_dim // 2
    if time + rows + columns != half or max(3 * rows - 1, 3 * columns) > half:
        raise ValueError(
            f"rope_parameters.mrope_section={parameters['mrope_section']} must sum to half of head_dim={head_dim}; "
            f"rows and columns take each third frequency, so there are at most {(half + 1) // 3} of rows and "
            f"{half // 3} of columns"
        )
