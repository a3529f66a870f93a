"""What the callbacks show."""

from __future__ import annotations

from conftest import ask, image

from callbacks.samples import draw
from lavi.batch import Sample


def test_every_sample_is_drawn_with_its_question_truth_and_answer() -> None:
    video = Sample("v", ask("what moves?", answer="the circle").messages, [[image(3), image(4)]])
    samples = [
        ask(1, "what colour is the circle?", answer="red"),
        ask(1, 2, "which image has the red circle?", answer="first"),
        ask("is there a circle?", answer="yes"),
        video,
        ask(5, "how many?", answer="two"),
    ]
    figure = draw(samples, ["red", "second", "yes", "the circle", "one"])
    drawn = [axes for axes in figure.axes if axes.images]  # type: ignore[attr-defined]
    assert [axes.get_title().splitlines()[1] for axes in drawn] == [
        "truth: red   answer: red",
        "truth: first   answer: second",
        "truth: yes   answer: yes",
        "truth: the circle   answer: the circle",
        "truth: two   answer: one",
    ]
    assert ["what colour" in axes.get_title() for axes in drawn] == [True, False, False, False, False]
    widths = [axes.images[0].get_array().shape[1] for axes in drawn]
    assert widths[:2] == [40, 84]  # two images side by side
