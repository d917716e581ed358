"""Feed-forward as a mixture of experts with expert-choice routing (paper section 3.2.1; arXiv 2202.09368)."""

# n tokens of the tower, E experts, D hidden size

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP


class FeedForward(LlamaMLP):
    """SwiGLU.  (n, D) -> (n, D)"""

    def forward(self, hidden_states: torch.Tensor, token_choice: bool = False) -> torch.Tensor:
        return super().forward(hidden_states)


class ExpertChoiceFeedForward(nn.Module):
    """Each expert takes the n/E tokens that prefer it most, so the FLOPs are those of one dense feed-forward.

    The experts choose among all tokens of the batch, later ones included, so this is not causal.
    Training and validation use it as it is, as the paper does; generation passes
    `token_choice=True`: the same router, each token taking its best expert.
    """

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.num_experts))

    def forward(self, hidden_states: torch.Tensor, token_choice: bool = False) -> torch.Tensor:
        """(n, D) -> (n, D)"""
        affinity = self.router(hidden_states).softmax(dim=-1, dtype=torch.float32)  # (n, E)
        chosen = self._token_choice(affinity) if token_choice else self._expert_choice(affinity)
        output = torch.zeros_like(hidden_states)
        for expert, index, column in zip(self.experts, chosen, affinity.unbind(-1)):
            weighted = expert(hidden_states[index]) * column[index].unsqueeze(-1).to(hidden_states.dtype)
            output = output.index_add(0, index, weighted.to(output.dtype))
        return output

    def _expert_choice(self, affinity: torch.Tensor) -> list[torch.Tensor]:
        # n need not be a multiple of E: the first n % E experts take one token more, so that
        # exactly n tokens are processed.
        n, num_experts = affinity.shape
        capacity = -(-n // num_experts)
        ranked = affinity.topk(capacity, dim=0).indices  # (capacity, E)
        return [ranked[: n // num_experts + (expert < n % num_experts), expert] for expert in range(num_experts)]

    def _token_choice(self, affinity: torch.Tensor) -> list[torch.Tensor]:
        best = affinity.argmax(dim=-1)
        return [(best == expert).nonzero().squeeze(-1) for expert in range(affinity.shape[-1])]
