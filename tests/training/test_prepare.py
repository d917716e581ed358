"""`python -m training.prepare`: what it makes is what training finds, and how it ends."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from training import prepare
from training.data.rows import prepare_rows
from training.model.building import load_processor
from training.train import load_recipe


RECIPE = ["data.row_length=4096", "data.sources.0.limit=12", "data.sources.1.limit=300"] + [
    f"data.validation_sources.{source}.limit=8" for source in (0, 1)
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A cache, the words that made it, and what was printed."""
    words = [*RECIPE, f"data.cache_dir={tmp_path_factory.mktemp('prepared')}"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert prepare.main([*words, "--workers", "1"]) == 0
    return words, printed.getvalue()


def test_training_finds_what_was_prepared(prepared, monkeypatch):
    words, printed = prepared
    recipe = load_recipe(words)
    processor = load_processor(recipe.model, None, True)
    monkeypatch.setattr("training.data.preparing.preparation.prepare", lambda *_: pytest.fail("prepared again"))
    stream, held_out, _ = prepare_rows(recipe.data, processor, 4)
    assert held_out
    for source in stream.sources:
        assert f"{source.config.name:20} {len(source):>12,} records {source.tokens:>16,} tokens" in printed
        assert source.fingerprint[:16] in printed
    assert sum((stream.row(index)["document_ids"] >= 0).mean() for index in range(8)) / 8 > 0.99
    report = stream.report()
    assert f"filled to {report['fill_rate']:.2%}" in printed
    assert ", ".join(f"{name} {share:.1%}" for name, share in report["shares_of_modalities"].items()) in printed


def test_verify_names_a_file_that_changed(prepared, tmp_path, capsys):
    words, _ = prepared
    shutil.copytree(words[-1].partition("=")[2], tmp_path / "cache")
    words = [*words[:-1], f"data.cache_dir={tmp_path / 'cache'}", "--workers", "1"]
    assert prepare.main([*words, "--verify"]) == 0
    path = next((tmp_path / "cache").rglob("*.arrow"))
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    for arguments in (words, [*words, "--verify"]):
        assert prepare.main(arguments) == 2
        assert f"{path.name} has another hash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["data.sources.0.path=/nowhere"], "path /nowhere does not exist"),
        (["data.max_pixel=3"], "did you mean data.max_pixels"),
    ],
)
def test_what_cannot_be_prepared_is_refused_by_name(tmp_path, capsys, extra, message):
    assert prepare.main([*RECIPE, f"data.cache_dir={tmp_path}", *extra]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_command_that_is_stopped_again_and_again_makes_the_same_files(tmp_path):
    command = [sys.executable, "-m", "training.prepare", *RECIPE, "--workers", "2"]
    command += ["data.sources.0.limit=1024"]
    root = Path(__file__).parents[2]
    begin = time.perf_counter()
    subprocess.run([*command, f"data.cache_dir={tmp_path / 'whole'}"], check=True, cwd=root)
    undisturbed = time.perf_counter() - begin
    killed, random, stopped = tmp_path / "killed", np.random.default_rng(0), 0
    for number in range(40):
        with open(tmp_path / "said", "w") as said:
            child = subprocess.Popen([*command, f"data.cache_dir={killed}"], cwd=root, stderr=said)
        time.sleep(random.uniform(0.2, 1) * undisturbed)
        signal_number = (signal.SIGKILL, signal.SIGINT)[number % 2]
        if child.poll() is not None:
            break
        os.kill(child.pid, signal_number)
        code = child.wait()
        # An interruption before it has begun ends it by the signal itself.
        expected = (130, -signal.SIGINT) if signal_number == signal.SIGINT else (-signal.SIGKILL,)
        assert code in expected, (tmp_path / "said").read_text()[-3000:]
        stopped += 1
    print(f"stopped {stopped} times")
    assert stopped >= 2
    subprocess.run([*command, f"data.cache_dir={killed}", "--verify"], check=True, cwd=root)
    made = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "whole", killed)
    ]
    assert made[0] == made[1]
