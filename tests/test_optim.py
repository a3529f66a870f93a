"""The optimizer: Muon and AdamW behind one door, and a checkpoint of it goes on as if nothing had happened."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lavi.errors import UserError
from lavi.training.optim import MuonAdamW, every_name, hidden_matrices, orthogonalised, parameter_groups, part_of_each


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
    orthogonal = torch.linalg.svdvals(orthogonalised(left @ values.diag() @ right))
    assert orthogonal.min() > 0.6
    assert orthogonal.max() < 1.3


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


class Reader(nn.Module):
    """A model of two parts, one inside the other's name, with a head tied to embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Embedding(6, 4)
        self.body = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        self.body_of_another = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.text.weight


BODY = sorted(f"body.{name}.{kind}" for name in ("first", "second") for kind in ("weight", "bias"))


@pytest.mark.parametrize(
    ("rates", "adapters", "expected"),
    [
        ({"body": 1.0}, (), dict.fromkeys(BODY, "body")),
        ({"body.first": 2.0, "body": 1.0}, (), {n: "body.first" if "first" in n else "body" for n in BODY}),
        ({"body": 1.0, "body.first": None}, (), {n: "body" for n in BODY if "first" not in n}),
        ({"body": None, "body.first.weight": 1.0}, (), {"body.first.weight": "body.first.weight"}),
        ({"head": 1.0}, (), {"text.weight": "head"}),
        ({"head": 1.0, "text": 1.0}, (), {"text.weight": "head"}),
        # where a part holds adapters, it trains these alone, and other parts stay as they are
        (
            {"body": 1.0, "text": 1.0},
            ("body.first.bias",),
            {"body.first.bias": "body", "text.weight": "text"},
        ),
    ],
    ids=str,
)
def test_a_parameter_trains_with_its_most_specific_part(
    rates: dict[str, float | None], adapters: tuple[str, ...], expected: dict[str, str]
) -> None:
    assert part_of_each(Reader(), rates, adapters) == expected


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"body.frist.weight": 1.0}, "names 'body.frist.weight': did you mean 'body.first'"),
        ({"bdoy.first": 1.0}, "did you mean 'body'"),
        ({"body": None}, "names nothing that has parameters to train"),
        ({"head": 1.0, "text": 2.0}, r"'text' and 'head'|'head' and 'text'"),
    ],
    ids=str,
)
def test_rates_that_cannot_be_are_refused(rates: dict[str, float | None], words: str) -> None:
    with pytest.raises(UserError, match=words):
        part_of_each(Reader(), rates)


def test_a_shared_module_is_a_part_by_any_of_its_names() -> None:
    model = Reader()
    model.alias = model.body_of_another
    assert part_of_each(model, {"alias": 1.0}) == {"body_of_another.weight": "alias"}


def test_a_shared_parameter_has_all_its_names() -> None:
    model = Reader()
    names = {tuple(names): parameter for names, parameter in every_name(model)}
    assert set(names) >= {("text.weight", "head.weight"), ("body_of_another.weight",), ("body.first.bias",)}
    assert names["text.weight", "head.weight"] is model.text.weight
    assert len(names) == len(list(model.parameters()))


@pytest.mark.parametrize("muon", [None, 3.0])
def test_groups_are_what_muon_trains_other_matrices_and_vectors_that_never_decay(muon: float | None) -> None:
    model = Reader()
    rates: dict[str, float | None] = {"text": 1.0, "body": 2.0, "body.second": None}
    groups = parameter_groups(model, part_of_each(model, rates), rates, weight_decay=0.1, muon=muon)
    body, text = model.body["first"], model.text
    matrix = ("body/muon", "muon", 6.0) if muon else ("body/matrices", "adamw", 2.0)
    expected = [
        ("text/matrices", "adamw", 1.0, 0.1, text.weight),
        (*matrix, 0.1, body.weight),
        ("body/vectors", "adamw", 2.0, 0.0, body.bias),
    ]
    settings = [(g["name"], g["kind"], g["lr"], g["weight_decay"], *g["params"]) for g in groups]
    assert [group[:4] for group in settings] == [group[:4] for group in expected]
    assert all(mine[4] is other[4] for mine, other in zip(settings, expected, strict=True))


def test_orthogonalised_is_the_nearest_and_as_wide_as_it_was() -> None:
    """Singular vectors stay; of a matrix of any size, none at all included."""
    for shape in ((3, 7), (7, 3)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for scale in (1.0, 1e4, 1e-4):
            orthogonal = orthogonalised(scale * matrix)
            assert orthogonal.shape == matrix.shape
            left, _, right = torch.linalg.svd(matrix, full_matrices=False)
            core = left.T @ orthogonal @ right.T
            torch.testing.assert_close(core, core.diag().diag(), atol=1e-4, rtol=1e-4)
            assert core.diag().min() > 0.6
    assert (orthogonalised(torch.zeros(2, 3)) == 0).all()


def test_what_has_no_gradient_stays_and_a_closure_gives_the_loss() -> None:
    matrices = [nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    matrices[0].grad = torch.ones(2, 3)
    optimizer = MuonAdamW([{"params": matrices, "kind": "muon", "lr": 0.1, "weight_decay": 0.5}])

    def closure() -> float:
        assert torch.is_grad_enabled()
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert (matrices[1] == 1).all()
    assert not torch.equal(matrices[0], torch.ones(2, 3))
    assert optimizer.step() is None
