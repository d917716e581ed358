"""What the folder of a run tells of one of its steps: manifest, recipe, figures, and the licences of its data."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class RunFacts:
    """What the files of a run tell of one of its steps; everything is empty without a run."""

    def __init__(self, run: Path | None, step: int | None):
        self.manifest = read_json(run, "manifest.json")
        self.summary = read_json(run, "summary.json")
        self.step = step if step is not None else self.summary.get("step")
        if self.step != self.summary.get("step"):
            self.summary = {}  # of other weights
        self.training, self.evaluation = _read_metrics(run, self.step)
        if self.step is None and self.training:
            self.step = max(self.training)
        if self.step is not None:
            # What the checkpoint says of itself is of this step; the run's manifest is of its last launch.
            self.manifest |= read_json(run, f"checkpoints/step-{self.step:08d}/manifest.json")
        self.recipe = _without_places(self.manifest.get("config") or {})
        self.held_out = self.summary.get("held_out") or self.evaluation
        self.sources = self.section("data").get("sources") or []
        self.validation_sources = self.section("data").get("validation_sources") or []
        self.data_cards = _without_places(self.manifest.get("data_cards") or {})

    def section(self, name: str) -> dict:
        return self.recipe.get(name) or {}

    def total(self, *keys: str) -> float | None:
        """The sum over all steps of the product of these figures; None unless every step recorded them."""
        rows = [[row.get(key) for key in keys] for row in self.training.values()]
        complete = len(rows) == self.step and not any(None in row for row in rows)
        return sum(math.prod(row) for row in rows) if complete else None


def _without_places(tree: Any) -> Any:
    """Of absolute paths the last part: a card is read by others, whom a machine's folders tell nothing."""
    if isinstance(tree, str):
        return Path(tree).name if tree.startswith(("/", "~")) else tree
    if isinstance(tree, dict):
        return {_without_places(key): _without_places(value) for key, value in tree.items()}
    return [_without_places(item) for item in tree] if isinstance(tree, list) else tree


def read_json(folder: Path | None, name: str) -> dict:
    file = None if folder is None else folder / name
    if file is None or not file.is_file():
        return {}
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}; mend or remove it") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} does not hold a JSON object; mend or remove it")
    return tree


def _read_metrics(run: Path | None, until: int | None) -> tuple[dict[int, dict], dict]:
    """(step -> training row, the last evaluation row) up to a step; of a repeated step the later row counts."""
    training, evaluation = {}, {}
    if run is None or not (run / "metrics.jsonl").is_file():
        return training, evaluation
    with open(run / "metrics.jsonl", encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # torn by a stop
            if not isinstance(row, dict) or "step" not in row or (until is not None and row["step"] > until):
                continue
            kind = evaluation if any(key.startswith("eval/") for key in row) else training
            kind[row["step"]] = row
    last = evaluation[max(evaluation)] if evaluation else {}
    return training, {key: value for key, value in last.items() if key.startswith("eval/")}


def licence_of(facts: RunFacts) -> tuple[str | None, str | None]:
    """(license, license_name) that follow from the data: theirs, if all declare one; else none is claimed."""
    cards = [facts.data_cards.get(source["path"], {}) for source in facts.sources]
    names = {card.get("license_name") or card.get("license") for card in cards}
    if not names or None in names:
        return None, None
    if len(names) == 1 and cards[0]["license"] != "other":
        return cards[0]["license"], None
    return "other", "-and-".join(sorted(names))


def languages_of(facts: RunFacts) -> list[str] | None:
    found = [facts.data_cards.get(source["path"], {}).get("language") for source in facts.sources]
    flat = [name for item in found if item for name in (item if isinstance(item, list) else [item])]
    return list(dict.fromkeys(flat)) or None


def hub_name(source: Mapping[str, Any], facts: RunFacts) -> str | None:
    """The data set's name on the Hub; None where the source is somewhere else."""
    path = source["path"]
    if match := re.match(r"hf://datasets/([^/]+/[^/@]+)", path):
        return match[1]
    return path if path not in facts.data_cards and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) else None
