"""Devices by their data sheets, and how long an operator takes on one at least: the roofline.

    time of an operator = max(FLOPs / peak, bytes / bandwidth), and a launch

The data sheets promise more than kernels reach. What they do reach is chosen here (:data:`OF_PEAK`,
:data:`OF_BANDWIDTH`, launches), so every time that comes from here is *estimated*, and is shown so. Of the CPU in use
the roofline is measured: products of few rows reach neither the peak nor the bandwidth of a copy.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lavi.efficiency.operators import Operator, trace
from lavi.errors import UserError, nearest

OF_PEAK, OF_BANDWIDTH = 0.7, 0.85
"""The share of a data sheet's figures that large kernels reach (chosen here)."""
LAUNCH, GAP = 8e-6, 1.5e-6
"""Seconds between two operators that Python asks for one by one, and between two that wait in a queue or stand in one
captured graph (chosen here)."""
GRAPH = "-graph"
"""Behind a device's name: every stage is one captured graph."""
HALF = (torch.bfloat16, torch.float16)
SIZES = {24: 22.4, 40: 39.4, 80: 79.2, 141: 139.8}
"""Usual GPUs by the GiB in their names, and the GiB that torch finds on them: of an L4, A100, H100 and H200."""
ASIDE = 1.0
"""GiB of a GPU that libraries and an allocator's gaps take (chosen here)."""


