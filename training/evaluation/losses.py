"""Measure held-out losses by modality, by source and by direction.

Each direction holds documents of one order (text then image, image then text, ...) with targets on the second segment
only. So a figure means one thing: how well pictures are predicted from names, names from pictures, and so on.

A mixture of experts is evaluated with expert choice, as in the paper (section 3.2.1). Its experts see later tokens when
they choose, which flatters its figures; `evaluation_note` says so wherever the figures are shown.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from modeling_mot import MoTConfig, MoTPreTrainedModel
from training.data.collate import latent_sizes, seed_of
from training.data.documents import is_transfusion
from training.data.rows import INTERLEAVED
from training.optimization import DIFFUSION, objective_names
from training.recipe import EvaluationConfig


def target_objective(direction: str, config: MoTConfig) -> str | None:
    """Return the objective of a direction: `image` of "text-to-image" (or `image_diffusion`), `text` of "text".

    The name of a source may stand before the direction: "emoji/text-to-image". Interleaved documents have several
    objectives, and None is returned.
    """
    if direction.rpartition("/")[2] == INTERLEAVED:
        return None
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
    that have the direction) and, for text, `eval/perplexity_text`. Interleaved documents have several targets:
    `eval/<source>/interleaved/loss_<modality>` is the loss of one modality, and `eval/<source>/interleaved/loss` is
    that of all tokens.

    For images that are diffused `eval/loss_image_diffusion` is the mean squared error per element, at drawn noise
    levels. Their direction also has `eval/<direction>/diffusion_validation_loss`, the mean of the losses at the fixed
    levels of `noise_levels`, and each of these with its level, such as
    `eval/text-to-image/diffusion_validation_loss@62`; each source of the direction has the same.

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
    # Sums and counts by direction and objective, and by direction and noise level: each rank's share of the batches.
    objectives, levels = objective_names(model.config), noise_levels(model.config, config.noise_levels)
    sums = torch.zeros(len(rows), len(objectives) + len(levels), 2, dtype=torch.float64)
    first_number = 0
    for index, (direction, direction_rows) in enumerate(rows.items()):
        is_diffused = target_objective(direction, model.config) == DIFFUSION
        starts = range(0, len(direction_rows), config.batch_rows)
        for turn in range(-(-len(starts) // accelerator.num_processes)):
            if stops():
                return None
            # Ranks of a sharded model run together: a rank that has no batch left repeats the first, uncounted.
            place = turn * accelerator.num_processes + accelerator.process_index
            start, counted = (starts[place], 1) if place < len(starts) else (0, 0)
            some = direction_rows[start : start + config.batch_rows]
            numbers = range(first_number + start, first_number + start + len(some))
            batch = collate(some, row_numbers=numbers)

            # The drawn noise levels, then each of the fixed ones.
            at_levels = batches_at_levels(some, batch, model.config, levels) if is_diffused else ()
            for position, noised in enumerate((batch, *at_levels)):
                with accelerator.autocast():
                    output = model(**send_to_device(noised, accelerator.device), use_cache=False, skip_logits=True)
                measured = enumerate(objectives) if position == 0 else [(len(objectives) + position - 1, DIFFUSION)]
                for column, objective in measured:
                    sums[index, column, 0] += counted * output.loss_sums[objective].double().cpu()
                    sums[index, column, 1] += counted * output.loss_counts[objective].cpu()
        first_number += len(direction_rows)

    # The means over all ranks. MPS has no float64; float32 holds sums of a few thousand losses.
    sums = accelerator.reduce(sums.to(accelerator.device, torch.float32)).cpu()
    return _figures(sums, list(rows), objectives, levels, model.config)


def _figures(
    sums: torch.Tensor, directions: list[str], objectives: list[str], levels: list[int | float], config: MoTConfig
) -> dict[str, float]:
    """Name the means of sums and counts, (directions, objectives + levels, 2); see `evaluate_losses`."""
    # By objective, over all directions.
    figures = {}
    for column, objective in enumerate(objectives):
        total, count = sums[:, column].sum(dim=0).tolist()
        if count:
            figures[f"eval/loss_{objective}"] = total / count
    if "eval/loss_text" in figures:
        figures["eval/perplexity_text"] = math.exp(min(figures["eval/loss_text"], 700.0))
    return figures | _losses_of_directions(dict(zip(directions, sums, strict=True)), levels, config)


def _losses_of_directions(
    sums: Mapping[str, torch.Tensor], levels: list[int | float], config: MoTConfig
) -> dict[str, float]:
    """Name the figures of each source and direction, then those of each direction over its sources.

    Args:
        sums: `<source>/<direction>`, or `<direction>`, -> sums of losses and counts of targets,
            (objectives + levels, 2).
    """
    objectives = objective_names(config)

    # Of each direction: the sources together.
    together: dict[str, torch.Tensor] = {}
    for name, of_source in sums.items():
        direction = name.rpartition("/")[2]
        if direction not in (name, INTERLEAVED):
            together[direction] = together.get(direction, 0) + of_source

    figures = {}
    for name, part in (dict(sums) | together).items():
        of_objectives, of_levels = part[: len(objectives)], part[len(objectives) :]
        target = target_objective(name, config)
        if target is None:  # interleaved documents: each objective, and all tokens
            means = {f"loss_{one}": sums for one, sums in zip(objectives, of_objectives, strict=True)}
            means["loss"] = of_objectives[[one != DIFFUSION for one in objectives]].sum(dim=0)
        else:
            means = {"loss": of_objectives[objectives.index(target)]}
        pairs = {key: mean.tolist() for key, mean in means.items()}
        figures |= {f"eval/{name}/{key}": total / count for key, (total, count) in pairs.items() if count}

        # By noise level.
        at_levels = [total / count for total, count in of_levels.tolist() if count]
        if at_levels:
            key = f"eval/{name}/diffusion_validation_loss"
            figures[key] = sum(at_levels) / len(at_levels)
            figures |= {f"{key}@{int(level)}": loss for level, loss in zip(levels, at_levels)}
    return figures


def is_repeated(key: str, figures: Mapping[str, float]) -> bool:
    """Return True if a figure of `evaluate_losses` is one source's, and no other source has its direction."""
    if key.count("/") < 3:
        return False
    _, direction, figure = key.rsplit("/", 2)
    of_sources = [other for other in figures if other.count("/") > 2 and other.endswith(f"/{direction}/{figure}")]
    return f"eval/{direction}/{figure}" in figures and len(of_sources) == 1


