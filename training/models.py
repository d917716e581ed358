"""From the `model` section of a recipe to a processor and a model that fit each other."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers.utils import cached_file, has_file, logging

from modeling_mot import (
    MoTConfig,
    MoTForCausalLM,
    MoTPreTrainedModel,
    MoTProcessor,
    MoTTransfusionConfig,
    MoTTransfusionModel,
)
from modeling_mot.configuration_presets import VARIANTS
from modeling_mot.hub_trust import read_weight_map
from modeling_mot.latent_vae import build_vae, vae_config_of, vae_fingerprint
from training.config import ConfigError, check_options, option
from training.data.config import DataConfig
from training.sizes import SIZES, Budget, leaves_size_open, modalities_of, restricted
from training.transfusion import (
    Autoencoder,
    TransfusionModelConfig,
    check_pictures,
    has_sound,
    load_vae,
    set_objective,
    transfusion_processor,
    vae_factor,
)


CARRIED_PROCESSOR = Path(__file__).parent / "assets" / "processor"
MODEL_CLASSES = {MoTConfig.model_type: MoTForCausalLM, MoTTransfusionConfig.model_type: MoTTransfusionModel}
_VARIANT = Literal[VARIANTS]


@dataclass
class ModelConfig:
    """Which model is trained. Sizes left at null come from the preset, or are MoTConfig's own defaults; where all are,
    they follow from the machine and the data (training/sizes.py)."""

    variant: _VARIANT = option("mot", "which modalities share weights and which towers hold experts")
    preset: str | None = option(None, "a row of the paper's tables, such as chameleon-37m; null: the sizes below")
    init_from: str | None = option(None, "folder or Hub name of a checkpoint to start from; its sizes are kept")
    processor: str | None = option(None, "folder or Hub name of a processor; null: the one carried with the project")
    modalities: list[str] | None = option(
        None, "of a new model, text first; null: those of the processor or, where no size is named, those of the data"
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
    norm_position: Literal["pre", "post"] | None = option(None, "pre: as Llama; post: as the paper's Algorithm 1")
    qk_norm: Literal["rms", "rms_all_heads", "layer"] | None = option(None, "norm of queries and keys; null: none")
    tie_word_embeddings: bool | None = option(None, "one matrix for input and output embeddings")
    hidden_dropout: float | None = option(None, "dropout on the outputs of attention and feed-forward", ge=0, lt=1)
    attention_dropout: float | None = option(None, "dropout on attention probabilities", ge=0, lt=1)
    z_loss_coefficient: float | None = option(None, "weight of log(Z)^2 (Chameleon: 1e-5)", ge=0, le=1000)
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
        if self.modalities is not None and (self.init_from is not None or self.transfusion is not None):
            raise ConfigError(
                f"model.modalities={self.modalities} are of a new model of tokens; leave them out with model.init_from and "
                "model.transfusion, which have their own"
            )


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
    if config.modalities is not None and (lacking := set(modalities_of(data) or ()) - set(config.modalities)):
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


def build_model(
    config: ModelConfig,
    planned: MoTConfig,
    seed: int,
    vae: Autoencoder | None = None,
    initial: MoTPreTrainedModel | None = None,
) -> MoTPreTrainedModel:
    """A new model of the `planned_config`, initialised from `seed` alone, or `initial`; in float32, in training mode."""
    if initial is not None:
        return _to_train(initial)
    torch.manual_seed(seed)
    return _to_train(_new_model(config, planned, vae))


def empty_model(config: ModelConfig, planned: MoTConfig, vae: Autoencoder | None = None) -> MoTPreTrainedModel:
    """The same without weights, its parameters on the meta device; buffers and the VAE are real."""
    with init_empty_weights(include_buffers=False):
        return _to_train(_new_model(config, planned, vae))


def _to_train(model: MoTPreTrainedModel) -> MoTPreTrainedModel:
    """In training mode, and with the setting of generation that documents ask for."""
    if model.generation_config.min_new_tokens is None:
        # Documents may end after a picture; who asks for text behind one is to get some.
        model.generation_config.min_new_tokens = 1
    return model.train()


def _new_model(config: ModelConfig, planned: MoTConfig, vae: Autoencoder | None) -> MoTPreTrainedModel:
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    parts = {} if vae is None else {"vae": vae}
    return MODEL_CLASSES[planned.model_type]._from_config(planned, dtype=torch.float32, **parts, **attention)


def set_up_layers(model: MoTPreTrainedModel, checkpointing: bool, compiled: bool, products: str = "separate") -> None:
    """How layers run: recomputed in the backward, compiled, the towers' products joined; before the model is sharded."""
    model.set_tower_products(products)
    if checkpointing:
        # Its older name warns where transformers knows the newer one.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if compiled:
        for layer in model.model.layers:
            layer.compile()


