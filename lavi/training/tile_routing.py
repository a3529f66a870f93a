"""Training of a tile router: which tile would have helped the answer, said by a trained model.

    features of all tiles --> for each tile: that one as it is, the overview in the place of the others
                                --> p(true answer | this tile)  --> normalised over the tiles: what the router learns

Of a question that the overview answers all tiles are alike, and nothing is learned. VISOR (arXiv 2603.23495) trains its
router of layers on such labels; here they need no file, each batch is labelled as it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch
from torch import Tensor

from lavi.batch import Answer, Batch, ImageSlot
from lavi.errors import UserError
from lavi.metrics.teacher_forcing import answer_probabilities
from lavi.model import VisionLanguageModel
from lavi.nn.autocast import without_autocast
from lavi.vision.tile_router import TileRouter
from lavi.vision.tiles_on_request import Overview, TilesOnRequest
from lavi.vision.windows import WHOLE, windows_of_views

FLOOR = 1e-6
"""Added to each probability: answers that no tile makes likely say nothing."""


@dataclass(frozen=True)
class TileQuestion:
    """A question about a tiled image, and what each tile does for its answer."""

    overview: Overview
    likely: Tensor
    """(tiles,): the probability of the true answer, this tile alone encoded."""

    @property
    def wanted(self) -> Tensor:
        """(tiles,): how much of the choice each tile should have; sums to 1."""
        return (self.likely + FLOOR) / (self.likely + FLOOR).sum()


@dataclass(frozen=True)
class _Tiled:
    """The features of one image's views (1 + tiles, N, Dv), and what the overview has at its tiles (tiles, N, Dv)."""

    views: Tensor
    windows: Tensor
    from_overview: Tensor

    @classmethod
    def of(cls, views: Tensor, slot: ImageSlot, vision: TilesOnRequest) -> _Tiled:
        """Of an image in its place; one that is not cut has no tiles."""
        windows = windows_of_views(slot.layout, vision.grid) if slot.layout.tiles is not None else [WHOLE]
        of_tiles = torch.tensor(windows[1:], device="cpu").reshape(-1, 4).to(views.device)  # (tiles, 4)
        return cls(views, of_tiles, vision.from_overview(views[0].float(), of_tiles))

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


@torch.no_grad()
def questions_about_tiles(model: VisionLanguageModel, batch: Batch) -> list[TileQuestion]:
    """Each answer of the conversations about one image that has several tiles, of a batch on the model's device.

    Args:
        model: one whose backbone encodes all tiles.

    Raises:
        UserError: a backbone of no one grid.
    """
    vision = TilesOnRequest(tower=model.vision, keep=1.0)
    features = batch.backbone_features
    if features is None:
        features = model.encode(batch.pixels, batch.layouts)
    slots = batch.image_slots
    of_images = features.split([slot.views for slot in slots]) if slots else ()
    images = [_Tiled.of(views, slot, vision) for views, slot in zip(of_images, slots, strict=True)]
    in_row = Counter(slot.row for slot in slots)
    wanted = {
        slot.row: (slot, image)
        for slot, image in zip(slots, images, strict=True)
        if image.tiles > 1 and in_row[slot.row] == 1
    }
    likely = []  # of each tile each answer's
    for number in range(max((image.tiles for _, image in wanted.values()), default=0)):
        shown = torch.cat([image.with_tile(number) for image in images])
        scores = model.token_scores(replace(batch, pixels=batch.pixels[:0], backbone_features=shown))
        likely.append(answer_probabilities(scores, batch))
    found = []
    for index, answer in enumerate(batch.answers):
        if answer.row in wanted:
            slot, image = wanted[answer.row]
            question = model.language.embed(batch.input_ids[answer.row, slice(*_asked(batch, answer, slot))])  # (T, D)
            overview = Overview(image.views[0].float(), image.from_overview, image.windows, question.float())
            of_tiles = torch.tensor([of_tile[index] for of_tile in likely[: image.tiles]], device="cpu")
            found.append(TileQuestion(overview, of_tiles.to(features.device)))
    return found


def _asked(batch: Batch, answer: Answer, slot: ImageSlot) -> tuple[int, int]:
    """The columns of what stands before an answer, behind the one before it."""
    before = [one.stop for one in batch.answers if one.row == answer.row and one.stop <= answer.start]
    return max(before, default=batch.before_answers(slot)[0]), answer.start


def train_tile_router(
    model: VisionLanguageModel, batches: Iterable[Batch], *, device: torch.device, learning_rate: float = 1e-3
) -> Iterator[tuple[TileRouter, dict[str, float]]]:
    """A router, trained on one pass over the batches; after each batch itself and what it does so far.

    Yields:
        The router, and of its batch ``loss``, the cross-entropy against what was wanted, ``likely``, the mean
        probability of the true answer with the tile that it would choose, ``best``, with the best one, and ``any``,
        the mean over the tiles.

    Raises:
        UserError: no image has several tiles.
    """
    model.to(device).eval()
    router: TileRouter | None = None
    for batch in batches:
        asked = questions_about_tiles(model, batch.to(device))
        if not asked:
            continue
        if router is None:
            width = asked[0].overview.tiles.shape[-1]
            router = TileRouter(width=width, question_width=model.language.width).to(device)
            optimizer = torch.optim.AdamW(router.parameters(), lr=learning_rate, weight_decay=0.01)
        with torch.enable_grad(), without_autocast(asked[0].likely):
            scores = [router.rank(one.overview) for one in asked]
            losses = [-(one.wanted * score.log_softmax(0)).sum() for one, score in zip(asked, scores, strict=True)]
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield router, _figures(asked, [score.detach() for score in scores], float(loss))
    if router is None:
        raise UserError("no conversation of these data is about one image of several tiles: there is nothing to route.")


def _figures(asked: Sequence[TileQuestion], scores: Sequence[Tensor], loss: float) -> dict[str, float]:
    chosen = [float(one.likely[score.argmax()]) for one, score in zip(asked, scores, strict=True)]
    best, of_any = ([float(of(one.likely)) for one in asked] for of in (torch.amax, torch.mean))
    return {"loss": loss, "likely": mean(chosen), "best": mean(best), "any": mean(of_any)}
