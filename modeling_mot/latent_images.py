"""The continuous images of a Transfusion forward: their noise, their places in the rows, and the way in and out.

`LatentImagesMixin`, at the end, holds the steps of the model's forward: `_images_of` reads, checks and noises the
images, `embed_latents` makes tokens of them, `predict_latents` makes latents of the tokens' hidden states. Before it
stand the noise schedule (paper, appendix A.1), its schedulers and times for sampling, then the places of images in
rows.
"""

import difflib
import inspect
from reprlib import repr as shortened
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .attention_masks import document_positions, find_image_blocks, find_placeholders
from .checks_arguments import check_tensor
from .latent_grid import frames_of_runs
from .latent_vae import encode_pixels


# B batch, L row length, D hidden size, N images in order of appearance over the flattened rows, C latent channels,
# (h, w) latents, n tokens of an image, P patches of all images, R images drawn together


# --------------------------------------------------------------------------------------------------------------- noise


SHORT_NAMES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
}
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
TIME_SPACINGS = ("scheduler", "steps", "points", "levels")


def cumulative_alphas(config) -> torch.Tensor:
    """Take diffusers' cumulative products of 1 - beta.  -> (num_train_timesteps,) float32"""
    scheduler = diffusers.DDPMScheduler(config.num_train_timesteps, beta_schedule=config.noise_schedule)
    return scheduler.alphas_cumprod


class NoiseSchedule(nn.Module):
    """How latents are noised, and the target of the prediction (paper, appendix A.1)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("alphas_cumprod", torch.ones(config.num_train_timesteps), persistent=False)
        with torch.no_grad():
            self.alphas_cumprod.copy_(cumulative_alphas(config).to(self.alphas_cumprod.device))

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        if self.alphas_cumprod.dtype != torch.float32 and not self.alphas_cumprod.is_meta:
            # A cast would round the schedule: it is made again in float32.
            self.alphas_cumprod = cumulative_alphas(self.config).to(self.alphas_cumprod.device)
        return self

    def weights(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the shares of clean latents and of noise.  (N,) -> (N, 1, 1, 1) twice"""
        if self.config.is_flow:
            noise = timesteps.float() / self.config.num_train_timesteps
            clean = 1 - noise
        else:
            alphas = self.alphas_cumprod[timesteps]
            clean, noise = alphas.sqrt(), (1 - alphas).sqrt()
        return clean.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Add noise to clean latents: x_t of appendix A.1.  (N, C, h, w) twice, (N,) -> (N, C, h, w)"""
        of_clean, of_noise = self.weights(timesteps)
        return of_clean * latents + of_noise * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the target of the prediction: the noise that was added, the velocity, noise - clean, or clean latents.

        (N, C, h, w) twice, (N,) -> (N, C, h, w)
        """
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "flow_sample":
            return latents
        if self.config.prediction_type == "flow":
            return noise - latents
        of_clean, of_noise = self.weights(timesteps)
        return of_clean * noise - of_noise * latents

    def loss_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Return the factors of squared errors: None, or 1 / t^2 for "flow_sample".  (N,) -> (N, 1, 1, 1)

        Velocities (noised - clean) / t differ by as much as the clean latents do, divided by t.
        """
        if self.config.prediction_type != "flow_sample":
            return None
        _, of_noise = self.weights(timesteps)
        return of_noise.clamp(min=self.config.smallest_divisor) ** -2

    def velocity(self, prediction: torch.Tensor, noisy: torch.Tensor, share: float) -> torch.Tensor:
        """Return the velocity that predicted clean latents imply; other predictions as they are.

        Args:
            prediction, noisy: (R, C, h, w).
            share: of noise in `noisy`, above 0.

        Returns:
            (R, C, h, w).
        """
        return (noisy - prediction) / share if self.config.prediction_type == "flow_sample" else prediction

    def bounded(
        self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor, bound: float
    ) -> torch.Tensor:
        """Bound predicted noise, so that the clean latents it implies stay within +-`bound`.

        The last noise levels of a cosine schedule hide the latents so well that an error of 1 % in the noise is an
        error of 200 deviations in the latents, from which few samplers recover. Other predictions divide by no such
        small number and are returned as they are.

        Args:
            prediction, noisy: (R, C, h, w).
            timestep: a number.

        Returns:
            (R, C, h, w).
        """
        if self.config.prediction_type != "epsilon":
            return prediction
        of_clean, of_noise = self.weights(timestep.long().view(1))
        clean = (noisy - of_noise * prediction) / of_clean
        return torch.where(clean.abs() <= bound, prediction, (noisy - of_clean * clean.clamp(-bound, bound)) / of_noise)


def draw_timesteps(
    config,
    image_first: torch.Tensor,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    sizes: list[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Draw noise levels for training.

    Args:
        image_first: (N,) bool, images with text after and none before them; their levels are at most
            `config.image_first_max_timestep`, where that is set.
        sizes: (h, w) of the latents of each image, by which its shift may differ; default: `config.latent_size`.

    Returns:
        (N,) integers, or floats for flow matching.
    """
    # Fractions from 0 to 1, then of the levels that an image may have.
    device = image_first.device if device is None else device
    count, levels = len(image_first), config.num_train_timesteps
    fractions = _draw_fractions(config, count, generator, device)
    low, high = config.timestep_range
    if (low, high) != (0, 1):
        fractions = low + (high - low) * fractions
    if config.is_flow:
        shifts = [config.shift_of(*size) for size in sizes or [config.latent_size] * count]
        shift = shifts[0] if len(set(shifts)) == 1 else torch.tensor(shifts, device=device)
        fractions = shift * fractions / (1 + (shift - 1) * fractions)
    highest = config.image_first_max_timestep
    is_limited = image_first.to(device) & (highest is not None)
    if config.is_flow:
        return fractions * torch.where(is_limited, highest or 0, levels)
    limits = torch.where(is_limited, (highest or 0) + 1, levels)
    # A sigmoid, or its product, may round up to 1.
    return torch.minimum((fractions * limits).long(), limits - 1)


