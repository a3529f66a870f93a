"""The loss, the schedule, what trains, and the metric."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import ask, awaken, collate, small, summed_loss
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from lavi.batch import IGNORE, Batch
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.language.token_scores import TokenScores, scores_of
from lavi.metrics.base import GroupedMean, groups_of
from lavi.metrics.teacher_forcing import correct_under_teacher_forcing
from lavi.training.module import VisionLanguageModule
from lavi.training.optim import MuonAdamW
from lavi.training.startup import what_trains


def test_each_token_weighs_the_same_however_rows_are_batched(build) -> None:
    model = build(ConcatFusion())
    samples = [ask(1, "what?", answer="red"), ask("which image?", answer="the first of the two images")]
    with torch.no_grad():
        batch = collate(model, samples)
        together, tokens = summed_loss(model(batch), batch.labels)
        apart = [summed_loss(model(b), b.labels) for b in (collate(model, [s]) for s in samples)]
    assert int(tokens) == sum(int(n) for _, n in apart)
    torch.testing.assert_close(together, sum(loss for loss, _ in apart))


def test_parts_that_are_not_named_are_frozen(build) -> None:
    module = VisionLanguageModule(build(LaViFusion(generator=small())), learning_rate={"fusion": 1e-3})
    trained = {name.split(".")[1] for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"fusion"}
    module.train()
    assert not module.model.vision.training
    assert not module.model.language.training
    assert module.model.fusion.training
    batch = collate(module.model, [ask(1, "what?", answer="red")])
    assert not module.model.features(batch.pixels).requires_grad
    with pytest.raises(UserError, match="did you mean 'language'"):
        VisionLanguageModule(module.model, learning_rate={"langauge": 1e-3})


RATES = {
    "language": 1e-4,
    "language.hf.model.layers.1": None,
    "language.hf.model.layers.1.mlp.down_proj.weight": 3e-4,
    "fusion.generators": 1e-3,
}


def owner(name: str) -> str | None:
    """The part that a parameter trains with, under RATES."""
    if name.startswith("language.hf.model.layers.1."):
        last = "language.hf.model.layers.1.mlp.down_proj.weight"
        return last if name == last else None
    return next((part for part in ("language", "fusion.generators") if name.startswith(part + ".")), None)


def test_the_most_specific_name_sets_the_rate(build) -> None:
    model = build(LaViFusion(every=2, generator=small()))
    module = VisionLanguageModule(model, learning_rate=RATES, weight_decay=0.1)
    assert {name: module.part_of.get(name) for name, _ in model.named_parameters()} == {
        name: owner(name) for name, _ in model.named_parameters()
    }
    assert all(p.requires_grad == (owner(name) is not None) for name, p in model.named_parameters())
    module.trainer = SimpleNamespace(estimated_stepping_batches=10, callbacks=[])  # type: ignore[assignment]
    named = {id(p): name for name, p in model.named_parameters()}
    groups_of: list[dict[str, Any]] = module.configure_optimizers()["optimizer"].param_groups
    for group in groups_of:
        part, kind = group["name"].split("/")
        assert {owner(named[id(p)]) for p in group["params"]} == {part}
        assert group["initial_lr"] == RATES[part]
        assert {p.ndim > 1 for p in group["params"]} == {kind == "matrices"}
        assert group["weight_decay"] == (0.1 if kind == "matrices" else 0.0)
    seen = [id(p) for group in groups_of for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters() if p.requires_grad)  # each once


class SharesOfPeak(pl.Callback):
    """The rates that a run's optimizer steps with, each as a share of its group's own."""

    def __init__(self, peaks: dict[str, float]) -> None:
        self.peaks, self.shares = peaks, list[set[float]]()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.shares.append({round(g["lr"] / self.peaks[g["name"].split("/")[0]], 6) for g in optimizer.param_groups})


def test_the_rates_of_a_run_rise_and_then_fall_to_a_hundredth(build) -> None:
    """Those of all parts alike, step by step."""
    peaks = {"fusion": 1e-3, "language": 2e-4}
    module = VisionLanguageModule(build(LaViFusion(every=2, generator=small())), learning_rate=peaks, warmup=0.2)
    batch = collate(module.model, [ask(1, "what?", answer="red")])
    shares = SharesOfPeak(peaks)
    settings: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(accelerator="cpu", max_steps=20, max_epochs=-1, callbacks=[shares], **settings)
    trainer.fit(module, DataLoader([batch] * 4, batch_size=None))
    assert all(len(alike) == 1 for alike in shares.shares)
    steps = [alike.pop() for alike in shares.shares]
    assert steps[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert steps[4] == pytest.approx(1.0)
    assert steps[4:] == sorted(set(steps[4:]), reverse=True)
    assert steps[12] == pytest.approx(0.505)  # half of the way down
    assert 0.01 < steps[-1] < 0.03
    left = {g["name"].split("/")[0]: g["lr"] for g in trainer.optimizers[0].param_groups}
    assert left == pytest.approx({part: 0.01 * peak for part, peak in peaks.items()})


def test_by_default_nothing_decays_and_adamw_trains_all(build) -> None:
    module = VisionLanguageModule(build(LaViFusion(every=2, generator=small())), learning_rate={"fusion": 1e-3})
    module.trainer = SimpleNamespace(estimated_stepping_batches=200, callbacks=[])  # type: ignore[assignment]
    optimizers = module.configure_optimizers()
    assert type(optimizers["optimizer"]) is torch.optim.AdamW
    assert {group["weight_decay"] for group in optimizers["optimizer"].param_groups} == {0.0}
    share = optimizers["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [share(step) for step in (0, 5)] == pytest.approx([1 / 6, 1.0])  # 3 % of the steps
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in module.model.language.layers)
    muon = VisionLanguageModule(module.model, learning_rate={"fusion": 1e-3}, muon=2.0)
    muon.trainer = module.trainer
    assert type(muon.configure_optimizers()["optimizer"]) is MuonAdamW


def test_validation_is_of_all_tokens_and_all_answers(build) -> None:
    """However they are batched: each token weighs the same."""
    module = VisionLanguageModule(build(LaViFusion(every=2, generator=small())), learning_rate={"fusion": 1e-3})
    one, long = ask(1, "what?", answer="red"), ask("which?", answer="the first of the two images")
    batches = [collate(module.model, samples) for samples in ([one], [long, one])]
    settings: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(accelerator="cpu", enable_model_summary=False, **settings)
    (metrics,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    with torch.no_grad():
        sums = [summed_loss(module.model(batch), batch.labels) for batch in batches]
        scores = [scores_of(module.model(batch), batch.labels) for batch in batches]
        right = [r for said, of in zip(scores, batches, strict=True) for r in correct_under_teacher_forcing(said, of)]
    assert metrics["val/loss"] == pytest.approx(float(sum(s for s, _ in sums) / sum(n for _, n in sums)))
    assert metrics["val/accuracy"] == pytest.approx(100 * sum(right) / 3)
    assert "val/accuracy" in trainer.progress_bar_metrics


def test_ranks_add_up_what_they_counted(build) -> None:
    module = VisionLanguageModule(build(ConcatFusion()), learning_rate={"fusion": 1e-3})
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: {"sum": 2 * value}[reduce_op])
    for ranks, expected in ((1, 3), (2, 6)):
        module.trainer = SimpleNamespace(world_size=ranks, strategy=strategy)  # type: ignore[assignment]
        assert int(module._sum_over_ranks(torch.tensor(3))) == expected


def test_on_two_ranks_each_token_of_both_weighs_the_same(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are averaged over ranks; what is logged is of all of them."""
    module = VisionLanguageModule(build(ConcatFusion()), learning_rate={"fusion": 1e-3})
    batch = collate(module.model, [ask(1, "what?", answer="red"), ask("which?", answer="blue")])
    other = torch.tensor([5, 0])  # trained tokens of the other rank, and none broken
    strategy = SimpleNamespace(reduce=lambda mine, reduce_op: mine + other)
    module.trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1, strategy=strategy)  # type: ignore[assignment]
    logged: dict[str, tuple[float, dict[str, Any]]] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **how: logged.update({name: (float(value), how)}))
    token_scores = module.model.token_scores

    def adding(batch: Batch, added: dict[str, Tensor]) -> TokenScores:
        added["size"] = torch.tensor(0.25)
        return token_scores(batch, added)

    monkeypatch.setattr(module.model, "token_scores", adding)
    loss = module.training_step(batch, 0)
    summed, tokens = summed_loss(module.model(batch), batch.labels)
    mean = float(2 * summed / (tokens + 5))
    assert float(loss) == pytest.approx(mean + 0.25)
    assert {name: value for name, (value, _) in logged.items()} == pytest.approx(
        {"train/loss": mean + 0.25, "train/loss/size": 0.25}
    )
    assert all(how["sync_dist"] and how["batch_size"] == 2 for _, how in logged.values())
    assert [name for name, (_, how) in logged.items() if how.get("prog_bar")] == ["train/loss"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision_are_not_trained(build, dtype: str) -> None:
    """Of a weight of 1, bfloat16 keeps no step below 2^-8; frozen they may be, and adapters are in float32."""
    for rates in ({"fusion": 1e-3}, {"fusion": 1e-3, "language": 1e-5}):
        module = VisionLanguageModule(build(ConcatFusion(), dtype=dtype), learning_rate=rates)
        module.trainer = SimpleNamespace(precision="bf16-mixed")  # type: ignore[assignment]
        module.setup("validate")
        if "language" not in rates:
            module.setup("fit")
    with pytest.raises(UserError, match=f"trains 'language', whose weights are {dtype}"):
        module.setup("fit")


def test_a_fit_starts_from_another_run_once(build, monkeypatch: pytest.MonkeyPatch) -> None:
    module = VisionLanguageModule(build(ConcatFusion()), learning_rate={"fusion": 1e-3}, start_from="~/runs/first")
    module.trainer = SimpleNamespace(precision="32-true")  # type: ignore[assignment]
    starts: list[Any] = []
    monkeypatch.setattr("lavi.training.module.load_start", lambda of, run: starts.append((of, run)) or {"fusion.x"})
    module.setup("validate")
    assert not starts
    module.setup("fit")
    assert starts == [(module, Path("~/runs/first").expanduser())]
    assert module.inherited == {"fusion.x"}
    module.setup("fit")
    assert len(starts) == 1
    module.trainer = SimpleNamespace(precision="bf16-true")  # type: ignore[assignment]
    with pytest.raises(UserError, match="precision=bf16-true casts every weight"):
        module.setup("fit")


def test_tied_weights_are_one(build) -> None:
    tied, untied = build(ConcatFusion()), build(ConcatFusion(), tie_word_embeddings=False)
    head, embeddings = "language.hf.lm_head", "language.hf.model.embed_tokens"
    assert set(VisionLanguageModule(tied, learning_rate={head: 1e-3}).part_of) == {f"{embeddings}.weight"}
    assert set(VisionLanguageModule(untied, learning_rate={head: 1e-3}).part_of) == {f"{head}.weight"}
    half = {"language": 1e-3, head: None}
    assert f"{embeddings}.weight" not in VisionLanguageModule(tied, learning_rate=half).part_of
    assert f"{embeddings}.weight" in VisionLanguageModule(untied, learning_rate=half).part_of
    with pytest.raises(UserError, match=r"tied weights.*name one of them"):
        VisionLanguageModule(tied, learning_rate={head: 1e-3, embeddings: 1e-4})
    VisionLanguageModule(tied, learning_rate={head: 1e-3, embeddings: 1e-3})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("langauge.hf", "'language'"),
        ("language.hf.lm_haed", "'language.hf.lm_head'"),
        ("fusion.generator.1", "'fusion.generators'"),
        ("language.hf.model.layers.1.mpl", "'language.hf.model.layers.1.mlp'"),
    ],
)
def test_a_part_that_is_none_is_answered_with_the_nearest(build, name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"names '{name}': did you mean {near}"):
        VisionLanguageModule(build(LaViFusion(generator=small())), learning_rate={name: 1e-3})


