"""Check the arguments of `forward` and `generate()`, on the host and by name; those of a forward without a wait for it.

In reading order: the two names of the cache, the arguments of a forward, labels and logits, then prompts and settings
of `generate()`, then the rows of tokens that negative prompts and a server's requests have.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from reprlib import repr as shortened
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import TransformersKwargs

from .attention_masks import AttentionPlan, ImageBlocks
from .checks_fields import Maybe, Number, Whole, check_fields, did_you_mean, is_real, is_whole
from .configuration_mot import check_spans
from .tower_routing import ModalityRouting


# B batch, L row length, D hidden size, H heads, V vocabulary, R rows


# ------------------------------------------------------------------------------------------ the two names of the cache


# Forwards here take `past_key_values`, the cache's name in transformers up to 5.23. Version 5.24 renamed it to `cache`:
# in its outputs, and in the arguments that `generate()` passes.
OTHER_NAME = {"past_key_values": "cache", "cache": "past_key_values"}
# The name in the outputs of the installed transformers, and in its `model_kwargs`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_as(name: str, arguments: dict) -> dict:
    """Give the cache one name among arguments that may hold it by either name.

    Args:
        name: `CACHE` for transformers, "past_key_values" for forwards of this package.

    Raises:
        ValueError: the arguments hold two caches.
    """
    other = OTHER_NAME[name]
    if other not in arguments:
        return arguments
    arguments = dict(arguments)
    cache = arguments.pop(other)
    if arguments.get(name) is None:
        arguments[name] = cache
    elif cache is not None and cache is not arguments[name]:
        raise ValueError("past_key_values and cache are two names of one argument, but two caches came: pass one")
    return arguments


def takes_both_names(method: Callable) -> Callable:
    """Let a method that has a parameter for the cache, by one of its names, take it by the other name as well."""
    names = [name for name in OTHER_NAME if name in inspect.signature(method).parameters]
    if len(names) != 1:
        return method

    @wraps(method)
    def with_both_names(*args, **kwargs):
        return method(*args, **cache_as(names[0], kwargs))

    return with_both_names


class CacheNamesMixin:
    """Lets this package's models, and classes that are derived from them, take the cache by both of its names."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in ("forward", "prepare_inputs_for_generation"):
            if name in vars(cls):
                setattr(cls, name, takes_both_names(vars(cls)[name]))


# ------------------------------------------------------------------------------------------ the arguments of a forward


# Keywords that Trainer, TRL, PEFT, accelerate and engines give to any model. Layers, attention functions or
# transformers' decorators read them. A model of tokens has no use for `token_type_ids`, but tokenizers of other
# families make them.
KEYWORDS = frozenset(TransformersKwargs.__optional_keys__) | {
    "cache_position",
    "debug_io",
    "debug_io_dir",
    "image_blocks",
    "attention_plan",
    "logits_to_keep",
    "prune_layers",
    "return_dict",
    "shift_labels",
    "token_choice",
    "token_type_ids",
    "use_cache",
}


def check_keywords(model, kwargs: dict) -> None:
    """Refuse unknown keywords, and suggest the nearest known one; a keyword of None asks for nothing and passes.

    A registered attention function may have parameters of its own, which are known.

    Raises:
        TypeError: an unknown keyword.
    """
    unknown = [name for name, value in kwargs.items() if name not in KEYWORDS and value is not None]
    if not unknown:
        return
    attention = ALL_ATTENTION_FUNCTIONS.get(model.config._attn_implementation)
    of_attention = set() if attention is None else set(inspect.signature(attention).parameters)
    for name in unknown:
        if name not in of_attention:
            known = [*inspect.signature(type(model).forward).parameters, *KEYWORDS]
            raise TypeError(
                f"{type(model).__name__}.forward() got an unknown argument {name!r}{did_you_mean(name, known)}"
            )


