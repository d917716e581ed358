"""Experts that choose tokens, and tokens that choose experts, against loops."""

import pytest
import torch

from modeling_mot.expert_choice import ExpertChoiceFeedForward


def mixture(tiny_config, num_experts=4):
    feed_forward = ExpertChoiceFeedForward(tiny_config("moe-4x", num_experts=num_experts))
    for parameter in feed_forward.parameters():
        parameter.data.normal_(std=0.3)
    return feed_forward


def naive(feed_forward, tokens, choice):
    """Each token and each expert by itself, with the softmax of the router as weight."""
    n, num_experts = len(tokens), len(feed_forward.experts)
    affinity = (tokens @ feed_forward.router.weight.T).softmax(-1)
    rows = [torch.zeros_like(token) for token in tokens]
    for e, expert in enumerate(feed_forward.experts):
        if choice == "token":
            chosen = [i for i in range(n) if max(range(num_experts), key=affinity[i].tolist().__getitem__) == e]
        else:
            capacity = n // num_experts + (1 if e < n % num_experts else 0)
            chosen = sorted(range(n), key=(-affinity[:, e]).tolist().__getitem__)[:capacity]
        for i in chosen:
            rows[i] = rows[i] + affinity[i, e] * expert(tokens[i])
    return torch.stack(rows)


@pytest.mark.parametrize("n", [1, 3, 4, 7, 16, 30])
@pytest.mark.parametrize("choice", ["expert", "token"])
def test_equals_a_loop_in_outputs_and_gradients(tiny_config, n, choice):
    feed_forward = mixture(tiny_config)
    tokens, upstream = torch.randn(n, 32, requires_grad=True), torch.randn(n, 32)
    wanted = [tokens, *feed_forward.parameters()]
    results = []
    with torch.no_grad():
        expected = naive(feed_forward, tokens, choice)
    for output in (feed_forward(tokens, token_choice=choice == "token"), naive(feed_forward, tokens, choice)):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        grads = torch.autograd.grad((output * upstream).sum(), wanted, allow_unused=True)
        results.append([torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_experts", [2, 4, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 9, 20, 23])
@pytest.mark.parametrize("token_choice", [False, True])
def test_exactly_n_tokens_are_processed(tiny_config, n, num_experts, token_choice):
    feed_forward, processed = mixture(tiny_config, num_experts), []
    for expert in feed_forward.experts:
        expert.register_forward_hook(lambda module, args, output: processed.append(len(args[0])))
    assert feed_forward(torch.randn(n, 32), token_choice=token_choice).shape == (n, 32)
    assert sum(processed) == n
    if not token_choice:
        assert max(processed) - min(processed) <= 1


def test_every_expert_has_a_gradient_on_zero_tokens(tiny_config):
    feed_forward = mixture(tiny_config)
    feed_forward(torch.randn(0, 32)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in feed_forward.parameters())


def test_bfloat16_stays_bfloat16(tiny_config):
    assert mixture(tiny_config).bfloat16()(torch.randn(9, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_expert_choice_looks_at_later_tokens_and_token_choice_does_not(tiny_model):
    model, ids = tiny_model("moe-4x"), torch.randint(0, 60, (1, 12))
    other = torch.cat([ids[:, :6], torch.randint(0, 60, (1, 6))], dim=1)
    with torch.no_grad():
        experts = [model(x).logits[:, :6] for x in (ids, other)]
        tokens = [model(x, token_choice=True).logits[:, :6] for x in (ids, other)]
    assert not torch.allclose(*experts)
    torch.testing.assert_close(*tokens)


def test_hybrid_has_experts_in_the_text_tower_only(tiny_model):
    model, seen = tiny_model("hybrid"), {}
    for tower, module in model.model.layers[0].mlp.items():
        module.register_forward_pre_hook(
            lambda m, args, tower=tower: seen.update({tower: (type(m).__name__, len(args[0]))})
        )
    model(torch.tensor([[8, 9, 31, 32, 33, 50]]))
    assert seen == {"text": ("ExpertChoiceFeedForward", 2), "image": ("FeedForward", 3), "speech": ("FeedForward", 1)}
