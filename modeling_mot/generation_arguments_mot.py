"""Checks of the arguments that `generate()` has beside those of transformers; requests of a server go through them too."""

# R rows, L tokens

from reprlib import repr as shortened
from typing import Any

import torch
from transformers import GenerationConfig

from .configuration_mot import check_spans
from .field_checks_mot import Maybe, Number, Whole, check_fields, is_real, is_whole


MOST = 1e6  # of what logits and predictions are multiplied or divided by
# Arguments of transformers that it never checks: with a limit of NaN no sequence ends.
WHOLE = {"max_new_tokens": 0, "max_length": 0, "min_new_tokens": 0, "min_length": 0, "num_return_sequences": 1}
SAMPLING_RULES = {
    "num_beams": Maybe(Whole()),
    "top_k": Maybe(Whole(0)),
    "top_p": Maybe(Number(0, 1)),
    "repetition_penalty": Maybe(Number(open="low")),
}


def check_lengths(arguments: dict) -> None:
    """Refuse lengths and counts, of those that are given, that are no whole numbers.

    Raises:
        ValueError: the message names field, value and way out.
    """
    for name, least in WHOLE.items():
        value = arguments.get(name)
        if value is not None and not is_whole(value, least):
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def check_settings(generation_config) -> None:
    """Refuse settings of another kind than the loop over tokens needs.

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
    if scale is not None and not (is_real(scale) and abs(scale) <= MOST):
        raise ValueError(f"guidance_scale={scale!r} must be a finite number of at most {MOST:g}; 1 is no guidance")
    # Others make infinities of logits, from which nothing can be sampled; of 0 transformers tells more.
    if temperature is not None and not (is_real(temperature) and (temperature <= 0 or 1 / MOST <= temperature <= MOST)):
        raise ValueError(
            f"temperature={temperature!r} must be a number from {1 / MOST:g} to {MOST:g}; do_sample=False takes the likeliest"
        )
    check_generator(getattr(generation_config, "generator", None))


def check_generator(generator: Any) -> None:
    """Refuse what is neither a `torch.Generator` nor a list of them.

    Raises:
        ValueError: the message names the type that came.
    """
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(entry, torch.Generator) for entry in generators):
        kinds = ", ".join(sorted({type(entry).__name__ for entry in generators}))
        raise ValueError(f"generator={kinds} must be a torch.Generator, or a list with one for each sequence")


def check_streamer(streamer: Any) -> None:
    """Refuse a streamer that cannot be told of tokens, or of their end.

    Raises:
        ValueError: a method is missing.
    """
    for name in ("put", "end"):
        if streamer is not None and not callable(getattr(streamer, name, None)):
            raise ValueError(
                f"streamer={type(streamer).__name__} has no method {name}(); see transformers' BaseStreamer"
            )


def check_config(generation_config: Any) -> None:
    """Refuse what is no `GenerationConfig`.

    Raises:
        ValueError: the message names the value.
    """
    if not isinstance(generation_config, (GenerationConfig, type(None))):
        raise ValueError(f"generation_config={shortened(generation_config)} must be a GenerationConfig of transformers")


def check_called(name: str, functions: Any) -> None:
    """Refuse what is no list of functions: logits processors and stopping criteria.

    Raises:
        ValueError: by name.
    """
    if functions is not None and not (isinstance(functions, (list, tuple)) and all(map(callable, functions))):
        raise ValueError(f"{name}={shortened(functions)} must be a list of what can be called")


def rows_of(name: str, value: Any, count: int | None = None) -> torch.Tensor:
    """A tensor, an array or lists, (L,) or (R, L), as a new tensor (R, L).

    Args:
        count: R may be this or 1; default: any number.

    Raises:
        ValueError: what makes no such tensor, or is empty; another number of rows.
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
    """Whole numbers in [0, end), as `rows_of` takes them.  -> (R, L) int64

    Args:
        of: the name of what `end` is.

    Raises:
        ValueError: as `rows_of`; numbers of another kind, or outside.
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
    """1 (or True) for tokens and 0 for padding, as `rows_of` takes them.  -> (R, L) int64

    Raises:
        ValueError: as `rows_of`; other numbers.
    """
    rows = rows_of(name, value)
    if not ((rows == 0) | (rows == 1)).all():
        raise ValueError(f"{name} holds other numbers than 1 for tokens and 0 for padding")
    return rows.long()


def negative_prompt(config, ids: Any, mask: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`negative_prompt_ids` and `negative_prompt_attention_mask` of `count` prompts.  -> (1 or count, L) twice

    Raises:
        ValueError: ids outside of the vocabulary or of images, another number of rows, a mask that does not fit.
    """
    if ids is None:
        raise ValueError("negative_prompt_attention_mask came without negative_prompt_ids, whose padding it marks")
    ids = whole_rows("negative_prompt_ids", ids, config.vocab_size, "vocab_size", count)
    placeholder = getattr(config, "image_token_id", None)  # of a Transfusion model
    if placeholder is not None and (ids == placeholder).any():
        raise ValueError(
            f"negative_prompt_ids holds image_token_id={placeholder}: a negative prompt is text, so leave its pictures out"
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
