"""The figures of a study, `results.json`: which share of the baseline's steps each variant needs, with spreads.

A *share* compares two runs of one size and one seed. The goal is the loss that the baseline has at its end, or at two
thirds of its steps; the share is the first step at which the variant has that loss, over the baseline's step. Training
losses are running means over whole windows, held-out losses as they were measured, so a share is as fine as the steps
between evaluations. `wall_clock` holds the same shares of the baseline's time.

Each figure stands by seed, with its mean, its standard deviation (of a sample: over n - 1 seeds), the least and the
greatest. If a variant has not reached the goal by its end, its share is null for that seed, and so are mean and spread.
A seed is left out while its runs cannot tell yet.

    {"study", "baseline", "steps_of_the_mean", "runs": [{"name", "variant", "size", "seed", "step", "steps",
        "finished", "losses": {split: {objective: loss}}}], "problems": [text],
     "step_shares": [{"size", "variant", "objective", "split", "at": "end" or "two thirds",
                      "seeds": {seed: share}, "mean", "deviation", "least", "greatest"}],
     "wall_clock": the same,
     "ahead": [the same with "at": share of the steps; "seeds": {seed: loss there - loss of the baseline's end}]}

Objectives are `total`, the modalities of the targets (`text`, `image`, ...) and, held out, the directions of the data
(`text-to-image`, `text only`, ...). The held-out total weighs the modalities as training does.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from modeling_mot import MoTTransfusionConfig
from training.config import ConfigError, to_tree
from training.data.config import MODALITY_OF_TYPE
from training.optimization import DIFFUSION
from training.report.runs import Run, read_runs, section
from training.report.step_matching import Curve, first_steps, whole_windows
from training.run_files.folder import write_whole
from training.run_files.metrics import count_key, iterate_rows, series
from training.study.specification import Study, StudyRun


# At which part of the baseline's run a variant is compared with it: the decay of the learning rate flatters the end.
PARTS = {"two thirds": 2 / 3, "end": 1.0}
TRAINING, HELD_OUT = "training", "held out"
TOTAL = "total"
_VALIDATION = "diffusion_validation_loss"
# What is compared of the manifests of two runs.
_COMPARED = ("data_fingerprint", "rows_in_a_step", "forward_flops_per_token")

# (objective, split) -> its curve
Curves = Mapping[tuple[str, str], Curve]


@dataclass(frozen=True)
class Trained:
    """The figures of a run of a study that has begun: all that results and page are made of.

    Attributes:
        curves: of each objective and split. Losses have seven digits, training curves eight values a window.
        hours: hours of training by the steps of the curves.
        manifest: what the run's manifest says of its rows and its FLOPs.
    """

    of: StudyRun
    last_step: int
    curves: Curves
    hours: Curve
    manifest: Mapping[str, Any]

    @cached_property
    def is_finished(self) -> bool:
        return self.of.is_finished()

    def hours_by(self, step: float) -> float:
        """Return the hours of training by a step of the curves."""
        steps, hours = self.hours
        return float(hours[np.searchsorted(steps, step)])


def read_trained(runs: Sequence[StudyRun], window: int) -> list[Trained]:
    """Read the runs that have done a step: from their records where they have one, else from their folders.

    Raises:
        ConfigError: naming a record that cannot be read, or that has running means of another window.
    """
    recorded = {run.name: _from_record(run, window) for run in runs if run.record.is_file()}
    begun = [run for run in runs if run.name not in recorded and run.folder.metrics.is_file()]
    begun = [run for run in begun if any(iterate_rows(run.folder.metrics))]
    read = zip(begun, read_runs([run.folder.path for run in begun]), strict=True)
    known = recorded | {of.name: _from_folder(of, run, window) for of, run in read}
    return [known[run.name] for run in runs if run.name in known]


def _from_folder(of: StudyRun, run: Run, window: int) -> Trained:
    curves = curves_of(run, window)
    steps = np.unique(np.concatenate([run.steps[-1:], *(at for at, _ in curves.values())]))
    manifest = {key: run.manifest[key] for key in _COMPARED if key in run.manifest}
    return Trained(of, run.last_step, curves, (steps, _rounded(run.places("hours", steps))), manifest)


def write_record(trained: Trained, window: int) -> None:
    """Write the record of a finished run: with it, a study goes on and draws its page without the run's folder."""
    (steps, hours), curves = trained.hours, trained.curves
    record = {
        "recipe": to_tree(trained.of.recipe),
        "steps_of_the_mean": window,
        "manifest": dict(trained.manifest),
        "hours": {"steps": steps.tolist(), "hours": hours.tolist()},
        "curves": [
            {"objective": objective, "split": split, "steps": at.tolist(), "losses": losses.tolist()}
            for (objective, split), (at, losses) in curves.items()
        ],
    }
    trained.of.record.parent.mkdir(parents=True, exist_ok=True)
    # A line for each curve: the file is kept in repositories.
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items() if key != "curves"]
    lines.append('"curves": [\n' + ",\n".join(map(json.dumps, record["curves"])) + "\n]")
    write_whole(trained.of.record, "{\n" + ",\n".join(lines) + "\n}\n")


