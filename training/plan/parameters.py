"""Count the parameters of a model by part and tower, and list the units in which FSDP2 gathers them."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from modeling_mot import MoTConfig, MoTPreTrainedModel
from modeling_mot.tower_routing import PerTower
from training.model.building import MODEL_CLASSES
from training.optimization import set_trained


SHARED = "shared"
PARTS = ("embeddings", "attention", "feed-forward", "norms", "output layer", "patchifier", "encoders", "adapters")
FROZEN = "VAE (frozen)"


def meta_model(config: MoTConfig, **trained: Any) -> MoTPreTrainedModel:
    """Build the model of a configuration on the meta device: all its parts, without memory.

    Args:
        trained: arguments of `set_trained`, for a model as a recipe trains it.
    """
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type]._from_config(config, dtype=torch.float32)
        set_trained(model, **trained)
        return model


def count_parameters(model: MoTPreTrainedModel) -> dict[str, Counter]:
    """Return part -> tower -> number of parameters. Parameters of all towers stand under `shared`; ties count once.

    The scales of weights in 8 bits are no parameters.
    """
    towers = {
        f"{path}.{tower}": tower
        for path, module in model.named_modules()
        if isinstance(module, PerTower)
        for tower in module
    }
    counts = {part: Counter() for part in (*PARTS, FROZEN)}
    for name, parameter in model.named_parameters():
        if name.endswith(".scale"):
            continue
        prefixes = accumulate(name.split("."), lambda path, word: f"{path}.{word}")
        tower = next((towers[path] for path in prefixes if path in towers), SHARED)
        counts[_part_of(name)][tower] += parameter.numel()
    return {part: towers for part, towers in counts.items() if towers}


def _part_of(name: str) -> str:
    if name.startswith("vae."):
        return FROZEN
    if name.startswith("patchifier."):
        return "patchifier"
    if name.startswith("encoders."):
        return "encoders"
    if ".lora_" in name:
        return "adapters"
    if name.startswith("lm_head."):
        return "output layer"
    if "embed_tokens." in name:
        return "embeddings"
    if ".mlp." in name:
        return "feed-forward"
    return "norms" if "norm" in name else "attention"


# ------------------------------------------------------------------------------------------------------- units of FSDP2


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together.

    Attributes:
        kind: layer, embeddings or root.
        shapes: the shapes of the parameters.
        stays: whether the parameters stay gathered from the forward to the backward.
    """

    kind: str
    shapes: tuple[torch.Size, ...]
    stays: bool

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))

    def shard_numel(self, processes: int) -> int:
        """Number of elements that each of `processes` holds: parameters are cut along dimension 0, rounded up."""
        return sum(-(-shape[0] // processes) * math.prod(shape[1:]) for shape in self.shapes)


def fsdp_units(model: MoTPreTrainedModel, reshard: bool = True, trained: bool = False) -> list[Unit]:
    """List the units that `training.world.shard_model` makes: each layer, the embeddings, and the rest.

    Args:
        reshard: whether units are gathered twice, for the forward and for the backward.
        trained: leave out what is frozen.

    The rest stays gathered from the forward to the backward; the output layer belongs to it, and so do tied embeddings.
    """
    left = {
        name: value.shape
        for name, value in model.named_parameters()
        if not name.startswith("vae.") and (value.requires_grad or not trained)
    }

    def take(*prefixes: str) -> tuple[torch.Size, ...]:
        return tuple(left.pop(name) for name in list(left) if name.startswith(prefixes))

    units = [Unit("layer", take(f"model.layers.{index}."), not reshard) for index in range(len(model.model.layers))]
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        units.append(Unit("embeddings", take("model.embed_tokens."), not reshard))
    return [*units, Unit("root", take(""), True)]
