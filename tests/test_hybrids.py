"""Language models some of whose layers keep a recurrent state: what padding and images must not enter."""

from __future__ import annotations

import pytest
import torch
from conftest import ask, awaken, collate, greedy
from families import HYBRIDS
from test_oracles import FUSIONS, SAMPLES, bare_logits, row

from lavi.efficiency.flops import language_flops
from lavi.errors import UserError
from lavi.language.load import LanguageModel
from lavi.language.surgery import PADDING_STAYS_OUT
from lavi.model import VisionLanguageModel


@pytest.fixture(params=[(f, n) for f in HYBRIDS for n in ("lavi-attention", "cross-attention")], ids="-".join)
def model(build, request: pytest.FixtureRequest) -> VisionLanguageModel:  # type: ignore[no-untyped-def]
    family, name = request.param
    return build(FUSIONS[name](), family=family)


def test_the_list_is_what_is_tried() -> None:
    assert set(HYBRIDS) == PADDING_STAYS_OUT


def test_the_start_is_the_language_model(model: VisionLanguageModel) -> None:
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        assert torch.equal(model(batch), bare_logits(model, batch))


@pytest.mark.parametrize("pad_left", [False, True])
def test_a_batch_answers_as_its_rows_alone(model: VisionLanguageModel, pad_left: bool) -> None:
    awaken(model.fusion)
    batch = collate(model, SAMPLES, pad_left=pad_left)
    with torch.no_grad():
        together = model(batch)
        for index, sample in enumerate(SAMPLES):
            alone = model(collate(model, [sample]))[0]
            torch.testing.assert_close(row(together, batch, index), alone, atol=2e-5, rtol=1e-4)


def test_cached_decoding_equals_the_full_forward(model: VisionLanguageModel) -> None:
    awaken(model.fusion)
    prompts = [ask(1, "what colour is the circle?"), ask("hello", 2, "which has the red circle?", 3), ask("hello")]
    batch = collate(model, prompts, prompt=True, pad_left=True)
    answers = model.generate(batch, max_new_tokens=6, eos_token_id=None, do_sample=False)
    assert answers == [greedy(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("name", ["concat", "fastv", "visor"])
def test_what_changes_the_sequence_is_refused(build, family: str, name: str) -> None:
    with pytest.raises(UserError, match=r"recurrent state, and .* works on another sequence"):
        build(FUSIONS[name](), family=family)


def test_a_family_that_was_not_shown_to_hold_is_refused(tokenizer: str) -> None:
    config = HYBRIDS["lfm2"] | {"model_type": "minimax", "num_local_experts": 2, "head_dim": 8}
    config["layer_types"] = ["linear_attention", "full_attention"] * 2
    del config["block_auto_adjust_ff_dim"]
    with pytest.raises(UserError, match="padding was not shown to leave no trace"):
        LanguageModel(config=config, tokenizer=tokenizer)


def test_conversations_of_a_row_would_see_each_other(build) -> None:
    model = build(FUSIONS["lavi-attention"](), family="lfm2")
    encoded = [model.processor.encode(sample) for sample in SAMPLES[:2]]
    with pytest.raises(UserError, match="see each other"):
        model(model.processor.collate([encoded]))


def test_a_scan_is_not_counted(build) -> None:
    with pytest.raises(UserError, match="have no formula"):
        language_flops(build(FUSIONS["lavi-attention"](), family="lfm2").language, tokens=[10] * 4)
