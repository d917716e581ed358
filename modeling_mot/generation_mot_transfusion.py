"""`generate()` in the Transfusion setting: text mode, diffusion mode at BOI, text again at EOI (paper, appendix A.2).

`MoTTransfusionGenerationMixin` takes the arguments apart: `DiffusionSettings` holds the options of drawing, and
`InterleavedDecoding` writes and draws.
"""

# B sequences, L columns

from dataclasses import fields

import torch
from transformers.utils import logging

from .attention_masks import find_image_blocks, find_placeholders, image_positions
from .checks_arguments import CACHE, cache_as, negative_prompt
from .decoding_loop import ENCODER_INPUTS, IMAGE_INPUTS, InterleavedDecoding, Request
from .decoding_pictures import SIZE_OF_PROMPT, DiffusionSettings, contexts_of, length_of
from .generation_mot import MoTGenerationMixin
from .latent_images import sizes_of_prompts
from .serving_rounds import PictureSequence, Studio


logger = logging.get_logger(__name__)

PROMPT_INPUTS = ("attention_mask", "modality_ids", "position_ids", *IMAGE_INPUTS, CACHE, "use_cache")
SETTINGS = tuple(setting.name for setting in fields(DiffusionSettings))
OF_PROMPTS = ("unconditional_prompt", "prompt_sizes")  # settings that are made of a call's prompts


