"""The instrument: two counters that agree, records that round-trip, measuring that changes nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, QWEN2, TOWER, ask, image, small
from families import VARIED
from PIL import Image
from sizes import QWEN2_7B, SIGLIP_SO400M
from torch.utils.flop_counter import FlopCounterMode
from verify_claims import recipe_at, shrunk

from callbacks.efficiency import Efficiency
from lavi.batch import Layout, Sample, Video
from lavi.efficiency.figures import (
    FLOOR,
    _lines,
    draw_curves,
    line_name,
    point_of,
    sweep_tables,
    write_csv,
    write_curves,
    write_savings,
    x_value,
)
from lavi.efficiency.flops import closed_form, counted, language_flops
from lavi.efficiency.latency import Clock
from lavi.efficiency.measure import Measurement, build_on, concat_twin, count, measure, saving
from lavi.efficiency.record import Record, read_records, write_records
from lavi.efficiency.scenario import Scenario
from lavi.efficiency.sweep import Sweep, sweep_records
from lavi.errors import UserError
from lavi.evaluation.scoring import PromptSizes, prompts_of
from lavi.fusion.base import Cost, Fusion
from lavi.fusion.casa import CASA
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.deepstack import DeepStackFusion
from lavi.fusion.evs import EVS
from lavi.fusion.late_injection import LateInjection
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.pruning import FastV, PyramidDrop
from lavi.fusion.shortv import ShortV
from lavi.fusion.vica import ViCA
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.reduction.base import Reducer
from lavi.reduction.resampler import PerceiverResampler
from lavi.vision.hf import HFVision
from lavi.visor.fusion import VisorFusion
from lavi.visor.readers import ModulationReader

FUSIONS = {
    "concat": ConcatFusion,
    "lavi": LaViFusion,
    "lavi-all": lambda: LaViFusion(every=1, generator=small(bottleneck=32)),
    "lavi-mlp": lambda: LaViFusion(generator=small("mlp", depth=2, bottleneck=64)),
    "lavi-conv": lambda: LaViFusion(generator=small("conv", depth=2, bottleneck=64)),
    "lavi-pooled": lambda: LaViFusion(targets=["attention", "ffn", "final"], generator=small("pooled", bottleneck=64)),
    "lavi-scale": lambda: LaViFusion(every=2, parameters="scale", targets=["ffn"]),
    "cross-attention": lambda: CrossAttentionFusion(every=2),
    "cross-attention-alone": lambda: CrossAttentionFusion(fraction=0.5, ffn=0),
    "casa": lambda: CASA(every=2),
    "visor": lambda: VisorFusion(cross_attention=2, self_attention=2),
    "visor-cross": lambda: VisorFusion(cross_attention=2, self_attention=0),
    "visor-fixed": lambda: VisorFusion(cross_attention=[0], self_attention=[1, 2, 3], configuration=[2]),
    "visor-modulation": lambda: VisorFusion(cross_attention=2, self_attention=1, reader=ModulationReader()),
    "visor-routed": lambda: VisorFusion(
        cross_attention=[0], self_attention=[2], configurations=[[], [2]], configuration="none", router="token"
    ),
    "fastv": lambda: FastV(layer=2, keep=0.5),
    "pyramid-drop": lambda: PyramidDrop(stages=4, keep=0.5),
    "evs": lambda: EVS(keep=0.5),
    "late-injection": lambda: LateInjection(first=1, last=2, stages={1: 0.5}),
    "shortv": lambda: ShortV(layers=[0, 2]),
    "vica": lambda: ViCA(layers=[0, 2]),
    "lavi-levels": lambda: LaViFusion(every=1, levels=3),
    "deepstack": lambda: DeepStackFusion(levels=3),
}
ROOT = Path(__file__).parent.parent


class SteadyClock(Clock):
    """Every run takes as long."""

    milliseconds = 32.0

    def start(self) -> None:
        pass

    def stop(self) -> float:
        return self.milliseconds


WIDE = SIGLIP_SO400M | {"num_hidden_layers": 4}, QWEN2_7B | {"num_hidden_layers": 8}
SIZES = {"small": ("cpu", TOWER, QWEN2, -1), "wide": ("meta", *WIDE, -2)}
"""Where a size is built, tower and language model, the tower's layer whose output is read. Small models are counted
fastest on the CPU: on meta many operators run in Python. Wide ones, of 7B but for some layers, only fit on meta."""


@pytest.fixture
def of_size(tokenizer: str):  # type: ignore[no-untyped-def]
    def make(fusion: Fusion, size: str, reducer: Reducer | None = None) -> VisionLanguageModel:
        device, tower, config, layer = SIZES[size]
        with torch.device(device):
            vision, language = HFVision(config=tower, layer=layer), LanguageModel(config=config, tokenizer=tokenizer)
            return VisionLanguageModel(vision=vision, language=language, fusion=fusion, reducer=reducer).eval()

    return make


def typical_prompt(model: VisionLanguageModel, samples: list[Sample]) -> Scenario:
    """Of all questions in the samples."""
    sizes = PromptSizes()
    for sample in samples:
        for prompt, _ in prompts_of(sample):
            sizes.add(model.processor.encode(prompt, prompt=True))
    return sizes.typical(model.vision.tokens)


def test_the_prompt_whose_cost_is_told_shows_what_the_samples_show(build) -> None:  # type: ignore[no-untyped-def]
    model = build(LaViFusion())
    shown = [{"type": "video"}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": shown}, {"role": "assistant", "content": "a"}]
    clip = Sample("clip", list(turns), [Video([image(1)] * 3)])
    one, two, none = (ask(*parts, "what?", answer="a") for parts in ((1,), (1, 2), ()))
    assert typical_prompt(model, [one, one, two]).image == (40, 40)
    assert typical_prompt(model, [two]).visual_tokens == 2 * model.vision.tokens
    assert typical_prompt(model, [none]).visual_tokens == 0
    assert typical_prompt(model, [clip, clip, one]).shape_for(model).encoded == 3
    turns[0] = {"role": "user", "content": [{"type": "video"}, *shown]}
    assert typical_prompt(model, [Sample("two", turns, [*clip.images, *clip.images])]).shape_for(model).encoded == 6


def difference(model: VisionLanguageModel, scenario: Scenario) -> dict[str, float]:
    """How far the closed formula is from the counter, as a share, for each part."""
    shape = scenario.shape_for(model)
    closed, seen = closed_form(model, shape), counted(model, shape)
    views = shape.layout, shape.per_view
    costs = model.fusion.costs(shape.text, *views).values()
    added = shape.batch * sum(cost.flops for cost in costs)
    hidden = shape.batch * sum(cost.uncounted for cost in model.fusion.costs(1, *views, past=shape.text).values())
    formula = {
        "vision_encoder": closed.prefill["vision_encoder"],
        "fusion": added - shape.batch * sum(cost.uncounted for cost in costs),
        "language": closed.language - added,
        "decode": sum(closed.decode.values()) - hidden,
    }
    if not shape.views:
        del formula["fusion"]  # a fusion without an image still computes on one padding token
        formula["decode"] = seen["decode"]
    return {part: abs(formula[part] - seen[part]) / max(seen[part], 1.0) for part in formula}


SCENARIOS = [
    Scenario(text=50),
    Scenario(text=50, visual_tokens=729),
    Scenario(text=10, visual_tokens=64, batch=3),
    Scenario(text=50, frames=4),
]


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_two_counters_agree(of_size, name: str, scenario: Scenario) -> None:
    model = of_size(FUSIONS[name](), "small")
    if name == "visor-routed":
        model.to("meta")  # where nothing is seen that it could choose by: its configuration is what runs
    apart = difference(model, scenario)
    assert max(apart.values()) < 0.01, apart


COSTLY = ["lavi", "lavi-mlp", "lavi-conv", "cross-attention", "casa", "visor-modulation", "visor-routed"]
COSTLY += ["pyramid-drop", "late-injection", "vica", "deepstack"]
"""One with each component that costs."""


@pytest.mark.parametrize("name", COSTLY)
def test_two_counters_agree_at_full_width(of_size, name: str) -> None:
    apart = difference(of_size(FUSIONS[name](), "wide"), Scenario(text=50, visual_tokens=729))
    assert max(apart.values()) < 0.01, apart


def test_two_counters_agree_at_full_size(seven_billion) -> None:
    apart = difference(seven_billion["lavi"], Scenario(text=50, visual_tokens=729))
    assert max(apart.values()) < 0.01, apart


@pytest.mark.parametrize("name", ["lavi", "visor", "fastv"])
def test_operators_cost_the_same_wherever_they_are_counted(of_size, name: str) -> None:
    model = of_size(FUSIONS[name](), "small")
    shape = Scenario(text=50, visual_tokens=64, batch=2).shape_for(model)
    assert counted(model, shape) == counted(model.to("meta"), shape)


VISUAL = ["visor", "fastv", "shortv", "vica"]
"""With visual tokens in the sequence: one of them in turn on each family; two on those of another attention."""
OTHER_ATTENTION = ("gemma2", "deepseek_v2", "diffllama", "gpt_bigcode", "gpt_oss", "qwen3_moe")


OF_FAMILIES = [(family, "lavi") for family in FAMILIES] + [(family, "cross-attention") for family in VARIED]
OF_FAMILIES += [(family, VISUAL[number % 4]) for number, family in enumerate(VARIED)]
OF_FAMILIES += [(family, name) for family in OTHER_ATTENTION for name in ("visor", "fastv")]


@pytest.mark.parametrize(("family", "name"), list(dict.fromkeys(OF_FAMILIES)))
def test_two_counters_agree_for_every_family(build, family: str, name: str) -> None:
    meta = name == "lavi" and family in VARIED  # where profiles are made
    with torch.device("meta" if meta else "cpu"):
        model = build(FUSIONS[name](), family=family, pad_token_id=None)
    apart = difference(model, Scenario(text=50, visual_tokens=64))
    assert max(apart.values()) < 0.01, apart


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_a_planted_error_is_seen(of_size, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    model = of_size(LaViFusion(every=1), "small")
    right = model.fusion.costs

    def wrong(text: int, *shape: Any, past: int = 0) -> dict[str, Cost]:
        slip = 1.02 if part == "prefill" else 2.0
        costs = right(text, *shape, past=past)
        return {name: Cost(slip * cost.flops, cost.uncounted) for name, cost in costs.items()}

    monkeypatch.setattr(model.fusion, "costs", wrong)
    apart = difference(model, Scenario(text=50, visual_tokens=64))
    assert apart["fusion" if part == "prefill" else "decode"] > 0.01


@pytest.mark.parametrize("name", ["concat", "fastv", "deepstack", "lavi"])
def test_the_breakdown_names_each_part(of_size, name: str) -> None:
    """Text and visual tokens apart: what a model costs without its image, and what the image adds."""
    model, scenario = of_size(FUSIONS[name](), "small"), Scenario(text=10, visual_tokens=64, batch=3)
    flops, blind = (closed_form(model, s.shape_for(model)) for s in (scenario, Scenario(text=10, batch=3)))
    parts_of = {"lavi": {"generator", "modulation"}, "concat": {"projector"}, "fastv": {"projector", "ranking"}}
    own = (parts_of | {"deepstack": {"projector", "merger"}})[name]
    parts = {"text_attention", "text_ffn", "visual_attention", "visual_ffn", "head"}
    assert set(flops.prefill) == {"vision_encoder", *own, *parts}
    assert set(flops.decode) - own == {"text_attention", "text_ffn", "visual_attention", "head"}
    for part in ("text_attention", "text_ffn", "head"):
        assert flops.prefill[part] == blind.prefill[part] > 0
        assert flops.decode[part] == blind.decode[part] > 0
    assert flops.floor == blind.floor == sum(flops.prefill[part] for part in ("text_attention", "text_ffn", "head"))
    inside = scenario.shape_for(model).visual_tokens_in_language(model)
    visual = model.fusion.visual_by_layer(inside, len(model.language.layers))
    whole = language_flops(model.language, tokens=[10 + count for count in visual])
    assert flops.prefill["visual_attention"] == pytest.approx(3 * whole["attention"] - flops.prefill["text_attention"])
    assert flops.prefill["visual_ffn"] == pytest.approx(3 * whole["ffn"] - flops.prefill["text_ffn"])
    keys = (
        4.0 * sum(visual) * model.language.attention_widths(0).query
    )  # a token reads them, and computes nothing else for them
    assert flops.decode["visual_attention"] == pytest.approx(3 * keys)
    assert flops.language + flops.prefill["vision_encoder"] == flops.total == sum(flops.prefill.values())


@pytest.mark.parametrize("tokens", [[10] * 4, [10, 20, 20, 30]], ids=str)
def test_every_matrix_of_a_layer_meets_every_token(of_size, tokens: list[int]) -> None:
    language = of_size(ConcatFusion(), "small").language
    layer, config, flops = language.layers[0], language.hf.config, language_flops(language, tokens=tokens)
    matrices = {name: sum(p.numel() for p in m.parameters() if p.ndim == 2) for name, m in layer.named_children()}
    assert flops["ffn"] == 2 * sum(tokens) * matrices["mlp"]
    assert flops["scores"] == 4 * sum(count**2 for count in tokens) * language.attention_widths(0).query
    assert flops["attention"] - flops["scores"] == 2 * sum(tokens) * matrices["self_attn"]
    assert flops["head"] == 2 * config.hidden_size * config.vocab_size
    behind = language_flops(language, tokens=[1] * 4, past=tokens)
    assert behind["scores"] == 4 * sum(count + 1 for count in tokens) * language.attention_widths(0).query


def test_a_token_meets_the_experts_that_it_is_sent_to(build) -> None:
    """Two of four, and the router; so does the operator counter, which does not know transformers' own kernel."""
    with torch.device("meta"):
        model = build(ConcatFusion(), family="qwen3_moe", pad_token_id=None)
    layer, flops = model.language.layers[0], language_flops(model.language, tokens=[10] * 4)
    experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    assert flops["ffn"] == 4 * 2 * 10 * (experts / 2 + layer.mlp.gate.weight.numel())


