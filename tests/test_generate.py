"""What ``generate`` promises, for every fusion: the answers of each prompt alone, or one sentence that says why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import ask, awaken, collate, greedy
from test_oracles import FUSIONS
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache, TextStreamer
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.streamers import BaseStreamer

from lavi.batch import Batch
from lavi.errors import UserError
from lavi.language.decoding import DRAFTS_BEHIND_EMBEDDINGS
from lavi.model import VisionLanguageModel

TOKENS = 5
PROMPTS = [ask(1, "what colour is the circle?"), ask("hello", 2, "which image has the red circle?", 3)]

KINDS = [
    "lavi-attention",
    "concat",
    "cross-attention",
    "casa",
    "pyramid-drop",
    "late-injection",
    "shortv",
    "vica",
    "deepstack",
    "visor-cross",
    "visor-routed",
    "visor-modulation",
]
CASES = [("qwen2", name) for name in KINDS]
# Windows shorter than the text, in all layers and in every other one, and learned positions.
CASES += [("mistral", "lavi-attention"), ("mistral", "fastv"), ("gemma2", "visor-routed"), ("gpt2", "visor-routed")]
CASES += [("mistral", "vica"), ("gemma2", "shortv"), ("gpt2", "late-injection"), ("mistral", "casa")]

OWN_CACHE = ("casa", "fastv", "pyramid-drop", "late-injection", "shortv", "vica", "visor")
"""Fusions whose layers keep what no cache of transformers can hold."""
TEXT_ALONE = ("lavi", "cross-attention", "casa", "visor-cross")
"""Fusions that leave the sequence to the text."""


@dataclass
class Case:
    """A model and the likeliest answers to two prompts, each computed alone, without a cache."""

    family: str
    fusion: str
    model: VisionLanguageModel
    answers: list[list[int]]

    @property
    def own_cache(self) -> bool:
        return self.fusion.startswith(OWN_CACHE)

    @property
    def text_only_input(self) -> bool:
        return self.fusion.startswith(TEXT_ALONE)

    def batch(self, *rows: int) -> Batch:
        """The prompts, or some of them."""
        return prompts(self.model, [PROMPTS[row] for row in rows or (0, 1)])

    def generate(self, *rows: int, **decoding: Any) -> Any:
        """Answers of :data:`TOKENS` tokens to the prompts, or to some of them."""
        return self.model.generate(self.batch(*rows), **({"max_new_tokens": TOKENS, "eos_token_id": None} | decoding))


def prompts(model: VisionLanguageModel, samples: list[Any]) -> Batch:
    return collate(model, samples, prompt=True, pad_left=True)


def make(build: Callable[..., VisionLanguageModel], family: str, fusion: str) -> VisionLanguageModel:
    """A model whose answers vary; where rows may go different ways, they do."""
    window = {"sliding_window": 12} if family in ("mistral", "gemma2") else {}
    drawn = {"initializer_range": 0.3, "tie_word_embeddings": False}
    model = build(FUSIONS[fusion](), family=family, **drawn, **window)
    awaken(model.fusion)
    router = getattr(model.fusion, "router", None)
    for seed in range(50 if router is not None else 0):
        awaken(router, seed)
        model.fusion.route_counts.clear()
        model.generate(prompts(model, PROMPTS), max_new_tokens=1)
        if len(model.fusion.route_counts) > 1:
            break
    return model


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(build, request: pytest.FixtureRequest) -> Case:  # type: ignore[no-untyped-def]
    family, fusion = request.param
    model = make(build, family, fusion)
    return Case(family, fusion, model, [greedy(model, prompt, TOKENS) for prompt in PROMPTS])


@pytest.fixture(scope="module")
def plain(build) -> Case:  # type: ignore[no-untyped-def]
    """A model for what no fusion changes; its answers are never that of an image, so they are not asked for."""
    return Case("qwen2", "concat", make(build, "qwen2", "concat"), [])


class Streamed(BaseStreamer):
    """Takes all that is streamed, of any number of rows."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value)

    def end(self) -> None:
        self.ended = True


# --- every way of decoding, for every fusion --------------------------------------------------------------------------


def test_the_answers_are_those_of_each_prompt_alone(case: Case) -> None:
    assert case.generate() == case.answers
    assert len({tuple(answer) for answer in case.answers}) == 2, "two prompts that answer alike show little"


def test_sampled_answers_stand_beside_their_prompt(case: Case) -> None:
    """Sampling that is nearly greedy: what is drawn is the likeliest answer."""
    drawn = case.generate(do_sample=True, temperature=1e-4, num_return_sequences=3)
    assert drawn == [answer for answer in case.answers for _ in range(3)]


