"""Exact FLOPs of a MoT forward, in closed form, and the peak they are measured against.

A matrix product of (m, k) by (k, n) counts 2mkn. Norms, activations, rotary embeddings and softmax are not counted, as
in torch's own counter, with which these figures agree exactly. Attention is counted in full (every query against every
key of its row, masked or not), as that counter and the usual definition of MFU do; a kernel that skips what is masked
is not credited with less work.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_mot import MoTConfig, MoTTransfusionConfig
from modeling_mot.modeling_mot_transfusion import build_patchifier


# D hidden size, F feed-forward width, L row length, E experts


@dataclass(frozen=True)
class Gpu:
    """An accelerator as its vendor's data sheet describes it.

    Attributes:
        half, single: dense FLOP/s of products in 16 bits and in float32.
        memory: bytes.
        link: bytes/s that it receives from the other GPUs of its node.
    """

    half: float
    single: float
    memory: float
    link: float
    has_bf16: bool = True


# A device that is not here is measured.
GPUS = {
    "V100": Gpu(125e12, 15.7e12, 32e9, 150e9, has_bf16=False),
    "A100": Gpu(312e12, 19.5e12, 80e9, 300e9),
    "A10G": Gpu(70e12, 31.5e12, 24e9, 32e9),
    "L4": Gpu(121e12, 30.3e12, 24e9, 32e9),
    "L40S": Gpu(362e12, 91.6e12, 48e9, 32e9),
    "H100 PCIe": Gpu(756e12, 51e12, 80e9, 64e9),
    "H100": Gpu(989e12, 67e12, 80e9, 450e9),
    "H200": Gpu(989e12, 67e12, 141e9, 450e9),
    "B200": Gpu(2250e12, 75e12, 180e9, 900e9),
    "RTX 3090": Gpu(71e12, 35.6e12, 24e9, 32e9),
    "RTX 4090": Gpu(165e12, 82.6e12, 24e9, 32e9),
}


def _projection(config: MoTConfig) -> int:
    """Q, K, V and O of one token in one layer."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return 2 * config.hidden_size * (2 * queries + 2 * keys)


def _is_mixture(config: MoTConfig, modality: str) -> bool:
    return _feed_forward_of(config, modality) in config.moe_towers


def _feed_forward_of(config: MoTConfig, modality: str) -> str:
    names = config.part_names("feed_forward")
    return names[0] if len(names) == 1 else config.towers[modality]


def patchifier_flops(config: MoTTransfusionConfig, size: tuple[int, int] | None = None) -> int:
    """FLOPs of the patchifier's way in and out for an image of `size` latents (default: `latent_size`), as torch counts
    them on tensors without data. The frozen VAE's are not counted: latents are encoded once."""
    height, width = size or config.latent_size
    return _patchifier_flops(config.to_json_string(use_diff=False), height, width)


@lru_cache(maxsize=16)
def _patchifier_flops(config_json: str, height: int, width: int) -> int:
    config = MoTTransfusionConfig.from_dict(json.loads(config_json))
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        patchifier = build_patchifier(config)
        latents = torch.empty(1, config.latent_channels, height, width)
        tokens, features = patchifier.embed(latents, torch.zeros(1))
        patchifier.predict(tokens, features, height, width)
    return counter.get_total_flops()


def forward_flops_per_token(config: MoTConfig, row_length: int) -> dict[str, int]:
    """FLOPs of one token's forward by modality, in a row of `row_length`, the output layer included, and for images that
    are diffused a token's share of the patchifier's at `latent_size`.

    Experts choose exactly as many tokens as there are, so a mixture costs one expert a token plus its router; the
    router's product is the only difference between the variants.
    """
    attention = 4 * row_length * config.num_attention_heads * config.head_dim
    feed_forward = 6 * config.hidden_size * config.intermediate_size
    router = 2 * config.hidden_size * config.num_experts
    beside = dict.fromkeys(config.modalities, head_flops(config))
    if isinstance(config, MoTTransfusionConfig):
        beside["image"] += patchifier_flops(config) // config.image_length(*config.latent_size)
    return {
        modality: config.num_hidden_layers
        * (_projection(config) + attention + feed_forward + (router if _is_mixture(config, modality) else 0))
        + beside[modality]
        for modality in config.modalities
    }


def head_flops(config: MoTConfig) -> int:
    """The output layer's share of `forward_flops_per_token`."""
    return 2 * config.hidden_size * config.vocab_size


def forward_flops(config: MoTConfig, tokens: Mapping[str, int], row_length: int) -> int:
    """FLOPs of a forward over `tokens` (modality -> number) in rows of `row_length`; images that are diffused count as so
    many of `latent_size` as have that many tokens."""
    per_token = forward_flops_per_token(config, row_length)
    total = sum(per_token[modality] * count for modality, count in tokens.items())
    if isinstance(config, MoTTransfusionConfig):
        # What a token's share lost to rounding.
        lost = patchifier_flops(config) % config.image_length(*config.latent_size)
        total += lost * tokens.get("image", 0) // config.image_length(*config.latent_size)
    return total


def training_flops(config: MoTConfig, tokens: Mapping[str, int], row_length: int) -> int:
    """FLOPs of a forward and backward: the backward makes two products for each of the forward's."""
    return 3 * forward_flops(config, tokens, row_length)


def recomputed_flops(config: MoTConfig, tokens: Mapping[str, int], row_length: int) -> int:
    """FLOPs that gradient checkpointing spends once more, at most: all of a forward but the output layer. PyTorch leaves
    out what comes after the last tensor that a backward needs."""
    return forward_flops(config, tokens, row_length) - sum(tokens.values()) * head_flops(config)


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> tuple[float, str]:
    """(FLOP/s, where the figure comes from) that MFU is a share of.

    A known accelerator has its data sheet's figure for 16-bit products; anything else, every CPU among it, is measured
    once by square matrix products of 1,024 in `dtype`, of which the fastest counts.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known in sorted(GPUS, key=len, reverse=True):
            if known in name:
                return GPUS[known].half, f"data sheet of {known}"
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"measured by {size}x{size} products in {str(dtype).removeprefix('torch.')}"