@dataclass(frozen=True)
class Device:
    """What a device can do, as kernels reach it."""

    name: str
    half: float
    """FLOPs a second in bfloat16 and float16, without sparsity."""
    single: float
    """FLOPs a second in float32."""
    bandwidth: float
    """Bytes a second from and to its memory."""
    launch: float
    """Seconds between two operators."""
    source: str
    runs_ahead: bool = True
    """Whether the host asks for operators while the device still works on earlier ones."""
    products: Mapping[torch.dtype, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """By dtype, as measured: FLOPs a byte, ascending, and the FLOPs a second of products of so many. Empty: peak and
    bandwidth."""

    def seconds(self, operators: Sequence[Operator]) -> float:
        """How long they take, one behind the other."""
        if not self.runs_ahead:
            return sum(self._kernel(operator) + self.launch for operator in operators)
        # The host runs ahead of the device: whichever is later at each operator decides.
        host = device = 0.0
        for operator in operators:
            host += self.launch
            device = max(host, device) + self._kernel(operator) + GAP
        return device

    def _kernel(self, operator: Operator) -> float:
        flops = operator.flops - operator.skipped
        if flops and (measured := self.products.get(operator.dtype)):
            return flops / _rate(measured, flops / operator.bytes)
        peak = self.half if operator.dtype in HALF else self.single
        return max(flops / peak, operator.bytes / self.bandwidth)


def _rate(measured: Sequence[tuple[float, float]], intensity: float) -> float:
    """FLOPs a second at so many FLOPs a byte: on straight lines between what was measured, in logarithms.

    Below all of it bytes decide, as at its first point; above it the last point's rate holds.
    """
    above = bisect_left(measured, (intensity, 0.0))
    if above == 0:
        return measured[0][1] * intensity / measured[0][0]
    if above == len(measured):
        return measured[-1][1]
    (low, slower), (high, faster) = measured[above - 1 : above + 1]
    part = math.log(intensity / low) / math.log(high / low)
    return slower * (faster / slower) ** part


def _gpu(name: str, half: float, single: float, gigabytes: float, source: str) -> Device:
    """Of a data sheet: TFLOPs without sparsity, GB a second."""
    return Device(
        name,
        half=OF_PEAK * half * 1e12,
        single=OF_PEAK * single * 1e12,
        bandwidth=OF_BANDWIDTH * gigabytes * 1e9,
        launch=LAUNCH,
        source=source,
    )


DEVICES = {
    "l4": _gpu("L4", 121, 30.3, 300, "NVIDIA L4 data sheet: bf16 242 with sparsity, fp32 30.3, 300 GB/s, 24 GB"),
    "rtx4090": _gpu("RTX 4090", 165.2, 82.6, 1008, "NVIDIA Ada architecture white paper, appendix A"),
    "a100": _gpu("A100", 312, 19.5, 2039, "NVIDIA A100 data sheet, SXM 80 GB"),
    "h100": _gpu("H100", 989.4, 67, 3350, "NVIDIA H100 data sheet, SXM: bf16 1,979 with sparsity"),
    "h200": _gpu("H200", 989.4, 67, 4800, "NVIDIA H200 data sheet, SXM"),
    "b200": _gpu("B200", 2250, 75, 8000, "NVIDIA HGX B200 data sheet, of eight: bf16 36 PFLOPs with sparsity"),
}
"""By the name that a command takes."""


def fits_in(mib: float) -> str:
    """The smallest GPU that holds so many MiB."""
    size = next((size for size, found in SIZES.items() if mib / 1024 + ASIDE <= found), None)
    return f"{size} GiB" if size is not None else f"> {max(SIZES)} GiB"


def device_named(name: str) -> Device:
    """A device of the table, also with :data:`GRAPH` behind its name, or ``cpu``: the one in use, measured now.

    Raises:
        UserError: there is none of that name.
    """
    if name == "cpu":
        return this_cpu()
    known = DEVICES | {f"{short}{GRAPH}": as_one_graph(device) for short, device in DEVICES.items()}
    if name not in known:
        raise UserError(f"no device '{name}' is known here: {nearest(name, [*known, 'cpu'])}")
    return known[name]


def as_one_graph(device: Device) -> Device:
    """The same device where all that a stage does is one captured graph: launches cost less, and no host runs ahead."""
    return replace(device, name=f"{device.name}, one graph", launch=GAP, runs_ahead=False)


def this_cpu() -> Device:
    """The CPU in use: FLOPs of products, bytes of a large copy, time an operator of a decoder of no size."""
    count = 2**25
    products = {dtype: _measured_products(dtype) for dtype in (torch.bfloat16, torch.float32)}
    source, target = torch.zeros(2, count).unbind()
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = Qwen2Config(vocab_size=16, num_hidden_layers=4, **sizes)
    small, token = Qwen2ForCausalLM(config).eval(), torch.zeros(1, 1, dtype=torch.long)
    with torch.device("meta"):
        shapes = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        operators = len(trace(lambda: shapes(token.to("meta"), use_cache=True)).operators)
        launch = _shortest(lambda: small(token, use_cache=True), repeat=5) / operators
    return Device(
        "this CPU",
        half=products[torch.bfloat16][-1][1],
        single=products[torch.float32][-1][1],
        bandwidth=8.0 * count / _shortest(lambda: target.copy_(source)),
        launch=launch,
        source="measured",
        runs_ahead=False,
        products=products,
    )


def _measured_products(dtype: torch.dtype) -> list[tuple[float, float]]:
    """FLOPs a byte and FLOPs a second of linear layers of 1 to 1024 rows.

    One behind another, as in a decoder: what has few rows finds no weight in a cache.
    """
    side, layers = 1024, 32
    weights = torch.randn(layers, side, side).to(dtype).unbind()
    measured = []
    for rows in (1, 4, 16, 64, 256, 1024):
        x, used = torch.randn(rows, side).to(dtype), weights[: max(1, min(layers, 1024 // rows))]
        flops, moved = 2.0 * rows * side**2, (2 * rows * side + side**2) * dtype.itemsize

        def run(x: torch.Tensor = x, used: Sequence[torch.Tensor] = used) -> None:
            for weight in used:
                torch.nn.functional.linear(x, weight)

        measured.append((flops / moved, flops * len(used) / _shortest(run)))
    return measured


def _shortest(run: Callable[[], object], *, repeat: int = 1) -> float:
    """Seconds of the shortest of two to seven runs behind a first one; of those that take long, fewer."""
    run()
    times: list[float] = []
    while len(times) < 2 or (len(times) < 7 and repeat * sum(times) < 1):
        began = time.perf_counter()
        for _ in range(repeat):
            run()
        times.append((time.perf_counter() - began) / repeat)
    return min(times)
