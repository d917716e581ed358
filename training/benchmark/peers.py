"""The models that are compared: MoTs, transformers' Llama of equal active size, and the paper's Algorithm 1.

B rows, L row length, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_mot import MoTConfig, MoTForCausalLM


SIZES = {
    "small": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=768),
    "mid": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1536),
}


def build_llama(size: dict, dtype: torch.dtype, vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, rms_norm_eps=1e-5, **size)).to(dtype).train()


def build_mot(llama: LlamaForCausalLM, size: dict, towers: int) -> MoTForCausalLM:
    """Build a MoT whose towers all have the Llama's weights, so that both compute the same."""
    modalities = ["text", *(f"modality_{index}" for index in range(1, towers))]
    weights, dtype = llama.state_dict(), llama.dtype
    model = MoTForCausalLM(MoTConfig.from_variant("mot", modalities=modalities, vocab_size=llama.vocab_size, **size))
    names = {key: ".".join(part for part in key.split(".") if part not in modalities) for key in model.state_dict()}
    model.load_state_dict({key: weights[name] for key, name in names.items()})
    return model.to(dtype).train()


def made_up_batch(
    rows: int, length: int, vocab_size: int, towers: int, shares: list[float] | None = None, seed: int = 1
) -> dict:
    """Make random tokens (B, L) of random modalities, each with its share of `shares`, or with an equal share."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(shares or [1.0] * towers)
    modality_ids = torch.multinomial(weights, rows * length, replacement=True, generator=generator).view(rows, length)
    return {
        "input_ids": torch.randint(0, vocab_size, (rows, length), generator=generator),
        "modality_ids": modality_ids,
    }


class BooleanMaskMoT(nn.Module):
    """The paper's Algorithm 1, line by line, over the modules of a MoT.

    In every layer and for every part, a boolean mask picks the tokens of a modality and puts the results back. The
    norms stand before the parts, as in our default.
    """

    def __init__(self, model: MoTForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, modality_ids: torch.Tensor, labels: torch.Tensor | None = None):
        """Return the loss (None without labels) and the logits (B, L, V)."""
        model = self.model.model
        masks = [(tower, modality_ids == index) for index, tower in enumerate(self.model.config.tower_names)]

        def each(part, rows: torch.Tensor, width: int | None = None) -> torch.Tensor:
            out = rows.new_zeros(*rows.shape[:2], width or rows.shape[-1])
            for tower, mask in masks:
                out[mask] = part[tower](rows[mask])
            return out

        # Embeddings and rotary angles are shared by the modalities.
        hidden = model.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        embeddings = model.rotary_emb(hidden, position_ids=positions)

        # Each layer: projections, attention over the whole sequence, output projection, feed-forward.
        for layer in model.layers:
            attention = layer.self_attn
            normed = each(layer.input_layernorm, hidden)
            heads = [
                each(projection, normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            ]
            query, key = apply_rotary_pos_emb(*heads[:2], *embeddings)
            seen = F.scaled_dot_product_attention(query, key, heads[2], is_causal=True)
            hidden = hidden + each(attention.o_proj, seen.transpose(1, 2).flatten(2))
            hidden = hidden + each(layer.mlp, each(layer.post_attention_layernorm, hidden))

        logits = self.model.lm_head(each(model.norm, hidden))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return loss, logits
