"""Rows gathered from a table, and their gradients: what does the way of taking them cost?

    python benchmarks/gather.py --out benchmarks/results/gather.jsonl

Visual tokens are gathered image by image for each row of a batch, half of it padding: by indexing, and by
:func:`lavi.nn.take_rows.take_rows`, forward and backward, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from own_records import ends, keep, parser_of, read, with_interval
from torch import Tensor

from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.efficiency.estimate import estimate, ratio
from lavi.efficiency.latency import Contestant, clock_of, half_the_threads, shortest_turn, time_in_turns
from lavi.efficiency.record import device_name
from lavi.nn.take_rows import take_rows
from lavi.report import console, table

BATCH, TOKENS, WIDTH = 64, 128, 128
STAGE = "forward and backward"
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "table[index]": lambda table, index: table[index],
    "lavi.nn.take_rows": take_rows,
}


def gathered(take: Callable[[Tensor, Tensor], Tensor], batch: int, device: torch.device) -> Callable[[], None]:
    """Gathers the visual tokens of a batch, and backpropagates."""
    visual = torch.randn(batch * TOKENS // 2 + 1, WIDTH, device=device, requires_grad=True)  # the last is padding
    index = torch.full((batch, TOKENS), len(visual) - 1, device=device)
    index[:, : TOKENS // 2] = torch.arange(len(visual) - 1, device=device).view(batch, -1)
    grad = torch.randn(batch, TOKENS, WIDTH, device=device)

    def run() -> None:
        visual.grad = None
        with torch.enable_grad():
            take(visual, index).backward(grad)

    return run


def measure(device: torch.device, *, batch: int, turns: int) -> list[dict[str, Any]]:
    """A record for each way."""
    with half_the_threads(device):
        times = time_in_turns(
            [Contestant({STAGE: gathered(take, batch, device)}) for take in WAYS.values()],
            clock_of(device),
            pairs={(1, 0)},
            turns=turns,
            shortest=shortest_turn(device),
        )
        about = {"device": device_name(device), "torch": torch.__version__}
    about |= {"rows": batch, "tokens": TOKENS, "width": WIDTH}
    return [
        about
        | {"way": way, "milliseconds": estimate(own[STAGE]).median}
        | {"of_indexing": ends(ratio(own[STAGE], times[0][STAGE]))}
        for way, own in zip(WAYS, times, strict=True)
    ]


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=whole_number(1), default=15, help="timed turns")
    parser.add_argument("--small", action="store_true", help="a small batch")
    args = read(parser)
    records = keep(measure(device_of("auto"), batch=2 if args.small else BATCH, turns=args.turns), args.out)
    rows = [[one["way"], f"{one['milliseconds']:.2f}", with_interval(one["of_indexing"])] for one in records]
    title = f"{records[0]['rows']} rows of {TOKENS} tokens of width {WIDTH}, {STAGE}; {records[0]['device']}"
    console().print(table(title, ["way", "ms", "times indexing (interval)"], rows))


if __name__ == "__main__":
    main()
