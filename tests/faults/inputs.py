"""Faults of inputs: data that changed since they were prepared, hostile recipes, and secrets that must not leak."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.bench import TRAIN, Bench, Outcome


SECRETS = ("hf_QwErTyUiOpAsDfGh", "pa55w0rdOfTheHub", "keyOfTheTracker99")
NEVER = {"do": "kill", "at": "step", "nth": -1}  # so that the ranks note their exit codes


def changed_data(bench: Bench) -> Outcome:
    """A source with fewer records than the run began with; prepared data that are cut short."""
    # The source has another number of records than the checkpoint knows.
    outcome, run = Outcome(), bench.copy("shrunk")
    ended = bench.launch(run, "data.sources.0.limit=5", faults=[NEVER])
    outcome.times += 1
    outcome.expect(set(ended.codes.values()) == {2}, f"ranks ended with {ended.codes}: {ended.printed[-800:]}")
    outcome.expect("data was" in ended.printed, f"data are not named: {ended.printed[-800:]}")

    # A file of prepared data is half as long.
    chunk = max((bench.folder / "cache").rglob("*.arrow"), key=lambda path: path.stat().st_size)
    whole = chunk.read_bytes()
    os.truncate(chunk, len(whole) // 2)
    ended = bench.launch(run, faults=[NEVER])
    outcome.times += 1
    outcome.expect(0 not in ended.codes.values() and chunk.name in ended.printed, f"not named: {ended.printed[-800:]}")
    chunk.write_bytes(whole)
    bench.finish(run, outcome)
    outcome.remarks = ["both refused by name with code 2; the restored run goes on"]
    return outcome


def python_tags(bench: Bench) -> Outcome:
    """!!python/object in a recipe and on the command line."""
    outcome, made = Outcome(), bench.folder / "made-by-yaml"
    tag = f"!!python/object/apply:os.mkdir [{str(made)!r}]"
    recipe = bench.folder / "recipe.yaml"
    recipe.write_text(f"train: {tag}\n", encoding="utf-8")
    for words in ([str(recipe)], [f"train.seed={tag}"]):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, str(TRAIN), *words], capture_output=True, text=True, cwd=bench.folder)
        outcome.times += 1
        outcome.expect(done.returncode == 2, f"{words} ended with {done.returncode}: {done.stderr[-800:]}")
    outcome.expect(not made.exists(), "a tag was executed")
    outcome.remarks = [f"code 2 after {time.perf_counter() - begin:.1f} s"]
    return outcome


def secrets(bench: Bench) -> Outcome:
    """A token, a password and a key: in the environment, in the recipe, on the command line, in an address."""
    # One run that ends well, and one whose address does not answer.
    outcome, run = Outcome(), bench.new("secrets")
    segment = f"text:{{word}} {SECRETS[0]} https://user:{SECRETS[1]}@hub/ api_key={SECRETS[2]}"
    word = f"data.sources.1.templates.0.segments.0='{segment}'"
    kept = dict(os.environ)
    os.environ.update(HF_TOKEN=SECRETS[0], WANDB_API_KEY=SECRETS[2])
    try:
        ended = bench.launch(run, "train.steps=4", "train.tracker=tensorboard", word)
        address = f"data.sources.0.path=https://user:{SECRETS[1]}@127.0.0.1:9/pictures.parquet"
        refused = bench.launch(bench.new("secret-address"), address)
    finally:
        os.environ.clear()
        os.environ.update(kept)
    outcome.times = 2
    outcome.expect(ended.code == 0, f"the run ended with {ended.code}: {ended.printed[-800:]}")
    outcome.expect(refused.code != 0, "an address that does not answer was trained on")

    # The secrets are nowhere.
    for path in (file for file in sorted(Path(run).rglob("*")) if file.is_file()):
        data = path.read_bytes()
        for secret in SECRETS:
            outcome.expect(secret.encode() not in data, f"{secret} is in {path.relative_to(run)}")
    for secret in SECRETS:
        outcome.expect(secret not in ended.printed + refused.printed, f"{secret} was printed")
    outcome.remarks = ["in no file of the run, and not printed"]
    return outcome
