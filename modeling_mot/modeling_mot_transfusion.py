"""Transfusion with a Mixture-of-Transformers: text by next token, images by diffusion, in one sequence (paper, section
3.4 and appendix A)."""

# B batch, L row length, T = B * L tokens, D hidden size, V vocabulary
# N images in order of appearance, C latent channels, (h, w) latents, n tokens of an image, P patches of all images

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .attention_masks import ImageBlocks, find_image_blocks, image_positions
from .configuration_mot_transfusion import MoTTransfusionConfig
from .diffusion_mot import NoiseSchedule, cumulative_alphas, draw_timesteps
from .generation_mot_transfusion import MoTTransfusionGenerationMixin
from .latent_patchifier import build_patchifier, position_table
from .latents_mot import build_vae, encode_pixels
from .modality_routing import ModalityRouting
from .modeling_mot import MoTCausalLMOutputWithPast, MoTModel, MoTPreTrainedModel
from .token_losses import token_losses


@dataclass
class MoTTransfusionOutput(MoTCausalLMOutputWithPast):
    """What a Transfusion model returns.

    Attributes:
        loss: mean over token targets + `diffusion_loss_weight` * mean over the elements of noised latents (equation 4).
        loss_sums, loss_counts: of each modality of tokens, in nats and targets, and of "image_diffusion", in squared
            errors and elements of the latents of images that have noise.
        prediction: (N, C, h, w) what the patchifier says of the noise (or of `prediction_type`); zero in the padding.
    """

    prediction: torch.Tensor | None = None


class NoisyImages(NamedTuple):
    """The images of a forward.

    Attributes:
        latents: (N, C, h, w) with noise, padded at the bottom and the right where sizes differ.
        target: (N, C, h, w) what is to be predicted, or None.
        timesteps: (N,) their noise levels, 0 where clean.
        clean: (N,) bool.
        sizes: (h, w) of each image.
    """

    latents: torch.Tensor
    target: torch.Tensor | None
    timesteps: torch.Tensor
    clean: torch.Tensor
    sizes: list[tuple[int, int]]

    def by_size(self) -> dict[tuple[int, int], list[int]]:
        """size -> the images that have it"""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(self.sizes):
            groups.setdefault(size, []).append(index)
        return groups


