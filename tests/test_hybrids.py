"""Language models that need the text's own sequence: layers with a recurrent state, or inputs looked up by ids."""

from __future__ import annotations

import pytest
import torch
from conftest import awaken, collate
from families import HYBRIDS, LOOKING_UP
from test_oracles import FUSIONS, SAMPLES, assert_cached_is_full, assert_rows_answer_alone, bare_logits

from lavi.efficiency.flops import language_flops
from lavi.efficiency.memory import MIB, prefill_memory
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError
from lavi.language.load import LanguageModel
from lavi.language.sequence import PADDING_STAYS_OUT, recurrent_layers
from lavi.model import VisionLanguageModel


@pytest.fixture(
    params=[
        *((family, name) for family in HYBRIDS | LOOKING_UP for name in ("lavi-attention", "cross-attention")),
        *((family, "casa") for family in LOOKING_UP),
    ],
    ids="-".join,
)
def model(build, request: pytest.FixtureRequest) -> VisionLanguageModel:  # type: ignore[no-untyped-def]
    family, name = request.param
    return build(FUSIONS[name](), family=family)


def test_the_list_is_what_is_tried() -> None:
    assert set(HYBRIDS) == PADDING_STAYS_OUT


def test_the_start_is_the_language_model(model: VisionLanguageModel) -> None:
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        assert torch.equal(model(batch), bare_logits(model, batch))


def test_a_batch_answers_as_its_rows_alone(model: VisionLanguageModel) -> None:
    awaken(model.fusion)
    assert_rows_answer_alone(model)


def test_cached_decoding_equals_the_full_forward(model: VisionLanguageModel) -> None:
    awaken(model.fusion)
    assert_cached_is_full(model)


@pytest.mark.parametrize("family", HYBRIDS)
def test_their_memory_is_measured(build, family: str) -> None:  # type: ignore[no-untyped-def]
    """That of recurrent layers beside keys and values: what they carry on."""
    model = build(FUSIONS["lavi-attention"](), family=family)
    shape = Scenario(8, image=(32, 32)).shape_for(model)
    mib = prefill_memory(model, shape, device=torch.device("cpu"))
    with torch.no_grad():
        layers = model.prefill(*shape.inputs(model, "cpu"))[0].past_key_values.layers
    keys = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    assert mib["kv_cache"] * MIB > sum(key.numel() * 4 for key in keys if key is not None)
    assert mib["peak"] > 0


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("name", ["concat", "fastv", "late-injection", "visor", "vica"])
def test_what_changes_the_sequence_is_refused(build, family: str, name: str) -> None:
    with pytest.raises(UserError, match=r"recurrent state, and .* works on another sequence"):
        build(FUSIONS[name](), family=family)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_cache_that_holds_no_recurrent_state_is_refused(build, family: str) -> None:
    with pytest.raises(UserError, match="recurrent state, which CASA's own cache cannot hold"):
        build(FUSIONS["casa"](), family=family)


@pytest.mark.parametrize("name", ["concat", "fastv", "late-injection", "visor", "vica"])
def test_tokens_without_ids_are_refused(build, name: str) -> None:
    with pytest.raises(UserError, match=r"looked up by a token's id, and .* that have none"):
        build(FUSIONS[name](), family="gemma4_text")


def test_what_is_looked_up_is_not_counted(build) -> None:
    with pytest.raises(UserError, match="looks up for each layer have no formula"):
        language_flops(build(FUSIONS["lavi-attention"](), family="gemma4_text").language, tokens=[10] * 4)


@pytest.mark.parametrize("name", ["lavi-attention", "cross-attention"])
def test_several_versions_of_a_hidden_state_are_refused(build, name: str) -> None:
    config = {"model_type": "gemma3n_text", "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 500}
    config |= {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": None, "num_kv_shared_layers": 0}
    with pytest.raises(UserError, match="several versions of each hidden state"):
        build(FUSIONS[name](), family="qwen2", **config)


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


def test_layers_that_read_another_layer_s_keys_are_not_recurrent(tokenizer: str) -> None:
    config = LOOKING_UP["gemma4_text"] | {"num_kv_shared_layers": 1}
    with torch.device("meta"):
        model = LanguageModel(config=config, tokenizer=tokenizer)
    assert recurrent_layers(model.hf) == []
