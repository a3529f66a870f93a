"""What is kept of a run: stages that start from one another, whole models in folders, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ask, awaken, collate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lavi import export, fit
from lavi.checkpoints import keep_run
from lavi.checkpoints.keep_run import KeepRun
from lavi.checkpoints.model_folder import FUSION, RECIPE, build, from_pretrained, save_pretrained
from lavi.checkpoints.run_folder import LAST, load_run
from lavi.checkpoints.trained_weights import TRAINED
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.recipe import Recipe
from lavi.training.module import VisionLanguageModule

LORA = "model.language.lora={rank: 4, dropout: 0.5}"
SAMPLES = [ask(1, "what colour is the circle?", answer="red"), ask("is there a square?", answer="yes")]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_recipe: Path):  # type: ignore[no-untyped-def]
    """Trains the tiny recipe, changed, or goes on with a run: (status, errors)."""
    monkeypatch.chdir(tmp_path)

    def call(run: str, *overrides: str, front: Any = fit, options: tuple[str, ...] = ("--run",)) -> int:
        given = {override.partition("=")[0] for override in overrides}
        usual = {"trainer.limit_val_batches": 0} | ({"trainer.max_steps": 2} if options == ("--run",) else {})
        short = [f"{key}={value}" for key, value in usual.items() if key not in given]
        recipe = ["--recipe", str(tiny_recipe)] if options == ("--run",) else []
        monkeypatch.setattr(sys, "argv", ["front", *options, run, *recipe, *short, *overrides])
        with pytest.raises(SystemExit) as left:
            front.main()
        return int(left.value.code or 0)

    return call


def names(run: str | Path) -> set[str]:
    return set(load_file(Path(run) / TRAINED))


def logits(run: str | Path) -> Tensor:
    model = load_run(Path(run))[1]
    with torch.no_grad():
        return model(collate(model, SAMPLES))


class Final(KeepRun):
    """Notes what the model says when training ends."""

    said: Tensor

    def on_train_end(self, trainer: Any, module: Any) -> None:
        super().on_train_end(trainer, module)
        model = module.eval().model
        with torch.no_grad():
            Final.said = model(collate(model, SAMPLES))


def test_a_later_stage_lacks_nothing_of_an_earlier_one(train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 trains fusion and language, stage 2 the fusion alone; its run says the same when stage 1 is gone."""
    monkeypatch.setattr("lavi.training.run.KeepRun", Final)
    assert train("one") == 0
    assert torch.equal(logits("one"), Final.said)
    start = ["module.start_from=one", "module.learning_rate.language=null"]
    assert train("two", *start) == 0
    assert (
        train("three", "module.start_from=two", "module.learning_rate={fusion: null, language: null, vision: 1e-3}")
        == 0
    )
    trained = {name for name in names("one") if name.startswith("model.fusion.")}
    assert names("two") == names("one") > trained
    one, two = load_file(f"one/{TRAINED}"), load_file(f"two/{TRAINED}")
    assert all(torch.equal(one[name], two[name]) for name in names("one") - trained)
    assert not any(torch.equal(one[name], two[name]) for name in trained if "generators" in name)
    shutil.rmtree("one")
    assert torch.equal(logits("three"), Final.said)
    assert any(name.startswith("model.vision.") for name in names("three"))
    assert names("three") > names("two")
    assert train("two", "trainer.max_steps=3", options=("--resume",)) == 0  # nor does it need stage 1 to go on
    assert torch.equal(logits("two"), Final.said)
    assert names("two") == set(one)


