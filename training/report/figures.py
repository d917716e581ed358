"""The pictures of a report: curves of one or several runs on shared axes.

A run has the same colour in every panel. A panel for which no run has values is left out, and so is a figure without
panels.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter

from training.evaluation.sheet import HELD_OUT_COLOUR, draw_held_out, draw_loss, frame_losses, loss_unit, thinned
from training.report.runs import AXES, EVENTS, Run
from training.report.step_matching import StepMatch, loss_curves, match_steps, matched_curve
from training.report.tables import objectives_of


# The colours of Okabe and Ito, which colour-blind eyes tell apart, without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")

_PLAIN = FuncFormatter(lambda value, place: f"{value:.3g}")
_PERCENT = FuncFormatter(lambda share, place: f"{100 * share:g} %")
_MARKERS = {"not_finite": "X", "spike": "^", "spike_skipped": "v", "resumed": "|"}

_STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.edgecolor": "#888888", "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 9, "axes.labelcolor": "#444444", "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "xtick.color": "#666666", "ytick.color": "#666666", "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


@dataclass(frozen=True)
class View:
    """How curves are drawn: over which axis of `AXES`, and with running means over how many steps."""

    axis: str
    window: int


# A panel: its title, and a function that draws it and returns whether there was anything to draw.
Panel = tuple[str, Callable[[Axes], bool]]


def colour_of(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def draw_pictures(runs: Sequence[Run], view: View) -> dict[str, bytes]:
    """Return PNGs by name: `losses`, `step_matching` (of several runs), `gradients`, `speed`, `resources`."""
    # Losses: a panel for each objective, or for the sum where a run of an earlier version records only that.
    objectives = objectives_of(runs)
    towers = list(dict.fromkeys(tower for run in runs for tower in run.towers))
    losses = [(objective, _losses(runs, view, objective)) for objective in objectives]
    losses = losses or [("all objectives", _curve(runs, view, "loss", unit="nats per target", marked=True))]

    # Gradients, speed and resources: a panel for each figure of a step.
    gradients = [("Gradient norm, all parameters", _curve(runs, view, "grad_norm", unit="before clipping", log=True))]
    gradients += [
        (f"Gradient norm, {tower}", _curve(runs, view, f"grad_norm_{tower}", unit="before clipping", log=True))
        for tower in towers
    ]
    gradients += [("Learning rate", _curve(runs, view, "lr", unit="learning rate", formatter=_PLAIN, mean=False))]
    speed = [
        ("Throughput", _curve(runs, view, "tokens_per_second", unit="tokens/s", formatter=EngFormatter(sep=""))),
        ("MFU", _curve(runs, view, "mfu", unit="share of the peak", formatter=_PERCENT)),
        ("Waiting for data", _curve(runs, view, _data_share, unit="share of the step", formatter=_PERCENT)),
    ]
    resources = [
        ("Saving", _saves(runs, view)),
        ("Memory", _curve(runs, view, _memory, unit="GiB, the most so far", mean=False)),
        ("Updates left out", _curve(runs, view, _skipped, unit="so far", mean=False)),
    ]

    # Step matching: a panel for each objective and split, training before held out.
    matches: dict[tuple[str, str], list[StepMatch]] = {}
    for match in sorted(match_steps(runs, view.window), key=lambda match: match.split != "training"):
        matches.setdefault((match.objective, match.split), []).append(match)
    matching = [
        (f"{objective}, {split}", _matching(runs, view, found)) for (objective, split), found in matches.items()
    ]

    groups = {
        "losses": losses,
        "step_matching": matching,
        "gradients": gradients,
        "speed": speed,
        "resources": resources,
    }
    drawn = {name: _draw(runs, view, name, panels) for name, panels in groups.items()}
    return {name: picture for name, picture in drawn.items() if picture is not None}


# ---------------------------------------------------------------------------------------------------- laying panels out


def _draw(runs: Sequence[Run], view: View, name: str, panels: Sequence[Panel]) -> bytes | None:
    """Lay panels out on one figure.  -> PNG, or None if all panels are empty"""
    with rc_context(_STYLE):
        # Panels are drawn once to see which have anything to show, and at most three stand in a line.
        filled = [(title, draw) for title, draw in panels if draw(Figure().subplots())]
        if not filled:
            return None
        columns = min(len(filled), 3)
        if name == "step_matching" and len(filled) % 2 == 0:
            columns = min(columns, len(filled) // 2)  # training above, held out below
        lines = -(-len(filled) // columns)

        # The filled panels take the first places of the grid; places that are left over are removed.
        figure = Figure(figsize=(max(4.1 * columns, 6.2), 3.1 * lines + 0.5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03)
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, (title, draw) in zip(grid, filled):
            axes.set_title(_plain(title))
            draw(axes)
        for axes in grid[len(filled) :]:
            axes.remove()

        handles = _legend(runs, view, name)
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 5))
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=160)
        return picture.getvalue()


def _legend(runs: Sequence[Run], view: View, name: str) -> list[Line2D]:
    # The colours of runs; of step matching without the reference, which has no curve there.
    runs_of = enumerate(runs[1:], 1) if name == "step_matching" else enumerate(runs)
    handles = [Line2D([], [], color=colour_of(index), linewidth=3, label=_plain(run.name)) for index, run in runs_of]

    # The kinds of line that this figure has.
    if name == "step_matching":
        handles.append(Line2D([], [], color="#999999", linestyle=":", label="as many steps as " + _plain(runs[0].name)))
    elif name != "resources" and view.window > 1:
        handles.append(Line2D([], [], color="#666666", linewidth=0.8, alpha=0.5, label="each step"))
        handles.append(Line2D([], [], color="#666666", linewidth=1.5, label=f"mean of {view.window} steps"))

    # Held-out curves and the marks of events stand on the losses alone.
    if name == "losses":
        if any(len(run.held_out(objective)[0]) for run in runs for objective in run.objectives):
            colour = HELD_OUT_COLOUR if len(runs) == 1 else "#666666"
            handles.append(Line2D([], [], color=colour, marker="o", markersize=4.5, linestyle="--", label="held out"))
        present = {event for run in runs for _, event in run.events}
        for event, marker in _MARKERS.items():
            if event in present:
                style = {"color": "none", "marker": marker, "markerfacecolor": "#333333", "markeredgecolor": "#333333"}
                handles.append(Line2D([], [], label=EVENTS[event], **style))
    return handles


def _plain(text: str) -> str:
    """Escape `$`, which matplotlib would take for the beginning of a formula."""
    return text.replace("$", r"\$")


def _finish(axes: Axes, runs: Sequence[Run], view: View, unit: str) -> None:
    end = max(float(run.places(view.axis, run.steps[-1:])[0]) for run in runs)
    axes.set_xlim(-0.02 * end, 1.02 * end)
    axes.set(xlabel=AXES[view.axis], ylabel=unit)
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if view.axis != "hours" else axes.xaxis.get_major_formatter())
    axes.locator_params(axis="x", nbins=6)


# --------------------------------------------------------------------------------------------------- what panels show


def _losses(runs: Sequence[Run], view: View, objective: str) -> Callable[[Axes], bool]:
    def draw(axes: Axes) -> bool:
        training, evaluated = [], []
        for index, run in enumerate(runs):
            steps, values = run.curve(f"loss_{objective}")
            draw_loss(axes, (run.places(view.axis, steps), values), view.window, colour_of(index))
            held_steps, held_values = run.held_out(objective)
            colour = HELD_OUT_COLOUR if len(runs) == 1 else colour_of(index)
            draw_held_out(axes, (run.places(view.axis, held_steps), held_values), colour)
            training.append(values)
            evaluated.append(held_values)
        frame_losses(axes, training, evaluated)
        mark_events(axes, runs, view)
        _finish(axes, runs, view, loss_unit(objective))
        return any(map(len, training)) or any(map(len, evaluated))

    return draw


def mark_events(axes: Axes, runs: Sequence[Run], view: View) -> None:
    """Mark events along the top of a panel: the loss of such a step may lie outside the panel, or be no number."""
    for index, run in enumerate(runs):
        for event, marker in _MARKERS.items():
            steps = np.array([step for step, kind in run.events if kind == event], dtype=np.int64)
            if len(steps):
                style = {"marker": marker, "linestyle": "none", "markersize": 7, "color": colour_of(index)}
                height = np.full(len(steps), 0.97 - 0.05 * (index % 4))
                axes.plot(run.places(view.axis, steps), height, transform=axes.get_xaxis_transform(), **style)


def _curve(
    runs: Sequence[Run],
    view: View,
    what: str | Callable[[Run], np.ndarray],
    unit: str,
    formatter=None,
    mean: bool = True,
    log: bool = False,
    marked: bool = False,
) -> Callable[[Axes], bool]:
    """Make a function that draws a value of each step: `what` is a key of the rows, or a function of a run.

    A step whose value is NaN has no point. `mean` draws a running mean over faint values, `log` allows a logarithmic
    axis, and `marked` marks events.
    """

    def draw(axes: Axes) -> bool:
        everything = []
        for index, run in enumerate(runs):
            values = run.column(what) if isinstance(what, str) else what(run)
            known = np.isfinite(values)
            places, values = run.places(view.axis, run.steps[known]), values[known]
            if mean:
                draw_loss(axes, (places, values), view.window, colour_of(index))
            else:
                # Schedules are often the same: the wider line of an earlier run shows behind that of a later one.
                width = 1.5 + 2 * (len(runs) - 1 - index) / len(runs)
                axes.plot(*thinned(places, values), color=colour_of(index), linewidth=width)
            everything.append(values)
        values = np.concatenate(everything)
        if len(values):
            _frame(axes, values, log)
        if formatter is not None:
            axes.yaxis.set_major_formatter(formatter)
        if marked:
            mark_events(axes, runs, view)
        _finish(axes, runs, view, unit)
        return bool(len(values))

    return draw


def _frame(axes: Axes, values: np.ndarray, log: bool) -> None:
    """Begin the axis at zero; or make it logarithmic, if `log` allows it and the values span more than a decade."""
    low, high = values.min(), values.max()
    if log and low > 0 and high > 20 * low:
        axes.set_yscale("log")
    elif low >= 0:
        # A single slow or wild step must not flatten all others.
        axes.set_ylim(0, 1.15 * (min(high, 1.5 * np.quantile(values, 0.98)) or high or 1))


def _saves(runs: Sequence[Run], view: View) -> Callable[[Axes], bool]:
    def draw(axes: Axes) -> bool:
        found = False
        for index, run in enumerate(runs):
            seconds = np.nan_to_num(run.column("checkpoint_seconds"))
            saved = seconds > 0
            found |= bool(saved.any())
            places = run.places(view.axis, run.steps[saved])
            axes.vlines(places, 0, seconds[saved], color=colour_of(index), linewidth=1, alpha=0.5)
            axes.plot(places, seconds[saved], "o", markersize=4.5, color=colour_of(index))
        axes.set_ylim(bottom=0)
        _finish(axes, runs, view, "seconds that training stood still")
        return found

    return draw


def _matching(runs: Sequence[Run], view: View, matches: Sequence[StepMatch]) -> Callable[[Axes], bool]:
    """Make a function that draws the matches of one objective and split."""
    objective, split = matches[0].objective, matches[0].split

    def draw(axes: Axes) -> bool:
        # A line for each run: its step of the same loss, over the reference's step; a dot where the reference ends.
        reference = loss_curves(runs[0], objective, view.window)[split]
        indices = {run.name: index for index, run in enumerate(runs)}
        for line, match in enumerate(matches):
            index = indices[match.run]
            curve = loss_curves(runs[index], objective, view.window)[split]
            axes.plot(*matched_curve(reference, curve), color=colour_of(index), linewidth=1.6, drawstyle="steps-post")
            if match.step is not None:
                axes.plot(match.reference_step, match.step, "o", color=colour_of(index), clip_on=False, zorder=3)

            # The share of steps, written in the corner, a line for each run.
            words = "last loss not reached" if match.share is None else f"{match.share:.1%} of the steps"
            place = {
                "x": 0.97,
                "y": 0.05 + 0.08 * (len(matches) - 1 - line),
                "transform": axes.transAxes,
                "ha": "right",
            }
            axes.text(**place, s=words, color=colour_of(index), fontsize=8.5, backgroundcolor="#ffffffcc")

        # The diagonal is a run that is as fast as the reference.
        last = int(reference[0][-1])
        axes.plot([0, last], [0, last], color="#999999", linestyle=":")
        axes.set(xlim=(0, last), ylim=(0, None), xlabel=f"steps of {_plain(runs[0].name)}", ylabel="steps to that loss")
        return True

    return draw


def _data_share(run: Run) -> np.ndarray:
    return run.column("data_seconds") / run.column("step_seconds")


def _memory(run: Run) -> np.ndarray:
    return run.column("memory_bytes") / 2**30


def _skipped(run: Run) -> np.ndarray:
    counts = run.column("skipped_steps")
    return counts if np.nan_to_num(counts).any() else np.full_like(counts, np.nan)
