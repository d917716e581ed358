"""Curves and tables of one or several runs, as one self-contained HTML file and PNGs.

    python -m training.report RUN [RUN ...] [--output FOLDER] [--smooth N] [--x step|tokens|flops|hours]

RUN is the folder that a run writes to (train.output_dir), finished or not. Of several runs the first is the one that the
others are compared with: step matching gives the steps that each needs for its last loss. Written are report.html,
report.json (the figures of the tables) and the pictures; what stands in the folder is replaced only where it still is
what an earlier report wrote there. The exit code is 0, or 2 for a request that cannot be met.
"""

import argparse
import sys
from collections.abc import Sequence

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
    """Draw the report of these run folders into a folder, and say in a few lines what came out.

    Raises:
        ConfigError: one is not a run, it does not record what `axis` needs, or a file in `output` is not a report's.
    """
    runs = read_runs(folders)
    folder = ReportFolder(output, overwrite)
    if any(run.path == folder.path.resolve() for run in runs):
        raise ConfigError(f"--output {output} is the folder of a run; give another, such as {output}/report")
    # As of the pictures that a run makes of itself.
    view = View(axis, smooth or max(1, max(len(run.training) for run in runs) // 40))
    figures = compare(runs, view.window)
    pictures = draw_pictures(runs, view)
    page = write_page(runs, figures, pictures, view)
    files = {"report.html": page.encode(), **{f"{name}.png": picture for name, picture in pictures.items()}}
    folder.write(files, figures)
    for run in figures["runs"]:
        losses = (f"{name} {of['training']:.3f}" for name, of in run["at_end"].items() if of["training"] is not None)
        print(f"{run['name']}: step {run['step']}, {', '.join(losses)}")
    for match in figures["step_matching"]:
        words = f"{percent(match['share'])} of the steps" if match["share"] is not None else "not reached"
        print(f"last {match['split']} loss of {match['reference']}, {match['objective']}: {match['run']} {words}")
    print(f"wrote {folder.path / 'report.html'}, {', '.join(f'{name}.png' for name in pictures)}")


def _parser() -> argparse.ArgumentParser:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser("python -m training.report", description=summary, epilog=details.split("\n\n")[-1])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", default="report", metavar="FOLDER", help="where to write (default: %(default)s)")
    parser.add_argument(
        "--smooth", type=_positive, metavar="N", help="steps of the running mean (default: 1/40 of all)"
    )
    parser.add_argument("--x", choices=AXES, default="step", help="what curves are drawn over (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files in FOLDER that no report wrote")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps; give a whole number from 1 up")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
