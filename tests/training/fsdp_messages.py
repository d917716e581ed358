"""What FSDP2 really holds and sends on rank 0 of eight, and losses without logits, as JSON; in a process of its own.

PyTorch's `fake` process group sends nothing, but is asked for everything.
"""

import json
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from training.world import shard_model

from .plans import FSDP_CASES, batch_of, model_of


WORLD = 8


class Messages(TorchDispatchMode):
    """Bytes that a rank receives if each collective is a ring."""

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups
        self.losses_without_logits = 0
        self.received = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), 0)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        if name.startswith("c10d._allgather_base_"):
            whole, part = arguments[:2]
            self.received["all_gather"] += whole.nbytes - part.nbytes
        elif name.startswith("c10d._reduce_scatter_base_"):
            part, whole = arguments[:2]
            self.received["reduce_scatter"] += whole.nbytes - part.nbytes
        elif name.startswith("c10d.allreduce_"):
            self.received["all_reduce"] += sum(2 * (self.groups - 1) * t.nbytes // self.groups for t in arguments[0])
        elif "loss_tokens" in name and name.endswith("forward.default"):
            self.losses_without_logits += 1
        return function(*arguments, **(options or {}))


def shard(model: torch.nn.Module, parallelism: ParallelismConfig, bf16: bool, reshard: bool) -> torch.nn.Module:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        reshard_after_forward=reshard,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=parallelism.build_device_mesh("cpu"),
        parallelism_config=parallelism,
        device=torch.device("cpu"),
    )
    return shard_model(accelerator, model)


def measure(name: str, replicate: int, bf16: bool, reshard: bool, micro_batches: int) -> dict[str, int]:
    parallelism = ParallelismConfig(dp_replicate_size=replicate, dp_shard_size=WORLD // replicate)
    model = shard(model_of(name).train(), parallelism, bf16, reshard)
    batch = batch_of(model.config)
    with Messages(replicate) as messages:
        for number in range(micro_batches):
            model.set_requires_all_reduce(number == micro_batches - 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = model(**batch, use_cache=False, skip_logits=True)
            output.loss.backward()
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    return {"held": held, "losses_without_logits": messages.losses_without_logits, **messages.received}


if __name__ == "__main__":
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    print(json.dumps([measure(*case) for case in FSDP_CASES]))
