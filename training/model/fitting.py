"""What fits together: the model, processor and VAE that a recipe asks for, and the sizes that it leaves open."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from modeling_mot import (
    MoTConfig,
    MoTPreTrainedModel,
    MoTProcessor,
    MoTTransfusionConfig,
    MoTTransfusionModel,
)
from modeling_mot.configuration_presets import PRESETS
from modeling_mot.latent_vae import downsampling, vae_config_of, vae_fingerprint
from modeling_mot.processing_vocabulary import extend_tokenizer, without_codes
from training.config import ConfigError
from training.data.config import MODALITY_OF_TYPE, DataConfig
from training.model.building import Autoencoder, empty_model, load_vae
from training.recipe import ModelConfig, TransfusionModelConfig
from training.tokenizers.processor import continuous_processor


if TYPE_CHECKING:
    from training.recipe import Recipe


logger = logging.getLogger(__name__)

# What makes a size, and those to choose from: the rows of the paper's Table 1.
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES = {name: {field: PRESETS[name][field] for field in SIZE_FIELDS} for name in (
    "chameleon-37m", "chameleon-94m", "chameleon-443m", "chameleon-1.5b", "chameleon-7b",
)}  # fmt: skip
_STATE_BYTES = 16  # of a parameter in float32: itself, its gradient and AdamW's two moments
_ACTIVATION_BYTES = 80  # of a value of the residual stream in one layer, about
_BATCH_BYTES = 40  # of a token: five integers
_STEP_SECONDS = 10.0


@dataclass(frozen=True)
class Budget:
    """What there is to train with.

    Attributes:
        memory: bytes of a process, of its accelerator where it has one; None: not known.
        flops: FLOP/s that a process may be expected to reach.
        shards: processes that share the state of a model.
        tokens_of_forward, tokens_of_step: of a process.
        tokens_of_run: of all processes, in all steps.
        state_bytes: of a parameter.
    """

    memory: float | None
    flops: float
    shards: int
    tokens_of_forward: int
    tokens_of_step: int
    tokens_of_run: int
    state_bytes: int

    @classmethod
    def of(
        cls, recipe: "Recipe", memory: float | None, peak: float, processes: int, shards: int, utilisation: float = 0.4
    ) -> "Budget":
        """What a recipe has on `processes` devices of a peak in FLOP/s, of which `utilisation` may be expected."""
        train = recipe.train
        tokens = train.rows * recipe.data.row_length
        return cls(
            memory=memory,
            flops=utilisation * peak,
            shards=shards,
            tokens_of_forward=tokens,
            tokens_of_step=tokens * train.accumulation,
            tokens_of_run=tokens * train.accumulation * processes * train.steps,
            state_bytes=_STATE_BYTES // 4 if train.frozen_towers else _STATE_BYTES,
        )

    def is_enough_for(self, config: MoTConfig) -> bool:
        """Whether a model fits well: 7 tenths of the memory, steps of at most 10 s, and a token for each active parameter
        (the paper's runs have more; a small set is seen many times)."""
        active = config.num_parameters(active=True)
        values = config.num_hidden_layers * config.hidden_size * _ACTIVATION_BYTES + 8 * config.vocab_size
        needed = self.state_bytes * config.num_parameters() / self.shards + self.tokens_of_forward * values
        return (
            (self.memory is None or needed <= 0.7 * self.memory)
            and 6 * active * self.tokens_of_step <= _STEP_SECONDS * self.flops
            and active <= self.tokens_of_run
        )

    def refuse_impossible(self, config: MoTConfig) -> None:
        """Refuse what no memory holds, before any of it is made: the state of the model, the input of a layer, the batches
        of a step.

        Raises:
            ConfigError: naming how much is needed, and of what.
        """
        parameters = config.num_parameters()
        needs = {
            f"{parameters:,} parameters with what the optimizer keeps": self.state_bytes * parameters / self.shards,
            f"train.rows x data.row_length = {self.tokens_of_forward:,} tokens of {config.hidden_size} values": (
                4 * self.tokens_of_forward * config.hidden_size
            ),
            f"train.rows x train.accumulation x data.row_length = {self.tokens_of_step:,} tokens": (
                _BATCH_BYTES * self.tokens_of_step
            ),
        }
        what, most = max(needs.items(), key=lambda need: need[1])
        if self.memory is not None and most > self.memory:
            raise ConfigError(
                f"{what} take {most / 1e9:,.1f} GB of a process that has {self.memory / 1e9:,.1f} GB; make them fewer, or "
                "share the model among more processes (python -m training.plan says how many)"
            )


def describe_choice(config: MoTConfig, budget: Budget) -> str:
    """What was chosen, and how to choose otherwise."""
    return (
        f"no size is named: {config.hidden_size} wide, {config.num_hidden_layers} layers, {config.num_attention_heads} "
        f"heads, modalities {', '.join(config.modalities)}, which fits this machine and the "
        f"{budget.tokens_of_run:,} tokens of the run; for another set model.preset ({', '.join(SIZES)}) or "
        "model.hidden_size, model.num_hidden_layers and model.num_attention_heads"
    )


def leaves_size_open(model: Any) -> bool:
    """Whether a `ModelConfig` names no size and nothing that has one."""
    return all(getattr(model, name) is None for name in ("preset", "init_from", "intermediate_size", *SIZE_FIELDS))


def fill_from_checkpoint(model: Any, stored: Mapping[str, Any]) -> None:
    """Give a `ModelConfig` the size and the modalities that its run began with, in place."""
    for name in (*SIZE_FIELDS, "modalities"):
        setattr(model, name, stored.get(name))


def modalities_of(data: DataConfig) -> list[str] | None:
    """List the modalities that the data have, text first: those of the templates and, where a template is a document, of
    the first records. None where the records cannot be read; preparing them says why."""
    from training.data.reading.sources import kinds_in_documents  # imports `datasets`, which few recipes need here

    kinds: set[str] = set()
    for source in (*data.sources, *data.validation_sources):
        kinds |= {segment.type for segment in source.segments}
        if "document" not in kinds:
            continue
        try:
            found, is_all = kinds_in_documents(source, data.limits)
        except (ValueError, OSError):
            return None
        kinds = (kinds | found) - {"document"}
        if not is_all:
            logger.warning(
                "source %r: its first records have %s; if later ones have more, set model.modalities, such as "
                "[text, image, speech]",
                source.name,
                ", ".join(sorted(found)),
            )
    modalities = {MODALITY_OF_TYPE[kind] for kind in kinds}
    return ["text", *(name for name in ("image", "speech") if name in modalities)]


def restricted(processor: MoTProcessor, modalities: Sequence[str]) -> MoTProcessor:
    """A processor of discrete codes with some of its modalities alone; its text keeps its ids.

    Raises:
        ConfigError: modalities that it does not have, or text is not the first.
    """
    has = processor.modalities
    if list(modalities) != [name for name in has if name in modalities] or "text" not in modalities:
        raise ConfigError(
            f"model.modalities={list(modalities)} must be text and others of the processor's, in its order: {has}"
        )
    if list(modalities) == list(has):
        return processor
    image = processor.image_tokenizer if "image" in modalities else None
    speech = processor.speech_tokenizer if "speech" in modalities else None
    tokenizer = extend_tokenizer(
        without_codes(processor.tokenizer), image.num_codes if image else 0, speech.num_units if speech else 0
    )
    return MoTProcessor(tokenizer, image, speech, chat_template=processor.chat_template)


# What of a Transfusion model may change when it is trained further.
OBJECTIVE_FIELDS = ("diffusion_loss_weight", "image_first_max_timestep", "timestep_sampling")


def vae_factor(vae: Autoencoder) -> int:
    """Pixels of one latent's side."""
    return downsampling(vae_config_of(vae))


def transfusion_processor(
    processor: MoTProcessor, config: TransfusionModelConfig, vae: Autoencoder, keep_speech: bool = False
) -> MoTProcessor:
    """The same text with pictures that stay pixels, in tokens of the VAE's factor times the patch size.

    Args:
        keep_speech: keep the speech units too.

    Raises:
        ConfigError: an image size that the tokens do not divide, or that is not the one of a processor whose pictures
            are pixels already.
    """
    if processor.image_processor is not None:
        found = processor.image_processor
        if found.fit != "keep" and found.image_size != list(config.image_size):
            raise ConfigError(
                f"model.transfusion.image_size={config.image_size}, but the processor makes pictures of "
                f"{found.image_size}; set them alike"
            )
        return processor
    side = vae_factor(vae) * (config.patch_size or MoTTransfusionConfig.patch_size)
    try:
        return continuous_processor(processor, config.image_size, side, keep_speech=keep_speech)
    except ValueError as error:
        raise ConfigError(f"model.transfusion.image_size={config.image_size}: {error}") from error


def check_pictures(config: MoTConfig, processor: MoTProcessor) -> None:
    """Refuse a processor whose pictures are not what the model takes: codes or pixels, and how many of them a token.

    Raises:
        ConfigError: naming `model.processor`.
    """
    pixels, is_continuous = processor.image_processor, isinstance(config, MoTTransfusionConfig)
    if is_continuous != (pixels is not None):
        raise ConfigError(
            f"model.processor: its pictures are {'codes' if pixels is None else 'pixels'}, but the model takes "
            f"{'pixels, which it diffuses' if is_continuous else 'codes: for pixels set model.transfusion'}"
        )
    if not is_continuous:
        return
    wanted = config.vae_downsampling * config.patch_size
    if pixels.downsampling != wanted:
        raise ConfigError(
            f"model.processor: a token stands for {pixels.downsampling} pixels a side, but for {wanted} in the model "
            f"(VAE {config.vae_downsampling} x patch_size {config.patch_size}); use a processor of downsampling={wanted}"
        )


def set_objective(config: MoTTransfusionConfig, recipe: TransfusionModelConfig, init_from: str) -> None:
    """Let a recipe change what a checkpoint is trained on further, and nothing that would make another model of it.

    Raises:
        ConfigError: a field that the checkpoint has another value of.
    """
    for name, value in recipe.model_fields().items():
        if name in OBJECTIVE_FIELDS:
            setattr(config, name, value)
        elif getattr(config, name) != value:
            raise ConfigError(
                f"model.transfusion.{name}={value!r}, but model.init_from={init_from!r} was made with "
                f"{getattr(config, name)!r}; leave it out"
            )
    try:
        config.validate_architecture()
    except ValueError as error:
        raise ConfigError(f"model.transfusion: {error}") from error


def has_sound(data: DataConfig) -> bool:
    """Whether any template has a sound, so that the model needs speech beside text and pictures."""
    sources = (*data.sources, *data.validation_sources)
    return any(segment.type == "audio" for source in sources for segment in source.segments)


def caption_dropout(data: DataConfig) -> float:
    """How often captions are dropped, which decides whether guidance makes sense; the most of any template."""
    return max((template.caption_dropout for source in data.sources for template in source.templates), default=0.0)


CARRIED_PROCESSOR = Path(__file__).parents[1] / "assets" / "processor"


_NOT_FIELDS_OF_MOT = {
    "variant", "preset", "init_from", "processor", "modalities", "rope_theta", "attn_implementation", "transfusion",
    "gradient_checkpointing", "compile", "tower_products",
}  # fmt: skip


def size_overrides(config: ModelConfig) -> dict[str, Any]:
    """The fields of MoTConfig that the recipe sets."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _NOT_FIELDS_OF_MOT}
    values = {name: value for name, value in values.items() if value is not None}
    if config.rope_theta is not None:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return values


def load_processor(config: ModelConfig, vae: Autoencoder | None = None, keep_speech: bool = False) -> MoTProcessor:
    """The processor a recipe names, else the one beside the checkpoint it starts from, else the carried one.

    With a `vae`, the pictures of a processor of discrete codes become continuous, and its speech is left out unless
    `keep_speech`.
    """
    source = config.processor or config.init_from or str(CARRIED_PROCESSOR)
    try:
        processor = MoTProcessor.from_pretrained(source)
    except Exception as error:  # whatever transformers raises of a folder that holds something else
        key = "model.processor" if config.processor else "model.init_from"
        raise ConfigError(f"{key}={source!r}: no processor could be loaded: {error}") from error
    if config.modalities is not None:
        return restricted(processor, config.modalities)
    if vae is None or config.transfusion is None:
        return processor
    return transfusion_processor(processor, config.transfusion, vae, keep_speech)


def find_vae(config: ModelConfig, initial: MoTPreTrainedModel | None) -> Autoencoder | None:
    """The autoencoder of a Transfusion recipe, or of the checkpoint it starts from; None where all is tokens."""
    if initial is None:
        return None if config.transfusion is None else load_vae(config.transfusion.vae)
    is_transfusion = isinstance(initial, MoTTransfusionModel)
    if config.transfusion is not None and not is_transfusion:
        raise ConfigError(
            f"model.transfusion is set, but model.init_from={config.init_from!r} is a model of tokens alone"
        )
    if is_transfusion and initial.vae is None:
        raise ConfigError(f"model.init_from={config.init_from!r} holds no VAE, so no picture can be encoded for it")
    is_named = is_transfusion and config.transfusion is not None and config.transfusion.vae != "carried"
    if is_named and vae_fingerprint(load_vae(config.transfusion.vae)) != vae_fingerprint(initial.vae):
        raise ConfigError(
            f"model.transfusion.vae={config.transfusion.vae!r} is not the VAE of model.init_from={config.init_from!r}, "
            "which the model goes on with; leave it out"
        )
    return initial.vae if is_transfusion else None


def model_config(
    config: ModelConfig, processor: MoTProcessor, row_length: int, vae: Autoencoder | None = None
) -> MoTConfig:
    """The configuration of a new model: the recipe's sizes, the processor's vocabulary and modalities, the VAE's latents.

    A preset keeps its own vocabulary size where the processor's fits in: the rows beyond are never used.
    """
    tokens = processor.config_kwargs()
    overrides = size_overrides(config)
    config_class = MoTConfig
    if vae is None and processor.image_processor is not None:
        raise ConfigError(
            f"model.processor={config.processor!r} keeps pictures as pixels, for a model that diffuses them: set "
            "model.transfusion, such as model.transfusion.vae=carried"
        )
    if vae is not None:
        config_class, factor = MoTTransfusionConfig, vae_factor(vae)
        overrides |= config.transfusion.model_fields()
        overrides["latent_size"] = [side // factor for side in config.transfusion.image_size]
        overrides["latent_channels"] = vae.config.latent_channels
        overrides["vae_config"] = vae_config_of(vae)
    try:
        if config.preset is None:
            overrides.setdefault("max_position_embeddings", row_length)
            return config_class.from_variant(config.variant, **tokens, **overrides)
        preset = config_class.from_preset(config.preset, config.variant)
        tokens["vocab_size"] = max(tokens["vocab_size"], preset.vocab_size)
        overrides.setdefault("max_position_embeddings", max(row_length, preset.max_position_embeddings))
        return config_class.from_preset(config.preset, config.variant, **tokens, **overrides)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def planned_config(
    config: ModelConfig,
    processor: MoTProcessor,
    row_length: int,
    vae: Autoencoder | None = None,
    initial: MoTPreTrainedModel | None = None,
) -> MoTConfig:
    """The configuration of the model that a recipe trains: a new one, or that of `initial`, which may get another
    objective (see `set_objective`).

    Raises:
        ConfigError: model, processor, VAE and rows do not fit each other.
    """
    if initial is None:
        planned = model_config(config, processor, row_length, vae)
        check_pictures(planned, processor)
    else:
        planned = initial.config
        check_pictures(planned, processor)
        check_fits(planned, processor, config.init_from)
        if config.transfusion is not None:
            set_objective(planned, config.transfusion, config.init_from)
    if vae is not None and planned.image_length(*planned.latent_size) > row_length:
        raise ConfigError(
            f"a picture of latent_size={list(planned.latent_size)} takes {planned.image_length(*planned.latent_size):,} "
            f"tokens, but data.row_length={row_length}; make model.transfusion.image_size smaller or rows longer"
        )
    if planned.max_position_embeddings < row_length:
        raise ConfigError(
            f"data.row_length={row_length} is longer than the model's max_position_embeddings="
            f"{planned.max_position_embeddings}; shorten the rows or set model.max_position_embeddings"
        )
    return planned


class Planned(NamedTuple):
    """What fits together: the configuration of a recipe's model, its processor, and the VAE of continuous images."""

    config: MoTConfig
    processor: MoTProcessor
    vae: Autoencoder | None


def plan_model(
    config: ModelConfig, data: DataConfig, initial: MoTPreTrainedModel | None = None, budget: Budget | None = None
) -> Planned:
    """Decide what is trained and on what, before anything is made or tokenised. What `config` leaves open is set in it,
    and `data.clean_copies` where the model needs them.

    Args:
        initial: the checkpoint of `config.init_from`, with or without weights (`load_frame`).
        budget: what a size that is left open must fit; None: the smallest is taken, since the data do not depend on it.

    Raises:
        ConfigError: model, processor, VAE and rows do not fit each other, or the budget.
    """
    vae = find_vae(config, initial)
    is_open = leaves_size_open(config)
    if is_open and config.modalities is None and vae is None and config.processor is None:
        config.modalities = modalities_of(data)
    elif config.modalities is not None and (lacking := set(modalities_of(data) or ()) - set(config.modalities)):
        raise ConfigError(f"model.modalities={config.modalities} lack {', '.join(sorted(lacking))}, which data has")
    processor = load_processor(config, vae, has_sound(data))
    if is_open:
        for sizes in SIZES.values():
            larger = planned_config(replace(config, **sizes), processor, data.row_length, vae)
            if config.hidden_size is not None and not (budget is not None and budget.is_enough_for(larger)):
                break
            for name, value in sizes.items():
                setattr(config, name, value)
    planned = planned_config(config, processor, data.row_length, vae, initial)
    if budget is not None:
        budget.refuse_impossible(planned)
    if config.attn_implementation is not None and initial is None:
        if config.attn_implementation.startswith("paged|"):
            raise ConfigError(
                f"model.attn_implementation={config.attn_implementation!r} is for serving; leave out paged|"
            )
        try:
            empty_model(config, planned, vae)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"model.attn_implementation={config.attn_implementation!r}: {error}") from error
    if not getattr(planned, "noised_images_visible", True):
        data.clean_copies = True
    return Planned(planned, processor, vae)


def check_fits(config: MoTConfig, processor: MoTProcessor, source: str) -> None:
    """Refuse a processor whose tokens are not those of the model."""
    for name, expected in processor.config_kwargs().items():
        found = getattr(config, name, None)
        fits = found >= expected if name == "vocab_size" else _plain(found) == _plain(expected)
        if not fits and name != "image_grid":
            raise ConfigError(f"{source!r} was made with {name}={found}, the processor has {expected}; use its own")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
