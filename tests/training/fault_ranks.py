"""One of two ranks to which something happens; `python -m tests.training.fault_ranks FOLDER` is started twice."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.faults.stages import at
from training import trainer as trainer_module
from training.optimization import NotFiniteError
from training.trainer import whole
from training.world import Interrupted

from .tiny import tiny_trainer


RANK = int(os.environ.get("RANK", 0))
TIMEOUT = 5.0


def parameters(trainer) -> list[float]:
    """The sums of all parameters, which no update leaves alone."""
    return [whole(value.detach()).double().sum().item() for value in trainer.trained.values()]


def not_finite(folder: Path) -> dict:
    """The loss is NaN on rank 1 in step 2, a gradient infinite on rank 0 in step 4."""
    trainer, before = tiny_trainer(folder, steps=6), []
    combine, train_step = trainer_module.combine, trainer.train_step

    def broken(*arguments):
        loss = combine(*arguments)
        if (RANK, trainer.step + 1) == (1, 2):
            loss = loss * float("nan")
        if (RANK, trainer.step + 1) == (0, 4):
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    def noted(batches):
        before.append(parameters(trainer))
        return train_step(batches)

    trainer_module.combine, trainer.train_step = broken, noted
    trainer.fit()
    trainer_module.combine = combine
    before.append(parameters(trainer))
    unchanged = [step for step in range(1, 7) if before[step - 1] == before[step]]
    return {"unchanged": unchanged, "skipped": trainer.guard.skipped}


def never_finite(folder: Path) -> dict:
    """The loss is NaN on rank 1 from step 2 on."""
    trainer, combine = tiny_trainer(folder, steps=20, not_finite_limit=3), trainer_module.combine
    trainer_module.combine = lambda *arguments: (
        combine(*arguments) * (float("nan") if RANK == 1 and trainer.step >= 1 else 1)
    )
    try:
        trainer.fit()
    except NotFiniteError as error:
        return {"step": trainer.step, "saved": trainer.run.saved_steps(), "error": str(error)}
    finally:
        trainer_module.combine = combine
    return {}


def late_signal(folder: Path) -> dict:
    """A signal comes to rank 0 alone, when it has already said that there is none and waits for the others."""
    trainer = tiny_trainer(folder, steps=20)
    reduce = trainer.accelerator.reduce

    def interrupted(tensor, *arguments):
        if RANK == 0 and trainer.step == 3:
            trainer.stop_signal.number = signal.SIGTERM
        return reduce(tensor, *arguments)

    trainer.accelerator.reduce = interrupted
    try:
        trainer.fit()
    except Interrupted as error:
        return {"step": trainer.step, "saved": trainer.run.saved_steps(), "code": error.exit_code}
    return {}


def full_disk(folder: Path) -> dict:
    """Rank 1 cannot write its shard of the second checkpoint, saved beside the training."""
    trainer = tiny_trainer(folder, steps=6, save_every=2, save_asynchronously=True, keep_checkpoints=9)
    failed: list[str] = []

    def full():
        if RANK == 1 and (trainer.run.checkpoints / ".step-00000004.tmp").exists():
            raise OSError(28, "No space left on device")

    trainer._save_failed = lambda error: failed.append(str(error))
    with at("half of a shard written", full):
        trainer.fit()
    return {"saved": trainer.run.saved_steps(), "failed": failed, "left": sorted(os.listdir(trainer.run.checkpoints))}


def stopped_rank(folder: Path) -> dict:
    """Rank 1 is stopped in step 3 and does not go on."""
    trainer = tiny_trainer(folder, steps=8, save_every=2)
    for group in (dist.group.WORLD, trainer.checkpointer.group):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT), group)
    seed_forward = trainer.seed_forward

    def stop(index):
        if RANK == 1 and trainer.step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        seed_forward(index)

    trainer.seed_forward = stop
    trainer.fit()
    return {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    for scenario in (not_finite, never_finite, late_signal, full_disk, stopped_rank):
        place = base / scenario.__name__
        outcome = scenario(place)
        (place / f"outcome-{RANK}.json").write_text(json.dumps(outcome), encoding="utf-8")
