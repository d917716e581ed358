"""The machines of a plan: the processes, how they share parameters, and how much each can hold, compute and receive."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from training.config import ConfigError
from training.model.costs import GPUS, peak_flops
from training.world import choose_precision


@dataclass(frozen=True)
class Mesh:
    """Processes that share parameters in groups of `shard` and replicate them `replicate` times.

    Attributes:
        world: number of processes, one for each GPU.
        replicate: number of groups that each hold all parameters; 1 means full shard.
        reshard: whether layers are dropped after the forward and gathered again for the backward.

    Raises:
        ConfigError: the numbers do not make groups of equal size, of two processes at least.
    """

    world: int = 1
    replicate: int = 1
    reshard: bool = True

    def __post_init__(self):
        for name in ("world", "replicate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.world % self.replicate:
            raise ConfigError(
                f"--world={self.world} is no multiple of --replicate={self.replicate}: every group of a hybrid shard "
                "is of the same size"
            )
        if self.replicate > 1 and self.shard == 1:
            raise ConfigError(
                f"--replicate={self.replicate} leaves groups of one process, which FSDP2 does not shard; the groups of "
                f"a hybrid shard are of two at least: --replicate={max(1, self.world // 2)} or less"
            )

    @property
    def shard(self) -> int:
        """Number of processes that together hold the parameters once."""
        return self.world // self.replicate

    def describe(self) -> str:
        if self.world == 1:
            return "1 process, nothing sharded"
        if self.replicate == 1:
            return f"{self.world} processes, full shard"
        return f"{self.world} processes, hybrid shard: {self.replicate} groups of {self.shard}"


def mesh_of_accelerate(path: str) -> tuple[Mesh, bool]:
    """Return the mesh of an Accelerate configuration, and whether it asks for activation checkpointing.

    Raises:
        ConfigError: the file does not exist, or it shards by something else than FSDP2.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--accelerate {path} does not exist; the project's are in training/configs/accelerate")
    try:
        config = load_config_from_file(path)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--accelerate {path}: {error}") from error

    # A plan knows one process, or several that FSDP2 shards.
    fsdp = config.fsdp_config
    if config.num_processes > 1 and (
        config.distributed_type != DistributedType.FSDP or str(fsdp.get("fsdp_version")) != "2"
    ):
        raise ConfigError(
            f"--accelerate {path}: distributed_type={config.distributed_type.value!r} with fsdp_version="
            f"{fsdp.get('fsdp_version')}; a plan is of one process or of FSDP version 2"
        )

    # Sizes that the file leaves out follow from the number of processes.
    replicate = config.parallelism_config.get("parallelism_config_dp_replicate_size", 1)
    shard = config.parallelism_config.get("parallelism_config_dp_shard_size", config.num_processes // replicate)
    if replicate * shard != config.num_processes:
        raise ConfigError(
            f"--accelerate {path}: dp_replicate_size={replicate} x dp_shard_size={shard} is not num_processes="
            f"{config.num_processes}"
        )
    mesh = Mesh(config.num_processes, replicate, fsdp.get("fsdp_reshard_after_forward", True))
    return mesh, fsdp.get("fsdp_activation_checkpointing", False)


@dataclass(frozen=True)
class Device:
    """The device that a process runs on.

    Attributes:
        peak: FLOP/s of matrix products in `precision`; `source` says where the figure comes from.
        memory: bytes; None if unknown.
        link: bytes/s that it receives inside a node; None: as from other nodes.
    """

    name: str
    precision: str
    peak: float
    source: str
    memory: float | None = None
    link: float | None = None


def find_device(name: str, precision: str, processes: int = 1) -> Device:
    """Find a GPU of `training.model.costs.GPUS` by name; or `cpu`, a share of this machine, whose peak is measured.

    Args:
        precision: the value of `train.precision`: auto, bf16 or float32.
        processes: how many processes share this machine, if it is the device.

    Raises:
        ConfigError: the name is unknown, or the device does not have the precision.
    """
    if name.lower() == "cpu":
        precision = choose_precision(precision, "cpu")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        peak, source = peak_flops(torch.device("cpu"), dtype)
        return Device("CPU", precision, peak / processes, source, psutil.virtual_memory().total / processes)
    known = {gpu.lower(): gpu for gpu in GPUS}
    if name.lower() not in known:
        raise ConfigError(f"--device={name!r} is unknown; there are cpu, {', '.join(GPUS)}")
    name = known[name.lower()]
    gpu = GPUS[name]
    if precision == "bf16" and not gpu.has_bf16:
        raise ConfigError(f"train.precision=bf16: {name} has no bf16; use train.precision=float32")
    if precision == "auto":
        precision = "bf16" if gpu.has_bf16 else "float32"
    peak = gpu.half if precision == "bf16" else gpu.single
    return Device(name, precision, peak, f"data sheet, {precision}", gpu.memory, gpu.link)
