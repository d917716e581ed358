"""The loop over tokens: process logits, draw a token, append it, stop, step to the next logits.

`TokenLoop.choose` is one turn of the loop, from logits to an appended token. `Sampling.run` repeats it for sequences of
tokens, `InterleavedDecoding.run` for sequences that draw pictures between tokens. A server calls one turn at a time.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .attention_masks import find_placeholders, times_of
from .checks_arguments import CACHE
from .decoding_lean import DecodingCache, LeanDecoder, Prefix, decoder_of
from .decoding_pictures import (
    UNCONDITIONAL,
    WITHOUT_TEXT,
    Denoising,
    Generators,
    check_finite,
    commit,
    contexts_of,
    denoise,
    kept_tokens,
    length_of,
)
from .image_processing import MoTImageProcessor
from .latent_grid import grid_positions
from .latent_images import ImagePlaces, check_placeholders, sizes_of
from .latent_vae import decode_latents


# R sequences, P tokens of a prompt, L tokens so far, V vocabulary, N images, C latent channels, (h, w) latents

ENCODER_INPUTS = ("encoder_pixel_values", "encoder_image_sizes")
IMAGE_INPUTS = ("latents", "pixel_values", "image_sizes", *ENCODER_INPUTS)


class Request(NamedTuple):
    """One call of `generate()`, as transformers prepared it for decoding.

    Attributes:
        input_ids: (R, P) the prompts.
        logits_processor, stopping_criteria, generation_config: transformers' objects, made from the arguments.
        model_kwargs: arguments of the forwards: `attention_mask`, `modality_ids`, the cache, images.
        streamer: an object that is given each token; None for none.
        request_id, created_time: a server's name for the request, and when it came, by `time.perf_counter()`.
    """

    input_ids: torch.Tensor
    logits_processor: Any
    stopping_criteria: Any
    generation_config: Any
    model_kwargs: dict
    streamer: Any = None
    request_id: str | None = None
    created_time: float | None = None


# ---------------------------------------------------------------------------------------------------------- one choice


class TokenLoop:
    """Choose one token after another for R sequences, as `GenerationMixin._sample` does.

    A subclass holds the sequences. It says how logits are processed (`_process`), where tokens go (`_append`), which
    sequences end (`_stop`), and which generator each sequence draws from (`generators`).

    Args:
        returns_dict: True if `generate()` returns more than the sequences, so that scores and logits are worth keeping.

    Attributes:
        kept_scores, kept_logits: (R, V) of each choice so far; None if nobody asked for them.
    """

    generators: Generators

    def __init__(self, model, request: Request, returns_dict: bool):
        self.model = model
        self.request = request
        self.generation_config = request.generation_config
        self.kept_scores = () if returns_dict and request.generation_config.output_scores else None
        self.kept_logits = () if returns_dict and request.generation_config.output_logits else None

    def choose(self, logits: torch.Tensor) -> None:
        """Choose the next token of each sequence, and end the sequences that are complete.

        Args:
            logits: (R, V) in float32. They belong to the loop from now on.
        """
        # Process the logits. Scores and logits are kept if `generate()` is to return them.
        scores = self._process(logits)
        if self.kept_scores is not None:
            self.kept_scores += (scores,)
        if self.kept_logits is not None:
            self.kept_logits += (logits,)

        # Draw and append tokens, hand them out, and see which sequences are complete.
        tokens = self._append(draw(scores, self.generation_config.do_sample, self.generators))
        if self.request.streamer is not None:
            self.request.streamer.put(tokens.cpu())  # a streamer may write into them: nothing reads them after this
        self._stop()


def generators_of(generator, count: int) -> Generators:
    """Make one entry for each sequence from `generator=`: none, one for all, or one for each.

    Raises:
        ValueError: there are not as many generators as sequences.
    """
    if not isinstance(generator, (list, tuple)):
        return [generator] * count
    if len(generator) != count:
        raise ValueError(f"generator has {len(generator)} entries for {count} sequences; give one for each, or one")
    return list(generator)


def processed(logits_processor, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Call logits processors, and refuse scores of another shape.  (R, L), (R, V) -> (R, V)

    Raises:
        ValueError: the processors returned something of another shape.
    """
    scores = logits_processor(input_ids, logits)
    if not isinstance(scores, torch.Tensor) or scores.shape != logits.shape:
        made = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"logits_processor made {made} of logits of shape {tuple(logits.shape)}; the shape must stay")
    return scores


