"""Train the small VAE: reconstruction, and a weak pull of the posterior towards a standard normal.

N pictures, B batch, (H, W) pixels, C latent channels, (h, w) latent cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import nn

from modeling_mot.latent_vae import encode_pixels
from training.tokenizers.autoencoder_training import (
    AutoencoderTrainingConfig,
    Progress,
    augment,
    draw_batch,
    learning_rate_factor,
    reconstruction_loss,
)


@dataclass
class VAETrainingConfig(AutoencoderTrainingConfig):
    """Settings of a VAE's training.

    `kl` weighs the divergence from a standard normal, in nats per latent element. The weight grows from 0 over
    `kl_warmup`, a share of the run. `lr` is AdamW's rate, for norms and biases; `matrix_lr` is Muon's, for
    convolutions.
    """

    steps: int = 2400
    batch_size: int = 16
    lr: float = 3e-3
    matrix_lr: float = 0.04
    kl: float = 1e-3
    kl_warmup: float = 0.3


class MuonAdamW:
    """Muon for the kernels of convolutions, as matrices of (out, height * width * in); AdamW for everything else.

    AdamW alone needs several times as many steps: for a long time a few directions of the latents (light and dark)
    carry everything, and the directions for rare colours stay empty. Kernels must be in channels_last, so that a matrix
    is a view of its kernel. Muon: https://kellerjordan.github.io/posts/muon

    Raises:
        ValueError: the model is not in channels_last.
    """

    def __init__(self, model: nn.Module, lr: float, matrix_lr: float):
        self.kernels = [p for p in model.parameters() if p.ndim == 4 and min(len(p), p[0].numel()) > 8]
        self.matrices = [nn.Parameter(self.as_matrix(kernel.data)) for kernel in self.kernels]
        if any(m.data_ptr() != k.data_ptr() for m, k in zip(self.matrices, self.kernels)):
            raise ValueError("MuonAdamW takes a model in channels_last: call model.to(memory_format=...) first")
        taken = set(map(id, self.kernels))
        self.others = [p for p in model.parameters() if id(p) not in taken]
        self.muon = torch.optim.Muon(self.matrices, lr=matrix_lr, weight_decay=0.0, adjust_lr_fn="original")
        self.adamw = torch.optim.AdamW(self.others, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
        self.rates = {self.muon: matrix_lr, self.adamw: lr}

    @staticmethod
    def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
        """Return (O, I, kh, kw) -> (O, kh * kw * I)"""
        return kernel.permute(0, 2, 3, 1).flatten(1)

    def step(self, factor: float) -> None:
        """Take a step at `factor` times the peak rates, and clear the gradients."""
        for kernel, matrix in zip(self.kernels, self.matrices):
            matrix.grad = self.as_matrix(kernel.grad)
            kernel.grad = None
        nn.utils.clip_grad_norm_(self.others, 1.0)  # Muon's steps have a size of their own
        for optimizer, rate in self.rates.items():
            optimizer.param_groups[0]["lr"] = factor * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def train_vae(
    vae: AutoencoderKL,
    pictures: Sequence[torch.Tensor],
    config: VAETrainingConfig,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train `vae` in place on uint8 pictures (3, H, W); return figures of the last steps."""
    generator = torch.Generator().manual_seed(config.seed)
    vae.train().requires_grad_(True).to(memory_format=torch.channels_last)
    optimizer = MuonAdamW(vae, config.lr, config.matrix_lr)
    progress = Progress(config, log)
    while progress.share < 1:
        # Sample latents from the posterior, and decode them.
        batch = draw_batch(pictures, config.batch_size, generator)
        pixels = augment(batch, config, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            posterior = vae.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator)
            predicted = vae.decode(mean + (0.5 * logvar).exp() * noise).sample

        # The divergence gains its weight slowly, over the warm-up.
        loss = reconstruction_loss(predicted.float(), pixels, config)
        kl = normal_divergence(mean, logvar)
        (loss + config.kl * min(1.0, progress.share / config.kl_warmup) * kl).backward()
        optimizer.step(learning_rate_factor(progress.share, config))
        progress.advance({"loss": loss.item(), "kl": kl.item()})
    vae.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    return progress.summary()


def normal_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) in nats, as the mean over elements.  (B, C, h, w) twice"""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def scale_latents(vae: AutoencoderKL, pictures: Sequence[torch.Tensor], limit: int = 4096) -> dict[str, list[float]]:
    """Set `shift_factor` and `scaling_factor` so that latents of `pictures` have mean 0 and deviation 1 overall.

    Returns:
        The mean and the deviation of every channel afterwards.
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
    """Encode the first `limit` pictures into scaled latents.  -> (N, C, h, w)"""
    count = min(len(pictures), limit)
    chunks = [range(start, min(start + 64, count)) for start in range(0, count, 64)]
    return torch.cat([encode_pixels(vae, torch.stack([pictures[i] for i in c]).float() / 127.5 - 1) for c in chunks])
