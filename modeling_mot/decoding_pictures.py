"""Draw images in diffusion mode: the prefix stays in the cache, each step runs the image's tokens alone.

The paper's appendix A.2 describes the mode. `DiffusionSettings` holds the options, `Denoising` the latents on their way
from noise to clean, `ImageForward` runs the model over an image behind cached prefixes, and `commit` puts the clean
image into the cache. Guidance predicts an image behind other contexts too, which are parts of the prompt:
`contexts_of` names them, `kept_tokens` says which tokens they keep, and `guided` combines the predictions.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging

from .attention_masks import (
    RANGES,
    AttentionPlan,
    ImageBlocks,
    TowerSight,
    attention_mask_for,
    find_image_blocks,
    find_placeholders,
    times_of,
)
from .checks_arguments import MOST_SCALE, check_generator
from .checks_fields import (
    Maybe,
    Number,
    OneOf,
    Several,
    Typed,
    Whole,
    check_fields,
    check_names,
    is_real,
    is_whole,
)
from .decoding_lean import DecodingCache, Prefix
from .latent_grid import Grid, VideoSize
from .latent_images import TIME_SPACINGS, build_scheduler, noise_shares, set_times
from .tower_routing import ModalityRouting


# R images drawn together, L cached columns, T tokens of an image with its markers, C latent channels, (h, w) latents,
# K key heads, d head size, D hidden size, V vocabulary

Generators = list[torch.Generator | None]  # one for each sequence
SCHEDULER_NUMBERS = 10**6  # the largest whole number among the arguments of a scheduler
EDGE = 1e-6  # times as near as this to an end of `guidance_interval` are at it, because both were rounded
SETTINGS_RULES = {
    "image_guidance_scale": Maybe(Number(0, MOST_SCALE)),
    "guidance_form": OneOf(("nested", "sum")),
    "guidance_renorm": OneOf(("none", "global", "channel", "text_channel")),
    "guidance_renorm_min": Number(0, 1),
    "guidance_interval": Several(Number(0, 1), count=2),
    "time_spacing": OneOf(TIME_SPACINGS),
    "timestep_shift": Maybe(Number(0, SCHEDULER_NUMBERS, open="low")),
    "num_frames": Maybe(Whole(1, 2**16)),
    "frames_per_second": Maybe(Number(open="low")),
    "editing": Maybe(Typed(dict)),
    "think": Typed(bool),
    "max_think_tokens": Whole(1, 2**20),
}
# The settings that `editing` may give.
EDITING = (
    "guidance_scale", "image_guidance_scale", "guidance_form", "guidance_renorm", "guidance_renorm_min",
    "guidance_interval", "num_inference_steps", "time_spacing", "timestep_shift",
)  # fmt: skip
SIZE_OF_PROMPT = "prompt"  # the `image_size` of the last image in a prompt
# The contexts of guidance beside the whole prompt.
UNCONDITIONAL = "unconditional"  # nothing of the prompt, or a negative prompt
WITHOUT_TEXT = "without_text"  # the prompt without its last text
WITHOUT_IMAGES = "without_images"  # the texts of the prompt


@dataclass
class DiffusionSettings:
    """The options of drawing; `MoTTransfusionGenerationMixin.generate` describes each."""

    guidance_scale: float = 1.0
    image_guidance_scale: float | None = None
    guidance_form: str = "nested"
    guidance_renorm: str = "none"
    guidance_renorm_min: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    num_inference_steps: int = 250
    time_spacing: str = "scheduler"
    timestep_shift: float | None = None
    scheduler: str = "ddpm"
    scheduler_kwargs: dict = field(default_factory=dict)
    generator: torch.Generator | list[torch.Generator] | None = None
    image_size: tuple[int, int] | str | None = None
    num_frames: int | None = None
    frames_per_second: float | None = None
    first_frames: torch.Tensor | None = None
    latent_bound: float = 6.0
    unconditional_prompt: tuple | None = None  # ids and mask, as `negative_prompt` makes them
    prompt_sizes: list | None = None  # of the last image in each prompt, as `sizes_of_prompts` finds them
    editing: dict | None = None
    think: bool = False
    max_think_tokens: int = 1000
    callback_on_step_end: Callable | None = None
    intermediate_every: int | None = None
    output_type: str = "pil"
    progress_bar: bool = False
    generation_mode: str | None = None

    def validate(self, config) -> None:
        """Refuse options that cannot be drawn by, before anything is drawn.

        Raises:
            ValueError: the message names field, value and way out.
        """
        # Numbers.
        steps, levels = self.num_inference_steps, config.num_train_timesteps
        if not is_whole(steps) or steps > levels:
            raise ValueError(
                f"num_inference_steps={steps!r} must lie in [1, num_train_timesteps={levels}] and be a whole number"
            )
        if not is_real(self.guidance_scale) or not 0 <= self.guidance_scale <= MOST_SCALE:
            raise ValueError(
                f"guidance_scale={self.guidance_scale!r} must not be negative, and must be at most {MOST_SCALE:g}; 1 "
                "is no guidance"
            )
        if self.latent_bound != math.inf and not (is_real(self.latent_bound) and 0 < self.latent_bound <= MOST_SCALE):
            raise ValueError(
                f"latent_bound={self.latent_bound!r} must be positive, and at most {MOST_SCALE:g}; infinity is no bound"
            )
        if self.intermediate_every is not None and not is_whole(self.intermediate_every):
            raise ValueError(
                f"intermediate_every={self.intermediate_every!r} must be a whole number of at least 1, or None"
            )

        # Words, functions and objects.
        for name, allowed in (("output_type", ("pil", "pt", "latent")), ("generation_mode", (None, "text", "image"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {allowed}")
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise ValueError(f"callback_on_step_end={self.callback_on_step_end!r} cannot be called")
        if not isinstance(self.progress_bar, bool):
            raise ValueError(f"progress_bar={self.progress_bar!r} must be True or False")
        check_generator(self.generator)
        check_fields(self, SETTINGS_RULES)
        self._check_guidance()
        for size in set(self.latent_sizes(config)):
            self._check_scheduler(config, size)
            self._check_frames(config, size)
        if self.think and self.generation_mode is None:
            raise ValueError(
                "think=True needs generation_mode='text' or 'image', since a thought is asked for before an answer of "
                "one kind"
            )
        # What holds for prompts with images.
        if self.editing is not None:
            check_names(self.editing, EDITING, "setting in editing")
            self.for_prompt(has_images=True).validate(config)

    def for_prompt(self, has_images: bool) -> "DiffusionSettings":
        """Return the settings of a prompt with images in it, or of one without."""
        return replace(self, editing=None, **self.editing) if has_images and self.editing is not None else self

    @property
    def writes_thoughts(self) -> bool:
        """True if a thought is written before each picture."""
        return self.think and self.generation_mode == "image"

    def _check_frames(self, config, size: tuple[int, int]) -> None:
        """Refuse a video of a model that draws none, and first frames that are not of its size."""
        given = self.first_frames
        if self.num_frames is None:
            if given is not None or self.frames_per_second is not None:
                raise ValueError("first_frames and frames_per_second are of videos: give num_frames too")
            return
        if config.image_positions != "grid" or config.vae_config is not None or self.guidance_renorm != "none":
            raise ValueError(
                f"num_frames={self.num_frames} draws a video, as latents of a model with image_positions='grid' and "
                f"without vae_config, and with guidance_renorm='none'; here image_positions={config.image_positions!r} "
                f"and guidance_renorm={self.guidance_renorm!r}"
            )
        if given is not None:
            shape = (config.latent_channels, *size)
            fits = isinstance(given, torch.Tensor) and given.dim() == 5 and (given.shape[1], *given.shape[3:]) == shape
            if not fits or not 0 < given.shape[2] < self.num_frames:
                found = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
                raise ValueError(
                    f"first_frames is {found}, and must be a tensor (prompts, {shape[0]}, frames, {size[0]}, {size[1]})"
                    f" with fewer frames than num_frames={self.num_frames}"
                )

    def _check_guidance(self) -> None:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval={self.guidance_interval!r} must be [low, high] with low < high")
        if self.guidance_renorm == "text_channel" and self.guidance_form == "sum":
            raise ValueError(
                "guidance_renorm='text_channel' renormalises the inner step of guidance_form='nested', and "
                "guidance_form='sum' has none; take 'global' or 'channel'"
            )
        if self.image_guidance_scale is not None and self.unconditional_prompt is not None:
            raise ValueError(
                f"negative_prompt_ids came with image_guidance_scale={self.image_guidance_scale!r}, which leads away "
                "from the prompt without its text and not from another text; leave one of them out"
            )

    def _check_scheduler(self, config, size: tuple[int, int]) -> None:
        if not isinstance(self.scheduler, str):
            raise ValueError(f"scheduler={self.scheduler!r} must be a name, such as 'ddpm'")
        if not isinstance(self.scheduler_kwargs, Mapping):
            raise ValueError(f"scheduler_kwargs={self.scheduler_kwargs!r} must be a dictionary")
        for name, value in self.scheduler_kwargs.items():
            # Some schedulers build lists or tables of that length.
            if is_whole(value) and value > SCHEDULER_NUMBERS or isinstance(value, float) and math.isnan(value):
                raise ValueError(f"scheduler_kwargs has {name}={value!r}; numbers may be at most {SCHEDULER_NUMBERS}")
        if self.timestep_shift is not None and not config.is_flow:
            raise ValueError(
                f"timestep_shift={self.timestep_shift!r} shifts the times of flow matching, not those of "
                f"prediction_type={config.prediction_type!r}; leave it out"
            )
        scheduler = self.built_scheduler(config, size)
        if self.time_spacing != "scheduler":
            set_times(scheduler, self.time_spacing, self.num_inference_steps)

    def built_scheduler(self, config, size: tuple[int, int]):
        """Build the scheduler of images of h x w latents."""
        shift = self.timestep_shift
        if shift is None and config.is_flow:
            shift = config.shift_of(*size)
        return build_scheduler(config, self.scheduler, shift, **self.scheduler_kwargs)

    def latent_sizes(self, config) -> list[tuple[int, int]]:
        """Return the rows and columns of latents of the images to be drawn, for each prompt, or one for all.

        Raises:
            ValueError: sides that are no multiples of a patch.
        """
        if self.image_size == SIZE_OF_PROMPT:
            return [tuple(size or config.latent_size) for size in self.prompt_sizes or [None]]
        if self.image_size is None:
            return [tuple(config.latent_size)]
        size = self.image_size if isinstance(self.image_size, (list, tuple)) else [self.image_size] * 2
        patch = 1 if config.partial_patches else config.patch_size
        multiple = config.vae_downsampling * patch
        if len(size) != 2 or not all(is_whole(side) and side % multiple == 0 for side in size):
            raise ValueError(
                f"image_size={self.image_size!r} must be [height, width] in pixels, each a multiple of {multiple} "
                f"(VAE {config.vae_downsampling} x patch_size {patch}), or {SIZE_OF_PROMPT!r} for the size of the "
                "last image in each prompt"
            )
        return [(size[0] // config.vae_downsampling, size[1] // config.vae_downsampling)]

    def sizes(self, config) -> "list[tuple[int, int] | VideoSize]":
        """Return the sizes of what is drawn, for each prompt, or one for all: of images' latents, or of videos'."""
        sizes = self.latent_sizes(config)
        if self.num_frames is None:
            return sizes
        given = 0 if self.first_frames is None else self.first_frames.shape[2]
        return [VideoSize(self.num_frames, *size, given, self.frames_per_second) for size in sizes]

    def unconditional_prompts(self, config, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prompts that guidance leads away from: one for all, or one for each prompt.

        -> ids and mask, (R, L) each, with BOI at the end
        """
        if self.unconditional_prompt is None:
            ids = torch.tensor([[] if config.bos_token_id is None else [config.bos_token_id]], dtype=torch.long)
            ids, mask = ids.to(device), torch.ones_like(ids, device=device)
        else:
            ids, mask = (tensor.to(device) for tensor in self.unconditional_prompt)
        if not ids.shape[1] or (ids[:, -1] != config.boi_token_id).any():
            ids = F.pad(ids, (0, 1), value=config.boi_token_id)
            mask = F.pad(mask, (0, 1), value=1)
        return ids, mask


