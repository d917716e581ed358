"""Conversions from and to other checkpoints, and publishing."""

import functools
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from conversion import export_dense, import_chameleon, upcycle, vae
from modeling_mot import MoTConfig, MoTForCausalLM
from modeling_mot.latents_mot import build_vae
from tests.conversion import chameleon_sources
from tests.conversion.conftest import SIZES
from tests.conversion.sources import save_source
from tests.modeling_mot.naive_transfusion import VAE
from tests.modeling_mot.naive_transfusion import tiny_model as transfusion
from tests.modeling_mot.test_continuous_processor import build_continuous
from tests.modeling_mot.test_processor import build_processor

from . import files, values
from .case import Case, Place, WrongResult
from .commands import damage_folder


@functools.cache
def saved() -> Path:
    """A folder of good checkpoints: `llama`, `qwen2` in shards, `chameleon`, `mot`, `dense`, `transfusion`, `vae`."""
    root = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    save_source(root / "llama", "llama", tokenizer=True)
    save_source(root / "qwen2", "qwen2", tokenizer=True, shard_size="30KB")
    chameleon_sources.save_source(
        chameleon_sources.chameleon_model(**chameleon_sources.LAYOUTS["7b"]), root / "chameleon"
    )
    for name, variant in (("mot", "mot"), ("dense", "dense")):
        processor = build_processor()
        config = MoTConfig.from_variant(variant, **SIZES, **processor.config_kwargs())
        MoTForCausalLM(config).save_pretrained(root / name, max_shard_size="200KB")
        processor.save_pretrained(root / name)
    pictures = build_continuous(image_size=[8, 8], downsampling=4)
    transfusion(**{"vae_config": VAE, "noise_schedule": "linear"} | pictures.config_kwargs()).save_pretrained(
        root / "transfusion"
    )
    pictures.save_pretrained(root / "transfusion")
    build_vae(VAE).save_pretrained(root / "vae")
    return root


def warm() -> None:
    saved()


# ---------------------------------------------------------------------------------------------------------- conversion

_NUMBERS = ("-1", "0", "x", "nan", str(10**30), "", "1.5")
UPCYCLE = {
    "--modalities": ("image", "text text", "text nope", "text image speech"), "--image-codes": _NUMBERS, "--speech-units": _NUMBERS,
    "--image-grid": ("0 0", "-1 5", "2", "1000000000 1000000000", "nan nan", "2 2"), "--image-tokenizer": ("/etc", "no-such", "\0"), "--speech-tokenizer": ("/etc", "no-such", "\0"),
    "--vae": ("/etc", "no-such", "\0"), "--share": ("nope", "attention attention"), "--moe-text": _NUMBERS, "--max-length": ("-5", "0", "x", str(10**30), "1"),
    "--init": ("image=perturbed:inf", "image=perturbed:nan", "image=perturbed:-1", "image=perturbed:1e400", "nope=copy", "image", "image=", "image=nope", "=copy", "text=fresh", "image=perturbed:x"),
    "--set": ("nope=1", "hidden_dropout=nan", "hidden_dropout=2", "initializer_range=NaN", "initializer_range=-1", "hidden_dropout=" + "[" * 5000, "x", "=", "max_speech_tokens=0", "z_loss_coefficient=-1",
              "initializer_range=Infinity", "hidden_dropout=x"),
    "--seed": ("-1", "x", str(10**30), str(-(2**63))), "--dtype": ("int8", "nope"), "--max-shard-size": ("0", "-1", "x", "", "nan", "1KB", "1e400", "999999999999999TB"), "--revision": ("x", ""),
    "--ignore-fields": ("nope", "hidden_size"),
}  # fmt: skip
EXPORT = {
    "--tower": ("nope", "", "text"),
    "--architecture": ("nope", "gemma"),
    "--vocab-size": _NUMBERS,
    "--dtype": ("int8",),
    "--max-shard-size": UPCYCLE["--max-shard-size"],
    "--revision": ("x",),
}
CHAMELEON = {
    "--variant": ("nope", "hybrid"), "--modalities": ("text", "image", "text image speech"), "--speech-units": _NUMBERS, "--speech-tokenizer": ("/etc", "no-such"), "--image-decoder": ("/etc", "no-such", "/dev/null"),
    "--max-shard-size": UPCYCLE["--max-shard-size"], "--dtype": ("int8",),
}  # fmt: skip
UPCYCLED = ["--image-codes", "8", "--image-grid", "2", "4"]
CONVERSIONS: dict[str, tuple[Callable, tuple[str, ...], dict, list[str]]] = {
    "upcycle": (upcycle.main, ("llama", "qwen2"), UPCYCLE, UPCYCLED),
    "export_dense": (export_dense.main, ("dense", "mot"), EXPORT, []),
    "import_chameleon": (import_chameleon.main, ("chameleon",), CHAMELEON, []),
    "vae": (vae.main, ("transfusion",), {"--max-shard-size": UPCYCLE["--max-shard-size"]}, []),
}


def good(folder: Path) -> None:
    """Every conversion of a good source."""
    root = saved()
    for main, words in (
        (upcycle.main, [root / "llama", folder / "upcycled", *UPCYCLED]),
        (upcycle.main, [root / "qwen2", folder / "planned", *UPCYCLED, "--dry-run"]),
        (export_dense.main, [root / "dense", folder / "exported"]),
        (export_dense.main, [root / "mot", folder / "tower", "--tower", "text"]),
        (import_chameleon.main, [root / "chameleon", folder / "imported"]),
        (vae.main, ["export", root / "transfusion", folder / "vae"]),
        (vae.main, ["import", root / "transfusion", root / "vae", folder / "with-vae", "--other-latents"]),
    ):
        if code := main(list(map(str, words))):
            raise WrongResult(f"{words} ends with {code}")


