"""The scores of trained tokens: those of all logits, without computing all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import train_step
from conftest import FAMILIES, HYBRIDS, LOOKING_UP, ask, awaken, collate, small, summed_loss
from torch import Tensor, nn

from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.language.lora import LoRA, add_lora
from lavi.language.token_scores import score_tokens, scores_of
from lavi.metrics.teacher_forcing import answer_probabilities
from lavi.model import VisionLanguageModel
from lavi.training.module import VisionLanguageModule

SAMPLES = [
    ask(1, "what?", answer="red"),
    ask("which image?", answer="the first of the two images"),
    ask(2, "how many?", 3, answer="two"),
]
FUSIONS: dict[str, Callable[[], Fusion]] = {
    "concat": ConcatFusion,
    "lavi": lambda: LaViFusion(every=2, generator=small()),
    "cross-attention": lambda: CrossAttentionFusion(every=2),
}


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS, *LOOKING_UP])
def test_the_head_alone_gives_the_familys_own_logits(build: Any, family: str) -> None:
    """Scaled and capped as the family does it."""
    model = build(FUSIONS["lavi"](), family=family)
    awaken(model.fusion)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        inputs = model._arranged(batch)
        expected, hidden = model.language(inputs), model.language.hidden(inputs)
        said = model.language.head(hidden.flatten(0, 1)).view_as(expected)
    torch.testing.assert_close(said[batch.attention_mask], expected[batch.attention_mask], atol=1e-6, rtol=1e-5)


def awaken_adapters(language: LanguageModel) -> None:
    """Adapters with random numbers."""
    names = add_lora(language.hf, language.layers, LoRA(rank=2, alpha=4))
    language.adapters = frozenset(f"hf.{name}" for name in names)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in sorted(names):
            parameter = language.hf.get_parameter(name)
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("most_logits", [2**26, 1], ids=["at once", "one token at a time"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", FUSIONS)
def test_losses_and_gradients_are_those_of_all_logits(
    build: Any, name: str, lora: bool, tied: bool, most_logits: int
) -> None:
    def gradients(loss: Callable[[VisionLanguageModel], Tensor]) -> tuple[float, dict[str, Tensor]]:
        model = build(FUSIONS[name](), tie_word_embeddings=tied)
        awaken(model.fusion)
        if lora:
            awaken_adapters(model.language)
        VisionLanguageModule(model, learning_rate={"fusion": 1e-3, "language": 1e-3})
        value = loss(model)
        value.backward()
        return float(value), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def in_chunks(model: VisionLanguageModel) -> Tensor:
        batch = collate(model, SAMPLES)
        return model.language.token_scores(model._arranged(batch), batch.labels, most_logits=most_logits).loss

    def by_all_logits(model: VisionLanguageModel) -> Tensor:
        batch = collate(model, SAMPLES)
        return summed_loss(model(batch), batch.labels)[0]

    loss, of_each = gradients(in_chunks)
    expected, of_each_expected = gradients(by_all_logits)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert of_each.keys() == of_each_expected.keys()
    for parameter, gradient in of_each_expected.items():
        torch.testing.assert_close(of_each[parameter], gradient, atol=1e-6, rtol=1e-4)


def test_no_more_logits_than_a_chunk_are_kept() -> None:
    """Not for the backward pass either, in which they are computed anew."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(4, 50), torch.randn(2, 9, 4, requires_grad=True)
    labels = torch.randint(50, (2, 9))  # 16 are trained: a row's first token is not
    sizes: list[int] = []
    kept: list[int] = []

    def counted(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return head(states)

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape[-1] if tensor.ndim == 2 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = score_tokens(counted, hidden, labels, chunk=5)
    assert sizes == [5, 5, 5, 1]
    assert 50 not in kept
    scores.loss.backward()
    assert sorted(sizes) == [1, 1, 5, 5, 5, 5, 5, 5]
    assert torch.equal(scores.is_likeliest, scores_of(head(hidden), labels).is_likeliest)


def test_only_trained_tokens_get_logits(build: Any) -> None:
    model = build(ConcatFusion())
    batch = collate(model, SAMPLES)
    computed: list[int] = []
    head = model.language.hf.lm_head
    head.register_forward_hook(lambda module, args, output: computed.append(output.shape[:-1].numel()))
    scores = model.token_scores(batch)
    trained = int((batch.labels[:, 1:] != -100).sum())
    assert computed == [trained] == [int(scores.tokens)]


def test_a_batch_without_labels_has_a_loss_of_zero_that_goes_back(build: Any) -> None:
    model = build(ConcatFusion())
    batch = collate(model, SAMPLES)
    batch.labels = torch.full_like(batch.labels, -100)
    scores = model.token_scores(batch)
    scores.loss.backward()
    assert (float(scores.loss), int(scores.tokens)) == (0.0, 0)


def test_the_probability_of_an_answer_is_that_of_all_its_tokens(build: Any) -> None:
    model = build(ConcatFusion())
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        said, logits = answer_probabilities(model.token_scores(batch), batch), model(batch)
    expected = []
    for row, start, stop, *_ in batch.answers:
        tokens = logits[row, start - 1 : stop - 1].softmax(-1)
        expected.append(float(tokens.gather(1, batch.labels[row, start:stop, None]).prod()))
    assert said == pytest.approx(expected, rel=1e-4)


def test_the_benchmark_measures_both_ways() -> None:
    records = train_step.measure(torch.device("cpu"), vocabulary=1000, width=16, turns=1)
    assert [record["peak_ratio"] for record in records] == [1.0, pytest.approx(0.25, abs=0.1)]
    columns, rows = train_step.train_step_table(records)
    assert [len(row) for row in rows] == [len(columns)] * 2
