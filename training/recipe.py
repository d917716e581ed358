"""A recipe: the sections of one YAML file, their checks, and the list of their keys.

`data` is described in training/data/config.py, `optimizer` in training/optimization.py, the other sections here.
"""

import difflib
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from modeling_mot import MoTConfig, MoTProcessor, MoTTransfusionConfig
from modeling_mot.configuration_presets import STYLES, VARIANTS
from modeling_mot.decoding_pictures import DiffusionSettings
from training.config import ConfigError, check_options, describe, option
from training.data.config import DataConfig, Segment, SourceConfig
from training.data.reading.records import text_of
from training.data.reading.sources import open_source
from training.model.adapters import FrozenDtype, LoraConfig
from training.optimization import OptimizerConfig, warmup_steps


@dataclass
class TransfusionModelConfig:
    """The fields that a Transfusion model adds. A field left at null has MoTTransfusionConfig's default."""

    vae: str = option("carried", "frozen autoencoder of images: carried, a diffusers folder or a name on the Hub")
    image_size: list[int] = option(
        factory=lambda: [64, 64], doc="height and width of pictures, in pixels", ge=1, le=10**5
    )
    patch_size: int | None = option(None, "a token stands for patch_size x patch_size latents", ge=1, le=1024)
    patchifier: Literal["unet", "linear"] | None = option(None, "from latents to hidden states and back")
    unet_channels: list[int] | None = option(
        None, "channels of the U-Net's down blocks, log2(patch_size) + 1 of them", ge=1, le=10**5
    )
    unet_layers: int | None = option(None, "residual layers of a down block", ge=1, le=1000)
    unet_norm_groups: int | None = option(None, "groups of the U-Net's group norms", ge=1, le=10**5)
    prediction_type: Literal["epsilon", "v_prediction", "flow", "flow_sample"] | None = option(
        None,
        "what the model predicts: the noise, the v of diffusers, the velocity of flow matching, or the clean latents "
        "that a velocity leads to",
    )
    noise_schedule: str | None = option(None, "diffusers' name of a beta schedule; null: the cosine schedule")
    num_train_timesteps: int | None = option(None, "noise levels", ge=1, le=10**6)
    timestep_sampling: Literal["uniform", "logit_normal", "beta"] | None = option(None, "how noise levels are drawn")
    timestep_sampling_parameters: list[float] | None = option(
        None, "mean and deviation of the logit, or alpha and beta of the Beta distribution"
    )
    timestep_range: list[float] | None = option(None, "[low, high] onto which drawn fractions are spread", ge=0, le=1)
    timestep_shift: float | list[list[float]] | None = option(
        None, "shift of flow matching's fractions, or pairs [tokens of an image, shift]", gt=0
    )
    smallest_divisor: float | None = option(None, "least t by which the loss of flow_sample divides", gt=0, le=1)
    timestep_format: Literal["index", "fraction"] | None = option(None, "what the timestep embedding sees")
    timestep_direction: Literal["noise", "clean"] | None = option(
        None, "whether the timestep embedding counts towards noise or towards clean latents, with flow matching"
    )
    timestep_addition: Literal["patch", "token", "noised_token"] | None = option(
        None,
        "what the linear patchifier adds the timestep embedding to: a patch, its token, or tokens with noise alone",
    )
    diffusion_loss_weight: float | None = option(None, "lambda of equation 4", ge=0)
    image_first_max_timestep: int | None = option(
        None,
        "largest noise level of an image that its caption follows (Transfusion's ablation: 500); null: no limit",
        ge=0,
    )
    image_positions: Literal["consecutive", "shared"] | None = option(None, "positions of an image's patches")
    markers_in_image_block: bool | None = option(None, "BOI and EOI see their image in both directions")
    noised_images_visible: bool | None = option(
        None, "whether later tokens see noised images; false: they see a clean copy that the data repeats (BAGEL)"
    )
    noised_images_advance: bool | None = option(
        None, "whether a noised image takes a position; false: its clean copy has the same one (BAGEL)"
    )
    latent_position_table: Literal["sincos"] | None = option(None, "a fixed 2-D table added to the patches; null: none")

    def __post_init__(self):
        check_options(self)
        if len(self.image_size) != 2:
            raise ConfigError(f"model.transfusion.image_size={self.image_size} must be [height, width]")

    def model_fields(self) -> dict[str, Any]:
        """Return the fields of MoTTransfusionConfig that the recipe sets."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v for name, v in values.items() if v is not None and name not in ("vae", "image_size")}


_VARIANT = Literal[VARIANTS]
_STYLE = Literal[tuple(STYLES)]


@dataclass
class ModelConfig:
    """The model that is trained.

    Sizes left at null come from the preset, or are MoTConfig's defaults; if all are null, they follow from the machine
    and the data (training/model/costs.py).
    """

    variant: _VARIANT = option("mot", "which modalities share weights and which towers hold experts")
    preset: str | None = option(None, "a row of the paper's tables, such as chameleon-37m; null: the sizes below")
    style: _STYLE | None = option(
        None, "QK-norm, norm position, dropout and z-loss of that Chameleon, as one set; null: none of them"
    )
    init_from: str | None = option(None, "folder or Hub name of a checkpoint to start from; its sizes are kept")
    processor: str | None = option(None, "folder or Hub name of a processor; null: the one carried with the project")
    modalities: list[str] | None = option(
        None, "modalities of a new model, text first; null: the processor's or, if no size is named, the data's"
    )
    image_tokens: int | None = option(
        None, "tokens of a picture that the processor must make, without markers; null: any number", ge=1, le=2**24
    )
    image_size: list[int] | None = option(
        None, "height and width of pictures, in pixels, that the processor must make; null: any", ge=1, le=10**5
    )
    hidden_size: int | None = option(None, "width of the residual stream", ge=1, le=10**6)
    intermediate_size: int | None = option(
        None, "width of the feed-forward; null: 8/3 of hidden_size, up to 256s", ge=1, le=10**7
    )
    num_hidden_layers: int | None = option(None, "number of layers", ge=1, le=10**4)
    num_attention_heads: int | None = option(None, "number of query heads", ge=1, le=10**4)
    num_key_value_heads: int | None = option(
        None, "number of key and value heads; null: as many as query heads", ge=1, le=10**4
    )
    head_dim: int | None = option(None, "width of a head; null: hidden_size / num_attention_heads", ge=2, le=10**5)
    max_position_embeddings: int | None = option(
        None, "longest row; null: the preset's, at least data.row_length", ge=1, le=10**9
    )
    hidden_act: str | None = option(None, "activation of the feed-forward, such as relu2; null: silu")
    gated_mlp: bool | None = option(None, "whether the feed-forward has a gate, as Llama's; null: it has")
    tower_configs: dict[str, dict[str, Any]] | None = option(
        None,
        "tower -> its own hidden_size, intermediate_size, hidden_act, gated_mlp, rms_norm_eps, norm_offset or qk_norm, "
        "such as {image: {hidden_size: 128}}; null: all towers alike",
    )
    norm_position: Literal["pre", "post"] | None = option(None, "pre: as Llama; post: as the paper's Algorithm 1")
    qk_norm: Literal["rms", "rms_all_heads", "layer"] | None = option(None, "norm of queries and keys; null: none")
    tie_word_embeddings: bool | None = option(None, "one matrix for input and output embeddings")
    hidden_dropout: float | None = option(None, "dropout on the outputs of attention and feed-forward", ge=0, lt=1)
    attention_dropout: float | None = option(None, "dropout on attention probabilities", ge=0, lt=1)
    z_loss_coefficient: float | None = option(None, "weight of log(Z)^2", ge=0, le=1000)
    rope_theta: float | None = option(None, "base of the rotary embedding", ge=1, le=10**12)
    num_experts: int | None = option(
        None, "experts of a tower that is a mixture (moe-4x and hybrid: 4)", ge=1, le=10**4
    )
    attn_implementation: str | None = option(None, "eager, sdpa, flex_attention, ...; null: transformers' choice")
    transfusion: TransfusionModelConfig | None = option(None, "images are continuous and diffused; null: all is tokens")
    gradient_checkpointing: bool = option(False, "recompute each layer in the backward: less memory, a third more time")
    compile: bool = option(False, "compile each layer with torch.compile")
    tower_products: Literal["separate", "batched_mm", "grouped_mm"] = option(
        "separate",
        "batched_mm: the towers' products in one padded product (balanced towers); grouped_mm: in bf16, on GPUs",
    )

    def __post_init__(self):
        check_options(self)
        if self.preset is not None and self.preset not in MoTConfig.preset_names():
            names = ", ".join(MoTConfig.preset_names())
            raise ConfigError(f"model.preset={self.preset!r} is unknown; the presets are {names}")
        if self.preset is not None and self.init_from is not None:
            raise ConfigError(f"model.preset={self.preset!r} and model.init_from={self.init_from!r} exclude each other")
        if self.style is not None and self.init_from is not None:
            raise ConfigError(
                f"model.style={self.style!r} is of a new model; leave it out with model.init_from={self.init_from!r}, "
                "which has its own options"
            )
        if self.modalities is not None and (self.init_from is not None or self.transfusion is not None):
            raise ConfigError(
                f"model.modalities={self.modalities} are of a new model of tokens; leave them out with model.init_from "
                "and model.transfusion, which have their own"
            )
        for name in ("image_tokens", "image_size"):
            if getattr(self, name) is not None and self.transfusion is not None:
                raise ConfigError(
                    f"model.{name}={getattr(self, name)} is of pictures that are codes; with model.transfusion set "
                    "model.transfusion.image_size"
                )
        if self.image_size is not None and len(self.image_size) != 2:
            raise ConfigError(f"model.image_size={self.image_size} must be [height, width]")


@dataclass
class TrainConfig:
    """The length, batch, precision and bookkeeping of a run."""

    steps: int = option(1000, "updates of the parameters", ge=1)
    rows: int = option(8, "rows in a micro-batch of one process", ge=1)
    accumulation: int | None = option(
        None, "micro-batches in a step; null: 1, or as many as make train.tokens_per_step", ge=1
    )
    tokens_per_step: int | None = option(
        None,
        "tokens of a step of all processes, padding included, held on any number of them; null: not held",
        ge=1,
        le=10**12,
    )
    precision: Literal["auto", "bf16", "float32"] = option(
        "auto", "dtype of matrix products; auto: bf16 if the device has it natively, else float32; losses are float32"
    )
    seed: int = option(0, "of initialisation and dropout (data.seed orders the rows)", ge=0, le=2**32 - 1)
    modality_weights: dict[str, float] | None = option(
        None, "modality -> weight of its targets in the loss; null: the plain mean over all targets", ge=0, le=10**6
    )
    frozen_towers: list[str] | None = option(
        None, "towers that are not trained, such as [text]; shared: what towers have in common"
    )
    frozen_parts: list[str] | None = option(
        None, "parts beside the towers that are not trained: embeddings, output_layer, patchifier, encoders"
    )
    gradient_stops: list[str] | None = option(
        None, "frozen towers whose tokens pass no gradient on to what they have read, as BAGEL's freeze_und"
    )
    lora: LoraConfig | None = option(
        None, "adapters that are trained in the place of towers, in a model that each process holds whole; null: none"
    )
    frozen_dtype: FrozenDtype = option(
        "float32",
        "what frozen weights of linear layers are held in: float32, bfloat16, or int8 with a scale for each output; "
        "the final model has those of model.init_from in their place",
    )
    frozen_vocabulary: int | None = option(
        None,
        "first rows of embeddings and output layer that keep their values, such as a text model's; null: none",
        ge=1,
    )
    ema_decay: float | None = option(
        None,
        "decay of the moving average of the weights, which then is evaluated, sampled and saved as final; null: none",
        gt=0,
        lt=1,
    )
    output_dir: str = option("runs/default", "folder of everything the run writes")
    resume: bool | Literal["auto"] = option(
        False,
        "go on from the newest intact checkpoint in output_dir; without one, auto: begin anew; true: stop",
    )
    resume_despite: list[str] = option(
        factory=list, doc="keys that may differ from those the checkpoint was made with, or data for the data"
    )
    overwrite: bool = option(False, "replace the run that output_dir holds")
    save_every: int = option(0, "steps between checkpoints; 0: only at the end and when interrupted", ge=0)
    save_asynchronously: bool = option(False, "write checkpoints from a copy in memory while training goes on")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept", ge=1)
    not_finite_limit: int = option(
        10, "steps in a row with a loss or gradient that is not finite, before the run stops", ge=0
    )
    spike_threshold: float | None = option(
        8.0,
        "standard deviations above the median of the last losses at which a loss is called a spike; null: never",
        gt=0,
    )
    skip_spikes: bool = option(False, "leave out the updates of spikes")
    tracker: str = option("none", "Accelerate's name of a tracker, such as tensorboard, wandb or trackio, or none")
    progress_bar: bool = option(True, "show a progress bar")
    processes: int | None = option(
        None, "how many processes the run must have; null: as many as it was launched with", ge=1
    )
    timeout_seconds: float = option(
        600.0, "how long a process waits for the others before the run ends", ge=1, le=10**7
    )
    cpu: bool = option(False, "train on the CPU even where there is an accelerator")
    cpu_threads: int | None = option(
        None, "threads of one process on a CPU; null: the cores shared by its processes", ge=1, le=1024
    )
    keep_freed_memory: bool = option(
        True, "on CPUs (glibc), keep large freed blocks for the next step instead of giving them back to the system"
    )
    float32_matmul_precision: Literal["highest", "high", "medium"] = option(
        "highest", "products of float32: high allows TF32 on GPUs, medium also bfloat16 parts, on GPUs and CPUs"
    )

    def __post_init__(self):
        check_options(self)
        if self.tokens_per_step is None and self.accumulation is None:
            self.accumulation = 1


def trained_parts(train: TrainConfig) -> dict[str, Any]:
    """Return the arguments of `training.model.adapters.set_trained`."""
    names = ("frozen_towers", "frozen_parts", "gradient_stops", "lora", "frozen_dtype", "seed")
    return {name: getattr(train, name) for name in names}


@dataclass
class EvaluationConfig:
    """When, and on how many rows, the held-out losses are measured."""

    every: int = option(0, "steps between evaluations; 0: only at the end", ge=0)
    rows: int = option(32, "most rows of each direction of each source", ge=0)
    batch_rows: int = option(8, "rows of one forward", ge=1)
    noise_levels: int = option(
        8, "evenly spaced levels of the diffusion validation loss, a forward for each; 0: none", ge=0, le=1000
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class SamplesConfig:
    """The samples at the end of a run: how many are drawn, read and spoken, and how."""

    enabled: bool = option(True, "make samples, the sheet and the nearest-neighbour measure at the end")
    measured: int | None = option(None, "trained names that are drawn and measured; null: all the run trained on", ge=1)
    held_out: int = option(48, "held-out names that are drawn and read", ge=0)
    held_out_names: list[str] | None = option(None, "which held-out names; null: the first `held_out` of them")
    held_out_label: str = option("held out", "what the sheet says of the held-out names: `never seen in this style`")
    concept: str | None = option(
        None, "column of what a picture shows: a drawn one may be near any of its concept; null: only the named one"
    )
    shown: int = option(24, "pictures of each kind on the sheet", ge=0)
    edits: int = option(48, "edits of a picture that are drawn and measured, of each split", ge=0)
    spoken: int = option(6, "names spoken into WAV files", ge=0)
    texts: int = option(4, "running texts continued", ge=0)
    gallery: int = option(5000, "most pictures of a split among which a drawn one must find its own", ge=1)
    distractors: list[SourceConfig] = option(
        factory=list, doc="sources of further pictures among which a drawn one must find its own"
    )
    temperature: float = option(0.0, "of picture codes and speech units; 0: the likeliest one each time", ge=0, le=1000)
    top_k: int = option(0, "sample among the likeliest so many; 0: all", ge=0)
    guidance_scale: float = option(
        1.0, "classifier-free guidance of pictures; 1: none; needs caption dropout in training", ge=1, le=1000
    )
    num_inference_steps: int = option(250, "denoising steps of a picture that is diffused", ge=1, le=10**5)
    scheduler: str = option("ddpm", "ddpm, ddim, dpm, ... or the name of one of diffusers' schedulers")
    batch: int = option(64, "prompts generated together", ge=1)
    max_text_tokens: int = option(24, "longest text that is read off or continued", ge=1, le=10**5)
    max_speech_tokens: int = option(100, "longest span of speech", ge=1, le=10**5)
    seed: int = option(0, "of sampling", ge=0, le=2**32 - 1)

    def __post_init__(self):
        check_options(self)
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature={self.temperature} divides by almost nothing; give 0, or at least 0.001")


@dataclass
class Recipe:
    """Everything that a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)

    def __post_init__(self):
        try:
            self.data.validate()
        except ValueError as error:
            raise ConfigError(f"data: {error}") from error
        self.optimizer.warmup_steps = warmup_steps(self.optimizer, self.train.steps)
        if self.optimizer.warmup_steps > self.train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than train.steps={self.train.steps}: "
                "the peak learning rate would not be reached; set optimizer.warmup_steps=null for a tenth of the run"
            )

        if self.train.frozen_dtype != "float32" and self.model.init_from is None:
            raise ConfigError(
                f"train.frozen_dtype={self.train.frozen_dtype!r} holds weights of a checkpoint, but model.init_from is "
                "null; name one, or set train.frozen_dtype=float32"
            )

    def micro_batches(self, processes: int) -> int:
        """The micro-batches of a step on so many processes: `train.accumulation`, or what the tokens of a step need.

        Raises:
            ConfigError: the processes cannot make `train.tokens_per_step`; the message names values that would fit.
        """
        train, length = self.train, self.data.row_length
        if train.tokens_per_step is None:
            return train.accumulation
        together = train.rows * length * processes
        fitting, rest = divmod(train.tokens_per_step, together)
        if rest:
            raise ConfigError(
                f"train.tokens_per_step={train.tokens_per_step:,} is no multiple of train.rows={train.rows} x "
                f"data.row_length={length:,} x {processes} process{'es' * (processes > 1)} = {together:,} tokens; "
                f"{self._what_fits(processes)}"
            )
        if train.accumulation not in (None, fitting):
            raise ConfigError(
                f"train.accumulation={train.accumulation} makes {train.accumulation * together:,} tokens a step of "
                f"{processes} process{'es' * (processes > 1)}, but train.tokens_per_step={train.tokens_per_step:,}; "
                f"leave train.accumulation out, or set it to {fitting}"
            )
        return fitting

    def _what_fits(self, processes: int) -> str:
        """Values of rows, processes and tokens that would divide each other, each with the others as they are."""
        tokens, rows, length = self.train.tokens_per_step, self.train.rows, self.data.row_length
        fitting = []
        if numbers := _divisors_near(tokens, length * processes, rows):
            fitting.append(f"train.rows={' or '.join(map(str, numbers))}")
        if numbers := _divisors_near(tokens, length * rows, processes):
            fitting.append(f"{' or '.join(map(str, numbers))} processes")
        below, together = tokens // (rows * length * processes), rows * length * processes
        multiples = [f"{number * together}" for number in (below, below + 1) if number]
        return ", or ".join([*fitting, f"train.tokens_per_step={' or '.join(multiples)}"]) + " would fit"


