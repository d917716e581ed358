"""Estimate what a run will need before it begins: parameters, FLOPs, memory, messages and time.

    python -m training.plan [CONFIG.yaml] [key=value ...] [options]

The figures are for the GPU that --device names (H100 by default), not for the machine that runs the command;
`--device cpu` plans for this machine. The plan needs the configuration alone: no data are read, and the model is built
without weights. CONFIG.yaml and key=value are those of training/train.py.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modeling_mot import MoTConfig, MoTPreTrainedModel, MoTTransfusionConfig
from modeling_mot.configuration_mot import variant_fields
from training.config import ConfigError, one_line
from training.model.building import load_initial, plan_model
from training.model.costs import (
    GPUS,
    Budget,
    forward_flops_per_token,
    leaves_size_open,
    recomputed_flops,
    training_flops,
)
from training.plan.activations import count_kept
from training.plan.cluster import Device, Mesh, find_device, mesh_of_accelerate
from training.plan.communication import Traffic, plan_traffic, seconds_of_traffic
from training.plan.memory import FLOAT, plan_memory
from training.plan.parameters import FROZEN, count_parameters, fsdp_units, meta_model
from training.plan.screen import render
from training.recipe import Recipe, trained_parts
from training.train import load_recipe


# The variants that the paper compares in section 6.1.
COMPARED = ("dense", "moe-4x", "mot")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a request that cannot be met."""
    options = make_parser().parse_intermixed_args(arguments)
    try:
        plan = plan_figures(load_recipe(options.words), options)
        if options.json is not None:
            write_new(Path(options.json), json.dumps(plan, indent=2) + "\n")
    except ConfigError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(render(plan))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="CONFIG.yaml | key=value", help="as for training/train.py")
    add("--world", type=int, metavar="N", help="processes, one to a GPU, that share the model by FSDP2 (default: 1)")
    add("--replicate", type=int, metavar="R", help="hybrid shard: R groups of N / R, each with the whole model")
    add("--accelerate", metavar="FILE", help="an Accelerate configuration, instead of --world and --replicate")
    add("--device", default="H100", metavar="NAME", help=f"cpu (this machine) or {', '.join(GPUS)} (default: H100)")
    add("--utilisation", type=float, default=0.4, help="share of the device's peak while it computes (default: 0.4)")
    add(
        "--network", type=float, default=50.0, metavar="GB/S", help="what a GPU receives from other nodes (default: 50)"
    )
    add("--per-node", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    add(
        "--shares",
        metavar="text=0.5,image=0.5",
        help="modalities' shares of the tokens (default: data.token_shares, else equal)",
    )
    add("--json", metavar="FILE", help="write all figures to a new file, in parameters, bytes, FLOPs and seconds")
    return parser


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet.

    Raises:
        ConfigError: the file exists, or it cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"--json {path} exists; name a new file") from error
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error}") from error


# ------------------------------------------------------------------------------------------------------------- the plan


