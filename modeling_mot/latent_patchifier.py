"""Latents of images to hidden states and back: Transfusion's U-Net, or a linear layer (paper, appendix A.2).

Both are for images of any size that `patch_size` divides; a token stands for patch_size x patch_size latents, in raster
order. Latents are noised before they come here, and the noise level enters as a timestep embedding.
"""

# N images, C latent channels, (h, w) latents, p patch size, n = h * w / p^2 tokens, D hidden size, E timestep embedding

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D
from torch import nn


class TimestepEncoder(nn.Module):
    """Sinusoids of the noise level, then two linear layers.  (N,) -> (N, E)

    `frequencies` is the number of sinusoids. They see indices up to `num_train_timesteps`, or with
    `timestep_format="fraction"` shares of it.
    """

    def __init__(self, config, width: int, frequencies: int = 256):
        super().__init__()
        self.scale = 1.0 if config.timestep_format == "index" else 1.0 / config.num_train_timesteps
        self.sinusoids = Timesteps(frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(frequencies, width)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        sinusoids = self.sinusoids(timesteps.float() * self.scale)
        return self.mlp(sinusoids.to(self.mlp.linear_1.bias.dtype))  # a quantised weight is of another type


def position_table(height: int, width: int, dim: int, device=None) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions of patches in raster order, columns in the first half.  -> (height * width, dim)"""
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim / 4))

    def along(length):
        angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    columns = along(width).expand(height, -1, -1)
    rows = along(height).unsqueeze(1).expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def cut_into_patches(latents: torch.Tensor, size: int) -> torch.Tensor:
    """(N, C, h, w) -> (N, n, p * p * C), each patch in (row, column, channel) order"""
    patches = latents.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (N, C, h/p, p, w/p, p)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def join_patches(patches: torch.Tensor, size: int, height: int, width: int) -> torch.Tensor:
    """(N, n, p * p * C) -> (N, C, h, w)"""
    grid = patches.unflatten(2, (size, size, -1)).unflatten(1, (height // size, width // size))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class LinearPatchifier(nn.Module):
    """Patches as vectors: the timestep embedding is added, then a linear layer; a linear layer back."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        values = config.patch_size**2 * config.latent_channels
        self.time_encoder = TimestepEncoder(config, values)
        self.proj_in = nn.Linear(values, config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, values)

    def embed(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(N, C, h, w), (N,) -> (N, n, D) and nothing for the way back"""
        patches = cut_into_patches(latents, self.patch_size)
        return self.proj_in(patches + self.time_encoder(timesteps).unsqueeze(1)), None

    def predict(self, hidden_states: torch.Tensor, features: None, height: int, width: int) -> torch.Tensor:
        """(N, n, D) -> (N, C, h, w)"""
        return join_patches(self.proj_out(hidden_states), self.patch_size, height, width)


class UNetPatchifier(nn.Module):
    """A U-Net whose middle is the transformer: down blocks before it, up blocks after it, skips between the two.

    Plain residual blocks of diffusers with a timestep embedding. The last feature map of the way down becomes the
    tokens; on the way up it stands beside what the transformer made of them, as all others do.
    """

    def __init__(self, config):
        super().__init__()
        channels, layers = list(config.unet_channels), config.unet_layers
        last = len(channels) - 1
        width, groups = 4 * channels[0], config.unet_norm_groups
        shared = {"temb_channels": width, "resnet_groups": groups, "resnet_eps": 1e-6}
        self.time_encoder = TimestepEncoder(config, width, frequencies=channels[0])
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock2D(inputs, outputs, num_layers=layers, add_downsample=depth < last, **shared)
            for depth, (inputs, outputs) in enumerate(zip([channels[0], *channels], channels))
        )
        self.norm_in = nn.GroupNorm(groups, channels[-1])
        self.proj_in = nn.Linear(channels[-1], config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, channels[-1])
        self.up_blocks = nn.ModuleList(
            UpBlock2D(
                in_channels=channels[max(depth - 1, 0)],
                prev_output_channel=channels[min(depth + 1, last)],
                out_channels=channels[depth],
                num_layers=layers + 1,
                add_upsample=depth > 0,
                **shared,
            )
            for depth in reversed(range(len(channels)))
        )
        self.norm_out = nn.GroupNorm(groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.latent_channels, 3, padding=1)

    def embed(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """(N, C, h, w), (N,) -> (N, n, D), and the features that `predict` takes up again"""
        time = self.time_encoder(timesteps)
        features = self.conv_in(latents)
        skips = [features]
        for block in self.down_blocks:
            features, outputs = block(features, time)
            skips.extend(outputs)
        tokens = F.silu(self.norm_in(features)).flatten(2).transpose(1, 2)
        return self.proj_in(tokens), (tuple(skips), time)

    def predict(self, hidden_states: torch.Tensor, features: tuple, height: int, width: int) -> torch.Tensor:
        """(N, n, D) -> (N, C, h, w)"""
        skips, time = features
        tokens = self.proj_out(hidden_states).transpose(1, 2)
        features = tokens.unflatten(2, skips[-1].shape[2:]).contiguous()
        for block in self.up_blocks:
            count = len(block.resnets)
            features = block(features, skips[-count:], time)
            skips = skips[:-count]
        return self.conv_out(F.silu(self.norm_out(features)))


def build_patchifier(config) -> nn.Module:
    return {"unet": UNetPatchifier, "linear": LinearPatchifier}[config.patchifier](config)
