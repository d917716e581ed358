"""Which tower each token belongs to, decided once per forward, and the modules that towers have.

The residual stream stays sorted by tower through all layers, so norms, projections and
feed-forwards are plain products on contiguous slices; only queries, keys and values go back to the
order of the sequence for the global attention (paper, Algorithm 1 and section 6.1).
"""

# B batch, L row length, T = B * L tokens, D hidden size

from typing import NamedTuple

import torch
from torch import nn


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient of a permutation is its inverse, a copy and not a sum."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None


class ModalityRouting(NamedTuple):
    """The plan of one forward; a collator may build it ahead so that the forward never waits for a device.

    Attributes:
        towers: names of the towers, in the order of `counts`.
        counts: tokens of each tower, Python integers that sum to T.
        order: (T,) positions in the flattened rows, sorted by tower; None where one tower has all tokens.
        inverse: (T,) the permutation back.
    """

    towers: tuple[str, ...]
    counts: tuple[int, ...]
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    @classmethod
    def from_modality_ids(cls, modality_ids: torch.Tensor, config) -> "ModalityRouting":
        """Sort tokens by tower, in a stable way.

        Args:
            modality_ids: (B, L) indices into `config.modalities`.
            config: a `MoTConfig`.

        Raises:
            ValueError: an id that is not the index of a modality.
        """
        towers = tuple(config.tower_names)
        num_modalities = len(config.modalities)
        flat = modality_ids.flatten()
        if len(towers) == 1 and torch.compiler.is_compiling():
            return cls(towers, (flat.numel(),))  # a read of the ids would break the graph
        # One wait for the device: the number of tokens of each modality, and of ids that are none.
        outside = ((flat < 0) | (flat >= num_modalities)).sum().unsqueeze(0)
        histogram = torch.bincount(flat.clamp(0, num_modalities - 1), minlength=num_modalities)
        *per_modality, strays = torch.cat([histogram, outside]).tolist()
        if strays:
            raise ValueError(
                f"modality_ids has {strays} ids outside 0..{num_modalities - 1}, from {int(flat.min())} to "
                f"{int(flat.max())}; they are indices into modalities={list(config.modalities)}"
            )
        counts = [0] * len(towers)
        for tower, count in zip(config.tower_of_modality, per_modality):
            counts[tower] += count
        if max(counts) == flat.numel():  # always so where there is one tower
            return cls(towers, tuple(counts))
        tower_of = torch.tensor(config.tower_of_modality, device=flat.device)
        order = torch.argsort(tower_of[flat], stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return cls(towers, tuple(counts), order, inverse)

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    def to(self, device) -> "ModalityRouting":
        if self.order is None:
            return self
        return self._replace(order=self.order.to(device), inverse=self.inverse.to(device))

    def sort(self, rows: torch.Tensor) -> torch.Tensor:
        """Make each tower's tokens contiguous.  (B, L, ...) -> (T, ...)"""
        flat = rows.flatten(0, 1)
        return flat if self.order is None else _Permute.apply(flat, self.order, self.inverse)

    def restore(self, rows: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Back to the order of the sequence.  (T, ...) -> (B, L, ...)"""
        if self.order is not None:
            rows = _Permute.apply(rows, self.inverse, self.order)
        return rows.unflatten(0, (batch_size, -1))

    def split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each tower's slice.  (T, D) -> {tower: (T_tower, D)}

        While gradients are on, a tower without tokens gets zero rows, so that it runs all the same:
        its parameters then have zero, not missing, gradients, and collectives match on every rank.
        """
        if len(self.towers) == 1:
            return {self.towers[0]: rows}
        slices = zip(self.towers, self.counts, rows.split(self.counts))
        return {tower: rows for tower, count, rows in slices if torch.is_grad_enabled() or count}


def join(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The slices of all towers, one after another.  {tower: (T_tower, D)} -> (T, D)"""
    return torch.cat(list(parts.values())) if len(parts) > 1 else next(iter(parts.values()))


class PerTower(nn.ModuleDict):
    """One module per tower, each run on its own tokens; or one module named `shared`, run on all."""

    def forward(self, parts: dict[str, torch.Tensor], **kwargs) -> dict[str, torch.Tensor]:
        if "shared" not in self:
            return {tower: self[tower](part, **kwargs) for tower, part in parts.items()}
        rows = self["shared"](join(parts), **kwargs)
        return dict(zip(parts, rows.split([part.shape[0] for part in parts.values()])))