class MoTTransfusionModel(MoTPreTrainedModel, MoTTransfusionGenerationMixin):
    """One transformer that predicts text and denoises images.

    Args:
        config: a `MoTTransfusionConfig`.
        vae: a trained diffusers autoencoder to hold; by default an untrained one of `config.vae_config`, whose weights
            come with the checkpoint, or none. It is frozen and stays in float32.
    """

    config_class = MoTTransfusionConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _keep_in_fp32_modules_strict = ["vae"]
    _supports_flash_attn = False  # its kernels know nothing of images that see themselves in both directions
    _no_split_modules = ["MoTDecoderLayer", "AutoencoderKL", "AutoencoderTiny"]
    main_input_name = "input_ids"

    def __init__(self, config: MoTTransfusionConfig, vae: nn.Module | None = None):
        if vae is not None:
            config.vae_config = {**vae.config, "_class_name": type(vae).__name__}
            config.validate_architecture()
        super().__init__(config)
        self.model = MoTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.patchifier = build_patchifier(config)
        self.noise_schedule = NoiseSchedule(config)
        self.vae = vae
        if vae is None and config.vae_config is not None:
            self.vae = build_vae(config.vae_config)
        self._freeze_vae()
        self.post_init()

    def _freeze_vae(self):
        if self.vae is not None:
            self.vae.requires_grad_(False).eval()
            for parameter in self.vae.parameters():
                parameter._is_hf_initialized = True  # its weights are diffusers' or a checkpoint's, never ours

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_vae()
        return loaded

    def train(self, mode: bool = True):
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    def _init_weights(self, module):
        if isinstance(module, NoiseSchedule):
            init.copy_(module.alphas_cumprod, cumulative_alphas(self.config))
        elif module is self.patchifier:
            # Its parts keep the initialisation they have in diffusers; the transformer's would be far too small.
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
        else:
            super()._init_weights(module)

    def save_pretrained(self, *args, **kwargs):
        self.generation_config._from_model_config = None  # as in MoTForCausalLM
        return super().save_pretrained(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------ the images

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> scaled latents (N, C, h, w) in float32, by the frozen VAE.

        Raises:
            ValueError: there is no VAE, or a side that it cannot divide.
        """
        if self.vae is None:
            raise ValueError("pixel_values came, but this model has no VAE (config.vae_config is None): pass latents")
        return encode_pixels(self.vae, pixel_values)

    def _noisy_images(
        self, latents, pixel_values, image_sizes, timesteps, noise, clean_images, image_first, generator
    ) -> NoisyImages | None:
        """Encode, check, draw what was not given, add the noise."""
        if latents is not None and pixel_values is not None:
            raise ValueError("pass either latents or pixel_values, not both")
        if pixel_values is not None:
            latents = self.encode_images(pixel_values)
            if image_sizes is not None:
                scale = self.config.vae_downsampling
                image_sizes = [(int(height) // scale, int(width) // scale) for height, width in image_sizes]
        if latents is None:
            return None
        if latents.dim() != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; it must be (N, latent_channels={self.config.latent_channels}, "
                "h, w)"
            )
        count, device = len(latents), latents.device
        sizes = [tuple(latents.shape[2:])] * count
        if image_sizes is not None:
            sizes = [(int(height), int(width)) for height, width in image_sizes]
        if len(sizes) != count or any(h > latents.shape[2] or w > latents.shape[3] for h, w in sizes):
            raise ValueError(
                f"image_sizes={sizes} must give the height and width of each of {count} images, within "
                f"{tuple(latents.shape[2:])} latents"
            )
        for name, value, shape in (
            ("timesteps", timesteps, (count,)),
            ("noise", noise, latents.shape),
            ("clean_images", clean_images, (count,)),
            ("image_first", image_first, (count,)),
        ):
            if value is not None and tuple(value.shape) != tuple(shape):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, but latents needs {tuple(shape)}")
        latents = latents.float()
        if clean_images is None:
            clean_images = torch.zeros(count, dtype=torch.bool, device=device)
        drawing = {"generator": generator, "device": generator.device if generator is not None else device}
        if timesteps is None:
            timesteps = draw_timesteps(self.config, image_first, **drawing).to(device)
        if noise is None:
            noise = torch.randn(latents.shape, **drawing).to(device)
        noised = self.noise_schedule.noised(latents, noise, timesteps)
        of_clean = clean_images.view(-1, 1, 1, 1)
        return NoisyImages(
            torch.where(of_clean, latents, noised),
            self.noise_schedule.target(latents, noise, timesteps),
            torch.where(clean_images, torch.zeros_like(timesteps), timesteps),
            clean_images,
            sizes,
        )

    def patchifier_tokens(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, tuple | None]:
        """Images of one size to what the transformer sees of them.  (N, C, h, w), (N,) -> (N, n, D) and features"""
        latents = latents.to(self.patchifier.proj_in.weight.dtype)
        tokens, features = self.patchifier.embed(latents, timesteps)
        if self.config.latent_position_table is not None:
            rows, columns = (side // self.config.patch_size for side in latents.shape[2:])
            tokens = tokens + position_table(rows, columns, tokens.shape[-1], tokens.device).to(tokens.dtype)
        return tokens, features

    def embed_latents(self, images: NoisyImages) -> tuple[torch.Tensor, list]:
        """All patches in order of appearance (P, D), and what `predict_latents` needs of the way in."""
        tokens, features, order = [], [], []
        starts = [0]
        for height, width in images.sizes:
            starts.append(starts[-1] + self.config.image_length(height, width))
        for (height, width), members in (images.by_size() or {self._empty_size(): []}).items():
            part, timesteps = images.latents, images.timesteps
            if len(members) != len(images.sizes) or not members:
                part, timesteps = part[members], timesteps[members]
            embedded, kept = self.patchifier_tokens(part[:, :, :height, :width], timesteps)
            tokens.append(embedded.flatten(0, 1))
            features.append((members, (height, width), kept))
            order.extend(place for index in members for place in range(starts[index], starts[index + 1]))
        tokens = torch.cat(tokens)
        if len(features) > 1:
            inverse = torch.empty(len(order), dtype=torch.long)
            inverse[torch.tensor(order)] = torch.arange(len(order))
            tokens = tokens[inverse.to(tokens.device)]
        return tokens, features

    def predict_latents(self, hidden_states: torch.Tensor, features: list, shape: torch.Size) -> torch.Tensor:
        """The patches' hidden states (P, D) -> the prediction (N, C, h, w) in float32, zero in the padding."""
        if len(features) == 1:
            members, (height, width), kept = features[0]
            length = self.config.image_length(height, width)
            patches = hidden_states.view(len(members), length, hidden_states.shape[-1])
            return self.patchifier.predict(patches, kept, height, width).float()
        lengths = {size: self.config.image_length(*size) for _, size, _ in features}
        size_of = {index: size for members, size, _ in features for index in members}
        pieces = hidden_states.split([lengths[size_of[index]] for index in range(shape[0])])
        prediction = hidden_states.new_zeros(shape, dtype=torch.float32)
        for members, (height, width), kept in features:
            part = self.patchifier.predict(torch.stack([pieces[index] for index in members]), kept, height, width)
            prediction[members, :, :height, :width] = part.float()
        return prediction

    def _empty_size(self):
        return self.config.patch_size, self.config.patch_size

    # ----------------------------------------------------------------------------------------------- the forward

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        modality_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        latents: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | list | None = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.FloatTensor | None = None,
        clean_images: torch.BoolTensor | None = None,
        image_first: torch.BoolTensor | None = None,
        labels: torch.LongTensor | None = None,
        routing: ModalityRouting | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> MoTTransfusionOutput:
        """Predict the next tokens of text, and of each image the noise that is in it.

        Args:
            input_ids: (B, L) with an `image_token_id` for each patch of an image, between BOI and EOI.
            modality_ids: (B, L) indices into `config.modalities`; derived from `input_ids` when absent.
            attention_mask: (B, past + L) 1 for tokens, 0 for padding.
            position_ids, document_ids, routing, logits_to_keep: as in `MoTForCausalLM`.
            past_key_values: a cache; images that come with a filled one are `generate()`'s affair.
            latents: (N, C, h, w) clean and scaled, images in order of appearance over the flattened rows.
            pixel_values: (N, 3, H, W) in [-1, 1], instead of `latents`; the VAE encodes them.
            image_sizes: (N, 2) height and width of each image in the unit of the tensor that holds them, which is padded
                at the bottom and the right; needed when sizes differ.
            timesteps: (N,) noise levels, 0 <= t < num_train_timesteps (flow: floats, up to num_train_timesteps); drawn
                when absent.
            noise: of the latents' shape; drawn when absent.
            clean_images: (N,) bool, images that are context: they get no noise, t = 0, and have no loss.
            image_first: (N,) bool, images that no text of their document precedes, whose drawn timesteps keep to
                `image_first_max_timestep`; found from `input_ids` when absent.
            labels: (B, L) token ids, shifted inside by one; -100, placeholders and EOI are no targets.
            generator: of the timesteps and the noise that are drawn.
            num_items_in_batch: divide the token loss by this instead of by the number of token targets here.

        Returns:
            `MoTTransfusionOutput`.

        Raises:
            ValueError: images without placeholders or the reverse, sizes that `patch_size` does not divide, timesteps
                out of range; the message names field, value and way out.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        config, planned = self.config, routing is not None
        if input_ids is None:
            raise ValueError("input_ids is needed: a Transfusion model finds its images by their placeholders")
        is_patch = input_ids == config.image_token_id
        if latents is not None or pixel_values is not None:
            if image_first is None and timesteps is None:
                image_first = self._images_first(input_ids, is_patch, document_ids, attention_mask)
        if timesteps is not None and not planned:
            self._check_timesteps(timesteps)
        images = self._noisy_images(
            latents, pixel_values, image_sizes, timesteps, noise, clean_images, image_first, generator
        )
        if images is not None and past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError("images came with a filled past_key_values; pass them with the prompt, or use generate()")
        blocks = find_image_blocks(is_patch, document_ids, config.markers_in_image_block)
        if not planned:
            self._check_placeholders(is_patch, blocks, images)

        inputs_embeds = self.model._embed(input_ids)
        if images is None:
            # The patchifier and its tower run on no image at all, so that their gradients are zero and not missing.
            images = self._no_images(inputs_embeds)
        tokens, features = self.embed_latents(images)
        places = torch.argsort(~is_patch.flatten(), stable=True)[: len(tokens)]  # no wait for the device
        flat = inputs_embeds.flatten(0, 1).index_copy(0, places, tokens.to(inputs_embeds.dtype))

        if modality_ids is None and not planned:
            modality_ids = self.model.modality_ids_of(input_ids)
        if position_ids is None and config.image_positions == "shared":
            position_ids = image_positions(blocks, document_ids, attention_mask)
        outputs = self.model(
            inputs_embeds=flat.view_as(inputs_embeds),
            modality_ids=modality_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            past_key_values=past_key_values,
            routing=routing,
            image_blocks=self._image_blocks(blocks, is_patch, images),
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        prediction = self.predict_latents(hidden_states.flatten(0, 1)[places], features, images.latents.shape)
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        losses = {}
        if labels is not None:
            if modality_ids is None:
                modality_ids = self.model.modality_ids_of(input_ids)
            losses = self._losses(logits, labels, modality_ids, prediction, images, num_items_in_batch)
        return MoTTransfusionOutput(
            logits=logits,
            prediction=prediction,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **losses,
        )

    def _no_images(self, like):
        latents = like.new_zeros(0, self.config.latent_channels, *self._empty_size(), dtype=torch.float32)
        nothing = like.new_zeros(0, dtype=torch.long)
        return NoisyImages(latents, latents, nothing, nothing.bool(), [])

    def _image_blocks(self, blocks, is_patch, images: NoisyImages) -> ImageBlocks | None:
        if not images.sizes:
            return None
        if self.config.noised_images_visible:
            return ImageBlocks(blocks)
        # Images are numbered over all rows here, as in `clean`.
        first = torch.zeros_like(blocks[:, 0])
        first[1:] = (blocks.amax(dim=1) + 1).cumsum(0)[:-1]
        number = (blocks + first[:, None]).clamp(min=0, max=len(images.clean) - 1)
        return ImageBlocks(blocks, (blocks >= 0) & ~images.clean[number])

    def _images_first(self, input_ids, is_patch, document_ids, attention_mask):
        """(N,) whether no text precedes each image in its document."""
        config = self.config
        special = (config.bos_token_id, config.pad_token_id, config.boi_token_id)
        is_text = ~is_patch
        for token in special:
            if isinstance(token, int):
                is_text &= input_ids != token
        if attention_mask is not None:
            is_text &= attention_mask[:, -input_ids.shape[1] :].bool()
        counted = is_text.long().cumsum(dim=1)
        if document_ids is not None:
            starts = torch.ones_like(is_text)
            starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
            counted = counted - torch.where(starts, counted - is_text.long(), 0).cummax(dim=1).values
        blocks = find_image_blocks(is_patch, document_ids, with_markers=False)
        begins = is_patch.clone()
        begins[:, 1:] &= blocks[:, 1:] != blocks[:, :-1]
        return counted[begins] == 0

    def _check_timesteps(self, timesteps) -> None:
        limit = self.config.num_train_timesteps + (self.config.prediction_type == "flow")
        if len(timesteps) and not 0 <= timesteps.min() <= timesteps.max() < limit:
            raise ValueError(
                f"timesteps run from {timesteps.min().item()} to {timesteps.max().item()}; they must be at least 0 and "
                f"less than {limit} (num_train_timesteps={self.config.num_train_timesteps}); a clean image is marked by "
                "clean_images"
            )

    def _check_placeholders(self, is_patch, blocks, images: NoisyImages | None) -> None:
        found, given = int(is_patch.sum()), 0
        if images is not None:
            given = sum(self.config.image_length(height, width) for height, width in images.sizes)
        if found == given == 0:
            return
        if images is None:
            raise ValueError(
                f"input_ids holds {found} placeholders (image_token_id={self.config.image_token_id}) but neither latents "
                "nor pixel_values came"
            )
        if found != given:
            raise ValueError(
                f"latents (or pixel_values) make {given} patches of {len(images.sizes)} images, but input_ids holds "
                f"{found} placeholders (image_token_id={self.config.image_token_id}); was the processor built for "
                f"patches of {self.config.patch_size * self.config.vae_downsampling} pixels?"
            )
        runs = int((blocks.amax(dim=1) + 1).sum())
        if runs != len(images.sizes):
            raise ValueError(
                f"{len(images.sizes)} images came, but the placeholders in input_ids stand in {runs} places; put each "
                "image between boi_token_id and eoi_token_id"
            )

    def _losses(self, logits, labels, modality_ids, prediction, images: NoisyImages, num_items_in_batch) -> dict:
        config = self.config
        ours = (labels == config.image_token_id) | (labels == config.eoi_token_id)  # the sampler's, not the model's
        labels = labels.masked_fill(ours, -100)
        targets, modality_ids = (F.pad(ids[:, 1:], (0, 1), value=-100) for ids in (labels, modality_ids))
        losses = token_losses(config, logits, targets, modality_ids, num_items_in_batch)
        squared = (prediction - images.target.float()).square()
        counted = (~images.clean).view(-1, 1, 1, 1).expand_as(squared)
        if len(set(images.sizes)) > 1:
            counted = counted & _inside(images.latents, images.sizes)
        error, count = torch.where(counted, squared, 0.0).sum(), counted.sum()
        losses["loss_sums"]["image_diffusion"], losses["loss_counts"]["image_diffusion"] = error, count
        losses["loss"] = losses["loss"] + config.diffusion_loss_weight * error / count.clamp(min=1)
        return losses


def _inside(latents: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """(N, 1, h, w) bool, false in the padding of images that are smaller than the tensor."""
    heights, widths = (torch.tensor(sides, device=latents.device) for sides in zip(*sizes))
    rows = torch.arange(latents.shape[2], device=latents.device)[None] < heights[:, None]
    columns = torch.arange(latents.shape[3], device=latents.device)[None] < widths[:, None]
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


MoTTransfusionModel.register_for_auto_class("AutoModel")

__all__ = ["MoTTransfusionModel", "MoTTransfusionOutput"]
