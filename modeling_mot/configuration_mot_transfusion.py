"""Configuration of Transfusion models: text by next token, images by diffusion (paper, section 3.4 and appendix A)."""

import math

from .checks_fields import (
    CONFIG_RULES,
    Either,
    Maybe,
    Number,
    OneOf,
    Several,
    Whole,
    check_fields,
    strict_configuration,
)
from .configuration_mot import MoTConfig
from .configuration_presets import TRANSFUSION_FIELDS, TRANSFUSION_PRESETS


PATCHIFIERS = ("unet", "linear")
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow", "flow_sample")
NOISE_SCHEDULES = ("squaredcos_cap_v2", "linear", "scaled_linear")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal", "beta")
TIMESTEP_FORMATS = ("index", "fraction")
TIMESTEP_DIRECTIONS = ("noise", "clean")
IMAGE_POSITIONS = ("consecutive", "shared")
LATENT_POSITION_TABLES = (None, "sincos")
VAE_CLASS_NAMES = ("AutoencoderKL", "AutoencoderTiny")

TRANSFUSION_RULES = CONFIG_RULES | {
    "patch_size": Whole(1, 2**10),
    "latent_channels": Whole(1, 2**16),
    "latent_size": Several(Whole(0, 2**16), count=2),
    "unet_channels": Several(Whole(1, 2**16)),
    "unet_layers": Whole(1, 2**10),
    "unet_norm_groups": Whole(1, 2**16),
    "num_train_timesteps": Whole(1, 10**6),
    "timestep_sampling_parameters": Maybe(Several(Number(-math.inf), count=2)),
    "timestep_range": Several(Number(0, 1), count=2),
    "timestep_shift": Either(Number(open="low"), Several(Several(Number(open="low"), count=2))),
    "smallest_divisor": Number(0, 1, open="low"),
    "diffusion_loss_weight": Number(),
    "caption_dropout": Number(0, 1),
    "patchifier": OneOf(PATCHIFIERS),
    "prediction_type": OneOf(PREDICTION_TYPES),
    "noise_schedule": OneOf(NOISE_SCHEDULES),
    "timestep_sampling": OneOf(TIMESTEP_SAMPLINGS),
    "timestep_format": OneOf(TIMESTEP_FORMATS),
    "timestep_direction": OneOf(TIMESTEP_DIRECTIONS),
    "image_positions": OneOf(IMAGE_POSITIONS),
    "latent_position_table": OneOf(LATENT_POSITION_TABLES),
}
VAE_RULES = {
    "_class_name": OneOf(VAE_CLASS_NAMES),
    "latent_channels": Whole(1, 2**16),
    "block_out_channels": Several(Whole(1, 2**16)),
    "encoder_block_out_channels": Several(Whole(1, 2**16)),
    "scaling_factor": Number(open="low"),
    "shift_factor": Maybe(Number(-math.inf)),
}


def vae_downsampling(vae_config) -> int:
    """Compute the pixels of one latent's side from diffusers' configuration: every block but one halves the sides."""
    if vae_config["_class_name"] == "AutoencoderTiny":
        blocks = vae_config.get("encoder_block_out_channels") or (64, 64, 64, 64)  # the defaults are diffusers'
    else:
        blocks = vae_config.get("block_out_channels") or (64,)
    return 2 ** (len(blocks) - 1)


