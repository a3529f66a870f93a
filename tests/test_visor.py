"""VISOR's own oracles: what it equals at its two ends, the ways that rows go, and what is trained."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ask, assert_same, awaken, collate, summed_loss
from families import VARIED
from test_oracles import bare_logits, row

from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.visor.context import VisorContext
from lavi.visor.fusion import VisorFusion
from lavi.visor.offline import answer_probability
from lavi.visor.readers import AttentionReader, ModulationReader, Reader

SAMPLES = [
    ask(1, "what colour is the circle?", answer="red", key="a"),
    ask("hello", 2, "which image has the red circle?", 3, answer="first", key="b"),
    ask("is there a blue square?", answer="yes", key="c"),
]
PROMPTS = [ask(seed, f"what is {'very ' * seed}red?") for seed in range(1, 7)]
WAYS = [[], [1], [3], [1, 3]]


def routed(**changes: object) -> VisorFusion:
    settings = {"cross_attention": [0, 2], "self_attention": [1, 3], "configurations": WAYS, "router": "token"}
    return VisorFusion(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", VARIED)
@pytest.mark.parametrize("pad_left", [False, True])
def test_with_self_attention_everywhere_it_is_concatenation(build, family: str, pad_left: bool) -> None:
    concat = build(ConcatFusion(), family=family)
    visor = build(VisorFusion(cross_attention=0, self_attention=4), family=family)
    awaken(concat.fusion)
    visor.fusion.load_state_dict(concat.fusion.state_dict())
    batch = collate(concat, SAMPLES, pad_left=pad_left)
    with torch.no_grad():
        expected, said = concat(batch), visor(batch)
    for index in range(len(SAMPLES)):
        assert_same(visor, row(said, batch, index), row(expected, batch, index))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reader", [AttentionReader, ModulationReader])
@pytest.mark.parametrize("family", VARIED)
def test_without_self_attention_it_starts_as_the_language_model(
    build, family: str, reader: type[Reader], dtype: str
) -> None:
    model = build(VisorFusion(cross_attention=2, self_attention=0, reader=reader()), family=family, dtype=dtype)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        assert torch.equal(model(batch), bare_logits(model, batch))


def test_optional_layers_switched_off_leave_the_language_model(build) -> None:
    """Where the image comes first, up to rounding: all positions are later by as many tokens."""
    model = build(VisorFusion(cross_attention=2, self_attention=2, configuration="none"))
    batch = collate(model, [ask(1, "what colour is the circle?", answer="red")])
    batch.image_slots = [batch.image_slots[0]._replace(column=0)]
    with torch.no_grad():
        torch.testing.assert_close(model(batch), bare_logits(model, batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("router", ["token", "pooled"])
def test_rows_that_go_different_ways_answer_as_they_do_alone(build, router: str) -> None:
    model = build(routed(router=router))
    awaken(model.fusion)
    batch = collate(model, PROMPTS, prompt=True, pad_left=True)
    with torch.no_grad():
        for seed in range(50):  # a router that is sure of one way tests nothing
            awaken(model.fusion.router, seed)
            model.fusion.route_counts.clear()
            together = model(batch)
            if len(model.fusion.route_counts) > 1:
                break
        ways = Counter(model.fusion.route_counts)
        model.fusion.route_counts.clear()
        for index, prompt in enumerate(PROMPTS):
            alone = model(collate(model, [prompt], prompt=True))[0]
            torch.testing.assert_close(row(together, batch, index), alone, atol=2e-5, rtol=1e-4)
    assert len(ways) > 1, "all rows went one way"
    assert model.fusion.route_counts == ways
    answers = model.generate(batch, max_new_tokens=6, eos_token_id=None)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        alone = collate(model, [prompt], prompt=True)
        assert model.generate(alone, max_new_tokens=6, eos_token_id=None) == [answer]


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3_text", "gpt2"])
def test_a_routed_row_is_the_fixed_configuration(build, family: str) -> None:
    model = build(routed(), family=family)
    awaken(model.fusion)
    batch = collate(model, PROMPTS, prompt=True)
    with torch.no_grad():
        for configuration in model.fusion.viable:
            fixed = build(
                VisorFusion(cross_attention=[0, 2], self_attention=[1, 3], configuration=list(configuration)),
                family=family,
            )
            state = {k: v for k, v in model.fusion.state_dict().items() if not k.startswith("router")}
            fixed.fusion.load_state_dict(state)
            expected = fixed(batch)
            with model.fusion.force_route(configuration):
                assert torch.equal(model(batch), expected)
            model.fusion.router.network[3].weight.zero_()
            model.fusion.router.network[3].bias.copy_(torch.eye(4)[model.fusion.viable.index(configuration)])
            assert torch.equal(model(batch), expected)
            model.fusion.router.network[3].weight.normal_()


def test_rows_go_different_ways_in_bf16(build) -> None:
    model = build(routed(), dtype="bfloat16")
    batch = collate(model, PROMPTS, prompt=True)
    with torch.no_grad():
        for seed in range(50):
            awaken(model.fusion.router, seed)
            model.fusion.route_counts.clear()
            logits = model(batch)
            if len(model.fusion.route_counts) > 1:
                break
    assert len(model.fusion.route_counts) > 1
    assert logits.isfinite().all()


def test_the_router_stands_where_the_ways_part(build) -> None:
    model = build(routed(configurations=[[1], [1, 3]]))
    assert model.fusion.router.before_layer == 3
    awaken(model.fusion)
    batch = collate(model, PROMPTS, prompt=True)
    fixed = build(VisorFusion(cross_attention=[0, 2], self_attention=[1, 3], configuration=[1]))
    fixed.fusion.load_state_dict({k: v for k, v in model.fusion.state_dict().items() if not k.startswith("router")})
    with torch.no_grad(), model.fusion.force_route((1,)):
        assert torch.equal(model(batch), fixed(batch))


def test_more_images_than_embeddings_stay_apart(build) -> None:
    """Text between two images must not see the second, whatever number it shares with the first."""
    model = build(VisorFusion(cross_attention=[0], self_attention=[1], max_images=1))
    awaken(model.fusion)
    one, other = (collate(model, [ask(1, "which image has the red circle?", seed, answer="first")]) for seed in (2, 3))
    column = one.image_slots[1].column
    with torch.no_grad():
        torch.testing.assert_close(model(one)[:, :column], model(other)[:, :column], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("refining", [0, 2])
@pytest.mark.parametrize("pad_left", [False, True])
def test_a_token_reads_the_images_before_it(build, refining: int, pad_left: bool) -> None:
    """Counted in columns of the text, with V in the sequence or beside it; also what is said behind the prompt."""
    model = build(VisorFusion(cross_attention=1, self_attention=refining))
    batch = collate(model, SAMPLES, pad_left=pad_left)
    rows, text = batch.input_ids.shape
    with torch.no_grad():
        context = model.fusion(batch, model.features(batch.pixels), model.language).vision
    length = text if context.length is None else context.length
    assert (context.length is None) == (not refining)
    stands = [[slot.column for slot in batch.image_slots if slot.row == r for _ in range(16)] for r in range(rows)]
    for past, now, columns in (
        (0, length, range(text)),
        (0, length + 2, range(text + 2)),
        (length + 3, 2, range(text + 3, text + 5)),
    ):
        mask = context.for_step(past, now).seen.mask
        for mine, own in zip(mask, stands, strict=True):
            assert mine[:, : len(own)].tolist() == [[before <= column for before in own] for column in columns]
            assert not mine[:, len(own) :].any()


def test_caches_hold_what_each_layer_worked_on(build) -> None:
    model = build(VisorFusion(cross_attention=[0], self_attention=[1, 2], configuration=[2]))
    awaken(model.fusion)
    batch = collate(model, [ask(1, "what colour is the circle?")], prompt=True)
    with torch.no_grad():
        out, _ = model.prefill(batch, model.features(batch.pixels))
    text = batch.input_ids.shape[1]
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert lengths == [text, text, text + 16, text]
    assert out.past_key_values.get_seq_length() == text + 16
    assert [tuple(part.shape) for part in out.past_key_values.cached_tensors()] == [(1, 4, 16, 8)] * 2


def test_each_training_step_draws_a_viable_configuration(build) -> None:
    model = build(VisorFusion(cross_attention=[0], self_attention=[1, 2], configurations=[[], [2], [1, 2]]))
    batch = collate(model, SAMPLES)
    features = model.features(batch.pixels)
    model.train()
    drawn = Counter(model.fusion(batch, features, model.language).vision.configuration for _ in range(60))
    assert set(drawn) == {(), (2,), (1, 2)}
    assert min(drawn.values()) > 5
    model.eval()
    assert model.fusion(batch, features, model.language).vision.configuration == (1, 2)


def test_the_router_learns_its_labels(build, tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    wanted = {"a": [], "b": [1, 3], "c": [3]}
    file.write_text("".join(json.dumps({"key": k, "configuration": way}) + "\n" for k, way in wanted.items()))
    model = build(routed(labels=str(file)))
    batch = collate(model, SAMPLES)
    optimizer = torch.optim.Adam(model.fusion.router.parameters(), lr=0.02)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        added: dict[str, torch.Tensor] = {}
        model(batch, added)
        added["router"].backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for sample, way in zip(SAMPLES, wanted.values(), strict=True):
            model.fusion.route_counts.clear()
            model(collate(model, [sample]))
            assert list(model.fusion.route_counts) == [tuple(way)]


def test_while_a_router_learns_the_cheapest_way_serves(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps({"key": key, "configuration": [1, 3]}) + "\n" for key in "abc"))
    refined: list[int] = []
    monkeypatch.setattr(
        VisorContext, "_refine", lambda self, arranged, layer, call, text, *_: refined.append(layer) or text
    )
    model = build(routed(labels=str(file)))
    with torch.no_grad():
        model.train()(collate(model, SAMPLES), {})
        assert refined == []
        with model.fusion.force_route((1, 3)):
            model(collate(model, SAMPLES), {})
    assert refined == [1, 3]


def test_likely_is_the_probability_of_the_whole_answer(build) -> None:  # type: ignore[no-untyped-def]
    """Each of the right tokens, the end token among them: what the loss of the sample alone says."""
    model = build(VisorFusion(cross_attention=2, self_attention=1))
    awaken(model.fusion)
    result = dict(answer_probability(model, [collate(model, SAMPLES)], torch.device("cpu")))
    for sample in SAMPLES:
        alone = collate(model, [sample])
        with torch.no_grad():
            loss, _ = summed_loss(model(alone), alone.labels)
        assert result[sample.key] == pytest.approx([math.exp(-loss)], rel=1e-4)


def test_layers_are_spread_evenly_and_apart(build) -> None:
    fusion = build(VisorFusion(cross_attention=8, self_attention=8), num_hidden_layers=24).fusion
    assert fusion.reading == [2, 5, 8, 11, 14, 17, 20, 23]
    assert len(fusion.refining) == 8
    assert not set(fusion.reading) & set(fusion.refining)
    assert min(fusion.refining) > 2  # so that a router before them has read the image


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cross_attention": [1], "self_attention": [1]}, "cannot both read"),
        ({"cross_attention": 3, "self_attention": 3}, "the language model has 4"),
        ({"cross_attention": [9], "self_attention": 1}, "0 to 3"),
        ({"cross_attention": 1, "self_attention": [2], "configuration": [1]}, r"only \[2\] may refine"),
        ({"cross_attention": 1, "self_attention": [2], "configurations": "nowhere.json"}, "lavi.visor search"),
        ({"cross_attention": 1, "self_attention": [2], "router": "token"}, "chooses from 'configurations'"),
        ({"cross_attention": 1, "self_attention": [2], "labels": "x"}, "are for its router"),
        ({"cross_attention": 1, "self_attention": 0, "configurations": [[]], "router": "token"}, "nothing to choose"),
        (
            {"cross_attention": [3], "self_attention": [1], "configurations": [[], [1]], "router": "token"},
            "no layer has shown it the image",
        ),
    ],
)
def test_what_cannot_be_is_refused(build, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(VisorFusion(**settings))  # type: ignore[arg-type]


def test_samples_without_labels_are_refused(build, tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps({"key": "other", "configuration": []}) + "\n")
    model = build(routed(labels=str(file))).train()
    for _ in range(19):  # a batch without one may come; none at all is a mistake
        added: dict[str, torch.Tensor] = {}
        model(collate(model, SAMPLES), added)
        assert added["router"] == 0
    with pytest.raises(UserError, match="a label for none"):
        model(collate(model, SAMPLES), {})
    file.write_text(json.dumps({"key": "a", "configuration": [2]}) + "\n")
    with pytest.raises(UserError, match="not viable"):
        build(routed(labels=str(file))).train()(collate(model, SAMPLES), {})
