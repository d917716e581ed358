"""Requests as a server runs them: prepared by `generate()` itself, then one token after another."""

# L tokens of a prompt, V vocabulary

import time
from typing import Any, NamedTuple

import torch
from transformers.generation import GenerationMode

from .decoding_cache_mot import DecodingCache, Prefix
from .lean_decoding_mot import is_plain_dynamic
from .sampling_mot import Sampling


ROWS = ("input_ids", "modality_ids", "attention_mask", "position_ids")


class Request(NamedTuple):
    """A request as `generate()` prepared it."""

    request_id: str
    created_time: float
    input_ids: torch.Tensor
    logits_processor: Any
    stopping_criteria: Any
    generation_config: Any
    streamer: Any
    model_kwargs: dict


def prepared(model, request_id: str, arguments: dict) -> Request:
    """Everything that `generate()` does before it decodes, its refusals included.

    Raises:
        ValueError: what `generate()` refuses; several sequences; beams or assistants.
    """
    arguments = dict(arguments)
    for name in ROWS:
        if arguments.get(name) is not None:
            ids = torch.as_tensor(arguments[name])
            arguments[name] = (ids[None] if ids.dim() == 1 else ids).to(model.device)
    created, caught = time.perf_counter(), {}

    def catch(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        caught.update(input_ids=input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria)
        caught.update(generation_config=generation_config, model_kwargs=model_kwargs)
        return input_ids

    model.generate(**arguments, custom_generate=catch)
    config, count = caught["generation_config"], len(caught["input_ids"])
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"a request asks for {mode.value}; served are sampling and greedy search: use generate()")
    if count != 1:
        raise ValueError(f"a request makes {count} sequences; it may make one: send as many requests")
    cache = caught["model_kwargs"].get("past_key_values")
    if cache is not None and not is_plain_dynamic(cache):
        raise ValueError(f"a request is served from a DynamicCache, not a {type(cache).__name__}: leave its cache out")
    caught["model_kwargs"]["use_cache"] = True
    return Request(request_id, created, streamer=arguments.get("streamer"), **caught)


class TextSequence:
    """A request that writes tokens of any modality.

    Attributes:
        token: what is to be run next; None at its end.
        position: where it stands.
        is_drawing: whether a picture is to be drawn before the next token.
    """

    is_drawing = False

    def __init__(self, model, request: Request, decoder):
        self.request, self.decoder, self.token, self.began = request, decoder, None, time.perf_counter()
        self.sampling = Sampling(
            model,
            request.input_ids,
            request.logits_processor,
            request.stopping_criteria,
            request.generation_config,
            request.model_kwargs,
        )

    def begin(self) -> Prefix:
        """Run the prompt.  -> what is to be cached"""
        outputs = self.sampling.prefill()
        mask = self.sampling.model_kwargs.get("attention_mask")
        cache = DecodingCache.of(outputs.past_key_values, mask, self.decoder.cache_dtype)
        self.position = self.sampling.positions()[0] + 1
        self.take(outputs.logits[:, -1])
        return cache.prefix(0, self.position)

    def take(self, logits: torch.Tensor) -> None:
        """Go on from the logits (1, V) behind what was run last."""
        token = self.sampling.take(logits)
        if self.request.streamer is not None:
            self.request.streamer.put(token.cpu())
        self.token = None if self.sampling.is_done else int(token)

    def new_tokens(self) -> list[int]:
        return self.sampling.input_ids[0, self.request.input_ids.shape[1] :].tolist()

    def output(self):
        return self.sampling.output()
