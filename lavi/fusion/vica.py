"""ViCA: visual tokens are never updated, and few layers read them (arXiv 2602.07574).

    V as the projector made it, beside the text T through all layers

    T = layer(T attends to [T ; V])     the listed layers: V through the layer's own input norm, keys and values, in its
                                        place in the sequence, one softmax over all; feed-forward part on T alone
    T = layer(T)                        all others

The paper: no new parameters; in LLaVA-1.5-7B the layers 0, 1, 7, 8, 9, 10, 11 and 14 read. Chosen here: for a language
model of another depth the layers must be named, since how the paper chose its own is not computed here.
"""

from __future__ import annotations

from typing import ClassVar

from lavi.fusion.visual_layers import Mode, ReadingLayersFusion


class ViCA(ReadingLayersFusion):
    """Text reads the visual tokens in the listed layers, by default the paper's, and is alone in all others."""

    paper_layers = (0, 1, 7, 8, 9, 10, 11, 14)
    other_layers: ClassVar[Mode] = "text"
