"""The feed-forward as a mixture of experts with expert-choice routing (paper, section 3.2.1; arXiv 2202.09368)."""

import torch
from torch import nn

from .tower_routing import feed_forward


# n tokens of the tower, E experts, D hidden size


class ExpertChoiceFeedForward(nn.Module):
    """Each expert takes the n / E tokens that prefer it most, so the FLOPs are as many as in one dense feed-forward.

    The experts choose among all tokens of the batch, later tokens included, so this is not causal. Training and
    validation use it as it is, as the paper does; generation passes `token_choice=True`, and each token then takes its
    best expert by the same router.

    Examples:

        >>> import torch
        >>> from modeling_mot import MoTConfig
        >>> from modeling_mot.tower_experts import ExpertChoiceFeedForward
        >>> mixture = ExpertChoiceFeedForward(MoTConfig(hidden_size=32, intermediate_size=64, num_experts=2))
        >>> mixture(torch.randn(6, 32)).shape
        torch.Size([6, 32])
    """

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(feed_forward(config) for _ in range(config.num_experts))

    def forward(
        self, hidden_states: torch.Tensor, is_token: torch.Tensor | None = None, token_choice: bool = False
    ) -> torch.Tensor:
        """Apply the experts: (n, D) -> (n, D)

        Args:
            is_token: (n,) bool, False for padding, which no expert chooses and which becomes zero; None where nothing
                is padding.
            token_choice: True if each token chooses its expert.
        """
        affinity = self.router(hidden_states).softmax(dim=-1, dtype=torch.float32)  # (n, E)
        chosen = self._token_choice(affinity) if token_choice else self._expert_choice(affinity, is_token)
        output = torch.zeros_like(hidden_states)
        for expert, (index, weights) in zip(self.experts, chosen):
            weighted = expert(hidden_states[index]) * weights.unsqueeze(-1).to(hidden_states.dtype)
            output = output.index_add(0, index, weighted.to(output.dtype))
        return output

    def _expert_choice(self, affinity: torch.Tensor, is_token: torch.Tensor | None) -> list[tuple]:
        """Let experts choose tokens.  -> for each expert the indices of its rows and their weights, (rows,) both"""
        n, num_experts = affinity.shape

        def share(tokens, expert):
            # The number of tokens need not be a multiple of E: the first experts then take one more.
            return (tokens + num_experts - 1 - expert) // num_experts

        # Rank the tokens for each expert.
        ranking = affinity if is_token is None else affinity.masked_fill(~is_token.unsqueeze(-1), -1)  # padding is last
        ranked = ranking.topk(share(n, 0), dim=0).indices  # (capacity, E)

        # Give each expert its share.
        num_tokens = n if is_token is None else is_token.sum()
        chosen = []
        for expert, column in enumerate(affinity.unbind(-1)):
            index = ranked[: share(n, expert), expert]
            weights = column[index]
            if is_token is not None:
                # The device alone knows how many tokens there are: rows past the expert's share of them weigh nothing.
                is_taken = torch.arange(len(index), device=index.device) < share(num_tokens, expert)
                weights = weights.where(is_taken, 0)
            chosen.append((index, weights))
        return chosen

    def _token_choice(self, affinity: torch.Tensor) -> list[tuple]:
        """Let tokens choose experts.  -> for each expert the indices of its rows and their weights, (rows,) both"""
        best = affinity.argmax(dim=-1)
        indices = [(best == expert).nonzero().squeeze(-1) for expert in range(affinity.shape[-1])]
        return [(index, column[index]) for index, column in zip(indices, affinity.unbind(-1))]
