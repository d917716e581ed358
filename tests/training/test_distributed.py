"""Several processes, sharded by FSDP2 or not, take the trajectory of one; their checkpoints fit every world."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from training.run_files.metrics import read_metrics

from .ranks import ROWS, assert_same_but_for_rounding, go_on, make, results, run_ranks


SCENARIOS = ["plain", "tied", "lopsided", "text", "transfusion", "checkpointing", "towers"]


def alone(folder, name: str, accumulation: int = 1):
    """What one process makes of the same rows: (parameters, metrics)."""
    trainer = make(name, folder, ROWS // accumulation, accumulation)
    trainer.fit()
    results(trainer, folder)
    return outcome(folder)


def outcome(folder):
    return load_file(folder / "result.safetensors"), read_metrics(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, folder, [*SCENARIOS, "plain.split", "bf16", "interrupted.stop"])
    return folder


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory, two_ranks):
    """Two replicas of two shards; one training goes on from what two ranks have saved."""
    folder = tmp_path_factory.mktemp("four")
    half_way(two_ranks / "interrupted", folder / "moved")
    run_ranks(4, folder, ["plain", "plain.split", "transfusion", "interrupted.stop", "moved.resume"], replicate=2)
    return folder


def half_way(source, target):
    """A run's folder as it was after its second step."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step-00000004")


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_sharded_ranks_take_the_trajectory_of_one_process(two_ranks, tmp_path, name):
    parameters, (training, evaluation) = outcome(two_ranks / name)
    expected, (expected_training, expected_evaluation) = alone(tmp_path, name)
    assert_same_but_for_rounding(parameters, expected)
    for row, reference in zip(training, expected_training, strict=True):
        for key, value in reference.items():
            if key.startswith(("loss", "grad_norm")) and value is not None:
                assert row[key] == pytest.approx(value, rel=2e-5), key
            if key.startswith(("tokens_text", "tokens_image", "elements")):
                assert row[key] == value
    assert evaluation[0]["eval/loss_text"] == pytest.approx(expected_evaluation[0]["eval/loss_text"], rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "plain-split", "transfusion"])
def test_two_replicas_of_two_shards_take_the_trajectory_of_one_process(four_ranks, tmp_path, name):
    assert_same_but_for_rounding(outcome(four_ranks / name)[0], alone(tmp_path, name.removesuffix("-split"))[0])


def test_the_split_of_a_step_into_ranks_and_micro_batches_does_not_matter(two_ranks, tmp_path):
    expected, _ = alone(tmp_path / "one", "plain")
    assert_same_but_for_rounding(outcome(two_ranks / "plain-split")[0], expected)
    for accumulation in (2, 4):
        assert_same_but_for_rounding(alone(tmp_path / f"{accumulation}", "plain", accumulation)[0], expected)


def test_ranks_that_are_not_sharded_take_it_too(tmp_path):
    run_ranks(2, tmp_path, ["lopsided", "transfusion"], fsdp=False)
    for name in ("lopsided", "transfusion"):
        assert_same_but_for_rounding(outcome(tmp_path / name)[0], alone(tmp_path / f"alone-{name}", name)[0])


def test_products_in_bf16_leave_losses_and_parameters_in_float32(two_ranks, tmp_path):
    parameters, (training, _) = outcome(two_ranks / "bf16")
    _, (expected, _) = alone(tmp_path, "plain")
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    for row, reference in zip(training, expected, strict=True):
        # A loss that was itself rounded to bf16 would be off by up to 2 ** -9.
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-3)
        assert torch.tensor(row["loss"]).bfloat16().item() != row["loss"]


@pytest.mark.parametrize("world", ["two_ranks", "four_ranks"])
def test_a_resumed_world_goes_on_bit_for_bit(request, world):
    folder = request.getfixturevalue(world)
    undisturbed, (expected, _) = outcome(folder / "plain")
    resumed, (training, _) = outcome(folder / "interrupted")
    assert all(torch.equal(value, undisturbed[name]) for name, value in resumed.items())
    assert [row["loss"] for row in training] == [row["loss"] for row in expected]


def test_a_checkpoint_of_two_ranks_goes_on_in_four_and_in_one(two_ranks, four_ranks, tmp_path):
    undisturbed, _ = outcome(two_ranks / "plain")
    assert_same_but_for_rounding(outcome(four_ranks / "moved")[0], undisturbed)
    half_way(two_ranks / "interrupted", tmp_path / "run")
    assert_same_but_for_rounding(go_on_alone(tmp_path / "run"), undisturbed)


def test_a_checkpoint_of_hybrid_shards_goes_on_in_two_ranks_and_in_one(four_ranks, tmp_path):
    half_way(four_ranks / "interrupted", tmp_path / "back")
    run_ranks(2, tmp_path, ["back.resume"])
    assert_same_but_for_rounding(outcome(tmp_path / "back")[0], outcome(four_ranks / "plain")[0])
    half_way(four_ranks / "interrupted", tmp_path / "run")
    assert_same_but_for_rounding(go_on_alone(tmp_path / "run"), outcome(four_ranks / "plain")[0])


def go_on_alone(folder):
    trainer = make("interrupted", folder, ROWS, resume=True)
    go_on(trainer)
    trainer.fit()
    results(trainer, folder)
    return outcome(folder)[0]
