"""The text of a recipe: YAML files with their parents, and ``key=value`` of a command line, to plain settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lavi.config.paths import home_path
from lavi.errors import UserError, nearest, one_line

TARGET = "_target_"
"""The key that names what is built."""

KEY = re.compile(r"[^\s.=]+(\.[^\s.=]+)*")
"""Of an override."""

NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)",
    "tag:yaml.org,2002:float": r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}
"""Also ``1e-3``; but 12:30:00 is a text and no number of base 60, and 010 none of base 8."""

SCALARS = {*NUMBERS, "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"}


class Loader(yaml.SafeLoader):
    """YAML as recipes have it: without dates, with :data:`NUMBERS`."""


class Dumper(yaml.SafeDumper):
    """Writes what :class:`Loader` reads as the same: a text ``1e-3`` in quotes."""


for kind in (Loader, Dumper):
    kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in SCALARS - {*NUMBERS} or tag.endswith(":merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in NUMBERS.items():
        kind.add_implicit_resolver(tag, re.compile(f"({pattern})$"), list("-+.0123456789"))


# --- files ------------------------------------------------------------------------------------------------------------


def read(path: Path, lines: dict[str, str], chain: Sequence[Path] = ()) -> dict[str, Any]:
    """One file merged over its parents.

    Args:
        lines: takes the file and line of each key, children last.
        chain: the files that named this one by ``extends``.

    Raises:
        UserError: there is no such file, or what is in it is no recipe.
    """
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        known = sorted(str(p) for p in folder.glob("*.yaml")) if folder.is_dir() else []
        named_by = f" (extended by {chain[-1]})" if chain else ""
        what = f"{path} is a folder, no recipe" if path.is_dir() else f"there is no recipe {path}"
        raise UserError(f"{what}{named_by}{f': {nearest(path, known)}' if known else '.'}")
    if path.resolve() in [p.resolve() for p in chain]:
        raise UserError(f"'extends' goes round in a circle: {' -> '.join(str(p) for p in [*chain, path])}.")
    own: dict[str, str] = {}
    settings = _parse(path, own)
    parent = settings.pop("extends", "")
    if not isinstance(parent, str) or ("extends" in own and not parent):
        raise UserError(f"{own['extends']}: 'extends' names one other recipe by its file, not {parent!r}.")
    inherited = read(path.parent / home_path(parent), lines, [*chain, path]) if parent else {}
    lines |= own
    return merge(inherited, settings)


def _parse(path: Path, lines: dict[str, str]) -> dict[str, Any]:
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        tree = loader.get_single_node()
        _note_lines(tree, "", path, lines)
        settings = loader.construct_document(tree) if tree is not None else None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not a text in UTF-8 ({error.reason} at byte {error.start}): save it as one."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or one_line(error)
        tab = " (a tab: indent with spaces)" if "'\\t'" in problem else ""
        raise UserError(f"{path}{line}: not readable as YAML: {problem}{tab}.") from None
    if not isinstance(settings, dict):
        what = "empty" if settings is None else "a list" if isinstance(settings, list) else "a single value"
        raise UserError(
            f"{path} is {what}: a recipe is a mapping of sections, such as model, module, data and trainer."
        )
    return settings


def _note_lines(node: Any, prefix: str, path: Path, lines: dict[str, str]) -> None:
    """The file and line of each key.

    Raises:
        UserError: a key stands twice in one mapping, of which YAML would take the last without a word.
    """
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if name in seen:
                raise UserError(f"{path}:{line}: '{name}' stands in line {seen[name]} already: keep one of them.")
            seen[name] = line
            lines[name] = f"{path}:{line}"
            _note_lines(value, f"{name}.", path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[f"{prefix}{index}"] = f"{path}:{value.start_mark.line + 1}"
            _note_lines(value, f"{prefix}{index}.", path, lines)


def merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """``child`` over ``parent``; a node that names another target replaces the parent's whole."""
    if TARGET in child and TARGET in parent and child[TARGET] != parent[TARGET]:
        return dict(child)
    merged = dict(parent)
    for key, value in child.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


