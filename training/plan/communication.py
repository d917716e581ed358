"""Count the bytes that the processes of FSDP2 send each other in a step, and the time that takes."""

from dataclasses import dataclass

from training.plan.cluster import Mesh
from training.plan.memory import BF16, FLOAT
from training.plan.parameters import Unit


# N processes of a shard group, R groups


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process receives in a step, by collective; it sends as many. A ring moves (N - 1) / N of a whole."""

    gather_forward: int
    gather_backward: int
    reduce_scatter: int
    all_reduce: int

    @property
    def in_shard_group(self) -> int:
        return self.gather_forward + self.gather_backward + self.reduce_scatter

    @property
    def total(self) -> int:
        return self.in_shard_group + self.all_reduce


def plan_traffic(units: list[Unit], mesh: Mesh, bf16: bool, accumulation: int = 1) -> Traffic:
    """Count the bytes that a process receives in a step.

    Parameters are gathered in the precision of products, in every micro-batch, and again for the backward unless they
    stayed. Gradients are reduced in float32: in every micro-batch they are scattered over a shard group, and once a
    step each process sums its part over the groups (a ring moves it twice).
    """
    others = mesh.shard - 1
    compute = BF16 if bf16 else FLOAT
    everything = sum(unit.shard_numel(mesh.shard) for unit in units)
    passing = sum(unit.shard_numel(mesh.shard) for unit in units if not unit.stays)
    return Traffic(
        gather_forward=accumulation * others * compute * everything,
        gather_backward=accumulation * others * compute * passing,
        reduce_scatter=accumulation * others * FLOAT * everything,
        all_reduce=2 * (mesh.replicate - 1) * FLOAT * everything // mesh.replicate,
    )


def seconds_of_traffic(traffic: Traffic, mesh: Mesh, network: float, link: float | None, per_node: int) -> float:
    """Return the seconds of a step's messages, sent one after another.

    Args:
        network: bytes/s that a process receives from other nodes.
        link: bytes/s that it receives inside a node of `per_node` processes; None: as from other nodes.
    """
    link = link or network
    inside = link if mesh.shard <= per_node else network
    between = link if mesh.world <= per_node else network
    return traffic.in_shard_group / inside + traffic.all_reduce / between