@pytest.mark.parametrize(
    ("past", "tokens", "keys"),
    [(0, 20, 20), (3, 1, 4), (7, 1, 8), (8, 1, 8), (20, 1, 8), (20, 3, 10), (6, 3, 9)],
)
def test_a_sliding_window_keeps_no_more_of_the_past(build, past: int, tokens: int, keys: int) -> None:
    """Of a window of 8 a new token reads itself and the last 7 before it; a prompt is counted in full."""
    with torch.device("meta"):
        model = build(ConcatFusion(), family="mistral", sliding_window=8, pad_token_id=None)
    layers = len(model.language.layers)
    flops = language_flops(model.language, tokens=[tokens] * layers, past=[past] * layers)
    assert flops["scores"] == 4 * tokens * keys * layers * model.language.attention_widths(0).query


@pytest.mark.parametrize("scenario", [Scenario(text=20, frames=2, batch=2), Scenario(text=20)], ids=str)
def test_the_reducer_is_a_part_of_its_own(of_size, scenario: Scenario) -> None:
    model = of_size(ConcatFusion(), "small", reducer=PerceiverResampler(tokens=4, heads=4))
    shape = scenario.shape_for(model)
    closed, by_operator = closed_form(model, shape), counted(model, shape)
    images = shape.batch * shape.encoded
    assert closed.prefill["reducer"] == images * model.reducer.flops()
    assert by_operator["reducer"] == pytest.approx(closed.prefill["reducer"], rel=0.01)
    assert by_operator["vision_encoder"] == pytest.approx(closed.prefill["vision_encoder"], rel=0.01)
    assert (by_operator["reducer"] > 0) == (by_operator["vision_encoder"] > 0) == (images > 0)
    bare = of_size(ConcatFusion(), "small")
    assert "reducer" not in closed_form(bare, scenario.shape_for(bare)).prefill
    assert counted(bare, scenario.shape_for(bare))["reducer"] == 0


