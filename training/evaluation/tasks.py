"""The tasks of an evaluation: what each measures, when it can be done, and its jobs.

Held-out losses are computed by `training.evaluation.losses`, and samples by `training.evaluation.end_of_run`: the same
code as in training. Captions, pictures, speech and features are measured by `training.evaluation.quality`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from modeling_mot import MoTPreTrainedModel, MoTProcessor
from training.config import ConfigError
from training.data import collate
from training.data.collate import TOWER_ROWS
from training.data.config import SourceConfig
from training.data.reading.records import decode_picture, decode_sound, text_of
from training.data.reading.sources import open_source
from training.evaluation.end_of_run import make_samples
from training.evaluation.losses import evaluate_losses, target_objective
from training.evaluation.sampling import Sampler
from training.evaluation.subjects import find_subjects
from training.optimization import DIFFUSION
from training.recipe import (
    Recipe,
    SamplesConfig,
    check_decoder,
    check_diffusion,
    check_names,
    has_edits,
    pair_of,
    text_of_sources,
)


QUALITY = "training.evaluation.quality"
# Options of samples that no figure depends on.
_OF_THE_SHEET = ("enabled", "shown", "spoken", "texts", "max_speech_tokens")
# Task -> the options that name its networks.
_NETWORKS = {"pictures": ("feature_network", "clip"), "speech": ("asr",)}
# Tasks whose figures are losses: all ranks compute them together.
OF_LOSSES = ("loss", "perplexity", "diffusion")
# Task -> what it measures, in the order in which tasks are done and shown.
TASKS = {
    "loss": "held-out losses by modality, and by data set and direction",
    "perplexity": "conditional perplexity by data set and direction: exp(loss) of targets that are tokens",
    "diffusion": "validation loss of pictures that are diffused",
    "retrieval": "drawn pictures that are nearest to the named one, and names read off pictures",
    "psnr": "peak signal-to-noise ratio of drawn pictures against the originals, in dB",
    "captions": "captions of pictures against the references (CIDEr)",
    "pictures": "pictures drawn from captions (FID, KID, CLIP score)",
    "speech": "spoken texts, transcribed (word error rate)",
    "features": "hidden states of every layer by modality (PCA)",
}
_PERPLEXITY_LIMIT = 700.0


@dataclass
class Evaluation:
    """A model with everything that it is evaluated on and with.

    Attributes:
        model: in evaluation mode, on the accelerator's device.
        recipe: its `data`, `evaluation` and `samples` are used.
        rows: held-out rows, see `prepare_held_out`.
        folder: the folder that results are written to.
        quality: options of `QualitySettings` that were asked for.
    """

    model: MoTPreTrainedModel
    processor: MoTProcessor
    recipe: Recipe
    rows: dict[str, list[dict]]
    accelerator: Accelerator
    folder: Path
    quality: dict[str, Any] = field(default_factory=dict)

    @property
    def shows_bar(self) -> bool:
        return self.recipe.train.progress_bar and self.accelerator.is_main_process

    @property
    def sources(self) -> list[SourceConfig]:
        """The held-out sources."""
        return self.recipe.data.validation_sources

    @cached_property
    def losses(self) -> dict[str, float]:
        """The figures of `evaluate_losses`. All ranks compute them together."""
        config, processes = self.recipe.evaluation, self.accelerator.num_processes
        turns = sum(-(-len(rows) // (config.batch_rows * processes)) for rows in self.rows.values())
        with tqdm(total=turns, desc="losses", unit="batch", disable=not self.shows_bar) as bar:

            def count() -> bool:
                bar.update()
                return False

            together = partial(collate, config=self.model.config, multiple_of=TOWER_ROWS, noise_seed="held out")
            return evaluate_losses(self.model, self.rows, together, config, self.accelerator, stops=count)

    @cached_property
    def quality_settings(self) -> Any:
        """The `QualitySettings`: what was asked for, else the recipe's samples, else their defaults.

        Raises:
            ConfigError: an option that they do not have, or that they refuse.
        """
        from training.evaluation.quality import QualitySettings

        samples = self.recipe.samples
        of_recipe = {
            "guidance": samples.guidance_scale,
            "steps": samples.num_inference_steps,
            "seed": samples.seed,
            "batch_size": samples.batch,
            "max_new_tokens": samples.max_text_tokens,
        }
        known = {option.name for option in fields(QualitySettings)}
        if unknown := sorted(self.quality.keys() - known):
            raise ConfigError(f"there is no option {unknown[0]!r} of quality; there are {', '.join(sorted(known))}")
        try:
            return QualitySettings(**{k: v for k, v in (of_recipe | self.quality).items() if k in known})
        except ValueError as error:
            raise ConfigError(f"quality: {error}") from error


@dataclass(frozen=True)
class Job:
    """A part of an evaluation that one process does alone.

    Attributes:
        tasks: the tasks that it has figures for.
        source: the name of the data set; empty: of all.
        run: makes them: task -> {"figures": {...}}, where it applies with "left_out", figure -> reason, with the
            "settings" of its own, and with "texts", the lines of a file that the figures can be computed from.
    """

    tasks: tuple[str, ...]
    source: str
    run: Callable[[], dict[str, dict[str, Any]]]


# ---------------------------------------------------------------------------------------------- what can be measured


def obstacle(task: str, evaluation: Evaluation) -> str | None:
    """Return the reason why a task cannot be done with this model and these data; None if it can."""
    config, sources = evaluation.model.config, evaluation.sources
    if task in OF_LOSSES and not evaluation.rows:
        return "evaluation.rows is 0"
    if task == "loss":
        return None
    if task == "perplexity":
        has_tokens = any(_is_perplexing(name, evaluation) for name in evaluation.rows)
        return None if has_tokens else "no held-out source has a direction whose target is tokens"
    if task == "diffusion":
        diffused = any(target_objective(name, config) == DIFFUSION for name in evaluation.rows)
        return None if diffused else "no held-out source has a direction to pictures that the model diffuses"
    if task in ("retrieval", "psnr"):
        return _obstacle_of_samples(task, evaluation)
    kind, modality = ("audio", "speech") if task == "speech" else ("image", "image")
    if task in ("captions", "pictures", "speech"):
        if modality not in config.modalities:
            return f"the model has no {modality}: its modalities are {', '.join(config.modalities)}"
        if not any(pair_of([source], kind) for source in sources):
            return f"no held-out source has a template of a text and one segment of {kind}"
    if task == "features" and not _groups_of_pairs(evaluation):
        return "no held-out source has a template of a text and a picture or sound of the model's modalities"
    reason = _obstacle_of_quality()
    if task == "pictures" and reason is None:
        reason = _obstacle_of_drawing(evaluation, evaluation.quality_settings.of_sampler())
    return reason


def _is_perplexing(name: str, evaluation: Evaluation) -> bool:
    """True if the targets of these rows are tokens of one modality."""
    return target_objective(name, evaluation.model.config) not in (None, DIFFUSION)


def _obstacle_of_quality() -> str | None:
    try:
        import_module(QUALITY)
    except ImportError as error:
        return f'{error}: install the packages that measure it with pip install -e ".[evaluation]"'
    return None


def _obstacle_of_samples(task: str, evaluation: Evaluation) -> str | None:
    data = evaluation.recipe.data
    sources = [*data.sources, *data.validation_sources]
    if pair_of(sources, "image") is None and not (task == "retrieval" and any(map(has_edits, sources))):
        return "no source has a template of a text and an image"
    try:
        check_names(data, evaluation.recipe.samples)
    except ConfigError as error:
        return str(error)
    return _obstacle_of_drawing(evaluation, replace(evaluation.recipe.samples, enabled=True))


def _obstacle_of_drawing(evaluation: Evaluation, samples: SamplesConfig) -> str | None:
    if not Sampler(evaluation.model, evaluation.processor, samples).can_draw:
        return "the model draws no pictures"
    try:
        check_decoder(evaluation.processor, samples)
        check_diffusion(evaluation.model.config, samples)
    except ConfigError as error:
        return str(error)
    return None


# --------------------------------------------------------------------------------------------- figures from the losses


def loss_figures(task: str, evaluation: Evaluation) -> dict[str, float]:
    """Return the figures of a task of `OF_LOSSES`, by the keys that training writes to metrics.jsonl."""
    losses = evaluation.losses
    if task == "perplexity":
        named = {name: losses.get(f"eval/{name}/loss") for name in evaluation.rows if _is_perplexing(name, evaluation)}
        return {
            f"eval/{name}/perplexity": math.exp(min(loss, _PERPLEXITY_LIMIT))
            for name, loss in named.items()
            if loss is not None
        }
    if task == "diffusion":
        config = evaluation.model.config
        diffused = {f"eval/{name}/loss" for name in evaluation.rows if target_objective(name, config) == DIFFUSION}
        return {k: v for k, v in losses.items() if k in diffused or DIFFUSION in k or "diffusion_validation" in k}
    return losses


# ------------------------------------------------------------------------------------------------------------ the jobs


def jobs_of(tasks: Sequence[str], evaluation: Evaluation) -> list[Job]:
    """List the jobs of the tasks that are not losses, in order; each is the same whichever process does it."""
    jobs = []
    if sampled := tuple(task for task in ("retrieval", "psnr") if task in tasks):
        jobs.append(Job(sampled, "", partial(_sampled, sampled, evaluation)))
    for task in ("captions", "pictures", "speech"):
        if task in tasks:
            kind = "audio" if task == "speech" else "image"
            for source in evaluation.sources:
                if pair_of([source], kind) is not None:
                    jobs.append(Job((task,), source.name, partial(_of_quality, task, source, kind, evaluation)))
    if "features" in tasks:
        jobs.append(Job(("features",), "", partial(_features, evaluation)))
    return jobs


def _sampled(tasks: Sequence[str], evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Measure retrieval and PSNR, as at the end of training; the sheet is written beside the results."""
    recipe, folder = evaluation.recipe, evaluation.folder
    subjects = find_subjects(recipe.data, recipe.samples)
    subjects = replace(subjects, spoken=[], texts=[])
    sheet, measures = make_samples(
        evaluation.model,
        evaluation.processor,
        subjects,
        recipe.samples,
        folder / "samples",
        evaluation.model.name_or_path,
        autocast=evaluation.accelerator.autocast,
        progress_bar=evaluation.shows_bar,
    )
    sheet.write_html(folder / "samples.html")
    sheet.write_png(folder / "samples.png")
    is_psnr = lambda name: name.endswith("_psnr")  # noqa: E731
    return {task: {"figures": {k: v for k, v in measures.items() if is_psnr(k) == (task == "psnr")}} for task in tasks}


