"""The prompt that is typical of a split: medians of its text, its images and its frames."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lavi.batch import Layout
from lavi.efficiency.point import Scenario
from lavi.evaluation import PromptSizes


def sizes_of(*prompts: tuple[int, list[Layout]]) -> PromptSizes:
    """Of prompts of so many ids and these images."""
    sizes = PromptSizes()
    for length, layouts in prompts:
        ready: Any = SimpleNamespace(encoded=SimpleNamespace(ids=[0] * length), layouts=layouts)
        sizes.add(ready)
    return sizes


def picture(height: int, width: int, views: int = 1) -> Layout:
    return Layout(views=views, size=(height, width))


def film(frames: int) -> Layout:
    return Layout(views=frames, video=True)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([(5, [picture(10, 40)]), (9, [picture(30, 20)]), (70, [picture(20, 90)])], Scenario(9, image=(40, 20))),
        ([(5, [film(4)]), (7, [film(8)]), (9, [film(90)])], Scenario(7, frames=8)),
        # two of three show a film; one of two does not make it typical
        ([(5, [film(4)]), (7, [film(8)]), (9, [picture(30, 20)])], Scenario(7, frames=6)),
        ([(4, [film(4)]), (8, [picture(30, 20)])], Scenario(6, image=(20, 30))),
        ([(5, [picture(9, 9, 5)] * 2), (7, [picture(9, 9)] * 3), (9, [])], Scenario(7, visual_tokens=3 * 16)),
        ([(5, []), (7, []), (9, [picture(9, 9)])], Scenario(7, visual_tokens=0)),
    ],
    ids=["images", "films", "mostly films", "as many images as films", "several images", "mostly none"],
)
def test_the_typical_prompt(prompts: list[tuple[int, list[Layout]]], expected: Scenario) -> None:
    assert sizes_of(*prompts).typical(16) == expected
