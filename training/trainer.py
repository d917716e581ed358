"""The training loop: one step for every objective, on any device that Accelerate knows."""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from modeling_mot import MoTPreTrainedModel, MoTProcessor
from training.checkpoints import load_averages, load_optimizer, read_state, remove_old_checkpoints, save_checkpoint
from training.config import ConfigError, option
from training.data.collate import seed_of
from training.flops import training_flops
from training.metrics import MetricsLog, count_key
from training.objectives import check_modality_weights, combine, count_targets, loss_scales, objective_names
from training.optimization import OptimizerConfig, learning_rate
from training.run_folder import RunFolder


# B batch, L row length


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
    ema_decay: float | None = option(
        None,
        "decay of the moving average of the weights, which then is evaluated, sampled and saved as final; null: none",
    )
    output_dir: str = option("runs/default", "folder of everything the run writes")
    resume: bool = option(False, "go on from the newest checkpoint in output_dir, if there is one")
    overwrite: bool = option(False, "replace the run that output_dir holds")
    save_every: int = option(0, "steps between checkpoints; 0: only when interrupted")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept")
    tracker: str = option("none", "Accelerate's name of a tracker, such as tensorboard, wandb or trackio, or none")
    progress_bar: bool = option(True, "show a progress bar")
    cpu: bool = option(False, "train on the CPU even where there is an accelerator")
    cpu_threads: int | None = option(None, "threads of one process on a CPU; null: the cores shared by its processes")

    def __post_init__(self):
        for name in ("steps", "rows", "accumulation", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie between 0 and 1, or be null for no average")
        if self.save_every < 0:
            raise ValueError(f"save_every={self.save_every} must not be negative")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"cpu_threads={self.cpu_threads} must be at least 1, or null")