# --- command lines ----------------------------------------------------------------------------------------------------


def override(settings: dict[str, Any], words: Sequence[str], lines: dict[str, str]) -> dict[str, Any]:
    """``settings`` with the values of ``key=value`` instead of what stood there, in whatever order they come.

    Raises:
        UserError: not of that form, a key twice, a value that is not readable, or nothing that it could be set in.
    """
    for key, value in _parsed(words):
        settings = _with(settings, key.split("."), value, key)
        for known in list(lines):
            if known.startswith(f"{key}."):
                del lines[known]
        lines[key] = "command line"
    return settings


def _parsed(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Keys and values, a key before those inside it, and what a component is before its arguments."""
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not KEY.fullmatch(key):
            raise UserError(f"'{word}' is no override: write key=value, such as trainer.max_steps=100.")
        if key in values:
            raise UserError(f"'{key}' is given twice, as {values[key]} and as {value}: keep one of them.")
        values[key] = value
    for key in sorted(values, key=lambda key: (key.count("."), not key.endswith(f".{TARGET}"))):
        yield key, _value(key, values[key])


def _value(key: str, text: str) -> Any:
    """The value of ``key=text``: a list, a mapping or a quoted text as in YAML; else all of it is one word or text."""
    if not text.strip():
        raise UserError(f"'{key}=' has no value: write {key}=null for none, or {key}='\"\"' for an empty text.")
    if text.startswith("="):
        raise UserError(f"'{key}={text}' has two equals signs: write key=value, or the value in quotes ('\"{text}\"').")
    if not text.lstrip().startswith(("[", "{", '"', "'")):
        loader, word = Loader(""), text.strip()
        tag = loader.resolve(yaml.ScalarNode, word, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, word)) if tag in SCALARS else text
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        _note_lines(node, f"{key}.", Path("command line"), {})
        tokens = list(yaml.scan(text))
        gaps = (text[one.end_mark.index : two.start_mark.index] for one, two in itertools.pairwise(tokens))
        if any("#" in gap for gap in gaps):  # YAML would leave out what is behind it
            raise yaml.YAMLError("'#' begins a comment")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = getattr(error, "problem", None) or one_line(error)
        raise UserError(
            f"the value of '{key}={text}' is not readable as YAML ({problem}): a text that begins so stands in quotes "
            f"({key}='\"...\"')."
        ) from None


def _with(node: Any, names: Sequence[str], value: Any, key: str) -> Any:
    """``node`` with ``value`` under ``names``, the last part of ``key``."""
    if not names:
        if is_component(node) and isinstance(value, dict) and TARGET not in value:
            raise UserError(
                f"'{key}' is a {node[TARGET]}, and {key}={{...}} without {TARGET} does not say what comes instead: "
                f"name the {TARGET} there, or change one argument, as in {key}.{next(iter(value), 'NAME')}=..."
            )
        return value
    name, *inside = names
    if isinstance(node, list):
        if not name.isdecimal() or int(name) >= len(node):
            raise UserError(f"'{key}': no item '{name}' in a list of {len(node)}; the first is item 0.")
        return [_with(item, inside, value, key) if index == int(name) else item for index, item in enumerate(node)]
    if node is not None and not isinstance(node, dict):
        above = key[: -len(".".join(names)) - 1]
        raise UserError(f"'{key}' cannot be set: '{above}' is {node!r}, and nothing is inside that.")
    node = node or {}
    if name == TARGET and not inside and node.get(TARGET) != value:
        return {TARGET: value}
    name = next((known for known in node if str(known) == name), name)  # a key may be a number
    return node | {name: _with(node.get(name), inside, value, key)}


def is_component(value: Any) -> bool:
    return isinstance(value, dict) and TARGET in value
