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
from .configuration_encoders import (
    POSITION_TABLES,
    TABLE_SIZE,
    check_modalities,
    complete_encoder,
    complete_modality,
)
from .configuration_mot import MoTConfig
from .configuration_presets import TRANSFUSION_FIELDS, TRANSFUSION_PRESETS


PATCHIFIERS = ("unet", "linear")
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow", "flow_sample")
NOISE_SCHEDULES = ("squaredcos_cap_v2", "linear", "scaled_linear")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal", "beta")
TIMESTEP_FORMATS = ("index", "fraction")
IMAGE_POSITIONS = ("consecutive", "shared", "grid")
TIMESTEP_ADDITIONS = ("patch", "token", "noised_token", None)
TIMESTEP_DIRECTIONS = ("noise", "clean")
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
    "modality_margin": Whole(0, 2**20),
    "base_frames_per_second": Maybe(Number(open="low")),
    "timestep_addition": OneOf(TIMESTEP_ADDITIONS),
    "latent_position_table": OneOf(POSITION_TABLES),
    "latent_position_table_size": Maybe(TABLE_SIZE),
    "num_placeholder_tokens": Whole(0, 2**10),
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
        partial_patches (`bool`, defaults to `False`):
            With the linear patchifier, True if `patch_size` need not divide the sides of an image: its last patches are
            filled up with zeros, and predictions are cut (Cosmos 3).
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
        timestep_addition (`"patch"`, `"token"`, `"noised_token"` or `None`, defaults to `"patch"`):
            Where the linear patchifier adds the timestep embedding: to a patch before it becomes a token, to the token
            (BAGEL), to tokens of images with noise alone (Cosmos 3), or nowhere. The U-Net has its own way, `"patch"`.
        timestep_direction (`"noise"` or `"clean"`, defaults to `"noise"`):
            With flow, what the timestep embedding takes at its largest t: noise, or clean latents. `timesteps` and all
            other settings count towards noise.
        diffusion_loss_weight (`float`, defaults to 5.0): The lambda of equation 4.
        image_first_max_timestep (`int`, *optional*):
            Largest noise level of an image with text of its document after and none before it (Transfusion's ablation:
            500).
        caption_dropout (`float`, defaults to 0.0):
            Share of captions that training dropped; guidance needs some.
        image_positions (`"consecutive"`, `"shared"` or `"grid"`, defaults to `"consecutive"`):
            Each patch has a position of its own, in raster order; or all patches of an image share one; or, with RoPE
            of three axes, a patch has the time of its image, and its row and column from 0 (Cosmos 3). A run of
            placeholders may then hold several images: the frames of a video.
        modality_margin (`int`, defaults to 0):
            With a grid, how far the time of an image lies behind that of the text before it (Cosmos 3: 15000).
        base_frames_per_second (`float`, *optional*):
            With a grid, the rate at which each frame of a video moves the time by 1 (Cosmos 3: 24). Frames of other
            rates move it by base / rate. Default: by 1 at any rate.
        markers_in_image_block (`bool`, defaults to `False`):
            True if BOI and EOI belong to the block that sees itself in both directions (and shares a position).
        noised_images_visible (`bool`, defaults to `True`):
            True if later tokens see an image that has noise (Transfusion). If False (BAGEL), they need a clean copy of
            it as context.
        noised_images_advance (`bool`, defaults to `True`):
            With shared positions, False if an image that has noise takes no position of its own, so that what follows,
            such as its clean copy, begins at the same one (BAGEL).
        latent_position_table (`None` or `"sincos"`): A fixed 2-D sine-cosine table added to the patches.
        latent_position_table_size (`list[int]`, *optional*):
            Rows and columns of the table, if the checkpoint holds it. Default: it is computed for each size.
        continuous_modalities (`dict[str, dict]`, *optional*):
            Modalities beside the image whose tokens are features of an encoder, by name (BAGEL: `"vision"`, the
            pictures that the model looks at). Fields: `kind`, `"features"`; `encoder`, a name in `encoders`;
            `placeholder_token_id`, one for each patch in `input_ids`; `begin_token_id` and `end_token_id`, the
            markers, by default those of images; `position_table` and `position_table_size`, as those of latents.
        encoders (`dict[str, dict]`, *optional*):
            Vision encoders by name. Fields: `type`, `"siglip_navit"`; `hidden_size`, `intermediate_size`,
            `num_hidden_layers`, `num_attention_heads`, `patch_size`, `num_channels`, `hidden_act`, `layer_norm_eps`;
            `table_size`, rows and columns of its learned positions; `drop_last_layers`, layers of
            `num_hidden_layers` that are not built; `frozen`, True to leave it untrained; `connector`, the two linear
            layers from its width to the transformer's, with a `hidden_act` of their own.
        num_placeholder_tokens (`int`, defaults to 0):
            Ids behind `vocab_size` that placeholders may have, for checkpoints whose vocabulary has no token for them.
            They have no row in embeddings and head.
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
    partial_patches: bool = False
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
    timestep_addition: str | None = "patch"
    timestep_direction: str = "noise"
    diffusion_loss_weight: float | int = 5.0
    image_first_max_timestep: int | None = None
    caption_dropout: float | int = 0.0
    image_positions: str = "consecutive"
    modality_margin: int = 0
    base_frames_per_second: float | int | None = None
    markers_in_image_block: bool = False
    noised_images_visible: bool = True
    noised_images_advance: bool = True
    latent_position_table: str | None = None
    latent_position_table_size: list[int] | tuple[int, ...] | None = None
    continuous_modalities: dict[str, dict] | None = None
    encoders: dict[str, dict] | None = None
    num_placeholder_tokens: int = 0
    vae_config: dict | None = None

    def __post_init__(self, **kwargs):
        self.latent_size = list(self.latent_size)
        self.unet_channels = list(self.unet_channels)
        if self.latent_position_table_size is not None:
            self.latent_position_table_size = list(self.latent_position_table_size)
        if self.continuous_modalities is not None:
            given = self.continuous_modalities.items()
            self.continuous_modalities = {name: complete_modality(fields, self) for name, fields in given}
        if self.encoders is not None:
            self.encoders = {name: complete_encoder(fields) for name, fields in self.encoders.items()}
        self.timestep_range = list(self.timestep_range)
        if isinstance(self.timestep_shift, tuple):
            self.timestep_shift = list(self.timestep_shift)
        super().__post_init__(**kwargs)

    @property
    def placeholder_token_ids(self) -> dict[str, int]:
        """Modality -> the token that stands for each of its patches: the image, and the features of encoders."""
        features = self.continuous_modalities or {}
        return {"image": self.image_token_id} | {
            name: fields["placeholder_token_id"] for name, fields in features.items()
        }

    @property
    def token_modalities(self) -> list[str]:
        """The modalities whose tokens are entries of the vocabulary: all that have no placeholders."""
        placeholders = self.placeholder_token_ids
        return [modality for modality in self.modalities if modality not in placeholders]

    @property
    def written_token_ids(self) -> list[int]:
        """The tokens that are written and never predicted: placeholders, and the markers that end what they fill."""
        ends = {fields["end_token_id"] for fields in (self.continuous_modalities or {}).values()}
        return [*self.placeholder_token_ids.values(), *({self.eoi_token_id} | ends)]

    @property
    def image_modality(self) -> int:
        """The index of "image" in `modalities`."""
        return self.modalities.index("image")

    @property
    def hides_images(self) -> bool:
        """True if text never sees images (`unseen_towers`)."""
        return self.towers["image"] in self.unseen_towers.get(self.towers["text"], ())

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
        """Count the tokens of an image of height x width latents; raises ValueError as `patch_grid` does."""
        rows, columns = self.patch_grid(height, width)
        return rows * columns

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches of an image of height x width latents.

        Raises:
            ValueError: `patch_size` does not divide a side, or the image exceeds the checkpoint's table of positions.
        """
        is_whole = self.partial_patches or not (height % self.patch_size or width % self.patch_size)
        if not is_whole or min(height, width) < 1:
            pixels = self.patch_size * self.vae_downsampling
            raise ValueError(
                f"an image of {height} x {width} latents cannot be cut into patches of patch_size={self.patch_size}; "
                f"its sides must be multiples of {self.patch_size} latents ({pixels} pixels)"
            )
        grid, table = (-(-height // self.patch_size), -(-width // self.patch_size)), self.latent_position_table_size
        if table is not None and (grid[0] > table[0] or grid[1] > table[1]):
            raise ValueError(
                f"an image of {height} x {width} latents has {grid[0]} x {grid[1]} patches, more than "
                f"latent_position_table_size={table}; take a smaller one"
            )
        return grid

    def features_grid(self, modality: str, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of tokens of a picture of height x width pixels, as its encoder cuts it.

        Raises:
            ValueError: the encoder's `patch_size` does not divide a side, or the picture exceeds a table of positions.
        """
        fields = self.continuous_modalities[modality]
        encoder = self.encoders[fields["encoder"]]
        patch = encoder["patch_size"]
        if height % patch or width % patch or min(height, width) < 1:
            raise ValueError(
                f"a picture of {height} x {width} pixels cannot be cut into patches of "
                f"encoders[{fields['encoder']!r}].patch_size={patch}; its sides must be multiples of {patch}"
            )
        grid = height // patch, width // patch
        for size in (encoder["table_size"], fields["position_table_size"]):
            if size is not None and (grid[0] > size[0] or grid[1] > size[1]):
                raise ValueError(
                    f"a picture of {height} x {width} pixels has {grid[0]} x {grid[1]} patches, and the positions of "
                    f"{modality!r} are a table of {size[0]} x {size[1]}; scale it down"
                )
        return grid

    def patchifier_parameters(self) -> int:
        """Count the parameters of the patchifier."""
        import torch

        from .modeling_mot_transfusion import build_patchifier

        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build_patchifier(self).parameters())

    def encoder_parameters(self) -> int:
        """Count the parameters of the encoders and their connectors."""
        import torch

        from .encoder_pictures import PictureEncoder

        with torch.device("meta"):
            encoders = [PictureEncoder(self, name) for name in self.encoders or ()]
        return sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters())

    def num_parameters(self, active: bool = False) -> int:
        """Count parameters as `MoTConfig.num_parameters` does, with patchifier and encoders, without the frozen VAE."""
        return super().num_parameters(active) + self.patchifier_parameters() + self.encoder_parameters()

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
        if self.continuous_modalities or self.encoders:
            check_modalities(self)
        self._validate_diffusion()

    def _validate_markers(self, markers):
        super()._validate_markers((*markers, "image_token_id"))

    def validate_token_ids(self):
        """Leave the ids to `validate_architecture`: transformers would warn of placeholders behind the vocabulary."""

    def check_token(self, field: str, value: int | None, is_placeholder: bool = False) -> None:
        """Refuse a marker or a placeholder that is no token of the vocabulary; placeholders may have an id behind it.

        Raises:
            ValueError: the message names field, value and way out.
        """
        end, size = self._end_of_tokens()
        has_row = value is not None and 0 <= value < size
        behind = range(self.vocab_size, self.vocab_size + self.num_placeholder_tokens)
        if not (has_row or is_placeholder and value in behind):
            raise ValueError(
                f"{field}={value} must be a token of the vocabulary, in [0, {end}={size}): images stand between "
                "boi_token_id and eoi_token_id, each patch an image_token_id"
            )

    def _validate_images(self):
        if "image" not in self.modalities:
            raise ValueError(f"modalities={self.modalities} has no 'image', which a Transfusion model diffuses")
        if unseen := self.unseen_towers.get(self.towers["image"]):
            raise ValueError(
                f"unseen_towers hides {unseen} from {self.towers['image']!r}, the tower of images, which are drawn "
                "from all that stands before them: leave it out"
            )
        # The tokens around and in an image.
        for field in ("image_token_id", "boi_token_id", "eoi_token_id"):
            self.check_token(field, getattr(self, field), is_placeholder=field == "image_token_id")
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
        if self.patchifier == "unet" and self.partial_patches:
            raise ValueError("partial_patches=True is of patchifier='linear'; the U-Net halves sides: leave it out")
        if self.patchifier == "unet" and self.timestep_addition != "patch":
            raise ValueError(
                f"timestep_addition={self.timestep_addition!r} is of patchifier='linear'; the U-Net adds the embedding "
                "in its own blocks: leave it at 'patch'"
            )
        # The positions of patches.
        is_grid = self.image_positions == "grid"
        if is_grid and (self.markers_in_image_block or not self.has_grid_positions):
            raise ValueError(
                f"image_positions='grid' needs rope_parameters with mrope_section, and markers_in_image_block=False: "
                f"rope_parameters={self.rope_parameters}, markers_in_image_block={self.markers_in_image_block}"
            )
        if not is_grid and (self.modality_margin or self.base_frames_per_second is not None):
            raise ValueError(
                f"modality_margin={self.modality_margin} and base_frames_per_second={self.base_frames_per_second} are "
                f"of image_positions='grid', not of {self.image_positions!r}; leave them out"
            )
        if not self.noised_images_advance and self.image_positions != "shared":
            raise ValueError(
                "noised_images_advance=False keeps the position of an image whose patches share one; set "
                "image_positions='shared'"
            )
        tables = {"image": ("latent_position_table", self.latent_position_table)} | {
            name: (f"continuous_modalities[{name!r}].position_table", fields.get("position_table"))
            for name, fields in (self.continuous_modalities or {}).items()
        }
        for modality, (field, table) in tables.items():
            width = self.tower_config(self.towers[modality]).hidden_size
            if table is not None and width % 4:
                raise ValueError(
                    f"{field}={table!r} splits hidden_size={width} into sine and cosine of rows and "
                    "columns: it must be a multiple of 4"
                )
        if self.latent_position_table is None and self.latent_position_table_size is not None:
            raise ValueError(
                f"latent_position_table_size={self.latent_position_table_size} without a latent_position_table; set "
                "latent_position_table='sincos', or leave the size out"
            )


MoTTransfusionConfig.register_for_auto_class()

__all__ = ["MoTTransfusionConfig"]
