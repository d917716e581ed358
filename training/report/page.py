"""The report as one HTML file that needs no network, no script and no other file."""

import base64
import html
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import yaml

from training.report.figures import View, colour_of
from training.report.runs import AXES, EVENTS, Run
from training.report.tables import count, describe_launches, describe_run, duration, objectives_of, percent


_HEADINGS = {
    "losses": ("Losses", "Training faint and as a running mean; held-out losses as points where they were measured."),
    "step_matching": ("Step matching", ""),
    "gradients": (
        "Gradients and learning rate",
        "Norms before clipping, of all parameters and of those of each tower.",
    ),
    "speed": ("Speed", "Tokens are positions that are not padding; MFU counts the products of the model alone."),
    "resources": ("Saving, memory, updates left out", "A save's seconds stand at the step after it."),
}
_EVENT_LIMIT = 50


def write_page(runs: Sequence[Run], figures: Mapping[str, Any], pictures: Mapping[str, bytes], view: View) -> str:
    """HTML of a report: `figures` as `tables.compare` makes them, `pictures` PNGs by name as `draw_pictures` does."""
    several = len(runs) > 1
    title = f"{len(runs)} training runs" if several else f"Training run {runs[0].name}"
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    means = f", running means over {view.window} steps" if view.window > 1 else ""
    about = f"Curves over {AXES[view.axis]}{means}. Drawn {now}."
    parts = [f"<h1>{_text(title)}</h1><p class=note>{_text(about)}</p>", _at_a_glance(runs, figures)]
    if several:
        parts.append(_at_the_same_step(runs, figures))
    for name, picture in pictures.items():
        heading, note = _HEADINGS[name]
        parts.append(f"<h2>{heading}</h2>" + (f"<p class=note>{note}</p>" if note else ""))
        if name == "step_matching":
            parts.append(_step_matching(runs, figures))
        parts.append(_picture(picture, heading, scale=0.7))
    parts += ["<h2>Runs</h2>" if several else "<h2>The run</h2>"]
    parts += [_run(index, run, is_open=not several) for index, run in enumerate(runs)]
    return _PAGE.format(title=_text(title), body="\n".join(parts))


# ------------------------------------------------------------------------------------------------------------- tables


def _at_a_glance(runs: Sequence[Run], figures: Mapping[str, Any]) -> str:
    objectives = objectives_of(runs)
    loss_heads, loss_cells = _loss_columns(objectives, [run["at_end"] for run in figures["runs"]])
    heads = [
        "run",
        "variant",
        "step",
        *loss_heads,
        "tokens",
        "time",
        "tokens/s",
        "MFU",
        "data wait",
        "saving",
        "memory",
    ]
    heads += ["left out", "done again"]
    rows = []
    for index, (run, of) in enumerate(zip(runs, figures["runs"], strict=True)):
        memory = of["memory_bytes"]
        cells = [
            _swatch(index, run),
            _text((run.config.get("model") or {}).get("variant") or "–"),
            f"{of['step']:,}" + (f" of {of['planned_steps']:,}" if of["planned_steps"] else ""),
            *loss_cells[index],
            count(of["tokens"]),
            duration(of["hours"]),
            count(of["tokens_per_second"]),
            percent(of["mfu"]),
            percent(of["data_share"]),
            percent(of["saving_share"]),
            "" if memory is None else f"{memory / 2**30:.3g} GiB",
            "" if of["skipped_steps"] is None else f"{of['skipped_steps']:,}",
            f"{of['steps_done_again']:,}",
        ]
        rows.append([cell or "–" for cell in cells])
    note = (
        "Losses: training (running mean) / held out, at the end of each run; the lowest of a column is bold. Time is that "
        "of steps and saving, without evaluations. Left out: updates that were not made, because something was not "
        "finite or, where so configured, a spike. Done again: steps repeated after a resume."
    )
    return f"<h2>At a glance</h2>{_table(heads, rows)}<p class=note>{note}</p>"


def _at_the_same_step(runs: Sequence[Run], figures: Mapping[str, Any]) -> str:
    step, held_out_step = figures["same_step"], figures["same_step_held_out"]
    heads, cells = _loss_columns(objectives_of(runs), [run["at_same_step"] for run in figures["runs"]])
    rows = [[_swatch(index, run), *cells[index]] for index, run in enumerate(runs)]
    where = (
        f"held out at step {held_out_step:,}" if held_out_step is not None else "no step at which all were evaluated"
    )
    note = f"Training (running mean) at step {step:,}, the last that all have reached / {where}."
    return f"<h2>At the same step</h2>{_table(['run', *heads], rows)}<p class=note>{note}</p>"


def _loss_columns(objectives: Sequence[str], losses: Sequence[Mapping]) -> tuple[list[str], list[list[str]]]:
    """One column per objective, `training / held out`; the lowest of each split bold where there are several runs."""
    cells: list[list[str]] = [[] for _ in losses]
    for objective in objectives:
        lowest = {}
        for split in ("training", "held_out"):
            values = [of[objective][split] for of in losses if of[objective][split] is not None]
            lowest[split] = min(values) if len(losses) > 1 and values else None
        for row, of in zip(cells, losses, strict=True):
            parts = [_loss(of[objective][split], lowest[split]) for split in ("training", "held_out")]
            row.append(" / ".join(parts))
    return [_text(f"loss {objective}") for objective in objectives], cells


