"""The fuzz: it sees harm of every kind, good inputs pass, and a short form of it over all entry points."""

import pickle
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from modeling_mot import MoTConfig
from tests.fuzz import files, sandbox, verdicts
from tests.fuzz.case import Area, Case, WrongResult


ROOT = Path(__file__).parents[1]


def outcome_of(folder, call, names=(), is_command=False):
    """What the sandbox says of `call(place)`."""

    def make(rng, place):
        return Case("a case", lambda: call(place), names, is_command)

    return sandbox.run_case("area", Area(make, good=None), 0, folder)


def wrong(place):
    raise WrongResult("not as it has to be")


def unpickle(place):
    pickle.loads(files.pickled(place.ran))


def open_in_c(place):
    """By a library that opens files outside of Python."""
    import soundfile

    soundfile.read(str(place.outside / "secret.wav"))


def open_in_another_process(place):
    subprocess.run([sys.executable, "-c", f"open({str(place.outside / 'secret.txt')!r})"], check=True)


def command(code, line):
    def call(place):
        print(line, file=sys.stderr)
        return code

    return call


HARM = {
    "a loop": (verdicts.HANG, lambda place: [None for _ in iter(int, 1)]),
    "a wait": (verdicts.HANG, lambda place: time.sleep(60)),
    "more than is allowed": (verdicts.MEMORY, lambda place: np.ones(2**27, dtype=np.uint8).sum()),
    "a terabyte of numpy": (verdicts.MEMORY, lambda place: np.ones(2**40, dtype=np.uint8)),
    "a terabyte of torch": (verdicts.MEMORY, lambda place: torch.ones(2**40, dtype=torch.uint8)),
    "a pickle": (verdicts.CODE, unpickle),
    "a program": (verdicts.CODE, lambda place: subprocess.run(["true"], check=True)),
    "a secret": (verdicts.OUTSIDE, lambda place: (place.outside / "secret.txt").read_text()),
    "a secret in C": (verdicts.OUTSIDE, open_in_c),
    "a secret in another process": (verdicts.OUTSIDE, open_in_another_process),
    "passwords": (verdicts.OUTSIDE, lambda place: Path("/etc/passwd").read_text()),
    "an address": (verdicts.OUTSIDE, lambda place: socket.create_connection(("outside.invalid", 80))),
    "a crash": (verdicts.CRASH, lambda place: __import__("os").abort()),
    "a wrong result": (verdicts.WRONG, wrong),
}


@pytest.mark.parametrize("name", HARM)
def test_harm_of_every_kind_is_seen(tmp_path, monkeypatch, name):
    expected, call = HARM[name]
    monkeypatch.setattr(sandbox, "GIGABYTE", 2**26)
    if expected == verdicts.HANG:
        monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
        monkeypatch.setattr(sandbox, "WALL_SECONDS", 3)
    outcome = outcome_of(tmp_path, call)
    assert outcome.verdict == expected, outcome
    assert not list(tmp_path.iterdir())


def compare_in_our_code(place):
    """An operation that fails in a file of ours."""
    exec(compile("'8' < 1", str(ROOT / "modeling_mot" / "made_up.py"), "exec"))


def llama(place):
    LlamaConfig(vocab_size="8")


ERRORS = {
    "raised by us": (verdicts.CLEAR, lambda place: MoTConfig(vocab_size=0), ()),
    "of a library, which names the argument": (verdicts.CLEAR, llama, ("vocab_size",)),
    "of a library, which names something else": (verdicts.LIBRARY, llama, ("hidden_size",)),
    "of an operation in our code": (verdicts.LIBRARY, compare_in_our_code, ("str",)),
    "of torch": (verdicts.LIBRARY, lambda place: torch.ones(2) + torch.ones(3), ()),
    "an unknown keyword": (verdicts.CLEAR, lambda place: outcome_of(nope=1), ("nope",)),
    "of a kind that nobody expects": (verdicts.LIBRARY, lambda place: {}.shape, ("shape",)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_clear_if_we_raise_it_or_it_names_the_input(tmp_path, name):
    expected, call, names = ERRORS[name]
    assert outcome_of(tmp_path, call, names).verdict == expected


@pytest.mark.parametrize(
    ("code", "line", "expected"),
    [
        (2, "error: train.lr=-1 must be positive", verdicts.CLEAR),
        (2, "error: something must be positive", verdicts.LIBRARY),
        (2, "train.lr=-1 must be positive", verdicts.LIBRARY),
        (1, "Traceback (most recent call last):\nerror: train.lr", verdicts.LIBRARY),
        (0, "", verdicts.ACCEPTED),
    ],
)
def test_a_command_ends_clearly_with_a_code_and_a_line_that_names_the_key(tmp_path, code, line, expected):
    assert outcome_of(tmp_path, command(code, line), ("train.lr",), is_command=True).verdict == expected


def fuzz(*options):
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", *options], capture_output=True, text=True, cwd=ROOT)
    assert re.search(r"\| \*\*all\*\* \| \d+", done.stdout), done.stderr[-3000:]
    return done


def test_no_bad_input_of_a_short_fuzz_takes_anything_down():
    done = fuzz("--count", "110", "--seed", "1", "--jobs", "1")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 7])
def test_no_bad_input_of_a_thousand_takes_anything_down(seed):
    done = fuzz("--count", "1000", "--seed", str(seed), "--jobs", "2")
    assert done.returncode == 0, done.stdout
