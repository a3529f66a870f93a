"""What training holds in memory, by class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MIB = 2**20


class Memory(pl.Callback):
    """Logs MiB of weights, gradients and optimiser state on this rank; the process's own memory; on a GPU its peaks.

    ``memory/rss`` that grows from epoch to epoch is a leak in reading data. ``memory/peak allocated`` is the most that
    tensors took since the last log, ``memory/peak reserved`` what the allocator had reserved for them.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not trainer._logger_connector.should_update_logs:
            return
        state = (tensor for values in optimizer.state.values() for tensor in _tensors(values))
        gradients = (p.grad for p in module.parameters() if p.grad is not None)
        sizes = {"weights": _mib(module.parameters()), "gradients": _mib(gradients), "optimiser": _mib(state)}
        if (rss := resident()) is not None:
            sizes["rss"] = rss
        if module.device.type == "cuda":
            sizes["peak allocated"] = torch.cuda.max_memory_allocated(module.device) / MIB
            sizes["peak reserved"] = torch.cuda.max_memory_reserved(module.device) / MIB
            torch.cuda.reset_peak_memory_stats(module.device)
        module.log_dict({f"memory/{name}": size for name, size in sizes.items()})


def _tensors(state: Any) -> Iterable[Tensor]:
    return (value for value in state.values() if isinstance(value, Tensor))


def _mib(tensors: Iterable[Tensor]) -> float:
    """Of what this rank holds: of a sharded tensor its own part."""
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in own) / MIB


def resident() -> float | None:
    """MiB of memory of this process, now; None where the system does not say."""
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return None
    return float(line.split()[1]) / 1024
