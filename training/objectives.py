"""From sums and counts to one loss.

A model returns, per objective, the sum of its losses (`loss_sums`); how many targets there are is known from the batch
alone. Counts are reduced over micro-batches and ranks first and everything is divided once, so that the gradient does
not depend on how rows were split. A mean of per-batch means would weight a token by how few others stood beside it.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from modeling_mot import MoTConfig
from training.config import ConfigError
from training.data.collate import count_noised, is_transfusion


# B batch, L row length

DIFFUSION = "image_diffusion"


def objective_names(config: MoTConfig) -> list[str]:
    """What a model's `loss_sums` are of: its modalities of tokens, then the diffusion of images where it has one."""
    return [*config.token_modalities, *([DIFFUSION] if is_transfusion(config) else [])]


def count_targets(batch: Mapping[str, torch.Tensor], config: MoTConfig) -> torch.Tensor:
    """How many targets of each objective a batch has, from the batch alone.  -> (objectives,) long

    Targets of tokens are labels, (B, L), by their modality; they are not shifted, so the first position of a row is
    never one. Targets of diffusion are the elements of the latents of images that are not clean.
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
    """(the factor of each objective's loss sum, the factor of the z-loss sum) for the global `totals` of one step.

    Without weights the loss of tokens is the mean over all their targets, as in Chameleon; with them a weighted mean,
    in which a modality's targets count `weight` times (1 when not named). The mean over the elements of noised latents
    is added `diffusion_weight` times (equation 4). An objective without any target has a factor of zero.
    """
    tokens = {name: count for name, count in totals.items() if name != DIFFUSION}
    weights = {name: (modality_weights or {}).get(name, 1.0) for name in tokens}
    weighted_total = sum(weights[name] * count for name, count in tokens.items())
    total = sum(tokens.values())
    scales = {name: weight / weighted_total if weighted_total else 0.0 for name, weight in weights.items()}
    if DIFFUSION in totals:
        scales[DIFFUSION] = diffusion_weight / totals[DIFFUSION] if totals[DIFFUSION] else 0.0
    return scales, 1 / total if total else 0.0


def check_modality_weights(weights: Mapping[str, float] | None, modalities: Sequence[str]) -> None:
    """Refuse weights of modalities that the model does not have, and weights that no loss can be made with."""
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
    """This micro-batch's share of the step's loss, in float32."""
    loss = sum(scales[name] * loss_sum.float() for name, loss_sum in loss_sums.items())
    return loss + z_scale * (z_loss_sum.float() if torch.is_tensor(z_loss_sum) else z_loss_sum)
