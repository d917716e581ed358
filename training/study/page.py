"""The page of a study: curves as mean and spread, the shares of steps, and the paper's figures beside them."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from PIL import Image

from training.config import to_tree
from training.evaluation.sheet import frame_losses, loss_unit, page_template
from training.optimization import DIFFUSION
from training.report.figures import PERCENT, colour_of, lay_out, plain
from training.report.step_matching import Curve, matched_curve
from training.report.tables import hours_in_words, percent
from training.study.results import HELD_OUT, PARTS, Trained
from training.study.specification import Study


# Beside the template of reports, with which it shares parts.
_TEMPLATE = Path(__file__).parents[1] / "report" / "study.html.jinja"

# A row of a table maps each heading to its cell.
Row = dict[str, str]


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_pictures(study: Study, trained: Sequence[Trained]) -> dict[str, bytes]:
    """Return PNGs by name: `curves` and `step_shares`, of each size of the study."""
    pictures = {}
    for size in study.sizes or (None,):
        some = [one for one in trained if one.of.size == size]
        keys = _distinct(some)
        ending = "" if size is None else f"-{size}"
        as_many = Line2D([], [], color="#999999", linestyle=":", label=f"as many as {plain(study.baseline)}")
        curves = [(", ".join(key), _curves(study, some, key)) for key in keys]
        shares = [(", ".join(key), _shares(study, some, key)) for key in keys]
        drawn = {
            "curves": lay_out(curves, _legend(study, 0)),
            "step_shares": lay_out(shares, [*_legend(study, 1), as_many]),
        }
        pictures |= {name + ending: small(picture) for name, picture in drawn.items() if picture is not None}
    return pictures


def small(picture: bytes) -> bytes:
    """Write a PNG of few colours with a palette: pages of studies are kept in repositories.  PNG -> PNG"""
    buffer = io.BytesIO()
    quantized = Image.open(io.BytesIO(picture)).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    quantized.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _distinct(trained: Sequence[Trained]) -> list[tuple[str, str]]:
    """Return (objective, split) of the curves, training first, without a modality that one direction alone has."""
    kept: dict[tuple[str, str], Curve] = {}
    for one in trained:
        for key, (steps, losses) in one.curves.items():
            twins = (other for name, other in one.curves.items() if name in kept and name[1] == key[1] and name != key)
            if not any(np.array_equal(losses, values) for _, values in twins):
                kept.setdefault(key, (steps, losses))
    return sorted(kept, key=lambda key: key[1] == HELD_OUT)


def _names(study: Study) -> list[str]:
    """Return the variants, the baseline first: so it has the first colour in every picture."""
    return sorted(study.variants, key=lambda variant: variant != study.baseline)


def _legend(study: Study, first: int) -> list[Line2D]:
    names = list(enumerate(_names(study)))[first:]
    return [Line2D([], [], color=colour_of(index), linewidth=3, label=plain(name)) for index, name in names]


def mean_of(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return (steps that all curves have, their mean, (the least, the greatest)), each (N,)."""
    steps = curves[0][0]
    for others, _ in curves[1:]:
        steps = np.intersect1d(steps, others)
    values = np.stack([losses[np.searchsorted(at, steps)] for at, losses in curves])
    return steps, values.mean(axis=0), (values.min(axis=0), values.max(axis=0))


def _curves(study: Study, trained: Sequence[Trained], key: tuple[str, str]) -> Callable[[Axes], bool]:
    """Make a function that draws an objective's curve of each variant: the mean of its seeds, least to greatest."""

    def draw(axes: Axes) -> bool:
        drawn = []
        for index, variant in enumerate(_names(study)):
            curves = [one.curves[key] for one in trained if one.of.variant == variant and key in one.curves]
            if curves:
                drawn += _draw_mean(axes, curves, index)
        frame_losses(axes, drawn if key[1] != HELD_OUT else [], drawn if key[1] == HELD_OUT else [])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(xlabel="step", ylabel="loss" if key[0] == "total" else loss_unit(_unit_of(key[0])))
        return any(map(len, drawn))

    return draw


def _unit_of(objective: str) -> str:
    return DIFFUSION if "noise" in objective else objective


def _shares(study: Study, trained: Sequence[Trained], key: tuple[str, str]) -> Callable[[Axes], bool]:
    """Make a function that draws the share of steps to the lowest loss that the baseline had by each step."""
    some = [one for one in trained if key in one.curves]
    baselines = {one.of.seed: one.curves[key] for one in some if one.of.variant == study.baseline}

    def draw(axes: Axes) -> bool:
        drawn = []
        for index, variant in enumerate(_names(study)[1:], 1):
            curves = []
            for one in some:
                if one.of.variant == variant and one.of.seed in baselines:
                    steps, needed = matched_curve(baselines[one.of.seed], one.curves[key])
                    curves.append((steps, needed / steps))
            if curves:
                drawn += _draw_mean(axes, curves, index)
        axes.axhline(1, color="#999999", linestyle=":")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set(xlabel=f"step of {plain(study.baseline)}", ylabel="steps to its loss")
        axes.set(xlim=(0, max(one.of.steps for one in trained)), ylim=(0, None))
        return any(np.isfinite(values).any() for values in drawn)

    return draw


