"""Training of a tile router: which tile helps the answer, said by a trained model.

    features of all tiles --> for each tile: that one as it is, the overview in the place of the others
                          --> probability of the true answer, the mean over its tokens (geometric)
    the router learns to give its score to tiles by how much better the answer is with them than with the mean tile

Where the overview is enough, no tile is better than another by more than :data:`LEAST_GAIN`, and nothing is learned.
VISOR (arXiv 2603.23495) trains its router of layers on such labels; here they need no file, each batch is labelled as
it is read.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lavi.batch import Batch, ImageSlot
from lavi.checkpoints.feature_cache import check_feature_caches, check_features_suffice
from lavi.checkpoints.model_folder import new_folder
from lavi.checkpoints.published_vlm import written_out
from lavi.config.targets import path_of
from lavi.config.text import TARGET
from lavi.errors import UserError
from lavi.metrics.teacher_forcing import token_probabilities
from lavi.model import VisionLanguageModel
from lavi.nn.autocast import without_autocast
from lavi.recipe import Recipe
from lavi.report import track
from lavi.vision.base import VisionBackbone
from lavi.vision.tile_router import TileRouter
from lavi.vision.tiles_on_request import RankingInput, TilesOnRequest, check_one_grid, tiles_from_overview

LEAST_GAIN = 0.01
"""Of a probability: less is rounding, or an answer that the overview is enough for."""


@dataclass(frozen=True)
class TileQuestion:
    """A question about a tiled image, and what each tile does for its answer."""

    given: RankingInput
    answer_probability: Tensor
    """(tiles,): of the true answer, the geometric mean over its tokens, this tile alone encoded."""

    @property
    def gain(self) -> Tensor:
        """(tiles,): what each adds to the mean tile; 0 for those that are hardly better."""
        more = self.answer_probability - self.answer_probability.mean()
        return more * (more > LEAST_GAIN)


@dataclass(frozen=True)
class _TiledImage:
    """The features of one image's views (1 + tiles, N, Dv), and what the overview has at its tiles (tiles, N, Dv)."""

    views: Tensor
    windows: Tensor
    from_overview: Tensor

    @classmethod
    def of(cls, views: Tensor, slot: ImageSlot, vision: VisionBackbone) -> _TiledImage:
        """Of an image in its place."""
        return cls(views, *tiles_from_overview(views[0].float(), slot.layout, vision.grid, vision.prefix))

    @property
    def tiles(self) -> int:
        return len(self.windows)

    def with_tile(self, number: int) -> Tensor:
        """Its views, of the tiles that one alone as it was encoded; views that are no tiles stay."""
        shown = self.views.clone()
        shown[1 : 1 + self.tiles] = self.from_overview.to(shown.dtype)
        if number < self.tiles:
            shown[1 + number] = self.views[1 + number]
        return shown


def check_encodes_all_tiles(model: VisionLanguageModel) -> None:
    """Whether a router can learn from a model.

    Raises:
        UserError: it encodes a part of the tiles itself, or its reducer reads more than features.
    """
    if isinstance(model.vision, TilesOnRequest) and model.vision.keep < 1:
        raise UserError(
            "a router learns from a model that encodes all tiles: name the tower alone, model.vision=THE TOWER OF "
            "TilesOnRequest, or keep: 1."
        )
    check_features_suffice(model)


@torch.no_grad()
def questions_about_tiles(model: VisionLanguageModel, batch: Batch) -> list[TileQuestion]:
    """Each answer of the conversations about one image that has several tiles, of a batch on the model's device.

    Raises:
        UserError: a backbone of no one grid.
    """
    slots = batch.image_slots
    if not slots:
        return []
    check_one_grid(model.vision, "a router of tiles")
    of_images = model.backbone_features_of(batch).split([slot.views for slot in slots])
    images = [_TiledImage.of(views, slot, model.vision) for views, slot in zip(of_images, slots, strict=True)]
    images_in = Counter(map(batch.conversation_of, slots))
    asked = [  # number of an answer, and the image that it is about
        (batch.answers.index(answer), image)
        for slot, image in zip(slots, images, strict=True)
        if image.tiles > 1 and images_in[batch.conversation_of(slot)] == 1
        for answer in batch.answers_in(*batch.conversation_of(slot))
        if answer.start >= slot.column
    ]
    with_tile = []  # probability of each answer
    for number in range(max((image.tiles for _, image in asked), default=0)):
        shown = torch.cat([image.with_tile(number) for image in images])
        scores = model.token_scores(replace(batch, pixels=batch.pixels[:0], backbone_features=shown))
        with_tile.append(token_probabilities(scores, batch))
    return [_question(model, batch, answer, image, with_tile) for answer, image in asked]


