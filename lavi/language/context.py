"""What travels between a fusion and a decoder: the arranged input, and the one keyword ``vision``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig


@dataclass
class VisualContext:
    """What the decoder layers of one call may see; made anew for each call, so no state outlives it.

    It travels as the keyword ``vision`` through the decoder (never under a name that transformers drops after
    prefill, such as ``pixel_values``). A fusion that works inside the layers subclasses it and overrides
    :meth:`run_layer`; what a layer needs of the image is computed before the decoder starts and carried here, so that
    decode steps and checkpointed recomputation find the same tensors.
    """

    text_columns: Tensor | None = None
    """(B, T): where the text tokens stand in the arranged sequence; logits are computed there only. None: all."""
    prompt_is_read: bool = False
    """Whether it is the same for all tokens to come: nobody need count those that are cached."""

    def for_step(self, past: int, length: int) -> Self:
        """The context as ``length`` tokens see it that follow ``past`` cached ones."""
        return self

    def works_in(self, layer: int) -> bool:
        """Whether :meth:`run_layer` has something to do in a layer: others run as they are.

        Another fusion on the same language model may have opened them.
        """
        return True

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        """Run decoder layer ``layer`` (``call``) on ``hidden`` (B, T, D); here a method does what it does.

        Args:
            kwargs: what the stack hands to the layer, by name (``attention_mask``, ``past_key_values`` ...).
        """
        return call(hidden, vision=self, **kwargs)

    def behind_prompt(self) -> Self:
        """The context of the tokens that follow a prompt which was read: one for all, unless each call has its own."""
        each_call = type(self).for_step is not VisualContext.for_step
        return self if each_call else replace(self, prompt_is_read=True)

    def new_cache(self, config: PretrainedConfig) -> Cache | None:
        """The only cache that can serve a prompt about to be read; None: any that the language model takes."""
        return None

    def during_stack(self) -> AbstractContextManager[object]:
        """Holds while the whole stack of layers runs, its final norm included."""
        return nullcontext()

    def cached_tensors(self) -> list[Tensor]:
        """What of the images is kept for the tokens to come, beside the language model's own cache."""
        return []

    def losses(self) -> dict[str, Tensor]:
        """What the method adds to the loss of a batch that was read, each a mean over samples."""
        return {}

    def for_generation(self, copies: int) -> Self:
        """The context of a prompt about to be continued, each row ``copies`` times, side by side."""
        return replace(self, text_columns=None)


class HeadAlone(VisualContext):
    """Tells the decoder to skip its layers: ``inputs_embeds`` already are its last hidden states."""


@dataclass
class DecoderInput:
    """A sequence as a fusion arranged it: ids (B, T) or embeddings (B, T', D), mask (B, T') bool, and the context.

    ``conversation`` (B, T') numbers the conversations that a row holds, where it holds several; -1 is padding. They do
    not see each other: transformers keeps apart what begins at position 0 anew, if it is given no mask.
    """

    attention_mask: Tensor
    vision: VisualContext
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    conversation: Tensor | None = None

    @property
    def position_ids(self) -> Tensor:
        """(B, T'): padding does not count, on either side; each conversation of a row begins at 0."""
        if self.conversation is None:
            return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        columns = torch.arange(self.conversation.shape[1], device=self.conversation.device).expand_as(self.conversation)
        first = torch.ones_like(self.attention_mask)
        first[:, 1:] = self.conversation[:, 1:] != self.conversation[:, :-1]
        return columns - columns.masked_fill(~first, 0).cummax(-1).values

    def sequence(self) -> dict[str, Tensor]:
        """``input_ids`` or ``inputs_embeds``, and ``attention_mask``, as transformers names them."""
        # A mask on meta has no values that transformers could look at; what is counted there is never padded.
        mask = None if self.attention_mask.is_meta or self.conversation is not None else self.attention_mask
        named = {"input_ids": self.input_ids, "inputs_embeds": self.inputs_embeds, "attention_mask": mask}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
