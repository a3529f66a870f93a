"""Language-model families: which norms they have, what cannot work, and the other ways of running a decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import FAMILIES, GENERATORS, TOWER, ask, awaken, collate, small
from families import VARIED
from torch import Tensor

from lavi.errors import UserError
from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.layers import spread_layers
from lavi.fusion.pruning import FastV
from lavi.language.load import LanguageModel
from lavi.language.surgery import norm_targets
from lavi.model import VisionLanguageModel
from lavi.vision.hf import HFVision

FEEDS_BOTH_APART = {"attention": "feeds", "ffn": "feeds"}
FEEDS_BOTH = {"both": "feeds"}
CLOSES = {"attention": "closes", "ffn": "closes"}
OTHER_ROLES = {
    **dict.fromkeys(("phi", "cohere", "cohere2"), FEEDS_BOTH),
    **dict.fromkeys(("olmo2", "olmo3", "flex_olmo", "exaone4"), CLOSES),
}
"""Of families that do not have one norm before their attention and one before their feed-forward part."""


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_are_found_by_probing(build, family: str) -> None:
    model = build(ConcatFusion(), family=family)
    targets = norm_targets(model.language.hf)
    for layer in range(4):
        of_layer = [t for t in targets if t.layer == layer]
        best = {t.role: t.position for t in sorted(of_layer, key=lambda t: t.position)}  # "feeds" wins over "closes"
        assert best == OTHER_ROLES.get(family, FEEDS_BOTH_APART)
    assert [t.role for t in targets if t.layer == 4] == ["final"]


def test_a_closing_norm_is_used_only_where_none_feeds(build) -> None:
    for family, position in (("gemma2", "feeds"), ("olmo2", "closes")):
        chosen = build(LaViFusion(every=2), family=family).fusion.modulated_norms
        assert {(t.layer, t.role, t.position) for t in chosen} == {
            (layer, role, position) for layer in (1, 3) for role in ("attention", "ffn")
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_modulated_norm_is_the_norm_with_other_weights(build, family: str) -> None:
    """ViLN: (gamma + dgamma) xhat + (beta + dbeta), whatever the family's norm computes and however small its input."""
    model = build(LaViFusion(every=2, targets=["attention", "ffn", "final"]), family=family)
    dgamma, dbeta = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for target in model.fusion.modulated_norms:
        norm = target.norm
        other = copy.deepcopy(norm)
        weight = getattr(other, "weight", None)
        for size in (1.0, 1e-3):  # at 1e-3 a wrong eps shows
            x = size * torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                plain = norm(x)
                if weight is None:  # OLMo: gamma is 1
                    expected = plain * (1 + dgamma) + dbeta
                else:
                    weight.add_(dgamma)
                    expected = other(x) + dbeta
                    weight.sub_(dgamma)
                norm.deltas = (dgamma.expand_as(x), dbeta.expand_as(x))
                torch.testing.assert_close(norm(x), expected, atol=1e-4, rtol=1e-3)
                norm.deltas = None


@pytest.mark.parametrize(
    ("count", "chosen", "where", "layers"),
    [
        (28, 7, "spread", [3, 7, 11, 15, 19, 23, 27]),
        (4, 4, "spread", [0, 1, 2, 3]),
        (6, 4, "spread", [1, 2, 3, 5]),
        (8, 2, "first", [0, 1]),
        (8, 2, "last", [6, 7]),
    ],
)
def test_a_share_of_the_layers(count: int, chosen: int, where: str, layers: list[int]) -> None:
    assert spread_layers(count, chosen, where) == layers


