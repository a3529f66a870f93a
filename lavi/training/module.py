"""The LightningModule: step, optimiser groups, schedule, and which parts train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn

from lavi.batch import Batch
from lavi.checkpoints.feature_cache import check_feature_caches
from lavi.checkpoints.published_vlm import start_from_vlm
from lavi.checkpoints.trained_weights import StartsFromRun, has_language, load_start
from lavi.config.paths import home_path
from lavi.config.types import Positive, PositiveOrZero, Share, ShareOrZero
from lavi.errors import UserError
from lavi.language.compiled import check_compiler
from lavi.loading.vlm import names_vlm
from lavi.metrics.base import GroupedMean, groups_of
from lavi.metrics.teacher_forcing import correct_under_teacher_forcing
from lavi.model import VisionLanguageModel
from lavi.training.compiled_layers import CompiledLayers
from lavi.training.optim import MuonAdamW, adamw, inside, parameter_groups, part_of_each, rate_at_share, rate_at_step
from lavi.training.sharding import shard
from lavi.training.tile_dropout import TileDropout


class VisionLanguageModule(StartsFromRun, pl.LightningModule):
    """Trains a :class:`VisionLanguageModel` on the tokens of its answers.

    Stages are recipes, each starting from the run before it. As LLaVA-1.5 does it, with LoRA in the second::

        stage1.yaml     module: {learning_rate: {fusion: 1e-3}}                        -> runs/stage1
        stage2.yaml     model: {language: {lora: {rank: 128, alpha: 256}}}
                        module: {learning_rate: {fusion: 2e-5, language: 2e-4}, start_from: runs/stage1}

    The weights of the run it started from are in its own checkpoints, also frozen ones: that run may be deleted.

    Args:
        model: what is trained.
        learning_rate: peak rate of each part that trains, by its dotted name in the model: ``fusion``, ``vision``,
            ``language.hf.lm_head`` or any other submodule or parameter. The most specific name wins; a part that is not
            named, or at null, is frozen. A language model with LoRA trains its adapters alone.
        weight_decay: on matrices only.
        warmup: share of the run over which the rate rises; then it falls along a cosine to a hundredth. When the run
            ends, the trainer says: ``max_steps``, ``max_epochs`` with a number of batches, or ``max_time``.
        muon: train the hidden matrices with Muon, at this many times their part's rate, and only the rest (embeddings,
            norms, biases) with AdamW; None: AdamW for all. For small models from scratch; finetuning uses AdamW.
        start_from: a run folder whose trained parameters the model starts from; the parts that train now may be others.
            Or a published vision-language model (:mod:`lavi.loading.vlm`): its tower, its language model and, where the
            fusion has one of its shape, its projector.
        checkpointing: recompute the decoder layers in the backward pass instead of keeping their activations.
        compile: compile the decoder layers (:mod:`lavi.training.compiled_layers`): the first steps take minutes, those
            behind them run fused operators. Validation is not compiled.
        tile_dropout: the share of tiled images in which, in training, what the overview shows stands in the place of
            some tiles (:mod:`lavi.training.tile_dropout`); None: all tiles are as they are encoded.

    Raises:
        UserError: an unknown part, or nothing that trains.
    """

    # A checkpoint holds the trained weights, and the recipe names where the others are from; the exact set of names is
    # checked by lavi.checkpoints.trained_weights.
    strict_loading = False

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        learning_rate: dict[str, PositiveOrZero | None],
        weight_decay: PositiveOrZero = 0.0,
        warmup: ShareOrZero = 0.03,
        muon: Positive | None = None,
        start_from: str | None = None,
        checkpointing: bool = False,
        compile: bool = False,
        tile_dropout: Share | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay, self.warmup, self.muon = weight_decay, warmup, muon
        self.start_from, self.checkpointing = start_from, checkpointing
        if compile:
            check_compiler("module.compile")
        self.compiled = CompiledLayers(model.language.layers, recomputed=checkpointing) if compile else None
        self.tile_dropout = tile_dropout
        self._drop_tiles: TileDropout | None = None
        rates = dict(learning_rate)
        if isinstance(getattr(model.vision, "ranking", None), nn.Module):  # it ranks without a gradient
            rates.setdefault("vision.ranking", None)
        self.part_of = part_of_each(model, rates, {f"language.{name}" for name in model.language.adapters})
        if model.language.quantization is not None and any(inside(name, "language") for name in self.part_of):
            raise UserError(
                f"weights in {model.language.quantization} stay frozen: leave 'language' out of module.learning_rate."
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.part_of)
        if checkpointing:
            checkpoint_layers(model.language.hf)
        self.accuracy = {"train": GroupedMean(), "val": GroupedMean()}
        self._window: tuple[Tensor, Tensor] | None = None
        """Trained tokens of the micro-batches since the last step of the optimizer, and the mean of their loss."""

    def setup(self, stage: str) -> None:
        """Load the run to start from; a run that goes on has those weights, and their names in ``inherited``, already.

        Raises:
            UserError: a precision in which all weights are cast; trained weights in half precision; 4-bit weights on a
                CPU; as :meth:`load_start` and :class:`TileDropout`; data whose features are not those of the model.
        """
        quantization = self.model.language.quantization
        if stage == "fit" and quantization == "bitsandbytes-4bit" and self.trainer.strategy.root_device.type == "cpu":
            raise UserError("4-bit weights of bitsandbytes pass no gradient on where the device is a CPU: take 8 bits.")
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise UserError(
                f"trainer.precision={precision} casts every weight, and what joins the halves of the model is trained "
                "in fp32: set bf16-mixed, or model.language.dtype for frozen weights."
            )
        self._inherits_later = bool(self.inherited)  # of a run that goes on: they come with its checkpoint
        if stage == "fit":
            self._check_dtypes()
            self.load_start()
            if self.tile_dropout is not None:
                self._drop_tiles = TileDropout(self.tile_dropout, self.model)
        if not self._inherits_later:
            self._check_features()

    def _check_dtypes(self) -> None:
        """Refuse to train weights whose steps are rounded: of a weight of 1, bfloat16 keeps none below 2^-8."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                part, dtype = name.partition(".")[0], str(parameter.dtype).removeprefix("torch.")
                raise UserError(
                    f"module.learning_rate trains '{part}', whose weights are {dtype}: most steps would be rounded "
                    "away. Keep them in float32 (dtype) with trainer.precision=bf16-mixed, or train adapters (lora)."
                )

    def _check_features(self) -> None:
        """Refuse data whose features are not those of the model, or of a tower that is about to change."""
        data = getattr(self.trainer, "datamodule", None)
        are_read = check_feature_caches(self.model, data, ["train", "validation"])
        if are_read and self.trains_vision:
            raise UserError(
                "data.train or data.validation hold features of a frozen vision backbone, and module.learning_rate "
                "trains it: leave 'vision' out, or name data with pixels."
            )

    def load_start(self) -> None:
        """Load the weights to start from, if there are any and they are not there already.

        Raises:
            UserError: there are none at that place, they do not fit, or they would be written into quantized ones.
        """
        if self.start_from is None or self.inherited:
            return
        of_vlm = names_vlm(self.start_from)
        if self.model.language.quantization is not None and (of_vlm or has_language(home_path(self.start_from))):
            raise UserError("module.start_from would write into quantized weights: leave quantization out.")
        if of_vlm:
            self.inherit(f"model.{name}" for name in start_from_vlm(self.model, self.start_from))
        else:
            self.inherit(load_start(self, home_path(self.start_from)))

    @property
    def trains_vision(self) -> bool:
        """Whether any part of the vision backbone is trained."""
        return any(inside(name, "vision") for name in self.part_of)

    def configure_model(self) -> None:
        """Shard the model, where the strategy has a mesh of ranks for it."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def train(self, mode: bool = True) -> VisionLanguageModule:
        """Frozen modules stay in evaluation mode, also inside a part that trains."""
        super().train(mode)
        if self.compiled is not None and not mode:
            self.compiled.stop()
        for part in self.model.children():
            _eval_frozen_modules(part)
        # Frozen or without parameters, they may still draw what each step of training looks like.
        for drawing in (self.model.fusion, self.model.reducer):
            if drawing is not None:
                drawing.training = mode
        if mode and self.checkpointing:
            for layer in self.model.language.layers:
                layer.training = True  # transformers recomputes layers in training only; what is inside them rests
        return self

    def on_fit_start(self) -> None:
        if self._inherits_later and self.device_mesh is None:  # of a sharded tower each rank has a part
            self._check_features()
        self.train()  # the trainer takes modes as it finds them
        self._seed = torch.initial_seed()

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        """Dropout draws other numbers in each step and rank, and a resumed run those that one go would have drawn."""
        step = self.trainer.fit_loop.total_batch_idx
        torch.manual_seed(self._seed + step * self.trainer.world_size + self.trainer.global_rank)
        if self.compiled is not None:
            self.compiled.start()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The mean loss of this batch's trained tokens, over all ranks; a micro-batch weighs as much as its tokens.

        A loss that the fusion adds has the same weight.
        """
        added: dict[str, Tensor] = {}
        try:
            if self._drop_tiles is not None:
                batch = self._drop_tiles(self.model.with_backbone_features(batch))
            scores = self.model.token_scores(batch, added)
        except UserError:
            if self.device_mesh is None:  # ranks that share weights wait for this one's, and end when it ends
                self._sum_over_ranks(torch.tensor([0, 1], device=self.device))
            raise
        loss, tokens = scores.loss, scores.tokens
        total, broken = self._sum_over_ranks(torch.stack([tokens, (~torch.isfinite(loss)).long()]))
        if broken:  # all ranks stop together
            raise UserError(
                f"the loss is {float(loss)} at step {self.global_step}, in samples {', '.join(batch.keys[:8])}: "
                "lower module.learning_rate or train in fp32; checkpoints written before this step are intact."
                if not torch.isfinite(loss)
                else f"another rank stops at step {self.global_step}: it refuses its batch, or its loss is not finite."
            )
        if not total:  # the loss of nothing is no number
            raise UserError(
                f"step {self.global_step} has no trained token on any rank, in samples {', '.join(batch.keys[:8])}: a "
                "training sample needs an answer (a message of role 'assistant') that is not cut off."
            )
        # Gradients are averaged over ranks: times their number, each token of the global batch weighs the same.
        loss = loss * (self.trainer.world_size / total) + self._touch_tower()
        for name, value in added.items():
            self.log(f"train/loss/{name}", value, batch_size=len(batch), sync_dist=True)
            loss = loss + value
        weight, mean = self._weigh(total, loss.detach())
        self.log("train/loss", mean, prog_bar=True, batch_size=len(batch), sync_dist=True)
        self.accuracy["train"].update(correct_under_teacher_forcing(scores, batch), groups_of(batch.answers))
        return loss * weight

    def _weigh(self, tokens: Tensor, loss: Tensor) -> tuple[Tensor | float, Tensor]:
        """The weight of a micro-batch of so many trained tokens; the gradients of those before it lose as much.

        So the gradients are at any time those of the mean over all tokens since the last step of the optimizer.

        Returns:
            The weight, and that mean of the losses.
        """
        if self._window is None:
            self._window = tokens, loss
            return float(self.trainer.accumulate_grad_batches), loss  # by which the trainer divides
        before, mean = self._window
        after = before + tokens
        share = tokens / after
        # The optimizer's parameters: behind a forward pass a sharded model has whole ones, without gradients.
        groups = (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups)
        for parameter in (one for group in groups for one in group["params"]):
            if parameter.grad is not None:
                parameter.grad.mul_(1 - share)
        self._window = after, mean + share * (loss - mean)
        return share * self.trainer.accumulate_grad_batches, self._window[1]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._window = None

    def _touch_tower(self) -> Tensor | float:
        """0, by way of each weight of the tower that trains: ranks wait for all gradients of one another.

        Without it a batch without images would have none, and a norm behind the features that are used never.
        """
        trained = [parameter for parameter in self.model.vision.parameters() if parameter.requires_grad]
        if self.trainer.world_size == 1 or not trained:
            return 0.0
        return 0.0 * torch.stack([parameter.sum() for parameter in trained]).sum()

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        if self.compiled is not None:
            self.compiled.stop()
        if self._window is not None:  # the step goes on: its answers are scored together
            return
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every:
            self.accuracy["train"].reset()
        elif self.global_step % every == 0:
            self._log_accuracy("train")

    def validation_step(self, batch: Batch, index: int) -> None:
        scores = self.model.token_scores(batch)
        tokens = len(scores.positions)
        self.log("val/loss", scores.loss / max(1, tokens), batch_size=tokens, sync_dist=True)
        self.accuracy["val"].update(correct_under_teacher_forcing(scores, batch), groups_of(batch.answers))

    def on_validation_epoch_end(self) -> None:
        self._log_accuracy("val")

    def _log_accuracy(self, split: str) -> None:
        """``val/accuracy`` over all, ``val/level/easy``, ``val/family/colour`` and so on, in percent."""
        scores = self.accuracy[split].to(self.device).compute()  # ranks exchange what is on their device
        self.accuracy[split].reset()
        if "all" in scores:
            self.log(f"{split}/accuracy", scores["all"], prog_bar=True)
        # Data without families or levels have one group.
        groups = {
            f"{split}/{group}": value for group, value in scores.items() if group.partition("/")[2] not in ("", "all")
        }
        if split == "val" or not groups:
            self.log_dict(groups)
            return
        # Steps have other groups each: what is logged once the trainer would log again in steps that have none.
        for logger in self.loggers:
            logger.log_metrics(groups, self.trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value, reduce_op="sum")  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(
            self.model, self.part_of, self.learning_rate, weight_decay=self.weight_decay, muon=self.muon
        )
        optimizer = adamw(groups) if self.muon is None else MuonAdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_peak())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _share_of_peak(self) -> Callable[[int], float]:
        """The rate of each step as a share of its peak: by the steps of the run, or by its time where that ends sooner.

        Raises:
            UserError: nothing says when the run ends.
        """
        steps = _known_steps(self.trainer)
        timer = _timer(self.trainer)
        if steps is None and timer is None:
            raise UserError(
                "nothing says when this run ends, and the learning rate falls towards its end: set trainer.max_steps, "
                "or trainer.max_epochs with trainer.limit_train_batches as a number of batches, or trainer.max_time."
            )

        def share(step: int) -> float:
            passed = 0.0 if timer is None else self.trainer.strategy.broadcast(_share_passed(timer))
            if steps is None or passed > (step + 1) / steps:
                return rate_at_share(passed, warmup=self.warmup)
            return rate_at_step(step, steps, warmup=self.warmup)

        return share


