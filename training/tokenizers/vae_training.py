"""Training of the small VAE: reconstruction and a weak pull of the posterior to a standard normal.

Shapes: B batch, (H, W) pixels, C latent channels, (h, w) latent cells.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import nn

from modeling_mot.latents_mot import encode_pixels
from training.tokenizers.autoencoder_training import (
    AutoencoderTrainingConfig,
    augment,
    draw_batch,
    learning_rate_factor,
    reconstruction_loss,
)


@dataclass
class VAETrainingConfig(AutoencoderTrainingConfig):
    """`kl` weighs the divergence from a standard normal, in nats per latent element."""

    kl: float = 1e-3


def train_vae(
    vae: AutoencoderKL,
    pictures: Sequence[torch.Tensor],
    config: VAETrainingConfig,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train `vae` in place on uint8 pictures (3, H, W); returns figures of the last steps."""
    generator = torch.Generator().manual_seed(config.seed)
    vae.train().requires_grad_(True).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    started, progress, step = time.monotonic(), 0.0, 0
    averages: dict[str, float] = {}

    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate_factor(progress, config)
        batch = draw_batch(pictures, config.batch_size, generator)
        pixels = augment(batch, config, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            posterior = vae.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator)
            predicted = vae.decode(mean + (0.5 * logvar).exp() * noise).sample
        loss = reconstruction_loss(predicted.float(), pixels, config)
        kl = normal_divergence(mean, logvar)
        optimizer.zero_grad(set_to_none=True)
        (loss + config.kl * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()

        step += 1
        elapsed = (time.monotonic() - started) / 60
        progress = max(step / config.steps, elapsed / config.minutes if config.minutes else 0.0)
        figures = {"loss": loss.item(), "kl": kl.item()}
        averages = {k: 0.99 * averages.get(k, v) + 0.01 * v for k, v in figures.items()}
        if step % config.log_every == 0:
            numbers = "  ".join(f"{k} {v:.4f}" for k, v in averages.items())
            log(f"step {step}  {100 * progress:.0f} %  {numbers}  {elapsed:.1f} min")
    vae.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    return {**averages, "steps": step, "minutes": (time.monotonic() - started) / 60}


def normal_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), the mean over elements, in nats.  (B, C, h, w) twice"""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def scale_latents(vae: AutoencoderKL, pictures: Sequence[torch.Tensor], limit: int = 4096) -> dict[str, list[float]]:
    """Set `shift_factor` and `scaling_factor` so that latents of `pictures` have mean 0 and deviation 1 overall.

    Returns mean and deviation of every channel after it.
    """
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = encode_all(vae, pictures, limit).double()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return {
        "channel_means": [round(value, 3) for value in latents.mean((0, 2, 3)).tolist()],
        "channel_deviations": [round(value, 3) for value in latents.std((0, 2, 3)).tolist()],
    }


def encode_all(vae: AutoencoderKL, pictures: Sequence[torch.Tensor], limit: int) -> torch.Tensor:
    """Scaled latents of the first `limit` pictures.  -> (N, C, h, w)"""
    count = min(len(pictures), limit)
    chunks = [range(start, min(start + 64, count)) for start in range(0, count, 64)]
    return torch.cat([encode_pixels(vae, torch.stack([pictures[i] for i in c]).float() / 127.5 - 1) for c in chunks])
