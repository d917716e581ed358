"""The costs of a model: exact FLOPs in closed form, the peak of a device, and the size that a machine can train.

A matrix product of (m, k) by (k, n) counts 2mkn. Norms, activations, rotary embeddings and softmax are not counted, as
in torch's own counter, with which these figures agree exactly. Attention is counted in full (every query against every
key of its row, masked or not), as torch's counter and the usual definition of MFU do; a kernel that skips masked keys
is not credited with less work.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_mot import MoTConfig, MoTTransfusionConfig
from modeling_mot.configuration_presets import PRESETS
from modeling_mot.modeling_mot_transfusion import build_patchifier
from training.config import ConfigError


if TYPE_CHECKING:
    from training.recipe import ModelConfig, Recipe


# L row length

# ------------------------------------------------------------------------------------------------- the FLOPs of a model


def _layer_flops(config: MoTConfig, modality: str, row_length: int) -> int:
    """Count the FLOPs of one token in one layer: in its tower, and in the attention over its row."""
    tower = config.tower_config(config.towers[modality])
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projections = 2 * tower.hidden_size * (2 * queries + 2 * keys)
    feed_forward = (3 if tower.gated_mlp else 2) * 2 * tower.hidden_size * tower.intermediate_size
    readers = len(config.tower_names) if config.cross_key_norm else 1  # each tower reads keys of its own
    router = 2 * tower.hidden_size * config.num_experts if _is_mixture(config, modality) else 0
    return projections + readers * 4 * row_length * queries + feed_forward + router


def _is_mixture(config: MoTConfig, modality: str) -> bool:
    names = config.part_names("feed_forward")
    return (names[0] if len(names) == 1 else config.towers[modality]) in config.moe_towers


def patchifier_flops(config: MoTTransfusionConfig, size: tuple[int, int] | None = None) -> int:
    """Count the FLOPs of the patchifier's way in and out, for an image of `size` latents (default: `latent_size`).

    Torch counts them on tensors without data. The frozen VAE is not counted, since latents are encoded once.
    """
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


def encoder_flops(config: MoTTransfusionConfig, modality: str) -> int:
    """Count the FLOPs of an encoder with its connector, for a picture that fills its table of positions."""
    fields = config.encoders[config.continuous_modalities[modality]["encoder"]]
    (rows, columns), width, inner = fields["table_size"], fields["hidden_size"], fields["intermediate_size"]
    length, depth = rows * columns, fields["num_hidden_layers"] - fields["drop_last_layers"]
    layer = 2 * width * (4 * width + 2 * inner) + 4 * length * width
    patch = 2 * width * fields["patch_size"] ** 2 * fields["num_channels"]
    connector = 2 * config.hidden_size * (width + config.hidden_size)
    return length * (patch + depth * layer + connector)


def _picture_flops(config: MoTConfig) -> dict[str, tuple[int, int]]:
    """Modality -> (FLOPs of a picture beside the transformer, its tokens), for modalities that are no tokens."""
    if not isinstance(config, MoTTransfusionConfig):
        return {}
    pictures = {"image": (patchifier_flops(config), config.image_length(*config.latent_size))}
    for modality, fields in (config.continuous_modalities or {}).items():
        rows, columns = config.encoders[fields["encoder"]]["table_size"]
        pictures[modality] = encoder_flops(config, modality), rows * columns
    return pictures


def forward_flops_per_token(config: MoTConfig, row_length: int) -> dict[str, int]:
    """Count the FLOPs of one token's forward, by modality, in a row of `row_length`.

    The output layer is included, and for images that are diffused a token's share of the patchifier at `latent_size`,
    for features a token's share of the encoder at the largest picture.
    Experts choose exactly as many tokens as there are, so a mixture costs one expert a token plus its router; the
    router's product is the only difference between the variants.
    """
    beside = dict.fromkeys(config.modalities, head_flops(config))
    for modality, (flops, length) in _picture_flops(config).items():
        beside[modality] += flops // length
    return {
        modality: config.num_hidden_layers * _layer_flops(config, modality, row_length) + beside[modality]
        for modality in config.modalities
    }


def head_flops(config: MoTConfig) -> int:
    """Count the output layer's share of `forward_flops_per_token`."""
    return 2 * config.hidden_size * config.vocab_size


def forward_flops(config: MoTConfig, tokens: Mapping[str, int], row_length: int) -> int:
    """Count the FLOPs of a forward over `tokens` (modality -> number) in rows of `row_length`.

    Images that are diffused count as if all had `latent_size`, pictures of encoders as if all filled their table.
    """
    per_token = forward_flops_per_token(config, row_length)
    total = sum(per_token[modality] * count for modality, count in tokens.items())
    for modality, (flops, length) in _picture_flops(config).items():
        # A token's share was rounded down.
        total += flops % length * tokens.get(modality, 0) // length
    return total


def training_flops(config: MoTConfig, tokens: Mapping[str, int], row_length: int) -> int:
    """Count the FLOPs of a forward and backward: for each product of the forward, the backward makes two."""
    return 3 * forward_flops(config, tokens, row_length)


def recomputed_flops(config: MoTConfig, tokens: Mapping[str, int], row_length: int) -> int:
    """Count the most FLOPs that gradient checkpointing adds: a forward without the output layer.

    PyTorch does not recompute operations after the last tensor that the backward needs.
    """
    return forward_flops(config, tokens, row_length) - sum(tokens.values()) * head_flops(config)


