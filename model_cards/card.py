"""The card of a model: what it is, how it was made and measured, how to load it; every figure read from files.

A saved folder tells the architecture, the folder of a run its data, training and figures. What no file tells is left
out. The text is `template.md`, beside this file.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from modeling_mot.configuration_mot import MoTConfig
from modeling_mot.configuration_mot_transfusion import MoTTransfusionConfig
from modeling_mot.hub_trust import reading


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


TEMPLATE = Path(__file__).resolve().parent / "template.md"
# What a card shows of a run's folder; whoever writes the card puts them beside it.
PICTURES = ("samples.png", "losses.png")
_MARK = (
    r"<!-- generated from files \((?:no step|step (?P<step>\d+)), (?P<weights>\w+)\), sha256 (?P<digest>\w+) -->\s*\Z"
)
_CONFIGURATIONS = {kind.model_type: kind for kind in (MoTConfig, MoTTransfusionConfig)}
# A held-out loss so many times that of training is called out as learning by heart.
_BY_HEART = 1.2

# Measure of summary.json -> (task, metric, what it is); `{}` takes the numbers beside it.
_MEASURES = {
    "drawn_right": (
        "text-to-image",
        "accuracy",
        "pictures drawn from {drawn} {which} names whose nearest of {gallery_size} pictures is the named one",
    ),
    "reconstructed_right": (
        None,
        "accuracy",
        "the same for those originals encoded and decoded, the ceiling of the former",
    ),
    "drawn_psnr": ("text-to-image", "psnr", "dB of {drawn} {which} drawn pictures against the originals"),
    "reconstructed_psnr": (None, "psnr", "dB of those originals encoded and decoded, the ceiling of the former"),
    "read_right": ("image-to-text", "exact_match", "names read off {drawn} {which} pictures letter by letter"),
    "nearer_to_target": (
        "image-to-image",
        "accuracy",
        "edits of {edited} {which} pictures nearer to the target than to the source",
    ),
    "distance_ratio": ("image-to-image", "distance_ratio", "median distance to the target over that to the source"),
}


def model_card(
    folder: str | Path,
    run: str | Path | None = None,
    repo: str | None = None,
    *,
    step: int | None = None,
    weights: str | None = None,
    revision: str | None = None,
    **metadata: Any,
) -> ModelCard:
    """The card of a saved checkpoint.

    Args:
        folder: with config.json, as `save_pretrained` writes it.
        run: the folder of the run that made it: manifest.json, summary.json, metrics.jsonl, samples.png, losses.png
            are read, where they are there.
        repo: its name on the Hub, for the title and the example.
        step: of the checkpoint; default: what an earlier card in `folder` says, or the run's last.
        weights: `trained`, or their moving `average`; default: what an earlier card in `folder` says, or the average
            where the run kept one.
        revision: shown in the example; without it the example says where to find one.
        metadata: fields of `huggingface_hub.ModelCardData`, such as `license` or `base_model`, that win over what is
            found.

    Raises:
        ValueError: `folder` holds no configuration of a MoT, or a file of the run cannot be read.
        FileNotFoundError: the template is not beside this package, as where this is run as remote code.
    """
    folder, run = Path(folder), None if run is None else Path(run)
    config = _configuration(folder)
    told_step, told_weights = _told_before(folder)
    facts = RunFacts(run, step if step is not None else told_step)
    weights = weights or told_weights or ("trained" if facts.section("train").get("ema_decay") is None else "average")
    name = repo.split("/")[-1] if repo else (run or folder).resolve().name
    made_from = read_json(folder, "conversion.json")
    results = list(_results(facts))
    found = {
        "language": languages_of(facts),
        "license": licence_of(facts)[0],
        "license_name": licence_of(facts)[1],
        "base_model": _base_model(made_from, facts),
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if config.modalities == ["text"] else "any-to-any",
        "tags": ["mixture-of-transformers", "multimodal", "custom_code"],
        "datasets": [hub for source in facts.sources if (hub := hub_name(source, facts))] or None,
        "model_name": name if results else None,
        "eval_results": [result for result, _ in results if result.task_type] or None,
    }
    if not TEMPLATE.is_file():
        raise FileNotFoundError(f"{TEMPLATE}: cards are made by the installed package, not by code from the Hub")
    card = ModelCard.from_template(
        ModelCardData(**(found | metadata)),
        template_path=str(TEMPLATE),
        name=repo or name,
        repo=repo,
        revision=revision,
        config=config,
        made_from=made_from,
        is_transfusion=isinstance(config, MoTTransfusionConfig),
        has_processor=(folder / "processor_config.json").is_file() or not (folder / "tokenizer_config.json").is_file(),
        architecture=list(_architecture(config, facts)),
        training=list(_training(facts, weights)),
        recipe=yaml_dump(facts.recipe, sort_keys=False).strip() if facts.recipe else None,
        sources=list(_sources(facts)),
        attributions=list(_attributions(facts)),
        losses=list(_losses(facts)),
        figures=[
            (result.metric_name, _figure(result.metric_value, share)) for result, share in results if share is not None
        ],
        by_heart=_by_heart(facts),
        note=facts.summary.get("note"),
        limited=[(source["name"], source["limit"]) for source in facts.sources if source.get("limit")],
        samples=facts.summary.get("samples") or {},
        recipe_samples=facts.section("samples"),
        # They were made with the summary, of its step.
        pictures=[file for file in PICTURES if facts.summary and (run / file).is_file()],
    )
    card.text = f"{card.text.rstrip()}\n\n"
    body = card.content
    step = "no step" if facts.step is None else f"step {facts.step}"
    card.text += f"<!-- generated from files ({step}, {weights}), sha256 {_digest(body)} -->\n"
    return card


def is_generated(text: str) -> bool:
    """Whether a README.md is a card as it was made here, and nobody has changed it since."""
    match = re.search(_MARK, text)
    return match is not None and match["digest"] == _digest(text[: match.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _base_model(made_from: dict, facts: RunFacts) -> str | None:
    """The model on the Hub that this one was converted from, or that its run began with."""
    if made_from.get("revision"):
        return made_from["source"]
    begun = facts.section("model").get("init_from")
    return hub_name({"path": begun}, facts) if begun and not Path(begun).exists() else None


def _told_before(folder: Path) -> tuple[int | None, str | None]:
    """(step, weights) of which the folder's present card says that it is, if it was made here."""
    readme = folder / "README.md"
    match = re.search(_MARK, readme.read_text(encoding="utf-8")) if readme.is_file() else None
    return (None, None) if match is None else (match["step"] and int(match["step"]), match["weights"])


