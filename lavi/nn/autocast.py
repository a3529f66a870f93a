"""Where numbers must not be cut to half precision, whatever the trainer's precision says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast on the tensor's device; meta has none to switch off."""
    device = tensor.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # entering and leaving it takes a while
    return torch.autocast(device, enabled=False) if on else nullcontext()
