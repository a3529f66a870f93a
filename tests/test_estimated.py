"""Memory and time without a device: storages as a profiler sees them, operators as a counter counts them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import estimates as benchmark
import pytest
import serving
import torch
from conftest import refused
from sizes import QWEN2_7B, SIGLIP_SO400M, recipe_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lavi.batch import Layout
from lavi.efficiency.comparison import side_by_side
from lavi.efficiency.estimated import TrainingMemory, milliseconds, traces, training_step
from lavi.efficiency.flops import closed_form
from lavi.efficiency.hardware import DEVICES, GAP, Device, as_one_graph, device_named, fits_in, this_cpu
from lavi.efficiency.measure import build_on, note_mean_flops, saving_of_samples
from lavi.efficiency.memory import MIB, prefill_memory
from lavi.efficiency.operators import Operator, trace
from lavi.efficiency.record import Record
from lavi.efficiency.scenario import Scenario
from lavi.recipe import Recipe


@pytest.mark.parametrize("width", [128, 256])
def test_the_peak_is_that_of_the_profiler(width: int) -> None:
    """Of prompts and training steps of each fusion: within 5 %."""
    for record in benchmark.of_memory([width], rows=2, text=60):
        assert record["told"] == pytest.approx(record["seen"], rel=0.05), record


def test_a_storage_counts_until_nothing_holds_it() -> None:
    kept: list[torch.Tensor] = []

    def run() -> None:
        x = torch.empty(1000, device="meta")  # 4000 bytes
        kept.append(x + 1)  # and another 4000
        x = x * 2  # three at once, then two
        view = x.view(10, 100).t()  # none of its own
        view.add_(1)  # nor in place
        kept.append(view.reshape(-1) + 1)  # a copy, and a sum of it

    seen = trace(run)
    assert seen.peak == 16000
    assert [operator.name for operator in seen.operators] == ["empty", "add", "mul", "add_", "clone", "add"]
    assert [operator.bytes for operator in seen.operators[1:4]] == [8000, 8000, 8000]


def test_fused_attention_stores_no_scores() -> None:
    query = torch.empty(1, 2, 512, 64, device="meta", requires_grad=True)
    run = lambda: nn.functional.scaled_dot_product_attention(query, query, query)  # noqa: E731
    seen = trace(run)
    assert seen.peak == query.numel() * 4
    assert seen.flops == 4 * 2 * 512 * 512 * 64
    both = trace(lambda: run().sum().backward())
    assert both.flops == 3.5 * seen.flops
    assert both.peak < 2 * 512 * 512 * 4
    assert query.grad is not None


@pytest.mark.parametrize("fusion", benchmark.FUSIONS)
def test_operators_have_the_flops_of_the_formula(fusion: str) -> None:
    model = benchmark.build(fusion, 128, "meta")
    shape = Scenario(20, image=(224, 224)).shape_for(model)
    of, formula = traces(model, shape), closed_form(model, shape)
    modulation = [formula.prefill.get("modulation", 0.0), formula.decode.get("modulation", 0.0)]
    slip = 1e-5  # transformers 5.17 multiplies matrices for rotary embeddings
    assert of["prefill"].flops == pytest.approx(formula.language - modulation[0], rel=slip)
    assert of["decode"].flops == pytest.approx(sum(formula.decode.values()) - modulation[1], rel=slip)
    assert of["floor_prefill"].flops == pytest.approx(formula.floor, rel=slip)
    assert of["vision_encoder"].flops == formula.prefill["vision_encoder"]
    assert (
        prefill_memory(model, shape, device=torch.device("meta"))["weights"]
        == sum(p.numel() * 4 for p in model.parameters()) / MIB
    )


SLOW = Device("slow", half=2e9, single=1e9, bandwidth=1e6, launch=1e-3, source="made up")


def test_a_roofline_is_the_larger_of_arithmetic_and_traffic() -> None:
    product = Operator("mm", flops=4e9, bytes=1e6, dtype=torch.float32)
    copy = Operator("clone", flops=0, bytes=2e6, dtype=torch.float32)
    half = Operator("mm", flops=4e9, bytes=1e6, dtype=torch.bfloat16)
    assert as_one_graph(SLOW).seconds([product, copy, half]) == pytest.approx(4 + 2 + 2 + 3 * GAP)
    assert SLOW.seconds([product, copy]) == pytest.approx(1e-3 + 4 + 2 + 2 * GAP)  # launched while the first runs
    small = Operator("add", flops=0, bytes=10, dtype=torch.float32)
    assert SLOW.seconds([small] * 100) == pytest.approx(100e-3 + 1e-5 + GAP)  # the host is the slower one
    waiting = Device(**{**vars(SLOW), "runs_ahead": False})
    assert waiting.seconds([small] * 100) == pytest.approx(100e-3 + 100 * 1e-5)


def test_a_measured_roofline_is_followed_between_its_points() -> None:
    measured = {torch.float32: [(0.5, 1e9), (8.0, 4e9), (128.0, 4.5e9)]}
    device = Device(**{**vars(SLOW), "launch": 0.0, "runs_ahead": False, "products": measured})

    def rate(intensity: float, dtype: torch.dtype = torch.float32) -> float:
        return 1e9 / device.seconds([Operator("mm", 1e9, 1e9 / intensity, dtype)])

    assert [rate(point) for point in (0.5, 8.0, 128.0)] == pytest.approx([1e9, 4e9, 4.5e9])
    assert rate(2.0) == pytest.approx(2e9)  # half way, in logarithms
    assert rate(0.05) == pytest.approx(1e8)  # 2e9 bytes a second, as at the first point
    assert rate(1e4) == pytest.approx(4.5e9)
    assert rate(8.0, torch.bfloat16) == pytest.approx(8e6)  # not measured: traffic of 1e6 bytes a second
    assert device.seconds([Operator("clone", 0, 2e6, torch.float32)]) == pytest.approx(2)


def test_this_cpu_s_roofline_is_measured() -> None:
    device = this_cpu()
    for dtype in (torch.float32, torch.bfloat16):
        intensity, rates = zip(*device.products[dtype], strict=True)
        assert list(intensity) == sorted(intensity)
        assert min(rates) > 0
    assert device.single == device.products[torch.float32][-1][1]


def test_a_causal_kernel_takes_half_the_time_and_is_counted_in_full() -> None:
    query = torch.empty(1, 2, 4, 8, device="meta")
    (full,), (causal,) = (
        trace(lambda on=on: nn.functional.scaled_dot_product_attention(query, query, query, is_causal=on)).operators
        for on in (False, True)
    )
    assert causal.flops == full.flops == 2 * 2 * 2 * 4 * 4 * 8
    assert (full.skipped, causal.skipped) == (0, full.flops * 6 / 16)  # of 4 x 4 scores the 6 above the diagonal
    busy = Device(**{**vars(SLOW), "launch": 0.0, "bandwidth": 1e12, "runs_ahead": False})
    assert busy.seconds([causal]) == pytest.approx(10 / 16 * busy.seconds([full]))


def test_the_tower_is_part_of_a_first_token() -> None:
    model = benchmark.build("lavi", 128, "meta")
    times = milliseconds(traces(model, Scenario(20, image=(224, 224)).shape_for(model)), DEVICES["h100"])
    assert times["first_token"] == times["vision_encoder"] + times["prefill"]
    assert times["floor_first_token"] == times["vision_encoder"] + times["floor_prefill"]
    assert times["prefill"] > times["floor_prefill"]


def test_one_graph_takes_less_where_launches_decide() -> None:
    model = benchmark.build("lavi", 128, "meta")
    of = traces(model, Scenario(20, image=(224, 224)).shape_for(model))
    eager, graph = (milliseconds(of, device_named(name))["decode"] for name in ("h100", "h100-graph"))
    assert graph < 0.5 * eager
    for operators in ([Operator("mm", 1e12, 1e9, torch.bfloat16)] * 9, [Operator("add", 0, 10, torch.bfloat16)] * 9):
        assert as_one_graph(DEVICES["h100"]).seconds(operators) <= DEVICES["h100"].seconds(operators)


def test_the_smallest_gpu_that_holds_it() -> None:
    assert [fits_in(1024 * gib) for gib in (1, 21.3, 21.5, 60, 100, 139)] == [
        "24 GiB", "24 GiB", "40 GiB", "80 GiB", "141 GiB", "> 141 GiB",
    ]  # fmt: skip


def test_profile_estimates_for_devices_that_are_not_there(run: Any, tiny_recipe: Any) -> None:
    command = ["lavi.profile", "--recipe", tiny_recipe, "--sweep", "batch=1,8", "--at", "image=32x32"]
    status, said, err = run(*command, "--estimate", "h100", "l4", "--out", "profile")
    assert status == 0, err
    assert "Estimated from the operators' shapes" in said
    assert "fits in" in said
    assert "ms a token L4" in " ".join(said.split())
    assert "estimated ms decode H100" in Path("profile/records.csv").read_text()
    refused(run(*command, "--estimate", "h1000"), "did you mean 'h100'")
    status, said, err = run(*command, "--training", "4", "--text", "20")
    assert status == 0, err
    assert "GiB of a training step of 4 x 32x32, 20 text tokens; estimated" in " ".join(said.split())
    assert "trainer.precision" not in said
    _, said, _ = run(*command, "--training", "4", "--text", "20", "trainer.precision=bf16-mixed")
    assert "trainer.precision=bf16-mixed keeps most" in " ".join(said.split())


def test_what_ranks_share_and_what_they_double() -> None:
    step = TrainingMemory(weights=8.0, gradients=4.0, optimizer=8.0, activations=3.0, gathered=2.0)
    assert step.mib() * MIB == 23
    assert step.mib(8, "ddp") * MIB == 27
    assert step.mib(8, "fsdp2") * MIB == 20 / 8 + 2 * 1.5 + 3


def test_recomputed_layers_keep_less(tiny_recipe: Any) -> None:
    recipe = Recipe.load(tiny_recipe)
    steps = [
        training_step(recipe.replaced("module.checkpointing", on), Scenario(200, batch=8, image=(32, 32)))
        for on in (False, True)
    ]
    assert steps[1].activations < 0.7 * steps[0].activations
    assert steps[0].gradients == steps[1].gradients > 0
    assert steps[0].optimizer == 2 * steps[0].gradients


def test_the_mean_over_samples_weighs_each_prompt() -> None:
    model = benchmark.build("concat", 128, "meta")
    picture = Layout(size=(224, 224))
    record = Record("concat", 0, 0, 0, 0)
    note_mean_flops(record, model, Counter({(10, None): 1, (30, picture): 3}))
    bare, seeing = (
        closed_form(model, Scenario(t, image=i).shape_for(model)) for t, i in ((10, None), (30, (224, 224)))
    )
    assert record.flops_of_samples["floor"] == pytest.approx((bare.floor + 3 * seeing.floor) / 4)
    whole = sum(value for part, value in record.flops_of_samples.items() if part != "floor")
    assert whole == pytest.approx((bare.total + 3 * seeing.total) / 4)
    saved, ceiling = saving_of_samples(record, record, with_vision=True)
    assert saved == 0
    assert ceiling == pytest.approx(
        100 * (1 - (record.flops_of_samples["floor"] + 3 * seeing.prefill["vision_encoder"] / 4) / whole)
    )
    record.flops, record.flops_floor = seeing.prefill, seeing.floor
    _, rows = side_by_side([record], record)
    assert ["saved, mean over samples of at most one image, with vision encoder (%)", "0.0"] in rows
    many = Counter({(n, None): 1 for n in range(1, 1001)})
    note_mean_flops(record, model, many)
    true = sum(closed_form(model, Scenario(n).shape_for(model)).total for n in range(1, 1001, 37)) / len(
        range(1, 1001, 37)
    )
    assert sum(v for p, v in record.flops_of_samples.items() if p != "floor") == pytest.approx(true, rel=0.1)


def test_estimates_stand_beside_measurements() -> None:
    records = list(benchmark.of_time([20], width=128, turns=1))
    assert [record["what"] for record in records] == ["ms, prefill", "ms, decode"] * 2
    columns, rows = benchmark.estimates_table(records)
    assert {len(row) for row in rows} == {len(columns)}


def test_a_counter_of_operators_knows_fused_attention() -> None:
    query = torch.empty(1, 2, 8, 4, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.ops.lavi.fused_attention(query, query, query, False)
    assert counter.get_total_flops() == 4 * 2 * 8 * 8 * 4


def test_requests_are_answered_in_batches_as_they_arrive() -> None:
    done: list[int] = []
    answer = {rows: lambda rows=rows: done.append(rows) for rows in (1, 2, 4)}
    times = serving.arrivals(1e6, 9)  # all at once
    assert times == serving.arrivals(1e6, 9)
    assert sorted(times) == times
    assert serving.arrivals(2.0, 9)[-1] == pytest.approx(9 / 2.0)  # at the rate that is asked for
    served = serving.serve(answer, times, torch.device("cpu"))
    assert sum(done) == 9
    assert set(done) <= {1, 2, 4}
    assert served["p50"] <= served["p90"] <= served["p99"]
    record = {"method": serving.CONCAT, "share": 0.5, "asked": 0.9, "capacity": 2.0, **served}
    columns, rows = serving.serving_table([record])
    assert [len(row) for row in rows] == [len(columns)]


@pytest.mark.parametrize(("fused_norm", "most"), [(True, 1.0), (False, 1.11)])
def test_a_step_of_lavi_7b_issues_few_operators_more_than_the_bare_model(
    tokenizer: str, fused_norm: bool, most: float
) -> None:
    recipe = recipe_of(SIGLIP_SO400M, QWEN2_7B, Path(tokenizer), source="a test", fused_norm=fused_norm)
    model = build_on(recipe, "meta")
    of = traces(model, Scenario(50, image=(384, 384)).shape_for(model))
    assert len(of["decode"].operators) <= most * len(of["floor_decode"].operators)
