"""A whole run: data, model, training, held-out losses, samples, and the folder they are left in."""

import sys
import time
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from modeling_mot import MoTConfig, MoTPreTrainedModel
from training.checkpoints import save_pretrained
from training.config import dump, to_tree
from training.data import collate
from training.devices import choose_precision, keep_freed_memory, set_cpu_threads
from training.evaluation.end_of_run import describe_measures, make_samples
from training.evaluation.losses import evaluate_losses, evaluation_note
from training.evaluation.subjects import check_subjects, find_subjects
from training.flops import forward_flops_per_token, peak_flops
from training.metrics import count_key, read_metrics
from training.models import build_model, find_vae, load_model, load_processor, planned_config
from training.objectives import objective_names
from training.optimization import build_optimizer
from training.recipe import Recipe
from training.reporting import plot_losses
from training.rows import prepare_rows
from training.run_folder import RunFolder, environment, write_json
from training.trainer import Interrupted, StepBatches, StopSignal, Trainer
from training.transfusion import caption_dropout, has_sound


def run(recipe: Recipe) -> int:
    """Run a recipe to its end; the exit code of the process (0, or 128 + signal when interrupted)."""
    with StopSignal() as stop_signal:
        session = Session(recipe, stop_signal)
        try:
            session.train()
            session.finish()
        except Interrupted as interrupted:
            session.report_interruption(interrupted)
            return interrupted.exit_code
        finally:
            session.accelerator.end_training()
    return 0


