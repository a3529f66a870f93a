"""Features that were computed once: what reads them trains as on pixels, and those of another tower are refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cached_features as benchmark
import pytest
import torch
import yaml
from conftest import TOWER, ask, collate, refused
from PIL import Image
from processes import start_command
from safetensors.torch import load, load_file
from test_data_module import Numbers
from test_native_resolution import tower

from datamodules.formats.features import MEMBER
from datamodules.moving import write_dataset as write_moving
from datamodules.shards.read import read_shard
from datamodules.shards.write import shard_jobs, write_shards
from lavi.batch import Batch, CachedVisual, Layout
from lavi.checkpoints.feature_cache import _layouts
from lavi.checkpoints.model_folder import build as build_model
from lavi.data.preprocessing import SquareResize
from lavi.data.tiling import AnyRes
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe

CONCAT = "model.fusion={_target_: lavi.fusion.concat.ConcatFusion}"
ANY_RES = "model.tiling={_target_: lavi.data.tiling.AnyRes, max_grid: 2}"
NATIVE = (
    "model.vision={_target_: lavi.vision.naflex.NaFlexVision, config: {hidden_size: 24, intermediate_size: 48, "
    "num_hidden_layers: 2, num_attention_heads: 2, num_patches: 16, patch_size: 8}}"
)
TWO_FRAMES = (
    "data.format={_target_: datamodules.formats.conversations.Conversations, "
    "video: {_target_: lavi.data.frame_sampling.FrameSampling, frames: 2}}"
)
POOLED = "model.reducer={_target_: lavi.reduction.pooling.AveragePooling, factor: 2}"


@pytest.fixture
def frozen(tiny_recipe: Path) -> Path:
    """A recipe whose tower is frozen, without validation."""
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["data"]["validation"] = None
    tiny_recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return tiny_recipe


def cached(run: Any, recipe: Path, out: str, *options: str) -> str:
    status, said, err = run("lavi.cache_features", "--recipe", recipe, "--out", out, *options)
    assert status == 0, err
    return said


def trained(run: Any, recipe: Path, name: str, *overrides: str) -> dict[str, torch.Tensor]:
    status, _, err = run("lavi.fit", "--recipe", recipe, "--run", name, *overrides)
    assert status == 0, err
    return load_file(Path(name) / "trained.safetensors")


def watch_tower(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of views whenever a model's tower runs."""
    views: list[int] = []
    encode = VisionLanguageModel.encode

    def counted(model: VisionLanguageModel, pixels: torch.Tensor, *about: Any) -> torch.Tensor:
        views.append(len(pixels))
        return encode(model, pixels, *about)

    monkeypatch.setattr(VisionLanguageModel, "encode", counted)
    return views


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "moving"
    write_moving(folder, seed=0, counts={"train": 24}, turns=3, workers=2)
    return folder


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose samples have no, one or several images, of odd sizes."""
    import io

    def png(seed: int) -> bytes:
        file = io.BytesIO()
        torch.manual_seed(seed)
        Image.fromarray(torch.randint(0, 255, (30 + seed % 7, 52, 3), dtype=torch.uint8).numpy()).save(file, "PNG")
        return file.getvalue()

    def samples(job: Any) -> Any:
        for number in range(job.start, job.stop):
            count = number % 3
            talk = [{"type": "image"}] * count + [{"type": "text", "text": "what colour is the circle?"}]
            messages = [{"role": "user", "content": talk}, {"role": "assistant", "content": f"blue {number}"}]
            images = {f"{one}.png": png(number + one) for one in range(count)}
            yield {"__key__": f"k{number}", "json": {"messages": messages}, **images}

    folder = tmp_path_factory.mktemp("data") / "several"
    write_shards(folder, shard_jobs(24, 6), samples, made_by={"test": 1}, workers=0)
    return folder


KINDS = {"lavi": [], "concat": [CONCAT], "tiled-pooled": [CONCAT, ANY_RES, POOLED], "native": [CONCAT, NATIVE]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["scenes", "videos", "several"])
def test_a_run_on_features_is_the_run_on_pixels(
    run: Any, frozen: Path, source: str, kind: str, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(source)
    data = f"data.train={folder if source == 'several' else folder / 'train'}"
    options = [*KINDS[kind], "model.timestamps=true"]
    said = cached(run, frozen, "features", "--dtype", "float32", *options, data)
    assert "data.train=features/train" in said
    on_pixels = trained(run, frozen, "pixels", *options, data)
    views = watch_tower(monkeypatch)
    on_features = trained(run, frozen, "read", *options, "data.train=features/train")
    assert views == [2 if ANY_RES in options else 1], "one call, of the fingerprint"
    for name, weight in on_pixels.items():
        torch.testing.assert_close(on_features[name], weight, atol=1e-6, rtol=1e-5)


def first_batch(recipe: Path, *overrides: str) -> tuple[VisionLanguageModel, Batch]:
    loaded = Recipe.load(recipe, overrides)
    model = build_model(loaded)
    return model, next(iter(loaded.build("data", processor=model.processor).train_dataloader())).batch


def test_bf16_features_are_nearly_those_of_the_pixels(run: Any, frozen: Path) -> None:
    cached(run, frozen, "features")
    model, pixels = first_batch(frozen)
    _, read = first_batch(frozen, "data.train=features/train")
    assert pixels.keys == read.keys
    assert len(read.pixels) == 0
    features = model.features_of(pixels)
    assert read.backbone_features is not None
    assert read.backbone_features.dtype == torch.bfloat16
    error = (model.features_of(read) - features).norm() / features.norm()
    assert 0 < error < 0.01


def test_a_shard_of_features_keeps_what_it_was_made_of(run: Any, frozen: Path, scenes: Path) -> None:
    cached(run, frozen, "features")
    for shard in sorted((scenes / "train").glob("*.tar")):
        before = list(read_shard(str(shard)))
        after = list(read_shard(f"features/train/{shard.name}", types=(MEMBER,)))
        assert [raw["__key__"] for raw in before] == [raw["__key__"] for raw in after]
        for raw, with_features in zip(before, after, strict=True):
            images = [name for name in raw if name.endswith("jpg")]
            assert images
            assert [raw[name] for name in images] == [with_features[name] for name in images]
            assert json.loads(raw["json"])["messages"] == json.loads(with_features["json"])["messages"]
            assert MEMBER in with_features


OTHERS = {
    "weights": ("seed=1", "other weights"),
    "layer": ("model.vision.layer=1", "other weights"),
    "image size": ("model.vision.image_size=16", "image size"),
    "tiling": (ANY_RES, "tiling"),
    "square": ("model.tiling={_target_: lavi.data.tiling.OneView, pad_to_square: true}", "prepared in another way"),
    "trained": ("module.learning_rate.vision=1e-4", "leave 'vision' out"),
    "reads the tower": ("model.reducer={_target_: lavi.reduction.visionzip.VisionZip, dominant: 4}", "VisionZip reads"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_features_of_another_model_are_refused(run: Any, frozen: Path, case: str) -> None:
    cached(run, frozen, "features")
    override, word = OTHERS[case]
    refused(run("lavi.fit", "--recipe", frozen, "data.train=features/train", override), word)


def test_tilings_that_differ_in_the_most_views_alone_are_told_apart() -> None:
    """However large a tile is: of 384 pixels a side, no image of 2000 has more than six."""
    found = set()
    for most in (4, 5, 6, 7, 9):
        processor = SimpleNamespace(tiling=AnyRes(max_grid=most), preprocessing=SquareResize(384))
        found.add(_layouts(SimpleNamespace(processor=processor)))  # type: ignore[arg-type]
    assert len(found) == 5


def test_a_tiling_that_differs_for_other_images_alone_is_refused(run: Any, frozen: Path) -> None:
    """The drawn picture is cut alike by both."""
    cached(run, frozen, "features", ANY_RES.replace("2", "6"))
    other = run("lavi.fit", "--recipe", frozen, "data.train=features/train", ANY_RES.replace("2", "7"))
    refused(other, "cut into other views")


def test_padding_is_not_stored(run: Any, frozen: Path, several: Path) -> None:
    cached(run, frozen, "features", NATIVE, f"data.train={several}")
    for raw in read_shard("features/train/shard-000000.tar", types=(MEMBER,)):
        layouts = json.loads(raw["json"]).get("features", [])
        stored = load(raw[MEMBER]) if MEMBER in raw else {}
        tokens = [one["grid"][0] * one["grid"][1] for one in layouts]
        assert [stored[str(n)].shape[1] for n in range(len(stored))] == tokens


def test_tokens_of_another_kind_are_refused(run: Any, frozen: Path) -> None:
    """The same weights, the same pixels: the class token alone is one more."""
    clip = {"model_type": "clip_vision_model", **{k: v for k, v in TOWER.items() if k != "model_type"}}
    options = [f"model.vision={{_target_: lavi.vision.hf.HFVision, config: {json.dumps(clip)}}}"]
    cached(run, frozen, "features", *options)
    refused(
        run("lavi.fit", "--recipe", frozen, "data.train=features/train", *options, "model.vision.class_token=true"),
        "other tokens",
    )


def test_frames_of_another_sampling_are_refused(run: Any, frozen: Path, videos: Path) -> None:
    cached(run, frozen, "features", f"data.train={videos / 'train'}")
    refused(run("lavi.fit", "--recipe", frozen, "data.train=features/train", TWO_FRAMES), "other frames", "frames=8")
    again = run(
        "lavi.cache_features", "--recipe", frozen, "--out", "features", f"data.train={videos / 'train'}", TWO_FRAMES
    )
    refused(again, "holds other data")


def test_features_of_features_are_refused(run: Any, frozen: Path) -> None:
    cached(run, frozen, "features")
    refused(
        run("lavi.cache_features", "--recipe", frozen, "--out", "again", "data.train=features/train"),
        "features already",
    )


def test_the_same_command_goes_on_and_another_is_refused(run: Any, frozen: Path) -> None:
    cached(run, frozen, "features")
    assert "there already" in cached(run, frozen, "features")
    refused(run("lavi.cache_features", "--recipe", frozen, "--out", "features", "seed=1"), "holds other data")
    refused(run("lavi.cache_features", "--recipe", frozen, "--out", "features", "--splits", "nope"), "nope", "test")


@pytest.mark.parametrize("moment", [1, 3])
def test_killed_it_goes_on(run: Any, frozen: Path, tmp_path: Path, moment: int) -> None:
    started = start_command(tmp_path / "said", "lavi.cache_features", "--recipe", frozen, "--out", "features")
    shards = Path("features").glob
    while started.process.exitcode is None and len(list(shards("train.part/shard-*.json"))) < moment:
        pass
    started.kill(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert "finished by an earlier run" in cached(run, frozen, "features")
    cached(run, frozen, "whole")
    for shard in sorted(Path("whole/train").iterdir()):
        assert shard.read_bytes() == (Path("features/train") / shard.name).read_bytes(), shard.name


def test_each_source_of_a_mixture_has_a_folder(run: Any, frozen: Path, scenes: Path, videos: Path) -> None:
    def mixture(first: str, second: str) -> str:
        sources = f"{{scenes: {first}, moving: {second}}}"
        return f"data.train={{_target_: datamodules.mixture.Mixture, sources: {sources}}}"

    said = cached(run, frozen, "features", "--dtype", "float32", mixture(str(scenes / "train"), str(videos / "train")))
    assert "data.train.sources.scenes=features/train/scenes data.train.sources.moving=features/train/moving" in said
    on_pixels = trained(run, frozen, "pixels", mixture(str(scenes / "train"), str(videos / "train")))
    on_features = trained(run, frozen, "read", mixture("features/train/scenes", "features/train/moving"))
    for name, weight in on_pixels.items():
        torch.testing.assert_close(on_features[name], weight, atol=1e-6, rtol=1e-5)
    mixed = run("lavi.fit", "--recipe", frozen, mixture("features/train/scenes", str(videos / "train")))
    refused(mixed, "cached features", "all sources")


def break_images(shard: Path, count: int) -> None:
    data = bytearray(shard.read_bytes())
    start = 0
    for _ in range(count):
        start = data.index(b"\xff\xd8\xff", start + 1)
        data[start + 200 : start + 204] = b"????"
    shard.write_bytes(data)


def test_broken_samples_are_left_out_as_in_training(run: Any, frozen: Path, scenes: Path) -> None:
    shutil.copytree(scenes / "train", "broken")
    first, second, *_ = sorted(Path("broken").glob("*.tar"))
    break_images(first, 1)
    assert "1 left out" in cached(run, frozen, "features", "data.train=broken")
    break_images(second, 20)
    refused(run("lavi.cache_features", "--recipe", frozen, "--out", "more", "data.train=broken"), "data.max_skipped")


def test_a_shard_that_cannot_be_read_stops_the_work(run: Any, frozen: Path, scenes: Path) -> None:
    """It is not written as an empty one, which no later command would notice."""
    shutil.copytree(scenes / "train", "lost")
    shard = sorted(Path("lost").glob("*.tar"))[3]
    shard.unlink()
    shard.mkdir()
    refused(run("lavi.cache_features", "--recipe", frozen, "--out", "features", "data.train=lost"), shard.name)
    shard.rmdir()
    shutil.copy(scenes / "train" / shard.name, shard)
    assert "3 of them finished by an earlier run" in cached(run, frozen, "features", "data.train=lost")


def test_features_that_no_index_vouches_for_are_not_read(
    run: Any, frozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(run, frozen, "features")
    Path("features/train/index.json").unlink()
    views = watch_tower(monkeypatch)
    trained(run, frozen, "read", "data.train=features/train", "module.learning_rate.vision=1e-4")
    assert len(views) >= 6
    (shard, *_) = sorted(Path("features/train").glob("*.tar"))
    status, said, _ = run("datamodules.inspect", str(shard))
    assert status == 0, said


def test_samples_in_folders_keep_their_keys(run: Any, frozen: Path) -> None:
    messages = [{"role": "user", "content": "blue"}, {"role": "assistant", "content": "red"}]

    def samples(job: Any) -> Any:
        return ({"__key__": f"in/folder/{n}", "json": {"messages": messages}} for n in range(job.start, job.stop))

    write_shards(Path("nested"), shard_jobs(12, 6), samples, made_by={"test": 2}, workers=0)
    cached(run, frozen, "features", "data.train=nested")
    (shard, *_) = sorted(Path("features/train").glob("*.tar"))
    assert [raw["__key__"] for raw in read_shard(str(shard))] == [f"in/folder/{n}" for n in range(6)]


def test_an_image_is_not_shown_in_another_cut_than_its_features_are_of(build: Any) -> None:
    """AnyRes cuts an image that is alone into tiles, and one beside others not."""
    processor = build(ConcatFusion()).processor
    features = torch.zeros(1, 16, 24)
    for alone, others, fits in (
        (True, 0, True),
        (None, 1, True),
        (False, 1, True),
        (True, 1, False),
        (False, 0, False),
    ):
        sample = ask(*range(1 + others), "what?", answer="red")
        sample.images = [CachedVisual(features, Layout(), lambda: None, alone=alone)] * (1 + others)  # type: ignore[arg-type, return-value]
        if fits:
            assert processor.encode(sample).backbone_features is not None
        else:
            with pytest.raises(UserError, match="another cut"):
                processor.encode(sample)


def test_a_run_is_scored_on_features(run: Any, frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training data need not be there."""
    trained(run, frozen, "trained", "trainer.max_steps=150", "module.learning_rate={fusion: 1e-2, language: 1e-2}")
    cached(run, frozen, "features", "--splits", "test", "--dtype", "float32")
    scores = []
    for test in ([], ["data.test=features/test", "data.train=gone"]):
        status, _, err = run("lavi.evaluate", "--checkpoint", "trained", "--out", "scores.jsonl", "--limit", 16, *test)
        assert status == 0, err
        scores = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]
    assert scores[0]["accuracy"]["all"] > 0
    assert scores[0]["controls"] == scores[1]["controls"]


