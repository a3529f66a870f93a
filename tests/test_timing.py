"""Times that can be believed: turns, intervals, noise. With scripted times: no test here depends on a clock."""

from __future__ import annotations

import csv
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import busy
import prefill
import pytest
import torch
from conftest import refused
from fusions_on_one import TINY
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lavi.efficiency import latency, measure
from lavi.efficiency.comparison import side_by_side
from lavi.efficiency.estimate import FEWEST, NOISE, estimate, ratio, values_outside
from lavi.efficiency.figures import curve_values, sweep_rows, turns_rows, waiting_note, write_csv
from lavi.efficiency.latency import (
    LONGEST,
    MOST,
    WARMUP,
    Clock,
    Contestant,
    DeviceClock,
    half_the_threads,
    time_in_turns,
)
from lavi.efficiency.measure import Measurement, build_on, concat_twin, count
from lavi.efficiency.record import Record, check_writable
from lavi.efficiency.scenario import PromptShape, Scenario
from lavi.efficiency.steps import Steps
from lavi.efficiency.sweep import Sweep, sweep_records
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.deepstack import DeepStackFusion
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.pruning import FastV
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.visor.fusion import VisorFusion

CPU = torch.device("cpu")
PROMPT = Scenario(text=12, visual_tokens=16)
TIMES = st.lists(st.floats(1.0, 1000.0), min_size=1, max_size=60)


class ScriptedClock(Clock):
    """Time passes only where somebody says so, and a little at each start."""

    def __init__(self, start: float = 1.0) -> None:
        self.now, self.least = 0.0, start

    def start(self) -> None:
        self.began = self.now
        self.now += self.least

    def stop(self) -> float:
        return self.now - self.began


# --- medians, intervals and noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 13))
def test_the_interval_holds_the_median_in_95_of_100_draws(count: int) -> None:
    """Counted over all ways in which so many values can fall below and above the median of what they are drawn from."""
    outside = values_outside(count)

    def share(left_out: int) -> float:
        """How often the median is between the values behind the first and before the last so many."""
        below = Counter(sum(draw) for draw in product((0, 1), repeat=count))
        return sum(below[number] for number in range(left_out + 1, count - left_out)) / 2**count

    if count < FEWEST:
        assert outside == 0
        assert share(0) < 0.95
    else:
        assert share(outside) >= 0.95 > share(outside + 1)


@given(TIMES, st.randoms())
def test_an_interval_lies_around_its_median_whatever_the_order(times: list[float], random: Any) -> None:
    interval = estimate(times)
    assert min(times) <= interval.low <= interval.median <= interval.high <= max(times)
    assert interval.median == median(times)
    random.shuffle(times)
    assert estimate(times) == interval


@given(TIMES, st.sampled_from([0.001, 0.5, 4.0, 1024.0]))
def test_noise_does_not_depend_on_the_unit(times: list[float], unit: float) -> None:
    near = estimate(times)
    edge = max(near.high - near.median, near.median - near.low) / near.median
    if abs(edge - NOISE) > 1e-9:
        assert estimate([unit * one for one in times]).noisy == near.noisy


@given(st.lists(st.floats(0.9, 1.1), min_size=15, max_size=45), st.lists(st.floats(1.0, 1000.0), max_size=3))
def test_a_few_runs_that_were_hit_make_no_noise(times: list[float], hit: list[float]) -> None:
    times[: len(hit)] = [one * factor for one, factor in zip(times, hit, strict=False)]
    assert not estimate(times).noisy


@given(st.lists(st.floats(0.9, 1.1), min_size=15, max_size=45), st.floats(2.2, 1000.0))
def test_runs_of_which_half_were_hit_are_noise(times: list[float], factor: float) -> None:
    assert estimate([one * factor if number % 2 else one for number, one in enumerate(times)]).noisy