def _draw_fractions(config, count: int, generator: torch.Generator | None, device) -> torch.Tensor:
    """Draw from the distribution that `config.timestep_sampling` names.  -> (N,) from 0 to 1"""
    drawing = {"generator": generator, "device": device}
    if config.timestep_sampling == "uniform":
        return torch.rand(count, **drawing)
    if config.timestep_sampling == "logit_normal":
        mean, deviation = config.timestep_sampling_parameters or (0, 1)
        return torch.sigmoid(mean + deviation * torch.randn(count, **drawing))
    # Of two gamma variables, the share of the first in their sum follows a Beta distribution.
    shapes = torch.tensor(config.timestep_sampling_parameters, dtype=torch.float64, device=device)
    gammas = torch._standard_gamma(shapes[:, None].repeat(1, count), generator=generator)
    return (gammas[0] / gammas.sum(dim=0)).float()


def build_scheduler(config, name: str = "ddpm", timestep_shift: float | None = None, **kwargs):
    """Build a diffusers scheduler that samples with the noise that this configuration was trained on.

    Args:
        name: `ddpm`, `ddim`, `dpm`, `unipc`, `euler`, `heun`, `flow`, or the name of a scheduler class of diffusers.
            "ddpm" is the default everywhere; a model of flow matching then samples with "flow".
        timestep_shift: of the fractions of flow matching; default: the configuration's, for `config.latent_size`.
        kwargs: further arguments of that class.

    Raises:
        ValueError: an unknown name or argument, or a scheduler that does not fit `prediction_type`.
    """
    # The class.
    is_flow = config.is_flow
    full_name = SHORT_NAMES["flow"] if is_flow and name == "ddpm" else SHORT_NAMES.get(name, name)
    scheduler_class = getattr(diffusers, full_name, None) if full_name.endswith("Scheduler") else None
    if scheduler_class is None:
        raise ValueError(
            f"scheduler={name!r} is unknown; there are {', '.join(SHORT_NAMES)}, and diffusers' class names such as "
            "'DPMSolverSinglestepScheduler'"
        )
    known = inspect.signature(scheduler_class).parameters
    fits = full_name in FLOW_SCHEDULERS or "use_flow_sigmas" in known if is_flow else full_name not in FLOW_SCHEDULERS
    if not fits:
        fitting = "'flow', 'unipc' or 'dpm'" if is_flow else "'ddpm', 'ddim' or 'dpm'"
        raise ValueError(
            f"scheduler={name!r} cannot sample a model of prediction_type={config.prediction_type!r}; take {fitting}"
        )

    # Its settings: the noise of training, then the caller's arguments.
    settings = {"num_train_timesteps": config.num_train_timesteps}
    if is_flow:
        shift = config.shift_of(*config.latent_size) if timestep_shift is None else timestep_shift
        settings |= {"shift": shift, "flow_shift": shift}
        settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    else:
        settings |= {
            "beta_schedule": config.noise_schedule,
            "beta_start": 0.0001,  # the betas of DDPM, with which latents were noised; some schedulers have others
            "beta_end": 0.02,
            "prediction_type": config.prediction_type,
            "clip_sample": False,  # latents have no bounds
            "timestep_spacing": "trailing",  # sampling begins where training ends, in pure noise
        }
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(
                f"scheduler_kwargs has {name!r}, which {full_name} does not know; did you mean {close[0]!r}?"
            )
    return scheduler_class(**({name: value for name, value in settings.items() if name in known} | kwargs))


