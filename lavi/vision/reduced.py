"""A vision tower whose blocks work on fewer tokens. Its features keep their grid, so it goes with every fusion.

    pixels -> embeddings (V, N, D) -> [ block 0 ] -> [ block 1 ] -> ... -> features (V, N, Dv)
                                 |                |
                          reductions say here which tokens go on as one

A token that stands for s others weighs as much as they in every attention: log s is added to its scores (ToMe, arXiv
2210.09461). Behind the blocks each place of the grid gets the features of the token that stands for it: what is saved
is the encoder's work, and what the language model sees is as long as before (a reducer shortens that). Without
reductions the tower is itself, bit for bit.

Chosen here: tokens are merged between blocks (ToMe: before a block's feed-forward part), since then a block of any
family runs as it is; and a merged token keeps the place of one of its tokens, where places are rotations (DINOv3).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lavi.batch import Layout, grids_of_views
from lavi.config.targets import path_of
from lavi.config.text import TARGET
from lavi.errors import UserError
from lavi.vision.base import VisionBackbone, save_part
from lavi.vision.hf import HFVision
from lavi.vision.naflex import NaFlexVision
from lavi.vision.shape_flops import forward_on_meta
from lavi.vision.token_set import Merge, TokenSet
from lavi.vision.tower import encoder_layers

log = logging.getLogger("lavi")

NAME = "lavi_token_sizes"
REFUSED = {
    "beit": "its attention has a bias for each pair of places",
    "mlcd_vision_model": "its attention takes one table of places for all images",
}
"""Towers of transformers whose blocks need all tokens of the grid."""


@dataclass(frozen=True)
class BlockOutput:
    """What a reduction may look at, behind a block."""

    block: int
    """The block that has just run; -1: none yet, the tokens come from the embeddings."""
    blocks: int
    """How many the tower has."""
    tokens: Tensor
    """(S, n, D)."""
    keys: Tensor | None
    """(S, n, d): the block's keys, the mean over heads; None before the first block."""
    patches: Tensor | None
    """(V, N - prefix, c): the values of each patch's pixels; None behind a block, and where there are no numbers."""
    grids: Sequence[tuple[int, int]]
    """Rows and columns of each view."""
    videos: Sequence[range]
    """The views of each video."""


class TokenReduction(ABC):
    """Says behind a block which tokens go on as one.

    One of one's own has :meth:`merge`, and is a dataclass of its arguments if towers with it are to be exported, or
    cached features of it told from those with other arguments.
    """

    def starts_at(self) -> int:
        """The first block after which it is asked; -1: before any."""
        return 0

    @abstractmethod
    def merge(self, out: BlockOutput, tokens: TokenSet) -> Merge | None:
        """Which of ``tokens``, that stand in ``out``, go on as one; None: all go on as they are."""

    def arguments(self) -> dict[str, Any]:
        """What builds it again.

        Raises:
            UserError: it does not say.
        """
        if not is_dataclass(self):
            raise UserError(f"{type(self).__name__} cannot be saved: make it a dataclass of its arguments.")
        return {TARGET: path_of(type(self)), **asdict(self)}


