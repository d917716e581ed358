"""Write the card of a model: what the model is, how it was made and measured, how to load it.

Every figure is read from files. A saved folder tells the architecture. The folder of a run tells the data, the training
and the figures. A fact that no file holds is left out. The text of a card is `template.md`, beside this file.

    card = model_card("runs/emoji/final", "runs/emoji", repo="you/emoji")
    card.save("README.md")
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


TEMPLATE = Path(__file__).resolve().parent / "template.md"
# The pictures of a run's folder that a card shows. The caller of `model_card` copies them beside the card.
PICTURES = ("samples.png", "losses.png")
# The last line of a card: it tells later whether somebody has changed the card since.
_MARK = (
    r"<!-- generated from files \((?:no step|step (?P<step>\d+)), (?P<weights>\w+)\), sha256 (?P<digest>\w+) -->\s*\Z"
)
_CONFIGURATIONS = {kind.model_type: kind for kind in (MoTConfig, MoTTransfusionConfig)}
# A held-out loss of more than so many times the training loss is called learning by heart.
_BY_HEART = 1.2
# The share of the last steps whose mean is the training loss, as in a run's own summary.
_LAST_STEPS = 1 / 40
# A longer caption does not become the prompt of the example.
_LONGEST_EXAMPLE = 60
_FILE_ENDINGS = (".json", ".jsonl", ".csv", ".txt", ".parquet", ".tar", ".gz", ".zst")

# Measure of summary.json -> (task, metric, description). The description is filled with the numbers beside the measure.
_MEASURES = {
    "drawn_right": (
        "text-to-image",
        "accuracy",
        "pictures drawn from {drawn} {which} names whose nearest of {gallery_size} pictures {is_right}",
    ),
    "drawn_same": (None, "accuracy", "the same, where it must be the very picture"),
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
# Task of `training.evaluate` -> its name on the Hub.
_QUALITY = {"captions": "image-to-text", "pictures": "text-to-image", "speech": None}
# What is measured of speech -> its task on the Hub: what the model has heard, and what a judge has of its speech.
_SPEECH = {"heard": "automatic-speech-recognition", "spoken": "text-to-speech"}
# So much of either end of a file of tensors tells it from others: names and shapes stand first.
_DIGEST_BYTES = 2**20
# Task of an evaluation, as the trainer names it -> its name on the Hub, where that is another.
_TASKS = {
    "interleaved": "any-to-any",
    "text": "text-generation",
    "text-to-speech": "text-to-speech",
    "speech-to-text": "automatic-speech-recognition",
}


# ------------------------------------------------------------------------------------------------------------ the card


def model_card(
    folder: str | Path,
    run: str | Path | None = None,
    repo: str | None = None,
    *,
    step: int | None = None,
    weights: str | None = None,
    revision: str | None = None,
    evaluation: str | Path | None = None,
    **metadata: Any,
) -> ModelCard:
    """Make the card of a saved checkpoint.

    Args:
        folder: holds config.json, as `save_pretrained` writes it.
        run: the folder of the run that made the checkpoint. Of its files these are read, where they exist:
            manifest.json, summary.json, metrics.jsonl, samples/names.tsv, samples.png, losses.png.
        repo: the model's name on the Hub, for the title and the example.
        step: the step of the checkpoint; default: the step that an earlier card in `folder` names, or the run's last.
        weights: `trained`, or their moving `average`; default: the word of an earlier card in `folder`, or `average`
            if the run kept one.
        revision: the commit that the example loads; without it the example says where to find one.
        evaluation: the folder that `python -m training.evaluate` wrote its results to; default: a folder `evaluation`
            in the run or beside the checkpoint, if its results are of these weights. A figure of the evaluation
            replaces the run's own figure of the same task and metric.
        metadata: fields of `huggingface_hub.ModelCardData`, such as `license` or `base_model`. They replace the fields
            that were found in the files.

    Raises:
        ValueError: `folder` holds no configuration of a MoT, a file of the run cannot be read, or `evaluation` has no
            results.
        FileNotFoundError: the template is not beside this module.
    """
    folder, run = Path(folder), None if run is None else Path(run)
    if not TEMPLATE.is_file():
        raise FileNotFoundError(f"{TEMPLATE}: cards are made by the installed package, not by code from the Hub")

    # An earlier card in the folder knows which step and which weights were saved there.
    config = _configuration(folder)
    told_step, told_weights = _told_before(folder)
    facts = RunFacts(run, step if step is not None else told_step)
    weights = weights or told_weights or ("trained" if facts.section("train").get("ema_decay") is None else "average")

    # The head is for the Hub, the body is for people.
    name = repo.split("/")[-1] if repo else (run or folder).resolve().name
    made_from = read_json(folder, "conversion.json")
    results = _all_results(facts, _evaluation(folder, run, evaluation))
    card = ModelCard.from_template(
        ModelCardData(**(_head(config, facts, made_from, name, results) | metadata)),
        template_path=str(TEMPLATE),
        name=repo or name,
        repo=repo,
        revision=revision,
        config=config,
        made_from=made_from,
        is_transfusion=isinstance(config, MoTTransfusionConfig),
        has_processor=(folder / "processor_config.json").is_file() or not (folder / "tokenizer_config.json").is_file(),
        **_body(config, facts, weights, results),
        # The pictures were made together with the summary, so they show the summary's step.
        pictures=[file for file in PICTURES if facts.summary and (run / file).is_file()],
    )

    # The mark is a digest of everything before it.
    card.text = f"{card.text.rstrip()}\n\n"
    digest = _digest(card.content)
    told = "no step" if facts.step is None else f"step {facts.step}"
    card.text += f"<!-- generated from files ({told}, {weights}), sha256 {digest} -->\n"
    return card


def is_generated(text: str) -> bool:
    """True if a README.md is a card that was made here and that nobody has changed since."""
    match = re.search(_MARK, text)
    return match is not None and match["digest"] == _digest(text[: match.start()])


def _head(
    config: MoTConfig, facts: "RunFacts", made_from: dict, name: str, results: list[tuple[EvalResult, bool | None]]
) -> dict[str, Any]:
    """Return the fields of `ModelCardData` that follow from the files."""
    licence, licence_name = licence_of(facts)
    return {
        "language": languages_of(facts),
        "license": licence,
        "license_name": licence_name,
        "base_model": _base_model(made_from, facts),
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if config.modalities == ["text"] else "any-to-any",
        "tags": ["mixture-of-transformers", "multimodal", "custom_code"],
        "datasets": [hub for source in facts.sources if (hub := hub_name(source, facts))] or None,
        "model_name": name if results else None,
        "eval_results": [result for result, _ in results if result.task_type] or None,
    }


def _body(
    config: MoTConfig, facts: "RunFacts", weights: str, results: list[tuple[EvalResult, bool | None]]
) -> dict[str, Any]:
    """Return the values of the template that follow from the run's files."""
    # Losses have a table of their own.
    measured = [(result, is_share) for result, is_share in results if is_share is not None]
    return {
        # JSON's quotes and escapes are Python's as well.
        "caption": facts.caption and json.dumps(facts.caption, ensure_ascii=False),
        "architecture": list(_architecture(config, facts)),
        "training": list(_training(facts, weights)),
        "recipe": yaml_dump(facts.recipe, sort_keys=False).strip() if facts.recipe else None,
        "sources": list(_sources(facts)),
        "attributions": list(_attributions(facts)),
        "losses": list(_losses(facts)),
        "figures": [(result.metric_name, _figure(result.metric_value, is_share)) for result, is_share in measured],
        "by_heart": _by_heart(facts),
        "note": facts.summary.get("note"),
        "limited": [(source["name"], source["limit"]) for source in facts.sources if source.get("limit")],
        "samples": facts.summary.get("samples") or {},
        "recipe_samples": facts.section("samples"),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _told_before(folder: Path) -> tuple[int | None, str | None]:
    """Return (step, weights) that the mark of the folder's present card names; (None, None) without such a card."""
    readme = folder / "README.md"
    match = re.search(_MARK, readme.read_text(encoding="utf-8")) if readme.is_file() else None
    return (None, None) if match is None else (match["step"] and int(match["step"]), match["weights"])


def _configuration(folder: Path) -> MoTConfig:
    kind = read_json(folder, "config.json").get("model_type")
    if kind not in _CONFIGURATIONS:
        what = "has no config.json" if kind is None else f"is of model_type={kind!r}"
        raise ValueError(f"{folder} {what}; give a folder that a MoT was saved to")
    with reading(f"{folder / 'config.json'} cannot be read"):
        return _CONFIGURATIONS[kind].from_pretrained(folder)


# ------------------------------------------------------------------------------------------------ the files of a run


class RunFacts:
    """The facts that the files of a run hold about one of its steps. Without a run every fact is empty.

    Attributes:
        manifest: manifest.json, with the checkpoint's own manifest over it.
        summary: summary.json, if it is about `step`; else empty.
        step: None if no file tells it.
        training: step -> row of metrics.jsonl, up to `step`.
        learnt: key such as `loss_text` -> training loss over the last steps.
        held_out: key such as `eval/loss_text` -> held-out figure.
        recipe: the resolved recipe.
        sources, validation_sources: the data sources of the recipe.
        data_cards: path of a local source -> the declarations of its own card, which may be empty.
        caption: a caption of the training data; None if the run kept none that is short.
        starts: the folders that relative paths of the recipe may begin in.
    """

    def __init__(self, run: Path | None, step: int | None):
        self.manifest = read_json(run, "manifest.json")
        self.summary = read_json(run, "summary.json")
        self.step = step if step is not None else self.summary.get("step")
        if self.step != self.summary.get("step"):
            self.summary = {}  # it is about other weights
        self.training, evaluation = _read_metrics(run, self.step)
        if self.step is None and self.training:
            self.step = max(self.training)
        if self.step is not None:
            # The checkpoint's manifest is about this step; the run's manifest is about its last launch.
            self.manifest |= read_json(run, f"checkpoints/step-{self.step:08d}/manifest.json")
        self.recipe = _without_places(self.manifest.get("config") or {})
        self.learnt = _recent_losses(self.training) | (self.summary.get("training") or {})
        self.held_out = self.summary.get("held_out") or evaluation
        self.sources = self.section("data").get("sources") or []
        self.validation_sources = self.section("data").get("validation_sources") or []
        self.data_cards = _without_places(self.manifest.get("data_cards") or {})
        self.caption = _first_caption(run) if self.summary else None
        self.starts = _starts(run, self.section("train").get("output_dir"))

    def section(self, name: str) -> dict:
        """Return a section of the recipe; empty if the recipe has none of that name."""
        return self.recipe.get(name) or {}

    def total(self, *keys: str) -> float | None:
        """Return the sum over all steps of the product of these figures; None unless every step recorded them."""
        rows = [[row.get(key) for key in keys] for row in self.training.values()]
        complete = len(rows) == self.step and not any(None in row for row in rows)
        return sum(math.prod(row) for row in rows) if complete else None


def read_json(folder: Path | None, name: str) -> dict:
    """Return the object in a JSON file; empty without a folder or a file.

    Raises:
        ValueError: the file is not JSON, or holds another value than an object.
    """
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
    """Read (step -> training row, the last evaluation row) up to step `until`; the later row of a step counts."""
    training, evaluation = {}, {}
    if run is None or not (run / "metrics.jsonl").is_file():
        return training, evaluation
    with open(run / "metrics.jsonl", encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a stop has torn the line
            if not isinstance(row, dict) or "step" not in row or (until is not None and row["step"] > until):
                continue
            kind = evaluation if any(key.startswith("eval/") for key in row) else training
            kind[row["step"]] = row
    last = evaluation[max(evaluation)] if evaluation else {}
    return training, {key: value for key, value in last.items() if key.startswith("eval/")}


def _recent_losses(training: dict[int, dict]) -> dict[str, float]:
    """Key such as `loss_text` -> its mean over the targets of the last steps.

    A short run may have no target of a modality in its last fortieth; its last step with such targets then counts.
    """
    rows = [training[step] for step in sorted(training)]
    losses = {}
    for key in dict.fromkeys(key for row in rows for key in row if key.startswith("loss_")):
        objective = key.removeprefix("loss_")
        count = f"{'elements' if objective == 'image_diffusion' else 'tokens'}_{objective}"
        pairs = [(row[key], row.get(count) or 0) for row in rows[-max(1, int(len(rows) * _LAST_STEPS)) :] if key in row]
        pairs = [(loss, targets) for loss, targets in pairs if loss is not None and targets]
        if not pairs:
            pairs = [(row[key], row[count]) for row in rows if row.get(key) is not None and row.get(count)][-1:]
        if pairs:
            losses[key] = sum(loss * targets for loss, targets in pairs) / sum(targets for _, targets in pairs)
    return losses


def _first_caption(run: Path) -> str | None:
    """Find the first caption that the run drew a picture for at its end; None without a short one."""
    file = run / "samples" / "names.tsv"
    lines = file.read_text(encoding="utf-8").splitlines()[1:2] if file.is_file() else []
    caption = lines[0].split("\t")[0].strip() if lines else ""
    return caption if 0 < len(caption) <= _LONGEST_EXAMPLE else None


def _starts(run: Path | None, output_dir: str | None) -> list[Path]:
    """List the present folder and, if the run still lies where its recipe says, the folder it was started in."""
    written = Path(output_dir or "").parts
    if run is None or not written or run.resolve().parts[-len(written) :] != written:
        return [Path()]
    return [Path(), run.resolve().parents[len(written) - 1]]


def _without_places(tree: Any) -> Any:
    """Replace each absolute path by its last part: strangers read the card, on machines of their own."""
    if isinstance(tree, str):
        return Path(tree).name if tree.startswith(("/", "~")) else tree
    if isinstance(tree, dict):
        return {_without_places(key): _without_places(value) for key, value in tree.items()}
    return [_without_places(item) for item in tree] if isinstance(tree, list) else tree


# ------------------------------------------------------------------------------------------------- data and licences


def hub_name(source: Mapping[str, Any], facts: RunFacts) -> str | None:
    """Return the name on the Hub of a source's data set; None if the data are elsewhere.

    `my/pets` may be a data set of the user "my" or a folder. It is a folder if the run read a card there, or if such a
    folder exists.
    """
    path = source["path"]
    if match := re.match(r"hf://datasets/([^/]+/[^/@]+)", path):
        return match[1]
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not path.endswith(_FILE_ENDINGS)
    is_local = path in facts.data_cards or any((start / path).exists() for start in facts.starts)
    return path if is_name and not is_local else None


def licence_of(facts: RunFacts) -> tuple[str | None, str | None]:
    """Return (license, license_name) of the data, if every source declares one; else (None, None)."""
    cards = [facts.data_cards.get(source["path"], {}) for source in facts.sources]
    names = {card.get("license_name") or card.get("license") for card in cards}
    if not names or None in names:
        return None, None
    if len(names) == 1 and cards[0].get("license", "other") != "other":
        return cards[0]["license"], None
    return "other", "-and-".join(sorted(names))


def languages_of(facts: RunFacts) -> list[str] | None:
    """Return the languages that the data declare, each once; None if no source declares one."""
    found = [facts.data_cards.get(source["path"], {}).get("language") for source in facts.sources]
    flat = [name for item in found if item for name in (item if isinstance(item, list) else [item])]
    return list(dict.fromkeys(flat)) or None


def _base_model(made_from: dict, facts: RunFacts) -> str | None:
    """Return the model on the Hub that this one was converted from, or that its run began with."""
    if made_from.get("revision"):
        return made_from["source"]
    begun = facts.section("model").get("init_from")
    return hub_name({"path": begun}, facts) if begun else None


def _data_name(path: str, facts: RunFacts) -> str:
    """Return a source's name for people: its name on the Hub, the title of its own card, or its path."""
    return hub_name({"path": path}, facts) or facts.data_cards.get(path, {}).get("pretty_name", path)


def _sources(facts: RunFacts) -> Iterator[tuple[str, ...]]:
    """Return (name, data, split, records, share, documents, licence) of each source that the model was trained on."""
    total = sum(source["weight"] for source in facts.sources)
    for source in facts.sources:
        hub = hub_name(source, facts)
        card = facts.data_cards.get(source["path"], {})
        local = card.get("pretty_name") or f"local files, `{source['path']}`"
        split = " ".join(filter(None, (source.get("config"), source["split"])))
        records = f"the first {source['limit']:,}" if source.get("limit") else "all"
        if source.get("match"):
            records += " where " + ", ".join(f"{column} has `{what}`" for column, what in source["match"].items())
        yield (
            source["name"],
            f"[{hub}](https://huggingface.co/datasets/{hub})" if hub else local,
            split,
            records,
            f"{source['weight'] / total:.0%}",
            "; ".join(", ".join(template["segments"]) for template in source["templates"]),
            card.get("license_name") or card.get("license") or ("see there" if hub else "not declared"),
        )


def _attributions(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """Return (title, text) of each data card that says whom to name."""
    for path in dict.fromkeys(source["path"] for source in facts.sources):
        card = facts.data_cards.get(path, {})
        if card.get("attribution"):
            yield card.get("pretty_name", path), card["attribution"]


# ----------------------------------------------------------------------------------------- architecture and training


def _architecture(config: MoTConfig, facts: RunFacts) -> Iterator[tuple[str, str]]:
    """Return (what, value) of each row in the table of the architecture."""
    # The towers.
    if variant := facts.section("model").get("variant"):
        yield "variant", f"`{variant}`"
    yield "modalities", ", ".join(config.modalities)
    own = ", ".join(part.replace("_", "-") for part in config.untied)
    yield "towers", ", ".join(config.tower_names) + (f"; each has its own {own}" if len(config.tower_names) > 1 else "")
    if config.moe_towers:
        yield "experts", f"{config.num_experts} in the feed-forwards of {', '.join(config.moe_towers)}"

    # The sizes.
    yield "layers", f"{config.num_hidden_layers} of width {config.hidden_size}, feed-forward {config.intermediate_size}"
    for tower, own in (config.tower_configs or {}).items():
        if own:
            yield f"tower {tower}", ", ".join(f"{field} {value}" for field, value in own.items())
    yield "heads", f"{config.num_attention_heads}, {config.num_key_value_heads} of keys and values"
    yield "vocabulary", f"{config.vocab_size:,}"
    if isinstance(config, MoTTransfusionConfig):
        size = " x ".join(map(str, (config.latent_channels, *config.latent_size)))
        yield "pictures", f"latents of {size}, {config.patchifier} patchifier, {config.prediction_type}"
    elif config.image_grid is not None:
        yield "pictures", f"{' x '.join(map(str, config.image_grid))} codes"

    # The costs.
    yield "active parameters (of one token)", _millions(config.num_parameters(active=True))
    beside = ", the frozen VAE not counted" if isinstance(config, MoTTransfusionConfig) else ""
    yield f"total parameters{beside}", _millions(config.num_parameters(active=False))
    if flops := facts.manifest.get("forward_flops_per_token"):
        each = ", ".join(f"{name} {value / 1e6:,.1f} M" for name, value in flops.items())
        yield f"forward FLOPs of a token in a row of {facts.section('data')['row_length']:,}", each


def _training(facts: RunFacts, weights: str) -> Iterator[tuple[str, str]]:
    """Return (what, value) of each row in the table of the training."""
    manifest, train, optimizer = facts.manifest, facts.section("train"), facts.section("optimizer")

    # The recipe.
    if facts.step is not None:
        yield "step", f"{facts.step:,}" + (f" of {train['steps']:,}" if train else "")
    if train:
        yield "rows in a micro-batch", f"{train['rows']} of {facts.section('data')['row_length']:,} tokens"
        held = f"as many as make {train.get('tokens_per_step') or 0:,} tokens"
        yield "micro-batches in a step", held if train["accumulation"] is None else str(train["accumulation"])
        if (decay := train.get("ema_decay")) is not None:
            average = weights == "average"
            yield "weights", f"their moving average ({decay})" if average else "of the last step, no average"
    if optimizer:
        schedule = f"{optimizer['lr']:g} to {optimizer['min_lr']:g}, {optimizer['warmup_steps']:,} steps of warm-up"
        yield "optimizer", f"AdamW, learning rate {schedule}, weight decay {optimizer['weight_decay']:g}"

    # The work and the time.
    if tokens := facts.total("tokens_per_second", "step_seconds"):
        yield "tokens", _large(tokens)
    if flops := facts.total("flops") or _flops_of_positions(facts):
        yield "training FLOPs", f"{flops:.3g}"
    if seconds := facts.summary.get("training_seconds"):
        yield "training time", f"{seconds / 3600:,.2f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"
        yield "tokens a second", f"{facts.summary['tokens_per_second']:,.0f}"
        yield "model FLOPs utilisation", f"{facts.summary['mfu']:.0%}"

    # The machine and the versions.
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
    """Return 3 x forward FLOPs of all positions, or None if positions of different modalities cost differently."""
    per_token, train = set((facts.manifest.get("forward_flops_per_token") or {}).values()), facts.section("train")
    if len(per_token) != 1 or not train or facts.step is None or "rows_in_a_step" not in facts.manifest:
        return None
    return 3 * per_token.pop() * facts.step * facts.manifest["rows_in_a_step"] * facts.section("data")["row_length"]


# ------------------------------------------------------------------------------------------------ losses and figures


def _losses(facts: RunFacts) -> Iterator[tuple[str, str, str]]:
    """Return (objective, training loss, held-out loss)."""
    held_out = [key.removeprefix("eval/") for key in facts.held_out if key.startswith("eval/loss_")]
    for key in dict.fromkeys([*facts.learnt, *held_out]):
        pair = (facts.learnt.get(key), facts.held_out.get(f"eval/{key}"))
        learnt, expected = ("not measured" if value is None else f"{value:.4g}" for value in pair)
        yield _objective(key), learnt, expected


def _by_heart(facts: RunFacts) -> list[str]:
    """Return the objectives whose held-out loss is far above the training loss."""
    held_out = {key: facts.held_out.get(f"eval/{key}") for key in facts.learnt}
    return [
        _objective(key)
        for key, value in facts.learnt.items()
        if held_out[key] is not None and held_out[key] > _BY_HEART * value
    ]


def _objective(key: str) -> str:
    return key.removeprefix("loss_").replace("_", " ")


def _results(facts: RunFacts) -> Iterator[tuple[EvalResult, bool | None]]:
    """Return (result, is a share); the second is None for a loss, since losses have another table.

    A result without a task is about the image tokenizer and not about the model; the metadata leave it out.
    """
    # Held-out losses, by data set and direction, and by objective.
    of_sources = [key for key in facts.held_out if key.count("/") > 2]
    for key, value in facts.held_out.items():
        name, _, figure = key.removeprefix("eval/").rpartition("/")
        source, _, direction = name.rpartition("/")
        # A direction's figure over all data sets says less than that of each of them.
        is_repeated = not source and any(other.endswith(f"/{direction}/{figure}") for other in of_sources)
        if value is None or is_repeated or "@" in figure:  # @: at one noise level
            continue
        is_of_one = figure.startswith(("loss_", "perplexity_"))
        metric, _, objective = figure.partition("_") if is_of_one else (figure, "", "")
        what = f"held-out {metric.replace('_', ' ')}{objective and f' of {objective}'.replace('_', ' ')}"
        if direction:
            what += f", {direction}{source and f' of {source}'}"
        sources = [found for found in facts.validation_sources if found["name"] == source] or _held_out(facts)
        task = _TASKS.get(direction, direction) if direction else "any-to-any"
        yield _result(facts, sources, task, metric, value, what), None

    # Measures of the samples, first of learnt names and then of held-out ones.
    measures = facts.summary.get("samples") or {}
    for prefix in ("", "held_out_"):
        numbers = {name: measures.get(prefix + name) for name in ("drawn", "edited")}
        is_right = "shows what was named" if prefix + "drawn_same" in measures else "is the named one"
        numbers |= {"which": "held-out" if prefix else "learnt", "is_right": is_right}
        numbers["gallery_size"] = measures.get("gallery_size")
        for name, (task, metric, what) in _MEASURES.items():
            if (value := measures.get(prefix + name)) is not None:
                is_share = metric in ("accuracy", "exact_match")
                sources = _held_out(facts) if prefix else facts.sources
                yield _result(facts, sources, task, metric, value, what.format(**numbers)), is_share


def _held_out(facts: RunFacts) -> list[dict]:
    return facts.validation_sources or facts.sources


def _result(facts: RunFacts, sources: list[dict], task: str | None, metric: str, value: float, what: str) -> EvalResult:
    """Return a result with the data that it was measured on.

    The Hub reads `owner/name` as the id of a data set, so local files get a type that is no id.
    """
    paths = list(dict.fromkeys(source["path"] for source in sources))
    types = [hub_name({"path": path}, facts) or f"local files ({path})" for path in paths]
    splits = set(source["split"] for source in sources)
    return EvalResult(
        task_type=task,
        dataset_type=" and ".join(types) or "unknown",
        dataset_name=" and ".join(_data_name(path, facts) for path in paths) or "unknown",
        dataset_split=splits.pop() if len(splits) == 1 else None,
        metric_type=metric,
        metric_name=what,
        metric_value=float(f"{value:.6g}"),
    )


# ------------------------------------------------------------------------------------------------------- an evaluation


def _all_results(facts: RunFacts, evaluation: dict) -> list[tuple[EvalResult, bool | None]]:
    """Join the results of a run and of an evaluation, which replaces the run's own of the same task and metric."""
    measured = list(evaluation_results(evaluation))
    anew = {(result.task_type, result.metric_type) for result, _ in measured}
    kept = [pair for pair in _results(facts) if (pair[0].task_type, pair[0].metric_type) not in anew]
    # Losses of an evaluation stand among the figures: the table of losses is that of the run.
    return kept + [(result, bool(is_share)) for result, is_share in measured]


def evaluation_results(evaluation: Mapping[str, Any]) -> Iterator[tuple[EvalResult, bool | None]]:
    """Yield the results of `python -m training.evaluate`, as `_results` gives those of a run; none of an empty mapping.

    Args:
        evaluation: what results.json holds.
    """
    if not evaluation:
        return
    figures = {task: one["figures"] for task, one in evaluation["tasks"].items()}

    # Losses and samples, as those of a run on the same data.
    facts = RunFacts(None, None)
    data = _without_places(evaluation["data"])
    facts.sources, facts.validation_sources = data["sources"], data["validation_sources"]
    for task in ("loss", "perplexity", "diffusion"):
        facts.held_out = facts.held_out | figures.get(task, {})
    facts.summary = {"samples": figures.get("retrieval", {}) | figures.get("psnr", {})}
    yield from _results(facts)

    # Captions, pictures and speech: `<source>/<metric>`. Counts and settings among the figures are no results.
    for task, hub_task in _QUALITY.items():
        for key, value in figures.get(task, {}).items():
            source, _, metric = key.rpartition("/")
            if isinstance(value, float):
                of = [found for found in facts.validation_sources if found["name"] == source]
                what = f"{metric.replace('_', ' ')} of {source}, held out"
                kind, _, rate = metric.partition("_")
                named = (_SPEECH[kind], rate) if kind in _SPEECH else (hub_task, metric)
                yield _result(facts, of, *named, value, what), False


def weights_digest(folder: Path) -> str | None:
    """Digest the names, the sizes and both ends of a folder's files of tensors, to tell its weights from others.

    Returns None if the folder holds none, as where a model is named by its name on the Hub.
    """
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_DIGEST_BYTES))
            file.seek(max(0, size - _DIGEST_BYTES))
            digest.update(file.read(_DIGEST_BYTES))
    return digest.hexdigest() if files else None


def _evaluation(folder: Path, run: Path | None, named: str | Path | None) -> dict:
    """Read results.json of the named folder, or of one that is of these weights; empty without any."""
    if named is not None:
        if not (found := read_json(Path(named), "results.json")):
            raise ValueError(f"{named} has no results.json; give the folder that training.evaluate wrote to")
        if not isinstance(found.get("tasks"), dict) or not isinstance(found.get("data"), dict):
            raise ValueError(
                f"{Path(named) / 'results.json'} has no tasks and data; training.evaluate did not write it"
            )
        return found
    digest = weights_digest(folder)
    for place in dict.fromkeys(filter(None, (run, folder, folder.resolve().parent))):
        found = read_json(place / "evaluation", "results.json")
        if found and digest is not None and found.get("weights") == digest:
            return found
    return {}


def _figure(value: float, is_share: bool) -> str:
    return f"{value:.1%}" if is_share else f"{value:.3g}"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M"


def _large(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.1f} {letter}"
    return f"{number:.0f}"
