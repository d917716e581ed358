"""A study as its YAML file says it, and the runs that it is made of.

    base: smoke                           # a recipe of training/configs, or a path from the study's folder
    overrides: {train.steps: 6000}        # of all runs; dotted keys of the recipe
    baseline: dense                       # the variant that all others are compared with
    variants:
      dense: {model.variant: dense}
      mot: {model.variant: mot}
    sizes:                                # optional: every variant in every size
      small: {model.hidden_size: 128}
    seeds: 3                              # 0, 1, 2; a run's seed orders its rows, and draws its weights and its noise
    paper:                                # optional: the paper's shares, for the table
      - {variant: mot, objective: text-to-image, share: [0.348], source: "Figure 5"}

A run's recipe is the base, then the overrides of all runs, of its size, of its variant. With one seed, all variants see
the same rows in the same order with the same noise: keys of other sections than `model` and `optimizer` may not differ.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from training.config import ConfigError, build, dump, flatten, option, override, read_yaml, to_tree
from training.recipe import Recipe
from training.run_files.folder import RunFolder


CONFIGS = Path(__file__).parents[1] / "configs"
STUDIES = Path(__file__).parents[1] / "studies"

# What holds for each run unless base or study say otherwise.
_DEFAULTS = {"train.cpu_threads": 1, "train.progress_bar": False}
# A run is evaluated and saved so many times, if its recipe leaves both to the end.
_EVALUATIONS = 30
# The sections in which variants may differ.
_FREE_SECTIONS = ("model.", "optimizer.")


@dataclass
class PaperFigure:
    """A share of steps that the paper reports."""

    variant: str = option(doc="a variant of the study")
    objective: str = option(doc="what is learnt, as the results name it: text-to-image, text only, total, ...")
    share: list[float] = option(doc="share of the baseline's steps, or the least and the greatest", gt=0)
    source: str = option(doc="figure and section")

    def __post_init__(self):
        if len(self.share) not in (1, 2):
            raise ConfigError(f"paper: share={self.share} must be [share], or [least, greatest]")


@dataclass
class Study:
    """The keys of a study's YAML file."""

    base: str = option(doc="name of a recipe in training/configs, or its path, seen from the study's folder")
    variants: dict[str, dict[str, Any]] = option(doc="name -> overrides, as dotted keys of the recipe")
    baseline: str = option(doc="the variant that the others are compared with")
    about: str = option("", "what the study shows, a sentence for its page")
    overrides: dict[str, Any] = option(factory=dict, doc="overrides of all runs, as dotted keys of the recipe")
    sizes: dict[str, dict[str, Any]] = option(factory=dict, doc="name -> overrides; none: all runs are of one size")
    seeds: int = option(3, "seeds of each variant and size: 0, 1, ...", ge=1, le=1000)
    shares: list[float] = option(
        factory=lambda: [0.558, 0.372, 0.33],
        doc="shares of the steps at which variants are compared with the end of the baseline",
        gt=0,
        le=1,
    )
    paper: list[PaperFigure] = option(factory=list, doc="shares of steps that the paper reports")
    launcher: list[str] = option(
        factory=list, doc="command in front of training/train.py, such as [accelerate, launch]; none: this Python"
    )

    def __post_init__(self):
        for name in (self.baseline, *(figure.variant for figure in self.paper)):
            if name not in self.variants:
                raise ConfigError(f"{name!r} is no variant; the variants are {', '.join(self.variants)}")
        for name in (*self.variants, *self.sizes):
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise ConfigError(f"{name!r} names folders; give a name of letters, digits, dots and hyphens")
        for overrides in (self.overrides, *self.sizes.values(), *self.variants.values()):
            for key in overrides:
                if key in _own_keys(Path(), 0):
                    raise ConfigError(f"{key} is set by the study for each of its runs; leave it out of the overrides")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        size: None in a study without sizes.
        record: the file that keeps the figures of the run when it is finished; the folder is not needed from then on.
        recipe: as the trainer gets it, from the file `recipe_file`.
    """

    variant: str
    size: str | None
    seed: int
    folder: RunFolder
    recipe_file: Path
    record: Path
    recipe: Recipe = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def steps(self) -> int:
        return self.recipe.train.steps

    @cached_property
    def flat_recipe(self) -> dict[str, Any]:
        return flatten(to_tree(self.recipe))

    def is_finished(self) -> bool:
        """True if the run has a record, or has reached its last step and has written all that a run leaves."""
        if self.record.is_file():
            return True
        try:
            return json.loads(self.folder.summary.read_text(encoding="utf-8"))["step"] == self.steps
        except (OSError, ValueError, KeyError):
            return False

    def write_recipe(self) -> None:
        self.recipe_file.parent.mkdir(parents=True, exist_ok=True)
        self.recipe_file.write_text(dump(self.recipe), encoding="utf-8")

    def refuse_change(self) -> None:
        """Refuse to go on with a run that began with another recipe, or to take it for finished.

        Raises:
            ConfigError: naming the run and the keys, or the record that cannot be read.
        """
        if self.record.is_file():
            before, there = self.read_record()["recipe"], self.record
        elif self.recipe_file.is_file() and self.folder.path.is_dir():
            before, there = read_yaml(self.recipe_file), self.folder.path
        else:
            return
        if changed := self._changes(before):
            told = (f"{key} was {_short(then)}, is {_short(now)}" for key, (then, now) in changed.items())
            raise ConfigError(
                f"{self.name} began with another recipe: {'; '.join(told)}. Restore it, give another --out, or remove "
                f"{there} to run it anew"
            )

    def _changes(self, recipe: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return key -> (its value in `recipe`, ours) where they differ, but for the folder of the run."""
        # A key that the project did not have then had its default.
        then, now = flatten(to_tree(build(Recipe, recipe))), self.flat_recipe
        return {key: (then[key], now[key]) for key in now if then[key] != now[key] and key != "train.output_dir"}

    def read_record(self) -> dict[str, Any]:
        """Read the record of a finished run, as `training.study.results.write_record` made it.

        Raises:
            ConfigError: naming the file.
        """
        return _read_record(self.record)

    def take_record(self, folder: Path) -> bool:
        """Copy the record of an equal run, whatever its name and study, from a folder of records; False if none is.

        Raises:
            ConfigError: a file there is no record.
        """
        for path in sorted(folder.glob("*.json")):
            if not self._changes(_read_record(path)["recipe"]):
                self.record.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self.record)
                return True
        return False


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and isinstance(record.get("recipe"), dict):
            return record
        why = "it holds no recipe"
    except (OSError, ValueError) as error:
        why = str(error)
    raise ConfigError(f"{path} is no record of a run ({why}); remove it to run the run anew")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------- from a file to its runs


