"""From the model section of a recipe to a model: load what it names, decide what fits together, build.

`load_initial` and `plan_model` refuse impossible recipes before data are tokenised; `build_model` makes the model.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import safe_open
from transformers.utils import cached_file, has_file
from transformers.utils import logging as transformers_logging

from modeling_mot import (
    MoTConfig,
    MoTForCausalLM,
    MoTPreTrainedModel,
    MoTProcessor,
    MoTTransfusionConfig,
    MoTTransfusionModel,
)
from modeling_mot.hub_trust import read_weight_map
from modeling_mot.latent_vae import VAE_CLASSES, build_vae, downsampling, vae_config_of, vae_fingerprint
from modeling_mot.processing_vocabulary import extend_tokenizer, without_codes
from training.config import ConfigError
from training.data.config import MODALITY_OF_TYPE, DataConfig
from training.data.reading.sources import kinds_in_documents
from training.model.costs import SIZE_FIELDS, SIZES, Budget, leaves_size_open
from training.recipe import ModelConfig, TransfusionModelConfig
from training.tokenizers.processor import continuous_processor


logger = logging.getLogger(__name__)


ASSETS = Path(__file__).parents[1] / "assets"
CARRIED_PROCESSOR = ASSETS / "processor"
CARRIED_VAE = ASSETS / "vae"
MODEL_CLASSES = {MoTConfig.model_type: MoTForCausalLM, MoTTransfusionConfig.model_type: MoTTransfusionModel}
Autoencoder = AutoencoderKL | AutoencoderTiny


# -------------------------------------------------------------------------------- loading: the checkpoint that is named


def load_initial(
    config: ModelConfig, with_weights: bool = False, dtype: torch.dtype | str = torch.float32
) -> MoTPreTrainedModel | None:
    """Load the checkpoint that a recipe starts from, with `load_model` or `load_frame`; None if it starts anew.

    Args:
        dtype: of the weights; "auto": as they are stored.

    Raises:
        ConfigError: naming `model.init_from`.
    """
    source = config.init_from
    if source is None:
        return None
    try:
        return load_model(source, config.attn_implementation, dtype) if with_weights else load_frame(source)
    except ConfigError as error:
        raise ConfigError(f"model.init_from={source!r}: {error}") from error
    except Exception as error:  # reading and building raise anything for a folder that is no checkpoint
        raise ConfigError(f"model.init_from={source!r}: {type(error).__name__}: {error}") from error


def load_frame(source: str) -> MoTPreTrainedModel:
    """Load a checkpoint of ours without the weights that are trained: its configuration, and its whole VAE.

    The ranks of a sharded model begin with it; their weights come from the main process or from a checkpoint.

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
        vae.load_state_dict(read_weights(source, "vae."))
        vae = vae.eval().requires_grad_(False)
    return empty_model(ModelConfig(), config, vae)


