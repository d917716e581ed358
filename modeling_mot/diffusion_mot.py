"""The diffusion objective on latents: noise schedule, targets, and the schedulers that sample (paper, appendix A.1).

Timesteps follow diffusers: 0 <= t < num_train_timesteps, larger is noisier. Rectified flow counts in fractions
t / num_train_timesteps. A clean image is no noise level: it is marked as such, and embedded as t = 0.
"""

# N images, C latent channels, (h, w) latents

import difflib
import inspect

import diffusers
import torch
from torch import nn


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


def cumulative_alphas(config) -> torch.Tensor:
    """Diffusers' cumulative products of 1 - beta.  -> (num_train_timesteps,) float32"""
    scheduler = diffusers.DDPMScheduler(config.num_train_timesteps, beta_schedule=config.noise_schedule)
    return scheduler.alphas_cumprod


class NoiseSchedule(nn.Module):
    """How latents are noised and what is to be predicted of them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("alphas_cumprod", torch.ones(config.num_train_timesteps), persistent=False)
        with torch.no_grad():
            self.alphas_cumprod.copy_(cumulative_alphas(config).to(self.alphas_cumprod.device))

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        if self.alphas_cumprod.dtype != torch.float32 and not self.alphas_cumprod.is_meta:
            # A model that is cast to another precision keeps the schedule, which has none to spare.
            self.alphas_cumprod = cumulative_alphas(self.config).to(self.alphas_cumprod.device)
        return self

    def weights(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The shares of clean latents and of noise.  (N,) -> (N, 1, 1, 1) twice"""
        if self.config.prediction_type == "flow":
            noise = timesteps.float() / self.config.num_train_timesteps
            clean = 1 - noise
        else:
            alphas = self.alphas_cumprod[timesteps]
            clean, noise = alphas.sqrt(), (1 - alphas).sqrt()
        return clean.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t of appendix A.1.  (N, C, h, w) twice, (N,) -> (N, C, h, w)"""
        of_clean, of_noise = self.weights(timesteps)
        return of_clean * latents + of_noise * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model is to predict: the noise that was added, the velocity, or noise - clean."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "flow":
            return noise - latents
        of_clean, of_noise = self.weights(timesteps)
        return of_clean * noise - of_noise * latents

    def bounded(
        self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor, bound: float
    ) -> torch.Tensor:
        """Predicted noise, but no more of it than leaves clean latents within +-`bound`.  (R, C, h, w) twice -> the same

        The last noise levels of a cosine schedule hide the latents so well that 1 % of error in the noise are 200
        deviations of error in the latents, from which few samplers recover. Other predictions have no such division.
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
) -> torch.Tensor:
    """Noise levels for training.

    Args:
        image_first: (N,) whether an image has text after and none before it; its level is then at most
            `config.image_first_max_timestep`, where that is set.

    Returns:
        (N,) integers, or floats for rectified flow.
    """
    device = image_first.device if device is None else device
    count, levels = len(image_first), config.num_train_timesteps
    if config.timestep_sampling == "logit_normal":
        fractions = torch.sigmoid(torch.randn(count, generator=generator, device=device))
    else:
        fractions = torch.rand(count, generator=generator, device=device)
    if config.prediction_type == "flow":
        shift = config.timestep_shift
        fractions = shift * fractions / (1 + (shift - 1) * fractions)
    highest = config.image_first_max_timestep
    is_limited = image_first.to(device) & (highest is not None)
    if config.prediction_type == "flow":
        return fractions * torch.where(is_limited, highest or 0, levels)
    limits = torch.where(is_limited, (highest or 0) + 1, levels)
    # A sigmoid, or its product, may round up to 1.
    return torch.minimum((fractions * limits).long(), limits - 1)


def build_scheduler(config, name: str = "ddpm", **kwargs):
    """A diffusers scheduler that samples what this configuration was trained on.

    Args:
        name: `ddpm`, `ddim`, `dpm`, `unipc`, `euler`, `heun`, `flow`, or the name of a scheduler class of diffusers.
            "ddpm" is the default everywhere; a model of rectified flow then samples with "flow".
        kwargs: further arguments of that class.

    Raises:
        ValueError: an unknown name or argument, or a scheduler that does not fit `prediction_type`.
    """
    is_flow = config.prediction_type == "flow"
    full_name = SHORT_NAMES["flow"] if is_flow and name == "ddpm" else SHORT_NAMES.get(name, name)
    scheduler_class = getattr(diffusers, full_name, None) if full_name.endswith("Scheduler") else None
    if scheduler_class is None:
        raise ValueError(
            f"scheduler={name!r} is unknown; there are {', '.join(SHORT_NAMES)}, and diffusers' class names such as "
            "'DPMSolverSinglestepScheduler'"
        )
    if is_flow != (full_name in FLOW_SCHEDULERS):
        fitting = "'flow'" if is_flow else "'ddpm', 'ddim' or 'dpm'"
        raise ValueError(
            f"scheduler={name!r} cannot sample a model of prediction_type={config.prediction_type!r}; take {fitting}"
        )
    settings = {"num_train_timesteps": config.num_train_timesteps}
    if is_flow:
        settings["shift"] = config.timestep_shift
    else:
        settings |= {
            "beta_schedule": config.noise_schedule,
            "beta_start": 0.0001,  # those of DDPM, with which latents were noised; some schedulers have others
            "beta_end": 0.02,
            "prediction_type": config.prediction_type,
            "clip_sample": False,  # latents have no bounds
            "timestep_spacing": "trailing",  # sampling begins where training ends, in pure noise
        }
    known = inspect.signature(scheduler_class).parameters
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(
                f"scheduler_kwargs has {name!r}, which {full_name} does not know; did you mean {close[0]!r}?"
            )
    return scheduler_class(**({name: value for name, value in settings.items() if name in known} | kwargs))
