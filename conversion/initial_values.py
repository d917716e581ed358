"""Make the first values of a tensor: a copy, drawn anew, a copy with noise, or a copy with more rows.

Noise depends on the seed and the tensor's name alone, not on the order or the files in which tensors are written.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from conversion.key_maps import ConversionError
from modeling_mot import MoTConfig


# Share of the standard deviation of a source's rows: enough to tell new rows apart, and still near their mean.
NEW_ROW_NOISE = 0.1
_ROWS_AT_ONCE = 1024
MOST_NOISE = 100  # times what a tensor holds; with more, half precision overflows


@dataclass(frozen=True)
class Start:
    """The way a tower begins. `std` belongs to `perturbed`: a share of each tensor's root mean square."""

    kind: Literal["copy", "fresh", "perturbed"] = "copy"
    std: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Start":
        """Return `copy`, `fresh` or `perturbed:STD`. Raises ConversionError for anything else."""
        kind, _, std = text.partition(":")
        try:
            if kind == "perturbed" and 0 < float(std) <= MOST_NOISE:
                return cls(kind, float(std))
            if kind in ("copy", "fresh") and not std:
                return cls(kind)
        except ValueError:
            pass
        raise ConversionError(
            f"{text!r} is none of copy, fresh and perturbed:STD, such as perturbed:0.02, with STD up to {MOST_NOISE}"
        )

    def __str__(self) -> str:
        return f"perturbed:{self.std}" if self.kind == "perturbed" else self.kind


def generator_of(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def fresh(name: str, shape: tuple[int, ...], config: MoTConfig, generator: torch.Generator) -> torch.Tensor:
    """Draw a tensor as a new model of `config` has it: biases 0, norms the identity, matrices normal.  -> float32"""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "norm." in name:
        return torch.zeros(shape) if config.norm_offset else torch.ones(shape)
    return torch.randn(shape, generator=generator) * config.initializer_range


def perturbed(tensor: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    """Add normal noise of `std` times the tensor's root mean square.  -> the same shape, float32"""
    tensor = tensor.float()
    return tensor + torch.randn(tensor.shape, generator=generator) * (std * tensor.square().mean().sqrt())


def extended(rows: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Add rows at the end: the mean of the present rows, plus `NEW_ROW_NOISE` of their spread in each dimension.

    A row at the mean has the mean of all logits, so new tokens take little from the probability of the old ones
    (Hewitt, "Initializing new word embeddings for pretrained language models", 2021).  (V, D) -> (size, D)
    """
    count = size - rows.shape[0]
    if count == 0:
        return rows
    # In blocks: the whole table in float64 would be several times the checkpoint's.
    total = squares = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(_ROWS_AT_ONCE):
        block = block.double()
        total, squares = total + block.sum(0), squares + block.square().sum(0)
    mean = total / rows.shape[0]
    std = (squares / rows.shape[0] - mean.square()).clamp(min=0).sqrt()
    new = mean + NEW_ROW_NOISE * std * torch.randn(count, rows.shape[1], generator=generator)
    return torch.cat([rows, new.to(rows.dtype)])
