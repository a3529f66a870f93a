"""A compiled decode step answers as the step it was made of, for every fusion that can be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import decode
import pytest
import torch
from conftest import ask, awaken, collate, small
from fusions_on_one import TINY
from test_oracles import FUSIONS as ALL_FUSIONS
from torch._dynamo.utils import counters

import lavi.language.compiled as compiled
from lavi.efficiency.steps import Steps
from lavi.errors import UserError
from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.deepstack import DeepStackFusion
from lavi.fusion.lavi import LaViContext, LaViFusion
from lavi.language.compiled import DecodeCompiler
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel

TOKENS = 6
PROMPTS = [
    ask(1, "what colour is the circle?"),
    ask("hello", 2, "which image has the red circle?", 3),
    ask("no image at all, what then?"),
]
# Each layer takes a second to trace: of one, all of what the fusion adds is in it.
FUSIONS: dict[str, Callable[[], Fusion]] = {
    "concat": ConcatFusion,
    "cross-attention": lambda: CrossAttentionFusion(every=1),
    "lavi-attention": lambda: LaViFusion(every=1, generator=small()),
    "lavi-mlp": lambda: LaViFusion(every=1, generator=small("mlp")),
    "lavi-final-norm": lambda: LaViFusion(targets=["final"], generator=small()),
    "deepstack": lambda: DeepStackFusion(levels=3),
}
CASES = [("qwen2", name) for name in ("concat", "cross-attention", "lavi-mlp", "lavi-final-norm", "deepstack")]
# A window shorter than the text, in all layers and in every other one; learned positions.
CASES += [(family, "lavi-attention") for family in ("qwen2", "mistral", "gemma2", "gpt2", "olmo2")]


@pytest.fixture(autouse=True)
def _traced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they were traced: nothing is built of them, which takes half a minute each."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def make(build) -> Callable[..., VisionLanguageModel]:  # type: ignore[no-untyped-def]
    def made(family: str, fusion: str) -> VisionLanguageModel:
        sizes = {"sliding_window": 12} if family in ("mistral", "gemma2") else {}
        sizes["num_hidden_layers"] = 2 if family == "gemma2" else 3 if fusion == "deepstack" else 1
        model: VisionLanguageModel = build(
            FUSIONS[fusion](), family=family, initializer_range=0.3, tie_word_embeddings=False, **sizes
        )
        awaken(model.fusion)
        return model

    return made


def answers(model: VisionLanguageModel, *rows: int, **decoding: Any) -> Any:
    batch = collate(model, [PROMPTS[row] for row in rows], prompt=True, pad_left=True)
    return model.generate(batch, **{"max_new_tokens": TOKENS, "eos_token_id": None, **decoding})


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_compiled_answers_are_those_of_single_steps(make: Any, case: tuple[str, str]) -> None:
    model = make(*case)
    both: list[tuple[int, ...]] = [(0,), (0, 1, 2)]
    asked = both if case == ("qwen2", "lavi-attention") else [both[CASES.index(case) % 2]]
    expected = [answers(model, *rows) for rows in asked]
    model.language.compiled = DecodeCompiler()
    assert [answers(model, *rows) for rows in asked] == expected
    assert counters["stats"]["unique_graphs"], "nothing was compiled"
    assert not counters["graph_break"]


def test_beams_find_the_same_answers(make: Any) -> None:
    """transformers does not compile their steps; the cache is the compiled one's."""
    model = make("qwen2", "lavi-attention")
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = answers(model, 0, 1, **beams)
    model.language.compiled = DecodeCompiler()
    assert answers(model, 0, 1, **beams) == expected


def test_one_graph_serves_all_steps_and_prompts_of_one_shape(make: Any) -> None:
    model = make("qwen2", "lavi-attention")
    model.language.compiled = DecodeCompiler()
    answers(model, 0)
    graphs = counters["stats"]["unique_graphs"]
    for tokens in (2, 9, 30):
        answers(model, 0, max_new_tokens=tokens)
    assert counters["stats"]["unique_graphs"] == graphs == 1


def test_models_of_one_class_do_not_get_each_other_s_graphs(build: Any) -> None:
    """Deeper, wider, in another dtype, with norms modulated elsewhere: what differs is in no tensor that goes in.

    The narrow dtype is float16: in bfloat16 the two largest logits of a step differ by one rounding, which is not
    the same on every version of torch.
    """
    drawn = {"initializer_range": 0.3, "tie_word_embeddings": False}
    models = [
        build(LaViFusion(every=1, generator=small()), num_hidden_layers=1, **drawn),
        build(LaViFusion(every=1, generator=small()), num_hidden_layers=2, **drawn),
        build(LaViFusion(every=2, generator=small()), num_hidden_layers=2, **drawn),
        build(LaViFusion(every=1, generator=small()), num_hidden_layers=1, dtype="float16", **drawn),
        build(LaViFusion(every=1, generator=small()), num_hidden_layers=1, hidden_act="relu", **drawn),
    ]
    expected = []
    for model in models:
        awaken(model.fusion)
        expected.append(answers(model, 0))
        model.language.compiled = DecodeCompiler()
    assert [answers(model, 0) for model in models] == expected
    # A model that changes behind its first compiled answer.
    models[0].language.hf.to(torch.float16)
    models[0].language.compiled = None
    narrow = answers(models[0], 0)
    models[0].language.compiled = DecodeCompiler()
    assert answers(models[0], 0) == narrow


