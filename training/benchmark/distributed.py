"""Time sharded processes by real runs of the training command: beside one process, saving, and in growing worlds."""

import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from training.benchmark.rounds import compare
from training.plan.__main__ import make_parser, plan_figures
from training.run_files.metrics import read_metrics
from training.train import load_recipe


TRAINING = Path(__file__).resolve().parents[1]
RECIPE = TRAINING / "configs" / "emoji.yaml"
FSDP = TRAINING / "configs" / "accelerate" / "cpu-2-fsdp.yaml"
WARM_UP = 4


def run(folder: Path, ranks: int, steps: int, rows: int, *words: str) -> list[dict]:
    """Run the default recipe in `ranks` processes of `rows` rows each; return the rows of its metrics."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(FSDP), "--num_processes", str(ranks)]
    command += [str(TRAINING / "train.py"), str(RECIPE), f"train.output_dir={folder}", f"train.steps={steps}"]
    command += [f"train.rows={rows}", "train.cpu=true", "train.progress_bar=false", *words]
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
                folder = Path(scratch) / f"{turn}-{name.replace(' ', '-')}"
                rows = run(folder, processes, steps, 20 // processes, *words)
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


# ----------------------------------------------------------------------------------------------------- growing worlds


def time_worlds(worlds: Sequence[int], variants: Sequence[str], rounds: int, steps: int, rows: int) -> dict:
    """Time a step of each variant in worlds of several sizes, beside the planner's arithmetic (figures 18 and 19).

    The batch grows with the world, as in the paper's section 6.2.1: each process has `rows` rows. All processes share
    this machine, so a step takes world * (FLOPs of a process / F + bytes that a process receives / B) seconds. FLOPs
    and bytes are the planner's. F and B are the machine's, from the measured steps of the first variant in the first
    and in the second world. All other steps are predictions.

    Args:
        worlds: numbers of processes, ascending, two at least.
        variants: values of `model.variant`; the ratios are to the first.

    Returns:
        dict: `worlds`: the figures of `compare` by world; `steps`: measured and planned seconds, FLOPs and bytes of
        each variant and world; `flops_per_second` and `bytes_per_second` of the machine.
    """
    # Real runs, in turn.
    means: dict[tuple[int, str], list[float]] = {(world, name): [] for world in worlds for name in variants}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds):
            for world, name in means:
                folder = Path(scratch) / f"{turn}-{world}-{name}"
                measured = run(folder, world, steps, rows, f"model.variant={name}")
                means[world, name].append(statistics.mean(row["step_seconds"] for row in measured))
    medians = {key: statistics.median(values) for key, values in means.items()}

    # What the machine does in a second, from two steps of the first variant.
    flops, received = {}, {}
    for world, name in means:
        plan = _plan(world, name, rows)
        flops[world, name] = world * plan["flops"]["step_of_a_process"]
        received[world, name] = world * plan["traffic"]["total"]
    baseline, (first, second, *_) = variants[0], worlds
    speed = flops[first, baseline] / medians[first, baseline]
    waiting = medians[second, baseline] - flops[second, baseline] / speed
    transfer = received[second, baseline] / waiting if waiting > 0 else math.inf

    pairs = [(name, baseline) for name in variants[1:]]
    return {
        "worlds": {str(world): compare({name: means[world, name] for name in variants}, pairs) for world in worlds},
        "steps": [
            {
                "world": world,
                "variant": name,
                "measured_seconds": medians[world, name],
                "planned_seconds": flops[world, name] / speed + received[world, name] / transfer,
                "flops": flops[world, name],
                "received_bytes": received[world, name],
            }
            for world, name in means
        ],
        "flops_per_second": speed,
        "bytes_per_second": transfer if waiting > 0 else None,
    }


def _plan(world: int, variant: str, rows: int) -> dict:
    options = make_parser().parse_args(["--device", "cpu", "--world", str(world)])
    return plan_figures(load_recipe([str(RECIPE), f"model.variant={variant}", f"train.rows={rows}"]), options)
