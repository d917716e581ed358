"""Count the files that one must open to follow a story of the code, in the order in which it enters them.

    python -m tests.reading_order            the files of all stories, each with the first sentence of its docstring
    python -m tests.reading_order step       of one
    python -m tests.reading_order --json     {story: [file, ...]} on the last line

A file belongs to a story if a function of it runs. What runs while modules are imported is not counted.
"""

import argparse
import ast
import importlib
import json
import pkgutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import CO_OPTIMIZED
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("modeling_mot", "training", "conversion", "model_cards")
SCRIPTS = {"__main__", "clean_process"}  # run when they are imported
# The most files that a story may run through.
LIMITS = {"step": 14, "picture": 14, "start": 30}


@contextmanager
def files_entered(files: dict[str, int]) -> Iterator[None]:
    """Add the project's files whose functions run within the block, on any thread, with how many; in order."""
    functions: set = set()

    def note(frame, event, _):
        code = frame.f_code
        # The bodies of modules and classes run while they are imported; functions alone are optimised.
        if event != "call" or code in functions or not code.co_flags & CO_OPTIMIZED:
            return
        functions.add(code)
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
            name = str(path.relative_to(ROOT))
            files[name] = files.get(name, 0) + 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def import_all() -> None:
    """Import every module, so that no story enters one because it is the first to need it."""
    for package in PACKAGES:
        found = importlib.import_module(package) if (ROOT / package / "__init__.py").exists() else None
        for module in pkgutil.walk_packages(found.__path__, f"{package}.") if found else ():
            if module.name.rpartition(".")[2] not in SCRIPTS:
                importlib.import_module(module.name)


def training_stories(wanted: set[str]) -> dict[str, dict[str, int]]:
    """`start`: everything before the first step, with data prepared anew; `step`: a step with its batch."""
    from training.run import Session
    from training.run_files.folder import RunLock
    from training.train import load_recipe
    from training.world import StopSignal

    start: dict[str, int] = {}
    step: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        words = [
            str(ROOT / "training/configs/smoke.yaml"),
            f"train.output_dir={folder}/run",
            "train.progress_bar=false",
        ]
        with StopSignal() as stop_signal:
            with files_entered(start):
                recipe = load_recipe([*words, f"data.cache_dir={folder}/cache"])
                lock = RunLock(recipe.train.output_dir, 0)
                session = Session(recipe, stop_signal, lock)
            if "step" in wanted:
                with files_entered(step):
                    session.trainer.train_step(session.trainer.batches.micro_batches(0))
            lock.release()
    return {"start": start, "step": step}


def picture_story() -> dict[str, int]:
    """`generate()` of a Transfusion model: a prompt, one picture drawn with guidance, and the text after it."""
    import torch

    from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel

    config = MoTTransfusionConfig.from_variant(
        "mot",
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        latent_channels=2,
        latent_size=[4, 4],
        unet_channels=[8, 16],
        unet_layers=1,
        unet_norm_groups=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        boi_token_id=3,
        eoi_token_id=4,
        image_token_id=5,
        caption_dropout=0.1,
        max_position_embeddings=64,
    )
    model = MoTTransfusionModel(config).eval()
    files: dict[str, int] = {}
    with files_entered(files):
        model.generate(
            torch.tensor([[1, 10, 11, 3]]),
            max_new_tokens=10,
            num_inference_steps=2,
            guidance_scale=2.0,
            do_sample=False,
        )
    return files


def conversion_story() -> dict[str, int]:
    """A small Llama becomes a Mixture-of-Transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from conversion.upcycle import main

    files: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(f"{folder}/llama")
        with files_entered(files):
            main([f"{folder}/llama", f"{folder}/mot", "--modalities", "text", "image"])
    return files


def stories(names: set[str]) -> dict[str, dict[str, int]]:
    """Story -> its files in the order in which it enters them, and how many functions of each run."""
    import_all()
    found: dict[str, Callable | dict] = {}
    if names & {"start", "step"}:
        found |= training_stories(names)
    if "picture" in names:
        found["picture"] = picture_story()
    if "conversion" in names:
        found["conversion"] = conversion_story()
    return {name: files for name, files in found.items() if name in names}


def first_sentence(name: str) -> str:
    """Of the docstring of a file."""
    docstring = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="STORY", help="step, start, picture, conversion; default: all")
    parser.add_argument("--json", action="store_true", help="print the files alone, on one line")
    options = parser.parse_args()
    found = stories(set(options.names) or {"step", "start", "picture", "conversion"})
    if options.json:
        print(json.dumps({name: list(files) for name, files in found.items()}))
        return
    for name, files in found.items():
        limit = f", at most {LIMITS[name]}" if name in LIMITS else ""
        print(f"\n{name}: {len(files)} files{limit}")
        for file, functions in files.items():
            print(f"  {file:44} {functions:3} functions  {first_sentence(file)}")


if __name__ == "__main__":
    main()
