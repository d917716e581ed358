"""Run a study, compare its variants with the baseline, and draw its page.

    python -m training.study NAME_OR_YAML [--out DIR] [--workers N] [--seeds N] [--records DIR ...]
    ... --plan       print runs, hours and disk; nothing is started or written
    ... --report     draw the page of the runs that are there; nothing is started

NAME is a folder of training/studies; training/study/specification.py describes the YAML. DIR (default: runs/NAME) gets
index.html, results.json and PNGs, drawn anew after each run; runs/, the folders of the runs; records/, the figures of
the finished ones, a small file each, which stand for their folders from then on; recipes/ and logs/. The same command
goes on with a study that was stopped or killed: finished runs are skipped, begun ones resume, failed ones are tried
again. Ctrl-C (or SIGTERM) lets the running ones write a checkpoint; a second one ends at once.

Exit code: 0 all runs are finished, 1 a run failed, 2 what was asked for cannot be met, 130 or 143 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from training.config import ConfigError, one_line
from training.report.tables import percent
from training.run_files.folder import write_json
from training.study.page import draw_pictures, write_page
from training.study.results import HELD_OUT, default_window, read_trained, study_results, write_record
from training.study.running import run_all
from training.study.specification import Study, StudyRun, find_study, read_study, runs_of, study_name
from training.world import StopSignal


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: see above."""
    options = _parser().parse_args(arguments)
    try:
        path = find_study(options.study)
        name = study_name(path)
        out = Path(options.out or f"runs/{name}")
        study = read_study(path, options.seeds)
        runs = runs_of(study, path, out)
        for run in runs:
            run.refuse_change()
        if options.plan:
            # Imported here, since nothing else needs the planner.
            from training.study.planning import describe_plan

            print("\n".join(describe_plan(study, runs, options.workers)))
            return 0
        if options.report:
            report(study, name, runs, out)
            return 0
        return run_study(study, name, runs, out, options.workers, options.records)
    except ConfigError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ended by a second signal", file=sys.stderr)
        return 130


def run_study(
    study: Study, name: str, runs: Sequence[StudyRun], out: Path, workers: int, records: Sequence[Path] = ()
) -> int:
    """Run what is not finished, and report; return the exit code.

    Args:
        records: folders of records; a run that has an equal one there is taken for finished.

    Raises:
        ConfigError: another process runs the study in this folder, or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / "study.lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"--out {out}: another process runs the study there; wait for it, or name another") from error
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error

    with lock, StopSignal() as stop_signal:
        for run in runs:
            if not run.is_finished() and any(map(run.take_record, records)):
                print(f"{run.name}: an equal run has been done, its record is taken", flush=True)
        left = [run for run in runs if not run.is_finished()]
        print(f"{name}: {len(runs)} runs, {len(runs) - len(left)} of them finished, {workers} at a time", flush=True)
        failed = run_all(
            left,
            workers,
            study.launcher,
            out / "logs",
            stop_signal,
            say=lambda line: print(line, flush=True),
            after_each=lambda: _report_so_far(study, name, runs, out, quiet=True),
        )
        _report_so_far(study, name, runs, out)
    for run, why in failed.items():
        print(f"failed: {run}, {why}; see {out / 'logs' / f'{run}.log'}", file=sys.stderr)
    return 128 + stop_signal.number if stop_signal.number else int(bool(failed))


def _report_so_far(*arguments, quiet: bool = False) -> None:
    """Call `report`; a page that cannot be drawn must not end runs of many hours, so its error is only printed."""
    try:
        report(*arguments, quiet=quiet)
    except Exception as error:
        print(f"no page: {one_line(error)}", file=sys.stderr)


def report(study: Study, name: str, runs: Sequence[StudyRun], out: Path, quiet: bool = False) -> None:
    """Write index.html, results.json and the pictures from what the runs have recorded so far; print the main figures.

    Raises:
        ConfigError: there is nothing to report, or `out` cannot be written.
    """
    window = default_window(runs)
    trained = read_trained(runs, window)
    if not trained:
        raise ConfigError(f"no run in {out / 'runs'} has done a step yet, so there is nothing to report")
    results = study_results(study, name, runs, trained, window)
    pictures = draw_pictures(study, trained)
    page = write_page(study, name, results, trained, pictures)
    files = {"index.html": page.encode(), **{f"{picture}.png": png for picture, png in pictures.items()}}
    try:
        for one in trained:
            if one.is_finished and not one.of.record.is_file():
                write_record(one, window)
        for file, content in files.items():
            temporary = out / f"{file}.tmp"
            temporary.write_bytes(content)
            os.replace(temporary, out / file)
        write_json(out / "results.json", results)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error
    if quiet:
        return

    # The screen gets the held-out shares at the end, and where to look.
    for row in results["step_shares"]:
        if row["at"] == "end" and row["split"] == HELD_OUT:
            kind = " ".join(filter(None, (row["variant"], row["size"])))
            share = "not reached by all seeds" if row["mean"] is None else f"{percent(row['mean'])} of the steps"
            print(f"{row['objective']}: {kind} has the last held-out loss of {study.baseline}: {share}")
    print(f"wrote {out / 'index.html'}, results.json and {', '.join(f'{picture}.png' for picture in pictures)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m training.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("study", metavar="NAME_OR_YAML", help="a study of training/studies, or a file")
    parser.add_argument("--out", metavar="DIR", help="folder of runs and results (default: runs/NAME)")
    parser.add_argument("--workers", type=_positive, default=cores, metavar="N", help="runs at once (default: cores)")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="seeds of each variant (default: the study's)")
    parser.add_argument(
        "--records",
        type=_folder,
        nargs="+",
        default=[],
        metavar="DIR",
        help="take the records of equal runs from these folders: records/ of other studies",
    )
    parser.add_argument("--plan", action="store_true", help="print runs, hours and disk alone")
    parser.add_argument("--report", action="store_true", help="draw the page alone")
    return parser


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
