"""Memory of one process at its fullest, which is early in the backward, by part.

What is there only for the time of an operator is not counted, but gradients are, of which few exist so early.
"""

from modeling_mot import MoTConfig, MoTPreTrainedModel
from training.plan.activations import Kept, loss_bytes
from training.plan.cluster import Mesh
from training.plan.parameters import fsdp_units


FLOAT, BF16 = 4, 2


def plan_memory(
    model: MoTPreTrainedModel,
    kept: Kept,
    tokens: int,
    mesh: Mesh,
    *,
    bf16: bool,
    checkpointing: bool,
    averaged: bool,
) -> dict[str, int]:
    """Part -> bytes of the process that holds most.

    Parameters, gradients, AdamW's two moments and the moving average are float32 and sharded; a frozen VAE is whole
    everywhere. Of the units of FSDP2 (`fsdp_units`) what stays is gathered at once, and of the others two: one computes
    while the next comes. A gradient is in the precision of products until it is reduced in float32.

    Args:
        model: on the meta device.
        kept: of the forward of a micro-batch of `tokens` tokens.
        averaged: whether there is a moving average of the weights.
    """
    config: MoTConfig = model.config
    units = fsdp_units(model, mesh.reshard)
    own = sum(unit.shard_numel(mesh.shard) for unit in units)
    compute = BF16 if bf16 else FLOAT
    parts = {
        "weights (float32)": FLOAT * own,
        "gradients (float32)": FLOAT * own,
        "optimizer (AdamW, 2 x float32)": 2 * FLOAT * own,
    }
    if averaged:
        parts["moving average (float32)"] = FLOAT * own
    if (vae := getattr(model, "vae", None)) is not None:
        parts["VAE (frozen, whole)"] = FLOAT * sum(parameter.numel() for parameter in vae.parameters())
    if mesh.world > 1:
        staying = sum(unit.numel for unit in units if unit.stays)
        passing = sorted((unit.numel for unit in units if not unit.stays), reverse=True)
        parts["gathered units"] = compute * (staying + sum(passing[:2]))
        parts["gradients being reduced"] = (compute + FLOAT) * max(unit.numel for unit in units)
    elif kept.copies:
        parts["weights cast to bf16"] = kept.copies
    parts["activations"] = kept.of_model(config.num_hidden_layers, checkpointing)
    loss = loss_bytes(config, tokens, bf16)
    if checkpointing:
        # By then only the logits are left of the loss, which the model's output holds; and the widest gradients are
        # those of a SwiGLU's three inner tensors.
        recomputed = kept.layer + tokens * (config.vocab_size + 3 * config.intermediate_size) * compute
        parts["loss, or the layer recomputed"] = max(loss, recomputed)
    else:
        parts["logits and loss"] = loss
    return parts
