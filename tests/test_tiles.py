"""Any-resolution tiling: the oracle is transformers' own LLaVA-OneVision, and the published token counts."""

from __future__ import annotations

import pytest
import torch
from conftest import QWEN2, ask, awaken, collate, small
from conftest import TOWER as SMALL_TOWER
from PIL import Image
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from lavi.batch import Batch, Layout, Sample, Video
from lavi.data.tiling import AnyRes, OneView
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.tile_arrangement import TileArrangement
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.vision.hf import HFVision

SIDE, PATCH = 24, 8  # a grid of 3 x 3, odd as SigLIP's 27 x 27: pooling by two has to round up
TOWER = SMALL_TOWER | {"image_size": SIDE, "patch_size": PATCH}
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in range(1, 7) for columns in range(1, 7)]
SIZES = [
    (24, 24),
    (40, 30),
    (64, 48),
    (64, 64),
    (120, 67),
    (144, 144),
    (31, 97),
    (200, 13),
    (13, 200),
    (7, 7),
    (500, 3),
]
"""(width, height): smaller than a tile, odd, long, and past the budget of nine views."""

IMAGE_ID, VIDEO_ID = 298, 299
"""Ids that stand in no question here."""

PUBLISHED = {
    (384, 384): (2, 1485),
    (640, 480): (5, 2929),
    (1024, 768): (7, 4725),
    (1024, 1024): (10, 7371),
    (1920, 1080): (16, 7269),
    (2304, 2304): (37, 7371),
}
"""LLaVA-OneVision's crops and visual tokens by (width, height), of SigLIP-so400m-patch14-384."""


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 255, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(noise.numpy())


@pytest.fixture
def ours(tokenizer: str) -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(
        vision=HFVision(config=TOWER),
        language=LanguageModel(config=QWEN2 | {"max_position_embeddings": 1024}, tokenizer=tokenizer),
        fusion=ConcatFusion(newline=True),
        tiling=AnyRes(),
    ).eval()


@pytest.fixture
def theirs(ours: VisionLanguageModel) -> LlavaOnevisionForConditionalGeneration:
    """Transformers' own, with our weights."""
    config = LlavaOnevisionConfig(
        vision_config=TOWER | {"vision_use_head": False},
        text_config=ours.language.hf.config.to_dict(),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(ours.vision.tower.state_dict())  # type: ignore[attr-defined]
    model.model.language_model.load_state_dict(ours.language.hf.model.state_dict())
    model.lm_head.load_state_dict(ours.language.hf.lm_head.state_dict())
    first, _, second = ours.fusion.projector.layers  # type: ignore[misc]
    model.model.multi_modal_projector.linear_1.load_state_dict(first.state_dict())
    model.model.multi_modal_projector.linear_2.load_state_dict(second.state_dict())
    with torch.no_grad():
        model.model.image_newline.copy_(ours.fusion.newline)  # type: ignore[arg-type]
    return model


def their_ids(ours: VisionLanguageModel, batch: Batch, token: int) -> Tensor:
    """The ids of a batch of one row, their placeholder standing once for each visual token."""
    ids = batch.input_ids[0].tolist()
    for slot in reversed(batch.image_slots):
        ids[slot.column : slot.column] = [token] * ours.processor.count_visual_tokens(slot.layout)
    return torch.tensor([ids])


def processed(images: list[list[Image.Image]]) -> dict[str, Tensor]:
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=Image.Resampling.BICUBIC,
    )
    return dict(processor(images, return_tensors="pt"))


def question(images: list[Image.Image], ours: VisionLanguageModel) -> Batch:
    sample = ask(*range(len(images)), "what colour is the circle?", answer="red")
    sample.images = list(images)
    return collate(ours, [sample])


