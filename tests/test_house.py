"""The rooms: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room may import the rooms before it, and itself.
ORDER = [
    {"errors", "output", "arguments", "batch", "images", "video", "nn", "configurations"},
    {"vision", "language", "chat"},
    {"processor", "reduction"},
    {"fusion"},
    {"recipe_text", "recipe", "report", "weights"},
    {"model", "pretrained"},
    {"metrics", "optim", "module"},
    {"checkpoint", "startup", "targets"},
    {"efficiency"},
    {"evaluation", "routing"},
    {"fit", "evaluate", "generate", "profile", "export", "visor"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def rooms_imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "lavi" else {node.module}
    return names


@pytest.mark.parametrize("file", sorted((ROOT / "lavi").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    room = file.relative_to(ROOT / "lavi").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for name in rooms_imported(file):
        package, _, rest = name.partition(".")
        assert package not in {"datamodules", "callbacks"}, f"{file} imports {name}: a recipe names it instead"
        if package == "lavi" and rest:
            other = rest.split(".")[0]
            assert LEVEL[other] <= LEVEL[room], f"{file} imports {name} from a room above it"


MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (ROOT / "lavi").rglob("*.py")
}
# A published VLM is a way to build the model, and building it takes the model: looked up when it is called.
KNOWN_CIRCLES = {("lavi.model", "lavi.pretrained")}


def modules_imported(file: Path) -> Iterator[str]:
    """Modules of lavi, also those that a function imports when it is called."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & MODULES.keys() or {node.module}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also not within a room, nor among rooms of one level, nor late, inside a function."""
    modules = {name: set(modules_imported(file)) - {name, "lavi"} for name, file in MODULES.items()}
    for module, other in KNOWN_CIRCLES:
        assert circle_in(modules), f"{module} and {other} are no circle any more: take them out of KNOWN_CIRCLES"
        modules[module].discard(other)
    rooms = defaultdict(set)
    for module, others in modules.items():
        room = module.split(".")[:2][-1]
        rooms[room] |= {other.split(".")[1] for other in others} - {room}
    assert not circle_in(modules)
    assert not circle_in(rooms)


def test_a_batch_knows_nothing_of_lavi() -> None:
    """It is what every room hands on: whatever it imported, all of them would."""
    assert not {name for name in rooms_imported(ROOT / "lavi" / "batch.py") if name.split(".")[0] == "lavi"}


def test_importing_lavi_is_light() -> None:
    code = (
        "import sys, lavi, lavi.fit, lavi.evaluate, lavi.generate, lavi.profile\n"
        "heavy = {'tensorboard', 'datamodules', 'callbacks', 'lightning', 'transformers', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_using_lavi_needs_no_tensorboard_and_no_room_above() -> None:
    code = (
        "import sys, lavi.model, lavi.module, lavi.recipe, lavi.checkpoint, lavi.efficiency.measure\n"
        "heavy = {'tensorboard', 'datamodules', 'callbacks', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_project_speaks_of_itself_alone() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if (
            Path(name).suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".jsonl"}
            and name != "tests/test_house.py"
        ):
            text = (ROOT / name).read_text(errors="ignore")
            for word in ("/work/", "/root/", "/opt/"):
                assert word not in text, f"{name} names a path of somebody's machine: {word}"
