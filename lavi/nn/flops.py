"""Closed formulas that every component shares. 1 multiply-add = 2 FLOPs."""


def linear_flops(tokens: int, inputs: int, outputs: int) -> float:
    """A linear layer without its bias."""
    return 2.0 * tokens * inputs * outputs
