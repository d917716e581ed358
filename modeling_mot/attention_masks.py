"""Who may attend to whom: causal in a document, both ways inside a diffused image, never across packed documents.

`attention_mask_for` makes the mask of a forward for any attention implementation of transformers. The default
implementation, `"mot_ranges"`, runs from an `AttentionPlan`: every query sees one range of keys, so blocks of queries
can be planned once per forward, or ahead of it by a collator (`plan_rows`).

In reading order: the plan, images, towers that do not see each other, documents and positions, the mask of a forward,
the attention function.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
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


RANGES = "mot_ranges"  # the name of the attention that runs from a plan, for `attn_implementation`
BLOCK_SIZES = (64, 128, 256)  # queries of a block; the cheapest is taken
ALIGNED = 32  # blocks begin and end at multiples of so many keys: whole vectors are several times as fast
BLOCK_OVERHEAD = 16384  # the cost of a block beside its arithmetic, in scores of one row


# ------------------------------------------------------------------------------------------------------------- the plan


class AttentionPlan(NamedTuple):
    """The range of keys that each query of a batch sees; without ranges, all keys up to the query itself.

    Attributes:
        first, last: (B, L) int32, the first and the last key that a query sees.
        blocks: (n, 8) int64, for each block of queries: first row and end; first query and end; first key and end of
            the keys that any of its queries sees, rounded outwards to multiples of `ALIGNED`; first key and end of the
            keys that all of its queries see, rounded inwards.
        num_scores: scores of all blocks, for one head.
    """

    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    num_scores: int = 0

    @classmethod
    def from_ranges(cls, first: torch.Tensor, last: torch.Tensor) -> "AttentionPlan":
        """Plan blocks for ranges; waits for the device.  (B, L) twice

        A block covers one row, or all rows. One block for all rows has less overhead, but each row then computes
        scores for keys that only other rows see. The cheaper of the two is taken.
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
        cls,
        document_ids: torch.Tensor | None,
        block_ids: torch.Tensor | None = None,
        sight: "TowerSight | None" = None,
    ) -> "AttentionPlan | None":
        """Plan packed rows with images that see themselves in both directions; waits for the device.

        Args:
            document_ids: (B, L); tokens whose ids differ do not see each other. None: one document a row.
            block_ids: (B, L) of `find_image_blocks`, or None.
            sight: which towers see which; None where all see all.

        Returns:
            The plan; None where a token sees no single range: a document stands in several pieces, or tokens of a tower
            that it does not see stand among the others.
        """
        towers = None if sight is None else sight.towers
        given = [ids for ids in (document_ids, block_ids, towers) if ids is not None]
        if not given:
            return cls()
        like = given[0]
        places = torch.arange(like.shape[1], device=like.device).expand_as(like)
        first, last = torch.zeros_like(places), places

        # A query sees keys from the first token of its document on.
        if document_ids is not None:
            starts = document_starts(document_ids)
            ordered = document_ids.sort(dim=1).values
            if not torch.equal((ordered.diff(dim=1) != 0).sum(), starts[:, 1:].sum()):
                return None
            first = torch.where(starts, places, 0).cummax(dim=1).values

        # A query in an image sees keys up to the last token of the image.
        if block_ids is not None:
            ends = torch.ones_like(like, dtype=torch.bool)
            ends[:, :-1] = block_ids[:, 1:] != block_ids[:, :-1]
            end = torch.where(ends, places, like.shape[1]).flip(1).cummin(dim=1).values.flip(1)
            last = torch.where(block_ids >= 0, end, places)
        if sight is not None and sight.cuts(first, last):
            return None
        return cls.from_ranges(first, last)

    @property
    def is_causal(self) -> bool:
        """True if every query sees all keys up to itself."""
        return self.first is None

    def sees(self, batch, head, query, key):
        """True if a query sees a key: a mask function for transformers and flex attention."""
        return key <= query if self.is_causal else (self.first[batch, query] <= key) & (key <= self.last[batch, query])

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """Make the mask that torch's attention takes.  -> (B, 1, L, L) bool, or None for a causal plan"""
        if self.is_causal:
            return None
        keys = torch.arange(self.first.shape[1], device=device)
        first, last = (ends.to(device)[:, None, :, None] for ends in (self.first, self.last))
        return (first <= keys) & (keys <= last)

    def for_device(self, device: torch.device):
        """Make the mask that layers take: the plan on a CPU, a block mask of flex attention on CUDA.

        On other devices it is a boolean mask; a causal plan is None there and on CUDA.
        """
        if device.type in ("cpu", "meta"):
            return self
        if device.type == "cuda" and not self.is_causal:
            batch, length = self.first.shape
            return flex_attention_mask(batch, length, length, mask_function=self.sees, device=device)
        return self.mask(device)


