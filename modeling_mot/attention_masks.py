"""Who may attend to whom: causal in a document, and never across the documents of a packed row."""

import torch
from transformers.masking_utils import create_causal_mask


def document_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Positions that begin at 0 in every document.  (B, L) -> (B, L)"""
    steps = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return steps - torch.where(starts, steps, 0).cummax(dim=1).values


def attention_mask_for(config, inputs_embeds, attention_mask, past_key_values, position_ids, document_ids):
    """The mask in the form that the configured attention implementation takes.

    Args:
        inputs_embeds: (B, L, D), read for its shape, dtype and device only.
        attention_mask: (B, past + L) 1 for tokens and 0 for padding, or a 4-D mask, taken as it is.
        document_ids: (B, L); tokens whose ids differ do not see each other.
        position_ids: (B, L) as the caller passed them, or None. Without `document_ids` and
            `attention_mask`, positions that begin anew begin a new document, as in transformers.

    Raises:
        ValueError: `document_ids` together with keys of an earlier forward, whose documents are unknown.
    """
    if document_ids is None:
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids)
    if document_ids.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"document_ids has shape {tuple(document_ids.shape)} but the rows are {tuple(inputs_embeds.shape[:2])}"
        )
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError(
            "document_ids came with a filled past_key_values, whose documents are not known; "
            "packed rows are for training, continue one document per row"
        )
    if config._attn_implementation.startswith("flash"):
        return attention_mask  # flash takes `flash_documents` instead

    def same_document(batch, head, query, key):
        return document_ids[batch, query] == document_ids[batch, key]

    return create_causal_mask(config, inputs_embeds, attention_mask, None, and_mask_function=same_document)


def flash_documents(document_ids: torch.Tensor) -> dict:
    """Packed documents as flash attention's kernels take them: cumulative lengths over the flattened rows.

    Args:
        document_ids: (B, L)
    """
    starts = document_positions(document_ids).flatten().eq(0).nonzero().squeeze(-1)
    bounds = torch.cat([starts, starts.new_tensor([document_ids.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
