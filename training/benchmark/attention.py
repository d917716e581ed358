"""Time attention alone, forward and backward: ranges of keys beside torch's attention with an equal mask."""

import torch
import torch.nn.functional as F

from modeling_mot.attention_masks import AttentionPlan
from modeling_mot.attention_ranges import attend_in_ranges
from training.benchmark.rounds import compare, interleave


# B rows, H heads, L row length, h head dimension

ROWS, IMAGE = 4, 64


def made_up_rows(kind: str, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Make (document_ids, block_ids), each (B, L) or None.

    Args:
        kind: `causal`: neither; `packed`: documents of about 256 tokens; `images`: the same documents, half of whose
            tokens are in images of 64 tokens that attend in both directions.
    """
    if kind == "causal":
        return None, None
    generator = torch.Generator().manual_seed(2)
    starts = torch.rand(ROWS, length, generator=generator) < 1 / 256
    documents = starts.cumsum(dim=1)
    if kind == "packed":
        return documents, None
    places = torch.arange(length).expand(ROWS, -1)
    within = places - torch.where(starts | (places == 0), places, 0).cummax(dim=1).values
    blocks = torch.where(within // IMAGE % 2 == 1, places.new_tensor(0) + documents * length + within // IMAGE, -1)
    return documents, blocks


def mask_of(documents: torch.Tensor | None, blocks: torch.Tensor | None, length: int) -> torch.Tensor:
    """Write out plainly which keys each query sees.  -> (B, 1, L, L) bool"""
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if blocks is not None:
        visible = visible | ((blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0))
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    return visible.expand(ROWS, length, length).unsqueeze(1)


def time_attention(size: dict, dtype: torch.dtype, lengths: list[int], rounds: int) -> dict:
    """Time attention for each row length and kind of rows.

    Contestants are `ranges`, `sdpa_mask` (torch's attention with the dense mask) and `sdpa_causal` (torch's without a
    mask, which ignores documents and images).

    Returns:
        dict: "kind, length" -> the figures of `compare`.
    """
    figures, num_heads = {}, size["num_attention_heads"]
    head_dim = size["hidden_size"] // num_heads
    for length in lengths:
        for kind in ("causal", "packed", "images"):
            # The same heads go to all three, with the mask or the plan of these rows.
            documents, blocks = made_up_rows(kind, length)
            mask, plan = mask_of(documents, blocks, length), AttentionPlan.from_ids(documents, blocks)
            torch.manual_seed(0)
            heads = [torch.randn(ROWS, num_heads, length, head_dim).to(dtype).requires_grad_() for _ in range(3)]

            def ranges(heads=heads, plan=plan):
                return attend_in_ranges(*heads, plan, head_dim**-0.5)

            def with_mask(heads=heads, mask=mask):
                return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

            def causal(heads=heads):
                return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

            # Time forward and backward, after checking that the outputs agree.
            _check_equal(ranges, with_mask, heads)
            calls = {"ranges": ranges, "sdpa_mask": with_mask, "sdpa_causal": causal}
            calls = {name: lambda call=call: call().sum().backward() for name, call in calls.items()}
            pairs = [("ranges", "sdpa_mask"), ("ranges", "sdpa_causal")]
            figures[f"{kind}, {length}"] = compare(interleave(calls, rounds, warm_up=2), pairs)
    return figures


def _check_equal(one, other, heads: list[torch.Tensor]) -> None:
    results = []
    for call in (one, other):
        out = call()
        gradients = torch.autograd.grad(out.float().square().sum(), heads)
        results.append([out, *gradients])
    tolerance = 1e-4 if heads[0].dtype == torch.float32 else 3e-2
    for a, b in zip(*results, strict=True):
        apart = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if apart > tolerance:
            raise SystemExit(f"ranges differ from torch's attention by {apart:.2e}: nothing was timed")
