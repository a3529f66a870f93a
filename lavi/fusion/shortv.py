"""ShortV: visual tokens are frozen in the layers that change them to little effect (arXiv 2504.00502).

    T, V = layer([T ; V])                  all others: concatenation
    T = layer(T attends to [T ; V])        the listed layers: V through the layer's own keys and values; V itself skips
                                           the layer, and has no queries and no feed-forward part there

The paper: training-free; in LLaVA-1.5-7B 19 of 32 layers are such, found by how little the model's output changes when
a layer leaves the visual tokens as they are. Chosen here: for a language model of another depth the layers must be
named, since the paper's measure is not computed here.
"""

from __future__ import annotations

from typing import ClassVar

from lavi.fusion.visual_layers import Mode, ReadingLayersFusion


class ShortV(ReadingLayersFusion):
    """Visual tokens stay as they are in the listed layers, by default the paper's; elsewhere it is concatenation."""

    paper_layers = (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19)
    other_layers: ClassVar[Mode] = "whole"
