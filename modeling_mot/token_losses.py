"""Cross-entropy of tokens as sums and counts by modality."""

# B batch, L row length, D hidden size, V vocabulary

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import slice_logits_to_keep

from .forward_arguments_mot import (
    behind_virtual_tokens,
    check_ids,
    check_items,
    check_labels,
    check_logits_to_keep,
)
from .linear_cross_entropy_mot import linear_cross_entropy
from .plain_modules_mot import is_plain_linear


def targets_of(model, shape, labels, shift_labels, modality_ids) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Targets aligned with the logits and their modalities, (B, L) both; None twice where there are no labels.

    Args:
        shape: (B, L) of the tokens.
        labels: (B, L), to be shifted by one; or `shift_labels`, which are aligned already.
        modality_ids: (B, L) of the tokens, or None; without them modalities follow from the vocabulary.

    Raises:
        ValueError: labels of another shape, or that are neither tokens nor -100.
    """
    given = labels if shift_labels is None else shift_labels
    if given is None:
        return None, None
    check_ids("labels" if shift_labels is None else "shift_labels", given, shape)
    check_labels(given, model.config.vocab_size)
    given = given.long()
    if shift_labels is not None:
        return given, _modalities(model, given)
    of_labels = (
        _modalities(model, given) if modality_ids is None else behind_virtual_tokens(modality_ids, given.shape[1])
    )
    # The labels move, not the logits: the last position of a row has no target.
    return tuple(F.pad(ids[:, 1:], (0, 1), value=-100) for ids in (given, of_labels))


def _modalities(model, labels):
    if model.config.modality_token_ranges is None and len(model.config.tower_names) == 1:
        return torch.zeros_like(labels)  # one tower and no ranges: all of it counts as text
    return model.model.modality_ids_of(labels)


def logits_and_losses(
    model, hidden_states, targets, num_items_in_batch, logits_to_keep, skip_logits
) -> tuple[torch.Tensor | None, dict]:
    """Logits unless they are skipped, and the losses of tokens where there are targets.

    Args:
        targets: of `targets_of`.

    Raises:
        ValueError: logits are skipped without targets, or together with `logits_to_keep`; or what is kept are no
            positions; a number of items that nothing can be divided by.
    """
    check_logits_to_keep(logits_to_keep, tuple(hidden_states.shape[:2]))
    logits_to_keep = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else int(logits_to_keep)
    check_items(num_items_in_batch)
    targets, modality_ids = targets
    args = (targets, modality_ids, num_items_in_batch)
    if not skip_logits:
        logits = model.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        return logits, {} if targets is None else token_losses(model.config, logits, *args)
    if targets is None or torch.is_tensor(logits_to_keep) or logits_to_keep != 0:
        raise ValueError(
            "skip_logits=True leaves the losses alone: it needs labels, one per token, and logits_to_keep=0; "
            f"labels are {'absent' if targets is None else 'given'}, logits_to_keep={logits_to_keep}"
        )
    return None, token_losses_without_logits(model.config, hidden_states, model.lm_head, *args)


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
    logits, targets = logits.flatten(0, 1).float(), targets.flatten()
    cross_entropy = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    z_losses = None
    if config.z_loss_coefficient:
        squares = logits.logsumexp(dim=-1).square()
        z_losses = config.z_loss_coefficient * torch.where(targets != -100, squares, 0.0)
    return _sums(config, cross_entropy, z_losses, targets, modality_ids.flatten(), num_items_in_batch)


def token_losses_without_logits(
    config,
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    targets: torch.Tensor,
    modality_ids: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> dict:
    """The same from hidden states (B, L, D) and the projection to logits, of which only a part exists at a time.

    A projection that is more than its weight (adapters, hooks, quantised or spread over devices) is run as it is.
    """
    if not is_plain_linear(lm_head) or lm_head.bias is not None:
        return token_losses(config, lm_head(hidden_states), targets, modality_ids, num_items_in_batch)
    targets = targets.flatten()
    losses = linear_cross_entropy(hidden_states.flatten(0, 1), lm_head.weight, targets, config.z_loss_coefficient)
    return _sums(config, *losses, targets, modality_ids.flatten(), num_items_in_batch)


def _sums(config, cross_entropy, z_losses, targets, modality_ids, num_items_in_batch) -> dict:
    is_target = targets != -100
    loss_sums, loss_counts = {}, {}
    for modality in config.token_modalities:
        of_modality = is_target & (modality_ids == config.modalities.index(modality))
        loss_sums[modality] = torch.where(of_modality, cross_entropy, 0.0).sum()
        loss_counts[modality] = of_modality.sum()
    z_loss_sum = cross_entropy.new_zeros(()) if z_losses is None else z_losses.sum()
    count = is_target.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = (sum(loss_sums.values()) + z_loss_sum) / count
    return {"loss": loss, "loss_sums": loss_sums, "loss_counts": loss_counts, "z_loss_sum": z_loss_sum}
