"""Recipes: YAML -> merge -> check -> build.

    extends: other.yaml            one parent; the child holds only the lines that differ
    seed: 0
    name: my-run                   the run folder is runs/my-run (numbered when it exists)
    model: {_target_: lavi.model.VisionLanguageModel, fusion: {_target_: ..., every: 4}, ...}
    module: {_target_: lavi.training.module.VisionLanguageModule, ...}
    data: {_target_: datamodules.image_text.ImageTextData, ...}
    trainer: {max_steps: 300}      arguments of lightning.pytorch.Trainer
    callbacks: {samples: {_target_: ...}, efficiency: null}

A component is named by ``_target_`` (a dotted path) with its keyword arguments. Everything is checked against the
signatures before anything is built. A child is merged over its parent; where it names another ``_target_`` it replaces
the parent's component whole. A ``key=value`` of a command line replaces what stood there.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavi.config.targets import OURS, find_target, path_of
from lavi.config.text import TARGET, Dumper, is_component, override, read
from lavi.config.types import Check, Count, PositiveOrZero, Range
from lavi.errors import UserError, nearest, one_line

SECTIONS = ("seed", "name", "model", "module", "data", "trainer", "callbacks")
TRAINER = "lightning.pytorch.Trainer"
PROVIDED = {
    "model": ("built_from",),
    "module": ("model",),
    "data": ("processor",),
    "trainer": ("callbacks", "logger", "default_root_dir", "enable_checkpointing"),
}
"""What the fronts hand to a section's component themselves."""

TRAINER_LIMITS = {
    "max_steps": Annotated[int, Range(1, besides=-1)],
    "max_epochs": Annotated[int, Range(1, besides=-1)],
    "limit_train_batches": Annotated[float, Range(0, above=True)],
    "val_check_interval": Annotated[float, Range(0, above=True)],
    "check_val_every_n_epoch": Count,
    "accumulate_grad_batches": Count,
    "gradient_clip_val": PositiveOrZero,
    "log_every_n_steps": Annotated[int, Range(0)],
    "num_sanity_val_steps": Annotated[int, Range(0, besides=-1)],
}
"""What Lightning takes without a word, and trains nothing with, or stops at in the middle of the work."""

OF_AN_EPOCH = (
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "overfit_batches",
    "val_check_interval",
)
"""What of the trainer is a number of batches, or a share of them all."""


