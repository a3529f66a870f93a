"""What this model costs beside its concatenation twin, over a sweep of visual tokens."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lavi.checkpoint import RECIPE
from lavi.efficiency import record
from lavi.efficiency.measure import build_on, concat_twin, count, measure, saving
from lavi.efficiency.record import Record
from lavi.recipe import Recipe
from lavi.report import console, table

log = logging.getLogger("lavi")

RECORDS = "efficiency.jsonl"


class Efficiency(pl.Callback):
    """Counts FLOPs on the meta device and measures time and memory on the device in use, when training ends.

    Each point is one JSON line in ``efficiency.jsonl`` of the run folder. In TensorBoard the curves stand under
    ``efficiency/``, x = visual tokens, one line a method (a run of its own, so that they overlay). The weights that
    were trained are not touched: fresh models are measured, since time does not depend on weights.

    Args:
        visual_tokens: the sweep.
        text_tokens: of the prompt.
        runs: timed runs of each stage; 0 counts FLOPs only.
    """

    def __init__(self, *, visual_tokens: list[int], text_tokens: int = 50, runs: int = 20) -> None:
        self.visual_tokens, self.text_tokens, self.runs = visual_tokens, text_tokens, runs

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        recipe = Recipe.load(folder / RECIPE)
        records = self.sweep(recipe, module.device)
        record.write(records, folder / RECORDS)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                write_curves(records, Path(logger.log_dir))
        console().print(sweep_table(records))

    def sweep(self, recipe: Recipe, device: torch.device) -> list[Record]:
        """One record for each method and number of visual tokens."""
        recipes = {"own": recipe, "twin": concat_twin(recipe)}
        with torch.random.fork_rng():  # building a model draws weights: the run's random state is left as it was
            on_meta = {name: build_on(r, "meta") for name, r in recipes.items()}
            on_device = {name: build_on(r, device) for name, r in recipes.items()} if self.runs else {}
        records = []
        for visual in self.visual_tokens:
            for name, made_from in recipes.items():
                made = count(made_from, on_meta[name], text=self.text_tokens, visual=visual)
                room = on_meta[name].language.context_length
                if made.visual_tokens_in_language + self.text_tokens > room:
                    log.warning(
                        "%s with %d visual tokens is longer than its %d positions: not measured",
                        made.method,
                        visual,
                        room,
                    )
                    continue
                if self.runs:
                    measure(made, on_device[name], device=device, runs=self.runs)
                records.append(made)
        return records


def curves(made: Record) -> dict[str, float]:
    """The curves a record is a point of."""
    named = {
        "GFLOPs with vision encoder": made.gflops_total,
        "GFLOPs without vision encoder": made.gflops_language,
        "peak MiB above weights": made.mib.get("peak"),
    }
    named |= {f"ms {stage}": made.milliseconds.get(stage, [None])[0] for stage in ("prefill", "decode")}
    return {f"efficiency/{name}": value for name, value in named.items() if value is not None}


def write_curves(records: list[Record], folder: Path) -> None:
    """Curves over visual tokens: one TensorBoard run a method, and the floor of FLOPs as one more."""
    for method in dict.fromkeys(made.method for made in records):
        with SummaryWriter(str(folder / f"efficiency-{method}")) as writer:
            for made in (m for m in records if m.method == method):
                for tag, value in curves(made).items():
                    writer.add_scalar(tag, value, made.visual_tokens)
    with SummaryWriter(str(folder / "efficiency-floor")) as writer:
        for made in records:
            if made.method != "concat":
                floor = made.flops_floor / 1e9
                writer.add_scalar("efficiency/GFLOPs without vision encoder", floor, made.visual_tokens)
                with_vision = floor + made.flops["vision_encoder"] / 1e9
                writer.add_scalar("efficiency/GFLOPs with vision encoder", with_vision, made.visual_tokens)


def sweep_table(records: list[Record]) -> object:
    """One row a point, the method beside its twin."""
    twins = {made.visual_tokens: made for made in records if made.method == "concat"}
    rows = []
    for made in records:
        twin = twins.get(made.visual_tokens)
        saved, ceiling = saving(made, twin, with_vision=False) if twin else (float("nan"), float("nan"))
        saved_all, ceiling_all = saving(made, twin, with_vision=True) if twin else (float("nan"), float("nan"))
        ms = [f"{made.milliseconds[s][0]:.2f}" if s in made.milliseconds else "-" for s in ("prefill", "decode")]
        rows.append(
            [
                made.method,
                str(made.visual_tokens),
                f"{made.gflops_language:.4g}",
                f"{saved:.1f} ({ceiling:.1f})",
                f"{made.gflops_total:.4g}",
                f"{saved_all:.1f} ({ceiling_all:.1f})",
                *ms,
                f"{made.mib['peak']:.2f}" if made.mib else "-",
            ]
        )
    columns = ["method", "visual tokens", "GFLOPs LM", "saved % (ceiling)", "GFLOPs all", "saved % (ceiling)"]
    device = next((made.device for made in records if made.device), "not timed")
    title = f"Efficiency of one prompt of {records[0].text_tokens} text tokens; 1 multiply-add = 2 FLOPs; {device}"
    return table(title, [*columns, "ms prefill", "ms decode", "peak MiB"], rows)
