"""Training code that the VQ tokenizer and the VAE share: options, loss, augmentation, batches, learning rate.

B batch, (H, W) pixels.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from training.tokenizers.sources import number


@dataclass
class AutoencoderTrainingConfig:
    """Steps, optimiser and weights of the loss. `minutes` ends a run early and squeezes its schedule into the time."""

    steps: int = 6000
    minutes: float | None = None
    batch_size: int = 32
    lr: float = 2e-3
    warmup: float = 0.02
    l1: float = 1.0
    gradient: float = 1.0
    coarse: float = 0.5
    flip: float = 0.5
    shift: int = 2
    bf16: bool = True
    log_every: int = 200
    seed: int = 0


def add_training_arguments(
    parser: argparse.ArgumentParser, defaults: AutoencoderTrainingConfig
) -> argparse._ArgumentGroup:
    """Add the options that `training_settings` reads, and --sheet."""
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=number(int, ge=1), default=defaults.steps, help=f"default: {defaults.steps}")
    training.add_argument(
        "--minutes",
        type=number(float, gt=0),
        help="end after this time at the latest; the schedule is squeezed into it",
    )
    training.add_argument(
        "--batch-size",
        type=number(int, ge=1, le=2**24),
        default=defaults.batch_size,
        help=f"default: {defaults.batch_size}",
    )
    training.add_argument(
        "--lr", type=number(float, gt=0), default=defaults.lr, help=f"peak learning rate (default: {defaults.lr})"
    )
    training.add_argument("--no-flip", action="store_true", help="do not train on mirror images")
    training.add_argument("--no-bf16", action="store_true", help="train in float32")
    training.add_argument(
        "--sheet", type=Path, metavar="PNG", help="also write originals and reconstructions as a picture"
    )
    return training


def training_settings(arguments: argparse.Namespace) -> dict:
    """Return the fields of an `AutoencoderTrainingConfig` that the command line sets."""
    return {
        "steps": arguments.steps,
        "minutes": arguments.minutes,
        "batch_size": arguments.batch_size,
        "lr": arguments.lr,
        "flip": 0.0 if arguments.no_flip else AutoencoderTrainingConfig.flip,
        "bf16": not arguments.no_bf16,
        "seed": arguments.seed,
    }


class Progress:
    """How far a training is, with running means of its figures.

    Attributes:
        share: the share of the run that is done, by steps or by minutes, whichever is more.
        step: number of steps that are done.
    """

    def __init__(self, config: AutoencoderTrainingConfig, log: Callable[[str], None]):
        self.config = config
        self.log = log
        self.share = 0.0
        self.step = 0
        self.averages: dict[str, float] = {}
        self.started = time.monotonic()

    def advance(self, figures: dict[str, float], phase: str = "") -> None:
        """Count a step with its figures; every `log_every` steps a line is logged, which names the phase."""
        self.step += 1
        minutes = (time.monotonic() - self.started) / 60
        self.share = max(self.step / self.config.steps, minutes / self.config.minutes if self.config.minutes else 0.0)
        self.averages = {k: 0.99 * self.averages.get(k, v) + 0.01 * v for k, v in figures.items()}
        if self.step % self.config.log_every == 0:
            means = [f"{name} {value:.4f}" for name, value in self.averages.items()]
            words = [f"step {self.step}", f"{100 * self.share:.0f} %", phase, *means, f"{minutes:.1f} min"]
            self.log("  ".join(filter(None, words)))

    def summary(self) -> dict[str, float]:
        """Return the running means, the number of steps and the minutes that the run took."""
        return {**self.averages, "steps": self.step, "minutes": (time.monotonic() - self.started) / 60}


def reconstruction_loss(
    predicted: torch.Tensor, pixels: torch.Tensor, config: AutoencoderTrainingConfig
) -> torch.Tensor:
    """Sum L1 of pixels, their differences (sharp edges) and two coarser scales (right colours).  (B, 3, H, W) twice"""
    error = predicted - pixels
    loss = config.l1 * error.abs().mean()
    horizontal, vertical = error.diff(dim=-1), error.diff(dim=-2)
    loss = loss + config.gradient * (horizontal.abs().mean() + vertical.abs().mean())
    for _ in range(2):
        error = nn.functional.avg_pool2d(error, 2)
        loss = loss + config.coarse * error.abs().mean()
    return loss


def augment(pixels: torch.Tensor, config: AutoencoderTrainingConfig, generator: torch.Generator) -> torch.Tensor:
    """Mirror and shift pictures at random; a shift repeats the edge.  (B, 3, H, W)"""
    if config.flip:
        flipped = torch.rand(len(pixels), generator=generator) < config.flip
        pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
    if config.shift:
        height, width = pixels.shape[-2:]
        padded = nn.functional.pad(pixels, (config.shift,) * 4, mode="replicate")
        top, left = torch.randint(2 * config.shift + 1, (2,), generator=generator).tolist()
        # Half of the batches are not shifted, since pictures are not shifted when they are tokenised.
        if torch.rand((), generator=generator) < 0.5:
            pixels = padded[..., top : top + height, left : left + width]
    return pixels


def learning_rate_factor(progress: float, config: AutoencoderTrainingConfig) -> float:
    """Share of the peak rate: a linear warm-up, then half a cosine down to 2 %."""
    if progress < config.warmup:
        return progress / config.warmup + 0.01
    return 0.02 + 0.98 * 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item())


def draw_batch(pictures: Sequence[torch.Tensor], size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `size` pictures with replacement.  -> (B, 3, H, W), float32 in [-1, 1]"""
    indices = torch.randint(len(pictures), (size,), generator=generator).tolist()
    return torch.stack([pictures[i] for i in indices]).float() / 127.5 - 1
