"""The end of a run: its final folder, its samples and how many of them are right, and its figures."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from modeling_mot import MoTPreTrainedModel, MoTProcessor
from training.consolidate import complete_card, consolidate
from training.evaluation.edits import edit_figures
from training.evaluation.fidelity import fitting_of, mean_psnr
from training.evaluation.losses import evaluation_note, is_repeated
from training.evaluation.retrieval import PictureGallery, retrieval_share
from training.evaluation.sampling import Sampler, write_wav
from training.evaluation.sheet import SampleSheet, plot_losses
from training.evaluation.subjects import NamedPicture, SampleSubjects, find_subjects
from training.model.building import load_model
from training.optimization import objective_names
from training.recipe import Recipe, SamplesConfig
from training.run_files.folder import write_json
from training.run_files.metrics import count_key, read_metrics
from training.trainer import Trainer
from training.world import Interrupted, leave_group, say


def end_run(recipe: Recipe, trainer: Trainer, processor: MoTProcessor, begin: float) -> None:
    """Write the final folder, then plots and samples; the figures go to the screen and to summary.json.

    The main process does it alone, for however long it takes: the others do not wait. If the final folder cannot be
    written, `trainer.save_failed` becomes true.

    Args:
        begin: when the run began, in seconds of `time.perf_counter`.
    """
    accelerator, run = trainer.accelerator, trainer.run
    accelerator.wait_for_everyone()
    leave_group()
    if not accelerator.is_main_process:
        return

    # The trained model.
    if trainer.save_failed:
        say(
            accelerator,
            f"error: the last checkpoint could not be written, so there is no {run.final}; make room and set "
            "train.resume=auto",
        )
        return
    training_seconds = time.perf_counter() - begin
    try:
        consolidate(run, trainer.step, run.final)
    except OSError as error:
        trainer.save_failed = True
        say(
            accelerator,
            f"error: {run.final} could not be written: {error}; make room, then: python -m training.consolidate "
            f"{run.path}",
        )
        return
    say(accelerator, f"saved {run.final} (load it with trust_remote_code=True)")

    # What it has learnt: losses, samples, and the card that shows both.
    title = f"{recipe.model.variant}, step {trainer.step}"
    plot_losses(run.metrics, run.path / "losses.png", objective_names(trainer.raw_model.config), title)
    summary = summarise(trainer)
    if recipe.samples.enabled:
        summary["samples"] = _write_samples(recipe, trainer, processor, title)
    summary["seconds"] = {"total": time.perf_counter() - begin, "until_saved": training_seconds}
    write_json(run.summary, summary)
    complete_card(run)
    for line in describe_summary(summary, recipe):
        say(accelerator, line)


def report_interruption(trainer: Trainer, interrupted: Interrupted) -> None:
    """Say what is left of a run that a signal has ended."""
    saved = trainer.run.saved_steps()
    where = f"; train.resume=auto goes on from step {saved[-1]}" if saved else ""
    if trainer.save_failed:
        where = f", and its checkpoint could not be written{where}"
    if trainer.run.final.exists():
        where = f"; the trained model is in {trainer.run.final}"
    say(trainer.accelerator, f"ended by {interrupted}{where}")


# -------------------------------------------------------------------------------------------------------- the figures


def summarise(trainer: Trainer) -> dict:
    """Collect the figures of a run as JSON values: losses of its last fortieth, held-out losses, speed."""
    training, evaluation = read_metrics(trainer.run.metrics)

    # Means over the targets of the last steps.
    recent = training[-max(1, len(training) // 40) :]
    losses = {}
    for name in trainer.objectives:
        key = count_key(name)
        pairs = [(row[f"loss_{name}"], row[key]) for row in recent if row[key]]
        if pairs:
            losses[f"loss_{name}"] = sum(a * b for a, b in pairs) / sum(b for _, b in pairs)

    # Means over the time of all steps.
    seconds = sum(row["step_seconds"] for row in training)
    speed = {
        key: sum(row[key] * row["step_seconds"] for row in training) / max(seconds, 1e-9)
        for key in ("tokens_per_second", "mfu")
    }
    return {
        "step": trainer.step,
        "training": losses,
        "held_out": {k: v for k, v in (evaluation[-1] if evaluation else {}).items() if k.startswith("eval/")},
        "note": evaluation_note(trainer.raw_model.config),
        "training_seconds": seconds,
        **speed,
    }


def describe_summary(summary: dict, recipe: Recipe) -> list[str]:
    """Write a summary as lines for people."""
    lines = []
    for kind in ("training", "held_out"):
        # A direction that one source alone has is said once, without the name of the source.
        shown = {
            key.removeprefix("eval/"): value
            for key, value in summary[kind].items()
            if "@" not in key and not is_repeated(key, summary[kind])
        }
        figures = ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
        lines.append(f"{kind.replace('_', ' ')}: {figures or 'nothing measured'}")
    if not summary["held_out"]:
        missing = "evaluation.rows is 0" if recipe.data.validation_sources else "there are no data.validation_sources"
        lines[-1] += f" ({missing})"
    if summary["note"]:
        lines.append(summary["note"])
    lines.extend(f"{what}: {value}" for what, value in describe_measures(summary.get("samples", {})))
    lines.append(
        f"{summary['tokens_per_second']:.0f} tokens/s, {summary['mfu']:.0%} of the peak, "
        f"{summary['seconds']['total']:.0f} s in all; see {recipe.train.output_dir}"
    )
    return lines


# -------------------------------------------------------------------------------------------------------- the samples


def _write_samples(recipe: Recipe, trainer: Trainer, processor: MoTProcessor, title: str) -> dict[str, float | int]:
    """Load the final model, make its samples and the sheet; return the measures."""
    accelerator, run = trainer.accelerator, trainer.run
    torch.set_float32_matmul_precision("highest")
    model = load_model(str(run.final), recipe.model.attn_implementation).eval()
    model.to(accelerator.device)
    subjects = find_subjects(recipe.data, recipe.samples)
    say(accelerator, f"drawing, reading and speaking ({subjects.describe(recipe.samples)}) ...")
    sheet, measures = make_samples(
        model,
        processor,
        subjects,
        recipe.samples,
        run.samples,
        title,
        trainer.stop_signal.check,
        accelerator.autocast,
        recipe.train.progress_bar,
    )
    sheet.write_html(run.path / "samples.html")
    sheet.write_png(run.path / "samples.png")
    return measures


def make_samples(
    model: MoTPreTrainedModel,
    processor: MoTProcessor,
    subjects: SampleSubjects,
    config: SamplesConfig,
    folder: Path,
    title: str,
    check_stop: Callable[[], None] = lambda: None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress_bar: bool = False,
) -> tuple[SampleSheet, dict[str, float | int]]:
    """Write samples into `folder`; return the sheet and the measures. `Sampler` explains the last three arguments.

    Every measure also exists as `held_out_...`. `edit_figures` describes the measures of edits. The others are:

    - `drawn_right`: the share of drawn pictures whose nearest neighbour among `gallery_size` pictures is the named one.
    - `reconstructed_right`: the same share for originals that the image tokenizer or the VAE encoded and decoded. It is
      the ceiling of `drawn_right`.
    - `read_right`: the share of pictures whose name is read off letter by letter.
    - `drawn_psnr`, `reconstructed_psnr`: the mean peak signal-to-noise ratio against the originals, in dB. A model that
      has seen several pictures of one name may draw another of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    was_training = model.training
    model.eval()
    sampler = Sampler(model, processor, config, check_stop, autocast, progress_bar)
    sheet = SampleSheet(title)
    measures: dict[str, float | int] = {}

    # Pictures drawn from names, and names read off pictures.
    held_in = subjects.held_in[: config.measured]
    held_out = subjects.held_out[: config.held_out]
    if (held_in or held_out) and sampler.can_draw:
        pictures = [*subjects.held_in, *subjects.held_out]
        gallery = PictureGallery([p.image for p in pictures] + subjects.distractors)
        measures["gallery_size"] = len(gallery.descriptors)
        for prefix, group, first in (("", held_in, 0), ("held_out_", held_out, len(subjects.held_in))):
            if group:
                shown, figures = _pictures(sampler, gallery, group, range(first, first + len(group)), folder, prefix)
                measures.update({prefix + key: value for key, value in figures.items()})
                (sheet.held_out if prefix else sheet.pictures).extend(shown[: config.shown])

    # Pictures changed by an instruction.
    if sampler.can_edit:
        for prefix, edits in (("", subjects.edits), ("held_out_", subjects.held_out_edits)):
            if edits:
                drawn = sampler.edit([(edit.source, edit.instruction) for edit in edits])
                measures.update({prefix + key: value for key, value in edit_figures(edits, drawn).items()})
                for place, (edit, picture) in enumerate(zip(edits, drawn, strict=True)):
                    name = f"{prefix.replace('_', '-')}edited-{place:04d}-{_slug(edit.instruction)}.png"
                    picture.save(folder / name)
                shown = [(e.instruction, e.source, e.target, picture) for e, picture in zip(edits, drawn, strict=True)]
                (sheet.held_out_edits if prefix else sheet.edits).extend(shown[: config.shown])

    # Names spoken, and texts continued.
    if spoken := subjects.spoken[: config.spoken]:
        for place, (name, (audio, rate)) in enumerate(zip(spoken, sampler.speak(spoken), strict=True)):
            path = folder / f"spoken-{place:04d}-{_slug(name)}.wav"
            write_wav(path, audio, rate)
            sheet.spoken.append((name, path))
    if texts := subjects.texts[: config.texts]:
        sheet.texts = list(zip(texts, sampler.continue_text(texts), strict=True))
        (folder / "texts.txt").write_text("".join(f"{a}|{b}\n" for a, b in sheet.texts), encoding="utf-8")
    sheet.figures = describe_measures(measures)
    model.train(was_training)
    return sheet, measures


