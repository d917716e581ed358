"""Which keys each token of a batch sees, where those are ranges: made once per batch, for all layers."""

# B batch, L row length

from typing import NamedTuple

import torch
from transformers.masking_utils import flex_attention_mask


RANGES = "mot_ranges"  # the attention that runs from a plan, as `attn_implementation`
BLOCK_SIZES = (64, 128, 256)
ALIGNED = 32  # a block begins and ends at multiples of so many keys: whole vectors are worked on several times as fast
BLOCK_OVERHEAD = 16384  # what a block costs beside its arithmetic, in scores of one row


class AttentionPlan(NamedTuple):
    """Which keys each query of a batch sees; without ranges, all up to itself.

    Attributes:
        first, last: (B, L) int32, the first and the last key that a query sees.
        blocks: (n, 8) int64 of blocks of queries: first row and end, first query and end, first key and end of what any
            of them sees, first key and end of what all of them see; keys rounded to multiples of `ALIGNED`, the former
            outwards and the latter inwards.
        num_scores: of all blocks, for one head.
    """

    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    num_scores: int = 0

    @classmethod
    def from_ranges(cls, first: torch.Tensor, last: torch.Tensor) -> "AttentionPlan":
        """Plan blocks for ranges.  (B, L) twice

        Rows share a block where that saves more than the keys cost that only some of them see. Waits for the device.
        """
        first, last = first.to(torch.int32), last.to(torch.int32)
        if bool((first == 0).all()) and torch.equal(last, torch.arange(last.shape[1]).to(last).expand_as(last)):
            return cls()
        starts, ends = first.cpu(), last.cpu() + 1
        cost, blocks = min((_blocks(starts, ends, size) for size in BLOCK_SIZES), key=lambda plan: plan[0])
        num_scores = sum((r[1] - r[0]) * (r[3] - r[2]) * (r[5] - r[4]) for r in blocks)
        return cls(first, last, torch.tensor(blocks), num_scores)

    @classmethod
    def from_ids(
        cls, document_ids: torch.Tensor | None, block_ids: torch.Tensor | None = None
    ) -> "AttentionPlan | None":
        """The plan of packed rows with images that see themselves in both directions.

        Args:
            document_ids: (B, L); tokens whose ids differ do not see each other. None: one document a row.
            block_ids: (B, L) of `find_image_blocks`, or None.

        Returns:
            The plan; None where a document stands in several pieces, so that what its tokens see is no range.
        """
        if document_ids is None and block_ids is None:
            return cls()
        like = block_ids if document_ids is None else document_ids
        places = torch.arange(like.shape[1], device=like.device).expand_as(like)
        first, last = torch.zeros_like(places), places
        if document_ids is not None:
            starts = torch.ones_like(like, dtype=torch.bool)
            starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
            ordered = document_ids.sort(dim=1).values
            if not torch.equal((ordered.diff(dim=1) != 0).sum(), starts[:, 1:].sum()):
                return None
            first = torch.where(starts, places, 0).cummax(dim=1).values
        if block_ids is not None:
            ends = torch.ones_like(like, dtype=torch.bool)
            ends[:, :-1] = block_ids[:, 1:] != block_ids[:, :-1]
            end = torch.where(ends, places, like.shape[1]).flip(1).cummin(dim=1).values.flip(1)
            last = torch.where(block_ids >= 0, end, places)
        return cls.from_ranges(first, last)

    @property
    def is_causal(self) -> bool:
        return self.first is None

    def sees(self, batch, head, query, key):
        """Whether a query sees a key, as transformers' and flex attention's mask functions say it."""
        return key <= query if self.is_causal else (self.first[batch, query] <= key) & (key <= self.last[batch, query])

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """The same as torch's attention takes it.  -> (B, 1, L, L) bool, or None for a causal one"""
        if self.is_causal:
            return None
        keys = torch.arange(self.first.shape[1], device=device)
        first, last = (ends.to(device)[:, None, :, None] for ends in (self.first, self.last))
        return (first <= keys) & (keys <= last)

    def for_device(self, device: torch.device):
        """What the layers take as their mask: the plan on a CPU, a block mask of flex attention on CUDA.

        Elsewhere a boolean mask, and None for a causal one.
        """
        if device.type in ("cpu", "meta"):
            return self
        if device.type == "cuda" and not self.is_causal:
            batch, length = self.first.shape
            return flex_attention_mask(batch, length, length, mask_function=self.sees, device=device)
        return self.mask(device)


def _blocks(starts: torch.Tensor, ends: torch.Tensor, size: int) -> tuple[int, list[list[int]]]:
    """Blocks of so many queries, each of one row or of all, and what they cost in scores."""
    batch, length = starts.shape
    num_keys, cost, blocks = ends.max(), 0, []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        part = slice(begin, end)
        low, high = _down(starts[:, part].amin(1)), _up(ends[:, part].amax(1)).clamp(max=num_keys)
        common, common_end = _up(starts[:, part].amax(1)), _down(ends[:, part].amin(1))
        keys, end_key = low.min().item(), high.max().item()
        together = batch * (end - begin) * (end_key - keys) + BLOCK_OVERHEAD
        apart = (end - begin) * int((high - low).sum()) + batch * BLOCK_OVERHEAD
        if together <= apart:
            blocks.append([0, batch, begin, end, keys, end_key, common.max().item(), common_end.min().item()])
        else:
            bounds = torch.stack([low, high, common, common_end], dim=1).tolist()
            blocks += [[row, row + 1, begin, end, *of_row] for row, of_row in enumerate(bounds)]
        cost += min(together, apart)
    return cost, blocks


def _down(keys: torch.Tensor) -> torch.Tensor:
    return keys // ALIGNED * ALIGNED


def _up(keys: torch.Tensor) -> torch.Tensor:
    return _down(keys + ALIGNED - 1)
