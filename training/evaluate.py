"""Evaluate a model on held-out data: losses, perplexities, pictures, captions and speech, in one command.

    python -m training.evaluate MODEL --data CONFIG.yaml [key=value ...] [--tasks loss,psnr,...] [--out DIR]
    accelerate launch --multi_gpu -m training.evaluate MODEL --data CONFIG.yaml ...  in several processes, on GPUs
    torchrun --nproc_per_node 2 -m training.evaluate MODEL --data CONFIG.yaml ...    in several processes, on CPUs too

MODEL is a folder (RUN/final) or a name on the Hub. CONFIG.yaml is a recipe, or holds `data:` alone; its
`validation_sources` are evaluated. `key=value` changes it: evaluation.rows=1000 samples.guidance_scale=1.6

DIR gets results.json (written after each task), results.html and pictures. The exit code is 0, 1 if a task failed, or
2 for a request that cannot be met.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch

from modeling_mot import MoTProcessor
from training.config import ConfigError, build, one_line, override, read_yaml, to_tree
from training.data.config import MODALITY_OF_TYPE, SourceConfig
from training.data.rows import prepare_held_out
from training.evaluation.losses import evaluation_note
from training.evaluation.results import ResultsFolder
from training.evaluation.tasks import OF_LOSSES, TASKS, Evaluation, Job, jobs_of, loss_figures, obstacle, settings_of
from training.model.building import Planned, load_model, model_type, plan_model
from training.recipe import ModelConfig, Recipe
from training.world import (
    build_accelerator,
    describe_world,
    gather_objects,
    is_sharding,
    leave_group,
    say,
    set_cpu_threads,
)


# Ranks wait for each other between jobs, and a job may draw thousands of pictures.
_TIMEOUT_SECONDS = 7 * 24 * 3600.0
# Words of the command line -> options of `QualitySettings`.
_QUALITY = {
    "samples": (int, "N", "most records of captions, pictures, speech and features of a data set"),
    "guidance": (float, "SCALE", "guidance of drawn pictures (default: the recipe's samples.guidance_scale)"),
    "steps": (int, "N", "denoising steps (default: the recipe's samples.num_inference_steps)"),
    "seed": (int, "N", "of sampling (default: the recipe's samples.seed)"),
    "batch_size": (int, "N", "records generated together (default: the recipe's samples.batch)"),
    "max_new_tokens": (int, "N", "longest caption (default: the recipe's samples.max_text_tokens)"),
    "feature_network": (str, "NAME", "network of FID and KID: a folder or a name on the Hub"),
    "clip": (str, "NAME", "CLIP model: a folder or a name on the Hub"),
    "asr": (str, "NAME", "speech recognition: a folder or a name on the Hub"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says, and return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    quality = {name: value for name in _QUALITY if (value := getattr(options, name)) is not None}
    try:
        recipe = read_data(options.data, options.keys)
        return evaluate(
            options.model, recipe, options.tasks, options.out, options.processor, quality, options.overwrite
        )
    except ConfigError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ended by SIGINT", file=sys.stderr)
        return 130
    finally:
        leave_group()


def evaluate(
    source: str,
    recipe: Recipe,
    tasks: Sequence[str] | None = None,
    out: str | Path = "evaluation",
    processor: str | None = None,
    quality: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> int:
    """Evaluate a model, write its results and print them.

    Args:
        source: folder or Hub name of the model.
        tasks: names of `TASKS`; None: those that the model and the data allow.
        out: the folder of the results.
        processor: folder or Hub name; None: the model's own.
        quality: options of `QualitySettings`.
        overwrite: replace the results that `out` holds.

    Returns:
        0, or 1 if a task failed.

    Raises:
        ConfigError: something that was asked for cannot be done; nothing has been written.
    """
    # Everything that can be refused is refused before the model is loaded, or before anything is computed.
    if tasks is not None and not tasks:
        raise ConfigError(f"no task is named; the tasks are {', '.join(TASKS)}")
    if unknown := [task for task in tasks or () if task not in TASKS]:
        raise ConfigError(f"there is no task {unknown[0]!r}; the tasks are {', '.join(TASKS)}")
    folder = ResultsFolder(out, overwrite)
    evaluation, planned = prepare(source, recipe, processor, folder.path, quality or {})
    accelerator = evaluation.accelerator
    obstacles = {task: obstacle(task, evaluation) for task in tasks or TASKS}
    if tasks and (refused := {task: reason for task, reason in obstacles.items() if reason}):
        raise ConfigError("; ".join(f"task {task}: {reason}" for task, reason in refused.items()))
    chosen = [task for task in TASKS if task in obstacles and obstacles[task] is None]
    settings = {task: settings_of(task, evaluation) for task in chosen}

    # What is known before the first task.
    folder.begin(
        model=source,
        revision=getattr(planned.config, "_commit_hash", None),
        world=describe_world(accelerator),
        device=str(evaluation.model.device),
        precision="bf16" if accelerator.mixed_precision == "bf16" else "float32",
        note=evaluation_note(planned.config),
        data=to_tree(recipe.data),
        left_out={task: reason for task, reason in obstacles.items() if reason},
        writes=accelerator.is_main_process,
    )
    for task, reason in folder.results["left_out"].items():
        say(accelerator, f"left out {task}: {reason}")

    # What a person reads is written and said even if the tasks are interrupted.
    try:
        _do(chosen, evaluation, folder, settings)
    finally:
        folder.finish()
        for line in folder.table():
            say(accelerator, line)
    return 1 if folder.failed else 0


def prepare(
    source: str, recipe: Recipe, processor: str | None, folder: Path, quality: dict[str, Any]
) -> tuple[Evaluation, Planned]:
    """Load the model and its processor, check that they fit the data, and prepare the held-out rows.

    Raises:
        ConfigError: they cannot be loaded, or do not fit each other.
    """
    # The processes, each with the whole model.
    train = recipe.train
    accelerator = build_accelerator(
        train.precision, cpu=train.cpu, timeout_seconds=_TIMEOUT_SECONDS, alike={"model": source, **to_tree(recipe)}
    )
    if is_sharding(accelerator):
        raise ConfigError(
            "evaluation has the whole model in every process; launch it without FSDP, by torchrun --nproc_per_node N"
        )
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    if accelerator.device.type == "cpu":
        set_cpu_threads(train.cpu_threads)

    # The model, and what must fit it.
    _check_model(source)
    settings = ModelConfig(init_from=source, processor=processor)
    try:
        MoTProcessor.from_pretrained(processor or source)
    except Exception as error:  # transformers raises anything for a folder that holds something else
        name = processor or source
        raise ConfigError(f"no processor could be loaded from {name!r}: {error}; name one with --processor") from error
    model = load_model(source, recipe.model.attn_implementation).eval()
    _check_modalities(model.config.modalities, recipe.data.validation_sources)
    planned = plan_model(settings, recipe.data, model)
    recipe = copy(recipe)
    recipe.data = planned.data

    # The rows.
    say(accelerator, f"tokenising the held-out data (kept in {recipe.data.cache_path}) ...")
    shows_bar = train.progress_bar and accelerator.is_main_process
    rows = prepare_held_out(recipe.data, planned.processor, recipe.evaluation.rows, planned.vae, shows_bar)
    rows = {name: of_name for name, of_name in rows.items() if of_name}
    if not rows and recipe.evaluation.rows:
        raise ConfigError("the validation sources hold no records, so there is nothing to evaluate")
    model = model.to(accelerator.device)
    return Evaluation(model, planned.processor, recipe, rows, accelerator, folder, quality), planned


def _check_model(source: str) -> None:
    """Raise ConfigError if there is no model of ours at `source`, with the place where one may be."""
    try:
        model_type(source)
    except (OSError, ValueError) as error:
        final = Path(source) / "final"
        named = f"{final}, the model of this run" if final.is_dir() else "a folder such as RUN/final, or a Hub name"
        raise ConfigError(f"MODEL {source!r} is no model: {str(error).rstrip('.')}; give {named}") from error


def _check_modalities(modalities: Sequence[str], sources: Sequence[SourceConfig]) -> None:
    """Raise ConfigError if a source has a segment of a modality that the model lacks."""
    for source in sources:
        kinds = {MODALITY_OF_TYPE.get(segment.type, "text") for segment in source.segments}
        if lacking := sorted(kinds - set(modalities)):
            raise ConfigError(
                f"data.validation_sources: {source.name!r} has {' and '.join(lacking)}, but the model has "
                f"{', '.join(modalities)} alone; leave the source or the template out"
            )


def read_data(path: str | Path, words: Sequence[str] = ()) -> Recipe:
    """Read a recipe, or a file that holds `data:` alone, which need not have training sources.

    Raises:
        ConfigError: the file cannot be used.
    """
    tree = override(read_yaml(path), words)
    data = tree.get("data")
    if not isinstance(data, dict):
        raise ConfigError(f"{path} has no section data:, which names the held-out data in data.validation_sources")
    if not data.get("validation_sources"):
        raise ConfigError(f"{path}: data.validation_sources is empty, so nothing is held out; name a source there")
    if data.get("sources"):
        return build(Recipe, tree)
    # The checks of a recipe want training sources; the evaluation then goes on without them.
    recipe = build(Recipe, tree | {"data": data | {"sources": data["validation_sources"]}})
    recipe.data.sources = []
    return recipe


def _do(tasks: Sequence[str], evaluation: Evaluation, folder: ResultsFolder, settings: dict[str, dict]) -> None:
    """Do the tasks, with the other processes, and add what they find to the folder as soon as it is there."""
    accelerator = evaluation.accelerator
    # The losses are computed by all ranks together, so a rank on which they fail must end the others.
    processes = accelerator.num_processes
    for task in (task for task in OF_LOSSES if task in tasks):
        job = Job((task,), "", lambda task=task: {task: {"figures": loss_figures(task, evaluation)}})
        folder.add(_attempt(job, catches=processes == 1), settings)

    # The other tasks are shared out. After each round the results of all ranks are written.
    jobs = jobs_of(tasks, evaluation)
    world = torch.distributed.group.WORLD if processes > 1 else None
    for first in range(0, len(jobs), processes):
        place = first + accelerator.process_index
        for job in jobs[first : first + processes]:
            say(accelerator, f"{', '.join(job.tasks)} {job.source}".rstrip() + " ...")
        done = _attempt(jobs[place]) if place < len(jobs) else {}
        for of_rank in gather_objects(done, world):
            folder.add(of_rank, settings)


def _attempt(job: Job, catches: bool = True) -> dict[str, dict]:
    """Do a job: task -> its parts and seconds. A job that fails has the reason there; without `catches` it raises."""
    begin = time.perf_counter()
    try:
        done = job.run()
    except Exception as error:  # whatever it is, the other tasks have figures
        if not catches:
            raise
        logging.getLogger(__name__).exception("%s failed", ", ".join(job.tasks))
        where = f"{job.source}: " if job.source else ""
        done = {task: {"failed": [f"{where}{type(error).__name__}: {one_line(error)}"]} for task in job.tasks}
    return {task: one | {"seconds": time.perf_counter() - begin} for task, one in done.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=__doc__,
        epilog="tasks:\n" + "\n".join(f"  {task:10}  {what}" for task, what in TASKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a model, or its name on the Hub")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="keys of CONFIG.yaml that are changed")
    parser.add_argument("--data", required=True, metavar="CONFIG.yaml", help="a recipe, or a file with data: alone")
    parser.add_argument(
        "--tasks",
        type=lambda words: [word.strip() for word in words.split(",") if word.strip()],
        metavar="NAME,...",
        help="tasks, joined by commas (default: those that the model and the data allow)",
    )
    parser.add_argument(
        "--out", default="evaluation", metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--processor", metavar="NAME", help="folder or Hub name of a processor (default: the model's)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that DIR holds")
    for name, (kind, shown, words) in _QUALITY.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=shown, help=words)
    return parser


if __name__ == "__main__":
    sys.exit(main())
