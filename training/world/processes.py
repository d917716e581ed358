"""The processes of a run: what was asked of the launcher and what was got, FSDP2 through Accelerate, and agreement.

Accelerate's own files choose the processes and how parameters are sharded (training/configs/accelerate/). What does not
fit this trainer is refused before anything is built: Accelerate drops some wishes without a word (FSDP on a CPU, several
processes with --cpu), and a run of weeks must not find that out from its speed.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs, ParallelismConfig
from torch import nn
from torch.distributed import PrefixStore, Store, register_rendezvous_handler, rendezvous
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.device_mesh import DeviceMesh

from training.config import ConfigError
from training.run_files.checkpoints import refuse_different
from training.world.devices import choose_precision


_RESTARTABLE = "restartable"
_MESH = "ACCELERATE_USE_PARALLELISM_CONFIG"
_CONFIGS = "training/configs/accelerate"
_KNOWN_TYPES = (
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP,
)  # fmt: skip


@dataclass
class Asked:
    """What the launcher was asked for; None where it left no trace."""

    processes: int | None = None
    fsdp: bool = False
    cpu: bool = False


def asked_of_launcher() -> Asked:
    """The wishes in the command line of the `accelerate launch` above this process, and in the file it names.

    Accelerate passes on what it does, not what it was asked for, so its command is read with its own parser.
    """
    asked = Asked(fsdp=_is_set("ACCELERATE_USE_FSDP"))
    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return asked
    begin = next(
        (place + 1 for place, word in enumerate(command) if word.endswith(("accelerate-launch", "commands.launch"))),
        None,
    )
    if begin is None and any(word.endswith("accelerate") for word in command) and "launch" in command:
        begin = command.index("launch") + 1
    if begin is None:
        return asked
    options, _ = launch_command_parser().parse_known_args(command[begin:])
    file = options.config_file or (default_config_file if os.path.isfile(default_config_file) else None)
    stored = load_config_from_file(file) if file is not None and not options.cpu else None
    asked.cpu = options.cpu or bool(getattr(stored, "use_cpu", False))
    asked.processes = options.num_processes or getattr(stored, "num_processes", None)
    asked.fsdp |= options.use_fsdp or getattr(stored, "distributed_type", None) == DistributedType.FSDP
    return asked


def build_accelerator(
    precision: str,
    *,
    cpu: bool = False,
    processes: int | None = None,
    timeout_seconds: float = 600,
    tracker: str = "none",
    project_dir: str | None = None,
    alike: Mapping[str, Any] | None = None,
) -> Accelerator:
    """An Accelerator that is what the launcher was asked for; FSDP2 also on CPUs, over gloo.

    Args:
        precision: `auto`, `bf16` or `float32`, see `choose_precision`; it becomes `accelerator.mixed_precision`.
        processes: how many there must be; None: as many as the launcher was asked for, where that can be found out.
        timeout_seconds: how long a rank waits for the others before it gives up.
        alike: JSON values that all ranks must have alike, compared as soon as they have met.

    Raises:
        ConfigError: ranks that differ, another number of processes, no FSDP where it was asked for, or settings of Accelerate that this
            trainer does not follow.
    """
    asked = asked_of_launcher()
    cpu = cpu or asked.cpu or _is_set("ACCELERATE_USE_CPU") or torch.accelerator.current_accelerator() is None
    device_type = "cpu" if cpu else torch.accelerator.current_accelerator().type
    _refuse_environment()
    if precision == "auto" and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        precision = "bf16"
    precision = choose_precision(precision, device_type)
    plugin = None
    if asked.fsdp:
        plugin = _fsdp_plugin(torch.bfloat16 if precision == "bf16" else None)
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    # Accelerate has FSDP, and meshes of it, for accelerators alone; everything below it works on CPUs just as well.
    sharding_cpus = asked.fsdp and cpu
    has_mesh = os.environ.pop(_MESH, None) if sharding_cpus else None
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if precision == "bf16" else "no",
        fsdp_plugin=plugin,
        log_with=None if tracker == "none" else tracker,
        project_dir=project_dir,
        kwargs_handlers=[_meeting(timeout_seconds)],
    )
    if sharding_cpus and accelerator.distributed_type == DistributedType.MULTI_CPU:
        for state in (AcceleratorState._shared_state, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        if has_mesh is not None:
            os.environ[_MESH] = has_mesh
            accelerator.state.parallelism_config = sizes = ParallelismConfig()
            accelerator.state.device_mesh = sizes.get_device_mesh("cpu")
            sizes._validate_accelerator(accelerator)
    refuse_different(accelerator, alike or {})
    _refuse_accelerator(accelerator, asked, processes)
    return accelerator


def _meeting(timeout_seconds: float) -> InitProcessGroupKwargs:
    """How processes find each other: as by default, but those of a restart under keys of their own.

    A launcher that restarts its workers (`--max_restarts`) keeps the store with the addresses of those that died.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return InitProcessGroupKwargs(timeout=timeout)
    return InitProcessGroupKwargs(init_method=f"{_RESTARTABLE}://", timeout=timeout)


