"""The cross-entropy by a kernel: where it may serve, and that losses and gradients stay those of plain code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ask, awaken, collate, small
from processes import run_in_triton_s_interpreter
from torch import Tensor, nn

from lavi.fusion.lavi import LaViFusion
from lavi.language import fused_cross_entropy
from lavi.language.fused_cross_entropy import is_plain_linear
from lavi.language.token_scores import score_tokens

SAMPLES = [ask(1, "what?", answer="red"), ask(2, "how many?", 3, answer="two")]

CHECK = """
import torch
from torch import nn
from lavi.language import fused_cross_entropy
from lavi.language.token_scores import score_tokens

def compare(dtype, places, bias, frozen):
    head = nn.Linear(24, 301, bias=bias).to(dtype).requires_grad_(not frozen)
    hidden = torch.randn(2, 9, 24).to(dtype).requires_grad_()
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    labels = torch.randint(301, (2, 9))
    labels[0, :5] = -100
    drawn = torch.get_rng_state()
    assert fused_cross_entropy.runs_kernel(hidden)
    assert torch.equal(torch.get_rng_state(), drawn)
    found, likeliest = [], []
    for way in (head, lambda states: head(states)):  # the layer itself goes to the kernel
        scores = score_tokens(way, hidden, labels, chunk=4)
        assert ("Liger" in str(scores.log_probability.grad_fn.next_functions)) == (way is head)
        weighted = (scores.log_probability * torch.linspace(-1, 1, len(scores.positions))).sum()
        of_weighted = torch.autograd.grad(weighted, wanted, retain_graph=True)
        found.append([scores.log_probability, *of_weighted, *torch.autograd.grad(scores.loss, wanted)])
        likeliest.append(scores.is_likeliest)
    assert torch.equal(*likeliest)
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=places, atol=places * float(plain.abs().max()))

with torch.inference_mode():  # a validation may be the first to ask
    for dtype in (torch.float32, torch.bfloat16):
        assert fused_cross_entropy.runs_kernel(torch.randn(1, 24, dtype=dtype))
torch.manual_seed(0)
for bias in (True, False):
    for frozen in (True, False):
        compare(torch.float32, 1e-5, bias, frozen)
        compare(torch.bfloat16, 4e-2, bias, frozen)
        with torch.autocast("cpu", torch.bfloat16):
            compare(torch.float32, 4e-2, bias, frozen)
"""


@pytest.mark.skipif(not fused_cross_entropy.IS_INSTALLED, reason="Liger's kernels are not installed")
def test_losses_and_gradients_by_the_kernel_in_triton_s_interpreter() -> None:
    run_in_triton_s_interpreter(CHECK)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if a kernel ran here: how many tokens it was asked for, call by call; plain code answers."""
    numbers: list[int] = []

    def fused_scores(head: nn.Linear, hidden: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        numbers.append(len(truth))
        logits = head(hidden)
        return -nn.functional.cross_entropy(logits, truth, reduction="none"), logits.argmax(-1) == truth

    monkeypatch.setattr(fused_cross_entropy, "runs_kernel", lambda hidden: True)
    monkeypatch.setattr(fused_cross_entropy, "fused_scores", fused_scores)
    return numbers


@pytest.mark.parametrize(
    ("family", "settings", "served"),
    [
        ("qwen2", {}, True),
        ("gemma2", {"final_logit_softcapping": 3.0}, False),
        ("granite", {"logits_scaling": 2}, False),
    ],
)
def test_heads_that_scale_or_cap_stay_with_plain_code(
    build: Any, asked: list[int], family: str, settings: dict[str, Any], served: bool
) -> None:
    model = build(LaViFusion(every=2, generator=small()), family=family, **settings)
    awaken(model.fusion)
    batch = collate(model, SAMPLES)
    tokens = int((batch.labels[:, 1:] != -100).sum())
    drawn = torch.get_rng_state()
    with torch.no_grad():
        expected = model.token_scores(batch)
    assert asked == []  # nothing would be computed anew in a backward pass
    model.requires_grad_()
    scores = model.language.token_scores(model._arranged(batch), batch.labels, most_logits=1)
    assert asked == [tokens] * served
    assert torch.equal(torch.get_rng_state(), drawn)  # a training draws what it would draw without the kernel
    torch.testing.assert_close(scores.log_probability, expected.log_probability, rtol=1e-5, atol=1e-5)


def test_only_a_bare_linear_layer_is_served() -> None:
    head = nn.Linear(4, 9)
    assert is_plain_linear(head)
    assert not is_plain_linear(nn.Sequential(head))
    assert not is_plain_linear(None)
    hook = head.register_forward_hook(lambda module, args, output: output * 2)
    assert not is_plain_linear(head)
    hook.remove()
    nn.utils.parametrizations.weight_norm(head)
    assert not is_plain_linear(head)


@pytest.mark.parametrize("fault", ["other gradients", "an error"])
def test_a_kernel_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def fused_scores(head: nn.Linear, hidden: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        if fault == "an error":
            raise RuntimeError("no kernel image")
        logits = head(hidden.detach() + 1e-30 * hidden)  # the right losses
        return -nn.functional.cross_entropy(logits, truth, reduction="none"), logits.argmax(-1) == truth

    monkeypatch.setattr(fused_cross_entropy, "fused_scores", fused_scores)
    fused_cross_entropy._is_equal.cache_clear()
    with pytest.warns(UserWarning, match="plain code is used"):
        assert not fused_cross_entropy._is_equal("cpu", torch.float32)
    fused_cross_entropy._is_equal.cache_clear()


def test_few_tokens_are_scored_at_once_by_plain_code(asked: list[int]) -> None:
    """Their logits are kept: a kernel would compute them twice."""
    head, hidden = nn.Linear(4, 50), torch.randn(2, 9, 4, requires_grad=True)
    labels = torch.randint(50, (2, 9))
    score_tokens(head, hidden, labels, chunk=16)
    assert asked == []
    score_tokens(head, hidden, labels, chunk=15)
    assert asked == [16]
