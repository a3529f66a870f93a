"""A learned ranking of tiles, by the question and the overview. A method of this library; no paper has it.

    question (T, D) --- norm, linear, convolution over neighbours ---> (T, r), and how much each token counts
    overview at the tiles (tiles, N, Dv) -- norm, linear, + place ---> (tiles, N, r)
    score of a tile: the sum over the question's tokens of their best match in it (late interaction: arXiv 2004.12832)

Trained by :mod:`lavi.training.tile_routing`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.functional import gelu, softmax

from lavi.config.files import sha256_of
from lavi.config.paths import home_path
from lavi.errors import UserError, one_line
from lavi.loading.without_weights import weights_wanted
from lavi.nn.formulas import linear_flops
from lavi.vision.tiles_on_request import RankingInput, TileRanking

CONFIG, WEIGHTS = "router.json", "router.safetensors"
NEIGHBOURS = 3
"""Tokens of the question that are read together: a colour and what has it."""
TYPICAL_QUESTION = 16
"""Tokens of a question that is not known, where the ranking is counted."""


class TileRouter(TileRanking, nn.Module):
    """Says which tiles the answer to a question is likely to need.

    It serves the model that it was trained with: it reads that model's embeddings and its tower's features.

    Args:
        source: a folder that ``python -m lavi.route_tiles`` has written. Its weights stay as they are.

    Raises:
        UserError: it holds no router.
    """

    reads_questions = True
    width: int
    question_width: int

    def __init__(self, *, source: str) -> None:
        super().__init__()
        folder = home_path(source)
        self._make(**_widths_in(folder))
        self.requires_grad_(False)
        if weights_wanted():
            self._load(folder / WEIGHTS)

    @classmethod
    def untrained(cls, *, width: int, question_width: int, match_width: int = 64) -> Self:
        """A router at random.

        Args:
            width, question_width: Dv and D.
            match_width: r, the width that question and picture are compared in.
        """
        router = cls.__new__(cls)
        nn.Module.__init__(router)
        router._make(width=width, question_width=question_width, match_width=match_width)
        return router

    def _make(self, *, width: int, question_width: int, match_width: int) -> None:
        self.width, self.question_width, self.match_width = width, question_width, match_width
        self.question = nn.Sequential(nn.LayerNorm(question_width), nn.Linear(question_width, match_width))
        self.together = nn.Conv1d(match_width, match_width, NEIGHBOURS, padding=NEIGHBOURS // 2)
        self.importance = nn.Linear(match_width, 1)
        self.picture = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, match_width))
        self.place = nn.Sequential(nn.Linear(4, match_width), nn.GELU(), nn.Linear(match_width, match_width))

    def _load(self, file: Path) -> None:
        try:
            load_model(self, file)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{file} holds no weights of such a router ({one_line(error)}).") from None
        self.variant = f" {sha256_of(file)[:16]}"

    def rank(self, given: RankingInput) -> Tensor:
        dtype = self.importance.weight.dtype
        asked = given.question
        if asked is None or not len(asked):
            asked = given.tiles.new_zeros(TYPICAL_QUESTION, self.question_width)
        words = self.question(asked.to(dtype))  # (T, r)
        words = words + gelu(self.together(words.T[None])[0].T)
        shown = self.picture(given.tiles.to(dtype)) + self.place(given.windows.to(dtype))[:, None]  # (tiles, N, r)
        match = torch.einsum("tr,snr->stn", words, shown).float() / self.match_width**0.5  # (tiles, T, N)
        best = match.logsumexp(-1)  # (tiles, T): smooth, so that all places learn
        share = softmax(self.importance(words).float(), dim=0)[:, 0]  # (T,)
        return (best * share).sum(-1) * len(words)

    def flops(self, tiles: int, per_view: int) -> float:
        inner = self.match_width
        of_question = linear_flops(TYPICAL_QUESTION, self.question_width + NEIGHBOURS * inner, inner)
        of_question += linear_flops(TYPICAL_QUESTION, inner, 1)
        of_tiles = linear_flops(tiles * per_view, self.width, inner) + linear_flops(tiles, 4 + inner, inner)
        return of_question + of_tiles + linear_flops(TYPICAL_QUESTION, inner, tiles * per_view)

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write the weights; returns the arguments that build it again, paths relative to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / WEIGHTS))
        widths = {"width": self.width, "question_width": self.question_width, "match_width": self.match_width}
        (folder / CONFIG).write_text(json.dumps(widths))
        return {"source": Path()}


def _widths_in(folder: Path) -> dict[str, int]:
    try:
        widths: dict[str, int] = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no tile router ({one_line(error)}): make one with python -m lavi.route_tiles."
        ) from None
    return widths
