"""What a run writes down: one JSON object a step, appended to `metrics.jsonl` and never rewritten.

Training rows hold
- `step`: updates made so far (the first row is 1),
- `loss`: mean over all targets of the step in nats, plus the z-loss, plus what diffusion adds; `loss_text`,
  `loss_image`, ...: means over that modality's targets (null in a step without any); `loss_image_diffusion`: mean
  squared error of the elements of noised latents,
- `tokens_text`, `tokens_image`, ...: targets by modality, over all ranks and micro-batches; `elements_image_diffusion`:
  those elements,
- `grad_norm`: before clipping; `lr`: the learning rate of the update,
- `tokens_per_second`: positions that are not padding, over the whole step, waiting for data included,
- `mfu`: 3 x forward FLOPs of all positions (training/flops.py), over `step_seconds` x the peak in `environment.json`,
- `step_seconds`, and `data_seconds`, the part of it spent waiting for rows.
Evaluation rows hold `step` and `eval/...` keys only. After a resume, steps that had been run past the checkpoint appear
a second time; the later row counts, and `read_metrics` returns that one.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def count_key(objective: str) -> str:
    """The key of an objective's number of targets: `tokens_text`, `elements_image_diffusion`."""
    return f"{'elements' if objective == 'image_diffusion' else 'tokens'}_{objective}"


class MetricsLog:
    """Appends rows to a JSONL file; every row is on disk before the next step begins."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        # A process killed while writing leaves half a row; what follows must not be glued to it.
        if self.path.is_file() and self.path.stat().st_size:
            with open(self.path, "rb+") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def append(self, row: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        # JSON has no NaN; a loss that is not a number is written as null.
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value


def iterate_rows(path: str | Path) -> Iterator[dict]:
    """Whole rows of a metrics file in the order written; a torn line is skipped."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "step" in row:
                yield row


def read_metrics(path: str | Path) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows), one of each step, by step; of a repeated step the later row."""
    training, evaluation = {}, {}
    for row in iterate_rows(path):
        is_evaluation = any(key.startswith("eval/") for key in row)
        (evaluation if is_evaluation else training)[row["step"]] = row
    return [training[step] for step in sorted(training)], [evaluation[step] for step in sorted(evaluation)]


def series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one key, without the rows that lack it."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return np.array([step for step, _ in pairs], dtype=np.int64), np.array(
        [value for _, value in pairs], dtype=np.float64
    )


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values (fewer at the beginning)."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    index = np.arange(1, len(values) + 1)
    begin = np.maximum(0, index - window)
    return (total[index] - total[begin]) / (index - begin)
