"""A whole run: data, model, training, held-out losses, samples, and the folder they are left in."""

import json
import logging
import math
import os
import sys
import time
from functools import partial

import torch
from accelerate.utils import set_seed

from modeling_mot import MoTConfig, MoTPreTrainedModel
from training.config import dump, to_tree, without_secrets
from training.consolidate import complete_card, consolidate
from training.data import collate
from training.data.collate import TOWER_ROWS
from training.data.reading.sources import data_cards
from training.data.rows import prepare_rows
from training.data.stream import StepBatches
from training.evaluation.end_of_run import describe_measures, make_samples
from training.evaluation.losses import evaluate_losses, evaluation_note
from training.evaluation.sheet import plot_losses
from training.evaluation.subjects import check_decoder, check_diffusion, check_subjects, find_subjects
from training.model.building import build_model, empty_model, load_initial, load_model, set_up_layers, stored_dtype
from training.model.fitting import (
    Budget,
    Planned,
    caption_dropout,
    describe_choice,
    fill_from_checkpoint,
    leaves_size_open,
    plan_model,
)
from training.model.flops import forward_flops_per_token, peak_flops
from training.objectives import objective_names
from training.optimization import HeldRows, NotFiniteError, build_optimizer, freeze_towers
from training.recipe import Recipe
from training.run_files.checkpoints import find_checkpoint, flatten, gather_objects, refuse_changes, refuse_different
from training.run_files.folder import RunFolder, RunLock, environment, write_json
from training.run_files.metrics import check_tracker, count_key, read_metrics
from training.trainer import Trainer
from training.world.devices import device_memory, keep_freed_memory, set_cpu_threads
from training.world.processes import (
    Interrupted,
    StopSignal,
    build_accelerator,
    describe_world,
    is_sharding,
    make_room,
    shard_model,
    spread_weights,
    wants_checkpointing,
)


NOT_SAVED, NOT_FINITE = 3, 4