def check_tensor(name: str, value: Any, shape: tuple | None = None, dtype: torch.dtype | None = None) -> None:
    """Refuse a value that is no tensor, or has another shape or dtype than the given one.

    Raises:
        ValueError: by name.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}={shortened(value)} is {type(value).__name__}, and must be a tensor")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but the images need {shape}")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name} is {value.dtype}, and must be a tensor of {dtype}")


def check_whole(name: str, ids: Any) -> None:
    """Refuse a value that is no tensor of whole numbers.

    Raises:
        ValueError: by name.
    """
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"{name} is {kind}, and must be a tensor of whole numbers")


def check_ids(name: str, ids: torch.Tensor, shape: tuple | None = None) -> None:
    """Refuse a value that is no tensor of whole numbers of this shape, by default of any (B, L).

    Raises:
        ValueError: by name.
    """
    check_whole(name, ids)
    if shape is None and (ids.dim() != 2 or not ids.numel()):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, and must be (batch, length), both at least 1")
    if shape is not None and tuple(ids.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)} but the tokens have {tuple(shape)}; pass one for each token"
        )


def check_forward(
    model, keywords: dict, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, document_ids
) -> tuple[int, int]:
    """Check the arguments that all forwards have, without a wait for a device.  -> (B, L)

    Args:
        keywords: the keyword arguments that the forward passes on.

    Raises:
        TypeError: an unknown keyword.
        ValueError: tokens that are missing or given twice, or tensors that do not fit them; by name.
    """
    check_keywords(model, keywords)
    shape = check_tokens(model.config, input_ids, inputs_embeds)
    check_rows(model.config, shape, attention_mask, position_ids, past_key_values, document_ids)
    return shape


def check_tokens(config, input_ids, inputs_embeds) -> tuple[int, int]:
    """Refuse anything but either ids (B, L) or embeddings (B, L, D).  -> (B, L)

    Raises:
        ValueError: by name.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if inputs_embeds is None:
        check_ids("input_ids", input_ids)
        return input_ids.shape
    check_tensor("inputs_embeds", inputs_embeds)
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.widest_hidden_size or not inputs_embeds.numel():
        of_towers = f" of the widest of tower_widths={config.tower_widths}" if config.tower_widths else ""
        raise ValueError(
            f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, and must be (batch, length, hidden_size="
            f"{config.widest_hidden_size}{of_towers})"
        )
    if not inputs_embeds.is_floating_point():
        raise ValueError(f"inputs_embeds is {inputs_embeds.dtype}, and must be a tensor of floats")
    return inputs_embeds.shape[:2]


def check_plans(routing: Any, attention_plan: Any, image_blocks: Any) -> None:
    """Refuse a plan made ahead that lacks fields of its class. A plan of another copy of this code is as good.

    Raises:
        ValueError: by name.
    """
    kinds = {"routing": ModalityRouting, "attention_plan": AttentionPlan, "image_blocks": ImageBlocks}
    for (name, kind), plan in zip(kinds.items(), (routing, attention_plan, image_blocks)):
        if plan is not None and not all(hasattr(plan, field) for field in kind._fields):
            raise ValueError(f"{name}={shortened(plan)} must be a {kind.__name__}, or None to make one here")


def check_rows(config, shape, attention_mask, position_ids, past_key_values, document_ids=None) -> None:
    """Refuse a mask, positions, documents or a cache whose shapes do not fit the tokens.

    Args:
        config: a `MoTConfig`.
        shape: (B, L) of the tokens.
        attention_mask: (B, past + L), or a 4-D mask (1 or B, 1 or H, L, keys), or a `BlockMask` of flex attention.
        position_ids: (B, L) or (1, L), or with RoPE of three axes (3, B, L).
        document_ids: (B, L)

    Raises:
        ValueError: by name.
    """
    # The cache.
    batch, length = shape
    if past_key_values is not None and not isinstance(past_key_values, Cache):
        raise ValueError(f"past_key_values is a {type(past_key_values).__name__}, and must be a Cache of transformers")
    if isinstance(past_key_values, DynamicCache) and past_key_values.layers:
        keys = getattr(past_key_values.layers[0], "keys", None)
        if keys is not None and keys.dim() == 4 and keys.shape[0] != batch:
            raise ValueError(f"past_key_values holds {keys.shape[0]} rows but there are {batch} rows of tokens")

    # Ids of documents and positions.
    if document_ids is not None:
        check_ids("document_ids", document_ids, shape)
    if isinstance(position_ids, torch.Tensor) and position_ids.dim() == 3:
        _check_grid(config, position_ids, tuple(shape))
    elif position_ids is not None:
        check_whole("position_ids", position_ids)
        check_ids(
            "position_ids", position_ids, position_ids.shape if tuple(position_ids.shape) == (1, length) else shape
        )

    # The mask, over the keys of the cache and of this forward.
    if attention_mask is not None and not isinstance(attention_mask, BlockMask):
        check_tensor("attention_mask", attention_mask)
    if isinstance(attention_mask, torch.Tensor):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        # The length of a static cache is a tensor, which may be on a device: it is not waited for.
        keys = past + length if isinstance(past, int) else None
        _check_mask(config, attention_mask, batch, length, keys)


def _check_grid(config, position_ids: torch.Tensor, shape: tuple[int, int]) -> None:
    """Refuse positions of three axes that do not fit; a time may be a fraction."""
    if not config.has_grid_positions or tuple(position_ids.shape) != (3, *shape):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, and must be {shape}, or {(3, *shape)} of time, row "
            "and column where rope_parameters has mrope_section"
        )
    if position_ids.dtype == torch.bool or position_ids.is_complex():
        raise ValueError(f"position_ids is {position_ids.dtype}, and must be a tensor of numbers")