def _of_quality(task: str, source: SourceConfig, kind: str, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Measure captions, pictures or speech of one source."""
    from training.evaluation import quality

    measure = {
        "captions": quality.caption_quality,
        "pictures": quality.picture_quality,
        "speech": quality.speech_quality,
    }[task]
    settings = evaluation.quality_settings
    records = list(islice(records_of(source, kind, evaluation.recipe.data.limits), settings.samples))
    with evaluation.accelerator.autocast():
        found = measure(evaluation.model, evaluation.processor, records, settings, evaluation.shows_bar)

    # The texts of all sources lie in one file.
    parts = _parts(found, f"{source.name}/")
    return {task: parts | {"texts": [{"source": source.name} | one for one in parts["texts"]]}}


def _parts(found: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Split what a function of `quality` returns into the parts of a job's task."""
    beside = {"settings": {}, "left_out": {}, "texts": []}
    beside |= {name: found[name] for name in beside if name in found}
    figures = {f"{prefix}{name}": value for name, value in found.items() if name not in beside}
    left_out = {f"{prefix}{name}": reason for name, reason in beside["left_out"].items()}
    return {"figures": figures, "left_out": left_out, "settings": beside["settings"], "texts": beside["texts"]}


def _features(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Draw the feature space of records of all sources and kinds, as a picture beside the results."""
    from training.evaluation import quality

    # Equal shares of the sources and kinds.
    limits = evaluation.recipe.data.limits
    groups = [records_of(source, kind, limits) for source, kind in _groups_of_pairs(evaluation)]
    groups += [_texts(source, limits) for source in evaluation.sources if text_of_sources([source]) is not None]
    settings = evaluation.quality_settings
    share = -(-settings.samples // max(1, len(groups)))
    records = [record for group in groups for record in islice(group, share)]
    with evaluation.accelerator.autocast():
        picture = evaluation.folder / "features.png"
        found = quality.feature_space(evaluation.model, evaluation.processor, records, picture, evaluation.shows_bar)
    return {"features": _parts(found)}


def _groups_of_pairs(evaluation: Evaluation) -> list[tuple[SourceConfig, str]]:
    """List (source, kind) of the sources with a text beside an `image` or `audio` of the model's modalities."""
    return [
        (source, kind)
        for kind, modality in (("image", "image"), ("audio", "speech"))
        for source in evaluation.sources
        if modality in evaluation.model.config.modalities and pair_of([source], kind) is not None
    ]


def settings_of(task: str, evaluation: Evaluation) -> dict[str, Any]:
    """Return the settings that the figures of a task depend on, as JSON values.

    Raises:
        ConfigError: an option that is refused, or that names a network that is not at hand.
    """
    recipe = evaluation.recipe
    if task in OF_LOSSES:
        return {name: value for name, value in asdict(recipe.evaluation).items() if name != "every"}
    if task in ("retrieval", "psnr"):
        return {name: value for name, value in asdict(recipe.samples).items() if name not in _OF_THE_SHEET}
    from training.evaluation.networks import check_network

    try:
        for option in _NETWORKS.get(task, ()):
            check_network(option, evaluation.quality.get(option))
    except ValueError as error:
        raise ConfigError(f"task {task}: {error}") from error
    return evaluation.quality_settings.described()


# --------------------------------------------------------------------------------------------------------- the records


def records_of(source: SourceConfig, kind: str, limits: Any) -> Iterator[dict]:
    """Read the records of a source's first pair of a text and a segment of `kind` (`image` or `audio`).

    Records that follow each other with the same picture or sound become one record with several texts.

    Returns:
        {"texts": [references], "image": PIL picture or None, "audio": (samples, rate) or None} of each.
    """
    _, text, other = pair_of([source], kind)
    decode = decode_picture if kind == "image" else decode_sound
    last: Any = None

    def read(record: dict) -> tuple[list[str], Any]:
        """Read the texts, and the picture or sound unless it is that of the record before."""
        nonlocal last
        texts, value = _texts_in(record, text), record[other.column]
        if _is_same(value, last):
            return texts, None
        decoded, last = decode(value, limits), value
        return texts, decoded

    whole: dict[str, Any] = {}
    for texts, decoded in open_source(source, limits).each(read):
        if decoded is None:
            whole["texts"] += texts
            continue
        if whole:
            yield whole
        whole = {"texts": texts, "image": None, "audio": None} | {kind: decoded}
    if whole:
        yield whole


def _texts(source: SourceConfig, limits: Any) -> Iterator[dict]:
    _, text = text_of_sources([source])
    for found in open_source(source, limits).each(lambda record: _texts_in(record, text)):
        yield {"texts": found, "image": None, "audio": None}


def _texts_in(record: dict, text: Any) -> list[str]:
    """Return the texts of a record: each item of a list of texts, or one text."""
    value = record.get(text.column)
    if isinstance(value, list) and value and all(isinstance(item, str) and item.strip() for item in value):
        return [item.strip() for item in value]
    return [text_of(text, record)]


def _is_same(one: Any, other: Any) -> bool:
    """True if two values of a column are one file or hold the same bytes."""
    kinds = (str, bytes, Path)
    if isinstance(one, dict) and isinstance(other, dict):
        return all(isinstance(v, (*kinds, type(None))) for v in one.values()) and one == other
    return isinstance(one, kinds) and one == other
