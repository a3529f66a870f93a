"""Images at their own aspect: the tower against transformers', and every fusion that takes them blind to padding."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QWEN2, ask, awaken, collate, small
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from lavi.batch import Layout, Sample, Video
from lavi.data.tiling import AnyRes, OneView
from lavi.efficiency.flops import closed_form, counted
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError
from lavi.fusion.base import Fusion
from lavi.fusion.casa import CASA
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.deepstack import DeepStackFusion
from lavi.fusion.evs import EVS
from lavi.fusion.late_injection import LateInjection
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.pruning import FastV
from lavi.fusion.shortv import ShortV
from lavi.fusion.tile_markers import TileMarkers
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.reduction.pooling import AveragePooling
from lavi.vision.hf import HFVision
from lavi.vision.naflex import NaFlexVision
from lavi.visor.fusion import VisorFusion

CONFIG = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIG |= {"num_patches": 16, "patch_size": 8}
SIZES = [(70, 20), (40, 40), (17, 90)]
GRIDS = [(2, 7), (4, 4), (8, 2)]
"""Rows and columns of SIZES (width, height) within 16 patches."""
FUSIONS: dict[str, Callable[[], Fusion]] = {
    "concat": ConcatFusion,
    "newline": lambda: ConcatFusion(newline=True),
    "LaVi": lambda: LaViFusion(every=2, generator=small()),
    "cross-attention": lambda: CrossAttentionFusion(every=2),
    "CASA": lambda: CASA(every=2),
    "EVS": lambda: EVS(keep=0.5),
    "FastV": lambda: FastV(layer=1),
    "late injection": lambda: LateInjection(first=1),
    "ShortV": lambda: ShortV(layers=[1]),
    "DeepStack": lambda: DeepStackFusion(levels=3),
}


def noise(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(width)
    values = torch.randint(0, 255, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(values.numpy())


def tower(**settings: Any) -> NaFlexVision:
    torch.manual_seed(0)
    return NaFlexVision(config=CONFIG, **settings).eval()


def model_of(name: str, tokenizer: str, **parts: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    language = LanguageModel(config=QWEN2, tokenizer=tokenizer)
    model = VisionLanguageModel(vision=tower(), language=language, fusion=FUSIONS[name](), **parts).eval()
    awaken(model.fusion)
    return model


def about(*sizes: tuple[int, int]) -> Sample:
    sample = ask(*range(len(sizes)), "what colour is it?", answer="red")
    return Sample(sample.key, sample.messages, [noise(*size) for size in sizes])


@torch.no_grad()
def test_features_are_those_of_transformers() -> None:
    """Of its own tower behind its own processor, whatever the shapes in a batch."""
    vision = tower(layer=[-1, 2])
    whole = Siglip2VisionModel(Siglip2VisionConfig(**CONFIG, vision_use_head=False)).eval()
    whole.load_state_dict(vision.tower.state_dict())
    images = [noise(*size) for size in SIZES]
    inputs = vision.preprocessing.image_processor(images, return_tensors="pt")
    hidden = whole(**inputs, output_hidden_states=True).hidden_states
    pixels = torch.stack([vision.preprocessing(image) for image in images])
    grids = [vision.preprocessing.grid((height, width)) for width, height in SIZES]
    assert grids == GRIDS == [tuple(shape) for shape in inputs["spatial_shapes"].tolist()]
    features = vision(pixels, grids)
    assert features.shape == (3, vision.tokens, vision.width) == (3, 16, 48)
    for view, (rows, columns) in enumerate(GRIDS):
        count = rows * columns
        expected = torch.cat([hidden[3][view, :count], hidden[2][view, :count]], dim=-1)
        torch.testing.assert_close(features[view, :count], expected, atol=1e-5, rtol=1e-4)
        assert not features[view, count:].any()
        torch.testing.assert_close(vision(pixels[view : view + 1], grids[view : view + 1])[0], features[view])


def test_what_a_tower_costs_is_what_its_grid_costs() -> None:
    vision = tower()
    for grid in GRIDS:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vision(torch.zeros(1, *vision.pixel_shape), [grid])
        layout = Layout(grid=grid)
        assert vision.flops(1, layout) == counter.get_total_flops() == vision.flops(3, layout) / 3
    assert vision.flops(1, Layout(grid=(2, 7))) < vision.flops(1, Layout(grid=(4, 4))) == vision.flops(1)


@pytest.mark.parametrize("name", FUSIONS)
@torch.no_grad()
def test_a_row_is_what_it_is_alone_and_padding_is_never_seen(
    name: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name, tokenizer)
    samples = [about(SIZES[0]), about(SIZES[1], SIZES[2]), ask("hello", answer="hi"), about(SIZES[2])]
    batch = collate(model, samples)
    logits = model(batch)
    for row, sample in enumerate(samples):
        alone = model(collate(model, [sample]))[0]
        torch.testing.assert_close(logits[row, : len(alone)], alone, atol=1e-4, rtol=1e-3)
    features = model.features_of(batch)

    def with_other_padding(batch: Any) -> Tensor:
        other = features.clone()
        for view, (rows, columns) in enumerate(batch.grids):
            other[view, rows * columns :] = 100.0
        return other

    monkeypatch.setattr(model, "features_of", with_other_padding)
    torch.testing.assert_close(model(batch), logits)
    monkeypatch.setattr(model, "features_of", lambda batch: features.flip(0))
    assert not torch.allclose(model(batch), logits, atol=1e-3)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_prompt_has_as_many_tokens_as_its_image_has_patches(name: str, tokenizer: str) -> None:
    model = model_of(name, tokenizer)
    inside = name not in ("LaVi", "cross-attention", "CASA")
    text = len(collate(model, [about(SIZES[0])]).input_ids[0])
    for size, (rows, columns) in zip(SIZES, GRIDS, strict=True):
        _, length = model.processor.measure(about(size))
        assert length == text + inside * (rows * columns + (name == "newline"))
        shape = Scenario(text=9, image=size).shape_for(model)
        flops, hand = closed_form(model, shape), model.vision.flops(1, Layout(grid=(rows, columns)))
        assert flops.prefill["vision_encoder"] == hand
        assert shape.per_view == rows * columns
        by_operator = counted(model, shape)
        assert by_operator["vision_encoder"] == pytest.approx(hand, rel=0.01)
        assert sum(by_operator[key] for key in ("vision_encoder", "language", "fusion")) == pytest.approx(
            flops.total, rel=0.02
        )


@pytest.mark.parametrize("name", ["concat", "LaVi"])
def test_answers_come_from_state_and_prompt_alike(name: str, tokenizer: str) -> None:
    model = model_of(name, tokenizer)
    images = [noise(*SIZES[0]), noise(*SIZES[2])]
    state = model.see(*images)
    wider = model.see(*images, noise(*SIZES[1]), known=state)
    assert [layout.grid for layout in wider.layouts] == [GRIDS[0], GRIDS[2], GRIDS[1]]
    direct = model.answer(model.prompt("what is it?", *images), max_new_tokens=4)
    assert direct == [model.ask("what is it?", state=state, max_new_tokens=4)]


def test_frames_of_a_video_are_pooled_on_their_own_grid(tokenizer: str) -> None:
    model = model_of("concat", tokenizer)
    video = Video([noise(*SIZES[0]), noise(*SIZES[0])])
    layout = model.tiling.layout(video, model.vision.preprocessing)
    assert layout == Layout(views=2, video=True, grid=(2, 7))
    assert model.processor.count_visual_tokens(layout) == 2 * 1 * 4
    batch = model.prompt("what is it?", video)
    assert model.answer(batch, max_new_tokens=2)


def test_a_padded_image_has_the_grid_of_its_square() -> None:
    preprocessing = tower().preprocessing
    (view,), layout = OneView(pad_to_square=True).cut(noise(*SIZES[0]), preprocessing, alone=True)
    assert (view.size, layout.size, layout.grid) == ((70, 70), (20, 70), (4, 4))


def test_more_patches_are_a_matter_of_preprocessing_alone(tmp_path: Path) -> None:
    """The tower's positions are interpolated; a saved tower keeps its budget, its layers and its features."""
    vision = tower(max_patches=64, layer=-2)
    assert (vision.tokens, vision.grid, vision.preprocessing.grid((40, 40))) == (64, (8, 8), (8, 8))
    arguments = vision.save_pretrained(tmp_path)
    json.dumps({key: value for key, value in arguments.items() if not isinstance(value, Path)})
    again = NaFlexVision(str(tmp_path), layer=arguments["layer"]).eval()
    preprocessing = pickle.loads(pickle.dumps(again.preprocessing))
    pixels = torch.stack([preprocessing(noise(*size)) for size in SIZES])
    grids = [preprocessing.grid(size[::-1]) for size in SIZES]
    with torch.no_grad():
        assert torch.equal(again(pixels, grids), vision(pixels, grids))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"tiling": AnyRes()}, "AnyRes cuts images into tiles of one size"),
        ({"reducer": AveragePooling(factor=2)}, "AveragePooling reduces views of one grid"),
        ({"fusion": VisorFusion(cross_attention=2, self_attention=1)}, "VisorFusion as it is set needs one for all"),
        ({"fusion": LaViFusion(generator=small("conv"))}, "LaViFusion as it is set needs one for all"),
    ],
)
def test_parts_that_need_one_grid_are_refused(parts: dict[str, Any], words: str, tokenizer: str) -> None:
    language = LanguageModel(config=QWEN2, tokenizer=tokenizer)
    with pytest.raises(UserError, match=words):
        VisionLanguageModel(**{"vision": tower(), "language": language, "fusion": ConcatFusion(), **parts})