def stopped(stopping_criteria, input_ids: torch.Tensor, scores) -> torch.Tensor:
    """Call stopping criteria one by one, and refuse answers of another shape or type.  (R, L) -> (R,) bool

    Raises:
        ValueError: a criterion answered neither a bool nor a bool for each sequence.
    """
    # A list with a call of its own answers for its members.
    is_list = type(stopping_criteria).__call__ is StoppingCriteriaList.__call__
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for criterion in stopping_criteria if is_list else [stopping_criteria]:
        answer = criterion(input_ids, scores)
        is_tensor = isinstance(answer, torch.Tensor)
        if is_tensor and not (answer.is_floating_point() or answer.is_complex()) and answer.shape in ((), done.shape):
            done = done | answer.to(done.device, torch.bool)
        elif isinstance(answer, bool):
            done = done | answer
        else:
            made = f"{answer.dtype} of shape {tuple(answer.shape)}" if is_tensor else type(answer).__name__
            raise ValueError(
                f"stopping_criteria answered {made} for {len(input_ids)} sequences; one bool for each is needed"
            )
    return done


def draw(scores: torch.Tensor, do_sample: bool, generators: Generators) -> torch.Tensor:
    """Draw the next token of each sequence, or take the likeliest.  (R, V) -> (R,)

    Raises:
        ValueError: the scores are NaN, or nothing can be sampled from them.
    """
    # An accelerator that samples from such scores fails, and with it everything else that this process does there.
    highest = scores.amax(dim=-1)
    if not (highest.isfinite() if do_sample else ~highest.isnan()).all():
        raise ValueError(
            f"the scores of the next token are at most {highest.tolist()}, so none can be chosen; look for NaN in the "
            "inputs, the weights and the results of logits processors"
        )
    if not do_sample:
        return scores.argmax(dim=-1)

    # Each sequence draws on the device of its generator.
    probabilities = scores.softmax(dim=-1)
    if generators[0] is None:
        return torch.multinomial(probabilities, num_samples=1).squeeze(1)
    drawn = [
        torch.multinomial(row.to(generator.device), 1, generator=generator)
        for row, generator in zip(probabilities, generators)
    ]
    return torch.cat([token.to(scores.device) for token in drawn])


# ------------------------------------------------------------------------------------------------- sequences of tokens