def test_several_beams_are_returned_beside_their_prompt(case: Case) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 2}
    together = case.generate(**beams)
    assert together == [answer for row in (0, 1) for answer in case.generate(row, **beams)]
    assert together[0] != together[1]
    if not case.own_cache:
        assert case.generate(**beams, cache_implementation="static") == together


def test_scores_come_with_the_new_tokens_alone(case: Case) -> None:
    out = case.generate(return_dict_in_generate=True, output_scores=True)
    assert out.sequences.tolist() == case.answers
    assert torch.stack(out.scores, dim=1).argmax(-1).tolist() == case.answers


def test_no_cache_answers_as_a_cache(case: Case) -> None:
    assert case.generate(use_cache=False) == case.answers


@pytest.mark.parametrize("name", ["cache_implementation", "past_key_values"])
def test_another_cache_answers_alike_or_is_refused(case: Case, name: str) -> None:
    cache = DynamicCache(config=case.model.language.hf.config)
    other = {name: "static" if name == "cache_implementation" else cache}
    if case.own_cache:
        with pytest.raises(UserError, match=f"a cache of its own: leave out {name}"):
            case.generate(**other)
    else:
        assert case.generate(**other) == case.answers


def test_drafts_change_no_answer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of two right tokens and a wrong one: what was read for the wrong one has to be forgotten."""
    row, read = 1, []
    prompt = case.batch(row).input_ids.shape[1] if case.text_only_input else 0

    def draft(self: PromptLookupCandidateGenerator, ids: Tensor) -> tuple[Tensor, None]:
        done = ids.shape[1] - prompt
        wrong = [token + 1 for token in case.answers[row][done + 2 : done + 3]]
        new = (case.answers[row][done : done + 2] + wrong)[: TOKENS - done - 1] if ids.shape[1] else []
        read.append(len(new) + 1)
        return torch.cat([ids, torch.tensor([new], dtype=torch.long)], dim=1), None

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", draft)
    if not (case.text_only_input or DRAFTS_BEHIND_EMBEDDINGS):
        with pytest.raises(UserError, match=r"transformers before 5\.18 loses drafts"):
            case.generate(row, prompt_lookup_num_tokens=3)
        return
    assert case.generate(row, prompt_lookup_num_tokens=3) == [case.answers[row]]
    assert len(read) < TOKENS
    assert max(read) > 2
    with pytest.raises(UserError, match="prompt_lookup_num_tokens serves one answer at a time, and 2 grow"):
        case.generate(prompt_lookup_num_tokens=3)


def test_a_prompt_read_in_chunks_answers_alike_or_is_refused(case: Case) -> None:
    if case.text_only_input:
        assert case.generate(prefill_chunk_size=5) == case.answers
    else:
        with pytest.raises(UserError, match="prefill_chunk_size works on text alone: leave it out"):
            case.generate(prefill_chunk_size=5)


def test_what_scores_tokens_sees_the_whole_text(case: Case) -> None:
    """Penalties of repetition depend on it."""
    ids: list[Tensor] = []
    case.generate(logits_processor=[lambda so_far, scores: ids.append(so_far) or scores])
    answers = torch.tensor(case.answers)
    for step, so_far in enumerate(ids):
        assert torch.equal(so_far, torch.cat([case.batch().input_ids, answers[:, :step]], dim=1))


def test_a_penalty_counts_the_words_of_each_prompt_and_no_padding(case: Case) -> None:
    """Also beside a prompt with more images, which the sequence has and the text has not. Below 1 it is a reward."""
    for more in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        together = case.generate(repetition_penalty=0.02, **more)
        assert together == [a for row in (0, 1) for a in case.generate(row, repetition_penalty=0.02, **more)]
        assert together != case.generate(**more)


def test_a_penalty_goes_with_drafts_and_is_a_number(plain: Case) -> None:
    if DRAFTS_BEHIND_EMBEDDINGS:
        drafted = plain.generate(0, repetition_penalty=0.1, prompt_lookup_num_tokens=2)  # words of the prompt, please
        assert drafted == plain.generate(0, repetition_penalty=0.1)
        assert drafted != plain.generate(0)
    assert plain.generate(0, repetition_penalty=2) == plain.generate(0, repetition_penalty=2.0)
    for wrong in (-1.0, 0, "much"):
        with pytest.raises(UserError, match="repetition_penalty must be a number above 0"):
            plain.generate(repetition_penalty=wrong)


def test_a_checkpoint_s_own_settings_do_not_change_the_likeliest_answer(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many penalize repetition; who wants that names it."""
    own = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(40)), "top_k": 3}
    own |= {"bad_words_ids": [[token] for token in case.answers[0]], "min_new_tokens": 3, "temperature": 0.5}
    monkeypatch.setattr(case.model.language.hf, "generation_config", GenerationConfig(**own))
    assert case.generate() == case.answers
    assert case.generate(no_repeat_ngram_size=1) != case.answers or all(len(set(a)) == len(a) for a in case.answers)


