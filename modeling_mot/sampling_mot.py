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


def draw(scores: torch.Tensor, do_sample: bool, generators: Generators) -> torch.Tensor:
    """The next token of each sequence.  (R, V) -> (R,)"""
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

    def __init__(self, lean: LeanDecoder, filled, model_kwargs: dict, count: int):
        self.lean, self.filled = lean, filled
        self.cache = DecodingCache.of(filled, model_kwargs.get("attention_mask"), lean.cache_dtype)
        positions = model_kwargs["position_ids"][:, -1].tolist()
        self.positions = positions * (count // len(positions))

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
    """What `GenerationMixin._sample` does, with steps of our own and a generator for each sequence.

    Args:
        generation_config: as `generate()` prepared it.
        generators: of each sequence's tokens.
    """

    def __init__(self, generation_config, generators: Generators):
        self.config, self.generators = generation_config, generators
        returns_dict = generation_config.return_dict_in_generate
        self.scores = () if returns_dict and generation_config.output_scores else None
        self.logits = () if returns_dict and generation_config.output_logits else None

    def run(
        self, model, lean: LeanDecoder | None, input_ids, logits_processor, stopping_criteria, streamer, model_kwargs
    ):
        """From the prompt's forward to the last token.  (R, L) -> (R, L + new), or the output that holds them"""
        outputs = model._prefill(input_ids, self.config, model_kwargs, is_first_iteration=not self.config.is_assistant)
        if lean is None:
            steps = ModelSteps(model, outputs, model_kwargs)
        else:
            steps = LeanSteps(lean, outputs.past_key_values, model_kwargs, len(input_ids))
        cache, logits = outputs.past_key_values, outputs.logits[:, -1]
        del outputs  # the logits of all the prompt
        may_end = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        while True:
            tokens = self._choose(input_ids, logits.to(copy=True, dtype=torch.float32), logits_processor)
            if may_end:
                tokens = tokens * unfinished + self.config._pad_token_tensor * (1 - unfinished)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            unfinished = unfinished & ~stopping_criteria(input_ids, self.scores)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if not unfinished.any():
                break
            logits = steps(input_ids)
        if streamer is not None:
            streamer.end()
        returns_dict = self.config.return_dict_in_generate
        cache = steps.past_key_values(returns_dict or getattr(cache, "_is_user_defined", False))
        if not returns_dict:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids, scores=self.scores, logits=self.logits, past_key_values=cache
        )

    def _choose(self, input_ids: torch.Tensor, logits: torch.Tensor, logits_processor) -> torch.Tensor:
        """(R, L), (R, V) -> (R,)"""
        scores = logits_processor(input_ids, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        return draw(scores, self.config.do_sample, self.generators)
