"""The loss of tokens: cross-entropy as sums and counts by modality, and the projection to logits fused with it.

Without logits (`skip_logits`) the projection to the vocabulary and the cross-entropy are one operator,
`linear_cross_entropy`, which holds the logits of a block at a time.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from .tower_routing import autocast_dtype, is_plain_linear


# B batch, L row length, T = B * L tokens, D hidden size, V vocabulary, c tokens of a block


def token_losses(
    config,
    logits: torch.Tensor,
    targets: torch.Tensor,
    modality_ids: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> dict:
    """Compute the parts of a language model's loss from logits, in float32.

    Args:
        config: a `MoTConfig`.
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
    """Compute the same as `token_losses` from hidden states, with logits of a part of the tokens at a time.

    A projection that is more than its weight (adapters, hooks, quantised or spread over devices) is run as it is.

    Args:
        hidden_states: (B, L, D).
        lm_head: the projection to logits.
    """
    if not is_plain_linear(lm_head) or lm_head.bias is not None:
        return token_losses(config, lm_head(hidden_states), targets, modality_ids, num_items_in_batch)
    targets = targets.flatten()
    losses = linear_cross_entropy(hidden_states.flatten(0, 1), lm_head.weight, targets, config.z_loss_coefficient)
    return _sums(config, *losses, targets, modality_ids.flatten(), num_items_in_batch)


def _sums(config, cross_entropy, z_losses, targets, modality_ids, num_items_in_batch) -> dict:
    """Sum the losses (T,) of tokens by the modality of their targets."""
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


# --------------------------------------------------------------------------------- projection and loss as one operator


BLOCK_LOGITS = 1 << 24  # logits of one block, made by one product
BLOCK_TOKENS = 128  # the fewest tokens of a block; with fewer, products become slow
CACHED_LOGITS = 1 << 19  # logits that are worked on at a time, in float32, few enough to stay in a cache
# Remote code may be loaded beside the installed package, so the operators of each module have names of their own.
_NAMESPACE = re.sub(r"\W", "_", __name__)