def _from_record(run: StudyRun, window: int) -> Trained:
    record = run.read_record()
    if record.get("steps_of_the_mean") != window:
        raise ConfigError(
            f"{run.record} has running means over {record.get('steps_of_the_mean')} steps, but the study now takes "
            f"{window}; remove it to run {run.name} anew"
        )
    try:
        curves = {(row["objective"], row["split"]): _curve(row["steps"], row["losses"]) for row in record["curves"]}
        hours = _curve(record["hours"]["steps"], record["hours"]["hours"])
        return Trained(run, int(hours[0][-1]), curves, hours, record["manifest"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{run.record} is no record of a run: {error!r}; remove it to run {run.name} anew") from error


def _curve(steps: Sequence[int], values: Sequence[float]) -> Curve:
    return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Round to seven digits, which is what a float32 holds."""
    return np.array([float(f"{value:.7g}") for value in values])


def default_window(runs: Sequence[StudyRun]) -> int:
    """Return the steps of a running mean: a fortieth of the longest run, as in a report."""
    return max(1, max(run.steps for run in runs) // 40)


# --------------------------------------------------------------------------------------------------- curves of one run


def curves_of(run: Run, window: int) -> dict[tuple[str, str], Curve]:
    """Return the curves of a run that are compared, of training and then held out."""
    curves = {(TOTAL, TRAINING): run.curve("loss")}
    curves |= {(objective, TRAINING): run.curve(f"loss_{objective}") for objective in run.objectives}
    curves = {key: _thinned(whole_windows(curve, window), window) for key, curve in curves.items() if len(curve[0])}
    curves[TOTAL, HELD_OUT] = _held_out_total(run)
    curves |= {(objective, HELD_OUT): run.held_out(objective) for objective in run.objectives}
    for key in dict.fromkeys(key for row in run.evaluation for key in row):
        direction, _, kind = key.removeprefix("eval/").rpartition("/")
        if direction and kind in ("loss", _VALIDATION):
            curves[_name(direction, kind), HELD_OUT] = series(run.evaluation, key)
    return {key: (steps, _rounded(losses)) for key, (steps, losses) in curves.items() if len(steps)}


def _thinned(curve: Curve, window: int) -> Curve:
    """Keep eight values a window, counted back from the last."""
    every = max(1, window // 8)
    kept = np.arange(len(curve[0]) - 1, -1, -every)[::-1]
    return curve[0][kept], curve[1][kept]


def _name(direction: str, kind: str) -> str:
    """Name what a held-out direction measures; one modality alone is told from that modality in all directions."""
    is_alone = direction.rpartition("/")[2] in MODALITY_OF_TYPE.values()
    name = f"{direction} only" if is_alone else direction
    return f"{name}, fixed noise levels" if kind == _VALIDATION else name


def _held_out_total(run: Run) -> Curve:
    """Add up the held-out losses as the training's loss does: tokens by their number, diffusion by its weight."""
    train = section(run.config, "train")
    weights = {name: float(np.nansum(run.column(count_key(name)))) for name in run.objectives if name != DIFFUSION}
    weights = {name: number * (train.get("modality_weights") or {}).get(name, 1.0) for name, number in weights.items()}
    factors = {name: weight / max(sum(weights.values()), 1.0) for name, weight in weights.items()}
    if DIFFUSION in run.objectives:
        set_by_recipe = section(section(run.config, "model"), "transfusion").get("diffusion_loss_weight")
        factors[DIFFUSION] = MoTTransfusionConfig().diffusion_loss_weight if set_by_recipe is None else set_by_recipe

    # Only evaluations of everything that is learnt have a total.
    factors = {f"eval/loss_{name}": factor for name, factor in factors.items() if factor}
    rows = [row for row in run.evaluation if all(row.get(key) is not None for key in factors)] if factors else []
    totals = [sum(factor * row[key] for key, factor in factors.items()) for row in rows]
    return np.array([row["step"] for row in rows], dtype=np.int64), np.array(totals, dtype=np.float64)


# ----------------------------------------------------------------------------------------------------- pairs of runs


def loss_by(curve: Curve, step: float) -> tuple[int, float] | None:
    """Return the last step of a curve up to `step`, and the loss there; None if the curve begins later."""
    steps, losses = curve
    index = int(np.searchsorted(steps, step, side="right")) - 1
    return None if index < 0 else (int(steps[index]), float(losses[index]))


# How a figure of one pair is found: (baseline, variant, objective and split) -> the figure, None for a goal that was
# not reached; NaN while the runs cannot tell.
Figure = Callable[[Trained, Trained, tuple[str, str]], float | None]


def step_share(part: float, of_hours: bool = False) -> Figure:
    """Return the function that finds the share of the baseline's steps, or of its hours, at a part of its steps."""

    def share(baseline: Trained, other: Trained, key: tuple[str, str]) -> float | None:
        end = part * baseline.of.steps
        goal = loss_by(baseline.curves[key], end)
        if goal is None or not _has_come_to(baseline, part):
            return np.nan
        step, loss = goal
        first = first_steps(other.curves[key], np.array([loss]))
        if np.isnan(first[0]):
            return None if other.is_finished else np.nan
        if of_hours:
            return other.hours_by(first[0]) / baseline.hours_by(step)
        return float(first[0] / step)

    return share


def loss_ahead(part: float) -> Figure:
    """Return the function that finds a variant's loss at a part of its steps, less that of the baseline's end."""

    def difference(baseline: Trained, other: Trained, key: tuple[str, str]) -> float:
        goal = loss_by(baseline.curves[key], baseline.of.steps)
        there = loss_by(other.curves[key], part * other.of.steps)
        if goal is None or there is None or not (baseline.is_finished and _has_come_to(other, part)):
            return np.nan
        return there[1] - goal[1]

    return difference


def _has_come_to(trained: Trained, part: float) -> bool:
    return trained.is_finished if part == 1 else trained.last_step >= part * trained.of.steps


# ------------------------------------------------------------------------------------------------------------- a study


def study_results(study: Study, name: str, runs: Sequence[StudyRun], trained: Sequence[Trained], window: int) -> dict:
    """Return all figures of a study as JSON values; the top of this file describes them."""
    return {
        "study": name,
        "baseline": study.baseline,
        "steps_of_the_mean": window,
        "runs": [_run_figures(run, {one.of.name: one for one in trained}.get(run.name)) for run in runs],
        "problems": list(_problems(study, trained)),
        "step_shares": [row for at, part in PARTS.items() for row in _compare(study, trained, at, step_share(part))],
        "wall_clock": [
            row for at, part in PARTS.items() for row in _compare(study, trained, at, step_share(part, of_hours=True))
        ],
        "ahead": [row for part in study.shares for row in _compare(study, trained, part, loss_ahead(part))],
    }


def _run_figures(run: StudyRun, trained: Trained | None) -> dict[str, Any]:
    losses: dict[str, dict[str, float]] = {TRAINING: {}, HELD_OUT: {}}
    for (objective, split), (_, values) in trained.curves.items() if trained else ():
        losses[split][objective] = float(values[-1])
    return {
        "name": run.name,
        "variant": run.variant,
        "size": run.size,
        "seed": run.seed,
        "step": trained.last_step if trained else 0,
        "steps": run.steps,
        "finished": run.is_finished(),
        "losses": losses,
    }


def _compare(study: Study, trained: Sequence[Trained], at: str | float, figure: Figure) -> Iterator[dict[str, Any]]:
    """Compare each variant with the baseline, for each objective and split, over the seeds that can tell."""
    by_kind = {(one.of.variant, one.of.size, one.of.seed): one for one in trained}
    for size in study.sizes or (None,):
        for variant in study.variants:
            pairs = {
                seed: (by_kind[study.baseline, size, seed], by_kind[variant, size, seed])
                for seed in range(study.seeds)
                if {(study.baseline, size, seed), (variant, size, seed)} <= by_kind.keys()
            }
            keys = dict.fromkeys(key for baseline, _ in pairs.values() for key in baseline.curves)
            for key in keys if variant != study.baseline else ():
                both = {seed: pair for seed, pair in pairs.items() if all(key in one.curves for one in pair)}
                found = {seed: figure(*pair, key) for seed, pair in both.items()}
                found = {seed: value for seed, value in found.items() if value is None or not np.isnan(value)}
                if found:
                    row = {"size": size, "variant": variant, "objective": key[0], "split": key[1], "at": at}
                    yield row | spread(found)


def spread(by_seed: Mapping[int, float | None]) -> dict[str, Any]:
    """Return figures by seed with their mean, standard deviation (over n - 1), least and greatest.

    A seed without a figure (None) leaves none of these: they would be those of the lucky seeds.
    """
    values = np.array([value for value in by_seed.values() if value is not None], dtype=np.float64)
    seeds = {str(seed): value for seed, value in by_seed.items()}
    if len(values) < len(by_seed):
        return {"seeds": seeds, "mean": None, "deviation": None, "least": None, "greatest": None}
    return {
        "seeds": seeds,
        "mean": float(values.mean()),
        "deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
        "least": float(values.min()),
        "greatest": float(values.max()),
    }


def _problems(study: Study, trained: Sequence[Trained]) -> Iterator[str]:
    """Say where runs of one size and seed had not the same rows, or not the same FLOPs for a token."""
    baselines = {(one.of.size, one.of.seed): one for one in trained if one.of.variant == study.baseline}
    for one in trained:
        baseline = baselines.get((one.of.size, one.of.seed))
        if baseline is None or baseline is one:
            continue
        for key in ("data_fingerprint", "rows_in_a_step"):
            ours, theirs = one.manifest.get(key), baseline.manifest.get(key)
            if ours != theirs:
                yield f"{one.of.name} has {key} {str(ours)[:12]}, {baseline.of.name} {str(theirs)[:12]}: other rows"
        ours, theirs = (section(of.manifest, "forward_flops_per_token") for of in (one, baseline))
        for name, flops in theirs.items():
            if abs(ours.get(name, 0) / flops - 1) > 0.01:
                times = f"{ours.get(name, 0) / flops:.3g} times"
                yield f"{one.of.name} spends {times} the FLOPs of {baseline.of.name} on a token of {name}"
