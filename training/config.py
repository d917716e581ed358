"""Strict configuration: dataclasses, filled from one YAML file and from dotted overrides.

A section is a plain dataclass; `option(default, "what it does")` gives a field its documentation and the range of its
values. `load` composes a recipe from a YAML file and `key=value` words. It checks every type and range, and refuses
unknown keys with their full dotted path and the nearest valid name. `describe` lists every key.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and the way out."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that an option takes: at least `ge`, above `gt`, at most `le`, below `lt`; None: no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        bounds = {word: getattr(self, name) for name, word in words.items()}
        return " and ".join(f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None)


def option(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    factory: Any = dataclasses.MISSING,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Make a dataclass field with its documentation and the range of its values, see `Range`; `--help` prints both.

    The range of a list or a mapping holds for each of its values. `build` and `check_options` check it.
    """
    metadata = {"doc": doc, "range": Range(ge, gt, le, lt)}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


_SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|(?i:\b[\w-]*(?:token|secret|password|api_?key)=)\S+|(?<=://)[^/@\s]+@")


def without_secrets(value: Any) -> Any:
    """Remove tokens of the Hub, `...token=`, `...key=` and credentials in addresses from a tree of JSON values."""
    if isinstance(value, str):
        return _SECRET.sub("[removed]", value)
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value


def one_line(error: Exception) -> str:
    """Format an error as a command prints it: on one line, without secrets, and no longer than a screen."""
    line = without_secrets(" ".join(str(error).split()))
    return line if len(line) <= 2000 else line[:2000] + " ..."


class _Repr(reprlib.Repr):
    """Shows a value in messages, in a length that does not grow with the value."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 120


_show = _Repr().repr


# ---------------------------------------------------------------------------------------------------------------- YAML

MAX_DEPTH, MAX_VALUES, MAX_INTEGER = 50, 100_000, 2**63 - 1


class _Loader(yaml.SafeLoader):
    """SafeLoader (no Python tags) that reads 3e-4 as a number, as YAML 1.2 does.

    It refuses a key that is given twice, and deeper nesting than any recipe has.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"lists or mappings are nested more than {MAX_DEPTH} deep; write them flat")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ConfigError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise ConfigError(f"line {node.start_mark.line + 1} holds no {kind}, as it says: {error}") from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, typing.Hashable) and key in seen:
                raise ConfigError(f"key {key!r} is given twice, again on line {key_node.start_mark.line + 1}; keep one")
            seen.add(key if isinstance(key, typing.Hashable) else None)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def parse_value(text: str) -> Any:
    """Read one YAML value of the command line: `3e-4`, `true`, `null`, `[1, 2]`, `{a: 1}`, `text`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{_show(text)} is not a YAML value: {error}") from error


def read_yaml(path: str | Path) -> dict:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist{_nearest_file(path)}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a configuration is a mapping of sections")
    return tree


def _nearest_file(path: Path) -> str:
    """Return a hint at a configuration file of nearly this name, beside it or among the project's; or nothing."""
    files = [file for folder in (path.parent, Path(__file__).parent / "configs") for file in folder.glob("*.y*ml")]
    by_stem = {file.stem: file for file in reversed(files)}
    match = difflib.get_close_matches(path.stem, by_stem, n=1, cutoff=0.75)
    return f"; did you mean {by_stem[match[0]]}?" if match else ""


# ----------------------------------------------------------------------------------------------------------- overrides


def override(tree: dict, words: Sequence[str]) -> dict:
    """Lay `a.b.0.c=value` words over a tree of mappings and lists, in order; the tree is not changed."""
    tree = _copy(tree)
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise ConfigError(f"{_show(word)} is not key=value; give a dotted key and a YAML value, such as seed=1")
        try:
            value = parse_value(text)
        except ConfigError as error:
            raise ConfigError(f"{key.strip()[:120]}: {error}") from error
        _assign(tree, key.strip(), _copy(value, key.strip()))
    return tree


def _assign(tree: dict, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    if len(parents) > MAX_DEPTH:
        raise ConfigError(f"key {_show(key)} has {len(parents) + 1} parts; no key has more than {MAX_DEPTH}")
    node: Any = tree
    for depth, part in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_index(node, part, here)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"{key}: {here} is {_show(node)}, which has no keys of its own")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _index(items: list, part: str, path: str) -> int:
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(items):
        way_out = f"the last of its entries is {len(items) - 1}" if items else "the list is empty"
        raise ConfigError(f"{path}: the list has no entry {part[:20]}; {way_out}")
    return int(part)


