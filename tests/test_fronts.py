"""The commands: train, stop, resume, score, ask; and one clear sentence for each user's mistake."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import refused
from PIL import Image
from safetensors import safe_open

from lavi.checkpoints.keep_run import KeepRun
from lavi.checkpoints.load import load, trained_sampling
from lavi.checkpoints.model_folder import RECIPE
from lavi.checkpoints.run_folder import LAST
from lavi.checkpoints.trained_weights import TRAINED
from lavi.data.frame_sampling import FrameSampling
from lavi.efficiency.record import Record, read_records

ROOT = Path(__file__).parent.parent


@pytest.fixture
def trained(run, tiny_recipe: Path, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    assert run("lavi.fit", "--recipe", tiny_recipe, "--run", folder)[0] == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / TRAINED, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_fit_shows_what_it_does_and_keeps_what_was_trained(run, tiny_recipe: Path, tmp_path: Path) -> None:
    status, out, _ = run("lavi.fit", "--recipe", tiny_recipe, "module.learning_rate.language=null")
    assert status == 0
    for words in (
        "What trains",
        "One conversation as trained",
        "the end token among them",
        "tensorboard --logdir runs",
        "after 6 steps",
    ):
        assert words in out
    folder = tmp_path / "runs" / "tiny"
    assert yaml.safe_load((folder / RECIPE).read_text())["module"]["learning_rate"] == {
        "fusion": 0.001,
        "language": None,
    }
    kept = weights(folder)
    assert kept
    assert all(name.startswith("model.fusion.") for name in kept)  # exactly what was trained
    with safe_open(folder / TRAINED, framework="pt") as file:
        header = file.metadata()
    assert yaml.safe_load(header["recipe"])["name"] == "tiny"
    assert "torch" in json.loads(header["versions"])
    assert header["step"] == "6"
    assert any(folder.glob("events.out.tfevents*"))


def test_a_log_shows_that_it_trains(run, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines where there is no terminal; none where the recipe wants no bar; a recipe's own bar instead of them."""
    from lavi import report

    for name in ("FIRST", "EVERY", "PATIENCE"):  # no line depends on the speed of the machine
        monkeypatch.setattr(report, name, float("inf"))
    fit = ("lavi.fit", "--recipe", tiny_recipe, "trainer.num_sanity_val_steps=0")
    status, out, err = run(*fit, "trainer.enable_progress_bar=true")
    assert status == 0, err
    first, last = [line for line in out.splitlines() if line.startswith(("training:", "validation:"))]
    assert re.fullmatch(r"training: step 1 of 6, loss \d+\.\d+", first)
    assert re.fullmatch(r"training: step 6 of 6, [\d.,]+ steps/s, loss \d+\.\d+, (\d+|under 1) s in all", last)
    assert "eval mode" not in err
    assert "LeafSpec" not in err
    assert "Total params" not in out
    assert "training:" not in run(*fit)[1]
    monkeypatch.setattr(report, "FIRST", 0.0)
    monkeypatch.setattr(report, "EVERY", 0.0)
    out = run(*fit, "trainer.enable_progress_bar=true", "trainer.limit_val_batches=2")[1]
    said = [line.split(",")[0] for line in out.splitlines() if line.startswith(("training:", "validation:"))]
    validated = [f"validation: batch {n} of 2" for n in (1, 2, 2)]
    assert said == [*(f"training: step {n} of 6" for n in range(1, 7)), *validated, "training: step 6 of 6"]
    own = "callbacks.bar={_target_: lightning.pytorch.callbacks.TQDMProgressBar}"
    out = run(*fit, "trainer.enable_progress_bar=true", own)[1]
    assert "training:" not in out


