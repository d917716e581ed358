"""What the forwards take: the keywords that others pass, and the shapes of tensors, checked on the host by name."""

# B batch, L row length, H heads, V vocabulary

import inspect

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import TransformersKwargs

from .field_checks_mot import did_you_mean


# Passed on to layers and attention, or read by transformers' decorators: what Trainer, TRL, PEFT, accelerate and engines
# give to any model. A model of tokens has no use for `token_type_ids`, but tokenizers of other families make them.
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
    """Refuse keywords that nobody reads, with the nearest that is; None asks for nothing and passes.

    An attention function that somebody registered may have parameters of its own.

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


def check_ids(name: str, ids: torch.Tensor, shape: tuple | None = None) -> None:
    """Refuse what is no tensor of whole numbers of a shape, (B, L) by default.

    Raises:
        ValueError: by name.
    """
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"{name} is {kind}, and must be a tensor of whole numbers")
    if shape is None and (ids.dim() != 2 or not ids.numel()):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, and must be (batch, length), both at least 1")
    if shape is not None and tuple(ids.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)} but the tokens have {tuple(shape)}; pass one for each token"
        )


def check_rows(config, shape, attention_mask, position_ids, past_key_values) -> None:
    """Refuse tensors beside the tokens that do not fit these, by their shapes alone.

    Args:
        shape: (B, L) of the tokens.
        attention_mask: (B, past + L), or a 4-D mask (1 or B, 1 or H, L, keys); other forms pass.

    Raises:
        ValueError: by name.
    """
    batch, length = shape
    if past_key_values is not None and not isinstance(past_key_values, Cache):
        raise ValueError(f"past_key_values is a {type(past_key_values).__name__}, and must be a Cache of transformers")
    if isinstance(past_key_values, DynamicCache) and past_key_values.layers:
        keys = getattr(past_key_values.layers[0], "keys", None)
        if keys is not None and keys.dim() == 4 and keys.shape[0] != batch:
            raise ValueError(f"past_key_values holds {keys.shape[0]} rows but there are {batch} rows of tokens")
    if position_ids is not None:
        check_ids(
            "position_ids", position_ids, position_ids.shape if tuple(position_ids.shape) == (1, length) else shape
        )
    if isinstance(attention_mask, torch.Tensor):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        # The length of a static cache is a tensor, which may be on a device: it is not waited for.
        keys = past + length if isinstance(past, int) else None
        _check_mask(config, attention_mask, batch, length, keys)


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
            f"attention_mask has shape {tuple(mask.shape)} but there are {batch} rows of {length} tokens, and {columns} "
            f"keys with those of past_key_values: it must be ({batch}, {columns}), or a 4-D mask of {length} queries"
        )


def behind_virtual_tokens(modality_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Modalities of rows that begin with virtual tokens, which are text.  (B, tokens behind these) -> (B, L)"""
    return F.pad(modality_ids, (max(length - modality_ids.shape[-1], 0), 0))


def check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """Refuse labels that are neither tokens nor -100, without a wait for a device.

    On a CPU the value is named; elsewhere, and while a graph is traced, the device asserts it when it gets there.

    Raises:
        ValueError: a label outside of the vocabulary.
    """
    outside = (labels != -100) & ((labels < 0) | (labels >= vocab_size))
    if type(labels) is torch.Tensor and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if bool(outside.any()):
            raise ValueError(
                f"labels hold {int(labels[outside][0])}, which is no token of vocab_size={vocab_size}; mark what is not to "
                "be predicted, padding for one, with -100"
            )
    else:
        torch._assert_async(~outside.any(), f"labels must be -100, or in [0, vocab_size={vocab_size})")


def check_prompt_keywords(model, model_kwargs: dict) -> None:
    """Refuse what `generate()` was given and nobody reads, with the nearest name of its arguments.

    Raises:
        ValueError: as transformers raises for these.
    """
    methods = (model.forward, model.prepare_inputs_for_generation)
    known = {name for method in methods for name in inspect.signature(method).parameters} | KEYWORDS
    for name, value in model_kwargs.items():
        if value is not None and name not in known:
            near = did_you_mean(name, [*known, *vars(GenerationConfig())])
            raise ValueError(f"generate() got an unknown argument {name!r}{near}")


def check_prompt(prompt: torch.Tensor, model_kwargs: dict) -> None:
    """Refuse masks and modalities that are not of the prompts' shape.

    Args:
        prompt: (B, L) ids, or (B, L, D) embeddings.

    Raises:
        ValueError: by name.
    """
    shape = tuple(prompt.shape[:2])
    continues = (
        model_kwargs.get("past_key_values") is not None
    )  # then it may be of cached tokens as well, or of new ones
    for name in ("attention_mask", "modality_ids", "position_ids"):
        given = model_kwargs.get(name)
        if not isinstance(given, torch.Tensor) or given.dim() != 2:
            continue
        rows = (1, shape[0]) if name == "position_ids" else (shape[0],)
        if given.shape[0] not in rows or not (continues or given.shape[1] == shape[1]):
            raise ValueError(
                f"{name} has shape {tuple(given.shape)} but the prompts have {shape}: pass one for each token"
            )
