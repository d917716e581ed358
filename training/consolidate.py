"""Make a run's checkpoint an ordinary `from_pretrained` folder: weights in one piece, code, processor and card.

    python -m training.consolidate RUN [--step N] [--output FOLDER] [--weights average|trained] [--dtype float32]

RUN is a run's folder. The checkpoint is verified first; its tensors go through the memory of one CPU. They are written
in the precision of the checkpoint that the run started from (model.init_from), else bit for bit, in float32.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from model_cards.card import PICTURES, model_card
from modeling_mot import MoTPreTrainedModel, MoTProcessor
from training.config import ConfigError, build, one_line
from training.model.adapters import LoraConfig, adapters_of, merge_adapters, save_adapters
from training.model.building import MODEL_CLASSES, read_weights, without_bars
from training.optimization import set_trained
from training.run_files.checkpoints import DamagedError, model_tensors, newest_intact, read_tensors, replacing, verify
from training.run_files.folder import RunFolder
from training.world import make_room


DTYPES = ("float32", "bfloat16", "float16")


def consolidate(
    run: RunFolder,
    step: int | None = None,
    output: Path | None = None,
    weights: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a checkpoint as a folder for `from_pretrained`, which appears whole or not at all.

    Args:
        step: None: the newest checkpoint that is intact.
        output: an existing folder is replaced; None: `consolidated/step-...` in the run's folder, which must not exist.
        weights: `trained`, or their moving `average`; None: the average where there is one.
        dtype: one of `DTYPES`; None: that of the checkpoint that the run started from, else float32.

    Raises:
        ConfigError: no such checkpoint, or it is damaged, or it holds no average.
    """
    # The checkpoint, which of its weights, and the folder.
    manifest = _manifest(run, step)
    checkpoint = run.checkpoint(manifest["step"])
    has_average = manifest["average_updates"] is not None
    weights = weights or ("average" if has_average else "trained")
    if weights == "average" and not has_average:
        raise ConfigError(f"{checkpoint} holds no average (train.ema_decay=null); use --weights trained")
    if output is None:
        output = run.path / "consolidated" / checkpoint.name
        if output.exists():
            raise ConfigError(f"{output} exists; remove it, or name another folder with --output")

    # The model, and all that a stranger needs beside it.
    recipe = manifest.get("config", {})
    trained = trained_parts_of(recipe.get("train", {}))
    model = read_model(checkpoint, average=weights == "average", **trained)
    lora, source = trained.get("lora"), recipe.get("model", {}).get("init_from")
    adapters = adapters_of(model)
    merge_adapters(model, (lambda name: read_weights(source, name)[""]) if source else None)
    cast_parameters(model, getattr(torch, dtype or manifest.get("dtype") or "float32"))
    processor = MoTProcessor.from_pretrained(checkpoint / "pretrained")
    with replacing(output) as folder, without_bars():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model_card(folder, run.path, step=manifest["step"], weights=weights).save(folder / "README.md")
        if lora is not None:
            save_adapters(adapters, lora, source, folder / "adapter")
    return output


def trained_parts_of(train: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments of `set_trained` from a manifest's train section, which may be an older version's."""
    names = ("frozen_towers", "frozen_parts", "lora", "frozen_dtype")
    trained = {name: train[name] for name in names if train.get(name) is not None}
    return trained | ({"lora": build(LoraConfig, trained["lora"])} if "lora" in trained else {})


def cast_parameters(model: MoTPreTrainedModel, dtype: torch.dtype) -> None:
    """Cast parameters to a precision, in place; parts that the model keeps in float32 (a VAE) and buffers stay."""
    lists = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
    kept = tuple(f"{name}." for names in lists for name in names or ())
    for name, parameter in model.named_parameters():
        if not name.startswith(kept):
            parameter.data = parameter.data.to(dtype)


def complete_card(run: RunFolder) -> None:
    """Write the card of the final folder anew, with the figures and pictures that the run's end has brought."""
    for name in PICTURES:
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, run.final / name)
    model_card(run.final, run.path).save(run.final / "README.md")


def read_model(checkpoint: Path, average: bool = False, **trained: Any) -> MoTPreTrainedModel:
    """Load the model of a verified checkpoint on the CPU, with its weights or their average; frozen ones have none.

    Args:
        trained: arguments of `set_trained`, with which the model was trained.
    """
    # A model without weights, with room for them.
    described = checkpoint / "pretrained"
    model_class = MODEL_CLASSES[json.loads((described / "config.json").read_text(encoding="utf-8"))["model_type"]]
    config = model_class.config_class.from_pretrained(described)
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(config, dtype=torch.float32)
    if (described / "generation_config.json").is_file():
        model.generation_config = model.generation_config.from_pretrained(described)
    set_trained(model, **trained)
    make_room(model, "cpu")

    # The weights, by the names that they were stored under.
    averaged = {name for name, parameter in model.named_parameters() if average and parameter.requires_grad}
    tensors = model_tensors(model).items()
    read_tensors(checkpoint, {f"{'average' if name in averaged else 'model'}.{name}": value for name, value in tensors})
    return model.eval()


def _manifest(run: RunFolder, step: int | None) -> dict[str, Any]:
    """Return the manifest of the checkpoint that is asked for, which is verified."""
    if step is None:
        manifest, skipped = newest_intact(run)
        if manifest is None:
            found = "; ".join(f"{folder.name}: {reason}" for folder, reason in skipped) or "there is none"
            raise ConfigError(f"{run.checkpoints} has no intact checkpoint ({found})")
        for folder, reason in skipped:
            print(f"{folder.name} is passed over: {reason}", file=sys.stderr)
        return manifest
    if step not in run.saved_steps():
        raise ConfigError(f"{run.path} has no checkpoint of step {step}; there are {run.saved_steps()}")
    try:
        return verify(run.checkpoint(step))
    except DamagedError as error:
        raise ConfigError(f"{run.checkpoint(step)} is damaged: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m training.consolidate", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest intact one)")
    parser.add_argument("--output", type=Path, help="new folder (default: RUN/consolidated/step-...)")
    parser.add_argument("--weights", choices=("average", "trained"), help="(default: the average where one was kept)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: that of model.init_from, or float32)")
    options = parser.parse_args(arguments)
    try:
        if options.output is not None and options.output.exists():
            raise ConfigError(f"--output {options.output} exists; remove it or name another folder")
        print(consolidate(RunFolder(options.run), options.step, options.output, options.weights, options.dtype))
    except ConfigError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
