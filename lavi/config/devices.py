"""The device that a user names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lavi.errors import UserError

if TYPE_CHECKING:  # a command that a mistake ends does not wait for it
    import torch


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name; ``auto``: a GPU if there is one.

    Raises:
        UserError: no such device, or nothing can be computed on it here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"the device '{name}' cannot be used here ({cause}): take cpu, or auto.") from None
    return device