def _check_mask(config, mask: torch.Tensor, batch: int, length: int, keys: int | None) -> None:
    if mask.dim() == 2:
        fits = mask.shape[0] == batch and (mask.shape[1] >= length if keys is None else mask.shape[1] == keys)
    else:
        heads = (1, config.num_attention_heads)
        fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in heads and mask.shape[2] == length
        fits = fits and mask.shape[3] >= (length if keys is None else keys)
    if not fits:
        columns = f"at least {length}" if keys is None else keys
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} but there are {batch} rows of {length} tokens, and "
            f"{columns} keys with those of past_key_values: it must be ({batch}, {columns}), or a 4-D mask of {length} "
            "queries"
        )


def own_modalities(config, modality_ids: torch.Tensor | None, length: int, past_key_values) -> torch.Tensor | None:
    """Cut the modalities of cached keys off, which `config.unseen_towers` needs.  (B, past + L) or (B, L) -> (B, L)

    Raises:
        ValueError: `modality_ids` is no tensor of whole numbers.
    """
    if modality_ids is None or not config.unseen_towers or past_key_values is None:
        return modality_ids
    check_whole("modality_ids", modality_ids)
    return modality_ids[:, -length:]


def behind_virtual_tokens(modality_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Put text before the modalities of rows that begin with virtual tokens.  (B, real tokens) -> (B, L)

    Raises:
        ValueError: `modality_ids` is no tensor of whole numbers.
    """
    check_whole("modality_ids", modality_ids)
    return F.pad(modality_ids, (max(length - modality_ids.shape[-1], 0), 0))


# ------------------------------------------------------------------------------------------- labels, logits and losses


def check_logits_to_keep(logits_to_keep: Any, shape: tuple[int, int]) -> None:
    """Refuse anything but a number of last positions, a tensor of positions, or a boolean mask of them.

    Args:
        logits_to_keep: a number; positions (n,) or (B, n); or a mask (L,) or (B, L).
        shape: (B, L) of the tokens.

    Raises:
        ValueError: by name.
    """
    if type(logits_to_keep) is int and logits_to_keep >= 0:
        return  # as nearly always
    if not isinstance(logits_to_keep, torch.Tensor):
        if not is_whole(logits_to_keep, 0):
            raise ValueError(f"logits_to_keep={logits_to_keep!r} must be 0 for all, or the number of last positions")
    elif logits_to_keep.dtype == torch.bool:
        if tuple(logits_to_keep.shape) not in (shape, shape[1:]):
            raise ValueError(f"logits_to_keep has shape {tuple(logits_to_keep.shape)} but the tokens have {shape}")
    else:
        check_whole("logits_to_keep", logits_to_keep)
        if logits_to_keep.dim() > 2 or logits_to_keep.dim() == 2 and len(logits_to_keep) != shape[0]:
            raise ValueError(
                f"logits_to_keep has shape {tuple(logits_to_keep.shape)}; it must be (n,) or ({shape[0]}, n)"
            )
        on_host = logits_to_keep.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and any(not -shape[1] <= place < shape[1] for place in logits_to_keep.flatten().tolist()):
            raise ValueError(f"logits_to_keep={logits_to_keep.tolist()} has positions outside of {shape[1]} tokens")


def check_items(num_items_in_batch: Any) -> None:
    """Refuse a number of items that no loss can be divided by; a number on a device is not waited for.

    Raises:
        ValueError: by name.
    """
    if num_items_in_batch is None:
        return
    smallest = num_items_in_batch
    if isinstance(num_items_in_batch, torch.Tensor):
        if num_items_in_batch.device.type != "cpu" or torch.compiler.is_compiling() or not num_items_in_batch.numel():
            return
        smallest = num_items_in_batch.min().item()
    if not is_real(smallest) or smallest <= 0:
        raise ValueError(
            f"num_items_in_batch={shortened(smallest)} must be the number of targets in the batch, and greater than 0; "
            "leave it out to divide by the targets that are here"
        )


def check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """Refuse labels that are neither tokens nor -100, without a wait for a device.

    On a CPU the message names the value. Elsewhere, and while a graph is traced, the device asserts it later.

    Raises:
        ValueError: a label outside of the vocabulary.
    """
    outside = (labels != -100) & ((labels < 0) | (labels >= vocab_size))
    if type(labels) is torch.Tensor and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if bool(outside.any()):
            raise ValueError(
                f"labels hold {int(labels[outside][0])}, which is no token of vocab_size={vocab_size}; mark what is "
                "not to be predicted, padding for one, with -100"
            )
    else:
        torch._assert_async(~outside.any(), f"labels must be -100, or in [0, vocab_size={vocab_size})")


# ---------------------------------------------------------------------------------- prompts and settings of generate()


def check_prompt_keywords(model, model_kwargs: dict) -> None:
    """Refuse unknown arguments of `generate()`, and suggest the nearest known one.

    Raises:
        ValueError: as transformers does.
    """
    methods = (model.forward, model.prepare_inputs_for_generation)
    known = {name for method in methods for name in inspect.signature(method).parameters} | KEYWORDS
    for name, value in model_kwargs.items():
        if value is not None and name not in known:
            near = did_you_mean(name, [*known, *vars(GenerationConfig())])
            raise ValueError(f"generate() got an unknown argument {name!r}{near}")


def check_call(inputs: Any, arguments: dict) -> None:
    """Refuse tensors of a prompt of `generate()` that have another type or other dimensions.

    Args:
        inputs: the positional argument, or None.
        arguments: all others by name, of which `input_ids`, masks, ids, embeddings and images are checked.

    Raises:
        ValueError: by name.
    """
    given = {"inputs": inputs} | {name: arguments.get(name) for name in ("input_ids", "modality_ids")}
    for name, ids in given.items():
        if ids is None:
            continue
        check_whole(name, ids)
        # Ids beside embeddings may have no columns, and a request for a server may be one row.
        is_served = arguments.get("cache_implementation") == "paged"
        if ids.dim() not in ((1, 2) if is_served else (2,)) or not len(ids):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}, and must be (batch, length), with a row at least")
    if (positions := arguments.get("position_ids")) is not None:
        check_whole("position_ids", positions)
        if positions.dim() != 2:
            raise ValueError(f"position_ids has shape {tuple(positions.shape)}, and must be (batch, length)")
    for name in ("attention_mask", "inputs_embeds", "latents", "pixel_values", "encoder_pixel_values"):
        if arguments.get(name) is not None and not isinstance(arguments[name], BlockMask):
            check_tensor(name, arguments[name])
    mask, embeds = arguments.get("attention_mask"), arguments.get("inputs_embeds")
    if isinstance(mask, torch.Tensor) and mask.dim() not in (2, 4):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, and must be (batch, length)")
    if embeds is not None and (embeds.dim() != 3 or not len(embeds)):
        raise ValueError(f"inputs_embeds has shape {tuple(embeds.shape)}, and must be (batch, length, hidden_size)")


def check_prompt(prompt: torch.Tensor, model_kwargs: dict) -> None:
    """Refuse masks, modalities and positions that do not have the prompts' shape.

    Args:
        prompt: (B, L) ids, or (B, L, D) embeddings.

    Raises:
        ValueError: by name.
    """
    shape = tuple(prompt.shape[:2])
    # With a cache, masks and ids may cover cached and new tokens, or new tokens alone: their length is not checked.
    continues = model_kwargs.get(CACHE) is not None
    for name in ("attention_mask", "modality_ids", "position_ids"):
        given = model_kwargs.get(name)
        if not isinstance(given, torch.Tensor) or given.dim() != 2:
            continue
        rows = (1, shape[0]) if name == "position_ids" else (shape[0],)
        if given.shape[0] not in rows or not (continues or given.shape[1] == shape[1]):
            raise ValueError(
                f"{name} has shape {tuple(given.shape)} but the prompts have {shape}: pass one for each token"
            )


MOST_SCALE = 1e6  # the largest factor or divisor of logits and predictions
# Arguments that transformers never checks: with a limit of NaN no sequence ends.
WHOLE = {"max_new_tokens": 0, "max_length": 0, "min_new_tokens": 0, "min_length": 0, "num_return_sequences": 1}
SAMPLING_RULES = {
    "num_beams": Maybe(Whole()),
    "top_k": Maybe(Whole(0)),
    "top_p": Maybe(Number(0, 1)),
    "repetition_penalty": Maybe(Number(open="low")),
}


def check_lengths(arguments: dict) -> None:
    """Refuse lengths and counts that are no whole numbers.

    Raises:
        ValueError: the message names field, value and way out.
    """
    for name, least in WHOLE.items():
        value = arguments.get(name)
        if value is not None and not is_whole(value, least):
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def check_settings(generation_config) -> None:
    """Refuse settings that the loop over tokens cannot use.

    Raises:
        ValueError: the message names field, value and way out.
    """
    check_lengths(vars(generation_config))
    check_fields(vars(generation_config), SAMPLING_RULES)
    check_spans(getattr(generation_config, "image_grid", None), getattr(generation_config, "max_speech_tokens", None))
    constrain = getattr(generation_config, "constrain_spans", None)
    if constrain is not None and not isinstance(constrain, bool):
        raise ValueError(f"constrain_spans={constrain!r} must be True or False")
    scale, temperature = generation_config.guidance_scale, generation_config.temperature
    if scale is not None and not (is_real(scale) and abs(scale) <= MOST_SCALE):
        raise ValueError(
            f"guidance_scale={scale!r} must be a finite number of at most {MOST_SCALE:g}; 1 is no guidance"
        )
    # A tiny or huge temperature makes infinities of logits. Of 0 and less, transformers' own message says more.
    if temperature is not None and not (
        is_real(temperature) and (temperature <= 0 or 1 / MOST_SCALE <= temperature <= MOST_SCALE)
    ):
        raise ValueError(
            f"temperature={temperature!r} must be a number from {1 / MOST_SCALE:g} to {MOST_SCALE:g}; "
            "do_sample=False takes the likeliest"
        )
    check_generator(getattr(generation_config, "generator", None))


def check_generator(generator: Any) -> None:
    """Refuse anything but a `torch.Generator`, a list of them, or None.

    Raises:
        ValueError: the message names the type that came.
    """
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(entry, torch.Generator) for entry in generators):
        kinds = ", ".join(sorted({type(entry).__name__ for entry in generators}))
        raise ValueError(f"generator={kinds} must be a torch.Generator, or a list with one for each sequence")


def check_streamer(streamer: Any) -> None:
    """Refuse a streamer that cannot take tokens or their end.

    Raises:
        ValueError: a method is missing.
    """
    for name in ("put", "end"):
        if streamer is not None and not callable(getattr(streamer, name, None)):
            raise ValueError(
                f"streamer={type(streamer).__name__} has no method {name}(); see transformers' BaseStreamer"
            )


def check_config(generation_config: Any) -> None:
    """Refuse anything but a `GenerationConfig` or None.

    Raises:
        ValueError: the message names the value.
    """
    if not isinstance(generation_config, (GenerationConfig, type(None))):
        raise ValueError(f"generation_config={shortened(generation_config)} must be a GenerationConfig of transformers")


def check_called(name: str, functions: Any) -> None:
    """Refuse anything but a list of functions, such as logits processors and stopping criteria, or None.

    Raises:
        ValueError: by name.
    """
    if functions is not None and not (isinstance(functions, (list, tuple)) and all(map(callable, functions))):
        raise ValueError(f"{name}={shortened(functions)} must be a list of what can be called")


# ------------------------------------------------------------------------------------------------------ rows of tokens


def rows_of(name: str, value: Any, count: int | None = None) -> torch.Tensor:
    """Make a new tensor (R, L) of a tensor, an array or lists, (L,) or (R, L).

    Args:
        count: R may be this or 1; default: any number.

    Raises:
        ValueError: the value makes no such tensor, is empty, or has another number of rows.
    """
    if isinstance(value, (str, bytes)):
        raise ValueError(f"{name}={value[:40]!r} is text; encode it first, with the model's processor or tokenizer")
    try:
        rows = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} makes no tensor of (rows, tokens): {error}") from None
    if rows.dim() not in (1, 2) or not rows.numel():
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; it must be (L,) or (rows, L), with a token at least")
    rows = rows.clone().view(-1, rows.shape[-1])
    if count is not None and len(rows) not in (1, count):
        raise ValueError(f"{name} has {len(rows)} rows for {count} sequences; give one for all or one for each prompt")
    return rows


def whole_rows(name: str, value: Any, end: int, of: str, count: int | None = None) -> torch.Tensor:
    """Make rows of whole numbers in [0, end), as `rows_of` does.  -> (R, L) int64

    Args:
        of: the name of `end`, for the message.

    Raises:
        ValueError: as `rows_of`; numbers of another kind, or outside of the range.
    """
    rows = rows_of(name, value, count)
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise ValueError(f"{name} holds {rows.dtype}; it must hold whole numbers")
    rows = rows.long()
    lowest, highest = rows.min().item(), rows.max().item()
    if lowest < 0 or highest >= end:
        raise ValueError(f"{name} holds numbers from {lowest} to {highest}; they must lie in [0, {of}={end})")
    return rows


def mask_rows(name: str, value: Any) -> torch.Tensor:
    """Make rows of a mask, 1 or True for tokens and 0 for padding, as `rows_of` does.  -> (R, L) int64

    Raises:
        ValueError: as `rows_of`; other numbers.
    """
    rows = rows_of(name, value)
    if not ((rows == 0) | (rows == 1)).all():
        raise ValueError(f"{name} holds other numbers than 1 for tokens and 0 for padding")
    return rows.long()


def negative_prompt(config, ids: Any, mask: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Check `negative_prompt_ids` and `negative_prompt_attention_mask` of `count` prompts.  -> (1 or count, L) twice

    Raises:
        ValueError: ids outside of the vocabulary or of images, another number of rows, a mask that does not fit.
    """
    if ids is None:
        raise ValueError("negative_prompt_attention_mask came without negative_prompt_ids, whose padding it marks")
    ids = whole_rows("negative_prompt_ids", ids, config.vocab_size, "vocab_size", count)
    for modality, placeholder in config.placeholder_token_ids.items():  # of a Transfusion model
        if (ids == placeholder).any():
            field = "image_token_id" if modality == "image" else f"the placeholder of {modality!r}"
            raise ValueError(
                f"negative_prompt_ids holds {field}={placeholder}: a negative prompt is text, so leave its pictures out"
            )
    if mask is None:
        return ids, torch.ones_like(ids)
    mask = mask_rows("negative_prompt_attention_mask", mask).to(ids.device)
    if mask.shape != ids.shape:
        raise ValueError(
            f"negative_prompt_attention_mask has shape {tuple(mask.shape)}, but negative_prompt_ids {tuple(ids.shape)}"
        )
    if (mask[:, -1] == 0).any() or (mask[:, 1:] < mask[:, :-1]).any():
        raise ValueError(
            "negative_prompt_attention_mask has padding on the right; pad negative prompts on the left "
            "(padding_side='left')"
        )
    return ids, mask