class ReducedTower(VisionBackbone):
    """A vision transformer of transformers whose blocks work on fewer tokens.

    Args:
        tower: of :class:`~lavi.vision.hf.HFVision` or :class:`~lavi.vision.naflex.NaFlexVision`, for this alone.
        reductions: in the order in which they are asked behind each block.

    Raises:
        UserError: a tower of another kind, or one whose blocks need all tokens.
    """

    def __init__(self, *, tower: VisionBackbone, reductions: list[TokenReduction]) -> None:
        super().__init__()
        if not isinstance(tower, HFVision | NaFlexVision) or not hasattr(tower.tower.config, "num_attention_heads"):
            raise UserError(
                "ReducedTower takes a vision transformer of lavi.vision.hf.HFVision or lavi.vision.naflex.NaFlexVision."
            )
        self.tower, self.reductions = tower, list(reductions)
        self.width, self.levels, self.grid, self.prefix = tower.width, tower.levels, tower.grid, tower.prefix
        self.native_resolution, self.preprocessing = tower.native_resolution, tower.preprocessing
        self.reads_layouts = True
        self.variant = repr([one.arguments() if is_dataclass(one) else path_of(type(one)) for one in self.reductions])
        self._flops_by_layout: dict[Layout, float] = {}
        self.sizes: list[tuple[int, ...]] = []
        """Tokens of each sequence that each block worked on, the last time."""
        if self.reductions:
            _open(tower.tower)
            self._warn_of_idle_ones(len(encoder_layers(tower.tower)))

    def _warn_of_idle_ones(self, blocks: int) -> None:
        """Say which reductions are never asked: behind the last block nothing is left to save."""
        for reduction in self.reductions:
            if reduction.starts_at() >= blocks - 1:
                log.warning(
                    "%s starts behind block %d (from 0), and the tower has %d: it reduces nothing.",
                    type(reduction).__name__,
                    reduction.starts_at(),
                    blocks,
                )

    def forward(self, pixels: Tensor, layouts: Sequence[Layout] = ()) -> Tensor:
        """As the tower's own.

        Args:
            layouts: of each image; views that none speaks of are images of their own, on :attr:`grid`.

        Raises:
            UserError: it is trained with recomputed blocks, which would not find their tokens again.
        """
        if self.training and self.reductions and getattr(self.tower.tower, "is_gradient_checkpointing", False):
            raise UserError("a ReducedTower cannot recompute its blocks: switch gradient checkpointing of it off.")
        alone = Layout(grid=self.grid if self.native_resolution else None)
        layouts = [*layouts, *[alone] * (len(pixels) - sum(layout.views for layout in layouts))]
        grids = grids_of_views(layouts) or [self.grid] * len(pixels)
        encoding = Encoding(
            pixels,
            grids=grids,
            videos=videos_of(layouts),
            patches=self._patches(pixels, grids),
            prefix=getattr(self.tower, "standing_before", 0),
            reductions=self.reductions,
        )
        token = _encoding.set(encoding)
        try:
            features: Tensor = self.tower(pixels, grids) if self.native_resolution else self.tower(pixels)
        finally:
            _encoding.reset(token)
        if not pixels.is_meta:  # else it is only counted
            self.sizes = encoding.sizes
        return features

    def _patches(self, pixels: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor | None:
        """(V, N - prefix, c): the pixels of each patch, where a reduction looks at them."""
        if pixels.is_meta or all(reduction.starts_at() >= 0 for reduction in self.reductions):
            return None
        if self.native_resolution:
            return pixels[:, 0, : max(rows * columns for rows, columns in grids)]
        size = self.tower.tower.config.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        return unfold(pixels, (height, width), stride=(height, width)).transpose(1, 2)

    def flops(self, views: int, layout: Layout | None = None) -> float:
        one = Layout(grid=None if layout is None else layout.grid)
        if layout is not None and layout.video and layout.views == views:
            one = layout
        if one not in self._flops_by_layout:
            self._flops_by_layout[one] = forward_on_meta(self, self.pixel_shape, [one], views=one.views)[1]
        return views / one.views * self._flops_by_layout[one]

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write the tower; returns the arguments that build it again, paths relative to ``folder``.

        Raises:
            UserError: a reduction does not say what builds it.
        """
        return {
            "tower": save_part(self.tower, folder, "tower"),
            "reductions": [one.arguments() for one in self.reductions],
        }


# --- one forward ------------------------------------------------------------------------------------------------------


@dataclass
class Encoding:
    """One forward of a tower: the tokens that each block works on."""

    pixels: Tensor
    """(V, C, H, W)."""
    grids: Sequence[tuple[int, int]]
    videos: Sequence[range]
    patches: Tensor | None
    prefix: int
    reductions: Sequence[TokenReduction]
    tokens: TokenSet | None = None
    """None: all, each for itself."""
    keys: Tensor | None = None
    """(S, n, d) of the block that runs."""
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    """Tokens of each sequence in each block that ran."""

    def before(self, number: int, blocks: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand a block the tokens that it works on, instead of (V, N, D), with their rotations."""
        named = dict(kwargs)
        hidden: Tensor = args[0] if args else named.pop("hidden_states")
        if number == 0:
            self.tokens = self._without_padding(hidden, named.get("attention_mask", args[1] if args[1:] else None))
            hidden = self._reduced(-1, blocks, hidden)
        elif self.tokens is not None:
            hidden = self.tokens.gather(hidden)
        tokens = self.tokens
        self.sizes.append(tokens.counts if tokens is not None else (hidden.shape[1],) * len(hidden))
        if tokens is not None and named.get("position_embeddings") is not None:
            named["position_embeddings"] = tuple(rotations_of(tokens, part) for part in named["position_embeddings"])
        return (hidden, *args[1:]), named

    def behind(self, number: int, blocks: int, out: Tensor) -> Tensor:
        """Merge behind a block, and write out what it gave to (V, N, D)."""
        if number < blocks - 1:
            out = self._reduced(number, blocks, out)
        self.keys = None
        return out if self.tokens is None else self.tokens.write_out(out, len(self.pixels))

    def _reduced(self, block: int, blocks: int, hidden: Tensor) -> Tensor:
        """Tokens behind ``block`` as they go on."""
        for reduction in self.reductions:
            if block < reduction.starts_at():
                continue
            tokens = self.tokens or TokenSet.whole(*hidden.shape[:2], prefix=self.prefix, device=hidden.device)
            patches = self.patches if block < 0 else None
            out = BlockOutput(block, blocks, hidden, self.keys, patches, self.grids, self.videos)
            if (merge := reduction.merge(out, tokens)) is not None:
                hidden = tokens.values(hidden, merge)
                self.keys = None if self.keys is None else tokens.values(self.keys, merge)
                self.tokens = tokens.merged(merge)
        return hidden

    def _without_padding(self, hidden: Tensor, mask: Tensor | None) -> TokenSet | None:
        """Where views have padding, the tokens that are none, read from the mask of the first block."""
        if mask is None:
            return None
        valid = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0  # (V, N)
        return TokenSet.whole(*hidden.shape[:2], prefix=self.prefix, device=hidden.device, valid=valid)


_encoding: ContextVar[Encoding | None] = ContextVar("encoding", default=None)


def rotations_of(tokens: TokenSet, table: Tensor) -> Tensor:
    """Rotations of the grid's places (places, d), as those of the tokens (S, 1, n - prefix, d)."""
    place = tokens.index[:, tokens.prefix :] % (tokens.prefix + table.shape[-2]) - tokens.prefix
    return table[place.clamp(min=0)][:, None]


def _open(tower: Any) -> None:
    """Let encodings into the blocks and attentions of a vision transformer.

    Raises:
        UserError: its blocks need all tokens, its attention cannot be told, or it is open already.
    """
    kind = tower.config.model_type
    if kind in REFUSED:
        raise UserError(f"tokens of a '{kind}' tower cannot be merged: {REFUSED[kind]}.")
    if tower.config._attn_implementation == NAME:
        raise UserError("this tower is in a ReducedTower already: build another one, or put all reductions into one.")
    tower.set_attn_implementation(NAME)
    if tower.config._attn_implementation != NAME:
        raise UserError(f"tokens of a '{kind}' tower cannot be merged: its attention takes no other implementation.")
    blocks = encoder_layers(tower)
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(_Before(number, len(blocks)), with_kwargs=True)
        # Before transformers' own hooks, which keep hidden states.
        block.register_forward_hook(_Behind(number, len(blocks)), with_kwargs=True, prepend=True)


@dataclass(frozen=True)
class _Before:
    """A hook of a block; no closure, so that the tower can be copied."""

    number: int
    blocks: int

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        encoding = _encoding.get()
        return None if encoding is None else encoding.before(self.number, self.blocks, args, kwargs)


@dataclass(frozen=True)
class _Behind:
    """The same, behind it."""

    number: int
    blocks: int

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        encoding = _encoding.get()
        return out if encoding is None else encoding.behind(self.number, self.blocks, out)


def videos_of(layouts: Sequence[Layout]) -> list[range]:
    """The views of each video, of images and videos that stand one after the other."""
    videos, first = [], 0
    for layout in layouts:
        if layout.video:
            videos.append(range(first, first + layout.views))
        first += layout.views
    return videos


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Attention in which a token counts as often as the tokens that it stands for; its keys are noted."""
    encoding = _encoding.get()
    if encoding is not None:
        encoding.keys = key.detach().mean(1)  # (S, n, d)
        if encoding.tokens is not None:
            mask = encoding.tokens.size.log()[:, None, None].to(query.dtype)  # (S, 1, 1, n)
            mask = mask.expand(-1, -1, query.shape[2], -1)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
