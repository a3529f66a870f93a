"""What depends on images alone is computed once, and every question about them is answered as if it had come alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import answering, ask, awaken, collate, image
from PIL import Image
from test_oracles import FUSIONS
from torch import Tensor

import lavi
from lavi.batch import Sample, Video
from lavi.data.tiling import AnyRes
from lavi.fusion.concat import ConcatFusion
from lavi.model import VisionLanguageModel
from lavi.reduction.pooling import AveragePooling

TOKENS = 5
QUESTIONS = ["what colour is the circle?", "which image has the red circle? first or second?", "blue"]
KINDS = ["lavi-attention", "lavi-conv", "concat", "cross-attention", "visor", "visor-routed", "fastv", "pyramid-drop"]
KINDS += ["deepstack", "late-injection", "shortv", "vica"]


def concat_with(build: Any, **parts: Any) -> VisionLanguageModel:
    """Concatenation with further parts of a model."""
    bare = answering(build, ConcatFusion())
    model = VisionLanguageModel(vision=bare.vision, language=bare.language, fusion=ConcatFusion(), **parts).eval()
    awaken(model.fusion)
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(build: Any, request: pytest.FixtureRequest) -> VisionLanguageModel:
    return answering(build, FUSIONS[request.param]())


@pytest.fixture(scope="module")
def plain(build: Any) -> VisionLanguageModel:
    return answering(build, ConcatFusion())


def views_through(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of views whenever the vision backbone runs."""
    seen: list[int] = []
    tower = model.vision.forward

    def counted(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return tower(pixels)

    monkeypatch.setattr(model.vision, "forward", counted)
    return seen


def answers_to_pixels(model: VisionLanguageModel, *seeds: int) -> list[str]:
    """To each question alone, its images read from their pixels in the same call."""
    prompts = [collate(model, [ask(*seeds, question)], prompt=True) for question in QUESTIONS]
    return [model.answer(prompt, max_new_tokens=TOKENS)[0] for prompt in prompts]


def test_many_prompts_on_one_state_are_answered_as_each_alone(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [image(1), image(2)]
    expected = answers_to_pixels(model, 1, 2)
    assert [model.ask(question, *images, max_new_tokens=TOKENS) for question in QUESTIONS] == expected
    assert len(set(expected)) == len(QUESTIONS), "questions that are answered alike show little"
    seen = views_through(model, monkeypatch)
    state = model.see(*images)
    assert seen == [2]
    assert model.ask_all(QUESTIONS, state, max_new_tokens=TOKENS) == expected
    assert [model.ask(question, state=state, max_new_tokens=TOKENS) for question in QUESTIONS] == expected
    assert seen == [2], "the vision backbone has run again"


def test_a_state_without_images_is_the_text_alone(model: VisionLanguageModel) -> None:
    assert model.ask_all(QUESTIONS, model.see(), max_new_tokens=TOKENS) == answers_to_pixels(model)


def test_logits_on_a_state_are_those_on_the_pixels(model: VisionLanguageModel) -> None:
    prompts = [ask(1, 2, question) for question in QUESTIONS]
    messages = [prompt.messages for prompt in prompts]
    with torch.no_grad():
        expected = model(collate(model, prompts, prompt=True, pad_left=True))
        logits = model(model.prompts(messages, model.see(image(1), image(2))))
        others = model(model.prompts(messages, model.see(image(2), image(1))))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits[:, -1], others[:, -1], atol=1e-3), "it does not see"


def test_what_is_known_is_not_computed_again(plain: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a picture that was opened anew; and the state holds them in their new order."""
    film = Video([image(3), image(4)], [0.0, 1.0], 2.0)
    seen = views_through(plain, monkeypatch)
    first = plain.see(image(1), film)
    more = plain.see(image(2), film, image(1), known=first)
    assert seen == [3, 1]
    assert [features.shape[0] for features in more.features] == [1, 2, 1]
    anew = plain.see(image(2), film, image(1))
    assert seen == [3, 1, 4]
    for one, other in zip(more.features, anew.features, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert plain.see(image(2), known=more).features[0] is more.features[0]
    assert seen == [3, 1, 4]


def test_an_image_in_company_is_cut_as_its_tiling_says(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiled where it is alone, one view where it is not: then its views are other pixels, and are computed."""
    tiled = concat_with(build, tiling=AnyRes(max_grid=2))
    seen = views_through(tiled, monkeypatch)
    first = tiled.see(image(1))
    both = tiled.see(image(1), image(2), known=first)
    three = tiled.see(image(1), image(2), image(3), known=both)
    assert seen == [5, 2, 1]
    assert tiled.ask_all(QUESTIONS, three, max_new_tokens=TOKENS) == answers_to_pixels(tiled, 1, 2, 3)


def test_the_same_pixels_in_another_layout_are_other_views(
    plain: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A white image is white in any shape; where the backbone keeps the shape, its features are others."""
    seen = views_through(plain, monkeypatch)
    wide, high = Image.new("RGB", (40, 20), "white"), Image.new("RGB", (20, 40), "white")
    first = plain.see(wide)
    both = plain.see(wide, high, known=first)
    assert seen == [1, 1]
    assert both.features[0] is first.features[0]
    assert torch.equal(*both.pixels)


def test_a_state_holds_what_a_reducer_leaves(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = concat_with(build, reducer=AveragePooling(factor=2))
    runs: list[int] = []
    model.reducer.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[union-attr]
    state = model.see(image(1), image(2))
    assert state.features[0].shape == (1, 4, model.feature_spec.width)
    assert model.ask_all(QUESTIONS, state, max_new_tokens=TOKENS) == answers_to_pixels(model, 1, 2)
    assert len(runs) == 1 + len(QUESTIONS)  # the state's, and one for each prompt that came with pixels


def test_a_conversation_is_about_all_that_its_state_holds(plain: VisionLanguageModel) -> None:
    """Images of earlier and later turns; with a part too few, it is refused."""
    first, second = ask(1, QUESTIONS[0], answer="red"), ask("and", 2, QUESTIONS[1])
    messages = [*first.messages, *second.messages]
    whole = collate(plain, [Sample("s", messages, [image(1), image(2)])], prompt=True)
    state = plain.see(image(1), image(2))
    assert plain.reply(plain.prompts([messages], state)) == plain.answer(whole, max_new_tokens=64)
    with pytest.raises(lavi.UserError, match="has parts for 1 images and comes with 2"):
        plain.prompts([first.messages[:1]], state)


def test_images_and_their_state_are_not_both_given(plain: VisionLanguageModel) -> None:
    with pytest.raises(lavi.UserError, match="not both: give all of them to see"):
        plain.ask("what?", image(1), state=plain.see(image(2)))


def test_the_longest_prompt_of_a_batch_limits_all_answers(plain: VisionLanguageModel) -> None:
    state = plain.see(image(1))
    with pytest.raises(lavi.UserError, match="more than the context of 256"):
        plain.ask_all(["circle " * 400, "what?"], state)
    long = plain.ask_all(["circle " * 215, "what?"], state)
    assert len(long) == 2
    assert plain.ask_all([], state) == []


def test_a_state_moves_no_gradient(plain: VisionLanguageModel) -> None:
    assert not plain.see(image(1)).features[0].requires_grad