def _blocks(starts: torch.Tensor, ends: torch.Tensor, size: int) -> tuple[int, list[list[int]]]:
    """Cut rows into blocks of `size` queries, each of one row or of all rows.  -> cost in scores, blocks"""
    batch, length = starts.shape
    num_keys, cost, blocks = ends.max(), 0, []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        part = slice(begin, end)
        # For each row the keys that any of its queries sees, and the keys that all of them see.
        low, high = _down(starts[:, part].amin(1)), _up(ends[:, part].amax(1)).clamp(max=num_keys)
        common, common_end = _up(starts[:, part].amax(1)), _down(ends[:, part].amin(1))
        # One block for all rows, or one for each.
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


# --------------------------------------------------------------------------------------------------------------- images


class ImageBlocks(NamedTuple):
    """Where the images of the Transfusion setting stand, and who sees them.

    Attributes:
        ids: (B, L) the number of the image in its row, -1 outside of images. Tokens of one image see each other.
        hidden: (B, L) bool, tokens that no token outside of their image sees; None where there are no such tokens.
    """

    ids: torch.Tensor
    hidden: torch.Tensor | None = None

    def visible(self, batch, head, query, key):
        """True if the images allow `query` to see `key`; causality is another matter."""
        return ~self.hidden[batch, key] | self.same(batch, head, query, key)

    def same(self, batch, head, query, key):
        """True if `query` and `key` are tokens of one image."""
        return (self.ids[batch, query] == self.ids[batch, key]) & (self.ids[batch, key] >= 0)


def find_placeholders(config, input_ids: torch.Tensor) -> torch.Tensor:
    """Mark patches with their modality, an index into `config.modalities`; 0 for all other tokens.  (B, L) -> (B, L)"""
    kinds = torch.zeros_like(input_ids)
    for modality, token in config.placeholder_token_ids.items():
        kinds = kinds.masked_fill(input_ids == token, config.modalities.index(modality))
    return kinds


def find_image_blocks(kinds: torch.Tensor, document_ids: torch.Tensor | None, with_markers: bool) -> torch.Tensor:
    """Number the images of each row: each run of patches within a document is one.  (B, L) -> (B, L), -1 elsewhere

    Args:
        kinds: (B, L) of `find_placeholders`, or bool; patches of two kinds are of two images.
        document_ids: (B, L) or None.
        with_markers: True if the token before and the token after a run (BOI and EOI) belong to the image.
    """
    is_patch = kinds != 0
    begins_document = document_starts(torch.zeros_like(kinds) if document_ids is None else document_ids)
    starts = is_patch.clone()
    starts[:, 1:] &= (kinds[:, 1:] != kinds[:, :-1]) | begins_document[:, 1:]
    numbers = starts.cumsum(dim=1) - 1
    ids = torch.where(is_patch, numbers, -1)
    if with_markers:
        # The neighbours of a run in its document take its number.
        before, after = torch.full_like(ids, -1), torch.full_like(ids, -1)
        is_before = starts[:, 1:] & ~is_patch[:, :-1] & ~begins_document[:, 1:]
        before[:, :-1] = torch.where(is_before, numbers[:, 1:], -1)
        after[:, 1:] = torch.where(is_patch[:, 1:] | begins_document[:, 1:], -1, ids[:, :-1])
        ids = torch.maximum(ids, torch.maximum(before, after))
    return ids


def image_positions(
    block_ids: torch.Tensor,
    document_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    stays: torch.Tensor | None = None,
) -> torch.Tensor:
    """Count positions so that all tokens of an image share one, from 0 in each document.  (B, L) -> (B, L)

    Args:
        block_ids: (B, L) of `find_image_blocks`.
        document_ids: (B, L) or None.
        attention_mask: (B, L) or None; padding on the left is not counted.
        stays: (B, L) bool, tokens of images behind which the position stays the same; None for no such image.
    """
    moves = torch.ones_like(block_ids)
    moves[:, 1:] = ((block_ids[:, 1:] < 0) | (block_ids[:, 1:] != block_ids[:, :-1])).long()
    if stays is not None:
        moves[:, 1:] *= ~stays[:, :-1]
    if attention_mask is not None:
        moves = moves * attention_mask
    counted = (moves.cumsum(dim=1) - 1).clamp(min=0)
    if document_ids is None:
        return counted
    return counted - torch.where(document_starts(document_ids), counted, 0).cummax(dim=1).values


# ------------------------------------------------------------------------------------------------------------- towers