class Sampling(TokenLoop):
    """Sequences of tokens, all of one length, each with a generator of its own.

    Attributes:
        input_ids: (R, L) the prompts and the tokens behind them.
        is_done: True once all sequences have ended.
    """

    def __init__(self, model, request: Request):
        config, input_ids = request.generation_config, request.input_ids
        super().__init__(model, request, config.return_dict_in_generate)
        self.generators = generators_of(getattr(config, "generator", None), len(input_ids))
        self.input_ids = input_ids
        self.unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        self.may_end = any(hasattr(criteria, "eos_token_id") for criteria in request.stopping_criteria)
        self.is_done = False

    def run(self, lean: LeanDecoder | None):
        """Go from the prompts' forward to the last token.

        Args:
            lean: runs the steps behind the prompts; None for the model's own forward.

        Returns:
            What `generate()` returns.
        """
        # The prompts, and who runs the steps behind them.
        outputs = self.prefill()
        cache = getattr(outputs, CACHE)
        if lean is None:
            steps = ModelSteps(self.model, outputs, self.request.model_kwargs)
        else:
            steps = LeanSteps(lean, cache, self.request.model_kwargs.get("attention_mask"), self.positions())

        # A choice, a step, a choice, ..., until all sequences have ended.
        self.take(outputs.logits[:, -1])
        del outputs  # the logits of whole prompts are large
        while not self.is_done:
            self.take(steps(self.input_ids))
        if self.request.streamer is not None:
            self.request.streamer.end()

        # The cache is worth a copy only if somebody can see it.
        wants_cache = self.generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        return self.output(steps.filled_cache(wants_cache))

    def prefill(self):
        """Run the prompts.  -> the model's outputs"""
        is_first = not self.generation_config.is_assistant
        return self.model._prefill(
            self.input_ids, self.generation_config, self.request.model_kwargs, is_first_iteration=is_first
        )

    def positions(self) -> list[int]:
        """Return the position of the last token of each prompt."""
        positions = self.request.model_kwargs["position_ids"][:, -1].tolist()
        return positions * (len(self.input_ids) // len(positions))

    def take(self, logits: torch.Tensor) -> None:
        """Choose from the logits (R, V) of a forward, which stay as they are."""
        self.choose(logits.to(copy=True, dtype=torch.float32))

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        return processed(self.request.logits_processor, self.input_ids, logits)

    def _append(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append the tokens, or padding to a sequence that has ended.  (R,) -> (R,)"""
        if self.may_end:
            tokens = tokens * self.unfinished + self.generation_config._pad_token_tensor * (1 - self.unfinished)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        return tokens

    def _stop(self) -> None:
        done = stopped(self.request.stopping_criteria, self.input_ids, self.kept_scores)
        self.unfinished = self.unfinished & ~done
        self.is_done = not self.unfinished.any()

    def output(self, cache=None):
        """Return what `generate()` returns."""
        if not self.generation_config.return_dict_in_generate:
            return self.input_ids
        return GenerateDecoderOnlyOutput(
            sequences=self.input_ids,
            scores=self.kept_scores,
            logits=self.kept_logits,
            **{CACHE: cache},
        )


class LeanSteps:
    """The steps behind the prompts, by a `LeanDecoder`.

    Args:
        filled: the `DynamicCache` that the prompts' forward filled.
        mask: (R, P) 1 for tokens, 0 for padding; or None.
        positions: of the prompts' last tokens.
    """

    def __init__(self, lean: LeanDecoder, filled: DynamicCache, mask: torch.Tensor | None, positions: list[int]):
        self.lean = lean
        self.filled = filled
        self.positions = positions
        self.cache = DecodingCache.of(filled, mask, lean.cache_dtype)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the last token of each sequence.  (R, L) -> logits (R, V)"""
        self.positions = [position + 1 for position in self.positions]
        return self.lean.step(input_ids[:, -1], self.positions, self.cache)

    def filled_cache(self, is_wanted: bool):
        """Return the prompts' cache. It is brought up to date if it is wanted."""
        if is_wanted:
            self.cache.write_back(self.filled)
        return self.filled


class ModelSteps:
    """The steps behind the prompts, by the model's own forward, as `GenerationMixin._sample` makes them."""

    def __init__(self, model, outputs, model_kwargs: dict):
        self.model = model
        self.model_kwargs = model_kwargs
        self._update(outputs)

    def _update(self, outputs) -> None:
        self.model_kwargs = self.model._update_model_kwargs_for_generation(outputs, self.model_kwargs)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the last token of each sequence, or all tokens without a cache.  (R, L) -> logits (R, V)"""
        length = 1 if self.model_kwargs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=length, **self.model_kwargs)
        outputs = self.model(**inputs, return_dict=True)
        self._update(outputs)
        return outputs.logits[:, -1]

    def filled_cache(self, is_wanted: bool):
        """Return the cache, which is up to date."""
        return self.model_kwargs.get(CACHE)


# ------------------------------------------------------------------------------------ sequences of tokens and pictures


@dataclass
class MoTTransfusionGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate()` of a Transfusion model returns.

    Attributes:
        sequences: (R, L) prompts and new tokens, placeholders for the patches of images, padded on both sides.
        modality_ids: (R, L).
        images: for each sequence the pictures that it drew, in order, as `output_type` says; None without a VAE.
        latents: for each sequence the latents of these pictures, (C, h, w) each.
        intermediates: for each sequence and picture, pictures along the way (latents without a VAE), if
            `intermediate_every` asked for them.
        scores, logits: of each sampled token, (R, V), if `output_scores` or `output_logits` asked for them.
    """

    modality_ids: torch.LongTensor | None = None
    images: list[list[Any]] | None = None
    latents: list[list[torch.Tensor]] | None = None
    intermediates: list[list[list[Any]]] | None = None


class InterleavedDecoding(TokenLoop):
    """Sequences that write tokens and draw pictures.

    A sequence whose last token is BOI draws a picture, and the others wait. Sequences may therefore differ in length at
    any time. Logits processors and stopping criteria see each sequence as its own prompt with the tokens behind it, so
    that the result of a sequence does not depend on the others. A sequence that is to think first writes up to its end
    token, and then BOI.

    Args:
        model: a `MoTTransfusionModel`.
        decoder: runs the steps over tokens; default: `decoder_of(model)`.

    Attributes:
        running: the sequences that go on.
        thinking: those that write a thought, behind which a picture comes.
        sizes, lengths: of each sequence's pictures, in latents and in tokens.
        new_tokens: the tokens of each sequence behind its prompt.
        latents, images, intermediates: of each sequence, the pictures that it drew, in order.
        logits: (R, V) of the next tokens.
        cache, positions: the keys and values so far, and the position of each next token.
    """

    def __init__(self, model, request: Request, decoder=None):
        super().__init__(model, request, returns_dict=True)
        self.decoder = decoder or decoder_of(model)
        self.config = model.config
        self.settings = request.generation_config.diffusion
        self.prompt = request.input_ids
        pad = request.generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        count = len(self.prompt)
        sizes = self.settings.sizes(self.config)
        self.sizes = [sizes[row // (count // len(sizes))] for row in range(count)]
        self.lengths = [length_of(self.config, size) for size in self.sizes]
        self.budget = request.generation_config.max_length - self.prompt.shape[1]

        # Everything that can be refused is refused before a generator or the model is asked.
        mask = request.model_kwargs.get("attention_mask")
        mask = torch.ones_like(self.prompt) if mask is None else mask
        self._check(mask)
        self.generators = self._generators(count)
        self.running = list(range(count))
        self.thinking = set(self.running if self.settings.writes_thoughts else ())
        self.new_tokens: list[list[int]] = [[] for _ in range(count)]
        self.latents: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self.images: list[list[Any]] = [[] for _ in range(count)]
        self.intermediates: list[list[list[Any]]] = [[] for _ in range(count)]
        self.contexts: dict[str, list[Prefix]] = {}
        self.has_images = (find_placeholders(self.config, self.prompt) != 0).any(dim=1).tolist()
        self.mask = mask
        self.clean_images = self._clean_images(request.model_kwargs)
        given = {name: request.model_kwargs.get(name) for name in ("position_ids", "modality_ids")}
        self.logits, self.cache, self.positions = self._prefill(self.prompt, mask, self.clean_images, **given)

    def _check(self, mask: torch.Tensor) -> None:
        if (mask[:, -1] == 0).any() or (mask[:, 1:] < mask[:, :-1]).any():
            raise ValueError("attention_mask has padding on the right; pad prompts on the left (padding_side='left')")
        for modality, token in self.config.placeholder_token_ids.items():
            if (self.prompt[:, -1] == token).any():
                field = "image_token_id" if modality == "image" else f"the placeholder of {modality!r}"
                raise ValueError(
                    f"a prompt ends inside of an image, with {field}={token}; eoi_token_id={self.config.eoi_token_id} "
                    f"must follow the image, or boi_token_id={self.config.boi_token_id} must stand alone where one is "
                    "to be drawn"
                )
        is_begun = (self.prompt[:, -1] == self.config.boi_token_id).tolist()
        length = max((length for length, begun in zip(self.lengths, is_begun) if begun), default=0)
        if any(is_begun) and self.budget <= length:
            raise ValueError(
                f"max_new_tokens={self.budget} is shorter than the picture that boi_token_id begins: it takes "
                f"{length} tokens and EOI; set max_new_tokens to at least {length + 1}"
            )
        first = self.settings.first_frames
        if first is not None and (not len(first) or len(self.prompt) % len(first)):
            raise ValueError(
                f"first_frames has {len(first)} rows for {len(self.prompt)} sequences; give one for all, or one for "
                "each prompt"
            )
        if self.settings.writes_thoughts and self._end_token is None:
            raise ValueError("think=True writes a thought that ends with eos_token_id, which is None: set it")
        if self.request.streamer is not None and len(self.prompt) > 1:
            raise ValueError(f"a streamer follows one sequence, not {len(self.prompt)}; generate them one by one")

    @property
    def _end_token(self) -> int | None:
        """The token that ends a thought."""
        ends = self.request.generation_config._eos_token_tensor
        return None if ends is None else int(ends[0])

    def _generators(self, count: int) -> Generators:
        """Make a generator for each sequence. If the caller gives one generator, it seeds a generator per sequence."""
        generator = self.settings.generator
        if not isinstance(generator, torch.Generator):
            return generators_of(generator, count)
        seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
        return [torch.Generator(device=generator.device).manual_seed(seed) for seed in seeds]

    def _clean_images(self, inputs: dict) -> dict:
        """Return the images of the prompts as arguments of the model's forward: at timestep 0, without noise."""
        images = {name: inputs[name] for name in IMAGE_INPUTS if inputs.get(name) is not None}
        if "pixel_values" in images and "latents" not in images:
            encoded = self.model.encode_images(images.pop("pixel_values"), images.get("image_sizes"))
            images["latents"], images["image_sizes"] = encoded
        if "latents" in images:
            latents = images["latents"]
            zeros = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
            images |= {"timesteps": zeros, "clean_images": zeros == 0, "noise": torch.zeros_like(latents)}
        return images

    def _prefill(
        self, ids: torch.Tensor, attention_mask: torch.Tensor, images: dict, position_ids=None, modality_ids=None
    ) -> tuple[torch.Tensor, DecodingCache, list[int]]:
        """Run prompts with their images clean.  (R, P) -> the next logits (R, V), the cache, the next positions"""
        # One forward, of which only the last logits are computed.
        if "latents" in images and self.config.image_positions == "grid":
            places = ImagePlaces.find(self.config, ids, None, attention_mask)
            sizes = sizes_of(images["latents"], images.get("image_sizes"))
            position_ids = grid_positions(self.config, places, sizes, check_placeholders(self.config, places, sizes))
        elif position_ids is None:
            position_ids = self.model.positions_of_prompts(ids, attention_mask)
        position_ids = position_ids if position_ids.dim() == 3 else position_ids.expand_as(ids)
        outputs = self.model(
            ids,
            attention_mask,
            position_ids,
            DynamicCache(config=self.config),
            modality_ids=modality_ids,
            logits_to_keep=1,
            return_dict=True,
            **images,
        )
        if self.config.hides_images:
            attention_mask = attention_mask * (ids != self.config.image_token_id)
        cache = DecodingCache.of(getattr(outputs, CACHE), attention_mask, self.decoder.cache_dtype)
        return outputs.logits[:, -1].float(), cache, (times_of(position_ids)[:, -1] + 1).long().tolist()

    def run(self) -> MoTTransfusionGenerateOutput:
        """Go from the prompts to the last token and picture.  -> what `generate()` returns"""
        while self.running:
            # Pictures come first, so that the sequences that draw catch up with the others.
            drawing = [row for row in self.running if self.last_token(row) == self.config.boi_token_id]
            if drawing:
                # A sequence with images in its prompt may need other settings, and contexts of guidance, than one
                # without; and pictures may differ in size.
                is_edited = [self.has_images[row] and self.settings.editing is not None for row in drawing]
                kinds = [(self.contexts_of(row), self.sizes[row], own) for row, own in zip(drawing, is_edited)]
                self._draw([row for row, kind in zip(drawing, kinds) if kind == kinds[0]])
                continue
            self.choose(self.logits)
            if self.running:
                self._step()
        if self.request.streamer is not None:
            self.request.streamer.end()
        return self.output()

    def settings_of(self, row: int):
        """Return the settings of the pictures of a sequence."""
        return self.settings.for_prompt(self.has_images[row])

    def contexts_of(self, row: int) -> tuple[str, ...]:
        """Name the contexts of guidance of a sequence, beside its whole prompt."""
        return contexts_of(self.settings_of(row), self.has_images[row])

    def last_token(self, row: int) -> int:
        return self.new_tokens[row][-1] if self.new_tokens[row] else int(self.prompt[row, -1])

    # ------------------------------------------------------------------------------------------------------- text mode

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        """Process the logits of each sequence with its own prompt: (R, V) -> (R, V)."""
        # Placeholders and EOI are appended and never chosen. BOI is no choice where a picture does not fit.
        allowed = logits.clone()
        allowed[:, [token for token in self.config.written_token_ids if token < logits.shape[1]]] = -float("inf")
        for row, tokens in enumerate(self.new_tokens):
            has_room = self.budget - len(tokens) >= self.lengths[row] + 2
            if not has_room or self.settings.generation_mode == "text" or row in self.thinking:
                allowed[row, self.config.boi_token_id] = -float("inf")

        scores = allowed.clone()
        for group, ids in self._by_length(self.running):
            scores[group] = processed(self.request.logits_processor, ids, allowed.clone())[group]

        # Behind the end of a thought comes BOI, and a thought that is too long ends.
        for row in self.thinking:
            tokens = self.new_tokens[row]
            is_ended = bool(tokens) and tokens[-1] in self.request.generation_config._eos_token_tensor.tolist()
            if is_ended or len(tokens) >= self.settings.max_think_tokens:
                scores[row] = -float("inf")
                scores[row, self.config.boi_token_id if is_ended else self._end_token] = 0.0
        return scores

    def _append(self, tokens: torch.Tensor) -> torch.Tensor:
        chosen = tokens.tolist()
        for row in self.running:
            self.new_tokens[row].append(chosen[row])
            if chosen[row] == self.config.boi_token_id:
                self.thinking.discard(row)
        return tokens

    def _stop(self) -> None:
        self._end([row for row in self.running if row not in self.thinking])

    def _end(self, rows: list[int]) -> None:
        """Ask the stopping criteria about `rows`, and take the sequences that end out of `running`."""
        for group, ids in self._by_length(rows):
            done = stopped(self.request.stopping_criteria, ids, self.kept_scores or None).tolist()
            self.running = [row for row in self.running if not (row in group and done[row])]

    def _by_length(self, rows: list[int]):
        """Yield sequences of one length, and a batch (R, L) in which only these are right.

        The other sequences are cut or padded to that length, and keep their places in the batch: logits processors and
        stopping criteria may hold one state for each place.
        """
        for length in sorted({len(self.new_tokens[row]) for row in rows}):
            tokens = [(tokens + [self.pad] * length)[:length] for tokens in self.new_tokens]
            group = [row for row in rows if len(self.new_tokens[row]) == length]
            ids = torch.cat([self.prompt, self.prompt.new_tensor(tokens)], dim=1)
            if self.config.num_placeholder_tokens:  # logits processors look up the scores of all ids
                ids = ids.masked_fill(ids >= self.config.vocab_size, self.config.eoi_token_id)
            yield group, ids

    def _step(self) -> None:
        """Run the last token of each sequence that goes on, padding for the others."""
        tokens = [self.last_token(row) if row in self.running else self.pad for row in range(len(self.prompt))]
        self.logits = self.decoder.step(self.prompt.new_tensor(tokens), self.positions, self.cache).float()
        self.positions = [position + 1 for position in self.positions]

    # -------------------------------------------------------------------------------------------------- diffusion mode

    def _draw(self, rows: list[int]) -> None:
        """Draw a picture in each of these sequences, and append it with EOI."""
        # A BOI that belongs to the image's block is run again with it, and is no part of the prefix.
        drop = int(self.config.markers_in_image_block)
        prefixes = [self.cache.prefix(row, self.positions[row], drop) for row in rows]
        drawing = self.drawing(rows)
        denoise(drawing, prefixes, self.context_prefixes(rows))
        self.keep(rows, drawing)

        # Only a sequence that goes on needs its picture in the cache.
        places = [place for place, row in enumerate(rows) if row in self.running]
        if not places:
            return
        going_on = [rows[place] for place in places]
        behind = [prefixes[place] for place in places]
        drawn = drawing.latents[places]
        self.logits[going_on], positions = commit(self.model, self.cache, going_on, behind, drawn, drawing.size)
        for row, position in zip(going_on, positions):
            self.positions[row] = position

    def drawing(self, rows: list[int]) -> Denoising:
        """Begin a picture in each of these sequences, which are alike in size, contexts and settings of guidance."""
        first, generators = rows[0], [self.generators[row] for row in rows]
        given = self.settings.first_frames
        if given is not None:
            given = given[[row // (len(self.prompt) // len(given)) for row in rows]]
        return Denoising(
            self.model, self.settings_of(first), generators, rows, self.has_images[first], self.sizes[first], given
        )

    def context_prefixes(self, rows: list[int]) -> list[Prefix]:
        """Return the prefixes that guidance leads these sequences away from: those of one context, then of the next.

        Contexts are parts of the prompts, and are run once. What a sequence wrote and drew behind its prompt stands in
        none of them.
        """
        prefixes = []
        for name in self.contexts_of(rows[0]):
            if name not in self.contexts:
                self.contexts[name] = self._run_context(name)
            # There is one for all, or one for each prompt, whose sequences stand together.
            own = self.contexts[name]
            prefixes += [own[row // (len(self.prompt) // len(own))] for row in rows]
        return prefixes

    def _run_context(self, name: str) -> list[Prefix]:
        """Run a context of the prompts.  -> the prefix of each prompt, or one for all"""
        if name == UNCONDITIONAL:
            ids, mask = self.settings.unconditional_prompts(self.config, self.prompt.device)
        else:
            # The tokens that are kept move to the right, and BOI follows. The begin of a thought belongs to it.
            prompt, mask = self.prompt, self.mask
            if self.settings.writes_thoughts and (prompt[:, -1] == self.request.generation_config.bos_token_id).all():
                prompt, mask = prompt[:, :-1], mask[:, :-1]
            kept = kept_tokens(self.config, name, prompt, mask)
            order = kept.long().argsort(dim=1, stable=True)[:, prompt.shape[1] - int(kept.sum(dim=1).max()) :]
            ids = prompt.masked_fill(~kept, self.pad).gather(1, order)  # no placeholder stays in the padding
            ids = F.pad(ids, (0, 1), value=self.config.boi_token_id)
            mask = F.pad(kept.long().gather(1, order), (0, 1), value=1)
        images = self.clean_images if name == WITHOUT_TEXT else {}
        _, cache, positions = self._prefill(ids, mask, images)
        drop = int(self.config.markers_in_image_block)
        return [cache.prefix(row, position, drop) for row, position in enumerate(positions)]

    def keep(self, rows: list[int], drawing: Denoising) -> None:
        """Append finished pictures and EOI to these sequences. Some sequences may end here.

        Raises:
            ValueError: latents that are not finite.
        """
        # Decode everything before anything is appended.
        latents = drawing.latents
        check_finite(latents, f"after {drawing.num_steps} steps with guidance_scale={drawing.settings.guidance_scale}")
        pictures = pictures_of(self.model, latents, self.settings.output_type)
        along = [pictures_of(self.model, estimate, self.settings.output_type) for estimate in drawing.estimates]

        # Append placeholders and EOI, and hand out tokens and picture.
        tokens = [self.config.image_token_id] * self.lengths[rows[0]] + [self.config.eoi_token_id]
        streamer = self.request.streamer
        for place, row in enumerate(rows):
            self.new_tokens[row].extend(tokens)
            self.latents[row].append(latents[place])
            self.images[row].append(pictures[place])
            self.intermediates[row].append([estimate[place] for estimate in along])
            if streamer is not None:
                streamer.put(torch.tensor(tokens))
                if hasattr(streamer, "put_image"):
                    streamer.put_image(pictures[place])
        self._end(rows)
        if self.settings.generation_mode == "image":
            self.running = [row for row in self.running if row not in rows]

    # --------------------------------------------------------------------------------------------------------- results

    def sequences(self) -> torch.Tensor:
        """Return prompts and new tokens, padded on the right.  -> (R, P + longest)"""
        longest = max(map(len, self.new_tokens))
        padded = [tokens + [self.pad] * (longest - len(tokens)) for tokens in self.new_tokens]
        return torch.cat([self.prompt, self.prompt.new_tensor(padded)], dim=1)

    def output(self) -> MoTTransfusionGenerateOutput:
        """Return what `generate()` returns, as far as the sequences have come."""
        sequences = self.sequences()
        has_pictures = self.model.vae is not None and self.settings.output_type != "latent"
        return MoTTransfusionGenerateOutput(
            sequences=sequences,
            modality_ids=self.model.model.modality_ids_of(sequences),
            images=self.images if has_pictures else None,
            latents=self.latents,
            intermediates=self.intermediates if self.settings.intermediate_every else None,
            scores=self.kept_scores or None,
            logits=self.kept_logits or None,
        )


def pictures_of(model, latents: torch.Tensor, output_type: str) -> list:
    """Decode latents to pictures.  (N, C, h, w) -> N pictures

    Args:
        output_type: "pil"; "pt", tensors (3, H, W) in [0, 1]; or "latent". Without a VAE all of them give latents.
    """
    if model.vae is None or output_type == "latent":
        return list(latents)
    pixels = decode_latents(model.vae, latents)
    return list((pixels + 1) / 2) if output_type == "pt" else MoTImageProcessor.to_pictures(pixels)
