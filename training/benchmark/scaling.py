"""Time a step as towers, row length, rows and imbalance grow, beside the FLOPs of the step."""

import torch

from training.benchmark.peers import SIZES, build_llama, build_mot, made_up_batch
from training.benchmark.rounds import compare, interleave
from training.benchmark.train import step
from training.model.costs import training_flops


VOCAB_SIZE = 8192


def settings(towers: int) -> list[dict]:
    """List settings that each change one thing of the base: `towers` towers with equal shares, 4 rows of 512."""
    base = {"towers": towers, "rows": 4, "length": 512, "shares": None}
    varied = [("towers", number) for number in (1, 2, 3, 4, 8)]
    varied += [("length", length) for length in (256, 1024, 2048, 4096)]
    varied += [("rows", rows) for rows in (1, 8, 16)]
    if towers > 1:
        varied += [("shares", [share, *[(1 - share) / (towers - 1)] * (towers - 1)]) for share in (0.9, 0.99, 1.0)]
    return [base | {name: value} for name, value in varied]


def time_scaling(size: str, dtype: torch.dtype, towers: int, rounds: int) -> dict:
    """Time forward and backward of `mot` and `llama` for each setting.

    Returns:
        dict: setting -> the figures of `compare`, the analytic `flops`, and the `flops_per_second` of the MoT.
    """
    llama = build_llama(SIZES[size], dtype, VOCAB_SIZE)
    figures = {}
    for setting in settings(towers):
        number, rows, length = setting["towers"], setting["rows"], setting["length"]
        mot = build_mot(llama, SIZES[size], number)
        batch = made_up_batch(rows, length, VOCAB_SIZE, number, setting["shares"])
        calls = {"mot": lambda mot=mot, batch=batch: step(mot, batch), "llama": lambda batch=batch: step(llama, batch)}
        # Long steps are less noisy, so fewer rounds do.
        turns = max(2, rounds * 2048 // max(rows * length, 2048))
        compared = compare(interleave(calls, turns, warm_up=2), [("mot", "llama")])

        # FLOPs depend on how many tokens each tower got.
        counts = batch["modality_ids"].flatten().bincount(minlength=number).tolist()
        flops = training_flops(mot.config, dict(zip(mot.config.modalities, counts, strict=True)), length)
        name = f"{number} tower{'s' * (number > 1)}, {rows} x {length}"
        if setting["shares"]:
            name += f", shares {[round(share, 3) for share in setting['shares']]}"
        figures[name] = compared | {"flops": flops, "flops_per_second": flops / compared["seconds"]["mot"]}
    return figures
