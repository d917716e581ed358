"""One layer: attention over all towers' tokens, and each tower's feed-forward, around a residual stream."""

# B batch, L row length, D hidden size

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_mot import MoTAttention, rms_norm
from .configuration_mot import MoTConfig
from .expert_choice import ExpertChoiceFeedForward, FeedForward
from .modality_routing import ModalityRouting, PerTower, join


class MoTDecoderLayer(GradientCheckpointingLayer):
    """One layer, equation 2 (`norm_position="post"`) or Llama's order of the same parts (`"pre"`)."""

    def __init__(self, config: MoTConfig, layer_idx: int):
        super().__init__()
        self.config = config

        def feed_forward(name):
            return ExpertChoiceFeedForward(config) if name in config.moe_towers else FeedForward(config)

        def norm():
            return PerTower({name: rms_norm(config, config.hidden_size) for name in config.part_names("norm")})

        self.self_attn = MoTAttention(config, layer_idx)
        self.mlp = PerTower({name: feed_forward(name) for name in config.part_names("feed_forward")})
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.dropout = nn.Dropout(config.hidden_dropout)

    def _residual(self, parts, norm, block):
        # The paper normalises after the block; pre-norm is the default because a dense Llama then
        # becomes a MoT with identical logits.
        update = block(norm(parts)) if self.config.norm_position == "pre" else norm(block(parts))
        return {tower: rows + self.dropout(update[tower]) for tower, rows in parts.items()}

    def forward(
        self,
        hidden_states: torch.Tensor,
        routing: ModalityRouting,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        token_choice: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """(T, D) sorted by tower -> the same; or (B, L, D) in the order of the sequence -> the same."""
        # One tensor, whose slices are the towers' own: what checkpointing, offloading and hooks on layers know of.
        in_sequence_order = hidden_states.dim() == 3
        parts = routing.split(routing.sort(hidden_states) if in_sequence_order else hidden_states)
        parts = self._residual(
            parts,
            self.input_layernorm,
            lambda parts: self.self_attn(
                parts, routing, position_embeddings, attention_mask, past_key_values, **kwargs
            )[0],
        )
        parts = self._residual(
            parts, self.post_attention_layernorm, lambda parts: self.mlp(parts, token_choice=token_choice)
        )
        rows = join(parts)
        return routing.restore(rows, hidden_states.shape[0]) if in_sequence_order else rows
