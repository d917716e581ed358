"""Small trainings in several processes over gloo; `python -m tests.training.ranks FOLDER SCENARIO ...` is one."""

import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.run_files.checkpoints import newest_intact
from training.trainer import whole
from training.world import Interrupted

from .plans import IMAGE_TOWER
from .tiny import MadeUpStream, tiny_model, tiny_trainer
from .tiny_transfusion import OPTIMIZER, transfusion_trainer


ROOT = Path(__file__).resolve().parents[2]


ROWS = 8  # of a step


class Lopsided(MadeUpStream):
    """Of every eight rows the first four are text alone, or all of them: of two ranks, one or both lack modalities."""

    def __init__(self, all_alike: bool = False):
        super().__init__()
        self.all_alike = all_alike

    def row(self, index: int) -> dict:
        alone = self.all_alike or index % 8 < 4
        return MadeUpStream(modalities=("text",) if alone else ("text", "image", "speech")).row(index)


def make(name: str, folder: Path, rows: int, accumulation: int = 1, **options):
    """The trainer of a scenario, in a world whose size x rows x accumulation is ROWS."""
    split = {"rows": rows, "accumulation": accumulation, "optimizer": OPTIMIZER, "steps": 4}
    if name == "transfusion":
        trainer = transfusion_trainer(folder, ema_decay=0.5, **split, **options)
    else:
        streams = {"lopsided": Lopsided(), "text": Lopsided(all_alike=True)}
        towers = {"image": IMAGE_TOWER, "speech": {"hidden_size": 40}} if name == "towers" else None
        model = tiny_model(tie_word_embeddings=name == "tied", tower_configs=towers)
        if name == "checkpointing":
            model.gradient_checkpointing_enable()
        split |= {"precision": "bf16"} if name == "bf16" else {}
        split |= {"frozen_towers": ["text"], "frozen_vocabulary": 33, "ema_decay": 0.5} if name == "frozen" else {}
        trainer = tiny_trainer(folder, model, streams.get(name, MadeUpStream()), **split, **options)
    trainer.evaluate = lambda model, stops: evaluate(trainer, model)
    return trainer


def evaluate(trainer, model) -> dict[str, float]:
    """The loss on rows that every rank has."""
    output = model(
        **trainer.batches.collate([trainer.batches.stream.row(n) for n in (100, 103)], row_numbers=(100, 103))
    )
    return {"eval/loss_text": (output.loss_sums["text"] / output.loss_counts["text"]).item()}


def go_on(trainer):
    """From the newest checkpoint in its folder."""
    manifest, skipped = newest_intact(trainer.run, trainer.accelerator.process_index, trainer.accelerator.num_processes)
    assert manifest is not None and not skipped
    trainer.resume(manifest)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Over all parameters, relative to the size of each."""
    assert set(left) == set(right)
    return max(float((value - right[name]).norm() / right[name].norm()) for name, value in left.items())


def assert_same_but_for_rounding(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """After a few updates in float32: 1e-6 of the size of all parameters together, and no single one more than 5e-6 of
    its own (biases begin at zero and are small)."""
    assert largest_difference(left, right) < 5e-6
    square = sum(float((value - right[name]).double().square().sum()) for name, value in left.items())
    assert (square / sum(float(value.double().square().sum()) for value in right.values())) ** 0.5 < 1e-6


def stop_at(trainer, step: int, number: int = 15) -> None:
    """Train until a signal comes to this process in a step."""
    train_step = trainer.train_step

    def and_signal(batches):
        figures = train_step(batches)
        if trainer.step == step:
            trainer.stop_signal.number = number
        return figures

    trainer.train_step = and_signal
    try:
        trainer.fit()
    except Interrupted:
        return
    raise AssertionError("the signal was not noticed")


def results(trainer, folder: Path) -> None:
    """Whole parameters (and averages) of rank 0, in one file."""
    tensors = {name: whole(value.detach()).clone() for name, value in trainer.raw_model.named_parameters()}
    if trainer.ema is not None:
        averages = zip(trainer.trained, trainer.ema.shadow_params, strict=True)
        tensors |= {f"average.{name}": whole(value).clone() for name, value in averages}
    if trainer.accelerator.is_main_process:
        save_file(tensors, folder / "result.safetensors")


def main(folder: Path, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    for scenario in scenarios:
        # name, or name.resume, name.stop (and resumed), name.split (in two micro-batches); the name is the folder's.
        name, _, rest = scenario.partition(".")
        place, rows = folder / name, ROWS // world
        if rest == "stop":
            stop_at(make(name, place, rows), 2, number=15 if os.environ["RANK"] == "1" else 0)
        if rest == "split":
            place, rows = folder / f"{name}-split", ROWS // world // 2
        trainer = make(name, place, rows, ROWS // world // rows, resume="auto" if rest in ("resume", "stop") else False)
        if rest in ("resume", "stop"):
            go_on(trainer)
        trainer.fit()
        results(trainer, place)
        assert world == trainer.accelerator.num_processes
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's own end sometimes aborts a process whose work is done


def free_port() -> int:
    """A port below those that the system gives to outgoing connections, and apart from those of tests run beside."""
    first = 20000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for port in range(first + os.getpid() % 500, first + 1000):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no free port above {first}")


def start_ranks(
    module: str, arguments: list[str], processes: int = 2, fsdp: bool = True, replicate: int = 1
) -> list[subprocess.Popen]:
    """The processes of `python -m module ...` as one world; each has its output and errors in its `stdout`."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(processes)}
    if fsdp:
        common |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if replicate > 1:
        shard = str(processes // replicate)
        common |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": shard}
        common |= {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(replicate)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def lost(outputs: list[str]) -> bool:
    """Whether a world ended because gloo lost a connection, which on the loopback interface happens once in some dozens
    of worlds when much else runs; a warning then shows what was printed, and the world is started anew, once."""
    is_lost = any("Connection closed by peer" in text or "Connection reset by peer" in text for text in outputs)
    if is_lost:
        warnings.warn("a world of ranks is started anew:\n" + "\n".join(outputs), stacklevel=2)
    return is_lost


def run_ranks(processes: int, folder: Path, scenarios: list[str], fsdp: bool = True, replicate: int = 1) -> None:
    """Run scenarios one after another in so many fresh processes; with `replicate`, hybrid sharding."""
    found = folder.parent / f"{folder.name} before"
    if folder.exists():
        shutil.copytree(folder, found)
    for attempt in range(2):
        ranks = start_ranks("tests.training.ranks", [str(folder), *scenarios], processes, fsdp, replicate)
        try:
            outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        done = all(rank.returncode == 0 for rank in ranks)
        if done or attempt or not lost(outputs):
            break
        shutil.rmtree(folder)
        shutil.copytree(found, folder)
    assert done, "\n".join(outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