def _divisors_near(whole: int, part: int, wanted: int) -> list[int]:
    """Up to three numbers near `wanted` that divide `whole / part`, ascending; none if that is no whole number."""
    quotient, rest = divmod(whole, part)
    if rest:
        return []
    found = {d for i in range(1, math.isqrt(quotient) + 1) if not quotient % i for d in (i, quotient // i)}
    return sorted(sorted(found, key=lambda number: abs(number - wanted))[:3])


def list_keys() -> str:
    """Every key of a recipe with its type, default and documentation, for `--help`."""
    lines = []
    section = ""
    for key, kind, default, doc in describe(Recipe):
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append(f"\n{section}:")
        lines.append(f"  {key} ({kind}; {default})")
        lines.extend(textwrap.wrap(doc, 112, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines).lstrip("\n")


# ------------------------------------------------------------------ the samples that data, processor and model can give

EDIT_KINDS = ["image", "text", "image"]


def check_subjects(data: DataConfig, config: SamplesConfig) -> None:
    """Refuse to start a run whose samples could not be made from its data."""
    found = [pair_of(data.sources, "image"), pair_of(data.sources, "audio"), text_of_sources(data.sources)]
    if config.enabled and not any(found) and not any(map(has_edits, data.sources)):
        raise ConfigError(
            "samples.enabled=true, but no source has a template of a text and an image, a text and a sound, an image, "
            "a text and an image, or a text alone to ask for; set samples.enabled=false"
        )
    if config.enabled:
        check_names(data, config)


def check_names(data: DataConfig, config: SamplesConfig) -> None:
    """Refuse held-out names that no held-out picture has, and columns and sources that say of no picture what it is."""
    if config.held_out_names is not None:
        pair = pair_of(data.validation_sources, "image")
        names = [name.strip() for name in texts_of(*pair[:2])] if pair is not None else []
        if missing := [name for name in config.held_out_names if name not in names]:
            near = difflib.get_close_matches(missing[0], names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"samples.held_out_names has {missing[0]!r}, which no held-out picture is called{hint}")
    for source in config.distractors:
        if pair_of([source], "image") is None:
            raise ConfigError(f"samples.distractors: {source.name!r} has no template of a text and an image; give one")
        try:
            open_source(source)
        except ValueError as error:
            raise ConfigError(f"samples.distractors: {error}") from error
    if config.enabled and config.concept is not None:
        pairs = [pair_of(sources, "image") for sources in (data.sources, data.validation_sources)]
        pairs += [pair_of([source], "image") for source in config.distractors]
        for source, text, _ in filter(None, pairs):
            if config.concept not in text.columns:
                raise ConfigError(
                    f"samples.concept={config.concept!r} is no column of the captions text:{text.column} of source "
                    f"{source.name!r}; give one of {', '.join(text.columns)}, or leave it out"
                )


def check_decoder(processor: MoTProcessor, config: SamplesConfig) -> None:
    """Refuse to start a run that is to draw pictures with a processor that cannot decode them."""
    tokenizer = processor.image_tokenizer
    if config.enabled and tokenizer is not None and not tokenizer.can_decode:
        raise ConfigError(
            "samples.enabled=true, but the processor's image tokenizer has no decoder, so no picture can be shown; set "
            "samples.enabled=false, or convert the checkpoint again with the weights of one (--image-decoder)"
        )


def check_diffusion(planned: MoTConfig, config: SamplesConfig) -> None:
    """Refuse to start a run if the model cannot draw pictures with the settings of `samples`."""
    if not (config.enabled and isinstance(planned, MoTTransfusionConfig)):
        return
    names = ("guidance_scale", "num_inference_steps", "scheduler")
    try:
        DiffusionSettings(**{name: getattr(config, name) for name in names}).validate(planned)
    except ValueError as error:
        raise ConfigError(f"samples: {error}") from error


def pair_of(sources: list[SourceConfig], kind: str) -> tuple[SourceConfig, Segment, Segment] | None:
    """Return the first source with a template of one text and one segment of `kind`: (source, text, other segment)."""
    for source in sources:
        for template in source.templates:
            segments = template.parsed
            if sorted(segment.type for segment in segments) == sorted(["text", kind]):
                text, other = sorted(segments, key=lambda segment: segment.type != "text")
                return source, text, other
    return None


def text_of_sources(sources: list[SourceConfig]) -> tuple[SourceConfig, Segment] | None:
    """Return the first source with a template of text alone."""
    for source in sources:
        for template in source.templates:
            if [segment.type for segment in template.parsed] == ["text"]:
                return source, template.parsed[0]
    return None


def has_edits(source: SourceConfig) -> bool:
    """True if a template of the source is a picture, a text and a picture."""
    return any([segment.type for segment in template.parsed] == EDIT_KINDS for template in source.templates)


def texts_of(source: SourceConfig, text: Segment) -> Iterator[str]:
    """Return the texts of a segment, one for each record of the source."""
    return open_source(source).each(lambda record: text_of(text, record))
