"""Count the bytes that autograd keeps of a forward for its backward, on tensors without data.

We count a model of one layer and a model of two. Layers are alike, so n layers keep n times as much as one. The forward
is the model's own, in the precision of the run, with a loss. Attention is PyTorch's fused attention, which keeps
queries, keys, values, outputs and the mask; with `attn_implementation: eager` the probabilities are kept too. Compiled
layers keep less.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_mot import MoTConfig, MoTPreTrainedModel, MoTTransfusionConfig
from modeling_mot.tower_routing import ModalityRouting
from training.model.adapters import FrozenLinear
from training.model.building import MODEL_CLASSES, set_up_layers
from training.optimization import set_trained


# B rows, L row length, T = B * L tokens, V vocabulary, N images, C latent channels


@dataclass(frozen=True)
class Kept:
    """Bytes that the forward of a micro-batch keeps for its backward.

    Attributes:
        layer: bytes of one layer.
        beside: bytes of everything that is not a layer, without tensors of (T, V), which `loss_bytes` counts.
        recomputed_layer, recomputed_beside: the same with gradient checkpointing (a patchifier recomputes too).
        copies: bytes of parameters that autocast has cast; 0 if FSDP holds them in that precision.
    """

    layer: int
    beside: int
    recomputed_layer: int
    recomputed_beside: int
    copies: int

    def of_model(self, layers: int, checkpointing: bool) -> int:
        """Return the bytes of a model; with `checkpointing`, without the layer that is being recomputed."""
        if checkpointing:
            return self.recomputed_beside + layers * self.recomputed_layer
        return self.beside + layers * self.layer


def loss_bytes(config: MoTConfig, tokens: int, bf16: bool) -> int:
    """Return the bytes of (T, V) tensors when the backward begins.

    These are the logits and, in float32, their log-probabilities and the gradients of both. The z-loss has a gradient
    of its own, and keeps the logits in float32.
    """
    each = (2 if bf16 else 4) + 3 * 4
    if config.z_loss_coefficient:
        each += 4 + (4 if bf16 else 0)
    return tokens * config.vocab_size * each


def count_kept(
    config: MoTConfig,
    tokens: Mapping[str, int],
    rows: int,
    *,
    bf16: bool = False,
    sharded: bool = False,
    attention: str | None = None,
    trained: Mapping[str, Any] | None = None,
) -> Kept:
    """Count the bytes that the model of `config` keeps.

    Args:
        tokens: modality -> tokens in a micro-batch of `rows` rows; together rows x row length.
        bf16: whether products are in bf16; else they are in float32.
        sharded: whether FSDP holds the parameters in the precision of products; else autocast casts them.
        attention: `attn_implementation` of the run.
        trained: arguments of `set_trained`; None: everything is trained.
    """
    # The copy of the configuration leaves out what the count does not need.
    config, layers = copy.deepcopy(config), config.num_hidden_layers
    if attention != "eager":
        attention, config.attention_dropout = "sdpa", 0.0  # a CPU has no fused attention with dropout
    if isinstance(config, MoTTransfusionConfig):
        config.vae_config = None  # latents are encoded beforehand
    dtype = torch.bfloat16 if bf16 and sharded else torch.float32

    def forward(number: int, checkpointing: bool) -> tuple[int, int]:
        config.num_hidden_layers = number
        with FakeTensorMode():
            model = MODEL_CLASSES[config.model_type]._from_config(config, dtype=dtype, attn_implementation=attention)
            set_trained(model, **(trained or {}))
            set_up_layers(model, checkpointing, compiled=False)
            batch = made_up_batch(config, tokens, rows)
            return saved_bytes(model.train(), batch, torch.autocast("cpu", torch.bfloat16, enabled=bf16))

    # The second layer's bytes are the difference of the two models; the rest is what the first has more.
    (one, casts), (two, more_casts) = forward(1, False), forward(2, False)
    (one_again, _), (two_again, _) = forward(1, True), forward(2, True)
    return Kept(
        layer=two - one,
        beside=2 * one - two,
        recomputed_layer=two_again - one_again,
        recomputed_beside=2 * one_again - two_again,
        copies=casts + (layers - 1) * (more_casts - casts),
    )


def made_up_batch(config: MoTConfig, tokens: Mapping[str, int], rows: int) -> dict:
    """Make a batch with these numbers of tokens as collation does: with routing, documents, and images with noise."""
    total = sum(tokens.values())
    ids = torch.zeros(rows, total // rows, dtype=torch.long)
    names = tuple(config.tower_names)
    counts = tuple(sum(n for modality, n in tokens.items() if config.towers[modality] == name) for name in names)
    places = None if max(counts) == total else torch.arange(total)
    routing = ModalityRouting(names, counts, places, places, (0,) * len(names))
    batch = {"input_ids": ids, "modality_ids": ids, "document_ids": ids, "labels": ids, "routing": routing}
    if isinstance(config, MoTTransfusionConfig) and (images := images_of(config, tokens)):
        latents = torch.zeros(images, config.latent_channels, *config.latent_size)
        timesteps = torch.zeros(images, dtype=torch.long)
        batch |= {"latents": latents, "noise": latents, "timesteps": timesteps}
        batch["clean_images"] = torch.zeros(images, dtype=torch.bool)
    return batch


def images_of(config: MoTTransfusionConfig, tokens: Mapping[str, int]) -> int:
    """Return how many images of `latent_size` the image tokens of a micro-batch make."""
    return round(tokens.get("image", 0) / config.image_length(*config.latent_size))


class _Casts(TorchDispatchMode):
    """Remembers the copies of some storages that are made in another precision."""

    def __init__(self, storages: set[int]):
        super().__init__()
        self.storages = storages
        self.casts: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if function is torch.ops.aten._to_copy.default and _storage(arguments[0]) in self.storages:
            self.casts[_storage(output)] = output
        return output


def saved_bytes(model: MoTPreTrainedModel, batch: dict, autocast: torch.autocast) -> tuple[int, int]:
    """Return the bytes that autograd keeps of a forward, and the bytes of parameters that autocast has cast.

    The first leave out parameters and tensors of the logits' size.
    """
    # A weight that is held in 8 bits, with its scales, is restored for each product, and not kept.
    parameters = {_storage(parameter) for parameter in model.parameters()}
    held = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    restored = {_storage(parameter) for module in held for parameter in module.parameters(recurse=False)}
    casts, saved = _Casts(parameters - restored), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[_storage(tensor)] = tensor  # held, or another tensor would get the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast, casts:
        output = model(**batch, use_cache=False)
    logits = output.logits.numel()
    own = {
        storage: tensor.untyped_storage().nbytes()
        for storage, tensor in saved.items()
        if storage not in parameters and storage not in casts.casts and tensor.numel() != logits
    }
    return sum(own.values()), sum(tensor.untyped_storage().nbytes() for tensor in casts.casts.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