class Session:
    """The parts of one run, made from its recipe. Everything that can be refused is refused in the constructor."""

    def __init__(self, recipe: Recipe, stop_signal: StopSignal):
        self.recipe, self.stop_signal, self.begin = recipe, stop_signal, time.perf_counter()
        train = recipe.train
        self.accelerator = self._accelerator()
        self.is_main = self.accelerator.is_main_process
        if self.accelerator.device.type == "cpu":
            set_cpu_threads(train.cpu_threads)
            keep_freed_memory()
        set_seed(train.seed)
        self.run = RunFolder(train.output_dir)
        self.run.check(train.resume, train.overwrite)
        check_subjects(recipe.data, recipe.samples)
        initial = None
        if recipe.model.init_from is not None:
            initial = load_model(recipe.model.init_from, recipe.model.attn_implementation)
        self.vae = find_vae(recipe.model, initial)
        self.processor = load_processor(recipe.model, self.vae, has_sound(recipe.data))
        # Before the data, which may take long to prepare.
        planned = planned_config(recipe.model, self.processor, recipe.data.row_length, self.vae, initial)
        if not getattr(planned, "noised_images_visible", True):
            recipe.data.clean_copies = True
        self.say(f"tokenising the data (kept in {recipe.data.cache_path}) ...")
        with self.accelerator.main_process_first():
            self.stream, self.held_out_rows, self.data_fingerprint = prepare_rows(
                recipe.data, self.processor, recipe.evaluation.rows, self.vae
            )
        self.trainer = self._trainer(planned, initial)
        self._write_down()

    def _accelerator(self) -> Accelerator:
        train = self.recipe.train
        device_type = "cpu" if train.cpu else _default_device_type()
        self.precision = choose_precision(train.precision, device_type)
        return Accelerator(
            cpu=train.cpu,
            mixed_precision="bf16" if self.precision == "bf16" else "no",
            log_with=None if train.tracker == "none" else train.tracker,
            project_dir=f"{train.output_dir}/trackers",
        )

    def _trainer(self, planned: MoTConfig, initial: MoTPreTrainedModel | None) -> Trainer:
        recipe, accelerator = self.recipe, self.accelerator
        saved = self.run.saved_steps() if recipe.train.resume else []
        if saved:
            folder = str(self.run.checkpoint(saved[-1]))
            model = load_model(folder, recipe.model.attn_implementation).train()
            if recipe.model.gradient_checkpointing:
                model.gradient_checkpointing_enable()
        else:
            model = build_model(recipe.model, planned, recipe.train.seed, self.vae, initial)
        if self.vae is not None:
            model.config.caption_dropout = max(model.config.caption_dropout, caption_dropout(recipe.data))
        # Padded, or every step would have products of other sizes, for which kernels are made anew.
        batch = partial(collate, config=model.config, multiple_of=64)
        self.collate_held_out = partial(batch, noise_seed="held out")
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.peak, self.peak_source = peak_flops(accelerator.device, dtype)
        model.to(accelerator.device)
        trainer = Trainer(
            accelerator,
            model,
            self.processor,
            build_optimizer(model, recipe.optimizer),
            StepBatches(
                self.stream,
                partial(batch, noise_seed=recipe.train.seed),
                recipe.train.rows,
                recipe.train.accumulation,
                accelerator.process_index,
                accelerator.num_processes,
            ),
            recipe.train,
            recipe.optimizer,
            self.run,
            peak_flops=self.peak,
            evaluate=self.evaluate if any(map(len, self.held_out_rows.values())) else None,
            evaluate_every=recipe.evaluation.every,
            stop_signal=self.stop_signal,
            state={
                "data_fingerprint": self.data_fingerprint,
                "rows_in_a_step": recipe.train.rows * recipe.train.accumulation * accelerator.num_processes,
                "row_length": recipe.data.row_length,
                "data_seed": recipe.data.seed,
                "seed": recipe.train.seed,
            },
        )
        if saved:
            trainer.resume()
        return trainer

    def _write_down(self) -> None:
        """The resolved configuration and what the run is made with, beside its results; and a summary on the screen."""
        model = self.trainer.raw_model
        active, total = model.config.num_parameters(active=True), model.config.num_parameters(active=False)
        per_token = forward_flops_per_token(model.config, self.recipe.data.row_length)
        if self.is_main:
            self.run.claim(self.recipe.train.resume, self.recipe.train.overwrite)
            self.run.config.write_text(dump(self.recipe), encoding="utf-8")
            facts = environment(
                processes=self.accelerator.num_processes,
                device=str(self.accelerator.device),
                precision=self.precision,
                peak_flops=self.peak,
                peak_flops_source=self.peak_source,
                data_fingerprint=self.data_fingerprint,
                processor_fingerprint=self.processor.fingerprint(),
                active_parameters=active,
                total_parameters=total,
                forward_flops_per_token=per_token,
            )
            write_json(self.run.environment, facts)
        if self.recipe.train.tracker != "none":
            self.accelerator.init_trackers("mixture-of-transformers", config=_flat(to_tree(self.recipe)))
        self.say(
            f"{self.recipe.model.variant}: {active / 1e6:.1f} M active parameters of {total / 1e6:.1f} M, "
            f"{self.precision} on {self.accelerator.num_processes} x {self.accelerator.device} "
            f"({self.peak / 1e9:.0f} GFLOP/s, {self.peak_source}); writing to {self.run.path}"
        )

    # --------------------------------------------------------------------------------------------------- the phases

    def train(self) -> None:
        if self.trainer.step:
            self.say(f"going on from step {self.trainer.step}")
        self.trainer.fit()

    def evaluate(self, model) -> dict[str, float]:
        collate_rows = self.collate_held_out
        return evaluate_losses(model, self.held_out_rows, collate_rows, self.recipe.evaluation, self.accelerator)

    def finish(self) -> None:
        """The final folder, then plots and samples; the figures on the screen and in summary.json."""
        with self.trainer.averaged():
            self._finish()

    def _finish(self) -> None:
        if self.is_main:
            model = self.trainer.raw_model
            training_seconds = time.perf_counter() - self.begin
            save_pretrained(self.run.final, model, self.processor)
            self.say(f"saved {self.run.final} (load it with trust_remote_code=True)")
            title = f"{self.recipe.model.variant}, step {self.trainer.step}"
            plot_losses(self.run.metrics, self.run.path / "losses.png", objective_names(model.config), title)
            summary = self._summary()
            if self.recipe.samples.enabled:
                summary["samples"] = self._samples(title)
            summary["seconds"] = {"total": time.perf_counter() - self.begin, "until_saved": training_seconds}
            write_json(self.run.summary, summary)
            self._print_summary(summary)
        self.accelerator.wait_for_everyone()

    def _samples(self, title: str) -> dict[str, float | int]:
        self.say("drawing, reading and speaking ...")
        model, config = self.trainer.raw_model, self.recipe.samples
        subjects = find_subjects(self.recipe.data, config)
        with self.accelerator.autocast():
            sheet, measures = make_samples(
                model, self.processor, subjects, config, self.run.samples, title, self.stop_signal.check
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
        where = f"; train.resume=true goes on from step {saved[-1]}" if saved else ""
        if self.run.final.exists():
            where = f"; the trained model is in {self.run.final}"
        self.say(f"ended by {interrupted}{where}")

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, file=sys.stderr, flush=True)


def _default_device_type() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None else "cpu"


def _flat(tree: dict, prefix: str = "") -> dict:
    """Nested mappings as dotted keys, which is what trackers take."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
