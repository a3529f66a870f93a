"""Which visual token belongs where: rows, columns, conversations, tiles and layers, on small batches by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import awaken, small

from lavi.batch import Answer, Batch, ImageSlot, Layout
from lavi.errors import UserError
from lavi.fusion.arrangement import (
    ColumnContext,
    Rows,
    conversation_ids,
    grid_code_of,
    group_tokens_by_row,
    last_prompt_columns,
    splice,
    splice_tokens,
    text_conversation_ids,
    text_only_input,
    view_indices,
    view_windows,
)
from lavi.fusion.base import Cost, Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.layers import chosen_layers, spread_layers
from lavi.fusion.pruning import PruningFusion
from lavi.nn.delta_generators import AttentionDeltas, ConvDeltas, MLPDeltas
from lavi.nn.formulas import modulation_flops
from lavi.nn.grid_code import GridCode
from lavi.visor.fusion import VisorFusion


def batch_of(
    spans: list[tuple[int, int]],
    image_slots: list[ImageSlot],
    *,
    width: int = 6,
    packed: list[list[tuple[int, int]]] | None = None,
    answers: list[Answer] | None = None,
) -> Batch:
    """A batch whose ids count its tokens, row after row."""
    ids = torch.arange(len(spans) * width).reshape(len(spans), width)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = True
    return Batch(ids, ids, mask, torch.zeros(0), spans, image_slots, answers or [], packed=packed)


TILED = Layout(views=5, tiles=(2, 2))
FILM = Layout(views=3, video=True)
PLACES = [ImageSlot(0, 1), ImageSlot(2, 0), ImageSlot(0, 4), ImageSlot(2, 3)]
RIGHT = batch_of([(0, 6), (0, 4), (0, 5)], PLACES)
LEFT = batch_of([(0, 6), (2, 6), (1, 6)], [PLACES[0], ImageSlot(2, 1), PLACES[2], ImageSlot(2, 4)])
PACKED = batch_of([(0, 6), (0, 4), (0, 5)], PLACES, packed=[[(0, 3), (3, 6)], [(0, 4)], [(0, 3), (3, 5)]])


def test_each_row_has_the_tokens_of_its_own_images() -> None:
    rows = group_tokens_by_row(RIGHT, [2, 1, 3, 2])
    assert rows.index.tolist() == [[0, 1, 3, 4, 5], [8, 8, 8, 8, 8], [2, 6, 7, 8, 8]]
    never = Rows.NEVER
    assert rows.column.tolist() == [[1, 1, 4, 4, 4], [never] * 5, [0, 3, 3, never, never]]
    assert rows.image[0].tolist() == [0, 0, 1, 1, 1]
    assert rows.image[2, :3].tolist() == [0, 1, 1]
    tokens = torch.arange(1.0, 17).reshape(8, 1, 2)
    gathered = rows.gather(tokens)
    assert gathered.shape == (3, 5, 2)
    assert gathered[0].tolist() == tokens[[0, 1, 3, 4, 5], 0].tolist()
    assert gathered[2].tolist() == [*tokens[[2, 6, 7], 0].tolist(), [0, 0], [0, 0]]
    moved = rows.to(torch.device("meta"))
    assert [part.device.type for part in (moved.index, moved.column, moved.image)] == ["meta"] * 3
    nothing = group_tokens_by_row(RIGHT.without_images(), [])
    assert nothing.index.tolist() == [[0], [0], [0]]
    assert nothing.gather(torch.zeros(0, 4)).shape == (3, 1, 4)


def test_a_token_sees_the_images_before_it_in_its_conversation() -> None:
    visual = {"1": torch.arange(30.0).reshape(3, 5, 2), "3": torch.ones(3, 5, 2)}
    rows = group_tokens_by_row(RIGHT, [2, 1, 3, 2])
    context = ColumnContext(visual=visual, column=rows.column)
    assert [tensor is visual[key] for tensor, key in zip(context.cached_tensors(), "13", strict=True)] == [True, True]
    for past, length in ((0, 6), (4, 2), (6, 1)):
        mask = context.for_step(past, length).mask
        assert mask is not None
        for row in range(3):
            for token in range(length):
                expected = [int(before) <= past + token for before in rows.column[row]]
                assert mask[row, token].tolist() == expected
    packed = text_only_input(PACKED, ColumnContext(visual=visual, column=rows.column))
    apart = packed.vision.for_step(0, 6).mask  # type: ignore[union-attr]
    assert apart[0].tolist() == [
        [False] * 5,
        [True, True, False, False, False],
        [True, True, False, False, False],
        [False] * 5,
        [False, False, True, True, True],
        [False, False, True, True, True],
    ]
    assert apart[2, 2].tolist() == [True, False, False, False, False]
    assert apart[2, 3].tolist() == [False, True, True, False, False]
    copied = packed.vision.for_generation(2)
    assert torch.equal(copied.column, rows.column[[0, 0, 1, 1, 2, 2]])  # type: ignore[attr-defined]
    assert torch.equal(copied.visual["1"], visual["1"][[0, 0, 1, 1, 2, 2]])  # type: ignore[attr-defined]
    assert copied.text_columns is None


def test_text_alone_is_the_text_as_it_is() -> None:
    context = ColumnContext(visual={}, column=group_tokens_by_row(RIGHT, [2, 1, 3, 2]).column)
    plain = text_only_input(RIGHT, context)
    assert plain.input_ids is RIGHT.input_ids
    assert plain.attention_mask is RIGHT.attention_mask
    assert plain.conversation is context.start is None
    assert plain.vision is context
    packed = text_only_input(PACKED, context)
    assert packed.conversation is not None
    assert packed.conversation.tolist() == text_conversation_ids(PACKED).tolist()
    assert text_conversation_ids(PACKED).tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1], [0, 0, 0, 1, 1, -1]]
    assert text_conversation_ids(LEFT).tolist() == [[0] * 6, [-1, -1, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0]]


def test_views_are_numbered_in_their_conversation() -> None:
    slots = [ImageSlot(0, 1, TILED), ImageSlot(0, 2, FILM), ImageSlot(0, 4), ImageSlot(1, 0)]
    batch = batch_of([(0, 6), (0, 6)], slots, packed=[[(0, 3), (3, 6)], [(0, 6)]])
    tiles = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 2, 0], [0, 2, 1, 0], [0, 2, 2, 0]]
    frames = [[1, 0, 0, 1], [1, 0, 0, 2], [1, 0, 0, 3]]
    result = view_indices(batch, torch.device("cpu"))
    assert result.tolist() == [*tiles, *frames, [0, 0, 0, 0], [0, 0, 0, 0]]
    batch.packed = None
    assert view_indices(batch, torch.device("cpu"))[8].tolist() == [2, 0, 0, 0]
    nothing = view_indices(batch.without_images(), torch.device("cpu"))
    assert nothing.shape == (0, 4)
    assert nothing.dtype == torch.long


def test_tiles_lie_where_their_image_stands_in_its_canvas() -> None:
    """A view is all of its image; tiles of 2 x 2 views hold an image twice as wide as high with a quarter above it."""
    wide = Layout(views=5, tiles=(2, 2), size=(50, 100))
    high = Layout(views=3, tiles=(1, 2), size=(100, 50))  # on a canvas twice as wide as high
    slots = [ImageSlot(0, 1, wide), ImageSlot(0, 2, FILM), ImageSlot(0, 4, high), ImageSlot(1, 0, TILED)]
    batch = batch_of([(0, 6), (0, 6)], slots)
    windows = view_windows(batch, (4, 4), torch.device("cpu")).tolist()
    whole = [0, 0, 1, 1]
    quarters = [[-0.5, 0, 1, 0.5], [-0.5, 0.5, 1, 0.5], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 0.5]]
    assert windows[:5] == [whole, *quarters]
    assert windows[5:8] == [whole] * 3
    assert windows[8:11] == [whole, [0, -1.5, 1, 2], [0, 0.5, 1, 2]]
    halves = [[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 0.5], [0.5, 0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
    assert windows[11:] == [whole, *halves]  # of a size that is not known: it fills them
    stretched = batch_of([(0, 6)], [ImageSlot(0, 1, wide._replace(stretched=True))])
    assert view_windows(stretched, (4, 4), torch.device("cpu")).tolist() == [whole, *halves]
    tall = view_windows(batch_of([(0, 6)], [ImageSlot(0, 1, wide)]), (4, 2), torch.device("cpu"))
    assert tall[1].tolist() == [-1.5, 0, 2, 0.5]  # views twice as high as wide
    assert view_windows(batch.without_images(), (4, 4), torch.device("cpu")).shape == (0, 4)


def test_a_token_has_one_code_wherever_it_is_seen() -> None:
    """In the whole image and in a tile of it; a class token has none."""
    batch = batch_of([(0, 6)], [ImageSlot(0, 1, TILED)])
    code = GridCode(24)
    fine = grid_code_of(code, batch, torch.zeros(5, 36, 24), (6, 6))
    assert fine is not None
    coarse = grid_code_of(code, batch, torch.zeros(5, 9, 24), (3, 3))
    assert coarse is not None
    whole, first = fine.unflatten(1, (6, 6))[0], coarse.unflatten(1, (3, 3))[1]
    torch.testing.assert_close(first, whole[:3, :3])  # a tile of 3 x 3 shows a quarter of a view of 6 x 6
    prefixed = grid_code_of(code, batch, torch.zeros(5, 37, 24), (6, 6))
    assert prefixed is not None
    assert (prefixed[:, 0] == 0).all()
    assert torch.equal(prefixed[:, 1:], fine)
    pooled = grid_code_of(code, batch, torch.zeros(5, 9, 24), (6, 6))  # to another scale in this step
    assert pooled is not None
    assert torch.equal(pooled, coarse)
    assert grid_code_of(None, batch, torch.zeros(5, 36, 24), (6, 6)) is None


def test_the_asking_token_stands_before_the_first_answer() -> None:
    answers = [Answer(0, 3, 4), Answer(2, 2, 3), Answer(2, 4, 5), Answer(0, 5, 6)]
    assert last_prompt_columns(batch_of([(0, 6), (0, 4), (0, 5)], [], answers=answers)) == [2, 3, 1]


@pytest.mark.parametrize(
    ("count", "chosen", "where", "expected"),
    [
        (8, 3, "first", [0, 1, 2]),
        (8, 3, "last", [5, 6, 7]),
        (8, 4, "spread", [1, 3, 5, 7]),
        (8, 3, "spread", [2, 4, 7]),
        (28, 7, "spread", [3, 7, 11, 15, 19, 23, 27]),
        (5, 5, "spread", [0, 1, 2, 3, 4]),
    ],
)
def test_layers_are_spread(count: int, chosen: int, where: str, expected: list[int]) -> None:
    assert spread_layers(count, chosen, where) == expected


def test_layers_are_chosen_by_name_by_share_or_by_group() -> None:
    def choose(every: int = 4, layers: list[int] | None = None, fraction: float | None = None) -> list[int]:
        return chosen_layers(12, every=every, layers=layers, fraction=fraction, where="last", method="X")

    assert choose() == [3, 7, 11]
    assert choose(every=5) == [4, 9]
    assert choose(every=1) == list(range(12))
    assert choose(layers=[7, 2, 7, 0, 11]) == [0, 2, 7, 11]
    assert choose(fraction=0.25) == [9, 10, 11]
    assert choose(fraction=0.01) == [11]
    assert choose(fraction=1.0) == list(range(12))
    for wrong in ({"layers": [12]}, {"layers": [-1]}, {"layers": []}, {"every": 13}):
        with pytest.raises(UserError, match=r"X cannot work in layers .* has 0 to 11"):
            choose(**wrong)  # type: ignore[arg-type]
    for wrong in ({"every": 0}, {"fraction": 0.0}, {"fraction": 1.5}):
        with pytest.raises(UserError, match=r"^X takes every from 1 and a fraction above 0 and at most 1, not "):
            choose(**wrong)  # type: ignore[arg-type]


def test_modulating_costs_what_its_formula_says() -> None:
    """Square, sum and product of xhat, product with dgamma, its sum; the sum of dbeta."""
    assert modulation_flops(2, 3, 10) == 6 * 60
    assert modulation_flops(2, 3, 10, shift=False) == 5 * 60
    assert modulation_flops(2, 3, 10, scale=False) == 60


@pytest.mark.parametrize("batch", [RIGHT, LEFT, PACKED], ids=["right", "left", "packed"])
def test_visual_tokens_stand_where_the_conversation_puts_them(batch: Batch) -> None:
    """Row by row, with lists; padded on the side on which the text was."""
    counts, width = [2, 1, 3, 2], 6
    order, columns = splice(batch, counts, text_width=width)
    sequences: list[list[int]] = []
    first = [18, 20, 21, 24]  # of each image's tokens, behind the text of three rows of six
    for row, (start, stop) in enumerate(batch.spans):
        tokens: list[int] = []
        for column in range(start, stop):
            for slot, begin, count in zip(batch.image_slots, first, counts, strict=True):
                if (slot.row, slot.column) == (row, column):
                    tokens += range(begin, begin + count)
            tokens.append(row * width + column)
        sequences.append(tokens)
    longest = max(map(len, sequences))
    left = batch is LEFT
    expected = [[-1] * (longest - len(s)) + s if left else s + [-1] * (longest - len(s)) for s in sequences]
    assert order.tolist() == expected
    assert order.dtype == columns.dtype == torch.long
    for row, (start, stop) in enumerate(batch.spans):
        for column in range(start, stop):
            assert expected[row][int(columns[row, column])] == row * width + column
    text, visual = torch.arange(36.0).reshape(3, 6, 2) + 1, torch.arange(16.0).reshape(8, 2) + 100
    embeds, mask = splice_tokens(text, visual.double(), order)
    flat = torch.cat([text.flatten(0, 1), visual])
    assert embeds.dtype == text.dtype
    assert mask.tolist() == [[source >= 0 for source in row] for row in expected]
    for row, sources in enumerate(expected):
        for slot, source in enumerate(sources):
            assert embeds[row, slot].tolist() == (flat[source].tolist() if source >= 0 else [0, 0])
    of_each = conversation_ids(batch, counts, order)
    numbers = [int(n) for n in text_conversation_ids(batch).flatten()]
    for slot, count in zip(batch.image_slots, counts, strict=True):
        numbers += [batch.conversation_of(slot)[1]] * count
    assert of_each.tolist() == [[numbers[source] if source >= 0 else -1 for source in row] for row in expected]


def test_an_image_at_the_end_stands_behind_the_last_word() -> None:
    batch = batch_of([(0, 3), (0, 6)], [ImageSlot(0, 3), ImageSlot(1, 0)])
    order, columns = splice(batch, [2, 1], text_width=6)
    assert order.tolist() == [[0, 1, 2, 12, 13, -1, -1], [14, 6, 7, 8, 9, 10, 11]]
    assert columns[0, :3].tolist() == [0, 1, 2]
    assert columns[1].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_newline_is_as_large_as_a_token_and_in_every_graph(build) -> None:  # type: ignore[no-untyped-def]
    model = build(ConcatFusion(newline=True))
    assert float(model.fusion.newline.std()) == pytest.approx(model.language.width**-0.5, rel=0.4)
    projected = torch.zeros(0, 16, model.language.width, requires_grad=True)
    tokens, counts = model.fusion.visual_tokens(RIGHT.without_images(), projected, model.language)
    assert (tokens.shape, counts) == ((0, model.language.width), [])
    tokens.sum().backward()
    assert model.fusion.newline.grad is not None
    assert build(ConcatFusion()).fusion.newline is None


@pytest.mark.parametrize("columns", [(1, 3), (3, 3)])
def test_where_all_is_seen_there_is_no_mask(build, columns: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    """From the column of the last image on, and not before."""
    model = build(CrossAttentionFusion(fraction=0.5, ffn=0))
    batch = batch_of([(0, 6)], [ImageSlot(0, column) for column in columns])
    context = model.fusion(batch, torch.randn(2, 16, 24), model.language).vision
    for past in range(6):
        seen = context.for_step(past, 1).seen
        assert (seen.partly is None) == (past >= 3)
        assert torch.equal(seen.mask[0, 0], context.column[0] <= past)


def test_layers_read_each_view_with_its_numbers(build) -> None:  # type: ignore[no-untyped-def]
    """What the images leave for each block or generator: of the features and the views' embeddings together."""
    slots = [ImageSlot(0, 1, FILM), ImageSlot(1, 2)]
    batch = batch_of([(0, 6), (0, 5)], slots)
    features = torch.randn(4, 16, 24)
    cross = build(CrossAttentionFusion(fraction=0.5, ffn=0))
    lavi = build(LaViFusion(every=2, generator=small()))
    assert sorted(cross.fusion.blocks) == sorted(lavi.fusion.generators) == ["1", "3"]
    for model in (cross, lavi):
        awaken(model.fusion)
        fusion = model.fusion
        context = fusion(batch, features, model.language).vision
        code = fusion.view_embedding(view_indices(batch, torch.device("cpu")))
        code = code + grid_code_of(fusion.grid_code, batch, features, (4, 4))
        assert context.column.tolist() == [[1] * 48, [2] * 16 + [Rows.NEVER] * 32]
        for layer in ("1", "3"):
            if model is cross:
                key, value = fusion.blocks[layer].keys_values((fusion.norm(features) + code).flatten(0, 1)[None])
                result = [context.visual[f"{layer} {part}"] for part in ("key", "value")]
                for whole, of_rows in ((key, result[0]), (value, result[1])):
                    torch.testing.assert_close(of_rows[0], whole[0, :, :48])
                    torch.testing.assert_close(of_rows[1, :, :16], whole[0, :, 48:])
            else:
                generator = fusion.generators[layer]
                slots = generator.visual(features, (4, 4), code).flatten(0, 1)
                of_rows = context.visual[layer]  # (B, 2, heads, M, r / heads)
                torch.testing.assert_close(of_rows[:1], generator.prepare(slots[None, :48]))
                torch.testing.assert_close(of_rows[1:, :, :, :16], generator.prepare(slots[None, 48:]))