def test_at_native_resolution_padding_is_not_stored(build: Any) -> None:
    """Features of images of other grids meet in one batch, padded to the longest as the tower would."""
    bare = build(ConcatFusion())
    model = VisionLanguageModel(vision=tower(), language=bare.language, fusion=ConcatFusion()).eval()
    samples = [ask(0, "what?", answer="blue"), ask("what?", 1, answer="red")]
    samples[1].images = [samples[1].images[0].resize((80, 16))]
    batch = collate(model, samples)
    with torch.no_grad():
        features = model.features(batch.pixels, batch.layouts)
        logits = model(batch)
    for sample, one, slot in zip(samples, features, batch.image_slots, strict=True):
        own = one[None, : slot.layout.tokens_of_view(len(one))]
        sample.images = [CachedVisual(own, slot.layout, lambda: None)]  # type: ignore[arg-type, return-value]
    read = collate(model, samples)
    assert len(read.pixels) == 0
    assert read.backbone_features is not None
    assert torch.equal(read.backbone_features, features)
    with torch.no_grad():
        assert torch.equal(model(read), logits)


def test_another_data_module_keeps_none(build: Any) -> None:
    with pytest.raises(UserError, match="keeps no features"):
        Numbers(build(ConcatFusion()).processor).write_features("train", Path("x"), None)  # type: ignore[arg-type]


def test_the_benchmark_measures_both_ways() -> None:
    records = benchmark.measure(torch.device("cpu"), small=True, batch_size=2, turns=1)
    assert [record["way"] for record in records] == ["pixels", "features"]
    columns, rows = benchmark.cached_features_table(records)
    assert [len(row) for row in rows] == [len(columns)] * 2


def test_a_tower_brought_by_another_run_counts(run: Any, frozen: Path) -> None:
    """The weights to start from are there before features are written, and before they are compared."""
    trained(run, frozen, "first", "module.learning_rate.vision=1e-2")
    start = "module.start_from=first"
    cached(run, frozen, "features", start)
    refused(run("lavi.fit", "--recipe", frozen, "data.train=features/train"), "other weights")
    trained(run, frozen, "second", start, "data.train=features/train")
    status, _, err = run("lavi.fit", "--resume", "second", "trainer.max_steps=8")
    assert status == 0, err
    cached(run, frozen, "others")
    refused(run("lavi.fit", "--resume", "second", "data.train=others/train"), "not what the run was reading")
    cached(run, frozen, "others", "--splits", "test")
    resumed = run("lavi.fit", "--resume", "second", "data.validation=others/test", "trainer.max_steps=9")
    refused(resumed, "other weights")