def test_adapters_start_around_what_was_trained_before(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavi.training.run.KeepRun", Final)
    assert train("one") == 0
    assert train("two", "module.start_from=one", LORA, "module.learning_rate.vision=2e-4") == 0
    q_proj = "model.language.hf.model.layers.0.self_attn.q_proj"
    assert f"{q_proj}.base_layer.weight" in names("two")
    one, two = load_file(f"one/{TRAINED}"), load_file(f"two/{TRAINED}")
    assert torch.equal(two[f"{q_proj}.base_layer.weight"], one[f"{q_proj}.weight"])
    assert torch.equal(logits("two"), Final.said)
    model = load_run(Path("two"))[1]
    adapters = {f"model.language.{name}" for name in model.language.adapters}
    frozen = {name for name in two if ".base_layer." in name}
    assert adapters <= set(two)
    assert not frozen & adapters


def whole_and_half(train, monkeypatch: pytest.MonkeyPatch, *changes: str) -> None:  # type: ignore[no-untyped-def]
    """Two runs of four steps: ``whole`` in one go, ``half`` as the same stood after two of them."""
    save = KeepRun._save

    def and_copy(self: KeepRun, trainer: Any) -> None:
        save(self, trainer)
        if trainer.global_step == 2:
            shutil.copytree(self.folder, "half")

    with monkeypatch.context() as patched:
        patched.setattr(KeepRun, "_save", and_copy)
        assert train("whole", *changes, "trainer.max_steps=4", "--save-every", "2") == 0


def test_a_run_with_dropout_goes_on_as_if_it_had_not_stopped(train, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_and_half(train, monkeypatch, LORA)
    assert names("half") == names("whole")
    assert train("half", options=("--resume",)) == 0
    whole, half = load_file(f"whole/{TRAINED}"), load_file(f"half/{TRAINED}")
    assert all(torch.equal(whole[name], half[name]) for name in whole)


TILED = "model.tiling={_target_: lavi.data.tiling.AnyRes, max_grid: 2}"
NORMED = [
    "model.vision={_target_: lavi.vision.timm.TimmVision, name: test_efficientnet, image_size: 64, pretrained: false}",
    "module.learning_rate.vision=1e-3",
]


def test_the_statistics_of_a_trained_batch_norm_are_kept(train, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no parameters: a run, one that goes on and one that starts from it have them, as they were learned."""
    whole_and_half(train, monkeypatch, *NORMED)
    two = load_file(f"half/{TRAINED}")
    assert train("half", options=("--resume",)) == 0
    whole, half = load_file(f"whole/{TRAINED}"), load_file(f"half/{TRAINED}")
    statistics = [name for name in whole if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) > 10
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    assert all(not torch.equal(whole[name], two[name]) for name in statistics)
    state = load_run(Path("whole"))[1].state_dict()
    assert all(torch.equal(state[name.removeprefix("model.")], whole[name]) for name in statistics)
    frozen = [NORMED[0], "module.learning_rate.vision=null", "module.start_from=whole"]
    assert train("later", *frozen) == 0
    later = load_file(f"later/{TRAINED}")
    assert all(torch.equal(later[name], whole[name]) for name in statistics)


def test_a_run_of_before_buffers_were_kept_opens(train, caplog: pytest.LogCaptureFixture) -> None:
    """They have the values of their own checkpoint, and it is said."""
    assert train("one", *NORMED) == 0
    file = Path("one") / TRAINED
    with safe_open(file, "pt") as weights:
        header = weights.metadata()
    parameters = {
        name: t for name, t in load_file(file).items() if ".running_" not in name and "num_batches" not in name
    }
    save_file(parameters, file, header)
    model = load_run(Path("one"))[1]
    assert "buffers, such as model.vision." in caplog.text
    state = model.state_dict()
    assert all(torch.equal(state[name.removeprefix("model.")], tensor) for name, tensor in parameters.items())
    assert train("one", "trainer.max_steps=3", options=("--resume",)) == 0


def test_statistics_are_found_behind_a_backbone_that_goes_around_the_tower(train) -> None:
    """A run of the bare tower is scored with fewer tiles: its weights and its statistics have other names there."""
    assert train("one", *NORMED) == 0
    around = NORMED[0].replace(
        "model.vision=", "model.vision={_target_: lavi.vision.tiles_on_request.TilesOnRequest, tower: "
    )
    state = load_run(Path("one"), overrides=[f"{around}, keep: 1.0}}", TILED])[1].state_dict()
    stored = load_file(f"one/{TRAINED}")
    statistics = [name for name in stored if name.endswith("running_mean")]
    assert len(statistics) > 5
    for name in statistics:
        own = name.removeprefix("model.").replace("vision.", "vision.tower.", 1)
        assert torch.equal(state[own], stored[name])


def test_weights_that_are_not_finite_replace_no_checkpoint(
    train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss may be finite, and the gradient not; what can be gone on from is the checkpoint before."""
    step = VisionLanguageModule.on_before_optimizer_step

    def broken(self: VisionLanguageModule, optimizer: Any) -> None:
        step(self, optimizer)
        if self.global_step == 3:
            next(p for p in self.parameters() if p.grad is not None).grad.fill_(float("nan"))

    monkeypatch.setattr(VisionLanguageModule, "on_before_optimizer_step", broken)
    assert train("one", "trainer.max_steps=4", "trainer.gradient_clip_val=null", "--save-every", "2") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "after step 4 the weight model." in said
    assert "is not finite, and is not saved: lower module.learning_rate" in said
    assert "one/last.ckpt of step 2 is intact" in said
    assert all(torch.isfinite(tensor).all() for tensor in load_file(f"one/{TRAINED}").values())
    monkeypatch.setattr(VisionLanguageModule, "on_before_optimizer_step", step)
    assert train("one", "trainer.max_steps=4", options=("--resume",)) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("module.learning_rate.fusion=1e-5", "module.learning_rate cannot change"),
        ("module.learning_rate={language: 1e-3, fusion: 1e-3}", "module.learning_rate cannot change"),
        ("module.weight_decay=0.3", "module.weight_decay cannot change"),
        (
            "module.muon=2.0",
            "module.muon cannot change (it was None): begin anew from its weights with module.start_from",
        ),
    ],
)
def test_what_the_optimizer_s_state_would_undo_is_refused(
    train, capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    """A run that is resumed has its old rates: it must not say and write down that it has others."""
    assert train("one") == 0
    before = Path("one/recipe.yaml").read_text()
    assert train("one", change, "trainer.max_steps=3", options=("--resume",)) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert Path("one/recipe.yaml").read_text() == before
    same = ["module.warmup=0.5", "module.weight_decay=0.0", "module.learning_rate.vision=null"]
    assert train("one", *same, "trainer.max_steps=3", options=("--resume",)) == 0


class TakesAll:
    """As a module of one's own that hands its settings on."""

    def __init__(self, model: Any, **settings: Any) -> None:
        pass


def test_settings_of_the_optimizer_are_those_that_a_module_is_built_with() -> None:
    """Its defaults among them, whatever its constructor names; a part at null is frozen, as one that is not named."""

    def read(target: str, **settings: Any) -> dict[str, Any]:
        return keep_run._of_optimizer(yaml.safe_dump({"module": {"_target_": target, **settings}}))

    assert read("test_checkpoint.TakesAll", weight_decay=0.3) == {"weight_decay": 0.3}
    assert read("test_checkpoint.TakesAll") == {}
    ours, rates = "lavi.training.module.VisionLanguageModule", {"fusion": 1e-3}
    expected = {"learning_rate": rates, "weight_decay": 0.0, "muon": None}
    assert read(ours, learning_rate=rates) == expected
    assert read(ours, learning_rate=rates | {"vision": None}, muon=None) == expected


def test_a_start_that_does_not_fit_is_refused(train, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*overrides: str, words: str) -> None:
        assert train("two", *overrides) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
        assert not Path("two").exists()

    assert train("one", LORA) == 0
    refused("module.start_from=gone", words="there is no gone/trained.safetensors: give module.start_from a run folder")
    refused("module.start_from=one", words="lacks: give model.language the same lora.")
    refused(
        "module.start_from=one",
        LORA,
        "model.fusion.generator.bottleneck=8",
        words="is no start for this recipe: model.fusion",
    )
    refused(
        "module.start_from=one",
        LORA,
        "model.fusion.per_target=true",
        words="has trained 'model.fusion.generators.1.",
    )
    other = LORA.replace("rank: 4", "rank: 4, alpha: 8")
    refused("module.start_from=one", other, words="has adapters of lora.alpha=256 at lora.rank=4")
    assert train("one", other, "trainer.max_steps=3", options=("--resume",)) == 2
    assert "would be another model" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"lora\.alpha=256"):
        load_run(Path("one"), overrides=[other])


def test_what_another_recipe_made_is_refused(train, tmp_path: Path) -> None:
    """A run may hold more than it trains only where its recipe starts from another."""
    assert train("one") == 0
    assert train("two", "module.start_from=one", "module.learning_rate.language=null") == 0
    recipe = yaml.safe_load(Path("two", RECIPE).read_text())

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            load_run(Path("two"))

    without = recipe | {"module": recipe["module"] | {"start_from": None}}
    Path("two", RECIPE).write_text(yaml.safe_dump(without))
    refused("belongs to another recipe: it has besides")
    Path("two", RECIPE).write_text(yaml.safe_dump(recipe))
    with safe_open(Path("two", TRAINED), framework="pt") as file:
        header = file.metadata()
    state = load_file(Path("two", TRAINED))
    some = next(name for name in state if "language" in name)
    save_file({name: tensor for name, tensor in state.items() if name != some}, Path("two", TRAINED), header)
    refused("belongs to another recipe: it lacks 1 parameters")
    newer = header | {"versions": json.dumps(json.loads(header["versions"]) | {"lavi": "999.0"})}
    save_file(state, Path("two", TRAINED), newer)
    refused("was written by lavi 999.0, and this is lavi .*: upgrade lavi")


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_in_a_folder_needs_nothing_else(train, lora: bool, scenes: Path, tmp_path: Path) -> None:
    """Neither the run, nor the tokenizer and checkpoints it was built from; and its language model is ordinary."""
    tokenizer = shutil.copytree(scenes / "tokenizer", tmp_path / "tokenizer")
    rates = "module.learning_rate={fusion: 1e-3, language: 1e-3, vision: 1e-3}"
    assert train("run", rates, f"model.language.tokenizer={tokenizer}", *([LORA] if lora else [])) == 0
    model = load_run(Path("run"))[1]
    with torch.no_grad():
        batch = collate(model, SAMPLES)
        expected = model(batch)
        text = model.language.hf(input_ids=batch.input_ids).logits
    assert train("run", "--out", "away/model", front=OnlyOwn(export), options=("--checkpoint",)) == 0
    shutil.rmtree("run")
    shutil.rmtree(tokenizer)
    shutil.move("away", "elsewhere")
    folder = Path("elsewhere/model")
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} <= {".safetensors", ".json", ".yaml", ".jinja"}

    again = from_pretrained(folder)
    assert not again.training
    assert again.language.adapters == frozenset()
    assert again.language.tokenizer.get_vocab() == model.language.tokenizer.get_vocab()
    encoded = collate(again, SAMPLES)
    assert torch.equal(encoded.input_ids, batch.input_ids)
    assert torch.equal(encoded.pixels, batch.pixels)
    ordinary = AutoModelForCausalLM.from_pretrained(folder / "language")
    with torch.no_grad():
        same = torch.testing.assert_close if lora else exactly
        same(again(encoded), expected)
        same(ordinary(input_ids=batch.input_ids).logits, text)
    plain = AutoModelForCausalLM.from_config(ordinary.config)
    plain.save_pretrained("plain")
    assert type(ordinary) is type(plain)
    assert set(load_file(folder / "language" / "model.safetensors")) == set(load_file("plain/model.safetensors"))
    save_pretrained(again, "again")  # once more, from there
    assert torch.equal(from_pretrained("again")(encoded), again(encoded))