def set_times(scheduler, spacing: str, count: int, device=None) -> None:
    """Give a scheduler the times of its steps.

    Flow matching goes from t = 1, noise, to t = 0, and a model is evaluated at all of these times but 0. The families
    space them differently, before the shift:

    - "scheduler": as diffusers' class does; `count` evaluations.
    - "steps": `count` equal steps, so `count` evaluations (pi0).
    - "points": `count` equally spaced times with both ends, so `count` - 1 evaluations (BAGEL).
    - "levels": `count` equal steps from the last noise level, 1 - 1 / num_train_timesteps (Cosmos 3, native schedule).

    Raises:
        ValueError: a scheduler that takes no times, or a single point.
    """
    if spacing == "scheduler":
        scheduler.set_timesteps(count, device=device)
        return
    flows = type(scheduler).__name__ in FLOW_SCHEDULERS or scheduler.config.get("use_flow_sigmas")
    if not flows or "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(
            f"time_spacing={spacing!r} needs a scheduler of flow matching that takes times, 'flow' or 'unipc', not "
            f"{type(scheduler).__name__}; leave it out, or take 'scheduler'"
        )
    if spacing == "points" and count < 2:
        raise ValueError(
            f"time_spacing='points' with num_inference_steps={count}: a step has two ends, give at least 2"
        )
    first = 1 - 1 / scheduler.config.num_train_timesteps if spacing == "levels" else 1.0
    times = np.linspace(first, 0, count if spacing == "points" else count + 1)[:-1]
    scheduler.set_timesteps(len(times), device=device, sigmas=times)


def noise_shares(scheduler, config) -> list[float]:
    """Return the share of noise in what each step of a scheduler starts from: (0, 1], counted levels from 1."""
    if config.is_flow:
        return scheduler.sigmas[: len(scheduler.timesteps)].tolist()
    return ((scheduler.timesteps + 1) / config.num_train_timesteps).tolist()


def position_table(height: int, width: int, dim: int, device=None) -> torch.Tensor:
    """Make fixed 2-D sine-cosine positions of patches in raster order.  -> (height * width, dim)

    The first half of the dimensions holds the columns, the second the rows.
    """
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim / 4))

    def along(length):
        angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    columns = along(width).expand(height, -1, -1)
    rows = along(height).unsqueeze(1).expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class PositionTable(nn.Module):
    """The values of `position_table` for the largest picture, held by the checkpoint and never trained.

    Args:
        rows, columns: of patches.
        dim: D.
    """

    def __init__(self, rows: int, columns: int, dim: int):
        super().__init__()
        self.size = (rows, columns)
        self.register_buffer("weight", torch.empty(rows * columns, dim))
        with torch.no_grad():
            self.weight.copy_(self.values())

    def values(self) -> torch.Tensor:
        """Compute the table.  -> (rows * columns, D)"""
        return position_table(*self.size, self.weight.shape[1], self.weight.device)

    def forward(self, height: int, width: int) -> torch.Tensor:
        """Return the positions of a picture of height x width patches.  -> (height * width, D)"""
        return self.weight.unflatten(0, self.size)[:height, :width].flatten(0, 1)


