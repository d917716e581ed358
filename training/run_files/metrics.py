"""The metrics of a run: one JSON object a step, appended to `metrics.jsonl` and never rewritten.

Training rows hold
- `step`: updates made so far (the first row is 1),
- `loss`: mean over all targets of the step in nats, plus the z-loss, plus what diffusion adds; `loss_text`,
  `loss_image`, ...: means over that modality's targets (null in a step without any); `loss_image_diffusion`: mean
  squared error of the elements of noised latents,
- `tokens_text`, `tokens_image`, ...: targets by modality, over all ranks and micro-batches; `elements_image_diffusion`:
  those elements,
- `grad_norm`: before clipping; `grad_norm_<tower>`, `grad_norm_shared`: of the parameters of one tower, and of none,
- `lr`: the learning rate of the update,
- `tokens_per_second`: positions that are not padding, over the whole step, waiting for data included,
- `flops`: 3 x forward FLOPs of all positions (training/model/costs.py); `mfu`: the same over `step_seconds` x the peak
  in `manifest.json`,
- `step_seconds`, and `data_seconds`, the part of the step that was spent waiting for rows,
- `checkpoint_seconds`: for how long saving held up training before this step (not in `step_seconds`),
- `memory_bytes`: the most that the main process has held so far, on its accelerator or in all,
- `skipped_steps`: updates left out so far; `event`: null, `not_finite` (update left out), `spike` or `spike_skipped`.
Evaluation rows hold `step` and `eval/...` keys only. Steps that had been run past a checkpoint appear a second time
after a resume; the later row counts, and `read_metrics` returns the later row.
"""

import difflib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from modeling_mot import MoTConfig
from training.config import ConfigError
from training.model.costs import training_flops
from training.optimization import DIFFUSION
from training.world import peak_memory


logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------- writing


class Metrics:
    """Makes the rows of a run and writes them, to `metrics.jsonl` and to Accelerate's trackers, on the main process.

    Args:
        path: of metrics.jsonl.
        config: of the model, whose FLOPs are counted.
        peak_flops: FLOP/s of one device, of which `mfu` is a share.
    """

    def __init__(self, path: Path, accelerator: Accelerator, config: MoTConfig, peak_flops: float):
        self.accelerator = accelerator
        self.config = config
        self.peak_flops = peak_flops
        self.log = MetricsLog(path) if accelerator.is_main_process else None
        self.trackers = Trackers(accelerator)

    def step_row(
        self, figures: Mapping[str, Any], seconds: float, data_seconds: float, checkpoint_seconds: float
    ) -> dict[str, Any]:
        """Make the row of one step, from the figures of `Trainer.train_step`; the top of this file lists its keys."""
        flops = training_flops(self.config, figures["positions"], figures["row_length"])
        return {
            "step": figures["step"],
            "loss": figures["loss"],
            **{f"loss_{name}": mean for name, mean in figures["means"].items()},
            **{count_key(name): count for name, count in figures["targets"].items()},
            "grad_norm": figures["grad_norm"],
            **{f"grad_norm_{tower}": norm for tower, norm in figures["grad_norms"].items()},
            "lr": figures["lr"],
            "tokens_per_second": figures["tokens"] / seconds,
            "flops": flops,
            "mfu": flops / (seconds * self.peak_flops * self.accelerator.num_processes),
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "checkpoint_seconds": checkpoint_seconds,
            "memory_bytes": peak_memory(self.accelerator.device),
            "skipped_steps": figures["skipped"],
            "event": figures["event"],
        }

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row, of a step or of an evaluation."""
        if self.log is not None:
            self.log.append(row)
            self.trackers.log(row, row["step"])


def count_key(objective: str) -> str:
    """Return the key of an objective's number of targets: `tokens_text`, `elements_image_diffusion`."""
    return f"{'elements' if objective == DIFFUSION else 'tokens'}_{objective}"


class MetricsLog:
    """Appends rows to a JSONL file; every row is in the file before the next step begins.

    While the disk is full, rows are kept in memory; they are written once there is room.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.waiting: list[str] = []
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        # A process killed while writing, or a full disk, leaves half a row; the next row must not be glued to it.
        if self.path.is_file() and self.path.stat().st_size:
            with open(self.path, "rb+") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def append(self, row: Mapping[str, Any]) -> None:
        self.waiting.append(json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False) + "\n")
        try:
            if len(self.waiting) > 1:
                self._end_torn_line()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self.waiting))
        except OSError as error:
            if len(self.waiting) == 1:
                logger.error("%s cannot be written, rows are kept until it can: %s", self.path, error)
            return
        self.waiting = []


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        # JSON has no NaN; a loss that is not a number is written as null.
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value


# ------------------------------------------------------------------------------------------------------------ trackers


def check_tracker(name: str) -> None:
    """Refuse a tracker that Accelerate does not know, or that lacks its package: Accelerate would drop it silently."""
    known = ["none", "all", *LOGGER_TYPE_TO_CLASS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"train.tracker={name!r} is no tracker that Accelerate knows; {hint}")
    if name in LOGGER_TYPE_TO_CLASS and name not in map(str, get_available_trackers()):
        raise ConfigError(
            f"train.tracker={name!r} needs a package that is not installed: pip install {name}, or set "
            "train.tracker=none (metrics.jsonl has every figure anyway)"
        )


class Trackers:
    """Accelerate's trackers. A tracker that is down is left alone, with a warning, and the run goes on without it."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.is_up = False

    def start(self, project: str, config: Mapping[str, Any]) -> None:
        """Begin a run of the tracker that the accelerator was made with."""
        self.is_up = True
        self._try(lambda: self.accelerator.init_trackers(project, config=dict(config)))

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Send the numbers of a row."""
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        self._try(lambda: self.accelerator.log(numbers, step=step))

    def finish(self) -> None:
        """Let the trackers write what they hold."""
        self._try(lambda: [tracker.finish() for tracker in self.accelerator.trackers])

    def _try(self, action: Callable[[], Any]) -> None:
        if not self.is_up:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker's client may raise
            self.is_up = False
            logger.warning("the tracker failed and gets no more rows; metrics.jsonl has them all: %r", error)


# ------------------------------------------------------------------------------------------------------------- reading


def iterate_rows(path: str | Path) -> Iterator[dict]:
    """Read the whole rows of a metrics file in the order written; a torn line is skipped."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "step" in row:
                yield row


def read_metrics(path: str | Path) -> tuple[list[dict], list[dict]]:
    """Return (training rows, evaluation rows), one of each step, by step; of a repeated step the later row."""
    training, evaluation = {}, {}
    for row in iterate_rows(path):
        is_evaluation = any(key.startswith("eval/") for key in row)
        (evaluation if is_evaluation else training)[row["step"]] = row
    return [training[step] for step in sorted(training)], [evaluation[step] for step in sorted(evaluation)]


def series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, values) of one key, without the rows that lack it."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return np.array([step for step, _ in pairs], dtype=np.int64), np.array(
        [value for _, value in pairs], dtype=np.float64
    )


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Average over the last `window` values (fewer at the beginning)."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    index = np.arange(1, len(values) + 1)
    begin = np.maximum(0, index - window)
    return (total[index] - total[begin]) / (index - begin)
