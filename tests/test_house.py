"""The rooms: who may import whom, what importing costs, and how long files and functions are."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lavi

ROOT = Path(__file__).parent.parent

PACKAGES = ("lavi", "datamodules", "callbacks")

LONGEST_FILE, LONGEST_FUNCTION, REPEATED = 450, 60, 10
"""Lines of a file, lines of a function, and lines of code that may not stand twice."""


def modules_in(root: Path) -> dict[str, Path]:
    """The modules of the packages, by their dotted names."""
    files = [file for package in PACKAGES for file in (root / package).rglob("*.py")]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported_by(file: Path, modules: Collection[str]) -> set[str]:
    """The modules that a file imports: also late, in a function, and for the type checker alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & set(modules)) or {node.module}
    return {name for name in found if name in modules}


def room_of(module: str) -> str:
    """``lavi.fusion`` of ``lavi.fusion.lavi``; a module on a top floor is a room of its own."""
    return ".".join(module.split(".")[:2])


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """The first circle, as ``[a, b, a]``; empty if there is none, and every import can point down."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def circles_in(root: Path) -> list[list[str]]:
    """Among modules, and among rooms: two rooms that import each other have no order, whatever their modules do."""
    modules = modules_in(root)
    graph = {name: imported_by(file, modules) - {name} for name, file in modules.items()}
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, others in graph.items():
        rooms[room_of(module)] |= {room_of(other) for other in others} - {room_of(module)}
    packages: dict[str, set[str]] = defaultdict(set)
    for room, others in rooms.items():
        packages[room.split(".")[0]] |= {other.split(".")[0] for other in others} - {room.split(".")[0]}
    return [circle for circle in (circle_in(graph), circle_in(rooms), circle_in(packages)) if circle]


def test_imports_point_down() -> None:
    """No module, no room and no package imports what imports it."""
    assert circles_in(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("lavi/nn/formulas.py", "from lavi.nn import cross_attention"),  # within a room
        ("lavi/reduction/base.py", "from lavi.fusion.layers import chosen_layers\n\nimport lavi.fusion.base"),
        ("lavi/vision/base.py", "def late():\n    from lavi.fusion.arrangement import splice"),  # a room above
        ("lavi/recipe.py", "from datamodules.image_text import ImageTextData"),  # a recipe names it instead
    ],
)
def test_a_planted_circle_is_found(tmp_path: Path, file: str, line: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.json", "__pycache__"))
    if file == "lavi/reduction/base.py":
        other = tmp_path / "lavi/fusion/layers.py"
        other.write_text(other.read_text() + "\nimport lavi.reduction.base\n")
    planted = tmp_path / file
    planted.write_text(f"{planted.read_text()}\n{line}\n")
    assert circles_in(tmp_path)


def test_lavi_never_names_the_rooms_that_recipes_name() -> None:
    modules = modules_in(ROOT)
    for name, file in modules.items():
        if name.split(".")[0] == "lavi":
            assert not {other for other in imported_by(file, modules) if not other.startswith("lavi")}, name


def test_a_batch_knows_nothing_of_lavi() -> None:
    """It is what every room hands on: whatever it imported, all of them would."""
    assert not imported_by(ROOT / "lavi" / "batch.py", modules_in(ROOT))


def sources_in(root: Path) -> dict[str, str]:
    """The text of each file that the limits are for, by its path."""
    files = sorted(file for package in (*PACKAGES, "benchmarks") for file in (root / package).rglob("*.py"))
    return {file.relative_to(root).as_posix(): file.read_text() for file in files}


def long_functions(source: str) -> list[str]:
    """Functions above the limit, counted from their first decorator to their last line."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    counts = []
    for function in functions:
        first = min(node.lineno for node in (*function.decorator_list, function))
        counts.append((function.name, (function.end_lineno or first) - first + 1))
    return [f"{name}: {count} lines" for name, count in counts if count > LONGEST_FUNCTION]


def code_lines(source: str) -> list[tuple[int, str]]:
    """The lines of code with their numbers: no imports, docstrings, comments and blank lines."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [(number, line.strip()) for number, line in enumerate(source.splitlines(), start=1)]
    return [(number, line) for number, line in lines if line and number not in skipped and not line.startswith("#")]


def repeated_blocks(sources: Mapping[str, str]) -> list[str]:
    """Where a block of code begins that stands elsewhere, too, as ``file:line = file:line``."""
    first: dict[tuple[str, ...], str] = {}
    twins = []
    for name, source in sources.items():
        lines = code_lines(source)
        for start in range(len(lines) - REPEATED + 1):
            block = tuple(line for _, line in lines[start : start + REPEATED])
            at = f"{name}:{lines[start][0]}"
            if first.setdefault(block, at) != at:
                twins.append(f"{first[block]} = {at}")
    return twins


def test_files_and_functions_are_short() -> None:
    sources = sources_in(ROOT)
    assert {name: count for name, text in sources.items() if (count := text.count("\n")) > LONGEST_FILE} == {}
    assert {name: long for name, text in sources.items() if (long := long_functions(text))} == {}


def test_no_block_of_code_stands_twice() -> None:
    assert repeated_blocks(sources_in(ROOT)) == []


def test_a_long_function_and_a_repeated_block_are_found() -> None:
    body = "\n".join(f"    step({number})\n    # a comment\n" for number in range(REPEATED))
    planted = {"a.py": f'def first():\n    """Steps."""\n{body}', "b.py": f"import os\n\n\ndef second():\n{body}"}
    assert repeated_blocks(planted) == ["a.py:3 = b.py:5"]
    steps = "    step()\n" * (LONGEST_FUNCTION - 1)
    assert long_functions(f"def third():\n{steps}") == []
    assert long_functions(f"@cached\ndef third():\n{steps}") == ["third: 61 lines"]


def test_importing_lavi_is_light() -> None:
    code = (
        "import sys, lavi, lavi.fit, lavi.evaluate, lavi.generate, lavi.profile, lavi.export\n"
        "assert {'load', 'VisionLanguageModel', 'Recipe', 'Sample'} <= set(dir(lavi)) == set(lavi.__all__)\n"
        "heavy = {'tensorboard', 'datamodules', 'callbacks', 'lightning', 'transformers', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_lavi_offers_is_there() -> None:
    assert all(getattr(lavi, name) is not None for name in lavi.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        lavi.laod  # noqa: B018


def test_using_lavi_needs_no_tensorboard_and_no_room_above() -> None:
    code = (
        "import sys, lavi.model, lavi.training.module, lavi.recipe\n"
        "import lavi.checkpoints.run_folder, lavi.efficiency.measure\n"
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
