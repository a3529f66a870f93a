"""A learned ranking of tiles, by the question and the overview. A method of this library; no paper has it.

    question (T, D) --- norm, linear, convolution over neighbours ---> (T, r), and how much each token counts
    overview at the tiles (tiles, N, Dv) -- norm, linear, + place ---> (tiles, N, r)
    a tile promises: the sum over the question's tokens of their best match in it (late interaction: arXiv 2004.12832)

Trained by :mod:`lavi.training.tile_routing`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.functional import softmax

from lavi.config.files import sha256_of
from lavi.config.types import Count
from lavi.errors import UserError, one_line
from lavi.nn.formulas import linear_flops
from lavi.vision.tiles_on_request import Overview, TileRanking

CONFIG, WEIGHTS = "router.json", "router.safetensors"
NEIGHBOURS = 3
"""Tokens of the question that are read together: a colour and what has it."""
TYPICAL_QUESTION = 16
"""Tokens of a question that is not known, where the ranking is counted."""


class TileRouter(TileRanking, nn.Module):
    """Says which tiles the answer to a question is likely to need.

    Args:
        source: a folder that :meth:`save_pretrained` has written; its weights are frozen. None: one to be trained.
        width, question_width: Dv and D, of one to be trained.
        match_width: r, the width that question and picture are compared in.

    Raises:
        UserError: neither a folder nor widths, or a folder that holds no router.
    """

    reads_questions = True

    def __init__(
        self,
        *,
        source: str | None = None,
        width: Count | None = None,
        question_width: Count | None = None,
        match_width: Count = 64,
    ) -> None:
        super().__init__()
        widths: dict[str, Any] = {"width": width, "question_width": question_width, "match_width": match_width}
        if source is not None:
            widths = _widths_in(Path(source))
        elif width is None or question_width is None:
            raise UserError("a tile router has a source, the folder of a trained one (python -m lavi.route_tiles).")
        self.widths = widths
        inner = widths["match_width"]
        self.question = nn.Sequential(
            nn.LayerNorm(widths["question_width"]), nn.Linear(widths["question_width"], inner)
        )
        self.together = nn.Conv1d(inner, inner, NEIGHBOURS, padding=NEIGHBOURS // 2)
        self.importance = nn.Linear(inner, 1)
        self.picture = nn.Sequential(nn.LayerNorm(widths["width"]), nn.Linear(widths["width"], inner))
        self.place = nn.Sequential(nn.Linear(4, inner), nn.GELU(), nn.Linear(inner, inner))
        if source is not None:
            self._load(Path(source) / WEIGHTS)

    def _load(self, file: Path) -> None:
        try:
            load_model(self, file)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{file} holds no weights of such a router ({one_line(error)}).") from None
        self.requires_grad_(False)
        self.variant = f" {sha256_of(file)[:16]}"

    def rank(self, overview: Overview) -> Tensor:
        asked = overview.question
        if asked is None:
            asked = overview.tiles.new_zeros(TYPICAL_QUESTION, self.widths["question_width"])
        words = self.question(asked)  # (T, r)
        words = words + nn.functional.gelu(self.together(words.T[None])[0].T)
        seen = self.picture(overview.tiles) + self.place(overview.windows)[:, None]  # (tiles, N, r)
        match = torch.einsum("tr,snr->stn", words, seen) / self.widths["match_width"] ** 0.5  # (tiles, T, N)
        best = match.logsumexp(-1)  # (tiles, T): smooth, so that all places learn
        share = softmax(self.importance(words), dim=0)[:, 0]  # (T,)
        return (best * share).sum(-1) * len(words)

    def flops(self, tiles: int, per_view: int) -> float:
        width, question, inner = (self.widths[name] for name in ("width", "question_width", "match_width"))
        of_question = linear_flops(TYPICAL_QUESTION, question + NEIGHBOURS * inner, inner)
        of_question += linear_flops(TYPICAL_QUESTION, inner, 1)
        of_tiles = linear_flops(tiles * per_view, width, inner) + linear_flops(tiles, 4 + inner, inner)
        return of_question + of_tiles + linear_flops(TYPICAL_QUESTION, inner, tiles * per_view)

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write the weights; returns the arguments that build it again, paths relative to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / WEIGHTS))
        (folder / CONFIG).write_text(json.dumps(self.widths))
        return {"source": Path()}


def _widths_in(folder: Path) -> dict[str, Any]:
    try:
        widths: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no tile router ({one_line(error)}): make one with python -m lavi.route_tiles."
        ) from None
    return widths
