"""One step of the optimizer, and its rate: whatever the run's length is given in, and however a step is cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import ask, awaken, collate, small
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from lavi.batch import Sample
from lavi.errors import UserError
from lavi.fusion.lavi import LaViFusion
from lavi.training.module import VisionLanguageModule

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SAMPLES = [
    ask(1, "what?", answer="red"),
    ask(2, "which image?", answer="the first of the two images"),
    ask("is there a circle?", answer="yes"),
    ask(3, "what colour?", answer="the small circle is red and the large square is blue"),
    ask(4, "how many?", answer="two"),
]


class Gradients(pl.Callback):
    """What the optimizer is about to step with, of each step, as any callback sees it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: pl.LightningModule, optimizer: Any) -> None:
        named = module.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


class AddedLoss(LaViFusion):
    """Adds to the loss what grows with its parameters: a fusion's own loss is accumulated, too."""

    def forward(self, *args: Any) -> Any:
        inputs = super().forward(*args)
        added = sum(parameter.square().sum() for parameter in self.parameters())
        inputs.vision.losses = lambda: {"size": 0.1 * added}
        return inputs


def gradients(
    build: Any, sizes: list[int], accumulate: int, *, rate: float = 1e-3, samples: Sequence[Sample] = SAMPLES
) -> tuple[list[dict[str, Tensor]], Any]:
    """Of a run over the samples in micro-batches of these sizes; and what it logged last."""
    model = build(AddedLoss(every=2, generator=small()))
    awaken(model.fusion)
    module = VisionLanguageModule(model, learning_rate={"fusion": rate, "language": rate})
    left = list(samples)
    batches = [collate(model, [left.pop(0) for _ in range(size)]) for size in sizes]
    seen = Gradients()
    run = pl.Trainer(
        logger=False,
        **QUIET,
        accumulate_grad_batches=accumulate,
        callbacks=[seen],
        max_epochs=1,
    )
    run.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return seen.steps, run.callback_metrics


@pytest.mark.parametrize(("sizes", "accumulate"), [([1, 4], 2), ([2, 3], 2), ([1, 1, 1, 2], 4), ([4, 1], 3)], ids=str)
def test_each_token_of_an_accumulated_step_weighs_the_same(build, sizes: list[int], accumulate: int) -> None:
    """Also in a window that the end of an epoch cuts short ([4, 1] of 3); the logged loss is that of all its tokens."""
    (whole,), logged = gradients(build, [5], 1)
    (summed,), logged_summed = gradients(build, sizes, accumulate)
    assert whole.keys() == summed.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logged_summed["train/loss"], logged["train/loss"], rtol=1e-5, atol=1e-6)


def test_every_step_has_a_window_of_its_own(build) -> None:
    """While the rate is 0 the model stays as it is: what the second window leaves is what it leaves as the first."""
    second = gradients(build, [1, 2, 1, 1], 2, rate=0.0)[0][1]
    (first,) = gradients(build, [1, 1], 2, rate=0.0, samples=SAMPLES[3:])[0]
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-4, atol=1e-6)


def rates(module: VisionLanguageModule, trainer: Any, steps: int) -> list[float]:
    """Of each step, which takes a second."""
    module.trainer = trainer
    optimizers = module.configure_optimizers()
    optimizer, schedule = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    per_step = []
    for _ in range(steps):
        per_step.append(optimizer.param_groups[0]["lr"])
        for timer in trainer.callbacks:
            timer.now += 1
        optimizer.step()
        schedule.step()
    return per_step


@pytest.fixture
def module(build) -> VisionLanguageModule:
    return VisionLanguageModule(
        build(LaViFusion(every=2, generator=small())), learning_rate={"fusion": 1e-3}, warmup=0.1
    )


class Seconds(Timer):
    """A timer whose clock is set by hand."""

    def __init__(self, duration: float) -> None:
        super().__init__({"seconds": duration})
        self.now = 0.0

    def time_elapsed(self, stage: str = "train") -> float:
        return self.now


ONE_RANK = SimpleNamespace(broadcast=lambda value: value)


def test_the_rate_rises_and_falls_to_a_hundredth_of_its_peak(module: VisionLanguageModule) -> None:
    rate = rates(module, SimpleNamespace(estimated_stepping_batches=20, callbacks=[]), 21)
    assert rate[0] == pytest.approx(0.5e-3)
    assert rate[1] == max(rate) == pytest.approx(1e-3)
    assert rate[1:] == sorted(rate[1:], reverse=True)
    assert rate[20] == pytest.approx(1e-5)


