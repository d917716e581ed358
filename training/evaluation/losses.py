"""Held-out loss per modality and per direction.

Every direction holds documents of one order (text then image, image then text, ...) with targets on the second segment
only, so that a figure means one thing: how well pictures are predicted from names, names from pictures, and so on.

A mixture of experts is evaluated with expert choice, as the paper does (section 3.2.1): its experts see later tokens
when they choose, so its figures flatter it; `evaluation_note` says so wherever the figures are shown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from modeling_mot import MoTConfig, MoTForCausalLM
from training.config import option


@dataclass
class EvaluationConfig:
    """When and on how much the held-out losses are measured."""

    every: int = option(0, "steps between evaluations; 0: only at the end")
    rows: int = option(32, "most rows of each direction")
    batch_rows: int = option(8, "rows of one forward")

    def __post_init__(self):
        if self.every < 0 or self.rows < 0 or self.batch_rows < 1:
            raise ValueError(
                f"every={self.every} and rows={self.rows} must not be negative, batch_rows={self.batch_rows} at least 1"
            )


def target_modality(direction: str) -> str:
    """`image` of "text-to-image", `text` of "text"."""
    return direction.rpartition("-to-")[2]


@torch.no_grad()
def evaluate_losses(
    model: MoTForCausalLM,
    rows: Mapping[str, Sequence[dict]],
    collate: Callable[[Sequence[dict]], dict],
    config: EvaluationConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean loss in nats per target: `eval/loss_<modality>` over all directions, and `eval/<direction>/loss`.

    Args:
        model: in evaluation mode.
        rows: direction -> packed rows, the same on every rank; the batches are shared out between ranks.
        collate: rows -> a batch of tensors.

    A direction's loss is that of its target modality; the end marker of an image is text and counts there. A key
    without any target is left out.
    """
    modalities = list(model.config.modalities)
    sums = torch.zeros(len(rows), len(modalities), 2, dtype=torch.float64)
    for index, direction_rows in enumerate(rows.values()):
        starts = range(0, len(direction_rows), config.batch_rows)
        for start in starts[accelerator.process_index :: accelerator.num_processes]:
            batch = send_to_device(collate(direction_rows[start : start + config.batch_rows]), accelerator.device)
            with accelerator.autocast():
                output = model(**batch)
            for column, modality in enumerate(modalities):
                sums[index, column, 0] += output.loss_sums[modality].double().cpu()
                sums[index, column, 1] += output.loss_counts[modality].cpu()
    # MPS has no float64; the figures are sums of few thousand losses, float32 holds them.
    sums = accelerator.reduce(sums.to(accelerator.device, torch.float32)).cpu()
    figures = {}
    for column, modality in enumerate(modalities):
        total, count = sums[:, column].sum(dim=0).tolist()
        if count:
            figures[f"eval/loss_{modality}"] = total / count
    for index, direction in enumerate(rows):
        total, count = sums[index, modalities.index(target_modality(direction))].tolist()
        if count:
            figures[f"eval/{direction}/loss"] = total / count
    return figures


def evaluation_note(config: MoTConfig) -> str | None:
    """What must be said beside the held-out losses of this model, or None."""
    if not config.moe_towers:
        return None
    return (
        "The mixture of experts is evaluated with expert choice, as in training and in the paper: experts see later "
        "tokens when they choose, so held-out losses are lower than a causal model could reach."
    )
