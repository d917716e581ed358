"""Bad sources and options for conversions from and to other checkpoints."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from conversion import export_bagel, export_dense, import_bagel, import_chameleon, upcycle, vae
from tests.conversion.bagel_sources import TOKEN_IDS

from . import values
from .case import Case, Place, WrongResult
from .saved import bad_config, bad_index, bad_tensors, damage_folder, saved, words_of


_NUMBERS = ("-1", "0", "x", "nan", str(10**30), "", "1.5")
_FOLDERS = ("/etc", "no-such", "\0", "/dev/null")
_SHARDS = ("0", "-1", "x", "", "nan", "1KB", "1e400", "999999999999999TB")
UPCYCLE: dict[str, tuple[str, ...]] = {
    "--modalities": ("image", "text text", "text nope", "text image speech"),
    "--image-codes": _NUMBERS,
    "--speech-units": _NUMBERS,
    "--image-grid": ("0 0", "-1 5", "2", "1000000000 1000000000", "nan nan", "2 2"),
    "--image-tokenizer": _FOLDERS,
    "--speech-tokenizer": _FOLDERS,
    "--vae": _FOLDERS,
    "--share": ("nope", "attention attention"),
    "--moe-text": _NUMBERS,
    "--max-length": ("-5", "0", "x", str(10**30), "1"),
    "--init": (
        "image=perturbed:inf", "image=perturbed:nan", "image=perturbed:-1", "image=perturbed:1e400",
        "nope=copy", "image",
        "image=", "image=nope", "=copy", "text=fresh", "image=perturbed:x",
    ),
    "--set": (
        "nope=1", "hidden_dropout=nan", "hidden_dropout=2", "initializer_range=NaN", "initializer_range=-1", "x", "=",
        "hidden_dropout=" + "[" * 5000, "max_speech_tokens=0", "z_loss_coefficient=-1", "initializer_range=Infinity",
        "hidden_dropout=x",
    ),
    "--seed": ("-1", "x", str(10**30), str(-(2**63))),
    "--dtype": ("int8", "nope"),
    "--max-shard-size": _SHARDS,
    "--revision": ("x", ""),
    "--ignore-fields": ("nope", "hidden_size"),
}  # fmt: skip
EXPORT: dict[str, tuple[str, ...]] = {
    "--tower": ("nope", "", "text"),
    "--architecture": ("nope", "gemma"),
    "--vocab-size": _NUMBERS,
    "--dtype": ("int8",),
    "--max-shard-size": _SHARDS,
    "--revision": ("x",),
}
CHAMELEON: dict[str, tuple[str, ...]] = {
    "--variant": ("nope", "hybrid"),
    "--modalities": ("text", "image", "text image speech"),
    "--speech-units": _NUMBERS,
    "--speech-tokenizer": _FOLDERS,
    "--image-decoder": _FOLDERS,
    "--max-shard-size": _SHARDS,
    "--dtype": ("int8",),
}
BAGEL: dict[str, tuple[str, ...]] = {
    "--token-ids": ("im_start", "im_start=x", "nope=1", "im_start=-1", f"im_end={10**30}", "vision=5 image=5", ""),
    "--vae": _FOLDERS,
    "--max-shard-size": _SHARDS,
    "--dtype": ("int8",),
}
IDS = ["--token-ids", *(f"{name}={token}" for name, token in TOKEN_IDS.items())]
UPCYCLED = ["--image-codes", "8", "--image-grid", "2", "4"]
CONVERSIONS: dict[str, tuple[Callable, tuple[str, ...], dict, list[str]]] = {
    "upcycle": (upcycle.main, ("llama", "qwen2"), UPCYCLE, UPCYCLED),
    "export_dense": (export_dense.main, ("dense", "mot"), EXPORT, []),
    "import_chameleon": (import_chameleon.main, ("chameleon",), CHAMELEON, []),
    "import_bagel": (import_bagel.main, ("bagel",), BAGEL, IDS),
    "export_bagel": (export_bagel.main, ("bagel-mot",), {"--overwrite": ("x",)}, []),
    "vae": (vae.main, ("transfusion",), {"--max-shard-size": _SHARDS}, []),
}


def good(folder: Path) -> None:
    """Run every conversion on a good source."""
    root = saved()
    for main, words in (
        (upcycle.main, [root / "llama", folder / "upcycled", *UPCYCLED]),
        (upcycle.main, [root / "qwen2", folder / "planned", *UPCYCLED, "--dry-run"]),
        (export_dense.main, [root / "dense", folder / "exported"]),
        (export_dense.main, [root / "mot", folder / "tower", "--tower", "text"]),
        (import_chameleon.main, [root / "chameleon", folder / "imported"]),
        (import_bagel.main, [root / "bagel", folder / "bagel", *IDS]),
        (export_bagel.main, [root / "bagel-mot", folder / "bagel-again"]),
        (vae.main, ["export", root / "transfusion", folder / "vae"]),
        (vae.main, ["import", root / "transfusion", root / "vae", folder / "with-vae", "--other-latents"]),
    ):
        if code := main(list(map(str, words))):
            raise WrongResult(f"{words} ends with {code}")


def convert(rng: Random, place: Place) -> Case:
    """Make a conversion with a damaged or hostile source, or a bad option."""
    name = rng.choice(["upcycle", "upcycle", "export_dense", "import_chameleon", "vae", "import_bagel", "export_bagel"])
    main, sources, options, good = CONVERSIONS[name]
    source, out = saved() / rng.choice(sources), place.inside / "out"
    words = [*good, *(["--tower", "text"] if source.name == "mot" else [])]
    names: tuple[str, ...] = ("config.json", "source", "index", "tensor", "model.safetensors")
    if rng.random() < 0.3:
        option = rng.choice(sorted(options))
        value = rng.choice(options[option])
        words = [] if option in ("--image-codes", "--image-grid", "--token-ids") else words
        words, says = [*words, option, *(value.split(" ") if value else [value])], f"{option} {values.shown(value)}"
        names = (option, option.strip("-").replace("-", "_"), value[:60], value.partition("=")[2])
    else:
        copy = place.inside / "source"
        ways = [bad_config, bad_config, bad_index, bad_tensors, damage_folder]
        says = rng.choice(ways[3:] if name == "import_bagel" else ways)(rng, place, source, copy)
        source, names = copy, (*names, *words_of(says), "tokenizer.json", "the source")
    paths = [str(source), str(out)]
    if name == "vae" and (words or rng.random() < 0.5):
        paths = ["import", paths[0], str(saved() / "vae"), paths[1]]
    elif name == "vae":
        paths = ["export", *paths]
    if rng.random() < 0.3:
        words.append("--dry-run")
    return Case(f"{name}: {says}", lambda: main([*paths, *words]), names, is_command=True)