def read_weights(source: str, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint whose names begin with `prefix`, in float32, under names without it."""
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


def load_model(
    source: str, attn_implementation: str | None = None, dtype: torch.dtype | str = torch.float32
) -> MoTPreTrainedModel:
    """Load a checkpoint of ours, in float32 unless told otherwise; "auto": as it is stored.

    Raises:
        ConfigError: another model type, or tensors that are missing or misshapen, by name.
    """
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        model_class = MODEL_CLASSES[model_type(source)]
        with without_bars():
            model, info = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **attention)
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
    """Return the precision that a checkpoint of ours says it is stored in, such as `bfloat16`."""
    dtype = MODEL_CLASSES[model_type(source)].config_class.from_pretrained(source).dtype
    return None if dtype is None else str(dtype).removeprefix("torch.")


def model_type(source: str) -> str:
    """Return the model type of a folder or a repository on the Hub, read before anything is built from it.

    Raises:
        ConfigError: it is none of ours.
        OSError: there is no such folder or repository.
    """
    # A repository is called `name` or `owner/name`; anything else can only be a folder.
    if (source.count("/") > 1 or source.startswith(("/", "."))) and not Path(source).is_dir():
        raise FileNotFoundError("there is no such folder; train or convert that model first")
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


@contextmanager
def without_bars() -> Iterator[None]:
    """Switch off transformers' bars for reading and writing files, which would cut through the training's bar."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


# ----------------------------------------------------------------------------------- loading: the VAE and the processor


def find_vae(config: ModelConfig, initial: MoTPreTrainedModel | None) -> Autoencoder | None:
    """Find the autoencoder of a Transfusion recipe, or of the checkpoint it starts from; None where all is tokens.

    Raises:
        ConfigError: recipe and checkpoint contradict each other.
    """
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


def load_vae(source: str) -> Autoencoder:
    """Load a diffusers autoencoder in float32, frozen.

    Raises:
        ConfigError: there is none, it is of another class, or it is not whole.
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
    except Exception as error:  # diffusers raises anything for a folder that holds something else
        raise ConfigError(f"model.transfusion.vae={source!r}: no autoencoder could be loaded: {error}") from error
    return vae.eval().requires_grad_(False)


def load_processor(config: ModelConfig, vae: Autoencoder | None = None, keep_speech: bool = False) -> MoTProcessor:
    """Load the processor that a recipe names, else that of the checkpoint it starts from, else the carried one.

    With a `vae`, the pictures of a processor of discrete codes become continuous, and its speech is left out unless
    `keep_speech`.

    Raises:
        ConfigError: no processor could be loaded, or it lacks the recipe's modalities.
    """
    source = config.processor or config.init_from or str(CARRIED_PROCESSOR)
    try:
        processor = MoTProcessor.from_pretrained(source)
    except Exception as error:  # transformers raises anything for a folder that holds something else
        key = "model.processor" if config.processor else "model.init_from"
        raise ConfigError(f"{key}={source!r}: no processor could be loaded: {error}") from error
    if config.modalities is not None:
        return restricted(processor, config.modalities)
    if vae is None or config.transfusion is None:
        return processor
    return transfusion_processor(processor, config.transfusion, vae, keep_speech)


def restricted(processor: MoTProcessor, modalities: Sequence[str]) -> MoTProcessor:
    """Restrict a processor of discrete codes to some of its modalities; its text keeps its ids.

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


def transfusion_processor(
    processor: MoTProcessor, config: TransfusionModelConfig, vae: Autoencoder, keep_speech: bool = False
) -> MoTProcessor:
    """Make a processor that keeps the text tokens, and keeps pictures as pixels.

    A token of a picture stands for a square with a side of (the VAE's factor x the patch size) pixels.

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
    side = downsampling(vae_config_of(vae)) * (config.patch_size or MoTTransfusionConfig.patch_size)
    try:
        return continuous_processor(processor, config.image_size, side, keep_speech=keep_speech)
    except ValueError as error:
        raise ConfigError(f"model.transfusion.image_size={config.image_size}: {error}") from error


# ----------------------------------------------------------------------------------------------------- fitting together


@dataclass(frozen=True)
class Planned:
    """A model, a processor, a VAE and data that fit together.

    Attributes:
        config: of the model.
        processor: makes its tokens.
        vae: of continuous images; None where all is tokens.
        model: the model section of the recipe, with the sizes and modalities that it left open.
        data: the data section, with the clean copies that the model needs.
    """

    config: MoTConfig
    processor: MoTProcessor
    vae: Autoencoder | None
    model: ModelConfig
    data: DataConfig


def plan_model(
    model: ModelConfig, data: DataConfig, initial: MoTPreTrainedModel | None = None, budget: Budget | None = None
) -> Planned:
    """Decide what is trained and on what, before anything is built or tokenised.

    Args:
        model, data: sections of the recipe; they stay as they are.
        initial: the checkpoint of `model.init_from`, with or without weights (`load_frame`).
        budget: what a size that is left open must fit; None: the smallest is taken, since the data do not depend on it.

    Raises:
        ConfigError: model, processor, VAE and rows do not fit each other, or the budget.
    """
    vae = find_vae(model, initial)

    # Modalities: a recipe that names no size gets those of its data, a row of the paper's tables has its own.
    is_open = leaves_size_open(model)
    if is_open and model.modalities is None and vae is None and model.processor is None:
        model = replace(model, modalities=modalities_of(data))
    elif model.modalities is None and model.preset is not None and vae is None:
        model = replace(model, modalities=list(MoTConfig.from_preset(model.preset).modalities))
        if lacking := set(modalities_of(data) or ()) - set(model.modalities):
            raise ConfigError(
                f"model.preset={model.preset!r} has {', '.join(model.modalities)}, but data has "
                f"{', '.join(sorted(lacking))} as well; take a preset of these modalities, or set model.modalities"
            )
    elif model.modalities is not None and (lacking := set(modalities_of(data) or ()) - set(model.modalities)):
        raise ConfigError(f"model.modalities={model.modalities} lack {', '.join(sorted(lacking))}, which data has")
    processor = load_processor(model, vae, has_sound(data))

    # Size, and with it the configuration.
    if is_open:
        model = choose_size(model, processor, data.row_length, vae, budget)
    config = planned_config(model, processor, data.row_length, vae, initial)
    if budget is not None:
        budget.refuse_impossible(config)
    if initial is None:
        _check_attention(model, config, vae)

    # What the data and the model ask of each other.
    if vae is not None:
        config.caption_dropout = max(config.caption_dropout, caption_dropout(data))
    if not getattr(config, "noised_images_visible", True) and not getattr(config, "encoders", None):
        data = replace(data, clean_copies=True)
    return Planned(config, processor, vae, model, data)


def choose_size(
    model: ModelConfig, processor: MoTProcessor, row_length: int, vae: Autoencoder | None, budget: Budget | None
) -> ModelConfig:
    """Choose the largest of `SIZES` up to which each is within the budget; the smallest at least."""
    chosen, *larger = (replace(model, **sizes) for sizes in SIZES.values())
    for candidate in larger if budget is not None else ():
        if not budget.is_enough_for(planned_config(candidate, processor, row_length, vae)):
            break
        chosen = candidate
    return chosen


def _check_attention(model: ModelConfig, config: MoTConfig, vae: Autoencoder | None) -> None:
    """Refuse an attention implementation that this model cannot be trained with."""
    name = model.attn_implementation
    if name is None:
        return
    if name.startswith("paged|"):
        raise ConfigError(f"model.attn_implementation={name!r} is for serving; leave out paged|")
    try:
        empty_model(model, config, vae)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"model.attn_implementation={name!r}: {error}") from error


def fill_from_checkpoint(model: ModelConfig, stored: Mapping[str, Any]) -> ModelConfig:
    """Return the model section with the size and the modalities that its run began with."""
    return replace(model, **{name: stored.get(name) for name in (*SIZE_FIELDS, "modalities")})


def modalities_of(data: DataConfig) -> list[str] | None:
    """List the modalities of the data, text first.

    The templates name the modalities; for a template of a document, the first records do. Returns None if the records
    cannot be read: the preparation, which reads them again, reports the reason.
    """

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


def has_sound(data: DataConfig) -> bool:
    """True if any template has a sound, so that the model needs speech beside text and pictures."""
    sources = (*data.sources, *data.validation_sources)
    return any(segment.type == "audio" for source in sources for segment in source.segments)


def planned_config(
    config: ModelConfig,
    processor: MoTProcessor,
    row_length: int,
    vae: Autoencoder | None = None,
    initial: MoTPreTrainedModel | None = None,
) -> MoTConfig:
    """Return the configuration that a recipe trains: a new one, or `initial`'s with the recipe's objective.

    Raises:
        ConfigError: model, processor, VAE and rows do not fit each other.
    """
    if initial is None:
        planned = model_config(config, processor, row_length, vae)
        check_pictures(planned, processor)
    else:
        planned = deepcopy(initial.config)
        check_pictures(planned, processor)
        check_fits(planned, processor, config.init_from)
        planned.tokenizer_vocab_size = processor.config_kwargs()["vocab_size"]
        if config.transfusion is not None:
            set_objective(planned, config.transfusion, config.init_from)
    if vae is not None and (length := planned.image_length(*planned.latent_size)) > row_length:
        raise ConfigError(
            f"a picture of latent_size={list(planned.latent_size)} takes {length:,} tokens, but "
            f"data.row_length={row_length}; make model.transfusion.image_size smaller or rows longer"
        )
    if planned.max_position_embeddings < row_length:
        raise ConfigError(
            f"data.row_length={row_length} is longer than the model's max_position_embeddings="
            f"{planned.max_position_embeddings}; shorten the rows or set model.max_position_embeddings"
        )
    return planned


def model_config(
    config: ModelConfig, processor: MoTProcessor, row_length: int, vae: Autoencoder | None = None
) -> MoTConfig:
    """Make the configuration of a new model: sizes from the recipe, vocabulary of the processor, latents of the VAE.

    A preset keeps its own vocabulary size if the processor's fits in; the ids beyond are never sampled.
    """
    # Fields of the processor, of the recipe, and of the VAE where there is one.
    tokens = processor.config_kwargs()
    overrides = size_overrides(config)
    config_class = MoTConfig
    if vae is None and processor.image_processor is not None:
        raise ConfigError(
            f"model.processor={config.processor!r} keeps pictures as pixels, for a model that diffuses them: set "
            "model.transfusion, such as model.transfusion.vae=carried"
        )
    if vae is not None:
        config_class = MoTTransfusionConfig
        factor = downsampling(vae_config_of(vae))
        overrides |= config.transfusion.model_fields()
        overrides["latent_size"] = [side // factor for side in config.transfusion.image_size]
        overrides["latent_channels"] = vae.config.latent_channels
        overrides["vae_config"] = vae_config_of(vae)
    # A size of one's own, or a preset's.
    try:
        if config.preset is None:
            overrides.setdefault("max_position_embeddings", row_length)
            return config_class.from_variant(config.variant, **tokens, **overrides)
        preset = config_class.from_preset(config.preset, config.variant)
        tokens["tokenizer_vocab_size"] = tokens["vocab_size"]
        tokens["vocab_size"] = max(tokens["vocab_size"], preset.vocab_size)
        overrides.setdefault("max_position_embeddings", max(row_length, preset.max_position_embeddings))
        return config_class.from_preset(config.preset, config.variant, **tokens, **overrides)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


_NOT_FIELDS_OF_MOT = {
    "variant", "preset", "init_from", "processor", "modalities", "rope_theta", "attn_implementation", "transfusion",
    "gradient_checkpointing", "compile", "tower_products", "image_tokens", "image_size",
}  # fmt: skip


def size_overrides(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of MoTConfig that the recipe sets."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _NOT_FIELDS_OF_MOT}
    values = {name: value for name, value in values.items() if value is not None}
    if config.rope_theta is not None:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return values


def check_pictures(config: MoTConfig, processor: MoTProcessor) -> None:
    """Refuse a processor whose pictures the model does not take: codes or pixels, and how many pixels a token.

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
            f"(VAE {config.vae_downsampling} x patch_size {config.patch_size}); use one with downsampling={wanted}"
        )
    # Pictures that the model looks at.
    given = getattr(processor, "placeholder_token_ids", {"image": processor.image_token_id})
    if given != config.placeholder_token_ids:
        raise ConfigError(
            f"model.processor: its placeholders are {given}, but those of the model {config.placeholder_token_ids}; "
            "use the model's own processor"
        )
    for name, modality in (config.continuous_modalities or {}).items():
        patch, found = config.encoders[modality["encoder"]]["patch_size"], processor.encoder_processor.downsampling
        if patch != found:
            raise ConfigError(
                f"model.processor: a token of {name} stands for {found} pixels a side, but for {patch} in the model; "
                "use the model's own processor"
            )


