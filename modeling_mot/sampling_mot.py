"""The loop over tokens: processed logits, a choice, stopping criteria, and the step to the next logits."""

# R sequences, L tokens so far, V vocabulary

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .decoding_cache_mot import DecodingCache
from .lean_decoding_mot import LeanDecoder


Generators = list[torch.Generator | None]


def generators_of(generator, count: int) -> Generators:
    """One entry for each sequence from `generator=`: none, one for all, or one for each.

    Raises:
        ValueError: as many generators as there are not sequences.
    """
    if not isinstance(generator, (list, tuple)):
        return [generator] * count
    if len(generator) != count:
        raise ValueError(f"generator has {len(generator)} entries for {count} sequences; give one for each, or one")
    return list(generator)


def processed(logits_processor, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What processors make of logits.  (R, L), (R, V) -> (R, V)

    Raises:
        ValueError: something of another shape.
    """
    scores = logits_processor(input_ids, logits)
    if not isinstance(scores, torch.Tensor) or scores.shape != logits.shape:
        made = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"logits_processor made {made} of logits of shape {tuple(logits.shape)}; the shape must stay")
    return scores


def stopped(stopping_criteria, input_ids: torch.Tensor, scores) -> torch.Tensor:
    """Which sequences stopping criteria end.  (R, L) -> (R,)

    Raises:
        ValueError: an answer of another shape.
    """
    done = stopping_criteria(input_ids, scores)
    if not isinstance(done, torch.Tensor) or done.shape != input_ids.shape[:1]:
        made = tuple(done.shape) if isinstance(done, torch.Tensor) else type(done).__name__
        raise ValueError(
            f"stopping_criteria answered {made} for {len(input_ids)} sequences; one bool for each is needed"
        )
    return done


def draw(scores: torch.Tensor, do_sample: bool, generators: Generators) -> torch.Tensor:
    """The next token of each sequence.  (R, V) -> (R,)

    Raises:
        ValueError: scores that are NaN, or of which nothing can be sampled. On an accelerator sampling from them would
            end all that this process does there.
    """
    highest = scores.amax(dim=-1)
    if not (highest.isfinite() if do_sample else ~highest.isnan()).all():
        raise ValueError(
            f"the scores of the next token are at most {highest.tolist()}, so none can be chosen; look for NaN in the "
            "inputs, the weights and the results of logits processors"
        )
    if not do_sample:
        return scores.argmax(dim=-1)
    probabilities = scores.softmax(dim=-1)
    if generators[0] is None:
        return torch.multinomial(probabilities, num_samples=1).squeeze(1)
    drawn = [
        torch.multinomial(row.to(generator.device), 1, generator=generator)
        for row, generator in zip(probabilities, generators)
    ]
    return torch.cat([token.to(scores.device) for token in drawn])


class LeanSteps:
    """The steps after a prompt, read off the model's weights."""

    def __init__(self, lean: LeanDecoder, filled, mask: torch.Tensor | None, positions: list[int]):
        self.lean, self.filled, self.positions = lean, filled, positions
        self.cache = DecodingCache.of(filled, mask, lean.cache_dtype)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(R, L) -> logits (R, V)"""
        self.positions = [position + 1 for position in self.positions]
        return self.lean.step(input_ids[:, -1], self.positions, self.cache)

    def past_key_values(self, is_wanted: bool):
        if is_wanted:
            self.cache.write_back(self.filled)
        return self.filled


class ModelSteps:
    """The steps after a prompt, by the model's own forward, as `GenerationMixin._sample` makes them."""

    def __init__(self, model, outputs, model_kwargs: dict):
        self.model, self.model_kwargs = model, model_kwargs
        self._update(outputs)

    def _update(self, outputs) -> None:
        self.model_kwargs = self.model._update_model_kwargs_for_generation(outputs, self.model_kwargs)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(R, L) -> logits (R, V)"""
        length = 1 if self.model_kwargs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=length, **self.model_kwargs)
        outputs = self.model(**inputs, return_dict=True)
        self._update(outputs)
        return outputs.logits[:, -1]

    def past_key_values(self, is_wanted: bool):
        return self.model_kwargs.get("past_key_values")


class Sampling:
    """What `GenerationMixin._sample` does, one token at a time, with a generator for each sequence.

    Args:
        generation_config, logits_processor, stopping_criteria, model_kwargs: as `generate()` prepared them.

    Attributes:
        input_ids: (R, L) prompts with what followed.
        is_done: whether all sequences have ended.
    """

    def __init__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs):
        self.model, self.input_ids, self.config, self.model_kwargs = model, input_ids, generation_config, model_kwargs
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.generators = generators_of(getattr(generation_config, "generator", None), len(input_ids))
        self.unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        self.may_end = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        self.returns_dict, self.is_done = generation_config.return_dict_in_generate, False
        self.scores = () if self.returns_dict and generation_config.output_scores else None
        self.logits = () if self.returns_dict and generation_config.output_logits else None

    def prefill(self):
        """The prompts' forward."""
        is_first = not self.config.is_assistant
        return self.model._prefill(self.input_ids, self.config, self.model_kwargs, is_first_iteration=is_first)

    def positions(self) -> list[int]:
        """Of the prompts' last tokens."""
        positions = self.model_kwargs["position_ids"][:, -1].tolist()
        return positions * (len(self.input_ids) // len(positions))

    def take(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose the next token of each sequence.  (R, V) -> (R,)"""
        logits = logits.to(copy=True, dtype=torch.float32)
        scores = processed(self.logits_processor, self.input_ids, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        tokens = draw(scores, self.config.do_sample, self.generators)
        if self.may_end:
            tokens = tokens * self.unfinished + self.config._pad_token_tensor * (1 - self.unfinished)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        self.unfinished = self.unfinished & ~stopped(self.stopping_criteria, self.input_ids, self.scores)
        self.is_done = not self.unfinished.any()
        return tokens

    def output(self, past_key_values=None):
        """What `generate()` returns."""
        if not self.returns_dict:
            return self.input_ids
        return GenerateDecoderOnlyOutput(
            sequences=self.input_ids, scores=self.scores, logits=self.logits, past_key_values=past_key_values
        )


def sample(sampling: Sampling, lean: LeanDecoder | None, streamer):
    """From the prompt's forward to the last token.  -> (R, L + new), or the output that holds them"""
    outputs = sampling.prefill()
    if lean is None:
        steps = ModelSteps(sampling.model, outputs, sampling.model_kwargs)
    else:
        mask = sampling.model_kwargs.get("attention_mask")
        steps = LeanSteps(lean, outputs.past_key_values, mask, sampling.positions())
    cache, logits = outputs.past_key_values, outputs.logits[:, -1]
    del outputs  # the logits of all the prompt
    while True:
        tokens = sampling.take(logits)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if sampling.is_done:
            break
        logits = steps(sampling.input_ids)
    if streamer is not None:
        streamer.end()
    return sampling.output(steps.past_key_values(sampling.returns_dict or getattr(cache, "_is_user_defined", False)))
