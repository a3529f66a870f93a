"""Recipes: merging, and errors that name the line and the nearest right thing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ask

from lavi.cli.arguments import path
from lavi.config.text import Loader, override
from lavi.errors import UserError
from lavi.recipe import Recipe, _fits
from lavi.reduction.base import Reducer
from lavi.training.run import check_data
from lavi.vision.shape_flops import forward_on_meta

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "recipes" / "tasks"  # read as what they are by test_tasks.py
RECIPES = sorted(file for file in (ROOT / "recipes").rglob("*.yaml") if file.parent != TASKS)


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_recipe_is_right_and_says_how_to_run_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    Recipe.load(file)
    header = file.read_text().split("\n\n")[0].splitlines()
    comment = "\n".join(line for line in header if line.startswith("#"))
    for word in ("run:", "needs:", "expect:", str(file.relative_to(ROOT))):
        assert word in comment, f"{file} lacks '{word}' in its header"


FULL_SIZE = [
    file
    for file in RECIPES
    if file.parent.name in ("lavi", "baselines") or (file.parent.name == "visor" and file.name.startswith("qwen2"))
]


@pytest.mark.parametrize("file", [file for file in RECIPES if file not in FULL_SIZE], ids=lambda f: f.stem)
def test_a_small_recipe_trains_on_the_devices_that_it_names(file: Path) -> None:
    """Its batch is of one device: on all that a machine has it would be another recipe."""
    trainer = Recipe.load(file).settings["trainer"]
    assert trainer["accelerator"] == "cpu" or trainer["devices"] == 1


@pytest.fixture(scope="module")
def keep_shapes_of() -> Iterator[Callable[[object], None]]:
    """Keeps the shapes of towers, which take a second to infer, for all recipes of the same vision section."""
    known: dict[str, Any] = {}
    section = ""

    def call(vision: object) -> None:
        nonlocal section
        section = str(vision)

    def remembered(module: Any, shape: Any) -> Any:
        key = f"{section} {module} {shape}"
        if key not in known:
            known[key] = forward_on_meta(module, shape)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lavi.vision.tower.forward_on_meta", remembered)
        yield call


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("file", FULL_SIZE, ids=lambda f: f.stem)
def test_a_recipe_of_published_checkpoints_builds_on_meta(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_shapes_of: Callable[[object], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/visor").mkdir(parents=True)  # what VISOR's offline steps write
    Path("data/visor/viable.json").write_text('{"viable": [[], [4, 9]]}')
    recipe = Recipe.load(file)
    keep_shapes_of(recipe.settings["model"].get("vision"))
    with torch.device("meta"):
        model = recipe.build("model")
        module = recipe.build("module", model=model)
    named = {name for name, rate in recipe.settings["module"]["learning_rate"].items() if rate is not None}
    trained = {name.removeprefix("model.") for name, p in module.named_parameters() if p.requires_grad}
    assert all(any(f"{name}.".startswith(f"{part}.") for part in named) for name in trained)
    assert all(any(f"{name}.".startswith(f"{part}.") for name in trained) for part in named)
    assert sum(p.numel() for p in model.language.parameters()) > 1e8
    batch = model.processor.collate([model.processor.encode(ask(1, "what is this?", answer="a cat"))])
    assert len(batch.pixels) == batch.image_slots[0].views


@pytest.mark.parametrize("name", ["stage1", "modulation", "reduced"])
def test_the_first_stage_of_visor_trains_what_is_new_alone(name: str) -> None:
    recipe = Recipe.load(ROOT / "recipes" / "visor" / f"qwen2_0_5b_siglip_{name}.yaml")
    rates = recipe.settings["module"]["learning_rate"]
    assert {part for part, rate in rates.items() if rate is not None} == {"fusion"}
    assert {"fusion.projector", "fusion.newline"} <= set(rates)


@pytest.mark.parametrize("name", ["lavi_conv", "llama", "clip"])
def test_a_swapped_part_is_a_few_lines(name: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = ROOT / "recipes" / "scenes" / f"{name}.yaml"
    assert len([line for line in file.read_text().splitlines() if not line.startswith("#")]) <= 6
    recipe = Recipe.load(file, [f"model.language.tokenizer={tokenizer}"])
    with torch.device("meta"):
        model = recipe.build("model")
    kinds = {type(g).__name__ for g in model.fusion.generators.values()}
    parts = (model.vision.tower.config.model_type, model.language.hf.config.model_type, *kinds)
    assert (
        parts
        == {
            "lavi_conv": ("siglip_vision_model", "qwen2", "ConvDeltas"),
            "llama": ("siglip_vision_model", "llama", "AttentionDeltas"),
            "clip": ("clip_vision_model", "qwen2", "AttentionDeltas"),
        }[name]
    )


def child(tiny_recipe: Path, text: str) -> Path:
    file = tiny_recipe.with_name("child.yaml")
    file.write_text(f"extends: {tiny_recipe.name}\n{text}")
    return file


def test_a_child_changes_only_its_lines(tiny_recipe: Path) -> None:
    recipe = Recipe.load(child(tiny_recipe, "seed: 7\nmodel:\n  fusion: {every: 1}\n"), ["trainer.max_steps=3"])
    assert recipe.settings["seed"] == 7
    assert recipe.settings["model"]["fusion"] == {
        "_target_": "lavi.fusion.lavi.LaViFusion",
        "every": 1,
        "generator": {"_target_": "lavi.nn.delta_generators.AttentionDeltas", "bottleneck": 16},
    }
    assert recipe.settings["trainer"]["max_steps"] == 3
    assert recipe.settings["name"] == "tiny"


def test_another_target_replaces_the_component_whole(tiny_recipe: Path) -> None:
    recipe = Recipe.load(child(tiny_recipe, "model:\n  fusion: {_target_: lavi.fusion.concat.ConcatFusion}\n"))
    assert recipe.settings["model"]["fusion"] == {"_target_": "lavi.fusion.concat.ConcatFusion"}
    override = "model.fusion._target_=lavi.fusion.concat.ConcatFusion"
    assert Recipe.load(tiny_recipe, [override]).settings["model"]["fusion"] == recipe.settings["model"]["fusion"]


def test_the_resolved_recipe_is_the_recipe(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(child(tiny_recipe, "seed: 7\n"))
    saved = tmp_path / "saved.yaml"
    saved.write_text(recipe.yaml())
    assert Recipe.load(saved).settings == recipe.settings


VALUES = {
    "1e-3": 0.001,
    ".5": 0.5,
    "1_000": 1000,
    "0x10": 16,
    "-1": -1,
    "yes": True,
    "off": False,
    "null": None,
    "~": None,
    "010": "010",
    "12:30:45": "12:30:45",
    "2024-01-01": "2024-01-01",
    "~/data": "~/data",
    "What is this? #1": "What is this? #1",
    "#1": "#1",
    "one: two, three": "one: two, three",
    "- one": "- one",
    "*": "*",
    "a=b": "a=b",
    "Describe it. ": "Describe it. ",
    '"What is this? #1"': "What is this? #1",
    "'42'": "42",
    '""': "",
    "[1e-3, yes, '#']": [0.001, True, "#"],
    "{a: {b: [1]}}": {"a": {"b": [1]}},
}


@pytest.mark.parametrize("text", VALUES)
def test_a_value_on_the_command_line_is_taken_whole(text: str) -> None:
    value = override({"a": {"b": 0, "c": 1}}, [f"a.b={text}"], {})["a"]["b"]
    assert value == VALUES[text]
    assert type(value) is type(VALUES[text])


@pytest.mark.parametrize("value", [*VALUES, *VALUES.values(), float("inf"), "=", "<<", "é", "two\nlines"])
def test_what_a_run_keeps_of_its_recipe_reads_back_the_same(value: object) -> None:
    settings = {"a": value}
    text = Recipe(settings).yaml()
    assert yaml.load(text, Loader) == settings


def test_a_mapping_on_the_command_line_takes_the_place_of_the_old_one(tiny_recipe: Path) -> None:
    recipe = Recipe.load(tiny_recipe, ["module.learning_rate={fusion: 1e-4}"])
    assert recipe.settings["module"]["learning_rate"] == {"fusion": 1e-4}
    concat = "model.fusion={_target_: lavi.fusion.concat.ConcatFusion, newline: true}"
    recipe = Recipe.load(tiny_recipe, [concat])
    assert recipe.settings["model"]["fusion"] == {"_target_": "lavi.fusion.concat.ConcatFusion", "newline": True}
    again = concat.replace("concat.ConcatFusion, newline: true", "lavi.LaViFusion, every: 3")
    assert Recipe.load(tiny_recipe, [again]).settings["model"]["fusion"] == {
        "_target_": "lavi.fusion.lavi.LaViFusion",
        "every": 3,
    }
    # In a file that extends another one it is merged.
    merged = Recipe.load(child(tiny_recipe, "module:\n  learning_rate: {fusion: 1e-4}\n"))
    assert merged.settings["module"]["learning_rate"] == {"fusion": 1e-4, "language": 1e-3}


def test_changes_may_come_in_any_order(tiny_recipe: Path) -> None:
    changes = [
        "module.learning_rate={fusion: 1e-4}",
        "module.learning_rate.vision=1e-5",
        "model.fusion._target_=lavi.fusion.cross_attention.CrossAttentionFusion",
        "model.fusion.every=1",
    ]
    merged = [Recipe.load(tiny_recipe, order).settings for order in (changes, changes[::-1])]
    assert merged[0] == merged[1]
    assert merged[0]["module"]["learning_rate"] == {"fusion": 1e-4, "vision": 1e-5}
    assert merged[0]["model"]["fusion"] == {"_target_": changes[2].partition("=")[2], "every": 1}


def test_a_change_reaches_items_numbers_and_what_is_not_there_yet() -> None:
    lines = {"a.0": "file:1", "a": "file:1"}
    settings = {"a": [1, {"b": 2}], "stages": {2: 0.5}, "nothing": None}
    changed = override(settings, ["a.1.b=3", "stages.2=0.25", "nothing.new.key=4"], lines)
    assert changed == {"a": [1, {"b": 3}], "stages": {2: 0.25}, "nothing": {"new": {"key": 4}}}
    assert settings == {"a": [1, {"b": 2}], "stages": {2: 0.5}, "nothing": None}
    assert override(settings, ["a=[7]"], lines)["a"] == [7]
    assert lines["a"] == "command line"
    assert "a.0" not in lines  # what stood in the file there is gone


IN_THE_HEADS = [
    (file, *change)
    for file in RECIPES
    for change in re.findall(r"([\w.]+)='(\{[^']*\})'", file.read_text().replace("\n#", " "))
]


@pytest.mark.parametrize(("file", "key", "value"), IN_THE_HEADS, ids=lambda part: getattr(part, "stem", None))
def test_what_the_head_of_a_recipe_changes_is_then_there_alone(
    file: Path, key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert len(IN_THE_HEADS) >= 3
    node = Recipe.load(file, [f"{key}={value}"]).settings
    for name in key.split("."):
        node = node[name]
    assert node == yaml.load(value, Loader)


def test_a_byte_order_mark_and_the_home_folder(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_recipe.parent))
    file = tiny_recipe.with_name("marked.yaml")
    file.write_bytes(b"\xef\xbb\xbfextends: ~/tiny.yaml\nseed: 7\n")
    assert Recipe.load(file).settings["seed"] == 7
    assert path("~/x") == tiny_recipe.with_name("x")
    for part in ("vision", "language"):
        monkeypatch.setenv("HOME", str(ROOT / "recipes" / "scenes"))
        change = [f"model.{part}.config=null", f"model.{part}.source=~/vision_tower"]
        recipe = Recipe.load(tiny_recipe, change)
        if part == "vision":
            assert recipe.build("model.vision").width
        else:  # the folder is there, and holds no language model
            with pytest.raises(UserError, match=r"no 'siglip_vision_model'|no decoder-only language model"):
                recipe.build("model.language")


class Broken:
    """Of another package, for the next test."""

    def __init__(self, *, error: str) -> None:
        raise {"value": ValueError, "import": ImportError}[error]("not\nso.")


@pytest.mark.parametrize("error", ["value", "import"])
def test_what_other_packages_refuse_is_one_sentence(tiny_recipe: Path, error: str) -> None:
    callback = f"callbacks={{mine: {{_target_: test_recipe.Broken, error: {error}}}}}"
    with pytest.raises(UserError, match=r"command line: test_recipe.Broken refuses .*'callbacks.mine'.*: not so\."):
        Recipe.load(tiny_recipe, [callback]).build_callbacks()


def test_a_fault_of_our_own_keeps_its_traceback(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, **arguments: object) -> None:
        raise ValueError("a fault")

    recipe = Recipe.load(tiny_recipe)
    monkeypatch.setattr("lavi.vision.hf.HFVision.__init__", broken)
    with pytest.raises(ValueError, match="a fault"):
        recipe.build("model.vision")


WRONG = {
    "unknown section": (
        "callback: {}\n",
        r"child.yaml:2: a recipe has no section 'callback': did you mean 'callbacks'\?",
    ),
    "unknown key": (
        "model:\n  fusion: {evry: 2}\n",
        r"child.yaml:3: 'model.fusion.evry' is unknown .* did you mean 'every'\?",
    ),
    "unknown key of the trainer": (
        "trainer:\n  max_step: 3\n",
        r"child.yaml:3: 'trainer.max_step' .* did you mean 'max_steps'\?",
    ),
    "wrong type": (
        "model:\n  fusion: {every: often}\n",
        r"child.yaml:3: 'model.fusion.every' must be int, not 'often'",
    ),
    "wrong item": (
        "module:\n  learning_rate: {fusion: fast}\n",
        r"child.yaml:3: 'module.learning_rate' must be dict\[str, float \| None\]",
    ),
    "wrong choice": (
        "model:\n  fusion: {parameters: all}\n",
        r"child.yaml:3: .* must be Literal\['both', 'scale', 'shift'\]",
    ),
    "wrong component": (
        "model:\n  fusion: {_target_: lavi.vision.hf.HFVision, source: x}\n",
        r"child.yaml:3: 'model.fusion' must be Fusion, not lavi.vision.hf.HFVision",
    ),
    "no such module": (
        "model:\n  fusion: {_target_: lavi.fusion.lavy.LaViFusion}\n",
        r"child.yaml:3: there is no module 'lavi.fusion.lavy': did you mean 'lavi.fusion.lavi.LaViFusion'\?",
    ),
    "no such class": (
        "model:\n  fusion: {_target_: lavi.fusion.lavi.LavyFusion}\n",
        r"child.yaml:3: module 'lavi.fusion.lavi' has no 'LavyFusion': did you mean 'LaViFusion'\?",
    ),
    "not YAML": ("model: {fusion: [}\n", r"child.yaml:2: not readable as YAML"),
    "no component": ("data: nothing\n", r"child.yaml:2: section 'data' must name a component by _target_"),
    "interpolation": ("seed: ${nothing}\n", r"nothing"),
    "missing argument": (
        "data:\n  _target_: datamodules.patches.TowerScenes\n",
        r"child.yaml:2: 'data' \(datamodules.patches.TowerScenes\) needs 'grid'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_its_place(tiny_recipe: Path, case: str) -> None:
    text, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        Recipe.load(child(tiny_recipe, text))


def test_files_that_are_not_there_and_loops(tiny_recipe: Path) -> None:
    with pytest.raises(UserError, match=r"there is no recipe .*tinny.yaml: did you mean '.*tiny.yaml'\?"):
        Recipe.load(tiny_recipe.with_name("tinny.yaml"))
    tiny_recipe.with_name("a.yaml").write_text("extends: b.yaml\n")
    tiny_recipe.with_name("b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match=r"'extends' goes round in a circle: .*a.yaml -> .*b.yaml -> .*a.yaml"):
        Recipe.load(tiny_recipe.with_name("a.yaml"))
    tiny_recipe.with_name("c.yaml").write_text("extends: gone.yaml\n")
    with pytest.raises(UserError, match=r"gone.yaml \(extended by .*c.yaml\)"):
        Recipe.load(tiny_recipe.with_name("c.yaml"))
    with pytest.raises(UserError, match="write key=value"):
        Recipe.load(tiny_recipe, ["trainer.max_steps"])


def test_a_recipe_from_a_checkpoint_builds_classes_of_known_packages_only(tiny_recipe: Path) -> None:
    settings = yaml.safe_load(tiny_recipe.read_text())
    for target, message in {
        "subprocess.Popen": "outside lavi",
        "torch.hub.load": "outside lavi",
        "lavi.errors.nearest": "is not a class",
    }.items():
        settings["model"] = {"_target_": target, "name": "x", "known": []}
        tiny_recipe.write_text(yaml.safe_dump(settings))
        with pytest.raises(UserError, match=message):
            Recipe.load(tiny_recipe, trusted=False)


def test_validation_data_that_would_never_be_used_are_said(tiny_recipe: Path) -> None:
    """A stream has no end of an epoch; an epoch of a number of batches has one."""
    unset = tiny_recipe.read_text().replace("val_check_interval: 6", "num_sanity_val_steps: 0")
    tiny_recipe.write_text(unset)
    for change in ([], ["trainer.val_check_interval=1.0"], ["trainer.val_check_interval=null"]):
        with pytest.raises(UserError, match=r"data\.validation would never be used.*trainer\.val_check_interval"):
            check_data(Recipe.load(tiny_recipe, change))
    for change in ("data.validation=null", "trainer.limit_train_batches=5", "trainer.limit_val_batches=0"):
        check_data(Recipe.load(tiny_recipe, [change]))
    Recipe.load(tiny_recipe).build("model")  # what does not train takes them as they are


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("lavi.module.VisionLanguageModule", "lavi.training.module.VisionLanguageModule"),
        ("lavi.fusion.visor.VisorFusion", "lavi.visor.fusion.VisorFusion"),
        ("lavi.vision.tiles.AnyRes", "lavi.data.tiling.AnyRes"),
        ("lavi.video.FrameSampling", "lavi.data.frame_sampling.FrameSampling"),
        ("lavi.vision.base.HFVision", "lavi.vision.hf.HFVision"),  # a module that is there, and has no such class
        ("datamodules.shards.Mixture", "datamodules.mixture.Mixture"),
    ],
)
def test_a_class_that_has_moved_is_named_where_it_is_now(tiny_recipe: Path, old: str, now: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"did you mean '{now}'?")):
        Recipe.load(tiny_recipe, [f"model.fusion._target_={old}"])


def test_components_stand_in_mappings_too() -> None:
    """Of a class of one's own."""
    pooling = {"_target_": "lavi.reduction.pooling.AveragePooling", "factor": 2}
    assert _fits({"a": pooling}, dict[str, Reducer])
    assert not _fits({"a": 3}, dict[str, Reducer])
    assert not _fits({1: pooling}, dict[str, Reducer])