def test_a_streamer_gets_the_prompts_and_every_row(case: Case) -> None:
    streamed = Streamed()
    case.generate(streamer=streamed)
    assert torch.equal(streamed.parts[0], case.batch().input_ids)
    assert torch.stack(streamed.parts[1:], dim=1).tolist() == case.answers
    assert streamed.ended


def test_a_row_that_stops_at_a_string_is_as_long_as_alone(case: Case) -> None:
    """Also if no token ends an answer: then the other rows go on."""
    tokenizer = case.model.chat.tokenizer
    words = [(row, tokenizer.decode([token])) for row in (0, 1) for token in case.answers[row][:-1]]
    stopped, stop = next((row, text) for row, text in words if text.strip().isalpha() and text.isascii())
    together = case.generate(stop_strings=[stop])
    assert together == [case.generate(row, stop_strings=[stop])[0] for row in (0, 1)]
    assert len(together[stopped]) < TOKENS
    if case.family == "qwen2":
        beams = case.generate(stop_strings=[stop], num_beams=2)
        assert beams == [case.generate(row, stop_strings=[stop], num_beams=2)[0] for row in (0, 1)]


@pytest.mark.parametrize(
    ("family", "fusion"),
    [("gpt2", "lavi-attention"), ("gpt2", "concat"), ("gpt2", "visor-routed"), ("qwen2", "fastv")],
    ids=lambda name: name,
)
def test_an_answer_may_fill_the_positions_and_no_more(build, family: str, fusion: str) -> None:  # type: ignore[no-untyped-def]
    positions = 48
    model = build(FUSIONS[fusion](), family=family, max_position_embeddings=positions)
    batch = prompts(model, PROMPTS)
    inputs = model.fusion(batch, model.features(batch.pixels), model.language)
    room = positions - inputs.attention_mask.shape[1] + 1  # the last token is never read
    answers = model.generate(batch, max_new_tokens=room, eos_token_id=None)
    assert [len(answer) for answer in answers] == [room, room]
    with pytest.raises(UserError, match=f"room for {room}; set max_new_tokens to at most that"):
        model.generate(batch, max_new_tokens=room + 1)


def test_a_route_is_counted_once_a_sample(build) -> None:  # type: ignore[no-untyped-def]
    model = make(build, "qwen2", "visor-routed")
    counted = []
    for copies in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 4}):
        model.fusion.route_counts.clear()
        model.generate(prompts(model, PROMPTS), max_new_tokens=2, **copies)
        counted.append(Counter(model.fusion.route_counts))
    assert len(counted[0]) == 2, "both went one way"
    assert counted == [counted[0]] * 3


# --- arguments --------------------------------------------------------------------------------------------------------


def test_the_end_may_be_one_token_several_or_none(plain: Case) -> None:
    whole = plain.generate()
    end = whole[0][3]
    first = whole[0].index(end)
    for ends in (end, [end], [end, plain.model.end_ids()[0]], torch.tensor([end])):
        assert plain.generate(eos_token_id=ends)[0] == whole[0][:first]
    assert len(plain.generate(eos_token_id=end, min_new_tokens=TOKENS)[0]) == TOKENS
    assert end not in plain.generate(eos_token_id=end, min_new_tokens=TOKENS)[0]


def test_a_configuration_says_what_is_left_open(plain: Case) -> None:
    config = GenerationConfig(max_new_tokens=3, num_beams=2, num_return_sequences=2)
    batch = plain.batch()
    expected = plain.model.generate(batch, max_new_tokens=3, num_beams=2, num_return_sequences=2)
    assert plain.model.generate(batch, generation_config=config) == expected
    assert len(expected) == 4
    single = plain.model.generate(batch, generation_config=config, num_return_sequences=1)
    assert single == expected[::2]
    assert [len(answer) for answer in plain.model.generate(batch, eos_token_id=None)] == [32, 32]


def test_text_is_of_the_same_tokens(plain: Case) -> None:
    many = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    batch = plain.batch()
    assert plain.model.answer(batch, **many) == [
        plain.model.chat.decode(ids) for ids in plain.model.generate(batch, **many)
    ]
    with pytest.raises(UserError, match="call generate for what return_dict_in_generate gives"):
        plain.model.answer(batch, return_dict_in_generate=True)


