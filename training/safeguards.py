"""What keeps a long run from ruin: signals that never cut a step in two, losses that are not finite, spikes."""

import math
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor


Event = Literal["not_finite", "spike", "spike_skipped"]

# Ctrl-C reaches the workers twice, from the terminal and from their launcher.
_SAME_SIGNAL_SECONDS = 2.0


class Interrupted(Exception):
    """A signal asked the run to end; everything worth keeping has been written. `exit_code` is 128 + signal."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class NotFiniteError(FloatingPointError):
    """Losses or gradients were not finite for too many steps in a row, or an update left parameters that are not."""


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


def not_finite(tensors: Mapping[str, torch.Tensor], accelerator: Accelerator) -> list[str]:
    """Names of the tensors, sharded or not, that hold NaN or infinity on any rank; every rank calls it.

    One pass over them and one wait for the device.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in floating.values())
    flags = [(~tensor.isfinite().all()).to(accelerator.device, torch.float32) for tensor in local]
    counts = accelerator.reduce(torch.stack(flags)).tolist() if flags else []
    return [name for name, count in zip(floating, counts, strict=True) if count]


class SpikeDetector:
    """Tells a loss that jumps from one that wanders.

    A loss is a spike when it lies more than `threshold` standard deviations above the median of the last `window` losses
    that were none; the deviation is estimated by how far their highest twentieth lies from that median (1.645 of them, for
    a normal distribution): single jumps do not widen it, and steps that lack a modality, of which the losses then have two
    levels, are no spikes. Losses above it one after another are one spike; when they stay there
    for a quarter of the window, they are the new level.

    Args:
        threshold: in standard deviations; None: nothing is a spike.
        window: losses that are remembered; nothing is a spike before a quarter of them is there.
    """

    def __init__(self, threshold: float | None, window: int = 128):
        self.threshold, self.window = threshold, window
        self.losses: list[float] = []
        self.high_in_a_row = 0

    def sees(self, loss: float) -> bool:
        """Whether this loss begins a spike; `high_in_a_row` says whether it belongs to one."""
        if self._is_high(loss):
            self.high_in_a_row += 1
            if self.high_in_a_row <= self.window // 4:
                return self.high_in_a_row == 1
            self.losses = []
        self.high_in_a_row = 0
        self.losses = [*self.losses, loss][-self.window :]
        return False

    def _is_high(self, loss: float) -> bool:
        if self.threshold is None or len(self.losses) < self.window // 4:
            return False
        median = statistics.median(self.losses)
        deviation = (statistics.quantiles(self.losses, n=20, method="inclusive")[-1] - median) / 1.645
        return loss > median + self.threshold * max(deviation, 1e-3 * abs(median))

    def state(self) -> dict:
        return {"losses": self.losses, "high_in_a_row": self.high_in_a_row}

    def restore(self, state: dict) -> None:
        self.losses, self.high_in_a_row = list(state["losses"]), state["high_in_a_row"]


class UpdateGuard:
    """Decides from a step's loss and gradient norm, which all ranks share, whether its update is made.

    What an update has made of the parameters shows in the next losses, or in none, where no token passes through them;
    `wants_check` says after which steps the trainer looks at the parameters themselves. It does so before every
    checkpoint, too.

    Args:
        not_finite_limit: steps in a row whose loss or gradient may be not finite; one more stops the run.
        skip_spikes: leave out the updates of all steps of a spike.
    """

    def __init__(self, not_finite_limit: int, spike_threshold: float | None, skip_spikes: bool):
        self.not_finite_limit, self.skip_spikes = not_finite_limit, skip_spikes
        self.spikes = SpikeDetector(spike_threshold)
        self.skipped = 0
        self.not_finite_in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> tuple[bool, Event | None]:
        """(whether to update, what there is to tell)."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped += 1
            self.not_finite_in_a_row += 1
            return False, "not_finite"
        self.not_finite_in_a_row = 0
        begins = self.spikes.sees(loss)
        skips = self.skip_spikes and self.spikes.high_in_a_row > 0
        self.skipped += skips
        if skips:
            return False, "spike_skipped"
        return True, "spike" if begins else None

    def wants_check(self, step: int) -> bool:
        """Whether to look at the parameters after this step: where a loss begins to be no number, and every 100 steps."""
        return self.not_finite_in_a_row == 1 or step % 100 == 0

    @property
    def gives_up(self) -> bool:
        return self.not_finite_in_a_row > self.not_finite_limit

    def state(self) -> dict:
        """JSON values with which a resumed run judges alike."""
        return {
            "skipped": self.skipped, "not_finite_in_a_row": self.not_finite_in_a_row, "spikes": self.spikes.state()
        }  # fmt: skip

    def restore(self, state: dict) -> None:
        self.skipped, self.not_finite_in_a_row = state["skipped"], state["not_finite_in_a_row"]
        self.spikes.restore(state["spikes"])