@strict_configuration
class MoTTransfusionConfig(MoTConfig):
    r"""Configuration of `MoTTransfusionModel`.

    All fields of a `MoTConfig`; images are continuous, so `modality_token_ranges`, where given, has no range for them
    and there is no `image_grid`. Added:

    Args:
        boi_token_id, eoi_token_id (`int`, default to 32000 and 32001): Markers around an image.
        image_token_id (`int`, defaults to 32002): Placeholder in `input_ids`, one for each patch of an image.
        latent_channels (`int`, defaults to 8): Channels of the latents (paper: 8).
        latent_size (`list[int]`, defaults to `[32, 32]`):
            Rows and columns of the latents of an image that `generate()` makes by default. Training and `generate()`
            take any size that `patch_size` divides: resolution is part of the input.
        patch_size (`int`, defaults to 2): A token stands for patch_size x patch_size latents (paper: 2).
        patchifier (`"unet"` or `"linear"`, defaults to `"unet"`): The way from latents to hidden states and back.
        unet_channels (`list[int]`, defaults to `[544, 1024]`):
            Channels of the U-Net's down blocks, log2(patch_size) + 1 of them. Each block but the last halves the sides;
            the up blocks mirror the down blocks. The default makes the paper's U-Net of 0.27 B parameters.
        unet_layers (`int`, defaults to 3): Residual layers of a down block; an up block has one more.
        unet_norm_groups (`int`, defaults to 32): Groups of the U-Net's group norms.
        prediction_type (`"epsilon"`, `"v_prediction"`, `"flow"` or `"flow_sample"`, defaults to `"epsilon"`):
            The target of the prediction: the noise, the velocity of arXiv 2202.00512, or noise - clean (flow matching
            on straight lines). With "flow_sample" it is the clean latents, and the loss is that of the velocity which
            they imply, (noised - clean) / t (arXiv 2511.13720).
        smallest_divisor (`float`, defaults to 0.05): The least t by which that loss divides.
        noise_schedule (`str`, defaults to `"squaredcos_cap_v2"`):
            Diffusers' name of a beta schedule. The default is the cosine schedule of Nichol & Dhariwal; flow uses none.
        num_train_timesteps (`int`, defaults to 1000): Noise levels.
        timestep_sampling (`"uniform"`, `"logit_normal"` or `"beta"`, defaults to `"uniform"`):
            How training draws fractions t of the noise levels; t = 1 is noise.
        timestep_sampling_parameters (`list[float]`, *optional*):
            Mean and deviation of the logit (default 0 and 1), or alpha and beta of the Beta distribution.
        timestep_range (`list[float]`, defaults to `[0.0, 1.0]`):
            Drawn fractions t become low + (high - low) t, before the shift.
        timestep_shift (`float` or `list[list[float]]`, defaults to 1.0):
            With flow, fractions t become s t / (1 + (s - 1) t), in training and in sampling. Pairs `[tokens, shift]`
            give images of so many tokens a shift of their own; between and beyond the pairs log(shift) goes on along
            straight lines over the tokens, as in diffusers' FLUX pipelines.
        timestep_format (`"index"` or `"fraction"`, defaults to `"index"`):
            The timestep embedding takes t in [0, num_train_timesteps], or in [0, 1].
        timestep_direction (`"noise"` or `"clean"`, defaults to `"noise"`):
            With flow, what the timestep embedding takes at its largest t: noise, or clean latents. `timesteps` and all
            other settings count towards noise.
        diffusion_loss_weight (`float`, defaults to 5.0): The lambda of equation 4.
        image_first_max_timestep (`int`, *optional*):
            Largest noise level of an image with text of its document after and none before it (Transfusion's ablation:
            500).
        caption_dropout (`float`, defaults to 0.0):
            Share of captions that training dropped; guidance needs some.
        image_positions (`"consecutive"` or `"shared"`, defaults to `"consecutive"`):
            Each patch has a position of its own, in raster order, or all patches of an image share one.
        markers_in_image_block (`bool`, defaults to `False`):
            True if BOI and EOI belong to the block that sees itself in both directions (and shares a position).
        noised_images_visible (`bool`, defaults to `True`):
            True if later tokens see an image that has noise (Transfusion). If False (BAGEL), they need a clean copy of
            it as context.
        latent_position_table (`None` or `"sincos"`): A fixed 2-D sine-cosine table added to the patches.
        vae_config (`dict`, *optional*):
            Configuration of diffusers' `AutoencoderKL` or `AutoencoderTiny` inside the model, with its `_class_name`;
            None for a model that takes latents.

    Examples:

        >>> from modeling_mot import MoTTransfusionConfig
        >>> config = MoTTransfusionConfig(latent_size=[32, 48], patch_size=2)
        >>> config.image_length(32, 48)  # tokens of an image
        384
    """

    field_rules = TRANSFUSION_RULES
    model_type = "mixture_of_transformers_transfusion"
    keys_to_ignore_at_inference = [*MoTConfig.keys_to_ignore_at_inference, "prediction"]
    auto_classes = {
        "AutoConfig": "configuration_mot_transfusion.MoTTransfusionConfig",
        "AutoModel": "modeling_mot_transfusion.MoTTransfusionModel",
        "AutoModelForCausalLM": "modeling_mot_transfusion.MoTTransfusionModel",
        "AutoModelForImageTextToText": "modeling_mot_transfusion.MoTTransfusionModel",
        "AutoModelForMultimodalLM": "modeling_mot_transfusion.MoTTransfusionModel",
        "AutoProcessor": "processing_mot.MoTProcessor",
    }

    boi_token_id: int | None = TRANSFUSION_FIELDS["boi_token_id"]
    eoi_token_id: int | None = TRANSFUSION_FIELDS["eoi_token_id"]
    image_token_id: int | None = TRANSFUSION_FIELDS["image_token_id"]
    latent_channels: int = 8
    latent_size: list[int] | tuple[int, ...] = (32, 32)
    patch_size: int = 2
    patchifier: str = "unet"
    unet_channels: list[int] | tuple[int, ...] = (544, 1024)
    unet_layers: int = 3
    unet_norm_groups: int = 32
    prediction_type: str = "epsilon"
    noise_schedule: str = "squaredcos_cap_v2"
    num_train_timesteps: int = 1000
    timestep_sampling: str = "uniform"
    timestep_sampling_parameters: list | tuple | None = None
    timestep_range: list | tuple = (0.0, 1.0)
    timestep_shift: float | int | list | tuple = 1.0
    smallest_divisor: float | int = 0.05
    timestep_format: str = "index"
    timestep_direction: str = "noise"
    diffusion_loss_weight: float | int = 5.0
    image_first_max_timestep: int | None = None
    caption_dropout: float | int = 0.0
    image_positions: str = "consecutive"
    markers_in_image_block: bool = False
    noised_images_visible: bool = True
    latent_position_table: str | None = None
    vae_config: dict | None = None

    def __post_init__(self, **kwargs):
        self.latent_size = list(self.latent_size)
        self.unet_channels = list(self.unet_channels)
        self.timestep_range = list(self.timestep_range)
        if isinstance(self.timestep_shift, tuple):
            self.timestep_shift = list(self.timestep_shift)
        super().__post_init__(**kwargs)

    @property
    def token_modalities(self) -> list[str]:
        """The modalities whose tokens are entries of the vocabulary: all but images."""
        return [modality for modality in self.modalities if modality != "image"]

    @property
    def image_modality(self) -> int:
        """The index of "image" in `modalities`."""
        return self.modalities.index("image")

    @property
    def vae_downsampling(self) -> int:
        """Pixels of one latent's side; 1 without a VAE."""
        return 1 if self.vae_config is None else vae_downsampling(self.vae_config)

    @property
    def is_flow(self) -> bool:
        """True for flow matching, whose noise levels are floats from 0 (clean) to `num_train_timesteps` (noise)."""
        return self.prediction_type in ("flow", "flow_sample")

    def shift_of(self, height: int, width: int) -> float:
        """Return the `timestep_shift` of an image of height x width latents."""
        if not isinstance(self.timestep_shift, list):
            return self.timestep_shift
        # The two pairs around the image's length, or the first or last two.
        length, pairs = self.image_length(height, width), sorted(self.timestep_shift)
        if len(pairs) == 1:
            return pairs[0][1]
        place = sum(length > tokens for tokens, _ in pairs[1:-1])
        (low, first), (high, second) = pairs[place : place + 2]
        return first * (second / first) ** ((length - low) / (high - low))

    def image_length(self, height: int, width: int) -> int:
        """Count the tokens of an image of height x width latents.

        Raises:
            ValueError: `patch_size` does not divide a side.
        """
        if height % self.patch_size or width % self.patch_size or min(height, width) < 1:
            pixels = self.patch_size * self.vae_downsampling
            raise ValueError(
                f"an image of {height} x {width} latents cannot be cut into patches of patch_size={self.patch_size}; "
                f"its sides must be multiples of {self.patch_size} latents ({pixels} pixels)"
            )
        return (height // self.patch_size) * (width // self.patch_size)

    def patchifier_parameters(self) -> int:
        """Count the parameters of the patchifier."""
        import torch

        from .modeling_mot_transfusion import build_patchifier

        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build_patchifier(self).parameters())

    def num_parameters(self, active: bool = False) -> int:
        """Count parameters as `MoTConfig.num_parameters` does, with the patchifier and without the frozen VAE."""
        return super().num_parameters(active) + self.patchifier_parameters()

    @staticmethod
    def preset_fields(name: str) -> dict:
        return TRANSFUSION_PRESETS[name] | TRANSFUSION_FIELDS

    @staticmethod
    def preset_names() -> list[str]:
        return list(TRANSFUSION_PRESETS)

    # ------------------------------------------------------------------ contradictions

    def validate_architecture(self):
        super().validate_architecture()
        self._validate_images()
        self._validate_diffusion()

    def _validate_markers(self, markers):
        super()._validate_markers((*markers, "image_token_id"))

    def _validate_images(self):
        if "image" not in self.modalities:
            raise ValueError(f"modalities={self.modalities} has no 'image', which a Transfusion model diffuses")
        # The tokens around and in an image.
        end, size = self._end_of_tokens()
        for field in ("image_token_id", "boi_token_id", "eoi_token_id"):
            value = getattr(self, field)
            if value is None or not 0 <= value < size:
                raise ValueError(
                    f"{field}={value} must be a token of the vocabulary, in [0, {end}={size}): images stand between "
                    "boi_token_id and eoi_token_id, each patch an image_token_id"
                )
        if self.image_grid is not None:
            raise ValueError(f"image_grid={self.image_grid} is of discrete images; set latent_size instead")
        # The autoencoder, and latents of its shape.
        if self.vae_config is not None:
            if self.vae_config.get("_class_name") not in VAE_CLASS_NAMES:
                raise ValueError(
                    f"vae_config has _class_name={self.vae_config.get('_class_name')!r}, which is not one of "
                    f"{VAE_CLASS_NAMES}; with another autoencoder leave vae_config out and pass latents"
                )
            check_fields(self.vae_config, VAE_RULES, "vae_config.")
            channels = self.vae_config.get("latent_channels", 4)
            if channels != self.latent_channels:
                raise ValueError(f"latent_channels={self.latent_channels} but the VAE has {channels}; set them alike")
        self.image_length(*self.latent_size)

    def _validate_diffusion(self):
        # The patchifier: its blocks divide the sides and the channels.
        if self.patchifier == "unet":
            if 2 ** (len(self.unet_channels) - 1) != self.patch_size:
                raise ValueError(
                    f"patch_size={self.patch_size} with unet_channels={self.unet_channels}: every block of the U-Net "
                    "but the last halves the sides, so patch_size must be a power of 2 and have log2(patch_size) + 1 "
                    "channels"
                )
            if wrong := [width for width in self.unet_channels if width % self.unet_norm_groups]:
                raise ValueError(
                    f"unet_channels={self.unet_channels}: {wrong[0]} is not a multiple of "
                    f"unet_norm_groups={self.unet_norm_groups}"
                )
        # The noise levels.
        if self.image_first_max_timestep is not None and not (
            0 <= self.image_first_max_timestep < self.num_train_timesteps
        ):
            raise ValueError(
                f"image_first_max_timestep={self.image_first_max_timestep} must lie in "
                f"[0, num_train_timesteps={self.num_train_timesteps})"
            )
        if self.timestep_shift != 1 and not self.is_flow:
            raise ValueError(
                f"timestep_shift={self.timestep_shift} shifts the fractions of flow matching; "
                f"prediction_type={self.prediction_type!r} needs 1.0"
            )
        if isinstance(self.timestep_shift, list) and len(dict(self.timestep_shift)) < len(self.timestep_shift):
            raise ValueError(f"timestep_shift={self.timestep_shift} must name each number of tokens once")
        if self.timestep_direction == "clean" and not self.is_flow:
            raise ValueError(
                f"timestep_direction='clean' turns the fractions of flow matching round; prediction_type="
                f"{self.prediction_type!r} needs 'noise'"
            )
        # How fractions are drawn.
        low, high = self.timestep_range
        if low >= high:
            raise ValueError(f"timestep_range={self.timestep_range} must be [low, high] with low < high")
        given, kind = self.timestep_sampling_parameters, self.timestep_sampling
        if given is None and kind == "beta" or given is not None and kind == "uniform":
            needs = "takes none" if kind == "uniform" else "needs [alpha, beta], such as [1.5, 1.0]"
            raise ValueError(f"timestep_sampling_parameters={given}, but timestep_sampling={kind!r} {needs}")
        if given is not None and min(given[kind == "logit_normal" :]) <= 0:
            raise ValueError(
                f"timestep_sampling_parameters={given} of timestep_sampling={kind!r} must be "
                f"{'[mean, deviation] with a positive deviation' if kind == 'logit_normal' else 'positive'}"
            )
        # The positions of patches.
        if self.latent_position_table is not None and self.hidden_size % 4:
            raise ValueError(
                f"latent_position_table={self.latent_position_table!r} splits hidden_size={self.hidden_size} into sine "
                "and cosine of rows and columns: it must be a multiple of 4"
            )


MoTTransfusionConfig.register_for_auto_class()

__all__ = ["MoTTransfusionConfig"]