class TowerSight(NamedTuple):
    """Which towers see which: `config.unseen_towers` for the tokens of a forward.

    Attributes:
        towers: (B, past + L) the index of each key's tower in `config.tower_names`.
        unseen: (K, K) bool, at [reader, key] True if a token of the first tower never sees a key of the second.
    """

    towers: torch.Tensor
    unseen: torch.Tensor

    @classmethod
    def of(cls, config, towers: torch.Tensor) -> "TowerSight | None":
        """Look up `config.unseen_towers` for the towers of keys, (B, past + L); None if all towers see each other."""
        if not config.unseen_towers:
            return None
        names = config.tower_names
        unseen = [[key in config.unseen_towers.get(reader, ()) for key in names] for reader in names]
        return cls(towers, torch.tensor(unseen, device=towers.device))

    def visible(self, batch, head, query, key):
        """True if the tower of `query` sees that of `key`: a mask function for transformers and flex attention."""
        return ~self.unseen[self.towers[batch, query], self.towers[batch, key]]

    def cuts(self, first: torch.Tensor, last: torch.Tensor) -> bool:
        """True if an unseen key stands within any query's range of keys; waits for the device.  (B, L) twice"""
        for reader, unseen in enumerate(self.unseen):
            counted = F.pad(unseen[self.towers].long().cumsum(dim=1), (1, 0))
            within = counted.gather(1, last + 1) - counted.gather(1, first)
            if bool(((self.towers == reader) & (within > 0)).any()):
                return True
        return False


# ---------------------------------------------------------------------------------------------- documents and positions


def document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """Mark the tokens at which a document begins.  (B, L) -> (B, L) bool"""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def document_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Count positions from 0 in every document.  (B, L) -> (B, L)"""
    steps = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return steps - torch.where(document_starts(document_ids), steps, 0).cummax(dim=1).values


def documents_of(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the documents of rows whose positions return to 0 where a document begins.  (B, L) -> (B, L)

    Transformers begins a document wherever positions are not consecutive, but the patches of an image may share one.
    """
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = ((position_ids[:, 1:] == 0) & (position_ids[:, :-1] != 0)).long()
    return starts.cumsum(dim=1)


def positions_of(
    rows: torch.Tensor, position_ids: torch.Tensor | None, document_ids: torch.Tensor | None, past_key_values
) -> torch.Tensor:
    """Find the positions of all tokens: as given, or from 0 in each document, or behind the cache.

    -> (B, L), or (3, B, L) as given

    Args:
        rows: (B, L, any size), read for its shape and device only.
        position_ids: (B, L) or (1, L), or of three axes (3, B, L), or None.
        document_ids: (B, L) or None.
        past_key_values: a cache, or None.
    """
    if position_ids is None and document_ids is not None:
        position_ids = document_positions(document_ids)
    elif position_ids is None:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = (torch.arange(rows.shape[1], device=rows.device) + past).unsqueeze(0)
    return position_ids if position_ids.dim() == 3 else position_ids.expand(rows.shape[0], -1)


def times_of(position_ids: torch.Tensor) -> torch.Tensor:
    """Return positions on one axis, that of time if there are three.  (B, L) or (3, B, L) -> (B, L)"""
    return position_ids if position_ids.dim() == 2 else position_ids[0]


