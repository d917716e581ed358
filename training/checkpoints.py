"""Checkpoints to resume from, and the folder that others load: safetensors and JSON, nothing pickled.

A checkpoint folder is the final folder (model, code, processor, generation config) with `optimizer.safetensors`,
`trainer.json` and, where a moving average of the weights is kept, `ema.safetensors`; so every checkpoint can be loaded
with `AutoModelForCausalLM`. It is written under another name and renamed, so a folder with its final name is whole.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

from modeling_mot import MoTPreTrainedModel, MoTProcessor
from training.config import ConfigError
from training.run_folder import RunFolder, write_json


def save_pretrained(folder: Path, model: MoTPreTrainedModel, processor: MoTProcessor) -> None:
    """Model, code, processor and generation config in one folder, which appears whole or not at all."""
    with _replacing(folder) as temporary:
        _write_pretrained(temporary, model, processor)


def _write_pretrained(folder: Path, model: MoTPreTrainedModel, processor: MoTProcessor) -> None:
    # transformers' own bar for writing files would cut through ours.
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:
        if was_on:
            logging.enable_progress_bar()


def save_checkpoint(
    folder: Path,
    model: MoTPreTrainedModel,
    processor: MoTProcessor,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ema: EMAModel | None = None,
) -> None:
    """All that `load_checkpoint` needs to go on after `state["step"]` updates."""
    with _replacing(folder) as temporary:
        _write_pretrained(temporary, model, processor)
        tensors = {}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value.detach().cpu().contiguous().clone()
        save_file(tensors, temporary / "optimizer.safetensors")
        if ema is not None:
            averages = zip(_trained(model), ema.shadow_params, strict=True)
            save_file({name: value.cpu().contiguous() for name, value in averages}, temporary / "ema.safetensors")
        write_json(temporary / "trainer.json", state)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_averages(folder: Path, model: nn.Module, ema: EMAModel) -> None:
    """Fill the moving averages of the trained parameters.

    Raises:
        ConfigError: the file is missing or holds other parameters.
    """
    path = folder / "ema.safetensors"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: that run kept no average; set train.ema_decay=null to resume it")
    stored, names = load_file(path), list(_trained(model))
    if set(stored) != set(names):
        raise ConfigError(f"{path} holds averages of other parameters; it belongs to another model or is not whole")
    for name, average in zip(names, ema.shadow_params, strict=True):
        average.copy_(stored[name])


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's state by parameter name.

    Raises:
        ConfigError: the file is missing or lacks a tensor of a trained parameter.
    """
    path = folder / "optimizer.safetensors"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; the checkpoint cannot be resumed from")
    with safe_open(path, framework="pt") as file:
        stored: dict[str, list[str]] = {}
        for key in list(file.keys()):
            kind, _, name = key.partition(".")
            stored.setdefault(name, []).append(kind)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in stored:
                raise ConfigError(f"{path} has no state of {name}; it belongs to another model or is not whole")
            state = {kind: file.get_tensor(f"{kind}.{name}") for kind in stored[name]}
            for kind, value in state.items():
                if value.ndim and value.shape != parameter.shape:
                    raise ConfigError(f"{path}: {kind}.{name} is {tuple(value.shape)}, not {tuple(parameter.shape)}")
            optimizer.state[parameter] = {
                # Copied: as read they lie in the mapped file, aligned to nothing.
                kind: (value.to(parameter.device) if value.ndim or optimizer.defaults.get("fused") else value).clone()
                for kind, value in state.items()
            }


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer.json").read_text(encoding="utf-8"))


def remove_old_checkpoints(run: RunFolder, keep: int) -> None:
    """Keep the newest `keep` whole checkpoints."""
    for step in run.saved_steps()[:-keep]:
        shutil.rmtree(run.checkpoint(step))


class _replacing:
    """A folder beside `folder` that takes its place when the block ends without an error."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        if self.folder.exists():
            old = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.old")
            os.replace(self.folder, old)
            os.replace(self.temporary, self.folder)
            shutil.rmtree(old)
        else:
            os.replace(self.temporary, self.folder)
