"""Rotary positions: the angles of transformers' Llama, whose frequencies keep their precision, and the turning of heads."""

# B batch, L row length, H heads

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from .precision_mot import without_cast


class MoTRotaryEmbedding(LlamaRotaryEmbedding):
    """Frequencies stay in float32 when a model is cast: rounded to bfloat16 they turn far positions the wrong way."""

    def _apply(self, function, recurse=True):
        return super()._apply(without_cast(function), recurse)


class Rotary(torch.autograd.Function):
    """RoPE as transformers' Llama computes it. The backward turns the other way, in as many operations."""

    @staticmethod
    def forward(heads, cosines, sines):
        return heads * cosines + rotate_half(heads) * sines

    @staticmethod
    def setup_context(ctx, inputs, output):
        heads, cosines, sines = inputs
        ctx.save_for_backward(cosines, sines)
        ctx.dtype = heads.dtype

    @staticmethod
    def backward(ctx, grad):
        cosines, sines = ctx.saved_tensors
        return (grad * cosines - rotate_half(grad * sines)).to(ctx.dtype), None, None