def _loss(value: float | None, lowest: float | None) -> str:
    if value is None:
        return "–"
    return f"<b>{value:.4g}</b>" if value == lowest else f"{value:.4g}"


def _step_matching(runs: Sequence[Run], figures: Mapping[str, Any]) -> str:
    reference = runs[0].name
    heads = ["run", "objective", "losses", f"last loss of {_text(reference)}", "at step", "reached at step", "share"]
    indices = {run.name: index for index, run in enumerate(runs)}
    rows = []
    for match in figures["step_matching"]:
        index = indices[match["run"]]
        reached = f"not yet, lowest {match['lowest']:.4g}" if match["step"] is None else f"{match['step']:,}"
        cells = [_text(match["objective"]), match["split"], f"{match['loss']:.4g}", f"{match['reference_step']:,}"]
        rows.append([_swatch(index, runs[index]), *cells, reached, f"<b>{percent(match['share']) or '–'}</b>"])
    note = (
        f"How many steps a run needs to first reach the last loss of {_text(reference)}, the run named first, as a share "
        "of the steps of that one: the dots. The lines are the same for the lowest loss that it had had by each step; below "
        "the dotted one a run needs fewer steps. Where its loss rises towards the end, as held-out losses do, the last is "
        "an easier loss than its lowest: look at the lines then."
    )
    return f"<p class=note>{note}</p>{_table(heads, rows)}"


def _run(index: int, run: Run, is_open: bool) -> str:
    parts = [f"<p class=problem>{_text(problem)}</p>" for problem in run.problems]
    parts.append(
        _table([], [[_text(what), f"<span class=words>{_text(value)}</span>"] for what, value in describe_run(run)])
    )
    if run.evaluation:
        row = run.evaluation[-1]
        figures = [(key.removeprefix("eval/"), value) for key, value in row.items() if key.startswith("eval/")]
        rows = [[_text(key), "–" if value is None else f"{value:.5g}"] for key, value in figures]
        parts.append(f"<h4>Held out, at step {row['step']:,}</h4>{_table([], rows)}")
    parts.append(f"<h4>Checkpoints</h4><p>{_saves(run)}</p>")
    if run.events:
        rows = [[f"{step:,}", _text(EVENTS.get(event, event))] for step, event in run.events[-_EVENT_LIMIT:]]
        which = f", the last {_EVENT_LIMIT} of {len(run.events):,}" if len(run.events) > _EVENT_LIMIT else ""
        parts.append(f"<h4>Events{which}</h4>{_table(['step', 'what'], rows)}")
    if launches := describe_launches(run):
        rows = [[_text(cell) for cell in launch[:3]] + [f"<code>{_text(launch[3])}</code>"] for launch in launches]
        parts.append(f"<h4>Launches</h4>{_table(['started', 'from step', 'processes', 'command'], rows)}")
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=110)
        parts.append(f"<details><summary>Configuration</summary><pre>{_text(text)}</pre></details>")
    samples = run.path / "samples.png"
    if samples.is_file():
        parts.append(f"<h4>Samples</h4>{_picture(samples.read_bytes(), f'samples of {run.name}')}")
    opened = " open" if is_open else ""
    return f"<details class=run{opened}><summary>{_swatch(index, run)}</summary>{''.join(parts)}</details>"


def _saves(run: Run) -> str:
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


# --------------------------------------------------------------------------------------------------------- HTML itself


def _text(value: Any) -> str:
    return html.escape(str(value))


def _swatch(index: int, run: Run) -> str:
    return f"<span class=swatch style='background:{colour_of(index)}'></span>{_text(run.name)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the first of each row is its heading."""
    head = "".join(f"<th scope=col>{cell}</th>" for cell in heads)
    body = "".join(
        f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows
    )
    return f"<div class=wide><table>{f'<thead><tr>{head}</tr></thead>' if heads else ''}<tbody>{body}</tbody></table></div>"


def _picture(png: bytes, words: str, scale: float = 1.0) -> str:
    width = round(scale * int.from_bytes(png[16:20], "big"))  # the header of a PNG
    content = base64.b64encode(png).decode("ascii")
    return f"<img alt='{_text(words)}' width={width} src='data:image/png;base64,{content}'>"


# The policy keeps a reader's browser from fetching anything, whatever a run's texts hold.
_PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2em auto; max-width: 84em; padding: 0 1.5em }}
h1 {{ font-size: 1.7em; margin-bottom: 0 }}
h2 {{ font-size: 1.25em; margin: 2.2em 0 .5em; border-bottom: 1px solid #ddd; padding-bottom: .2em }}
h4 {{ margin: 1.4em 0 .3em }}
.note {{ color: #666; font-size: .9em; max-width: 62em; margin: .4em 0 }}
.problem {{ color: #a33; margin: .4em 0 }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em }}
th, td {{ text-align: left; padding: .3em 1.1em .3em 0; border-bottom: 1px solid #eee; vertical-align: top; white-space: nowrap }}
thead th {{ color: #666; font-weight: normal }}
tbody th {{ font-weight: 500 }}
.words, code {{ white-space: pre-wrap; overflow-wrap: anywhere }}
.swatch {{ display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em }}
img {{ max-width: 100%; height: auto; display: block; margin: .6em 0 }}
details.run {{ border: 1px solid #ddd; border-radius: 8px; padding: .6em 1em; margin: .7em 0 }}
details.run > summary {{ font-weight: 600; cursor: pointer }}
pre {{ background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: .85em }}
</style>
{body}
</html>
"""
