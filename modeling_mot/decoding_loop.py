"""The loop over tokens: processed logits, a choice, stopping criteria, and the step to the next logits."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .decoding_lean import DecodingCache, LeanDecoder, Prefix, decoder_of
from .decoding_pictures import Denoising, Generators, check_finite, commit, denoise
from .image_processing import MoTImageProcessor
from .latent_vae import decode_latents


# R sequences, L tokens so far, V vocabulary


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


# B sequences, P columns of the prompts, n tokens of an image, C latent channels, (h, w) latents, V vocabulary


IMAGE_INPUTS = ("latents", "pixel_values", "image_sizes")


def pictures_of(model, latents: torch.Tensor, output_type: str) -> list:
    """(N, C, h, w) -> N pictures: PIL, tensors (3, H, W) in [0, 1], or the latents ("latent", or there is no VAE)."""
    if model.vae is None or output_type == "latent":
        return list(latents)
    pixels = decode_latents(model.vae, latents)
    return list((pixels + 1) / 2) if output_type == "pt" else MoTImageProcessor.to_pictures(pixels)


@dataclass
class MoTTransfusionGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate()` returns.

    Attributes:
        sequences: (B, L) prompt and new tokens, placeholders for the patches of images, padded on both sides.
        modality_ids: (B, L).
        images: for each sequence the images it drew, in order, as `output_type` says; None without a VAE.
        latents: for each sequence the latents of these images, (C, h, w) each.
        intermediates: for each sequence and image, pictures along the way (latents without a VAE), if
            `intermediate_every` asked for them.
        scores, logits: of each sampled token, (B, V), if `output_scores` or `output_logits` asked for them.
    """

    modality_ids: torch.LongTensor | None = None
    images: list[list[Any]] | None = None
    latents: list[list[torch.Tensor]] | None = None
    intermediates: list[list[list[Any]]] | None = None


