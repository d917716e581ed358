"""The `train` section of a recipe."""

from dataclasses import dataclass
from typing import Literal

from training.config import check_options, option


@dataclass
class TrainConfig:
    """Length, batch, precision and bookkeeping of a run."""

    steps: int = option(1000, "updates of the parameters", ge=1)
    rows: int = option(8, "rows in a micro-batch of one process", ge=1)
    accumulation: int = option(1, "micro-batches in a step", ge=1)
    precision: Literal["auto", "bf16", "float32"] = option(
        "auto", "of matrix products; auto: bf16 where the device computes it natively, else float32; losses are float32"
    )
    seed: int = option(0, "of initialisation and dropout (data.seed orders the rows)", ge=0, le=2**32 - 1)
    modality_weights: dict[str, float] | None = option(
        None, "modality -> weight of its targets in the loss; null: the plain mean over all targets", ge=0, le=10**6
    )
    frozen_towers: list[str] | None = option(
        None, "towers that are not trained, such as [text]; shared: what towers have in common"
    )
    frozen_vocabulary: int | None = option(
        None,
        "first rows of the embeddings and of the output layer that keep their values, such as a text model's; null: none",
        ge=1,
    )
    ema_decay: float | None = option(
        None,
        "decay of the moving average of the weights, which then is evaluated, sampled and saved as final; null: none",
        gt=0,
        lt=1,
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
    save_every: int = option(0, "steps between checkpoints; 0: only at the end and when interrupted", ge=0)
    save_asynchronously: bool = option(False, "write checkpoints from a copy in memory while training goes on")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept", ge=1)
    not_finite_limit: int = option(
        10, "steps in a row with a loss or gradient that is not finite, before the run stops", ge=0
    )
    spike_threshold: float | None = option(
        8.0,
        "standard deviations above the median of the last losses at which a loss is called a spike; null: never",
        gt=0,
    )
    skip_spikes: bool = option(False, "leave out the updates of spikes")
    tracker: str = option("none", "Accelerate's name of a tracker, such as tensorboard, wandb or trackio, or none")
    progress_bar: bool = option(True, "show a progress bar")
    processes: int | None = option(
        None, "how many processes the run must have; null: as many as it was launched with", ge=1
    )
    timeout_seconds: float = option(
        600.0, "how long a process waits for the others before the run ends", ge=1, le=10**7
    )
    cpu: bool = option(False, "train on the CPU even where there is an accelerator")
    cpu_threads: int | None = option(
        None, "threads of one process on a CPU; null: the cores shared by its processes", ge=1, le=1024
    )
    keep_freed_memory: bool = option(
        True, "on CPUs (glibc), keep large freed blocks for the next step instead of giving them back to the system"
    )
    float32_matmul_precision: Literal["highest", "high", "medium"] = option(
        "highest", "products of float32: high allows TF32 on GPUs, medium also bfloat16 parts, on GPUs and CPUs"
    )

    def __post_init__(self):
        check_options(self)