def convert(rng: Random, place: Place) -> Case:
    """A source that is damaged or means harm, or an option that is bad."""
    name = rng.choice(["upcycle", "upcycle", "export_dense", "import_chameleon", "vae"])
    main, sources, options, good = CONVERSIONS[name]
    source, out = saved() / rng.choice(sources), place.inside / "out"
    words = [*good, *(["--tower", "text"] if source.name == "mot" else [])]
    names: tuple[str, ...] = ("config.json", "source", "index", "tensor", "model.safetensors")
    if rng.random() < 0.3:
        option = rng.choice(sorted(options))
        value = rng.choice(options[option])
        words = [] if option in ("--image-codes", "--image-grid") and name == "upcycle" else words
        words, says = [*words, option, *(value.split(" ") if value else [value])], f"{option} {values.shown(value)}"
        names = (option, option.strip("-").replace("-", "_"), value[:60])
    else:
        copy = place.inside / "source"
        says = rng.choice([bad_config, bad_config, bad_index, bad_tensors, damage_folder])(rng, place, source, copy)
        source, names = copy, (*names, *words_of(says), "tokenizer.json", "the source")
    paths = [str(source), str(out)]
    if name == "vae":
        words = (
            ["import", paths[0], str(saved() / "vae"), paths[1], *words]
            if rng.random() < 0.5 or words
            else ["export", *paths]
        )
        paths = []
    if rng.random() < 0.3:
        words.append("--dry-run")
    return Case(f"{name}: {says}", lambda: main([*paths, *words]), names, is_command=True)


def words_of(says: str) -> tuple[str, ...]:
    """Names of fields and files in what is said of a case."""
    return tuple(word.split("=")[0] for word in says.replace(",", " ").split() if "." in word or "=" in word)


def bad_config(rng: Random, place: Place, source: Path, copy: Path) -> str:
    shutil.copytree(source, copy)
    tree = json.loads((copy / "config.json").read_text())
    key = rng.choice(sorted(tree))
    number = isinstance(tree[key], (int, float))
    tree[key] = (
        rng.choice([0, -1, values.NAN, 10**9, 10**30, 2.5, "8", None, values.INF])
        if number and rng.random() < 0.8
        else values.json_value(rng)
    )
    (copy / "config.json").write_text(json.dumps(tree))
    return f"{key}={values.shown(tree[key])} in config.json"


def bad_index(rng: Random, place: Place, source: Path, copy: Path) -> str:
    shutil.copytree(source, copy)
    index = copy / "model.safetensors.index.json"
    tensors = [name for path in copy.glob("model*.safetensors") for name in load_file(path)]
    outside = rng.choice([str(place.outside / "secret.safetensors"), "../../outside/secret.safetensors"])
    first = next(copy.glob("model*.safetensors")).name
    tree = rng.choice([
        [], {}, None, 3, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": None}}, {"weight_map": {"a": 3}}, {"weight_map": {"a": ["x"]}}, {"weight_map": {"w": outside}},
        {"weight_map": dict.fromkeys(tensors, outside)}, {"weight_map": {name: first for name in tensors} | {"w": outside}}, {"weight_map": {"a": "\0"}}, {"weight_map": {"a": "x" * 5000}},
        {"weight_map": {"a": ""}}, {"weight_map": {"a": "."}}, {"weight_map": dict.fromkeys(tensors, "config.json")}, {"weight_map": dict.fromkeys(tensors, "/dev/zero")}, values.nested(900),
    ])  # fmt: skip
    data = rng.choice([json.dumps(tree).encode()] * 3 + [files.bad_json(rng, tree)[0]])
    index.write_bytes(data)
    if rng.random() < 0.7:
        (copy / "model.safetensors").unlink(missing_ok=True)
    return f"model.safetensors.index.json of {values.shown(tree)}"


def bad_tensors(rng: Random, place: Place, source: Path, copy: Path) -> str:
    shutil.copytree(source, copy)
    file = rng.choice(sorted(copy.glob("model*.safetensors")))
    way = rng.choice(["dtype", "shape", "gone", "surplus", "nan", "header", "header", "pickle", "bin"])
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    if way == "dtype":
        dtype = rng.choice([torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8, torch.float64])
        tensors[name] = tensors[name].to(dtype)
    elif way == "shape":
        shape = list(tensors[name].shape)
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 7])
        tensors[name] = torch.zeros(shape)
    elif way == "gone":
        del tensors[name]
    elif way == "surplus":
        tensors[rng.choice(["x", name + ".x", "../x", "\0", "a" * 5000])] = torch.zeros(2)
    elif way == "nan":
        tensors[name] = torch.full_like(tensors[name], values.NAN)
    if way in ("dtype", "shape", "gone", "surplus", "nan"):
        save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
        return f"{name} in {file.name}, {way}"
    if way == "pickle":
        file.write_bytes(files.pickled(place.ran))
        return f"a pickle as {file.name}"
    if way == "bin":
        for path in copy.glob("model*.safetensors*"):
            path.unlink()
        (copy / "pytorch_model.bin").write_bytes(files.pickled(place.ran))
        return "pytorch_model.bin that is a pickle"
    header = rng.choice([
        b'{"w":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}', b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b'{"w":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}',
        b"{}", b"[]", b"[" * 100_000, b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b'{"w":3}', b'{"a":' * 50_000, b'{"__metadata__":{"a":1}}', b"\xff",
    ])  # fmt: skip
    length = rng.choice([len(header)] * 4 + [2**40, 2**63, 0])
    file.write_bytes(struct.pack("<Q", length) + header + bytes(4))
    return f"header {values.shown(header)} of {length} bytes in {file.name}"
