"""A run as its folder records it: rows, manifest and configuration, and the figures that follow from them.

The folder may be that of a run in progress, of a run that was resumed (if a step was done twice, its later row counts),
or of an earlier version of the project (figures that it did not write are missing, not zero).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from training.config import ConfigError, read_yaml
from training.run_files.metrics import iterate_rows, read_metrics, series


# The axes that curves can be drawn over, with their labels.
AXES = {"step": "step", "tokens": "tokens trained on", "flops": "training FLOPs", "hours": "hours of training"}

# The `event` of a row in words; "resumed" comes from the launches of the manifest.
EVENTS = {
    "not_finite": "not finite, update left out",
    "spike": "loss spike",
    "spike_skipped": "loss spike, update left out",
    "resumed": "resumed",
}


@dataclass(frozen=True)
class Run:
    """One run folder, read once.

    Attributes:
        name: its name in legends and tables; no other run of the report has it.
        path: the folder.
        training, evaluation: rows of metrics.jsonl, one for each step, by step.
        repeated: number of training rows that a later row of the same step replaced (steps done again after a resume).
        manifest: the run's manifest.json; {} if there is none.
        config: the resolved recipe as a tree; {} if there is none.
        problems: files that could not be read, in words.
    """

    name: str
    path: Path
    training: list[dict]
    evaluation: list[dict]
    repeated: int
    manifest: dict
    config: dict
    problems: list[str]
    _columns: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @cached_property
    def steps(self) -> np.ndarray:
        return np.array([row["step"] for row in self.training], dtype=np.int64)

    @property
    def last_step(self) -> int:
        return int(self.steps[-1])

    @property
    def planned_steps(self) -> int | None:
        return section(self.config, "train").get("steps")

    @cached_property
    def objectives(self) -> list[str]:
        """Names that the rows record losses of (`text`, `image`, ...), in the order of the rows."""
        return _suffixes(self.training, "loss_")

    @cached_property
    def towers(self) -> list[str]:
        """Names that the rows record gradient norms of: the towers, and `shared`."""
        return _suffixes(self.training, "grad_norm_")

    @cached_property
    def saved_steps(self) -> list[int]:
        """Steps of the checkpoints that are in the folder."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.path.glob("checkpoints/step-*"))
        return sorted(int(match[1]) for match in found if match)

    @property
    def launches(self) -> list[dict]:
        """The launches of the manifest: one for the start of the run and one for each resume, in order."""
        launches = self.manifest.get("launches")
        return [launch for launch in launches if isinstance(launch, dict)] if isinstance(launches, list) else []

    @property
    def processes(self) -> int:
        """Number of processes of the last launch."""
        return section(self.manifest, "world").get("processes") or self.manifest.get("processes") or 1

    @cached_property
    def events(self) -> list[tuple[int, str]]:
        """(step, the `event` of its row or "resumed"), by step."""
        flagged = [(row["step"], row["event"]) for row in self.training if row.get("event")]
        return sorted(flagged + [(start, "resumed") for start in map(_from_step, self.launches) if start])

    @property
    def skipped_steps(self) -> int | None:
        """Number of updates that were left out so far; None if the run did not count them."""
        return self.training[-1].get("skipped_steps")

    def column(self, key: str) -> np.ndarray:
        """Return the values of a key in the training rows, NaN where a row lacks it.  -> (rows,)"""
        if key not in self._columns:
            values = [np.nan if row.get(key) is None else row[key] for row in self.training]
            self._columns[key] = np.array(values, dtype=np.float64)
        return self._columns[key]

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps, values) of a key, without the training rows that lack it."""
        values = self.column(key)
        known = ~np.isnan(values)
        return self.steps[known], values[known]

    def held_out(self, objective: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps, held-out losses) of an objective."""
        return series(self.evaluation, f"eval/loss_{objective}")

    # ------------------------------------------------------------------------------------- what a step has cost so far

    @cached_property
    def seconds(self) -> np.ndarray:
        """Seconds of each step and of the saving that followed it, without evaluations.  -> (rows,)"""
        return self.column("step_seconds") + np.nan_to_num(self.column("checkpoint_seconds"))

    @cached_property
    def tokens(self) -> np.ndarray:
        """Positions of each step that are not padding: the tokens trained on.  -> (rows,)"""
        return self.column("tokens_per_second") * self.column("step_seconds")

    @cached_property
    def flops(self) -> np.ndarray:
        """Training FLOPs of each step.  -> (rows,)

        Older runs recorded only `mfu`, a share of the peak of all processes; their FLOPs are computed from it.
        """
        processes = np.full(len(self.training), float(self.processes))
        for launch in self.launches:
            processes[self.steps > _from_step(launch)] = section(launch, "world").get("processes") or self.processes
        peak = self.manifest.get("peak_flops") or np.nan
        recorded = self.column("flops")
        shared = self.column("mfu") * self.column("step_seconds") * peak * processes
        return np.where(np.isnan(recorded), shared, recorded)

    def places(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """Return where these steps lie on an axis of `AXES`: how much the run had spent when they were done.

        Raises:
            ConfigError: the run does not record the figures that the axis needs.
        """
        if axis == "step":
            return steps
        spent = {"tokens": self.tokens, "flops": self.flops, "hours": self.seconds / 3600}[axis]
        if np.isnan(spent).any():
            raise ConfigError(
                f"--x {axis}: {self.path} does not record it (rows need tokens_per_second, mfu and step_seconds, its "
                "manifest peak_flops); use --x step"
            )
        return np.concatenate([[0.0], np.cumsum(spent)])[np.searchsorted(self.steps, steps, side="right")]

    def totals(self) -> dict[str, float | None]:
        """Return sums, means over time and shares of time of all steps; None for a figure that was not recorded."""
        step_seconds = self.column("step_seconds")
        saving, memory = self.column("checkpoint_seconds"), self.column("memory_bytes")
        stalls = saving[saving > 0]
        figures = {
            "tokens": self.tokens.sum(),
            "flops": self.flops.sum(),
            "hours": self.seconds.sum() / 3600,
            "tokens_per_second": self.tokens.sum() / step_seconds.sum(),
            "mfu": (self.column("mfu") * step_seconds).sum() / step_seconds.sum(),
            "data_share": self.column("data_seconds").sum() / step_seconds.sum(),
            "saving_share": np.nansum(saving) / self.seconds.sum() if not np.isnan(saving).all() else np.nan,
            "seconds_per_save": stalls.mean() if len(stalls) else np.nan,
            "longest_save": stalls.max() if len(stalls) else np.nan,
            "memory_bytes": np.nanmax(memory) if not np.isnan(memory).all() else np.nan,
        }
        return {key: float(value) if np.isfinite(value) else None for key, value in figures.items()}


def _from_step(launch: dict) -> int:
    step = launch.get("from_step")
    return step if isinstance(step, int) else 0


def section(tree: dict, key: str) -> dict:
    """Return the mapping that `tree` holds under `key`; {} if it holds none."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read runs in the order given. The name of a run is the shortest end of its path that no other run shares.

    Raises:
        ConfigError: a folder is given twice, is not one of a run, or the run has not done a step.
    """
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"{path} is given twice; name each run once")
    return [_read_run(path, name) for path, name in zip(paths, _short_names(paths), strict=True)]


