"""Transfusion with a Mixture-of-Transformers: text by next token, images by diffusion (paper, section 3.4, appendix A).

Text and images stand in one sequence and pass through one transformer, modeling_mot.py. A text token is an entry of the
vocabulary; an image is a block of patches of noisy VAE latents, whose tokens see each other in both directions. The
model predicts the next token of text and the noise in every image, and is trained on both at once (equation 4):

    loss = cross-entropy of text + diffusion_loss_weight * squared error of the predicted noise

Read `MoTTransfusionModel.forward` first: its steps are the images (latent_images.py), one row of embeddings, the
transformer and the losses. Then the patchifiers, between latents and hidden states. `generate()` is in
generation_mot_transfusion.py, and the images' attention in attention_masks.py. A model may also look at pictures
through encoders (encoder_pictures.py), as BAGEL does; one and the same picture may then stand in a row as noisy
latents, as clean latents and as features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from .attention_masks import ImageBlocks, documents_of, image_positions
from .checks_arguments import CACHE, check_forward, check_ids, check_tokens, own_modalities
from .configuration_mot_transfusion import MoTTransfusionConfig
from .encoder_pictures import EncodedPicturesMixin, PictureEncoder
from .generation_mot_transfusion import MoTTransfusionGenerationMixin
from .latent_grid import grid_positions
from .latent_images import (
    ImageInputs,
    ImagePlaces,
    LatentImagesMixin,
    NoiseSchedule,
    NoisyImages,
    PositionTable,
    cumulative_alphas,
    cut_into_patches,
    join_patches,
)
from .latent_vae import build_vae, vae_config_of
from .modeling_mot import MoTCausalLMOutputWithPast, MoTModel, MoTPreTrainedModel, logits_and_losses, targets_of
from .tower_routing import ModalityRouting, without_cast


# B batch, L row length, D hidden size, V vocabulary, N images in order of appearance over the flattened rows,
# C latent channels, (h, w) latents, p patch size, n = h * w / p^2 tokens of an image, P patches of all images,
# E timestep embedding


# ----------------------------------------------------------------------------------------------------------- the model


@dataclass
class MoTTransfusionOutput(MoTCausalLMOutputWithPast):
    """The output of a Transfusion model.

    Attributes:
        loss: mean over token targets + `diffusion_loss_weight` * mean over the elements of noised latents (equation 4).
        loss_sums, loss_counts: for each modality of tokens, in nats and targets; and for "image_diffusion", in squared
            errors and elements, over the latents of images that have noise.
        prediction: (N, C, h, w) the predicted noise (or other target, as `prediction_type` says); zero in the padding.
    """

    prediction: torch.Tensor | None = None


class MoTTransfusionModel(LatentImagesMixin, EncodedPicturesMixin, MoTPreTrainedModel, MoTTransfusionGenerationMixin):
    """One transformer that predicts text and denoises images.

    Args:
        config: a `MoTTransfusionConfig`.
        vae: a trained diffusers autoencoder to hold; by default an untrained one of `config.vae_config`, whose weights
            come with the checkpoint, or none. It is frozen and stays in float32.

    Examples:

        >>> import torch
        >>> from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel
        >>> config = MoTTransfusionConfig(
        ...     vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, boi_token_id=60,
        ...     eoi_token_id=61, image_token_id=62, patchifier="linear", latent_channels=4, latent_size=[4, 4])
        >>> model = MoTTransfusionModel(config)

        A training step on text and an image of 4 x 4 latents, which are four patches of 2 x 2.

        >>> input_ids = torch.tensor([[5, 9, 60, 62, 62, 62, 62, 61, 7]])
        >>> output = model(input_ids, labels=input_ids, latents=torch.randn(1, 4, 4, 4))
        >>> output.loss.backward()
        >>> output.prediction.shape
        torch.Size([1, 4, 4, 4])
        >>> {part: int(count) for part, count in output.loss_counts.items()}
        {'text': 3, 'image_diffusion': 64}
    """

    config_class = MoTTransfusionConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _keep_in_fp32_modules = ["vae"]  # for float16 and quantizers; `_get_dtype_plan` adds other precisions
    _supports_flash_attn = False  # its kernels cannot let an image see itself in both directions
    _no_split_modules = ["MoTDecoderLayer", "PictureEncoderLayer", "AutoencoderKL", "AutoencoderTiny"]
    main_input_name = "input_ids"

    def __init__(self, config: MoTTransfusionConfig, vae: nn.Module | None = None):
        if vae is not None:
            config.vae_config = vae_config_of(vae)
            config.validate_architecture()
        super().__init__(config)
        self.model = MoTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.patchifier = build_patchifier(config)
        self.noise_schedule = NoiseSchedule(config)
        self.encoders = nn.ModuleDict({name: PictureEncoder(config, name) for name in config.encoders or ()})
        tables = {"image": config.latent_position_table_size} | {
            name: fields["position_table_size"] for name, fields in (config.continuous_modalities or {}).items()
        }
        self.position_tables = nn.ModuleDict(
            {name: PositionTable(*size, config.hidden_size) for name, size in tables.items() if size is not None}
        )
        self.vae = vae
        if vae is None and config.vae_config is not None:
            self.vae = build_vae(config.vae_config)
        # Weights that post_init must leave alone.
        for own in (self.patchifier, self.vae):
            for module in own.modules() if own is not None else ():
                module.keeps_own_initialization = True  # diffusers' own; the transformer's would be far too small
        for tensor in vae.state_dict(keep_vars=True).values() if vae is not None else ():
            tensor._is_hf_initialized = True
        self._freeze()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        modality_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        latents: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | list | None = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.FloatTensor | None = None,
        clean_images: torch.BoolTensor | None = None,
        image_first: torch.BoolTensor | None = None,
        encoder_pixel_values: torch.FloatTensor | None = None,
        encoder_image_sizes: torch.LongTensor | list | None = None,
        frames_per_second: float | list[float] | None = None,
        routing: ModalityRouting | None = None,
        skip_logits: bool = False,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> MoTTransfusionOutput:
        """Predict the next token of text at every position, and the noise in every image.

        Args:
            input_ids: (B, L) with an `image_token_id` for each patch of an image, between BOI and EOI.
            attention_mask: (B, past + L) 1 for tokens, 0 for padding.
            past_key_values: a cache. Images may not come with a filled cache; `generate()` draws images behind one.
            inputs_embeds: (B, L, D), instead of the embeddings of `input_ids`, which must come along.
            labels: (B, L) token ids, shifted inside by one; -100, placeholders and EOI are no targets.
            modality_ids: (B, L) indices into `config.modalities`; derived from `input_ids` when absent.
            position_ids, use_cache, logits_to_keep, document_ids, routing, skip_logits: as in `MoTForCausalLM`.
            latents: (N, C, h, w) clean and scaled, images in order of appearance over the flattened rows.
            pixel_values: (N, 3, H, W) in [-1, 1], instead of `latents`; the VAE encodes them.
            image_sizes: (N, 2) height and width of each image, in pixels beside `pixel_values`, else in latents. Needed
                when sizes differ; images are padded at the bottom and the right. A tensor on a device is waited for, a
                list not.
            timesteps: (N,) noise levels, 0 <= t < num_train_timesteps (flow: floats, up to num_train_timesteps); drawn
                when absent.
            noise: (N, C, h, w); drawn when absent.
            clean_images: (N,) bool, images that are context: they get no noise, t = 0, and have no loss.
            image_first: (N,) bool, images with text of their document after and none before them, whose drawn timesteps
                keep to `image_first_max_timestep`; found from `input_ids` when absent.
            encoder_pixel_values: (M, C, H, W) pictures for encoders, in [-1, 1], in order of appearance: the
                placeholders say which modality of `config.continuous_modalities` each is of.
            encoder_image_sizes: (M, 2) height and width of each of them in pixels, as `image_sizes`.
            frames_per_second: rate of videos, of all or of each run of placeholders, with `image_positions="grid"`.
                The frames of a video are images that follow each other in one run. Default: the base rate.
            generator: draws the timesteps and the noise that are absent.
            num_items_in_batch: divide the token loss by this instead of by the number of token targets here.
            shift_labels: (B, L) targets aligned with the logits already, instead of `labels`.

        Returns:
            `MoTTransfusionOutput`.

        Raises:
            ValueError: images without placeholders or the reverse, sizes that `patch_size` does not divide, timesteps
                out of range; the message names field, value and way out.
            TypeError: an unknown keyword.
        """
        if input_ids is None:
            raise ValueError(
                "input_ids is needed: a Transfusion model finds its images by their placeholders; inputs_embeds may "
                "come beside it, but prompt tuning and other virtual tokens go with a MoTForCausalLM only"
            )
        check_forward(self, kwargs, input_ids, None, attention_mask, position_ids, past_key_values, document_ids)
        own_ids = own_modalities(self.config, modality_ids, input_ids.shape[1], past_key_values)
        if own_ids is not None:
            check_ids("modality_ids", own_ids, input_ids.shape)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        shift_labels = kwargs.pop("shift_labels", None)
        planned = routing is not None
        is_filled = past_key_values is not None and past_key_values.get_seq_length() > 0

        # 1. The images: where they stand, their latents, and their noise.
        has_steps = position_ids is not None and position_ids.dim() == 2  # positions of three axes are no steps
        if document_ids is None and attention_mask is None and past_key_values is None and has_steps:
            document_ids = documents_of(position_ids.expand_as(input_ids))
        places = ImagePlaces.find(self.config, input_ids, document_ids, attention_mask)
        given = ImageInputs(latents, pixel_values, image_sizes, timesteps, noise, clean_images, image_first, generator)
        images = self._images_of(given, places, planned, is_filled)
        encoded = []
        if self.encoders or encoder_pixel_values is not None:
            encoded = self.encode_pictures(encoder_pixel_values, encoder_image_sizes, places, planned, is_filled)

        # 2. One row of embeddings: tokens of text, and the patches of images in the places of their placeholders.
        embeds, patches, features = self._embed(input_ids, inputs_embeds, places, images, encoded)

        # Positions, modalities and targets of that row.
        if position_ids is None and self.config.image_positions == "shared":
            position_ids = self._shared_positions(places, images, is_filled)
        elif position_ids is None and self.config.image_positions == "grid" and images.sizes:
            position_ids = grid_positions(self.config, places, images.sizes, images.frames, frames_per_second)
        if modality_ids is None and (labels is not None or not planned):
            modality_ids = own_ids = self.model.modality_ids_of(input_ids)
        targets = self._targets(input_ids.shape, labels, shift_labels, own_ids)

        # 3. The transformer.
        outputs = self.model(
            inputs_embeds=embeds,
            modality_ids=modality_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            routing=routing,
            image_blocks=self._image_blocks(places, images, has_pictures=encoder_pixel_values is not None),
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state

        # 4. The losses: of the next tokens, and of the predicted noise (equation 4).
        prediction = self.predict_latents(hidden_states.flatten(0, 1).index_select(0, patches), features, images)
        logits, losses = logits_and_losses(
            self, hidden_states, targets, num_items_in_batch, logits_to_keep, skip_logits
        )
        if losses:
            self._add_diffusion_loss(losses, prediction, images)
        return MoTTransfusionOutput(
            logits=logits,
            prediction=prediction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
            **losses,
        )

    def _embed(self, input_ids, inputs_embeds, places: ImagePlaces, images: NoisyImages, encoded: list) -> tuple:
        """Put the patches of images, and what encoders made of pictures, in the places of their placeholders.

        Args:
            encoded: of `encode_pictures`.

        Returns:
            (B, L, D); the indices (P,) of the patches in the flattened rows; and the features for `predict_latents`.
        """
        if inputs_embeds is None:
            # An id behind the vocabulary has no row.
            has_rows = not self.config.num_placeholder_tokens
            inputs_embeds = self.model.embed(input_ids if has_rows else input_ids.masked_fill(places.kinds != 0, 0))
        elif check_tokens(self.config, None, inputs_embeds) != input_ids.shape:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, but input_ids and hidden_size make it "
                f"{(*input_ids.shape, self.config.widest_hidden_size)}"
            )
        tokens, features = self.embed_latents(images)
        embeds, patches = inputs_embeds.flatten(0, 1), _places_of(places.is_patch, len(tokens))
        embeds = embeds.index_copy(0, patches, tokens.to(embeds))
        for is_patch, tokens in encoded:
            tokens = self.model.widen(tokens.to(embeds))
            embeds = embeds.index_copy(0, _places_of(is_patch, len(tokens)), tokens)
        return embeds.view_as(inputs_embeds), patches, features

    def _shared_positions(self, places: ImagePlaces, images: NoisyImages, is_filled: bool) -> torch.Tensor:
        """Positions at which the patches of an image share one.  -> (B, L)"""
        if is_filled:
            raise ValueError(
                "position_ids are needed beside a filled past_key_values: with image_positions='shared' they do not "
                "follow from its length"
            )
        stays = places.noised(images.clean) if images.sizes and not self.config.noised_images_advance else None
        return image_positions(places.blocks, places.document_ids, places.attention_mask, stays)

    def _targets(self, shape, labels, shift_labels, modality_ids) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Make the targets of text, and their modalities.  -> (B, L) twice, or None twice without labels

        Placeholders and EOI are no targets: the sampler writes them.
        """
        if self.config.num_placeholder_tokens:
            labels, shift_labels = self._with_rows(labels), self._with_rows(shift_labels)
        targets, of_targets = targets_of(self, shape, labels, shift_labels, modality_ids)
        for token in self.config.written_token_ids if targets is not None else ():
            targets = targets.masked_fill(targets == token, -100)
        return targets, of_targets

    def _with_rows(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        """Make placeholders without a row in the vocabulary no targets; what is no tensor is refused later."""
        if not isinstance(labels, torch.Tensor):
            return labels
        end = self.config.vocab_size
        for token in self.config.placeholder_token_ids.values():
            labels = labels.masked_fill(labels == token, -100) if token >= end else labels
        return labels

    def _image_blocks(self, places: ImagePlaces, images: NoisyImages, has_pictures: bool) -> ImageBlocks | None:
        """Mark the images, and hide noised images from later tokens if `noised_images_visible` is False."""
        if not images.sizes and not has_pictures:
            return None
        if self.config.noised_images_visible or not images.sizes:
            return ImageBlocks(places.blocks)
        return ImageBlocks(places.blocks, places.noised(images.clean))

    def _add_diffusion_loss(self, losses: dict, prediction: torch.Tensor, images: NoisyImages) -> None:
        """Add the squared error of the prediction to the losses of tokens (equation 4)."""
        # Clean images and padding do not count.
        squared = (prediction - images.target).square()
        if (weights := self.noise_schedule.loss_weights(images.timesteps)) is not None:
            squared = squared * weights
        counted = (~images.clean).view(-1, 1, 1, 1).expand_as(squared)
        if any(size != tuple(squared.shape[2:]) for size in images.sizes):
            counted = counted & images.inside()
        error, count = torch.where(counted, squared, 0.0).sum(), counted.sum()
        losses["loss_sums"]["image_diffusion"], losses["loss_counts"]["image_diffusion"] = error, count
        losses["loss"] = losses["loss"] + self.config.diffusion_loss_weight * error / count.clamp(min=1)

    # --------------------------------------------------------------------------------- the VAE stays frozen, in float32

    def _freeze(self):
        if self.vae is not None:
            self.vae.float().requires_grad_(False).eval()
        for encoder in self.encoders.values():
            encoder.freeze()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    def train(self, mode: bool = True):
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    def _apply(self, fn, recurse=True):
        """Move everything, but cast no VAE: in half precision it would spoil the pictures."""
        vae, self.vae = self.vae, None
        super()._apply(fn, recurse)
        self.vae = vae
        if vae is not None:
            vae._apply(without_cast(fn), recurse)
        return self

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        return super()._get_dtype_plan(dtype) | {"vae": torch.float32}

    def _init_weights(self, module):
        if isinstance(module, NoiseSchedule):
            init.copy_(module.alphas_cumprod, cumulative_alphas(self.config))
        elif isinstance(module, PositionTable):
            init.copy_(module.weight, module.values())
        elif getattr(module, "keeps_own_initialization", False):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        else:
            super()._init_weights(module)


# ---------------------------------------------------------------------------------------------------- the patchifiers


class TimestepEncoder(nn.Module):
    """Embed noise levels by sinusoids, then two linear layers.  (N,) -> (N, E)

    The sinusoids take indices up to `num_train_timesteps`, or with `timestep_format="fraction"` shares of it; with
    `timestep_direction="clean"` they take what is missing to that.

    Args:
        config: a `MoTTransfusionConfig`.
        width: E.
        frequencies: the number of sinusoids.
    """

    def __init__(self, config, width: int, frequencies: int = 256):
        super().__init__()
        self.scale = 1.0 if config.timestep_format == "index" else 1.0 / config.num_train_timesteps
        self.levels = config.num_train_timesteps
        self.is_turned = config.timestep_direction == "clean"
        self.sinusoids = Timesteps(frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(frequencies, width)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        timesteps = self.levels - timesteps.float() if self.is_turned else timesteps.float()
        sinusoids = self.sinusoids(timesteps * self.scale)
        return self.mlp(sinusoids.to(self.mlp.linear_1.bias.dtype))  # a quantised weight is of another type


class LinearPatchifier(nn.Module):
    """A linear layer from each patch to a token, with the timestep embedding added on the way; a linear layer back."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.addition = config.timestep_addition
        values = config.patch_size**2 * config.latent_channels
        if self.addition is not None:
            self.time_encoder = TimestepEncoder(config, values if self.addition == "patch" else config.hidden_size)
        self.proj_in = nn.Linear(values, config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, values)

    def embed(
        self, latents: torch.Tensor, timesteps: torch.Tensor, clean: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """Embed noised latents: (N, C, h, w), (N,) -> (N, n, D), and None: the way back needs nothing

        Args:
            clean: (N,) bool, images whose tokens are not told the time, with `timestep_addition="noised_token"`.
        """
        patches = cut_into_patches(latents, self.patch_size)
        if self.addition is None:
            return self.proj_in(patches), None
        time = self.time_encoder(timesteps).unsqueeze(1)
        if self.addition == "patch":
            return self.proj_in(patches + time), None
        if clean is not None:
            time = time.masked_fill(clean.view(-1, 1, 1), 0)
        return self.proj_in(patches) + time, None

    def predict(self, hidden_states: torch.Tensor, features: None, height: int, width: int) -> torch.Tensor:
        """Predict latents: (N, n, D) -> (N, C, h, w)"""
        return join_patches(self.proj_out(hidden_states), self.patch_size, height, width)


class UNetPatchifier(nn.Module):
    """A U-Net whose middle is the transformer: down blocks before it, up blocks after it, skips between (appendix A.2).

    The blocks are diffusers' residual blocks with a timestep embedding. The last feature map of the down blocks becomes
    the tokens; like all other feature maps it also reaches the up blocks by a skip.
    """

    def __init__(self, config):
        super().__init__()
        channels = list(config.unet_channels)
        layers = config.unet_layers
        groups = config.unet_norm_groups
        width = 4 * channels[0]
        last = len(channels) - 1
        shared = {"temb_channels": width, "resnet_groups": groups, "resnet_eps": 1e-6}
        self.time_encoder = TimestepEncoder(config, width, frequencies=channels[0])

        # Down to the tokens.
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock2D(inputs, outputs, num_layers=layers, add_downsample=depth < last, **shared)
            for depth, (inputs, outputs) in enumerate(zip([channels[0], *channels], channels))
        )
        self.norm_in = nn.GroupNorm(groups, channels[-1])
        self.proj_in = nn.Linear(channels[-1], config.hidden_size)

        # And up again; each block takes the features from below and the skips of its own depth.
        self.proj_out = nn.Linear(config.hidden_size, channels[-1])
        self.up_blocks = nn.ModuleList(
            UpBlock2D(
                in_channels=channels[max(depth - 1, 0)],
                prev_output_channel=channels[min(depth + 1, last)],
                out_channels=channels[depth],
                num_layers=layers + 1,
                add_upsample=depth > 0,
                **shared,
            )
            for depth in reversed(range(len(channels)))
        )
        self.norm_out = nn.GroupNorm(groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.latent_channels, 3, padding=1)

    def embed(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """Embed noised latents: (N, C, h, w), (N,) -> (N, n, D), and the features that `predict` needs"""
        time = self.time_encoder(timesteps)
        features = self.conv_in(latents)
        skips = [features]
        for block in self.down_blocks:
            features, outputs = block(features, time)
            skips.extend(outputs)
        tokens = F.silu(self.norm_in(features)).flatten(2).transpose(1, 2)
        return self.proj_in(tokens), (tuple(skips), time)

    def predict(self, hidden_states: torch.Tensor, features: tuple, height: int, width: int) -> torch.Tensor:
        """Predict latents: (N, n, D) -> (N, C, h, w)"""
        skips, time = features
        tokens = self.proj_out(hidden_states).transpose(1, 2)
        features = tokens.unflatten(2, skips[-1].shape[2:]).contiguous()
        for block in self.up_blocks:
            count = len(block.resnets)
            features = block(features, skips[-count:], time)
            skips = skips[:-count]
        return self.conv_out(F.silu(self.norm_out(features)))


def _places_of(is_patch: torch.Tensor, count: int) -> torch.Tensor:
    """Find the `count` marked tokens of rows, without a wait for the device.  (B, L) bool -> (count,) flattened"""
    return torch.argsort(~is_patch.flatten(), stable=True)[:count]


def build_patchifier(config) -> nn.Module:
    """Build the patchifier that `config.patchifier` names, as wide as the tower of images."""
    tower = config.tower_config(config.towers["image"])
    return {"unet": UNetPatchifier, "linear": LinearPatchifier}[config.patchifier](tower)


MoTTransfusionModel.register_for_auto_class("AutoModel")

__all__ = ["MoTTransfusionModel", "MoTTransfusionOutput"]