def test_what_one_step_cannot_serve_is_not_compiled(make: Any) -> None:
    model = make("qwen2", "lavi-attention")
    expected = answers(model, 0)
    model.language.compiled = DecodeCompiler()
    assert answers(model, 0, use_cache=False) == expected
    assert answers(model, 0, cache_implementation="static") == expected
    assert answers(model, 0, prompt_lookup_num_tokens=2) == expected
    model.train()
    assert answers(model, 0) == expected
    assert not counters["stats"]["unique_graphs"]


def test_a_longer_prompt_gets_a_larger_cache_and_a_shorter_one_keeps_it(make: Any) -> None:
    model = make("qwen2", "concat")
    step = DecodeCompiler()
    first = step.cache_for(model.language.hf, rows=1, columns=100)
    assert step.columns == compiled.BLOCK
    assert step.cache_for(model.language.hf, rows=1, columns=compiled.BLOCK) is first
    longer = step.cache_for(model.language.hf, rows=1, columns=compiled.BLOCK + 1)
    assert longer is not first
    assert step.columns == 2 * compiled.BLOCK
    assert step.cache_for(model.language.hf, rows=1, columns=7) is longer
    assert step.cache_for(model.language.hf, rows=2, columns=7) is not longer


@pytest.mark.parametrize("fusion", ["lavi-attention", "concat"])
def test_timed_steps_are_those_of_an_answer(make: Any, fusion: str) -> None:
    """What is timed of a compiled step gives the logits of the step it was made of, also when it is taken back."""
    model = make("qwen2", fusion)
    batch = collate(model, [PROMPTS[0]], prompt=True, pad_left=True)
    with torch.no_grad():
        features = model.features_of(batch)

        def prefill(cache: Any) -> Any:
            return model.prefill(batch, features, cache)

        plain, one = (Steps(model.language.hf, prefill, rows=1, length=length) for length in (None, 100))
        torch.testing.assert_close(plain.begin(), one.begin())
        for token in (5, 9, 3):
            said = torch.tensor([[token]])
            for _ in range(2):
                expected, logits = plain.step(said), one.step(said)
                torch.testing.assert_close(logits, expected)
                plain.undo_step()
                one.undo_step()
            torch.testing.assert_close(one.step(said), plain.step(said))


@pytest.mark.slow
def test_the_benchmark_times_each_way_of_each_fusion() -> None:
    records = decode.measure(TINY, torch.device("cpu"), turns=2)
    assert [(record["fusion"], record["way"]) for record in records] == [
        (name, way) for name in (decode.BARE, *decode.FUSIONS) for way in decode.WAYS
    ]
    assert records[0]["of_bare"] == records[1]["of_bare"] == [1, 1, 1]
    columns, rows = decode.decode_table(records)
    assert {len(row) for row in rows} == {len(columns)}
    assert counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("fusion", ["visor", "fastv", "pyramid-drop", "vica"])
def test_a_cache_of_its_own_cannot_be_compiled(make: Any, build: Any, tokenizer: str, fusion: str) -> None:
    language = make("qwen2", "concat").language
    language.compiled = DecodeCompiler()
    vision = make("qwen2", "concat").vision
    with pytest.raises(UserError, match="a cache of its own, which cannot be compiled"):
        VisionLanguageModel(vision=vision, language=language, fusion=ALL_FUSIONS[fusion]())


def test_without_a_compiler_one_sentence_says_so(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("qwen2", "concat")
    model.language.compiled = DecodeCompiler()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        answers(model, 0)


def test_a_recipe_asks_for_it_by_name(tokenizer: str) -> None:
    config = {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    assert LanguageModel(config=config, tokenizer=tokenizer).compiled is None
    assert isinstance(LanguageModel(config=config, tokenizer=tokenizer, compile="decode").compiled, DecodeCompiler)


def test_the_cache_is_made_anew_where_its_tensors_cannot_serve(make: Any) -> None:
    model = make("qwen2", "concat")
    expected = answers(model, 0)
    model.language.compiled = DecodeCompiler()
    with torch.inference_mode():
        assert answers(model, 0) == expected
    assert answers(model, 0) == expected
    first = model.language.compiled.cache
    assert answers(model, 0) == expected
    assert model.language.compiled.cache is first


def test_a_context_with_steps_of_its_own_is_asked_at_each(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Counting(LaViContext):
        def for_step(self, past: int, length: int) -> Any:
            asked.append(past)
            return super().for_step(past, length)

    model = make("qwen2", "lavi-attention")
    monkeypatch.setattr("lavi.fusion.lavi.LaViContext", Counting)
    answers(model, 0)
    assert len(asked) == TOKENS
    assert asked == sorted(set(asked))


def test_a_step_that_is_no_single_graph_is_refused_in_one_sentence(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("qwen2", "lavi-attention")
    model.language.compiled = DecodeCompiler()
    generator = next(iter(model.fusion.generators.values()))
    attend = generator.attend

    def looking(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        assert float(hidden.sum()) < 1e9  # a number that the graph does not know
        return attend(hidden, *args)  # type: ignore[no-any-return]

    monkeypatch.setattr(generator, "attend", looking)
    with pytest.raises(UserError, match=r"cannot be compiled .* leave language.compile out"):
        answers(model, 0)
