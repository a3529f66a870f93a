"""What one token attends to in one layer, against attention written out key by key."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lavi.language.ranking import Ranking

AT = torch.tensor([4, 2])
COLUMNS = torch.tensor([[0, 3, 4, 9, 10, 11], [1, 2, 7, 8, 9, 10]])
VALID = torch.tensor([[True, True, True, True, True, True], [False, True, True, True, True, True]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("valid", [None, VALID], ids=["whole", "padded"])
@pytest.mark.parametrize("window", [None, 7, 2])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_shares_are_those_of_one_query(
    valid: Tensor | None, window: int | None, softcap: float | None, scaling: float | None
) -> None:
    """Means over heads, of which two share a key; of keys before it, in its window of columns, that are no padding."""
    query, key = draw(2, 4, 6, 8), draw(2, 2, 6, 8, seed=1)
    ranking = Ranking("sdpa", at=AT, columns=COLUMNS, valid=valid)
    ranking.record_scores(
        query.requires_grad_(), key, scaling=scaling, softcap=softcap, sliding_window=window, dropout=0.0
    )
    shares_of_keys = ranking.scores
    assert shares_of_keys is not None
    assert not shares_of_keys.requires_grad
    for row in range(2):
        asking = int(AT[row])
        seen = [
            j
            for j in range(asking + 1)
            if (valid is None or valid[row, j]) and (window is None or COLUMNS[row, asking] - COLUMNS[row, j] < window)
        ]
        shares = torch.zeros(6)
        for head in range(4):
            scores = torch.stack([query[row, head, asking] @ key[row, head // 2, j] for j in seen]).detach()
            scores = scores * (scaling or 1 / math.sqrt(8))
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            shares[seen] += scores.softmax(-1) / 4
        torch.testing.assert_close(shares_of_keys[row], shares)


def test_shares_are_computed_in_fp32() -> None:
    ranking = Ranking("sdpa", at=AT, columns=COLUMNS, valid=None)
    ranking.record_scores(draw(2, 4, 6, 8).bfloat16(), draw(2, 2, 6, 8, seed=1).bfloat16())
    assert ranking.scores is not None
    assert ranking.scores.dtype == torch.float32
    torch.testing.assert_close(ranking.scores.sum(1), torch.ones(2))
