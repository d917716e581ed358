"""Build a model, or load it from a checkpoint."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import safe_open
from transformers.utils import cached_file, has_file, logging

from modeling_mot import (
    MoTConfig,
    MoTForCausalLM,
    MoTPreTrainedModel,
    MoTTransfusionConfig,
    MoTTransfusionModel,
)
from modeling_mot.hub_trust import read_weight_map
from modeling_mot.latent_vae import VAE_CLASSES, build_vae
from training.config import ConfigError
from training.recipe import ModelConfig


CARRIED_VAE = Path(__file__).parents[1] / "assets" / "vae"
Autoencoder = AutoencoderKL | AutoencoderTiny


def load_vae(source: str) -> Autoencoder:
    """A diffusers autoencoder in float32, frozen.

    Raises:
        ConfigError: there is none, it is of another class or not whole.
    """
    folder = str(CARRIED_VAE) if source == "carried" else source
    try:
        name = AutoencoderKL.load_config(folder).get("_class_name", "AutoencoderKL")
        if name not in VAE_CLASSES:
            raise ValueError(f"its class is {name}; there are {', '.join(VAE_CLASSES)}")
        vae, info = VAE_CLASSES[name].from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"its weights lack {', '.join(missing[:4])}; is it whole?")
    except Exception as error:  # whatever diffusers raises of a folder that holds something else
        raise ConfigError(f"model.transfusion.vae={source!r}: no autoencoder could be loaded: {error}") from error
    return vae.eval().requires_grad_(False)


MODEL_CLASSES = {MoTConfig.model_type: MoTForCausalLM, MoTTransfusionConfig.model_type: MoTTransfusionModel}


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