def test_files_are_the_same_in_any_locale(run, tiny_recipe: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    settings = yaml.safe_load(tiny_recipe.read_text()) | {"name": "été"}
    tiny_recipe.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    # As where the locale is C: what names no encoding is ASCII.
    monkeypatch.setattr(io, "text_encoding", lambda encoding, level=2: encoding or "ascii")
    status, _, err = run("lavi.fit", "--recipe", tiny_recipe, "trainer.max_steps=1")
    assert status == 0, err
    assert "name: été" in (tmp_path / "runs" / "été" / RECIPE).read_text(encoding="utf-8")
    assert run("lavi.evaluate", "--checkpoint", "runs/été", "--limit", 4)[0] == 0
    profiled = run("lavi.profile", "--recipe", tiny_recipe, "--sweep", "visual_tokens=4", "--out", "costs")
    assert profiled[0] == 0, profiled[2]
    assert "été" in Path("costs/records.csv").read_text(encoding="utf-8")


def test_a_run_folder_is_never_written_over(run, tiny_recipe: Path, trained: Path, tmp_path: Path) -> None:
    before = (trained / TRAINED).read_bytes()
    refused(run("lavi.fit", "--recipe", tiny_recipe, "--run", trained), "exists", "--resume")
    for name in ("tiny", "tiny-2"):
        assert run("lavi.fit", "--recipe", tiny_recipe, "trainer.max_steps=1")[0] == 0
        assert (tmp_path / "runs" / name / TRAINED).is_file()
    assert (trained / TRAINED).read_bytes() == before


def test_resuming_ends_where_one_go_ends_bit_for_bit(run, tiny_recipe: Path, trained: Path, tmp_path: Path) -> None:
    """The schedule knows six steps from the start: the run is cut by copying its checkpoint of step three."""
    kept, save = tmp_path / "kept", KeepRun._save

    def and_copy(self: KeepRun, trainer: pl.Trainer) -> None:
        save(self, trainer)
        if trainer.global_step == 3:
            shutil.copytree(self.folder, kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeepRun, "_save", and_copy)
        assert run("lavi.fit", "--recipe", tiny_recipe, "--run", tmp_path / "cut", "--save-every", 3)[0] == 0
    status, _, _ = run("lavi.fit", "--resume", kept)
    assert status == 0
    whole, resumed = weights(trained), weights(kept)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_ctrl_c_saves_and_says_how_to_go_on(run, tiny_recipe: Path, tmp_path: Path) -> None:
    """Started as users do: what is said while Python ends counts."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "lavi.fit", "--recipe", tiny_recipe, "--run", folder, "trainer.max_steps=100000"]
    command += ["--save-every", "5", "trainer.val_check_interval=100000"]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (folder / LAST).is_file() or started.poll() is not None:
            break
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert "Traceback" not in err
    said = " ".join(out.split())
    assert f"python -m lavi.fit --resume {folder}" in said
    step = int(said.split("stopped at step ")[1].split(",")[0])
    assert step > 0
    changes = (f"trainer.max_steps={step + 2}", "trainer.limit_val_batches=0")
    status, out, err = run("lavi.fit", "--resume", folder, *changes)
    assert status == 0, err
    assert f"after {step + 2} steps" in " ".join(out.split())


def test_evaluate_puts_noise_on_images_where_it_is_asked_for(run, trained: Path) -> None:  # type: ignore[no-untyped-def]
    noise = ("--noise", 0.1, 0.3, "data.validation=null")  # a change of the recipe may stand behind
    status, out, _ = run("lavi.evaluate", "--checkpoint", trained, "--limit", 4, "--out", "records.jsonl", *noise)
    assert status == 0
    assert "noise of 0.1" in out
    (record,) = read_records(Path("records.jsonl"))
    assert list(record.controls) == ["shuffled images", "no image", "noise of 0.1", "noise of 0.3"]
    assert all("all" in control for control in record.controls.values())


def test_evaluate_scores_with_controls_and_costs(run, trained: Path) -> None:
    status, out, _ = run("lavi.evaluate", "--checkpoint", trained, "--out", "records.jsonl")
    assert status == 0
    for words in (
        "held-out accuracy",
        "shuffled images",
        "no image",
        "ceiling",
        "peak MiB",
        "visual tokens in the language model",
    ):
        assert words in out
    (record,) = read_records(Path("records.jsonl"))
    assert record.method == "lavi"
    assert record.visual_tokens_in_language == 0
    assert {"all", "level/easy", "family/colour"} <= set(record.accuracy)
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_answers(run, trained: Path, beams: int) -> None:
    Image.new("RGB", (50, 30)).save("a.png")
    question = ["--question", "what colour is the circle?", "--max-new-tokens", 4, "--beams", beams]
    status, _, err = run("lavi.generate", "--checkpoint", trained, "--image", "a.png", *question)
    assert status == 0, err
    assert run("lavi.generate", "--checkpoint", trained, *question)[0] == 0  # without an image, the language model
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    frames[0].save("v.gif", save_all=True, append_images=frames[1:], duration=100)
    status, _, err = run("lavi.generate", "--checkpoint", trained, "--video", "v.gif", "--frames", 2, *question)
    assert status == 0, err
    refused(
        run("lavi.generate", "--checkpoint", trained, "--video", "a.png", *question), "a.png does not open as a video"
    )


def test_an_export_sees_the_frames_that_its_run_was_trained_on(run, tiny_recipe: Path) -> None:
    sampling = "{_target_: lavi.data.frame_sampling.FrameSampling, how: fps, fps: 2.0, frames: 5}"
    formed = f"data.format={{_target_: datamodules.formats.conversations.Conversations, video: {sampling}}}"
    for name, more in (("films", (formed,)), ("pictures", ())):
        assert run("lavi.fit", "--recipe", tiny_recipe, "--run", name, *more)[0] == 0
        assert run("lavi.export", "--checkpoint", name, "--out", f"{name}-export")[0] == 0
        assert trained_sampling(f"{name}-export") == trained_sampling(name)
        assert load(f"{name}-export").fusion is not None
    assert trained_sampling("films") == FrameSampling(how="fps", fps=2.0, frames=5)
    assert trained_sampling("pictures") == FrameSampling()


def test_weights_in_fewer_bits_are_not_timed_as_if_they_were_whole(run, tiny_recipe: Path) -> None:
    quantized = "model.language.quantization=bitsandbytes-4bit"
    profile = ("lavi.profile", "--recipe", tiny_recipe, quantized, "--sweep", "visual_tokens=16")
    refused(run(*profile, "--measure"), "weights in bitsandbytes-4bit are counted here, and neither timed nor weighed")
    refused(run(*profile, "--estimate", "h100"), "weights in bitsandbytes-4bit are counted here")


def test_mistakes_with_recipes(run, tiny_recipe: Path) -> None:
    refused(run("lavi.fit", "--recipe", "gone.yaml"), "there is no recipe gone.yaml")
    refused(run("lavi.fit", "--recipe", tiny_recipe, "model.fusion.evry=2"), "command line", "did you mean 'every'?")
    refused(run("lavi.fit", "--recipe", tiny_recipe, "data.train=gone"), "no shards at gone", "datamodules.scenes")
    refused(
        run("lavi.fit", "--recipe", tiny_recipe, "model.language.tokenizer=gone"), "tiny.yaml", "no tokenizer at 'gone'"
    )
    refused(run("lavi.fit", "--recipe", tiny_recipe, "model.fusion.layers=[9]"), "layers [9]", "0 to 3")
    refused(run("lavi.fit", "--recipe", tiny_recipe, "module.learning_rate={fusoin: 1}"), "did you mean 'fusion'?")
    refused(run("lavi.fit", "--recipe", tiny_recipe, "data.workers=9"), "8 shards cannot feed 9 readers")
    empty = Path("empty")
    empty.mkdir()
    refused(run("lavi.fit", "--recipe", tiny_recipe, f"data.train={empty}"), "has no .tar file", "datamodules.pack")


def test_mistakes_with_checkpoints(run, tiny_recipe: Path, trained: Path, tmp_path: Path) -> None:
    ask = ["--question", "what?"]
    refused(run("lavi.generate", "--checkpoint", "gone", *ask), "gone holds no model")
    refused(run("lavi.fit", "--resume", "gone"), "gone has no last.ckpt")
    refused(run("lavi.generate", "--checkpoint", trained, "--image", "gone.jpg", *ask), "there is no image gone.jpg")
    Path("text.jpg").write_text("no pixels")
    refused(
        run("lavi.generate", "--checkpoint", trained, "--image", "text.jpg", *ask),
        "text.jpg is not an image that opens",
    )
    refused(
        run("lavi.generate", "--checkpoint", trained, "--question", "circle " * 400), "more than the context of 256"
    )
    refused(run("lavi.fit", "--resume", trained, "model.fusion.every=1"), "belongs to another recipe")
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    settings: dict[str, Any] = yaml.safe_load((other / RECIPE).read_text())
    settings["model"]["fusion"]["generator"]["bottleneck"] = 8
    (other / RECIPE).write_text(yaml.safe_dump(settings))
    refused(
        run("lavi.generate", "--checkpoint", other, *ask), "belongs to another recipe", "in the file", "in the model"
    )
    (other / TRAINED).write_bytes(b"broken")
    refused(run("lavi.generate", "--checkpoint", other, *ask), "not a readable checkpoint")
    settings["model"]["fusion"]["_target_"] = "os.system"
    (other / RECIPE).write_text(yaml.safe_dump(settings))
    refused(run("lavi.generate", "--checkpoint", other, *ask), "wants to build 'os.system'", "--trust")


def test_your_own_data(run, tmp_path: Path) -> None:
    """LLaVA-style JSON and an image folder become shards that read back as they were."""
    from datamodules.formats.conversations import Conversations
    from datamodules.shards.read import read_shard
    from datamodules.shards.sources import find_shards

    decode = Conversations().decode

    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    Image.new("RGB", (9, 7), (255, 0, 0)).save(images / "a.png")
    Image.new("RGB", (5, 5)).save(images / "sub" / "b.jpg")
    entries = [
        {
            "id": "one",
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}],
        },
        {
            "id": "x/y.z",
            "image": ["a.png", "sub/b.jpg"],
            "conversations": [
                {"from": "human", "value": "is <image>\nlarger than <image>\n?"},
                {"from": "gpt", "value": "yes", "family": "size"},
            ],
        },
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
    ]
    Path("d.json").write_text(json.dumps(entries))
    assert run("datamodules.pack", "--json", "d.json", "--images", images, "--out", "shards", "--per-shard", 2)[0] == 0
    one, two, three = [decode(raw) for shard in find_shards("shards") for raw in read_shard(shard)]
    assert one.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what?"}]
    assert [image.size for image in two.images] == [(9, 7), (5, 5)]
    kinds = [part["type"] for part in two.messages[0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert two.messages[1]["family"] == "size"
    assert three.images == []
    pack = ["datamodules.pack", "--images", images, "--out", "new", "--json"]
    refused(run("datamodules.pack", "--json", "d.json", "--images", images, "--out", "shards"), "shards exists")
    refused(run(*pack, "gone.json"), "there is no gone.json")
    Path("bad.json").write_text("{")
    refused(run(*pack, "bad.json"), "bad.json is not JSON")
    Path("bad.json").write_text(json.dumps([{"id": "n"}]))
    refused(run(*pack, "bad.json"), "entry 0 has no 'conversations'")
    Path("bad.json").write_text(json.dumps([entries[0] | {"image": "gone.png"}]))
    refused(run(*pack, "bad.json"), "entry 'one': there is no image")
    Path("bad.json").write_text(json.dumps([{"id": "q", "conversations": entries[0]["conversations"][:1]}]))
    refused(run(*pack, "bad.json"), "entry 'q' has no answer")
    assert not Path("new").exists()
    assert not list(Path().glob("new.part*"))


def test_visor_from_search_to_router(run, tiny_recipe: Path, scenes: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Universal training, search, labels, router, score; a search and a labelling that were stopped go on."""
    fusion = "model.fusion={_target_: lavi.visor.fusion.VisorFusion, cross_attention: [0, 3], self_attention: [1, 2]"
    universal, viable, labels = tmp_path / "universal", tmp_path / "viable.json", tmp_path / "labels.jsonl"
    fit = ("lavi.fit", "--recipe", tiny_recipe)
    assert run(*fit, "--run", universal, fusion + ", configurations: [[], [1], [1, 2]]}")[0] == 0
    search = ("lavi.visor", "search", "--checkpoint", universal, "--keep", "0.01", "--samples", 24)
    status, _, err = run(*search, "--out", viable)
    assert status == 0, err
    scored = json.loads(viable.read_text())
    assert set(scored["scores"]) == {"none", "1", "2", "1,2"}
    nothing = {"batches": 0, "samples": 0, "answers": 0, "right": dict.fromkeys(scored["scores"], 0)}
    viable.write_text(json.dumps({"about": scored["about"]} | nothing))
    label = ("lavi.visor", "label", "--checkpoint", universal, "--configurations", viable, "--out", labels)
    refused(run(*label), "not finished")
    assert run(*search, "--out", viable)[0] == 0
    assert json.loads(viable.read_text()) == scored
    refused(run(*search[:-1], 12, "--out", viable), "another samples")
    refused(run(*search, "--out", viable, "data.batch_size=2"), "another batch_size")  # its batches would be others
    refused(run(*search, "--out", viable, f"data.validation={scenes / 'test'}"), "another data")
    before = viable.read_bytes()
    refused(run(*label[:-1], viable), "viable.json holds no labels, and is left as it is")
    assert viable.read_bytes() == before
    refused(run(*label), "have several")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("{}\n{}\n")
    refused(run(*label[:5], lines, *label[6:]), "lines.jsonl does not hold the scores of a search")
    refused(run(*search, "--out", lines), "lines.jsonl does not hold the scores of a search")
    labels.unlink()
    label += (f"data.train={scenes / 'validation'}",)
    status, _, err = run(*label)
    assert status == 0, err
    whole = labels.read_text().splitlines()
    assert len(whole[1:]) == len({json.loads(line)["key"] for line in whole[1:]}) == 48
    labels.write_text("".join(line + "\n" for line in whole[:20]) + whole[20][:7])  # killed in the middle of a line
    assert run(*label)[0] == 0
    assert sorted(labels.read_text().splitlines()) == sorted(whole)

    routed = fusion + f", configurations: {viable}, router: token, labels: {labels}" + "}"
    rates = "module.learning_rate={fusion.router: 1e-2}"
    refused(run(*fit, "--run", tmp_path / "several", routed, rates), "one question each")
    router = tmp_path / "router"
    single = f"data.train={scenes / 'validation'}"
    status, _, err = run(*fit, "--run", router, routed, rates, f"module.start_from={universal}", single)
    assert status == 0, err
    viable.unlink()  # a run does not change when the files it was built from do
    assert run("lavi.evaluate", "--checkpoint", router, universal, "--limit", 12)[0] == 0
    mean, full = (read_records(folder / "evaluation.jsonl")[0] for folder in (router, universal))
    assert sum(mean.knobs["routes"].values()) == pytest.approx(1)
    assert mean.knobs["timed route"] in mean.knobs["routes"]
    assert mean.gflops_language < full.gflops_language or "(1, 2)" in mean.knobs["routes"]
    refused(run("lavi.visor", "search", "--checkpoint", router, "--out", tmp_path / "x.json"), "has a router already")


@pytest.mark.parametrize("command", ["pack", "inspect", "scenes", "moving", "digits"])
def test_commands_about_shards_start_without_torch(command: str) -> None:
    """Loading it takes seconds, in each process that writes: longer than most of what they do."""
    code = f"import sys, datamodules.{command}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_adapters_are_counted_as_merged(run: Any, tiny_recipe: Path) -> None:
    """A model answers with the weights that they are merged into; its floor has none either."""
    records = {}
    for name, more in (("plain", ()), ("adapted", ("model.language.lora={rank: 8}",))):
        assert run("lavi.fit", "--recipe", tiny_recipe, "--run", name, *more)[0] == 0
        assert run("lavi.evaluate", "--checkpoint", name, "--limit", 4)[0] == 0
        (records[name],) = read_records(Path(name) / "evaluation.jsonl")
    plain, adapted = records["plain"], records["adapted"]
    assert (adapted.flops, adapted.flops_floor) == (plain.flops, plain.flops_floor)
    assert adapted.flops_of_samples == plain.flops_of_samples
    assert adapted.decode_flops == plain.decode_flops
    assert adapted.milliseconds.keys() == plain.milliseconds.keys()
