"""Recipes: YAML -> merge -> check -> build.

    extends: other.yaml            one parent; the child holds only the lines that differ
    seed: 0
    name: my-run                   the run folder is runs/my-run (numbered when it exists)
    model: {_target_: lavi.model.VisionLanguageModel, fusion: {_target_: ..., every: 4}, ...}
    module: {_target_: lavi.module.VisionLanguageModule, ...}
    data: {_target_: datamodules.image_text.ImageTextData, ...}
    trainer: {max_steps: 300}      arguments of lightning.pytorch.Trainer
    callbacks: {samples: {_target_: ...}, efficiency: null}

A component is named by ``_target_`` (a dotted path) with its keyword arguments. Everything is checked against the
signatures before anything is built. A child that names another ``_target_`` replaces the parent's component whole.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavi.errors import UserError, nearest

TARGET = "_target_"
SECTIONS = ("seed", "name", "model", "module", "data", "trainer", "callbacks")
TRAINER = "lightning.pytorch.Trainer"
PROVIDED = {
    "module": ("model",),
    "data": ("processor",),
    "trainer": ("callbacks", "logger", "default_root_dir", "enable_checkpointing"),
}
"""What the fronts hand to a section's component themselves."""

TRUSTED = ("lavi.", "datamodules.", "callbacks.", "torch.optim.", "lightning.pytorch.", "torchmetrics.")
"""From a recipe inside a checkpoint only classes of these packages are built."""


