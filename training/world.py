"""The world of a run: its machine, its processes as Accelerate sets them up, sharded models, and signals.

Accelerate's own files choose the processes and how parameters are sharded (training/configs/accelerate/). A setting
that does not fit this trainer is refused before anything is built: Accelerate drops some settings without a word (FSDP
on a CPU, several processes with --cpu), and nobody should find that out from the speed of a run of weeks.
"""

import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs, ParallelismConfig
from torch import nn
from torch.distributed import PrefixStore, Store, register_rendezvous_handler, rendezvous
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.device_mesh import DeviceMesh

from training.config import ConfigError, digest_of, flatten, without_secrets


_RESTARTABLE = "restartable"
_MESH = "ACCELERATE_USE_PARALLELISM_CONFIG"
_CONFIGS = "training/configs/accelerate"
_KNOWN_TYPES = (
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- the machine


def choose_precision(asked: str, device_type: str) -> str:
    """Return `bf16` or `float32`: as asked; for `auto` bf16 where the device multiplies it natively.

    Raises:
        ConfigError: the device has no bf16.
    """
    if asked == "auto":
        return "bf16" if has_fast_bf16(device_type) else "float32"
    if asked == "bf16" and device_type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("train.precision=bf16: this GPU has no bf16; use train.precision=float32")
    return asked


def has_fast_bf16(device_type: str) -> bool:
    """True if matrix products are faster in bf16 than in float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def set_cpu_threads(threads: int | None) -> None:
    """Set the threads of this process (default: its share of the cores); `accelerate launch` leaves it only one."""
    if threads is None:
        cores = psutil.cpu_count(logical=False) or 1
        if hasattr(os, "sched_getaffinity"):
            cores = min(cores, len(os.sched_getaffinity(0)))
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them to the system.

    A training step on a CPU frees and takes the same large buffers every time. Fresh buffers cost a page fault for each
    4 KiB, which takes longer than the arithmetic on them. Without Linux and glibc nothing is done.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def device_memory(device: torch.device) -> float | None:
    """Return the bytes that a process may use: of its accelerator, or its share of the machine's; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        return psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return None


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far, in the accelerator's memory or in the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return psutil.Process().memory_info().rss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -------------------------------------------------------------------------------------------------------- the processes


@dataclass
class Asked:
    """What the launcher was asked for; None for a setting that left no trace."""

    processes: int | None = None
    fsdp: bool = False
    cpu: bool = False


def asked_of_launcher() -> Asked:
    """Read the command line of the `accelerate launch` above this process, and the file that it names.

    Accelerate tells its workers what it does, not what it was asked for; so its command is read here, with its parser.
    """
    # The words behind `accelerate launch`, if the parent process is one.
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
    # Options first, then the configuration file.
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
    """Build an Accelerator that is what the launcher was asked for; with FSDP2 also on CPUs, over gloo.

    Args:
        precision: `auto`, `bf16` or `float32`, see `choose_precision`; it becomes `accelerator.mixed_precision`.
        cpu: use the CPU even where there is an accelerator.
        processes: how many there must be; None: as many as the launcher was asked for, where that can be found out.
        timeout_seconds: how long a rank waits for the others before it gives up.
        tracker, project_dir: Accelerate's tracker, and the folder of its files.
        alike: JSON values that all ranks must have alike, compared as soon as the ranks have met.

    Raises:
        ConfigError: ranks that differ, another number of processes, no FSDP where it was asked for, or settings of
            Accelerate that this trainer does not follow.
    """
    # What was asked for, and the precision that the device can give.
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
    # Accelerate offers FSDP and its meshes on accelerators only, though all that they use works on CPUs just as well.
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
    # So on CPUs the state that Accelerate has made of plain processes is turned into that of sharded ones.
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
    """Choose how processes find each other: as by default, but restarted processes use keys of their own.

    A launcher that restarts its workers (`--max_restarts`) keeps the store with the addresses of the dead ones.
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
    """Refuse settings that Accelerate's files pass to the workers as variables that this trainer would not follow."""
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
            "accelerate's context and sequence parallelism replace the attention mask by a causal one: packed "
            "documents would see each other, and images only their past; set cp_size and sp_size to 1"
        )
    if sizes["TP"] > 1:
        raise ConfigError("tensor parallelism is for inference here; set accelerate's tp_size to 1 and use FSDP")


def _fsdp_plugin(compute_dtype: torch.dtype | None) -> FullyShardedDataParallelPlugin:
    """Return Accelerate's settings from its file, with the units and the precision of this trainer.

    A unit is a layer. Products are in bf16, reductions of gradients in float32; outputs, such as losses, are not cast.
    """
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
    """True if Accelerate's file asks for activation checkpointing, which `model.gradient_checkpointing` also sets."""
    return _is_set("FSDP_ACTIVATION_CHECKPOINTING")


def _refuse_accelerator(accelerator: Accelerator, asked: Asked, processes: int | None) -> None:
    """Refuse an Accelerator that is not what was asked for."""
    found, kind = accelerator.num_processes, accelerator.distributed_type
    for expected, who in ((processes, "train.processes"), (asked.processes, "the launcher's num_processes")):
        if expected is not None and expected != found:
            raise ConfigError(
                f"{who} is {expected}, but this run has {found}. `accelerate launch --cpu` starts one process, "
                f"whatever it is asked for: use --config_file {_CONFIGS}/cpu-2-fsdp.yaml --num_processes {expected}, "
                "or torchrun"
            )
    if kind not in _KNOWN_TYPES:
        raise ConfigError(f"accelerate's distributed_type {kind.value} is not supported; use FSDP, as {_CONFIGS} does")
    if asked.fsdp and (kind != DistributedType.FSDP or not accelerator.is_fsdp2):
        raise ConfigError(
            f"FSDP was asked for, but Accelerate set up {kind.value} with {found} process{'es' * (found > 1)}; launch "
            f"with --config_file {_CONFIGS}/cpu-2-fsdp.yaml on CPUs or {_CONFIGS}/gpu-8.yaml on GPUs"
        )