def _configuration(folder: Path) -> MoTConfig:
    kind = read_json(folder, "config.json").get("model_type")
    if kind not in _CONFIGURATIONS:
        what = "has no config.json" if kind is None else f"is of model_type={kind!r}"
        raise ValueError(f"{folder} {what}; a card is of a folder that a MoT was saved to")
    with reading(f"{folder / 'config.json'} cannot be read"):
        return _CONFIGURATIONS[kind].from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------- what is said


def _architecture(config: MoTConfig, facts: RunFacts) -> Iterator[tuple[str, str]]:
    if variant := facts.section("model").get("variant"):
        yield "variant", f"`{variant}`"
    yield "modalities", ", ".join(config.modalities)
    own = ", ".join(part.replace("_", "-") for part in config.untied)
    yield "towers", ", ".join(config.tower_names) + (f"; each has its own {own}" if len(config.tower_names) > 1 else "")
    if config.moe_towers:
        yield "experts", f"{config.num_experts} in the feed-forwards of {', '.join(config.moe_towers)}"
    yield "layers", f"{config.num_hidden_layers} of width {config.hidden_size}, feed-forward {config.intermediate_size}"
    yield "heads", f"{config.num_attention_heads}, {config.num_key_value_heads} of keys and values"
    yield "vocabulary", f"{config.vocab_size:,}"
    if isinstance(config, MoTTransfusionConfig):
        size = " x ".join(map(str, (config.latent_channels, *config.latent_size)))
        yield "pictures", f"latents of {size}, {config.patchifier} patchifier, {config.prediction_type}"
    elif config.image_grid is not None:
        yield "pictures", f"{' x '.join(map(str, config.image_grid))} codes"
    yield "active parameters (of one token)", _millions(config.num_parameters(active=True))
    beside = ", the frozen VAE not counted" if isinstance(config, MoTTransfusionConfig) else ""
    yield f"total parameters{beside}", _millions(config.num_parameters(active=False))
    if flops := facts.manifest.get("forward_flops_per_token"):
        each = ", ".join(f"{name} {value / 1e6:,.1f} M" for name, value in flops.items())
        yield f"forward FLOPs of a token in a row of {facts.section('data')['row_length']:,}", each


