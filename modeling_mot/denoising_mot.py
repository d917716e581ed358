"""Drawing images in diffusion mode: the prefix stays in the cache, each step runs the image's tokens alone."""

# R images drawn together, L cached columns, n tokens of an image, C latent channels, (h, w) latents, H heads

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging

from .attention_masks import ImageBlocks, attention_mask_for
from .diffusion_mot import build_scheduler
from .modality_routing import ModalityRouting


@dataclass
class DiffusionSettings:
    """How `generate()` draws images; its own docstring says what each means."""

    guidance_scale: float = 1.0
    num_inference_steps: int = 250
    scheduler: str = "ddpm"
    scheduler_kwargs: dict = field(default_factory=dict)
    generator: torch.Generator | list[torch.Generator] | None = None
    image_size: tuple[int, int] | None = None
    latent_bound: float = 6.0
    unconditional_prompt: tuple | None = None  # ids and mask
    callback_on_step_end: Callable | None = None
    intermediate_every: int | None = None
    output_type: str = "pil"
    progress_bar: bool = False
    generation_mode: str | None = None

    def validate(self, config) -> None:
        """Refuse what cannot be drawn, before anything is.

        Raises:
            ValueError: the message names field, value and way out.
        """
        if not 1 <= self.num_inference_steps <= config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps} must lie in [1, num_train_timesteps="
                f"{config.num_train_timesteps}]"
            )
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale={self.guidance_scale} must not be negative; 1 is no guidance")
        if self.latent_bound <= 0:
            raise ValueError(f"latent_bound={self.latent_bound} must be positive; infinity is no bound")
        if self.intermediate_every is not None and self.intermediate_every < 1:
            raise ValueError(f"intermediate_every={self.intermediate_every} must be at least 1, or None")
        for name, allowed in (("output_type", ("pil", "pt", "latent")), ("generation_mode", (None, "text", "image"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {allowed}")
        build_scheduler(config, self.scheduler, **self.scheduler_kwargs)
        self.latent_size(config)

    def latent_size(self, config) -> tuple[int, int]:
        """Rows and columns of the latents of an image; `image_size` is in pixels."""
        if self.image_size is None:
            return tuple(config.latent_size)
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)
        multiple = config.vae_downsampling * config.patch_size
        if len(size) != 2 or any(side < 1 or side % multiple for side in size):
            raise ValueError(
                f"image_size={self.image_size} must be [height, width] in pixels, each a multiple of {multiple} "
                f"(VAE {config.vae_downsampling} x patch_size {config.patch_size})"
            )
        return size[0] // config.vae_downsampling, size[1] // config.vae_downsampling

    def unconditional_prompts(self, config, count: int, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of what guidance leads `count` sequences away from, with BOI at the end.  -> (R, L) twice

        Raises:
            ValueError: negative prompts of another number than the sequences.
        """
        ids, mask = self.unconditional_prompt or ([[] if config.bos_token_id is None else [config.bos_token_id]], None)
        ids = torch.as_tensor(ids, dtype=torch.long, device=device)
        ids = ids.view(-1, ids.shape[-1])
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, device=device).view_as(ids)
        if count % len(ids):
            raise ValueError(
                f"negative_prompt_ids has {len(ids)} rows for {count} sequences; give one for all or one for each prompt"
            )
        if not ids.shape[1] or (ids[:, -1] != config.boi_token_id).any():
            ids = F.pad(ids, (0, 1), value=config.boi_token_id)
            mask = F.pad(mask, (0, 1), value=1)
        return ids, mask


class Prefix:
    """Cached keys and values of R sequences, left-padded, and where they end.

    Attributes:
        keys, values: of each layer, (R, H, L, head_dim).
        mask: (R, L) 1 for tokens, 0 for padding.
        position: (R,) the position of the next token.
    """

    def __init__(
        self, keys: list[torch.Tensor], values: list[torch.Tensor], mask: torch.Tensor, position: torch.Tensor
    ):
        self.keys, self.values, self.mask, self.position = keys, values, mask, position

    @classmethod
    def of_cache(cls, cache: Cache, mask: torch.Tensor, position: torch.Tensor) -> "Prefix":
        return cls([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], mask, position)

    def rows(self, index: torch.Tensor, drop_last: int = 0) -> "Prefix":
        """Some of the sequences, without padding that all of them have, and without their last columns."""
        mask = self.mask[index]
        first = int(mask.long().argmax(dim=1).min()) if len(mask) else 0
        stop = mask.shape[1] - drop_last
        cut = [[x[index, :, first:stop] for x in tensors] for tensors in (self.keys, self.values)]
        return Prefix(*cut, mask[:, first:stop], self.position[index] - drop_last)

    def beside(self, other: "Prefix") -> "Prefix":
        """The sequences of both, padded on the left to the longer of the two."""
        length = max(self.mask.shape[1], other.mask.shape[1])

        def stack(mine, others):
            return torch.cat([_pad_left(mine, length, -2), _pad_left(others, length, -2)])

        keys = [stack(*pair) for pair in zip(self.keys, other.keys)]
        values = [stack(*pair) for pair in zip(self.values, other.values)]
        mask = torch.cat([_pad_left(self.mask, length, -1), _pad_left(other.mask, length, -1)])
        return Prefix(keys, values, mask, torch.cat([self.position, other.position]))

    def cache(self) -> Cache:
        """A cache that grows from here."""
        return Cache(layers=[_filled_layer(*pair) for pair in zip(self.keys, self.values)])

    def scratch(self, room: int) -> Cache:
        """A cache whose last `room` columns every forward writes anew; the prefix is copied once, here."""
        return Cache(layers=[ScratchLayer(*pair, room) for pair in zip(self.keys, self.values)])


def _pad_left(tensor: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def _filled_layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


class ScratchLayer(DynamicLayer):
    """The prefix of one layer, and room behind it that each denoising step overwrites."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length = keys.shape[-2]
        empty = keys.new_zeros(*keys.shape[:2], room, keys.shape[-1])
        self.keys, self.values = torch.cat([keys, empty], dim=-2), torch.cat([values, empty], dim=-2)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.keys[:, :, self.length :] = key_states
        self.values[:, :, self.length :] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


class ImageForward:
    """Forwards over [BOI,] an image [, EOI] behind a prefix, for images of one size.

    Args:
        model: a `MoTTransfusionModel`.
        prefix: of the R sequences that get an image; it ends with BOI, unless BOI belongs to the image's block.
        size: (h, w) of the latents.
        with_end: whether EOI is run as well, though it does not belong to the block: the pass that commits the image.
        cache: what the forwards write to.
    """

    def __init__(self, model, prefix: Prefix, size: tuple[int, int], with_end: bool, cache: Cache):
        config, device = model.config, prefix.mask.device
        self.model, self.config, self.cache, self.size = model, config, cache, size
        count, inside = len(prefix.mask), config.markers_in_image_block
        self.length = config.image_length(*size)
        self.before, self.after = int(inside), int(inside or with_end)
        total = self.before + self.length + self.after
        ids = torch.full((count, total), config.image_token_id, device=device)
        if self.before:
            ids[:, 0] = config.boi_token_id
        if self.after:
            ids[:, -1] = config.eoi_token_id
        self.input_ids = ids
        embeds = model.model.embed_tokens(ids)
        self.begin, self.end = embeds[:, : self.before], embeds[:, self.before + self.length :]
        is_patch = ids == config.image_token_id
        self.routing = ModalityRouting.from_modality_ids(torch.where(is_patch, config.image_modality, 0), config)
        steps = torch.arange(total, device=device)
        if config.image_positions == "shared":
            steps = torch.zeros_like(steps) if inside else (steps >= self.length).long()
        self.position_ids = prefix.position[:, None] + steps
        of_image = torch.zeros_like(ids) if inside else torch.where(is_patch, 0, -1)
        blocks = F.pad(of_image, (prefix.mask.shape[1], 0), value=-1)
        self.mask = torch.cat([prefix.mask, torch.ones_like(ids)], dim=1)
        self.attention = attention_mask_for(config, embeds, self.mask, cache, None, None, ImageBlocks(blocks))

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor | float) -> tuple[torch.Tensor, Any]:
        """(R, C, h, w), or fewer that are repeated -> hidden states (R, total, D) and the patchifier's features"""
        timesteps = torch.as_tensor(timestep, device=latents.device).expand(len(latents))
        tokens, features = self.model.patchifier_tokens(latents, timesteps)
        times = len(self.input_ids) // len(latents)
        tokens, features = repeated(tokens, times), repeated(features, times)
        outputs = self.model.model(
            inputs_embeds=torch.cat([self.begin, tokens.to(self.begin.dtype), self.end], dim=1),
            routing=self.routing,
            attention_mask=self.attention,
            position_ids=self.position_ids,
            past_key_values=self.cache,
        )
        return outputs.last_hidden_state, features

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """What the model says is in noisy latents.  (R, C, h, w), or fewer that are repeated -> (R, C, h, w) float32"""
        hidden_states, features = self(latents, timestep)
        image = hidden_states[:, self.before : self.before + self.length]
        return self.model.patchifier.predict(image, features, *self.size).float()


def repeated(features, times: int):
    """What a patchifier keeps of N images, for N * times of them."""
    if features is None or times == 1:
        return features
    if isinstance(features, tuple):
        return tuple(repeated(part, times) for part in features)
    return torch.cat([features] * times)


@torch.no_grad()
def denoise(
    model,
    prefix: Prefix,
    unconditional: Prefix | None,
    settings: DiffusionSettings,
    generators: list[torch.Generator | None],
    rows: list[int],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Latents of one image behind each of R prefixes.

    Args:
        unconditional: R prefixes of the unconditional prompt, for classifier-free guidance; both run as one batch.
        generators: of each image's noise; None for the global one.
        rows: which sequences of the batch these are, for the callback.

    Returns:
        (R, C, h, w) clean latents, and estimates of them every `intermediate_every` steps.
    """
    config, device = model.config, prefix.mask.device
    size = settings.latent_size(config)
    scheduler = build_scheduler(config, settings.scheduler, **settings.scheduler_kwargs)
    scheduler.set_timesteps(settings.num_inference_steps, device=device)
    count = len(prefix.mask)
    both = prefix if unconditional is None else prefix.beside(unconditional)
    room = config.image_length(*size) + 2 * config.markers_in_image_block
    forward = ImageForward(model, both, size, with_end=False, cache=both.scratch(room))

    shape = (1, config.latent_channels, *size)
    latents = torch.cat([_randn(shape, generator, device) for generator in generators])
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    own = None if generators[0] is None else generators
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_kwargs = {"generator": own} if takes_generator else {}
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    intermediates = []
    for step, timestep in enumerate(
        logging.tqdm(scheduler.timesteps, disable=not settings.progress_bar, desc="denoising")
    ):
        noisy = scale(latents, timestep)
        if unconditional is None:
            prediction = forward.predict(noisy, timestep)
        else:
            guided, free = forward.predict(noisy, timestep).chunk(2)
            prediction = free + settings.guidance_scale * (guided - free)
        prediction = model.noise_schedule.bounded(prediction, noisy, timestep, settings.latent_bound)
        stepped = scheduler.step(prediction, timestep, latents, **step_kwargs)
        latents = stepped.prev_sample
        if settings.intermediate_every is not None and (step + 1) % settings.intermediate_every == 0:
            estimate = getattr(stepped, "pred_original_sample", None)
            intermediates.append(latents if estimate is None else estimate)
        if settings.callback_on_step_end is not None:
            changed = settings.callback_on_step_end(model, step, timestep, {"latents": latents, "rows": rows})
            latents = (changed or {}).get("latents", latents)
    assert len(latents) == count
    return latents, intermediates


def _randn(shape: tuple, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)
