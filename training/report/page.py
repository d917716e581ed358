"""The report as one HTML file that needs no network, no script and no other file: the data of `page.html.jinja`."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from training.evaluation.sheet import page_template
from training.report.figures import View, colour_of
from training.report.runs import AXES, EVENTS, Run
from training.report.tables import count, describe_launches, describe_run, hours_in_words, objectives_of, percent


_EVENT_LIMIT = 50

# A row of a table maps each heading to its cell: a text, a run, or pairs of a text and whether it is bold.
Row = dict[str, Any]


def write_page(runs: Sequence[Run], figures: Mapping[str, Any], pictures: Mapping[str, bytes], view: View) -> str:
    """HTML of a report: `figures` as `tables.compare` makes them, `pictures` PNGs by name as `draw_pictures` does."""
    several = len(runs) > 1
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    means = f", running means over {view.window} steps" if view.window > 1 else ""
    at = figures["same_step_held_out"]
    return page_template(Path(__file__).with_name("page.html.jinja")).render(
        title=f"{len(runs)} training runs" if several else f"Training run {runs[0].name}",
        about=f"Curves over {AXES[view.axis]}{means}. Drawn {now}.",
        runs=runs,
        colours={run.name: colour_of(index) for index, run in enumerate(runs)},
        pictures=pictures,
        width=lambda png: int.from_bytes(png[16:20], "big"),  # from the header of a PNG
        at_a_glance=_at_a_glance(runs, figures),
        at_the_same_step=_at_the_same_step(runs, figures) if several else [],
        same_step=f"{figures['same_step']:,}",
        same_step_held_out=f"held out at step {at:,}" if at is not None else "no step at which all were evaluated",
        step_matching=_step_matching(runs, figures),
        described={run.name: _describe(run) for run in runs},
    )


# ------------------------------------------------------------------------------------------------------------- tables


def _at_a_glance(runs: Sequence[Run], figures: Mapping[str, Any]) -> list[Row]:
    """Tabulate what each run came to and what it cost; a dash stands for a figure that the run does not record."""
    losses = _losses(objectives_of(runs), [run["at_end"] for run in figures["runs"]])
    rows = []
    for run, figure, loss in zip(runs, figures["runs"], losses, strict=True):
        memory, planned, skipped = figure["memory_bytes"], figure["planned_steps"], figure["skipped_steps"]
        row = {
            "run": run,
            "variant": str((run.config.get("model") or {}).get("variant") or ""),
            "step": f"{figure['step']:,}" + (f" of {planned:,}" if planned else ""),
            **loss,
            "tokens": count(figure["tokens"]),
            "time": hours_in_words(figure["hours"]),
            "tokens/s": count(figure["tokens_per_second"]),
            "MFU": percent(figure["mfu"]),
            "data wait": percent(figure["data_share"]),
            "saving": percent(figure["saving_share"]),
            "memory": "" if memory is None else f"{memory / 2**30:.3g} GiB",
            "left out": "" if skipped is None else f"{skipped:,}",
            "done again": f"{figure['steps_done_again']:,}",
        }
        rows.append({heading: cell or "–" for heading, cell in row.items()})
    return rows


def _at_the_same_step(runs: Sequence[Run], figures: Mapping[str, Any]) -> list[Row]:
    losses = _losses(objectives_of(runs), [run["at_same_step"] for run in figures["runs"]])
    return [{"run": run, **loss} for run, loss in zip(runs, losses, strict=True)]


def _losses(objectives: Sequence[str], losses: Sequence[Mapping]) -> list[Row]:
    """Tabulate the objectives as columns, `training / held out`; of several runs, the lowest of each is bold."""
    rows: list[Row] = [{} for _ in losses]
    for objective in objectives:
        lowest = {}
        for split in ("training", "held_out"):
            values = [loss[objective][split] for loss in losses if loss[objective][split] is not None]
            lowest[split] = min(values) if len(losses) > 1 and values else None
        for row, loss in zip(rows, losses, strict=True):
            training, held_out = (_loss(loss[objective][split], lowest[split]) for split in ("training", "held_out"))
            row[f"loss {objective}"] = [training, (" / ", False), held_out]
    return rows


def _loss(value: float | None, lowest: float | None) -> tuple[str, bool]:
    return ("–", False) if value is None else (f"{value:.4g}", value == lowest)


def _step_matching(runs: Sequence[Run], figures: Mapping[str, Any]) -> list[Row]:
    by_name = {run.name: run for run in runs}
    return [
        {
            "run": by_name[match["run"]],
            "objective": match["objective"],
            "losses": match["split"],
            f"last loss of {match['reference']}": f"{match['loss']:.4g}",
            "at step": f"{match['reference_step']:,}",
            "reached at step": (
                f"not yet, lowest {match['lowest']:.4g}" if match["step"] is None else f"{match['step']:,}"
            ),
            "share": [(percent(match["share"]) or "–", True)],
        }
        for match in figures["step_matching"]
    ]


# ------------------------------------------------------------------------------------------------------------- one run


def _describe(run: Run) -> dict[str, Any]:
    """Return what the page says of one run, by the names that the template uses."""
    last = run.evaluation[-1] if run.evaluation else {"step": 0}
    held_out = [(key.removeprefix("eval/"), value) for key, value in last.items() if key.startswith("eval/")]
    left_out = len(run.events) - _EVENT_LIMIT
    samples = run.path / "samples.png"
    return {
        "facts": describe_run(run),
        "evaluated_at": f"{last['step']:,}",
        "held_out": [(key, "–" if value is None else f"{value:.5g}") for key, value in held_out],
        "saves": _saves(run),
        "events": [
            {"step": f"{step:,}", "what": EVENTS.get(event, str(event))} for step, event in run.events[-_EVENT_LIMIT:]
        ],
        "which_events": f", the last {_EVENT_LIMIT} of {len(run.events):,}" if left_out > 0 else "",
        "launches": [
            dict(zip(("started", "from step", "processes", "command"), launch)) for launch in describe_launches(run)
        ],
        "configuration": (
            yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=110) if run.config else ""
        ),
        "samples": samples.read_bytes() if samples.is_file() else None,
    }


def _saves(run: Run) -> str:
    """Return the checkpoints that the folder holds, and how long saving held training up."""
    kept = ", ".join(f"{step:,}" for step in run.saved_steps) or "none"
    totals = run.totals()
    saves = int((run.column("checkpoint_seconds") > 0).sum())
    if not saves:
        return f"in the folder: {kept}"
    mean, longest = totals["seconds_per_save"], totals["longest_save"]
    return (
        f"in the folder: {kept}; {saves:,} saves between steps held training up for {mean:.3g} s on average, "
        f"{longest:.3g} s at most, {percent(totals['saving_share'])} of the time in all"
    )
