"""Translate names of tensors between two checkpoints, by a table of rules that reads in both directions.

    Rule("layers.{layer}.mlp.{part}_proj.weight", "layers.{layer}.mlp.{tower}.{part}_proj.weight")

`{layer}` and `{part}` stand for text without a dot and are the same on both sides; `{rest*}` may hold dots. `{tower}`
stands on the target's side alone and takes each of its values in the map: one tensor of the source becomes one tensor
for each tower, and the tensors of all towers come from this one.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


_FIELD = re.compile(r"\{(\w+)(\*?)\}")


class ConversionError(ValueError):
    """A conversion that cannot be done; the message names the obstacle and the way out."""


@dataclass(frozen=True)
class Rule:
    """One line of the table: a pattern of names in the source, and one of names in the target.

    Raises:
        ValueError: a field of the source that the target lacks, so that there is no way back.
    """

    source: str
    target: str

    def __post_init__(self):
        if lost := [field for field in fields_of(self.source) if field not in fields_of(self.target)]:
            raise ValueError(f"the target {self.target!r} lacks {lost} of the source {self.source!r}")

    @property
    def fan_out(self) -> list[str]:
        """The fields that only the target has."""
        return [field for field in fields_of(self.target) if field not in fields_of(self.source)]


class Origin(NamedTuple):
    """The origin of a tensor of the target: a name in the source, and the values of the fields that it lacks there."""

    name: str
    fan_out: dict[str, str]


class KeyMap:
    """A table of rules and the values of the fields that only targets have.

    Args:
        rules: in any order; names must not fit two rules in such a way that a target has two sources.
        values: field -> its values, such as `{"tower": ["text", "image"]}`; a rule whose field has none makes nothing.
        ignored: patterns of names in the source that hold nothing to convert.
    """

    def __init__(
        self, rules: Iterable[Rule], values: Mapping[str, Sequence[str]] | None = None, ignored: Iterable[str] = ()
    ):
        # Every field that targets alone have needs values.
        self.values = {field: list(given) for field, given in (values or {}).items()}
        self.rules = list(rules)
        for rule in self.rules:
            if unknown := [field for field in rule.fan_out if field not in self.values]:
                raise ValueError(f"no values are given for {unknown} of {rule.target!r}")

        # The rules as regular expressions, for both directions.
        self._sources = [_pattern(rule.source) for rule in self.rules]
        self._targets = [_pattern(rule.target, self.values) for rule in self.rules]
        self._ignored = [_pattern(pattern) for pattern in ignored]

    def forward(self, name: str) -> list[str]:
        """Return the targets of a tensor of the source, in the order of rules and values; empty if no rule fits."""
        targets = []
        for rule, pattern in zip(self.rules, self._sources):
            if match := pattern.fullmatch(name):
                for chosen in itertools.product(*(self.values[field] for field in rule.fan_out)):
                    targets.append(_fill(rule.target, match.groupdict() | dict(zip(rule.fan_out, chosen))))
        return targets

    def backward(self, name: str) -> Origin | None:
        """Return the origin of a tensor of the target; None if no rule fits.

        Raises:
            ValueError: two rules give it two sources, a mistake in the table.
        """
        origins = []
        for rule, pattern in zip(self.rules, self._targets):
            if match := pattern.fullmatch(name):
                fields = match.groupdict()
                origins.append(Origin(_fill(rule.source, fields), {field: fields[field] for field in rule.fan_out}))
        if len(origins) > 1:
            raise ValueError(f"{name!r} has {len(origins)} sources: {[origin.name for origin in origins]}")
        return origins[0] if origins else None

    def ignores(self, name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in self._ignored)

    def origins(self, source: Iterable[str], target: Iterable[str]) -> dict[str, Origin]:
        """Return the origin of each name of `target`, in its order; every name of `source` must be used or ignored.

        Raises:
            ConversionError: names are left over on either side; all of them are listed.
        """
        source = list(source)
        present = set(source)
        origins = {}
        unmet = []
        for name in target:
            origin = self.backward(name)
            if origin is None or origin.name not in present:
                unmet.append(name if origin is None else f"{name} (from {origin.name})")
            else:
                origins[name] = origin

        # Nothing of the source may be lost in silence.
        used = {origin.name for origin in origins.values()}
        unused = [name for name in source if name not in used and not self.ignores(name)]
        if unused or unmet:
            raise ConversionError(_left_over(unused, unmet))
        return origins


def fields_of(pattern: str) -> list[str]:
    """Return the names of a pattern's fields, each once."""
    return list(dict.fromkeys(match[1] for match in _FIELD.finditer(pattern)))


def _pattern(pattern: str, values: Mapping[str, Sequence[str]] | None = None) -> re.Pattern:
    """Compile a pattern; a field with `values` is one of them, any other is text without a dot."""
    parts = []
    seen = set()
    end = 0
    for match in _FIELD.finditer(pattern):
        field, many = match.groups()
        parts.append(re.escape(pattern[end : match.start()]))
        if field in seen:
            parts.append(f"(?P={field})")
        elif values and field in values:
            # (?!) fits nothing: without values there are no such names.
            parts.append(f"(?P<{field}>{'|'.join(map(re.escape, values[field])) or '(?!)'})")
        else:
            parts.append(f"(?P<{field}>{'.+' if many else '[^.]+'})")
        seen.add(field)
        end = match.end()
    return re.compile("".join(parts) + re.escape(pattern[end:]))


def _fill(pattern: str, fields: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda match: fields[match[1]], pattern)


def _left_over(unused: list[str], unmet: list[str]) -> str:
    lines = [f"{len(unused)} tensors of the source have no place, and {len(unmet)} of the target have no source"]
    lines += [f"  only in the source: {name}" for name in unused]
    lines += [f"  only in the target: {name}" for name in unmet]
    return "\n".join(lines)