@dataclass
class Recipe:
    """A merged, resolved recipe, and the place in a file that each of its keys came from."""

    settings: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    source: str = "recipe"
    trusted: bool = True
    """False for a recipe that came with a checkpoint."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), *, trusted: bool = True) -> Recipe:
        """Read a recipe with its parents, apply ``key=value`` overrides, check it.

        Raises:
            UserError: naming the file and line, the key, and the nearest right thing.
        """
        places: dict[str, str] = {}
        merged = _read(Path(path), places, chain=[])
        for override in overrides:
            merged = _merge(merged, _parse_override(override, places))
        try:
            settings = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
        except OmegaConfBaseException as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
        assert isinstance(settings, dict)
        recipe = cls(typing.cast(dict[str, Any], settings), places, str(path), trusted)
        recipe.check()
        return recipe

    def check(self) -> None:
        """Check sections, targets, keys and types. Builds nothing."""
        for key in self.settings:
            if key not in SECTIONS:
                raise UserError(f"{self._where(key)}: a recipe has no section '{key}': {nearest(key, SECTIONS)}")
        for key in ("model", "module", "data"):
            if not isinstance(self.settings.get(key), dict) or TARGET not in self.settings[key]:
                raise UserError(f"{self._where(key)}: section '{key}' must name a component by {TARGET}.")
        for key in ("model", "module", "data", "callbacks"):
            self._check_node(self.settings.get(key), key)
        trainer = self.settings.setdefault("trainer", {})
        self._check_component({TARGET: TRAINER, **trainer}, "trainer")

    def build(self, section: str, **provided: Any) -> Any:
        """Build one section, or a component in it (``model.language``).

        Args:
            provided: the arguments that do not stand in a file.
        """
        node = self.settings
        for name in section.split("."):
            node = node[name]
        if section == "trainer":
            node = {TARGET: TRAINER, **node}
        return self._build(node, section, provided)

    def build_callbacks(self) -> list[Any]:
        """The callbacks that are not null, in order."""
        named = self.settings.get("callbacks") or {}
        return [self._build(node, f"callbacks.{name}", {}) for name, node in named.items() if node is not None]

    def yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True, width=110)

    def replaced(self, key: str, node: Any) -> Recipe:
        """The same recipe with something else at ``key`` (``model.fusion``, ``model.fusion.every``).

        Raises:
            UserError: there is no place for it.
        """
        settings: dict[str, Any] = yaml.safe_load(self.yaml())
        *parents, last = key.split(".")
        inner: Any = settings
        for name in parents:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise UserError(f"{self.source} has no '{'.'.join(parents)}' that '{key}' could be set in.")
        inner[last] = node
        recipe = Recipe(settings, self.places, self.source, self.trusted)
        top = key.split(".")[0]
        recipe._check_node(settings[top], top)
        return recipe

    def takes(self, key: str, argument: str) -> bool:
        """Whether the component at ``key`` has an argument of that name."""
        node: Any = self.settings
        for name in key.split("."):
            node = node[name]
        return argument in _signature(self._find(node[TARGET], key))[0]

    # --- checking ---

    def _where(self, key: str) -> str:
        """The file and line of a key, or of the nearest key above it."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, self.source)

    def _check_node(self, node: Any, key: str) -> None:
        if isinstance(node, dict):
            if TARGET in node:
                self._check_component(node, key)
                return
            for name, child in node.items():
                self._check_node(child, f"{key}.{name}")
        elif isinstance(node, list):
            for index, child in enumerate(node):
                self._check_node(child, f"{key}.{index}")

    def _check_component(self, node: dict[str, Any], key: str) -> None:
        target = self._find(node[TARGET], key)
        parameters, hints = _signature(target)
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        given = {name: value for name, value in node.items() if name != TARGET}
        for name, value in given.items():
            if name not in parameters and not takes_any:
                where, near = self._where(f"{key}.{name}"), nearest(name, parameters)
                raise UserError(f"{where}: '{key}.{name}' is unknown to {node[TARGET]}: {near}")
            if name in PROVIDED.get(key, ()):
                raise UserError(
                    f"{self._where(f'{key}.{name}')}: '{key}.{name}' is set by the program, not by a recipe."
                )
            self._check_node(value, f"{key}.{name}")
            self._check_type(value, hints.get(name, Any), f"{key}.{name}")
        for name, parameter in parameters.items():
            needed = parameter.default is inspect.Parameter.empty and parameter.kind not in (
                inspect.Parameter.VAR_KEYWORD,
                inspect.Parameter.VAR_POSITIONAL,
            )
            if needed and name not in given and name not in PROVIDED.get(key, ()):
                raise UserError(f"{self._where(key)}: '{key}' ({node[TARGET]}) needs '{name}'.")

    def _check_type(self, value: Any, hint: Any, key: str) -> None:
        component = isinstance(value, dict) and TARGET in value
        kind = self._find(value[TARGET], key) if component else None
        if not _fits(value, hint, kind):
            wanted = (
                getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")
            )
            shown = value[TARGET] if component else repr(value)
            raise UserError(f"{self._where(key)}: '{key}' must be {wanted}, not {shown}.")

    def _find(self, path: Any, key: str) -> Callable[..., Any]:
        """What a dotted path names.

        Raises:
            UserError: nothing of that name, or not allowed from a checkpoint.
        """
        where = self._where(f"{key}.{TARGET}")
        if not isinstance(path, str) or "." not in path:
            raise UserError(f"{where}: '{key}.{TARGET}' must be a dotted path to a class, not {path!r}.")
        if not self.trusted and not path.startswith(TRUSTED):
            raise UserError(
                f"{where}: the checkpoint's recipe wants to build '{path}', which is outside "
                f"{', '.join(p.rstrip('.') for p in TRUSTED)}: pass --trust if you know where it comes from."
            )
        module_name, _, name = path.rpartition(".")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise  # the module is there, what it imports is not
            raise UserError(f"{where}: there is no module '{module_name}': {_near_module(module_name)}") from None
        found = getattr(module, name, None)
        if found is None:
            classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module_name]
            raise UserError(f"{where}: module '{module_name}' has no '{name}': {nearest(name, classes)}")
        if not self.trusted and not inspect.isclass(found):
            raise UserError(f"{where}: '{path}' is not a class, and a checkpoint's recipe may build classes only.")
        return typing.cast(Callable[..., Any], found)

    # --- building ---

    def _build(self, node: Any, key: str, provided: Mapping[str, Any]) -> Any:
        if isinstance(node, list):
            return [self._build(child, f"{key}.{i}", {}) for i, child in enumerate(node)]
        if not isinstance(node, dict):
            return node
        arguments = {k: self._build(v, f"{key}.{k}", {}) for k, v in node.items() if k != TARGET}
        if TARGET not in node:
            return arguments
        try:
            return self._find(node[TARGET], key)(**arguments, **provided)
        except UserError as error:
            raise UserError(f"{self._where(key)}: {key}: {error}") if "yaml:" not in str(error) else error from None