def _rendezvous(url: str, **options) -> Iterator[tuple[Store, int, int]]:
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for store, rank, processes in rendezvous("env://", **options):
        yield PrefixStore(f"restart-{restarts}", store), rank, processes


register_rendezvous_handler(_RESTARTABLE, _rendezvous)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _refuse_environment() -> None:
    """Settings that Accelerate's files carry to the workers as variables, and that the trainer would not follow."""
    environment = os.environ.get
    if environment("ACCELERATE_MIXED_PRECISION") in ("fp16", "fp8"):
        raise ConfigError(
            f"accelerate's mixed_precision={environment('ACCELERATE_MIXED_PRECISION')!r} is not supported: losses are "
            "not scaled; set it to 'no' and train.precision=bf16"
        )
    if environment("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ConfigError("accelerate's dynamo_backend compiles the whole model; set it to 'no' and model.compile=true")
    if environment("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise ConfigError(
            "accelerate's gradient_accumulation_steps divides the loss by micro-batches, which this trainer divides by "
            "targets; leave it out and set train.accumulation"
        )
    sizes = {name: int(environment(f"PARALLELISM_CONFIG_{name}_SIZE", "1")) for name in ("CP", "SP", "TP")}
    if sizes["CP"] > 1 or sizes["SP"] > 1:
        raise ConfigError(
            "accelerate's context and sequence parallelism replace the attention mask by a causal one: packed documents "
            "would see each other, and images only their past; set cp_size and sp_size to 1"
        )
    if sizes["TP"] > 1:
        raise ConfigError("tensor parallelism is for inference here; set accelerate's tp_size to 1 and use FSDP")


def _fsdp_plugin(compute_dtype: torch.dtype | None) -> FullyShardedDataParallelPlugin:
    """Accelerate's settings from its file, with units and precision of this trainer: a unit is a layer; products are in
    bf16, reductions of gradients in float32, and outputs, losses among them, are not cast."""
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise ConfigError("accelerate's fsdp_version=1 does not resume exactly; set fsdp_version: 2")
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError("accelerate's fsdp_offload_params is not supported; shard over more GPUs instead")
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=policy,
        activation_checkpointing=False,  # by transformers, see `wants_checkpointing`
        cpu_ram_efficient_loading=False,  # by `shard_model`, which also knows a frozen VAE
        state_dict_type="SHARDED_STATE_DICT",
    )


def wants_checkpointing() -> bool:
    """Whether Accelerate's file asks for activation checkpointing; `model.gradient_checkpointing` is the same."""
    return _is_set("FSDP_ACTIVATION_CHECKPOINTING")


def _refuse_accelerator(accelerator: Accelerator, asked: Asked, processes: int | None) -> None:
    found, kind = accelerator.num_processes, accelerator.distributed_type
    for expected, who in ((processes, "train.processes"), (asked.processes, "the launcher's num_processes")):
        if expected is not None and expected != found:
            raise ConfigError(
                f"{who} is {expected}, but this run has {found}. `accelerate launch --cpu` starts one process whatever it "
                f"is asked for: use --config_file {_CONFIGS}/cpu-2-fsdp.yaml --num_processes {expected}, or torchrun"
            )
    if kind not in _KNOWN_TYPES:
        raise ConfigError(f"accelerate's distributed_type {kind.value} is not supported; use FSDP, as {_CONFIGS} does")
    if asked.fsdp and (kind != DistributedType.FSDP or not accelerator.is_fsdp2):
        raise ConfigError(
            f"FSDP was asked for, but Accelerate set up {kind.value} with {found} process{'es' * (found > 1)}; launch "
            f"with --config_file {_CONFIGS}/cpu-2-fsdp.yaml on CPUs or {_CONFIGS}/gpu-8.yaml on GPUs"
        )


