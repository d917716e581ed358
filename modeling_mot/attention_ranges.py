"""Attention in which every query sees one range of keys: causal, both ways inside an image, apart in packed documents.

`attend_in_ranges` is the attention for a CPU. It runs over blocks of queries, each against the keys that any of its
queries sees: torch's kernel computes all scores, also the ones that a mask hides, and its backward is slow.
attention_masks.py makes the plan of blocks, and gives it to other kernels on other devices.
"""

import re

import torch
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from .tower_routing import autocast_dtype


# B batch, L row length, H heads, K heads of keys, h head dimension; R rows, c queries and k keys of a block


CAUSAL_BLOCK = 128  # queries of a block where all rows are causal
KEPT_WIDTH = 32  # probabilities are kept for the backward up to so many keys per query and channel of a head


def _causal_blocks(query: torch.Tensor) -> list[list[int]]:
    """Cut causal rows into blocks, as `AttentionPlan.blocks` has them."""
    batch, _, length, _ = query.shape
    spans = ((begin, min(begin + CAUSAL_BLOCK, length)) for begin in range(0, length, CAUSAL_BLOCK))
    return [[0, batch, begin, end, 0, end, 0, begin] for begin, end in spans]


def kept_scores(query: torch.Tensor, num_scores: int) -> int:
    """Count the probabilities to keep for the backward; 0 if they are too many and computed again there.

    Args:
        query: (B, H, L, h)
        num_scores: of one head; 0 for causal rows.
    """
    batch, heads, length, head_dim = query.shape
    if not num_scores:
        num_scores = sum(batch * (end - begin) * end for _, _, begin, end, *_ in _causal_blocks(query))
    return heads * num_scores if num_scores <= KEPT_WIDTH * head_dim * batch * length else 0