def _read_run(path: Path, name: str) -> Run:
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        below = sorted(str(found.parent) for found in path.glob("*/metrics.jsonl"))[:5]
        hint = f"the runs in it are {', '.join(below)}" if below else "give a folder that train.output_dir named"
        what = "has no metrics.jsonl, so it is not the folder of a run" if path.is_dir() else "is not a folder"
        raise ConfigError(f"{path} {what}; {hint}")
    training, evaluation = read_metrics(metrics)
    if not training:
        raise ConfigError(f"{metrics} holds no training step yet; try again when the run has done one")

    # Count rows up to the last step that was read only: the run may have written more meanwhile.
    until = training[-1]["step"]
    rows = (row for row in iterate_rows(metrics) if row["step"] <= until)
    written = sum(1 for row in rows if not any(key.startswith("eval/") for key in row))

    problems: list[str] = []
    manifest = _read_manifest(path, problems)
    config = _read_config(path, manifest, problems)
    return Run(name, path, training, evaluation, written - len(training), manifest, config, problems)


def _read_manifest(path: Path, problems: list[str]) -> dict:
    # Earlier versions called the manifest environment.json.
    for file in (path / "manifest.json", path / "environment.json"):
        if file.is_file():
            try:
                manifest = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                problems.append(f"{file.name} cannot be read: {error}")
                continue
            if isinstance(manifest, dict):
                return manifest
            problems.append(f"{file.name} does not hold a JSON object")
    return {}


def _read_config(path: Path, manifest: dict, problems: list[str]) -> dict:
    if section(manifest, "config"):
        return manifest["config"]
    if not (path / "config.yaml").is_file():
        return {}
    try:
        return read_yaml(path / "config.yaml")
    except ConfigError as error:
        problems.append(str(error))
        return {}


def _short_names(paths: Sequence[Path]) -> list[str]:
    def name(path: Path, parts: int) -> str:
        return "/".join(path.parts[-parts:])

    names = []
    for path in paths:
        lengths = range(1, len(path.parts) + 1)
        names.append(name(path, next(n for n in lengths if sum(name(p, n) == name(path, n) for p in paths) == 1)))
    return names


def _suffixes(rows: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(prefix))
    return [key.removeprefix(prefix) for key in keys]
