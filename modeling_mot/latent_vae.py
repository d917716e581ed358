"""Pictures to continuous latents and back through a frozen diffusers autoencoder.

Shapes: N pictures, (H, W) pixels, (h, w) latent cells with h = H / downsampling, C latent channels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from .configuration_mot_transfusion import VAE_CLASS_NAMES, vae_downsampling
from .hub_trust import without_code
from .image_tokenizer import fingerprint, without_autocast


VAE_CLASSES = {name: getattr(diffusers, name) for name in VAE_CLASS_NAMES}
# Larger inputs go through the autoencoder in parts: 64 pictures of 64 pixels, 4 of 256 pixels at a time.
PIXELS_AT_ONCE = 64 * 64 * 64


def vae_class(vae_config: Mapping[str, Any]) -> type:
    """The diffusers class that `_class_name` names; ValueError for one that is not supported."""
    name = vae_config.get("_class_name")
    if name not in VAE_CLASSES:
        raise ValueError(
            f"vae_config has _class_name={name!r}; supported are {', '.join(VAE_CLASSES)} (other autoencoders can "
            "encode ahead: build the model with vae_config=None and give it latents)"
        )
    return VAE_CLASSES[name]


def build_vae(vae_config: Mapping[str, Any]) -> AutoencoderKL | AutoencoderTiny:
    """An untrained autoencoder of a diffusers configuration, in float32 and evaluation mode, frozen.

    Raises ValueError for a `_class_name` other than AutoencoderKL and AutoencoderTiny.
    """
    return vae_class(vae_config).from_config(without_code(vae_config)).float().eval().requires_grad_(False)


def downsampling(vae_config: Mapping[str, Any]) -> int:
    """Pixels per latent cell along one side; ValueError for a `_class_name` that is not supported."""
    vae_class(vae_config)
    return vae_downsampling(vae_config)


def vae_config_of(vae: AutoencoderKL | AutoencoderTiny) -> dict[str, Any]:
    """What `build_vae` needs to build its like; where it was loaded from and by which version is left out."""
    known = {name: value for name, value in without_code(vae.config).items() if not name.startswith("_")}
    return {**known, "_class_name": type(vae).__name__}


def check_divisible(height: int, width: int, multiple: int) -> None:
    """ValueError, naming the size and the multiple, for pictures that the autoencoder cannot divide."""
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ValueError(
            f"pictures of {height} x {width} pixels cannot be encoded: the VAE makes one latent of {multiple} x "
            f"{multiple} pixels, so both sides must be multiples of {multiple}; scale, crop or pad them first"
        )


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL | AutoencoderTiny, pixel_values: torch.Tensor) -> torch.Tensor:
    """Scaled latents: the mode of the posterior, `(z - shift_factor) * scaling_factor`.

    (N, 3, H, W) in [-1, 1] -> (N, C, h, w), float32, without gradient, autocast off. AutoencoderTiny has no
    posterior: its latents are scaled as they are. Raises ValueError for another shape, for integers and for sides that
    are no multiples of the down-sampling.
    """
    channels = vae.config.in_channels
    if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values is {pixel_values.dtype} of shape {tuple(pixel_values.shape)}; the VAE takes floats in "
            f"[-1, 1] of shape (N, {channels}, H, W)"
        )
    height, width = pixel_values.shape[-2:]
    check_divisible(height, width, downsampling(vae_config_of(vae)))

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        encoded = vae.encode(pixels)
        return encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()

    shift, scale = latent_scaling(vae)
    return (in_parts(encode, vae, pixel_values, height * width) - shift) * scale


@torch.no_grad()
def decode_latents(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """Pixels of scaled latents, the inverse of `encode_pixels`, clamped to [-1, 1].

    (N, C, h, w) -> (N, 3, H, W), float32, without gradient, autocast off. Raises ValueError for another shape.
    """
    channels = vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels or not latents.is_floating_point():
        raise ValueError(
            f"latents are {latents.dtype} of shape {tuple(latents.shape)}; the VAE decodes floats of shape "
            f"(N, {channels}, h, w)"
        )
    multiple = downsampling(vae_config_of(vae))
    shift, scale = latent_scaling(vae)
    latents = latents.to(vae.device).float() / scale + shift
    pixels = in_parts(lambda z: vae.decode(z).sample, vae, latents, latents.shape[2] * latents.shape[3] * multiple**2)
    return pixels.clamp(-1, 1)


def latent_scaling(vae: AutoencoderKL | AutoencoderTiny) -> tuple[torch.Tensor, torch.Tensor]:
    """(shift, scale), each (1, 1, 1, 1) or, where the configuration has statistics per channel, (1, C, 1, 1)."""
    config = vae.config
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    # As diffusers' pipelines do: statistics per channel, where there are any, stand in for the shift.
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shift, scale = mean, [scale / value for value in std]
    shift, scale = (torch.tensor(value, dtype=torch.float32, device=vae.device) for value in (shift, scale))
    return shift.view(1, -1, 1, 1), scale.view(1, -1, 1, 1)


def in_parts(
    function: Callable[[torch.Tensor], torch.Tensor],
    vae: AutoencoderKL | AutoencoderTiny,
    inputs: torch.Tensor,
    pixels_each: int,
) -> torch.Tensor:
    """`function` over the first dimension, a bounded number of pixels at a time; float32 out.

    Computes in the dtype of the VAE's weights, which is float32 unless somebody cast them.
    """
    inputs = inputs.to(device=vae.device, dtype=vae.dtype)
    size = max(1, PIXELS_AT_ONCE // max(1, pixels_each))
    with without_autocast():
        if not len(inputs):  # attention in diffusers takes no empty batch
            return function(inputs.new_zeros(1, *inputs.shape[1:]))[:0].float()
        return torch.cat([function(part).float() for part in inputs.split(size)])


def vae_fingerprint(vae: AutoencoderKL | AutoencoderTiny) -> str:
    """sha256 over class, configuration and weights (as float32), in hexadecimal: what cached latents depend on.

    Where the VAE was loaded from, the version that saved it and the dtype it was stored in make no difference.
    """
    tensors = {name: tensor.detach().float() for name, tensor in vae.state_dict().items()}
    return fingerprint(vae_config_of(vae), tensors)