# How to get a processor whose pictures are the paper's: 1,024 codes of 512 pixels.
OF_THE_PAPER = (
    "train one with `python -m training.tokenizers.image --preset chameleon-512 --source PICTURES --output runs/image` "
    "(1,024 of 8,192 codes for 512 x 512 pixels; --image-size and --channels make others) and "
    "`python -m training.tokenizers.processor --text training/assets/processor --image runs/image "
    "--speech training/assets/processor/speech_tokenizer --output runs/processor`, or take Chameleon's own with "
    "`python -m conversion.import_chameleon facebook/chameleon-7b runs/chameleon` (without a decoder; Anole has one), "
    "and name the folder in model.processor"
)


def check_image_codes(model: ModelConfig, processor: MoTProcessor) -> None:
    """Refuse a processor whose pictures do not have the codes and pixels that the recipe asks for.

    Plans need no such processor, so `plan_model` does not ask for it.

    Raises:
        ConfigError: naming the key, both values and the commands that make such a processor.
    """
    tokenizer, found = processor.image_tokenizer, {}
    if tokenizer is not None and tokenizer.image_grid is not None:
        found = {"image_tokens": math.prod(tokenizer.image_grid), "image_size": list(tokenizer.config.image_size)}
    for name in ("image_tokens", "image_size"):
        wanted = getattr(model, name)
        if wanted is None or found.get(name) == wanted:
            continue
        named = model.processor or model.init_from or "the carried processor"
        has = "has no codes of one size for pictures"
        way_out = f"set model.{name}=null"
        if found:
            has = f"makes {found['image_tokens']:,} tokens of {' x '.join(map(str, found['image_size']))} pixels"
            height, width = found["image_size"]
            way_out = f"set model.image_tokens={found['image_tokens']} model.image_size=[{height},{width}]"
        raise ConfigError(
            f"model.{name}={wanted}, but {named} {has}; {OF_THE_PAPER}; to train with this processor, {way_out}"
        )