def linear_cross_entropy(
    hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss_coefficient: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy of softmax(h W^T), and `z_loss_coefficient` * log(Z)^2, of each token.

    On a CPU the forward, which has the logits, also makes the gradients of the plain sum of the losses. A backward that
    weights the tokens differently, or runs on another device, computes the logits again.

    Args:
        hidden_states: (T, D).
        weight: (V, D), of the same dtype.
        targets: (T,) in [0, V), or -100 for none.

    Returns:
        (T,) twice in float32 at least, 0 where there is no target.
    """
    device = hidden_states.device.type
    dtype = autocast_dtype(device)
    if dtype is not None:
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    needs_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    gradients_now = needs_grad and device in ("cpu", "meta")
    return _LinearCrossEntropy.apply(hidden_states, weight, targets, z_loss_coefficient, gradients_now)[:2]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply left @ right^T; in float32 on a CPU by oneDNN, up to twice as fast as MKL and no slower."""
    if left.dtype == torch.float32 and left.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return left @ right.T


def _blocks(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor):
    """Cut tokens into blocks of indices; tokens without a target are left out if finding them needs no wait."""
    if targets.device.type == "cpu":
        tokens = (targets != -100).nonzero().squeeze(-1)
    else:
        tokens = torch.arange(len(targets), device=targets.device)
    return tokens.split(max(BLOCK_LOGITS // len(weight), BLOCK_TOKENS))


def _losses(
    logits: torch.Tensor, targets: torch.Tensor, slopes: Callable | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cross-entropy and log(Z) of a block, in float32 at least.  (c, V), (c,) -> (c,) twice

    Args:
        logits: (c, V), overwritten.
        targets: (c,)
        slopes: (log(Z), tokens) -> (of_target, of_all), (c,) both or None for 1. If given, the logits become the
            gradients: of_all * probabilities, minus of_target at the target.
    """
    cross_entropy, log_z = (logits.new_empty(len(targets), dtype=_wide(logits)) for _ in range(2))
    places = targets.clamp(min=0)[:, None]
    size = max(CACHED_LOGITS // logits.shape[1], 1)
    for begin in range(0, len(targets), size):
        tokens = slice(begin, begin + size)
        at_target = logits[tokens].gather(1, places[tokens]).squeeze(1)
        wide = logits[tokens].to(_wide(logits))  # in float32 the logits themselves
        largest = wide.amax(dim=-1)
        probabilities = torch.softmax(wide, dim=-1, out=wide)
        # The largest logit has the largest probability, at least 1 / V, and log(Z) = logit - log(probability).
        log_z[tokens] = largest - probabilities.amax(dim=-1).log()
        cross_entropy[tokens] = log_z[tokens] - at_target
        if slopes is not None:
            of_target, of_all = slopes(log_z[tokens], tokens)
            if of_all is not None:
                probabilities *= of_all[:, None]
            of_target = torch.ones_like(log_z[tokens]) if of_target is None else of_target
            logits[tokens] = probabilities.scatter_add_(1, places[tokens], -of_target[:, None])
    return cross_entropy.masked_fill_(targets == -100, 0.0), log_z


class _Gradients:
    """Return the gradients of hidden states and weight, summed over blocks; that of the weight in float32 at least."""

    def __init__(self, hidden_states: torch.Tensor):
        self.hidden_states = torch.zeros_like(hidden_states)
        # (D, V) as the product makes it, transposed once at the end: adding a transposed matrix for each block takes as
        # long as the products.
        self._transposed_weight = None

    def add(self, tokens, hidden_states, weight, gradient) -> None:
        """Add the gradients of a block, from the gradient (c, V) of its logits."""
        self.hidden_states[tokens] = _product(gradient, weight.T)
        of_block = _product(hidden_states.T, gradient.T)
        if self._transposed_weight is None:
            self._transposed_weight = of_block
        else:
            self._transposed_weight = self._transposed_weight.to(_wide(of_block)).add_(of_block)

    def weight(self, like: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the weight in its shape (V, D) and precision."""
        if self._transposed_weight is None:
            return torch.zeros_like(like)
        return self._transposed_weight.T.to(like.dtype).contiguous()


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
@torch.autocast("cpu", enabled=False)
def _forward(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_loss_coefficient: float,
    gradients_now: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (T,) twice, and the gradients of their sum, which are empty unless `gradients_now`."""
    losses, z_losses = (hidden_states.new_zeros(len(targets), dtype=_wide(hidden_states)) for _ in range(2))
    gradients = _Gradients(hidden_states) if gradients_now else None

    def slopes(log_z, tokens):
        return None, 1 + 2 * z_loss_coefficient * log_z if z_loss_coefficient else None

    for tokens in _blocks(hidden_states, weight, targets):
        block, wanted = hidden_states[tokens], targets[tokens]
        logits = _product(block, weight)
        losses[tokens], log_z = _losses(logits, wanted, slopes if gradients_now else None)
        z_losses[tokens] = (z_loss_coefficient * log_z.square()).masked_fill(wanted == -100, 0.0)
        if gradients is not None:
            gradients.add(tokens, block, weight, logits)
    if gradients is None:
        return losses, z_losses, hidden_states.new_empty(0), weight.new_empty(0)
    return losses, z_losses, gradients.hidden_states, gradients.weight(weight)


@_forward.register_fake
def _(hidden_states, weight, targets, z_loss_coefficient, gradients_now):
    losses, z_losses = (hidden_states.new_empty(len(targets), dtype=_wide(hidden_states)) for _ in range(2))
    if not gradients_now:
        return losses, z_losses, hidden_states.new_empty(0), weight.new_empty(0)
    return losses, z_losses, torch.empty_like(hidden_states), torch.empty_like(weight)


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
@torch.autocast("cpu", enabled=False)
def _backward(
    grad_losses: torch.Tensor,
    grad_z_losses: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    made_hidden_states: torch.Tensor,
    made_weight: torch.Tensor,
    z_loss_coefficient: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of hidden states and weight, for gradients (T,) of the losses."""
    # The forward made them, if all tokens weigh the same.
    if len(made_weight):
        of_targets = grad_losses[targets != -100]
        scale = of_targets[0] if len(of_targets) else grad_losses.new_zeros(())
        same_z = not z_loss_coefficient or torch.equal(grad_z_losses[targets != -100], of_targets)
        if same_z and bool((of_targets == scale).all()):
            return made_hidden_states * scale.item(), made_weight * scale.item()

    # Otherwise the logits are computed again, block by block.
    gradients = _Gradients(hidden_states)
    for tokens in _blocks(hidden_states, weight, targets):
        block, wanted = hidden_states[tokens], targets[tokens]
        of_losses, of_z_losses = (
            grad[tokens].masked_fill(wanted == -100, 0.0) for grad in (grad_losses, grad_z_losses)
        )

        def slopes(log_z, part, of_losses=of_losses, of_z_losses=of_z_losses):
            return of_losses[part], of_losses[part] + of_z_losses[part] * 2 * z_loss_coefficient * log_z

        logits = _product(block, weight)
        _losses(logits, wanted, slopes)
        gradients.add(tokens, block, weight, logits)
    return gradients.hidden_states, gradients.weight(weight)


@_backward.register_fake
def _(grad_losses, grad_z_losses, hidden_states, weight, targets, made_hidden_states, made_weight, z_loss_coefficient):
    return torch.empty_like(hidden_states), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    hidden_states, weight, targets, ctx.z_loss_coefficient, _ = inputs
    ctx.save_for_backward(hidden_states, weight, targets, *output[2:])
    ctx.set_materialize_grads(False)  # the gradients have no gradients, and zeros in their place would be large


def _gradients(ctx, grad_losses, grad_z_losses, *_):
    if grad_losses is None and grad_z_losses is None:
        return (None,) * 5
    known = grad_z_losses if grad_losses is None else grad_losses
    grads = (torch.zeros_like(known) if grad is None else grad for grad in (grad_losses, grad_z_losses))
    return *_backward(*grads, *ctx.saved_tensors, ctx.z_loss_coefficient), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


class _LinearCrossEntropy(torch.autograd.Function):
    """The operator for `torch.func`, which does not know gradients that are registered with an operator."""

    @staticmethod
    def forward(*args):
        return _forward(*args)

    setup_context = staticmethod(_setup)
    backward = staticmethod(once_differentiable(_gradients))


def _product_flops(hidden_shape, weight_shape) -> int:
    return 2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0]


# FLOPs count the three products of a projection; logits that are computed again do not count.
@register_flop_formula(getattr(torch.ops, _NAMESPACE).forward)
def _(hidden_shape, weight_shape, *args, **kwargs) -> int:
    return _product_flops(hidden_shape, weight_shape)


@register_flop_formula(getattr(torch.ops, _NAMESPACE).backward)
def _(losses_shape, z_losses_shape, hidden_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * _product_flops(hidden_shape, weight_shape)
