"""A whole run: processes, folder, checkpoint, plan, rows, model, trainer; then the training and its end."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from modeling_mot import MoTPreTrainedModel
from training.config import ConfigError, dump, flatten, to_tree, without_secrets
from training.data import collate
from training.data.collate import TOWER_ROWS
from training.data.reading.sources import data_cards
from training.data.rows import prepare_rows
from training.data.stream import RowStream, StepBatches
from training.evaluation.end_of_run import end_run, report_interruption
from training.evaluation.losses import evaluate_losses
from training.model.building import (
    Planned,
    build_model,
    check_image_codes,
    empty_model,
    fill_from_checkpoint,
    load_initial,
    plan_model,
    set_up_layers,
    stored_dtype,
)
from training.model.costs import Budget, describe_choice, forward_flops_per_token, leaves_size_open, peak_flops
from training.optimization import NotFiniteError, set_trained
from training.recipe import Recipe, TrainConfig, check_decoder, check_diffusion, check_subjects, trained_parts
from training.run_files.checkpoints import Checkpointer, find_checkpoint, refuse_changes
from training.run_files.folder import RunFolder, RunLock, environment, write_json
from training.run_files.metrics import Metrics, check_tracker
from training.trainer import Trainer
from training.world import (
    Interrupted,
    StopSignal,
    build_accelerator,
    describe_world,
    device_memory,
    gather_objects,
    is_sharding,
    keep_freed_memory,
    leave_group,
    make_room,
    refuse_different,
    say,
    set_cpu_threads,
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
            trainer = session.trainer
            # Train and write what a run leaves. Each way to end has its exit code.
            try:
                if trainer.step:
                    say(session.accelerator, f"going on from step {trainer.step}")
                trainer.fit()
                end_run(session.recipe, trainer, session.planned.processor, session.begin)
            except Interrupted as interrupted:
                report_interruption(trainer, interrupted)
                return NOT_SAVED if trainer.save_failed else interrupted.exit_code
            except NotFiniteError as error:
                say(session.accelerator, f"error: {error}")
                return NOT_FINITE
            finally:
                trainer.metrics.trackers.finish()
        finally:
            lock.release()
            leave_group()
    return NOT_SAVED if trainer.save_failed else 0


class Session:
    """The parts of one run, made from its recipe. Everything that can be refused is refused in the constructor.

    Attributes:
        recipe: the recipe with everything that it left open.
        begin: time at which the run began.
    """

    def __init__(self, recipe: Recipe, stop_signal: StopSignal, lock: RunLock):
        self.begin = time.perf_counter()

        # The processes, and the folder that they write to.
        self.accelerator = accelerator = start_processes(recipe)
        run = take_folder(recipe.train, accelerator, lock)
        checkpoint = find_last_checkpoint(run, recipe.train, accelerator)

        # What is trained, before the data, which may take long to prepare.
        check_subjects(recipe.data, recipe.samples)
        refuse_sharded(recipe.train, accelerator)
        dtype = "auto" if recipe.train.frozen_dtype != "float32" else torch.float32
        initial = load_initial(recipe.model, makes_weights(accelerator, checkpoint), dtype)
        self.planned = planned = make_plan(recipe, accelerator, initial, checkpoint)
        check_image_codes(recipe.model, planned.processor)
        check_decoder(planned.processor, recipe.samples)
        check_diffusion(planned.config, recipe.samples)
        self.recipe = recipe = replace(recipe, model=planned.model, data=planned.data)

        # The rows.
        say(accelerator, f"tokenising the data (kept in {recipe.data.cache_path}) ...")
        stream, held_out, data_fingerprint = prepare_rows(
            recipe.data, planned.processor, recipe.evaluation.rows, planned.vae
        )
        refuse_different_data(accelerator, data_fingerprint, planned)

        # The model. Training alone may be less exact: the data before it and the samples after it are whole float32.
        torch.set_float32_matmul_precision(recipe.train.float32_matmul_precision)
        model = make_model(recipe, accelerator, planned, initial, checkpoint)
        batch = partial(collate, config=model.config, multiple_of=TOWER_ROWS)
        batches = make_batches(recipe, accelerator, stream, batch)

        # What must be the same when the run goes on.
        same = {
            "config": without_secrets(to_tree(recipe)),
            "data_fingerprint": data_fingerprint,
            "rows_in_a_step": batches.rows_in_a_step,
        }
        if checkpoint is not None:
            check_resume(recipe.train, accelerator, checkpoint, same, stream)

        # The trainer, and the folder's first files.
        peak, peak_source = find_peak(accelerator)
        evaluate = partial(
            evaluate_losses,
            rows=held_out,
            collate=partial(batch, noise_seed="held out"),
            config=recipe.evaluation,
            accelerator=accelerator,
        )
        self.trainer = Trainer(
            accelerator,
            model,
            batches,
            recipe.train,
            recipe.optimizer,
            make_checkpointer(recipe, accelerator, run, planned, same),
            Metrics(run.metrics, accelerator, model.config, peak),
            evaluate=evaluate if any(map(len, held_out.values())) else None,
            evaluate_every=recipe.evaluation.every,
            stop_signal=stop_signal,
        )
        if checkpoint is not None:
            self.trainer.resume(checkpoint)
        write_down(recipe, self.trainer, planned, same, peak_source)


# ------------------------------------------------------------------------------------ the parts, in the order of making


def start_processes(recipe: Recipe) -> Accelerator:
    """Meet the other processes, and set up this one: threads, memory, messages, seed.

    Raises:
        ConfigError: the processes are not those that were asked for.
    """
    train = recipe.train
    check_tracker(train.tracker)
    accelerator = build_accelerator(
        train.precision,
        cpu=train.cpu,
        processes=train.processes,
        timeout_seconds=train.timeout_seconds,
        tracker=train.tracker,
        project_dir=f"{train.output_dir}/trackers",
        alike=to_tree(recipe),
    )
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    if accelerator.device.type == "cpu":
        set_cpu_threads(train.cpu_threads)
        if train.keep_freed_memory:
            keep_freed_memory()
    set_seed(train.seed)
    return accelerator


def take_folder(train: TrainConfig, accelerator: Accelerator, lock: RunLock) -> RunFolder:
    """Check the folder of the run, lock it and return it. The main process goes first."""
    run = RunFolder(train.output_dir)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            run.check(train.resume, train.overwrite)
        lock.acquire()
    return run


def find_last_checkpoint(run: RunFolder, train: TrainConfig, accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the manifest of the checkpoint to go on from, or None; say which damaged ones are passed over."""
    checkpoint, passed_over = find_checkpoint(run, train.resume, accelerator)
    for line in passed_over:
        say(accelerator, line)
    return checkpoint