def _pictures(
    sampler: Sampler,
    gallery: PictureGallery,
    group: list[NamedPicture],
    indices: Sequence[int],
    folder: Path,
    prefix: str,
) -> tuple[list, dict]:
    """Draw, reconstruct and read a group of named pictures; `indices` are their places in the gallery."""
    names, originals = [p.name for p in group], [p.image for p in group]
    drawn, rebuilt, read = sampler.draw(names), sampler.reconstruct(originals), sampler.read(originals)
    lines = []
    ranks = gallery.ranks(drawn, indices)
    for place, (name, image, text, rank) in enumerate(zip(names, drawn, read, ranks, strict=True)):
        image.save(folder / f"{prefix.replace('_', '-')}drawn-{place:04d}-{_slug(name)}.png")
        lines.append(f"{name}\t{text}\t{rank}\n")
    header = "name\tread off the original\tgallery pictures nearer to the drawn one than the named\n"
    (folder / f"{prefix.replace('_', '-')}names.tsv").write_text(header + "".join(lines), encoding="utf-8")
    figures = {
        "drawn": len(drawn),
        "drawn_right": retrieval_share(ranks),
        "reconstructed_right": retrieval_share(gallery.ranks(rebuilt, indices)),
        "read_right": sum(text == name.strip() for text, name in zip(read, names, strict=True)) / len(names),
        "drawn_psnr": mean_psnr(drawn, originals, fitting_of(sampler.processor)),
        "reconstructed_psnr": mean_psnr(rebuilt, originals, fitting_of(sampler.processor)),
    }
    return list(zip(names, originals, rebuilt, drawn, read, strict=True)), figures


