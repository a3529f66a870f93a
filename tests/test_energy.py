"""Joules: what a counter of the GPU says of one run; without one there are none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_timing import clock, measured_together  # noqa: F401  (a fixture; a recipe and its twin)

from lavi.efficiency import measure
from lavi.efficiency.energy import EnergyMeter


class Counter:
    """A GPU that uses 250 mJ a run, when the run is done."""

    def __init__(self) -> None:
        self.queued = self.used = 0

    def run(self) -> None:
        self.queued += 250

    def wait(self) -> None:
        self.used, self.queued = self.used + self.queued, 0


def test_joules_are_the_mean_of_runs_that_are_done() -> None:
    gpu = Counter()
    gpu.queued = 10_000  # what was asked of it before
    meter = EnergyMeter(lambda: gpu.used, gpu.wait)
    for seconds in (0.0, 0.01):
        assert meter.joules(gpu.run, seconds=seconds) == pytest.approx(0.25)


def test_a_cpu_and_a_machine_without_the_library_have_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EnergyMeter.of(torch.device("cpu")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter.of(torch.device("cuda")) is None


def test_a_gpu_without_a_counter_has_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def unsupported(handle: object) -> int:
        raise NVMLError

    names = {"NVMLError": NVMLError, "nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": lambda name: name}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    library = SimpleNamespace(**names, nvmlDeviceGetTotalEnergyConsumption=unsupported)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert EnergyMeter.of(torch.device("cuda")) is None
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 7 if handle == "GPU-1-2" else 0
    meter = EnergyMeter.of(torch.device("cuda"))
    assert meter is not None
    assert meter.millijoules() == 7


@pytest.mark.usefixtures("clock")
def test_records_have_the_joules_of_what_a_user_waits_for(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        def joules(self, run: Any) -> float:
            run()
            return 0.5

    assert not measured_together(tiny_recipe)[0].joules
    monkeypatch.setattr(measure.EnergyMeter, "of", lambda device: Meter())
    for record in measured_together(tiny_recipe):
        assert record.joules == {"first_token": 0.5, "floor_first_token": 0.5}
