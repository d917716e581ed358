"""The training loop: one step for every objective, on any device and number of processes that Accelerate knows."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from signal import SIGTERM
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm.auto import tqdm

from modeling_mot import MoTPreTrainedModel
from training.data.collate import seed_of
from training.data.stream import StepBatches
from training.optimization import (
    HeldRows,
    NotFiniteError,
    OptimizerConfig,
    UpdateGuard,
    averaged,
    build_optimizer,
    check_modality_weights,
    combine,
    count_targets,
    learning_rate,
    loss_scales,
    not_finite,
    objective_names,
)
from training.recipe import TrainConfig
from training.run_files.checkpoints import Checkpointer, SaveError, load_state, optimizer_scalars, state_tensors
from training.run_files.metrics import Metrics
from training.world import Interrupted, StepProfiler, StopSignal, is_sharding, resharded


# B batch, L row length

logger = logging.getLogger(__name__)

# The bar itself stands last and takes what is left of the line: 80 columns hold three losses.
BAR = "{n_fmt}/{total_fmt} {remaining} left{postfix} {bar}"


class Trainer:
    """Trains `model` on `batches`: takes the steps, and decides when to evaluate, to save and to end.

    Args:
        accelerator: devices and precision.
        model: on its device, and already sharded if the accelerator shards; else it is prepared here.
        batches: the micro-batches of each step.
        checkpointer: writes the checkpoints, into the folder of the run.
        metrics: writes the rows of steps and evaluations.
        evaluate: called as `evaluate(model, stops=stops)`, every `evaluate_every` steps and at the end (0: only at the
            end); returns `eval/...` figures, which are logged, or None if `stops()` became true.
        stop_signal: a signal that has come ends the run after the step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: MoTPreTrainedModel,
        batches: StepBatches,
        config: TrainConfig,
        optimizer_config: OptimizerConfig,
        checkpointer: Checkpointer,
        metrics: Metrics,
        *,
        evaluate: Callable[..., dict[str, float] | None] | None = None,
        evaluate_every: int = 0,
        stop_signal: StopSignal | None = None,
    ):
        check_modality_weights(config.modality_weights, model.config.token_modalities)
        self.accelerator = accelerator
        self.batches = batches
        self.config = config
        self.optimizer_config = optimizer_config
        self.checkpointer = checkpointer
        self.run = checkpointer.run
        self.metrics = metrics
        self.evaluate = evaluate
        self.evaluate_every = evaluate_every
        self.stop_signal = stop_signal or StopSignal()

        # The model, its parameters and what updates them; as they are, and as the accelerator wraps them.
        self.raw_model = model
        self.held_rows = HeldRows(model, config.frozen_vocabulary)
        self.raw_optimizer = optimizer = build_optimizer(model, optimizer_config, self.held_rows.parameters)
        self.is_sharded = is_sharding(accelerator)
        if self.is_sharded:
            self.model = model
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.of_tower = parameters_by_tower(self.trained, model.config.tower_names)
        self.ema = None
        if config.ema_decay is not None:
            # Torch has no grouped copy of sharded tensors.
            self.ema = EMAModel(self.trained.values(), decay=config.ema_decay, foreach=not self.is_sharded)
        self.guard = UpdateGuard(config.not_finite_limit, config.spike_threshold, config.skip_spikes)

        # What a step counts.
        self.modalities = list(model.config.modalities)
        self.objectives = objective_names(model.config)
        self.diffusion_weight = getattr(model.config, "diffusion_loss_weight", 1.0)

        # Where the run stands.
        self.step = 0
        self.saved_step: int | None = None
        self.evaluated_step: int | None = None
        self.save_failed = False
        self.profiler = StepProfiler(self.run.profiles)
        self.checkpoint_seconds = 0.0

    # --------------------------------------------------------------------------------------------------- one step

    def train_step(self, micro_batches: list[dict] | None) -> dict:
        """Make one update from this rank's micro-batches, unless `UpdateGuard` forbids it; return the step's figures.

        The figures cover all ranks. If a rank has no micro-batches, no rank computes, and all return `stalled`: true.
        """
        # Count the targets of all ranks and micro-batches before any backward: each sum is divided by them.
        counts = self.count(micro_batches)
        if counts["stalled"]:
            return counts
        targets = dict(zip(self.objectives, counts["targets"], strict=True))
        scales, z_scale = loss_scales(targets, self.config.modality_weights, self.diffusion_weight)

        # The losses and their gradients.
        sums = torch.zeros(len(self.objectives) + 2, device=self.accelerator.device)
        for index, batch in enumerate(micro_batches):
            self.seed_forward(index)
            with self.accumulating(is_last=index == len(micro_batches) - 1):
                batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
                with self.accelerator.autocast():
                    output = self.model(**batch, use_cache=False, skip_logits=True)
                loss = combine(output.loss_sums, output.z_loss_sum, scales, z_scale)
                self.accelerator.backward(loss * self.accelerator.num_processes)  # undo the gradient mean over ranks
            parts = [*(output.loss_sums[name] for name in self.objectives), loss]
            sums[:-1] += torch.stack([part.detach().float() for part in parts])
        sums[-1] = self.stop_signal.number  # one that has come since the count ends the run after this step
        *objective_sums, loss, signals = self.accelerator.reduce(sums).tolist()

        # The update, unless loss or gradient forbid it.
        self.held_rows.clear_gradients()
        norm, norms = self.gradient_norms()
        updates, event = self.guard.judge(loss, norm.item())
        lr = learning_rate(self.optimizer_config, self.step, self.config.steps)
        if updates:
            if self.optimizer_config.clip_norm is not None:
                clip_grads_with_norm_(self.trained.values(), self.optimizer_config.clip_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self.ema is not None:
                self.ema.step(self.trained.values())
        self.optimizer.zero_grad()
        self.step += 1

        means = {o: s / n if n else None for (o, n), s in zip(targets.items(), objective_sums, strict=True)}
        figures = {"loss": loss, "means": means, "targets": targets, "grad_norm": norm.item(), "grad_norms": norms}
        guarded = {"event": event, "skipped": self.guard.skipped}
        stop = counts["stop"] or signals > 0
        return {**counts, **figures, **guarded, "step": self.step, "lr": lr, "stop": stop}

    def count(self, micro_batches: list[dict] | None) -> dict:
        """Count targets by objective, positions by modality, positions without padding, and signals, over all ranks."""
        first = len(self.objectives)
        number = len(self.modalities)
        local = torch.zeros(first + number + 3, dtype=torch.long)
        for batch in micro_batches or []:
            local[:first] += count_targets(batch, self.raw_model.config)
            local[first:-3] += torch.bincount(batch["modality_ids"].flatten(), minlength=number)
            local[-3] += (batch["document_ids"] >= 0).sum()
        local[-2] = self.stop_signal.number
        local[-1] = micro_batches is None
        total = self.accelerator.reduce(local.to(self.accelerator.device)).tolist()
        # Only the reduced number may decide: a signal that has come meanwhile is known to this rank alone.
        stop = total[-2] > 0
        if total[-1]:
            return {"stop": stop, "stalled": True}
        positions = dict(zip(self.modalities, total[first:-3], strict=True))
        row_length = micro_batches[0]["input_ids"].shape[1]
        counts = {"targets": total[:first], "positions": positions, "tokens": total[-3]}
        return {**counts, "row_length": row_length, "stop": stop, "stalled": False}

    def accumulating(self, is_last: bool) -> AbstractContextManager:
        """Return the context of a micro-batch's backward; gradients are summed over ranks with the last one of a step.

        Gradients of sharded models are scattered in each micro-batch, or every rank would hold all of them until the
        last; only the sum over the groups of a hybrid mesh waits for it.
        """
        if self.is_sharded:
            self.model.set_requires_all_reduce(is_last)
            return nullcontext()
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def gradient_norms(self) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the norm of the whole gradient and of each tower's, over all ranks."""
        gradients = [[p.grad for p in parameters if p.grad is not None] for parameters in self.of_tower.values()]
        norms = torch.stack([whole(get_total_norm(of_tower)) for of_tower in gradients])
        return torch.linalg.vector_norm(norms), dict(zip(self.of_tower, norms.tolist(), strict=True))

    def seed_forward(self, micro_batch: int) -> None:
        """Make dropout a function of (seed, step, micro-batch, rank), so that a resumed run draws the same."""
        words = f"{self.config.seed}/{self.step}/{micro_batch}/{self.accelerator.process_index}"
        torch.manual_seed(seed_of(words))

    # ---------------------------------------------------------------------------------------------------- the run

    def fit(self) -> None:
        """Train up to `config.steps`, with evaluations and checkpoints on the way.

        Raises:
            Interrupted: after the step in which a signal came; a checkpoint has been written, unless `save_failed`.
            NotFiniteError: see `UpdateGuard`; likewise.
        """
        # A run that goes on makes up for an evaluation that a signal prevented.
        if self.evaluation_is_due() and self.evaluated_step != self.step:
            self.run_evaluation()

        # The steps.
        bar_is_off = not (self.accelerator.is_main_process and self.config.progress_bar)
        bar = tqdm(total=self.config.steps, initial=self.step, disable=bar_is_off, bar_format=BAR)
        batches = self.batches.from_step(self.step, self.config.steps, lambda: bool(self.stop_signal.number))
        begin = time.perf_counter()
        with bar:
            for micro_batches in batches:
                data_seconds = time.perf_counter() - begin
                with self.profiler.step(self.stop_signal):
                    figures = self.train_step(micro_batches)
                if not figures["stalled"]:
                    seconds = time.perf_counter() - begin
                    row = self.metrics.step_row(figures, seconds, data_seconds, self.checkpoint_seconds)
                    self.checkpoint_seconds = 0.0
                    # Before anything is saved: a run that is killed here must not resume past a row it never wrote.
                    self.metrics.write(row)
                    bar.set_postfix_str(_postfix(row, self.objectives), refresh=False)
                    bar.update()
                self.after_step(figures)
                begin = time.perf_counter()

        # The end.
        if self.evaluate is not None:
            self.run_evaluation()
        self.save(wait=True)

    def after_step(self, figures: dict) -> None:
        """Evaluate and save if that is due; end if a signal asks for it, or if losses or parameters are not finite."""
        # What ends the run.
        alone = self.accelerator.num_processes == 1
        if self.stop_signal.number if alone else figures["stop"]:
            self.interrupt()
        if self.guard.wants_check(self.step):
            self.refuse_not_finite({name: value.detach() for name, value in self.trained.items()})
        if self.guard.gives_up:
            self.save(wait=True)
            raise NotFiniteError(
                f"loss or gradient were not finite for {self.guard.not_finite_in_a_row} steps in a row, up to step "
                f"{self.step} (loss {figures['loss']}, gradient norm {figures['grad_norm']}); the parameters are those "
                "before them. Lower optimizer.lr, or train with train.precision=float32"
            )

        # What is due, unless `fit` is about to do it.
        if self.step == self.config.steps:
            return
        if self.evaluation_is_due():
            self.run_evaluation()
        if self.config.save_every and self.step % self.config.save_every == 0:
            self.save()
            if self.stops():
                self.interrupt()
        self.note_failed_save()

    def refuse_not_finite(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """End the run if a tensor holds NaN or infinity, before a checkpoint is written. Every rank calls it.

        Raises:
            NotFiniteError: naming them.
        """
        if not (names := not_finite(tensors, self.accelerator)):
            return
        self.note_failed_save(wait=True)
        steps = self.run.saved_steps()
        kept = f"the checkpoint of step {steps[-1]} is the newest" if steps else "there is no checkpoint"
        named = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
        raise NotFiniteError(
            f"{named} hold values that are not finite after step {self.step}. Nothing was saved of them; {kept}. Lower "
            "optimizer.lr or optimizer.weight_decay, set optimizer.clip_norm, or train with train.precision=float32"
        )

    def stops(self) -> bool:
        """True if any rank has had a signal. Every rank calls it."""
        number = self.stop_signal.number
        if self.accelerator.num_processes > 1:
            number = self.accelerator.reduce(torch.tensor([number], device=self.accelerator.device)).item()
        return number > 0

    def interrupt(self) -> None:
        """Save, then raise Interrupted."""
        self.save(wait=True)
        raise Interrupted(self.stop_signal.number or SIGTERM)

    def evaluation_is_due(self) -> bool:
        """True if the model is to be evaluated after the present step, which is not the last."""
        every = self.evaluate_every if self.evaluate is not None else 0
        return bool(every) and 0 < self.step < self.config.steps and self.step % every == 0

    def run_evaluation(self) -> dict[str, float]:
        """Evaluate, log `eval/...` and return it.

        Raises:
            Interrupted: a signal cut it short. The run that goes on from the checkpoint makes up for it.
        """
        self.model.eval()
        with torch.no_grad(), resharded(self.raw_model), averaged(self.trained.values(), self.ema):
            figures = self.evaluate(self.raw_model, stops=self.stops)
        self.model.train()
        if figures is None:
            self.interrupt()
        self.metrics.write({"step": self.step, **figures})
        self.evaluated_step = self.step
        # The end of the run says the last losses.
        losses = _losses({name: figures.get(f"eval/loss_{name}") for name in self.objectives})
        if losses and self.step < self.config.steps and self.accelerator.is_main_process:
            tqdm.write(f"step {self.step}: held out {' '.join(losses)}", file=sys.stderr)
        return figures

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self, wait: bool = False) -> None:
        """Write a checkpoint of the present step, unless there is one; with `wait` it is on the disk afterwards.

        If it cannot be written, `save_failed` becomes true, the earlier checkpoints stay, and the run goes on.

        Raises:
            NotFiniteError: the model, its average or the optimizer is not finite; nothing is written then.
        """
        begin = time.perf_counter()
        # Finish the last save first: some ranks may know of its failure and others not yet, and all must do the same.
        self.note_failed_save(wait=True)
        if self.saved_step != self.step or self.save_failed:
            state = self.state()
            tensors = state_tensors(self.raw_model, self.raw_optimizer, self.ema)
            self.refuse_not_finite(tensors)
            try:
                self.checkpointer.save(state, tensors, self.raw_model)
                self.saved_step = self.step
                self.save_failed = False
            except SaveError as error:
                self._save_failed(error)
        if wait:
            self.note_failed_save(wait=True)
        self.checkpoint_seconds += time.perf_counter() - begin

    def note_failed_save(self, wait: bool = False) -> None:
        """Learn whether a checkpoint that is written beside the training has failed."""
        try:
            self.checkpointer.finish(wait)
        except SaveError as error:
            self._save_failed(error)

    def _save_failed(self, error: SaveError) -> None:
        self.save_failed = True
        if self.accelerator.is_main_process:
            logger.error("a checkpoint could not be written, those before it are untouched: %s", error)

    def state(self) -> dict[str, Any]:
        """Where the run stands, as JSON values; with the tensors of a checkpoint it is all that `resume` needs."""
        rows = self.step * self.batches.rows_in_a_step
        return {
            "step": self.step,
            "rows": rows,
            "stream": self.batches.stream.position(rows),
            "optimizer": optimizer_scalars(self.raw_optimizer),
            "average_updates": None if self.ema is None else self.ema.optimization_step,
            "guard": self.guard.state(),
            "evaluated_step": self.evaluated_step,
        }

    def resume(self, manifest: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of this run, of any number of processes."""
        self.step = self.saved_step = manifest["step"]
        folder = self.run.checkpoint(self.step)
        # An average that the checkpoint does not hold begins with the next update.
        has_average = self.ema is not None and manifest["average_updates"] is not None
        with resharded(self.raw_model):
            load_state(folder, manifest, self.raw_model, self.raw_optimizer, self.ema if has_average else None)
        if has_average:
            self.ema.optimization_step = manifest["average_updates"]
        self.guard.restore(manifest["guard"])
        self.evaluated_step = manifest["evaluated_step"]
        if self.checkpointer.describe.get("data_fingerprint") == manifest.get(
            "data_fingerprint"
        ):  # else rows are counted anew
            self.batches.stream.restore(manifest["stream"])


def parameters_by_tower(
    parameters: Mapping[str, torch.nn.Parameter], towers: list[str]
) -> dict[str, list[torch.nn.Parameter]]:
    """Tower -> its parameters, and `shared` -> parameters of no tower; without empty groups."""
    groups: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        tower = next((part for part in name.split(".") if part in towers), "shared")
        groups.setdefault(tower, []).append(parameter)
    return groups


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the parts of all ranks; a collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _postfix(row: dict, objectives: list[str]) -> str:
    losses = _losses({name: row[f"loss_{name}"] for name in objectives})
    return " ".join([*losses, f"{tqdm.format_sizeof(row['tokens_per_second'])} tok/s", f"{row['mfu']:.0%} MFU"])


def _losses(losses: dict[str, float | None]) -> list[str]:
    return [f"{name} {loss:#.3g}" for name, loss in losses.items() if loss is not None]