def describe_measures(measures: dict[str, float | int]) -> list[tuple[str, str]]:
    """Write the measures as lines for people."""
    lines = []
    for prefix, what in (("", "trained"), ("held_out_", "held-out")):
        if prefix + "drawn" not in measures:
            continue
        count, size = measures[prefix + "drawn"], measures["gallery_size"]
        lines.append((
            f"pictures drawn from {count} {what} names whose nearest of {size} pictures is the named one",
            f"{measures[prefix + 'drawn_right']:.1%} (encoded and decoded originals, the ceiling: "
            f"{measures[prefix + 'reconstructed_right']:.1%})",
        ))  # fmt: skip
        lines.append(
            (f"names read off {count} {what} pictures, letter by letter", f"{measures[prefix + 'read_right']:.1%}")
        )
        lines.append((
            f"mean peak signal-to-noise ratio of {count} {what} drawn pictures against the originals",
            f"{measures[prefix + 'drawn_psnr']:.1f} dB (encoded and decoded originals: "
            f"{measures[prefix + 'reconstructed_psnr']:.1f} dB)",
        ))  # fmt: skip
    for prefix, what in (("", "trained"), ("held_out_", "held-out")):
        if prefix + "edited" in measures:
            lines.append((
                f"edits of {measures[prefix + 'edited']} {what} pictures nearer to the target than to the source",
                f"{measures[prefix + 'nearer_to_target']:.1%} (median ratio of the two distances: "
                f"{measures[prefix + 'distance_ratio']:.2f})",
            ))  # fmt: skip
    return lines


def _slug(name: str) -> str:
    """Make a name safe as part of a file name."""
    safe = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.strip().lower())
    return "-".join(part for part in safe.split("-") if part)[:60] or "unnamed"
