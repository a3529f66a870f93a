"""Layers that work on a part of the sequence: what each token may attend to, column by column, and what is cached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, Qwen2Config

from lavi.errors import UserError
from lavi.language.subsequence import (
    ArrangedCall,
    AttentionKind,
    LayeredCache,
    causal_mask,
    rows_only,
    take,
    window_of,
)

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
PLAIN = Qwen2Config(**SIZES, num_key_value_heads=2)
WINDOWED = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
SIX = torch.arange(6).expand(2, 6)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def test_a_column_is_taken_from_each_row_and_one_behind_the_end_is_the_last() -> None:
    columns = torch.tensor([[0, 2, 3], [4, 1, 9]])
    for tensor in (draw(2, 5), draw(2, 5, 3), draw(1, 5, 3, 2)):
        result = take(tensor, columns)
        assert result.shape == (2, 3, *tensor.shape[2:])
        for row in range(2):
            for index, column in enumerate(columns[row].clamp(max=4)):
                assert torch.equal(result[row, index], tensor[row % len(tensor), column])


def allowed(
    queries: list[int], keys: list[int], valid: list[bool] | None, window: int | None, *, itself: bool
) -> list[list[bool]]:
    """Which of the keys each query may attend to, by definition; padding attends to ``itself``."""
    return [
        [
            (k <= q and (window is None or q - k < window) and (valid is None or valid[j])) or (itself and k == q)
            for j, k in enumerate(keys)
        ]
        for q in queries
    ]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_allows_what_comes_before_in_the_window_and_is_no_padding(window: int | None, padded: bool) -> None:
    queries, keys = torch.tensor([[2, 5, 6], [0, 1, 7]]), torch.tensor([[0, 2, 5, 6], [0, 1, 3, 7]])
    valid = torch.tensor([[True, True, False, True], [False, True, True, True]]) if padded else None
    for q, k, v in ((queries, keys, valid), (queries, queries, None if valid is None else valid[:, :3])):
        result = causal_mask(q, k, v, window=window, kernel="sdpa", dtype=torch.float32)
        assert result is not None
        assert result.shape == (2, 1, *q.shape[1:], k.shape[1])
        for row in range(2):
            expected = allowed(
                q[row].tolist(), k[row].tolist(), None if v is None else v[row].tolist(), window, itself=q is k
            )
            assert result[row, 0].tolist() == expected
        eager = causal_mask(q, k, v, window=window, kernel="eager", dtype=torch.bfloat16)
        assert eager is not None
        assert eager.dtype == torch.bfloat16
        assert torch.equal(eager == 0, result)
        assert (eager[~result] == torch.finfo(torch.bfloat16).min).all()
        assert causal_mask(q, k, v, window=window, kernel="flash_attention_2", dtype=torch.float32) is v


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "attention_mask": "the stack's",
        "position_ids": torch.arange(6)[None],
        "position_embeddings": (draw(1, 6, 4), draw(2, 6, 4)),
        "past_key_values": "a cache",
    } | changes


def call_of(length: int, past: int, new_tokens: int) -> ArrangedCall:
    return ArrangedCall(length=length, past=past, new_tokens=new_tokens)


def kwargs_of(
    columns: Tensor, valid: Tensor | None, call: ArrangedCall, *, config: Any = PLAIN, kernel: str = "sdpa"
) -> Any:
    attention = AttentionKind.of(kernel, config)
    return call.layer_kwargs(arguments(), columns, valid, attention=attention, layer=1, dtype=torch.float32)


def test_a_prompt_s_columns_keep_their_positions() -> None:
    columns = torch.tensor([[0, 2, 3], [1, 4, 5]])
    result = kwargs_of(columns, None, call_of(6, 0, 6))
    assert result["past_key_values"] == "a cache"
    assert result["position_ids"].tolist() == columns.tolist()
    cos, sin = arguments()["position_embeddings"]
    for row in range(2):
        assert torch.equal(result["position_embeddings"][0][row], cos[0, columns[row]])
        assert torch.equal(result["position_embeddings"][1][row], sin[row, columns[row]])
    assert result["attention_mask"] is None  # plain causal attention: the kernel's own
    bare = arguments(position_ids=None, position_embeddings=None)
    attention = AttentionKind.of("sdpa", PLAIN)
    without = call_of(6, 0, 6).layer_kwargs(bare, columns, None, attention=attention, layer=0, dtype=torch.float32)
    assert without["position_ids"] is without["position_embeddings"] is None


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [PLAIN, WINDOWED], ids=["plain", "windowed"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("past", "now"), [(0, 6), (6, 1), (6, 3), (8, 1), (8, 2), (3, 1)])
def test_each_new_token_attends_to_the_kept_columns_before_it(
    kernel: str, config: Any, padded: bool, past: int, now: int
) -> None:
    """Against the definition, in columns of the whole sequence; no mask is one that allows all."""
    span = call_of(min(6, past or 6), past, now)
    kept = torch.tensor([[0, 1, 2], [0, 1, 2]]) if span.length == 3 else torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])
    valid = torch.ones_like(kept, dtype=torch.bool)
    valid[0, 0] = False
    result = kwargs_of(kept, valid if padded else None, span, config=config, kernel=kernel)["attention_mask"]
    behind = list(range(span.length, past + now)) if past else []
    window = 4 if config is WINDOWED and past + now > 4 else None
    for row in range(2):
        keys = kept[row].tolist() + behind
        good = valid[row].tolist() + [True] * len(behind)
        queries = behind[-now:] if past else keys
        if window is not None and past:
            keys, good = keys[-(window - 1 + now) :], good[-(window - 1 + now) :]
        expected = allowed(queries, keys, good if padded else None, window, itself=not past)
        if result is None:
            causal = allowed(queries, keys, None, None, itself=False)
            assert expected == causal
            assert now == 1 or (not past and kernel == "sdpa")
        else:
            seen = result[row, 0] if result.dtype == torch.bool else result[row, 0] == 0
            assert seen.tolist() == expected


def test_only_what_needs_a_mask_gets_one() -> None:
    """Kernels are faster without."""
    columns = torch.tensor([[0, 2, 3, 5]] * 2)
    for config, window in ((PLAIN, False), (WINDOWED, True)):
        assert (kwargs_of(columns, None, call_of(6, 0, 6), config=config)["attention_mask"] is None) == (not window)
        assert (kwargs_of(columns, None, call_of(6, 6, 1), config=config)["attention_mask"] is None) == (not window)
        assert (
            kwargs_of(columns, None, call_of(6, 6, 1), config=config, kernel="eager")["attention_mask"] is None
            or window
        )
    assert kwargs_of(torch.tensor([[0, 1, 3]] * 2), None, call_of(4, 0, 4), config=WINDOWED)["attention_mask"] is None
    assert kwargs_of(columns, None, call_of(6, 6, 2))["attention_mask"] is not None


def test_positions_that_are_a_bias_are_refused() -> None:
    with pytest.raises(UserError, match="ALiBi"):
        call_of(6, 0, 6).layer_kwargs(
            {"alibi": torch.zeros(1)},
            SIX,
            None,
            attention=AttentionKind.of("sdpa", PLAIN),
            layer=0,
            dtype=torch.float32,
        )


def test_parts_of_a_sequence_are_joined_at_their_columns() -> None:
    """Also where a call reads on behind its prompt; the prompt's length as a column is padding."""
    call, cached = call_of(4, 0, 6), call_of(4, 4, 1)
    columns = torch.tensor([[0, 3], [1, 4]])
    assert call.columns(columns).tolist() == [[0, 3, 4, 5], [1, 6, 4, 5]]
    assert cached.columns(columns) is columns
    assert call.valid(None) is None
    valid = torch.tensor([[True, False], [True, True]])
    assert call.valid(valid).tolist() == [[True, False, True, True], [True, True, True, True]]  # type: ignore[union-attr]
    assert cached.valid(valid) is valid
    text, visual = draw(2, 4, 3), draw(2, 1, 3)
    joined = call.join((text, call.columns(columns)), (visual, call.with_padding(torch.tensor([[2], [4]]))))
    assert joined.shape == (2, 6, 3)
    for row, (of_text, of_visual) in enumerate([({0: 0, 3: 1, 4: 2, 5: 3}, {2: 0}), ({1: 0, 4: 2, 5: 3}, {})]):
        for column in range(6):
            expected = text[row, of_text[column]] if column in of_text else torch.zeros(3)
            expected = visual[row, of_visual[column]] if column in of_visual else expected
            assert torch.equal(joined[row, column], expected)
    assert torch.equal(call.join((text, SIX[:, :4]))[:, :4], text)  # a single part