def gather_objects(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return the values of all ranks of a group, in order; only this rank's where there is no group."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def refuse_different(accelerator: Accelerator, values: Mapping[str, Any]) -> None:
    """Refuse ranks that were started with different values; they would train on, each towards something else.

    Args:
        values: JSON values, nested or not. Digests are compared; the values travel only if the digests differ.

    Raises:
        ConfigError: on every rank, with the keys that differ, and their values on the first ranks that differ.
    """
    if accelerator.num_processes == 1:
        return
    if len(set(gather_objects(digest_of(values), dist.group.WORLD))) == 1:
        return
    of_ranks = [flatten(of_rank) for of_rank in gather_objects(values, dist.group.WORLD)]
    different = []
    for key in dict.fromkeys(key for of_rank in of_ranks for key in of_rank):
        found = [of_rank.get(key) for of_rank in of_ranks]
        if (rank := next((rank for rank, value in enumerate(found) if value != found[0]), None)) is not None:
            different.append(f"{key} is {found[0]!r} on rank 0, {found[rank]!r} on rank {rank}")
    raise ConfigError(f"ranks differ: {'; '.join(different)}. Start all of them with the same recipe and the same data")


def leave_group() -> None:
    """End the communication of this process with the others."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def say(accelerator: Accelerator, text: str) -> None:
    """Print a line for people: on the main process, to stderr, without secrets."""
    if accelerator.is_main_process:
        print(without_secrets(text), file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- sharded models


def is_sharding(accelerator: Accelerator) -> bool:
    """True if FSDP2 shards the models."""
    return accelerator.distributed_type == DistributedType.FSDP


def describe_world(accelerator: Accelerator) -> dict:
    """Describe the processes and how parameters lie on them, as JSON values for manifests."""
    mesh: DeviceMesh | None = getattr(accelerator, "torch_device_mesh", None)
    return {
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "mesh": None if mesh is None else dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)),
    }


def shard_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Shard a model, in place; parameters on the meta device get room, without values, on this rank's device.

    A unit is a layer, or the embeddings. The rest belongs to the root, the output layer too: the loss reads its weight
    without calling it, while the root runs (Accelerate's own division puts it in a unit that only its own forward
    gathers). A frozen VAE is small and stays whole on every rank.
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
    """Move a model to a device, in place; tensors on the meta device get memory there, with arbitrary values."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    model.tie_weights()
    return model


def spread_weights(model: nn.Module, whole: nn.Module | None) -> None:
    """Fill a sharded model from a whole one, which the main process alone has (in the memory of its CPU)."""
    weights = {} if whole is None else whole.state_dict()
    # A frozen VAE is whole on every rank already.
    weights = {name: value for name, value in weights.items() if not name.startswith("vae.")}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=options)


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Let parameters be read and changed within the block; no unit computes with a copy that it gathered before.

    A forward without a backward leaves the root's parameters gathered, and the next forward would use that copy.
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


# --------------------------------------------------------------------------------------------------- signals and traces


# Ctrl-C reaches the workers twice, from the terminal and from their launcher.
_SAME_SIGNAL_SECONDS = 2.0


class Interrupted(Exception):
    """A signal asked the run to end, and its checkpoint has been written. `exit_code` is 128 + signal."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class StopSignal:
    """Remembers the first SIGINT or SIGTERM, so that a step is never cut in two; a second one, later, ends at once.

    SIGUSR1 asks for a trace of the next steps, see `StepProfiler`.
    """

    def __init__(self):
        self.number = 0
        self.since = 0.0
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
            self.number = number
            self.since = time.monotonic()
        elif time.monotonic() - self.since > _SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def _ask_for_profile(self, number: int, frame) -> None:
        self.wants_profile = True

    def check(self) -> None:
        """Raise Interrupted if a signal has come; for the phases after training."""
        if self.number:
            raise Interrupted(self.number)


class StepProfiler:
    """Traces a few steps when a signal asks for it, for chrome://tracing or Perfetto.

    Args:
        folder: gets `trace-<number>-<pid>.json`.
        steps: how many are traced.
    """

    def __init__(self, folder: Path, steps: int = 3):
        self.folder = folder
        self.steps = steps
        self._trace: torch.profiler.profile | None = None
        self._left = 0

    @contextmanager
    def step(self, asked: StopSignal) -> Iterator[None]:
        """Run one step in the block; `asked.wants_profile` begins a trace and is reset."""
        if asked.wants_profile and self._trace is None:
            self._trace, self._left = torch.profiler.profile(), self.steps
            self._trace.start()
        asked.wants_profile = False
        yield
        if self._trace is not None:
            self._left -= 1
            if not self._left:
                trace, self._trace = self._trace, None
                trace.stop()
                self.folder.mkdir(parents=True, exist_ok=True)
                number = len(list(self.folder.glob(f"*-{os.getpid()}.json")))
                trace.export_chrome_trace(str(self.folder / f"trace-{number}-{os.getpid()}.json"))