@pytest.mark.parametrize(
    ("decoding", "sentence"),
    [
        ({"max_new_token": 3}, "generate takes no argument 'max_new_token': did you mean 'max_new_tokens'?"),
        ({"input_ids": torch.zeros(2, 3)}, "generate takes no argument 'input_ids'"),
        ({"generation_config": {"num_beams": 2}}, "must be a transformers.GenerationConfig, not dict"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
        ({"max_new_tokens": 2.5}, "not 2.5"),
        ({"min_new_tokens": "3"}, "min_new_tokens must be a whole number of at least 0, not '3'"),
        ({"encoder_repetition_penalty": 1.5}, "ConcatFusion puts visual tokens into the sequence"),
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1, not 0"),
        ({"num_return_sequences": -1}, "num_return_sequences must be"),
        ({"min_new_tokens": 9}, "cannot have at most max_new_tokens=5: raise the one or lower the other"),
        ({"max_new_tokens": 400}, "beyond the positions of the language model"),
        ({"max_length": 50}, "set max_new_tokens instead"),
        ({"min_length": 50}, "set min_new_tokens instead"),
        ({"num_return_sequences": 2}, "Greedy methods"),
        ({"num_beams": 2, "num_return_sequences": 3}, "has to be smaller or equal to `num_beams`"),
        ({"do_sample": True, "temperature": 0.0}, "has to be a strictly positive float"),
        ({"do_sample": True, "top_p": -1.0}, "`top_p` has to be a float"),
        ({"temperature": 0.5}, "you should set `do_sample=True` or unset `temperature`"),
        ({"output_scores": True}, "`return_dict_in_generate` is NOT set"),
        ({"num_beams": 2, "streamer": Streamed()}, "`streamer` cannot be used with beam search"),
        ({"cache_implementation": "sttic"}, "Invalid `cache_implementation`"),
        ({"cache_implementation": "offloaded"}, "needs a GPU"),
        ({"cache_implementation": "paged"}, "without its images"),
        ({"cache_implementation": "quantized"}, "generate: "),
        ({"guidance_scale": 1.5}, "without the images: leave it out"),
        ({"negative_prompt_ids": torch.zeros(2, 3)}, "without the images"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "set output_logits instead"),
        ({"assistant_model": object()}, "set prompt_lookup_num_tokens instead"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "transformers no longer has"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "transformers no longer has"),
        ({"custom_generate": "someone/decoding"}, "knows nothing of the images"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_in_one_sentence(plain: Case, decoding: dict[str, Any], sentence: str) -> None:
    ran = []
    hook = plain.model.language.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UserError) as refused:
        plain.generate(**decoding)
    hook.remove()
    text = str(refused.value)
    assert sentence in text
    assert "\n" not in text
    assert ". " not in text
    assert not ran, "the language model had run"


@pytest.mark.parametrize(
    "decoding",
    [
        {"guidance_scale": 1.0},
        {"num_beam_groups": 1},
        {"diversity_penalty": 0.0},
        {"penalty_alpha": None},
        {"token_healing": False},
        {"cache_implementation": None},
        {"pad_token_id": None},
        {"streamer": None},
        {"encoder_repetition_penalty": 1.0},
    ],
    ids=lambda decoding: next(iter(decoding)),
)
def test_what_asks_for_nothing_is_taken(plain: Case, decoding: dict[str, Any]) -> None:
    assert plain.generate(**decoding) == plain.generate()


def test_a_text_streamer_serves_one_answer(plain: Case) -> None:
    streamer = TextStreamer(plain.model.chat.tokenizer, skip_prompt=True)
    assert len(plain.generate(0, streamer=streamer)) == 1
    for rows, more in (((0, 1), {}), ((0,), {"do_sample": True, "num_return_sequences": 2})):
        with pytest.raises(UserError, match="a TextStreamer serves one answer at a time, and 2 grow"):
            plain.generate(*rows, streamer=streamer, **more)


def test_a_given_cache_is_empty_and_grows(plain: Case) -> None:
    config = plain.model.language.hf.config
    cache = DynamicCache(config=config)
    plain.generate(past_key_values=cache)
    with pytest.raises(UserError, match="tokens already, and each prompt is read from its start"):
        plain.generate(past_key_values=cache)
    with pytest.raises(UserError, match="set cache_implementation=static instead"):
        plain.generate(past_key_values=StaticCache(config=config, max_cache_len=4))
    assert plain.generate(cache_implementation="dynamic") == plain.generate()


def test_only_prompts_that_end_together_are_continued(plain: Case) -> None:
    right = collate(plain.model, PROMPTS, prompt=True)
    packed = replace(plain.batch(0), packed=[[plain.batch(0).spans[0]]])
    for batch in (right, packed):
        with pytest.raises(UserError, match="pad_left=True"):
            plain.model.generate(batch)


def test_an_error_of_ones_own_stays_what_it_is(plain: Case) -> None:
    def mine(ids: Tensor, scores: Tensor) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        plain.generate(logits_processor=[mine])
