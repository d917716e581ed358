"""Which precision products run in, and which tensors keep their own when a model is cast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives products on such a device; None where it is off, or unknown as on "meta"."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast switched off for such a device, where it has any."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def without_cast(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `nn.Module._apply` does to tensors, but for their dtype: they are moved, and not cast."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        probe = function(tensor.new_empty(0))
        return function(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

    return move
