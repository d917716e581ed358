"""`python -m training.benchmark serve --soak MINUTES`."""

import pytest

from training.benchmark import soak as soak_of
from training.benchmark.__main__ import main
from training.benchmark.soak import soak


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def assert_sound(figures, at_least):
    for kind in ("codes", "diffusion"):
        requests = figures[kind]["requests"]
        assert set(requests) == {"good", "bad", "cancelled"} and sum(requests.values()) >= at_least


def test_good_requests_among_bad_and_cancelled_ones_equal_those_alone():
    assert_sound(soak(SIZE, 4), 16)


def test_a_soak_that_finds_something_wrong_says_so(monkeypatch):
    monkeypatch.setattr(soak_of, "is_same", lambda kind, output, expected: False)
    with pytest.raises(SystemExit, match="became something else than alone"):
        soak(SIZE, 2)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_the_time_of_a_soak_is_a_number(minutes, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--soak", minutes])
    assert "--soak must be" in capsys.readouterr().err


@pytest.mark.slow
def test_hundreds_of_mixed_requests_for_a_minute():
    assert_sound(soak(SIZE, 120), 200)
