"""The rooms: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
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
