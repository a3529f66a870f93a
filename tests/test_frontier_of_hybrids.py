"""Hybrids of fusions and encoders: what is scored in the lab is what is counted at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
from hybrids import (
    ALONE,
    BASELINE_NAME,
    ENCODERS,
    FUSIONS,
    WHOLE,
    Hybrid,
    counted,
    draw,
    frontier,
    hybrids_of,
    hybrids_table,
)
from lab_methods import method_of_variant

from lavi.efficiency.record import Record


def hybrid(name: str, hard: float, teraflops: float) -> Hybrid:
    return Hybrid("LaVi", name, 90.0, hard, 50.0, teraflops, 1.0)


def test_the_frontier_is_what_nothing_as_cheap_beats() -> None:
    """Of two at one cost the better one; what costs more and answers no more is not on it, in any order."""
    cheap, better, dear, best = hybrid("a", 60, 1), hybrid("b", 70, 1), hybrid("c", 70, 2), hybrid("d", 80, 3)
    for order in ([cheap, better, dear, best], [best, dear, better, cheap]):
        assert [one.encoder for one in frontier(order)] == ["b", "d"]
    assert frontier([]) == []


def test_each_is_scored_in_the_lab_under_the_name_that_it_is_looked_up_by() -> None:
    scored = method_of_variant()
    for fusion in FUSIONS.values():
        assert fusion.lab in scored
        for encoder in set(ENCODERS) - {WHOLE}:
            assert encoder + fusion.suffix in scored


def accuracy(value: float) -> dict[str, float]:
    return {"level/easy": value + 1, "level/hard": value, "family/reading": value - 1}


def test_accuracy_is_the_lab_s_and_cost_is_that_of_full_size() -> None:
    """Means over seeds; what was not scored is left out; a quarter of the tiles costs less than all of them."""
    records = [counted(BASELINE_NAME, WHOLE), *(counted("LaVi", encoder) for encoder in (WHOLE, ALONE))]
    names = [FUSIONS["LaVi"].lab] * 2 + [ALONE + FUSIONS["VISOR"].suffix]
    lab = [
        Record("x", 9, 64, 0, 1, accuracy=accuracy(value), knobs={"method": name})
        for name, value in zip(names, (80.0, 90.0, 10.0), strict=True)
    ]
    found = hybrids_of(records, lab)
    assert [(one.encoder, one.easy, one.hard, one.reading) for one in found] == [(WHOLE, 86.0, 85.0, 84.0)]
    whole, alone = records[1:]
    assert found[0].times_fewer == pytest.approx(records[0].gflops_total / whole.gflops_total)
    assert alone.flops["vision_encoder"] == pytest.approx(whole.flops["vision_encoder"] / 10)  # 1 view of 10
    columns, rows = hybrids_table(records, lab)
    assert rows[0][columns.index("frontier")] == "yes"


def test_merging_costs_the_same_share_of_the_encoder_as_in_the_lab() -> None:
    """In the lab blocks work on 64, 48, 32 and 16 of 64 tokens; tiles of the question are a quarter of nine."""
    encoders = ["all, 16 of 64 tokens merged behind each block", "1 of 4, by the question"]
    whole, merged, quarter = (
        counted("LaVi, levels of the tower", encoder).flops["vision_encoder"] for encoder in (WHOLE, *encoders)
    )
    assert merged / whole == pytest.approx((64 + 48 + 32 + 16) / (4 * 64), abs=0.03)
    assert quarter / whole == pytest.approx(0.4, abs=0.01)  # 3 of 9 tiles, and the overview: 4 of 10 views


def test_they_are_drawn(tmp_path: Path) -> None:
    draw([hybrid(WHOLE, 60, 1), hybrid(ALONE, 70, 2)]).savefig(tmp_path / "hybrids.png")
    assert (tmp_path / "hybrids.png").stat().st_size > 10_000