PUBLISHED = {  # width x height or frames: crops, visual tokens, vision and language TFLOPs, ceilings with and without
    "384x384": (2, 1485, 1.28, 21.0, 91.3, 96.9),
    "640x480": (5, 2929, 3.21, 42.4, 91.6, 98.5),
    "1024x1024": (10, 7371, 6.42, 119.0, 94.4, 99.4),
    "2304x2304": (37, 7371, 23.75, 119.0, 83.0, 99.4),
    "32 frames": (32, 6273, 20.5, 98.6, 82.3, 99.3),
}


@pytest.fixture(scope="module")
def seven_billion() -> dict[str, VisionLanguageModel]:
    """LaVi and LLaVA-OneVision of 7B, from the recipes."""
    files = {"lavi": "lavi/qwen2_7b_siglip_stage2", "concat": "baselines/llava_onevision_7b"}
    return {name: build_on(Recipe.load(ROOT / "recipes" / f"{file}.yaml"), "meta") for name, file in files.items()}


@pytest.mark.parametrize("seen", PUBLISHED)
def test_the_sizes_of_the_published_baseline(seven_billion, seen: str) -> None:
    """From the recipes, within 1 % of what the released configurations give."""
    crops, tokens, vision, language, with_vision, without = PUBLISHED[seen]
    number, _, unit = seen.partition(" ")
    if unit:
        scenario = Scenario(frames=int(number))
    else:
        width, height = map(int, seen.split("x"))
        scenario = Scenario(image=(width, height))
    shape = scenario.shape_for(seven_billion["concat"])
    assert (shape.encoded, shape.visual_tokens_in_language(seven_billion["concat"])) == (crops, tokens)
    base = closed_form(seven_billion["concat"], shape)
    assert base.prefill["vision_encoder"] == pytest.approx(vision * 1e12, rel=0.01)
    assert base.language - base.prefill["projector"] == pytest.approx(language * 1e12, rel=0.01)
    assert base.floor == pytest.approx(0.65e12, rel=0.01)
    encoder, projector = base.prefill["vision_encoder"], base.prefill["projector"]
    ceiling = 100 * (1 - (encoder + base.floor) / (base.total - projector))
    assert ceiling == pytest.approx(with_vision, abs=0.1)
    assert 100 * (1 - base.floor / (base.language - projector)) == pytest.approx(without, abs=0.1)
    own = closed_form(seven_billion["lavi"], scenario.shape_for(seven_billion["lavi"]))
    assert 1 - own.language / base.language > 0.94
    assert own.total <= 1.05 * (own.prefill["vision_encoder"] + own.floor)


