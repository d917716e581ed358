"""The VAE of a Transfusion model: pictures to continuous latents and back by a frozen diffusers autoencoder."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from .configuration_mot_transfusion import VAE_CLASS_NAMES, vae_downsampling
from .hub_trust import without_code
from .image_tokenizer import fingerprint, without_autocast


# N pictures, (H, W) pixels, (h, w) latents with h = H / downsampling, C latent channels


VAE_CLASSES = {name: getattr(diffusers, name) for name in VAE_CLASS_NAMES}
# Larger inputs go through the autoencoder in parts: 64 pictures of 64 pixels, 4 of 256 pixels at a time.
PIXELS_AT_ONCE = 64 * 64 * 64


def vae_class(vae_config: Mapping[str, Any]) -> type:
    """Return the diffusers class that `_class_name` names.

    Raises:
        ValueError: an unsupported class.
    """
    name = vae_config.get("_class_name")
    if name not in VAE_CLASSES:
        raise ValueError(
            f"vae_config has _class_name={name!r}; supported are {', '.join(VAE_CLASSES)} (other autoencoders can "
            "encode ahead: build the model with vae_config=None and give it latents)"
        )
    return VAE_CLASSES[name]


def build_vae(vae_config: Mapping[str, Any]) -> AutoencoderKL | AutoencoderTiny:
    """Build an untrained autoencoder of a diffusers configuration, frozen, in float32 and evaluation mode.

    Raises:
        ValueError: a `_class_name` other than AutoencoderKL and AutoencoderTiny.
    """
    return vae_class(vae_config).from_config(without_code(vae_config)).float().eval().requires_grad_(False)


def downsampling(vae_config: Mapping[str, Any]) -> int:
    """Compute the pixels of one latent's side.

    Raises:
        ValueError: an unsupported `_class_name`.
    """
    vae_class(vae_config)
    return vae_downsampling(vae_config)


def vae_config_of(vae: AutoencoderKL | AutoencoderTiny) -> dict[str, Any]:
    """Return the configuration with which `build_vae` builds such a VAE, without its origin and version."""
    known = {name: value for name, value in without_code(vae.config).items() if not name.startswith("_")}
    return {**known, "_class_name": type(vae).__name__}


def check_divisible(height: int, width: int, multiple: int) -> None:
    """Refuse pictures whose sides the autoencoder cannot divide.

    Raises:
        ValueError: the message names the size and the multiple.
    """
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ValueError(
            f"pictures of {height} x {width} pixels cannot be encoded: the VAE makes one latent of {multiple} x "
            f"{multiple} pixels, so both sides must be multiples of {multiple}; scale, crop or pad them first"
        )


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL | AutoencoderTiny, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encode pictures as scaled latents: the mode z of the posterior, as (z - shift_factor) * scaling_factor.

    AutoencoderTiny has no posterior: its latents are scaled as they are. No gradient, autocast off.

    Args:
        pixel_values: (N, 3, H, W) floats in [-1, 1].

    Returns:
        (N, C, h, w) in float32.

    Raises:
        ValueError: another shape, integers, or sides that the down-sampling does not divide.
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
    """Decode scaled latents to pixels, the inverse of `encode_pixels`. No gradient, autocast off.

    Args:
        latents: (N, C, h, w) floats.

    Returns:
        (N, 3, H, W) in float32, clamped to [-1, 1].

    Raises:
        ValueError: another shape.
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
    """Return shift and scale of the latents, (1, 1, 1, 1) each; (1, C, 1, 1) with statistics of each channel."""
    config = vae.config
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    # As in diffusers' pipelines, statistics of each channel, where there are any, replace the two numbers.
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
    """Run `function` over the first dimension, a bounded number of pixels at a time.

    It runs in the dtype of the VAE's weights, which is float32 unless a user cast them.

    Args:
        pixels_each: pixels of one picture.

    Returns:
        The outputs in one tensor, in float32.
    """
    inputs = inputs.to(device=vae.device, dtype=vae.dtype)
    size = max(1, PIXELS_AT_ONCE // max(1, pixels_each))
    with without_autocast():
        if not len(inputs):  # attention in diffusers takes no empty batch
            return function(inputs.new_zeros(1, *inputs.shape[1:]))[:0].float()
        return torch.cat([function(part).float() for part in inputs.split(size)])


def vae_fingerprint(vae: AutoencoderKL | AutoencoderTiny) -> str:
    """Hash all that cached latents depend on: class, configuration and weights as float32.  -> sha256, hexadecimal

    The origin of the VAE, the version that saved it and its stored dtype make no difference.
    """
    tensors = {name: tensor.detach().float() for name, tensor in vae.state_dict().items()}
    return fingerprint(vae_config_of(vae), tensors)
