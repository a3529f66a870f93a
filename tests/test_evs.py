"""EVS: of a video the first frame, then what changed most; of an image everything."""

from __future__ import annotations

import pickle

import pytest
import torch
from conftest import ask, awaken, collate, image
from test_oracles import SAMPLES, row
from test_visual_layers import pair

from lavi.batch import Layout, Sample, Video
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.evs import EVS, FrameArrangement, most_changed
from lavi.fusion.tile_arrangement import TileArrangement


def clip(name: str, *seeds: int) -> Sample:
    """A question about a video of these frames."""
    return Sample(
        name,
        [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what moves?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ],
        [Video([image(seed) for seed in seeds])],
    )


NATIVE = Layout(views=5, video=True, grid=(4, 5))
"""Frames with a grid of their own, their features padded."""
CLIPS = [clip("a", 1, 1, 2, 2), clip("b", 3, 4), ask(5, "what?", answer="red", key="c")]


def test_everything_kept_is_concatenation_bit_for_bit(build) -> None:  # type: ignore[no-untyped-def]
    model, concat = pair(build, EVS(keep=1.0))
    batch = collate(model, CLIPS)
    with torch.no_grad():
        assert torch.equal(model(batch), concat(batch))


def test_images_are_left_as_they_are(build) -> None:  # type: ignore[no-untyped-def]
    model, concat = pair(build, EVS(keep=0.1))
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        assert torch.equal(model(batch), concat(batch))


def test_the_first_frame_stays_and_then_what_changed_most() -> None:
    """Against the definition, place by place."""
    frames = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    frames[2] = frames[1]  # nothing moved
    frames[3, :2] = 3 * frames[2, :2]  # brighter, not otherwise
    change = {
        (frame, place): 1 - float(torch.cosine_similarity(frames[frame, place], frames[frame - 1, place], dim=0))
        for frame in (1, 2, 3)
        for place in range(6)
    }
    for count in (6, 9, 14, 24):
        likely = sorted(change, key=lambda at: -change[at])[: count - 6]
        expected = [*range(6), *sorted(6 * frame + place for frame, place in likely)]
        if count < 17:  # from there on ties decide
            assert most_changed(frames, count).tolist() == expected
    assert most_changed(frames, 24).tolist() == list(range(24))
    still = torch.ones(3, 4, 8)
    assert most_changed(still, 6).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("layout", [Layout(), Layout(views=1, video=True), Layout(views=5, video=True), NATIVE])
def test_it_counts_what_it_gives(layout: Layout, keep: float, newline: bool) -> None:
    arrangement = FrameArrangement(TileArrangement((6, 4), newline=newline), keep)
    features = torch.randn(layout.views, 24, 8)
    embedding = torch.full((8,), 7.0) if newline else None
    tokens = arrangement.arrange(features, layout, embedding)
    assert len(tokens) == pickle.loads(pickle.dumps(arrangement))(layout, 24)
    if newline:
        assert tokens[-1].tolist() == [7.0] * 8
    if layout.views == 5:
        assert len(tokens) - newline == max(6, round(keep * 30))  # pooled, 6 x 4 and 4 x 5 alike
        assert torch.equal(tokens[:6], arrangement.tiles.arrange(features, layout, embedding)[:6])
    assert len(arrangement.arrange(features[:, :0], layout, embedding)) == 0 == arrangement(layout, 0)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3_text"])
def test_a_batch_answers_as_its_rows_alone(build, family: str) -> None:  # type: ignore[no-untyped-def]
    model = build(EVS(keep=0.5), family=family)
    awaken(model.fusion)
    for pad_left in (False, True):
        batch = collate(model, CLIPS, pad_left=pad_left)
        with torch.no_grad():
            together = model(batch)
            for index, sample in enumerate(CLIPS):
                alone = collate(model, [sample])
                said = row(together, batch, index)
                torch.testing.assert_close(said, row(model(alone), alone, 0), atol=1e-5, rtol=1e-4)


def test_answers_are_those_of_each_prompt_alone(build) -> None:  # type: ignore[no-untyped-def]
    model = build(EVS(keep=0.4), initializer_range=0.3, tie_word_embeddings=False)
    awaken(model.fusion)

    def answers(*samples: Sample) -> list[list[int]]:
        batch = collate(model, [*samples], prompt=True, pad_left=True)
        said: list[list[int]] = model.generate(batch, max_new_tokens=4, eos_token_id=None)
        return said

    questions = [Sample(clip.key, clip.messages[:1], clip.images) for clip in CLIPS]
    assert answers(*questions) == [answer for one in questions for answer in answers(one)]


def test_gradients_reach_the_projector_through_what_stays(build) -> None:  # type: ignore[no-untyped-def]
    model = build(EVS(keep=0.5))
    model(collate(model, CLIPS[:1])).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.fusion.projector.parameters())


def test_a_scenario_has_the_tokens_that_stay(build) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        model, concat = build(EVS(keep=0.25)), build(ConcatFusion())
    shape = Scenario(text=10, frames=8)
    inside, all_of_them = (shape.shape_for(one).visual_tokens_in_language(one) for one in (model, concat))
    assert (inside, all_of_them) == (8, 32)


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_a_share_out_of_range_is_refused(keep: float) -> None:
    with pytest.raises(UserError, match="EVS keeps a share above 0 and at most 1"):
        EVS(keep=keep)