def test_the_size_of_llava_1_5() -> None:
    model = build_on(Recipe.load(ROOT / "recipes" / "baselines" / "llava_1_5_7b.yaml"), "meta")
    flops = closed_form(model, Scenario(image=(640, 480)).shape_for(model))
    assert flops.prefill["vision_encoder"] == pytest.approx(0.366e12, rel=0.01)
    assert flops.language - flops.prefill["projector"] == pytest.approx(8.3e12, rel=0.01)


def test_modulation_is_counted_though_no_operator_shows_it(of_size) -> None:
    model = of_size(LaViFusion(every=2), "small")
    cost = model.fusion.costs(50, Layout(), 64)["modulation"]
    assert cost.flops == cost.uncounted == (3 + 1 + 1 + 1) * 4 * 50 * QWEN2["hidden_size"]


@pytest.mark.parametrize("name", ["concat", "lavi", "fastv"])
def test_a_causal_kernel_leaves_out_what_the_mask_hides(of_size, name: str) -> None:
    """Counted by torch for one layer in full, and by the pairs of tokens above the diagonal."""
    model, scenario = of_size(FUSIONS[name](), "small"), Scenario(text=50, visual_tokens=64, batch=2)
    shape, hf = scenario.shape_for(model), model.language.hf.config
    hidden = 0.0
    for visual in model.fusion.visual_by_layer(shape.visual_tokens_in_language(model), hf.num_hidden_layers):
        tokens = shape.text + visual
        query = torch.empty(shape.batch, hf.num_attention_heads, tokens, 8, device="meta")
        with FlopCounterMode(display=False) as counter:
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
        hidden += counter.get_total_flops() * torch.ones(tokens, tokens).triu(diagonal=1).mean().item()
    assert closed_form(model, shape).causal_discount == pytest.approx(hidden, rel=0.025)  # the diagonal: 1 in 50