def test_something_has_to_train(build) -> None:
    with pytest.raises(UserError, match="names nothing that has parameters"):
        VisionLanguageModule(build(ConcatFusion()), learning_rate={"language": None})


def test_what_is_frozen_inside_a_part_that_trains_rests(build) -> None:
    model = build(LaViFusion(every=2, generator=small()))
    module = VisionLanguageModule(model, learning_rate=RATES)
    module.train()
    resting = {name for name, m in model.named_modules() if not m.training}
    layer = model.language.layers[1]
    assert {"vision", "fusion.view_embedding"} <= resting
    assert not any(m.training for m in (layer.self_attn, layer.input_layernorm, layer.mlp.up_proj))
    assert all(m.training for m in (layer, layer.mlp, layer.mlp.down_proj, model.language.layers[0].self_attn))
    module.eval()
    assert not any(m.training for m in module.modules())


def test_the_table_shows_each_named_part(build) -> None:
    model = build(LaViFusion(every=2, generator=small()))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(what_trains(VisionLanguageModule(model, learning_rate=RATES | {"language.hf.lm_head": 2e-5})))
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if line.startswith("│")]
    shown = {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}
    embeddings = model.language.hf.lm_head.weight.numel()
    assert set(shown) == {"vision", "language", "fusion", *RATES, "language.hf.lm_head"}
    assert shown["vision"][1:] == ["0", "frozen"]
    assert shown["fusion"][2] == "as below"
    assert shown["language.hf.lm_head"] == [f"{embeddings:,}", f"{embeddings:,}", "2e-05"]
    assert shown["language"][0] == f"{sum(p.numel() for p in model.language.parameters()):,}"
    trained = model.language.layers[1].mlp.down_proj.weight.numel()
    assert shown["language.hf.model.layers.1"][1:] == [f"{trained:,}", "as below"]


