"""Train the VQ image tokenizer: autoencoder, k-means codebook, moving averages, then the decoder alone.

A codebook that starts at random leaves most codes dead. We first train the encoder without quantisation, and start
the codebook as k-means of its outputs. The codebook then follows by exponential moving averages, and codes that fall
out of use are restarted from latents. In the last phase the codes are final, and only the decoder learns. No pretrained
network takes part.

B batch, (H, W) pixels, C latent channels, K codes, M = B h w latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modeling_mot.image_tokenizer import MoTImageTokenizer, fold, nearest_code, unfold
from training.tokenizers.autoencoder_training import (
    AutoencoderTrainingConfig,
    Progress,
    augment,
    draw_batch,
    learning_rate_factor,
    reconstruction_loss,
)
from training.tokenizers.kmeans import assign, kmeans


@dataclass
class VQTrainingConfig(AutoencoderTrainingConfig):
    """Settings of a VQ tokenizer's training: shares of the run for its first and last phase, and of the codebook."""

    autoencoder_share: float = 0.12
    decoder_share: float = 0.3
    commitment: float = 0.25
    ema_decay: float = 0.98
    restart_every: int = 100


class Codebook:
    """A codebook whose codes are moving averages of the latents that were assigned to them."""

    def __init__(self, weight: torch.Tensor, decay: float):
        self.weight = weight
        self.decay = decay
        self.counts = torch.ones(len(weight))
        self.sums = weight.clone()

    @torch.no_grad()
    def update(self, latents: torch.Tensor, codes: torch.Tensor) -> None:
        """Move codes towards the latents (M, C) that were assigned to them by `codes` (M,)."""
        counts = torch.bincount(codes, minlength=len(self.weight)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, latents)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        alive = self.counts > 1e-2
        self.weight[alive] = self.sums[alive] / self.counts[alive, None]

    @torch.no_grad()
    def restart_unused(self, latents: torch.Tensor, generator: torch.Generator) -> int:
        """Move rarely used codes (under 3 % of the average) onto latents far from their codes; return their number."""
        unused = (self.counts < 0.03 * len(latents) / len(self.weight)).nonzero().flatten()
        if len(unused):
            distances = assign(latents, self.weight)[1]
            picks = torch.multinomial(distances + 1e-12, len(unused), generator=generator, replacement=True)
            self.weight[unused] = latents[picks]
            self.sums[unused] = latents[picks]
            self.counts[unused] = 1.0
        return len(unused)


def train_vq(
    tokenizer: MoTImageTokenizer,
    pictures: Sequence[torch.Tensor],
    config: VQTrainingConfig,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train `tokenizer` in place on uint8 pictures (3, H, W); return figures of the last steps."""
    generator = torch.Generator().manual_seed(config.seed)
    model, patch = tokenizer.model, tokenizer.config.patch_size

    # The codebook learns by moving averages, everything else by gradients.
    model.train().requires_grad_(True).to(memory_format=torch.channels_last)
    model.quantize.requires_grad_(False)
    decoder_parameters = [*model.post_quant_conv.parameters(), *model.decoder.parameters()]
    encoder_parameters = [*model.encoder.parameters(), *model.quant_conv.parameters()]
    groups = [{"params": encoder_parameters}, {"params": decoder_parameters}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    codebook: Codebook | None = None
    progress = Progress(config, log)
    while progress.share < 1:
        # The phase: autoencoder, then with a codebook, then the decoder alone with final codes.
        quantising = progress.share >= config.autoencoder_share
        encoder_frozen = progress.share >= 1 - config.decoder_share
        if quantising and codebook is None:
            codebook = start_codebook(tokenizer, pictures, config, generator, log)
        if encoder_frozen and groups[0]["params"][0].requires_grad:
            finish_codebook(tokenizer, pictures, config, generator, log)
            for parameter in encoder_parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        rate = config.lr * learning_rate_factor(progress.share, config)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # Encode, and replace latents by their codes; gradients pass straight through to the encoder.
        batch = draw_batch(pictures, config.batch_size, generator)
        pixels = augment(batch, config, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            latents = model.encode(fold(pixels, patch)).latents
        latents = latents.float()
        commitment = latents.new_zeros(())
        if quantising:
            flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
            codes = nearest_code(flat.detach(), codebook.weight)
            if not encoder_frozen:
                codebook.update(flat.detach(), codes)
                if progress.step % config.restart_every == 0:
                    codebook.restart_unused(flat.detach(), generator)
            quantised = codebook.weight[codes].view(len(latents), *latents.shape[2:], -1).permute(0, 3, 1, 2)
            commitment = (latents - quantised).square().mean()
            latents = latents + (quantised - latents).detach()

        # Decode and learn.
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            predicted = unfold(model.decode(latents, force_not_quantize=True).sample, patch)
        loss = reconstruction_loss(predicted.float(), pixels, config)
        optimizer.zero_grad(set_to_none=True)
        (loss + config.commitment * commitment).backward()
        nn.utils.clip_grad_norm_(decoder_parameters + encoder_parameters, 1.0)
        optimizer.step()
        phase = "decoder" if encoder_frozen else "codebook" if quantising else "autoencoder"
        progress.advance({"loss": loss.item(), "commitment": commitment.item()}, phase)
    model.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    return progress.summary()


@torch.no_grad()
def sample_latents(tokenizer, pictures, config, generator, limit: int = 2048) -> torch.Tensor:
    """Encode up to `limit` random pictures.  -> (M, C)"""
    order = torch.randperm(len(pictures), generator=generator)[:limit].tolist()
    tokenizer.model.eval()
    parts = []
    for start in range(0, len(order), config.batch_size):
        chunk = torch.stack([pictures[i] for i in order[start : start + config.batch_size]]).float() / 127.5 - 1
        latents = tokenizer.latents(chunk)
        parts.append(latents.permute(0, 2, 3, 1).flatten(0, 2).float())
    tokenizer.model.train()
    return torch.cat(parts)


def start_codebook(tokenizer, pictures, config, generator, log) -> Codebook:
    """Set the codebook to k-means of the encoder's outputs."""
    latents = sample_latents(tokenizer, pictures, config, generator)
    weight = tokenizer.codebook.data
    weight.copy_(kmeans(latents, len(weight), iterations=8, seed=config.seed))
    error = assign(latents, weight)[1].mean() / latents.var(0).sum()
    log(f"codebook: k-means over {len(latents)} latents leaves {100 * error:.1f} % of their variance")
    return Codebook(weight, config.ema_decay)


def finish_codebook(tokenizer, pictures, config, generator, log) -> None:
    """Take four exact Lloyd steps from the moving averages; unused codes move onto latents far from their codes."""
    latents = sample_latents(tokenizer, pictures, config, generator)
    weight = tokenizer.codebook.data
    for _ in range(4):
        codes, distances = assign(latents, weight)
        counts = torch.bincount(codes, minlength=len(weight))
        sums = torch.zeros_like(weight).index_add_(0, codes, latents)
        used = counts > 0
        weight[used] = sums[used] / counts[used, None]
        weight[~used] = latents[distances.topk(int((~used).sum())).indices]
    used = len(assign(latents, weight)[0].unique())
    log(f"codebook final: {used} of {len(weight)} codes in use")