def test_savings_stay_below_their_ceiling(tiny_recipe: Path) -> None:
    recipe = Recipe.load(tiny_recipe)
    twin = concat_twin(recipe)
    own, base = (count(r, build_on(r, "meta"), Scenario(text=12, visual_tokens=64)) for r in (recipe, twin))
    for with_vision in (False, True):
        saved, ceiling = saving(own, base, with_vision=with_vision)
        assert 0 < saved < ceiling < 100


def measured(recipe: Recipe, model: VisionLanguageModel, scenario: Scenario, **settings: Any) -> Record:
    """One model at one prompt, alone."""
    record = count(recipe, model, scenario)
    measure([Measurement(record, scenario, lambda: model)], device=torch.device("cpu"), **{"runs": 2} | settings)
    return record


def test_measuring_changes_nothing(tiny_recipe: Path) -> None:
    recipe, scenario = Recipe.load(tiny_recipe), Scenario(text=12, image=(40, 30))
    model = build_on(recipe, "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random, cache = torch.random.get_rng_state(), model.language.hf.config.use_cache
    record = measured(recipe, model, scenario, runs=3, outputs=[1, 3])
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert model.language.hf.config.use_cache == cache
    stages = {"preprocessing", "vision_encoder", "fusion", "prefill", "first_token", "decode"}
    floors = {"floor_prefill", "floor_decode", "floor_first_token"}
    answers = {"end_to_end_1", "end_to_end_3", "floor_end_to_end_1", "floor_end_to_end_3"}
    assert stages | floors | answers == set(record.milliseconds) == set(record.intervals) == set(record.turns)
    assert set(record.ratios["floor"]) == {"prefill", "decode", "first_token", "end_to_end_1", "end_to_end_3"}
    for median, p10, p90 in record.milliseconds.values():
        assert 0 < p10 <= median <= p90


def test_building_to_measure_leaves_the_random_state(tiny_recipe: Path) -> None:
    random = torch.random.get_rng_state()
    build_on(Recipe.load(tiny_recipe), "cpu")
    assert torch.equal(random, torch.random.get_rng_state())


def test_memory_by_class(tiny_recipe: Path) -> None:
    recipe, scenario = Recipe.load(tiny_recipe), Scenario(text=12, visual_tokens=16, batch=2)
    model = build_on(recipe, "cpu")
    mib = measured(recipe, model, scenario).mib
    sizes = {name: round(size * 2**20) for name, size in mib.items()}
    layers, rows, tokens, heads, head_width = 4, 2, 12, QWEN2["num_key_value_heads"], 8
    assert sizes["weights"] == sum(p.numel() * 4 for p in model.parameters())
    assert sizes["kv_cache"] == layers * 2 * rows * tokens * heads * head_width * 4
    assert sizes["visual_features"] == rows * 16 * model.vision.width * 4
    assert sizes["visual_cache"] == 2 * rows * 16 * 2 * 16 * 4  # 2 generators, keys and values of width 16
    assert sizes["logits"] == rows * model.language.hf.config.vocab_size * 4
    assert sizes["peak"] > sizes["kv_cache"] + sizes["visual_cache"]


def test_memory_grows_with_the_tokens_in_the_language_model(tiny_recipe: Path) -> None:
    twin = concat_twin(Recipe.load(tiny_recipe))
    model = build_on(twin, "cpu")
    few, many = (
        measured(twin, model, scenario).mib
        for scenario in (Scenario(text=12, visual_tokens=16), Scenario(text=12, visual_tokens=128))
    )
    assert many["kv_cache"] == pytest.approx(few["kv_cache"] * 140 / 28)
    assert many["peak"] > few["peak"]


def test_a_point_without_memory_is_recorded_and_the_sweep_goes_on(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = VisionLanguageModel.prefill

    def full(self: VisionLanguageModel, batch, features, *cache):  # type: ignore[no-untyped-def]
        if len(batch) == 4 and not features.is_meta:
            raise torch.OutOfMemoryError("no more")
        return prefill(self, batch, features, *cache)

    monkeypatch.setattr(VisionLanguageModel, "prefill", full)
    base = Scenario(text=12, visual_tokens=16)
    sweep = Sweep.parse("batch=2,4,8")
    records = list(sweep_records([Recipe.load(tiny_recipe)], sweep, base, device=torch.device("cpu"), runs=2))
    assert [record.error for record in records] == ["", "out of memory", ""]
    assert [bool(record.milliseconds) for record in records] == [True, False, True]
    assert records[1].flops["text_ffn"] == 2 * records[0].flops["text_ffn"]


def test_adapters_are_counted_as_merged(tiny_recipe: Path) -> None:
    plain = Recipe.load(tiny_recipe)
    adapted = plain.replaced("model.language.lora", {"rank": 4})
    scenario = Scenario(visual_tokens=16)
    own, other = (count(recipe, build_on(recipe, "meta"), scenario).flops for recipe in (plain, adapted))
    assert own == other


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("visual_tokens=0..64", (0, 1, 9, 36, 64)),
        ("visual_tokens=10..100", (10, 36, 64, 100)),
        ("image=384x300,500", ((384, 300), (500, 500))),
        ("image=336..512", ((336, 336), (384, 384), (512, 512))),
        ("frames=1..8,3", (1, 2, 4, 8, 3)),
        ("model.fusion.every=1,2", (1, 2)),
        ("model.fusion.generator=conv", ("conv",)),
        ("model.fusion.layers=[1],[0, 2]", ([1], [0, 2])),
    ],
)
def test_sweeps_are_read(text: str, values: tuple[object, ...]) -> None:
    assert Sweep.parse(text).values == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frames", "KNOB=VALUES"),
        ("frame=1", "did you mean 'frames'"),
        ("frames=0", "from 1 on"),
        ("frames=8..1", "runs backwards"),
        ("image=axb", "sizes such as 640x480"),
        ("image=100000", "16384 pixels a side"),
        ("batch=two", "whole numbers"),
        ("image=640x480..1024", "a range is one of squares"),
        ("model.fusion.targets=[attention", "not readable as YAML"),
        ("data.batch_size=1,2", "there is no knob 'data.batch_size'"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sweep.parse(text)


def test_a_sweep_of_layers_turns_the_fusion(tiny_recipe: Path) -> None:
    recipe = Recipe.load(tiny_recipe)
    sweep = Sweep.parse("layers=1,2,4")
    records = list(sweep_records([recipe, concat_twin(recipe)], sweep, Scenario(visual_tokens=16)))
    own = [record.flops["modulation"] for record in records if record.method == "lavi"]
    assert own == [own[0], 2 * own[0], 4 * own[0]]
    assert len({record.gflops_total for record in records if record.method == "concat"}) == 1
    with pytest.raises(UserError, match="1 to 4 layers"):
        list(sweep_records([recipe], Sweep.parse("layers=5"), Scenario()))


def test_a_sweep_of_a_key_leaves_concatenation_as_it_is(tiny_recipe: Path) -> None:
    recipe = Recipe.load(tiny_recipe)
    sweep = Sweep.parse("model.fusion.layers=[1],[0,2]")
    records = list(sweep_records([recipe, concat_twin(recipe)], sweep, Scenario()))
    assert [record.method for record in records] == ["lavi", "concat"] * 2
    assert records[2].flops["modulation"] == 2 * records[0].flops["modulation"]
    assert records[1].flops == records[3].flops
    assert point_of(records[0]) == point_of(records[1]) != point_of(records[2])
    assert [x_value(record) for record in records] == [0, 0, 1, 1]
    with pytest.raises(UserError, match="is unknown to"):
        list(sweep_records([recipe, concat_twin(recipe)], Sweep.parse("model.fusion.evry=1"), Scenario()))


def test_a_sweep_a_model_cannot_take_is_refused_before_anything_is_counted(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavi.efficiency.sweep.count", lambda *_: pytest.fail("counted"))
    recipes = [Recipe.load(tiny_recipe), concat_twin(Recipe.load(tiny_recipe))]
    with pytest.raises(UserError, match=r"1024 visual tokens .* more than the 256 positions"):
        list(sweep_records(recipes, Sweep.parse("visual_tokens=16,1024"), Scenario(text=12)))


def test_records_round_trip_and_become_curves(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("lavi.efficiency.measure.clock_of", lambda _: SteadyClock())
    monkeypatch.setattr("lavi.efficiency.measure.WaitMeter.share", lambda _: 0.0)
    recipe = Recipe.load(tiny_recipe)
    records = Efficiency(visual_tokens=[0, 16, 64], text_tokens=12, runs=6).sweep(recipe, torch.device("cpu"))
    write_records(records, tmp_path / "r.jsonl")
    assert read_records(tmp_path / "r.jsonl") == records
    assert [(r.method, r.visual_tokens) for r in records] == [(m, n) for n in (0, 16, 64) for m in ("lavi", "concat")]
    write_curves(records, tmp_path)
    write_savings(records, tmp_path)
    for line, method in (("tiny", "lavi"), ("tiny-(concat)", "concat")):
        events = EventAccumulator(str(tmp_path / f"efficiency-{line}")).Reload()
        curve = events.Scalars("efficiency over visual_tokens/GFLOPs without vision encoder")
        assert [point.step for point in curve] == [0, 16, 64]
        wanted = [r.gflops_language for r in records if r.method == method]
        assert [point.value for point in curve] == pytest.approx(wanted, rel=1e-6)
        times = [
            events.Scalars(f"efficiency over visual_tokens{part}/ms of one more token")[0].value
            for part in (", low", "", ", high")
        ]
        assert times == [SteadyClock.milliseconds] * 3
        assert events.Scalars("efficiency over visual_tokens/one more token, times the floor")[0].value == 1
        saved = events.Scalars("saved %/without vision encoder")[0].value
        assert (saved > 50) == (method == "lavi")


def test_a_report_is_a_table_a_spreadsheet_and_a_picture(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(tiny_recipe)
    records = list(sweep_records([recipe, concat_twin(recipe)], Sweep.parse("image=40x30,64"), Scenario(text=12)))
    (table,) = sweep_tables(records)
    assert table.row_count == 4
    write_csv(records, tmp_path / "r.csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert [row["scenario"] for row in rows] == ["40x30", "40x30", "64x64", "64x64"]
    assert float(rows[0]["flops"]) == pytest.approx(2 * float(rows[0]["macs"]))
    draw_curves(records, tmp_path / "r.png")
    with Image.open(tmp_path / "r.png") as picture:
        assert min(picture.size) > 300


def test_the_floor_that_is_drawn_is_that_of_one_method(tiny_recipe: Path, tmp_path: Path) -> None:
    """Of two decoders that of the first: a line has one value at each x."""
    first = Recipe.load(tiny_recipe)
    wide = tiny_recipe.with_name("wide.yaml")
    wide.write_text("extends: tiny.yaml\nname: wide\nmodel: {language: {config: {intermediate_size: 640}}}\n")
    records = list(sweep_records([first, Recipe.load(wide)], Sweep.parse("image=40,64"), Scenario(text=12)))
    lines = _lines(records)
    assert len(lines) == 3
    assert all([x for x, _ in points["GFLOPs without vision encoder"]] == [40, 64] for points in lines.values())
    floors = [record.flops_floor / 1e9 for record in records if line_name(record) == line_name(records[0])]
    assert [y for _, y in lines[FLOOR]["GFLOPs without vision encoder"]] == pytest.approx(floors)


def test_pixels_to_time_with_repeat_nothing(build) -> None:  # type: ignore[no-untyped-def]
    """Blank ones would be encoded in no time where repeated patches are dropped."""
    model = build(LaViFusion(every=2))
    shape = Scenario(text=12, image=(32, 32)).shape_for(model)
    pixels = shape.pixels(model, "cpu")
    assert torch.equal(pixels, shape.pixels(model, "cpu"))
    assert len(pixels.flatten().unique()) > 0.99 * pixels.numel()
    assert shape.pixels(model, "meta").is_meta


def test_a_small_model_reads_as_deep_a_level_as_the_others() -> None:
    """What is timed in the place of full size has the same encoder, whether one layer is read or several."""
    plain, levels = (
        shrunk(recipe_at(f"lavi/qwen2_7b_siglip_{name}")).settings["model"]["vision"]["layer"]
        for name in ("stage2", "levels")
    )
    assert levels[-1] == plain
    assert len(levels) == 3


def test_nothing_that_can_be_counted_is_no_report(tiny_recipe: Path, tmp_path: Path) -> None:
    records = Efficiency(visual_tokens=[4], text_tokens=500, runs=0).sweep(Recipe.load(tiny_recipe))
    assert records == sweep_tables(records) == []
    write_curves(records, tmp_path)
    write_savings(records, tmp_path)
    assert not list(tmp_path.glob("efficiency*"))
    with pytest.raises(UserError, match="name one"):
        Efficiency(visual_tokens=[])


def test_a_sweep_beyond_the_positions_is_left_out_and_said(tiny_recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = Efficiency(visual_tokens=[1024], text_tokens=12, runs=0).sweep(Recipe.load(tiny_recipe))
    assert [r.method for r in records] == ["lavi"]
    assert "more than the 256 positions" in caplog.text


def test_an_old_record_without_new_fields_still_reads() -> None:
    line = '{"method": "lavi", "text_tokens": 1, "visual_tokens": 2, "visual_tokens_in_language": 0, "views": 1}'
    assert Record.from_json(line).gflops_total == 0
