"""From sums and counts to one loss.

A model returns, per objective, the sum of its losses (`loss_sums`); how many targets there are is known from the batch
alone. Counts are reduced over micro-batches and ranks first and everything is divided once, so that the gradient does
not depend on how rows were split. A mean of per-batch means would weight a token by how few others stood beside it.
"""

from collections.abc import Mapping, Sequence

import torch

from training.config import ConfigError


# B batch, L row length


def count_targets(batch: Mapping[str, torch.Tensor], num_modalities: int) -> torch.Tensor:
    """How many targets of each modality a batch has: (B, L) labels and modality_ids -> (num_modalities,) long.

    Labels are not shifted, so the first position of a row is never a target.
    """
    is_target = batch["labels"][:, 1:] != -100
    return torch.bincount(batch["modality_ids"][:, 1:][is_target].flatten(), minlength=num_modalities)


def loss_scales(
    totals: Mapping[str, int], modality_weights: Mapping[str, float] | None = None
) -> tuple[dict[str, float], float]:
    """(the factor of each modality's loss sum, the factor of the z-loss sum) for the global `totals` of one step.

    Without weights the loss is the mean over all targets, as in Chameleon; with them a weighted mean, in which a
    modality's targets count `weight` times (1 when not named). A step without any target has factors of zero.
    """
    weights = {name: (modality_weights or {}).get(name, 1.0) for name in totals}
    weighted_total = sum(weights[name] * count for name, count in totals.items())
    total = sum(totals.values())
    scales = {name: weight / weighted_total if weighted_total else 0.0 for name, weight in weights.items()}
    return scales, 1 / total if total else 0.0


def check_modality_weights(weights: Mapping[str, float] | None, modalities: Sequence[str]) -> None:
    """Refuse weights of modalities that the model does not have, and negative ones."""
    for name, weight in (weights or {}).items():
        if name not in modalities:
            raise ConfigError(f"train.modality_weights names {name!r}; the model's modalities are {list(modalities)}")
        if weight < 0:
            raise ConfigError(f"train.modality_weights.{name}={weight} must not be negative")


def combine(
    loss_sums: Mapping[str, torch.Tensor], z_loss_sum: torch.Tensor | float, scales: Mapping[str, float], z_scale: float
) -> torch.Tensor:
    """This micro-batch's share of the step's loss, in float32."""
    loss = sum(scales[name] * loss_sum.float() for name, loss_sum in loss_sums.items())
    return loss + z_scale * (z_loss_sum.float() if torch.is_tensor(z_loss_sum) else z_loss_sum)
