"""What a study will take before it begins: its runs, their hours, their disk."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from training.plan.__main__ import make_parser, plan_figures
from training.plan.memory import FLOAT
from training.report.tables import hours_in_words
from training.run_files.metrics import read_metrics
from training.study.specification import Study, StudyRun


def describe_plan(study: Study, runs: Sequence[StudyRun], workers: int) -> Iterator[str]:
    """Describe the runs of a study, a line for each variant and size, then hours and disk of all; nothing is started.

    Hours are those of the steps that are left, without evaluations and samples. A step takes as long as the finished
    steps of such runs took; if there are none yet, as long as training.plan estimates for one thread of this machine.
    """
    torch.set_num_threads(1)
    hours, disk, measured = 0.0, 0, []
    kinds: dict[tuple, list[StudyRun]] = {}
    for run in runs:
        kinds.setdefault((run.variant, run.size), []).append(run)

    # One plan for each variant and size: seeds do not change it.
    options = make_parser().parse_args(["--device", "cpu"])
    for (variant, size), some in kinds.items():
        plan = plan_figures(some[0].recipe, options)
        seconds = [second for run in some for second in _step_seconds(run)]
        step = float(np.median(seconds)) if seconds else plan["time"]["step_seconds"]
        left = sum(run.steps - len(_rows(run)) for run in some if not run.is_finished())
        bytes_of_run = _disk(some[0], plan["parameters"]["total"], plan["parameters"]["frozen"])
        measured.append(bool(seconds))
        hours += left * step / 3600
        disk += len(some) * bytes_of_run
        yield (
            f"{' '.join(filter(None, (variant, size)))}: {len(some)} runs of {some[0].steps:,} steps, "
            f"{sum(run.is_finished() for run in some)} finished; {plan['parameters']['active'] / 1e6:.3g} M active "
            f"parameters of {plan['parameters']['total'] / 1e6:.3g} M; {step:.3g} s a step "
            f"({'measured' if seconds else 'estimated'}), {bytes_of_run / 2**20:,.0f} MiB a run"
        )

    source = f"estimated at {options.utilisation:.0%} of the peak of one thread (training.plan --device cpu)"
    source = "measured in runs of this study" if all(measured) else f"{source}, or measured where runs have begun"
    yield (
        f"in all: {len(runs)} runs, {hours_in_words(hours)} of training left, {hours_in_words(hours / workers)} with "
        f"{workers} at a time, without evaluations and samples; step times are {source}"
    )
    yield f"disk: {disk / 2**30:.3g} GiB at most, of checkpoints and final folders"


def _step_seconds(run: StudyRun) -> list[float]:
    """Return the seconds of the steps that are done; of a run that has a record, their mean."""
    if run.record.is_file():
        return [run.read_record()["hours"]["hours"][-1] * 3600 / run.steps]
    return [row["step_seconds"] for row in _rows(run)]


def _rows(run: StudyRun) -> list[dict]:
    return read_metrics(run.folder.metrics)[0] if run.folder.metrics.is_file() else []


def _disk(run: StudyRun, parameters: int, frozen: int) -> int:
    """Return the bytes of a run: its checkpoints, one that is being written, and the final folder."""
    train = run.recipe.train
    state = (3 + (train.ema_decay is not None)) * FLOAT * parameters  # weights, AdamW's two moments, the average
    checkpoints = (train.keep_checkpoints + 1) * (state + FLOAT * frozen)
    return checkpoints + FLOAT * (parameters + frozen)