@given(st.lists(st.floats(1.0, 2.0), min_size=1, max_size=FEWEST - 1))
def test_of_few_runs_nobody_can_say(times: list[float]) -> None:
    assert estimate(times).noisy
    assert estimate([times[0]] * len(times)).noisy


@given(st.lists(st.tuples(st.floats(1.0, 2.0), st.floats(0.1, 50.0)), min_size=6, max_size=45))
def test_what_slows_both_of_a_turn_leaves_their_ratio(turns: list[tuple[float, float]]) -> None:
    ours, theirs = ([factor * one * slowed for one, slowed in turns] for factor in (3.0, 1.5))
    between = ratio(ours, theirs)
    assert (between.median, between.low, between.high) == pytest.approx((2, 2, 2))
    assert not between.noisy


# --- turns ------------------------------------------------------------------------------------------------------------


def contestants(clock: ScriptedClock, ran: list[str], **times: Callable[[int], float]) -> list[Contestant]:
    """By name, what the n-th run of a contestant takes; ``ran`` notes who was at it."""

    def work(name: str, stage: str) -> None:
        number = ran.count(f"{name} {stage}")
        ran.append(f"{name} {stage}")
        clock.now += times[name](number)

    return [
        Contestant({stage: lambda name=name, stage=stage: work(name, stage) for stage in ("prefill", "decode")})
        for name in times
    ]