# --------------------------------------------------------------------------------------------------------- sharded models


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether models are sharded by FSDP2 here."""
    return accelerator.distributed_type == DistributedType.FSDP


def describe_world(accelerator: Accelerator) -> dict:
    """Processes, how parameters lie on them, and the mesh; for manifests."""
    mesh: DeviceMesh | None = getattr(accelerator, "torch_device_mesh", None)
    return {
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "mesh": None if mesh is None else dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)),
    }


def shard_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Shard a model, in place; parameters on the meta device are given room, without values, on this rank's device.

    A unit is a layer, or the embeddings; the rest is gathered with the root, the output layer too: the loss takes its
    weight without running it, while the root runs (Accelerate's own division has it in a unit that only its forward
    gathers). A frozen VAE is small and is left whole on every rank.
    """
    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    settings = {"mesh": mesh, "mp_policy": plugin.mixed_precision_policy}
    units = list(model.model.layers)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        units.append(model.model.embed_tokens)
    for unit in units:
        fully_shard(unit, **settings, reshard_after_forward=plugin.reshard_after_forward)
    vae = getattr(model, "vae", None)
    fully_shard(model, **settings, ignored_params=None if vae is None else set(vae.parameters()))
    return make_room(model, accelerator.device)


def make_room(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a model to a device, in place; what is on the meta device gets memory there, its values are arbitrary."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    model.tie_weights()
    return model


def spread_weights(model: nn.Module, whole: nn.Module | None) -> None:
    """Fill a sharded model from a whole one, which only the main process has (in the memory of its CPU)."""
    weights = {} if whole is None else whole.state_dict()
    # Buffers are made where the model is; a frozen VAE is whole everywhere.
    weights = {name: value for name, value in weights.items() if not name.startswith("vae.")}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=options)


@contextmanager
def accumulating(accelerator: Accelerator, model: nn.Module, is_last: bool) -> Iterator[None]:
    """A micro-batch of a step: gradients are summed over ranks with the last one.

    Those of sharded models are scattered in each, or every rank would hold all of them until then; what the groups of
    a hybrid mesh have is summed with the last.
    """
    if is_sharding(accelerator):
        model.set_requires_all_reduce(is_last)
        yield
    else:
        with nullcontext() if is_last else accelerator.no_sync(model):
            yield


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Parameters may be read and changed inside; no unit goes on computing with a copy gathered before.

    A forward without a backward leaves the root's parameters gathered, and the next forward would take those.
    """
    _reshard(model)
    try:
        yield
    finally:
        _reshard(model)


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all ranks; a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Ctrl-C reaches the workers twice, from the terminal and from their launcher.
_SAME_SIGNAL_SECONDS = 2.0


class Interrupted(Exception):
    """A signal asked the run to end; everything worth keeping has been written. `exit_code` is 128 + signal."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class StopSignal:
    """Remembers the first SIGINT or SIGTERM, so that a step is never cut in two; a second one, later, ends at once.

    SIGUSR1 asks for a trace of the next steps, see `Trainer.profiled`.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0
        self.wants_profile = False

    def __enter__(self) -> "StopSignal":
        handlers: dict[int, Callable] = {signal.SIGINT: self._remember, signal.SIGTERM: self._remember}
        if hasattr(signal, "SIGUSR1"):
            handlers[signal.SIGUSR1] = self._ask_for_profile
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > _SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def _ask_for_profile(self, number: int, frame) -> None:
        self.wants_profile = True

    def check(self) -> None:
        """Raise Interrupted when a signal has come; for the phases after training."""
        if self.number:
            raise Interrupted(self.number)