def _question(
    model: VisionLanguageModel, batch: Batch, number: int, image: _TiledImage, with_tile: list[list[float]]
) -> TileQuestion:
    answer = batch.answers[number]
    question = model.language.embed(batch.input_ids[answer.row, slice(*batch.question_columns(answer))])  # (T, D)
    probability = torch.tensor([of_tile[number] for of_tile in with_tile[: image.tiles]], device="cpu")
    given = RankingInput(image.views[0].float(), image.from_overview, image.windows, question.float())
    return TileQuestion(given, probability.to(question.device))


class TileRouterTraining:
    """A router that learns from questions as they come, and what it is worth so far.

    Args:
        router: on the device of the questions.
        learning_rate: of AdamW.
    """

    LAST = 50
    """Batches that :meth:`summary` is of."""

    def __init__(self, router: TileRouter, learning_rate: float = 1e-3) -> None:
        self.router, self.questions = router, 0
        self.optimizer = torch.optim.AdamW(router.parameters(), lr=learning_rate, weight_decay=0.01)
        self.figures: list[dict[str, float]] = []

    def learn(self, asked: Sequence[TileQuestion]) -> None:
        """One step. Before it is noted what the router would have chosen: the mean probability of the true answer with
        the tile of the highest score (``chosen``), with the best one (``best``) and with the mean one (``mean``).
        """
        with torch.enable_grad(), without_autocast(asked[0].answer_probability):
            scores = [self.router.rank(one.given) for one in asked]
            losses = [-(one.gain * score.log_softmax(0)).sum() for one, score in zip(asked, scores, strict=True)]
            if any(bool(one.gain.any()) for one in asked):
                self.optimizer.zero_grad()
                torch.stack(losses).mean().backward()
                self.optimizer.step()
        of_each = [one.answer_probability for one in asked]
        self.questions += len(asked)
        chosen = mean(float(of[score.argmax()]) for of, score in zip(of_each, scores, strict=True))
        best, middle = (mean(float(pick(of)) for of in of_each) for pick in (torch.amax, torch.mean))
        self.figures.append({"chosen": chosen, "best": best, "mean": middle})

    def summary(self) -> str:
        """What the router is worth, of its last batches, before it learned from them."""
        last = self.figures[-self.LAST :]
        chosen, best, middle = (100 * mean(of[name] for of in last) for name in ("chosen", "best", "mean"))
        return (
            f"{self.questions:,} questions; with one tile encoded, the mean probability of a token of the true answer "
            f"is {chosen:.1f} % with the router's choice, {best:.1f} with the best tile, {middle:.1f} with any "
            f"(the last {len(last)} batches, before it learned from them)"
        )


def train_tile_router(
    recipe: Recipe,
    model: VisionLanguageModel,
    data: Any,
    out: Path,
    *,
    split: str,
    limit: int | None,
    device: torch.device,
) -> Iterator[str]:
    """Train a router on one pass over a split and write it, in one step; gives lines that say what came of it.

    Args:
        recipe: the run's; the router is drawn from its seed.
        out: a new folder.
        limit: conversations, at most.

    Raises:
        UserError: as :func:`check_encodes_all_tiles`; features of another backbone; no question about an image of
            several tiles; a folder that exists.
    """
    check_encodes_all_tiles(model)
    check_feature_caches(model, data, [split])
    model.to(device).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.settings.get("seed", 0))
        router = TileRouter.untrained(width=model.vision.width, question_width=model.language.width)
    training = TileRouterTraining(router.to(device))
    batches = data.stream(split, limit=limit)
    for batch in track(batches, "training the router"):
        if asked := questions_about_tiles(model, batch.to(device)):
            training.learn(asked)
    yield from (f"left out: {count} x {cause}" for cause, count in batches.left_out.items())
    if not training.questions:
        read = split if limit is None else f"the first {limit:,} of {split}"
        raise UserError(f"no conversation of {read} is about one image of several tiles: there is nothing to choose.")
    with new_folder(out) as part:
        router.save_pretrained(part)
    yield training.summary()
    yield f"written: {out}"


def as_override(recipe: Recipe, folder: Path, keep: float = 0.25) -> str:
    """The change to a run's recipe, quoted for a shell, by which it encodes what the router in a folder chooses."""
    vision = {
        TARGET: path_of(TilesOnRequest),
        "tower": written_out(recipe).settings["model"]["vision"],
        "keep": keep,
        "ranking": {TARGET: path_of(TileRouter), "source": str(folder)},
    }
    return shlex.quote(f"model.vision={json.dumps(vision)}")
