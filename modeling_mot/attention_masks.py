"""Who may attend to whom: causal in a document, both ways inside an image that is diffused, and never across the
documents of a packed row.
"""

from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicCache
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    create_causal_mask,
    flex_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_ranges import attend_in_ranges, kept_scores


# B batch, L row length


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


class ImageBlocks(NamedTuple):
    """The images of the Transfusion setting, in rows of L tokens.

    Attributes:
        ids: (B, L) the number of the image in its row, -1 outside of images. Tokens of one image see each other.
        hidden: (B, L) bool, tokens that no token outside of their image sees; None where there are none.
    """

    ids: torch.Tensor
    hidden: torch.Tensor | None = None

    def visible(self, batch, head, query, key):
        """Whether the images allow `query` to see `key`, beside causality."""
        return ~self.hidden[batch, key] | self.same(batch, head, query, key)

    def same(self, batch, head, query, key):
        return (self.ids[batch, query] == self.ids[batch, key]) & (self.ids[batch, key] >= 0)


def find_image_blocks(is_patch: torch.Tensor, document_ids: torch.Tensor | None, with_markers: bool) -> torch.Tensor:
    """Number the images of each row: each run of patches within a document is one.  (B, L) bool -> (B, L), -1 elsewhere

    Args:
        document_ids: (B, L) or None.
        with_markers: whether the token before and the token after a run (BOI and EOI) belong to it.
    """
    begins_document = document_starts(torch.zeros_like(is_patch) if document_ids is None else document_ids)
    starts = is_patch.clone()
    starts[:, 1:] &= ~is_patch[:, :-1] | begins_document[:, 1:]
    numbers = starts.cumsum(dim=1) - 1
    ids = torch.where(is_patch, numbers, -1)
    if with_markers:
        before, after = torch.full_like(ids, -1), torch.full_like(ids, -1)
        before[:, :-1] = torch.where(starts[:, 1:] & ~begins_document[:, 1:], numbers[:, 1:], -1)
        after[:, 1:] = torch.where(is_patch[:, 1:] | begins_document[:, 1:], -1, ids[:, :-1])
        ids = torch.maximum(ids, torch.maximum(before, after))
    return ids