def _copy(tree: Any, path: str = "") -> Any:
    """Copy a tree without shared parts; refuse one that grows without end as the aliases of YAML are followed."""
    left = MAX_VALUES

    def copy(value: Any, path: str, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise ConfigError(
                f"{path[:80]} holds more than {MAX_VALUES} values or is nested more than {MAX_DEPTH} deep; an alias "
                "(*name) of what it stands in, or of many others, does that: write it out"
            )
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise ConfigError(f"{path} is an integer of {value.bit_length()} bits; give one of at most 63")
        if isinstance(value, dict):
            return {key: copy(item, _join(path, str(key)), depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [copy(item, f"{path}.{index}", depth + 1) for index, item in enumerate(value)]
        return value

    return copy(tree, path, 0)


# ------------------------------------------------------------------------------------------------------------ building


def build(cls: type, tree: Any, path: str = "") -> Any:
    """Make `cls` from plain mappings, lists and scalars.

    Raises:
        ConfigError: unknown or missing keys, wrong types and values, by their dotted path.
    """
    # Each key has its field and its type.
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'the configuration'} must be a mapping of keys, not {_show(tree)}")
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in tree:
        if key not in known:
            raise ConfigError(_unknown(key, list(known), path, _keys_below(hints)))
    values = {name: _convert(hints[name], value, _join(path, name)) for name, value in tree.items()}
    for name, field in known.items():
        if name not in values and _default(field) is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, name)} is required and missing{_doc_suffix(field)}")

    # Each value is in its range, and they go together.
    for name, value in values.items():
        _check(value, _join(path, name), known[name], hints[name])
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path or 'the configuration'}: {error}") from error


def check_options(config: Any, lead: str = "") -> None:
    """Check the values of a section that was made without `build` against the ranges of its options.

    Args:
        lead: the beginning of the message, such as the name of the section.

    Raises:
        ConfigError: a number that is not finite or not in its range, or a text that is empty.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        _check(getattr(config, field.name), lead + field.name, field, hints[field.name])


def _check(value: Any, path: str, field: dataclasses.Field, hint: Any) -> None:
    way_out = ", or null" if type(None) in typing.get_args(hint) else ""
    if isinstance(value, dict):
        for key, item in value.items():
            _check(item, _join(path, str(key)), field, None)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{path}.{index}", field, None)
    elif isinstance(value, str):
        if not value.strip() or re.search("[\0\ud800-\udfff]", value):
            raise ConfigError(f"{path}={_show(value)} must be a text: not empty, and without null bytes{way_out}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        allowed = field.metadata.get("range", Range())
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}={value} must be a finite number{way_out}")
        if value not in allowed:
            raise ConfigError(f"{path}={value} must be {allowed}{way_out}")


def _keys_below(hints: dict[str, Any]) -> list[str]:
    """Keys of the sections among the fields, with the section's name: `train.steps`."""
    sections = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return [f"{name}.{field.name}" for name, hint in sections.items() for field in dataclasses.fields(hint)]


