"""AdamW, its parameter groups, and the learning rate as a function of the step."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from modeling_mot import MoTPreTrainedModel
from modeling_mot.configuration_mot import SHARED
from training.config import ConfigError, check_options, option


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


Event = Literal["not_finite", "spike", "spike_skipped"]


class NotFiniteError(FloatingPointError):
    """Losses or gradients were not finite for too many steps in a row, or an update left parameters that are not."""


def not_finite(tensors: Mapping[str, torch.Tensor], accelerator: Accelerator) -> list[str]:
    """Names of the tensors, sharded or not, that hold NaN or infinity on any rank; every rank calls it.

    One pass over them and one wait for the device.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in floating.values())
    flags = [(~tensor.isfinite().all()).to(accelerator.device, torch.float32) for tensor in local]
    counts = accelerator.reduce(torch.stack(flags)).tolist() if flags else []
    return [name for name, count in zip(floating, counts, strict=True) if count]


class SpikeDetector:
    """Tells a loss that jumps from one that wanders.

    A loss is a spike when it lies more than `threshold` standard deviations above the median of the last `window` losses
    that were none; the deviation is estimated by how far their highest twentieth lies from that median (1.645 of them, for
    a normal distribution): single jumps do not widen it, and steps that lack a modality, of which the losses then have two
    levels, are no spikes. Losses above it one after another are one spike; when they stay there
    for a quarter of the window, they are the new level.

    Args:
        threshold: in standard deviations; None: nothing is a spike.
        window: losses that are remembered; nothing is a spike before a quarter of them is there.
    """

    def __init__(self, threshold: float | None, window: int = 128):
        self.threshold, self.window = threshold, window
        self.losses: list[float] = []
        self.high_in_a_row = 0

    def sees(self, loss: float) -> bool:
        """Whether this loss begins a spike; `high_in_a_row` says whether it belongs to one."""
        if self._is_high(loss):
            self.high_in_a_row += 1
            if self.high_in_a_row <= self.window // 4:
                return self.high_in_a_row == 1
            self.losses = []
        self.high_in_a_row = 0
        self.losses = [*self.losses, loss][-self.window :]
        return False

    def _is_high(self, loss: float) -> bool:
        if self.threshold is None or len(self.losses) < self.window // 4:
            return False
        median = statistics.median(self.losses)
        deviation = (statistics.quantiles(self.losses, n=20, method="inclusive")[-1] - median) / 1.645
        return loss > median + self.threshold * max(deviation, 1e-3 * abs(median))

    def state(self) -> dict:
        return {"losses": self.losses, "high_in_a_row": self.high_in_a_row}

    def restore(self, state: dict) -> None:
        self.losses, self.high_in_a_row = list(state["losses"]), state["high_in_a_row"]


class UpdateGuard:
    """Decides from a step's loss and gradient norm, which all ranks share, whether its update is made.

    What an update has made of the parameters shows in the next losses, or in none, where no token passes through them;
    `wants_check` says after which steps the trainer looks at the parameters themselves. It does so before every
    checkpoint, too.

    Args:
        not_finite_limit: steps in a row whose loss or gradient may be not finite; one more stops the run.
        skip_spikes: leave out the updates of all steps of a spike.
    """

    def __init__(self, not_finite_limit: int, spike_threshold: float | None, skip_spikes: bool):
        self.not_finite_limit, self.skip_spikes = not_finite_limit, skip_spikes
        self.spikes = SpikeDetector(spike_threshold)
        self.skipped = 0
        self.not_finite_in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> tuple[bool, Event | None]:
        """(whether to update, what there is to tell)."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped += 1
            self.not_finite_in_a_row += 1
            return False, "not_finite"
        self.not_finite_in_a_row = 0
        begins = self.spikes.sees(loss)
        skips = self.skip_spikes and self.spikes.high_in_a_row > 0
        self.skipped += skips
        if skips:
            return False, "spike_skipped"
        return True, "spike" if begins else None

    def wants_check(self, step: int) -> bool:
        """Whether to look at the parameters after this step: where a loss begins to be no number, and every 100 steps."""
        return self.not_finite_in_a_row == 1 or step % 100 == 0

    @property
    def gives_up(self) -> bool:
        return self.not_finite_in_a_row > self.not_finite_limit

    def state(self) -> dict:
        """JSON values with which a resumed run judges alike."""
        return {
            "skipped": self.skipped, "not_finite_in_a_row": self.not_finite_in_a_row, "spikes": self.spikes.state()
        }  # fmt: skip

    def restore(self, state: dict) -> None:
        self.skipped, self.not_finite_in_a_row = state["skipped"], state["not_finite_in_a_row"]
        self.spikes.restore(state["spikes"])


def freeze_towers(model: MoTPreTrainedModel, towers: list[str] | None) -> None:
    """Parameters of these towers get no gradient, in place; before the model is sharded.

    Args:
        towers: of `model.config.tower_names`, or `shared`, for the parts that towers have in common.

    Raises:
        ConfigError: no such tower, or nothing would be left to train in the layers.
    """
    names = {*model.config.tower_names, *(part for part in _parts(model) if part == SHARED)}
    if unknown := [tower for tower in towers or [] if tower not in names]:
        raise ConfigError(f"train.frozen_towers names {unknown[0]!r}; the model has {', '.join(sorted(names))}")
    if towers and names <= set(towers):
        raise ConfigError(f"train.frozen_towers={towers} are all towers of the model; leave one to train")
    for name, parameter in model.named_parameters():
        if not set(name.split(".")).isdisjoint(towers or ()):
            parameter.requires_grad_(False)


def _parts(model: MoTPreTrainedModel) -> set[str]:
    return {name for part in ("attention", "feed_forward", "norm") for name in model.config.part_names(part)}


class HeldRows:
    """The first rows of embeddings and output layer keep their values, where `parameters` do not decay.

    Args:
        model: on its device, and sharded where it is to be.
        count: how many; None: none.

    Raises:
        ConfigError: more than there are.
    """

    def __init__(self, model: MoTPreTrainedModel, count: int | None):
        if count is not None and count > model.config.vocab_size:
            raise ConfigError(
                f"train.frozen_vocabulary={count} rows, but the model has vocab_size={model.config.vocab_size}"
            )
        weights = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        self.parameters = list({id(weight): weight for weight in weights}.values()) if count else []  # tied: one
        self.count = count
        self._masks: dict[int, torch.Tensor] = {}

    def clear_gradients(self) -> None:
        """Set the gradient of the held rows to zero, before norms are taken of it."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self._mask(parameter))

    def _mask(self, parameter: nn.Parameter) -> torch.Tensor:
        """1 for rows that are trained, 0 for held ones; sharded as the gradient is.  -> (V, 1)"""
        if id(parameter) not in self._masks:
            mask = torch.ones(parameter.shape[0], 1, device=parameter.device)
            mask[: self.count] = 0
            if isinstance(parameter, DTensor):
                mask = distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)
            self._masks[id(parameter)] = mask
        return self._masks[id(parameter)]