def run(recipe: Recipe) -> int:
    """Run a recipe to its end; the exit code of the process, see training/train.py."""
    lock = RunLock(recipe.train.output_dir, int(os.environ.get("RANK", 0)))
    with StopSignal() as stop_signal:
        try:
            session = Session(recipe, stop_signal, lock)
            try:
                session.train()
                session.finish()
            except Interrupted as interrupted:
                session.report_interruption(interrupted)
                return NOT_SAVED if session.trainer.save_failed else interrupted.exit_code
            except NotFiniteError as error:
                session.say(f"error: {error}")
                return NOT_FINITE
            finally:
                session.trainer.trackers.finish()
        finally:
            lock.release()
            _leave_group()
    return NOT_SAVED if session.trainer.save_failed else 0


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Session:
    """The parts of one run, made from its recipe. Everything that can be refused is refused in the constructor."""

    def __init__(self, recipe: Recipe, stop_signal: StopSignal, lock: RunLock):
        self.recipe, self.stop_signal, self.begin = recipe, stop_signal, time.perf_counter()
        train = recipe.train
        check_tracker(train.tracker)
        self.accelerator = build_accelerator(
            train.precision,
            cpu=train.cpu,
            processes=train.processes,
            timeout_seconds=train.timeout_seconds,
            tracker=train.tracker,
            project_dir=f"{train.output_dir}/trackers",
            alike=to_tree(recipe),
        )
        self.precision = "bf16" if self.accelerator.mixed_precision == "bf16" else "float32"
        self.is_main = self.accelerator.is_main_process
        logging.basicConfig(format="%(message)s", level=logging.INFO if self.is_main else logging.ERROR)
        if self.accelerator.device.type == "cpu":
            set_cpu_threads(train.cpu_threads)
            if train.keep_freed_memory:
                keep_freed_memory()
        set_seed(train.seed)
        self.run = RunFolder(train.output_dir)
        with self.accelerator.main_process_first():
            if self.is_main:
                self.run.check(train.resume, train.overwrite)
            lock.acquire()
        self.checkpoint, passed_over = find_checkpoint(self.run, train.resume, self.accelerator)
        for line in passed_over:
            self.say(line)
        check_subjects(recipe.data, recipe.samples)
        initial = self._initial()
        # Before the data, which may take long to prepare.
        planned, self.processor, self.vae = self._plan(initial)
        check_decoder(self.processor, recipe.samples)
        check_diffusion(planned, recipe.samples)
        self.say(f"tokenising the data (kept in {recipe.data.cache_path}) ...")
        self.stream, self.held_out_rows, self.data_fingerprint = prepare_rows(
            recipe.data, self.processor, recipe.evaluation.rows, self.vae
        )
        refuse_different(
            self.accelerator,
            {
                "precision": self.precision,
                "data": self.data_fingerprint,
                "processor": self.processor.fingerprint(),
            },
        )
        # Of training alone: what encodes the data, before, and the samples, after, computes in whole float32.
        torch.set_float32_matmul_precision(train.float32_matmul_precision)
        self.trainer = self._trainer(planned, initial)
        self._write_down()

    def _initial(self) -> MoTPreTrainedModel | None:
        """The checkpoint that a recipe starts from; its weights only where they are needed."""
        needs_weights = self.checkpoint is None and (self.is_main or not is_sharding(self.accelerator))
        return load_initial(self.recipe.model, needs_weights)

    def _plan(self, initial: MoTPreTrainedModel | None) -> Planned:
        """What is trained; a size that the recipe leaves open is that of the checkpoint, or one that fits."""
        recipe, processes = self.recipe, self.accelerator.num_processes
        is_open = leaves_size_open(recipe.model)
        if is_open and self.checkpoint is not None:
            fill_from_checkpoint(recipe.model, self.checkpoint["config"]["model"])
        shards = processes if is_sharding(self.accelerator) else 1
        peak = self._peak_flops()[0] if is_open else math.inf  # only a choice asks for it
        budget = Budget.of(recipe, device_memory(self.accelerator.device), peak, processes, shards)
        # All ranks choose by what the first one has.
        budget = gather_objects(budget, torch.distributed.group.WORLD if processes > 1 else None)[0]
        planned = plan_model(recipe.model, recipe.data, initial, budget)
        if is_open:
            self.say(describe_choice(planned.config, budget))
        return planned

    def _peak_flops(self) -> tuple[float, str]:
        return peak_flops(self.accelerator.device, torch.bfloat16 if self.precision == "bf16" else torch.float32)

    def _model(self, planned: MoTConfig, initial: MoTPreTrainedModel | None) -> MoTPreTrainedModel:
        """The model on its device, sharded where it is to be; with its weights, unless a checkpoint brings them."""
        recipe, accelerator = self.recipe.model, self.accelerator
        built = None
        if self.checkpoint is None and (self.is_main or not is_sharding(accelerator)):
            built = build_model(recipe, planned, self.recipe.train.seed, self.vae, initial)
        whole_here = built is not None and not is_sharding(accelerator)
        model = built if whole_here else empty_model(recipe, planned, self.vae)
        if self.vae is not None:
            model.config.caption_dropout = max(model.config.caption_dropout, caption_dropout(self.recipe.data))
        freeze_towers(model, self.recipe.train.frozen_towers)
        checkpointing = recipe.gradient_checkpointing or wants_checkpointing()
        set_up_layers(model, checkpointing, recipe.compile, recipe.tower_products)
        if not is_sharding(accelerator):
            return make_room(model, accelerator.device)
        model = shard_model(accelerator, model)
        if self.checkpoint is None:
            spread_weights(model, built)
        return model

    def _trainer(self, planned: MoTConfig, initial: MoTPreTrainedModel | None) -> Trainer:
        recipe, accelerator = self.recipe, self.accelerator
        model = self._model(planned, initial)
        batch = partial(collate, config=model.config, multiple_of=TOWER_ROWS)
        self.collate_held_out = partial(batch, noise_seed="held out")
        self.peak, self.peak_source = self._peak_flops()
        batches = StepBatches(
            self.stream,
            partial(batch, noise_seed=recipe.train.seed),
            recipe.train.rows,
            recipe.train.accumulation,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.same_on_resume = {
            "config": without_secrets(to_tree(recipe)),
            "data_fingerprint": self.data_fingerprint,
            "rows_in_a_step": batches.rows_in_a_step,
        }
        if self.checkpoint is not None:
            self._check_resume(batches)
        held = HeldRows(model, recipe.train.frozen_vocabulary).parameters
        trainer = Trainer(
            accelerator,
            model,
            self.processor,
            build_optimizer(model, recipe.optimizer, held),
            batches,
            recipe.train,
            recipe.optimizer,
            self.run,
            peak_flops=self.peak,
            evaluate=self.evaluate if any(map(len, self.held_out_rows.values())) else None,
            evaluate_every=recipe.evaluation.every,
            stop_signal=self.stop_signal,
            describe={
                **self.same_on_resume,
                "world": describe_world(accelerator),
                "dtype": None if recipe.model.init_from is None else stored_dtype(recipe.model.init_from),
            },
        )
        if self.checkpoint is not None:
            trainer.resume(self.checkpoint)
        return trainer

    def _check_resume(self, batches: StepBatches) -> None:
        """Refuse to go on with another run than the one the checkpoint is of, or say what was allowed to change."""
        changed_source = None
        try:
            batches.stream.restore(self.checkpoint["stream"])
        except ValueError as error:
            changed_source = str(error)
        despite = self.recipe.train.resume_despite
        for line in refuse_changes(self.checkpoint, self.same_on_resume, despite, changed_source):
            self.say(f"resumed although {line}")

    def _write_down(self) -> None:
        """The resolved configuration and what the run is made with, beside its results; and a summary on the screen."""
        config = self.trainer.raw_model.config
        active, total = config.num_parameters(active=True), config.num_parameters(active=False)
        if self.is_main:
            self.run.claim(self.recipe.train.resume, self.recipe.train.overwrite)
            self.run.config.write_text(dump(self.same_on_resume["config"]), encoding="utf-8")
            facts = environment(
                world=describe_world(self.accelerator),
                device=str(self.accelerator.device),
                precision=self.precision,
                peak_flops=self.peak,
                peak_flops_source=self.peak_source,
                data_fingerprint=self.data_fingerprint,
                data_cards=data_cards(self.recipe.data),
                rows_in_a_step=self.same_on_resume["rows_in_a_step"],
                processor_fingerprint=self.processor.fingerprint(),
                seeds={"train": self.recipe.train.seed, "data": self.recipe.data.seed},
                active_parameters=active,
                total_parameters=total,
                forward_flops_per_token=forward_flops_per_token(config, self.recipe.data.row_length),
                config=self.same_on_resume["config"],
            )
            write_json(self.run.manifest, facts | {"launches": self._launches(facts)})
        if self.recipe.train.tracker != "none":
            self.trainer.trackers.start("mixture-of-transformers", _as_trackers_take(self.same_on_resume["config"]))
        self.say(
            f"{self.recipe.model.variant}: {active / 1e6:.1f} M active parameters of {total / 1e6:.1f} M, "
            f"{self.precision} on {self.accelerator.num_processes} x {self.accelerator.device}"
            f"{' (FSDP)' if is_sharding(self.accelerator) else ''} "
            f"({self.peak / 1e9:.0f} GFLOP/s, {self.peak_source}); writing to {self.run.path}"
        )

    def _launches(self, facts: dict) -> list[dict]:
        """When and from which step the run was begun and gone on with, this time the last."""
        try:
            earlier = json.loads(self.run.manifest.read_text(encoding="utf-8"))["launches"]
        except (OSError, ValueError, KeyError):
            earlier = []
        kept = ("started", "command", "commit", "world")
        return [*earlier, {name: facts[name] for name in kept} | {"from_step": self.trainer.step}]

    # --------------------------------------------------------------------------------------------------- the phases

    def train(self) -> None:
        if self.trainer.step:
            self.say(f"going on from step {self.trainer.step}")
        self.trainer.fit()

    def evaluate(self, model: MoTPreTrainedModel, stops) -> dict[str, float] | None:
        collate_rows, evaluation = self.collate_held_out, self.recipe.evaluation
        return evaluate_losses(model, self.held_out_rows, collate_rows, evaluation, self.accelerator, stops)

    def finish(self) -> None:
        """The final folder, then plots and samples; the figures on the screen and in summary.json.

        The main process does it alone, for however long it takes: the others do not wait.
        """
        self.accelerator.wait_for_everyone()
        _leave_group()
        if not self.is_main:
            return
        if self.trainer.save_failed:
            self.say(
                f"error: the last checkpoint could not be written, so there is no {self.run.final}; make room and "
                "set train.resume=auto"
            )
            return
        training_seconds = time.perf_counter() - self.begin
        try:
            consolidate(self.run, self.trainer.step, self.run.final)
        except OSError as error:
            self.trainer.save_failed = True
            self.say(
                f"error: {self.run.final} could not be written: {error}; make room, then: python -m "
                f"training.consolidate {self.run.path}"
            )
            return
        self.say(f"saved {self.run.final} (load it with trust_remote_code=True)")
        title = f"{self.recipe.model.variant}, step {self.trainer.step}"
        names = objective_names(self.trainer.raw_model.config)
        plot_losses(self.run.metrics, self.run.path / "losses.png", names, title)
        summary = self._summary()
        if self.recipe.samples.enabled:
            summary["samples"] = self._samples(title)
        summary["seconds"] = {"total": time.perf_counter() - self.begin, "until_saved": training_seconds}
        write_json(self.run.summary, summary)
        complete_card(self.run)
        self._print_summary(summary)

    def _samples(self, title: str) -> dict[str, float | int]:
        self.say("drawing, reading and speaking ...")
        torch.set_float32_matmul_precision("highest")
        config = self.recipe.samples
        model = load_model(str(self.run.final), self.recipe.model.attn_implementation).eval()
        model.to(self.accelerator.device)
        subjects = find_subjects(self.recipe.data, config)
        sheet, measures = make_samples(
            model,
            self.processor,
            subjects,
            config,
            self.run.samples,
            title,
            self.stop_signal.check,
            self.accelerator.autocast,
            self.recipe.train.progress_bar,
        )
        sheet.write_html(self.run.path / "samples.html")
        sheet.write_png(self.run.path / "samples.png")
        return measures

    def _summary(self) -> dict:
        training, evaluation = read_metrics(self.run.metrics)
        recent = training[-max(1, len(training) // 40) :]
        losses = {}
        for name in self.trainer.objectives:
            key = count_key(name)
            pairs = [(row[f"loss_{name}"], row[key]) for row in recent if row[key]]
            if pairs:
                losses[f"loss_{name}"] = sum(a * b for a, b in pairs) / sum(b for _, b in pairs)
        seconds = sum(row["step_seconds"] for row in training)
        return {
            "step": self.trainer.step,
            "training": losses,
            "held_out": {k: v for k, v in (evaluation[-1] if evaluation else {}).items() if k.startswith("eval/")},
            "note": evaluation_note(self.trainer.raw_model.config),
            "training_seconds": seconds,
            **{
                key: sum(row[key] * row["step_seconds"] for row in training) / max(seconds, 1e-9)
                for key in ("tokens_per_second", "mfu")
            },
        }

    def _print_summary(self, summary: dict) -> None:
        for kind in ("training", "held_out"):
            figures = ", ".join(f"{key.removeprefix('eval/')} {value:.3f}" for key, value in summary[kind].items())
            self.say(f"{kind.replace('_', ' ')}: {figures or 'nothing measured'}")
        if summary["note"]:
            self.say(summary["note"])
        for what, value in describe_measures(summary.get("samples", {})):
            self.say(f"{what}: {value}")
        self.say(
            f"{summary['tokens_per_second']:.0f} tokens/s, {summary['mfu']:.0%} of the peak, "
            f"{summary['seconds']['total']:.0f} s in all; see {self.run.path}"
        )

    def report_interruption(self, interrupted: Interrupted) -> None:
        saved = self.run.saved_steps()
        where = f"; train.resume=auto goes on from step {saved[-1]}" if saved else ""
        if self.trainer.save_failed:
            where = f", and its checkpoint could not be written{where}"
        if self.run.final.exists():
            where = f"; the trained model is in {self.run.final}"
        self.say(f"ended by {interrupted}{where}")

    def say(self, text: str) -> None:
        if self.is_main:
            print(without_secrets(text), file=sys.stderr, flush=True)


def _as_trackers_take(tree: dict) -> dict:
    """Dotted keys and plain values."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in flatten(tree).items()}
