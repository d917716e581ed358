"""The attention of a MoT layer: projections of each tower around one attention over the whole sequence."""

# B batch, L row length, T = B * L tokens, D hidden size, H heads

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_mot import MoTConfig
from .modality_routing import ModalityRouting, PerTower, join
from .rotary_mot import Rotary
from .tower_norms_mot import TowerNorms, qk_norm


class MoTAttention(nn.Module):
    """Projections of each tower around one attention over the whole sequence (paper, equation 3)."""

    def __init__(self, config: MoTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.has_rope = layer_idx not in config.layers_without_rope

        names = config.part_names("attention")
        hidden = config.hidden_size
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim

        def projection(inputs, outputs, bias):
            return PerTower({name: nn.Linear(inputs, outputs, bias=bias) for name in names})

        self.q_proj = projection(hidden, queries, config.attention_bias)
        self.k_proj = projection(hidden, keys, config.attention_bias)
        self.v_proj = projection(hidden, keys, config.attention_bias)
        self.o_proj = projection(queries, hidden, config.attention_output_bias)
        if config.qk_norm is not None:
            self.q_norm = TowerNorms({name: qk_norm(config, config.num_attention_heads) for name in names})
            self.k_norm = TowerNorms({name: qk_norm(config, config.num_key_value_heads) for name in names})

    def _heads(self, parts, norm, routing, batch_size):
        """Each tower's rows to heads in the order of the sequence.  {tower: (T_tower, H * D/H)} -> (B, H, L, D/H)"""
        rows = join(parts)
        if norm is not None:
            heads = rows if self.config.qk_norm == "rms_all_heads" else rows.unflatten(-1, (-1, self.head_dim))
            rows = norm(heads, routing).flatten(1)
        return routing.restore(rows, batch_size).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        parts: dict[str, torch.Tensor],
        routing: ModalityRouting,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """{tower: (T_tower, D)} -> {tower: (T_tower, D)} and the weights (B, H, L, past + L) if they exist."""
        batch_size = position_embeddings[0].shape[0]
        query = self._heads(self.q_proj(parts), getattr(self, "q_norm", None), routing, batch_size)
        key = self._heads(self.k_proj(parts), getattr(self, "k_norm", None), routing, batch_size)
        value = self._heads(self.v_proj(parts), None, routing, batch_size)
        if self.has_rope:
            angles = [of_head.unsqueeze(1) for of_head in position_embeddings]
            query, key = Rotary.apply(query, *angles), Rotary.apply(key, *angles)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        # Engines that keep the keys themselves, as vLLM does, give the rows back without the batch.
        output = output.reshape(batch_size, query.shape[2], -1)
        output = routing.split(routing.sort(output))
        return self.o_proj(output), weights
