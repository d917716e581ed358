"""From the losses of a step to an update: one loss, AdamW, the learning rate, and the updates that are left out.

A model returns, for each objective, the sum of its losses (`loss_sums`); the batch alone tells how many targets there
are. The trainer sums the counts over micro-batches and ranks first and divides once, so that the gradient does not
depend on how the rows were split. A mean of per-batch means would give a token more weight in a batch of few tokens.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from modeling_mot import MoTConfig, MoTPreTrainedModel
from modeling_mot.configuration_mot import SHARED
from modeling_mot.tower_routing import ModalityRouting
from training.config import ConfigError, check_options, option
from training.data.collate import count_noised
from training.data.documents import is_transfusion
from training.model.adapters import FrozenDtype, LoraConfig, add_adapters, hold_frozen


# B batch, L row length, V vocabulary

# ---------------------------------------------------------------------------------------------------------- one loss

DIFFUSION = "image_diffusion"


def objective_names(config: MoTConfig) -> list[str]:
    """List the keys of a model's `loss_sums`: its modalities of tokens, then the diffusion of images if it has one."""
    return [*config.token_modalities, *([DIFFUSION] if is_transfusion(config) else [])]


def count_targets(batch: Mapping[str, torch.Tensor], config: MoTConfig) -> torch.Tensor:
    """Count the targets of each objective in a batch, from the batch alone.  -> (objectives,) long

    Targets of tokens are the labels, (B, L), by their modality. The labels are not shifted, so the first position of a
    row is never a target. Targets of diffusion are the elements of the latents of images that are not clean.
    """
    is_target = batch["labels"][:, 1:] != -100
    modality_ids = batch["modality_ids"][:, 1:][is_target].flatten()
    of_modality = torch.bincount(modality_ids, minlength=len(config.modalities)).tolist()
    counts = [of_modality[config.modalities.index(modality)] for modality in config.token_modalities]
    if is_transfusion(config):
        counts.append(count_noised(batch, config))
    return torch.tensor(counts)


def loss_scales(
    totals: Mapping[str, int], modality_weights: Mapping[str, float] | None = None, diffusion_weight: float = 1.0
) -> tuple[dict[str, float], float]:
    """Return (the factor of each objective's loss sum, that of the z-loss sum) for the global `totals` of one step.

    Without weights the loss of tokens is the mean over all their targets, as in Chameleon. With weights it is a
    weighted mean, in which a modality's targets count `weight` times (1 for a modality that is not named). The mean
    over the elements of noised latents is added `diffusion_weight` times (equation 4 of the paper). An objective
    without any target has a factor of zero.
    """
    # One mean over the targets of all modalities of tokens.
    tokens = {name: count for name, count in totals.items() if name != DIFFUSION}
    weights = {name: (modality_weights or {}).get(name, 1.0) for name in tokens}
    weighted_total = sum(weights[name] * count for name, count in tokens.items())
    total = sum(tokens.values())
    scales = {name: weight / weighted_total if weighted_total else 0.0 for name, weight in weights.items()}
    # Beside it, the mean over the elements of noised latents.
    if DIFFUSION in totals:
        scales[DIFFUSION] = diffusion_weight / totals[DIFFUSION] if totals[DIFFUSION] else 0.0
    return scales, 1 / total if total else 0.0


