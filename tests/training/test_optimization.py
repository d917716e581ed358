import math

import pytest
import torch
from torch import nn

from training.optimization import OptimizerConfig, build_optimizer, learning_rate


def test_learning_rate_warms_up_linearly_to_the_peak():
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    assert [learning_rate(config, step, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_learning_rate_is_a_half_cosine_after_warm_up():
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    for step in range(4, 21):
        expected = 0.1 + 0.9 * math.cos(math.pi / 2 * (step - 4) / 16) ** 2
        assert learning_rate(config, step, 21) == pytest.approx(expected, abs=1e-12)
    assert learning_rate(config, 20, 21) == pytest.approx(0.1)


def test_learning_rate_agrees_with_transformers_cosine_schedule():
    from transformers import get_cosine_schedule_with_warmup

    config = OptimizerConfig(lr=2e-3, min_lr=0.0, warmup_steps=10)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, 50)
    for step in range(50):
        # Theirs starts at 0 and reaches 0 after the last step; ours is one warm-up step and one end step ahead.
        if step >= 10:
            assert learning_rate(config, step, 51) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_only_matrices_decay():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["params"] == [model["linear"].weight]


def test_a_tied_output_layer_is_an_embedding():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0]


def test_decay_of_everything_can_be_asked_for():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "linear": nn.Linear(4, 4)})
    config = OptimizerConfig(decay_norms_and_biases=True, decay_embeddings=True)
    assert [len(group["params"]) for group in build_optimizer(model, config).param_groups] == [3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", math.inf),
        ("min_lr", 1.0),
        ("warmup_steps", -1),
        ("betas", (0.9, 1.0)),
        ("clip_norm", 0.0),
        ("clip_norm", math.nan),
        ("weight_decay", math.nan),
        ("weight_decay", -0.1),
        ("eps", 0.0),
        ("betas", (math.nan, 0.9)),
    ],
)
def test_figures_that_cannot_be_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        OptimizerConfig(**{name: value})