def image_positions(
    block_ids: torch.Tensor, document_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Positions at which all tokens of an image share one, from 0 in each document.  (B, L) -> (B, L)

    Args:
        attention_mask: (B, L); padding on the left does not count.
    """
    moves = torch.ones_like(block_ids)
    moves[:, 1:] = ((block_ids[:, 1:] < 0) | (block_ids[:, 1:] != block_ids[:, :-1])).long()
    if attention_mask is not None:
        moves = moves * attention_mask
    counted = (moves.cumsum(dim=1) - 1).clamp(min=0)
    if document_ids is None:
        return counted
    return counted - torch.where(document_starts(document_ids), counted, 0).cummax(dim=1).values


def document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """Whether a document begins at a token.  (B, L) -> (B, L) bool"""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def document_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Positions that begin at 0 in every document.  (B, L) -> (B, L)"""
    steps = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return steps - torch.where(document_starts(document_ids), steps, 0).cummax(dim=1).values


def documents_of(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the documents of rows whose positions return to 0 where the next one begins.  (B, L) -> (B, L)

    Transformers begins one wherever positions are not consecutive, but those of an image may be shared.
    """
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = ((position_ids[:, 1:] == 0) & (position_ids[:, :-1] != 0)).long()
    return starts.cumsum(dim=1)


def tokens_of(attention_mask, document_ids: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """What of the rows is no padding, without a wait for the device.  -> (B, L) bool, or None where neither says it

    Args:
        attention_mask: (B, past + L), 0 for padding; masks of other forms do not tell padding.
        document_ids: (B, L), negative for padding.
        length: L.
    """
    is_token = None if document_ids is None else document_ids >= 0
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        attended = attention_mask[:, -length:].bool()
        is_token = attended if is_token is None else attended & is_token
    return is_token


def attention_mask_for(
    config,
    inputs_embeds,
    attention_mask,
    past_key_values,
    position_ids,
    document_ids,
    image_blocks=None,
    plan=None,
    may_plan=False,
):
    """The mask in the form that the configured attention implementation takes.

    Args:
        inputs_embeds: (B, L, D), read for its shape, dtype and device only.
        attention_mask: (B, past + L) 1 for tokens and 0 for padding, or a 4-D mask, taken as it is.
        document_ids: (B, L); tokens whose ids differ do not see each other.
        position_ids: (B, L) as the caller passed them, or None. Without `document_ids` and
            `attention_mask`, positions that begin anew begin a new document, as in transformers.
        image_blocks: `ImageBlocks` of the keys, (B, past + L), or None.
        plan: an `AttentionPlan` of all this, the keys of the cache included, made ahead; attention that runs from plans
            then needs nothing else.
        may_plan: make one where none is given and attention runs from plans, which waits for the device.

    Raises:
        ValueError: `document_ids` together with keys of an earlier forward, whose documents are unknown.
    """
    # Ranges that were made ahead are of all keys. Any other plan is of this forward's keys alone, and a static cache
    # would have room for more.
    has_ranges = plan is not None and not plan.is_causal
    is_fresh = past_key_values is None or (
        isinstance(past_key_values, DynamicCache) and past_key_values.get_seq_length() == 0
    )
    if config._attn_implementation == RANGES and attention_mask is None and (is_fresh or has_ranges):
        if plan is None:
            if position_ids is not None:
                position_ids = position_ids.expand(inputs_embeds.shape[:2])
            may_wait = may_plan and inputs_embeds.device.type != "meta"  # nothing can be read there
            plan = plan_attention(position_ids, document_ids, image_blocks, may_wait)
        if plan is not None:
            return plan.for_device(inputs_embeds.device)
    functions = {}
    if image_blocks is not None:
        functions["or_mask_function"] = image_blocks.same
        if image_blocks.hidden is not None:
            functions["and_mask_function"] = image_blocks.visible
        position_ids = None  # shared positions are no new documents
    if document_ids is None:
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids, **functions)
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError(
            "document_ids came with a filled past_key_values, whose documents are not known; "
            "packed rows are for training, continue one document per row"
        )
    if config._attn_implementation.startswith("flash"):
        return attention_mask  # flash takes `flash_documents` instead

    def same_document(batch, head, query, key):
        return document_ids[batch, query] == document_ids[batch, key]

    both = functions.pop("and_mask_function", None)
    allowed = same_document if both is None else and_masks(same_document, both)
    return create_causal_mask(config, inputs_embeds, attention_mask, None, and_mask_function=allowed, **functions)


def plan_attention(position_ids, document_ids, image_blocks, may_wait: bool) -> AttentionPlan | None:
    """The plan of rows without padding and cache, or None where visibility is no range or would have to be waited for.

    Args:
        As of `attention_mask_for`.
    """
    if image_blocks is not None and image_blocks.hidden is not None:
        return None
    if document_ids is None and image_blocks is None and position_ids is not None:
        if not may_wait:
            return None
        # Positions that are not consecutive begin a document, as in transformers.
        document_ids = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(dim=1)
    if document_ids is None and image_blocks is None:
        return AttentionPlan()
    return (
        AttentionPlan.from_ids(document_ids, None if image_blocks is None else image_blocks.ids) if may_wait else None
    )


def plan_rows(config, input_ids, document_ids, clean_images=None) -> AttentionPlan | None:
    """The plan of a training batch as a collator makes it, or None where what tokens see is no range.

    Args:
        config: the model's.
        input_ids, document_ids: (B, L).
        clean_images: (N,) bool of the images in the rows; None where there are none.
    """
    blocks = None
    if clean_images is not None and hasattr(config, "markers_in_image_block"):
        if not (config.noised_images_visible or bool(clean_images.all())):
            return None
        is_patch = input_ids == config.image_token_id
        blocks = find_image_blocks(is_patch, document_ids, config.markers_in_image_block)
    return AttentionPlan.from_ids(document_ids, blocks)


def flash_documents(document_ids: torch.Tensor) -> dict:
    """Packed documents as flash attention's kernels take them: cumulative lengths over the flattened rows.

    Args:
        document_ids: (B, L)
    """
    starts = document_positions(document_ids).flatten().eq(0).nonzero().squeeze(-1)
    bounds = torch.cat([starts, starts.new_tensor([document_ids.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def range_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, `attn_implementation="mot_ranges"`.

    Args:
        attention_mask: what `AttentionPlan.for_device` makes; or a mask as torch's attention takes it, which then runs.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(attention_mask, tuple):
        plan = attention_mask
        # Where probabilities would be computed again, torch's kernel is faster in float32.
        is_long = plan.is_causal and query.dtype == torch.float32 and not kept_scores(query, 0)
        if not (dropout or is_long):
            return attend_in_ranges(query, key, value, plan, scaling), None
        attention_mask = plan.mask(query.device)
    elif attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(RANGES, range_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(RANGES, sdpa_mask)