# ------------------------------------------------------------------------------------ diffusion at fixed noise levels


def noise_levels(config: MoTConfig, number: int) -> list[int | float]:
    """Space noise levels evenly, at the middles of `number` equal parts of the schedule; none for a model of tokens.

    The paper reports "the diffusion validation loss following SD 3" (section 3.4; arXiv 2403.03206): the same levels
    and the same noise for every model, so that a difference between two losses is one between the models. The middles
    leave out the two ends, clean images and pure noise.

    Returns:
        Integers, or floats for rectified flow; at most one for each of the schedule's levels.
    """
    if not is_transfusion(config):
        return []
    schedule = config.num_train_timesteps
    number = min(number, schedule)
    middles = [(place + 0.5) * schedule / number for place in range(number)]
    return middles if config.is_flow else [int(level) for level in middles]


def batches_at_levels(
    rows: Sequence[dict], batch: dict, config: MoTConfig, levels: Sequence[int | float]
) -> Iterator[dict]:
    """Give a batch of `collate` at one noise level after another; clean images stay clean.

    An image has the same noise at all levels. The noise follows from the image alone: not from its row, the batch, or
    the number of processes.
    """
    clean = batch.get("clean_images")
    if clean is None:  # as many forwards as on ranks with images
        yield from [batch] * len(levels)
        return
    images = [image for row in rows for image in row.get("images", ())]
    sizes = latent_sizes(batch, config)
    noise = torch.zeros(len(images), config.latent_channels, *map(max, zip(*sizes)))
    for own, image, (height, width) in zip(noise, images, sizes, strict=True):
        values = np.ascontiguousarray(image["values"])
        digest = hashlib.sha256(f"{values.shape} {values.dtype} ".encode() + values.tobytes()).hexdigest()
        generator = torch.Generator().manual_seed(seed_of(f"diffusion validation/{digest}"))
        own[:, :height, :width] = torch.randn(config.latent_channels, height, width, generator=generator)
    noise = noise.masked_fill(clean.view(-1, 1, 1, 1), 0)
    for level in levels:
        yield batch | {"timesteps": torch.full(clean.shape, level).masked_fill(clean, 0), "noise": noise}


def evaluation_note(config: MoTConfig) -> str | None:
    """Return the remark that belongs beside the held-out losses of this model, or None."""
    if not config.moe_towers:
        return None
    return (
        "The mixture of experts is evaluated with expert choice, as in training and in the paper: experts see later "
        "tokens when they choose, so held-out losses are lower than a causal model could reach."
    )
