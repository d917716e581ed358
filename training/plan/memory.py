"""Estimate the memory of one process at its fullest, which is early in the backward, by part.

Tensors that live for one operator only are not counted. All gradients are, though few exist so early.
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
    """Return part -> bytes, of the process that holds most.

    Trained parameters, their gradients, AdamW's two moments and the moving average are float32 and sharded; a frozen
    VAE is whole everywhere. Other frozen weights have no gradient, and the precision that the recipe gives them. FSDP2
    gathers units (`fsdp_units`): all units that stay, and two others at a time, since one computes while the next
    arrives. A gradient has the precision of products until it is reduced in float32.

    Args:
        model: the model on the meta device, as it is trained.
        kept: bytes that the forward of a micro-batch of `tokens` tokens keeps.
        averaged: whether the run keeps a moving average of the weights.
    """
    # The state of training, float32 and sharded.
    config: MoTConfig = model.config
    units = fsdp_units(model, mesh.reshard)
    own = sum(unit.shard_numel(mesh.shard) for unit in fsdp_units(model, trained=True))
    frozen = FLOAT * (sum(unit.shard_numel(mesh.shard) for unit in units) - own)
    if mesh.world == 1:
        held = [
            value for name, value in model.named_parameters() if not (value.requires_grad or name.startswith("vae."))
        ]
        frozen = sum(value.numel() * value.itemsize for value in held)
    compute = BF16 if bf16 else FLOAT
    parts = {
        "weights (float32)": FLOAT * own,
        "gradients (float32)": FLOAT * own,
        "optimizer (AdamW, 2 x float32)": 2 * FLOAT * own,
    }
    if frozen:
        parts["frozen weights"] = frozen
    if averaged:
        parts["moving average (float32)"] = FLOAT * own
    if (vae := getattr(model, "vae", None)) is not None:
        parts["VAE (frozen, whole)"] = FLOAT * sum(parameter.numel() for parameter in vae.parameters())

    # Weights in the precision of products: gathered by FSDP, or cast by autocast.
    if mesh.world > 1:
        staying = sum(unit.numel for unit in units if unit.stays)
        passing = sorted((unit.numel for unit in units if not unit.stays), reverse=True)
        parts["gathered units"] = compute * (staying + sum(passing[:2]))
        parts["gradients being reduced"] = (compute + FLOAT) * max(unit.numel for unit in units)
    elif kept.copies:
        parts["weights cast to bf16"] = kept.copies

    # Activations, and the tensors of the loss or of the layer that is recomputed.
    parts["activations"] = kept.of_model(config.num_hidden_layers, checkpointing)
    loss = loss_bytes(config, tokens, bf16)
    if checkpointing:
        # When a layer is recomputed, only the logits are left of the loss, since the model's output holds them. The
        # widest gradients are then those of a SwiGLU's three inner tensors, or of the two of one without a gate.
        towers = map(config.tower_config, config.part_names("feed_forward"))
        inner = max((3 if tower.gated_mlp else 2) * tower.intermediate_size for tower in towers)
        recomputed = kept.layer + tokens * (config.vocab_size + inner) * compute
        parts["loss, or the layer recomputed"] = max(loss, recomputed)
    else:
        parts["logits and loss"] = loss
    return parts