def test_kernels_whose_masks_are_not_made_here_are_refused() -> None:
    for kernel in ("sdpa", "eager", "flash_attention_2"):
        AttentionKind.of(kernel, PLAIN).check("x")
    for kernel in ("sdpa", "eager"):
        AttentionKind.of(kernel, WINDOWED).check("x")
    with pytest.raises(UserError, match="in a model with sliding windows needs"):
        AttentionKind.of("flash_attention_2", WINDOWED).check("pruning")
    with pytest.raises(UserError, match=r"works with the attention kernels sdpa, eager, .*not 'flex'"):
        AttentionKind.of("flex", PLAIN).check("pruning")


def test_rows_of_a_batch_take_their_part_of_what_is_per_row() -> None:
    rows = torch.tensor([2, 0])
    mask, one, flat = draw(3, 1, 4, 4), draw(1, 4), torch.arange(4)
    kwargs = {"attention_mask": mask, "position_ids": one, "position_embeddings": (draw(3, 4, 2), one), "other": flat}
    result = rows_only(kwargs, rows)
    assert torch.equal(result["attention_mask"], mask[rows])
    assert result["position_ids"] is one
    assert torch.equal(result["position_embeddings"][0], kwargs["position_embeddings"][0][rows])
    assert result["position_embeddings"][1] is one
    assert result["other"] is flat
    assert rows_only({"attention_mask": None, "position_ids": flat}, rows) == {
        "attention_mask": None,
        "position_ids": flat,
    }


