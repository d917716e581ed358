"""Cross-entropy of tokens as sums and counts by modality."""

# B batch, L row length, V vocabulary

import torch
import torch.nn.functional as F


def token_losses(
    config,
    logits: torch.Tensor,
    targets: torch.Tensor,
    modality_ids: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> dict:
    """The parts of a language model's loss, in float32.

    Args:
        logits: (B, L, V).
        targets: (B, L) token ids aligned with the logits; -100 is not a target.
        modality_ids: (B, L) of the targets.
        num_items_in_batch: divide the loss by this instead of by the number of targets here.

    Returns:
        `loss`, `loss_sums` and `loss_counts` by modality of the target, and `z_loss_sum`, as
        `MoTCausalLMOutputWithPast` has them.

    Raises:
        ValueError: logits and targets of different lengths.
    """
    if logits.shape[1] != targets.shape[1]:
        raise ValueError(
            f"labels has {targets.shape[1]} positions but logits has {logits.shape[1]}: "
            "a loss needs logits_to_keep=0 and one label per token"
        )
    logits, targets, modality_ids = logits.flatten(0, 1).float(), targets.flatten(), modality_ids.flatten()
    is_target = targets != -100
    cross_entropy = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    loss_sums, loss_counts = {}, {}
    for modality in config.token_modalities:
        of_modality = is_target & (modality_ids == config.modalities.index(modality))
        loss_sums[modality] = torch.where(of_modality, cross_entropy, 0.0).sum()
        loss_counts[modality] = of_modality.sum()
    z_loss_sum = cross_entropy.new_zeros(())
    if config.z_loss_coefficient:
        squares = logits.logsumexp(dim=-1).square()
        z_loss_sum = config.z_loss_coefficient * torch.where(is_target, squares, 0.0).sum()
    count = is_target.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = (sum(loss_sums.values()) + z_loss_sum) / count
    return {"loss": loss, "loss_sums": loss_sums, "loss_counts": loss_counts, "z_loss_sum": z_loss_sum}
