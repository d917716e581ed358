"""Encode pictures as grids of discrete codes and decode them: a VQ image tokenizer on diffusers' `VQModel`.

Transformers' Chameleon VQ-VAE, which has no decoder, can take the place of `VQModel`.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .checks_fields import Maybe, OneOf, Several, Typed, Whole, check_fields, check_names
from .hub_trust import forget_code, read_json_object, reading, without_code
from .media_loading import (
    MAX_KEPT_PIXELS,
    RESAMPLING,
    cut_long_side,
    describe_source,
    fit_picture,
    load_picture,
    pixel_limit,
)


# N pictures of (H, W) pixels, images of (h, w) codes, h = H / downsampling, C latent channels, K codes of the codebook,
# M latents, p pixels along a side of a folded patch

IMAGE_TOKENIZER_CONFIG_NAME = "image_tokenizer_config.json"
FITS = ("crop", "pad", "keep")
BACKENDS = ("diffusers", "chameleon")

# `model` holds the arguments of diffusers' VQModel. "chameleon-512" is the layout of Chameleon's tokenizer: 512 pixels,
# 16-fold down-sampling, 32 x 32 = 1,024 tokens out of 8,192 codes.
PRESETS: dict[str, dict[str, Any]] = {
    "small-64": {
        "image_size": [64, 64],
        "patch_size": 2,
        "model": {
            "block_out_channels": [32, 64, 112],
            "layers_per_block": 1,
            "latent_channels": 32,
            "vq_embed_dim": 16,
            "num_vq_embeddings": 1024,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
        },
    },
    "chameleon-512": {
        "image_size": [512, 512],
        "patch_size": 1,
        "model": {
            "block_out_channels": [128, 128, 256, 256, 512],
            "layers_per_block": 2,
            "latent_channels": 256,
            "vq_embed_dim": 256,
            "num_vq_embeddings": 8192,
            "norm_num_groups": 32,
            "mid_block_add_attention": True,
        },
    },
}


PICTURE_RULES = {
    "image_size": Several(Whole(1, 2**16), count=2),
    "fit": OneOf(FITS),
    "resample": OneOf(tuple(RESAMPLING)),
    "background": Several(Whole(0, 255), count=3),
    "max_pixels": Whole(),
    "max_kept_pixels": Whole(),
}
CONFIG_RULES = PICTURE_RULES | {
    "patch_size": Whole(1, 2**8),
    "backend": OneOf(BACKENDS),
    "batch_size": Whole(),
    "storage_dtype": OneOf(("float32", "float16", "bfloat16")),
    "model": Typed(dict),
    "image_processor": Maybe(Typed(dict)),
}
VQ_MODEL_RULES = {
    "block_out_channels": Several(Whole(1, 2**16)),
    "layers_per_block": Whole(1, 2**10),
    "latent_channels": Whole(1, 2**16),
    "vq_embed_dim": Maybe(Whole(1, 2**16)),
    "num_vq_embeddings": Whole(1, 2**24),
    "norm_num_groups": Whole(1, 2**16),
}


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtype of the weights under any outer autocast; a context or a decorator.

    A code is an argmin, which rounding turns into another code. So encoding and decoding never follow the precision in
    which a model is trained or sampled.
    """
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for device_type in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@dataclass
class ImageTokenizerConfig:
    """How a picture becomes pixels (`image_size`, `fit`, `resample`, `background`) and pixels become codes.

    `image_size` is [height, width] in pixels. `fit`: "crop" scales the shorter side and cuts the middle out, "pad"
    scales the longer side and fills with the background, "keep" takes pictures as they are (sides must be multiples
    of the down-sampling). `patch_size` p folds p x p pixels into channels before the first convolution. `model` holds
    the arguments of diffusers' `VQModel`. `storage_dtype` is that of the saved weights; they compute in float32.
    `image_processor` holds the settings of transformers' `ChameleonImageProcessorPil`: pictures then become pixels as
    they do for Chameleon, all of them `image_size`, and `fit`, `resample` and `background` are not read. Pictures of
    more than `max_pixels`, or of more than `max_kept_pixels` with `fit` "keep", are refused before they are decoded.
    `batch_size` pictures are encoded at a time.

    Raises:
        ValueError: a field with an impossible value, by name; or channels of `model` that its groups do not divide.
    """

    image_size: list[int] = field(default_factory=lambda: [64, 64])
    fit: str = "crop"
    resample: str = "bicubic"
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    max_pixels: int = 89_478_485
    patch_size: int = 1
    backend: str = "diffusers"
    batch_size: int = 32
    storage_dtype: str = "float32"
    model: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] | None = None
    max_kept_pixels: int = MAX_KEPT_PIXELS

    def __post_init__(self):
        if isinstance(self.image_size, int):
            self.image_size = [self.image_size, self.image_size]
        check_fields(self, CONFIG_RULES)
        self.image_size = list(self.image_size)
        if self.backend == "diffusers":
            self._check_model()

    def _check_model(self):
        """Raise ValueError for arguments of `VQModel` that are impossible or do not fit each other."""
        check_fields(self.model, VQ_MODEL_RULES, "model.")
        groups = self.model.get("norm_num_groups", 32)  # the default is diffusers'
        if wrong := [width for width in self.model.get("block_out_channels", ()) if width % groups]:
            raise ValueError(
                f"model.block_out_channels={self.model['block_out_channels']}: {wrong[0]} is not a multiple of "
                f"model.norm_num_groups={groups}"
            )

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "ImageTokenizerConfig":
        """Return the configuration of a named size: "small-64" (8 x 8 codes) or "chameleon-512" (32 x 32 codes).

        `overrides` replace fields; those of `model` are merged into it.
        """
        check_names([name], PRESETS, "image tokenizer preset")
        values = {**PRESETS[name], **overrides}
        values["model"] = {**PRESETS[name]["model"], **overrides.get("model", {})}
        return cls(**values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ImageTokenizerConfig":
        """Make a configuration of the content of `image_tokenizer_config.json`; ValueError for unknown names."""
        return from_known_fields(cls, values, "image tokenizer")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `image_tokenizer_config.json`."""
        return without_code(without_defaults(self, "image_processor", "max_kept_pixels"))

    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of `VQModel`: `model`, the channels of folded patches, and one block for each scale."""
        arguments = dict(self.model)
        if "block_out_channels" not in arguments:
            raise ValueError(f"model={self.model} has no block_out_channels: give the channels of each scale")

        # `VQModel` takes folded patches in the place of pixels, and the kind of block for each scale.
        scales = len(arguments["block_out_channels"])
        channels = 3 * self.patch_size**2
        arguments |= {"in_channels": channels, "out_channels": channels, "sample_size": self.image_size[0]}
        arguments["down_block_types"] = ("DownEncoderBlock2D",) * scales
        arguments["up_block_types"] = ("UpDecoderBlock2D",) * scales
        # Lists, as JSON has them, become the tuples of its own signature.
        return {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}


class MoTImageTokenizer:
    """Encode pictures as grids of codes in [0, num_codes), and decode such grids.

    Args:
        config: how pictures become pixels, and the sizes of the model.
        model: diffusers' `VQModel` or transformers' `ChameleonVQVAE`; default: an untrained one. It stays in float32
            and evaluation mode, so that codes do not depend on the dtype in which the weights were stored.

    Example, with an untrained tokenizer:
        >>> tokenizer = MoTImageTokenizer.from_preset("small-64")
        >>> (grid,) = tokenizer.encode([np.zeros((100, 80, 3), np.uint8)])
        >>> grid.shape, tokenizer.decode([grid])[0].size
        (torch.Size([8, 8]), (64, 64))
    """

    def __init__(self, config: ImageTokenizerConfig, model: nn.Module | None = None):
        self.config = config
        self.model = (model if model is not None else build_model(config)).float().eval().requires_grad_(False)
        for side in config.image_size:
            if config.fit != "keep" and side % self.downsampling:
                raise ValueError(
                    f"image_size={config.image_size} is not divisible by the down-sampling, {self.downsampling}"
                )

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MoTImageTokenizer":
        """Make an untrained tokenizer of a named size; see `ImageTokenizerConfig.from_preset`."""
        return cls(ImageTokenizerConfig.from_preset(name, **overrides))

    # ------------------------------------------------------------------------------------------------------------ sizes

    @property
    def codebook(self) -> torch.Tensor:
        """The vectors that latents are rounded to.  (K, C)"""
        return self.model.quantize.embedding.weight

    @property
    def num_codes(self) -> int:
        """K, the number of codes."""
        return self.codebook.shape[0]

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        if self.config.backend == "chameleon":
            return 2 ** (len(self.model.config.channel_multiplier) - 1)
        return self.config.patch_size * 2 ** (len(self.model.config.block_out_channels) - 1)

    @property
    def can_decode(self) -> bool:
        """True if there is a decoder; transformers' `ChameleonVQVAE` has none."""
        return self.config.backend != "chameleon"

    @property
    def image_grid(self) -> list[int] | None:
        """[h, w] of every image, or None if pictures keep their size."""
        if self.config.fit == "keep":
            return None
        return [side // self.downsampling for side in self.config.image_size]

    @property
    def device(self) -> torch.device:
        """Where the model is, and codes are computed."""
        return self.codebook.device

    def to(self, device) -> "MoTImageTokenizer":
        """Move the model to a device, in place."""
        self.model.to(device)
        return self

    # --------------------------------------------------------------------------------------------------------- encoding

    def preprocess(self, image: Any, size: tuple[int, int] | None = None, **access: bool) -> torch.Tensor:
        """Read one picture and fit it.  -> (3, H, W) in [-1, 1]

        Args:
            image: a picture in any form that `load_picture` takes.
            size: (height, width) in place of `image_size`.
            access: `allow_urls` and `allow_paths` of `load_picture`.
        """
        # A picture for Chameleon is scaled and cut by its own processor.
        picture = load_picture(image, *pixel_limit(self.config, size), **access)
        if self.config.image_processor is not None:
            return self._preprocess_for_chameleon(picture, size)

        # A kept picture must have sides that divide into codes.
        pixels = fit_picture(picture, self.config, size)
        for side in pixels.shape[:2]:
            if side % self.downsampling:
                raise ValueError(
                    f"{describe_source(image)} makes {pixels.shape[0]} x {pixels.shape[1]} pixels, not divisible by "
                    f"the down-sampling, {self.downsampling}; use fit='crop' or 'pad', or give another size"
                )
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1

    def _preprocess_for_chameleon(self, picture: Image.Image, size: tuple[int, int] | None) -> torch.Tensor:
        """Make pixels as transformers' processor for Chameleon does."""
        from transformers import ChameleonImageProcessorPil

        # A given size is that of the picture already, so it is neither scaled nor cut.
        height, width = size or self.config.image_size
        settings = self.config.image_processor
        if size is not None and (picture.height, picture.width) != tuple(size):
            raise ValueError(
                f"{describe_source(picture)} for size={tuple(size)}: with an image_processor pictures are scaled to "
                f"image_size={self.config.image_size} only; give it in the size wanted, or leave size out"
            )
        if size is not None:
            settings = settings | {"do_resize": False, "crop_size": {"height": height, "width": width}}

        # The settings are a stranger's, so anything may be wrong with them.
        try:
            process = ChameleonImageProcessorPil(**settings)
            pixels = process(cut_long_side(picture), return_tensors="pt")["pixel_values"][0]
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"image_processor={settings} cannot read {describe_source(picture)}: {error}") from error
        if pixels.shape != (3, height, width):
            raise ValueError(
                f"image_processor={settings} makes {tuple(pixels.shape)} of {describe_source(picture)}, not "
                f"(3, {height}, {width}); its crop_size must be image_size={self.config.image_size}"
            )
        return pixels.float()

    @torch.no_grad()
    def encode(self, images: list[Any], size: tuple[int, int] | None = None, **access: bool) -> list[torch.Tensor]:
        """Encode each picture as an image: a grid of codes (h, w), int64, row-major.

        Args:
            images: pictures in any form that `load_picture` takes.
            size: (height, width) in place of `image_size`.
            access: `allow_urls` and `allow_paths` of `load_picture`.
        """
        if not isinstance(images, (list, tuple)):
            raise ValueError(f"encode takes a list of pictures, not {type(images).__name__}")

        # Pictures of one size are encoded together, others one by one.
        grids: list[torch.Tensor] = []
        for start in range(0, len(images), self.config.batch_size):
            batch = [self.preprocess(image, size, **access) for image in images[start : start + self.config.batch_size]]
            if len({pixels.shape for pixels in batch}) == 1:
                grids += list(self.encode_pixels(torch.stack(batch)))
            else:
                grids += [self.encode_pixels(pixels[None])[0] for pixels in batch]
        return grids

    @without_autocast()
    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels in [-1, 1] as codes.  (N, 3, H, W) -> (N, h, w)"""
        latents = self.latents(pixels.to(self.device))
        count, channels, h, w = latents.shape
        flat = latents.permute(0, 2, 3, 1).reshape(-1, channels)
        return nearest_code(flat, self.codebook).view(count, h, w).cpu()

    @without_autocast()
    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the output of the encoder before it is rounded to codes.  (N, 3, H, W) -> (N, C, h, w)"""
        if self.config.backend == "chameleon":
            return self.model.quant_conv(self.model.encoder(pixels))
        return self.model.encode(fold(pixels, self.config.patch_size)).latents

    # --------------------------------------------------------------------------------------------------------- decoding

    @torch.no_grad()
    def decode(self, grids: list[torch.Tensor]) -> list[Image.Image]:
        """Decode each grid of codes (h, w) to a picture; grids may differ in size.

        Raises:
            ValueError: a grid of another shape, or codes outside of [0, num_codes).
            NotImplementedError: there is no decoder.
        """
        pictures = []
        for grid in grids:
            # Refuse codes before they index the codebook, on a device or not.
            grid = torch.as_tensor(grid, dtype=torch.long)
            if grid.ndim != 2 or grid.numel() == 0:
                raise ValueError(f"a grid of codes must have shape (h, w), not {tuple(grid.shape)}")
            if int(grid.min()) < 0 or int(grid.max()) >= self.num_codes:
                raise ValueError(
                    f"image codes lie in [0, {self.num_codes}), not [{int(grid.min())}, {int(grid.max())}]"
                )

            # Round the pixels to the nearest of 256 values.
            pixels = self.decode_codes(grid[None].to(self.device))[0].clamp(-1, 1)
            array = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            pictures.append(Image.fromarray(array))
        return pictures

    @without_autocast()
    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode codes to pixels, around [-1, 1] and not clamped.  (N, h, w) -> (N, 3, H, W)"""
        if not self.can_decode:
            raise NotImplementedError(
                "transformers' ChameleonVQVAE holds no decoder, so its codes cannot be turned back into pictures; give "
                "the weights of one to `python -m conversion.import_chameleon --image-decoder`, or use a tokenizer "
                "with backend='diffusers'"
            )
        quantised = self.codebook[codes].permute(0, 3, 1, 2)
        return unfold(self.model.decode(quantised, force_not_quantize=True).sample, self.config.patch_size)

    def blank_codes(self, grid: tuple[int, int]) -> list[int]:
        """Return the codes of a picture of background alone, row by row, for a grid of (h, w) codes."""
        height, width = (side * self.downsampling for side in grid)
        blank = np.broadcast_to(np.array(self.config.background, np.uint8), (height, width, 3))
        return self.encode([blank], size=(height, width))[0].flatten().tolist()

    # ----------------------------------------------------------------------------------------------- saving and loading

    def fingerprint(self) -> str:
        """Return the sha256 of the configuration and the weights."""
        return fingerprint(self.config.to_dict(), self.model.state_dict())

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write a folder in the layout of the model's own library, and `image_tokenizer_config.json` beside it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)

        # The weights in memory are rounded too, so that the saved and the loaded tokenizer give the same codes.
        nn.Module.to(self.model, getattr(torch, self.config.storage_dtype))
        # Neither code nor the path of the source goes into the saved configuration.
        if self.config.backend == "diffusers":
            self.model.register_to_config(_name_or_path=None)
            self.model._internal_dict = type(self.model.config)(without_code(self.model.config))
        else:
            forget_code(self.model.config)
        self.model.save_pretrained(directory)
        self.model.float()
        text = json.dumps(self.config.to_dict(), indent=2) + "\n"
        (directory / IMAGE_TOKENIZER_CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, subfolder: str = "", **hub_kwargs) -> "MoTImageTokenizer":
        """Load a folder or Hub repository that `save_pretrained` wrote."""
        values = read_hub_json(name_or_path, IMAGE_TOKENIZER_CONFIG_NAME, subfolder, **hub_kwargs)
        config = ImageTokenizerConfig.from_dict(values)
        return cls(config, load_model(config.backend, name_or_path, subfolder=subfolder, **hub_kwargs))

    @classmethod
    def from_backend(
        cls, name_or_path: str, backend: str, config: ImageTokenizerConfig, **kwargs
    ) -> "MoTImageTokenizer":
        """Make a tokenizer around existing weights.

        Args:
            name_or_path: a folder or Hub repository of the model's own library.
            backend: "diffusers" for a `VQModel`, "chameleon" for a `ChameleonVQVAE`.
            kwargs: arguments of its `from_pretrained`.
        """
        values = {**config.to_dict(), "backend": backend}
        return cls(ImageTokenizerConfig.from_dict(values), load_model(backend, name_or_path, **kwargs))


# ----------------------------------------------------------------------------------------------------- codes and models


def nearest_code(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Find the nearest row of the codebook by Euclidean distance, the first of equals.  (M, C), (K, C) -> (M,)"""
    # |x - c|^2 without |x|^2, which is the same for all codes; in chunks, so that the products fit into memory.
    codebook = codebook.float()
    offsets = codebook.square().sum(1)
    chunks = latents.float().split(65_536)
    return torch.cat([torch.addmm(offsets, chunk, codebook.T, alpha=-2).argmin(1) for chunk in chunks])


def fold(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Fold patches of p x p pixels into channels.  (N, 3, H, W) -> (N, 3 p^2, H / p, W / p)"""
    return nn.functional.pixel_unshuffle(pixels, patch_size) if patch_size > 1 else pixels


def unfold(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Unfold channels to patches of p x p pixels.  (N, 3 p^2, H / p, W / p) -> (N, 3, H, W)"""
    return nn.functional.pixel_shuffle(pixels, patch_size) if patch_size > 1 else pixels


def build_model(config: ImageTokenizerConfig) -> nn.Module:
    """Make an untrained model of the configured size."""
    if config.backend == "chameleon":
        from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

        return ChameleonVQVAE(ChameleonVQVAEConfig(**config.model))
    from diffusers import VQModel

    return VQModel(**config.model_arguments())


def load_model(backend: str, name_or_path: str | os.PathLike, subfolder: str = "", **hub_kwargs) -> nn.Module:
    """Load a model in float32 from a folder or Hub repository; nothing is unpickled.

    Raises:
        OSError: the model is not there.
        ValueError: its configuration or its weights are damaged, or do not fit each other.
    """
    if backend == "chameleon":
        from transformers import ChameleonVQVAE as model_class

        kwargs = {"dtype": torch.float32, "subfolder": subfolder}
    else:
        from diffusers import VQModel as model_class

        kwargs = {"torch_dtype": torch.float32, "subfolder": subfolder or None, "low_cpu_mem_usage": False}
    with reading(f"the image tokenizer of {name_or_path} cannot be read: config.json or its weights"):
        return model_class.from_pretrained(str(name_or_path), **{"use_safetensors": True, **kwargs, **hub_kwargs})


# ----------------------------------- settings and fingerprints, also of the tokenizer of speech and the image processor


def from_known_fields(cls: type, values: dict[str, Any], what: str) -> Any:
    """Make a dataclass from a mapping; ValueError, by name, for keys that are not fields."""
    if not isinstance(values, dict):
        raise ValueError(
            f"settings of the {what} are {type(values).__name__}, and must be a mapping of names to values"
        )
    check_names(values, [f.name for f in fields(cls)], f"{what} setting")
    return cls(**values)


def without_defaults(config: Any, *names: str) -> dict[str, Any]:
    """Return the fields of a dataclass, but `names` only where they differ from their defaults.

    These fields came later: leaving out their defaults keeps the fingerprints of older settings.
    """
    defaults = {field.name: field.default for field in fields(config)}
    return {name: value for name, value in asdict(config).items() if name not in names or value != defaults[name]}


def fingerprint(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Return the sha256 of a configuration and named tensors."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_hub_json(name_or_path: str | os.PathLike, filename: str, subfolder: str = "", **hub_kwargs) -> dict[str, Any]:
    """Read the object of a JSON file from a local folder or Hub repository.

    Raises:
        OSError: the file is not there.
        ValueError: the file holds no JSON object.
    """
    from transformers.utils import cached_file

    return read_json_object(Path(cached_file(str(name_or_path), filename, subfolder=subfolder, **hub_kwargs)))
