"""Ranks that are not alike; `python -m tests.training.different_ranks recipe|poisoned ...` is one of them."""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from training.optimization import NotFiniteError


ROOT = Path(__file__).resolve().parents[2]


def recipe(folder: str, *words: str) -> int:
    """The trainer's exit code; the words are those of the last rank alone."""
    from training.train import main

    alone = words if os.environ["RANK"] == "1" else ()
    return main([str(ROOT / "training" / "configs" / "smoke.yaml"), f"train.output_dir={folder}", *alone])


def poisoned(folder: str) -> int:
    """A single value of the last rank's part of the parameters becomes NaN in the second update, without a trace in the
    loss; 0 where every rank ends with the error that names it."""
    from .tiny import tiny_trainer

    torch.set_num_threads(1)
    trainer = tiny_trainer(Path(folder), rows=4, steps=4, save_every=1)
    name = "model.layers.1.mlp.speech.down_proj.weight"
    weight, step = trainer.trained[name], trainer.optimizer.step
    assert isinstance(weight, DTensor)

    def update():
        step()
        if trainer.step == 1 and os.environ["RANK"] == "1":
            weight.to_local().data[-1, -1] = float("nan")

    trainer.optimizer.step = update
    try:
        trainer.fit()
    except NotFiniteError as error:
        assert name in str(error) and "the checkpoint of step 1 is the newest" in str(error), error
        assert trainer.run.saved_steps() == [1]
        return 0
    return 1


if __name__ == "__main__":
    sys.exit({"recipe": recipe, "poisoned": poisoned}[sys.argv[1]](*sys.argv[2:]))
