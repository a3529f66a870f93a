"""Joules of a run on a GPU, from the counter of the GPU itself (NVML; extra ``energy``); elsewhere there are none."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

SECONDS = 1.0
"""How long runs are repeated, at least: the counter moves some ten times a second."""


class EnergyMeter:
    """Reads what a GPU has used since its driver was loaded.

    Args:
        millijoules: reads it.
        wait: until the GPU has done what was queued.
    """

    def __init__(self, millijoules: Callable[[], int], wait: Callable[[], object]) -> None:
        self.millijoules, self.wait = millijoules, wait

    @classmethod
    def of(cls, device: torch.device) -> EnergyMeter | None:
        """The meter of a device; None: it has none, or the extra is not there."""
        if device.type != "cuda":
            return None
        try:
            import pynvml as nvml
        except ImportError:
            return None
        with suppress(nvml.NVMLError):
            nvml.nvmlInit()
            handle: Any = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # old ones and parts of one have no counter
            return cls(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle), lambda: torch.cuda.synchronize(device))
        return None

    def joules(self, run: Callable[[], Any], *, seconds: float = SECONDS) -> float:
        """Of one run, the mean of as many as fill ``seconds``; what the GPU uses at rest is part of it."""
        self.wait()
        runs, began, before = 0, time.perf_counter(), self.millijoules()
        while not runs or time.perf_counter() - began < seconds:
            run()
            self.wait()
            runs += 1
        return (self.millijoules() - before) / 1e3 / runs