def check_modality_weights(weights: Mapping[str, float] | None, modalities: Sequence[str]) -> None:
    """Refuse weights of modalities that the model does not have, and weights that make no loss.

    Raises:
        ConfigError: the weight by name.
    """
    for name, weight in (weights or {}).items():
        if name not in modalities:
            hint = (
                "; for images that are diffused set model.transfusion.diffusion_loss_weight" if name == "image" else ""
            )
            raise ConfigError(
                f"train.modality_weights names {name!r}; modalities of tokens are {list(modalities)}{hint}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"train.modality_weights.{name}={weight} must be a finite number of at least 0")
    if weights and not any(weights.get(name, 1.0) for name in modalities):
        raise ConfigError(f"train.modality_weights={dict(weights)} leave nothing to learn; make one of them positive")


def combine(
    loss_sums: Mapping[str, torch.Tensor], z_loss_sum: torch.Tensor | float, scales: Mapping[str, float], z_scale: float
) -> torch.Tensor:
    """Return this micro-batch's share of the step's loss, in float32."""
    loss = sum(scales[name] * loss_sum.float() for name, loss_sum in loss_sums.items())
    return loss + z_scale * (z_loss_sum.float() if torch.is_tensor(z_loss_sum) else z_loss_sum)


# ----------------------------------------------------------------------------------------- AdamW and the learning rate


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


def default_warmup(steps: int) -> int:
    """Return the number of warm-up steps in a run of `steps`, if the recipe leaves it open."""
    return min(4000, steps // 10)


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Return the number of warm-up steps in a run of `steps`."""
    return default_warmup(steps) if config.warmup_steps is None else config.warmup_steps


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of update `step` (0-based) of `steps`: linear warm-up, then half a cosine to min_lr.

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
    decayed = []
    undecayed = []
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
    """Make AdamW, in its fused form where the device has one (CPU, CUDA), else in the foreach form.

    Args:
        undecayed_parameters: parameters without weight decay, whatever `config` says.
    """
    fused = {parameter.device.type for parameter in model.parameters()} <= {"cpu", "cuda"}
    groups = parameter_groups(model, config, undecayed_parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=fused)


# ------------------------------------------------------------------------------------------ updates that are left out

Event = Literal["not_finite", "spike", "spike_skipped"]


class NotFiniteError(FloatingPointError):
    """Losses or gradients were not finite for too many steps in a row, or an update left parameters not finite."""


def not_finite(tensors: Mapping[str, torch.Tensor], accelerator: Accelerator) -> list[str]:
    """Return the names of the tensors, sharded or not, that hold NaN or infinity on any rank. Every rank calls it.

    It takes one pass over the tensors and one wait for the device.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in floating.values())
    flags = [(~tensor.isfinite().all()).to(accelerator.device, torch.float32) for tensor in local]
    counts = accelerator.reduce(torch.stack(flags)).tolist() if flags else []
    return [name for name, count in zip(floating, counts, strict=True) if count]


class SpikeDetector:
    """Tells a loss that jumps from a loss that wanders.

    A loss is a spike if it lies more than `threshold` standard deviations above the median of the last `window` losses
    that were no spikes. The distance from the median to the highest twentieth of these losses estimates the deviation
    (1.645 standard deviations for a normal distribution). Single jumps do not widen this estimate. A run in which some
    steps lack a modality has losses on two levels, and the upper level is no spike. High losses one after another are
    one spike; if they stay high for a quarter of the window, they are the new level.

    Args:
        threshold: in standard deviations; None: nothing is a spike.
        window: number of losses that are remembered; the first quarter of them cannot be spikes.
    """

    def __init__(self, threshold: float | None, window: int = 128):
        self.threshold = threshold
        self.window = window
        self.losses: list[float] = []
        self.high_in_a_row = 0

    def sees(self, loss: float) -> bool:
        """True if this loss begins a spike. A loss that belongs to a spike leaves `high_in_a_row` above zero."""
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
        self.losses = list(state["losses"])
        self.high_in_a_row = state["high_in_a_row"]


class UpdateGuard:
    """Decides whether a step's update is made, from the loss and the gradient norm that all ranks share.

    A bad update shows in the next losses, unless no token passes through the parameters it has spoilt. So the trainer
    also looks at the parameters themselves: after the steps that `wants_check` names, and before every checkpoint.

    Args:
        not_finite_limit: how many steps in a row may have a loss or gradient that is not finite; one more ends the run.
        spike_threshold: see `SpikeDetector`.
        skip_spikes: leave out the updates of all steps of a spike.
    """

    def __init__(self, not_finite_limit: int, spike_threshold: float | None, skip_spikes: bool):
        self.not_finite_limit = not_finite_limit
        self.skip_spikes = skip_spikes
        self.spikes = SpikeDetector(spike_threshold)
        self.skipped = 0
        self.not_finite_in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> tuple[bool, Event | None]:
        """Return (true if the update is to be made, the event to report)."""
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
        """True if the parameters are checked after this step: the first of several not finite ones, or a 100th."""
        return self.not_finite_in_a_row == 1 or step % 100 == 0

    @property
    def gives_up(self) -> bool:
        """True if too many steps in a row were not finite."""
        return self.not_finite_in_a_row > self.not_finite_limit

    def state(self) -> dict:
        """Return JSON values from which `restore` continues with the same decisions."""
        return {
            "skipped": self.skipped,
            "not_finite_in_a_row": self.not_finite_in_a_row,
            "spikes": self.spikes.state(),
        }

    def restore(self, state: dict) -> None:
        self.skipped = state["skipped"]
        self.not_finite_in_a_row = state["not_finite_in_a_row"]
        self.spikes.restore(state["spikes"])


# ----------------------------------------------------------------- parameters that are kept, and their moving average


def set_trained(
    model: MoTPreTrainedModel,
    frozen_towers: list[str] | None = None,
    frozen_parts: list[str] | None = None,
    gradient_stops: list[str] | None = None,
    lora: LoraConfig | None = None,
    frozen_dtype: FrozenDtype = "float32",
    seed: int = 0,
) -> None:
    """Freeze what a recipe does not train, add its adapters, and hold frozen weights in its precision; in place.

    Call it before the model is sharded. The arguments are fields of `TrainConfig`; `seed` is of the adapters.

    Raises:
        ConfigError: by the name of the field.
    """
    freeze_towers(model, frozen_towers)
    freeze_parts(model, frozen_parts)
    if gradient_stops:
        stop_gradients(model, gradient_stops, frozen_towers or [])
    if lora is not None:
        torch.manual_seed(seed)
        add_adapters(model, lora)
    if frozen_dtype != "float32":
        hold_frozen(model, frozen_dtype)


def freeze_towers(model: MoTPreTrainedModel, towers: list[str] | None) -> None:
    """Freeze the parameters of these towers, in place. Call it before the model is sharded.

    Args:
        towers: of `model.config.tower_names`, or `shared` for the parts that towers have in common.

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


# Parts beside the towers -> the beginning of their parameters' names. A connector is a part of its encoder.
_BESIDE = {
    "embeddings": "model.embed_tokens.",
    "output_layer": "lm_head.",
    "patchifier": "patchifier.",
    "encoders": "encoders.",
}


def freeze_parts(model: MoTPreTrainedModel, parts: list[str] | None) -> None:
    """Freeze the parameters of parts beside the towers, in place: embeddings, output_layer, patchifier or encoders.

    Raises:
        ConfigError: no such part in this model.
    """
    names = [name for name, _ in model.named_parameters()]
    there = [part for part, beginnings in _BESIDE.items() if any(name.startswith(beginnings) for name in names)]
    for part in parts or ():
        if part not in there:
            raise ConfigError(f"train.frozen_parts names {part!r}; beside its towers the model has {', '.join(there)}")
        for name, parameter in model.named_parameters():
            if name.startswith(_BESIDE[part]):
                parameter.requires_grad_(False)


def stop_gradients(model: MoTPreTrainedModel, towers: list[str], frozen_towers: list[str]) -> None:
    """Let no gradient pass through the tokens of frozen towers, before and behind each layer, in place.

    The tokens of other towers still read them. What the tokens of these towers predict trains the output layer alone.

    Raises:
        ConfigError: a tower that is not frozen, which could not learn.
    """
    if trained := [tower for tower in towers if tower not in frozen_towers]:
        raise ConfigError(
            f"train.gradient_stops names {trained[0]!r}, which could not learn; name it in train.frozen_towers too"
        )

    def stopped(rows: torch.Tensor, routing: ModalityRouting) -> torch.Tensor:
        parts = zip(routing.towers, rows.split(routing.counts))
        return torch.cat([part.detach() if tower in towers else part for tower, part in parts])

    layers = model.model.layers
    layers[0].register_forward_pre_hook(lambda layer, given: (stopped(*given[:2]), *given[1:]))
    for layer in layers:
        layer.register_forward_hook(lambda layer, given, rows: stopped(rows, given[1]))


def _parts(model: MoTPreTrainedModel) -> set[str]:
    return {name for part in ("attention", "feed_forward", "norm") for name in model.config.part_names(part)}


class HeldRows:
    """Keeps the first rows of embeddings and output layer at their values; the optimizer must not decay `parameters`.

    Args:
        model: on its device, and already sharded if it is to be.
        count: how many rows; None: none.

    Raises:
        ConfigError: `count` is more than the model's rows.
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
        """Set the gradients of the held rows to zero, before any gradient norm is taken."""
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


@contextmanager
def averaged(parameters: Iterable[nn.Parameter], average: EMAModel | None) -> Iterator[None]:
    """Give the parameters their moving average until the block ends; without an average nothing changes."""
    if average is None:
        yield
        return
    parameters = list(parameters)
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)
