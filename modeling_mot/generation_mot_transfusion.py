"""Generation in the Transfusion setting: text mode, diffusion mode at BOI, back to text at EOI (paper, appendix A.2)."""

# B sequences, L columns, n tokens of an image, V vocabulary

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.cache_utils import DynamicCache
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .attention_masks import find_image_blocks, image_positions
from .denoising_mot import DiffusionSettings, ImageForward, Prefix, denoise
from .generation_mot import MoTGenerationMixin
from .latents_mot import decode_latents


logger = logging.get_logger(__name__)

SETTINGS = tuple(setting.name for setting in fields(DiffusionSettings))
IMAGE_INPUTS = ("latents", "pixel_values", "image_sizes")


@dataclass
class MoTTransfusionGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate()` returns.

    Attributes:
        sequences: (B, L) prompt and new tokens, placeholders for the patches of images, padded on both sides.
        modality_ids: (B, L).
        images: for each sequence the images it drew, in order, as `output_type` says; None without a VAE.
        latents: for each sequence the latents of these images, (C, h, w) each.
        intermediates: for each sequence and image, pictures along the way, if `intermediate_every` asked for them.
        scores, logits: of each sampled token, (B, V), if `output_scores` or `output_logits` asked for them.
    """

    modality_ids: torch.LongTensor | None = None
    images: list[list[Any]] | None = None
    latents: list[list[torch.Tensor]] | None = None
    intermediates: list[list[list[Any]]] | None = None


class MoTTransfusionGenerationMixin(MoTGenerationMixin):
    """`generate()` for interleaved text and pictures."""

    output_modalities = ("text", "image")

    def generate(self, inputs=None, *args, documents=None, processor=None, **kwargs):
        """Continue prompts with text and pictures.

        Text is sampled as `GenerationMixin.generate` does it, with its arguments. Where a sequence has BOI, sampled or at
        the end of its prompt, it draws a picture while the others wait: the prefix stays in the cache, each denoising
        step runs the image's tokens alone, guidance is one batch of two, the clean picture is committed in one pass at
        t = 0, EOI is appended, text goes on. What a sequence becomes does not depend on the others in its batch.

        Args:
            inputs, input_ids: (B, L) prompts, padded on the left; or
            documents: a document or a list of them, with the `processor` that encodes them.
            latents, pixel_values, image_sizes: the images in the prompts, as in `forward`; they are clean.
            max_new_tokens: new tokens of a sequence, those of pictures included. Default: one picture and 20.
            guidance_scale: prediction = unconditional + scale * (conditional - unconditional); 1 is none.
            num_inference_steps: denoising steps of a picture (default 250).
            scheduler: `ddpm` (default), `ddim`, `dpm`, ..., or a class name of diffusers; `scheduler_kwargs` go to it.
            generator: of the noise and of sampled tokens: one for all, or one for each sequence. From one, a generator
                is derived for each sequence.
            image_size: [height, width] of new pictures in pixels; default `config.latent_size`.
            negative_prompt_ids: (1, L) or (L,) what guidance leads away from, without BOI; default: bos alone, which is
                what training sees when it drops a caption.
            callback_on_step_end: called as (model, step, timestep, {"latents", "rows"}); it may return {"latents": ...}.
            intermediate_every: keep an estimate of the picture every so many steps.
            output_type: "pil", "pt" (tensors (3, H, W) in [0, 1]) or "latent" (no pictures, only latents).
            progress_bar: show one for each picture.
            generation_mode: "image" appends BOI to the prompts that do not end with it.
            streamer: as in transformers; a method `put_image(image)`, where it has one, is called with each picture.

        Returns:
            `MoTTransfusionGenerateOutput`.

        Raises:
            ValueError: what cannot be done, by name, before anything is drawn.
        """
        if documents is not None:
            if processor is None or inputs is not None or kwargs.get("input_ids") is not None:
                raise ValueError("documents= needs processor=, the MoTProcessor that encodes them, and no input_ids")
            kwargs |= self._encoded(documents, processor, kwargs.get("generation_mode"))
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None or input_ids.shape[1] == 0:
            raise ValueError("generate() needs prompts: pass input_ids, or documents with processor")
        if kwargs.get("generation_mode") == "image":
            input_ids, kwargs = self._with_boi(input_ids, kwargs)
        # Past MoTGenerationMixin.generate, which asks for the ranges that discrete modalities need.
        if len(self.config.token_modalities) > 1 and self.config.modality_token_ranges is None:
            raise ValueError("generate() needs config.modality_token_ranges for the modalities beside text and image")
        if kwargs.get("document_ids") is not None:
            raise ValueError("generate() got document_ids: packed rows are for training, pass one document per row")
        return super(MoTGenerationMixin, self).generate(input_ids, *args, **kwargs)

    def _encoded(self, documents, processor, mode) -> dict:
        encoded = processor(
            documents=documents,
            continue_with=mode or "text",
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return {name: value.to(self.device) for name, value in encoded.items()}

    def _with_boi(self, input_ids, kwargs):
        """BOI behind each prompt."""
        ended = input_ids[:, -1] == self.config.boi_token_id
        if ended.all():
            return input_ids, kwargs
        if ended.any():
            raise ValueError("generation_mode='image', but some prompts end with boi_token_id and some do not")
        kwargs = dict(kwargs)
        for name, value in (("attention_mask", 1), ("modality_ids", 0)):
            if kwargs.get(name) is not None:
                kwargs[name] = torch.nn.functional.pad(kwargs[name], (0, 1), value=value)
        return torch.nn.functional.pad(input_ids, (0, 1), value=self.config.boi_token_id), kwargs

    # ------------------------------------------------------------------------------- hooks of GenerationMixin.generate

    def _prepare_generation_config(self, generation_config, **kwargs):
        given = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        saved = {name: getattr(generation_config, name, None) for name in SETTINGS}
        settings = DiffusionSettings(**({name: value for name, value in saved.items() if value is not None} | given))
        settings.validate(self.config)
        if settings.guidance_scale not in (0, 1) and not self.config.caption_dropout:
            logger.warning(
                f"guidance_scale={settings.guidance_scale} with a model of caption_dropout=0: it never learnt to draw "
                "without a prompt, so there is nothing sensible to be led away from"
            )
        generation_config.guidance_scale = None  # transformers' own guidance is of logits
        generation_config.diffusion = settings
        return generation_config, model_kwargs

    def _prepare_generated_length(self, generation_config, has_default_max_length, *args, **kwargs):
        if has_default_max_length and generation_config.max_new_tokens is None:
            length = self.config.image_length(*generation_config.diffusion.latent_size(self.config))
            generation_config.max_new_tokens = length + 1 + 20
        return super()._prepare_generated_length(generation_config, has_default_max_length, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}
        if images and expand_size > 1:
            blocks = find_image_blocks(input_ids == self.config.image_token_id, None, with_markers=False)
            places = torch.arange(int((blocks.amax(dim=1) + 1).sum()), device=input_ids.device)
            rows = places.split((blocks.amax(dim=1) + 1).tolist())
            order = torch.cat([row for row in rows for _ in range(expand_size)])
            images = {name: torch.as_tensor(value)[order.cpu()] for name, value in images.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _refuse(self, *args, **kwargs):
        raise ValueError(
            "a Transfusion model samples tokens or takes the likeliest (do_sample, num_return_sequences); beam search and "
            "assisted decoding cannot go through pictures: leave num_beams and assistant_model out"
        )

    _beam_search = _assisted_decoding = _refuse

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("past_key_values is filled; a Transfusion model begins from the prompt: leave it out")
        if generation_config.cache_implementation not in (None, "dynamic") or generation_config.use_cache is False:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}, use_cache="
                f"{generation_config.use_cache}: pictures are drawn with the dynamic cache; leave both out"
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size would cut pictures in the prompt; leave it out")
        model_kwargs["past_key_values"] = DynamicCache(config=self.config)

    # --------------------------------------------------------------------------------------------------- the decoding

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        run = _Interleaved(self, input_ids, generation_config, streamer, model_kwargs)
        run.go(
            logits_processor, StoppingCriteriaList([c for c in stopping_criteria if type(c) is not MaxLengthCriteria])
        )
        return run.output(input_ids)


class _Interleaved:
    """One call of `generate()`.

    All sequences are kept padded on the left, ids and cache alike: when some draw a picture, the others move to the
    right. So each sequence is always a row that `generate()` could have been given as a prompt.
    """

    def __init__(self, model, input_ids, generation_config, streamer, model_kwargs):
        self.model, self.config, self.streamer = model, model.config, streamer
        self.generation_config, self.settings = generation_config, generation_config.diffusion
        self.ids, self.mask = input_ids, model_kwargs.pop("attention_mask", None)
        if self.mask is None:
            self.mask = torch.ones_like(input_ids)
        if (self.mask[:, -1] == 0).any():
            raise ValueError("attention_mask has padding on the right; pad prompts on the left (padding_side='left')")
        self.budget = generation_config.max_length - input_ids.shape[1]
        self.size = self.settings.latent_size(self.config)
        self.length = self.config.image_length(*self.size)
        count = len(input_ids)
        self.unfinished = torch.ones(count, dtype=torch.bool, device=input_ids.device)
        self.new_tokens: list[list[int]] = [[] for _ in range(count)]
        self.latents: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self.images: list[list] = [[] for _ in range(count)]
        self.intermediates: list[list[list]] = [[] for _ in range(count)]
        self.scores, self.raw_logits = (), ()
        self.generators = self._generators(count)
        self.free_prefix: Prefix | None = None
        if self.budget < self.length + 1 and (input_ids[:, -1] == self.config.boi_token_id).any():
            raise ValueError(
                f"max_new_tokens={self.budget} is shorter than the picture that boi_token_id begins: it takes "
                f"{self.length} tokens and EOI; set max_new_tokens to at least {self.length + 1}"
            )
        images = {name: model_kwargs.get(name) for name in IMAGE_INPUTS}
        self.logits, self.cache, self.position = self._prefill(self.ids, self.mask, model_kwargs, images)

    def _generators(self, count: int) -> list[torch.Generator | None]:
        generator = self.settings.generator
        if generator is None:
            return [None] * count
        if isinstance(generator, (list, tuple)):
            if len(generator) != count:
                raise ValueError(
                    f"generator has {len(generator)} entries for {count} sequences; give one for each, or one"
                )
            return list(generator)
        seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
        return [torch.Generator(device=generator.device).manual_seed(seed) for seed in seeds]

    def _prefill(self, ids, mask, model_kwargs, images):
        """The prompts, images clean.  -> next logits (B, V), cache, next position (B,)"""
        config = self.config
        position_ids = model_kwargs.get("position_ids")
        if position_ids is None:
            blocks = find_image_blocks(ids == config.image_token_id, None, config.markers_in_image_block)
            if config.image_positions == "consecutive":
                blocks = torch.full_like(blocks, -1)
            position_ids = image_positions(blocks, None, mask)
        count = next((len(value) for value in images.values() if value is not None), 0)
        clean = {}
        if count:
            clean = {
                "clean_images": torch.ones(count, dtype=torch.bool, device=ids.device),
                "timesteps": torch.zeros(count, dtype=torch.long, device=ids.device),
            }
        cache = DynamicCache(config=config)
        outputs = self.model(
            input_ids=ids,
            modality_ids=model_kwargs.get("modality_ids"),
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            logits_to_keep=1,
            **{name: value for name, value in images.items() if value is not None},
            **clean,
        )
        return outputs.logits[:, -1].float(), cache, position_ids[:, -1] + 1

    def go(self, logits_processor, stopping_criteria) -> None:
        while self.unfinished.any():
            drawing = self.unfinished & (self.ids[:, -1] == self.config.boi_token_id)
            if drawing.any():
                self._draw(drawing.nonzero().flatten())
                self._finish_over_budget()
                continue
            if self.budget <= 0:
                break
            tokens = self._sampled(logits_processor)
            self._append(tokens)
            self.unfinished &= ~stopping_criteria(self.ids, self.scores or None)
            self._finish_over_budget()
            if self.unfinished.any():
                self._step(tokens)
        if self.streamer is not None:
            self.streamer.end()

    def _finish_over_budget(self):
        used = torch.tensor([len(tokens) for tokens in self.new_tokens], device=self.unfinished.device)
        self.unfinished &= used < self.budget

    # ---------------------------------------------------------------------------------------------------- text mode

    def _sampled(self, logits_processor) -> torch.Tensor:
        """(B,) the next token of each sequence."""
        config = self.config
        logits = self.logits.clone()
        logits[:, [config.image_token_id, config.eoi_token_id]] = -float("inf")  # never sampled, only ever appended
        left = torch.tensor([self.budget - len(tokens) for tokens in self.new_tokens], device=logits.device)
        logits[left < self.length + 2, config.boi_token_id] = -float("inf")  # no room for a picture
        scores = logits_processor(self.ids, logits)
        if self.generation_config.output_scores:
            self.scores += (scores,)
        if self.generation_config.output_logits:
            self.raw_logits += (self.logits,)
        if not self.generation_config.do_sample:
            return scores.argmax(dim=-1)
        probabilities = scores.softmax(dim=-1)
        return torch.cat(
            [
                torch.multinomial(row if generator is None else row.to(generator.device), 1, generator=generator)
                for row, generator in zip(probabilities, self.generators)
            ]
        ).to(scores.device)

    def _append(self, tokens: torch.Tensor) -> None:
        pad = self.generation_config._pad_token_tensor
        if pad is not None:
            tokens = torch.where(self.unfinished, tokens, pad.to(tokens.device))
        for row, token in enumerate(tokens.tolist()):
            if self.unfinished[row]:
                self.new_tokens[row].append(token)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)[:, None]], dim=1)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())

    def _step(self, tokens: torch.Tensor) -> None:
        outputs = self.model.model(
            input_ids=self.ids[:, -1:],
            modality_ids=self.model.model.modality_ids_of(self.ids[:, -1:]),
            attention_mask=self.mask,
            position_ids=self.position[:, None],
            past_key_values=self.cache,
        )
        self.logits = self.model.lm_head(outputs.last_hidden_state[:, -1]).float()
        self.position = self.position + 1

    # ----------------------------------------------------------------------------------------------- diffusion mode

    def _draw(self, rows: torch.Tensor) -> None:
        """A picture in each of these sequences: denoise, commit it clean with EOI, move the others to the right."""
        inside = int(self.config.markers_in_image_block)
        everyone = Prefix.of_cache(self.cache, self.mask, self.position)
        prefix = everyone.rows(rows, drop_last=inside)
        latents, intermediates = denoise(
            self.model,
            prefix,
            self._unconditional(len(rows)),
            self.settings,
            [self.generators[row] for row in rows.tolist()],
            rows.tolist(),
        )
        cache = prefix.cache()
        commit = ImageForward(self.model, prefix, self.size, with_end=True, cache=cache)
        hidden_states, _ = commit(latents, 0)
        self.logits[rows] = self.model.lm_head(hidden_states[:, -1]).float()
        self._move(rows, cache, commit.input_ids[:, inside:])
        self.position[rows] = commit.position_ids[:, -1] + 1
        self._keep(rows.tolist(), latents, intermediates, commit.input_ids[:, inside:].tolist())

    def _unconditional(self, count: int) -> Prefix | None:
        """The prefix that guidance leads away from, prefilled once and repeated."""
        if self.settings.guidance_scale == 1:
            return None
        if self.free_prefix is None:
            ids = self.settings.negative_prompt_ids
            if ids is None:
                ids = [self.config.bos_token_id] if self.config.bos_token_id is not None else []
            ids = torch.as_tensor(ids, device=self.ids.device, dtype=torch.long).view(1, -1)
            if not ids.numel() or ids[0, -1] != self.config.boi_token_id:
                ids = torch.cat([ids, ids.new_full((1, 1), self.config.boi_token_id)], dim=1)
            mask = torch.ones_like(ids)
            _, cache, position = self._prefill(ids, mask, {}, {})
            self.free_prefix = Prefix.of_cache(cache, mask, position)
        repeated = torch.zeros(count, dtype=torch.long, device=self.ids.device)
        return self.free_prefix.rows(repeated, drop_last=int(self.config.markers_in_image_block))

    def _move(self, rows: torch.Tensor, cache, tokens: torch.Tensor) -> None:
        """Take over the cache of the sequences that drew; the others get as many columns on the left."""
        added, old = tokens.shape[1], self.mask.shape[1]

        def widened(whole, part=None):
            wide = whole.new_zeros(*whole.shape[:2], old + added, whole.shape[-1])
            wide[:, :, added:] = whole
            wide[rows] = 0
            wide[rows, :, old + added - part.shape[2] :] = part
            return wide

        for mine, theirs in zip(self.cache.layers, cache.layers):
            mine.keys, mine.values = widened(mine.keys, theirs.keys), widened(mine.values, theirs.values)
        pad = self.generation_config._pad_token_tensor
        filler = self.ids.new_full((len(self.ids), added), 0 if pad is None else int(pad))
        drew_ids = torch.cat([self.ids[rows], tokens], dim=1)
        drew_mask = torch.cat([self.mask[rows], torch.ones_like(tokens)], dim=1)
        self.ids = torch.cat([filler, self.ids], dim=1)
        self.mask = torch.cat([torch.zeros_like(filler), self.mask], dim=1)
        self.ids[rows], self.mask[rows] = drew_ids, drew_mask

    def _keep(self, rows: list[int], latents, intermediates, tokens: list[list[int]]) -> None:
        pictures = self._pictures(latents)
        along = [self._pictures(estimate) for estimate in intermediates]
        for place, row in enumerate(rows):
            self.new_tokens[row].extend(tokens[place])
            self.latents[row].append(latents[place])
            if pictures is not None:
                self.images[row].append(pictures[place])
                self.intermediates[row].append([estimate[place] for estimate in along])
            if self.streamer is not None:
                self.streamer.put(torch.tensor([tokens[place]]))
                if pictures is not None and hasattr(self.streamer, "put_image"):
                    self.streamer.put_image(pictures[place])

    def _pictures(self, latents: torch.Tensor) -> list | None:
        """(N, C, h, w) -> N pictures as `output_type` says, or None."""
        if self.model.vae is None or self.settings.output_type == "latent":
            return None
        pixels = (decode_latents(self.model.vae, latents) + 1) / 2
        if self.settings.output_type == "pt":
            return list(pixels)
        arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]

    def output(self, prompt: torch.Tensor) -> MoTTransfusionGenerateOutput:
        pad = self.generation_config._pad_token_tensor
        longest = max(map(len, self.new_tokens))
        filler = 0 if pad is None else int(pad)
        padded = [tokens + [filler] * (longest - len(tokens)) for tokens in self.new_tokens]
        sequences = torch.cat([prompt, torch.tensor(padded, device=prompt.device, dtype=prompt.dtype)], dim=1)
        has_pictures = self.model.vae is not None and self.settings.output_type != "latent"
        return MoTTransfusionGenerateOutput(
            sequences=sequences,
            modality_ids=self.model.model.modality_ids_of(sequences),
            images=self.images if has_pictures else None,
            latents=self.latents,
            intermediates=self.intermediates if self.settings.intermediate_every and has_pictures else None,
            scores=self.scores or None,
            logits=self.raw_logits or None,
        )
