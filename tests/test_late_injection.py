"""Late injection: concatenation in the layers that visual tokens are in, the text alone in all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import collate
from families import VARIED
from test_oracles import SAMPLES, assert_rows_are
from test_visual_layers import Modes, Reference, pair
from torch import Tensor

from lavi.batch import Layout
from lavi.errors import UserError
from lavi.fusion.late_injection import LateInjection
from lavi.fusion.pruning import Columns, PruningFusion
from lavi.fusion.visual_layers import Mode
from lavi.language.subsequence import AttentionKind
from lavi.language.surgery import open_decoder
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe

LATE = ["qwen2", "gpt2", "gemma3_text"]


@pytest.mark.parametrize("family", VARIED)
def test_from_the_first_layer_on_it_is_concatenation_bit_for_bit(build, family: str) -> None:  # type: ignore[no-untyped-def]
    model, concat = pair(build, LateInjection(first=0), family=family)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        assert torch.equal(model(batch), concat(batch))


@pytest.mark.parametrize("family", VARIED)
def test_from_the_first_layer_on_its_pyramid_is_pruning_bit_for_bit(build, family: str) -> None:  # type: ignore[no-untyped-def]
    stages = {0: 0.5, 2: 0.3}
    late, concat = pair(build, LateInjection(first=0, stages=stages), family=family)
    pruned = build(PruningFusion(stages=stages), family=family)
    pruned.fusion.load_state_dict(concat.fusion.state_dict())
    batch = collate(late, SAMPLES)
    with torch.no_grad():
        assert torch.equal(late(batch), pruned(batch))


@pytest.mark.parametrize(
    ("fusion", "modes"),
    [
        (lambda: LateInjection(first=2), ["text", "text", "whole", "whole"]),
        (lambda: LateInjection(first=3), ["text", "text", "text", "whole"]),
        (lambda: LateInjection(first=0, last=1), ["whole", "whole", "text", "text"]),
        (lambda: LateInjection(first=1, last=2), ["text", "whole", "whole", "text"]),
    ],
)
@pytest.mark.parametrize("family", LATE)
def test_without_a_pyramid_each_layer_works_on_all_or_on_the_text(  # type: ignore[no-untyped-def]
    build, fusion: Callable[[], LateInjection], modes: list[Mode], family: str
) -> None:
    late, concat = pair(build, fusion(), family=family)
    by_modes = build(Modes(*modes), family=family)
    by_modes.fusion.load_state_dict(concat.fusion.state_dict())
    for pad_left in (False, True):
        batch = collate(late, SAMPLES, pad_left=pad_left)
        with torch.no_grad():
            said, expected = late(batch), by_modes(batch)
        assert_rows_are(said, expected, batch)


@dataclass(kw_only=True)
class Present(Reference):
    """Concatenation, S tokens in every layer, of which each sees those that are present in it."""

    present: list[Tensor]
    """(B, S) of each layer."""

    def mask(self, layer: int, hidden: Tensor) -> Tensor:
        valid, self.valid = self.valid, self.present[layer]
        try:
            return super().mask(layer, hidden)
        finally:
            self.valid = valid


def present_in(columns: Columns | None, valid: Tensor) -> Tensor:
    """(B, S): those that a layer works on."""
    if columns is None:
        return valid
    own = torch.ones_like(columns.index, dtype=torch.bool) if columns.valid is None else columns.valid
    index = columns.index.clamp(max=valid.shape[1])
    padded = torch.zeros(len(valid), valid.shape[1] + 1, dtype=torch.bool).scatter(1, index, own)
    return padded[:, :-1]


@pytest.mark.parametrize("family", LATE)
def test_with_a_pyramid_each_layer_works_on_what_is_left(build, family: str) -> None:  # type: ignore[no-untyped-def]
    """Against concatenation in which what is not there is hidden; V as it waits before ``first``."""
    fusion = LateInjection(first=1, last=3, stages={1: 0.5, 2: 0.25})
    late, concat = pair(build, fusion, family=family, num_hidden_layers=5)
    batch = collate(late, SAMPLES, prompt=True, pad_left=True)
    with torch.no_grad():
        out, _ = late.prefill(batch, late.features_of(batch))
        stages = out.past_key_values.kept["stages"]
        assert sorted(stages) == [-1, 0, 1, 2, 3]
        assert stages[0] is None
        inputs = concat.fusion(batch, concat.features_of(batch), concat.language)
        valid = inputs.attention_mask
        present = [present_in(stages[layer - 1], valid) for layer in range(5)]
        assert [int(now.sum()) for now in present] == [
            sum(len_of(batch, number) + kept for number, kept in enumerate(counts))
            for counts in ([0] * 3, [16, 32, 0], [8, 16, 0], [2, 4, 0], [0] * 3)
        ]
        modes: list[Mode] = ["text", "whole", "whole", "whole", "text"]
        expected = reference(concat, batch, modes, present)
    torch.testing.assert_close(out.logits[:, -1], expected[:, -1], atol=1e-5, rtol=1e-4)


def len_of(batch: Any, number: int) -> int:
    """Text tokens of a row."""
    start, stop = batch.spans[number]
    return int(stop - start)


def reference(concat: VisionLanguageModel, batch: Any, modes: list[Mode], present: list[Tensor]) -> Tensor:
    """Logits (B, S, vocabulary)."""
    language = concat.language
    open_decoder(language.hf, range(len(modes)))
    inputs = concat.fusion(batch, concat.features_of(batch), language)
    context = Present(
        text_columns=None,
        modes=tuple(modes),
        visual=inputs.attention_mask & ~present[0],
        valid=inputs.attention_mask,
        attention=AttentionKind.of(language.attention, language.hf.config),
        present=present,
    )
    logits: Tensor = language(replace(inputs, vision=context))
    return logits


def test_the_authors_schedule_leaves_64_tokens_a_layer(build) -> None:  # type: ignore[no-untyped-def]
    """HiDrop's code, ``7b_Tok64``: entry 9, exit 25, 215, 10, 5 and 1 of 576 kept behind layers 10, 14, 16 and 18."""
    stages = {10: 215 / 576, 14: 10 / 215, 16: 5 / 10, 18: 1 / 5}
    with torch.device("meta"):
        fusion = build(LateInjection(first=9, last=24, stages=stages), num_hidden_layers=32).fusion
    counts = fusion.visual_by_layer(576, 32)
    assert counts == [0] * 9 + [576] * 2 + [215] * 4 + [10] * 2 + [5] * 2 + [1] * 6 + [0] * 7
    assert sum(counts) == 64 * 32
    assert fusion.cached_by_layer(576, 32) == counts


