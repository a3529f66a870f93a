"""VISOR's router: which configuration a sample needs, learned from offline labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lavi.batch import IGNORE
from lavi.errors import UserError
from lavi.nn.formulas import linear_flops
from lavi.visor.files import Configuration, Label, read_labels

PATIENCE = 20
"""Batches in which no sample has a label, before training a router stops."""
HIDDEN = 128
"""Width of the router."""


class Router(nn.Module):
    """Chooses one of the viable configurations for each row.

    Args:
        width: D.
        viable: from the cheapest to the dearest.
        before_layer: the layer that it stands before.
        reads: ``token``, the last one of the prompt, or ``pooled``, the mean visual token.
    """

    def __init__(self, width: int, viable: Sequence[Configuration], *, before_layer: int, reads: str) -> None:
        super().__init__()
        self.viable, self.before_layer, self.reads = list(viable), before_layer, reads
        self.network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, len(viable))
        )

    def forward(self, state: Tensor) -> Tensor:
        """(B, D) to logits (B, configurations)."""
        logits: Tensor = self.network(state.to(next(self.network.parameters()).dtype))
        return logits

    def flops(self) -> float:
        """FLOPs of one row."""
        norm = self.network[0]
        assert isinstance(norm, nn.LayerNorm)
        return linear_flops(1, norm.normalized_shape[0], HIDDEN) + linear_flops(1, HIDDEN, len(self.viable))


class RouterLabels:
    """The configuration that each training sample needs, from the file that ``lavi.visor label`` wrote.

    Args:
        file: read when it is needed first.
        viable: what the router chooses from.
    """

    def __init__(self, file: Path, viable: Sequence[Configuration]) -> None:
        self.file, self.viable = file, viable
        self.unlabelled_batches = 0

    @cached_property
    def of_samples(self) -> dict[str, Label]:
        """By key."""
        return read_labels(self.file, self.viable)

    def loss(self, keys: Sequence[str], tokens: Sequence[int], logits: Tensor) -> Tensor:
        """Cross-entropy of the router's choice (B, configurations) against the labels of the samples ``keys``.

        Args:
            tokens: of text, of each sample: a label of one that had another number is of other data.

        Raises:
            UserError: the file is empty, is of other data, or has had a label for no sample of :data:`PATIENCE`
                batches in a row.
        """
        if not self.of_samples:
            raise UserError(f"{self.file} holds no label: make them with python -m lavi.visor label.")
        found = [self.of_samples.get(key, Label(IGNORE, None)) for key in keys]
        for key, label, count in zip(keys, found, tokens, strict=True):
            if label.tokens not in (None, count):
                raise UserError(
                    f"{self.file} labels sample {key}, which had {label.tokens} tokens of text, and has {count} here: "
                    "these are labels of other data, or of other prompts. Label what is trained on."
                )
        labels = [label.number for label in found]
        if all(label < 0 for label in labels):
            self.unlabelled_batches += 1
            if self.unlabelled_batches < PATIENCE:  # a batch without labels is no mistake
                return 0.0 * logits.sum()
            raise UserError(
                f"{self.file} has a label for none of the samples {', '.join(keys[:4])} ..., nor of the "
                f"{PATIENCE - 1} batches before: label them."
            )
        self.unlabelled_batches = 0
        return nn.functional.cross_entropy(logits.float(), torch.tensor(labels, device=logits.device))
