"""Time drawing a picture by diffusion: `generate()` with a cached prefix, beside loops that recompute whole rows.

R pictures, L prompt tokens, C latent channels, (h, w) latents.
"""

import torch
from tqdm.auto import tqdm

from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel
from modeling_mot.latent_images import build_scheduler
from training.benchmark.rounds import compare, interleave, peak_bytes


GUIDANCE, ROWS, PROMPT, LATENTS = 3.0, 1, 64, (32, 32)
BOS, BOI, EOI, IMAGE = 1, 3, 4, 5


def build(size: dict, dtype: torch.dtype) -> MoTTransfusionModel:
    """Build two towers, and a U-Net with about a tenth of their parameters.

    The weights are random, since the time does not depend on them.
    """
    torch.manual_seed(0)
    config = MoTTransfusionConfig.from_variant(
        "mot", vocab_size=8192, bos_token_id=BOS, boi_token_id=BOI, eoi_token_id=EOI, image_token_id=IMAGE,
        latent_size=LATENTS, unet_channels=[32, 64], unet_layers=1, unet_norm_groups=8, caption_dropout=0.1,
        prediction_type="v_prediction", **size,
    )  # fmt: skip
    return MoTTransfusionModel(config).to(dtype).eval()


def prompts() -> torch.Tensor:
    """Make prompts (R, L) that end with BOI."""
    ids = torch.randint(6, 8192, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = BOS, BOI
    return ids


def cached(model: MoTTransfusionModel, steps: int) -> torch.Tensor:
    """Draw as the project does.  -> (R, C, h, w)"""
    length = model.config.image_length(*LATENTS)
    output = model.generate(
        prompts(),
        guidance_scale=GUIDANCE,
        num_inference_steps=steps,
        max_new_tokens=length + 1,
        generator=[torch.Generator().manual_seed(row) for row in range(ROWS)],
        do_sample=False,
        pad_token_id=0,
    )
    return torch.stack([latents[0] for latents in output.latents])


def recomputed(model: MoTTransfusionModel, steps: int, in_one_batch: bool = False) -> torch.Tensor:
    """Draw by a plain loop: each step computes the whole conditional and unconditional row.  -> (R, C, h, w)"""
    # Noise from the same generators as in `cached`.
    config = model.config
    length = config.image_length(*LATENTS)
    scheduler = build_scheduler(config, "ddpm")
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(row) for row in range(ROWS)]
    shape = (config.latent_channels, *LATENTS)
    latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    # The rows of the two passes, padded to one batch if asked for.
    image = torch.full((ROWS, length), IMAGE)
    conditional = torch.cat([prompts(), image], dim=1)
    free = torch.cat([torch.tensor([[BOS, BOI]]).expand(ROWS, -1), image], dim=1)
    rows = [(conditional, torch.ones_like(conditional)), (free, torch.ones_like(free))]
    if in_one_batch:
        padding = torch.zeros(ROWS, PROMPT - 2, dtype=torch.long)
        ids, mask = (torch.cat([a, torch.cat([padding, b], dim=1)]) for a, b in zip(*rows))
        rows = [(ids, mask)]

    # Each step predicts with and without the prompt, and extrapolates from one to the other.
    for timestep in tqdm(scheduler.timesteps, disable=True):
        predictions = []
        for ids, mask in rows:
            noisy = latents.repeat(len(ids) // ROWS, 1, 1, 1)
            # The forward adds noise to clean latents. If these are zero, the sum is the noisy latents themselves.
            timesteps = timestep.expand(len(noisy))
            _, of_noise = model.noise_schedule.weights(timesteps)
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                latents=torch.zeros_like(noisy),
                noise=noisy / of_noise,
                timesteps=timesteps,
                logits_to_keep=1,
                use_cache=False,
            )
            predictions.extend(output.prediction.split(ROWS))
        guided, unguided = predictions
        prediction = unguided + GUIDANCE * (guided - unguided)
        latents = scheduler.step(prediction, timestep, latents, generator=generators).prev_sample
    return latents


def contestant(name: str, model: MoTTransfusionModel, steps: int) -> torch.Tensor:
    with torch.no_grad():
        return cached(model, steps) if name == "cached" else recomputed(model, steps, name == "one_batch")


CONTESTANTS = ("cached", "recomputed", "one_batch")


def time_sample(size: dict, dtype: torch.dtype, steps: list[int], rounds: int) -> dict:
    """Time a picture with guidance for each number of steps, and measure the peak memory in a fresh process.

    Returns:
        dict: `steps`: number of steps -> the figures of `compare`; `peak_bytes` by contestant.

    Raises:
        SystemExit: the contestants draw different pictures.
    """
    # All contestants have to draw the same.
    model = build(size, dtype)
    wanted = contestant("recomputed", model, 4)
    for name in CONTESTANTS:
        difference = (contestant(name, model, 4) - wanted).abs().max().item()
        if difference > (1e-3 if dtype == torch.float32 else 0.5):
            raise SystemExit(f"{name} differs from recomputed by {difference:.2e}: nothing was timed")

    figures = {}
    pairs = [("cached", other) for other in CONTESTANTS[1:]]
    for number in steps:
        calls = {name: lambda name=name, number=number: contestant(name, model, number) for name in CONTESTANTS}
        figures[str(number)] = compare(interleave(calls, rounds), pairs, each=ROWS)
    peaks = {name: peak_bytes(_build, _draw, name, size, dtype) for name in CONTESTANTS}
    return {"steps": figures, "peak_bytes": peaks}


def _build(name: str, size: dict, dtype: torch.dtype) -> MoTTransfusionModel:
    return build(size, dtype)


def _draw(model: MoTTransfusionModel, name: str, *settings) -> None:
    contestant(name, model, 3)
