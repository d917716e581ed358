"""Ranks that do not agree: all of them end, and say why."""

import pytest

from .ranks import start_ranks


def ended(arguments, fsdp=False) -> list[tuple[int, str]]:
    """(exit code, what was printed) of each of two ranks."""
    ranks = start_ranks("tests.training.different_ranks", arguments, 2, fsdp)
    try:
        return [(rank.wait(), text) for rank in ranks for text in [rank.communicate(timeout=240)[0]]]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["data.seed=7", "optimizer.lr=1e-2"], ["data.seed is 0 on rank 0, 7 on rank 1", "optimizer.lr is 0.001"]),
        (["train.processes=3"], ["train.processes is None on rank 0, 3 on rank 1"]),
    ],
)
def test_ranks_with_other_recipes_are_refused_on_all_ranks_with_the_keys(tmp_path, words, named):
    for code, printed in ended(["recipe", str(tmp_path / "run"), *words]):
        assert code == 2 and "Traceback" not in printed, printed
        assert all(text in printed for text in named), printed
    assert not (tmp_path / "run").exists()


def test_parameters_that_are_not_finite_on_one_rank_end_all_ranks_before_a_checkpoint_holds_them(tmp_path):
    for code, printed in ended(["poisoned", str(tmp_path / "run")], fsdp=True):
        assert code == 0, printed
