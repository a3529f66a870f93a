"""The class that a recipe's ``_target_`` names, or one sentence that says what it may have meant."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lavi.config.text import TARGET
from lavi.errors import UserError, nearest

OURS = ("lavi.", "datamodules.", "callbacks.")
"""What their classes raise besides a UserError is a fault of theirs; of others, a refusal of their arguments."""

TRUSTED = (*OURS, "torch.optim.", "lightning.pytorch.", "torchmetrics.")
"""From a recipe inside a checkpoint only classes of these packages are built, and what :data:`BUILDERS` build."""

BUILDERS = ("lavi.checkpoints.published_vlm.published_vlm",)
"""Functions that such a recipe may name, too: of a path or a hub name they make what classes make."""

_beside: set[Path] = set()
"""Folders of recipes that stand at the end of Python's path, each for a module that a recipe in it names."""


def find_target(path: Any, key: str, *, where: str, trusted: bool, folder: Path | None = None) -> Callable[..., Any]:
    """The class or function that a dotted path names.

    Args:
        key: the component in its recipe.
        where: file and line of the path.
        trusted: False for a recipe that came with a checkpoint: it may name classes of :data:`TRUSTED` packages alone,
            and :data:`BUILDERS`.
        folder: of the recipe; what a trusted one names may lie beside it.

    Raises:
        UserError: nothing of that name, nothing that can be built, or not allowed.
    """
    if not isinstance(path, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", path):
        raise UserError(f"{where}: '{key}.{TARGET}' must be a dotted path to a class, not {path!r}.")
    if not trusted and not path.startswith(TRUSTED):
        raise UserError(
            f"{where}: the checkpoint's recipe wants to build '{path}', which is outside "
            f"{', '.join(p.rstrip('.') for p in TRUSTED)}: pass --trust if you know where it comes from."
        )
    target = _imported(path, where, folder if trusted else None)
    if not trusted and not inspect.isclass(target) and path not in BUILDERS:
        raise UserError(f"{where}: '{path}' is not a class, and a checkpoint's recipe may build classes only.")
    if not callable(target) or inspect.isabstract(target):
        what = "is only a contract: name a class that meets it" if callable(target) else "is no class"
        raise UserError(f"{where}: '{path}' cannot be built, it {what}.")
    return typing.cast(Callable[..., Any], target)


def path_of(kind: type) -> str:
    """The dotted path of a class, as ``_target_`` names it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def folders_beside() -> list[Path]:
    """Folders of recipes that modules were found in, and nowhere else: another command needs them in ``PYTHONPATH``."""
    return sorted(_beside)


def _imported(path: str, where: str, folder: Path | None) -> Any:
    """What stands at a dotted path; of a module that is nowhere else, beside the recipe in ``folder``."""
    module_name, _, name = path.rpartition(".")
    if folder is not None:
        _look_beside(path.partition(".")[0], folder.resolve(), where)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(
                f"{where}: '{path}' needs the module '{error.name}', which is not there: install what brings it."
            ) from error
        hint = _class_elsewhere(name) or _nearest_module(module_name, folder)
        raise UserError(f"{where}: there is no module '{module_name}': {hint}") from None
    target = getattr(module, name, None)
    if target is None:
        classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module_name]
        hint = _class_elsewhere(name) or nearest(name, classes)
        raise UserError(f"{where}: module '{module_name}' has no '{name}': {hint}")
    return target


def _look_beside(package: str, folder: Path, where: str) -> None:
    """Put the folder of a recipe behind all else on Python's path, if only there the package is found.

    On the path, since processes that read data are told of that and of nothing else.

    Raises:
        UserError: another recipe has another package of that name beside it.
    """
    file = folder / f"{package}.py"
    if not file.is_file() and not (folder / package / "__init__.py").is_file():
        return
    known = _folder_of(package)
    if known is None:
        _beside.add(folder)
        sys.path.append(str(folder))
        importlib.invalidate_caches()
        return
    other = known / file.name
    is_a_copy = file.is_file() and other.is_file() and file.read_bytes() == other.read_bytes()
    if known in _beside - {folder} and not is_a_copy:
        raise UserError(
            f"{where}: '{package}' lies beside this recipe, and another '{package}' beside that in {known}: a command "
            "can have one of them; rename one, or give each recipe a command of its own."
        )


def _folder_of(package: str) -> Path | None:
    """The folder that a package is found in; an empty path: it is in no folder. None: it is not found."""
    try:
        spec = find_spec(package)
    except ValueError:  # of a module that was made in memory
        return Path()
    if spec is None or spec.origin is None:  # a folder of that name without modules: Python takes a module before it
        return None
    if not spec.origin or not spec.has_location:
        return Path()
    return Path(spec.origin).resolve().parents[1 if spec.submodule_search_locations else 0]


def _class_elsewhere(name: str) -> str | None:
    """``did you mean 'lavi.model.NAME'?`` for the class of this name in our packages, whose files are only read."""
    for package in (prefix.rstrip(".") for prefix in OURS):
        for folder in _folders_of(package):
            for file in sorted(folder.rglob("*.py")):
                if re.search(rf"^class {re.escape(name)}\b", file.read_text(encoding="utf-8"), re.MULTILINE):
                    module = ".".join((package, *file.relative_to(folder).with_suffix("").parts))
                    return f"did you mean '{module}.{name}'?"
    return None


def _nearest_module(name: str, folder: Path | None) -> str:
    """The module of the same package whose name is closest, or where one of one's own may lie."""
    package, _, last = name.rpartition(".")
    folders = _folders_of(package) if package else []
    if not folders:
        hint = f"is '{package or name}' installed?"
        if folder is None:
            return hint
        file = folder / f"{name.partition('.')[0]}.py"
        return f"{hint} A module of one's own lies beside the recipe ({file}), or in a folder of PYTHONPATH."
    names = [file.stem for folder in folders for file in folder.glob("*.py") if file.stem != "__init__"]
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.3)
    return f"did you mean '{package}.{close[0]}'?" if close else f"known: {', '.join(sorted(names))}."


def _folders_of(package: str) -> list[Path]:
    """Where a package's modules lie; empty: there is no such package."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # the package above it is not there, or this is no module of a file
        spec = None
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