class Counted:
    """How often each decoder layer runs."""

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        self.runs = [0] * len(model.language.layers)
        for index, layer in enumerate(model.language.layers):
            layer.self_attn.register_forward_hook(lambda *_, index=index: self.count(index))

    def count(self, index: int) -> None:
        self.runs[index] += 1


@pytest.mark.parametrize(
    "fusion", [lambda: LaViFusion(layers=[1, 3], generator=small()), ConcatFusion], ids=["lavi", "concat"]
)
@pytest.mark.parametrize("rates", [{"fusion": 1e-3}, {"fusion": 1e-3, "language": 1e-3}], ids=["frozen", "trained"])
def test_checkpointing_recomputes_and_changes_no_gradient(build, fusion: Any, rates: dict[str, float]) -> None:
    """Also where the language model is frozen, which then needs no input with a gradient."""

    def gradients(checkpointing: bool) -> tuple[dict[str, Tensor], list[int]]:
        model = build(fusion())
        awaken(model.fusion)
        module = VisionLanguageModule(model, learning_rate=rates, checkpointing=checkpointing)
        module.train()
        counted = Counted(model)
        batch = collate(model, [ask(1, "what?", answer="red"), ask("which?", answer="blue")])
        summed_loss(model(batch), batch.labels)[0].backward()
        assert not model.language.embed(batch.input_ids).requires_grad or "language" in rates
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, counted.runs

    plain, once = gradients(False)
    recomputed, runs = gradients(True)
    assert once == [1] * 4
    first = 1 if "language" not in rates and isinstance(fusion(), LaViFusion) else 0  # nothing is learned below it
    assert runs == [1] * first + [2] * (4 - first)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


