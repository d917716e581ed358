"""The folder of an evaluation: results.json, the table on the screen, and a page with plots."""

import io
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from model_cards.card import evaluation_results, weights_digest
from training.config import ConfigError, without_secrets
from training.evaluation.losses import is_repeated
from training.evaluation.sheet import page_template
from training.evaluation.tasks import OF_LOSSES, TASKS
from training.run_files.folder import environment, write_json


RESULTS, PAGE = "results.json", "results.html"
# Pictures that tasks write beside the results, with the words above them on the page.
_PICTURES = {"features.png": "Hidden states of each layer by modality", "samples.png": "Samples"}


class ResultsFolder:
    """A folder for the results of one evaluation. `results` is what results.json holds; `texts` are in TASK.jsonl.

    Args:
        path: the folder; it need not exist.
        overwrite: replace the results that it holds.

    Raises:
        ConfigError: it holds results, and `overwrite` is False.
    """

    def __init__(self, path: str | Path, overwrite: bool = False):
        self.path = Path(path)
        self.results: dict[str, Any] = {}
        self.texts: dict[str, list[dict]] = {}
        self.writes = False
        if (self.path / RESULTS).exists() and not overwrite:
            raise ConfigError(f"{self.path} holds {RESULTS} already; choose another --out, or replace with --overwrite")

    @property
    def failed(self) -> list[str]:
        """The tasks that failed, for all of their data or for some."""
        return [task for task, one in self.results["tasks"].items() if one["failed"]]

    def begin(self, model: str, writes: bool, **facts: Any) -> None:
        """Make the folder, and write the facts that are known before the first task.

        Args:
            model: the folder or Hub name of the model.
            writes: true on the one process that writes.

        Raises:
            ConfigError: the folder cannot be written.
        """
        self.writes = writes
        known = without_secrets({"model": model, "weights": weights_digest(Path(model)), **facts})
        self.results = {**known, "environment": environment(), "tasks": {}, "results": []}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Texts of results that are replaced would be taken for those of the new ones.
            for task in TASKS if writes else ():
                (self.path / f"{task}.jsonl").unlink(missing_ok=True)
            self._write()
        except OSError as error:
            raise ConfigError(f"--out {self.path} cannot be written: {error}") from error

    def add(self, done: Mapping[str, Mapping], settings: Mapping[str, Mapping]) -> None:
        """Add what a job has done, see `training.evaluate`, and write everything so far: whole or not at all."""
        for task, new in done.items():
            nothing = {"figures": {}, "left_out": {}, "failed": [], "seconds": 0.0, "settings": settings[task]}
            one = self.results["tasks"].setdefault(task, nothing)
            one["figures"] |= new.get("figures", {})
            one["left_out"] |= new.get("left_out", {})
            one["failed"] += new.get("failed", [])
            one["seconds"] += new["seconds"]
            one["settings"] = new.get("settings") or one["settings"]
            self.texts.setdefault(task, []).extend(new.get("texts", []))
        # Without a task a result is about the tokenizer of pictures, and not about the model.
        found = [one for one, _ in evaluation_results(self.results) if one.task_type]
        self.results["results"] = [{k: v for k, v in vars(one).items() if v is not None} for one in found]
        if done:
            self._write()

    def finish(self) -> None:
        """Write the page."""
        if self.writes:
            (self.path / PAGE).write_text(self._page(), encoding="utf-8")

    def table(self) -> list[str]:
        """Write the lines for the screen: the figures of each task, with its settings.

        A loss that a direction has of one source alone is said once, without the name of the source.
        """
        shown = {
            task: {name: value for name, value in one["figures"].items() if not is_repeated(name, one["figures"])}
            for task, one in self._tasks()
        }
        width = max((len(name) for figures in shown.values() for name in figures), default=0)
        lines = []
        for task, one in self._tasks():
            lines += ["", *_wrapped(f"{task}: {TASKS[task]}")]
            lines += [f"  {name:{width}}  {_shown(value):>10}" for name, value in shown[task].items()]
            lines += _wrapped(f"  settings: {_listed(one['settings'])}")
            for name, reason in one["left_out"].items():
                lines += _wrapped(f"  {task} has no {name}: {reason}")
            for reason in one["failed"]:
                lines += _wrapped(f"  {task} failed: {reason}")
        lines += ["", *_wrapped(self.results["note"] or "")]
        return [*lines, f"wrote {self.path.resolve() / PAGE}, and beside it {RESULTS}"]

    def _tasks(self) -> list[tuple[str, dict]]:
        """List (task, what it has) in the order of `TASKS`."""
        return [(task, self.results["tasks"][task]) for task in TASKS if task in self.results["tasks"]]

    def _plotted(self, task: str, figures: Mapping[str, float]) -> Mapping[str, float]:
        """Choose the figures of a plot: losses of tokens apart from those of diffusion, which have another unit."""
        diffused = self.results["tasks"].get("diffusion", {"figures": ()})["figures"] if task == "loss" else ()
        return {key: value for key, value in figures.items() if key not in diffused}

    def _write(self) -> None:
        if self.writes:
            write_json(self.path / RESULTS, self.results)
            for task, texts in self.texts.items():
                if texts:
                    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in texts)
                    (self.path / f"{task}.jsonl").write_text(lines, encoding="utf-8")

    def _page(self) -> str:
        tasks = [
            {
                "name": task,
                "what": TASKS[task],
                "figures": [(name, _shown(value)) for name, value in one["figures"].items()],
                "plot": _bars(self._plotted(task, one["figures"])) if task in OF_LOSSES else None,
                "settings": _listed(one["settings"]),
                "left_out": one["left_out"],
                "failed": one["failed"],
                "seconds": f"{one['seconds']:.1f}",
            }
            for task, one in self._tasks()
        ]
        done = {
            "features.png": "features" in self.results["tasks"],
            "samples.png": bool({"retrieval", "psnr"} & self.results["tasks"].keys()),
        }
        pictures = {
            words: (self.path / name).read_bytes()
            for name, words in _PICTURES.items()
            if done[name] and (self.path / name).is_file()
        }
        template = page_template(Path(__file__).with_name("results.html.jinja"))
        return template.render(results=self.results, tasks=tasks, pictures=pictures)


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _listed(settings: Mapping[str, Any]) -> str:
    """Write settings in one line, without those that are not set."""
    return ", ".join(f"{name} {_shown(value)}" for name, value in settings.items() if value is not None)


def _wrapped(line: str) -> list[str]:
    """Wrap a line at the width of most screens; what follows the first line is indented further."""
    return textwrap.wrap(line, 80, subsequent_indent=" " * 4, break_long_words=False, break_on_hyphens=False)


def _bars(figures: Mapping[str, float]) -> bytes | None:
    """Draw a bar for each figure of a data set and direction.  -> PNG"""
    bars = {key.removeprefix("eval/"): value for key, value in figures.items() if key.count("/") > 2}
    if not bars:
        return None
    figure = Figure(figsize=(8, 0.6 + 0.35 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(list(bars), list(bars.values()), color="#0072B2")
    axes.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()
