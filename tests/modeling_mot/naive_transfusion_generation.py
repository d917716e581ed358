"""Text and pictures without cache and batch: the whole row anew at every token and every denoising step."""

import diffusers
import torch

from .naive_transfusion import BOI, BOS, EOI, EOS, PATCH, NaiveTransfusion, visible


def scheduler_of(config, name):
    """Each with what the configuration was trained on, by the names of diffusers."""
    classes = {
        "ddpm": diffusers.DDPMScheduler,
        "ddim": diffusers.DDIMScheduler,
        "dpm": diffusers.DPMSolverMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
    }
    if config.prediction_type.startswith("flow"):
        shift = config.timestep_shift
        if name in ("unipc", "dpm"):
            solver = {"unipc": diffusers.UniPCMultistepScheduler, "dpm": diffusers.DPMSolverMultistepScheduler}[name]
            return solver(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    unclipped = {"clip_sample": False} if name in ("ddpm", "ddim") else {}
    return classes[name](
        beta_schedule=config.noise_schedule,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
        **unclipped,
    )


class NaiveGeneration:
    """One sequence after the other.

    Args:
        size: (h, w) of the latents of new pictures.
        choose: (logits (V,), tokens so far) -> token; the likeliest by default.
        boi_allowed: whether pictures may begin of themselves.
    """

    def __init__(
        self, model, size=(4, 4), steps=4, scheduler="ddpm", guidance_scale=1.0, negative=(BOS,), choose=None,
        boi_allowed=True, dtype=torch.float64,
    ):  # fmt: skip
        self.naive, self.config = NaiveTransfusion(model, dtype), model.config
        self.size, self.steps, self.scheduler, self.guidance_scale = size, steps, scheduler, guidance_scale
        self.negative, self.boi_allowed = negative, boi_allowed
        self.choose = choose or (lambda logits, tokens: int(logits.argmax()))
        self.length = size[0] * size[1] // self.config.patch_size**2

    def denoised(self, tokens, images, noisy, timestep):
        """What the model says of a noisy picture behind these tokens, which end with BOI.  (C, h, w) -> (C, h, w)"""
        row = [*tokens, *[PATCH] * self.length, EOI]
        images = [*images, (noisy, float(timestep))]
        seen = visible(self.config, row, clean=[True] * (len(images) - 1) + [False])
        return self.naive(row, images, seen)[1][-1].float()

    def guided(self, tokens, images, noisy, timestep):
        """Away from what the model says without the prompt."""
        prediction = self.denoised(tokens, images, noisy, timestep)
        if self.guidance_scale == 1:
            return prediction
        free = self.denoised([*self.negative, BOI], [], noisy, timestep)
        return free + self.guidance_scale * (prediction - free)

    def plausible(self, noise, noisy, alpha, bound=6.0):
        """Noise that leaves no clean latent beyond the bound."""
        clean = (noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        clean = torch.tensor([max(-bound, min(bound, value)) for value in clean.flatten().tolist()]).view_as(clean)
        return (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()

    @torch.no_grad()
    def draw(self, tokens, images, generator):
        scheduler = scheduler_of(self.config, self.scheduler)
        scheduler.set_timesteps(self.steps)
        latents = torch.randn(1, self.config.latent_channels, *self.size, generator=generator)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        for step, timestep in enumerate(scheduler.timesteps):
            scaled = (
                scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
            )
            prediction = self.guided(tokens, images, scaled[0], timestep)
            if self.config.prediction_type == "flow_sample":
                prediction = (scaled[0] - prediction) / scheduler.sigmas[step]
            if self.config.prediction_type == "epsilon":
                prediction = self.plausible(prediction, scaled[0], scheduler.alphas_cumprod[int(timestep)])
            random = {"generator": generator} if self.scheduler in ("ddpm", "euler") else {}
            latents = scheduler.step(prediction[None], timestep, latents, **random).prev_sample
        return latents[0]

    @torch.no_grad()
    def __call__(self, prompt, images=(), new_tokens=12, generator=None):
        """Prompt and its clean images -> all tokens, and the latents of new pictures."""
        tokens, images, drawn = list(prompt), [(latents, 0) for latents in images], []
        while len(tokens) < len(prompt) + new_tokens:
            if tokens[-1] == BOI:
                drawn.append(self.draw(tokens, images, generator))
                images.append((drawn[-1], 0))
                tokens += [PATCH] * self.length + [EOI]
                continue
            logits = self.naive(tokens, images)[0][-1].float()
            logits[[PATCH, EOI]] = -float("inf")
            if not self.boi_allowed or len(prompt) + new_tokens - len(tokens) < self.length + 2:
                logits[BOI] = -float("inf")
            tokens.append(self.choose(logits, tokens))
            if tokens[-1] == EOS:
                break
        return tokens, drawn


def sampler(generator, temperature=1.0):
    """A choice by chance, from one row's own generator."""
    return lambda logits, tokens: int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


def penalised(penalty):
    """The likeliest, with transformers' repetition penalty (arXiv 1909.05858)."""

    def choose(logits, tokens):
        for token in set(tokens):
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        return int(logits.argmax())

    return choose