class Interrupted(Exception):
    """A signal asked the run to end; everything worth keeping has been written. `exit_code` is 128 + signal."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class StopSignal:
    """Remembers the first SIGINT or SIGTERM, so that a step is never cut in two; a second one ends at once."""

    def __init__(self):
        self.number = 0

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def check(self) -> None:
        """Raise Interrupted when a signal has come; for the phases after training."""
        if self.number:
            raise Interrupted(self.number)


class StepBatches:
    """This rank's micro-batches of every step; which rows they hold depends on nothing but the step.

    Step s takes rows [s * G, (s + 1) * G) of the stream, G = rows x accumulation x processes; any split of G into these
    three therefore sees the same rows in a step. `collate(rows, row_numbers=...)` is given their numbers in the stream,
    so what it draws for a row (the noise of diffusion) is the same after a resume too. The next step's batches are made
    while this one computes.
    """

    def __init__(self, stream, collate: Callable, rows: int, accumulation: int, rank: int = 0, processes: int = 1):
        self.stream, self.collate = stream, collate
        self.rows, self.accumulation, self.rank, self.processes = rows, accumulation, rank, processes

    def from_step(self, step: int, steps: int) -> Iterator[list[dict]]:
        """Lists of `accumulation` batches for steps `step`, ..., `steps - 1`."""
        start = step * self.rows * self.accumulation * self.processes
        rows = enumerate(self.stream.rows(start=start), start)
        with ThreadPoolExecutor(max_workers=1) as executor:
            ahead = executor.submit(self._take, rows) if step < steps else None
            for later in range(step + 1, steps + 1):
                batches = ahead.result()
                ahead = executor.submit(self._take, rows) if later < steps else None
                yield batches

    def _take(self, rows: Iterator[tuple[int, dict]]) -> list[dict]:
        batches = []
        for _ in range(self.accumulation):
            everyones = [next(rows) for _ in range(self.rows * self.processes)]
            numbers, mine = zip(*everyones[self.rank * self.rows : (self.rank + 1) * self.rows], strict=True)
            batches.append(self.collate(list(mine), row_numbers=numbers))
        return batches


class Trainer:
    """Trains `model` on `batches`; owns the optimizer's steps, the metrics file and the checkpoints.

    Args:
        accelerator: devices and precision; it prepares model and optimizer here.
        model, processor: they are saved together.
        optimizer: over the model's parameters.
        batches: a StepBatches.
        peak_flops: the FLOP/s that `mfu` is a share of.
        evaluate: called with the unwrapped model every `evaluate_every` steps and at the end (0: only at the end);
            returns `eval/...` figures, which are logged.
        state: JSON values that must be the same on resume (configuration of the data and batch).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: MoTPreTrainedModel,
        processor: MoTProcessor,
        optimizer: torch.optim.Optimizer,
        batches: StepBatches,
        config: TrainConfig,
        optimizer_config: OptimizerConfig,
        run: RunFolder,
        *,
        peak_flops: float,
        evaluate: Callable[[MoTPreTrainedModel], dict[str, float]] | None = None,
        evaluate_every: int = 0,
        stop_signal: StopSignal | None = None,
        state: dict | None = None,
    ):
        check_modality_weights(config.modality_weights, model.config.token_modalities)
        self.accelerator, self.processor, self.batches = accelerator, processor, batches
        self.config, self.optimizer_config, self.run = config, optimizer_config, run
        self.peak_flops, self.evaluate, self.evaluate_every = peak_flops, evaluate, evaluate_every
        self.stop_signal, self.state = stop_signal or StopSignal(), state or {}
        self.raw_model, self.raw_optimizer = model, optimizer
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.modalities, self.objectives = list(model.config.modalities), objective_names(model.config)
        self.diffusion_weight = getattr(model.config, "diffusion_loss_weight", 1.0)
        self.averaged_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ema = None
        if config.ema_decay is not None:
            self.ema = EMAModel(self.averaged_parameters, decay=config.ema_decay, foreach=True)
        self.step = 0
        self.log = MetricsLog(run.metrics) if accelerator.is_main_process else None

    # --------------------------------------------------------------------------------------------------- one step

    def train_step(self, micro_batches: list[dict]) -> dict:
        """One update from this rank's micro-batches; returns the step's figures over all ranks."""
        counts = self.count(micro_batches)  # over all ranks and micro-batches, before any backward
        targets = dict(zip(self.objectives, counts["targets"], strict=True))
        scales, z_scale = loss_scales(targets, self.config.modality_weights, self.diffusion_weight)
        sums = torch.zeros(len(self.objectives) + 1, device=self.accelerator.device)
        for index, batch in enumerate(micro_batches):
            self.seed_forward(index)
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                output = self.model(**send_to_device(batch, self.accelerator.device, non_blocking=True))
                loss = combine(output.loss_sums, output.z_loss_sum, scales, z_scale)
                self.accelerator.backward(loss * self.accelerator.num_processes)  # undo the gradient mean over ranks
            sums += torch.stack([output.loss_sums[name].detach().float() for name in self.objectives] + [loss.detach()])
        grad_norm = self.clip()
        lr = learning_rate(self.optimizer_config, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.step(self.averaged_parameters)
        *objective_sums, loss = self.accelerator.reduce(sums).tolist()
        means = {o: s / n if n else None for (o, n), s in zip(targets.items(), objective_sums, strict=True)}
        return {**counts, "loss": loss, "means": means, "targets": targets, "grad_norm": grad_norm, "lr": lr}

    def count(self, micro_batches: list[dict]) -> dict:
        """Targets by objective, positions by modality and those that are not padding, and the signal seen by any rank."""
        first, number = len(self.objectives), len(self.modalities)
        local = torch.zeros(first + number + 2, dtype=torch.long)
        for batch in micro_batches:
            local[:first] += count_targets(batch, self.raw_model.config)
            local[first:-2] += torch.bincount(batch["modality_ids"].flatten(), minlength=number)
            local[-2] += (batch["document_ids"] >= 0).sum()
        local[-1] = self.stop_signal.number
        # Signals are 2 and 15: their sum over ranks is not a signal, so only its being zero or not is used of others.
        total = self.accelerator.reduce(local.to(self.accelerator.device)).tolist()
        stop = self.stop_signal.number or (signal.SIGTERM if total[-1] else 0)
        positions = dict(zip(self.modalities, total[first:-2], strict=True))
        row_length = micro_batches[0]["input_ids"].shape[1]
        counts = {"targets": total[:first], "positions": positions, "tokens": total[-2]}
        return {**counts, "row_length": row_length, "stop": stop}

    def clip(self) -> float:
        """Clip the gradient and return its norm before; a norm that is not finite stops the run before the update."""
        limit = self.optimizer_config.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        norm = float(norm)
        if norm != norm or norm == float("inf"):
            raise FloatingPointError(
                f"the gradient norm of step {self.step + 1} is {norm}; the parameters are those of step {self.step}. "
                "Lower optimizer.lr, or train with train.precision=float32"
            )
        return norm

    def seed_forward(self, micro_batch: int) -> None:
        """Dropout is a function of (seed, step, micro-batch, rank), so that a resumed run draws the same."""
        words = f"{self.config.seed}/{self.step}/{micro_batch}/{self.accelerator.process_index}"
        torch.manual_seed(seed_of(words))

    # ---------------------------------------------------------------------------------------------------- the run

    def fit(self) -> None:
        """Train up to `config.steps`, with evaluations and checkpoints on the way.

        Raises:
            Interrupted: after the step in which a signal came, when its checkpoint has been written.
        """
        main, config = self.accelerator.is_main_process, self.config
        bar = tqdm(total=config.steps, initial=self.step, disable=not (main and config.progress_bar), unit="step")
        batches = self.batches.from_step(self.step, config.steps)
        begin = time.perf_counter()
        with bar:
            for micro_batches in batches:
                data_seconds = time.perf_counter() - begin
                figures = self.train_step(micro_batches)
                row = self.row(figures, time.perf_counter() - begin, data_seconds)
                if main:
                    self.log.append(row)
                    self.accelerator.log({k: v for k, v in row.items() if v is not None}, step=self.step)
                    bar.set_postfix_str(_postfix(row, self.objectives), refresh=False)
                    bar.update()
                alone = self.accelerator.num_processes == 1
                self.after_step(self.stop_signal.number if alone else figures["stop"])
                begin = time.perf_counter()
        if self.evaluate is not None and self.step == config.steps:
            self.run_evaluation()

    def after_step(self, stop: int) -> None:
        if stop:
            self.save()
            raise Interrupted(stop)
        is_end = self.step == self.config.steps
        if self.config.save_every and self.step % self.config.save_every == 0:
            self.save()
        if self.evaluate is not None and self.evaluate_every and self.step % self.evaluate_every == 0 and not is_end:
            self.run_evaluation()

    def run_evaluation(self) -> dict[str, float]:
        """Evaluate, log `eval/...` and return it. A signal that comes meanwhile is acted on after the next step."""
        self.raw_model.eval()
        with torch.no_grad(), self.averaged():
            figures = self.evaluate(self.raw_model)
        self.raw_model.train()
        if self.accelerator.is_main_process:
            self.log.append({"step": self.step, **figures})
            self.accelerator.log({k: v for k, v in figures.items() if v is not None}, step=self.step)
        return figures

    def row(self, figures: dict, seconds: float, data_seconds: float) -> dict:
        """The metrics of one step; training/metrics.py says what they mean."""
        flops = training_flops(self.raw_model.config, figures["positions"], figures["row_length"])
        peak = self.peak_flops * self.accelerator.num_processes
        return {
            "step": self.step,
            "loss": figures["loss"],
            **{f"loss_{name}": mean for name, mean in figures["means"].items()},
            **{count_key(name): count for name, count in figures["targets"].items()},
            "grad_norm": figures["grad_norm"],
            "lr": figures["lr"],
            "tokens_per_second": figures["tokens"] / seconds,
            "mfu": flops / (seconds * peak),
            "step_seconds": seconds,
            "data_seconds": data_seconds,
        }

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        if self.accelerator.is_main_process:
            state = {"step": self.step, **self.state}
            folder = self.run.checkpoint(self.step)
            save_checkpoint(folder, self.raw_model, self.processor, self.raw_optimizer, state, self.ema)
            remove_old_checkpoints(self.run, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Take optimizer state and step from the newest checkpoint, whose weights the model was loaded from."""
        folder = self.run.checkpoint(self.run.saved_steps()[-1])
        stored = read_state(folder)
        for name, value in self.state.items():
            if stored.get(name) != value:
                raise ConfigError(
                    f"{folder} was trained with {name}={stored.get(name)!r}, this configuration has {value!r}: the run "
                    "would not go on as it began. Restore the value, or start anew with model.init_from in a new folder"
                )
        load_optimizer(folder, self.raw_model, self.raw_optimizer)
        if self.ema is not None:
            load_averages(folder, self.raw_model, self.ema)
            self.ema.optimization_step = stored["step"]
        self.step = stored["step"]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the average of its weights, where one is kept, until the block ends."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.averaged_parameters)
        self.ema.copy_to(self.averaged_parameters)
        try:
            yield
        finally:
            self.ema.restore(self.averaged_parameters)


def _postfix(row: dict, objectives: list[str]) -> str:
    losses = (f"{name} {row[f'loss_{name}']:.3f}" for name in objectives if row[f"loss_{name}"] is not None)
    return ", ".join([*losses, f"{row['tokens_per_second']:.0f} tok/s"])