def test_the_recipe_has_the_authors_schedule_at_the_same_depths_of_24(build) -> None:  # type: ignore[no-untyped-def]
    file = Path(__file__).parent.parent / "recipes" / "baselines" / "hidrop_0_5b.yaml"
    fusion: Any = Recipe.load(file).build("model.fusion")
    with torch.device("meta"):
        counts = build(fusion, num_hidden_layers=24).fusion.visual_by_layer(576, 24)
    first, *stages, last = (round(layer * 24 / 32) for layer in (9, 10, 14, 16, 18, 24))
    assert [layer for layer, count in enumerate(counts) if count] == list(range(first, last + 1))
    assert list(fusion.stages) == stages
    assert [counts[layer + 1] for layer in stages] == [215, 10, 5, 1]


def test_where_all_tokens_leave_nothing_is_ranked(build, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def ranking(fusion: LateInjection) -> float:
        return build(fusion, num_hidden_layers=5).fusion.costs(7, Layout(), 16)["ranking"].flops

    assert ranking(LateInjection(first=1, last=3)) == 0
    assert ranking(LateInjection(first=1, last=3, stages={1: 0.5})) == ranking(LateInjection(first=1, stages={1: 0.5}))
    model = build(LateInjection(first=1, last=3), num_hidden_layers=5)

    def ranking_in(*_: Any) -> Any:
        raise AssertionError("a layer ranks")

    monkeypatch.setattr("lavi.fusion.pruning.ranking_in", ranking_in)
    with torch.no_grad():
        model(collate(model, SAMPLES))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LateInjection(first=4), "layers 4 to 3: the language model has 0 to 3"),
        (lambda: LateInjection(first=2, last=1), "layers 2 to 1"),
        (lambda: LateInjection(first=2, last=4), "layers 2 to 4"),
        (lambda: LateInjection(first=1, stages={0: 0.5}), r"prunes after layers \[0\]: .* layers 1 to 2"),
        (lambda: LateInjection(first=1, last=2, stages={2: 0.5}), r"prunes after layers \[2\]: .* layers 1 to 1"),
        (lambda: LateInjection(first=1, stages={1: 0.0}), "after layer 1 keeps a share above 0"),
    ],
)
def test_what_cannot_be_is_refused(build, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        build(make())


def test_flash_attention_needs_no_mask_here(build, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(AttentionKind, "of", lambda kernel, config: AttentionKind("flash_attention_2", (None,) * 4))
    build(LateInjection(first=1))
    monkeypatch.setattr(AttentionKind, "of", lambda kernel, config: AttentionKind("flex_attention", (None,) * 4))
    with pytest.raises(UserError, match="LateInjection works with the attention kernels"):
        build(LateInjection(first=1))
    build(LateInjection(first=0))  # which leaves all layers as they are
