"""The commands that train and assemble tokenizers."""

import csv
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.conversion.sources import words_tokenizer
from tests.modeling_mot.test_image_tokenizer import tiny_tokenizer
from tests.modeling_mot.test_speech_tokenizer import tokenizer_with_random_units
from training.tokenizers import image, processor, speech, text, vae

from . import files, values
from .case import Case, Place


@functools.cache
def parts() -> Path:
    """A folder of a text tokenizer, an image tokenizer and a speech tokenizer."""
    folder = Path(tempfile.mkdtemp())
    words_tokenizer(40).save_pretrained(folder / "text")
    tiny_tokenizer().save_pretrained(folder / "image")
    tokenizer_with_random_units().save_pretrained(folder / "speech")
    return folder


def warm() -> None:
    parts()


# command -> (main, the kind of its source, good options)
_TINY = ["--steps", "1", "--batch-size", "1", "--no-bf16", "--limit", "3"]
COMMANDS: dict[str, tuple[Callable[..., Any], str, list[str]]] = {
    "text": (text.main, "txt", ["--vocab-size", "300"]),
    "image": (image.main, "png", ["--image-size", "16", "--channels", "8", "16", "--codes", "8", "--latent-channels", "4", "--code-dim", "4", *_TINY]),
    "speech": (speech.main, "wav", ["--units", "2", "--iterations", "1"]),
    "vae": (vae.main, "png", ["--image-size", "16", "--channels", "8", "16", "--latent-channels", "4", *_TINY]),
}  # fmt: skip
_NUMBERS = ("-1", "0", "nan", "inf", "1.5", "x", str(10**30), "", "1e400")
OPTIONS = {
    "text": {"--vocab-size": _NUMBERS, "--min-frequency": _NUMBERS[:-3], "--from-pretrained": ("no/such", "/etc", "", "\0"), "--seed": _NUMBERS},
    "image": {"--image-size": (*_NUMBERS, "7"), "--codes": _NUMBERS, "--channels": (*_NUMBERS, "7"), "--latent-channels": _NUMBERS, "--code-dim": _NUMBERS, "--patch-size": _NUMBERS,
              "--preset": ("nope", ""), "--fit": ("nope",), "--storage-dtype": ("int8",), "--batch-size": _NUMBERS[:-3], "--lr": ("nan", "-1", "inf", "0", "x"), "--minutes": ("nan", "-1", "0"),
              "--sheet": ("/dev/null/x.png", "/proc/x.png", "x.nope"), "--seed": _NUMBERS},
    "speech": {"--units": _NUMBERS, "--units-per-second": (*_NUMBERS, "3"), "--encoder": ("no/such", "/etc", "\0"), "--encoder-layer": _NUMBERS, "--iterations": _NUMBERS[:-3], "--seed": _NUMBERS},
    "vae": {"--image-size": (*_NUMBERS, "7"), "--channels": (*_NUMBERS, "7"), "--layers": _NUMBERS[:-3], "--latent-channels": _NUMBERS, "--matrix-lr": ("nan", "-1", "inf"), "--kl": ("nan", "-1", "inf"),
            "--held-out": ("no-such", "", "/dev/null"), "--storage-dtype": ("int8",), "--batch-size": _NUMBERS[:-3], "--lr": ("nan", "-1", "inf"), "--seed": _NUMBERS},
    "processor": {"--text": ("no/such", "/etc", "", "\0"), "--image": ("no/such", "/etc", "", "\0"), "--speech": ("no/such", "/etc", "\0"), "--image-size": _NUMBERS, "--downsampling": (*_NUMBERS, "7"),
                  "--image-backend": ("nope", "diffusers", "chameleon")},
}  # fmt: skip
COMMON = {
    "--source": ("no-such", "", "\0", "/dev/null", "a:b:c:d", ":::", "x" * 5000, "~", "http://outside.invalid/a.txt", "no/such", "no/such:config:split"),
    "--column": ("nope", "", "\0"), "--limit": ("-1", "0", "x", "nan", str(10**30)), "--output": ("/dev/null", "/dev/null/x", "", "\0", "/proc/x"), "--nope": ("1",),
}  # fmt: skip


def good(folder: Path) -> None:
    """Every command on good sources."""
    for name, (main, kind, options) in COMMANDS.items():
        data = folder / kind
        data.mkdir(exist_ok=True)
        _good_source(Random(0), data, kind)
        main(["--source", str(data), "--output", str(folder / name), *options])
    root = parts()
    main = processor.main
    main([f"--text={root}/text", f"--image={root}/image", f"--speech={root}/speech", f"--output={folder}/processor"])


def tokenize(rng: Random, place: Place) -> Case:
    """An option, a source or a part that is bad."""
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
    """Without an option and what follows it up to the next."""
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


