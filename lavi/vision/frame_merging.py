"""Frames of a video that are alike become one inside a vision tower: EarlyTom (arXiv 2605.30010), its first stage.

    behind block k    frame 0   frame 1 ~ frame 2 ~ frame 3   frame 4      ~: alike, place by place
                      frame 0   their mean                    frame 4      the blocks that follow see three sequences

Paper: frames are merged early inside the tower, training-free, by the similarity of neighbouring frames, within
segments of the video. Chosen here: of F frames a share is kept, so that the cost is known before the video is seen; the
video is cut between the neighbours least alike (mean cosine of the tokens at the same place), and each segment becomes
the mean of its frames (paper: thresholds, only middle frames, weights by similarity).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lavi.config.types import CountOrZero, Share
from lavi.errors import UserError
from lavi.nn.autocast import without_autocast
from lavi.vision.reduced import BlockOutput, TokenReduction
from lavi.vision.token_set import Merge, TokenSet


@dataclass(frozen=True)
class FrameMerging(TokenReduction):
    """Merges neighbouring frames of each video, behind one block; images stay as they are.

    Args:
        keep: the share of the frames that is left, rounded up.
        behind: the block; other reductions may not have merged tokens before.
    """

    keep: Share
    behind: CountOrZero = 1

    def starts_at(self) -> int:
        return self.behind

    def merge(self, out: BlockOutput, tokens: TokenSet) -> Merge | None:
        if out.block != self.behind or not out.videos:
            return None
        if not tokens.is_whole:
            raise UserError(
                f"FrameMerging compares tokens at the same place, and behind block {self.behind} others have merged "
                "some: name it before TokenMerging, let that start no earlier, and leave RepeatedPatches out."
            )
        views, columns = out.tokens.shape[:2]
        onto = torch.arange(views, device="cpu").to(out.tokens.device)  # (V,): the view that each becomes part of
        kept: list[Tensor] = []
        counts: list[int] = []
        last = 0
        for video in out.videos:
            count = tokens.counts[video.start]  # of each frame
            first, begin = self._segments(out.tokens[video.start : video.stop, :count])
            onto[video.start : video.stop] = first + video.start
            kept += [torch.arange(last, video.start, device=onto.device), begin + video.start]
            counts += [*tokens.counts[last : video.start], *[count] * len(begin)]
            last = video.stop
        sequences = torch.cat([*kept, torch.arange(last, views, device=onto.device)])  # (S',)
        place = torch.arange(columns, device=onto.device)
        target, order = (columns * chosen[:, None] + place for chosen in (onto, sequences))
        return Merge(target, order, (*counts, *tokens.counts[last:]))

    @torch.no_grad()
    def _segments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Of frames (F, N, D), the first frame of the segment (F,) that each is in, and these first frames (k,)."""
        count = math.ceil(self.keep * len(frames) - 1e-9)
        with without_autocast(frames):
            alike = cosine_similarity(frames[1:].float(), frames[:-1].float(), dim=-1).mean(1)  # (F - 1,)
        cuts = alike.argsort(stable=True)[: count - 1] + 1
        begin = torch.cat([cuts.new_zeros(1), cuts.sort().values])  # (k,)
        begins = torch.zeros(len(frames), dtype=torch.long, device=frames.device).index_fill(0, begin, 1)
        return begin[begins.cumsum(0) - 1], begin
