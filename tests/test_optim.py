"""The optimizer: Muon and AdamW behind one door, and a checkpoint of it goes on as if nothing had happened."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lavi.optim import MuonAdamW, hidden_matrices, orthogonalised


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def groups(model: nn.Module, *, matrices: str) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "lr": 1e-2, "weight_decay": 0.0, "kind": matrices},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 1e-2, "weight_decay": 0.0, "kind": "adamw"},
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Tensor:
    for step in steps:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_muon_takes_the_steps_of_torch_s_own() -> None:
    """Which iterates in bfloat16: to its precision, a few hundredths of the way gone."""
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in ((4, 9), (9, 4))]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    left = MuonAdamW([{"params": ours, "kind": "muon", **settings}])
    right = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(6):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn(mine.shape, generator=draw)
        left.step()
        right.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        assert (mine - other).norm() < 0.03 * (other - before).norm()


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_orthogonalised_lifts_all_singular_values(shape: tuple[int, int]) -> None:
    """Also small ones: a hundredth of the largest."""
    left, _, right = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False
    )
    values = torch.logspace(0, -2, min(shape))
    found = torch.linalg.svdvals(orthogonalised(left @ values.diag() @ right))
    assert found.min() > 0.6
    assert found.max() < 1.3


def test_without_muon_it_is_adamw() -> None:
    ours, theirs = network(), network()
    left = train(ours, MuonAdamW(groups(ours, matrices="adamw")), range(4))
    right = train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0), range(4))
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_muon_steps_along_an_orthogonal_matrix() -> None:
    """The directions that have a gradient all move about equally far: what tells Muon from AdamW."""
    model = network()
    before = model[0].weight.detach().clone()
    train(model, MuonAdamW(groups(model, matrices="muon")), range(1))
    values = torch.linalg.svdvals(model[0].weight.detach() - before)
    assert values[0] < 2 * values[3]


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_it_goes_on_from_its_state(matrices: str) -> None:
    model = network()
    optimizer = MuonAdamW(groups(model, matrices=matrices))
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, range(3, 6))
    again = network()
    resumed = MuonAdamW(groups(again, matrices=matrices))
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.testing.assert_close(train(again, resumed, range(3, 6)), expected, rtol=0, atol=0)


def test_a_schedule_moves_both_kinds() -> None:
    model = network()
    optimizer = MuonAdamW(groups(model, matrices="muon"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert torch.equal(train(model, optimizer, range(2)), before)
    assert schedule.get_last_lr() == [0.0, 0.0]


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads_are_not_hidden(tied: bool) -> None:
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    language = Qwen2ForCausalLM(Qwen2Config(**settings, **heads, tie_word_embeddings=tied))
    names = {name for name, p in language.named_parameters() if id(p) in hidden_matrices(language)}
    layers = {n for n, p in language.named_parameters() if n.startswith("model.layers") and p.ndim == 2}
    assert names == layers
