"""What of a model is left as it is: whole towers, and the first rows of the vocabulary (LMFusion, arXiv 2412.15188).

A tower that is frozen takes no part in the optimizer. The rows of a vocabulary are one parameter with those that are
trained, of images for instance, so the gradient of the held ones is set to zero and the parameter does not decay: AdamW
then leaves them as they are, bit for bit. Text whose context is text alone then has the logits that it had.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from modeling_mot import MoTPreTrainedModel
from modeling_mot.configuration_mot import SHARED
from training.config import ConfigError


def freeze_towers(model: MoTPreTrainedModel, towers: list[str] | None) -> None:
    """Parameters of these towers get no gradient, in place; before the model is sharded.

    Args:
        towers: of `model.config.tower_names`, or `shared`, for the parts that towers have in common.

    Raises:
        ConfigError: no such tower, or nothing would be left to train in the layers.
    """
    names = {*model.config.tower_names, *(part for part in _parts(model) if part == SHARED)}
    if unknown := [tower for tower in towers or [] if tower not in names]:
        raise ConfigError(f"train.frozen_towers names {unknown[0]!r}; the model has {', '.join(sorted(names))}")
    if towers and names <= set(towers):
        raise ConfigError(f"train.frozen_towers={towers} are all towers of the model; leave one to train")
    for name, parameter in model.named_parameters():
        if not set(name.split(".")).isdisjoint(towers or ()):
            parameter.requires_grad_(False)


def _parts(model: MoTPreTrainedModel) -> set[str]:
    return {name for part in ("attention", "feed_forward", "norm") for name in model.config.part_names(part)}


class HeldRows:
    """The first rows of embeddings and output layer keep their values, where `parameters` do not decay.

    Args:
        model: on its device, and sharded where it is to be.
        count: how many; None: none.

    Raises:
        ConfigError: more than there are.
    """

    def __init__(self, model: MoTPreTrainedModel, count: int | None):
        if count is not None and count > model.config.vocab_size:
            raise ConfigError(
                f"train.frozen_vocabulary={count} rows, but the model has vocab_size={model.config.vocab_size}"
            )
        weights = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        self.parameters = list({id(weight): weight for weight in weights}.values()) if count else []  # tied: one
        self.count = count
        self._masks: dict[int, torch.Tensor] = {}

    def clear_gradients(self) -> None:
        """Set the gradient of the held rows to zero, before norms are taken of it."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self._mask(parameter))

    def _mask(self, parameter: nn.Parameter) -> torch.Tensor:
        """1 for rows that are trained, 0 for held ones; sharded as the gradient is.  -> (V, 1)"""
        if id(parameter) not in self._masks:
            mask = torch.ones(parameter.shape[0], 1, device=parameter.device)
            mask[: self.count] = 0
            if isinstance(parameter, DTensor):
                mask = distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)
            self._masks[id(parameter)] = mask
        return self._masks[id(parameter)]
