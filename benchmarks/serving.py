"""What do requests wait for under load? Percentiles and throughput where requests arrive at random.

    python benchmarks/serving.py --out benchmarks/results/serving.jsonl

Requests of one kind (an image, 50 text tokens, an answer of 16) arrive at random times of a given mean rate, the same
times for every method. A thread takes what is waiting, at most a batch of them, answers it to the end, and takes the
next: static batches. Rates are shares of what concatenation can do at its largest batch, so that at a share of 1.2 its
queue grows while a cheaper method's may not. On a GPU at full size, elsewhere with the small models of verify_claims.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from statistics import mean, median, quantiles
from typing import Any

import torch
from own_records import keep, parser_of, read
from verify_claims import BASELINE, LAVI, build_for_timing, recipe_at, shrunk

from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.efficiency.latency import half_the_threads, model_and_floor
from lavi.efficiency.measure import computing
from lavi.efficiency.record import device_name
from lavi.efficiency.scenario import Scenario
from lavi.recipe import Recipe
from lavi.report import console, table

SCENARIO, TOKENS = Scenario(50, image=(384, 384)), 16
BATCHES = (1, 2, 4, 8)
"""Rows that a batch may have; requests are answered in the largest that they fill."""
SHARES = (0.3, 0.6, 0.9, 1.2)
"""Rates, of what concatenation can do."""
CONCAT, FUSED, FLOOR = "LLaVA-OneVision", "LaVi", "floor"

Answer = Mapping[int, Callable[[], Any]]
"""Answers a batch of so many requests."""


def servers(recipes: Mapping[str, Recipe], device: torch.device) -> dict[str, Answer]:
    """How each method, and the floor, answers batches."""
    answers: dict[str, dict[int, Callable[[], Any]]] = {name: {} for name in (*recipes, FLOOR)}
    for name, recipe in recipes.items():
        model = build_for_timing(recipe, device)
        for rows in BATCHES:
            shape = Scenario(SCENARIO.text, rows, image=SCENARIO.image).shape_for(model)
            within = partial(computing, model, None, device)
            both = model_and_floor(model, shape, device=device, outputs=[TOKENS], within=within)
            for who, stages in zip((name, FLOOR), both, strict=True):
                answers[who][rows] = partial(_within, within, stages.stages[f"end_to_end_{TOKENS}"])
    return {name: dict(of) for name, of in answers.items()}


def _within(context: Callable[[], Any], run: Callable[[], Any]) -> None:
    with context():
        run()


def arrivals(rate: float, count: int) -> list[float]:
    """Seconds at which requests arrive: random gaps whose mean is 1 / ``rate``, the same for everybody who asks."""
    draw = random.Random(0)
    times = list(accumulate(draw.expovariate(1.0) for _ in range(count)))
    return [at * count / (rate * times[-1]) for at in times]


def serve(answer: Answer, times: Sequence[float], device: torch.device) -> dict[str, float]:
    """Answer requests as they arrive: seconds that they took, and requests a second."""
    waiting: queue.Queue[int] = queue.Queue()
    took: dict[int, float] = {}
    batches: list[int] = []
    began = time.perf_counter()

    def work() -> None:
        while len(took) < len(times):
            taken = [waiting.get()]
            largest = max(rows for rows in answer if rows <= 1 + waiting.qsize())
            taken += [waiting.get() for _ in range(largest - 1)]
            with torch.no_grad():
                answer[largest]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done = time.perf_counter() - began
            took.update({number: done - times[number] for number in taken})
            batches.append(len(taken))

    with ThreadPoolExecutor(1) as thread:
        worker = thread.submit(work)
        for number, at in enumerate(times):
            time.sleep(max(0.0, began + at - time.perf_counter()))
            waiting.put(number)
        worker.result()
    seconds = sorted(took.values())
    percentiles = quantiles(seconds, n=100, method="inclusive")
    return {
        "p50": percentiles[49],
        "p90": percentiles[89],
        "p99": percentiles[98],
        "rate": len(times) / (time.perf_counter() - began),
        "rows": mean(batches),
    }


def measure(recipes: Mapping[str, Recipe], device: torch.device, *, requests: int) -> Iterator[dict[str, Any]]:
    """One record for each method and rate."""
    answers = servers(recipes, device)
    capacity = capacities(answers, device)
    about = {"device": device_name(device), "torch": torch.__version__, "small": device.type != "cuda"}
    for share in SHARES:
        times = arrivals(share * capacity[CONCAT], requests)
        for name, answer in answers.items():
            load = {"method": name, "share": share, "asked": requests / times[-1], "capacity": capacity[name]}
            record = about | load | serve(answer, times, device)
            console().print(f"{name} at {share:g} of concatenation's capacity: {record['p90']:.2f} s (p90)")
            yield record


def capacities(answers: Mapping[str, Answer], device: torch.device) -> dict[str, float]:
    """Requests a second of each at its largest batch: of some runs, in turns, the median; all batches are warm then."""
    times: dict[str, list[float]] = {name: [] for name in answers}
    with torch.no_grad():
        for answer in answers.values():
            for run in answer.values():
                run()
        for _ in range(3):
            for name, answer in answers.items():
                began = time.perf_counter()
                answer[max(answer)]()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times[name].append(time.perf_counter() - began)
    return {name: max(answers[name]) / median(own) for name, own in times.items()}


def serving_table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["rate, of what concatenation can do", "method", "p50 s", "p90 s", "p99 s", "answered a second", "batch"]
    columns += ["in full batches, a second"]
    rows = []
    can = next(record["capacity"] for record in records if record["method"] == CONCAT)
    for record in records:
        figures = [f"{record[name]:.2f}" for name in ("p50", "p90", "p99", "rate")]
        figures += [f"{record[name]:.1f}" for name in ("rows", "capacity")]
        rows.append([f"{record['asked'] / can:.2f}", record["method"], *figures])
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--requests", type=whole_number(1), default=100, help="of each method and rate")
    args = read(parser)
    device = device_of("auto")
    recipes = {CONCAT: recipe_at(BASELINE), FUSED: recipe_at(LAVI)}
    if device.type != "cuda":
        recipes = {name: shrunk(recipe) for name, recipe in recipes.items()}
    with half_the_threads(device):
        records = keep(measure(recipes, device, requests=args.requests), args.out)
    shown = f"{SCENARIO}, {SCENARIO.text} text tokens, answers of {TOKENS} tokens; {records[0]['device']}"
    console().print(table(shown, *serving_table(records)))


if __name__ == "__main__":
    main()
