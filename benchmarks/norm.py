"""What does a modulated norm cost: bare, with its deltas beside it, and with both in one kernel?

    python benchmarks/norm.py --out benchmarks/results/norm.jsonl

An RMS norm of Qwen2-7B's width over the tokens of a batch, forward and forward with backward, all ways in turns. On a
GPU the bytes that each must move stand against those of a plain copy in the same run. On a CPU the one operator has no
kernel of its own: there only the first two tell something.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from own_records import ends, keep, parser_of, read, with_interval
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.efficiency.estimate import estimate, ratio
from lavi.efficiency.latency import Contestant, clock_of, half_the_threads, shortest_turn, time_in_turns
from lavi.efficiency.record import device_name
from lavi.language.surgery import swap
from lavi.nn.modulated_norm import ModulatedNorm
from lavi.nn.norm_kernel import fused
from lavi.nn.norm_kinds import kind_of
from lavi.report import console, table

WIDTH, TOKENS, TOKENS_ON_GPU = 3584, 4096, 16384
REPEATS = 20
"""Runs between two looks at the clock on a GPU, where one ends before the host has asked for the next; the tokens there
exceed its caches."""
BARE, BESIDE, AT_ONCE, COPY = "bare norm", "with deltas", "with deltas, one operator", "copy"
STAGES = ("forward", "forward and backward")


def ways(width: int, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    """Each way's stages."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, tokens, width, device=device, dtype=dtype).unbind()
    deltas = [tensor.requires_grad_() for tensor in torch.randn(2, tokens, width, device=device).unbind()]
    x.requires_grad_()
    bare, beside = (Qwen2RMSNorm(width).to(device, dtype).requires_grad_(False) for _ in range(2))
    kind = kind_of(bare, width)
    assert kind is not None
    swap(beside, ModulatedNorm)
    assert isinstance(beside, ModulatedNorm)
    beside.kind, beside.deltas = kind, (deltas[0], deltas[1])
    runs: dict[str, Callable[[], Tensor]] = {
        BARE: lambda: bare(x),
        BESIDE: lambda: beside(x),
        AT_ONCE: lambda: fused(x, bare.weight, None, (deltas[0], deltas[1]), kind),
    }

    def forward(run: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return run()

    def both(run: Callable[[], Tensor]) -> None:
        for tensor in (x, *deltas):
            tensor.grad = None
        with torch.enable_grad():
            run().backward(grad)

    stages = {
        name: {STAGES[0]: lambda r=run: forward(r), STAGES[1]: lambda r=run: both(r)} for name, run in runs.items()
    }  # type: ignore[misc]
    target = torch.empty_like(x)
    stages[COPY] = {STAGES[0]: lambda: target.copy_(x.detach())}
    repeats = REPEATS if device.type == "cuda" else 1
    return {name: {stage: partial(repeated, run, repeats) for stage, run in of.items()} for name, of in stages.items()}


def repeated(run: Callable[[], Any], times: int) -> None:
    """So many runs, one behind the other."""
    for _ in range(times):
        run()


def least_bytes(way: str, stage: str, width: int, tokens: int, size: int) -> float:
    """Bytes that must be moved: each input read once, each output written once; ``size`` of an element of x."""
    of_x, of_delta = float(tokens * width * size), float(tokens * width * 4)
    deltas = 0.0 if way in (BARE, COPY) else 2 * of_delta
    if stage == STAGES[0]:
        return 2 * of_x + deltas
    back = 3 * of_x + (0.0 if way == BARE else 3 * of_delta)  # grad, x, its gradient; dgamma and both gradients
    return 2 * of_x + deltas + back


def measure(device: torch.device, *, width: int, tokens: int, turns: int) -> list[dict[str, Any]]:
    """One record for each way and stage."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    runs = ways(width, tokens, device, dtype)
    names = list(runs)
    pairs = {(number, 0) for number in range(1, len(names) - 1)}
    with half_the_threads(device):
        times = time_in_turns(
            [Contestant(stages) for stages in runs.values()],
            clock_of(device),
            pairs=pairs,
            turns=turns,
            shortest=shortest_turn(device),
        )
        name_of_device = device_name(device)  # with the threads that computed
    size = torch.empty(0, dtype=dtype).element_size()

    repeats = REPEATS if device.type == "cuda" else 1

    def once(milliseconds: list[float]) -> float:
        return estimate(milliseconds).median / repeats

    def rate(name: str, stage: str, milliseconds: list[float]) -> float:
        return least_bytes(name, stage, width, tokens, size) / once(milliseconds) / 1e6

    copies = rate(COPY, STAGES[0], times[-1][STAGES[0]])
    about = {"device": name_of_device, "torch": torch.__version__, "width": width, "tokens": tokens}
    about |= {"dtype": str(dtype).removeprefix("torch.")}
    return [
        about
        | {"way": name, "stage": stage, "milliseconds": once(own[stage])}
        | {"of_bare": ends(ratio(own[stage], times[0][stage]))}
        | {"gb_per_second": rate(name, stage, own[stage]), "of_copy": rate(name, stage, own[stage]) / copies}
        for name, own in zip(names[:-1], times[:-1], strict=True)
        for stage in STAGES
    ]


def norm_table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["norm", "stage", "ms", "times the bare norm (interval)", "of the bandwidth of a copy (%)"]
    rows = []
    for record in records:
        cells = [
            f"{record['milliseconds']:.2f}",
            with_interval(record["of_bare"]),
            f"{100 * record['of_copy']:.0f}",
        ]
        rows.append([record["way"], record["stage"], *cells])
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=whole_number(1), default=15, help="timed turns")
    parser.add_argument("--small", action="store_true", help="few tokens of a small width")
    args = read(parser)
    device = device_of("auto")
    width, tokens = (64, 32) if args.small else (WIDTH, TOKENS_ON_GPU if device.type == "cuda" else TOKENS)
    records = keep(measure(device, width=width, tokens=tokens, turns=args.turns), args.out)
    title = f"{tokens} tokens of width {width}, {records[0]['dtype']}; {records[0]['device']}"
    console().print(table(title, *norm_table(records)))


if __name__ == "__main__":
    main()