def test_all_take_turns_stage_by_stage() -> None:
    clock, ran = ScriptedClock(0.0), list[str]()
    times = time_in_turns(contestants(clock, ran, a=lambda _: 10.0, b=lambda _: 20.0, c=lambda _: 40.0), clock, turns=6)
    turns = [f"{name} prefill" for _ in range(3) for name in "abccba"]
    assert ran[: len(ran) // 2][3 * WARMUP :] == turns
    assert ran[len(ran) // 2 :][3 * WARMUP :] == [name.replace("prefill", "decode") for name in turns]
    assert times == [{"prefill": [t] * 6, "decode": [t] * 6} for t in (10.0, 20.0, 40.0)]


def test_a_stage_is_taken_by_those_who_have_it_and_is_warmed_up() -> None:
    clock, ran = ScriptedClock(0.0), list[str]()
    one, other = contestants(clock, ran, a=lambda n: 100.0 if n < WARMUP else 1.0, b=lambda _: 2.0)
    times = time_in_turns([one, other.only(["decode"])], clock, pairs=[(0, 1)], turns=6)
    assert times == [{"prefill": [1.0] * 6, "decode": [1.0] * 6}, {"decode": [2.0] * 6}]


def test_short_runs_are_repeated_until_all_turns_are_long() -> None:
    clock, ran = ScriptedClock(0.0), list[str]()
    both = contestants(clock, ran, short=lambda n: 1.0 + n % 2, long=lambda _: 30.0)
    times = time_in_turns([one.only(["decode"]) for one in both], clock, turns=6, shortest=24.0)
    assert times == [{"decode": [1.5] * 6}, {"decode": [30.0] * 6}]
    assert Counter(ran) == {"short decode": WARMUP + 6 * 16, "long decode": WARMUP + 6}


@pytest.mark.parametrize(("factor", "times_as_many"), [(1.0, 1), (3.0, MOST)])
def test_noise_asks_for_more_turns_and_not_for_ever(factor: float, times_as_many: int) -> None:
    clock, ran = ScriptedClock(0.0), list[str]()
    noisy, steady = contestants(clock, ran, a=lambda n: factor if n % 2 else 1.0, b=lambda _: 1.0)
    times = time_in_turns([noisy.only(["decode"]), steady.only(["decode"])], clock, turns=7)
    assert [len(one["decode"]) for one in times] == [7 * times_as_many] * 2


def test_a_noisy_ratio_asks_for_more_turns() -> None:
    clock, ran = ScriptedClock(0.0), list[str]()
    both = contestants(clock, ran, a=lambda n: 1.4 if n % 2 else 1.0, b=lambda n: 1.0 if n % 2 else 1.4)
    both = [one.only(["decode"]) for one in both]
    assert len(time_in_turns(both, clock, turns=10)[0]["decode"]) == 10
    ran.clear()
    assert len(time_in_turns(both, clock, pairs=[(0, 1)], turns=10)[0]["decode"]) == 10 * MOST


def test_long_stages_get_no_more_turns() -> None:
    clock, ran = ScriptedClock(0.0), list[str]()
    (noisy,) = contestants(clock, ran, a=lambda n: LONGEST * (n % 2))
    assert len(time_in_turns([noisy.only(["decode"])], clock, turns=7)[0]["decode"]) == 7


def test_on_a_cpu_half_of_the_threads_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    with pytest.raises(ValueError, match="work"), half_the_threads(CPU):
        raise ValueError("work")
    assert asked == [6, 12]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fusion",
    [
        ConcatFusion,
        LaViFusion,
        lambda: FastV(layer=2),
        lambda: DeepStackFusion(levels=3),
        lambda: VisorFusion(cross_attention=2, self_attention=1),
    ],
)
def test_every_run_of_decode_finds_a_cache_of_the_same_length(build, fusion: Callable[[], Any]) -> None:  # type: ignore[no-untyped-def]
    model = build(fusion())
    lengths: list[int] = []
    model.language.hf.register_forward_pre_hook(
        lambda _, args, given: lengths.append(
            given["past_key_values"].get_seq_length() if given.get("past_key_values") is not None else 0
        ),
        with_kwargs=True,
    )
    for contestant in latency.model_and_floor(model, PROMPT.shape_for(model), device=CPU, within=torch.no_grad):
        lengths.clear()
        with torch.no_grad():
            for _ in range(4):
                contestant.stages["decode"]()
        assert lengths == [lengths[0]] * 4
        assert lengths[0] >= PROMPT.text


@pytest.mark.parametrize("fusion", [LaViFusion, ConcatFusion], ids=["lavi", "concat"])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@torch.no_grad()
def test_a_step_behind_a_full_window_is_undone(build, family: str, fusion: Callable[[], Any]) -> None:  # type: ignore[no-untyped-def]
    """Of a prompt longer than the sliding window each run of decode reads the same token behind the same cache."""
    model = build(fusion(), family=family, sliding_window=8, initializer_range=0.3)
    batch, features = PromptShape(text=12).inputs(model, "cpu")
    steps = Steps(model.language.hf, lambda cache: model.prefill(batch, features, cache), rows=1)
    steps.begin(undoable=True)
    logits = []
    for _ in range(3):
        logits.append(steps.step(torch.ones(1, 1, dtype=torch.long)))
        steps.undo_step()
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ScriptedClock:
    """By which models are timed, on a machine with nothing else to do."""
    record = ScriptedClock(32.0)
    monkeypatch.setattr(measure, "clock_of", lambda _: record)
    monkeypatch.setattr(measure.WaitMeter, "share", lambda _: 0.0)
    return record


def measured_together(file: Path, **settings: Any) -> tuple[Record, Record]:
    """LaVi and its concatenation twin, in this order."""
    recipe = Recipe.load(file)
    sweep, settings = Sweep.parse("visual_tokens=16"), {"runs": 6} | settings
    own, twin = sweep_records([recipe, concat_twin(recipe)], sweep, Scenario(text=12), device=CPU, **settings)
    return own, twin


def test_models_take_turns_with_each_other_and_with_their_floors(
    tiny_recipe: Path, clock: ScriptedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, features, ran = VisionLanguageModel.prefill, VisionLanguageModel.features, list[str]()

    def encoding(self: VisionLanguageModel, pixels: Any, *grids: Any) -> Any:
        clock.now += {"ConcatFusion": 96.0, "LaViFusion": 32.0}[type(self.fusion).__name__]
        return features(self, pixels, *grids)

    def scripted(self: VisionLanguageModel, batch: Any, features: Any, *cache: Any) -> Any:
        ran.append(type(self.fusion).__name__)
        clock.now += {"ConcatFusion": 96.0, "LaViFusion": 16.0}[ran[-1]]
        return prefill(self, batch, features, *cache)

    monkeypatch.setattr(VisionLanguageModel, "features", encoding)
    monkeypatch.setattr(VisionLanguageModel, "prefill", scripted)
    own, twin = measured_together(tiny_recipe)
    assert "LaViFusion ConcatFusion ConcatFusion LaViFusion LaViFusion ConcatFusion" in " ".join(ran)
    assert own.milliseconds["prefill"] == [48.0] * 3
    assert own.milliseconds["floor_prefill"] == own.milliseconds["decode"] == [32.0] * 3
    assert own.ratios["floor"]["prefill"] == [1.5] * 3
    assert own.ratios["concat"]["prefill"] == [48 / 128] * 3
    assert own.ratios["concat"]["vision_encoder"] == [64 / 128] * 3
    assert own.ratios["floor"]["first_token"] == [80 / 64] * 3
    assert own.ratios["floor"]["decode"] == [1.0] * 3
    assert twin.ratios["floor"]["prefill"] == [4.0] * 3
    assert twin.ratios["floor"]["first_token"] == [224 / 128] * 3
    assert "concat" not in twin.ratios
    assert own.turns["prefill"] == 6
    assert Record.from_json(own.to_json()) == own


def test_times_are_held_against_concatenation_in_front_of_the_same_decoder(
    tiny_recipe: Path, clock: ScriptedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = VisionLanguageModel.prefill

    def scripted(self: VisionLanguageModel, batch: Any, features: Any, *cache: Any) -> Any:
        clock.now += 64.0 * self.language.width if isinstance(self.fusion, ConcatFusion) else 0.0
        return prefill(self, batch, features, *cache)

    monkeypatch.setattr(VisionLanguageModel, "prefill", scripted)
    own, wider = (
        Recipe.load(tiny_recipe, [f"model.language.config.hidden_size={width}", f"name=width-{width}"])
        for width in (32, 64)
    )
    recipes = [concat_twin(wider), own, concat_twin(own)]
    records = list(sweep_records(recipes, Sweep.parse("visual_tokens=16"), Scenario(text=12), device=CPU, runs=6))
    assert [sorted(record.ratios) for record in records] == [["floor"], ["concat", "floor"], ["floor"]]
    assert records[1].ratios["concat"]["prefill"] == [32 / (64 * 32 + 32)] * 3
    padded = concat_twin(Recipe.load(tiny_recipe, ["model.language.config.vocab_size=1024"]))
    first, _ = sweep_records([own, padded], Sweep.parse("visual_tokens=16"), PROMPT, device=CPU, runs=6)
    assert "concat" in first.ratios  # one decoder, whose vocabulary is padded otherwise
    differently = (Recipe.load(tiny_recipe, [f"model.language.{way}"]) for way in ("attention=eager", "compile=decode"))
    for other in [wider, *differently]:
        twin = concat_twin(other)
        *_, alone = sweep_records([twin, own], Sweep.parse("visual_tokens=16"), PROMPT, device=CPU, runs=1)
        assert alone.ratios.keys() == {"floor"}


def test_a_turn_does_not_cast_weights_anew(tiny_recipe: Path, clock: ScriptedClock) -> None:
    recipe = Recipe.load(tiny_recipe, ["model.language.dtype=bfloat16"])
    model = build_on(recipe, "cpu")
    tower = {id(parameter): name for name, parameter in model.vision.named_parameters() if parameter.ndim > 1}
    casts: Counter[str] = Counter()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and id(args[0]) in tower:
                casts[tower[id(args[0])]] += 1
            return func(*args, **kwargs or {})

    record = count(recipe, model, PROMPT)
    with Casts():
        measure.measure([Measurement(record, PROMPT, lambda: model)], device=CPU, runs=2, stages=["vision_encoder"])
    assert not record.error
    assert set(casts.values()) == {1}


@pytest.mark.parametrize("error", [ValueError("boom"), RuntimeError("[enforce fail] can't allocate memory: 7 bytes")])
def test_a_model_that_raises_while_timed_loses_no_record(
    tiny_recipe: Path, clock: ScriptedClock, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prefill = VisionLanguageModel.prefill

    def raising(self: VisionLanguageModel, batch: Any, features: Any, *cache: Any) -> Any:
        if isinstance(self.fusion, ConcatFusion) and not features.is_meta:
            raise error
        return prefill(self, batch, features, *cache)

    monkeypatch.setattr(VisionLanguageModel, "prefill", raising)
    own, twin = measured_together(tiny_recipe)
    assert twin.error == ("out of memory" if "memory" in str(error) else "ValueError: boom")
    assert twin.flops
    assert not twin.milliseconds
    assert not own.error
    assert own.ratios.keys() == {"floor"}
    assert twin.error in own.knobs["timed alone"]
    _, rows = sweep_rows([own, twin])
    assert [row[-1] for row in rows] == [f"{own.mib['peak']:.4g}", twin.error]
    table = group_tokens_by_row(side_by_side([own, twin], twin))
    assert table["not measured"] == ["-", twin.error]
    assert table["ms prefill, median (p10-p90)"] == ["32.00 (32.00-32.00)", "-"]


def test_models_that_do_not_fit_together_are_timed_alone_and_say_so(
    tiny_recipe: Path, clock: ScriptedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(contestants: Any, *args: Any, **settings: Any) -> Any:
        if len(contestants) > 2:
            raise torch.OutOfMemoryError("no more")
        return time_in_turns(contestants, *args, **settings)

    monkeypatch.setattr(measure, "time_in_turns", small)
    for record in measured_together(tiny_recipe):
        assert not record.error
        assert record.knobs["timed alone"] == "all at once: out of memory"
        assert record.ratios.keys() == {"floor"}
        assert record.mib["peak"] > 0


# --- what is shown ----------------------------------------------------------------------------------------------------


def group_tokens_by_row(table: tuple[list[str], list[list[str]]]) -> dict[str, list[str]]:
    """By what they are called."""
    return {row[0]: row[1:] for row in table[1]}


def timed(method: str, milliseconds: float, *, reach: float = 0.05, times: float = 2.0, waited: float = 0.0) -> Record:
    """A record whose medians and ratios have intervals of this reach."""
    record = Record(method, text_tokens=9, visual_tokens=16, visual_tokens_in_language=0, views=1, waited=waited)
    record.flops, record.mib = {"vision_encoder": 1.0, "text_ffn": 1.0}, {"peak": 1.0}
    ends = [1 - reach, 1 + reach]
    for stage in ("first_token", "prefill", "decode", "floor_prefill"):
        record.milliseconds[stage] = [milliseconds, milliseconds * 0.9, milliseconds * 1.1]
        record.intervals[stage], record.turns[stage] = [milliseconds * end for end in ends], 15
    for to in ("floor", "concat")[: 1 if method == "concat" else 2]:
        record.ratios[to] = {stage: [times, *(times * end for end in ends)] for stage in ("first_token", "decode")}
    return record


@pytest.mark.parametrize(
    ("changes", "milliseconds", "times"),
    [
        ({}, "4.00 (3.60-4.40)", "2.00 (1.90-2.10)"),
        ({"reach": 0.3}, "noisy", "noisy"),
        ({"waited": 0.5}, "noisy", "2.00 (1.90-2.10)"),
        ({"waited": 0.15}, "4.00 (3.60-4.40)", "2.00 (1.90-2.10)"),
    ],
)
def test_tables_say_noisy_and_records_keep_the_numbers(
    tmp_path: Path, changes: dict[str, float], milliseconds: str, times: str
) -> None:
    own, concat = timed("lavi", 4.0, **changes), timed("concat", 8.0)
    table = group_tokens_by_row(side_by_side([own, concat], concat))
    assert table["ms decode, median (p10-p90)"] == [milliseconds, "8.00 (7.20-8.80)"]
    assert table["decode, times the floor (interval)"] == [times, "2.00 (1.90-2.10)"]
    assert table["decode, times concatenation (interval)"] == [times, "-"]
    _, rows = turns_rows([own, concat])
    assert rows[1] == ["16 visual tokens", "lavi", "decode", milliseconds, times, times, "15"]
    assert (sweep_rows([own, concat])[1][0][-2] == "noisy") == (milliseconds == "noisy")
    assert (curve_values(own)["ms of one more token"] is None) == (milliseconds == "noisy")
    assert (curve_values(own)["one more token, times concatenation"] is None) == (times == "noisy")
    write_csv([own], tmp_path / "r.csv")
    (row,) = csv.DictReader((tmp_path / "r.csv").read_text().splitlines())
    assert (row["ms decode"], row["decode / concat"]) == ("4.0", "2.0")
    assert ("ms decode" in row["noisy"], "decode / concat" in row["noisy"]) == (
        milliseconds == "noisy",
        times == "noisy",
    )
    again = Record.from_json(own.to_json())
    assert again.milliseconds["decode"][0] == 4.0
    assert again.ratios["concat"]["decode"][0] == 2.0
    assert waiting_note([own, concat]) == ("" if own.waited == 0 else f"{waiting_note([own])}")
    assert ("50%" in waiting_note([own])) == (own.waited == 0.5)


def test_records_without_turns_show_what_they_have() -> None:
    old = timed("lavi", 4.0)
    old.turns, old.ratios, old.intervals = {}, {}, {}
    table = group_tokens_by_row(side_by_side([old], None))
    assert table["ms decode, median (p10-p90)"] == ["4.00 (3.60-4.40)"]
    assert not [name for name in table if "times" in name]
    assert turns_rows([old])[1] == []
    assert old.ratio("floor", "decode") is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"times": 2.4}, "holds"),
        ({"times": 1.6}, "holds"),
        ({"times": 2.6}, "APART"),
        ({"times": 1.4}, "APART"),
        ({"times": 9.0, "reach": 0.4}, "noisy"),
        ({"waited": 0.6}, "holds"),
    ],
)
def test_ratios_of_a_busy_machine_hold_or_are_noisy(changes: dict[str, float], expected: str) -> None:
    quiet, other = timed("lavi", 4.0), timed("lavi", 9.0, **changes)
    assert busy.verdict(quiet, other, "floor", "decode")[1] == expected
    assert busy.verdict(quiet, other, "floor", "prefill")[1] == "not measured"
    for record, load in ((quiet, "quiet"), (other, "busy")):
        record.knobs["load"] = load
    assert {row[-1] for row in busy.busy_table([quiet, other])[1]} == {expected}


def test_what_kept_a_machine_busy_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    begin = subprocess.Popen
    monkeypatch.setattr(busy.subprocess, "Popen", lambda command: started.append(begin(command)) or started[-1])
    with busy.other_processes(2):
        assert [process.poll() for process in started] == [None, None]
    with pytest.raises(ZeroDivisionError), busy.other_processes(1):
        _ = 1 / 0
    assert [process.poll() is not None for process in started] == [True] * 3


# --- before the work --------------------------------------------------------------------------------------------------


def test_a_file_for_records_is_tried_before_the_work(tmp_path: Path) -> None:
    there, new = tmp_path / "there.jsonl", tmp_path / "new.jsonl"
    there.write_text("a line\n")
    check_writable(there)
    check_writable(new)
    assert there.read_text() == "a line\n"
    assert not new.exists()
    for file in (tmp_path, tmp_path / "missing" / "x.jsonl", there / "x.jsonl"):
        with pytest.raises(UserError, match=r"cannot be written \("):
            check_writable(file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "there"], "there exists"),
        (["--out", "tiny.yaml/x"], "cannot be created (Not a directory)"),
        (["--runs", "0"], "--runs"),
        (["--text", "0"], "--text"),
        (["--at", "image"], "KNOB=VALUES"),
        (["--at", "batch=2"], "--at is one of visual_tokens=N"),
        (["--at", "image=axb"], "sizes such as"),
        (["--sweep", "visual_tokens=1,x"], "whole numbers"),
        (["--sweep", "text=20", "--sweep", "text=9999"], "more than the 256 positions"),
        (["--sweep", "model.fusion.targets=[ffn"], "not readable as YAML"),
        (["--sweep", "model.fusion.nope=1"], "is unknown to"),
    ],
)
def test_what_profile_cannot_do_is_said_before_anything_is_counted(
    run, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("lavi.efficiency.sweep.count", lambda *_: pytest.fail("counted"))
    Path("there").mkdir()
    shown = [] if "--at" in arguments else ["--at", "visual_tokens=4"]
    refused(run("lavi.profile", "--recipe", tiny_recipe, *shown, "--sweep", "text=10", *arguments), words)
    assert sorted(os.listdir("there")) == []


def test_evaluate_tries_where_its_records_go_before_it_scores(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    evaluate = ("lavi.evaluate", "--checkpoint", tmp_path)
    refused(run(*evaluate, "--out", "missing/x.jsonl"), "missing/x.jsonl cannot be written")
    (tmp_path / "evaluation.jsonl").mkdir()
    refused(run(*evaluate), "evaluation.jsonl cannot be written (Is a directory)")


def test_the_share_of_waiting_is_of_the_thread_that_times() -> None:
    def share(wall: list[float], thread: list[float]) -> float:
        meter = latency.WaitMeter(wall=iter(wall).__next__, thread=iter(thread).__next__)
        for _ in wall[::2]:
            with meter:
                pass
        return meter.share()

    assert share([0.0, 10.0], [1.0, 5.0]) == pytest.approx(0.6)
    assert share([0.0, 10.0], [0.0, 12.0]) == 0
    assert share([0.0, 6.0, 100.0, 104.0], [1.0, 4.0, 50.0, 51.0]) == pytest.approx(0.6)  # what is between is not timed
    assert share([], []) == 0


def test_warming_up_is_no_waiting() -> None:
    """A stage may be compiled then, by other processes."""
    running: list[bool] = []

    class Meter(latency.WaitMeter):
        inside = False

        def __enter__(self) -> None:
            Meter.inside = True

        def __exit__(self, *_: object) -> None:
            Meter.inside = False

    stages = {name: lambda: running.append(Meter.inside) for name in ("prefill", "decode")}
    times = latency.time_in_turns([latency.Contestant(stages)], ScriptedClock(), turns=2, meter=Meter())
    assert running == 2 * ([False] * latency.WARMUP + [True] * (len(running) // 2 - latency.WARMUP))
    assert all(len(times[0][name]) >= 2 for name in stages)


def test_the_interval_of_thousands_of_turns_is_known() -> None:
    """About a standard deviation of the binomial times two on either side of the middle."""
    assert values_outside(10_000) == pytest.approx(5000 - 1.96 * 50, abs=2)


def test_the_benchmark_of_the_first_token_times_each_fusion() -> None:
    records = list(prefill.measure(TINY, prefill.SMALL_SIZES, CPU, turns=2))
    assert [record["fusion"] for record in records] == list(prefill.FUSIONS)
    columns, rows = prefill.prefill_table(records)
    assert {len(row) for row in rows} == {len(columns)}


def test_a_gpu_is_timed_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device may be another one, which has nothing to do meanwhile."""
    recorded: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self, stream: object = "the current one") -> None:
            recorded.append(stream)

        def elapsed_time(self, end: object) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    clock = DeviceClock(torch.device("cuda:1"))
    clock.start()
    assert clock.stop() == 1.5
    assert recorded == ["cuda:1", "cuda:1"]
