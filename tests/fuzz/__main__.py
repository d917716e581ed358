"""Hand seeded bad inputs to the public entry points, and count how they end.

    python -m tests.fuzz --count 1000 [--seed N] [--only AREA ...] [--jobs N] [--json FILE]
    python -m tests.fuzz --repeat AREA:SEED          one case again, with its traceback

An error is clear if our code raises it, or if it names the field, the value or the file. The error of a command is an
exit code with a line that does so. The fuzz ends with exit code 1 if an input hangs, crashes, takes a gigabyte, runs
code, opens a file or an address that is not its own, or gives a wrong result, or if more than 5 % of the errors are
those of a library.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path


# Before anything is imported: one thread each, no network, and a folder of our own for all that is written.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HOME=tempfile.mkdtemp(prefix="fuzz-"))

from tests.fuzz.areas import AREAS
from tests.fuzz.sandbox import Outcome, run_case
from tests.fuzz.verdicts import ACCEPTED, BROKEN, FATAL, LIBRARY, VERDICTS


MOST_LIBRARY = 0.05
_CASES_OF_A_SEED = 1_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code that the module's docstring describes."""
    tempfile.tempdir = os.environ["HF_HOME"]  # forked processes do not remove their own files
    try:
        options = _parser().parse_args(arguments)
        return repeat(*options.repeat.split(":")) if options.repeat else fuzz(options)
    finally:
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)


def fuzz(options: argparse.Namespace) -> int:
    """Run cases, and print the faults that were found and the table."""
    begin = time.perf_counter()
    outcomes = run(options.only or list(AREAS), options.count, options.seed, options.jobs, Path(tempfile.tempdir))
    findings = [outcome for outcome in outcomes if outcome.verdict in FATAL or outcome.verdict == LIBRARY]
    for finding in sorted(findings, key=lambda finding: (finding.verdict, finding.area)):
        print(f"{described(finding)}\n  python -m tests.fuzz --repeat {finding.area}:{finding.seed}")
    print(f"\n{table(outcomes)}\n\n{len(outcomes)} cases in {time.perf_counter() - begin:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return int(is_failure(outcomes))


def repeat(name: str, seed: str) -> int:
    """Run one case again; the seed of an area's good inputs is -1."""
    area = AREAS[name].control if seed == "-1" else AREAS[name]
    outcome = run_case(name, area, int(seed), Path(tempfile.tempdir), loud=True)
    print(f"{described(outcome)}\n  {outcome.seconds} s, {outcome.grown:,} bytes above what it began with")
    return int(outcome.verdict in FATAL or outcome.verdict == LIBRARY)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="cases, over all areas (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--only", nargs="+", choices=AREAS, metavar="AREA", help=f"of {', '.join(AREAS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome there, too")
    parser.add_argument("--repeat", metavar="AREA:SEED", help="run one case, and show its traceback")
    return parser


def run(names: Sequence[str], count: int, seed: int, jobs: int, folder: Path) -> list[Outcome]:
    """Run `count` cases, in equal shares of the areas, and the good inputs of each area."""
    shares = {name: count // len(names) + (place < count % len(names)) for place, name in enumerate(names)}
    cases = [(name, seed * _CASES_OF_A_SEED + number) for name, share in shares.items() for number in range(share)]
    outcomes = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        controls = [pool.submit(_run_control, name, folder) for name in names]
        futures = [pool.submit(_run, name, seed, folder) for name, seed in cases]
        for future in futures:
            outcomes.append(future.result())
            if len(outcomes) % 50 == 0:
                print(f"{len(outcomes)} of {count}", file=sys.stderr, flush=True)
    return outcomes + [control.result() for control in controls if control.result().verdict != ACCEPTED]


def _run(name: str, seed: int, folder: Path) -> Outcome:
    return run_case(name, AREAS[name], seed, folder)


def _run_control(name: str, folder: Path) -> Outcome:
    """Run an area's good inputs: if one is refused, the fuzz is at fault, or a check refuses too much."""
    outcome = run_case(name, AREAS[name].control, -1, folder)
    if outcome.verdict != ACCEPTED:
        outcome.verdict, outcome.detail = BROKEN, f"good inputs are not accepted: {outcome.verdict}: {outcome.detail}"
    return outcome


def is_failure(outcomes: Sequence[Outcome]) -> bool:
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    return any(verdicts[verdict] for verdict in FATAL) or verdicts[LIBRARY] > MOST_LIBRARY * len(outcomes)


def described(outcome: Outcome) -> str:
    """Say what was bad about a case and how it ended, in letters that any terminal shows."""
    lines = (f"{outcome.verdict}: {outcome.says}", outcome.detail[:600])
    return "\n  ".join(re.sub(r"[^ -~]", lambda found: repr(found[0])[1:-1], line) for line in lines)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a table in Markdown: a row for each area, a column for each verdict."""
    columns = [*VERDICTS, *([BROKEN] if any(outcome.verdict == BROKEN for outcome in outcomes) else [])]
    counts = Counter((outcome.area, outcome.verdict) for outcome in outcomes)
    names = list(dict.fromkeys(outcome.area for outcome in outcomes))
    lines = [f"| area | cases | {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [counts[name, verdict] for verdict in columns]
        lines.append(f"| {name} | {sum(cells)} | {' | '.join(map(str, cells))} |")
    sums = [sum(counts[name, verdict] for name in names) for verdict in columns]
    shares = [
        f"{count} ({count / max(1, len(outcomes)):.1%})" if c == LIBRARY else f"{count}"
        for c, count in zip(columns, sums)
    ]
    lines.append(f"| **all** | {len(outcomes)} | {' | '.join(shares)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