def _unknown(key: Any, known: list[str], path: str, below: list[str]) -> str:
    name = str(key)[:120]
    # A near key of this level, then the same key of a section (steps: train.steps), then anything similar.
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    near = near or [key for key in below if key.split(".")[-1] == name][:3]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    meant = " or ".join(_join(path, match) for match in near)
    hint = f"; did you mean {meant}?" if near else f"; the keys are {', '.join(known)}"
    return f"unknown key {_join(path, name)}{hint}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, path)

    # One of several words.
    if origin is typing.Literal:
        if value in arguments and type(value) in {type(argument) for argument in arguments}:
            return value
        match = difflib.get_close_matches(str(value), [str(argument) for argument in arguments], n=1)
        near = f"; did you mean {match[0]}?" if match else ""
        raise ConfigError(f"{path}={_show(value)} is not one of {', '.join(map(str, arguments))}{near}")

    # A section, and containers, whose items are converted in their turn.
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list, not {_show(value)}")
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise ConfigError(f"{path} must hold {len(arguments)} values, not {_show(value)}")
            return tuple(
                _convert(hint, v, f"{path}.{i}") for i, (hint, v) in enumerate(zip(arguments, value, strict=True))
            )
        items = [_convert(arguments[0] if arguments else Any, item, f"{path}.{i}") for i, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be a mapping, not {_show(value)}")
        of_key, of_value = arguments
        return {_convert(of_key, k, path): _convert(of_value, v, _join(path, str(k))) for k, v in value.items()}
    return _convert_plain(hint, value, path)


def _convert_union(options: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _convert(options[0], value, path)
    exact = [option for option in options if type(value) is option]
    for candidate in exact or options:
        try:
            return _convert(candidate, value, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}={_show(value)} must be one of {', '.join(type_name(option) for option in options)}")


def _convert_plain(hint: Any, value: Any, path: str) -> Any:
    if hint is float and type(value) is int and abs(value) <= MAX_INTEGER:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type):
        base = typing.get_origin(hint) or hint
        if isinstance(value, base) and not (isinstance(value, bool) and base is not bool):
            return value
        found, wanted = _with_article(type(value).__name__), _with_article(type_name(hint))
        raise ConfigError(f"{path}={_show(value)} is {found}; it must be {wanted}")
    raise ConfigError(f"{path}: type {hint!r} is not supported in a configuration")


# ------------------------------------------------------------------------------------------------- in, out and listing


def load(cls: type, path: str | Path | None = None, words: Sequence[str] = ()) -> Any:
    """Make `cls` from an optional YAML file and `key=value` words; errors say which of the two they come from."""
    tree = read_yaml(path) if path is not None else {}
    try:
        return build(cls, override(tree, words))
    except ConfigError as error:
        where = f"in {path}" if path is not None and _fails_alike(cls, tree, error) else "on the command line"
        raise ConfigError(f"{error} ({where})") from error


def _fails_alike(cls: type, tree: dict, error: ConfigError) -> bool:
    """True if a tree alone, without the words of the command line, has this error."""
    try:
        build(cls, tree)
    except ConfigError as other:
        return str(other) == str(error)
    return False


def digest_of(value: Any) -> str:
    """Hash a value that JSON holds, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def to_tree(config: Any) -> Any:
    """Return a configuration as plain mappings, lists and scalars, as YAML and JSON hold them."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, dict):
        return {str(key): to_tree(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_tree(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def dump(config: Any) -> str:
    """Write a configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True, width=120)


def describe(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """List (dotted key, type and range, default, documentation) of every key; list entries have `key[i].field`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        key, hint, default = _join(prefix, field.name), hints[field.name], _default(field)
        doc = field.metadata.get("doc") or field.metadata.get("help") or ""
        nested, is_list = _nested(hint)
        if nested is None or is_list or default is None:
            kind = ", ".join(filter(None, (type_name(hint), str(field.metadata.get("range", "")))))
            yield key, kind, "required" if default is dataclasses.MISSING else _short(default), doc
        if nested is not None:
            yield from describe(nested, f"{key}[i]" if is_list else key)


def _nested(hint: Any) -> tuple[type | None, bool]:
    """Return the dataclass inside a hint (also inside Optional, list and dict), and true if a container holds it."""
    if dataclasses.is_dataclass(hint):
        return hint, False
    is_container = typing.get_origin(hint) in (list, tuple, dict, Sequence)
    for argument in typing.get_args(hint):
        nested, inner = _nested(argument)
        if nested is not None:
            return nested, is_container or inner
    return None, False


def type_name(hint: Any) -> str:
    """Return a type as a reader writes it: `int`, `float or null`, `list of str`, `"a" or "b"`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin in (list, tuple, Sequence):
        return "list of " + type_name(arguments[0]) if arguments else "list"
    if origin is dict:
        return "mapping of " + type_name(arguments[1])
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "section"
    return getattr(hint, "__name__", str(hint))


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _doc_suffix(field: dataclasses.Field) -> str:
    return f": {field.metadata['doc']}" if field.metadata.get("doc") else ""


def _short(value: Any) -> str:
    text = yaml.safe_dump(to_tree(value), default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
    return text if len(text) <= 60 else text[:57] + "..."


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
