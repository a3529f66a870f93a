"""What do the logits of a training step cost: of all tokens, or of the trained ones alone?

    python benchmarks/train_step.py --out benchmarks/results/train_step.jsonl

The head and the loss, forward and backward, behind hidden states of a batch of which a fifth is trained: once with the
logits of all its tokens and a loss that leaves some out, once as training does it; on a GPU, where Liger's kernel is
installed, by that too. Timed in turns; the peak is what stands above the hidden states. Vocabulary and width are
Qwen2-0.5B's; ``--small`` is for a quick look.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from own_records import ends, keep, parser_of, read, with_interval
from torch import Tensor, nn

from lavi.batch import IGNORE
from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.efficiency.estimate import estimate, ratio
from lavi.efficiency.latency import Contestant, clock_of, time_in_turns
from lavi.efficiency.memory import MIB, peak_of
from lavi.efficiency.record import device_name
from lavi.language.fused_cross_entropy import fused_scores, runs_kernel
from lavi.language.token_scores import MOST_LOGITS, score_tokens
from lavi.report import console, table

VOCABULARY, WIDTH = 151_936, 896
ROWS, TOKENS, TRAINED = 4, 128, 0.2
"""Of the batch: rows, tokens of each, and the share of them that is trained, at the end of each row."""
ALL, SOME, FUSED = "logits of all tokens", "logits of trained tokens", "the same in Liger's kernel"


def head_and_loss(device: torch.device, vocabulary: int, width: int) -> dict[str, Callable[[], Tensor]]:
    """The ways: each runs forward and backward once and gives the loss; all look for the likeliest tokens, too."""
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, device=device).requires_grad_(False)
    hidden = torch.randn(ROWS, TOKENS, width, device=device, requires_grad=True)
    labels = torch.randint(vocabulary, (ROWS, TOKENS), device=device)
    labels[:, : round((1 - TRAINED) * TOKENS)] = IGNORE

    def of_all_tokens() -> Tensor:
        logits, targets = head(hidden), labels[:, 1:].flatten()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
        logits.argmax(-1)
        return loss

    def of_trained_tokens() -> Tensor:
        return score_tokens(head, hidden, labels, chunk=max(1, MOST_LOGITS // vocabulary)).loss

    def in_kernel() -> Tensor:
        trained = labels[:, 1:] != IGNORE
        return -fused_scores(head, hidden[:, :-1][trained], labels[:, 1:][trained])[0].sum()

    def run(way: Callable[[], Tensor]) -> Tensor:
        hidden.grad = None
        with torch.enable_grad():
            loss = way()
            loss.backward()
        return loss.detach()

    ways = {ALL: of_all_tokens, SOME: of_trained_tokens} | ({FUSED: in_kernel} if runs_kernel(hidden) else {})
    return {name: partial(run, way) for name, way in ways.items()}


def measure(device: torch.device, *, vocabulary: int, width: int, turns: int) -> list[dict[str, Any]]:
    """One record for each way."""
    ways = head_and_loss(device, vocabulary, width)
    losses = [float(run()) for run in ways.values()]
    assert all(abs(loss - losses[0]) < 1e-5 * abs(losses[0]) for loss in losses), losses
    contestants = [Contestant({"head and loss": run}) for run in ways.values()]
    times = [t["head and loss"] for t in time_in_turns(contestants, clock_of(device), pairs=[(1, 0)], turns=turns)]
    peaks = [peak_of(run, device) / MIB for run in ways.values()]
    about = {"device": device_name(device), "torch": torch.__version__, "vocabulary": vocabulary, "width": width}
    return [
        about
        | {"way": way, "milliseconds": estimate(own).median, "peak_mib": peak, "peak_ratio": peak / peaks[0]}
        | {"time_ratio": ends(ratio(own, times[0]))}
        for way, own, peak in zip(ways, times, peaks, strict=True)
    ]


def train_step_table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["head and loss with", "ms", "of that of all tokens (interval)", "peak MiB", "of that of all tokens"]
    rows = []
    for record in records:
        rows.append(
            [
                record["way"],
                f"{record['milliseconds']:.0f}",
                with_interval(record["time_ratio"]),
                f"{record['peak_mib']:.0f}",
                f"{record['peak_ratio']:.2f}",
            ]
        )
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=whole_number(1), default=15, help="timed turns")
    parser.add_argument("--small", action="store_true", help="a small vocabulary and width")
    args = read(parser)
    sizes = {"vocabulary": 1000, "width": 32} if args.small else {"vocabulary": VOCABULARY, "width": WIDTH}
    records = keep(measure(device_of("auto"), turns=args.turns, **sizes), args.out)
    title = f"{ROWS * TOKENS} tokens, {TRAINED:.0%} trained; {records[0]['device']}"
    console().print(table(title, *train_step_table(records)))


if __name__ == "__main__":
    main()
