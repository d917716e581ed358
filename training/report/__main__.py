"""Curves and tables of one or several runs, as one self-contained HTML file and PNGs.

    python -m training.report RUN [RUN ...] [--output FOLDER] [--smooth N] [--x step|tokens|flops|hours]

RUN is the folder that a run writes to (train.output_dir), finished or not. The other runs are compared with the first:
step matching tells after how many steps each of them reaches the last loss of the first. The report is written to
FOLDER, which is `report` in the working directory by default: report.html, report.json (the figures of the tables) and
the pictures. A file in FOLDER is replaced only if an earlier report wrote it and nobody has changed it. The exit code
is 0, or 2 for a request that cannot be met.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from training.config import ConfigError
from training.report.figures import View, draw_pictures
from training.report.output import ReportFolder
from training.report.page import write_page
from training.report.runs import AXES, read_runs
from training.report.tables import compare, percent


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        report(options.runs, options.output, options.smooth, options.x, options.overwrite)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(folders: Sequence[str], output: str, smooth: int | None, axis: str, overwrite: bool) -> None:
    """Draw the report of these run folders into the folder `output`, and print its main figures.

    Raises:
        ConfigError: a folder is not that of a run, a run does not record what `axis` needs, or `output` holds a file
            that no report wrote.
    """
    # Everything that can be refused is refused before anything is drawn.
    runs = read_runs(folders)
    folder = ReportFolder(output, overwrite)
    if any(run.path == folder.path.resolve() for run in runs):
        raise ConfigError(f"--output {output} is the folder of a run; give another, such as {output}/report")

    # The default window is that of the picture which a run draws of its own losses.
    view = View(axis, smooth or max(1, max(len(run.training) for run in runs) // 40))
    figures = compare(runs, view.window)
    pictures = draw_pictures(runs, view)
    page = write_page(runs, figures, pictures, view)
    files = {"report.html": page.encode(), **{f"{name}.png": picture for name, picture in pictures.items()}}
    folder.write(files, figures)

    # The screen gets the last losses, one line for each match, and where to look.
    for run in figures["runs"]:
        losses = (f"{name} {of['training']:.3f}" for name, of in run["at_end"].items() if of["training"] is not None)
        print(f"{run['name']}: step {run['step']}, {', '.join(losses)}")
    for match in figures["step_matching"]:
        print(_matched(match))
    print(
        f"wrote {folder.path.resolve() / 'report.html'}, and beside it {', '.join(f'{name}.png' for name in pictures)}"
    )


def _matched(match: Mapping[str, Any]) -> str:
    """Return one step match as a sentence; `match` is an item of `compare`'s `step_matching`."""
    goal = f"the last {match['split']} loss of {match['reference']} ({match['loss']:.4g})"
    if match["step"] is None:
        return f"{match['objective']}: {match['run']} does not reach {goal}; its lowest is {match['lowest']:.4g}"
    share = f"{percent(match['share'])} of the {match['reference_step']:,} steps that {match['reference']} took"
    return f"{match['objective']}: {match['run']} reaches {goal} at step {match['step']:,}, {share}"


def _parser() -> argparse.ArgumentParser:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser("python -m training.report", description=summary, epilog=details.split("\n\n")[-1])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", default="report", metavar="FOLDER", help="where to write (default: %(default)s, here)"
    )
    parser.add_argument(
        "--smooth", type=_positive, metavar="N", help="steps of the running mean (default: a fortieth of the run)"
    )
    parser.add_argument("--x", choices=AXES, default="step", help="the axis of the curves (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="also replace files in FOLDER that no report wrote")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps; give a whole number from 1 up")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