class InterleavedDecoding:
    """One call of `generate()`.

    While some sequences draw a picture the others wait, so at any time sequences may differ in length. Logits processors
    and stopping criteria see each sequence as the prompt it was given with what followed, so that nothing depends on the
    others.

    Attributes:
        running: the sequences that go on.
        new_tokens: what each sequence has beside its prompt.
        latents, images, intermediates: of each sequence, what it drew, in order.
    """

    def __init__(
        self,
        model,
        prompt,
        model_kwargs,
        generation_config,
        logits_processor,
        stopping_criteria,
        streamer=None,
        decoder=None,
    ):
        self.decoder = decoder or decoder_of(model)
        self.model, self.config, self.streamer = model, model.config, streamer
        self.generation_config, self.settings = generation_config, generation_config.diffusion
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.prompt, mask = prompt, model_kwargs.get("attention_mask")
        mask = torch.ones_like(prompt) if mask is None else mask
        pad = generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.size = self.settings.latent_size(self.config)
        self.length = self.config.image_length(*self.size)
        self.budget = generation_config.max_length - prompt.shape[1]
        self._check(mask)
        count = len(prompt)
        self.running = list(range(count))
        self.new_tokens, self.latents, self.images, self.intermediates = ([[] for _ in range(count)] for _ in range(4))
        self.scores, self.raw_logits = (), ()
        self.generators = self._generators(count)
        self.unconditional: list[Prefix] | None = None
        images = {name: model_kwargs[name] for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}
        self.logits, self.cache, self.positions = self._prefill(
            prompt, mask, model_kwargs.get("position_ids"), model_kwargs.get("modality_ids"), images
        )

    def _check(self, mask: torch.Tensor) -> None:
        if (mask[:, -1] == 0).any() or (mask[:, 1:] < mask[:, :-1]).any():
            raise ValueError("attention_mask has padding on the right; pad prompts on the left (padding_side='left')")
        if (self.prompt[:, -1] == self.config.image_token_id).any():
            raise ValueError(
                f"a prompt ends inside of an image, with image_token_id={self.config.image_token_id}; eoi_token_id="
                f"{self.config.eoi_token_id} must follow the image, or boi_token_id={self.config.boi_token_id} stand alone "
                "where one is to be drawn"
            )
        if self.budget <= self.length and (self.prompt[:, -1] == self.config.boi_token_id).any():
            raise ValueError(
                f"max_new_tokens={self.budget} is shorter than the picture that boi_token_id begins: it takes "
                f"{self.length} tokens and EOI; set max_new_tokens to at least {self.length + 1}"
            )
        if self.streamer is not None and len(self.prompt) > 1:
            raise ValueError(f"a streamer follows one sequence, not {len(self.prompt)}; generate them one by one")

    def _generators(self, count: int) -> Generators:
        generator = self.settings.generator
        if not isinstance(generator, torch.Generator):
            return generators_of(generator, count)
        seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
        return [torch.Generator(device=generator.device).manual_seed(seed) for seed in seeds]

    def _prefill(
        self, ids, mask, position_ids=None, modality_ids=None, images=None
    ) -> tuple[torch.Tensor, DecodingCache, list[int]]:
        """Prompts with their images clean.  (B, P) -> the next logits (B, V), what is cached, the positions that follow"""
        images = dict(images or {})
        if "pixel_values" in images and "latents" not in images:
            encoded = self.model.encode_images(images.pop("pixel_values"), images.get("image_sizes"))
            images["latents"], images["image_sizes"] = encoded
        if "latents" in images:
            latents = images["latents"]
            nothing = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
            images |= {"timesteps": nothing, "clean_images": nothing == 0, "noise": torch.zeros_like(latents)}
        if position_ids is None:
            position_ids = self.model.positions_of_prompts(ids, mask)
        position_ids = position_ids.expand_as(ids)
        cache = DynamicCache(config=self.config)
        outputs = self.model(
            ids, mask, position_ids, cache, modality_ids=modality_ids, logits_to_keep=1, return_dict=True, **images
        )
        cache = DecodingCache.of(cache, mask, self.decoder.cache_dtype)
        return outputs.logits[:, -1].float(), cache, (position_ids[:, -1] + 1).tolist()

    def run(self) -> None:
        while self.running:
            drawing = [row for row in self.running if self.last_token(row) == self.config.boi_token_id]
            if drawing:
                self._draw(drawing)
            else:
                tokens = self.choose()
                if self.running:
                    self._step(tokens)
        if self.streamer is not None:
            self.streamer.end()

    def last_token(self, row: int) -> int:
        return self.new_tokens[row][-1] if self.new_tokens[row] else int(self.prompt[row, -1])

    def _by_length(self, rows: list[int]):
        """Sequences of one length, and a batch (B, L) of it in which only they are right.

        The others, cut or padded to that length, keep the places that processors and criteria may count by.
        """
        for length in sorted({len(self.new_tokens[row]) for row in rows}):
            tokens = [(tokens + [self.pad] * length)[:length] for tokens in self.new_tokens]
            group = [row for row in rows if len(self.new_tokens[row]) == length]
            yield group, torch.cat([self.prompt, self.prompt.new_tensor(tokens)], dim=1)

    def _stop(self, rows: list[int]) -> None:
        for group, ids in self._by_length(rows):
            done = stopped(self.stopping_criteria, ids, self.scores or None).tolist()
            self.running = [row for row in self.running if not (row in group and done[row])]

    # ---------------------------------------------------------------------------------------------------- text mode

    def choose(self) -> list[int]:
        """The next token of each sequence that runs, padding for the others."""
        scores = self._processed(self.logits)
        if self.generation_config.output_scores:
            self.scores += (scores,)
        if self.generation_config.output_logits:
            self.raw_logits += (self.logits,)
        tokens = draw(scores, self.generation_config.do_sample, self.generators).tolist()
        for row in self.running:
            self.new_tokens[row].append(tokens[row])
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))
        self._stop(self.running)
        return [token if row in self.running else self.pad for row, token in enumerate(tokens)]

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, V) -> (B, V)"""
        config, logits = self.config, logits.clone()
        logits[:, [config.image_token_id, config.eoi_token_id]] = -float("inf")  # only ever appended
        for row, tokens in enumerate(self.new_tokens):
            if self.budget - len(tokens) < self.length + 2 or self.settings.generation_mode == "text":
                logits[row, config.boi_token_id] = -float("inf")
        scores = logits.clone()
        for group, ids in self._by_length(self.running):
            scores[group] = processed(self.logits_processor, ids, logits.clone())[group]
        return scores

    def _step(self, tokens: list[int]) -> None:
        self.logits = self.decoder.step(self.prompt.new_tensor(tokens), self.positions, self.cache).float()
        self.positions = [position + 1 for position in self.positions]

    # ----------------------------------------------------------------------------------------------- diffusion mode

    def _draw(self, rows: list[int]) -> None:
        """A picture and EOI in each of these sequences."""
        drop = int(self.config.markers_in_image_block)
        prefixes = [self.cache.prefix(row, self.positions[row], drop) for row in rows]
        drawing = Denoising(self.model, self.settings, [self.generators[row] for row in rows], rows)
        denoise(drawing, prefixes, self.unconditional_prefixes(rows))
        self.keep(rows, drawing)
        places = [place for place, row in enumerate(rows) if row in self.running]
        if not places:
            return
        going_on, behind = ([x[place] for place in places] for x in (rows, prefixes))
        self.logits[going_on], positions = commit(self.model, self.cache, going_on, behind, drawing.latents[places])
        for row, position in zip(going_on, positions):
            self.positions[row] = position

    def unconditional_prefixes(self, rows: list[int]) -> list[Prefix]:
        """What guidance leads these sequences away from, prefilled once; nothing without guidance."""
        if self.settings.guidance_scale == 1:
            return []
        if self.unconditional is None:
            ids, mask = self.settings.unconditional_prompts(self.config, self.prompt.device)
            _, cache, positions = self._prefill(ids, mask)
            drop = int(self.config.markers_in_image_block)
            self.unconditional = [cache.prefix(row, position, drop) for row, position in enumerate(positions)]
        # One for all, or one for each prompt, whose sequences stand together.
        repeats = len(self.prompt) // len(self.unconditional)
        return [self.unconditional[row // repeats] for row in rows]

    def keep(self, rows: list[int], drawing: Denoising) -> None:
        """What these sequences drew, its tokens and EOI; some may end there."""
        latents = drawing.latents
        check_finite(latents, f"after {drawing.num_steps} steps with guidance_scale={self.settings.guidance_scale}")
        pictures = pictures_of(self.model, latents, self.settings.output_type)
        along = [pictures_of(self.model, estimate, self.settings.output_type) for estimate in drawing.estimates]
        tokens = [self.config.image_token_id] * self.length + [self.config.eoi_token_id]
        for place, row in enumerate(rows):
            self.new_tokens[row].extend(tokens)
            self.latents[row].append(latents[place])
            self.images[row].append(pictures[place])
            self.intermediates[row].append([estimate[place] for estimate in along])
            if self.streamer is not None:
                self.streamer.put(torch.tensor(tokens))
                if hasattr(self.streamer, "put_image"):
                    self.streamer.put_image(pictures[place])
        self._stop(rows)

    # -------------------------------------------------------------------------------------------------------- results

    def sequences(self) -> torch.Tensor:
        """(B, P + longest), padded on the right."""
        longest = max(map(len, self.new_tokens))
        padded = [tokens + [self.pad] * (longest - len(tokens)) for tokens in self.new_tokens]
        return torch.cat([self.prompt, self.prompt.new_tensor(padded)], dim=1)

    def output(self) -> MoTTransfusionGenerateOutput:
        sequences = self.sequences()
        has_pictures = self.model.vae is not None and self.settings.output_type != "latent"
        return MoTTransfusionGenerateOutput(
            sequences=sequences,
            modality_ids=self.model.model.modality_ids_of(sequences),
            images=self.images if has_pictures else None,
            latents=self.latents,
            intermediates=self.intermediates if self.settings.intermediate_every else None,
            scores=self.scores or None,
            logits=self.raw_logits or None,
        )