class MoTTransfusionGenerationMixin(MoTGenerationMixin):
    """Adds text interleaved with pictures to `MoTGenerationMixin`."""

    output_modalities = ("text", "image")

    def generate(
        self,
        inputs=None,
        *args,
        documents=None,
        processor=None,
        allow_urls=None,
        allow_paths=None,
        negative_prompt_ids=None,
        negative_prompt_attention_mask=None,
        **kwargs,
    ):
        """Continue prompts with text and pictures.

        Text is sampled as `GenerationMixin.generate` does it, with its arguments. Behind BOI, sampled or at the end of
        its prompt, a sequence draws a picture while the others wait. The prefix stays in the cache, each denoising step
        runs the image's tokens alone, and all contexts of guidance are one batch. The clean picture is committed in one
        pass at t = 0, EOI is appended, and text goes on. The result of a sequence does not depend on the others in its
        batch.

        Args:
            inputs, input_ids: (B, L) prompts, padded on the left; or
            documents: a document or a list of them, with the `processor` that encodes them. `allow_urls` and
                `allow_paths` say if the documents may name addresses and files to be opened. Default: the processor's.
            latents, pixel_values, image_sizes: the images in the prompts, as in `forward`; they are clean.
            encoder_pixel_values, encoder_image_sizes: the pictures in the prompts that encoders see, as in `forward`.
            max_new_tokens: new tokens of a sequence, those of pictures included. Default: one picture and 20.
            generation_mode: "text" draws a picture only if a prompt ends with BOI. "image" appends BOI to prompts that
                do not end with it, and draws one picture for each and nothing after it, whatever `max_new_tokens`.
                Default: both, as the model chooses.
            guidance_scale: prediction = unconditional + scale * (conditional - unconditional); 1 is none.
            image_guidance_scale: guidance by the pictures of a prompt. With a number, `guidance_scale` leads away from
                the prompt without its last text and not from the unconditional prompt, and this scale leads away from
                the prompt without its pictures; 1 leads away from the text alone. Default: None.
            guidance_form: "nested" (default; BAGEL) or "sum" (InstructPix2Pix), the formula that combines both scales;
                see `decoding_pictures.guided`. In the nested one the image's scale has no effect where
                `guidance_scale` is 1.
            guidance_renorm: "none" (default), or what shrinks a guided prediction to the norm of the prediction without
                guidance: "global" (of a picture), "channel" (of each patch), "text_channel" (of each patch, before
                guidance by pictures). Norms are those of each picture: BAGEL's code takes "global" over a whole batch.
            guidance_renorm_min: the smallest factor by which it shrinks (default 0).
            guidance_interval: [low, high], the shares of noise t with low < t <= high at which there is guidance
                (default [0, 1], always).
            negative_prompt_ids: (L,) or (1, L) for all prompts, or (B, L): the unconditional prompts, with
                `negative_prompt_attention_mask` if padded on the left; BOI is appended. Default: `config.bos_token_id`
                alone, or nothing if there is none, as in training when a caption is dropped.
            num_inference_steps: denoising steps of a picture (default 250).
            time_spacing: the times of flow matching, before the shift: "scheduler" (default; as the scheduler has
                them), "steps", "points" (BAGEL: one evaluation fewer than `num_inference_steps`) or "levels"; see
                `latent_images.set_times`.
            timestep_shift: the shift of these times; default: the configuration's, for pictures of this size.
            scheduler: `ddpm` (default; `flow` with flow matching), `ddim`, `dpm`, `unipc`, ..., or a class name of
                diffusers; `scheduler_kwargs` go to it.
            generator: of the noise and of sampled tokens: one for each sequence; or one for all, from which one is
                derived for each sequence.
            image_size: [height, width] of new pictures in pixels (latents without a VAE); or "prompt" for that of the
                last image of latents in each prompt. Default, and without such an image: `config.latent_size`.
            num_frames: draw videos of so many frames of latents, with `image_positions="grid"` (Cosmos 3); their
                latents are (C, frames, h, w). Default: pictures.
            frames_per_second: of these videos, for the positions of their frames.
            first_frames: (1, C, k, h, w) for all prompts or (B, C, k, h, w): latents of the first k frames, which stay.
            editing: names of arguments of guidance and of times, and values that hold in their place for prompts with
                images. Those that a call names itself hold for all prompts.
            think: True to write a thought before each picture of `generation_mode="image"`: text up to EOS, of at most
                `max_think_tokens` (default 1000). Guidance leads away from contexts without it. With `documents`, they
                begin with the processor's text that asks for it, also before answers of "text".
            latent_bound: the largest clean latent that a prediction of noise may imply (default 6.0; latents have about
                unit deviation); see `NoiseSchedule.bounded`.
            callback_on_step_end: called as (model, step, timestep, {"latents", "rows"}); it may return
                {"latents": ...}, finite and of the same shape.
            intermediate_every: keep an estimate of the picture every so many steps.
            output_type: "pil", "pt" (tensors (3, H, W) in [0, 1]) or "latent" (no pictures, only latents).
            progress_bar: show one for each picture.
            streamer: as in transformers, for one sequence. If it has a method `put_image(image)`, this is called with
                each picture.

        Returns:
            `MoTTransfusionGenerateOutput`.

        Raises:
            ValueError: an argument that cannot be followed; the message names it, before anything is drawn.

        Example:

            >>> import torch
            >>> from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel
            >>> config = MoTTransfusionConfig(
            ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            ...     latent_channels=2, latent_size=[4, 4], unet_channels=[8, 16], unet_layers=1, unet_norm_groups=4,
            ...     bos_token_id=1, boi_token_id=3, eoi_token_id=4, image_token_id=5,
            ... )
            >>> model = MoTTransfusionModel(config).eval()
            >>> prompt = torch.tensor([[1, 9, 10]])
            >>> output = model.generate(prompt, generation_mode="image", num_inference_steps=2)
            >>> output.sequences[0].tolist()  # the prompt, BOI, a placeholder for each patch, EOI
            [1, 9, 10, 3, 5, 5, 5, 5, 4]
            >>> output.latents[0][0].shape  # a model with a VAE gives pictures too, in `output.images`
            torch.Size([2, 4, 4])
        """
        # Documents become token ids.
        config = kwargs.get("generation_config") or next(iter(args), None) or self.generation_config
        mode = kwargs.get("generation_mode") or getattr(config, "generation_mode", None)
        kwargs["generation_mode"] = mode
        think = getattr(config, "think", None) if kwargs.get("think") is None else kwargs["think"]
        if documents is not None:
            if processor is None or inputs is not None or kwargs.get("input_ids") is not None:
                raise ValueError("documents= needs processor=, the MoTProcessor that encodes them, and no input_ids")
            allowed = {"allow_urls": allow_urls, "allow_paths": allow_paths}
            allowed = {name: value for name, value in allowed.items() if value is not None}
            kwargs |= self._encoded(documents, processor, mode, allowed | ({"think": True} if think else {}))

        # Everything is checked before a tensor is moved.
        self._check_call(inputs, args, kwargs)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None or input_ids.shape[1] == 0:
            raise ValueError("generate() needs prompts: pass input_ids, or documents with processor")
        for name, way_out in (("unconditional_prompt", "negative_prompt_ids"), ("prompt_sizes", "image_size='prompt'")):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not an argument: pass {way_out}")
        if negative_prompt_ids is not None or negative_prompt_attention_mask is not None:
            kwargs["unconditional_prompt"] = negative_prompt(
                self.config, negative_prompt_ids, negative_prompt_attention_mask, len(input_ids)
            )

        # As in transformers, prompts may be on the CPU.
        input_ids = input_ids.to(self.device)
        for name in (
            "attention_mask", "modality_ids", "position_ids", "latents", "pixel_values", "encoder_pixel_values",
        ):  # fmt: skip
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].to(self.device)
        size = kwargs.get("image_size") or getattr(config, "image_size", None)
        if isinstance(size, str) and size == SIZE_OF_PROMPT:
            images = (kwargs.get(name) for name in ("latents", "pixel_values", "image_sizes"))
            kwargs["prompt_sizes"] = sizes_of_prompts(self.config, input_ids, *images)

        # A prompt that asks for a picture ends with BOI, or if a thought comes first, with the token that begins texts.
        opening, token = "boi_token_id", self.config.boi_token_id
        if think is True and mode == "image":
            if (input_ids[:, -1] == token).any():
                raise ValueError(
                    f"think=True writes a thought before the picture, but a prompt ends with boi_token_id={token}: "
                    "leave that token out"
                )
            # A begin token that documents begin with is not one of texts.
            own = config.bos_token_id or self.generation_config.bos_token_id
            opening, token = "bos_token_id", own if self.config.bos_token_id is None else None
        if mode == "image" and token is not None:
            input_ids, kwargs = self._opened(input_ids, kwargs, opening, token, mode)

        # Not through `MoTGenerationMixin.generate`, which asks for the ranges that modalities of tokens need.
        if len(self.config.token_modalities) > 1 and self.config.modality_token_ranges is None:
            raise ValueError("generate() needs config.modality_token_ranges for the modalities beside text and image")
        return super(MoTGenerationMixin, self).generate(input_ids, *args, **cache_as(CACHE, kwargs))

    @staticmethod
    def _encoded(documents, processor, mode, allowed) -> dict:
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        return dict(processor(documents=documents, continue_with=mode or "text", **options, **allowed))

    # -------------------------------------------------------------------------------------- hooks: checks and settings

    def _validate_model_kwargs(self, model_kwargs):
        super()._validate_model_kwargs(model_kwargs)
        for name, value in model_kwargs.items():
            if value is not None and name not in PROMPT_INPUTS:
                raise ValueError(
                    f"generate() of a Transfusion model takes no {name}; of a prompt it reads input_ids and "
                    f"{', '.join(PROMPT_INPUTS)}"
                )

    def _prepare_generation_config(self, generation_config, **kwargs):
        # Options of drawing leave the arguments before transformers reads them.
        given = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if self._shows_insides(generation_config):
            raise ValueError(
                "generate() of a Transfusion model gives no output_hidden_states and output_attentions, because its "
                "steps are of different kinds; leave them out, or ask its forward for them"
            )

        # They come from the call, or else from the generation configuration.
        saved = {name: getattr(generation_config, name, None) for name in SETTINGS if name not in OF_PROMPTS}
        if isinstance(saved["editing"], dict):
            saved["editing"] = {name: value for name, value in saved["editing"].items() if name not in given}
        if "unconditional_prompt" in given:
            saved.pop("image_guidance_scale")
        settings = DiffusionSettings(**({name: value for name, value in saved.items() if value is not None} | given))
        settings.validate(self.config)
        # Guidance needs a model that has learnt to draw without a caption.
        if settings.guidance_scale not in (0, 1) and not self.config.caption_dropout:
            logger.warning(
                f"guidance_scale={settings.guidance_scale} with a model of caption_dropout=0: it never learnt to draw "
                "without a prompt, so that guidance has nothing sensible to lead away from"
            )
        if settings.image_guidance_scale not in (None, 1) and not contexts_of(settings, has_images=True):
            logger.warning(
                f"image_guidance_scale={settings.image_guidance_scale} has no effect, because guidance_form='nested' "
                "guides by pictures only where guidance_scale is not 1; take guidance_form='sum' to guide by pictures "
                "alone"
            )
        generation_config.guidance_scale = None  # transformers' own guidance is of logits
        generation_config.diffusion = settings
        return generation_config, model_kwargs

    def _prepare_generated_length(self, generation_config, has_default_max_length, *args, **kwargs):
        settings = generation_config.diffusion
        length = max(length_of(self.config, size) for size in settings.sizes(self.config)) + 1
        if settings.generation_mode == "image":
            thought = settings.max_think_tokens + 2 if settings.writes_thoughts else 0  # with its end, and BOI
            generation_config.max_new_tokens, has_default_max_length = length + thought, True
        elif has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = length + 20
        return super()._prepare_generated_length(generation_config, has_default_max_length, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        return self.positions_of_prompts(inputs_tensor, model_kwargs.get("attention_mask"))

    def positions_of_prompts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return positions as `config.image_positions` says, from the first token on that is no padding.

        (B, L) -> (B, L)
        """
        blocks = find_image_blocks(find_placeholders(self.config, input_ids), None, self.config.markers_in_image_block)
        if self.config.image_positions != "shared":  # on a grid, prompts with images are counted where they are run
            blocks = torch.full_like(blocks, -1)
        return image_positions(blocks, None, attention_mask)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Each prompt's images are repeated with it. Transformers would repeat each image by itself.
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}
        if images and expand_size > 1:
            kinds = find_placeholders(self.config, input_ids)
            is_image = kinds == self.config.image_modality
            orders = {
                is_encoded: self._repeated(kinds.masked_fill(is_image == is_encoded, 0), expand_size)
                for is_encoded in (False, True)
            }
            images = {name: torch.as_tensor(value)[orders[name in ENCODER_INPUTS]] for name, value in images.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    @staticmethod
    def _repeated(kinds: torch.Tensor, times: int) -> torch.Tensor:
        """Return the order of images, if each row with its images comes so many times.  (B, L) -> (images,) on the host

        Args:
            kinds: 0 outside of the images that are counted.
        """
        counts = find_image_blocks(kinds, None, with_markers=False).amax(dim=1) + 1
        rows = torch.arange(int(counts.sum())).split(counts.tolist())
        return torch.cat([row for row in rows for _ in range(times)])

    def _refuse(self, *args, **kwargs):
        raise ValueError(
            "a Transfusion model samples tokens or takes the likeliest (do_sample, num_return_sequences); beam search "
            "and assisted decoding cannot go through pictures: leave num_beams and assistant_model out"
        )

    _beam_search = _assisted_decoding = _refuse

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if model_kwargs.get(CACHE) is not None:
            raise ValueError("past_key_values came, but a Transfusion model begins from the prompt: leave it out")
        if generation_config.cache_implementation not in (None, "dynamic") or generation_config.use_cache is False:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}, use_cache="
                f"{generation_config.use_cache}: pictures are drawn with the dynamic cache; leave both out"
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size would cut pictures in the prompt; leave it out")

    # -------------------------------------------------------------------------------------------------------- decoding

    def _served(self, request: Request, decoder) -> PictureSequence:
        return PictureSequence(self, request, decoder)

    def _studio(self) -> Studio:
        return Studio(self)

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
        request = Request(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, streamer)
        return InterleavedDecoding(self, request).run()
