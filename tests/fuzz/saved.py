"""Make folders of good checkpoints and tokenizers, and damage their files."""

import functools
import json
import shutil
import struct
import tempfile
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from conversion.import_bagel import import_bagel
from modeling_mot import MoTConfig, MoTForCausalLM
from modeling_mot.latent_vae import build_vae
from tests.conversion import chameleon_sources
from tests.conversion.bagel_sources import CHECKPOINT, TOKEN_IDS
from tests.conversion.conftest import SIZES
from tests.conversion.sources import save_source, words_tokenizer
from tests.modeling_mot.naive_transfusion import VAE
from tests.modeling_mot.naive_transfusion import tiny_model as transfusion
from tests.modeling_mot.test_continuous_processor import build_continuous
from tests.modeling_mot.test_image_tokenizer import tiny_tokenizer
from tests.modeling_mot.test_processor import build_processor
from tests.modeling_mot.test_speech_tokenizer import tokenizer_with_random_units

from . import files, values
from .case import Place


@functools.cache
def saved() -> Path:
    """Make good checkpoints: `llama`, `qwen2` in shards, `chameleon`, `mot`, `dense`, `transfusion`, `vae`, `bagel`."""
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
    shutil.copytree(CHECKPOINT, root / "bagel")
    (root / "bagel" / "ema.safetensors").rename(root / "bagel" / "model.safetensors")
    import_bagel(str(root / "bagel"), root / "bagel-mot", token_ids=TOKEN_IDS)
    return root


@functools.cache
def parts() -> Path:
    """Make a folder of a text tokenizer, an image tokenizer and a speech tokenizer."""
    folder = Path(tempfile.mkdtemp())
    words_tokenizer(40).save_pretrained(folder / "text")
    tiny_tokenizer().save_pretrained(folder / "image")
    tokenizer_with_random_units().save_pretrained(folder / "speech")
    return folder


# -------------------------------------------------------------------------------------------------------------- damage


def words_of(says: str) -> tuple[str, ...]:
    """Return the names of fields and files that the description of a damage contains."""
    return tuple(word.split("=")[0] for word in says.replace(",", " ").split() if "." in word or "=" in word)


def bad_config(rng: Random, place: Place, source: Path, copy: Path) -> str:
    """Copy a folder with a bad value in config.json, most often a number for a number.  -> description"""
    shutil.copytree(source, copy)
    tree = json.loads((copy / "config.json").read_text())
    key = rng.choice(sorted(tree))
    if isinstance(tree[key], (int, float)) and rng.random() < 0.8:
        tree[key] = rng.choice([0, -1, values.NAN, 10**9, 10**30, 2.5, "8", None, values.INF])
    else:
        tree[key] = values.json_value(rng)
    (copy / "config.json").write_text(json.dumps(tree))
    return f"{key}={values.shown(tree[key])} in config.json"


def bad_index(rng: Random, place: Place, source: Path, copy: Path) -> str:
    """Copy a folder with a bad index of its weights.  -> description"""
    shutil.copytree(source, copy)
    weights = sorted(copy.glob("model*.safetensors"))
    tensors = [name for path in weights for name in load_file(path)]
    outside = rng.choice([str(place.outside / "secret.safetensors"), "../../outside/secret.safetensors"])
    maps: list = [
        None, [], {}, 3, {"a": None}, {"a": 3}, {"a": ["x"]}, {"a": "\0"}, {"a": "x" * 5000}, {"a": ""}, {"a": "."},
        {"w": outside}, dict.fromkeys(tensors, outside), dict.fromkeys(tensors, weights[0].name) | {"w": outside},
        dict.fromkeys(tensors, "config.json"), dict.fromkeys(tensors, "/dev/zero"),
    ]  # fmt: skip
    tree = {"metadata": {}, "weight_map": rng.choice(maps)}
    if rng.random() < 0.2:
        tree = rng.choice([[], {}, None, 3, values.nested(900)])
    data = json.dumps(tree).encode() if rng.random() < 0.8 else files.bad_json(rng, tree)[0]
    (copy / "model.safetensors.index.json").write_bytes(data)
    if rng.random() < 0.7:
        (copy / "model.safetensors").unlink(missing_ok=True)
    return f"model.safetensors.index.json of {values.shown(tree)}"


_HEADERS = (
    b"{}", b"[]", b"[" * 100_000, b'{"a":' * 50_000, b'{"w":3}', b'{"__metadata__":{"a":1}}', b"\xff",
    b'{"w":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}',
    b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    b'{"w":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}',
    b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
)  # fmt: skip
_DTYPES = (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8, torch.float64)


def bad_tensors(rng: Random, place: Place, source: Path, copy: Path) -> str:
    """Copy a folder with a bad tensor in a file of weights, or a bad file.  -> description"""
    shutil.copytree(source, copy)
    file = rng.choice(sorted(copy.glob("model*.safetensors")))
    way = rng.choice(["dtype", "shape", "gone", "surplus", "nan", "header", "header", "pickle", "bin"])
    if way == "pickle":
        file.write_bytes(files.pickled(place.ran))
        return f"a pickle as {file.name}"
    if way == "bin":
        for path in copy.glob("model*.safetensors*"):
            path.unlink()
        (copy / "pytorch_model.bin").write_bytes(files.pickled(place.ran))
        return "pytorch_model.bin that is a pickle"
    if way == "header":
        header = rng.choice(_HEADERS)
        length = rng.choice([len(header)] * 4 + [2**40, 2**63, 0])
        file.write_bytes(struct.pack("<Q", length) + header + bytes(4))
        return f"header {values.shown(header)} of {length} bytes in {file.name}"
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    if way == "dtype":
        tensors[name] = tensors[name].to(rng.choice(_DTYPES))
    elif way == "shape":
        shape = list(tensors[name].shape)
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 7])
        tensors[name] = torch.zeros(shape)
    elif way == "gone":
        del tensors[name]
    elif way == "surplus":
        tensors[rng.choice(["x", name + ".x", "../x", "\0", "a" * 5000])] = torch.zeros(2)
    else:
        tensors[name] = torch.full_like(tensors[name], values.NAN)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
    return f"{name} in {file.name}, {way}"


def damage_folder(rng: Random, place: Place, source: Path, copy: Path) -> str:
    """Copy a folder, and damage, replace or remove one of its files or values.  -> description"""
    shutil.copytree(source, copy)
    known = (path for path in copy.rglob("*") if path.suffix in (".json", ".safetensors", ".jinja"))
    file = rng.choice(sorted(known))
    name, is_json = file.relative_to(copy), file.suffix == ".json"
    way = rng.choice(
        ["damage", "pickle", "gone", *(["json", "value", "value", "value", "auto_map"] if is_json else [])]
    )
    if way == "damage":
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
        evil = rng.choice(["evil.Evil", "attacker/repo--evil.Evil"])
        tree["auto_map"] = dict.fromkeys(("AutoModel", "AutoConfig", "AutoProcessor"), evil)
        tree["auto_map"]["AutoTokenizer"] = [evil, None]
        file.write_text(json.dumps(tree))
        return f"auto_map={evil} in {name}"
    key = rng.choice(sorted(tree))
    tree[key] = values.json_value(rng)
    file.write_text(json.dumps(tree))
    return f"{key}={values.shown(tree[key])} in {name}"