@dataclass
class Recipe:
    """A merged, resolved recipe, and the file and line of each of its keys."""

    settings: dict[str, Any]
    source_lines: dict[str, str] = field(default_factory=dict)
    source: str = "recipe"
    trusted: bool = True
    """False for a recipe that came with a checkpoint."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), *, trusted: bool = True) -> Recipe:
        """Read a recipe with its parents, apply ``key=value`` overrides, check it.

        Raises:
            UserError: naming the file and line, the key, and the nearest right thing.
        """
        source_lines: dict[str, str] = {}
        merged = override(read(Path(path), source_lines), overrides, source_lines)
        try:
            settings = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
        except OmegaConfBaseException as error:
            raise UserError(f"{path}: {one_line(error)}") from None
        assert isinstance(settings, dict)
        recipe = cls(typing.cast(dict[str, Any], settings), source_lines, str(path), trusted)
        recipe.check()
        return recipe

    def check(self) -> None:
        """Check sections, targets, keys, types and ranges. Builds nothing."""
        for key in self.settings:
            if key not in SECTIONS:
                raise UserError(f"{self._where(str(key))}: a recipe has no section '{key}': {nearest(key, SECTIONS)}")
        self._check_value(self.settings.get("seed", 0), Annotated[int, Range(0, 2**32 - 1)], "seed")
        self._check_value(self.settings.get("name", "name"), Annotated[str, Check(_check_name)], "name")
        for key in ("model", "module", "data"):
            if not is_component(self.settings.get(key)):
                raise UserError(f"{self._where(key)}: section '{key}' must name a component by {TARGET}.")
            self._check_node(self.settings[key], key)
        self._check_callbacks()
        self._check_trainer()

    def _check_callbacks(self) -> None:
        callbacks = self.settings.get("callbacks")
        if callbacks is not None and not isinstance(callbacks, dict):
            raise UserError(f"{self._where('callbacks')}: 'callbacks' is a mapping of names to components or null.")
        for name, node in (callbacks or {}).items():
            key = f"callbacks.{name}"
            if node is not None and not is_component(node):
                raise UserError(f"{self._where(key)}: '{key}' must name a component by {TARGET}, or be null.")
            self._check_node(node, key)

    def _check_trainer(self) -> None:
        trainer = self.settings.setdefault("trainer", {})
        if not isinstance(trainer, dict):
            raise UserError(f"{self._where('trainer')}: 'trainer' is a mapping of arguments of {TRAINER}.")
        self._check_component({TARGET: TRAINER, **trainer}, "trainer")
        for name, value in trainer.items():
            self._check_range(value, TRAINER_LIMITS.get(name, Any), f"trainer.{name}")
            if name in OF_AN_EPOCH and isinstance(value, float) and value not in (0, 1) and self._data_are_unsized():
                raise UserError(
                    f"{self._where(f'trainer.{name}')}: trainer.{name}={value} is a share of an epoch, and these data "
                    "are a stream that is not counted beforehand: give a whole number of batches."
                )

    def check_validation(self) -> None:
        """Refuse validation data that training would never come to.

        Raises:
            UserError: there are some, and the trainer names no time for them.
        """
        if self._never_validates(self.settings["trainer"]):
            raise UserError(
                f"{self._where('data.validation')}: data.validation would never be used, since a stream has no end to "
                "validate at: set trainer.val_check_interval to a number of batches, or data.validation=null."
            )

    def _never_validates(self, trainer: Mapping[str, Any]) -> bool:
        """Whether there are data to validate on and, by the trainer's own rule (behind an epoch), no time for it."""
        interval = trainer.get("val_check_interval")  # 1.0, the default, is the end of an epoch
        ends = isinstance(interval, int | str | dict) or isinstance(trainer.get("limit_train_batches"), int)
        validates = self.settings["data"].get("validation") is not None and trainer.get("limit_val_batches", 1)
        return bool(validates) and not ends and self._data_are_unsized()

    def _data_are_unsized(self) -> bool:
        return bool(getattr(self._find(self.settings["data"][TARGET], "data"), "unsized", False))

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
        return yaml.dump(self.settings, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)

    def replaced(self, key: str, node: Any) -> Recipe:
        """The same recipe with something else at ``key`` (``model.fusion``, ``model.fusion.every``).

        Raises:
            UserError: there is nothing that it could be set in.
        """
        settings = copy.deepcopy(self.settings)
        *parents, last = key.split(".")
        inner: Any = settings
        for name in parents:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise UserError(f"{self.source} has no '{'.'.join(parents)}' that '{key}' could be set in.")
        inner[last] = node
        recipe = Recipe(settings, self.source_lines, self.source, self.trusted)
        top = key.split(".")[0]
        recipe._check_node(settings[top], top)
        return recipe

    def takes(self, key: str, argument: str) -> bool:
        """Whether the component at ``key`` has an argument of that name."""
        node: Any = self.settings
        for name in key.split("."):
            node = node[name]
        return argument in _signature(self._find(node[TARGET], key)).named

    def component(self, section: str) -> Callable[..., Any]:
        """The class, or the function, that a section names."""
        return self._find(self.settings[section][TARGET], section)

    def require(self, section: str, base: type, advice: str) -> None:
        """Refuse a section that names a class of another kind than ``base``; builds nothing.

        Raises:
            UserError: with ``advice``.
        """
        component = self.component(section)
        if inspect.isclass(component) and not issubclass(component, base):
            where, name = self._where(f"{section}.{TARGET}"), self.settings[section][TARGET]
            raise UserError(f"{where}: '{section}' ({name}) is no {path_of(base)}: {advice}.")

    # --- checking ---

    def _where(self, key: str) -> str:
        """The file and line of a key, or of the nearest key above it."""
        while key and key not in self.source_lines:
            key = key.rpartition(".")[0]
        return self.source_lines.get(key, self.source)

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
        signature = _signature(self._find(node[TARGET], key))
        arguments = {name: value for name, value in node.items() if name != TARGET}
        for name, value in arguments.items():
            if name not in signature.named and not signature.takes_any:
                where, near = self._where(f"{key}.{name}"), nearest(name, signature.named)
                raise UserError(f"{where}: '{key}.{name}' is unknown to {node[TARGET]}: {near}")
            if name in PROVIDED.get(key, ()):
                raise UserError(
                    f"{self._where(f'{key}.{name}')}: '{key}.{name}' is set by the program, not by a recipe."
                )
            self._check_node(value, f"{key}.{name}")
            self._check_value(value, signature.hints.get(name, Any), f"{key}.{name}")
        for name in signature.needed:
            if name not in arguments and name not in PROVIDED.get(key, ()):
                raise UserError(f"{self._where(key)}: '{key}' ({node[TARGET]}) needs '{name}'.")

    def _check_value(self, value: Any, hint: Any, key: str) -> None:
        """The type of a value, and then what ``Annotated`` says of it."""
        component = is_component(value)
        kind = self._find(value[TARGET], key) if component else None
        if not _fits(value, hint, kind):
            shown = value[TARGET] if component else repr(value)
            quote = ": in quotes it is a text" if _fits("", hint) and isinstance(value, int | float) else ""
            raise UserError(f"{self._where(key)}: '{key}' must be {_named(hint)}, not {shown}{quote}.")
        self._check_range(value, hint, key)

    def _check_range(self, value: Any, hint: Any, key: str) -> None:
        """What ``Annotated`` says of a value whose type is right."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            for limit in arguments[1:]:
                if isinstance(limit, Range) and isinstance(value, int | float) and value not in limit:
                    kind = "a whole number" if arguments[0] is int else "a number"
                    raise UserError(f"{self._where(key)}: '{key}' must be {kind} {limit}, not {value}.")
                if isinstance(limit, Check):
                    self._run_check(limit, value, key)
        elif origin in (typing.Union, types.UnionType):
            for option in arguments:
                if _fits(value, option):
                    self._check_range(value, option, key)
        elif isinstance(value, dict) and not is_component(value) and len(arguments) == 2:
            for name, item in value.items():
                self._check_range(item, arguments[1], f"{key}.{name}")
        elif isinstance(value, list) and len(arguments) == 1:
            for index, item in enumerate(value):
                self._check_range(item, arguments[0], f"{key}.{index}")

    def _run_check(self, check: Check, value: Any, key: str) -> None:
        try:
            check.function(value)
        except UserError as error:
            raise UserError(f"{self._where(key)}: {key}: {error}") from None

    def _find(self, path: Any, key: str) -> Callable[..., Any]:
        """The class that a dotted path names.

        Raises:
            UserError: as :func:`lavi.config.targets.find_target`.
        """
        where = self._where(f"{key}.{TARGET}")
        line_of_file = re.fullmatch(r"(.+):\d+", where)
        file = Path(line_of_file[1] if line_of_file else self.source)
        folder = file.parent if file.is_file() else None
        return find_target(path, key, where=where, trusted=self.trusted, folder=folder)

    # --- building ---

    def _build(self, node: Any, key: str, provided: Mapping[str, Any]) -> Any:
        if isinstance(node, list):
            return [self._build(child, f"{key}.{i}", {}) for i, child in enumerate(node)]
        if not isinstance(node, dict):
            return node
        arguments = {k: self._build(v, f"{key}.{k}", {}) for k, v in node.items() if k != TARGET}
        if TARGET not in node:
            return arguments
        target = self._find(node[TARGET], key)
        try:
            return target(**arguments, **provided)
        except UserError as error:
            raise UserError(f"{self._where(key)}: {key}: {error}") from None
        except Exception as error:
            if node[TARGET].startswith(OURS):
                raise
            raise UserError(
                f"{self._where(key)}: {node[TARGET]} refuses what '{key}' gives it: {one_line(error)}."
            ) from error


@dataclass(frozen=True)
class Signature:
    """What a component takes: arguments by name, those without a default, and the types of all."""

    named: dict[str, inspect.Parameter]
    needed: list[str]
    takes_any: bool
    hints: dict[str, Any]
    """As they are written, with what ``Annotated`` says."""


def _signature(target: Callable[..., Any]) -> Signature:
    function = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    function = inspect.unwrap(function)
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    catch_alls = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind not in catch_alls}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    needed = [name for name, parameter in named.items() if parameter.default is inspect.Parameter.empty]
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # hints that exist for type checkers only
        hints = {}
    return Signature(named, needed, takes_any, hints)


def _named(hint: Any) -> str:
    """A type as a recipe's author reads it, without what ``Annotated`` says of it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _named(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_named(option) for option in arguments)
    if hint in (None, type(None)):
        return "None"
    if inspect.isclass(origin) and arguments:
        return f"{origin.__name__}[{', '.join(_named(argument) for argument in arguments)}]"
    return str(getattr(hint, "__name__", hint)) if not arguments else str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any, component: Any = None) -> bool:
    """Whether a YAML value (or the component it names) may stand where ``hint`` is asked for."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0], component)
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
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value if not is_component(item))
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(
            _fits(key, arguments[0]) and (is_component(item) or _fits(item, arguments[1]))
            for key, item in value.items()
        )
    if inspect.isclass(hint) and issubclass(hint, list | dict):
        return isinstance(value, hint)
    # Any other class wants a component; what is no class (Any, a protocol, a type variable) takes what comes.
    return (
        not inspect.isclass(hint) or hint is object or getattr(hint, "_is_protocol", False) or isinstance(value, hint)
    )


def _check_name(name: str) -> None:
    if not name.strip() or name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise UserError(f"{name!r} is no name of a folder: a run lies in runs/NAME (elsewhere: --run FOLDER).")


Built = typing.TypeVar("Built")


def load_component(file: Path, kind: type[Built]) -> Built:
    """Build the one component that a YAML file describes: its ``_target_`` and arguments, as a recipe has them.

    Args:
        kind: the class it must be of.

    Raises:
        UserError: as :meth:`Recipe.load`; it names a class of another kind.
    """
    lines: dict[str, str] = {}
    name = kind.__name__.lower()
    node = {TARGET: path_of(kind), **read(file, lines)}
    placed = {f"{name}.{key}": where for key, where in lines.items()}
    recipe = Recipe({name: node}, placed | {name: str(file)}, str(file))
    recipe.require(name, kind, f"name a {kind.__name__}")
    recipe._check_node(node, name)
    built: Built = recipe.build(name)
    return built
