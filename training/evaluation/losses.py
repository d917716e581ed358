"""Measure held-out losses by modality, by source and by direction.

Each direction holds documents of one order (text then image, image then text, ...) with targets on the second segment
only. So a figure means one thing: how well pictures are predicted from names, names from pictures, and so on.

A mixture of experts is evaluated with expert choice, as in the paper (section 3.2.1). Its experts see later tokens when
they choose, which flatters its figures; `evaluation_note` says so wherever the figures are shown.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from modeling_mot import MoTConfig, MoTPreTrainedModel
from training.data.rows import INTERLEAVED
from training.optimization import DIFFUSION, objective_names
from training.recipe import EvaluationConfig


def target_objective(direction: str, config: MoTConfig) -> str:
    """The objective of a direction: `image` of "text-to-image" (or `image_diffusion`), `text` of "text".

    The name of a source may stand before the direction: "emoji/text-to-image".
    """
    modality = direction.rpartition("/")[2].rpartition("-to-")[2]
    return modality if modality in config.token_modalities else DIFFUSION


@torch.no_grad()
def evaluate_losses(
    model: MoTPreTrainedModel,
    rows: Mapping[str, Sequence[dict]],
    collate: Callable[..., dict],
    config: EvaluationConfig,
    accelerator: Accelerator,
    stops: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Measure the mean loss in nats per target, over all directions and of each.

    The keys are `eval/loss_<modality>`, `eval/<source>/<direction>/loss`, `eval/<direction>/loss` (over the sources
    that have the direction) and, for text, `eval/perplexity_text`. For images that are diffused
    `eval/loss_image_diffusion` is the mean squared error per element. Interleaved documents have several targets:
    `eval/<source>/interleaved/loss_<modality>` is the loss of one modality, and `eval/<source>/interleaved/loss` is
    that of all tokens.

    Args:
        model: in evaluation mode.
        rows: `<source>/<direction>`, or `<direction>`, -> packed rows, the same on every rank; the batches are shared
            out between ranks.
        collate: (rows, row_numbers=) -> a batch of tensors. Noise and noise levels follow from the numbers, so that two
            evaluations, or two runs on the same rows, see the same noisy images.
        stops: asked before each batch, on all ranks together; if it is true, the evaluation ends with None.

    A direction's loss is the loss of its target modality; the end marker of an image is text and counts there. A key
    without any target is left out.
    """
    # Sums and counts by direction and objective, each rank's share of the batches.
    objectives = objective_names(model.config)
    sums = torch.zeros(len(rows), len(objectives), 2, dtype=torch.float64)
    first_number = 0
    for index, direction_rows in enumerate(rows.values()):
        starts = range(0, len(direction_rows), config.batch_rows)
        for turn in range(-(-len(starts) // accelerator.num_processes)):
            if stops():
                return None
            # Ranks of a sharded model run together: a rank that has no batch left repeats the first, uncounted.
            place = turn * accelerator.num_processes + accelerator.process_index
            start, counted = (starts[place], 1) if place < len(starts) else (0, 0)
            some = direction_rows[start : start + config.batch_rows]
            numbers = range(first_number + start, first_number + start + len(some))
            batch = send_to_device(collate(some, row_numbers=numbers), accelerator.device)
            with accelerator.autocast():
                output = model(**batch, use_cache=False, skip_logits=True)
            for column, objective in enumerate(objectives):
                sums[index, column, 0] += counted * output.loss_sums[objective].double().cpu()
                sums[index, column, 1] += counted * output.loss_counts[objective].cpu()
        first_number += len(direction_rows)

    # The means over all ranks. MPS has no float64; float32 holds sums of a few thousand losses.
    sums = accelerator.reduce(sums.to(accelerator.device, torch.float32)).cpu()
    figures = {}
    for column, objective in enumerate(objectives):
        total, count = sums[:, column].sum(dim=0).tolist()
        if count:
            figures[f"eval/loss_{objective}"] = total / count
    if "eval/loss_text" in figures:
        figures["eval/perplexity_text"] = math.exp(min(figures["eval/loss_text"], 700.0))
    return figures | _losses_of_directions(dict(zip(rows, sums, strict=True)), model.config)


def _losses_of_directions(sums: Mapping[str, torch.Tensor], config: MoTConfig) -> dict[str, float]:
    """The figures of each source and direction, then those of each direction over its sources.

    Args:
        sums: `<source>/<direction>`, or `<direction>`, -> sums of losses and counts of targets, (objectives, 2).
    """
    objectives = objective_names(config)

    # Of each source and direction.
    parts: dict[str, torch.Tensor] = {}
    for name, of_objectives in sums.items():
        direction = name.rpartition("/")[2]
        if direction == INTERLEAVED:
            tokens = [place for place, objective in enumerate(objectives) if objective != DIFFUSION]
            parts[f"{name}/loss"] = of_objectives[tokens].sum(dim=0)
            parts |= {f"{name}/loss_{o}": part for o, part in zip(objectives, of_objectives, strict=True)}
        else:
            parts[f"{name}/loss"] = of_objectives[objectives.index(target_objective(direction, config))]

    # Of each direction: the sources together.
    for name in sums:
        direction = name.rpartition("/")[2]
        if direction not in (name, INTERLEAVED):
            same = [part for key, part in parts.items() if key.endswith(f"/{direction}/loss")]
            parts[f"{direction}/loss"] = torch.stack(same).sum(dim=0)
    means = {key: part.tolist() for key, part in parts.items()}
    return {f"eval/{key}": total / count for key, (total, count) in means.items() if count}


def is_repeated(key: str, figures: Mapping[str, float]) -> bool:
    """True if a figure of `evaluate_losses` is of one source, and its direction's own figure is of no other source."""
    if key.count("/") < 3:
        return False
    _, direction, figure = key.rsplit("/", 2)
    of_sources = [other for other in figures if other.count("/") > 2 and other.endswith(f"/{direction}/{figure}")]
    return f"eval/{direction}/{figure}" in figures and len(of_sources) == 1


def evaluation_note(config: MoTConfig) -> str | None:
    """The remark that belongs beside the held-out losses of this model, or None."""
    if not config.moe_towers:
        return None
    return (
        "The mixture of experts is evaluated with expert choice, as in training and in the paper: experts see later "
        "tokens when they choose, so held-out losses are lower than a causal model could reach."
    )