def plan_figures(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures of a recipe, as JSON values.

    Raises:
        ConfigError: options or keys contradict each other.
    """
    # Options that argparse cannot check.
    for name in ("utilisation", "network", "per_node"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)} must be positive")
    if options.utilisation > 1:
        raise ConfigError(f"--utilisation={options.utilisation} is a share of the device's peak, at most 1")

    # Where the run takes place decides how large a model of open size is; the model decides everything else.
    mesh, checkpointing = _mesh(recipe, options)
    recipe = replace(recipe, train=replace(recipe.train, accumulation=recipe.micro_batches(mesh.world)))
    device = find_device(options.device, recipe.train.precision, mesh.world)
    config = _config(recipe, mesh, device, options.utilisation)
    tokens = _tokens(config, recipe, options.shares)
    return {
        "model": {
            "class": config.model_type,
            "towers": dict(config.towers),
            "experts": dict.fromkeys(config.moe_towers, config.num_experts),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "tower_widths": config.tower_widths,
        },
        "batch": {
            "rows": recipe.train.rows,
            "row_length": recipe.data.row_length,
            "accumulation": recipe.train.accumulation,
            "tokens_of_a_micro_batch": tokens,
            "tokens_of_a_step": sum(tokens.values()) * recipe.train.accumulation * mesh.world,
            "shares": {name: count / sum(tokens.values()) for name, count in tokens.items()},
            "shares_from": _source_of_shares(recipe, options.shares),
            "tokens_of_a_picture": _picture_tokens(config, recipe),
        },
        "mesh": {"world": mesh.world, "replicate": mesh.replicate, "shard": mesh.shard, "described": mesh.describe()},
        "device": vars(device),
        **_figures(recipe, config, tokens, mesh, device, checkpointing, options),
        "comparison": _comparison(config, mesh, device.precision == "bf16", recipe.train.accumulation),
    }


def _mesh(recipe: Recipe, options: argparse.Namespace) -> tuple[Mesh, bool]:
    checkpointing = recipe.model.gradient_checkpointing
    if options.accelerate is None:
        given = {name: getattr(options, name) for name in ("world", "replicate") if getattr(options, name) is not None}
        return Mesh(**given), checkpointing
    if options.world is not None or options.replicate is not None:
        raise ConfigError("--accelerate names the processes already; leave out --world and --replicate")
    mesh, asked = mesh_of_accelerate(options.accelerate)
    return mesh, checkpointing or asked


def _config(recipe: Recipe, mesh: Mesh, device: Device, utilisation: float) -> MoTConfig:
    # A model of open size is made to fit the device; a model of given size is planned whether it fits or not.
    budget = None
    if leaves_size_open(recipe.model):
        budget = Budget.of(recipe, device.memory, device.peak, mesh.world, mesh.shard, utilisation)
    return plan_model(recipe.model, recipe.data, load_initial(recipe.model), budget).config


def _source_of_shares(recipe: Recipe, shares: str | None) -> str:
    if shares is not None:
        return "--shares"
    if recipe.data.token_shares is not None:
        return "data.token_shares"
    return "taken as equal: state them in data.token_shares, or measure them with python -m training.prepare"


def _picture_tokens(config: MoTConfig, recipe: Recipe) -> int | None:
    """Return the tokens of a picture: those that the recipe asks for, else the processor's; None if they differ."""
    if "image" not in config.modalities:
        return None
    if isinstance(config, MoTTransfusionConfig):
        return config.image_length(*config.latent_size)
    return recipe.model.image_tokens or (math.prod(config.image_grid) if config.image_grid else None)


def _tokens(config: MoTConfig, recipe: Recipe, shares: str | None) -> dict[str, int]:
    """Return modality -> tokens of a micro-batch."""
    weights = dict.fromkeys(config.modalities, 1.0)
    if recipe.data.token_shares is not None:
        weights = {name: recipe.data.token_shares.get(name, 0.0) for name in config.modalities}
    if shares is not None:
        try:
            weights |= dict.fromkeys(weights, 0.0) | {
                name.strip(): float(value) for name, value in (pair.split("=") for pair in shares.split(","))
            }
        except ValueError as error:
            raise ConfigError(f"--shares={shares!r} is not modality=share,modality=share") from error
    if set(weights) != set(config.modalities) or min(weights.values()) < 0 or not sum(weights.values()):
        raise ConfigError(f"--shares={shares!r}: shares of {', '.join(config.modalities)}, none negative, not all zero")

    # Each modality gets its share of the tokens that are left, so that roundings do not lose a token.
    left, of_weights, tokens = recipe.train.rows * recipe.data.row_length, sum(weights.values()), {}
    for name, weight in weights.items():
        tokens[name] = round(left * weight / of_weights) if of_weights else 0
        left, of_weights = left - tokens[name], of_weights - weight
    return tokens


def _figures(
    recipe: Recipe,
    config: MoTConfig,
    tokens: Mapping[str, int],
    mesh: Mesh,
    device: Device,
    checkpointing: bool,
    options: argparse.Namespace,
) -> dict[str, Any]:
    # FLOPs of one process in a step.
    train, length = recipe.train, recipe.data.row_length
    trained = trained_parts(train)
    model, bf16 = meta_model(config, **trained), device.precision == "bf16"
    per_token = forward_flops_per_token(config, length)
    flops = (training_flops(config, tokens, length) + changed_flops(model, tokens)) * train.accumulation
    recomputed = recomputed_flops(config, tokens, length) * train.accumulation if checkpointing else 0

    # Memory, with gradient checkpointing and without it.
    kept = count_kept(
        config, tokens, train.rows, bf16=bf16, sharded=mesh.world > 1, attention=recipe.model.attn_implementation,
        trained=trained,
    )  # fmt: skip
    parts = {
        recompute: plan_memory(
            model, kept, sum(tokens.values()), mesh, bf16=bf16, checkpointing=recompute,
            averaged=train.ema_decay is not None,
        )
        for recompute in (False, True)
    }  # fmt: skip

    # Messages, and the time of both if messages are hidden behind products.
    traffic = plan_traffic(fsdp_units(model, mesh.reshard), mesh, bf16, train.accumulation)
    compute = (flops + recomputed) / (device.peak * options.utilisation)
    communication = seconds_of_traffic(traffic, mesh, options.network * 1e9, device.link, options.per_node)
    step = max(compute, communication)
    return {
        "parameters": _parameters(model),
        "flops": {
            "forward_per_token": per_token,
            "training_per_token": {name: 3 * number for name, number in per_token.items()},
            "step_of_a_process": flops,
            "recomputed": recomputed,
        },
        "memory": {
            "checkpointing": checkpointing,
            "parts": parts[checkpointing],
            "total": sum(parts[checkpointing].values()),
            "total_otherwise": sum(parts[not checkpointing].values()),
            "device": device.memory,
        },
        "traffic": _traffic(traffic),
        "time": {
            "utilisation": options.utilisation,
            "network_bytes_per_second": options.network * 1e9,
            "compute_seconds": compute,
            "communication_seconds": communication,
            "step_seconds": step,
            "step_seconds_nothing_hidden": compute + communication,
            "mfu": flops / (step * device.peak),
            "tokens_per_second": sum(tokens.values()) * train.accumulation * mesh.world / step,
            "steps": train.steps,
            "run_seconds": train.steps * step,
        },
    }


def _parameters(model: MoTPreTrainedModel) -> dict[str, Any]:
    """Parameters of a model by part and by tower, with those of a frozen VAE apart."""
    counts = count_parameters(model)
    frozen = sum(counts.pop(FROZEN, {}).values())
    by_tower: dict[str, int] = {}
    for towers in counts.values():
        for tower, number in towers.items():
            by_tower[tower] = by_tower.get(tower, 0) + number
    return {
        "total": sum(by_tower.values()),
        "active": model.config.num_parameters(active=True),
        "trained": sum(value.numel() for value in model.parameters() if value.requires_grad),
        "frozen": frozen,
        "by_tower": by_tower,
        "by_part": {part: dict(towers) for part, towers in counts.items()},
    }


def changed_flops(model: MoTPreTrainedModel, tokens: Mapping[str, int]) -> int:
    """Count the FLOPs of a micro-batch that adapters add to a training step, less those that frozen weights save.

    A frozen linear layer has no product for the gradient of its weight. An adapter has the three products of any layer.
    """
    towers = model.config.towers
    counts = {name: sum(n for modality, n in tokens.items() if towers[modality] == name) for name in towers.values()}
    changed = 0
    for name, value in model.named_parameters():
        if value.ndim != 2 or not name.startswith(("model.layers.", "lm_head.")) or name.endswith(".scale"):
            continue
        used = next((counts[word] for word in name.split(".") if word in counts), sum(tokens.values()))
        changed += (6 if ".lora_" in name else 0 if value.requires_grad else -2) * used * value.numel()
    return changed


def _traffic(traffic: Traffic) -> dict[str, int]:
    return vars(traffic) | {"total": traffic.total}


def _comparison(config: MoTConfig, mesh: Mesh, bf16: bool, accumulation: int) -> dict[str, dict]:
    """Compare the variants of `COMPARED` at the same sizes: parameters, and bytes of training state and of messages.

    The sizes are those of the model, which a tower may differ from.
    """
    rows = {}
    for variant in COMPARED:
        fields = config.to_dict()
        for name in ("towers", "tower_configs", "untied", "moe_towers"):
            fields.pop(name)
        other = type(config).from_dict(fields | variant_fields(variant, config.modalities))
        units = fsdp_units(meta_model(other), mesh.reshard)
        rows[variant] = {
            "total": other.num_parameters(),
            "active": other.num_parameters(active=True),
            "state_bytes": 4 * FLOAT * sum(unit.shard_numel(mesh.shard) for unit in units),
            "received_bytes": plan_traffic(units, mesh, bf16, accumulation).total,
        }
    return rows


if __name__ == "__main__":
    sys.exit(main())
