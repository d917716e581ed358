"""Step matching (MoT, section 3.2, figure 5b): how many steps one model needs to reach the loss of another.

For each loss on the curve of the reference, we look for the step at which the other model first reaches that loss.
The figure is this step for the reference's last loss, as a share of the reference's steps: 45.5 % means that fewer than
half of the steps were needed. Training losses are running means over whole windows, so that one lucky step does not
count. Held-out losses are taken as they are, at the steps where they were measured.

N steps of a curve, M losses to reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.report.runs import Run
from training.run_files.metrics import smooth


# A curve is (steps, losses), both (N,), by step.
Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class StepMatch:
    """How soon `run` reaches the last loss of `reference` for one objective and split.

    Attributes:
        loss, reference_step: the last loss of `reference`, and its step.
        step: the first step at which `run` has that loss; None if it never has.
        lowest: the lowest loss of `run`.
    """

    run: str
    reference: str
    objective: str
    split: str
    loss: float
    reference_step: int
    step: int | None
    lowest: float

    @property
    def share(self) -> float | None:
        """Steps that were needed, divided by the steps of the reference."""
        return None if self.step is None else self.step / self.reference_step


def whole_windows(curve: Curve, window: int) -> Curve:
    """Return running means over exactly `window` values (over all values if there are fewer), each at its last step."""
    steps, losses = curve
    first = max(0, min(window, len(losses)) - 1)
    return steps[first:], smooth(losses, window)[first:]


def first_steps(curve: Curve, losses: np.ndarray) -> np.ndarray:
    """Return the first step at which the curve is at or below each loss; NaN if it never is.  (M,) -> (M,)"""
    steps, values = curve
    lowest = np.minimum.accumulate(values)
    index = np.searchsorted(-lowest, -np.asarray(losses), side="left")
    return np.append(steps.astype(np.float64), np.nan)[index]


def matched_curve(reference: Curve, other: Curve) -> Curve:
    """Return the steps of the reference, and the steps that the other needs to the reference's lowest loss by then."""
    steps, losses = reference
    return steps, first_steps(other, np.minimum.accumulate(losses))


def loss_curves(run: Run, objective: str, window: int) -> dict[str, Curve]:
    """Return split -> the curve of an objective that is compared."""
    return {
        "training": whole_windows(run.curve(f"loss_{objective}"), window),
        "held out": run.held_out(objective),
    }


def match_steps(runs: Sequence[Run], window: int) -> list[StepMatch]:
    """Match every run against the first, for each objective and split that both have."""
    reference, *others = runs
    matches = []
    for objective in reference.objectives:
        for split, target in loss_curves(reference, objective, window).items():
            for run in others:
                curve = loss_curves(run, objective, window)[split]
                if not len(target[0]) or not len(curve[0]):
                    continue
                # The first step at which the run's curve is as low as the reference's last loss; NaN: never.
                step = first_steps(curve, target[1][-1:])[0]
                matches.append(
                    StepMatch(
                        run.name,
                        reference.name,
                        objective,
                        split,
                        loss=float(target[1][-1]),
                        reference_step=int(target[0][-1]),
                        step=None if np.isnan(step) else int(step),
                        lowest=float(curve[1].min()),
                    )
                )
    return matches