def _bad_source(rng: Random, place: Place, folder: Path, kind: str) -> tuple[Path, str]:
    """(source, what is bad): a folder with a bad file beside good ones, or a table whose values are bad."""
    secret = f"secret.{kind}"
    if rng.random() < 0.5:
        _good_source(rng, folder, kind)
        bad = folder / f"bad.{kind}"
        if rng.random() < 0.3:
            bad.symlink_to(rng.choice([place.outside / secret, Path("/dev/zero"), Path("/etc/hostname"), folder]))
            return folder, f"a link {bad.name}"
        if kind == "txt":
            data, says = rng.choice([(b"\xff\xfe", "no UTF-8"), (b"\0" * 100, "null bytes"), (b"", "nothing"), (b"a" * 2**24, "16 MB in a line"), (files.pickled(place.ran), "a pickle"),
                                     ("\ud800".encode("utf-8", "surrogatepass"), "a surrogate"), (b"<|eos|><|image|>" * 100, "special tokens")])  # fmt: skip
        else:
            data, says = files.bad_picture(rng) if kind == "png" else files.bad_sound(rng)
            if rng.random() < 0.15:
                data, says = files.pickled(place.ran), "a pickle"
        bad.write_bytes(data)
        return folder, f"a file of {says}"
    column = {"txt": "text", "png": "image", "wav": "audio"}[kind]
    named = files.outside_path(rng, folder, place.outside, secret)
    value = rng.choice(
        [
            named,
            named,
            str(place.outside / secret),
            "",
            None,
            3,
            "no-such",
            "a\0b",
            ["a"],
            {"bytes": None, "path": named},
            "\ud83d",
            values.text(rng)[:500],
            "http://outside.invalid/a",
        ]
    )
    path = folder / rng.choice(["table.jsonl", "table.json", "table.csv"])
    rows = [{column: value}] + ([{column: "a thing is a thing"}] * 3 if kind == "txt" else [])
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            csv.writer(file).writerows([[column], *([str(row[column]).replace("\0", "")] for row in rows)])
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    if rng.random() < 0.2:
        path.write_bytes(files.damaged(rng, path.read_bytes()))
    if rng.random() < 0.1:
        (folder / "table.py").write_text(files.code(place.ran))
        (folder / "data.py").write_text(files.code(place.ran))
        return folder, "a folder with code of a data set"
    return path, f"{path.suffix} of {values.shown(value)}"


def _assemble(rng: Random, place: Place) -> Case:
    """`training.tokenizers.processor` with parts that are bad."""
    root = parts()
    given = {
        "--text": str(root / "text"),
        "--image": str(root / "image"),
        "--speech": str(root / "speech"),
        "--output": str(place.inside / "out"),
    }
    names: tuple[str, ...] = ()
    if rng.random() < 0.5:
        option = rng.choice(sorted(OPTIONS["processor"]))
        given[option] = rng.choice(OPTIONS["processor"][option])
        if option == "--downsampling":
            given.pop("--image"), given.pop("--speech")
        says, names = f"{option}={given[option]!r}", (option, option.strip("-").replace("-", "_"), given[option][:60])
    else:
        part = rng.choice(["text", "image", "speech"])
        says = damage_folder(rng, place, root / part, place.inside / part)
        given[f"--{part}"] = str(place.inside / part)
        names = (part, f"{part} tokenizer", *(path.name for path in (root / part).iterdir()))
    arguments = [f"{option}={value}" for option, value in given.items()]
    return Case(f"processor: {says}", lambda: processor.main(arguments), names, is_command=True)


def damage_folder(rng: Random, place: Place, good: Path, copy: Path) -> str:
    """Copy a folder of a saved part or model, and damage a file of it.  -> what was done"""
    shutil.copytree(good, copy)
    file = rng.choice(
        sorted(
            path for path in copy.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja")
        )
    )
    way = rng.choice(["damage", "json", "value", "value", "value", "auto_map", "pickle", "gone"])
    name = file.relative_to(copy)
    if way == "damage" or file.suffix != ".json" and way in ("json", "value", "auto_map"):
        file.write_bytes(files.damaged(rng, file.read_bytes()))
        return f"damaged {name}"
    if way == "pickle":
        file.write_bytes(files.pickled(place.ran))
        return f"a pickle as {name}"
    if way == "gone":
        file.unlink()
        return f"no {name}"
    tree = json.loads(file.read_text())
    if way == "json" or not isinstance(tree, dict) or not tree:
        data, says = files.bad_json(rng, tree)
        file.write_bytes(data)
        return f"{says} as {name}"
    if way == "auto_map":
        (copy / "evil.py").write_text(files.code(place.ran))
        tree["auto_map"] = {
            kind: rng.choice(["evil.Evil", "attacker/repo--evil.Evil"])
            for kind in ("AutoModel", "AutoConfig", "AutoTokenizer", "AutoProcessor")
        }
        if "Tokenizer" in str(tree.get("tokenizer_class")):
            tree["auto_map"]["AutoTokenizer"] = ["evil.Evil", None]
        file.write_text(json.dumps(tree))
        return f"auto_map of foreign code in {name}"
    key = rng.choice(sorted(tree))
    tree[key] = values.json_value(rng)
    file.write_text(json.dumps(tree))
    return f"{key}={values.shown(tree[key])} in {name}"
