"""Devices by their data sheets, and how long an operator takes on one at least: the roofline.

    time of an operator = max(FLOPs / peak, bytes / bandwidth), and a launch

The data sheets promise more than kernels reach. What they do reach is chosen here (:data:`OF_PEAK`,
:data:`OF_BANDWIDTH`, launches), so every time that comes from here is *estimated*, and is shown so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lavi.efficiency.operators import Operator, trace
from lavi.errors import UserError, nearest

OF_PEAK, OF_BANDWIDTH = 0.7, 0.85
"""The share of a data sheet's figures that large kernels reach (chosen here)."""
HALF = (torch.bfloat16, torch.float16)
SIZES = (24, 40, 80, 141)
"""GiB of usual GPUs."""
ASIDE = 1.0
"""GiB of a GPU that its driver, its libraries and an allocator's gaps take (chosen here)."""


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
    eager: float
    """Seconds between two operators that Python asks for one by one."""
    graph: float
    """Seconds between two operators of one captured graph."""
    source: str
    runs_ahead: bool = True
    """Whether the host asks for operators while the device still works on earlier ones."""

    def seconds(self, operators: Sequence[Operator], *, graph: bool) -> float:
        """How long they take, one behind the other."""
        launch = self.graph if graph else self.eager
        if graph or not self.runs_ahead:
            return sum(self._kernel(operator) + launch for operator in operators)
        # The host runs ahead of the device: whichever is later at each operator decides.
        host = device = 0.0
        for operator in operators:
            host += launch
            device = max(host, device) + self._kernel(operator)
        return device

    def _kernel(self, operator: Operator) -> float:
        peak = self.half if operator.dtype in HALF else self.single
        return max(operator.flops / peak, operator.bytes / self.bandwidth)


def _gpu(name: str, half: float, single: float, gigabytes: float, source: str) -> Device:
    """Of a data sheet: TFLOPs without sparsity, GB a second."""
    return Device(
        name,
        half=OF_PEAK * half * 1e12,
        single=OF_PEAK * single * 1e12,
        bandwidth=OF_BANDWIDTH * gigabytes * 1e9,
        eager=8e-6,
        graph=1.5e-6,
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
"""By the name that a command takes. Launches are chosen here: 8 us an operator eager, 1.5 us in a graph."""


def fits_in(mib: float) -> str:
    """The smallest GPU that holds so many MiB."""
    size = next((size for size in SIZES if mib / 1024 + ASIDE <= size), None)
    return f"{size} GiB" if size is not None else f"> {SIZES[-1]} GiB"


def device_named(name: str) -> Device:
    """A device of the table, or ``cpu``: the one in use, measured now.

    Raises:
        UserError: there is none of that name.
    """
    if name == "cpu":
        return this_cpu()
    if name not in DEVICES:
        raise UserError(f"no device '{name}' is known here: {nearest(name, [*DEVICES, 'cpu'])}")
    return DEVICES[name]


def this_cpu() -> Device:
    """The CPU in use: FLOPs of a large product, bytes of a large copy, time an operator of a decoder of no size."""
    side, count = 1024, 2**25
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, side, side).to(dtype).unbind()
        rates[dtype] = 2.0 * side**3 / _shortest(lambda a=a, b=b: a @ b)  # type: ignore[misc]
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
        half=rates[torch.bfloat16],
        single=rates[torch.float32],
        bandwidth=8.0 * count / _shortest(lambda: target.copy_(source)),
        eager=launch,
        graph=launch,
        source="measured",
        runs_ahead=False,
    )


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