# ------------------------------------------------------------------------------------------------- the peak of a device


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


# A device that is not listed is measured.
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


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> tuple[float, str]:
    """Return (FLOP/s, source of the figure) of a device, of which MFU is a share.

    A known accelerator has its data sheet's figure for 16-bit products. Any other device, such as a CPU, is measured by
    square matrix products in `dtype`, for `seconds`; the fastest counts.
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


# ------------------------------------------------------------------------------------ the size that a machine can train

SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads")
# The sizes to choose from, in rising order: rows of the paper's Table 1.
_SIZE_NAMES = ("chameleon-37m", "chameleon-94m", "chameleon-443m", "chameleon-1.5b", "chameleon-7b")
SIZES = {name: {field: PRESETS[name][field] for field in SIZE_FIELDS} for name in _SIZE_NAMES}
_STATE_BYTES = 16  # of a parameter in float32: itself, its gradient and AdamW's two moments
_FROZEN_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a parameter that is not trained
_ACTIVATION_BYTES = 80  # of a value of the residual stream in one layer, about
_BATCH_BYTES = 40  # of a token: five integers
_STEP_SECONDS = 10.0


@dataclass(frozen=True)
class Budget:
    """The memory, time and tokens that a run has for its model.

    Attributes:
        memory: bytes of a process, in its accelerator if it has one; None: not known.
        flops: FLOP/s that a process may be expected to reach.
        shards: number of processes that share the state of a model.
        tokens_of_forward, tokens_of_step: of one process.
        tokens_of_run: of all processes, in all steps.
        state_bytes: bytes of a parameter with its gradient and the optimizer's moments.
    """

    memory: float | None
    flops: float
    shards: int
    tokens_of_forward: int
    tokens_of_step: int
    tokens_of_run: int
    state_bytes: int

    @classmethod
    def of(
        cls, recipe: "Recipe", memory: float | None, peak: float, processes: int, shards: int, utilisation: float = 0.4
    ) -> "Budget":
        """Return the budget of a recipe on `processes` devices of `peak` FLOP/s, used to the share `utilisation`."""
        train = recipe.train
        tokens = train.rows * recipe.data.row_length
        accumulation = recipe.micro_batches(processes)
        return cls(
            memory=memory,
            flops=utilisation * peak,
            shards=shards,
            tokens_of_forward=tokens,
            tokens_of_step=tokens * accumulation,
            tokens_of_run=tokens * accumulation * processes * train.steps,
            state_bytes=_FROZEN_BYTES[train.frozen_dtype] if train.frozen_towers or train.lora else _STATE_BYTES,
        )

    def is_enough_for(self, config: MoTConfig) -> bool:
        """True if a model fits well: 7 tenths of the memory, steps of 10 s, and a token for each active parameter.

        The paper's runs have more tokens; a small set is seen many times.
        """
        active = config.num_parameters(active=True)
        values = config.num_hidden_layers * config.widest_hidden_size * _ACTIVATION_BYTES + 8 * config.vocab_size
        needed = self.state_bytes * config.num_parameters() / self.shards + self.tokens_of_forward * values
        return (
            (self.memory is None or needed <= 0.7 * self.memory)
            and 6 * active * self.tokens_of_step <= _STEP_SECONDS * self.flops
            and active <= self.tokens_of_run
        )

    def refuse_impossible(self, config: MoTConfig) -> None:
        """Refuse a state of the model, an input of a layer or batches of a step that alone exceed the memory.

        Raises:
            ConfigError: how much is needed, and by which keys.
        """
        parameters = config.num_parameters()
        needs = {
            f"{parameters:,} parameters with what the optimizer keeps": self.state_bytes * parameters / self.shards,
            f"train.rows x data.row_length = {self.tokens_of_forward:,} tokens of {config.widest_hidden_size} values": (
                4 * self.tokens_of_forward * config.widest_hidden_size
            ),
            f"train.rows x train.accumulation x data.row_length = {self.tokens_of_step:,} tokens": (
                _BATCH_BYTES * self.tokens_of_step
            ),
        }
        what, most = max(needs.items(), key=lambda need: need[1])
        if self.memory is not None and most > self.memory:
            raise ConfigError(
                f"{what} take {most / 1e9:,.1f} GB of a process that has {self.memory / 1e9:,.1f} GB; make them "
                "fewer, or share the model among more processes (python -m training.plan says how many)"
            )


def describe_choice(config: MoTConfig, budget: Budget) -> str:
    """Say which size was chosen, and how to choose another."""
    return (
        f"no size is named: {config.hidden_size} wide, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads, modalities {', '.join(config.modalities)},\n"
        f"    which fits this machine and the {budget.tokens_of_run:,} tokens of the run; for another set\n"
        f"    model.preset ({', '.join(SIZES)}),\n"
        f"    or {', '.join(f'model.{name}' for name in SIZE_FIELDS)}"
    )


def leaves_size_open(model: "ModelConfig") -> bool:
    """True if the model section names no size and nothing that has a size."""
    named = ("preset", "init_from", "intermediate_size", "tower_configs", *SIZE_FIELDS)
    return all(getattr(model, name) is None for name in named)
