"""Bad recipes, as keys on a command line and as files of YAML, for training, preparing and planning."""

import functools
import json
from pathlib import Path
from random import Random

import yaml

from training import prepare, run, train
from training.config import describe
from training.plan import __main__ as plan
from training.recipe import Recipe

from . import files, values
from .case import Case, Place, WrongResult


def warm() -> None:
    assert run and keys()


@functools.cache
def keys() -> dict[str, str]:
    """Return key -> type of every key of a recipe; a list gives the keys of its first entry."""
    return {key.replace("[i]", ".0"): kind for key, kind, _, _ in describe(Recipe)}


def good_recipe(inside: Path) -> dict:
    """Write the recipe of a run of one step on twenty texts."""
    (inside / "texts.jsonl").write_text("".join(json.dumps({"text": f"thing {n} is red"}) + "\n" for n in range(20)))
    source = {"name": "texts", "path": str(inside / "texts.jsonl"), "templates": [{"segments": ["text:text"]}]}
    process = {"cpu": True, "cpu_threads": 1, "progress_bar": False, "timeout_seconds": 30}
    return {
        "model": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "data": {"row_length": 32, "cache_dir": str(inside / "cache"), "sources": [source]},
        "optimizer": {"warmup_steps": 0},
        "train": {"steps": 1, "rows": 1, "output_dir": str(inside / "run"), **process},
        "samples": {"enabled": False},
    }


