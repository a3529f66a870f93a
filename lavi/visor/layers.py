"""Which layers of a decoder read the visual tokens, which may refine them, and where a router can stand."""

from __future__ import annotations

from collections.abc import Sequence

from lavi.errors import UserError
from lavi.fusion.layers import spread_layers
from lavi.visor.files import Configuration


def choose_layers(reading: int | list[int], refining: int | list[int], depth: int) -> tuple[list[int], list[int]]:
    """The layers that read V and those that may refine it, of ``depth``; a number of them is evenly spread.

    Raises:
        UserError: more than there are, one that is not there, or one that would do both.
    """
    read_count = reading if isinstance(reading, int) else len(reading)
    refine_count = refining if isinstance(refining, int) else len(refining)
    if read_count + refine_count > depth or min(read_count, refine_count) < 0:
        raise UserError(
            f"VISOR: {read_count} reading and {refine_count} refining layers, and the language model has {depth}."
        )
    taken = set() if isinstance(refining, int) else set(refining)
    readers = _spread(reading, [layer for layer in range(depth) if layer not in taken])
    free = [layer for layer in range(depth) if layer not in readers]
    behind = [layer for layer in free if readers and layer > readers[0]]
    # A router that stands before the first of them has then read the image.
    refiners = _spread(refining, behind if refine_count <= len(behind) else free)
    for name, layers in (("cross_attention", readers), ("self_attention", refiners)):
        if wrong := [layer for layer in layers if not 0 <= layer < depth]:
            raise UserError(f"VISOR's {name} names layers {wrong}: the language model has 0 to {depth - 1}.")
    if both := sorted(set(readers) & set(refiners)):
        raise UserError(f"VISOR's layers {both} cannot both read the visual tokens and refine them.")
    return readers, refiners


def _spread(wanted: int | list[int], free: list[int]) -> list[int]:
    if isinstance(wanted, int):
        return [free[index] for index in spread_layers(len(free), wanted, "spread")] if wanted else []
    return sorted(set(wanted))


def where_routes_part(
    viable: Sequence[Configuration], reading: Sequence[int], refining: Sequence[int], *, reads: str
) -> int:
    """The first layer in which the viable configurations differ: the router stands before it.

    Raises:
        UserError: they do not differ; or a router that reads a token would stand before the image was read.
    """
    differing = [layer for layer in refining if len({layer in one for one in viable}) == 2]
    if not differing:
        raise UserError(
            f"VISOR's router has nothing to choose from: the viable configurations are {list(viable)}; name two."
        )
    if reads == "token" and not any(layer < differing[0] for layer in (*reading, *viable[0])):
        raise UserError(
            f"VISOR's router reads a token before layer {differing[0]}, and no layer has shown it the image by "
            "then: let a layer of cross_attention stand before it, or set router: pooled."
        )
    return differing[0]