def test_all_ranks_stop_where_one_has_no_finite_loss(build, monkeypatch: pytest.MonkeyPatch) -> None:
    module = VisionLanguageModule(build(ConcatFusion()), learning_rate={"fusion": 1e-3})
    monkeypatch.setattr(VisionLanguageModule, "_sum_over_ranks", lambda self, mine: mine + torch.tensor([5, 1]))
    batch = collate(module.model, [ask(1, "what?", answer="red")])
    with pytest.raises(UserError, match="another rank stops at step 0"):
        module.training_step(batch, 0)
    with torch.no_grad():
        module.model.fusion.projector.layers[0].bias.fill_(float("nan"))
    with pytest.raises(UserError, match="the loss is nan at step 0, in samples s: lower"):
        module.training_step(batch, 0)


def test_a_step_without_a_trained_token_is_refused(build) -> None:
    """Its loss is 0 / 0: the weights would be no numbers after it, and nothing would have said so."""
    module = VisionLanguageModule(build(ConcatFusion()), learning_rate={"fusion": 1e-3})
    batch = collate(module.model, [ask(1, "what?", answer="red")])
    batch.labels.fill_(IGNORE)
    module.trainer = SimpleNamespace(world_size=1, global_step=0)  # type: ignore[assignment]
    with pytest.raises(
        UserError, match="step 0 has no trained token on any rank, in samples s: a training sample needs"
    ):
        module.training_step(batch, 0)