def tokens_of(attention_mask, document_ids: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Mark what is no padding, without a wait for the device.  -> (B, L) bool, or None where nothing marks padding

    Args:
        attention_mask: (B, past + L), 0 for padding; masks of other forms do not mark padding.
        document_ids: (B, L), negative for padding.
        length: L.
    """
    is_token = None if document_ids is None else document_ids >= 0
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        attended = attention_mask[:, -length:].bool()
        is_token = attended if is_token is None else attended & is_token
    return is_token


def flash_documents(document_ids: torch.Tensor) -> dict:
    """Describe packed documents for flash attention's kernels: cumulative lengths over the flattened rows.

    Args:
        document_ids: (B, L)

    Returns:
        The kernels' keywords.
    """
    starts = document_positions(document_ids).flatten().eq(0).nonzero().squeeze(-1)
    bounds = torch.cat([starts, starts.new_tensor([document_ids.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


# ------------------------------------------------------------------------------------------------ the mask of a forward


def attention_mask_for(
    config,
    rows: torch.Tensor,
    attention_mask,
    past_key_values,
    position_ids: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    image_blocks: ImageBlocks | None = None,
    plan: AttentionPlan | None = None,
    sight: TowerSight | None = None,
):
    """Make the mask in the form that the configured attention implementation takes, without a wait for the device.

    Args:
        rows: (B, L, any size), read for its shape, dtype and device only.
        attention_mask: (B, past + L) 1 for tokens and 0 for padding, or a 4-D mask, taken as it is.
        past_key_values: a cache, or None.
        position_ids: (B, L); without `document_ids` a jump in them begins a document, as in transformers.
        document_ids: (B, L); tokens whose ids differ do not see each other.
        image_blocks: the images of all keys.
        plan: all this, made ahead, with the keys of the cache; attention that runs from plans then needs nothing else.
        sight: which towers see which, for all keys; None where all see all.

    Raises:
        ValueError: `document_ids` together with keys of an earlier forward, whose documents are unknown; or flash
            attention where a tower does not see another.
    """
    # Attention that runs from a plan.
    if takes_plan(config, attention_mask, past_key_values, plan):
        if plan is None:
            plan = _known_plan(position_ids, document_ids, image_blocks, sight)
        if plan is not None:
            return plan.for_device(rows.device)

    # Every other implementation takes a mask, which transformers makes of functions of queries and keys.
    functions, allowed = {}, []
    if image_blocks is not None:
        functions["or_mask_function"] = image_blocks.same
        if image_blocks.hidden is not None:
            allowed.append(image_blocks.visible)
        position_ids = None  # shared positions are no new documents
    if sight is not None:
        if config._attn_implementation.startswith("flash"):
            raise ValueError(
                f"unseen_towers={config.unseen_towers} hides keys that flash attention cannot hide: load the model "
                "with another attn_implementation, such as 'sdpa'"
            )
        allowed.append(sight.visible)
    if document_ids is None:
        if allowed:
            functions["and_mask_function"] = and_masks(*allowed)
        return create_causal_mask(config, rows, attention_mask, past_key_values, position_ids, **functions)

    # Packed documents.
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError(
            "document_ids came with a filled past_key_values, whose documents are not known; "
            "packed rows are for training, continue one document per row"
        )
    if config._attn_implementation.startswith("flash"):
        return attention_mask  # flash takes `flash_documents` instead

    def same_document(batch, head, query, key):
        return document_ids[batch, query] == document_ids[batch, key]

    functions["and_mask_function"] = and_masks(same_document, *allowed)
    return create_causal_mask(config, rows, attention_mask, None, **functions)


def takes_plan(config, attention_mask, past_key_values, plan: AttentionPlan | None = None) -> bool:
    """True if attention runs from an `AttentionPlan`: the plan covers all keys, and no mask hides padding.

    Args:
        plan: one made ahead, or None. Its ranges are of all keys; any other plan is of this forward's keys alone.
    """
    if config._attn_implementation != RANGES or attention_mask is not None:
        return False
    if plan is not None and not plan.is_causal:
        return True
    # Not a static cache, which has room for more keys than this forward has.
    return past_key_values is None or (
        isinstance(past_key_values, DynamicCache) and past_key_values.get_seq_length() == 0
    )


def plan_attention(
    shape: tuple[int, int],
    position_ids: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    image_blocks: ImageBlocks | None,
    sight: TowerSight | None = None,
) -> AttentionPlan | None:
    """Plan rows without padding and cache; waits for the device.

    Args:
        shape: (B, L).
        position_ids, document_ids, image_blocks, sight: as `attention_mask_for` takes them.

    Returns:
        The plan; None if the keys that some token sees are not one range.
    """
    if image_blocks is not None and image_blocks.hidden is not None:
        return None
    block_ids = None if image_blocks is None else image_blocks.ids
    if document_ids is None and block_ids is None and position_ids is not None:
        # Positions that are not consecutive begin a document, as in transformers.
        position_ids = position_ids.expand(shape)
        document_ids = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(dim=1)
    return AttentionPlan.from_ids(document_ids, block_ids, sight)


def _known_plan(*given) -> AttentionPlan | None:
    """Return the plan of rows where nothing but causality is given: it is known without looking at the device."""
    return AttentionPlan() if all(one is None for one in given) else None


def plan_rows(config, input_ids, document_ids, clean_images=None, modality_ids=None) -> AttentionPlan | None:
    """Plan a training batch, for a collator; None where what tokens see is no range of keys.

    Args:
        config: the configuration of the model.
        input_ids, document_ids: (B, L).
        clean_images: (N,) bool of the images in the rows; None where there are none.
        modality_ids: (B, L), which `config.unseen_towers` needs; without it such rows have no plan.
    """
    sight = None
    if config.unseen_towers:
        if modality_ids is None:
            return None
        sight = TowerSight.of(config, torch.tensor(config.tower_of_modality)[modality_ids])
    blocks = None
    has_images = clean_images is not None and "image" in config.placeholder_token_ids
    if has_images and not (config.noised_images_visible or bool(clean_images.all())):
        return None
    if has_images or len(config.placeholder_token_ids) > 1:
        blocks = find_image_blocks(find_placeholders(config, input_ids), document_ids, config.markers_in_image_block)
    return AttentionPlan.from_ids(document_ids, blocks, sight)


# ----------------------------------------------------------------------------------------------- the attention function


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
    """Run attention from a plan; an attention function of transformers, `attn_implementation="mot_ranges"`.

    Args:
        query, key, value: (B, H, L, d), keys and values with the heads of keys.
        attention_mask: made by `AttentionPlan.for_device`; or a mask for torch's attention, which then runs.

    Returns:
        (B, L, H, d), and None for the weights.
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