class _Block:
    """The queries and keys of one block, as views or copies with one dimension of rows and heads of keys.

    Args:
        bounds: one row of `AttentionPlan.blocks`.
        first, last: (B, L), the range of keys of each query; None for causal rows.
    """

    def __init__(self, bounds: list[int], first, last):
        # The rows, and the queries in them.
        self.row = bounds[0]
        self.row_end = bounds[1]
        self.begin = bounds[2]
        self.end = bounds[3]

        # The keys that any query sees, and the keys that all queries see.
        self.low = bounds[4]
        self.high = bounds[5]
        self.common = bounds[6]
        self.common_end = bounds[7]
        self.first = first
        self.last = last

    def queries(self, heads: torch.Tensor, groups: int) -> torch.Tensor:
        """Cut the block's queries: (B, H, L, h) -> (R * K, H / K * c, h)."""
        part = heads[self.row : self.row_end, :, self.begin : self.end]
        return part.reshape(-1, groups * (self.end - self.begin), heads.shape[-1])

    def keys(self, heads: torch.Tensor) -> torch.Tensor:
        """View the block's keys: (B, K, L, h), contiguous -> (R * K, k, h)."""
        return heads[self.row : self.row_end].flatten(0, 1)[:, self.low : self.high]

    def scatter(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Write (R * K, H / K * c, h) into the block's place of (B, L, H, h)."""
        place = out[self.row : self.row_end, self.begin : self.end]
        place.copy_(part.view(place.shape[0], place.shape[2], place.shape[1], -1).transpose(1, 2))

    def probabilities(self, queries, keys, scale, out=None) -> torch.Tensor:
        """Compute softmax(scale * Q K^T) over the keys that each query sees.  -> (R * K, H / K * c, k)"""
        scores = torch.baddbmm(queries.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=scale)

        # Hide keys at both ends; the ones between are seen by all queries.
        by_head = scores.view(self.row_end - self.row, -1, self.end - self.begin, self.high - self.low)
        spans = [(self.low, self.common), (self.common_end, self.high)]
        if self.common >= self.common_end:
            spans = [(self.low, self.high)]
        for low, high in spans:
            if low < high:
                # Adding a small bias is several times as fast as filling under a mask.
                by_head[..., low - self.low : high - self.low] += self.bias(low, high, scores)
        return torch.softmax(scores, dim=-1, out=scores if out is None else out.view_as(scores))

    def num_scores(self, queries) -> int:
        return queries.shape[0] * queries.shape[1] * (self.high - self.low)

    def bias(self, low: int, high: int, like: torch.Tensor) -> torch.Tensor:
        """Make a bias of 0 where a query sees a key and -inf elsewhere.  -> (R or 1, 1, c, high - low)"""
        keys = torch.arange(low, high, dtype=torch.int32)
        if self.first is None:
            hidden = keys > torch.arange(self.begin, self.end, dtype=torch.int32)[:, None]
            return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        part = (slice(self.row, self.row_end), None, slice(self.begin, self.end), None)
        hidden = (keys < self.first[part]) | (keys > self.last[part])
        return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _all_blocks(query, first, last, blocks) -> list[_Block]:
    bounds = _causal_blocks(query) if blocks is None else blocks.tolist()
    return [_Block(of_block, first, last) for of_block in bounds]


# ------------------------------------------------------------------------------------ the operators and their gradients


# Forward and backward are operators, so that a compiler sees one node and no loop that depends on the plan. Remote code
# may be loaded beside the installed package, so the operators of each module have names of their own.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::attend", mutates_args=())
@torch.autocast("cpu", enabled=False)
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    blocks: torch.Tensor | None,
    scale: float,
    num_kept: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend: (B, H, L, h), (B, K, L, h) twice -> (B, L, H, h) and the first `num_kept` probabilities"""
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1])
    kept, place, groups = query.new_empty(num_kept), 0, heads // key.shape[1]
    # Each block writes its part of the output, and its probabilities if they are kept.
    for block in _all_blocks(query, first, last, blocks):
        queries = block.queries(query, groups)
        begin, place = place, place + block.num_scores(queries)
        room = kept[begin:place] if num_kept else None
        probabilities = block.probabilities(queries, block.keys(key), scale, room)
        block.scatter(out, torch.bmm(probabilities, block.keys(value)))
    return out, kept


@_attend.register_fake
def _(query, key, value, first, last, blocks, scale, num_kept):
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]), query.new_empty(num_kept)


@torch.library.custom_op(f"{_NAMESPACE}::attend_backward", mutates_args=())
@torch.autocast("cpu", enabled=False)
def _attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    blocks: torch.Tensor | None,
    kept: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values, in their shapes."""
    batch, heads, length, _ = query.shape
    grad = grad.transpose(1, 2).contiguous()
    grad_query = query.new_empty(batch, length, heads, query.shape[-1])
    # Several blocks add to the gradient of a key: in float32 at least.
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
    place, groups = 0, heads // key.shape[1]
    for block in _all_blocks(query, first, last, blocks):
        # The probabilities of the forward, kept or computed again.
        queries, out_grad = block.queries(query, groups), block.queries(grad, groups)
        begin, place = place, place + block.num_scores(queries)
        if len(kept):
            probabilities = kept[begin:place].view(*queries.shape[:2], -1)
        else:
            probabilities = block.probabilities(queries, block.keys(key), scale)

        # Back through the product with the values, the softmax, and the product of queries and keys.
        block.keys(grad_value).add_(torch.bmm(probabilities.transpose(1, 2), out_grad))
        grad_probabilities = torch.bmm(out_grad, block.keys(value).transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
        block.scatter(grad_query, torch.bmm(grad_scores, block.keys(key)))
        block.keys(grad_key).add_(torch.bmm(grad_scores.transpose(1, 2), queries))
    grad_query, grad_key = grad_query.mul_(scale).transpose(1, 2), grad_key.mul_(scale)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@_attend_backward.register_fake
def _(grad, query, key, value, first, last, blocks, kept, scale):
    batch, heads, length, head_dim = query.shape
    grad_query = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    return grad_query, key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx, inputs, output):
    query, key, value, first, last, blocks, ctx.scale, _ = inputs
    ctx.save_for_backward(query, key, value, first, last, blocks, output[1])
    ctx.set_materialize_grads(False)  # the probabilities have no gradient, and zeros in its place would be large


def _gradients(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    return *_attend_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None, None, None


_attend.register_autograd(_gradients, setup_context=_setup)


class _Attend(torch.autograd.Function):
    """The operator for `torch.func`, which does not know gradients that are registered with an operator."""

    @staticmethod
    def forward(*args):
        return _attend(*args)

    setup_context = staticmethod(_setup)
    backward = staticmethod(once_differentiable(_gradients))


# Every query against every key, as torch counts its own attention; the backward has twice the products.
@register_flop_formula(getattr(torch.ops, _NAMESPACE).attend)
def _(query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


@register_flop_formula(getattr(torch.ops, _NAMESPACE).attend_backward)
def _(grad_shape, query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    return 2 * sdpa_flop_count(query_shape, key_shape, value_shape)


def attend_in_ranges(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan, scale: float) -> torch.Tensor:
    """Compute softmax(scale * Q K^T) V over each query's keys.  (B, H, L, h), (B, K, L, h) twice -> (B, L, H, h)

    Args:
        plan: an `AttentionPlan` (attention_masks.py).
        scale: of the scores, d^-0.5 for heads of d.
    """
    dtype = autocast_dtype(query.device.type)
    if dtype is not None:  # torch's own attention is cast by autocast, operators of others are not
        query, key, value = (heads.to(dtype) for heads in (query, key, value))
    # Contiguous already here, and not in the operator, whose backward would copy them again.
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    num_kept = kept_scores(query, plan.num_scores) if needs_grad else 0
    return _Attend.apply(query, key, value, plan.first, plan.last, plan.blocks, scale, num_kept)[0]
