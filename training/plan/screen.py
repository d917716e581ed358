"""A plan as text, for the screen."""

from collections.abc import Iterable, Sequence
from typing import Any

from training.model.costs import GPUS


def render(plan: dict[str, Any]) -> str:
    """Return the tables that `python -m training.plan` prints; `plan` is the result of `plan_figures`."""
    sections = (_parameters, _flops, _memory, _traffic, _time, _comparison)
    return "\n\n".join([_heading(plan), *("\n".join(section(plan)) for section in sections)])


def _heading(plan: dict) -> str:
    batch, mesh, model = plan["batch"], plan["mesh"], plan["model"]
    processes = f"{mesh['world']} process" + "es" * (mesh["world"] > 1)
    mixture = ", ".join(f"{name} {count}" for name, count in batch["tokens_of_a_micro_batch"].items())
    widths = ", ".join(f"{tower} {width}" for tower, width in model["tower_widths"].items()) or model["hidden_size"]
    return "\n".join(
        [
            *_device(plan["device"]),
            f"{model['class']}: {model['layers']} layers of {widths}, towers "
            + ", ".join(f"{modality}: {tower}" for modality, tower in model["towers"].items())
            + "".join(f", {count} experts in {tower}" for tower, count in model["experts"].items()),
            mesh["described"],
            f"{batch['rows']} rows of {batch['row_length']:,} x {batch['accumulation']} micro-batches x "
            f"{processes} = {batch['tokens_of_a_step']:,} tokens a step; a micro-batch: {mixture}",
            _shares(batch),
        ]
    )


def _shares(batch: dict) -> str:
    """Say how the modalities share the tokens, and what a row of this mixture holds."""
    shares, length = batch["shares"], batch["row_length"]
    of_row = [f"{name} {share * length:,.0f}" for name, share in shares.items()]
    if (size := batch["tokens_of_a_picture"]) is not None:
        of_row.append(f"{shares['image'] * length / size:.1f} pictures of {size:,} tokens")
    stated = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return f"shares of the tokens: {stated} ({batch['shares_from']}); a row of {length:,}: {', '.join(of_row)}"


def _device(device: dict) -> Iterable[str]:
    """Say which device the figures are for: the default is a GPU, whatever machine runs the command."""
    peak = f"{device['peak'] / 1e12:,.4g} TFLOP/s ({device['source']})"
    where = "this machine's CPU" if device["name"] == "CPU" else f"{device['name']}, not for this machine"
    yield f"planned for {where}: {peak}"
    yield f"others with --device: cpu (this machine), {', '.join(GPUS)}"


def _parameters(plan: dict) -> Iterable[str]:
    figures = plan["parameters"]
    towers = list(figures["by_tower"])
    rows = [
        [part, *(by_tower.get(tower, 0) for tower in towers), sum(by_tower.values())]
        for part, by_tower in figures["by_part"].items()
    ]
    rows.append(["all", *figures["by_tower"].values(), figures["total"]])
    yield from table(["parameters", *towers, "total"], [[row[0], *map(_grouped, row[1:])] for row in rows])
    if "shared" in towers:
        yield "shared: used by the tokens of every tower"
    if figures["trained"] < figures["total"]:
        yield f"trained: {figures['trained']:,}, {figures['trained'] / figures['total']:.2%} of them"
    yield f"active, of one token: {figures['active']:,}" + (
        f"; a frozen VAE of {figures['frozen']:,} beside them" if figures["frozen"] else ""
    )


def _flops(plan: dict) -> Iterable[str]:
    forward, training = plan["flops"]["forward_per_token"], plan["flops"]["training_per_token"]
    rows = [[name, _grouped(forward[name]), _grouped(training[name])] for name in forward]
    yield from table(["FLOPs per token", "forward", "training"], rows)


def _memory(plan: dict) -> Iterable[str]:
    memory = plan["memory"]
    rows = [[part, in_bytes(number)] for part, number in memory["parts"].items()]
    yield from table(["memory of a process, estimated", ""], [*rows, ["all", in_bytes(memory["total"])]])
    other = "without" if memory["checkpointing"] else "with"
    yield f"{other} model.gradient_checkpointing: {in_bytes(memory['total_otherwise'])}"
    if memory["device"] is not None:
        share = memory["total"] / memory["device"]
        verdict = (
            "does not fit" if share > 1 else "fits barely: the allocator and NCCL need some" if share > 0.9 else "fits"
        )
        yield f"{verdict}: {share:.0%} of {in_bytes(memory['device'])}"


def _traffic(plan: dict) -> Iterable[str]:
    if plan["mesh"]["world"] == 1:
        yield "one process sends nothing"
        return
    names = {
        "gather_forward": "parameters gathered for the forward",
        "gather_backward": "parameters gathered for the backward",
        "reduce_scatter": "gradients reduced and scattered",
        "all_reduce": "gradients summed over groups",
        "total": "all",
    }
    rows = [[name, in_bytes(plan["traffic"][key])] for key, name in names.items()]
    yield from table(["received by a process in a step", ""], rows)


def _time(plan: dict) -> Iterable[str]:
    time = plan["time"]
    rows = [
        [f"products, at {time['utilisation']:.0%} of the peak", f"{time['compute_seconds']:.4g} s"],
        ["messages", f"{time['communication_seconds']:.4g} s"],
        ["step, messages hidden behind products", f"{time['step_seconds']:.4g} s"],
        ["step, nothing hidden", f"{time['step_seconds_nothing_hidden']:.4g} s"],
        ["MFU", f"{time['mfu']:.1%}"],
        ["tokens/s", f"{time['tokens_per_second']:,.0f}"],
        [f"{time['steps']:,} steps", seconds_in_words(time["run_seconds"])],
    ]
    yield from table([f"time on {plan['device']['name']}, estimated", ""], rows)
    yield "small models take longer: the time to start each operation on the device is not counted"


def _comparison(plan: dict) -> Iterable[str]:
    figures = plan["comparison"]
    yield "for comparison, as in section 6.1 of the paper: a model of the same sizes as each variant"
    rows = [
        [name, _grouped(row["total"]), _grouped(row["active"]), in_bytes(row["state_bytes"])]
        + [in_bytes(row["received_bytes"]), f"{row['total'] / figures['dense']['total']:.2f}"]
        for name, row in figures.items()
    ]
    header = ["variant", "total", "active", "state of a process", "received in a step", "total / dense"]
    yield from table(header, rows)

    # The order of the variants, in one line.
    key, what = ("received_bytes", "bytes moved in a step") if plan["mesh"]["world"] > 1 else ("total", "parameters")
    order = sorted(figures, key=lambda name: figures[name][key])
    values = [figures[name][key] for name in order]
    signs = ["<" if after > 1.01 * before else "~" for before, after in zip(values, values[1:])]
    chain = " ".join(word for pair in zip(order, [*signs, ""]) for word in pair).strip()
    yield f"from least to most {what}: {chain}" + (" (~: within 1 %)" if "~" in signs else "")


# -------------------------------------------------------------------------------------------------------------- figures


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table, with the first column to the left and all others to the right."""
    rows = [header, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def in_bytes(number: float) -> str:
    """Write bytes in decimal units, as memory and networks are sold: 1 GB = 10^9."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def seconds_in_words(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _grouped(number: int) -> str:
    return f"{number:,}" if number else "-"