def check_fits(config: MoTConfig, processor: MoTProcessor, source: str) -> None:
    """Refuse a processor whose tokens are not those of the model."""
    for name, expected in processor.config_kwargs().items():
        found = getattr(config, name, None)
        fits = found >= expected if name == "vocab_size" else _plain(found) == _plain(expected)
        fits |= name == "pad_token_id" and found is None  # any token will do, since padding is never read
        if not fits and name != "image_grid":
            raise ConfigError(f"{source!r} was made with {name}={found}, the processor has {expected}; use its own")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# The fields of a Transfusion model that may change when it is trained further.
OBJECTIVE_FIELDS = (
    "diffusion_loss_weight",
    "image_first_max_timestep",
    "timestep_sampling",
    "timestep_sampling_parameters",
    "timestep_range",
    "smallest_divisor",
)


def set_objective(config: MoTTransfusionConfig, recipe: TransfusionModelConfig, init_from: str) -> None:
    """Give a checkpoint's configuration the recipe's objective, in place; other fields must be the checkpoint's.

    Raises:
        ConfigError: another field differs.
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


def caption_dropout(data: DataConfig) -> float:
    """Return the share of captions that are dropped, the most of any template; without it guidance makes no sense."""
    return max((template.caption_dropout for source in data.sources for template in source.templates), default=0.0)


# ------------------------------------------------------------------------------------------------------------- building


def build_model(
    config: ModelConfig,
    planned: MoTConfig,
    seed: int,
    vae: Autoencoder | None = None,
    initial: MoTPreTrainedModel | None = None,
) -> MoTPreTrainedModel:
    """Make a new model, initialised from `seed` alone, or train `initial` on; in float32, in training mode."""
    if initial is not None:
        # Its parts share its configuration, so the planned objective is written into that.
        objective = (*OBJECTIVE_FIELDS, "caption_dropout") if isinstance(planned, MoTTransfusionConfig) else ()
        for name in ("tokenizer_vocab_size", *objective):
            setattr(initial.config, name, getattr(planned, name))
        return _to_train(initial)
    torch.manual_seed(seed)
    return _to_train(_new_model(config, planned, vae))


def empty_model(config: ModelConfig, planned: MoTConfig, vae: Autoencoder | None = None) -> MoTPreTrainedModel:
    """Make a new model without weights: its parameters on the meta device, its buffers and the VAE real."""
    with init_empty_weights(include_buffers=False):
        return _to_train(_new_model(config, planned, vae))


def _to_train(model: MoTPreTrainedModel) -> MoTPreTrainedModel:
    """Put a model into training mode, with the generation setting that documents need."""
    if model.generation_config.min_new_tokens is None:
        # Documents may end after a picture; a request for text behind a picture is to get some.
        model.generation_config.min_new_tokens = 1
    return model.train()


def _new_model(config: ModelConfig, planned: MoTConfig, vae: Autoencoder | None) -> MoTPreTrainedModel:
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    parts = {} if vae is None else {"vae": vae}
    return MODEL_CLASSES[planned.model_type]._from_config(planned, dtype=torch.float32, **parts, **attention)


def set_up_layers(model: MoTPreTrainedModel, checkpointing: bool, compiled: bool, products: str = "separate") -> None:
    """Set how layers run: recomputed in the backward, compiled, with joined products; before the model is sharded."""
    model.set_tower_products(products)
    if checkpointing:
        # Its older name warns where transformers knows the newer one.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if compiled:
        for layer in model.model.layers:
            layer.compile()