def test_which_image_a_token_is_of_weighs_the_same_beside_the_features_of_any_tower(build) -> None:  # type: ignore[no-untyped-def]
    """The features may be a hundred times as large as another tower's: what is read of them and their view is not."""
    for model in (build(LaViFusion(every=2, generator=small())), build(CrossAttentionFusion(fraction=0.5))):
        awaken(model.fusion)
        batch = batch_of([(0, 6)], [ImageSlot(0, 1), ImageSlot(0, 2)])
        features = torch.randn(2, 16, 24)
        small_scale, large_scale = (
            model.fusion(batch, scale * features, model.language).vision.visual for scale in (1.0, 100.0)
        )
        for name, one in small_scale.items():
            torch.testing.assert_close(large_scale[name], one, atol=1e-3, rtol=1e-3)


def test_by_default_fusions_are_of_the_size_that_is_written_down(build) -> None:  # type: ignore[no-untyped-def]
    lavi, cross = build(LaViFusion()).fusion, build(CrossAttentionFusion()).fusion
    assert list(lavi.generators) == list(cross.blocks) == ["3"]
    generator = lavi.generators["3"]
    assert type(generator) is AttentionDeltas
    assert (generator.bottleneck, generator.heads, generator.outputs) == (64, 4, 4)
    assert (MLPDeltas().depth, ConvDeltas().depth, MLPDeltas().bottleneck, ConvDeltas().bottleneck) == (1, 1, 64, 64)
    assert lavi.where == "spread"
    block = cross.blocks["3"]
    assert (block.heads, block.ffn_width, block.width) == (4, 128, 32)
    assert lavi.view_embedding.image.num_embeddings == cross.view_embedding.image.num_embeddings == 8