@pytest.mark.parametrize("estimate", [float("inf"), -1])
def test_the_rate_follows_the_clock_where_time_ends_the_run(module: VisionLanguageModule, estimate: float) -> None:
    timer = Seconds(20)
    clocked = SimpleNamespace(estimated_stepping_batches=estimate, callbacks=[timer], strategy=ONE_RANK)
    rate = rates(module, clocked, 21)
    assert rate[2] == max(rate) == pytest.approx(1e-3)
    assert rate[:3] == sorted(rate[:3])
    assert rate[2:] == sorted(rate[2:], reverse=True)
    assert rate[20] == pytest.approx(1e-5)


def test_whichever_ends_the_run_first_decides_its_rate(module: VisionLanguageModule) -> None:
    timer = Seconds(1000)
    slow = SimpleNamespace(estimated_stepping_batches=20, callbacks=[timer], strategy=ONE_RANK)
    by_steps = SimpleNamespace(estimated_stepping_batches=20, callbacks=[])
    assert rates(module, slow, 21) == rates(module, by_steps, 21)
    timer = Seconds(15)  # behind the steps until the fourth, before them from there on
    both = rates(module, SimpleNamespace(estimated_stepping_batches=20, callbacks=[timer], strategy=ONE_RANK), 15)
    timer = Seconds(15)
    clocked = SimpleNamespace(estimated_stepping_batches=float("inf"), callbacks=[timer], strategy=ONE_RANK)
    assert both == rates(module, by_steps, 15)[:4] + rates(module, clocked, 15)[4:]
    timer = Seconds(20)
    quick = SimpleNamespace(estimated_stepping_batches=1000, callbacks=[timer], strategy=ONE_RANK)
    assert rates(module, quick, 21)[20] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("limit", "epochs", "most", "steps"), [(10, 2, -1, 10), (9, 2, -1, 10), (10, 2, 7, 7), (1.0, 2, 7, 7)]
)
def test_a_streams_steps_are_counted_without_making_its_loader(
    module: VisionLanguageModule, limit: float, epochs: int, most: int, steps: int
) -> None:
    """A loader that is created before a checkpoint is restored would begin to read from the start."""
    stream = SimpleNamespace(unsized=True)
    settings = {"limit_train_batches": limit, "max_epochs": epochs, "max_steps": most, "accumulate_grad_batches": 2}
    rate = rates(module, SimpleNamespace(datamodule=stream, callbacks=[], **settings), steps + 1)
    assert rate == rates(module, SimpleNamespace(estimated_stepping_batches=steps, callbacks=[]), steps + 1)


def test_a_run_whose_end_nothing_names_is_refused(module: VisionLanguageModule) -> None:
    with pytest.raises(UserError, match=r"set trainer\.max_steps, or trainer\.max_epochs with"):
        rates(module, SimpleNamespace(estimated_stepping_batches=float("inf"), callbacks=[Timer()]), 0)


def test_the_trainer_counts_the_steps_of_epochs(build) -> None:
    """Three epochs of five batches, two to a step: nine steps, and the rate has fallen at the end."""
    model = build(LaViFusion(every=2, generator=small()))
    module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3})
    batches = [collate(model, [sample]) for sample in SAMPLES]
    seen: list[float] = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    trainer = pl.Trainer(
        logger=False,
        **QUIET,
        accumulate_grad_batches=2,
        max_epochs=3,
        callbacks=[Rates()],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert len(seen) == 9
    assert seen[0] == max(seen) == pytest.approx(1e-3)
    assert seen[-1] < 0.1e-3


class Logged(Logger):
    """What a logger is given, by step."""

    name, version = "logged", "0"

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.steps.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def test_a_step_logs_the_groups_that_it_has(build) -> None:
    """What an earlier step had is not said again."""
    model = build(LaViFusion(every=2, generator=small()))
    module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3})
    colours, counts = ask(1, "what?", answer="red"), ask(2, "how many?", answer="two")
    colours.messages[1]["family"], counts.messages[1]["family"] = "colour", "count"
    batches = [collate(model, [one]) for one in (colours, counts, counts, colours)]
    logged = Logged()
    trainer = pl.Trainer(
        logger=logged,
        log_every_n_steps=1,
        **QUIET,
        max_epochs=1,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    families = [name.rpartition("/")[2] for step in range(4) for name in logged.steps[step] if "family" in name]
    assert families == ["colour", "count", "count", "colour"]
    assert not any(
        name.endswith("/all") for values in logged.steps.values() for name in values
    )  # of data without levels
    assert all({"train/accuracy", "train/loss"} <= set(logged.steps[step]) for step in range(4))


def test_scores_that_nobody_logs_are_not_collected(build) -> None:
    model = build(LaViFusion(every=2))
    module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3})
    batches = [collate(model, [sample]) for sample in SAMPLES]
    trainer = pl.Trainer(logger=False, log_every_n_steps=0, **QUIET, max_epochs=1)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert module.accuracy["train"].scores == []