def refuse_sharded(train: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse adapters and weights of less precision in a model that processes share.

    Raises:
        ConfigError: naming the key.
    """
    for name, neutral in (("lora", None), ("frozen_dtype", "float32")):
        if is_sharding(accelerator) and getattr(train, name) != neutral:
            raise ConfigError(
                f"train.{name} is for a model that each process holds whole, but this run shards it; launch it without "
                f"FSDP, or set train.{name}={'null' if neutral is None else neutral}"
            )


def makes_weights(accelerator: Accelerator, checkpoint: Mapping | None) -> bool:
    """True if this process makes whole weights: no checkpoint brings them, nor the main process of a sharded model."""
    return checkpoint is None and (accelerator.is_main_process or not is_sharding(accelerator))


def find_peak(accelerator: Accelerator) -> tuple[float, str]:
    """Return (FLOP/s of this device in the precision of training, source of the figure)."""
    return peak_flops(accelerator.device, torch.bfloat16 if precision_of(accelerator) == "bf16" else torch.float32)


def make_plan(
    recipe: Recipe, accelerator: Accelerator, initial: MoTPreTrainedModel | None, checkpoint: Mapping | None
) -> Planned:
    """Decide what to train. If the recipe names no size, take the checkpoint's, or one that fits the machine."""
    model, processes = recipe.model, accelerator.num_processes
    is_open = leaves_size_open(model)
    if is_open and checkpoint is not None:
        model = fill_from_checkpoint(model, checkpoint["config"]["model"])
    # The peak is measured only for a choice. All ranks choose by the budget of the first one.
    peak = find_peak(accelerator)[0] if is_open else math.inf
    shards = processes if is_sharding(accelerator) else 1
    budget = Budget.of(recipe, device_memory(accelerator.device), peak, processes, shards)
    budget = gather_objects(budget, torch.distributed.group.WORLD if processes > 1 else None)[0]
    planned = plan_model(model, recipe.data, initial, budget)
    if is_open:
        say(accelerator, describe_choice(planned.config, budget))
    return planned


def refuse_different_data(accelerator: Accelerator, data_fingerprint: str, planned: Planned) -> None:
    """Refuse ranks that have found other data, another processor or another precision."""
    refuse_different(
        accelerator,
        {
            "precision": precision_of(accelerator),
            "data": data_fingerprint,
            "processor": planned.processor.fingerprint(),
        },
    )


def precision_of(accelerator: Accelerator) -> str:
    """Return the precision of training: `bf16` or `float32`."""
    return "bf16" if accelerator.mixed_precision == "bf16" else "float32"


def make_model(
    recipe: Recipe,
    accelerator: Accelerator,
    planned: Planned,
    initial: MoTPreTrainedModel | None,
    checkpoint: Mapping | None,
) -> MoTPreTrainedModel:
    """Make the model on its device, sharded if the run shards, and without weights if a checkpoint brings them."""
    settings = recipe.model
    built = None
    if makes_weights(accelerator, checkpoint):
        built = build_model(settings, planned.config, recipe.train.seed, planned.vae, initial)
    # Whole weights of a sharded model stay on the main process, beside the model that gets its shards.
    whole_here = built is not None and not is_sharding(accelerator)
    model = built if whole_here else empty_model(settings, planned.config, planned.vae)
    set_trained(model, **trained_parts(recipe.train))
    checkpointing = settings.gradient_checkpointing or wants_checkpointing()
    set_up_layers(model, checkpointing, settings.compile, settings.tower_products)
    if not is_sharding(accelerator):
        return make_room(model, accelerator.device)
    model = shard_model(accelerator, model)
    if checkpoint is None:
        spread_weights(model, built)
    return model


def make_batches(recipe: Recipe, accelerator: Accelerator, stream: RowStream, batch: partial) -> StepBatches:
    """Make this process's share of the rows of each step."""
    return StepBatches(
        stream,
        partial(batch, noise_seed=recipe.train.seed),
        recipe.train.rows,
        recipe.micro_batches(accelerator.num_processes),
        accelerator.process_index,
        accelerator.num_processes,
    )


def check_resume(
    train: TrainConfig, accelerator: Accelerator, checkpoint: Mapping, same: Mapping, stream: RowStream
) -> None:
    """Refuse to go on with another run than the checkpoint's, or say which changes were allowed."""
    changed_source = None
    try:
        stream.restore(checkpoint["stream"])
    except ValueError as error:
        changed_source = str(error)
    for line in refuse_changes(checkpoint, same, train.resume_despite, changed_source):
        say(accelerator, f"resumed although {line}")


def make_checkpointer(
    recipe: Recipe, accelerator: Accelerator, run: RunFolder, planned: Planned, same: Mapping
) -> Checkpointer:
    """Make the writer of checkpoints, with everything that their manifests say of the run."""
    train, source = recipe.train, recipe.model.init_from
    describe = {
        **same,
        "world": describe_world(accelerator),
        "dtype": None if source is None else stored_dtype(source),
    }
    return Checkpointer(
        run, accelerator, planned.processor, describe, train.keep_checkpoints, train.save_asynchronously
    )


def write_down(recipe: Recipe, trainer: Trainer, planned: Planned, same: Mapping, peak_source: str) -> None:
    """Write the resolved configuration and what the run is made with, start the tracker, and say it on the screen."""
    accelerator, run, config = trainer.accelerator, trainer.run, trainer.raw_model.config
    active, total = config.num_parameters(active=True), config.num_parameters(active=False)
    peak = trainer.metrics.peak_flops

    # The folder becomes this run's; what the run is made of is written before its first step.
    if accelerator.is_main_process:
        run.claim(recipe.train.resume, recipe.train.overwrite)
        run.config.write_text(dump(same["config"]), encoding="utf-8")
        facts = environment(
            world=describe_world(accelerator),
            device=str(accelerator.device),
            precision=precision_of(accelerator),
            peak_flops=peak,
            peak_flops_source=peak_source,
            data_fingerprint=same["data_fingerprint"],
            data_cards=data_cards(recipe.data),
            rows_in_a_step=same["rows_in_a_step"],
            processor_fingerprint=planned.processor.fingerprint(),
            seeds={"train": recipe.train.seed, "data": recipe.data.seed},
            active_parameters=active,
            total_parameters=total,
            forward_flops_per_token=forward_flops_per_token(config, recipe.data.row_length),
            config=same["config"],
        )
        write_json(run.manifest, facts | {"launches": _launches(run, facts, trainer.step)})

    # The tracker and the screen.
    if recipe.train.tracker != "none":
        trainer.metrics.trackers.start("mixture-of-transformers", _as_trackers_take(same["config"]))
    say(
        accelerator,
        f"{recipe.model.variant}: {active / 1e6:.1f} M active parameters of {total / 1e6:.1f} M, "
        f"{precision_of(accelerator)} on {accelerator.num_processes} x {accelerator.device}"
        f"{' (FSDP)' if is_sharding(accelerator) else ''} "
        f"({peak / 1e9:.0f} GFLOP/s, {peak_source}); writing to {run.path}",
    )


def _launches(run: RunFolder, facts: Mapping, step: int) -> list[dict]:
    """List when and from which step the run was begun or gone on with; the last entry is this launch."""
    try:
        earlier = json.loads(run.manifest.read_text(encoding="utf-8"))["launches"]
    except (OSError, ValueError, KeyError):
        earlier = []
    kept = ("started", "command", "commit", "world")
    return [*earlier, {name: facts[name] for name in kept} | {"from_step": step}]


def _as_trackers_take(tree: dict) -> dict:
    """Flatten a tree to dotted keys and plain values."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in flatten(tree).items()}