def test_accuracy_counts_whole_answers_by_family(build) -> None:
    model = build(ConcatFusion())
    batch = collate(model, [ask(1, "what?", answer="red"), ask(2, "what?", answer="the first of all")])
    logits = torch.nn.functional.one_hot(batch.labels.clamp(min=0).roll(-1, 1), len(model.chat.tokenizer)).float()
    assert correct_under_teacher_forcing(scores_of(logits, batch.labels), batch) == [True, True]
    wrong = logits.clone()
    wrong[1, batch.answers[1].stop - 2] = 0  # its end token alone
    assert correct_under_teacher_forcing(scores_of(wrong, batch.labels), batch) == [True, False]
    metric = GroupedMean()
    metric.update([True, False, True], [("colour", "easy"), ("colour", "easy"), ("count", "hard")])
    metric.update([False], [("count", "hard")])
    expected = {"all": 50.0, "family/colour": 50.0, "family/count": 50.0, "level/easy": 50.0, "level/hard": 50.0}
    assert metric.compute() == expected
    assert groups_of(batch.answers) == [("all", "all")] * 2
    metric.reset()
    assert metric.compute() == {}


def test_a_token_is_judged_by_the_logits_before_it() -> None:
    labels = torch.tensor([[IGNORE, 3, 1, IGNORE, 2]])
    foretold = torch.zeros(1, 5, 4)
    for column in (1, 2, 4):  # at the column before, all mass on the label
        foretold[0, column - 1, labels[0, column]] = 50.0
    scores = scores_of(foretold, labels)
    assert (float(scores.loss), int(scores.tokens)) == (pytest.approx(0.0, abs=1e-5), 3)
    assert scores.positions.tolist() == [[0, 1], [0, 2], [0, 4]]


def test_a_loaders_worker_joins_pixels_in_shared_memory(build, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Joined elsewhere they would be copied there once more, the largest part of a batch."""
    model = build(LaViFusion())
    samples = [ask(1, "what?", answer="red"), ask(2, 3, "which?", answer="blue"), ask("what?", answer="two")]
    usual = collate(model, samples).pixels
    monkeypatch.setattr(torch.utils.data, "get_worker_info", object)
    shared = collate(model, samples).pixels
    assert shared.is_shared()
    assert torch.equal(shared, usual)
    assert collate(model, samples[2:]).pixels.shape == (0, *model.vision.pixel_shape)