def find_study(name: str) -> Path:
    """Return the YAML file of a study, by its name in training/studies or by its path.

    Raises:
        ConfigError: there is none, listing the names.
    """
    if Path(name).is_file():
        return Path(name)
    path = STUDIES / name / "study.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.parent.name for found in STUDIES.glob("*/study.yaml")))
        raise ConfigError(f"{name!r} is neither a YAML file nor a study of the project; the studies are {known}")
    return path


def study_name(path: Path) -> str:
    """Return the name of a study: its folder's, or its file's where that is not `study.yaml`."""
    return path.resolve().parent.name if path.stem == "study" else path.stem


def read_study(path: Path, seeds: int | None = None) -> Study:
    """Read a study; `seeds` replaces its number of seeds.

    Raises:
        ConfigError: naming the file.
    """
    try:
        study = build(Study, read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return study if seeds is None else replace(study, seeds=seeds)


def runs_of(study: Study, path: Path, out: Path) -> list[StudyRun]:
    """Make the runs of a study, seed by seed, so that all variants are there to compare as soon as possible.

    Args:
        path: the study's file.
        out: the study's folder of results.

    Raises:
        ConfigError: a recipe that is none, by the name of its run; or variants that would not see the same rows.
    """
    base = _read_base(study, path)
    runs = [_make_run(study, base, out, *of) for of in _combinations(study)]
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two runs would be named {twice}; rename a variant or a size")

    # All variants of one size and seed learn from the same rows.
    baselines = {(run.size, run.seed): run for run in runs if run.variant == study.baseline}
    for run in runs:
        _refuse_other_rows(run, baselines[run.size, run.seed])
    return runs


def _combinations(study: Study) -> Iterator[tuple[str, str | None, int]]:
    for seed in range(study.seeds):
        for size in study.sizes or (None,):
            for variant in study.variants:
                yield variant, size, seed


def _read_base(study: Study, path: Path) -> dict:
    named = CONFIGS / f"{study.base}.yaml"
    return read_yaml(named if named.is_file() else path.parent / study.base)


def _make_run(study: Study, base: dict, out: Path, variant: str, size: str | None, seed: int) -> StudyRun:
    name = "-".join([variant, *([] if size is None else [size]), f"seed{seed}"])
    folder = RunFolder(out / "runs" / name)
    # The defaults give way to the base and to the study; what the study decides for each run gives way to nothing.
    layers = [
        {key: value for key, value in _DEFAULTS.items() if not _has(base, key)},
        study.overrides,
        {} if size is None else study.sizes[size],
        study.variants[variant],
        _own_keys(folder.path, seed),
    ]
    try:
        recipe = build(Recipe, override(base, [word for layer in layers for word in _words(layer)]))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error

    # Shares of steps need losses on the way, and a killed run a checkpoint to go on from.
    often = max(1, recipe.train.steps // _EVALUATIONS)
    recipe.train.save_every = recipe.train.save_every or often
    recipe.evaluation.every = recipe.evaluation.every or often
    files = (out / "recipes" / f"{name}.yaml", out / "records" / f"{name}.json")
    return StudyRun(variant, size, seed, folder, *files, recipe)


def _own_keys(folder: Path, seed: int) -> dict[str, Any]:
    """Return the keys that a study decides for each of its runs."""
    return {
        "train.output_dir": str(folder),
        "train.resume": "auto",
        "train.overwrite": False,
        "train.seed": seed,
        "data.seed": seed,
    }


def _has(tree: Mapping[str, Any], key: str) -> bool:
    section, _, name = key.partition(".")
    return isinstance(tree.get(section), Mapping) and name in tree[section]


def _words(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as `key=value` words; JSON is YAML too."""
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in overrides.items()]


def _refuse_other_rows(run: StudyRun, baseline: StudyRun) -> None:
    ours, theirs = run.flat_recipe, baseline.flat_recipe
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key) and not key.startswith((*_FREE_SECTIONS, "train.output_dir")):
            raise ConfigError(
                f"{run.name}: {key} is {_short(ours.get(key))}, but {_short(theirs.get(key))} in {baseline.name}; "
                f"variants are compared on equal rows, so they may differ in model and optimizer alone: move {key} to "
                "overrides or sizes"
            )
