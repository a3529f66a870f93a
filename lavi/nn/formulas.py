"""Closed formulas that every component shares. 1 multiply-add = 2 FLOPs."""


def linear_flops(tokens: int, inputs: int, outputs: int) -> float:
    """A linear layer without its bias."""
    return 2.0 * tokens * inputs * outputs


def modulation_flops(norms: int, text: int, width: int, *, scale: bool = True, shift: bool = True) -> float:
    """FLOPs of modulating ``norms`` norms for ``text`` tokens; no operator counter sees them.

    Per element: xhat (square, sum, product), dgamma xhat, the two sums.
    """
    return float((3 * scale + scale + scale + shift) * norms * text * width)
