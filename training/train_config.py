"""The `train` section of a recipe."""

from dataclasses import dataclass
from typing import Literal

from training.config import option


@dataclass
class TrainConfig:
    """Length, batch, precision and bookkeeping of a run."""

    steps: int = option(1000, "updates of the parameters")
    rows: int = option(8, "rows in a micro-batch of one process")
    accumulation: int = option(1, "micro-batches in a step")
    precision: Literal["auto", "bf16", "float32"] = option(
        "auto", "of matrix products; auto: bf16 where the device computes it natively, else float32; losses are float32"
    )
    seed: int = option(0, "of initialisation and dropout (data.seed orders the rows)")
    modality_weights: dict[str, float] | None = option(
        None, "modality -> weight of its targets in the loss; null: the plain mean over all targets"
    )
    frozen_towers: list[str] | None = option(
        None, "towers that are not trained, such as [text]; shared: what towers have in common"
    )
    frozen_vocabulary: int | None = option(
        None,
        "first rows of the embeddings and of the output layer that keep their values, such as a text model's; null: none",
    )
    ema_decay: float | None = option(
        None,
        "decay of the moving average of the weights, which then is evaluated, sampled and saved as final; null: none",
    )
    output_dir: str = option("runs/default", "folder of everything the run writes")
    resume: bool | Literal["auto"] = option(
        False,
        "go on from the newest intact checkpoint in output_dir; auto: or begin, where there is none; true: or stop there",
    )
    resume_despite: list[str] = option(
        factory=list, doc="keys that may differ from those the checkpoint was made with, or data for the data"
    )
    overwrite: bool = option(False, "replace the run that output_dir holds")
    save_every: int = option(0, "steps between checkpoints; 0: only at the end and when interrupted")
    save_asynchronously: bool = option(False, "write checkpoints from a copy in memory while training goes on")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept")
    not_finite_limit: int = option(
        10, "steps in a row with a loss or gradient that is not finite, before the run stops"
    )
    spike_threshold: float | None = option(
        8.0, "standard deviations above the median of the last losses at which a loss is called a spike; null: never"
    )
    skip_spikes: bool = option(False, "leave out the updates of spikes")
    tracker: str = option("none", "Accelerate's name of a tracker, such as tensorboard, wandb or trackio, or none")
    progress_bar: bool = option(True, "show a progress bar")
    processes: int | None = option(None, "how many processes the run must have; null: as many as it was launched with")
    timeout_seconds: float = option(600.0, "how long a process waits for the others before the run ends")
    cpu: bool = option(False, "train on the CPU even where there is an accelerator")
    cpu_threads: int | None = option(None, "threads of one process on a CPU; null: the cores shared by its processes")
    keep_freed_memory: bool = option(
        True, "on CPUs (glibc), keep large freed blocks for the next step instead of giving them back to the system"
    )
    float32_matmul_precision: Literal["highest", "high", "medium"] = option(
        "highest", "products of float32: high allows TF32 on GPUs, medium also bfloat16 parts, on GPUs and CPUs"
    )

    def __post_init__(self):
        for name in ("steps", "rows", "accumulation", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie between 0 and 1, or be null for no average")
        for name in ("save_every", "not_finite_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("cpu_threads", "processes", "frozen_vocabulary"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, or null")
        for name in ("spike_threshold", "timeout_seconds"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
