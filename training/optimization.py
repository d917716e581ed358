"""AdamW, its parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from training.config import check_options, option


@dataclass
class OptimizerConfig:
    """AdamW with cosine decay after linear warm-up; the defaults are the paper's."""

    lr: float = option(3e-4, "peak learning rate, reached after warmup_steps", gt=0, le=100)
    min_lr: float = option(1.5e-5, "learning rate at the last step", ge=0)
    warmup_steps: int | None = option(
        None, "steps of linear warm-up from 0; null: the paper's 4000, in a shorter run a tenth of it", ge=0
    )
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's two decay rates", ge=0, lt=1)
    eps: float = option(1e-8, "AdamW's epsilon", ge=1e-30, le=1)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices", ge=0)
    decay_norms_and_biases: bool = option(False, "apply weight decay to norms and biases too")
    decay_embeddings: bool = option(False, "apply weight decay to embeddings (and to a tied output layer) too")
    clip_norm: float | None = option(
        1.0, "global gradient norm above which gradients are scaled down; null: never", ge=1e-6
    )

    def __post_init__(self):
        check_options(self)
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} must be at most lr={self.lr}")
        if self.lr * self.weight_decay > 1:
            raise ValueError(
                f"weight_decay={self.weight_decay} times lr={self.lr} is more than 1: a step would turn weights around"
            )


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Steps of warm-up in a run of `steps`."""
    return min(4000, steps // 10) if config.warmup_steps is None else config.warmup_steps


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of update `step` (0-based) of `steps`: linear warm-up, then a half cosine down to min_lr.

    A pure function of the step, so that a resumed run needs no scheduler state and no rank can step it twice.
    """
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, undecayed_parameters: Iterable[nn.Parameter] = ()
) -> list[dict]:
    """Two AdamW groups, with and without weight decay, each in the order of `named_parameters`."""
    kept = set(map(id, undecayed_parameters))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, undecayed = [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in kept:
            decay = False
        elif id(parameter) in embeddings:
            decay = config.decay_embeddings
        else:
            decay = parameter.ndim >= 2 or config.decay_norms_and_biases
        (decayed if decay else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, undecayed_parameters: Iterable[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """AdamW in its fused form where the device has one (CPU, CUDA), else the foreach form.

    Args:
        undecayed_parameters: those that do not decay, whatever `config` says.
    """
    fused = {parameter.device.type for parameter in model.parameters()} <= {"cpu", "cuda"}
    groups = parameter_groups(model, config, undecayed_parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=fused)
