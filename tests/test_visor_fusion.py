"""VISOR's choices: its layers, where the router stands and what it learns from, what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ask, collate
from torch import nn

from lavi.batch import Layout
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.visor.fusion import VisorFusion
from lavi.visor.layers import choose_layers, where_routes_part
from lavi.visor.readers import ModulationReader
from lavi.visor.router import PATIENCE, Router, RouterLabels

VIABLE = [(), (1,), (1, 3)]


# --- layers -----------------------------------------------------------------------------------------------------------


def test_layers_that_refine_stand_behind_the_first_that_reads_where_they_can() -> None:
    assert choose_layers(2, 1, 4) == ([1, 3], [2])
    assert choose_layers(2, 2, 4) == ([1, 3], [0, 2])
    assert choose_layers([3, 0, 3], [2], 4) == ([0, 3], [2])
    assert choose_layers(0, 2, 4) == ([], [1, 3])
    assert choose_layers(4, 0, 4) == ([0, 1, 2, 3], [])
    assert choose_layers(2, [1], 4) == ([2, 3], [1])
    for reading, refining in ((-1, 1), (1, -1)):
        with pytest.raises(UserError, match="the language model has 4"):
            choose_layers(reading, refining, 4)
    for name, reading, refining in (("self_attention", 1, [4]), ("cross_attention", [4], 1)):
        with pytest.raises(UserError, match=rf"VISOR's {name} names layers \[4\]: the language model has 0 to 3"):
            choose_layers(reading, refining, 4)


def test_the_router_stands_before_the_first_layer_that_differs() -> None:
    assert where_routes_part(VIABLE, [0], [1, 3], reads="token") == 1
    assert where_routes_part([(1,), (1, 3)], [2], [1, 3], reads="token") == 3
    assert (
        where_routes_part([(1,), (1, 3)], [], [1, 3], reads="token") == 3
    )  # a layer that refines shows the image, too
    assert where_routes_part(VIABLE, [2], [1, 3], reads="pooled") == 1
    with pytest.raises(UserError, match="before layer 1, and no layer has shown it the image"):
        where_routes_part(VIABLE, [2], [1, 3], reads="token")
    with pytest.raises(UserError, match="no layer has shown it the image"):  # the layer itself runs behind the router
        where_routes_part([(1,), (3,)], [], [1, 3], reads="token")


# --- the router -------------------------------------------------------------------------------------------------------


def test_a_router_is_a_small_network_with_a_logit_for_each_configuration() -> None:
    router = Router(6, VIABLE, before_layer=1, reads="token")
    norm, first, _, last = router.network
    state = torch.randn(2, 6)
    expected = last(nn.functional.gelu(first(nn.functional.layer_norm(state, (6,), norm.weight, norm.bias))))
    torch.testing.assert_close(router(state), expected)
    assert router(state.bfloat16()).shape == (2, 3)
    assert router.flops() == 2 * (6 * 128 + 128 * 3)


def labels(tmp_path: Path, **wanted: list[int]) -> RouterLabels:
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps({"key": k, "configuration": way}) + "\n" for k, way in wanted.items()))
    return RouterLabels(file, VIABLE)


def test_the_router_s_loss_is_of_the_samples_that_have_a_label(tmp_path: Path) -> None:
    logits = torch.randn(3, 3, requires_grad=True)
    loss = labels(tmp_path, a=[1], c=[]).loss(["a", "b", "c"], [9, 9, 9], logits)
    shares = logits.log_softmax(-1)
    torch.testing.assert_close(loss, -(shares[0, 1] + shares[2, 0]) / 2)
    assert labels(tmp_path, a=[1]).loss(["a"], [9], logits[:1].bfloat16()).dtype == torch.float32
    assert labels(tmp_path, a=[]).loss(["a"], [9], logits[:1]) > 0  # the cheapest one, too


def test_batches_without_a_label_count_nothing_until_there_are_too_many(tmp_path: Path) -> None:
    router_labels = labels(tmp_path, a=[1])
    for _ in range(PATIENCE - 1):
        logits = torch.zeros(1, 3, requires_grad=True)
        loss = router_labels.loss(["b"], [9], logits)
        loss.backward()
        assert loss == 0
        assert (logits.grad == 0).all()  # type: ignore[union-attr]
    router_labels.loss(["a"], [9], torch.zeros(1, 3))  # they are counted in a row
    for _ in range(PATIENCE - 1):
        router_labels.loss(["b"], [9], torch.zeros(1, 3))
    with pytest.raises(
        UserError, match=f"none of the samples b, c, d, e ..., nor of the {PATIENCE - 1} batches before"
    ):
        router_labels.loss(["b", "c", "d", "e", "f"], [9, 9, 9, 9, 9], torch.randn(5, 3))


def test_an_empty_file_of_labels_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no label"):
        labels(tmp_path).loss(["a"], [9], torch.randn(1, 3))


# --- what the fusion says of itself -----------------------------------------------------------------------------------


def bound(build: Any, **settings: Any) -> VisorFusion:
    fusion: VisorFusion = build(VisorFusion(**{"cross_attention": [0, 3], "self_attention": [1, 2]} | settings)).fusion
    return fusion


def test_costs_add_up_layer_by_layer_and_only_reading_is_left_while_decoding(build) -> None:  # type: ignore[no-untyped-def]
    fusion = bound(build, configurations=[[], [1], [1, 2]], router="token", newline=True)
    layout, per_view, visual = Layout(), 16, 17  # with the newline
    costs = fusion.costs(10, layout, per_view)
    reader = fusion.readers["0"]
    assert costs["cross_attention"].flops == 2 * reader.costs(10, visual, past=0)["cross_attention"].flops
    assert costs["projector"].flops == fusion.projector.flops(16)
    assert costs["router"].flops == fusion.router.flops() > 0  # type: ignore[union-attr]
    # V is read as it came in layer 0, and refined by layer 2 in layer 3
    assert costs["position"].flops == 2 * fusion.positions.flops(visual)  # type: ignore[union-attr]
    with fusion.force_route(()):
        assert fusion.costs(10, layout, per_view)["position"].flops == fusion.positions.flops(visual)  # type: ignore[union-attr]
    behind = fusion.costs(1, layout, per_view, past=9)
    assert set(behind) == {"projector", "cross_attention", "router"}
    assert behind["projector"].flops == behind["router"].flops == 0
    assert behind["cross_attention"].flops == 2 * reader.costs(1, visual, past=9)["cross_attention"].flops
    blind = fusion.costs(10, None, per_view)
    assert blind["projector"].flops == 0
    assert blind["cross_attention"].flops == 2 * reader.costs(10, 0, past=0)["cross_attention"].flops


def test_what_no_counter_sees_adds_up_too(build) -> None:  # type: ignore[no-untyped-def]
    costs = bound(build, reader=ModulationReader()).costs(10, Layout(), 16)
    assert costs["modulation"].uncounted == costs["modulation"].flops == 2 * 6 * 2 * 10 * 32  # two layers of two norms
    assert costs["generator"].uncounted == 0


def test_a_kernel_without_masks_is_refused_by_name(build) -> None:  # type: ignore[no-untyped-def]
    model = build(ConcatFusion())
    model.language.attention = "flex_attention"
    with pytest.raises(UserError, match=r"^VISOR works with the attention kernels .*, not 'flex_attention'"):
        VisorFusion(cross_attention=1, self_attention=1).bind(model.language, model.feature_spec)


def test_it_says_which_layers_work_on_how_many_visual_tokens(build) -> None:  # type: ignore[no-untyped-def]
    fusion = bound(build, configuration=[2])
    assert fusion.visual_by_layer(16, 4) == [0, 0, 16, 0]
    assert fusion.default_route == (2,)
    assert fusion.tokens_in_language(Layout(), 16) == 16
    assert bound(build, self_attention=0).tokens_in_language(Layout(), 16) == 0


def test_a_forced_route_holds_while_it_is_forced(build) -> None:  # type: ignore[no-untyped-def]
    fusion = bound(build)
    assert fusion.default_route == (1, 2)
    with fusion.force_route([2, 1]), fusion.force_route((2,)):
        assert (fusion.default_route, fusion.forced_route) == ((2,), (2,))
    assert (fusion.default_route, fusion.forced_route) == ((1, 2), None)
    with pytest.raises(UserError, match=r"names layers \[3\]: only \[1, 2\] may refine"), fusion.force_route((3,)):
        pass


def test_configurations_of_a_file_are_kept_with_the_run(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "viable.json"
    file.write_text('{"viable": [[2, 1], [], [2], [2]]}')
    fusion = bound(build, configurations=str(file))
    assert fusion.viable == [(), (2,), (1, 2)]
    assert fusion.resolved_arguments() == {"configurations": [[], [2], [1, 2]]}
    assert bound(build, configurations=[[1]]).resolved_arguments() == {}
    assert bound(build).viable == []
    assert bound(build, configuration="none").configuration == ()


def test_by_default_all_layers_refine_and_eight_images_are_told_apart(build) -> None:  # type: ignore[no-untyped-def]
    fusion = bound(build)
    assert fusion.configuration == (1, 2)
    assert fusion.positions.images.num_embeddings == 8  # type: ignore[union-attr]
    assert fusion.router is None
    assert bound(build, cross_attention=0).positions is None
    assert ConcatFusion.packs
    assert not VisorFusion.packs


def test_conversations_of_several_questions_train_no_router(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The first question alone would be seen when the route is chosen; without labels nothing is learned from them."""
    file = tmp_path / "labels.jsonl"
    file.write_text('{"key": "s", "configuration": []}\n')
    routed = {"configurations": [[], [1]], "router": "token"}
    for labels_file, is_training, is_refused in (
        (str(file), True, True),
        (str(file), False, False),
        (None, True, False),
    ):
        settings: dict[str, Any] = {"cross_attention": [0], "self_attention": [1], **routed, "labels": labels_file}
        model = build(VisorFusion(**settings)).train(is_training)
        batch = collate(model, [ask(1, "what?", answer="red")])
        batch.answers = [*batch.answers, batch.answers[0]]
        if is_refused:
            with pytest.raises(UserError, match="learns from conversations of one question each"):
                model(batch, {})
        else:
            model(batch, {})
