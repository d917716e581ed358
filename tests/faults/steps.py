"""Faults of steps: losses that are not finite, losses that jump, and trackers that cannot be reached."""

from pathlib import Path

from safetensors.torch import load_file

from tests.faults.bench import Bench, Outcome, rows_by_step
from training.run_files.folder import RunFolder
from training.run_files.metrics import read_metrics


CLEAN_STEPS = 1000


def not_finite(bench: Bench) -> Outcome:
    """NaN in the loss of one rank, an infinite gradient on another; then NaN in every step."""
    # Single steps are left out on all ranks, and change nothing.
    outcome, run = Outcome(), bench.new("not-finite")
    faults = [{"do": "nan loss", "nth": 3, "rank": bench.ranks - 1}, {"do": "infinite gradient", "nth": 6, "rank": 0}]
    ended = bench.launch(run, "train.steps=8", "train.keep_checkpoints=9", faults=faults)
    outcome.times += 2
    outcome.expect(ended.code == 0, f"the run ended with {ended.code}: {ended.printed[-1500:]}")
    events = {step: row["event"] for step, row in rows_by_step(run).items() if row["event"]}
    outcome.expect(events == {3: "not_finite", 6: "not_finite"}, f"events are {events}")
    unchanged = [step for step in range(2, 9) if _state(run, step) == _state(run, step - 1)]
    outcome.expect(unchanged == [3, 6], f"the state is that of the step before in steps {unchanged}, not in 3 and 6")

    # A run whose every step is not finite ends by itself.
    run = bench.new("never-finite")
    always = {"do": "nan loss", "nth": 3, "steps": 10**9, "rank": 0}
    ended = bench.launch(run, "train.not_finite_limit=4", faults=[always])
    outcome.times += 5
    outcome.expect(set(ended.codes.values()) == {4}, f"ranks ended with {ended.codes}: {ended.printed[-1500:]}")
    outcome.expect("not finite for 5 steps in a row, up to step 7" in ended.printed, "the error is not named")
    bench.check_checkpoints(run, outcome, 7)
    outcome.remarks = ["parameters and optimizer unchanged on all ranks; 5 in a row end all ranks with code 4"]
    return outcome


def _state(run: Path, step: int) -> dict[str, bytes]:
    """Return the weights and both moments of a checkpoint; the number of updates is a scalar in its manifest."""
    files = sorted((RunFolder(run).checkpoint(step) / "state").iterdir())
    return {
        f"{file.name} {name}": tensor.numpy().tobytes() for file in files for name, tensor in load_file(file).items()
    }


def spikes(bench: Bench) -> Outcome:
    """A loss five times as high, flagged or left out; and a clean run."""
    # A jump is flagged, and left out only if the recipe says so.
    outcome = Outcome()
    for skip in (False, True):
        run = bench.new(f"spike-{skip}")
        words = [f"train.skip_spikes={str(skip).lower()}", "train.save_every=0"]
        ended = bench.launch(run, *words, faults=[{"do": "high loss", "nth": 45, "steps": 2}])
        outcome.times += 1
        outcome.expect(ended.code == 0, f"the run ended with {ended.code}: {ended.printed[-1500:]}")
        events = {step: row["event"] for step, row in rows_by_step(run).items() if row["event"]}
        expected = {45: "spike_skipped", 46: "spike_skipped"} if skip else {45: "spike"}
        outcome.expect(events == expected, f"events are {events}")

    # A clean run has no flags.
    run = bench.new("clean")
    words = [f"train.steps={CLEAN_STEPS}", "train.save_every=0"]
    ended = bench.launch(run, *words, ranks=1, timeout=900)
    rows, _ = read_metrics(run / "metrics.jsonl")
    outcome.expect(len(rows) == CLEAN_STEPS, f"the clean run ended with {ended.code}: {ended.printed[-1500:]}")
    flagged = [row["step"] for row in rows if row["event"]]
    outcome.expect(not flagged, f"clean steps {flagged} were flagged")
    outcome.remarks = [f"flagged once, left out when asked; {len(flagged)} flags in {len(rows)} clean steps"]
    return outcome


def trackers(bench: Bench) -> Outcome:
    """A tracker that cannot be reached, from the start and later."""
    outcome = Outcome()
    for call in ("init_trackers", "log"):
        run = bench.new(f"tracker-{call}")
        fault = {"do": "tracker down", "call": call}
        ended = bench.launch(run, "train.tracker=tensorboard", "train.save_every=0", faults=[fault])
        outcome.times += 1
        outcome.expect(ended.code == 0, f"the run ended with {ended.code}: {ended.printed[-1500:]}")
        outcome.expect(ended.printed.count("the tracker failed") == 1, "that the tracker is down is not said once")
        bench.compare(run, outcome)
    outcome.remarks = ["one warning, and the run goes on"]
    return outcome