def _read(path: Path, places: dict[str, str], chain: list[Path]) -> dict[str, Any]:
    """One file merged over its parents; ``places`` takes the file and line of each key, children last."""
    if not path.is_file():
        known = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        named_by = f" (extended by {chain[-1]})" if chain else ""
        raise UserError(f"there is no recipe {path}{named_by}: {nearest(str(path), known)}")
    if path.resolve() in [p.resolve() for p in chain]:
        raise UserError(f"'extends' goes round in a circle: {' -> '.join(str(p) for p in [*chain, path])}.")
    text = path.read_text()
    try:
        tree = yaml.compose(text)
        settings = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not readable as YAML ({getattr(error, 'problem', error)}).") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections ({', '.join(SECTIONS)}).")
    parent = settings.pop("extends", None)
    inherited = _read(path.parent / str(parent), places, [*chain, path]) if parent is not None else {}
    _note_places(tree, "", path, places)
    return _merge(inherited, typing.cast(dict[str, Any], settings))


def _note_places(node: Any, prefix: str, path: Path, places: dict[str, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            places[name] = f"{path}:{key.start_mark.line + 1}"
            _note_places(value, f"{name}.", path, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            places[f"{prefix}{index}"] = f"{path}:{value.start_mark.line + 1}"
            _note_places(value, f"{prefix}{index}.", path, places)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """``child`` over ``parent``; a node that names another target replaces the parent's whole."""
    if TARGET in child and TARGET in parent and child[TARGET] != parent[TARGET]:
        return child
    merged = dict(parent)
    for key, value in child.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _parse_override(override: str, places: dict[str, str]) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override}' is no override: write key=value, such as trainer.max_steps=100.")
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))
    except (yaml.YAMLError, OmegaConfBaseException):
        raise UserError(f"the value of '{override}' is not readable as YAML.") from None
    node: Any = typing.cast(dict[str, Any], parsed)["value"]
    places[key] = "command line"
    for name in reversed(key.split(".")):
        node = {name: node}
    return typing.cast(dict[str, Any], node)


def _signature(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Parameters (without self) and type hints; keyword catch-alls are followed to the class behind them."""
    function = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    function = inspect.unwrap(function)
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # hints that exist for type checkers only
        hints = {}
    return parameters, hints


def _fits(value: Any, hint: Any, component: Any = None) -> bool:
    """Whether a YAML value (or the component it names) may stand where ``hint`` is asked for."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option, component) for option in arguments)
    if component is not None:
        return not (inspect.isclass(hint) and inspect.isclass(component)) or issubclass(component, hint)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if hint is type(None) or hint is None:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, str)
    if origin in (list, Sequence, Iterable):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value if not _is_component(item))
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if inspect.isclass(hint) and issubclass(hint, list | dict):
        return isinstance(value, hint)
    # Any other class wants a component; what is no class (Any, a protocol, a type variable) takes what comes.
    return (
        not inspect.isclass(hint) or hint is object or getattr(hint, "_is_protocol", False) or isinstance(value, hint)
    )


def _is_component(value: Any) -> bool:
    return isinstance(value, dict) and TARGET in value


def _near_module(name: str) -> str:
    """The module under the same package whose name is closest."""
    package, _, last = name.rpartition(".")
    try:
        folder = importlib.import_module(package).__path__ if package else []
    except (ImportError, AttributeError):
        return f"is '{package or name}' installed?"
    names = [p.stem for place in folder for p in Path(place).glob("*.py") if p.stem != "__init__"]
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.3)
    return f"did you mean '{package}.{close[0]}'?" if close else f"known: {', '.join(sorted(names))}."
