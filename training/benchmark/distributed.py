"""Time sharded processes beside one process, and the cost of saving, by real runs of the training command."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from training.benchmark.rounds import compare
from training.run_files.metrics import read_metrics


TRAINING = Path(__file__).resolve().parents[1]
RECIPE = TRAINING / "configs" / "emoji.yaml"
FSDP = TRAINING / "configs" / "accelerate" / "cpu-2-fsdp.yaml"
WARM_UP = 4


def run(folder: Path, ranks: int, steps: int, *words: str) -> list[dict]:
    """Run the default recipe in `ranks` processes, with the same rows in a step; return the rows of its metrics."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(FSDP), "--num_processes", str(ranks)]
    command += [str(TRAINING / "train.py"), str(RECIPE), f"train.output_dir={folder}", f"train.steps={steps}"]
    command += [f"train.rows={20 // ranks}", "train.cpu=true", "train.progress_bar=false", *words]
    command += ["samples.enabled=false", "evaluation.rows=0", f"optimizer.warmup_steps={steps // 2}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return read_metrics(folder / "metrics.jsonl")[0][WARM_UP:]


def time_distributed(ranks: int, rounds: int, steps: int, save_every: int) -> dict:
    """Time a step of one process, of sharded processes, and of sharded processes that save.

    Returns:
        dict: the figures of `compare`, saving included; `save_seconds`: way of saving -> how long one save holds up the
        training; `data_share`: the share of a step that is spent waiting for rows.
    """
    saving = f"train.save_every={save_every}"
    contestants = {
        "one process": (1, ()),
        f"{ranks} processes": (ranks, ()),
        "saving": (ranks, (saving,)),
        "saving asynchronously": (ranks, (saving, "train.save_asynchronously=true")),
    }

    # One run of each contestant in turn; each run gives its mean step, its saves and its share of waiting.
    means: dict[str, list[float]] = {name: [] for name in contestants}
    stalls: dict[str, list[float]] = {name: [] for name in contestants}
    waits: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds):
            for name, (processes, words) in contestants.items():
                rows = run(Path(scratch) / f"{turn}-{name.replace(' ', '-')}", processes, steps, *words)
                step, stall = ([row[key] for row in rows] for key in ("step_seconds", "checkpoint_seconds"))
                means[name].append((sum(step) + sum(stall)) / len(rows))
                stalls[name] += [seconds for seconds in stall if seconds]
                waits[name].append(sum(row["data_seconds"] for row in rows) / sum(step))

    many = f"{ranks} processes"
    pairs = ((many, "one process"), ("saving", many), ("saving asynchronously", many))
    return compare(means, pairs) | {
        "save_seconds": {name: statistics.median(values) for name, values in stalls.items() if values},
        "data_share": {name: statistics.median(values) for name, values in waits.items()},
        "save_every": save_every,
    }