def test_cross_attention_works_in_named_layers_or_a_share_and_costs_what_its_blocks_do(build) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="cross-attention takes either 'layers' or 'fraction', not both"):
        CrossAttentionFusion(layers=[0], fraction=0.5)
    fusion = build(CrossAttentionFusion(layers=[0, 2])).fusion
    blocks = fusion.blocks.values()
    for past in (0, 7):
        expected = sum(b.flops(5, 3 * 16) + (0 if past else b.keys_values_flops(3 * 16)) for b in blocks)
        assert fusion.costs(5, FILM, 16, past=past) == {"cross_attention": Cost(expected)}


def test_fusions_say_whether_rows_may_hold_several_conversations() -> None:
    assert LaViFusion.packs
    assert CrossAttentionFusion.packs
    assert ConcatFusion.packs
    assert not any(fusion.packs for fusion in (Fusion, PruningFusion, VisorFusion))


class Bare(Fusion):
    """The least that a fusion is: the text as it stands."""

    def bind(self, language: Any, features: Any) -> None: ...

    def forward(self, batch: Batch, features: torch.Tensor, language: Any) -> Any:
        return text_only_input(batch, ColumnContext(visual={}, column=torch.zeros(len(batch), 1)))

    def costs(self, text: int, layout: Layout | None, per_view: int, *, past: int = 0) -> dict[str, Cost]:
        return {"own": Cost(1.0 if past else 2.0)}


class Counting(Bare):
    @property
    def token_counter(self) -> Any:
        return lambda layout, per_view: layout.views * per_view


def test_what_a_fusion_leaves_out_means_nothing() -> None:
    fusion = Bare()
    assert (fusion.packs, fusion.modulated_norms, fusion.default_route) == (False, [], None)
    assert not fusion.route_counts
    assert fusion.resolved_arguments() == {}
    with fusion.force_route(None):
        pass
    assert fusion.tokens_in_language(TILED, 16) == 0
    assert Counting().tokens_in_language(TILED, 16) == 80
    assert fusion.visual_by_layer(7, 3) == [7, 7, 7]
    assert Cost(3.0).uncounted == 0