def _known_steps(trainer: pl.Trainer) -> int | None:
    """The steps of a whole run; None where its length is not given in steps.

    The trainer's own estimate creates the loader. A stream would then begin to read before a strategy that restores its
    checkpoint late has restored the position in the data.
    """
    batches = getattr(trainer, "limit_train_batches", None)
    epochs = getattr(trainer, "max_epochs", None) or -1
    if getattr(getattr(trainer, "datamodule", None), "unsized", False) and epochs > 0:
        of_epochs = -(-batches // trainer.accumulate_grad_batches) * epochs if isinstance(batches, int) else -1
        limits = [steps for steps in (of_epochs, trainer.max_steps) if steps > 0]
        return min(limits, default=None)
    estimate = trainer.estimated_stepping_batches
    return int(estimate) if 0 < estimate < float("inf") else None


def _timer(trainer: pl.Trainer) -> Timer | None:
    """What ends a run of ``max_time``."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    timers = (callback for callback in callbacks if isinstance(callback, Timer))
    return next((timer for timer in timers if timer.time_remaining() is not None), None)


def _share_passed(timer: Timer) -> float:
    elapsed, remaining = timer.time_elapsed(), timer.time_remaining()
    return elapsed / max(1e-9, elapsed + (remaining or 0.0))


def _eval_frozen_modules(module: nn.Module) -> None:
    """Put what is frozen into evaluation mode; what has no parameters (dropout) does as the module around it."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.eval()
        return
    for child in module.children():
        if any(True for _ in child.parameters()):
            _eval_frozen_modules(child)


def checkpoint_layers(language: Any) -> None:
    """Recompute the decoder layers in the backward pass.

    Raises:
        UserError: the family cannot.
    """
    # The new name of an old method.
    enable = getattr(language, "activation_checkpointing_enable", language.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"module.checkpointing=true: {error}") from None
    # Only re-entrant checkpointing needs an input with a gradient: here a frozen embedding would only make the
    # backward pass go on below the first layer that anything is learned from.
    language.disable_input_require_grads()