def _training(facts: RunFacts, weights: str) -> Iterator[tuple[str, str]]:
    manifest, train, optimizer = facts.manifest, facts.section("train"), facts.section("optimizer")
    if facts.step is not None:
        yield "step", f"{facts.step:,}" + (f" of {train['steps']:,}" if train else "")
    if train:
        yield "rows in a micro-batch", f"{train['rows']} of {facts.section('data')['row_length']:,} tokens"
        yield "micro-batches in a step", str(train["accumulation"])
        if (decay := train.get("ema_decay")) is not None:
            yield (
                "weights",
                f"their moving average ({decay})" if weights == "average" else "of the last step, no average",
            )
    if optimizer:
        schedule = f"{optimizer['lr']:g} to {optimizer['min_lr']:g}, {optimizer['warmup_steps']:,} steps of warm-up"
        yield "optimizer", f"AdamW, learning rate {schedule}, weight decay {optimizer['weight_decay']:g}"
    if tokens := facts.total("tokens_per_second", "step_seconds"):
        yield "tokens", _large(tokens)
    if flops := facts.total("flops") or _flops_of_positions(facts):
        yield "training FLOPs", f"{flops:.3g}"
    if seconds := facts.summary.get("training_seconds"):
        yield "training time", f"{seconds / 3600:,.2f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"
        yield "tokens a second", f"{facts.summary['tokens_per_second']:,.0f}"
        yield "model FLOPs utilisation", f"{facts.summary['mfu']:.0%}"
    if world := manifest.get("world"):
        yield "processes", f"{world['processes']} x {manifest.get('device', '').split(':')[0]}".removesuffix(" x ")
    if precision := manifest.get("precision"):
        yield "precision of products", precision
    for key, what in (("data_fingerprint", "fingerprint of the data"), ("commit", "commit of the code")):
        if manifest.get(key):
            yield what, f"`{manifest[key]}`"
    if versions := manifest.get("versions"):
        yield "versions", ", ".join(f"{package} {version}" for package, version in versions.items() if version)


def _flops_of_positions(facts: RunFacts) -> int | None:
    """3 x forward FLOPs of all positions, where each costs the same."""
    per_token, train = set((facts.manifest.get("forward_flops_per_token") or {}).values()), facts.section("train")
    if len(per_token) != 1 or not train or facts.step is None or "rows_in_a_step" not in facts.manifest:
        return None
    return 3 * per_token.pop() * facts.step * facts.manifest["rows_in_a_step"] * facts.section("data")["row_length"]


def _sources(facts: RunFacts) -> Iterator[tuple[str, ...]]:
    """(name, path, split, records, share, segments, licence) of what the model was trained on."""
    total = sum(source["weight"] for source in facts.sources)
    for source in facts.sources:
        hub = hub_name(source, facts)
        card = facts.data_cards.get(source["path"], {})
        split = " ".join(filter(None, (source.get("config"), source["split"])))
        records = f"the first {source['limit']:,}" if source.get("limit") else "all"
        if source.get("match"):
            records += " where " + ", ".join(f"{column} has `{what}`" for column, what in source["match"].items())
        segments = "; ".join(", ".join(template["segments"]) for template in source["templates"])
        path = f"[{hub}](https://huggingface.co/datasets/{hub})" if hub else card.get("pretty_name", source["path"])
        licence = card.get("license_name") or card.get("license") or ("see there" if hub else "not declared")
        yield source["name"], path, split, records, f"{source['weight'] / total:.0%}", segments, licence