def load_initial(config: ModelConfig, with_weights: bool = False) -> MoTPreTrainedModel | None:
    """The checkpoint that a recipe starts from, as `load_model` or `load_frame` has it; None where it starts anew.

    Raises:
        ConfigError: naming `model.init_from`.
    """
    source = config.init_from
    if source is None:
        return None
    try:
        return load_model(source, config.attn_implementation) if with_weights else load_frame(source)
    except ConfigError as error:
        raise ConfigError(f"model.init_from={source!r}: {error}") from error
    except Exception as error:  # whatever reading and building raise of a folder that is no checkpoint
        raise ConfigError(f"model.init_from={source!r}: {type(error).__name__}: {error}") from error


def load_frame(source: str) -> MoTPreTrainedModel:
    """A checkpoint of ours without the weights of what is trained: its configuration, and its VAE whole.

    What ranks of a sharded model begin with, whose weights come from the main process or from a checkpoint.

    Raises:
        ConfigError: there is none.
    """
    try:
        model_class = MODEL_CLASSES[model_type(source)]
        config = model_class.config_class.from_pretrained(source)
    except OSError as error:
        raise ConfigError(f"no model could be loaded from {source!r}: {error}") from error
    vae = None
    if getattr(config, "vae_config", None) is not None:
        vae = build_vae(config.vae_config)
        vae.load_state_dict(_read_tensors(source, "vae."))
        vae = vae.eval().requires_grad_(False)
    return empty_model(ModelConfig(), config, vae)


def _read_tensors(source: str, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names begin with `prefix`, without it, in float32."""
    names = ["model.safetensors"]
    if has_file(source, "model.safetensors.index.json"):
        files = read_weight_map(Path(cached_file(source, "model.safetensors.index.json")))
        names = sorted({file for name, file in files.items() if name.startswith(prefix)})
    tensors = {}
    for name in names:
        with safe_open(cached_file(source, name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                if key.startswith(prefix):
                    tensors[key.removeprefix(prefix)] = file.get_tensor(key).float().clone()
    return tensors


def load_model(source: str, attn_implementation: str | None = None) -> MoTPreTrainedModel:
    """A checkpoint of ours in float32; another model type and missing or misshapen tensors are refused by name."""
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        model_class = MODEL_CLASSES[model_type(source)]
        with without_bars():
            model, info = model_class.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, **attention
            )
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(f"no model could be loaded from {source!r}: {error}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(str(name) for name in info.get(kind) or ()):
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ConfigError(f"the checkpoint {source!r} has {kind.replace('_', ' ')}: {shown}; is it whole?")
    for tensor in (*model.parameters(), *model.buffers()):
        # As loaded they lie in the mapped file, aligned to nothing, where products differ in their last bits.
        tensor.data = tensor.data.clone()
    return model


def stored_dtype(source: str) -> str | None:
    """The precision that a checkpoint of ours says it is stored in, such as `bfloat16`."""
    dtype = MODEL_CLASSES[model_type(source)].config_class.from_pretrained(source).dtype
    return None if dtype is None else str(dtype).removeprefix("torch.")


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers' bars for reading and writing files would cut through that of the training."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def model_type(source: str) -> str:
    """The model type of a folder or a repository on the Hub, read before anything is built from it.

    Raises:
        ConfigError: it is none of ours.
    """
    path = cached_file(source, "config.json")
    if path is None:
        raise ConfigError(f"{source} has no config.json")
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    found = stored.get("model_type") if isinstance(stored, dict) else None
    if found not in MODEL_CLASSES:
        raise ConfigError(
            f"{path} has model_type={found!r}; this trainer loads {' and '.join(map(repr, MODEL_CLASSES))}"
        )
    return found


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
