"""Damaged or hostile folders of models, processors and their parts."""

import json
from pathlib import Path
from random import Random

from modeling_mot import MoTConfig, MoTForCausalLM, MoTProcessor, MoTTransfusionModel
from modeling_mot.image_tokenizer import MoTImageTokenizer
from modeling_mot.speech_tokenizer import MoTSpeechTokenizer
from training import consolidate

from .case import Case, Place, WrongResult
from .saved import bad_config, bad_index, bad_tensors, damage_folder, saved, words_of


def good(folder: Path) -> None:
    for name, kind in (("mot", MoTForCausalLM), ("dense", MoTForCausalLM), ("transfusion", MoTTransfusionModel)):
        kind.from_pretrained(saved() / name).save_pretrained(folder / name)
        MoTProcessor.from_pretrained(saved() / name).save_pretrained(folder / name)
        _refuse_foreign_code(folder / name)


def load(rng: Random, place: Place) -> Case:
    """Make a bad folder for our classes to read. If it is accepted, it is saved again without foreign code."""
    name, copy = rng.choice(["mot", "transfusion", "dense"]), place.inside / "model"
    says = rng.choice([damage_folder, damage_folder, bad_config, bad_index, bad_tensors])(
        rng, place, saved() / name, copy
    )
    model_class = MoTTransfusionModel if name == "transfusion" else MoTForCausalLM
    what = rng.choice(["model", "model", "processor", "config", "image_tokenizer", "speech_tokenizer", "consolidate"])
    names = (*words_of(says), "auto_map", str(copy), "model.safetensors", "tokenizer", "config.json")

    def model() -> None:
        loaded = model_class.from_pretrained(copy)
        again(loaded)

    def processor() -> None:
        again(MoTProcessor.from_pretrained(copy))

    def again(loaded) -> None:
        loaded.save_pretrained(place.inside / "again")
        _refuse_foreign_code(place.inside / "again")

    calls = {
        "model": model,
        "processor": processor,
        "config": lambda: again(MoTConfig.from_pretrained(copy)),
        "image_tokenizer": lambda: MoTImageTokenizer.from_pretrained(copy, subfolder="image_tokenizer"),
        "speech_tokenizer": lambda: MoTSpeechTokenizer.from_pretrained(copy, subfolder="speech_tokenizer"),
        "consolidate": lambda: consolidate.main([str(copy)]),
    }
    return Case(f"{what} of {name}: {says}", calls[what], names, is_command=what == "consolidate")


def _refuse_foreign_code(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        tree = json.loads(path.read_text())
        entries = json.dumps(tree.get("auto_map", {}) if isinstance(tree, dict) else {})
        if "--" in entries or "evil" in entries:
            raise WrongResult(f"{path.name} was saved with an auto_map of foreign code: {entries}")
    if (folder / "evil.py").exists():
        raise WrongResult("foreign code was saved")