def test_each_kind_of_tower_names_the_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaFlexVision"):
        HFVision(config={"model_type": "siglip2_vision_model"})
    with pytest.raises(UserError, match="HFVision"):
        NaFlexVision(config={"model_type": "siglip_vision_model"})
    with pytest.raises(UserError, match="3 layers, none is layer 4"):
        tower(layer=4)


def test_frames_of_other_sizes_are_brought_to_the_first_one_s() -> None:
    vision = tower()
    frames = [noise(*SIZES[0]), noise(*SIZES[2])]
    pixels, layout = OneView().views(Video(frames), vision.preprocessing)
    assert layout.grid == (2, 7)
    resized = [frames[0], frames[1].resize(SIZES[0])]
    assert torch.equal(pixels, torch.stack([vision.preprocessing(frame) for frame in resized]))


def test_between_markers_stand_the_patches_that_an_image_has() -> None:
    marked = TileMarkers().of_single_tokens()
    layout = Layout(grid=(2, 7))
    features, ids = torch.randn(1, 16, 24), torch.randn(len(marked.marker_ids), 24)
    arranged = marked.arrange(features, layout, ids)
    assert len(arranged) == marked(layout, 16)
    assert marked(layout, 16) == marked(Layout(), 14)
    assert any(torch.equal(part, features[0, :14]) for part in arranged.unfold(0, 14, 1).mT)