def good(folder: Path) -> None:
    """Run all commands on a good recipe."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(good_recipe(folder)))
    for command, options in ((prepare, ["--workers", "1"]), (plan, []), (train, ["--print-config"]), (train, [])):
        if code := command.main([str(file), *options]):
            raise WrongResult(f"{command.__name__} of a good recipe ends with {code}")


_OF_TYPE: dict[str, tuple[str, ...]] = {
    "int": (
        "-1", "0", str(2**63), str(10**30), ".nan", ".inf", "1.5", "true", "x", "null", "[1]", "{a: 1}", "'3'",
        "1_0", "0x10",
        "2024-01-01",
    ),
    "float": (
        "-1", "0", ".nan", ".inf", "-.inf", "1e400", "-1e-400", "true", "x", "null", "[1.0]", "'3'", "1e308",
        str(10**400),
    ),
    "bool": ("1", "x", "null", "[true]", "yes", "'true'", ".nan"),
    "str": (
        "''", "3", "null", "[a]", "'\\0'", '"\\0"', '"\\uD800"', "~", "!!binary aGk=", "nosuch",
        "'../../../x'", "/dev/null",
        "/etc", "x" * 5000, "é" * 300, "/proc/self/mem", "http://outside.invalid/a.jsonl",
        "hf://datasets/no/such", "'*'",
        "'[[['",
    ),
}  # fmt: skip
_OF_KEY: dict[str, tuple[str, ...]] = {
    "train.tracker": ("nosuch", "all", "wandb", "os", "'1'"),
    "train.output_dir": ("/dev/null", "/dev/null/run", "/proc/run", "''", '"a\\0b"', "x" * 300),
    "data.cache_dir": ("/dev/null", "/dev/null/cache", "/proc/cache", '"a\\0b"', "x" * 300),
    "model.init_from": ("/etc", "/dev/null", "''", "nosuch/model", "'../..'", '"\\0"', "texts.jsonl"),
    "model.processor": ("/etc", "/dev/null", "''", "nosuch/processor", '"\\0"'),
    "data.sources.0.path": (
        "/etc/nothing", "''", "/dev/null", "'*.jsonl'", '"\\0"', "/proc/self/mem", "'**'", "hf://x",
    ),
    "data.sources.0.templates.0.segments": (
        "[]", "['text:']", "['nope:text']", "['text:{}']", "['text:{text.__class__}']", "['text:{text[0]}']",
        "['text:{']",
        "['text:{text!r:>999999999}']", "['text:{text:{text}}']", "['image:text']", "['document:text']", "[3]",
        "['text:nope']",
    ),
    "data.sources.0.match": ("{text: '('}", "{text: '(a+)+$'}", "{nope: x}", "{3: x}", "{text: ''}", "[]"),
    "data.sources": ("[]", "null", "[null]", "[{}]", "3", "[{name: x}]"),
    "data.validation_sources": ("null", "[null]", "[{}]", "3"),
    "optimizer.betas": ("[.nan, 0.9]", "[1, 1]", "[0.9]", "[0.9, 0.95, 0.99]", "0.9", "[-1, 0.5]", "[.inf, 0.1]"),
    "train.modality_weights": ("{text: .nan}", "{nope: 1}", "{text: -1}", "{text: 0}", "{3: 1}", "{text: .inf}", "[]"),
    "data.token_shares": ("{text: .nan}", "{nope: 1}", "{text: -1}", "{text: 0.5}", "{3: 1}", "{}", "[]"),
    "train.frozen_towers": ("[nope]", "[text, image, speech, shared]", "[3]", "text", "[]", "[text, text]"),
    "model.attn_implementation": ("nope", "flash_attention_2", "3", "''"),
    "samples.scheduler": ("nope", "os", "''"),
}  # fmt: skip


def recipe(rng: Random, place: Place) -> Case:
    """Make a recipe that is bad in a key or as a file, for one of the commands that read recipes."""
    good, file = good_recipe(place.inside), place.inside / "recipe.yaml"
    file.write_text(yaml.safe_dump(good))
    words, names = [], ()
    if rng.random() < 0.75:
        words, names = _bad_words(rng)
        says = " ".join(values.shown(word) for word in words)
    else:
        says, names = _bad_file(rng, file, yaml.safe_dump(good)), ("data", "train", "sources", "alias")
    command = rng.choice(["train", "train", "prepare", "plan", "print"])
    arguments, options = [str(file), *words], _plan_options(rng) if command == "plan" else []
    call = {
        "train": lambda: train.main(arguments),
        "print": lambda: train.main([*arguments, "--print-config"]),
        "prepare": lambda: prepare.main([*arguments, "--workers", "1"]),
        "plan": lambda: plan.main([*arguments, *options]),
    }[command]
    names = (*names, "recipe.yaml", "configuration", "YAML", "key", *(option.partition("=")[0] for option in options))
    return Case(f"{command}: {' '.join([says, *options])}", call, names, is_command=True)


def _bad_words(rng: Random) -> tuple[list[str], tuple[str, ...]]:
    """Make bad words `key=value`.  -> (words, names)"""
    words, names = [], []
    for _ in range(rng.choice([1, 1, 1, 2])):
        key = rng.choice(sorted(_OF_KEY) if rng.random() < 0.35 else sorted(keys()))
        kind = keys().get(key, "").split(" ")[0]
        value = rng.choice(_OF_KEY.get(key) or _OF_TYPE.get(kind, _OF_TYPE["str"] + _OF_TYPE["int"]))
        if key == "train.steps" and value in (str(2**63), str(10**30)):
            value = "-1"  # a huge number of steps is valid, and the run would never end
        if rng.random() < 0.06:
            others = ["." + key, key.replace(".", ".."), "train", "data.sources.7.name", "", "=", "nope"]
            key = rng.choice([key + "s", key + ".x", *others])
        if key.startswith("model.transfusion."):
            words.append("model.transfusion.patchifier=linear")  # the default is the paper's U-Net of 0.27 B parameters
        words.append(f"{key}={value}")
        parts, given = key.split("."), value.strip("'\"")
        names += [key, parts[-1], *(".".join(parts[:count]) for count in range(2, len(parts)))]
        names += ["column"] if parts[-1] == "segments" else []
        names += [given[:60], given.replace("\\0", "\\x00")]
    if rng.random() < 0.04:
        words.append(rng.choice(["--nope", "other.yaml", "a\0=b", "train.steps", "=", "\ud800=1"]))
        names.append(words[-1])
    return words, tuple(names)


_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
_FILES = (
    ("data: " + "[" * 5000, "5,000 open brackets"),
    ("data: " + "[" * 5000 + "]" * 5000, "5,000 nested lists"),
    ("data: " + "{a: " * 3000 + "}" * 3000, "3,000 nested mappings"),
    ("".join(" " * n + f"k{n}:\n" for n in range(3000)), "3,000 nested blocks"),
    ("data: &a [*a]", "a recursive anchor"),
    ("train: &a {steps: *a}", "a recursive anchor of a mapping"),
    ("&a {train: *a}", "a recursive root"),
    ("data: {sources: &s [*s]}", "recursive sources"),
    (_LAUGHS, "a billion laughs"),
    ("x: !!python/object/apply:os.mkdir ['../ran']\n", "a tag of Python"),
    ("train: {steps: 1}\ntrain: {steps: 1}\n", "a section twice"),
    ("a: \0", "a null byte"),
    ("\t- a", "a tab"),
    ("[1, 2]", "a list"),
    ("3", "a number"),
    ("", "nothing"),
    ("? [a]\n: b", "a list as a key"),
    ("<<: *nope", "an unknown anchor"),
    ("<<: [1]", "a merge of a number"),
    ("---\na: 1\n---\nb: 2", "two documents"),
    ("train: {steps: 1" + "0" * 10_000 + "}", "a number of 10,000 digits"),
    ("train: null\ndata: null\n", "sections that are null"),
    ("train: {seed: 2024-13-45}", "a date that there is not"),
    ("train: {steps: !!int x}", "a wrong number"),
    ("x: !!timestamp 3", "a wrong date"),
    ("train: {1: 2, null: 3, [a]: 4}", "keys of other types"),
    ("train: {seed: \xff}", "a letter of another encoding"),
)


def _bad_file(rng: Random, file: Path, good: str) -> str:
    """Write a bad recipe.  -> description"""
    way = rng.choice(["known", "known", "known", "damaged", "text"])
    if way == "damaged":
        file.write_bytes(files.damaged(rng, good.encode()))
        return "a damaged file"
    if way == "text":
        text = values.text(rng)[:1000]
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"a file of {values.shown(text)}"
    text, says = rng.choice(_FILES)
    file.write_bytes(text.encode("latin-1"))
    return f"a file of {says}"


_NUMBERS = ("0", "-1", "nan", "inf", str(10**30), "x", "1e400")
_PLANS = {
    **dict.fromkeys(("--world", "--replicate", "--utilisation", "--network", "--per-node"), _NUMBERS),
    "--device": ("nope", ""),
    "--shares": ("nope", "text=nan", "text=-1", "text=inf", "=", "text=1,text=2"),
    "--accelerate": ("nope", "/etc", "recipe.yaml", "/dev/null"),
    "--json": ("/dev/null", "/proc/x/y", "", "recipe.yaml"),
}


def _plan_options(rng: Random) -> list[str]:
    if rng.random() < 0.5:
        return []
    option = rng.choice(list(_PLANS))
    return [f"{option}={rng.choice(_PLANS[option])}"]
