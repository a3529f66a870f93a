"""A prompt and the tokens behind it, step by step: what is timed of an answer, as ``generate`` would compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lavi.language.compiled import DecodeCompiler
from lavi.language.context import VisualContext

Prefill = Callable[[Cache | None], tuple[Any, VisualContext | None]]
"""Reads a prompt into a cache (None: one of its own); the decoder's output, and the context of the tokens behind it."""


class Steps:
    """One answer after the other of a language model.

    Args:
        hf: the language model.
        prefill: reads the prompt.
        rows: of the prompt.
        length: columns of the prompt and the longest answer; None: steps are not compiled.
    """

    def __init__(self, hf: PreTrainedModel, prefill: Prefill, *, rows: int, length: int | None = None) -> None:
        self.hf, self.prefill, self.rows, self.length = hf, prefill, rows, length
        self.compiler = None if length is None else DecodeCompiler()

    def begin(self, *, undoable: bool = False) -> Tensor:
        """Read the prompt; the last token's logits (B, 1, vocabulary).

        Args:
            undoable: keep what steps displace from a sliding window, for :meth:`undo_step` to bring it back.
        """
        cache = None
        if self.compiler is not None and self.length is not None:
            cache = self.compiler.cache_for(self.hf, rows=self.rows, columns=self.length)
        out, self.vision = self.prefill(cache)
        self.cache = out.past_key_values
        if self.compiler is not None:
            columns = int(self.cache.get_seq_length())
            self.mask = torch.ones(self.rows, columns, dtype=torch.long, device=self.hf.device)
        elif undoable:
            self.cache.activate_past_recording()
        return out.logits[:, -1:]  # type: ignore[no-any-return]

    def step(self, token: Tensor) -> Tensor:
        """Read one more token (B, 1); the logits of the next (B, 1, vocabulary)."""
        if self.compiler is None:
            out = self.hf(input_ids=token, past_key_values=self.cache, use_cache=True, vision=self.vision)
        else:
            self.mask = torch.cat([self.mask, self.mask.new_ones(self.rows, 1)], dim=1)
            out = self.compiler.step(self.hf, token, self.mask, self.vision)
        return out.logits  # type: ignore[no-any-return]

    def undo_step(self) -> None:
        """As if the last step had not been."""
        if self.compiler is None:
            self.cache.crop(-1)
        else:
            self.mask = self.mask[:, :-1]
            self.compiler.undo_step()
