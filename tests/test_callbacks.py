"""What the callbacks show."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ask, collate, image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import throughput
from callbacks.samples import colour_of, draw, first_question
from callbacks.throughput import OF_LANGUAGE, Throughput, conversations
from datamodules.streamed import StreamedData
from lavi.batch import IGNORE, Sample, Video
from lavi.checkpoints.keep_run import KeepRun
from lavi.efficiency.flops import closed_form
from lavi.efficiency.scenario import Scenario
from lavi.fusion.lavi import LaViFusion
from lavi.metrics.answers import ExactMatch
from lavi.recipe import Recipe
from lavi.training.module import VisionLanguageModule
from lavi.training.run import train


def test_every_sample_is_drawn_with_its_question_truth_and_answer(build) -> None:  # type: ignore[no-untyped-def]
    video = Sample("v", ask("what moves?", answer="the circle").messages, [Video([image(3), image(4)])])
    samples = [
        ask(1, "what colour is the circle?", answer="red"),
        ask(1, 2, "which image has the red circle?", answer="first"),
        ask("is there a circle?", answer="yes"),
        video,
        ask(5, "how many?", answer="two"),
    ]
    model = build(LaViFusion(every=2))
    figure = draw(
        [first_question(model, sample) for sample in samples],
        ["red", "second", "yes", "the circle", "one"],
        ExactMatch(),
    )
    drawn = [axes for axes in figure.axes if axes.images]  # type: ignore[attr-defined]
    assert [axes.get_title().splitlines()[1] for axes in drawn] == [
        "truth: red   answer: red",
        "truth: first   answer: second",
        "truth: yes   answer: yes",
        "truth: the circle   answer: the circle",
        "truth: two   answer: one",
    ]
    assert ["what colour" in axes.get_title() for axes in drawn] == [True, False, False, False, False]
    colours = [axes.title.get_color().removeprefix("tab:") for axes in drawn]
    assert colours == ["green", "red", "green", "green", "red"]
    widths = [axes.images[0].get_array().shape[1] for axes in drawn]
    assert widths[:2] == [40, 84]  # two images side by side


def test_a_colour_is_of_the_score() -> None:
    assert [colour_of(score) for score in (0.0, 0.01, 0.99, 1.0)] == ["tab:red", *["tab:orange"] * 2, "tab:green"]


@pytest.mark.parametrize(
    "text", [r"what is $\frac{1}{2$ of it?", "costs $5 or $6", r"\$ and _x^2", "a" * 500, "a " * 500]
)
def test_whatever_is_said_can_be_drawn(build, text: str) -> None:  # type: ignore[no-untyped-def]
    """A figure is drawn when it is saved; what people say is no formula."""
    question = first_question(build(LaViFusion(every=2)), ask(1, text[:100], answer=text))
    figure = draw([question], [text], ExactMatch())
    figure.savefig(io.BytesIO())  # type: ignore[attr-defined]
    (axes,) = [axes for axes in figure.axes if axes.images]  # type: ignore[attr-defined]
    assert axes.get_title().startswith(text[:10])


def test_the_first_question_is_asked_with_the_images_before_it(build) -> None:  # type: ignore[no-untyped-def]
    """An image of a later turn is not among them, and large ones are kept small."""
    model = build(LaViFusion(every=2))
    later = ask(1, "what colour?", answer="red").messages + ask(2, "and here?", answer="blue").messages
    large = Sample("s", later, [image(1).resize((2000, 1000)), image(2)])
    question = first_question(model, large)
    assert (question.text, question.references) == ("what colour?", ("red",))
    assert len(question.prompt.layouts) == 1
    assert question.picture.size == (320, 160)


def test_throughput_and_memory_are_logged(tiny_recipe: Path, tmp_path: Path) -> None:
    named = [
        "throughput={_target_: callbacks.throughput.Throughput, window: 3}",
        "memory={_target_: callbacks.memory.Memory}",
    ]
    recipe = Recipe.load(tiny_recipe, [f"callbacks.{one}" for one in named])
    assert train(recipe, tmp_path / "run", save_every=100) == 0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert last["train/device/samples_per_sec"] > 0
    assert last["train/device/items_per_sec"] > last["train/device/samples_per_sec"]
    assert 0 < last["train/data_wait"] < 1
    model = recipe.build("model")
    weights = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    assert last["memory/weights"] == pytest.approx(weights)
    frozen = sum(p.numel() * 4 for p in model.vision.parameters()) / 2**20
    assert last["memory/gradients"] == pytest.approx(weights - frozen)
    assert last["memory/optimiser"] == pytest.approx(2 * (weights - frozen), rel=0.01)  # AdamW's two moments
    assert last["memory/rss"] > weights


def test_training_flops_are_three_forwards_where_weights_train(build) -> None:  # type: ignore[no-untyped-def]
    model = build(LaViFusion(every=2))
    module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3, "language": 1e-3})
    batch = collate(model, [ask(1, "what colour?", answer="red"), ask("what?", answer="nothing")])
    width, flops = batch.input_ids.shape[1], Throughput().flops(module, batch)
    seeing = closed_form(model, Scenario(width, image=(40, 40)).shape_for(model))
    blind = closed_form(model, Scenario(width).shape_for(model))
    head, trained = blind.prefill["head"], int((batch.labels != IGNORE).sum())
    assert trained > 2
    language = seeing.language + blind.language + (trained - 2) * head  # the head is of the trained tokens
    vision = seeing.prefill["vision_encoder"]
    assert flops == pytest.approx(vision + 3 * language)
    frozen = VisionLanguageModule(build(LaViFusion(every=2)), learning_rate={"fusion": 1e-3})
    parts = [*seeing.prefill.items(), *blind.prefill.items()]
    own = sum(flops for name, flops in parts if name not in (*OF_LANGUAGE, "vision_encoder"))
    assert own > 0
    assert Throughput().flops(frozen, batch) == pytest.approx(vision + 2 * language + own)
    read = replace(batch, backbone_features=model.backbone_features_of(batch))
    assert Throughput().flops(module, read) == pytest.approx(3 * language)  # the tower computes nothing


def test_samples_are_counted_by_source_and_go_on_counting(tiny_recipe: Path, scenes: Path, tmp_path: Path) -> None:
    """Three steps, then three more of a resumed run: all that was drawn, none twice."""
    mixture = {
        "_target_": "datamodules.mixture.Mixture",
        "sources": {"some": str(scenes / "train"), "few": str(scenes / "validation")},
        "weights": {"some": 3, "few": 1},
    }
    settings = yaml.safe_load(tiny_recipe.read_text())
    settings["data"]["train"] = mixture
    settings["callbacks"] = {"sources": {"_target_": "callbacks.sources.Sources"}}
    tiny_recipe.write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(tiny_recipe.read_text())
    train(Recipe.load(tiny_recipe, ["trainer.max_steps=3", "trainer.limit_val_batches=0"]), run, save_every=3)
    train(Recipe.load(tiny_recipe), run, resume_from=run / "last.ckpt", save_every=3)
    events = EventAccumulator(str(run))
    events.Reload()
    counts = {name: [event.value for event in events.Scalars(f"samples/{name}")] for name in ("some", "few", "skipped")}
    assert [some + few for some, few in zip(counts["some"], counts["few"], strict=True)] == [4, 8, 12, 16, 20, 24]
    assert counts["few"] == sorted(counts["few"])
    assert counts["few"][-1] > 0
    assert set(counts["skipped"]) == {0}


def test_waiting_for_data_is_neither_validation_nor_saving_nor_a_part_of_a_step(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that a second passes on with each fetch, and a thousand with each validation and checkpoint."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(throughput, "time", clock)

    def passing(owner: Any, name: str, seconds: float) -> None:
        call = getattr(owner, name)

        def later(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, later)

    passing(VisionLanguageModule, "training_step", 3.0)
    passing(VisionLanguageModule, "on_validation_epoch_end", 1000.0)
    passing(KeepRun, "_refuse", 1000.0)
    passing(StreamedData, "on_after_batch_transfer", 1.0)
    changes = ["trainer.accumulate_grad_batches=2", "trainer.max_steps=4", "trainer.val_check_interval=4"]
    changes += ["trainer.log_every_n_steps=1", "callbacks.throughput={_target_: callbacks.throughput.Throughput}"]
    assert train(Recipe.load(tiny_recipe, changes), tmp_path / "run", save_every=3) == 0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    shares = [scalar.value for scalar in events.Scalars("train/data_wait")]
    # Of a step's two fetches of a second and two halves of three; behind a validation or a checkpoint one is left out.
    assert shares == pytest.approx([2 / 8, 2 / 8, 1 / 7, 1 / 7])


def test_packed_conversations_are_counted_each(build) -> None:  # type: ignore[no-untyped-def]
    model = build(LaViFusion(every=2))
    encoded = [model.processor.encode(ask("what?", answer="red", key=str(n))) for n in range(3)]
    packed = model.processor.collate([encoded[:2], encoded[2:]])
    assert (len(packed), conversations(packed)) == (2, 3)
