import pytest
import torch

from training.data import collate
from training.optimization import check_modality_weights, combine, count_targets, loss_scales

from .tiny import MadeUpStream, tiny_config, tiny_model


@pytest.fixture
def batch():
    stream = MadeUpStream()
    return collate([stream.row(index) for index in range(3)])


def test_counts_from_the_batch_are_those_the_model_finds(batch):
    counts = tiny_model()(**batch).loss_counts
    assert count_targets(batch, tiny_config()).tolist() == [int(count) for count in counts.values()]


def test_loss_is_the_mean_over_all_targets(batch):
    model = tiny_model().eval()
    output = model(**batch)
    # Independent of the model's own sums: every target's log-probability, one by one.
    log_probabilities = output.logits.log_softmax(-1)
    terms = [
        -log_probabilities[row, place - 1, batch["labels"][row, place]]
        for row in range(3)
        for place in range(1, 24)
        if batch["labels"][row, place] != -100
    ]
    totals = {name: int(count) for name, count in output.loss_counts.items()}
    loss = combine(output.loss_sums, output.z_loss_sum, *loss_scales(totals))
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_z_loss_is_added_as_a_mean_over_all_targets(batch):
    model = tiny_model(z_loss_coefficient=0.1).eval()
    output = model(**batch)
    is_target = batch["labels"][:, 1:] != -100
    expected = 0.1 * output.logits[:, :-1].logsumexp(-1).square()[is_target].mean()
    totals = {name: int(count) for name, count in output.loss_counts.items()}
    scales, z_scale = loss_scales(totals)
    with_z, without = (combine(output.loss_sums, z, scales, z_scale) for z in (output.z_loss_sum, 0.0))
    torch.testing.assert_close(with_z - without, expected)


def test_weights_make_a_weighted_mean():
    scales, _ = loss_scales({"text": 3, "image": 1}, {"image": 5.0})
    losses = {"text": [1.0, 2.0, 3.0], "image": [10.0]}
    total = sum(scales[name] * sum(values) for name, values in losses.items())
    assert total == pytest.approx((1 + 2 + 3 + 5 * 10) / (3 + 5))


def test_a_step_without_targets_has_no_loss():
    scales, z_scale = loss_scales({"text": 0, "image": 0})
    assert set(scales.values()) == {0.0} and z_scale == 0.0


def test_the_loss_is_float32_though_sums_are_not():
    sums = {"text": torch.tensor(3.0, dtype=torch.bfloat16)}
    assert combine(sums, torch.tensor(0.0, dtype=torch.bfloat16), {"text": 1.0}, 1.0).dtype == torch.float32


def test_weights_of_unknown_modalities_are_refused():
    with pytest.raises(ValueError, match="'video'"):
        check_modality_weights({"video": 1.0}, ["text", "image"])
