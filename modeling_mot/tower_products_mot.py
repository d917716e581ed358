"""Linear maps of several towers in one call instead of one for each tower.

`"batched_mm"` pads the towers' rows to the longest and multiplies them in one batched product (paper, section 6.3): for
towers that are balanced. `"grouped_mm"` multiplies rows without padding, in bfloat16, where a device has a fast kernel.
Both copy the weights of all towers into one tensor in every call, so they pay where a step has many rows.
"""

# K towers, n rows of all towers, D inputs, F outputs

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn

from .expert_choice import FeedForward
from .plain_modules_mot import is_plain, is_plain_linear
from .precision_mot import autocast_dtype


TOWER_PRODUCTS = ("separate", "batched_mm", "grouped_mm")


class _Batched:
    """Rows of each tower, padded to the longest."""

    def __init__(self, parts: dict[str, torch.Tensor]):
        self.counts = [len(rows) for rows in parts.values()]
        self.rows = nn.utils.rnn.pad_sequence(list(parts.values()), batch_first=True)  # (K, longest, D)

    def linear(self, rows: torch.Tensor, modules: list[nn.Linear]) -> torch.Tensor:
        weight = torch.stack([module.weight for module in modules]).mT  # (K, D, F)
        if modules[0].bias is None:
            return torch.bmm(rows, weight)
        return torch.baddbmm(torch.stack([module.bias for module in modules])[:, None], rows, weight)

    def split(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [of_tower[:count] for of_tower, count in zip(rows.unbind(), self.counts)]


class _Grouped:
    """Rows of each tower, one after another."""

    def __init__(self, parts: dict[str, torch.Tensor]):
        self.counts = [len(rows) for rows in parts.values()]
        self.rows = torch.cat(list(parts.values()))  # (n, D)
        self.rows = self.rows.to(_dtype_of_products(self.rows))  # autocast does not know this product
        ends = accumulate(self.counts)
        # Filled on the device: a copy from the host would be waited for.
        self.ends = torch.stack([torch.full((), end, dtype=torch.int32, device=self.rows.device) for end in ends])

    def linear(self, rows: torch.Tensor, modules: list[nn.Linear]) -> torch.Tensor:
        weight = torch.stack([module.weight for module in modules]).to(rows.dtype).mT  # (K, D, F)
        return F.grouped_mm(rows, weight, offs=self.ends)

    def split(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return list(rows.split(self.counts))


def _dtype_of_products(tensor: torch.Tensor) -> torch.dtype:
    return autocast_dtype(tensor.device.type) or tensor.dtype


def run_together(
    modules: list[nn.Module], parts: dict[str, torch.Tensor], products: str
) -> dict[str, torch.Tensor] | None:
    """The outputs of one module for each tower, linear maps or feed-forwards of them; None where they cannot be run so.

    Args:
        parts: {tower: (n_tower, D)}, of several towers.
        products: `"batched_mm"` or `"grouped_mm"`.
    """
    first = modules[0]
    if type(first) is nn.Linear:
        layers = [modules]
    elif hasattr(first, "gate_proj"):
        if not all(is_plain(module, FeedForward) for module in modules):
            return None
        layers = [[getattr(module, name) for module in modules] for name in ("gate_proj", "up_proj", "down_proj")]
    else:
        return None
    if not all(_can_join(of_towers, products) for of_towers in layers):
        return None
    joined = _Batched(parts) if products == "batched_mm" else _Grouped(parts)
    if len(layers) == 1:
        rows = joined.linear(joined.rows, modules)
    else:
        gate, up, down = layers
        rows = joined.linear(first.act_fn(joined.linear(joined.rows, gate)) * joined.linear(joined.rows, up), down)
    return dict(zip(parts, joined.split(rows)))


def _can_join(modules: list[nn.Module], products: str) -> bool:
    """Whether these are linear maps and no more, with whole weights."""
    if not all(map(is_plain_linear, modules)):
        return False
    weight, bias = modules[0].weight, modules[0].bias
    if products == "batched_mm":
        return True
    # What torch's grouped product takes everywhere, also while it is traced.
    is_aligned = all(size % 8 == 0 for size in weight.shape)
    return bias is None and is_aligned and _dtype_of_products(weight) == torch.bfloat16