# ------------------------------------------------------------------------------------------------------------ guidance


def plane_of(size: "tuple[int, int] | VideoSize") -> tuple[int, int]:
    """Return the rows and columns of latents of an image, or of each frame of a video."""
    return (size.height, size.width) if isinstance(size, VideoSize) else size


def length_of(config, size: "tuple[int, int] | VideoSize") -> int:
    """Count the tokens of an image or a video, without markers."""
    return config.image_length(*plane_of(size)) * (size.frames if isinstance(size, VideoSize) else 1)


def contexts_of(settings, has_images: bool) -> tuple[str, ...]:
    """Name the contexts beside the whole prompt that guidance needs, in the order that `guided` takes them.

    Args:
        settings: `DiffusionSettings`.
        has_images: True if images stand in the prompt. Without them there is no guidance by images.
    """
    images = settings.image_guidance_scale
    by_images = has_images and images not in (None, 1)
    is_nested = settings.guidance_form == "nested"
    if settings.guidance_scale == 1 and (is_nested or not by_images):
        return ()
    if images is None:
        return (UNCONDITIONAL,)
    if not by_images:
        return (WITHOUT_TEXT,)
    return (WITHOUT_TEXT, WITHOUT_IMAGES if is_nested else UNCONDITIONAL)


def kept_tokens(config, context: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mark the tokens of prompts that a context keeps; a BOI at the end is none of them.  (R, L) twice -> (R, L) bool

    The last text of a prompt is what stands behind its last image, or before it if nothing stands behind. A text also
    ends at EOS, and BOS at the beginning belongs to no text.
    """
    in_prompt = mask != 0
    in_prompt[:, -1] &= ids[:, -1] != config.boi_token_id
    is_text = in_prompt & (find_image_blocks(find_placeholders(config, ids), None, with_markers=True) < 0)
    if context == WITHOUT_IMAGES:
        return is_text

    # The last of the runs of text, numbered from 1; 0 elsewhere.
    if config.bos_token_id is not None:
        is_text &= ~((in_prompt.cumsum(dim=1) == 1) & (ids == config.bos_token_id))
    ends = [] if config.eos_token_id is None else config.eos_token_id
    is_end = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device))
    begins = is_text.clone()
    begins[:, 1:] &= ~is_text[:, :-1] | is_end[:, :-1]
    runs = begins.cumsum(dim=1) * is_text
    return in_prompt & ((runs == 0) | (runs < runs.amax(dim=1, keepdim=True)))


def guided(settings, patch_size: int, whole: torch.Tensor, *contexts: torch.Tensor) -> torch.Tensor:
    """Combine the predictions of pictures behind their prompts with those behind other contexts.

    With a the `guidance_scale` and b the `image_guidance_scale`, and predictions v behind the whole prompt:

        g = without_text + a (v - without_text)
        nested: without_images + b (g - without_images)                         (BAGEL, arXiv 2505.14683)
        sum: unconditional + b (without_text - unconditional) + a (v - without_text)
                                                              (InstructPix2Pix, arXiv 2211.09800, equation 3)

    Both are g if b is 1. Renormalisation multiplies the result by |v| / |result|, bounded by `guidance_renorm_min` and
    1. The norms are those of each picture ("global") or of each patch ("channel"); "text_channel" renormalises the
    patches of g, and not the result.

    Args:
        settings: `DiffusionSettings`.
        whole, contexts: (R, C, h, w) each, the contexts in the order of `contexts_of`.

    Returns:
        (R, C, h, w).
    """
    if not contexts:
        return whole
    scale, least = settings.guidance_scale, settings.guidance_renorm_min
    without_text, *others = contexts
    result = without_text + scale * (whole - without_text)
    if settings.guidance_renorm == "text_channel":
        result = _renormalised(result, whole, least, patch_size)
    if others:
        # Both formulas, solved for what the second scale adds to g.
        base = result if settings.guidance_form == "nested" else without_text
        result = result + (settings.image_guidance_scale - 1) * (base - others[0])
    if settings.guidance_renorm == "global":
        result = _renormalised(result, whole, least, None)
    elif settings.guidance_renorm == "channel":
        result = _renormalised(result, whole, least, patch_size)
    return result


def _renormalised(result: torch.Tensor, whole: torch.Tensor, least: float, patch_size: int | None) -> torch.Tensor:
    """Shrink a guided prediction to the norm of the prediction behind the whole prompt.

    Args:
        result, whole: (R, C, h, w).
        least: the smallest factor.
        patch_size: p, for the norms of patches; None for the norms of whole pictures.
    """

    def norms(prediction):
        squares = prediction.square().sum(dim=1, keepdim=True)  # (R, 1, h, w)
        if patch_size is None:
            return squares.sum(dim=(2, 3), keepdim=True).sqrt()
        sums = F.avg_pool2d(squares, patch_size, ceil_mode=True, divisor_override=1)  # (R, 1, h/p, w/p)
        return sums.sqrt()

    factors = (norms(whole) / (norms(result) + 1e-8)).clamp(least, 1)
    if patch_size is not None:
        factors = factors.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)
        factors = factors[:, :, : result.shape[2], : result.shape[3]]  # the last patches may be partial
    return result * factors


# ------------------------------------------------------------------------------------------------- from noise to clean


class Denoising:
    """Latents of R images of one size on their way from noise to clean.

    Args:
        generators: of each image's noise; None for the global one.
        settings: of these images; see `DiffusionSettings.for_prompt`.
        rows: the places of the images' sequences in the batch, for the callback.
        has_images: True if images stand in the prompts, by which guidance may lead too.
        size: (h, w) of the latents, or a `VideoSize`.
        first_frames: (R, C, k, h, w) of videos, without noise; None for none.

    Attributes:
        latents: (R, C, h, w), of videos (R, C, f, h, w)
        step: how many steps are done.
        shares: of noise, of what each step starts from.
        contexts: beside the prompts, behind which the images are predicted at guided steps.
        estimates: of the clean latents, every `intermediate_every` steps.
    """

    def __init__(
        self,
        model,
        settings: DiffusionSettings,
        generators: Generators,
        rows: list[int],
        has_images: bool,
        size: "tuple[int, int] | VideoSize",
        first_frames: torch.Tensor | None = None,
    ):
        config, device = model.config, model.device
        self.model = model
        self.settings = settings
        self.rows = rows
        self.size = size
        self.step = 0
        self.estimates: list[torch.Tensor] = []
        self.contexts = contexts_of(settings, has_images)
        self.scheduler = settings.built_scheduler(config, plane_of(size))
        set_times(self.scheduler, settings.time_spacing, settings.num_inference_steps, device)
        self.shares = noise_shares(self.scheduler, config)

        # Each image begins as noise of its own generator, from which a scheduler with random steps draws too.
        shape = (1, config.latent_channels, *self.size[:3])
        self.latents = torch.cat([_randn(shape, generator, device) for generator in generators])
        self.latents = self.latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        if first_frames is not None:
            self.latents[:, :, : first_frames.shape[2]] = first_frames.to(self.latents)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        self.step_kwargs = {"generator": None if generators[0] is None else generators} if takes_generator else {}
        self.bar = logging.tqdm(total=self.num_steps, disable=not settings.progress_bar, desc="denoising")

    @property
    def num_steps(self) -> int:
        return len(self.scheduler.timesteps)

    @property
    def is_done(self) -> bool:
        return self.step == self.num_steps

    @property
    def is_guided(self) -> bool:
        """True if the next step needs predictions behind `contexts`."""
        low, high = self.settings.guidance_interval
        return bool(self.contexts) and low < self.shares[self.step] - EDGE and self.shares[self.step] <= high + EDGE

    @property
    def timestep(self) -> torch.Tensor:
        return self.scheduler.timesteps[self.step]

    def noisy(self) -> torch.Tensor:
        """Return the latents as the model is to see them.  -> (R, C, h, w)"""
        scale = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        return scale(self.latents, self.timestep)

    def advance(self, noisy: torch.Tensor, *predictions: torch.Tensor) -> None:
        """Take one step.

        Args:
            noisy: (R, C, h, w) of `noisy()`.
            predictions: (R, C, h, w) of the model for them, behind the prompts and, if the step `is_guided`, behind
                each of `contexts`.

        Raises:
            ValueError: the callback left no finite latents of the same shape.
        """
        settings, timestep, schedule = self.settings, self.timestep, self.model.noise_schedule
        velocities = (schedule.velocity(prediction, noisy, self.shares[self.step]) for prediction in predictions)
        prediction = guided(settings, self.model.config.patch_size, *velocities)
        if isinstance(self.size, VideoSize):
            prediction[:, :, : self.size.given] = 0  # given frames stay

        # The scheduler's step, from a prediction that implies no clean latent beyond the bound.
        prediction = schedule.bounded(prediction, noisy, timestep, settings.latent_bound)
        stepped = self.scheduler.step(prediction, timestep, self.latents, **self.step_kwargs)
        self.latents = stepped.prev_sample
        if settings.intermediate_every is not None and (self.step + 1) % settings.intermediate_every == 0:
            estimate = getattr(stepped, "pred_original_sample", None)
            self.estimates.append(self.latents if estimate is None else estimate)

        # The callback may change the latents.
        if settings.callback_on_step_end is not None:
            shape, state = self.latents.shape, {"latents": self.latents, "rows": self.rows}
            changed = settings.callback_on_step_end(self.model, self.step, timestep, state)
            self.latents = self._checked(changed, shape)
        self.step += 1
        self.bar.update()
        if self.is_done:
            self.bar.close()

    def _checked(self, changed: Any, shape: torch.Size) -> torch.Tensor:
        """Return the latents to go on with after a callback, which may also have written into its argument.

        Raises:
            ValueError: the callback left no latents of this shape, or latents that are not finite.
        """
        if changed is not None and not isinstance(changed, Mapping):
            raise ValueError(
                f"callback_on_step_end returned {type(changed).__name__}; it may return nothing, or "
                '{"latents": tensor}'
            )
        latents = (changed or {}).get("latents", self.latents)
        if not isinstance(latents, torch.Tensor):
            raise ValueError(f"callback_on_step_end returned latents that are {type(latents).__name__}, not a tensor")
        if latents.shape != shape or not latents.is_floating_point():
            raise ValueError(
                f"callback_on_step_end made latents of {latents.dtype} and shape {tuple(latents.shape)}; they must "
                f"stay floats of {tuple(shape)}"
            )
        latents = latents.detach().to(self.latents)
        check_finite(latents, f"after callback_on_step_end of step {self.step}")
        return latents


@torch.no_grad()
def denoise(drawing: Denoising, prefixes: list[Prefix], contexts: list[Prefix]) -> None:
    """Take all steps of R images.

    Args:
        prefixes: of the R sequences.
        contexts: R prefixes for each of the drawing's contexts, which run in the same batch at the steps that are
            guided.
    """
    forward, was_guided = None, None
    places = torch.arange(len(prefixes), device=drawing.latents.device)
    while not drawing.is_done:
        if drawing.is_guided != was_guided:
            forward = None  # its memory is free before more is taken
            was_guided = drawing.is_guided
            behind = prefixes + contexts if was_guided else prefixes
            forward = ImageForward(drawing.model, behind, drawing.size)
            index = places.repeat(len(behind) // len(prefixes)) if was_guided else None
        noisy = drawing.noisy()
        drawing.advance(noisy, *forward.predict(noisy, drawing.timestep, index).split(len(prefixes)))


def check_finite(latents: torch.Tensor, when: str) -> None:
    """Refuse latents that no picture can be made of.

    Raises:
        ValueError: latents are NaN or infinite; the message names the moment.
    """
    if not latents.isfinite().all():
        raise ValueError(f"latents are not finite {when}: look for NaN in what came in, and lower guidance_scale")


def _randn(shape: tuple, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


# ------------------------------------------------------------------------------------ a forward behind cached prefixes


class ImageForward:
    """Forwards over [BOI,] an image or a video [, EOI] behind prefixes, for images of one size.

    Args:
        model: a `MoTTransfusionModel`.
        prefixes: of the R sequences that get an image; they end with BOI, unless BOI belongs to the image's block.
        size: (h, w) of the latents; or a `VideoSize`, and latents are (N, C, f, h, w) everywhere.
        with_end: True to run EOI even if it does not belong to the block: the pass that commits the clean image.

    Attributes:
        hidden: (R, T) bool, the tokens that text does not see; None where it sees all.
        seen: the arguments of `_seen`, the same in all forwards.
    """

    def __init__(self, model, prefixes: list[Prefix], size: tuple[int, int], with_end: bool = False):
        config, device = model.config, model.device
        self.model = model
        self.config = config
        self.video = size if isinstance(size, VideoSize) else None
        self.size = plane_of(size)
        self.is_clean = with_end

        # The tokens: markers have embeddings, patches are put between them in each forward.
        count, inside = len(prefixes), config.markers_in_image_block
        self.length = length_of(config, size)
        self.before = int(inside)
        self.after = int(inside or with_end)
        total = self.before + self.length + self.after
        markers = torch.tensor([config.boi_token_id, config.eoi_token_id], device=device).expand(count, 2)
        embeds = model.model.embed(markers)
        self.begin = embeds[:, : self.before]
        self.end = embeds[:, 2 - self.after :]
        is_patch = torch.zeros(count, total, dtype=torch.bool, device=device)
        is_patch[:, self.before : self.before + self.length] = True
        self.routing = ModalityRouting.from_modality_ids(torch.where(is_patch, config.image_modality, 0), config)

        # The positions follow those of the prefixes.
        begin = torch.tensor([prefix.position for prefix in prefixes], device=device)
        if config.image_positions == "grid":
            frames = () if self.video is None else (self.video.frames, self.video.frames_per_second)
            grid = Grid.of(config, self.size, *frames)
            end = (begin + grid.advance).view(1, -1, 1).expand(3, -1, self.after)
            self.position_ids = torch.cat([grid.at(config, begin), end], dim=2)
        else:
            steps = torch.arange(total, device=device)
            if config.image_positions == "shared":
                steps = torch.zeros_like(steps) if inside else (steps >= self.length).long()
            self.position_ids = begin[:, None] + steps

        # The prefixes are copied once for all forwards.
        self.layers = []
        for layer in range(len(prefixes[0].keys)):
            keys = [prefix.keys[layer] for prefix in prefixes]
            values = [prefix.values[layer] for prefix in prefixes]
            self.layers.append(ScratchLayer(keys, values, total, embeds.dtype))
        missing = torch.tensor([self.layers[0].length - prefix.length for prefix in prefixes], device=device)
        self.hidden = is_patch if config.hides_images else None
        self.seen = self._seen(embeds.new_empty(0).expand(count, total, 0), is_patch, missing, self._sight(prefixes))

    def _sight(self, prefixes: list[Prefix]) -> TowerSight | None:
        """Find which towers see which: of the prefixes' columns, text does not see those of images."""
        if not self.config.unseen_towers:
            return None
        longest, device = self.layers[0].length, self.begin.device
        of_text, of_image = (self.config.tower_of_modality[modality] for modality in (0, self.config.image_modality))
        towers = torch.full((len(prefixes), longest), of_text, device=device)
        for row, prefix in enumerate(prefixes):
            if prefix.hidden is not None:
                towers[row, longest - prefix.length :].masked_fill_(prefix.hidden, of_image)
        own = self.routing.tower_ids(len(prefixes), device)
        return TowerSight.of(self.config, torch.cat([towers, own], dim=1))

    def _seen(
        self, rows: torch.Tensor, is_patch: torch.Tensor, missing: torch.Tensor, sight: TowerSight | None
    ) -> dict:
        """Return the cache and the visibility of its keys, as arguments of the model's forward.

        All tokens of the block see each other, EOI behind the block sees them, and padding before prefixes is hidden.

        Args:
            rows: (R, T, any size), read for its shape, dtype and device.
            is_patch: (R, T) bool.
            missing: (R,) how much shorter each prefix is than the longest.
            sight: which towers see which; None where all see all.
        """
        config, longest, total = self.config, self.layers[0].length, is_patch.shape[1]
        cache = Cache(layers=self.layers)
        in_block = torch.ones_like(is_patch) if config.markers_in_image_block else is_patch
        on_ranges = config._attn_implementation == RANGES and rows.device.type == "cpu" and sight is None
        if on_ranges and rows.dtype != torch.float32:
            # Each token sees a range of keys. In float32 torch's own kernel with a mask is as fast.
            last = longest + torch.where(in_block, int(in_block[0].sum()) - 1, total - 1)
            plan = AttentionPlan.from_ranges(missing[:, None].expand_as(last), last)
            return {"past_key_values": cache, "attention_plan": plan}

        # Elsewhere it is a mask, made once and not in each forward.
        blocks = ImageBlocks(F.pad(torch.where(in_block, 0, -1), (longest, 0), value=-1))
        mask = (torch.arange(longest + total, device=rows.device) >= missing[:, None]).long()
        mask = attention_mask_for(config, rows, mask, cache, None, None, blocks, sight=sight)
        return {"past_key_values": cache, "attention_mask": mask}

    def __call__(
        self, latents: torch.Tensor, timestep: torch.Tensor | float, index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        """Run the model over images at their timesteps.  -> hidden states (R, T, D), the patchifier's features

        Args:
            latents: (N, C, h, w)
            timestep: of all, or (N,).
            index: (R,) the place among the latents of each sequence's image; default: N = R, in their order.
        """
        timesteps = torch.as_tensor(timestep, device=latents.device).expand(len(latents))
        clean = torch.full_like(timesteps, self.is_clean, dtype=torch.bool)
        if self.video is not None:
            # Each frame is an image; those that are given have no noise.
            count, frames = len(latents), self.video.frames
            latents = latents.transpose(1, 2).flatten(0, 1)
            timesteps = timesteps.repeat_interleave(frames)
            is_given = torch.arange(frames, device=clean.device) < self.video.given
            clean = (clean[:, None] | is_given).flatten()
        tokens, features = self.model.patchifier_tokens(latents, timesteps, clean)
        if self.video is not None:
            tokens = tokens.unflatten(0, (count, frames)).flatten(1, 2)
        if index is not None:
            tokens, features = taken(tokens, index), taken(features, index)
        outputs = self.model.model(
            inputs_embeds=torch.cat([self.begin, tokens.to(self.begin.dtype), self.end], dim=1),
            routing=self.routing,
            position_ids=self.position_ids,
            **self.seen,
        )
        return outputs.last_hidden_state, features

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor | float, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise (or `prediction_type`) in latents; arguments as above.  -> (R, C, h, w) float32"""
        hidden_states, features = self(latents, timestep, index)
        image = hidden_states[:, self.before : self.before + self.length]
        if self.video is None:
            return self.model.patchifier_latents(image, features, *self.size)
        frames = image.unflatten(1, (self.video.frames, -1)).flatten(0, 1)
        prediction = self.model.patchifier_latents(frames, features, *self.size)
        return prediction.unflatten(0, (len(image), -1)).transpose(1, 2)

    def written(self, row: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
        """Return what the last forward made for one sequence: `DecodingCache.extend` appends it

        -> keys and values of each layer, (K, T, d), and `hidden`, (T,) bool or None
        """
        keys = [layer.keys[row, :, layer.length :] for layer in self.layers]
        values = [layer.values[row, :, layer.length :] for layer in self.layers]
        return keys, values, None if self.hidden is None else self.hidden[row]


class ScratchLayer(DynamicLayer):
    """The prefixes of one layer, padded on the left to the longest, with columns behind them for each forward.

    A forward overwrites the columns of the one before it, so that prefixes are copied once.

    Args:
        keys, values: of each sequence, (K, L, d).
        room: T, the columns behind the prefixes.
    """

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], room: int, dtype: torch.dtype):
        super().__init__()
        self.length = max(tensor.shape[1] for tensor in keys)
        shape = (len(keys), keys[0].shape[0], self.length + room)
        filled = [tensors[0].new_zeros(*shape, tensors[0].shape[2], dtype=dtype) for tensors in (keys, values)]
        self.lazy_initialization(*filled)
        self.keys = filled[0]
        self.values = filled[1]
        for mine, tensors in ((self.keys, keys), (self.values, values)):
            for row, tensor in enumerate(tensors):
                mine[row, :, self.length - tensor.shape[1] : self.length] = tensor

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write behind the prefixes and return all: (R, K, T, d) -> (R, K, L + T, d), twice."""
        self.keys[:, :, self.length :] = key_states
        self.values[:, :, self.length :] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


def taken(features, index: torch.Tensor):
    """Index a patchifier's features of N images: None, a tensor, or tuples of them."""
    if features is None:
        return None
    if isinstance(features, tuple):
        return tuple(taken(part, index) for part in features)
    return features[index]


def commit(
    model,
    cache: DecodingCache,
    rows: list[int],
    prefixes: list[Prefix],
    latents: torch.Tensor,
    size: "tuple[int, int] | VideoSize",
) -> tuple[torch.Tensor, list[int]]:
    """Run clean images of one size once, with EOI, and append them to rows of a cache.

    Args:
        prefixes: of these rows, behind which the images were drawn.
        latents: (R, C, h, w), or of videos.
        size: of the drawing.

    Returns:
        the next logits (R, V), and the positions that follow.
    """
    forward = ImageForward(model, prefixes, size, with_end=True)
    hidden_states, _ = forward(latents, 0)
    logits = model.lm_head(hidden_states[:, -1, : model.config.hidden_size]).float()

    # Nothing that can fail comes after the first change of the cache, because a server tries a failed commit again.
    cache.reserve(max(cache.lengths[row] for row in rows) - forward.before + hidden_states.shape[1])
    for place, row in enumerate(rows):
        cache.cut(row, cache.lengths[row] - forward.before)  # BOI is run again where it belongs to the image's block
        cache.extend(row, *forward.written(place))
    return logits, (times_of(forward.position_ids)[:, -1] + 1).long().tolist()