def _attributions(facts: RunFacts) -> Iterator[tuple[str, str]]:
    for path in dict.fromkeys(source["path"] for source in facts.sources):
        card = facts.data_cards.get(path, {})
        if card.get("attribution"):
            yield card.get("pretty_name", path), card["attribution"]


def _losses(facts: RunFacts) -> Iterator[tuple[str, str, str]]:
    """(objective, training loss, held-out loss)."""
    training = facts.summary.get("training") or {}
    for key in dict.fromkeys(
        [*training, *(k.removeprefix("eval/") for k in facts.held_out if k.startswith("eval/loss_"))]
    ):
        pair = (training.get(key), facts.held_out.get(f"eval/{key}"))
        yield (
            key.removeprefix("loss_").replace("_", " "),
            *("" if value is None else f"{value:.4g}" for value in pair),
        )


def _by_heart(facts: RunFacts) -> list[str]:
    """Objectives whose held-out loss lies well above that of training."""
    training = facts.summary.get("training") or {}
    held_out = {key: facts.held_out.get(f"eval/{key}") for key in training}
    return [
        key.removeprefix("loss_").replace("_", " ")
        for key, value in training.items()
        if held_out[key] is not None and held_out[key] > _BY_HEART * value
    ]


def _results(facts: RunFacts) -> Iterator[tuple[EvalResult, bool | None]]:
    """(result, whether it is a share; None: a loss, of which the card has another table).

    Results without a task are of the image tokenizer and not of the model; they stay out of the metadata.
    """
    for key, value in facts.held_out.items():
        name = key.removeprefix("eval/")
        if value is None:
            continue
        if name.endswith("/loss"):
            task = name.removesuffix("/loss")
            yield _result(facts, True, _TASKS.get(task, task), "loss", value, f"held-out loss, {task}"), None
        else:
            metric, _, objective = name.partition("_")
            what = f"held-out {metric} of {objective.replace('_', ' ')}"
            yield _result(facts, True, "any-to-any", metric, value, what), None
    measures = facts.summary.get("samples") or {}
    for prefix in ("", "held_out_"):
        numbers = {name: measures.get(prefix + name) for name in ("drawn", "edited")}
        numbers |= {"which": "held-out" if prefix else "learnt", "gallery_size": measures.get("gallery_size")}
        for name, (task, metric, what) in _MEASURES.items():
            if (value := measures.get(prefix + name)) is not None:
                described = what.format(**numbers)
                yield (
                    _result(facts, bool(prefix), task, metric, value, described),
                    metric in ("accuracy", "exact_match"),
                )


_TASKS = {
    "text": "text-generation",
    "text-to-speech": "text-to-speech",
    "speech-to-text": "automatic-speech-recognition",
}


def _result(facts: RunFacts, held_out: bool, task: str | None, metric: str, value: float, what: str) -> EvalResult:
    sources = (held_out and facts.validation_sources) or facts.sources
    paths = list(dict.fromkeys(source["path"] for source in sources))
    names = [
        hub_name({"path": path}, facts) or facts.data_cards.get(path, {}).get("pretty_name", path) for path in paths
    ]
    splits = set(source["split"] for source in sources)
    return EvalResult(
        task_type=task,
        dataset_type=" and ".join(paths) or "unknown",
        dataset_name=" and ".join(names) or "unknown",
        dataset_split=splits.pop() if len(splits) == 1 else None,
        metric_type=metric,
        metric_name=what,
        metric_value=float(f"{value:.6g}"),
    )


def _figure(value: float, is_share: bool) -> str:
    return f"{value:.1%}" if is_share else f"{value:.3g}"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M"


def _large(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.1f} {letter}"
    return f"{number:.0f}"
