"""Inject the faults that long runs meet into small runs, and count what is lost.

    python -m tests.faults --long [--ranks 2] [--times 20] [--json FILE] [--keep FOLDER]
    python -m tests.faults --only NAME [NAME ...]

An undisturbed run comes first. After each fault the run is resumed to its end; its log must be that of the undisturbed
run, row for row, and its weights must have the same sha256. The exit code is 0, or 1 if anything is lost or wrong.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from tests.faults import files, inputs, processes, steps
from tests.faults.bench import Bench, Outcome


FAULTS: dict[str, Callable[[Bench], Outcome]] = {
    "kills": processes.kills,
    "orphans": processes.orphans,
    "signals": processes.signals,
    "stopped-rank": processes.stopped_rank,
    "full-disk": files.full_disk,
    "damage": files.damage,
    "all-damaged": files.all_damaged,
    "pickles": files.pickles,
    "not-finite": steps.not_finite,
    "spikes": steps.spikes,
    "trackers": steps.trackers,
    "changed-data": inputs.changed_data,
    "python-tags": inputs.python_tags,
    "secrets": inputs.secrets,
}
LONG = {"kills", "signals", "spikes"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code that the module's docstring describes."""
    listed = "\n".join(f"  {name:13} {fault.__doc__}" for name, fault in FAULTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=f"{__doc__.strip()}\n\nfaults:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--long", action="store_true", help="all of them (about a quarter of an hour on two cores)")
    which.add_argument("--only", nargs="+", choices=FAULTS, metavar="NAME", help="some of them")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2, help="processes of a run (default: 2)")
    parser.add_argument("--times", type=int, default=20, help="kills (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="new folder for the runs (default: they are deleted)"
    )
    options = parser.parse_args(arguments)
    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep {options.keep} exists; name another folder")

    # Inject each fault, and report faults at once.
    outcomes = {}
    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory(prefix="faults-") as folder:
        short = Bench(Path(folder), options.ranks, 24, options.times)
        # A long run is killed or signalled many times, and gets a few steps further each time.
        long = Bench(Path(folder) / "long", options.ranks, 4 * max(options.times, 16), options.times)
        for name in options.only or FAULTS:
            begin = time.perf_counter()
            outcomes[name] = outcome = FAULTS[name](long if name in LONG else short)
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            for line in outcome.wrong:
                print(f"  WRONG: {line}", file=sys.stderr, flush=True)

    print(table(outcomes))
    if options.json is not None:
        tree = {name: asdict(outcome) for name, outcome in outcomes.items()}
        options.json.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return 1 if any(outcome.wrong for outcome in outcomes.values()) else 0


def table(outcomes: dict[str, Outcome]) -> str:
    """Return a table in Markdown: a row for each fault."""
    lines = ["| fault | injected | rows lost or changed | checkpoints lost | remarks |", "|---|--:|--:|--:|---|"]
    for name, outcome in outcomes.items():
        remarks = "; ".join([*outcome.remarks, *(f"**{line.splitlines()[0][:120]}**" for line in outcome.wrong)])
        what = FAULTS[name].__doc__.rstrip(".")
        lines.append(f"| {what} | {outcome.times} | {outcome.rows_changed} | {outcome.checkpoints_lost} | {remarks} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
