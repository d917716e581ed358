"""A Transfusion model and made-up rows with continuous images, small enough for tests of the trainer."""

import hashlib

import numpy as np
import torch

from modeling_mot import MoTTransfusionConfig, MoTTransfusionModel
from training.data.documents import Vocabulary, build_row, compose
from training.optimization import OptimizerConfig

from .tiny import tiny_trainer


BOS, EOS, BOI, EOI, PATCH = 1, 2, 3, 4, 5
VOCABULARY = Vocabulary(
    ("text", "image"), bounds=(0, 40), pad=0, bos=BOS, eos=EOS, begins=(BOI,), ends=(EOI,), image_token=PATCH
)
ROW_LENGTH = 32
# Adam's first steps are signs of the gradient unless epsilon is large, and rounding flips those of zeros.
OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, eps=1e-3)


def tiny_config(variant: str = "mot", **fields) -> MoTTransfusionConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": BOS}
    markers = {"eos_token_id": EOS, "boi_token_id": BOI, "eoi_token_id": EOI, "image_token_id": PATCH}
    latents = {"latent_channels": 2, "latent_size": [4, 4], "unet_channels": [8, 16], "unet_layers": 1}
    values = sizes | tokens | markers | latents | {"unet_norm_groups": 4} | fields
    return MoTTransfusionConfig.from_variant(variant, modalities=["text", "image"], **values)


def tiny_model(variant: str = "mot", seed: int = 0, **fields) -> MoTTransfusionModel:
    torch.manual_seed(seed)
    return MoTTransfusionModel(tiny_config(variant, **fields)).train()


def picture_tokens(height: int = 4, width: int = 4, patch_size: int = 2) -> np.ndarray:
    """BOI, a placeholder for each patch, EOI."""
    return np.array([BOI, *[PATCH] * (height * width // patch_size**2), EOI])


class PictureStream:
    """Endless rows, each a function of (seed, index), of four kinds by turns: a caption and a picture beside a picture
    and its caption; a picture to be edited, what is to be done, and the outcome; text alone; pictures of two sizes."""

    def __init__(self, seed: int = 0, clean_copies: bool = False):
        self.seed, self.clean_copies = seed, clean_copies

    def rows(self, start: int = 0):
        while True:
            yield self.row(start)
            start += 1

    def position(self, index: int) -> dict:
        return {}

    def restore(self, position: dict) -> None:
        pass

    def row(self, index: int) -> dict:
        random = np.random.default_rng([self.seed, index])
        # A colour for each picture, which the text before or after it names.
        colour = int(random.integers(6))

        def text(length=2):
            return np.array([10 + colour] * length)

        def picture(height=4, width=4):
            return (random.standard_normal((2, height, width)) * 0.3 + colour - 2.5).astype(np.float16)

        def document(spans, images, targets="all"):
            return compose(spans, images, VOCABULARY, targets, self.clean_copies)

        small, wide = picture_tokens(), picture_tokens(4, 8)
        documents = {
            0: lambda: [document([text(), small], [picture()]), document([small, text(3)], [picture()])],
            1: lambda: [document([small, text(1), small], [picture(), picture()], targets="last")],
            2: lambda: [document([text(4)], []), document([text(7)], [])],
            3: lambda: [document([text(1), wide, small], [picture(4, 8), picture()])],
        }[index % 4]()
        return build_row(documents, ROW_LENGTH, VOCABULARY)


def generator_of_row(seed: int | str, number: int) -> torch.Generator:
    """Seeded by the first 56 bits of the SHA-256 of "seed/number"."""
    return torch.Generator().manual_seed(int(hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()[:14], 16))


def transfusion_trainer(folder, model=None, stream=None, **options):
    """A `tiny_trainer` of a Transfusion model."""
    return tiny_trainer(
        folder, model or tiny_model(), stream or PictureStream(), **({"optimizer": OPTIMIZER} | options)
    )
