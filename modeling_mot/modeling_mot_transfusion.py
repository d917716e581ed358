"""Transfusion with a Mixture-of-Transformers: text by next token, images by diffusion, in one sequence (paper, section
3.4 and appendix A).
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

from .attention_masks import ImageBlocks, documents_of, find_image_blocks, image_positions
from .checks_arguments import check_ids, check_keywords, check_rows, check_tensor, check_tokens
from .configuration_mot_transfusion import MoTTransfusionConfig
from .generation_mot_transfusion import MoTTransfusionGenerationMixin
from .latent_images import (
    LatentImagesMixin,
    NoiseSchedule,
    NoisyImages,
    check_placeholders,
    cumulative_alphas,
    images_first,
    sizes_of,
)
from .latent_vae import build_vae, vae_config_of
from .modeling_mot import MoTCausalLMOutputWithPast, MoTModel, MoTPreTrainedModel, logits_and_losses, targets_of
from .tower_routing import ModalityRouting, without_cast


# N images, C latent channels, (h, w) latents, p patch size, n = h * w / p^2 tokens, D hidden size, E timestep embedding


class TimestepEncoder(nn.Module):
    """Sinusoids of the noise level, then two linear layers.  (N,) -> (N, E)

    `frequencies` is the number of sinusoids. They see indices up to `num_train_timesteps`, or with
    `timestep_format="fraction"` shares of it.
    """

    def __init__(self, config, width: int, frequencies: int = 256):
        super().__init__()
        self.scale = 1.0 if config.timestep_format == "index" else 1.0 / config.num_train_timesteps
        self.sinusoids = Timesteps(frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(frequencies, width)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        sinusoids = self.sinusoids(timesteps.float() * self.scale)
        return self.mlp(sinusoids.to(self.mlp.linear_1.bias.dtype))  # a quantised weight is of another type


def cut_into_patches(latents: torch.Tensor, size: int) -> torch.Tensor:
    """(N, C, h, w) -> (N, n, p * p * C), each patch in (row, column, channel) order"""
    patches = latents.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (N, C, h/p, p, w/p, p)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def join_patches(patches: torch.Tensor, size: int, height: int, width: int) -> torch.Tensor:
    """(N, n, p * p * C) -> (N, C, h, w)"""
    grid = patches.unflatten(2, (size, size, -1)).unflatten(1, (height // size, width // size))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class LinearPatchifier(nn.Module):
    """Patches as vectors: the timestep embedding is added, then a linear layer; a linear layer back."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        values = config.patch_size**2 * config.latent_channels
        self.time_encoder = TimestepEncoder(config, values)
        self.proj_in = nn.Linear(values, config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, values)

    def embed(self, latents: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(N, C, h, w), (N,) -> (N, n, D) and nothing for the way back"""
        patches = cut_into_patches(latents, self.patch_size)
        return self.proj_in(patches + self.time_encoder(timesteps).unsqueeze(1)), None

    def predict(self, hidden_states: torch.Tensor, features: None, height: int, width: int) -> torch.Tensor:
        """(N, n, D) -> (N, C, h, w)"""
        return join_patches(self.proj_out(hidden_states), self.patch_size, height, width)


class UNetPatchifier(nn.Module):
    """A U-Net whose middle is the transformer: down blocks before it, up blocks after it, skips between the two.

    Plain residual blocks of diffusers with a timestep embedding. The last feature map of the way down becomes the
    tokens; on the way up it stands beside what the transformer made of them, as all others do.
    """

    def __init__(self, config):
        super().__init__()
        channels, layers = list(config.unet_channels), config.unet_layers
        last = len(channels) - 1
        width, groups = 4 * channels[0], config.unet_norm_groups
        shared = {"temb_channels": width, "resnet_groups": groups, "resnet_eps": 1e-6}
        self.time_encoder = TimestepEncoder(config, width, frequencies=channels[0])
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock2D(inputs, outputs, num_layers=layers, add_downsample=depth < last, **shared)
            for depth, (inputs, outputs) in enumerate(zip([channels[0], *channels], channels))
        )
        self.norm_in = nn.GroupNorm(groups, channels[-1])
        self.proj_in = nn.Linear(channels[-1], config.hidden_size)
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
        """(N, C, h, w), (N,) -> (N, n, D), and the features that `predict` takes up again"""
        time = self.time_encoder(timesteps)
        features = self.conv_in(latents)
        skips = [features]
        for block in self.down_blocks:
            features, outputs = block(features, time)
            skips.extend(outputs)
        tokens = F.silu(self.norm_in(features)).flatten(2).transpose(1, 2)
        return self.proj_in(tokens), (tuple(skips), time)

    def predict(self, hidden_states: torch.Tensor, features: tuple, height: int, width: int) -> torch.Tensor:
        """(N, n, D) -> (N, C, h, w)"""
        skips, time = features
        tokens = self.proj_out(hidden_states).transpose(1, 2)
        features = tokens.unflatten(2, skips[-1].shape[2:]).contiguous()
        for block in self.up_blocks:
            count = len(block.resnets)
            features = block(features, skips[-count:], time)
            skips = skips[:-count]
        return self.conv_out(F.silu(self.norm_out(features)))


def build_patchifier(config) -> nn.Module:
    return {"unet": UNetPatchifier, "linear": LinearPatchifier}[config.patchifier](config)


# B batch, L row length, T = B * L tokens, D hidden size, V vocabulary
# N images in order of appearance, C latent channels, (h, w) latents


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


class MoTTransfusionModel(LatentImagesMixin, MoTPreTrainedModel, MoTTransfusionGenerationMixin):
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
    _keep_in_fp32_modules = ["vae"]  # for float16 and quantizers; `_get_dtype_plan` adds other precisions
    _supports_flash_attn = False  # its kernels know nothing of images that see themselves in both directions
    _no_split_modules = ["MoTDecoderLayer", "AutoencoderKL", "AutoencoderTiny"]
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
        self.vae = vae
        if vae is None and config.vae_config is not None:
            self.vae = build_vae(config.vae_config)
        for own in (self.patchifier, self.vae):
            for module in own.modules() if own is not None else ():
                module.keeps_own_initialization = True  # that of diffusers; the transformer's would be far too small
        for tensor in vae.state_dict(keep_vars=True).values() if vae is not None else ():
            tensor._is_hf_initialized = True
        self._freeze_vae()
        self.post_init()

    def _freeze_vae(self):
        if self.vae is not None:
            self.vae.float().requires_grad_(False).eval()

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

    def _apply(self, fn, recurse=True):
        """Moves everything, but casts no VAE: a model in half precision keeps its pictures."""
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
        elif getattr(module, "keeps_own_initialization", False):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        else:
            super()._init_weights(module)

    # ----------------------------------------------------------------------------------------------- the forward

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
        routing: ModalityRouting | None = None,
        skip_logits: bool = False,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> MoTTransfusionOutput:
        """Predict the next tokens of text, and of each image the noise that is in it.

        Args:
            input_ids: (B, L) with an `image_token_id` for each patch of an image, between BOI and EOI.
            attention_mask: (B, past + L) 1 for tokens, 0 for padding.
            past_key_values: a cache; images that come with a filled one are `generate()`'s affair.
            inputs_embeds: (B, L, D), to be taken instead of the embeddings of `input_ids`, which must come along.
            labels: (B, L) token ids, shifted inside by one; -100, placeholders and EOI are no targets.
            modality_ids: (B, L) indices into `config.modalities`; derived from `input_ids` when absent.
            position_ids, use_cache, logits_to_keep, document_ids, routing, skip_logits: as in `MoTForCausalLM`.
            latents: (N, C, h, w) clean and scaled, images in order of appearance over the flattened rows.
            pixel_values: (N, 3, H, W) in [-1, 1], instead of `latents`; the VAE encodes them.
            image_sizes: (N, 2) height and width of each image in the unit of the tensor that holds them, which is padded
                at the bottom and the right; needed when sizes differ. A tensor on a device is waited for, a list not.
            timesteps: (N,) noise levels, 0 <= t < num_train_timesteps (flow: floats, up to num_train_timesteps); drawn
                when absent.
            noise: of the latents' shape; drawn when absent.
            clean_images: (N,) bool, images that are context: they get no noise, t = 0, and have no loss.
            image_first: (N,) bool, images with text of their document after and none before them, whose drawn timesteps
                keep to `image_first_max_timestep`; found from `input_ids` when absent.
            generator: of the timesteps and the noise that are drawn.
            num_items_in_batch: divide the token loss by this instead of by the number of token targets here.
            shift_labels: (B, L) targets aligned with the logits already, instead of `labels`.

        Returns:
            `MoTTransfusionOutput`.

        Raises:
            ValueError: images without placeholders or the reverse, sizes that `patch_size` does not divide, timesteps
                out of range; the message names field, value and way out.
            TypeError: a keyword that nobody reads.
        """
        check_keywords(self, kwargs)
        num_items_in_batch, shift_labels = (kwargs.pop(name, None) for name in ("num_items_in_batch", "shift_labels"))
        config, planned = self.config, routing is not None
        if input_ids is None:
            raise ValueError(
                "input_ids is needed: a Transfusion model finds its images by their placeholders; inputs_embeds may come "
                "beside it, but prompt tuning and other virtual tokens go with a MoTForCausalLM only"
            )
        check_ids("input_ids", input_ids)
        check_rows(config, input_ids.shape, attention_mask, position_ids, past_key_values, document_ids)
        if modality_ids is not None:
            check_ids("modality_ids", modality_ids, input_ids.shape)
        if latents is not None and pixel_values is not None:
            raise ValueError("pass either latents or pixel_values, not both")
        is_filled = past_key_values is not None and past_key_values.get_seq_length() > 0
        if document_ids is None and attention_mask is None and past_key_values is None and position_ids is not None:
            document_ids = documents_of(position_ids.expand_as(input_ids))
        is_patch = input_ids == config.image_token_id
        blocks = find_image_blocks(is_patch, document_ids, config.markers_in_image_block)

        sizes = []
        if pixel_values is not None:
            latents, sizes = self.encode_images(pixel_values, image_sizes)
        elif latents is not None:
            check_tensor("latents", latents)
            if latents.dim() != 4 or latents.shape[1] != config.latent_channels:
                raise ValueError(
                    f"latents has shape {tuple(latents.shape)}; it must be (N, latent_channels="
                    f"{config.latent_channels}, h, w)"
                )
            sizes = sizes_of(latents, image_sizes)
        if not planned:
            check_placeholders(config, is_patch, blocks, sizes)
        if sizes and is_filled:
            raise ValueError("images came with a filled past_key_values; pass them with the prompt, or use generate()")
        if sizes:
            if image_first is None and timesteps is None and config.image_first_max_timestep is not None:
                image_first = images_first(config, input_ids, is_patch, blocks, document_ids, attention_mask)
            images = self._noisy_images(latents, sizes, timesteps, noise, clean_images, image_first, generator, planned)
        else:
            images = self._no_images(input_ids)

        if inputs_embeds is None:
            inputs_embeds = self.model.embed(input_ids)
        elif check_tokens(config, None, inputs_embeds) != input_ids.shape:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, but input_ids and hidden_size make it "
                f"{(*input_ids.shape, config.hidden_size)}"
            )
        tokens, features = self.embed_latents(images)
        places = torch.argsort(~is_patch.flatten(), stable=True)[: len(tokens)]  # no wait for the device
        embeds = inputs_embeds.flatten(0, 1).index_copy(0, places, tokens.to(inputs_embeds.dtype))
        if modality_ids is None and (labels is not None or not planned):
            modality_ids = self.model.modality_ids_of(input_ids)
        targets, of_targets = targets_of(self, input_ids.shape, labels, shift_labels, modality_ids)
        if targets is not None:  # placeholders and EOI are the sampler's to write
            ours = (targets == config.image_token_id) | (targets == config.eoi_token_id)
            targets = targets.masked_fill(ours, -100)
        if position_ids is None and config.image_positions == "shared":
            if is_filled:
                raise ValueError(
                    "position_ids are needed beside a filled past_key_values: with image_positions='shared' they do not "
                    "follow from its length"
                )
            position_ids = image_positions(blocks, document_ids, attention_mask)
        outputs = self.model(
            inputs_embeds=embeds.view_as(inputs_embeds),
            modality_ids=modality_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            routing=routing,
            image_blocks=self._image_blocks(blocks, images),
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        patches = hidden_states.flatten(0, 1).index_select(0, places)
        prediction = self.predict_latents(patches, features, images)
        logits, losses = logits_and_losses(
            self, hidden_states, (targets, of_targets), num_items_in_batch, logits_to_keep, skip_logits
        )
        if losses:
            self._add_diffusion_loss(losses, prediction, images)
        return MoTTransfusionOutput(
            logits=logits,
            prediction=prediction,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **losses,
        )

    def _image_blocks(self, blocks: torch.Tensor, images: NoisyImages) -> ImageBlocks | None:
        if not images.sizes:
            return None
        if self.config.noised_images_visible:
            return ImageBlocks(blocks)
        # `blocks` number the images of each row, `clean` those of all rows.
        first = (blocks.amax(dim=1) + 1).cumsum(0).roll(1)
        first[0] = 0
        number = (blocks + first[:, None]).clamp(min=0, max=len(images.clean) - 1)
        return ImageBlocks(blocks, (blocks >= 0) & ~images.clean[number])

    def _add_diffusion_loss(self, losses: dict, prediction: torch.Tensor, images: NoisyImages) -> None:
        squared = (prediction - images.target).square()
        counted = (~images.clean).view(-1, 1, 1, 1).expand_as(squared)
        if any(size != tuple(squared.shape[2:]) for size in images.sizes):
            counted = counted & images.inside()
        error, count = torch.where(counted, squared, 0.0).sum(), counted.sum()
        losses["loss_sums"]["image_diffusion"], losses["loss_counts"]["image_diffusion"] = error, count
        losses["loss"] = losses["loss"] + self.config.diffusion_loss_weight * error / count.clamp(min=1)


MoTTransfusionModel.register_for_auto_class("AutoModel")

__all__ = ["MoTTransfusionModel", "MoTTransfusionOutput"]