def cut_into_patches(latents: torch.Tensor, size: int) -> torch.Tensor:
    """Cut latents into patches of p x p, each in (row, column, channel) order.  (N, C, h, w) -> (N, n, p * p * C)

    Patches at the bottom and the right are filled up with zeros where p does not divide a side.
    """
    missing = [-side % size for side in latents.shape[2:]]
    if any(missing):
        latents = F.pad(latents, (0, missing[1], 0, missing[0]))
    patches = latents.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (N, C, h/p, p, w/p, p)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def join_patches(patches: torch.Tensor, size: int, height: int, width: int) -> torch.Tensor:
    """Join patches, the inverse of `cut_into_patches`.  (N, n, p * p * C) -> (N, C, h, w)"""
    grid = patches.unflatten(2, (size, size, -1)).unflatten(1, (-(-height // size), -(-width // size)))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


# ---------------------------------------------------------------------------------------------- images and their places


class ImageInputs(NamedTuple):
    """The images of a forward as they were passed; the fields are arguments of `MoTTransfusionModel.forward`."""

    latents: torch.Tensor | None
    pixel_values: torch.Tensor | None
    image_sizes: torch.Tensor | list | None
    timesteps: torch.Tensor | None
    noise: torch.Tensor | None
    clean_images: torch.Tensor | None
    image_first: torch.Tensor | None
    generator: torch.Generator | None


class ImagePlaces(NamedTuple):
    """Where images stand in the rows.

    Attributes:
        input_ids: (B, L)
        document_ids: (B, L) or None.
        attention_mask: (B, L) or None.
        kinds: (B, L) the modality of each patch, 0 outside; see `find_placeholders`.
        is_patch: (B, L) bool, the placeholders of images that are diffused.
        blocks: (B, L) the number of the image in its row, whatever its modality, -1 outside; see `find_image_blocks`.
    """

    input_ids: torch.Tensor
    document_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    kinds: torch.Tensor
    is_patch: torch.Tensor
    blocks: torch.Tensor

    @classmethod
    def find(cls, config, input_ids, document_ids, attention_mask) -> "ImagePlaces":
        """Find the placeholders and number the images.  (B, L) each"""
        kinds = find_placeholders(config, input_ids)
        blocks = find_image_blocks(kinds, document_ids, config.markers_in_image_block)
        return cls(input_ids, document_ids, attention_mask, kinds, kinds == config.image_modality, blocks)

    def starts(self, is_patch: torch.Tensor | None = None) -> torch.Tensor:
        """Mark the first patch of each image, by default of those that are diffused.  (B, L) bool -> (B, L) bool"""
        is_patch = self.is_patch if is_patch is None else is_patch
        starts = is_patch.clone()
        starts[:, 1:] &= ~is_patch[:, :-1] | (self.blocks[:, 1:] != self.blocks[:, :-1])
        return starts

    def run_lengths(self, is_patch: torch.Tensor) -> list[int]:
        """Count the patches of each image among `is_patch`, in order; waits for the device.  (B, L) bool -> N"""
        return torch.bincount(self.starts(is_patch).flatten().cumsum(0)[is_patch.flatten()] - 1).tolist()

    def noised(self, clean: torch.Tensor) -> torch.Tensor:
        """Mark the tokens of images that have noise, with the markers in their blocks.  (N,) bool -> (B, L) bool"""
        starts, blocks = self.starts(), self.blocks.clamp(min=0)
        number = (starts.flatten().cumsum(0) - 1).clamp(min=0).view_as(starts)  # of the image that starts there
        by_block = torch.zeros_like(blocks).scatter_add(1, blocks, (starts & ~clean[number]).long())
        return (self.blocks >= 0) & by_block.gather(1, blocks).bool()


class NoisyImages(NamedTuple):
    """The images of a forward as the patchifier takes them.

    Attributes:
        latents: (N, C, h, w) with noise, padded at the bottom and the right where sizes differ; a blank one if N = 0.
        target: (N, C, h, w) the target of the prediction.
        timesteps: (N,) noise levels, 0 where clean.
        clean: (N,) bool.
        sizes: (h, w) of each image.
        frames: how many images each run of placeholders holds; None for one.
    """

    latents: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    clean: torch.Tensor
    sizes: list[tuple[int, int]]
    frames: list[int] | None = None

    def by_size(self) -> dict[tuple[int, int], list[int]]:
        """Group images by size: size -> their indices. The blank image has a size and no index."""
        return group_by_size(self.sizes) or {tuple(self.latents.shape[2:]): []}

    def inside(self) -> torch.Tensor:
        """Mark the latents that belong to an image, and not to padding.  -> (N, 1, h, w) bool"""
        heights, widths = (torch.tensor(sides, device=self.latents.device) for sides in zip(*self.sizes))
        rows = torch.arange(self.latents.shape[2], device=self.latents.device)[None] < heights[:, None]
        columns = torch.arange(self.latents.shape[3], device=self.latents.device)[None] < widths[:, None]
        return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def sizes_of(
    images: torch.Tensor, image_sizes: torch.Tensor | list | None, name: str = "image_sizes"
) -> list[tuple[int, int]]:
    """Read height and width of each image of a padded tensor, in its unit.  (N, C, h, w), (N, 2) -> N pairs

    Args:
        name: of the argument, for messages.

    Raises:
        ValueError: sizes of another number of images, or larger than the tensor.
    """
    height, width = images.shape[2:]
    if image_sizes is None:
        return [(height, width)] * len(images)
    try:
        sizes = [(int(h), int(w)) for h, w in (image_sizes.tolist() if torch.is_tensor(image_sizes) else image_sizes)]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={shortened(image_sizes)} must be pairs of a height and a width") from None
    if len(sizes) != len(images) or any(not (1 <= h <= height and 1 <= w <= width) for h, w in sizes):
        raise ValueError(
            f"{name}={sizes} must give the height and width of each of {len(images)} images, within the "
            f"{height} x {width} of the tensor that holds them"
        )
    return sizes


def group_by_size(sizes: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Group images by size: size -> their indices, in order of appearance."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return groups


def images_first(config, places: ImagePlaces) -> torch.Tensor:
    """Find the images that have text of their document after them and none before.  -> (N,) bool"""
    # Text is all but patches, special tokens and padding.
    input_ids = places.input_ids
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    is_text = places.kinds == 0
    for token in (config.bos_token_id, config.pad_token_id, config.boi_token_id, config.eoi_token_id, *ends):
        if token is not None:
            is_text &= input_ids != token
    if places.attention_mask is not None:
        is_text &= places.attention_mask.bool()

    # For each token, the text of its document before it, and in all.
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    documents = places.document_ids
    start = torch.zeros_like(columns) if documents is None else columns - document_positions(documents)
    before = is_text.cumsum(dim=1) - is_text.long()
    before = before - before.gather(1, start)
    total = torch.zeros_like(columns).scatter_add(1, start, is_text.long()).gather(1, start)
    return ((before == 0) & (total > 0))[places.starts()]


def check_placeholders(config, places: ImagePlaces, sizes: list[tuple[int, int]]) -> list[int] | None:
    """Check that each image has a run of placeholders of its own, one for each patch; waits for the device.

    With `image_positions="grid"` a run may hold several images, the frames of a video.

    Args:
        sizes: (h, w) of each image.

    Returns:
        how many images each run holds; None for one.

    Raises:
        ValueError: images without placeholders or the reverse, or another number of them.
    """
    runs = places.run_lengths(places.is_patch)
    token = f"placeholders (image_token_id={config.image_token_id})"
    if runs and not sizes:
        raise ValueError(f"input_ids holds {sum(runs)} {token} but neither latents nor pixel_values came")
    if config.image_positions == "grid":
        return frames_of_runs(runs, [config.image_length(*size) for size in sizes])
    if len(runs) != len(sizes):
        raise ValueError(
            f"{len(sizes)} images came, but the {token} in input_ids stand in {len(runs)} places; put each image "
            "between boi_token_id and eoi_token_id"
        )
    for index, (found, (height, width)) in enumerate(zip(runs, sizes)):
        if found != config.image_length(height, width):
            raise ValueError(
                f"image {index} of {height} x {width} latents makes {config.image_length(height, width)} patches, but "
                f"input_ids holds {found} {token} for it; was the processor built for patches of "
                f"{config.patch_size * config.vae_downsampling} pixels?"
            )


def sizes_of_prompts(config, input_ids: torch.Tensor, latents, pixel_values, image_sizes) -> list | None:
    """Return the size in latents of the last image of each prompt, None for a prompt without images.

    Args:
        input_ids: (R, L)
        latents, pixel_values, image_sizes: of the forward.

    Returns:
        R pairs (h, w) or None; None for all if no images came.

    Raises:
        ValueError: images without placeholders or the reverse.
    """
    given, unit = (latents, 1) if latents is not None else (pixel_values, config.vae_downsampling)
    # What is no batch of images is refused later, and so are pixels without a VAE to encode them.
    if given is None or given.dim() != 4 or (latents is None and config.vae_config is None):
        return None
    sizes = [(height // unit, width // unit) for height, width in sizes_of(given, image_sizes)]
    places = ImagePlaces.find(config, input_ids, None, None)
    frames = check_placeholders(config, places, sizes) or [1] * len(sizes)
    ends = np.cumsum(frames)
    last = places.starts().sum(dim=1).cumsum(0).tolist()
    has_images = places.is_patch.any(dim=1).tolist()
    return [sizes[ends[count - 1] - 1] if own else None for count, own in zip(last, has_images)]


def check_timesteps(config, timesteps: torch.Tensor, may_wait: bool) -> None:
    """Check that timesteps are noise levels. Their values are read only if the forward `may_wait` for the device.

    Raises:
        ValueError: timesteps out of range, or floats where levels are counted.
    """
    is_flow, levels = config.is_flow, config.num_train_timesteps
    if timesteps.is_floating_point() and not is_flow:
        raise ValueError(
            f"timesteps are {timesteps.dtype}, but the noise levels of prediction_type={config.prediction_type!r} are "
            "counted: pass integers"
        )
    if not may_wait or not len(timesteps):
        return
    low, high = timesteps.min().item(), timesteps.max().item()
    if not (low >= 0 and (high < levels or is_flow and high == levels)):
        raise ValueError(
            f"timesteps run from {low} to {high}; they must be at least 0 and {'at most' if is_flow else 'less than'} "
            f"num_train_timesteps={levels}; a clean image is marked by clean_images"
        )


# ------------------------------------------------------------------------------------------- steps of a model's forward


class LatentImagesMixin:
    """The way of images into a Transfusion model and out: VAE, noise, patchifier."""

    def _images_of(self, given: ImageInputs, places: ImagePlaces, planned: bool, is_filled: bool) -> NoisyImages:
        """Read and check the images of a forward, draw what was not given, and add the noise.

        Args:
            planned: the routing was made ahead, so nothing here may wait for the device.
            is_filled: the forward continues a cache that holds keys.

        Raises:
            ValueError: the message names field, value and way out.
        """
        if given.latents is not None and given.pixel_values is not None:
            raise ValueError("pass either latents or pixel_values, not both")

        # Latents, as given or of the VAE.
        config, latents, sizes = self.config, given.latents, []
        if given.pixel_values is not None:
            latents, sizes = self.encode_images(given.pixel_values, given.image_sizes)
        elif latents is not None:
            check_tensor("latents", latents)
            if latents.dim() != 4 or latents.shape[1] != config.latent_channels:
                raise ValueError(
                    f"latents has shape {tuple(latents.shape)}; it must be (N, latent_channels="
                    f"{config.latent_channels}, h, w)"
                )
            sizes = sizes_of(latents, given.image_sizes)

        # Their places in the rows.
        frames = None if planned else check_placeholders(config, places, sizes)
        if not sizes:
            return self._no_images(places.input_ids)
        if is_filled:
            raise ValueError("images came with a filled past_key_values; pass them with the prompt, or use generate()")

        # Their noise.
        if given.image_first is None and given.timesteps is None and config.image_first_max_timestep is not None:
            given = given._replace(image_first=images_first(config, places))
        return self._noisy_images(latents, sizes, given, planned)._replace(frames=frames)

    def encode_images(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | list | None = None
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Encode pictures as scaled latents with the frozen VAE, each as if it were alone.

        Args:
            pixel_values: (N, 3, H, W) in [-1, 1], padded at the bottom and the right where sizes differ.
            image_sizes: (N, 2) height and width of each image in pixels.

        Returns:
            (N, C, h, w) in float32 with zeros in the padding, and height and width of each image in latents.

        Raises:
            ValueError: there is no VAE, or a side that it cannot divide.
        """
        if self.vae is None:
            raise ValueError("pixel_values came, but this model has no VAE (config.vae_config is None): pass latents")
        check_tensor("pixel_values", pixel_values)
        if pixel_values.dim() != 4:
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}; it must be (N, 3, H, W)")
        factor, sizes = self.config.vae_downsampling, sizes_of(pixel_values, image_sizes)
        latent_sizes = [(height // factor, width // factor) for height, width in sizes]
        if set(sizes) == {tuple(pixel_values.shape[2:])}:
            return encode_pixels(self.vae, pixel_values), latent_sizes
        shape = (len(sizes), self.config.latent_channels, *(-(-side // factor) for side in pixel_values.shape[2:]))
        latents = pixel_values.new_zeros(shape, dtype=torch.float32)
        for (height, width), members in group_by_size(sizes).items():
            # The VAE looks at the whole picture, so padding would change the latents.
            encoded = encode_pixels(self.vae, pixel_values[members, :, :height, :width])
            latents[members, :, : height // factor, : width // factor] = encoded
        return latents, latent_sizes

    def _noisy_images(self, latents: torch.Tensor, sizes: list, given: ImageInputs, planned: bool) -> NoisyImages:
        """Check the noise levels and the noise, draw the ones that were not given, and add the noise."""
        # Every tensor has an entry for each image.
        count, device = len(latents), latents.device
        for name in ("timesteps", "noise", "clean_images", "image_first"):
            if (value := getattr(given, name)) is not None:
                shape = tuple(latents.shape) if name == "noise" else (count,)
                check_tensor(name, value, shape, torch.bool if name == "clean_images" else None)
        generator = given.generator
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator={shortened(generator)} must be a torch.Generator, or None for torch's own")
        if given.timesteps is not None:
            check_timesteps(self.config, given.timesteps, may_wait=not planned)

        # Draw where the generator is.
        latents = latents.float()
        timesteps, noise = given.timesteps, given.noise
        clean_images, image_first = given.clean_images, given.image_first
        if clean_images is None:
            clean_images = torch.zeros(count, dtype=torch.bool, device=device)
        if image_first is None:
            image_first = torch.zeros(count, dtype=torch.bool)
        drawing = {"generator": generator, "device": device if generator is None else generator.device}
        if timesteps is None:
            timesteps = draw_timesteps(self.config, image_first, **drawing, sizes=sizes)
        if noise is None:
            noise = torch.randn(latents.shape, **drawing)

        # Images that are context stay clean, at t = 0.
        timesteps, noise, clean_images = timesteps.to(device), noise.to(device), clean_images.to(device)
        noised = self.noise_schedule.noised(latents, noise, timesteps)
        return NoisyImages(
            latents=torch.where(clean_images.view(-1, 1, 1, 1), latents, noised),
            target=self.noise_schedule.target(latents, noise, timesteps),
            timesteps=torch.where(clean_images, torch.zeros_like(timesteps), timesteps),
            clean=clean_images,
            sizes=sizes,
        )

    def _no_images(self, like: torch.Tensor) -> NoisyImages:
        """Make a blank image that no token sees, so that the patchifier's gradients are zero and not missing.

        An empty batch would do as well, but some kernels and tracers cannot run it.
        """
        side = self.config.patch_size
        latents = like.new_zeros(1, self.config.latent_channels, side, side, dtype=torch.float32)
        timesteps = like.new_zeros(1, dtype=torch.long)
        return NoisyImages(latents, latents[:0], timesteps, timesteps[:0].bool(), [])

    def patchifier_tokens(
        self, latents: torch.Tensor, timesteps: torch.Tensor, clean: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple | None]:
        """Cut images of one size into tokens for the transformer.  -> (N, n, D) and features

        Args:
            latents: (N, C, h, w)
            timesteps: (N,)
            clean: (N,) bool, images without noise; None for none.
        """
        latents = latents.to(self.patchifier.proj_in.bias.dtype)
        told = (timesteps, clean) if self.config.timestep_addition == "noised_token" else (timesteps,)
        tokens, features = self.patchifier.embed(latents, *told)
        if self.config.latent_position_table is not None:
            grid = self.config.patch_grid(*latents.shape[2:])
            tokens = tokens + self.fixed_positions("image", *grid, tokens)
        return self.model.widen(tokens), features

    def patchifier_latents(self, hidden_states: torch.Tensor, features: Any, height: int, width: int) -> torch.Tensor:
        """Make latents of the hidden states of images of one size.  (N, n, D) -> (N, C, h, w) float32"""
        tower = self.config.tower_config(self.config.towers["image"])
        return self.patchifier.predict(hidden_states[..., : tower.hidden_size], features, height, width).float()

    def fixed_positions(self, modality: str, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """Return the positions of a picture's patches from the checkpoint's table, or computed.  -> (n, D)

        Args:
            like: (..., D), a tensor of the dtype and device that are wanted.
        """
        if modality in self.position_tables:
            return self.position_tables[modality](height, width).to(like)
        return position_table(height, width, like.shape[-1], like.device).to(like.dtype)

    def embed_latents(self, images: NoisyImages) -> tuple[torch.Tensor, list]:
        """Make tokens of images, group by group of one size.

        Returns:
            (P, D) in order of appearance, and for each size what `predict_latents` needs of the way in.
        """
        tokens, features = {}, []
        for size, members in images.by_size().items():
            latents, timesteps = images.latents[:, :, : size[0], : size[1]], images.timesteps
            clean = images.clean if images.sizes else None
            if len(members) < len(images.sizes):
                latents, timesteps, clean = latents[members], timesteps[members], clean[members]
            embedded, kept = self.patchifier_tokens(latents, timesteps, clean)
            features.append((size, members, kept))
            tokens |= zip(members, embedded)
        if len(features) == 1:
            tokens = embedded.flatten(0, 1)
            return tokens if images.sizes else tokens[:0], features
        return torch.cat([tokens[index] for index in range(len(tokens))]), features

    def predict_latents(self, hidden_states: torch.Tensor, features: list, images: NoisyImages) -> torch.Tensor:
        """Make latents of the patches' hidden states, group by group of one size.

        Args:
            hidden_states: (P, D).
            features: of `embed_latents`.

        Returns:
            (N, C, h, w) in float32, zero in the padding.
        """
        if not images.sizes:
            hidden_states = hidden_states.new_zeros(1, hidden_states.shape[-1])
        prediction = {}
        for (height, width), members, kept in features:
            length = self.config.image_length(height, width)
            if len(features) == 1:
                patches = hidden_states.unflatten(0, (-1, length))
            else:
                rows = hidden_states.split([self.config.image_length(*size) for size in images.sizes])
                patches = torch.stack([rows[index] for index in members])
            part = self.patchifier_latents(patches, kept, height, width)
            part = F.pad(part, (0, images.latents.shape[3] - width, 0, images.latents.shape[2] - height))
            prediction |= zip(members, part)
        if len(features) == 1:
            return part if images.sizes else part[:0]
        return torch.stack([prediction[index] for index in range(len(prediction))])
