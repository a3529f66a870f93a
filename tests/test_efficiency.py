"""The instrument: two counters that agree, records that round-trip, measuring that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import QWEN2, TOWER
from sizes import QWEN2_7B, SIGLIP_SO400M

from callbacks.efficiency import Efficiency, write_curves
from lavi.efficiency.flops import closed_form, counted
from lavi.efficiency.measure import build_on, concat_twin, count, measure, saving
from lavi.efficiency.record import Record, read, write
from lavi.fusion.base import Cost, Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.vision.hf import HFVision

FUSIONS = {
    "concat": ConcatFusion,
    "lavi": LaViFusion,
    "lavi-all": lambda: LaViFusion(every=1, bottleneck=32),
    "lavi-mlp": lambda: LaViFusion(generator="mlp", depth=2),
    "lavi-conv": lambda: LaViFusion(generator="conv", depth=2),
    "lavi-pooled": lambda: LaViFusion(generator="pooled", targets=["attention", "ffn", "final"]),
    "lavi-scale": lambda: LaViFusion(every=2, parameters="scale", targets=["ffn"]),
}
SIZES = {"small": (TOWER, QWEN2, -1), "7B": (SIGLIP_SO400M, QWEN2_7B, -2)}


@pytest.fixture
def on_meta(tokenizer: str):  # type: ignore[no-untyped-def]
    def make(fusion: Fusion, size: str) -> VisionLanguageModel:
        tower, language, layer = SIZES[size]
        with torch.device("meta"):
            vision = HFVision(config=tower, layer=layer)
            return VisionLanguageModel(
                vision=vision, language=LanguageModel(config=language, tokenizer=tokenizer), fusion=fusion
            ).eval()

    return make


def difference(model: VisionLanguageModel, *, text: int, visual: int, views: int) -> dict[str, float]:
    """How far the closed formula is from the counter, as a share, for each part."""
    closed = closed_form(model, text=text, visual=visual, views=views)
    seen = counted(model, text=text, visual=visual, views=views)
    costs = model.fusion.costs(text, visual)
    formula = {
        "vision_encoder": closed.components["vision_encoder"],
        "fusion": sum(cost.flops - cost.uncounted for cost in costs.values()),
    }
    formula["language"] = closed.language - sum(cost.flops for cost in costs.values())
    return {part: abs(formula[part] - seen[part]) / max(seen[part], 1.0) for part in seen}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize(("text", "visual"), [(50, 0), (50, 729), (10, 64)])
def test_two_counters_agree(on_meta, name: str, size: str, text: int, visual: int) -> None:
    model = on_meta(FUSIONS[name](), size)
    views = -(-visual // model.vision.tokens)
    apart = difference(model, text=text, visual=visual, views=views)
    if not visual:
        apart.pop("fusion")  # a fusion without an image still computes on one padding token
    assert max(apart.values()) < 0.01, apart


def test_a_planted_error_is_seen(on_meta, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(ConcatFusion(), "small")
    right = model.fusion.costs(50, 64)["projector"].flops
    monkeypatch.setattr(model.fusion, "costs", lambda text, visual: {"projector": Cost(1.02 * right)})
    assert max(difference(model, text=50, visual=64, views=4).values()) > 0.01


def test_the_sizes_of_the_published_baseline(on_meta) -> None:
    """SigLIP-so400m + Qwen2-7B with 50 text tokens, to four digits as computed from the released configurations."""
    concat, lavi = on_meta(ConcatFusion(), "7B"), on_meta(LaViFusion(), "7B")
    assert concat.vision.flops(1) == pytest.approx(0.642e12, rel=2e-3)
    seen = closed_form(concat, text=50, visual=7371, views=10)
    language = seen.language - seen.components["projector"]
    assert language == pytest.approx(119.0e12, rel=2e-3)
    assert seen.components["vision_encoder"] == pytest.approx(6.42e12, rel=2e-3)
    assert seen.floor == pytest.approx(0.65e12, rel=2e-2)
    own = closed_form(lavi, text=50, visual=7371, views=10)
    assert 1 - own.language / seen.language > 0.94


def test_modulation_is_counted_though_no_operator_shows_it(on_meta) -> None:
    model = on_meta(LaViFusion(every=2), "small")
    cost = model.fusion.costs(50, 64)["modulation"]
    assert cost.flops == cost.uncounted == (3 + 1 + 1 + 1) * 4 * 50 * QWEN2["hidden_size"]


def test_savings_stay_below_their_ceiling(tiny_recipe: Path) -> None:
    recipe = Recipe.load(tiny_recipe)
    twin = concat_twin(recipe)
    own, base = (count(r, build_on(r, "meta"), text=12, visual=64) for r in (recipe, twin))
    for with_vision in (False, True):
        saved, ceiling = saving(own, base, with_vision=with_vision)
        assert 0 < saved < ceiling < 100


def test_measuring_changes_nothing(tiny_recipe: Path) -> None:
    recipe = Recipe.load(tiny_recipe)
    model = build_on(recipe, "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    made = measure(count(recipe, model, text=12, visual=64), model, device=torch.device("cpu"), runs=3)
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert {"vision_encoder", "prefill", "decode", "floor_prefill", "floor_decode"} == set(made.milliseconds)
    for median, p10, p90 in made.milliseconds.values():
        assert 0 < p10 <= median <= p90
    weights = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    assert made.mib["weights"] == pytest.approx(weights)
    layers, tokens, heads = 4, 12, QWEN2["num_key_value_heads"]
    assert made.mib["kv_cache"] * 2**20 == layers * 2 * tokens * heads * 8 * 4
    assert made.mib["peak"] > made.mib["kv_cache"]


def test_memory_grows_with_the_tokens_in_the_language_model(tiny_recipe: Path) -> None:
    twin = concat_twin(Recipe.load(tiny_recipe))
    model = build_on(twin, "cpu")
    few, many = (
        measure(count(twin, model, text=12, visual=n), model, device=torch.device("cpu"), runs=2).mib for n in (16, 128)
    )
    assert many["kv_cache"] == pytest.approx(few["kv_cache"] * 140 / 28)
    assert many["peak"] > few["peak"]


def test_records_round_trip_and_become_curves(tiny_recipe: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = Efficiency(visual_tokens=[0, 16, 64], text_tokens=12, runs=2).sweep(
        Recipe.load(tiny_recipe), torch.device("cpu")
    )
    write(records, tmp_path / "r.jsonl")
    assert read(tmp_path / "r.jsonl") == records
    assert [(r.method, r.visual_tokens) for r in records] == [(m, n) for n in (0, 16, 64) for m in ("lavi", "concat")]
    write_curves(records, tmp_path)
    for method in ("lavi", "concat"):
        events = EventAccumulator(str(tmp_path / f"efficiency-{method}")).Reload()
        curve = events.Scalars("efficiency/GFLOPs without vision encoder")
        assert [point.step for point in curve] == [0, 16, 64]
        wanted = [r.gflops_language for r in records if r.method == method]
        assert [point.value for point in curve] == pytest.approx(wanted, rel=1e-6)


def test_a_sweep_beyond_the_positions_is_left_out_and_said(tiny_recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    sweep = Efficiency(visual_tokens=[1024], text_tokens=12, runs=0)
    records = sweep.sweep(Recipe.load(tiny_recipe), torch.device("cpu"))
    assert [r.method for r in records] == ["lavi"]
    assert "longer than its 256 positions" in caplog.text


def test_an_old_record_without_new_fields_still_reads() -> None:
    line = '{"method": "lavi", "text_tokens": 1, "visual_tokens": 2, "visual_tokens_in_language": 0, "views": 1}'
    assert Record.from_json(line).gflops_total == 0