def exactly(left: Tensor, right: Tensor) -> None:
    assert torch.equal(left, right)


class OnlyOwn:
    """A front without the overrides that this file's runs share."""

    def __init__(self, front: Any) -> None:
        self.front = front

    def main(self) -> None:
        sys.argv = [argument for argument in sys.argv if "=" not in argument]
        self.front.main()


@pytest.fixture
def folder(tiny_recipe: Path, tmp_path: Path) -> Path:
    model = build(Recipe.load(tiny_recipe))
    awaken(model.fusion)
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_that_does_not_fit_is_refused(folder: Path, build: Any) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            from_pretrained(folder)

    from_pretrained(folder)
    kept = {name: (folder / name).read_bytes() for name in (RECIPE, FUSION)}
    recipe = yaml.safe_load(kept[RECIPE])

    def write(**model: Any) -> None:
        (folder / RECIPE).write_text(yaml.safe_dump({"model": recipe["model"] | model}))

    write(fusion=recipe["model"]["fusion"] | {"every": 4})
    refused(r"fusion.safetensors does not fit the model of its recipe: it has besides .* parameters \(fusion")
    generator = recipe["model"]["fusion"]["generator"]
    write(fusion=recipe["model"]["fusion"] | {"generator": generator | {"bottleneck": 8}})
    refused(r"does not fit .*: fusion.generators.* in the file, .* in the model")
    write(fusion=recipe["model"]["fusion"] | {"evry": 8})
    refused("'model.fusion.evry' is unknown .* did you mean 'every'")
    write(fusion={"_target_": "os.system"})
    refused("wants to build 'os.system'.*--trust")
    write(_target_="lavi.vision.hf.HFVision")
    refused("is unknown to lavi.vision.hf.HFVision")
    (folder / RECIPE).write_text("- model\n")
    refused("has no section 'model'")
    (folder / RECIPE).write_bytes(kept[RECIPE])
    with safe_open(folder / FUSION, framework="pt") as file:
        header = file.metadata()
    save_file(load_file(folder / FUSION), folder / FUSION, {"versions": json.dumps({"lavi": "999.0"})})
    refused("was written by lavi 999.0")
    assert "torch" in json.loads(header["versions"])
    (folder / FUSION).write_bytes(b"broken")
    refused("is not a readable checkpoint")
    (folder / FUSION).write_bytes(kept[FUSION])
    (folder / "language" / "pytorch_model.bin").write_bytes(b"")
    refused("is a pickle, which could run anything")
    os.remove(folder / FUSION)
    refused("holds no model: it has no fusion.safetensors")
    with pytest.raises(UserError, match=r"model holds no model: it has no recipe\.yaml"):
        from_pretrained(folder / "model")


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(
    folder: Path, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_pretrained(folder)
    with pytest.raises(UserError, match="model exists and is left as it is"):
        save_pretrained(model, folder)
    with pytest.raises(UserError, match="put together by hand"):
        save_pretrained(build(ConcatFusion()), folder.with_name("new"))
    monkeypatch.setattr(type(model.vision), "save_pretrained", lambda self, folder: {"sorce": Path()})
    with pytest.raises(UserError, match=r"'model.vision.sorce' is unknown .* did you mean 'source'\?"):
        save_pretrained(model, folder.with_name("new"))
    monkeypatch.delattr(type(model.vision), "save_pretrained")
    with pytest.raises(UserError, match="HFVision cannot be saved"):
        save_pretrained(model, folder.with_name("new"))
    assert {path.name for path in folder.parent.iterdir()} == {"model", "tiny.yaml"}


def test_resuming_reads_no_pickle(train, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("evil",)

    assert train("run") == 0
    checkpoint: dict[str, Any] = torch.load(Path("run", LAST), weights_only=True)
    torch.save(checkpoint | {"epoch": Evil()}, Path("run", LAST))
    assert train("run", options=("--resume",)) == 2
    assert "last.ckpt holds more than tensors and numbers" in capsys.readouterr().err
    assert not Path("evil").exists()