@pytest.mark.parametrize("size", SIZES[:-1], ids=lambda size: "x".join(map(str, size)))
def test_one_image_is_seen_as_transformers_llava_onevision_sees_it(ours, theirs, size: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    batch = question([picture(size)], ours)
    inputs = processed([[picture(size)]])
    torch.testing.assert_close(batch.pixels, inputs["pixel_values"][0], atol=1e-6, rtol=0)  # equal crops
    with torch.no_grad():
        expected = theirs(input_ids=their_ids(ours, batch, IMAGE_ID), **inputs).logits
        tokens = ours.processor.count_visual_tokens(batch.image_slots[0].layout)
        features = theirs.model.get_image_features(**inputs).pooler_output[0]
        assert len(features) == tokens  # equal counts
        start = batch.image_slots[0].column
        logits = ours(batch)[0]
    torch.testing.assert_close(logits[start:], expected[0, start + tokens :], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[:start], expected[0, :start], atol=1e-4, rtol=1e-4)


def test_several_images_are_seen_as_transformers_sees_them(ours, theirs) -> None:  # type: ignore[no-untyped-def]
    images = [picture(size, seed) for seed, size in enumerate([(64, 48), (31, 97), (24, 24)])]
    batch = question(images, ours)
    inputs = processed([images])
    torch.testing.assert_close(batch.pixels, inputs["pixel_values"][:, 0], atol=1e-6, rtol=0)
    with torch.no_grad():
        expected = theirs(input_ids=their_ids(ours, batch, IMAGE_ID), **inputs).logits[0]
        logits = ours(batch)[0]
    start = batch.image_slots[0].column
    torch.testing.assert_close(logits[start:], expected[-len(logits[start:]) :], atol=1e-4, rtol=1e-4)


def test_a_video_is_seen_as_transformers_sees_it(ours, theirs) -> None:  # type: ignore[no-untyped-def]
    frames = [picture((40, 30), seed) for seed in range(5)]
    content = [{"type": "video"}, {"type": "text", "text": "what moves?"}]
    batch = collate(ours, [Sample("v", [{"role": "user", "content": content}], [Video(frames)])], prompt=True)
    layout = batch.image_slots[0].layout
    assert layout == Layout(views=5, video=True)
    assert ours.processor.count_visual_tokens(layout) == 5 * 4 + 1  # 3 x 3 pooled to 2 x 2, and the newline
    with torch.no_grad():
        expected = theirs(input_ids=their_ids(ours, batch, VIDEO_ID), pixel_values_videos=batch.pixels[None]).logits[0]
        logits = ours(batch)[0]
    start = batch.image_slots[0].column
    torch.testing.assert_close(logits[start:], expected[-len(logits[start:]) :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", PUBLISHED, ids=lambda size: "x".join(map(str, size)))
def test_the_published_counts(size: tuple[int, int]) -> None:
    width, height = size
    rows, columns = AnyRes().grid((height, width), (384, 384))
    layout = Layout(1 + rows * columns, (rows, columns), (height, width))
    assert (layout.views, TileArrangement((27, 27), newline=True)(layout, 729)) == PUBLISHED[size]


def test_32_frames_are_6273_tokens() -> None:
    assert TileArrangement((27, 27), newline=True)(Layout(32, video=True), 729) == 6273


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("newline", [False, True])
def test_as_many_tokens_as_counted(size: tuple[int, int], newline: bool) -> None:
    rows, columns = AnyRes().grid((size[1], size[0]), (SIDE, SIDE))
    layout = Layout(1 + rows * columns, (rows, columns), (size[1], size[0]))
    arrangement = TileArrangement((3, 3), budget=2, newline=newline)
    arranged = arrangement.arrange(torch.randn(layout.views, 9, 8), layout, torch.zeros(8) if newline else None)
    assert len(arranged) == arrangement(layout, 9) > 9


def test_an_image_of_one_view_or_a_video_has_no_newline_unless_asked_for() -> None:
    assert TileArrangement((4, 6))(Layout(), 24) == 24
    assert TileArrangement((4, 6))(Layout(views=3, video=True), 24) == 3 * 2 * 3
    assert TileArrangement((4, 6), newline=True)(Layout(views=3, video=True), 24) == 3 * 2 * 3 + 1
    assert TileArrangement((4, 6), newline=True)(Layout(), 24) == 25


def test_tokens_on_no_grid_stand_one_after_the_other() -> None:
    features, newline = torch.randn(3, 5, 4), torch.randn(4)
    arrangement = TileArrangement(None, newline=True)
    layout = Layout(views=3, tiles=(1, 2), size=(24, 48))
    arranged = arrangement.arrange(features, layout, newline)
    assert torch.equal(arranged, torch.cat([*features, newline[None]]))
    assert arrangement(layout, 5) == len(arranged) == 16


def test_tiles_of_a_grid_that_is_no_square_are_laid_out_row_by_row() -> None:
    """Two tiles, one below the other, each of 2 x 3 tokens; the image fills them."""
    features = torch.arange(18.0).reshape(3, 6, 1)
    layout, newline = Layout(views=3, tiles=(2, 1), size=(48, 36)), torch.tensor([-1.0])
    arrangement = TileArrangement((2, 3), newline=True)
    assert arrangement.kept(layout) == ((0, 0), (4, 3))
    rows = [[6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17]]
    expected = [*range(6), *(token for row in rows for token in [*row, -1])]
    assert arrangement.arrange(features, layout, newline).flatten().tolist() == expected
    assert arrangement(layout, 6) == len(expected)
    beside = Layout(views=3, tiles=(1, 2), size=(20, 60))
    rows = [[6, 7, 8, 12, 13, 14], [9, 10, 11, 15, 16, 17]]
    assert arrangement.kept(beside) == ((0, 0), (2, 6))
    expected = [*range(6), *(token for row in rows for token in [*row, -1])]
    assert arrangement.arrange(features, beside, newline).flatten().tolist() == expected


FILM, WIDE = Layout(views=5, video=True), Layout(views=5, tiles=(2, 2), size=(36, 48))


@pytest.mark.parametrize("layout", [Layout(), FILM, WIDE], ids=["one view", "frames", "tiles"])
def test_views_at_another_scale_are_arranged_on_their_own_grid(layout: Layout) -> None:
    """As a reducer that draws its scale gives them: 4 x 4 tokens of a grid that has 8 x 8."""
    given, own = TileArrangement((8, 8), newline=True), TileArrangement((4, 4), newline=True)
    features, newline = torch.randn(layout.views, 16, 6), torch.randn(6)
    tokens = {Layout(): 17, FILM: 5 * 4 + 1, WIDE: 16 + 6 * (8 + 1)}[layout]
    assert given(layout, 16) == own(layout, 16) == tokens
    arranged = given.arrange(features, layout, newline)
    assert torch.equal(arranged, own.arrange(features, layout, newline))
    assert len(arranged) == tokens


def test_what_is_no_smaller_square_of_a_square_is_at_no_other_scale() -> None:
    """Nine tokens in a row are no 3 x 3, and ten on a grid of 4 x 4 are one too many for that."""
    assert TileArrangement((1, 9))(FILM, 9) == 5 * 5
    assert TileArrangement((4, 4))(Layout(), 10) == 10
    with pytest.raises(UserError, match="grids of 4 x 4, and the vision backbone gives 10 tokens"):
        TileArrangement((4, 4)).arrange(torch.randn(5, 10, 6), WIDE, None)


@pytest.mark.parametrize(
    ("budget", "side", "shrunk"), [(1, 10, 10), (1, 11, 11), (1, 12, 10), (4, 22, 22), (4, 24, 20)]
)
def test_a_grid_is_shrunk_only_where_it_exceeds_its_budget_by_a_tenth(budget: int, side: int, shrunk: int) -> None:
    assert TileArrangement((10, 10), budget=budget).shrunk(side, side) == (shrunk, shrunk)


def test_rows_of_every_layout_answer_as_they_would_alone(ours: VisionLanguageModel) -> None:
    lavi = VisionLanguageModel(
        vision=ours.vision, language=ours.language, fusion=LaViFusion(every=2, generator=small()), tiling=AnyRes()
    ).eval()
    samples = [ask(0, "what colour is the circle?", answer="red", key=str(size)) for size in SIZES[:4]]
    for sample, size in zip(samples, SIZES, strict=False):
        sample.images = [picture(size)]
    samples += [ask(1, 2, "which image has the red circle?", answer="first"), ask("hello", answer="hi")]
    for model in (ours, lavi):
        awaken(model.fusion)
        batch = collate(model, samples)
        with torch.no_grad():
            together = model(batch)
            for row, sample in enumerate(samples):
                alone = model(collate(model, [sample]))[0]
                torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_lavi_tells_tiles_and_frames_apart(ours: VisionLanguageModel) -> None:
    """The same pixels in another tile, or in another frame, are another image."""
    model = VisionLanguageModel(
        vision=ours.vision, language=ours.language, fusion=LaViFusion(every=2, generator=small()), tiling=AnyRes()
    ).eval()
    awaken(model.fusion)
    batch = question([picture((48, 48))], model)
    swapped = question([picture((48, 48))], model)
    swapped.pixels = swapped.pixels[[0, 2, 1, 3, 4]]
    with torch.no_grad():
        assert not torch.allclose(model(batch), model(swapped), atol=1e-4)
        video = [picture((24, 24), 1), picture((24, 24), 2)]
        content = [{"type": "video"}, {"type": "text", "text": "what moves?"}]
        clips = [
            collate(model, [Sample("v", [{"role": "user", "content": content}], [Video(frames)])], prompt=True)
            for frames in (video, video[::-1])
        ]
        assert not torch.allclose(model(clips[0]), model(clips[1]), atol=1e-4)


def test_padding_to_a_square_keeps_all_of_the_image(ours: VisionLanguageModel) -> None:
    image = Image.new("RGB", (40, 20), "red")
    [view], layout = OneView(pad_to_square=True).cut(image, ours.vision.preprocessing, alone=True)
    assert (view.size, layout.size) == ((40, 40), (20, 40))
    assert view.getpixel((0, 0)) == (127, 127, 127)  # the tower's mean: it sees 0 there
    assert view.crop((0, 10, 40, 30)).tobytes() == image.tobytes()


def test_a_conversation_counts_its_tiles_against_the_context(ours: VisionLanguageModel) -> None:
    ours.processor.context_length = 60
    sample = ask(0, "what colour is the circle?", answer="red")
    sample.images = [picture((144, 144))]
    with pytest.raises(UserError, match="visual tokens"):
        ours.processor.encode(sample)


@pytest.mark.parametrize("budget", [1, 4])
def test_a_fusion_keeps_to_its_own_budget(build, budget: int) -> None:  # type: ignore[no-untyped-def]
    model = build(ConcatFusion(budget=budget))
    per_view = model.vision.tokens
    layout = Layout(views=10, tiles=(3, 3), size=(480, 480))
    tokens = model.fusion.tokens_in_language(layout, per_view)
    assert tokens - per_view <= 1.21 * budget * per_view < 9 * per_view


def test_a_stretched_image_and_one_of_unknown_size_fill_their_tiles() -> None:
    arrangement = TileArrangement((27, 27))
    padded = Layout(views=9, tiles=(2, 4), size=(300, 1000))
    assert arrangement.kept(padded) == ((11, 0), (32, 108))
    for layout in (padded._replace(stretched=True), padded._replace(size=(0, 0))):
        assert arrangement.kept(layout) == ((0, 0), (54, 108))