OTHER_KEYS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 600}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 64}, "as OPT does"),
        ({"model_type": "falcon"}, "Falcon"),
        ({"model_type": "bloom"}, "Bloom"),
        ({"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, "decoder-only"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_with_the_reason(tokenizer: str, config: dict[str, object], reason: str) -> None:
    def build() -> None:
        language = LanguageModel(config=OTHER_KEYS | config, tokenizer=tokenizer, attention="eager")
        VisionLanguageModel(vision=HFVision(config=TOWER), language=language, fusion=LaViFusion(every=1))

    with pytest.raises(UserError, match=reason):
        build()


def test_concatenation_too_needs_the_keyword(tokenizer: str) -> None:
    """It tells the stack where the text stands; without that, logits of visual tokens would be taken for the text's."""
    config = {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    language = LanguageModel(config=config, tokenizer=tokenizer, attention="eager")
    with pytest.raises(UserError, match="before its decoder"):
        VisionLanguageModel(vision=HFVision(config=TOWER), language=language, fusion=ConcatFusion())


def test_what_works_on_a_part_of_the_sequence_is_refused_attention_in_chunks(tokenizer: str) -> None:
    config = {"model_type": "llama4_text", "head_dim": 8, "num_local_experts": 2, "num_key_value_heads": 2}
    language = LanguageModel(config=OTHER_KEYS | config, tokenizer=tokenizer)
    with pytest.raises(UserError, match="attention in chunks"):
        VisionLanguageModel(vision=HFVision(config=TOWER), language=language, fusion=FastV(layer=1, keep=0.5))


def test_a_family_without_the_kernel_says_which_one_to_take(tokenizer: str) -> None:
    with pytest.raises(UserError, match="attention=eager"):
        LanguageModel(config=FAMILIES["gemma2"], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, kind) for family in VARIED for kind in ("attention", "concat")),
        *((family, kind) for family in ("olmo2", "gemma3_text", "gpt2", "phi") for kind in ("mlp", "conv", "pooled")),
    ],
)
def test_a_static_cache_answers_as_a_growing_one(build, family: str, kind: str) -> None:
    fusion: Fusion = ConcatFusion() if kind == "concat" else LaViFusion(every=2, generator=small(kind))
    model = build(fusion, family=family)
    awaken(model.fusion)
    prompts = [ask(1, "what colour is the circle?"), ask("hello", 2, "which image has the red circle?", 3), ask("hi")]
    batch = collate(model, prompts, prompt=True, pad_left=True)
    growing = model.generate(batch, max_new_tokens=6, eos_token_id=None)
    static = model.generate(batch, max_new_tokens=6, eos_token_id=None, cache_implementation="static")
    assert static == growing


@pytest.mark.parametrize(
    ("family", "kind"), [*(("qwen2", kind) for kind in GENERATORS), ("llama", "attention"), ("gpt_neox", "attention")]
)
def test_torch_compile_breaks_no_graph(build, family: str, kind: str) -> None:
    model = build(LaViFusion(every=2, generator=small(kind)), family=family, num_hidden_layers=2)
    awaken(model.fusion)
    batch = collate(model, [ask(1, "what colour is the circle?")])

    def run(inputs) -> Tensor:  # type: ignore[no-untyped-def]
        return model.language(inputs)

    with torch.no_grad():
        inputs = model.fusion(batch, model.features(batch.pixels), model.language)
        torch._dynamo.reset()
        compiled = torch.compile(run, backend="eager", fullgraph=True)  # fullgraph: a graph break is an error
        torch.testing.assert_close(compiled(inputs), run(inputs), atol=1e-5, rtol=1e-4)


def test_a_key_that_the_familys_code_looks_for_is_one(tokenizer: str) -> None:
    """Qwen2's configuration does not list ``head_dim``, and its attention has heads of that width where it is given."""
    wide = LanguageModel(config=FAMILIES["qwen2"] | {"head_dim": 16}, tokenizer=tokenizer)
    assert wide.hf.model.layers[0].self_attn.q_proj.weight.shape[0] == 4 * 16
    with pytest.raises(UserError, match="no key 'head_dims': did you mean 'head_dim'"):
        LanguageModel(config=FAMILIES["qwen2"] | {"head_dims": 16}, tokenizer=tokenizer)
