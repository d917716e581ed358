"""Precision, threads and memory of the machine a run is on, and traces of what it does."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from training.config import ConfigError


def choose_precision(asked: str, device_type: str) -> str:
    """`bf16` or `float32`: what was asked, or for `auto` bf16 where the device multiplies it natively."""
    if asked == "auto":
        return "bf16" if has_fast_bf16(device_type) else "float32"
    if asked == "bf16" and device_type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("train.precision=bf16: this GPU has no bf16; use train.precision=float32")
    return asked


def has_fast_bf16(device_type: str) -> bool:
    """Whether matrix products in bf16 are faster than in float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def set_cpu_threads(threads: int | None) -> None:
    """Give this process its share of the cores; `accelerate launch` otherwise leaves it one thread."""
    if threads is None:
        cores = psutil.cpu_count(logical=False) or 1
        if hasattr(os, "sched_getaffinity"):
            cores = min(cores, len(os.sched_getaffinity(0)))
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them to the system.

    A training step on a CPU frees and takes the same large buffers every time; fresh ones cost a page fault for every
    4 KiB, more than the arithmetic on them. Elsewhere than on Linux with glibc nothing is done.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def device_memory(device: torch.device) -> float | None:
    """Bytes that a process may use: of its accelerator, or its share of the machine's; None: not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        return psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return None


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: of the accelerator's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return psutil.Process().memory_info().rss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StepProfiler:
    """Traces a few steps when asked for it, for chrome://tracing or Perfetto.

    Args:
        folder: gets `trace-<number>-<pid>.json`.
        steps: that are traced.
    """

    def __init__(self, folder: Path, steps: int = 3):
        self.folder, self.steps = folder, steps
        self._trace: torch.profiler.profile | None = None
        self._left = 0

    @contextmanager
    def step(self, asked) -> Iterator[None]:
        """One step; `asked.wants_profile` begins a trace and is reset."""
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
