"""Bad options and sources for the commands that train and assemble tokenizers."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from training.tokenizers import image, processor, speech, text, vae

from . import files, values
from .case import Case, Place
from .saved import damage_folder, parts, words_of


_TINY = [
    "--steps",
    "1",
    "--batch-size",
    "1",
    "--no-bf16",
    "--limit",
    "3",
    "--image-size",
    "16",
    "--channels",
    "8",
    "16",
]
# command -> (main, the kind of its source, good options)
COMMANDS: dict[str, tuple[Callable[..., Any], str, list[str]]] = {
    "text": (text.main, "txt", ["--vocab-size", "300"]),
    "image": (image.main, "png", [*_TINY, "--latent-channels", "4", "--codes", "8", "--code-dim", "4"]),
    "speech": (speech.main, "wav", ["--units", "2", "--iterations", "1"]),
    "vae": (vae.main, "png", [*_TINY, "--latent-channels", "4"]),
}
_SIZES = ("-1", "0", "nan", "inf", "1.5", "x")
_NUMBERS = (*_SIZES, str(10**30), "", "1e400")
_RATES = ("nan", "-1", "inf", "0", "x")
_PARTS = ("no/such", "/etc", "", "\0")
_OF_PICTURES = {
    "--image-size": (*_NUMBERS, "7"),
    "--channels": (*_NUMBERS, "7"),
    "--latent-channels": _NUMBERS,
    "--fit": ("nope",),
    "--storage-dtype": ("int8",),
    "--batch-size": _SIZES,
    "--lr": _RATES,
    "--minutes": ("nan", "-1", "0"),
    "--sheet": ("/dev/null/x.png", "/proc/x.png", "x.nope"),
}
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"--vocab-size": _NUMBERS, "--min-frequency": _SIZES, "--from-pretrained": _PARTS},
    "image": _OF_PICTURES
    | {"--codes": _NUMBERS, "--code-dim": _NUMBERS, "--patch-size": _NUMBERS, "--preset": ("nope", "")},
    "speech": {
        "--units": _NUMBERS,
        "--units-per-second": (*_NUMBERS, "3"),
        "--encoder": _PARTS,
        "--encoder-layer": _NUMBERS,
        "--iterations": _SIZES,
    },
    "vae": _OF_PICTURES
    | {"--layers": _SIZES, "--matrix-lr": _RATES, "--kl": _RATES, "--held-out": ("no-such", "", "/dev/null")},
    "processor": {
        "--text": _PARTS,
        "--image": _PARTS,
        "--speech": _PARTS,
        "--image-size": _NUMBERS,
        "--downsampling": (*_NUMBERS, "7"),
        "--image-backend": ("nope", "diffusers", "chameleon"),
    },
}
COMMON: dict[str, tuple[str, ...]] = {
    "--source": (
        "no-such", "", "\0", "/dev/null", "a:b:c:d", ":::", "x" * 5000, "~", "http://outside.invalid/a.txt", "no/such",
        "no/such:config:split",
    ),
    "--column": ("nope", "", "\0"),
    "--limit": ("-1", "0", "x", "nan", str(10**30)),
    "--output": ("/dev/null", "/dev/null/x", "", "\0", "/proc/x"),
    "--seed": _NUMBERS,
    "--nope": ("1",),
}  # fmt: skip


def warm() -> None:
    parts()


def good(folder: Path) -> None:
    """Run every command on good sources."""
    for name, (main, kind, options) in COMMANDS.items():
        data = folder / kind
        data.mkdir(exist_ok=True)
        _good_source(Random(0), data, kind)
        main(["--source", str(data), "--output", str(folder / name), *options])
    root = parts()
    main = processor.main
    main([f"--text={root}/text", f"--image={root}/image", f"--speech={root}/speech", f"--output={folder}/processor"])


def tokenize(rng: Random, place: Place) -> Case:
    """Make a command with a bad option, source or part."""
    if rng.random() < 0.2:
        return _assemble(rng, place)
    name = rng.choice(list(COMMANDS))
    main, kind, options = COMMANDS[name]
    folder = place.inside / "data"
    folder.mkdir()
    arguments, says, names = ["--source", str(folder), "--output", str(place.inside / "out"), *options], "", ("data",)
    if rng.random() < 0.35:
        _good_source(rng, folder, kind)
        pool = OPTIONS[name] | COMMON
        option = rng.choice(sorted(pool))
        value = rng.choice(pool[option])
        arguments = [*_without(arguments, option), f"{option}={value}"]
        says, names = f"{option}={values.shown(value)}", (option, option.strip("-").replace("-", "_"), value[:60])
    else:
        source, says = _bad_source(rng, place, folder, kind)
        arguments[1] = str(source)
        names = ("data", Path(source).name, "bad", "picture", "sound", "text", "column")
    return Case(f"{name}: {says}", lambda: main(arguments), names, is_command=True)


def _without(arguments: list[str], option: str) -> list[str]:
    """Return the words without an option and its values."""
    kept, skipping = [], False
    for word in arguments:
        skipping = word == option if word.startswith("--") else skipping
        kept += [] if skipping else [word]
    return kept


def _good_source(rng: Random, folder: Path, kind: str) -> None:
    for number in range(2):
        path = folder / f"{number}.{kind}"
        if kind == "txt":
            path.write_text("a thing is a thing of that kind\n" * 20)
        else:
            path.write_bytes(files.picture(rng) if kind == "png" else files.sound(rng))


_TEXTS = (
    (b"\xff\xfe", "no UTF-8"), (b"\0" * 100, "null bytes"), (b"", "nothing"), (b"a" * 2**24, "16 MB in a line"),
    ("\ud800".encode("utf-8", "surrogatepass"), "a surrogate"), (b"<|eos|><|image|>" * 100, "special tokens"),
)  # fmt: skip


def _bad_source(rng: Random, place: Place, folder: Path, kind: str) -> tuple[Path, str]:
    """Make a bad source.  -> (source, description)"""
    return rng.choice([_bad_folder, _bad_table])(rng, place, folder, kind)


def _bad_folder(rng: Random, place: Place, folder: Path, kind: str) -> tuple[Path, str]:
    """Make a folder with a bad file beside good ones."""
    _good_source(rng, folder, kind)
    bad = folder / f"bad.{kind}"
    if rng.random() < 0.3:
        targets = [place.outside / f"secret.{kind}", Path("/dev/zero"), Path("/etc/hostname"), folder]
        bad.symlink_to(rng.choice(targets))
        return folder, f"a link {bad.name}"
    make = {"txt": lambda rng: rng.choice(_TEXTS), "png": files.bad_picture, "wav": files.bad_sound}[kind]
    data, says = (files.pickled(place.ran), "a pickle") if rng.random() < 0.15 else make(rng)
    bad.write_bytes(data)
    return folder, f"a file of {says}"


def _bad_table(rng: Random, place: Place, folder: Path, kind: str) -> tuple[Path, str]:
    """Make a table that is damaged or has bad values."""
    secret, column = f"secret.{kind}", {"txt": "text", "png": "image", "wav": "audio"}[kind]
    named = files.outside_path(rng, folder, place.outside, secret)
    others = ["", None, 3, "no-such", "a\0b", ["a"], "\ud83d", values.text(rng)[:500], "http://outside.invalid/a"]
    value = rng.choice([named, named, str(place.outside / secret), {"bytes": None, "path": named}, *others])
    path = folder / rng.choice(["table.jsonl", "table.json", "table.csv"])
    rows = [{column: value}] + [{column: "a thing is a thing"}] * (3 if kind == "txt" else 0)
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            csv.writer(file).writerows([[column], *([str(row[column]).replace("\0", "")] for row in rows)])
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    if rng.random() < 0.2:
        path.write_bytes(files.damaged(rng, path.read_bytes()))
    if rng.random() < 0.1:
        for name in ("table.py", f"{folder.name}.py"):
            (folder / name).write_text(files.code(place.ran))
        return folder, "a folder with code of a data set"
    return path, f"{path.suffix} of {values.shown(value)}"


def _assemble(rng: Random, place: Place) -> Case:
    """Make a call of `training.tokenizers.processor` with bad parts."""
    given = {f"--{part}": str(parts() / part) for part in ("text", "image", "speech")}
    given["--output"] = str(place.inside / "out")
    if rng.random() < 0.5:
        option = rng.choice(sorted(OPTIONS["processor"]))
        value = rng.choice(OPTIONS["processor"][option])
        given[option], says = value, f"{option}={value!r}"
        names: tuple[str, ...] = (option, option.strip("-").replace("-", "_"), value[:60], str(parts() / "image"))
        if option == "--downsampling":
            given = {name: value for name, value in given.items() if name not in ("--image", "--speech")}
    else:
        part = rng.choice(["text", "image", "speech"])
        says = damage_folder(rng, place, parts() / part, place.inside / part)
        given[f"--{part}"] = str(place.inside / part)
        names = (part, f"{part} tokenizer", *words_of(says), *(path.name for path in (parts() / part).iterdir()))
    arguments = [f"{option}={value}" for option, value in given.items()]
    return Case(f"processor: {says}", lambda: processor.main(arguments), names, is_command=True)