def filled(config: Any, rows: int, tokens: int) -> LayeredCache:
    cache = LayeredCache(config)
    cache.arranged = tokens
    for layer in range(2):
        cache.update(draw(rows, 2, tokens, 4) + layer, draw(rows, 2, tokens, 4) - layer, layer)
    return cache


def test_to_the_stack_a_cache_is_as_long_as_the_arranged_sequence() -> None:
    cache = filled(PLAIN, 2, 3)
    cache.arranged = 10
    assert cache.get_seq_length() == cache.get_seq_length(1) == 10
    assert cache.get_mask_sizes(2, 0) == (12, 0)
    windowed = LayeredCache(WINDOWED)
    assert window_of(windowed, 0) == 4
    assert window_of(cache, 0) is None
    windowed.arranged = 10
    assert windowed.get_mask_sizes(2, 1) == (5, 7)
    windowed.arranged = 2
    assert windowed.get_mask_sizes(2, 1) == (4, 0)


def test_beams_move_with_all_that_is_kept_of_them() -> None:
    """Of six beams of two prompts that went different ways: rows 0, 1, 2 and rows 3, 4, 5."""
    cache = filled(PLAIN, 6, 3)
    cache.cross = {1: (draw(6, 2, 5, 4), draw(6, 1))}
    cache.part([torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])])
    for _, group in cache.groups:
        group.arranged = 3
        group.update(draw(3, 2, 3, 4), draw(3, 2, 3, 4), 1)
        group.cross = {0: (draw(3, 2),)}
    assert [len(kept) for kept in (cache.cached_tensors(), cache.keys_values())] == [4, 8]
    before = [kept.clone() for kept in (*cache.keys_values(), *cache.cached_tensors())]
    order = torch.tensor([2, 0, 0, 3, 5, 4])
    cache.reorder_cache(order)
    inside = (order[:3], order[3:] - 3)
    orders = [order] * 4 + [inside[0]] * 2 + [inside[1]] * 2 + [order] * 2 + list(inside)
    for was, now, moved in zip(before, (*cache.keys_values(), *cache.cached_tensors()), orders, strict=True):
        assert torch.equal(now, was[moved])


def test_what_is_taken_back_leaves_every_cache() -> None:
    cache = filled(PLAIN, 2, 5)
    cache.part([torch.tensor([0]), torch.tensor([1])])
    for _, group in cache.groups:
        group.arranged = 5
        group.update(draw(1, 2, 5, 4), draw(1, 2, 5, 4), 1)
    before = [kept.clone() for kept in cache.keys_values()]
    cache.crop(-2)
    assert cache.arranged == 3
    assert [group.arranged for _, group in cache.groups] == [3, 3]
    for was, now in zip(before, cache.keys_values(), strict=True):
        assert torch.equal(now, was[:, :, :3])


def test_parts_of_several_precisions_are_joined_in_the_widest() -> None:
    """As under autocast, where a hidden state that waits is still in the precision that it came in."""
    half, whole = torch.ones(1, 1, 2, dtype=torch.float16), torch.full((1, 2, 2), 1 + 2**-20)
    for parts in (((half, [[0]]), (whole, [[1, 2]])), ((whole, [[1, 2]]), (half, [[0]]))):
        joined = call_of(3, 0, 3).join(*((part, torch.tensor(columns)) for part, columns in parts))
        assert torch.equal(joined, torch.tensor([[[1.0] * 2, [1 + 2**-20] * 2, [1 + 2**-20] * 2]]))
