"""What a run shows before its first step: what trains, and one conversation as it is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, Timer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase

from lavi.batch import IGNORE, Batch
from lavi.data.chat import TEMPLATES, Chat
from lavi.data.data_module import no_training_samples
from lavi.errors import UserError
from lavi.model import VisionLanguageModel
from lavi.report import Lines, table
from lavi.training.optim import every_name, inside


class StepBar(RichProgressBar):
    """Lightning's bar, counting epochs only where the recipe does: most of ours count steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        counts_epochs = self.trainer.max_epochs not in (None, -1)
        return super()._get_train_description(current_epoch) if counts_epochs else "Training  "


class StepLines(ProgressBar):
    """The same for a log or a pipe: a line on the first step and then every few seconds, while validating too."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._enabled = True
        self._training: Lines | None = None
        self._validation: Lines | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._enabled:
            self._training = Lines(
                "training",
                total=_whole(trainer.estimated_stepping_batches),
                done=trainer.global_step,
                unit="step",
                note=self._loss,
                deadline=self._seconds_left,
                console=self.console,
            )
            self._training.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if (lines := self._training) is None or trainer.global_step == lines.done:
            return
        if lines.done == lines.first:
            lines.warmed_up(trainer.global_step)
        else:
            lines.update(trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._training is not None:
            self._training.pace.pause()
        if self._enabled:
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            self._validation = Lines("validation", total=_whole(sum(batches)), unit="batch", console=self.console)
            self._validation.start()

    def on_validation_batch_end(self, *args: Any) -> None:
        if self._validation is not None:
            self._validation.update(self._validation.done + 1)

    def on_validation_end(self, *args: Any) -> None:
        if self._validation is not None:
            self._validation.stop()
            if self._validation.printed:  # a short one comes too often for a line of its own
                self._validation.say(last=True)
            self._validation = None
        if self._training is not None:
            self._training.pace.resume(self._training.done)

    def on_train_end(self, *args: Any) -> None:
        if self._training is not None:
            self._training.stop()
            self._training.say(last=True)
            self._training = None

    def on_exception(self, *args: Any) -> None:
        for lines in (self._training, self._validation):
            if lines is not None:
                lines.stop()
        self._training = self._validation = None

    def _loss(self) -> str:
        metrics = self.trainer.progress_bar_metrics
        losses = [value for name, value in metrics.items() if "loss" in name and not name.startswith("val")]
        return f"loss {losses[0]:.4g}" if losses else ""

    def _seconds_left(self) -> float | None:
        """Of ``max_time``."""
        timers = [callback for callback in self.trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        return next((left for timer in timers if (left := timer.time_remaining()) is not None), None)


def _whole(number: float) -> int | None:
    """None for a number without end."""
    return int(number) if 0 < number < float("inf") else None


def what_trains(module: pl.LightningModule) -> Table:
    """A table of the model's parts: parameters, how many of them train, at which rate; named parts below theirs."""
    rows: list[list[str]] = []
    model, rates = cast(nn.Module, module.model), getattr(module, "learning_rate", {})
    every = every_name(model)
    children = [name for name, _ in model.named_children()]
    deeper = sorted(set(rates) - set(children)) if isinstance(rates, dict) else []
    for child in children:
        for name in (child, *(part for part in deeper if inside(part, child))):
            sizes = [(p.numel(), p.requires_grad) for names, p in every if any(inside(n, name) for n in names)]
            trained = sum(size for size, trains in sizes if trains)
            rate = rates.get(name) if isinstance(rates, dict) else rates
            shown = str(rate) if rate is not None else "as below" if trained else "frozen"
            indented = "  " * name.count(".") + name
            rows.append([indented, f"{sum(size for size, _ in sizes):,}", f"{trained:,}", shown])
    return table("What trains", ["part", "parameters", "trained", "learning rate"], rows)


def as_trained(model: VisionLanguageModel, batches: Iterable[Batch]) -> RenderableType:
    """The first conversation as the model is trained on it: the trained tokens stand out.

    Raises:
        UserError: there is no batch; or no answer of the first ends with an end token: answers would never stop.
    """
    batch = next(iter(batches), None)
    if batch is None:
        raise no_training_samples(Counter(getattr(batches, "left_out", ())))
    start, stop = batch.spans[0]
    tokenizer = model.chat.tokenizer
    images = [slot.column for slot in batch.image_slots if slot.row == 0]
    text = Text()
    is_trained = (batch.labels[0] != IGNORE).tolist()
    # Tokens of one kind are decoded together: a character may be in several.
    for (_, trained), run in groupby(range(start, stop), lambda c: (sum(i <= c for i in images), is_trained[c])):
        first, *others = run
        text.append("[image] " * images.count(first), style="blue")
        ids = batch.input_ids[0, first : first + 1 + len(others)].tolist()
        text.append(str(tokenizer.decode(ids)), style="bold green" if trained else "dim")
    trained_tokens = int((batch.labels != IGNORE).sum())
    share = trained_tokens / int(batch.attention_mask.sum())
    ends = set(model.end_ids())
    if not any(int(batch.labels[a.row, a.stop - 1]) in ends for a in batch.answers):
        raise _no_end_token(tokenizer, ends)
    note = Text(f"trained: {100 * share:.0f} % of the tokens (green), the end token among them", style="italic")
    return Group(Text(f"One conversation as trained (sample '{batch.keys[0]}')", style="italic"), text, note)


def _no_end_token(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> UserError:
    """Of answers that would never stop, with the chat templates that would end them."""
    names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ends))) or "none is known"
    templates = [template or "null" for template in (None, *TEMPLATES) if _answer_end(tokenizer, template) in ends]
    advice = f"set model.chat_template={' or '.join(templates)}, which does"
    if not templates:
        advice = "take a tokenizer that has an eos_token, such as that of a model for chats"
    return UserError(f"no trained answer ends with an end token ({names}), and none would ever stop: {advice}.")


def _answer_end(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int | None:
    """The last token of an answer by a named template, or by the tokenizer's own; None: it cannot be trained on."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        encoded = Chat(tokenizer, template).encode(turns, images=0)
    except UserError:
        return None
    return encoded.ids[encoded.turns[-1].stop - 1]
