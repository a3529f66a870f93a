"""Delta generators (LaVi's conditioning module): text hidden states and visual tokens to the deltas of norms.

    V (views, N, Dv) -- visual, once an image --> slots (views, S, E) -- gathered by row --> (B, M, E) --+
    h (B, T, D) -----------------------------------------------------------------------------------------+
                                                          attend --> SiLU --> 0-init --> deltas (B, T, outputs, D)

What differs between the four is what an image leaves in its slots, and how a token reads them:

    attention   a key and a value for each visual token              the token attends to them (the paper's choice)
    mlp         one vector: an MLP over tokens, an MLP over channels  added to the token's own query
    conv        one vector: depthwise and pointwise convolutions      added to the token's own query
    pooled      one vector: the mean                                  the same deltas for all tokens (adaLN, FiLM)
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Self

from torch import Tensor, nn

from lavi.config.types import Count, PositiveOrZero
from lavi.errors import UserError
from lavi.nn.autocast import without_autocast
from lavi.nn.formulas import linear_flops
from lavi.nn.grid_code import grid_of_tokens
from lavi.nn.visibility import Visibility


class DeltaGenerator(nn.Module, ABC):
    """What all generators share: the zero-initialised projection, fp32, and exactly 0 where nothing is seen.

    A token's deltas depend on its own hidden state and on the images it may see, on nothing else of the text.
    Chosen here: the bottleneck, the norms on both inputs, and fp32 throughout (a delta of 2^-9 on a weight of 1 is
    lost in bf16).

    A recipe names one with its own arguments; a fusion binds a copy of it for each layer. One of one's own overrides
    :meth:`make`, :meth:`slots`, :meth:`attend` and their FLOPs.

    Args:
        bottleneck: r, the generator's own width, far below D.
        initial_std: deviation of the last projection's weights at the start. The paper's 0: a model that has not been
            trained answers as the language model alone.
    """

    width: int
    """D of the hidden states."""
    vision_width: int
    """Dv of the visual tokens."""
    outputs: int
    """How many deltas of width D a token gets."""
    vision_norm: nn.LayerNorm
    deltas: nn.Linear
    keeps_tokens = False
    """Whether each visual token leaves a slot of its own: S is N."""

    def __init__(self, *, bottleneck: Count = 64, initial_std: PositiveOrZero = 0.0) -> None:
        super().__init__()
        self.bottleneck, self.initial_std = bottleneck, initial_std

    def bound(self, *, width: int, vision_width: int, outputs: int) -> Self:
        """A copy with parameters of its own, for hidden states of width D and visual tokens of width Dv."""
        generator = copy.deepcopy(self)
        generator.width, generator.vision_width, generator.outputs = width, vision_width, outputs
        generator.vision_norm = nn.LayerNorm(vision_width)
        generator.deltas = nn.Linear(generator.bottleneck, outputs * width)
        nn.init.zeros_(generator.deltas.weight)
        if generator.initial_std:
            nn.init.normal_(generator.deltas.weight, std=generator.initial_std)
        nn.init.zeros_(generator.deltas.bias)
        generator.make()
        return generator

    def visual(self, features: Tensor, grid: tuple[int, int], code: Tensor | None = None) -> Tensor:
        """The image's part, computed once: ``features`` (views, N, Dv) of a ``grid`` to slots (views, S, E).

        Args:
            code: (views, N or 1, Dv), which view it is and where each token lies, added to the normed features.
        """
        with without_autocast(features):
            normed = self.vision_norm(features.float())
            return self.slots(normed if code is None else normed + code, grid)

    def prepare(self, slots: Tensor) -> Tensor:
        """The slots of each row (B, M, E) as :meth:`attend` reads them again and again; by default as they are."""
        return slots

    def forward(self, hidden: Tensor, slots: Tensor, seen: Visibility) -> list[Tensor]:
        """``outputs`` deltas (B, T, D) in fp32, exactly 0 where a token sees nothing.

        Args:
            hidden: (B, T, D).
            slots: what :meth:`visual` left of the images of each row, prepared.
            seen: which of them each token sees.
        """
        with without_autocast(hidden):
            # Multiplied by 0, not left out: the parameters stay in the graph, so that a rank whose batch has no image
            # does not hang the others.
            read = nn.functional.silu(self.attend(hidden.float(), slots, seen))  # (B, T, r)
            return list(seen.only(self.deltas(read)).split(self.width, dim=-1))

    @abstractmethod
    def make(self) -> None:
        """Make the generator's own parameters."""

    @abstractmethod
    def slots(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Normed features (views, N, Dv) to slots (views, S, E)."""

    @abstractmethod
    def attend(self, hidden: Tensor, slots: Tensor, seen: Visibility) -> Tensor:
        """(B, T, D) and prepared slots, (B, M, E), to (B, T, r); anything finite where a token sees nothing."""

    def shares(self, hidden: Tensor, slots: Tensor, seen: Visibility) -> Tensor | None:
        """What share of what each token reads comes from each slot: (B, T, M), 0 where nothing is seen.

        None: the generator has no slot for each visual token.
        """
        return None

    @abstractmethod
    def slots_flops(self, per_view: int) -> float:
        """FLOPs of the slots of one view of ``per_view`` tokens."""

    @abstractmethod
    def attend_flops(self, text: int, *, views: int, per_view: int) -> float:
        """FLOPs of ``text`` tokens reading the slots of ``views`` views."""

    def flops(self, text: int, *, views: int, per_view: int) -> float:
        """FLOPs of the deltas of ``text`` tokens that see ``views`` of ``per_view`` tokens; the slots not counted."""
        reading = self.attend_flops(text, views=views, per_view=per_view)
        return reading + linear_flops(text, self.bottleneck, self.outputs * self.width)


class AttentionDeltas(DeltaGenerator):
    """Each token attends to the visual tokens (LaVi, Table 4: its choice).

    Args:
        bottleneck: r, shared out among the heads.
        heads: of the attention.
        initial_std: as :class:`DeltaGenerator`.

    Raises:
        UserError: the bottleneck is no multiple of the heads.
    """

    keeps_tokens = True

    def __init__(self, *, bottleneck: Count = 64, heads: Count = 4, initial_std: PositiveOrZero = 0.0) -> None:
        super().__init__(bottleneck=bottleneck, initial_std=initial_std)
        if bottleneck % heads:
            raise UserError(f"the generator's bottleneck ({bottleneck}) must be a multiple of its heads, {heads}.")
        self.heads = heads

    def make(self) -> None:
        self.text_norm = nn.RMSNorm(self.width)
        self.query = nn.Linear(self.width, self.bottleneck, bias=False)
        self.key_value = nn.Linear(self.vision_width, 2 * self.bottleneck, bias=False)

    def slots(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.key_value(features)  # (views, N, 2 r)

    def prepare(self, slots: Tensor) -> Tensor:
        key_value = slots.unflatten(-1, (2, self.heads, -1))  # (B, M, 2, heads, r / heads)
        return key_value.permute(0, 2, 3, 1, 4).contiguous()  # (B, 2, heads, M, r / heads)

    def attend(self, hidden: Tensor, slots: Tensor, seen: Visibility) -> Tensor:
        key, value = slots.unbind(1)
        read = nn.functional.scaled_dot_product_attention(self._queries(hidden), key, value, attn_mask=seen.allowed)
        return read.transpose(1, 2).flatten(2)

    def shares(self, hidden: Tensor, slots: Tensor, seen: Visibility) -> Tensor:
        query, key = self._queries(hidden.float()), slots[:, 0]
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, heads, T, M)
        if seen.allowed is not None:
            scores = scores.masked_fill(~seen.allowed, float("-inf"))
        return seen.only(scores.softmax(-1).mean(1))

    def _queries(self, hidden: Tensor) -> Tensor:
        query = self.query(self.text_norm(hidden))  # (B, T, r)
        return query.view(*query.shape[:2], self.heads, -1).transpose(1, 2)  # (B, heads, T, r / heads)

    def slots_flops(self, per_view: int) -> float:
        return linear_flops(per_view, self.vision_width, 2 * self.bottleneck)

    def attend_flops(self, text: int, *, views: int, per_view: int) -> float:
        return linear_flops(text, self.width, self.bottleneck) + 4 * text * views * per_view * self.bottleneck


class _OneVector(DeltaGenerator):
    """An image leaves one vector (views, 1, r); a token sees the mean of its images', and its own query beside it."""

    asks = True
    """Whether the token's own hidden state takes part."""

    def make(self) -> None:
        self.down = nn.Linear(self.vision_width, self.bottleneck)
        if self.asks:
            self.text_norm = nn.RMSNorm(self.width)
            self.query = nn.Linear(self.width, self.bottleneck, bias=False)

    def attend(self, hidden: Tensor, slots: Tensor, seen: Visibility) -> Tensor:
        share = seen.mask.float() / seen.mask.sum(-1, keepdim=True).clamp(min=1)  # (B, T, M)
        read = share @ slots
        return read + self.query(self.text_norm(hidden)) if self.asks else read

    def attend_flops(self, text: int, *, views: int, per_view: int) -> float:
        images = 2.0 * text * views * self.bottleneck
        return images + (linear_flops(text, self.width, self.bottleneck) if self.asks else 0.0)


class PooledDeltas(_OneVector):
    """The mean visual token, for all tokens alike: the control that reviewers of the paper asked for (chosen here)."""

    asks = False

    def attend(self, hidden: Tensor, slots: Tensor, seen: Visibility) -> Tensor:
        return super().attend(hidden, slots, seen).expand(-1, hidden.shape[1], -1)  # one mask may serve all tokens

    def slots(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        # Not linear: the mean of two images' vectors would not tell which of them came first.
        return nn.functional.silu(self.down(features.mean(1, keepdim=True)))

    def slots_flops(self, per_view: int) -> float:
        return linear_flops(1, self.vision_width, self.bottleneck)


class MLPDeltas(_OneVector):
    """In the spirit of MLP-Mixer: an MLP over the tokens of a fixed grid, an MLP over channels (LaVi, Table 4).

    Chosen here: pooling to :attr:`SIDE` x :attr:`SIDE` tokens first, so that the token MLP fits any grid.

    Args:
        bottleneck: r.
        depth: blocks, each an MLP over the tokens and one over the channels.
        initial_std: as :class:`DeltaGenerator`.
    """

    SIDE = 4

    def __init__(self, *, bottleneck: Count = 64, depth: Count = 1, initial_std: PositiveOrZero = 0.0) -> None:
        super().__init__(bottleneck=bottleneck, initial_std=initial_std)
        self.depth = depth

    def make(self) -> None:
        super().make()
        tokens = self.SIDE**2
        self.over_tokens = nn.ModuleList(_mlp(tokens) for _ in range(self.depth))
        self.over_channels = nn.ModuleList(_mlp(self.bottleneck) for _ in range(self.depth))

    def slots(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        x = on_grid(features, grid).permute(0, 3, 1, 2)  # (views, Dv, rows, columns)
        x = nn.functional.adaptive_avg_pool2d(x, self.SIDE).flatten(2).transpose(1, 2)  # (views, S^2, Dv)
        x = self.down(x)
        for tokens, channels in zip(self.over_tokens, self.over_channels, strict=True):
            x = x + tokens(x.transpose(1, 2)).transpose(1, 2)
            x = x + channels(x)
        return x.mean(1, keepdim=True)

    def slots_flops(self, per_view: int) -> float:
        tokens, r = self.SIDE**2, self.bottleneck
        block = 2 * linear_flops(r, tokens, 2 * tokens) + 2 * linear_flops(tokens, r, 2 * r)
        return linear_flops(tokens, self.vision_width, r) + self.depth * block


class ConvDeltas(_OneVector):
    """In the spirit of ConvMixer: depthwise, then pointwise convolutions over the visual grid (LaVi, Table 4).

    Args:
        bottleneck: r.
        depth: blocks, each a depthwise and a pointwise convolution.
        initial_std: as :class:`DeltaGenerator`.
    """

    KERNEL = 3

    def __init__(self, *, bottleneck: Count = 64, depth: Count = 1, initial_std: PositiveOrZero = 0.0) -> None:
        super().__init__(bottleneck=bottleneck, initial_std=initial_std)
        self.depth = depth

    def make(self) -> None:
        super().make()
        r = self.bottleneck
        self.depthwise = nn.ModuleList(
            nn.Conv2d(r, r, self.KERNEL, padding="same", groups=r) for _ in range(self.depth)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(r, r, 1) for _ in range(self.depth))

    def slots(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.down(on_grid(features, grid)).permute(0, 3, 1, 2)  # (views, r, rows, columns)
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = x + nn.functional.gelu(depthwise(x))
            x = nn.functional.gelu(pointwise(x))
        return x.mean((2, 3))[:, None]

    def slots_flops(self, per_view: int) -> float:
        r = self.bottleneck
        block = linear_flops(per_view, self.KERNEL**2, r) + linear_flops(per_view, r, r)
        return linear_flops(per_view, self.vision_width, r) + self.depth * block


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def on_grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """(views, N, E) to (views, rows, columns, E); a class token, which stands before the grid, is left out.

    With another number of tokens than the backbone's ``grid`` has: the rectangle of them nearest to a square.
    """
    tokens = features.shape[1]
    grid = grid_of_tokens(tokens, grid)
    return features[:, tokens - grid[0] * grid[1] :].unflatten(1, grid)
