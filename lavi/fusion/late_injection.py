"""Late injection: visual tokens enter the decoder at a deeper layer (DeepInsert 2504.19327, HiDrop 2602.23699).

    [ text       text ] -> layers 0 .. first-1          text alone; V waits as the projector made it
    [ text V V V text ] -> layers first .. last         concatenation
    [ text       text ] -> layers last+1 .. L-1         text alone; only where ``last`` is given

The papers: early layers need no visual tokens, so V is spliced in at a middle layer, with the positions of the whole
sequence (both); behind a deep layer the visual tokens that are left leave the sequence (HiDrop's early exit). Chosen
here: no layer is a default, since it depends on the language model; between ``first`` and ``last`` all visual tokens
stay, where HiDrop prunes them along a pyramid, which is not here.
"""

from __future__ import annotations

from lavi.config.types import Count, CountOrZero
from lavi.errors import UserError
from lavi.fusion.tile_markers import TileMarkers
from lavi.fusion.visual_layers import Mode, VisualLayersFusion
from lavi.nn.projectors import Projector


class LateInjection(VisualLayersFusion):
    """Text alone, then text and visual tokens, then optionally text alone again.

    Args:
        first: the first layer, from 0, that the visual tokens are in.
        last: the last one; None: they stay.
        projector, newline, budget, markers: as in :class:`~lavi.fusion.concat.ConcatFusion`.

    Raises:
        UserError: no such layers.
    """

    def __init__(
        self,
        *,
        first: CountOrZero,
        last: CountOrZero | None = None,
        projector: Projector | None = None,
        newline: bool = False,
        budget: Count | None = 9,
        markers: TileMarkers | None = None,
    ) -> None:
        super().__init__(projector=projector, newline=newline, budget=budget, markers=markers)
        self.first, self.last = first, last

    def modes(self, depth: int) -> list[Mode]:
        last = depth - 1 if self.last is None else self.last
        if not 0 <= self.first <= last < depth:
            raise UserError(
                f"late injection has visual tokens in layers {self.first} to {last}: the language model has 0 to "
                f"{depth - 1}."
            )
        return ["whole" if self.first <= layer <= last else "text" for layer in range(depth)]
