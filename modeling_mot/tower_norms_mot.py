"""The norms of towers. RMSNorm runs for all of them in one go: only its weights are a tower's own."""

# K towers, T rows of all towers, D size of what is normalised

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .configuration_mot import MoTConfig
from .modality_routing import ModalityRouting, PerTower, join
from .plain_modules_mot import has_whole_weight, is_plain
from .precision_mot import without_autocast


class MoTHeadLayerNorm(nn.Module):
    """Chameleon's QK-norm: LayerNorm over each head with weights of that head.  (T, H, D/H) -> same"""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(heads, heads.shape[-1:], eps=1e-5) * self.weight + self.bias


def rms_norm(config: MoTConfig, size: int) -> nn.Module:
    norm = GemmaRMSNorm if config.norm_offset else LlamaRMSNorm
    return norm(size, eps=config.rms_norm_eps)


def qk_norm(config: MoTConfig, num_heads: int) -> nn.Module:
    if config.qk_norm == "layer":
        return MoTHeadLayerNorm(num_heads, config.head_dim)
    return rms_norm(config, config.head_dim * (num_heads if config.qk_norm == "rms_all_heads" else 1))


def _forward(rows, counts, epsilon, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The operations of LlamaRMSNorm in their order.  -> (T, ..., D), and 1 / RMS, (T, ..., 1)"""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    out = (wide * scale).to(rows.dtype).to(torch.promote_types(rows.dtype, weights[0].dtype))
    begin = 0
    for count, weight in zip(counts, weights):
        # Not views of `split`: an exported graph could not change these in place with gradients on.
        out.narrow(0, begin, count).mul_(weight)
        begin += count
    return out, scale


class _RMSNorm(torch.autograd.Function):
    """With a backward of half the operations that autograd would make of the forward."""

    @staticmethod
    def forward(rows, counts, epsilon, *weights):
        return _forward(rows, counts, epsilon, weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, ctx.counts, _, *weights = inputs
        _, scale = output
        ctx.mark_non_differentiable(scale)
        ctx.save_for_backward(rows, scale, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        rows, scale, *weights = ctx.saved_tensors
        with without_autocast(rows.device.type):
            grad = grad.to(scale.dtype, copy=True)
            normalised = rows.to(scale.dtype) * scale
            products = grad * normalised
            grad_weights, inner = [], []
            for part, product, weight in zip(grad.split(ctx.counts), products.split(ctx.counts), weights):
                grad_weights.append(product.flatten(0, -2).sum(0).to(weight.dtype))
                weight = weight.to(grad.dtype)
                inner.append(product @ weight)
                part *= weight
            # With the gradient g of the normalised rows x: (g - x mean(g x)) / RMS
            inner = torch.cat(inner).unsqueeze(-1)
            grad.addcmul_(normalised, inner, value=-1 / rows.shape[-1]).mul_(scale)
        return grad.to(rows.dtype), None, None, *grad_weights


class TowerNorms(PerTower):
    """The norms of all towers, or one named `shared`, on rows sorted by tower."""

    def forward(self, rows: torch.Tensor, routing: ModalityRouting) -> torch.Tensor:
        """(T, ..., D) -> the same"""
        shared = "shared" in self
        norms = [self["shared"]] if shared else [self[tower] for tower in routing.towers]
        if not all(is_plain(norm, LlamaRMSNorm) and has_whole_weight(norm) for norm in norms):
            return join(super().forward(routing.split(rows)))
        counts = (len(rows),) if shared else routing.counts
        epsilon, weights = norms[0].variance_epsilon, [norm.weight for norm in norms]
        if torch.is_grad_enabled():
            return _RMSNorm.apply(rows, counts, epsilon, *weights)[0]
        return _forward(rows, counts, epsilon, weights)[0]
