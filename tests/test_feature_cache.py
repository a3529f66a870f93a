"""Features that were computed once: what reads them trains as on pixels, and those of another tower are refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cached_features as benchmark
import pytest
import torch
import yaml
from conftest import TOWER, ask, collate, refused
from PIL import Image
from safetensors.torch import load_file
from test_data_module import Numbers
from test_native_resolution import tower

from datamodules.formats.features import MEMBER
from datamodules.moving import write_dataset as write_moving
from datamodules.shards.read import read_shard
from datamodules.shards.write import shard_jobs, write_shards
from lavi.batch import CachedVisual
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.model import VisionLanguageModel

CONCAT = "model.fusion={_target_: lavi.fusion.concat.ConcatFusion}"
ANY_RES = "model.tiling={_target_: lavi.data.tiling.AnyRes, max_grid: 2}"
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

    def counted(model: VisionLanguageModel, pixels: torch.Tensor, grids: Any) -> torch.Tensor:
        views.append(len(pixels))
        return encode(model, pixels, grids)

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


@pytest.mark.parametrize("options", [[], [CONCAT], [CONCAT, ANY_RES, POOLED]], ids=["lavi", "concat", "tiled-pooled"])
@pytest.mark.parametrize("source", ["scenes", "videos", "several"])
def test_a_run_on_features_is_the_run_on_pixels(
    run: Any, frozen: Path, source: str, options: list[str], request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(source)
    data = f"data.train={folder if source == 'several' else folder / 'train'}"
    options = [*options, "model.timestamps=true"]
    said = cached(run, frozen, "features", "--dtype", "float32", *options, data)
    assert "data.train=features/train" in said
    on_pixels = trained(run, frozen, "pixels", *options, data)
    views = watch_tower(monkeypatch)
    on_features = trained(run, frozen, "read", *options, "data.train=features/train")
    assert views == [2 if ANY_RES in options else 1], "one call, of the fingerprint"
    for name, weight in on_pixels.items():
        torch.testing.assert_close(on_features[name], weight, atol=1e-6, rtol=1e-5)


def test_bf16_features_are_nearly_the_same(run: Any, frozen: Path) -> None:
    cached(run, frozen, "features")
    on_pixels, on_features = trained(run, frozen, "pixels"), trained(run, frozen, "read", "data.train=features/train")
    unlike = [(on_features[name] - weight).abs().max() for name, weight in on_pixels.items()]
    assert 0 < max(unlike) < 0.01


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
    other = (
        "data.format={_target_: datamodules.formats.conversations.Conversations, "
        "video: {_target_: lavi.data.frame_sampling.FrameSampling, frames: 2}}"
    )
    refused(run("lavi.fit", "--recipe", frozen, "data.train=features/train", other), "other frames", "frames=8")


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
def test_killed_it_goes_on(run: Any, frozen: Path, moment: int) -> None:
    command = [sys.executable, "-m", "lavi.cache_features", "--recipe", str(frozen), "--out", "features"]
    process = subprocess.Popen(command)
    while process.poll() is None and len(list(Path("features").glob("train.part/*.tar"))) < moment:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    cached(run, frozen, "features")
    cached(run, frozen, "whole")
    for shard in sorted(Path("whole/train").iterdir()):
        assert shard.read_bytes() == (Path("features/train") / shard.name).read_bytes(), shard.name


def test_each_source_of_a_mixture_has_a_folder(run: Any, frozen: Path, scenes: Path, videos: Path) -> None:
    def mixture(first: str, second: str) -> str:
        sources = f"{{scenes: {first}, moving: {second}}}"
        return f"data.train={{_target_: datamodules.mixture.Mixture, sources: {sources}}}"

    cached(run, frozen, "features", "--dtype", "float32", mixture(str(scenes / "train"), str(videos / "train")))
    on_pixels = trained(run, frozen, "pixels", mixture(str(scenes / "train"), str(videos / "train")))
    on_features = trained(run, frozen, "read", mixture("features/train/scenes", "features/train/moving"))
    for name, weight in on_pixels.items():
        torch.testing.assert_close(on_features[name], weight, atol=1e-6, rtol=1e-5)
    mixed = run("lavi.fit", "--recipe", frozen, mixture("features/train/scenes", str(videos / "train")))
    refused(mixed, "cached features", "all sources")


def test_a_broken_sample_is_left_out(run: Any, frozen: Path, scenes: Path) -> None:
    shutil.copytree(scenes / "train", "broken")
    shard = sorted(Path("broken").glob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    start = data.index(b"\xff\xd8\xff")
    data[start + 200 : start + 204] = b"????"
    shard.write_bytes(data)
    assert "1 left out" in cached(run, frozen, "features", "data.train=broken")


def test_a_run_is_scored_on_features(run: Any, frozen: Path) -> None:
    trained(run, frozen, "trained")
    cached(run, frozen, "features", "--splits", "test", "--dtype", "float32")
    scores = []
    for test in ([], ["data.test=features/test"]):
        status, _, err = run("lavi.evaluate", "--checkpoint", "trained", "--out", "scores.jsonl", *test)
        assert status == 0, err
        scores = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]
    assert scores[0]["controls"] == scores[1]["controls"]


def test_at_native_resolution_padding_is_not_stored(build: Any) -> None:
    """Features of images of other grids meet in one batch, padded to the longest as the tower would."""
    bare = build(ConcatFusion())
    model = VisionLanguageModel(vision=tower(), language=bare.language, fusion=ConcatFusion()).eval()
    samples = [ask(0, "what?", answer="blue"), ask("what?", 1, answer="red")]
    samples[1].images = [samples[1].images[0].resize((80, 16))]
    batch = collate(model, samples)
    with torch.no_grad():
        features = model.features(batch.pixels, batch.grids)
        logits = model(batch)
    for sample, one, slot in zip(samples, features, batch.image_slots, strict=True):
        own = one[None, : slot.layout.tokens_of_view(len(one))]
        sample.images = [CachedVisual(own, slot.layout, lambda: None)]  # type: ignore[arg-type, return-value]
    read = collate(model, samples)
    assert len(read.pixels) == 0
    assert read.cached is not None
    assert torch.equal(read.cached, features)
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
