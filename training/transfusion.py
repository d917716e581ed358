"""The `model.transfusion` section of a recipe: images that stay continuous and are diffused (paper, section 3.4)."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from modeling_mot import MoTConfig, MoTProcessor, MoTTransfusionConfig
from modeling_mot.latent_vae import VAE_CLASSES, downsampling, vae_config_of
from training.config import ConfigError, check_options, option
from training.data.config import DataConfig
from training.tokenizers.processor import continuous_processor


CARRIED_VAE = Path(__file__).parent / "assets" / "vae"
# What of a Transfusion model may change when it is trained further.
OBJECTIVE_FIELDS = ("diffusion_loss_weight", "image_first_max_timestep", "timestep_sampling")
Autoencoder = AutoencoderKL | AutoencoderTiny


@dataclass
class TransfusionModelConfig:
    """What a Transfusion model adds. Fields left at null are MoTTransfusionConfig's own defaults."""

    vae: str = option("carried", "frozen autoencoder of images: carried, a diffusers folder or a name on the Hub")
    image_size: list[int] = option(
        factory=lambda: [64, 64], doc="height and width of pictures, in pixels", ge=1, le=10**5
    )
    patch_size: int | None = option(None, "a token stands for patch_size x patch_size latents", ge=1, le=1024)
    patchifier: Literal["unet", "linear"] | None = option(None, "from latents to hidden states and back")
    unet_channels: list[int] | None = option(
        None, "channels of the U-Net's down blocks, log2(patch_size) + 1 of them", ge=1, le=10**5
    )
    unet_layers: int | None = option(None, "residual layers of a down block", ge=1, le=1000)
    unet_norm_groups: int | None = option(None, "groups of the U-Net's group norms", ge=1, le=10**5)
    prediction_type: Literal["epsilon", "v_prediction", "flow"] | None = option(None, "what is predicted of the noise")
    noise_schedule: str | None = option(None, "diffusers' name of a beta schedule; null: the cosine schedule")
    num_train_timesteps: int | None = option(None, "noise levels", ge=1, le=10**6)
    timestep_sampling: Literal["uniform", "logit_normal"] | None = option(None, "how noise levels are drawn")
    timestep_shift: float | None = option(None, "shift of flow matching's fractions", gt=0)
    timestep_format: Literal["index", "fraction"] | None = option(None, "what the timestep embedding sees")
    diffusion_loss_weight: float | None = option(None, "lambda of equation 4", ge=0)
    image_first_max_timestep: int | None = option(
        None,
        "largest noise level of an image that its caption follows (Transfusion's ablation: 500); null: no limit",
        ge=0,
    )
    image_positions: Literal["consecutive", "shared"] | None = option(None, "positions of an image's patches")
    markers_in_image_block: bool | None = option(None, "BOI and EOI see their image in both directions")
    noised_images_visible: bool | None = option(
        None, "whether later tokens see noised images; false: they see a clean copy that the data repeats (BAGEL)"
    )
    latent_position_table: Literal["sincos"] | None = option(None, "a fixed 2-D table added to the patches; null: none")

    def __post_init__(self):
        check_options(self)
        if len(self.image_size) != 2:
            raise ConfigError(f"model.transfusion.image_size={self.image_size} must be [height, width]")

    def model_fields(self) -> dict[str, Any]:
        """The fields of MoTTransfusionConfig that the recipe sets."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v for name, v in values.items() if v is not None and name not in ("vae", "image_size")}


def load_vae(source: str) -> Autoencoder:
    """A diffusers autoencoder in float32, frozen.

    Raises:
        ConfigError: there is none, it is of another class or not whole.
    """
    folder = str(CARRIED_VAE) if source == "carried" else source
    try:
        name = AutoencoderKL.load_config(folder).get("_class_name", "AutoencoderKL")
        if name not in VAE_CLASSES:
            raise ValueError(f"its class is {name}; there are {', '.join(VAE_CLASSES)}")
        vae, info = VAE_CLASSES[name].from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"its weights lack {', '.join(missing[:4])}; is it whole?")
    except Exception as error:  # whatever diffusers raises of a folder that holds something else
        raise ConfigError(f"model.transfusion.vae={source!r}: no autoencoder could be loaded: {error}") from error
    return vae.eval().requires_grad_(False)


def vae_factor(vae: Autoencoder) -> int:
    """Pixels of one latent's side."""
    return downsampling(vae_config_of(vae))


def transfusion_processor(
    processor: MoTProcessor, config: TransfusionModelConfig, vae: Autoencoder, keep_speech: bool = False
) -> MoTProcessor:
    """The same text with pictures that stay pixels, in tokens of the VAE's factor times the patch size.

    Args:
        keep_speech: keep the speech units too.

    Raises:
        ConfigError: an image size that the tokens do not divide, or that is not the one of a processor whose pictures
            are pixels already.
    """
    if processor.image_processor is not None:
        found = processor.image_processor
        if found.fit != "keep" and found.image_size != list(config.image_size):
            raise ConfigError(
                f"model.transfusion.image_size={config.image_size}, but the processor makes pictures of "
                f"{found.image_size}; set them alike"
            )
        return processor
    side = vae_factor(vae) * (config.patch_size or MoTTransfusionConfig.patch_size)
    try:
        return continuous_processor(processor, config.image_size, side, keep_speech=keep_speech)
    except ValueError as error:
        raise ConfigError(f"model.transfusion.image_size={config.image_size}: {error}") from error


def check_pictures(config: MoTConfig, processor: MoTProcessor) -> None:
    """Refuse a processor whose pictures are not what the model takes: codes or pixels, and how many of them a token.

    Raises:
        ConfigError: naming `model.processor`.
    """
    pixels, is_continuous = processor.image_processor, isinstance(config, MoTTransfusionConfig)
    if is_continuous != (pixels is not None):
        raise ConfigError(
            f"model.processor: its pictures are {'codes' if pixels is None else 'pixels'}, but the model takes "
            f"{'pixels, which it diffuses' if is_continuous else 'codes: for pixels set model.transfusion'}"
        )
    if not is_continuous:
        return
    wanted = config.vae_downsampling * config.patch_size
    if pixels.downsampling != wanted:
        raise ConfigError(
            f"model.processor: a token stands for {pixels.downsampling} pixels a side, but for {wanted} in the model "
            f"(VAE {config.vae_downsampling} x patch_size {config.patch_size}); use a processor of downsampling={wanted}"
        )


def set_objective(config: MoTTransfusionConfig, recipe: TransfusionModelConfig, init_from: str) -> None:
    """Let a recipe change what a checkpoint is trained on further, and nothing that would make another model of it.

    Raises:
        ConfigError: a field that the checkpoint has another value of.
    """
    for name, value in recipe.model_fields().items():
        if name in OBJECTIVE_FIELDS:
            setattr(config, name, value)
        elif getattr(config, name) != value:
            raise ConfigError(
                f"model.transfusion.{name}={value!r}, but model.init_from={init_from!r} was made with "
                f"{getattr(config, name)!r}; leave it out"
            )
    try:
        config.validate_architecture()
    except ValueError as error:
        raise ConfigError(f"model.transfusion: {error}") from error


def has_sound(data: DataConfig) -> bool:
    """Whether any template has a sound, so that the model needs speech beside text and pictures."""
    sources = (*data.sources, *data.validation_sources)
    return any(segment.type == "audio" for source in sources for segment in source.segments)


def caption_dropout(data: DataConfig) -> float:
    """How often captions are dropped, which decides whether guidance makes sense; the most of any template."""
    return max((template.caption_dropout for source in data.sources for template in source.templates), default=0.0)
