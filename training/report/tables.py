"""The figures of a report, for its tables and for report.json."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from training.report.runs import Run, section
from training.report.step_matching import loss_curves, match_steps


def losses_at(run: Run, objective: str, step: int, window: int, held_out_step: int | None) -> dict[str, float | None]:
    """Return the running mean of the training loss at `step`, and the held-out loss at `held_out_step`."""
    steps, losses = loss_curves(run, objective, window)["training"]
    index = int(np.searchsorted(steps, step, side="right")) - 1
    held_steps, held = run.held_out(objective)
    found = np.flatnonzero(held_steps == held_out_step)
    return {
        "training": float(losses[index]) if index >= 0 else None,
        "held_out": float(held[found[0]]) if len(found) else None,
    }


def objectives_of(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(objective for run in runs for objective in run.objectives))


def common_steps(runs: Sequence[Run]) -> tuple[int, int | None]:
    """Return the last step that all runs have reached, and the last step until then at which all were evaluated."""
    step = min(run.last_step for run in runs)
    evaluated = set.intersection(*({row["step"] for row in run.evaluation} for run in runs))
    return step, max((at for at in evaluated if at <= step), default=None)


def compare(runs: Sequence[Run], window: int) -> dict[str, Any]:
    """Return the figures of all runs: losses at the end of each and at the same step, costs, and step matching."""
    step, held_out_step = common_steps(runs)
    objectives = objectives_of(runs)
    figures: dict[str, Any] = {"running_mean_steps": window, "runs": [], "same_step": step}
    figures["same_step_held_out"] = held_out_step
    # Each run on its own, at its end and at the step that all have reached.
    for run in runs:
        last_evaluation = run.evaluation[-1]["step"] if run.evaluation else None
        figures["runs"].append(
            {
                "name": run.name,
                "step": run.last_step,
                "planned_steps": run.planned_steps,
                "steps_done_again": run.repeated,
                "skipped_steps": run.skipped_steps,
                "events": [{"step": at, "event": event} for at, event in run.events],
                "saved_steps": run.saved_steps,
                **run.totals(),
                "at_end": {name: losses_at(run, name, run.last_step, window, last_evaluation) for name in objectives},
                "at_same_step": {name: losses_at(run, name, step, window, held_out_step) for name in objectives},
            }
        )
    # Each run against the first: how many steps it needs for the same loss.
    matches = match_steps(runs, window)
    figures["step_matching"] = [{**asdict(match), "share": match.share} for match in matches]
    return figures


def describe_run(run: Run) -> list[tuple[str, str]]:
    """Return (what, value) for each fact that the manifest of a run records."""
    manifest, model = run.manifest, section(run.config, "model")
    world = section(manifest, "world")
    per_token = section(manifest, "forward_flops_per_token")
    versions = {"python": manifest.get("python"), **section(manifest, "versions")}
    peak, source = manifest.get("peak_flops"), manifest.get("peak_flops_source")
    # What was trained, how it ran, on what machine, from which code and data. Facts without a value are left out.
    described = [
        ("folder", run.path),
        ("variant", model.get("variant")),
        ("active parameters", count(manifest.get("active_parameters"))),
        ("total parameters", count(manifest.get("total_parameters"))),
        ("forward FLOPs per token", ", ".join(f"{name} {count(value)}" for name, value in per_token.items())),
        ("precision", manifest.get("precision")),
        ("processes", run.processes if manifest else None),
        ("distributed", world.get("distributed")),
        ("mesh", " x ".join(f"{name} {size}" for name, size in section(world, "mesh").items())),
        ("device", manifest.get("device")),
        ("peak of a process", peak and count(peak, "FLOP/s") + (f", {source}" if source else "")),
        ("platform", manifest.get("platform")),
        ("threads of a process", manifest.get("cpu_threads")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("commit", manifest.get("commit")),
        ("data fingerprint", manifest.get("data_fingerprint")),
        ("processor fingerprint", manifest.get("processor_fingerprint")),
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in section(manifest, "seeds").items())),
        ("started", manifest.get("started")),
        ("command", _words(manifest.get("command"))),
    ]
    return [(what, str(value)) for what, value in described if value not in (None, "")]


def describe_launches(run: Run) -> list[tuple[str, str, str, str]]:
    """Return (started, from step, processes, command) of each launch of a run."""
    return [
        (
            str(launch.get("started", "")),
            str(launch.get("from_step", "")),
            str(section(launch, "world").get("processes", "")),
            _words(launch.get("command")),
        )
        for launch in run.launches
    ]


def _words(command: Any) -> str:
    return " ".join(map(str, command)) if isinstance(command, list) else str(command or "")


# -------------------------------------------------------------------------------------------------- figures in words


def count(value: Any, unit: str = "") -> str:
    """Write a number with three digits and a power of a thousand: 13.4 M, 1.25 E; None as ""."""
    if not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    for power, name in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:#.3g}".rstrip(".") + f" {name}{unit}"
    return f"{value:.3g}" + (f" {unit}" if unit else "")


def hours_in_words(hours: float | None) -> str:
    """Write hours as `41 s`, `12.5 min`, `3.2 h` or `4.1 days`; None as ""."""
    if hours is None:
        return ""
    for limit, unit, name in ((1 / 60, 3600, "s"), (1, 60, "min"), (48, 1, "h")):
        if hours < limit:
            return f"{hours * unit:.3g} {name}"
    return f"{hours / 24:.3g} days"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}".replace("%", " %")