def _draw_mean(axes: Axes, curves: Sequence[Curve], index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the mean of curves and the band from the least to the greatest; return the two edges of the band."""
    steps, mean, (least, greatest) = mean_of(curves)
    colour = colour_of(index)
    dots = {"marker": "o", "markersize": 3} if len(steps) <= 40 else {}
    axes.plot(steps, mean, color=colour, linewidth=1.5, **dots)
    axes.fill_between(steps, least, greatest, color=colour, alpha=0.2, linewidth=0)
    return least, greatest


# ---------------------------------------------------------------------------------------------------------------- page


def write_page(
    study: Study, name: str, results: Mapping[str, Any], trained: Sequence[Trained], pictures: Mapping[str, bytes]
) -> str:
    """HTML of a study that needs no network and no other file; `results` as `study_results` makes them."""
    runs = results["runs"]
    done = sum(run["finished"] for run in runs)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return page_template(_TEMPLATE).render(
        title=f"Study {name}",
        about=study.about,
        progress=f"{done} of {len(runs)} runs are finished. Drawn {now}.",
        baseline=study.baseline,
        window=results["steps_of_the_mean"],
        problems=results["problems"],
        pictures=pictures,
        width=lambda png: int.from_bytes(png[16:20], "big"),  # from the header of a PNG
        step_shares=_table_of_shares(study, results["step_shares"], _paper(study)),
        wall_clock=_table_of_shares(study, results["wall_clock"], {}),
        ahead=list(_table_ahead(results["ahead"])),
        runs=list(_table_of_runs(results, trained)),
        specification=yaml.safe_dump(to_tree(study), sort_keys=False, allow_unicode=True, width=110),
    )


def _of(row: Mapping[str, Any]) -> Row:
    size = {} if row["size"] is None else {"size": row["size"]}
    return size | {"variant": row["variant"], "objective": row["objective"], "losses": row["split"]}


def _paper(study: Study) -> dict[tuple[str, str], str]:
    """(variant, objective) -> the paper's shares in words."""
    words: dict[tuple[str, str], str] = {}
    for figure in study.paper:
        shares = " to ".join(map(percent, figure.share))
        before = words.get((figure.variant, figure.objective))
        words[figure.variant, figure.objective] = "; ".join(filter(None, (before, f"{shares} ({figure.source})")))
    return words


def _table_of_shares(study: Study, shares: Sequence[Mapping[str, Any]], paper: Mapping[tuple, str]) -> list[Row]:
    """Tabulate shares: a row for each variant, objective and split, beside it the paper's share."""
    rows: dict[tuple, Row] = {}
    for share in shares:
        key = (share["size"], share["variant"], share["objective"], share["split"])
        row = rows.setdefault(key, _of(share) | dict.fromkeys([*PARTS, "of each seed, at the end"], "–"))
        row[share["at"]] = _spread(share, percent)
        if share["at"] == "end":
            row["of each seed, at the end"] = ", ".join(_or_not_reached(value) for value in share["seeds"].values())
        if paper:
            row["the paper"] = paper.get((share["variant"], share["objective"]), "")
    return list(rows.values())


def _table_ahead(rows: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    table: dict[tuple, Row] = {}
    for row in rows:
        key = (row["size"], row["variant"], row["objective"], row["split"])
        table.setdefault(key, _of(row))[f"at {percent(row['at'])} of the steps"] = _spread(row, "{:+.4f}".format)
    return iter(table.values())


def _spread(figure: Mapping[str, Any], write: Callable[[float], str]) -> str:
    """Write the mean of the seeds, with deviation and range if there are several."""
    if figure["mean"] is None:
        missed = sum(value is None for value in figure["seeds"].values())
        return f"not reached by {missed} of {len(figure['seeds'])} seeds"
    if figure["deviation"] is None:
        return write(figure["mean"])
    low, high = write(figure["least"]), write(figure["greatest"])
    return f"{write(figure['mean'])} ± {write(figure['deviation']).lstrip('+')} ({low} to {high})"


def _or_not_reached(share: float | None) -> str:
    return "not reached" if share is None else percent(share)


def _table_of_runs(results: Mapping[str, Any], trained: Sequence[Trained]) -> Iterator[Row]:
    hours = {one.of.name: one.hours[1][-1] for one in trained}
    for run in results["runs"]:
        held_out = run["losses"][HELD_OUT]
        state = "finished" if run["finished"] else f"step {run['step']:,} of {run['steps']:,}"
        yield {
            "run": run["name"],
            "state": state,
            "time": hours_in_words(hours.get(run["name"])),
            "held out, last": ", ".join(f"{name} {loss:.4g}" for name, loss in held_out.items()),
        }
