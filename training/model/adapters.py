"""Fine-tuning large models in little memory: low-rank adapters beside frozen weights, which may be held in 8 bits.

`add_adapters` puts adapters (LoRA, arXiv 2106.09685) beside the linear layers of towers, and `hold_frozen` gives frozen
weights less precision. Both change a model in place, on any device and on `meta`. `merge_adapters` makes an ordinary
model of it again, and `save_adapters` writes the adapters alone, for PEFT.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import nn

from modeling_mot import MoTPreTrainedModel
from modeling_mot.tower_routing import autocast_dtype
from training.config import ConfigError, check_options, option


# T tokens of a tower, I and O inputs and outputs of a layer, r rank

FrozenDtype = Literal["float32", "bfloat16", "int8"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LoraConfig:
    """Low-rank adapters: what is trained in the place of the weights of towers."""

    towers: list[str] | None = option(None, "towers that get adapters; null: all")
    rank: int = option(16, "inner width of an adapter", ge=1, le=2**14)
    alpha: float = option(32.0, "an adapter's output is scaled by alpha / rank", gt=0, le=10**6)
    modules: list[str] = option(
        factory=lambda: list(PROJECTIONS), doc=f"linear layers that get adapters, out of {', '.join(PROJECTIONS)}"
    )

    def __post_init__(self):
        check_options(self)
        if unknown := [name for name in self.modules if name not in PROJECTIONS]:
            raise ConfigError(f"train.lora.modules has {unknown[0]!r}; there are {', '.join(PROJECTIONS)}")
        if not self.modules:
            raise ConfigError(
                "train.lora.modules is empty; leave it out for all, or set train.lora=null for no adapters"
            )


# ------------------------------------------------------------------------------------------------------------- modules


class _FrozenProduct(torch.autograd.Function):
    """rows @ weight.T, of a weight that is held in another precision and whose gradient nobody wants.

    (T, I), (O, I), (O, 1) or None -> (T, O)
    """

    @staticmethod
    def forward(rows, weight, scale):
        return rows @ _restored(weight, scale, rows.dtype).T

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, scale = inputs
        ctx.save_for_backward(weight, scale)

    @staticmethod
    def backward(ctx, grad):
        # The weight is restored again: kept from the forward, it would take what its precision saves.
        return grad @ _restored(*ctx.saved_tensors, grad.dtype), None, None


def _restored(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight that is computed with.  (O, I), (O, 1) or None -> (O, I)"""
    return weight.to(dtype) if scale is None else weight.to(dtype) * scale.to(dtype)


class FrozenLinear(nn.Module):
    """A linear layer that is not trained, whose weight is held in bfloat16, or in 8 bits with a scale for each output.

    Args:
        linear: the layer; it may be on `meta`.
        dtype: of the weight, `torch.bfloat16` or `torch.int8`.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight, scale = linear.weight.detach(), None
        if dtype == torch.int8:
            # The largest value of each output becomes 127.
            scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            weight = (weight.float() / scale).round()
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(autocast_dtype(rows.device.type) or rows.dtype)
        out = _FrozenProduct.apply(rows, self.weight, self.scale)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def whole_weight(self) -> torch.Tensor:
        """Return the weight that the layer computes with.  -> (O, I) float32"""
        return _restored(self.weight, self.scale, torch.float32)


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter: base(x) + alpha / r * B A x. The parts are named as PEFT names them.

    Args:
        base: an `nn.Linear` or a `FrozenLinear`.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.scaling = alpha / rank
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)  # the model begins as it was

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.base_layer(rows) + self.scaling * self.lora_B(self.lora_A(rows))

    @torch.no_grad()
    def merged(self, weight: torch.Tensor | None = None) -> nn.Linear:
        """Return one layer that computes the same.

        Args:
            weight: of the base before it lost precision, (O, I); None: as it is held.
        """
        base = self.base_layer
        if weight is None:
            weight = base.whole_weight() if isinstance(base, FrozenLinear) else base.weight
        return _linear(weight.float() + self.scaling * (self.lora_B.weight @ self.lora_A.weight).float(), base.bias)


def _linear(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.bias = bias
    return linear


# -------------------------------------------------------------------------------------------------------- whole models


def add_adapters(model: MoTPreTrainedModel, config: LoraConfig) -> None:
    """Freeze the towers that `config` names, and put adapters beside their linear layers.

    Raises:
        ConfigError: towers that the model does not have, or no layer that an adapter could stand beside.
    """
    names = sorted({name for part in ("attention", "feed_forward") for name in model.config.part_names(part)})
    if unknown := [tower for tower in config.towers or [] if tower not in names]:
        raise ConfigError(f"train.lora.towers names {unknown[0]!r}; the model has {', '.join(names)}")
    towers = set(config.towers or names)
    for name, parameter in model.named_parameters():
        if not towers.isdisjoint(name.split(".")):
            parameter.requires_grad_(False)
    adapted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not towers.isdisjoint(name.split("."))
        and not set(config.modules).isdisjoint(name.split("."))
    ]
    if not adapted:
        raise ConfigError(f"train.lora.modules={config.modules}: towers {sorted(towers)} have no such linear layers")
    for name in adapted:
        _replace(model, name, LoraLinear(model.get_submodule(name), config.rank, config.alpha))


def hold_frozen(model: MoTPreTrainedModel, dtype: FrozenDtype) -> None:
    """Hold the frozen weights of linear layers of the transformer and of encoders in `dtype`, all others in float32."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith("vae.") and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for name, module in list(model.named_modules()):
        is_inner = name.startswith(("model.", "encoders."))
        if is_inner and isinstance(module, nn.Linear) and not module.weight.requires_grad:
            _replace(model, name, FrozenLinear(module, getattr(torch, dtype)))


def merge_adapters(model: MoTPreTrainedModel, original: Callable[[str], torch.Tensor] | None = None) -> None:
    """Make an ordinary model of one with adapters and frozen weights, in place.

    Args:
        original: name of a parameter -> its value before `hold_frozen`; None: what is held.
    """
    for name, module in list(model.named_modules()):
        base = module.base_layer if isinstance(module, LoraLinear) else module
        if isinstance(module, (LoraLinear, FrozenLinear)) and not name.endswith(".base_layer"):
            lost = original is not None and isinstance(base, FrozenLinear)
            weight = original(f"{name}.weight") if lost else None
            if isinstance(module, LoraLinear):
                _replace(model, name, module.merged(weight))
            else:
                _replace(model, name, _linear(base.whole_weight() if weight is None else weight, base.bias))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def adapters_of(model: MoTPreTrainedModel) -> dict[str, LoraLinear]:
    """Return the adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def save_adapters(adapters: Mapping[str, LoraLinear], config: LoraConfig, base: str | None, folder: Path) -> None:
    """Write adapters alone, as `peft.PeftModel.from_pretrained` reads them.

    Args:
        adapters: of `adapters_of`.
        base: folder or name of the model that they stand beside.
    """
    tensors = {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part).weight.detach().float().contiguous()
        for name, layer in adapters.items()
        for part in ("lora_A", "lora_B")
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(adapters),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
