"""Layers that work on fewer tokens than the sequence has, and on rows apart: their masks, positions and caches.

    arranged sequence (B, S)     t t V V V V t t t      what the stack made its masks and positions for
    a layer's columns (B, n)     t t   V     t t t      what one layer works on

The stack is left as it is. A layer that works on some columns only gets its mask made anew and its positions picked;
its cache holds these columns alone, while to the stack the cache looks as long as the arranged sequence.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from lavi.errors import UserError

KERNELS = ("sdpa", "eager", "flash_attention_2")
"""The attention kernels whose masks are made here."""


class LayeredCache(DynamicCache):
    """Keys and values of layers that worked on different columns; also of groups of rows that went different ways.

    Attributes:
        arranged: columns of the arranged sequence so far.
        cross: for a layer that reads beside the sequence, what it keeps of what it reads (keys and values).
        added: keys and values of attention that a fusion adds: of what it reads, and of the text behind that.
        groups: where rows part, groups of them (their numbers, ascending) and the cache of each for the layers behind.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.config = config
        self.arranged = 0
        self.cross: dict[int, tuple[Tensor, ...]] = {}
        self.added = DynamicCache()
        self.groups: list[tuple[Tensor, LayeredCache]] = []
        self.kept: dict[str, Any] = {}
        """Whatever else a context needs of the prompt in the calls that follow it."""

    def part(self, rows: list[Tensor]) -> None:
        """From here on each group of rows has a cache of its own."""
        self.groups = [(group, LayeredCache(self.config)) for group in rows]
        if any(getattr(layer, "record_past", False) for layer in self.layers):
            self.activate_past_recording()

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        for _, cache in self.groups:
            cache.activate_past_recording()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.arranged

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        window = window_of(self, layer_idx)
        kept = self.arranged if window is None else min(self.arranged, window - 1)
        return kept + query_length, self.arranged - kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.cross = {layer: tuple(part[beam_idx] for part in seen) for layer, seen in self.cross.items()}
        self.added.reorder_cache(beam_idx)  # type: ignore[arg-type]
        for rows, cache in self.groups:  # beams of one prompt went the same way, so each group keeps its rows
            cache.reorder_cache(torch.searchsorted(rows, beam_idx[rows]))

    def crop(self, tokens_to_remove: int) -> None:
        self.arranged -= abs(tokens_to_remove)
        layers: list[Any] = [*self.layers, *self.added.layers]
        for layer in layers:
            if layer.is_initialized:  # those behind the parting of the rows are not
                layer.crop(tokens_to_remove)
        for _, cache in self.groups:
            cache.crop(tokens_to_remove)

    def cached_tensors(self) -> list[Tensor]:
        """What is kept beside the language model's own keys and values."""
        own = [tensor for seen in self.cross.values() for tensor in seen]
        added: list[Any] = self.added.layers
        own += [tensor for layer in added for tensor in (layer.keys, layer.values)]
        return own + [tensor for _, cache in self.groups for tensor in cache.cached_tensors()]

    def keys_values(self) -> list[Tensor]:
        """What the language model's own attention keeps."""
        layers: list[Any] = self.layers
        own = [tensor for layer in layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
        return own + [tensor for _, cache in self.groups for tensor in cache.keys_values()]


def window_of(cache: DynamicCache, layer: int) -> int | None:
    """The sliding window of a layer's attention, in tokens."""
    return getattr(cache.layers[layer], "sliding_window", None)


@dataclass(frozen=True)
class AttentionKind:
    """The attention of a language model: its kernel, and the sliding window of each layer in tokens (None: all)."""

    kernel: str
    windows: tuple[int | None, ...]
    chunked: bool = False
    """Whether some layers attend within chunks of the sequence, as Llama 4's do."""

    @classmethod
    def of(cls, kernel: str, config: PretrainedConfig) -> Self:
        """Of the language model with this configuration."""
        cache = DynamicCache(config=config)
        windows = tuple(window_of(cache, layer) for layer in range(len(cache.layers)))
        return cls(kernel, windows, chunked="chunked_attention" in (getattr(config, "layer_types", None) or ()))

    def check(self, method: str) -> None:
        """Refuse what masks cannot be made for here.

        Raises:
            UserError: attention in chunks; another kernel than :data:`KERNELS`; or flash attention in a model with
                sliding windows, which it counts in the tokens it gets, not in those of the sequence.
        """
        if self.chunked:
            raise UserError(
                f"{method} works on a part of the sequence, which attention in chunks (Llama 4) would cut "
                "elsewhere than the whole: take another family."
            )
        if self.kernel == "flash_attention_2" and any(self.windows):
            raise UserError(
                f"{method} in a model with sliding windows needs language.attention=sdpa, not '{self.kernel}'."
            )
        if self.kernel not in KERNELS:
            raise UserError(f"{method} works with the attention kernels {', '.join(KERNELS)}, not '{self.kernel}'.")


def take(tensor: Tensor, columns: Tensor) -> Tensor:
    """(B or 1, S, ...) at ``columns`` (B, n): (B, n, ...). A column behind the end (padding) takes the last."""
    columns = columns.clamp(max=tensor.shape[1] - 1)
    index = columns.reshape(*columns.shape, *[1] * (tensor.ndim - 2))
    wide = tensor.expand(len(columns), *tensor.shape[1:])
    return wide.gather(1, index.expand(*columns.shape, *tensor.shape[2:]))


def _take_each(parts: Any, columns: Tensor) -> Any:
    """Cosine and sine, or one complex tensor, at ``columns``."""
    return take(parts, columns) if isinstance(parts, Tensor) else tuple(take(part, columns) for part in parts)


def causal_mask(
    queries: Tensor, keys: Tensor, valid: Tensor | None, *, window: int | None, kernel: str, dtype: torch.dtype
) -> Tensor | None:
    """The attention mask of columns ``queries`` (B, Q) over columns ``keys`` (B, K), as ``kernel`` wants it.

    Args:
        valid: (B, K): which keys are tokens and no padding; None: all.
        window: of sliding attention, in columns.
    """
    if kernel == "flash_attention_2":
        return valid
    allowed = keys[:, None, :] <= queries[:, :, None]  # (B, Q, K)
    if window is not None:
        allowed &= queries[:, :, None] - keys[:, None, :] < window
    if valid is not None:
        allowed &= valid[:, None, :]
    if queries.shape == keys.shape:  # padding attends to itself: a softmax over nothing is no number
        allowed |= keys[:, None, :] == queries[:, :, None]
    allowed = allowed[:, None]  # (B, 1, Q, K)
    if kernel == "eager":
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return allowed


@dataclass(frozen=True, kw_only=True)
class ArrangedCall:
    """One call of the decoder on a sequence whose prompt a fusion arranged, as layers see it that work on a part.

    Columns are counted in the arranged sequence. Where columns (B, n) are given, :attr:`length` among them is padding.
    """

    length: int
    """S, of the arranged prompt."""
    past: int
    """Columns that are cached."""
    new_tokens: int
    """Tokens of this call: all of the sequence while nothing is cached."""

    @property
    def behind(self) -> int:
        """Tokens behind the prompt that this call reads together with it; 0 where the prompt is cached."""
        return 0 if self.past else self.new_tokens - self.length

    def columns_behind(self, rows: int, device: torch.device) -> Tensor:
        """(rows, k): the columns behind the prompt, up to the end of this call."""
        return torch.arange(self.length, self.past + self.new_tokens, device=device).expand(rows, -1)

    def columns(self, of_prompt: Tensor) -> Tensor:
        """Columns (B, n) of the prompt, and (B, n + k) those behind it in this call; its length is padding."""
        if not self.behind:
            return of_prompt
        behind = self.columns_behind(len(of_prompt), of_prompt.device)
        return torch.cat([self.with_padding(of_prompt), behind], dim=1)

    def with_padding(self, of_prompt: Tensor) -> Tensor:
        """Columns (B, n) of the prompt alone, padding as :meth:`join` wants it: the length of this call."""
        return of_prompt.masked_fill(of_prompt == self.length, self.new_tokens)

    def valid(self, of_prompt: Tensor | None) -> Tensor | None:
        """Which columns (B, n) of the prompt are no padding, and (B, n + k) those behind it; None: all."""
        if of_prompt is None or not self.behind:
            return of_prompt
        return torch.cat([of_prompt, of_prompt.new_ones(len(of_prompt), self.behind)], dim=1)

    def join(self, *parts: tuple[Tensor, Tensor]) -> Tensor:
        """Parts (B, n, D), each at its columns (B, n), as one sequence (B, new tokens, D); zero where none is."""
        first = parts[0][0]
        widest = functools.reduce(torch.promote_types, (part.dtype for part, _ in parts))  # under autocast they differ
        # The last column takes padding.
        joined = first.new_zeros(first.shape[0], self.new_tokens + 1, first.shape[2], dtype=widest)
        for part, columns in parts:
            joined = joined.scatter(1, columns[..., None].expand_as(part), part.to(joined.dtype))
        return joined[:, : self.new_tokens]

    def layer_kwargs(
        self,
        kwargs: dict[str, Any],
        columns: Tensor,
        valid: Tensor | None,
        *,
        attention: AttentionKind,
        layer: int,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """The arguments of a layer that works on some columns only: its positions, its mask.

        Args:
            kwargs: what the stack made for the arranged sequence.
            columns: (B, n) of this call; behind a cached prompt, those of the prompt.
            valid: (B, n) which of them are no padding; None: all.

        Raises:
            UserError: positions come as a bias on the attention, which is not made anew here.
        """
        queries, kernel = columns, attention.kernel
        changed = self.kwargs_at(kwargs, columns)
        if self.past:
            behind = self.columns_behind(len(columns), columns.device)
            queries, columns = behind[:, -self.new_tokens :], torch.cat([columns, behind], dim=1)
            valid = None if valid is None else torch.cat([valid, valid.new_ones(behind.shape)], dim=1)
        window = attention.windows[layer]
        if window is not None and self.past + self.new_tokens <= window:
            window = None
        if window is not None and self.past:  # its cache keeps no more
            kept = window - 1 + self.new_tokens
            columns, valid = columns[:, -kept:], None if valid is None else valid[:, -kept:]
        if valid is not None or window is not None or (self.past and self.new_tokens > 1):
            mask = causal_mask(queries, columns, valid, window=window, kernel=kernel, dtype=dtype)
            changed["attention_mask"] = mask
        elif kernel == "eager" and not self.past:  # the only kernel that does not know what causal means
            changed["attention_mask"] = causal_mask(queries, columns, None, window=None, kernel=kernel, dtype=dtype)
        return changed

    def kwargs_at(self, kwargs: dict[str, Any], columns: Tensor) -> dict[str, Any]:
        """The arguments of a layer that works on some columns (B, n) only: its positions, and no mask.

        Raises:
            UserError: as :meth:`layer_kwargs`.
        """
        if kwargs.get("alibi") is not None:
            raise UserError(
                "language models with ALiBi positions cannot work on a part of a sequence: take another family."
            )
        changed: dict[str, Any] = {"attention_mask": None}
        if not self.past and isinstance(kwargs.get("position_ids"), Tensor):
            changed["position_ids"] = take(kwargs["position_ids"], columns)
        if not self.past and kwargs.get("position_embeddings") is not None:
            changed["position_embeddings"] = _take_each(kwargs["position_embeddings"], columns)
        return kwargs | changed

    def mask_over_all(
        self, queries: Tensor, valid: Tensor | None, *, attention: AttentionKind, layer: int, dtype: torch.dtype
    ) -> Tensor | None:
        """The mask of columns ``queries`` (B, Q) over all S columns of a call without a cached prompt.

        Args:
            valid: (B, S) which of them are no padding; None: all.
        """
        keys = torch.arange(self.new_tokens, device=queries.device).expand(len(queries), -1)
        window = attention.windows[layer]
        return causal_mask(queries, keys, valid, window=window, kernel=attention.kernel, dtype=dtype)


def rows_only(kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """A layer's arguments for some rows of its batch."""

    def choose(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] > 1:
            return value[rows]
        return tuple(map(choose, value)) if isinstance(value, tuple) else value

    names = ("attention_mask", "position_ids", "position_embeddings")
    return kwargs | {name: choose(kwargs[name]) for name in names if name in kwargs}
