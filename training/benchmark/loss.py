"""Time the last projection and its cross-entropy, forward and backward: in blocks of tokens, and with all logits.

T tokens, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F

from modeling_mot.loss_tokens import linear_cross_entropy
from training.benchmark.rounds import compare, interleave, peak_bytes


Z_LOSS = 1e-5  # Chameleon's


def made_up(hidden_size: int, dtype: torch.dtype, tokens: int, vocab_size: int) -> tuple[torch.Tensor, ...]:
    """Make hidden states (T, D), a weight (V, D) of the size that a trained model has, and targets (T,)."""
    generator = torch.Generator().manual_seed(3)
    hidden_states = torch.randn(tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5).to(dtype).requires_grad_()
    return hidden_states, weight, torch.randint(0, vocab_size, (tokens,), generator=generator)


def in_blocks(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden_states, weight, targets)[0].mean()


def in_blocks_with_z_loss(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses, z_losses = linear_cross_entropy(hidden_states, weight, targets, Z_LOSS)
    return (losses + z_losses).mean()


def all_logits(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss as transformers computes it."""
    return F.cross_entropy(F.linear(hidden_states, weight).float(), targets)


def all_logits_with_z_loss(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden_states, weight).float()
    return F.cross_entropy(logits, targets) + Z_LOSS * logits.logsumexp(dim=-1).square().mean()


CONTESTANTS = {
    "blocks": in_blocks,
    "logits": all_logits,
    "blocks_z": in_blocks_with_z_loss,
    "logits_z": all_logits_with_z_loss,
}


def time_loss(hidden_size: int, dtype: torch.dtype, tokens: int, vocabs: list[int], rounds: int) -> dict:
    """Time the loss in `blocks` and with all `logits`, without and with a z-loss, for each vocabulary.

    Returns:
        dict: "vocabulary N" -> the figures of `compare`.
    """
    figures = {}
    for vocab_size in vocabs:
        tensors = made_up(hidden_size, dtype, tokens, vocab_size)
        _check_equal(tensors)
        calls = {
            name: lambda loss=loss, tensors=tensors: torch.autograd.grad(loss(*tensors), tensors[:2])
            for name, loss in CONTESTANTS.items()
        }
        pairs = [("blocks", "logits"), ("blocks_z", "logits_z")]
        figures[f"vocabulary {vocab_size}"] = compare(interleave(calls, rounds, warm_up=2), pairs)
    return figures


def _check_equal(tensors: tuple[torch.Tensor, ...]) -> None:
    tolerance = 1e-4 if tensors[0].dtype == torch.float32 else 3e-2
    for name in ("", "_z"):
        one, other = ([loss, *torch.autograd.grad(loss, tensors[:2])] for loss in _losses(name, tensors))
        for a, b in zip(one, other, strict=True):
            apart = ((a.float() - b.float()).norm() / b.float().norm()).item()
            if apart > tolerance:
                raise SystemExit(f"the loss in blocks differs from torch's by {apart:.2e}: nothing was timed")


def _losses(name: str, tensors: tuple[torch.Tensor, ...]):
    return (CONTESTANTS[f"{way}{name}"](*tensors) for way in ("blocks", "logits"))


def memory_of_loss(hidden_size: int, dtype: torch.dtype, tokens: int, vocab_size: int) -> dict[str, int]:
    """Return the peak bytes of forward and backward, gradients included, each in a fresh process."""
    return {
        name: peak_bytes(_build, _run, name, hidden_size, dtype, tokens, vocab_size) for name in ("blocks", "logits")
    }


def _build(name: str, *arguments) -> tuple[torch.Tensor, ...]:
    return made_up(*arguments)


def _run(tensors: tuple[torch.Tensor, ...], name: str, *arguments) -> None:
    torch.autograd.grad(CONTESTANTS[name](*tensors), tensors[:2])
