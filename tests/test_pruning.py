"""FastV and PyramidDrop: nothing dropped is concatenation, and what is dropped is what attention ranks last."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import ask, awaken, collate
from families import VARIED
from test_oracles import assert_rows_are
from transformers import AutoModelForCausalLM

from lavi.batch import Layout, Sample
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.pruning import FastV, PruningFusion, PyramidDrop, kept_count
from lavi.language import ranking
from lavi.nn.projectors import MLPProjector

SAMPLES = [
    ask(1, "what colour is the circle?", answer="red", key="a"),
    ask("hello", 2, "which image has the red circle?", 3, answer="first", key="b"),
    ask("is there a blue square?", answer="yes", key="c"),
]


@pytest.mark.parametrize("fusion", [lambda: FastV(keep=1.0), lambda: PyramidDrop(keep=1.0)])
@pytest.mark.parametrize("family", VARIED)
def test_with_nothing_dropped_it_is_concatenation(build, fusion, family: str) -> None:  # type: ignore[no-untyped-def]
    concat, pruned = build(ConcatFusion(), family=family), build(fusion(), family=family)
    awaken(concat.fusion)
    pruned.fusion.load_state_dict(concat.fusion.state_dict())
    batch = collate(concat, SAMPLES)
    with torch.no_grad():
        assert torch.equal(pruned(batch), concat(batch))


@pytest.mark.parametrize("family", VARIED)
def test_a_drop_of_nothing_through_the_ranking_is_concatenation(build, family: str) -> None:
    """The whole machinery with shares that round to all tokens: masks, positions and order are those of concat."""
    concat, pruned = (
        build(ConcatFusion(), family=family),
        build(PruningFusion(stages={0: 0.99, 1: 0.99}), family=family),
    )
    awaken(concat.fusion)
    pruned.fusion.load_state_dict(concat.fusion.state_dict())
    for pad_left in (False, True):
        batch = collate(concat, SAMPLES, pad_left=pad_left)
        with torch.no_grad():
            said, expected = pruned(batch), concat(batch)
        assert_rows_are(said, expected, batch)


@pytest.mark.parametrize("family", VARIED)
def test_what_stays_is_what_the_last_token_attends_to_most(build, family: str) -> None:
    """Against the attention that transformers itself returns, windows and caps of the scores included."""
    window = {"sliding_window": 12} if family in ("mistral", "gemma2", "gemma3_text") else {}
    concat = build(ConcatFusion(), family=family, **window)
    pruned = build(PruningFusion(stages={0: 0.25}), family=family, **window)
    awaken(concat.fusion)
    pruned.fusion.load_state_dict(concat.fusion.state_dict())
    batch = collate(concat, [ask(1, "what colour is the circle?")], prompt=True)
    with torch.no_grad():
        inputs = concat.fusion(batch, concat.features(batch.pixels), concat.language)
        plain = AutoModelForCausalLM.from_config(concat.language.hf.config, attn_implementation="eager").eval()
        plain.load_state_dict(concat.language.hf.state_dict())
        attention = plain(**inputs.sequence(), output_attentions=True).attentions[0]
        scores = attention.mean(1)[0, -1]  # (S,)
        first = batch.image_slots[0].column
        best = (scores[first : first + 16].topk(4).indices + first).sort().values
        out, _ = pruned.prefill(batch, pruned.features(batch.pixels))
    stage = out.past_key_values.kept["stages"][0]
    stays = [column for column in stage.index[0].tolist() if first <= column < first + 16]
    assert stays == best.tolist()


def test_dropped_tokens_are_in_no_later_cache(build) -> None:
    model = build(PyramidDrop(stages=4, keep=0.5))
    awaken(model.fusion)
    batch = collate(model, [ask(1, "what colour is the circle?")], prompt=True)
    with torch.no_grad():
        out, _ = model.prefill(batch, model.features(batch.pixels))
    text = batch.input_ids.shape[1]
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == [text + n for n in (16, 8, 4, 2)]
    assert model.fusion.visual_by_layer(16, 4) == [16, 8, 4, 2]


def test_tokens_leave_behind_the_layers_that_the_papers_say(build) -> None:  # type: ignore[no-untyped-def]
    """FastV behind its K-th layer, PyramidDrop behind each of its parts but the last; of 100 tokens, with 8 layers."""
    for fusion, left in (
        (FastV(), [100] * 2 + [50] * 6),
        (FastV(layer=3, keep=0.1), [100] * 3 + [10] * 5),
        (PyramidDrop(), [100, 100, 50, 50, 25, 25, 12, 12]),
        (PyramidDrop(stages=2, keep=0.25), [100] * 4 + [25] * 4),
        (PyramidDrop(stages=3, keep=0.5), [100] * 3 + [50] * 2 + [25] * 3),
        (PruningFusion(stages={4: 0.5, 0: 0.1, 2: 1.0}), [100] + [10] * 4 + [5] * 3),
    ):
        bound = build(fusion, num_hidden_layers=8).fusion
        assert bound.visual_by_layer(100, 8) == left
        assert not bound.packs
        assert list(bound.stages) == sorted(bound.stages)


def test_ranking_costs_one_query_s_scores_in_its_layers(build) -> None:  # type: ignore[no-untyped-def]
    """Over the text and the visual tokens that are still there; where nothing is seen or a prompt is cached, none."""
    fusion = build(PruningFusion(stages={0: 0.5, 2: 0.5}), family="qwen3", num_attention_heads=2, head_dim=12).fusion
    assert fusion.query_widths == [24] * 4
    assert fusion.costs(10, Layout(), 16)["ranking"].flops == 2 * 24 * ((10 + 16) + (10 + 8))
    assert fusion.costs(10, Layout(), 32)["ranking"].flops == 2 * 24 * ((10 + 32) + (10 + 16))
    for seen, past in ((None, 0), (Layout(), 9)):
        assert fusion.costs(10, seen, 16, past=past)["ranking"].flops == 0
    concat = build(ConcatFusion()).fusion.costs(10, Layout(), 16)
    assert fusion.costs(10, Layout(), 16)["projector"] == concat["projector"]


def test_scores_are_computed_in_ranking_layers_alone(build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(FastV(layer=2, keep=0.5))
    shapes = []
    look = ranking.Ranking.record_scores

    def spied(self, query, key, **kwargs):  # type: ignore[no-untyped-def]
        look(self, query, key, **kwargs)
        shapes.append(self.scores.shape)

    monkeypatch.setattr(ranking.Ranking, "record_scores", spied)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        model(batch)
    assert len(shapes) == 1
    assert len(shapes[0]) == 2  # one query a row: (B, K)
    assert model.language.hf.config._attn_implementation == "sdpa"


def test_the_kernel_comes_back_after_an_error(build) -> None:
    model = build(FastV(layer=1, keep=0.5))
    model.language.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(collate(model, SAMPLES))
    assert model.language.hf.config._attn_implementation == "sdpa"


def test_shares_never_drop_all() -> None:
    assert [kept_count(count, 0.01) for count in (0, 1, 16)] == [0, 1, 1]
    assert [kept_count(count, 0.5) for count in (16, 7, 5)] == [8, 4, 2]  # to the nearest, a half to the even one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastV(keep=0.0), "above 0 and at most 1"),
        (lambda: FastV(keep=1.1), "above 0 and at most 1"),
        (lambda: FastV(layer=4, keep=0.5), "0 to 2"),
        (lambda: FastV(layer=0, keep=0.5), "0 to 2"),
        (lambda: PyramidDrop(keep=0.0), "above 0 and at most 1"),
        (lambda: FastV(layer=9, keep=0.5), "0 to 2"),
        (lambda: PyramidDrop(stages=1), "at least 2 stages"),
    ],
)
def test_what_cannot_be_is_refused(build, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        build(make())


def test_pruning_takes_what_concatenation_takes(build) -> None:  # type: ignore[no-untyped-def]
    for make in (partial(PruningFusion, stages={1: 0.5}), FastV, PyramidDrop):
        projector = MLPProjector()
        fusion = build(make(projector=projector, newline=True, budget=2)).fusion
        assert fusion.projector is projector
        assert (fusion.tile_arrangement.budget, fusion.tile_arrangement.newline) == (2, True)
        assert "projector" in fusion.costs(3, Layout(), 16)


def test_only_rows_of_unequal_length_are_padded(build) -> None:  # type: ignore[no-untyped-def]
    """A kernel is faster without a mask; text and visual tokens count alike."""
    model = build(PruningFusion(stages={0: 0.5}))
    for samples, is_padded in (
        ([ask(1, "what?"), ask(2, "what?")], False),
        ([ask(1, "what?"), ask("what?")], True),
        ([ask(1, "what?"), ask(1, "what colour is the circle?")], True),
    ):
        batch = collate(model, samples, prompt=True)
        with torch.no_grad():
            context: Any = model.fusion(batch, model.features(batch.pixels), model.language).vision
        length = context.length
        columns = context.for_step(0, length)._all_columns()
        assert (columns.valid is not None) == is_padded
        assert columns.index.tolist() == [list(range(length))] * 2


@pytest.mark.parametrize("pad_left", [False, True])
def test_behind_a_stage_the_longest_row_sets_the_width(build, pad_left: bool) -> None:  # type: ignore[no-untyped-def]
    """Of its text and what it keeps of its image, on whichever side the others are padded."""
    model = build(PruningFusion(stages={0: 0.5}))
    samples = [ask(1, "what?"), ask("is there a blue square?")]
    batch = collate(model, samples, prompt=True, pad_left=pad_left)
    with torch.no_grad():
        out, _ = model.prefill(batch, model.features(batch.pixels))
    lengths = [stop - start + kept for (start, stop), kept in zip(batch.spans, (8, 0), strict=True)]
    stage = out.past_key_values.kept["stages"][0]
    assert stage.index.shape == (2, max(lengths))
    assert stage.valid.sum(1).tolist() == lengths
    assert stage.valid[:, -1 if pad_left else 0].all()


def test_a_pyramid_that_keeps_all_has_no_stage(build) -> None:  # type: ignore[no-untyped-def]
    assert build(PyramidDrop(keep=1.0)).fusion.stages == {}
    assert build(PyramidDrop(keep=0.5)).fusion.stages == {0: 0.5, 1: 0.5, 2: 0.5}


def test_images_behind_the_question_that_ranks_are_refused(build) -> None:  # type: ignore[no-untyped-def]
    """The token that ranks sees none of theirs: all would count as equally unimportant."""
    first, second = ask(1, "what colour?", answer="red"), ask(2, "and here?", answer="blue")
    both = Sample("s", first.messages + second.messages, first.images + second.images)
    model = build(FastV(keep=0.5, layer=1))
    with pytest.raises(UserError, match="FastV ranks visual tokens by what the first question attends to"):
        model(collate(model, [both]))
    asked_again = Sample("s", first.messages + ask("and now?", answer="blue").messages, first.images)
    assert model(collate(model, [asked_again])).isfinite().all()
    whole = build(FastV(keep=1.0, layer=1))  # where nothing is ranked, nothing is refused
    assert whole(collate(whole, [both])).isfinite().all()
