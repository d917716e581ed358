"""One layer: attention over all towers' tokens, and each tower's feed-forward, around a residual stream."""

# B batch, L row length, D hidden size

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_mot import MoTAttention
from .configuration_mot import MoTConfig
from .expert_choice import ExpertChoiceFeedForward, FeedForward
from .modality_routing import ModalityRouting, PerTower, join
from .tower_norms_mot import TowerNorms, rms_norm


class MoTDecoderLayer(GradientCheckpointingLayer):
    """One layer, equation 2 (`norm_position="post"`) or Llama's order of the same parts (`"pre"`)."""

    def __init__(self, config: MoTConfig, layer_idx: int):
        super().__init__()
        self.config = config

        def feed_forward(name):
            return ExpertChoiceFeedForward(config) if name in config.moe_towers else FeedForward(config)

        def norm():
            return TowerNorms({name: rms_norm(config, config.hidden_size) for name in config.part_names("norm")})

        self.self_attn = MoTAttention(config, layer_idx)
        self.mlp = PerTower({name: feed_forward(name) for name in config.part_names("feed_forward")})
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.dropout = nn.Dropout(config.hidden_dropout)

    def _residual(self, rows, norm, block, routing):
        # The paper normalises after the block; pre-norm is the default because a dense Llama then
        # becomes a MoT with identical logits.
        if self.config.norm_position == "pre":
            update = join(block(routing.split(norm(rows, routing))))
        else:
            update = norm(join(block(routing.split(rows))), routing)
        return rows + self.dropout(update)

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
        rows = routing.sort(hidden_states) if in_sequence_order else hidden_states

        def attend(parts):
            return self.self_attn(parts, routing, position_embeddings, attention_mask, past_key_values, **kwargs)[0]

        def feed_forward(parts):
            is_token = None if routing.is_token is None else routing.split(routing.is_token)
            return self.mlp(parts, is_token, token_choice=token_choice)

        rows = self._residual(rows, self.input_layernorm, attend, routing)
        rows = self._residual(rows, self.post_attention_layernorm, feed_forward, routing)
        return routing.restore(rows, hidden_states.shape[0]) if in_sequence_order else rows
