"""The small faults that can be planted in a module.

mutmut says how code can be changed (its operators for single expressions and statements). Not changed: annotations,
decorators, imports, asserts and casts, which are for the reader and the type checker; the words of error messages and
of progress; ``strict`` of zip, which guards against a mistake that is not there; ``device``, which means nothing on a
machine that has one. Left out, since no test can notice them: an argument that is None instead of False, which is as
false; and ``.to(None)``, on a machine that has one device.
"""

from __future__ import annotations

import ast
import difflib
import random
from dataclasses import dataclass, field

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

UNCHANGED = {"strict", "device", "description"}
"""Arguments that are not changed."""


@dataclass(frozen=True)
class Mutant:
    """One change of one module; ``before`` and ``after`` are the lines that differ, without their indentation."""

    module: str
    line: int
    before: str
    after: str
    source: str = field(repr=False)

    @property
    def key(self) -> tuple[int, str, str]:
        return self.line, self.before, self.after


class Sites(cst.CSTVisitor):
    """Collects what can be changed: pairs of a node and another for it."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[cst.CSTNode, cst.CSTNode]] = []
        self.in_raise = False

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom | cst.Assert):
            return False
        if isinstance(node, cst.Raise):
            self.in_raise = True
        if self.in_raise and isinstance(node, cst.SimpleString | cst.FormattedString):
            return False
        if isinstance(node, cst.Arg) and node in unchanged_arguments(node):
            return False
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == "cast":
            return True  # for the type checker, too; not so what is inside
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                self.changes += [(node, other) for other in operator(node) if is_noticeable(node, other)]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.Raise):
            self.in_raise = False


def is_noticeable(node: cst.CSTNode, other: cst.CSTNode) -> bool:
    """Whether a test could notice ``other`` instead of ``node``."""
    if unchanged_arguments(node) != unchanged_arguments(other):
        return False
    if not isinstance(node, cst.Call) or not isinstance(other, cst.Call) or len(node.args) != len(other.args):
        return True
    moves = isinstance(node.func, cst.Attribute) and node.func.attr.value == "to"
    values = [(before.value, after.value) for before, after in zip(node.args, other.args, strict=True)]
    return not any(is_name(after, "None") and (moves or is_name(before, "False")) for before, after in values)


def is_name(node: cst.CSTNode, name: str) -> bool:
    return isinstance(node, cst.Name) and node.value == name


def unchanged_arguments(node: cst.CSTNode) -> list[cst.Arg]:
    """Those of a call, or of an argument by itself, that are not changed."""
    arguments = node.args if isinstance(node, cst.Call) else [node] if isinstance(node, cst.Arg) else []
    return [argument for argument in arguments if argument.keyword and argument.keyword.value in UNCHANGED]


def mutants_of(module: str, source: str, *, sample: int, seed: int) -> list[Mutant]:
    """A draw of ``sample`` mutants of a module's source, or all that there are; in the order of its lines."""
    tree = MetadataWrapper(cst.parse_module(source))
    sites = Sites()
    tree.visit(sites)
    random.Random(f"{seed} {module}").shuffle(sites.changes)
    drawn: dict[tuple[int, str, str], Mutant] = {}
    for node, other in sites.changes:
        if len(drawn) == sample:
            break
        changed = tree.module.deep_replace(node, other)
        mutant = _mutant(module, source, cst.ensure_type(changed, cst.Module).code)
        if mutant is not None:
            drawn[mutant.key] = mutant
    return sorted(drawn.values(), key=lambda mutant: mutant.key)


def _mutant(module: str, source: str, changed: str) -> Mutant | None:
    """None: it is no Python, or says the same."""
    try:
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
            return None
    except SyntaxError:
        return None
    old, new = source.splitlines(), changed.splitlines()
    blocks = [block for block in difflib.SequenceMatcher(None, old, new).get_opcodes() if block[0] != "equal"]
    first, last = blocks[0], blocks[-1]
    before, after = (
        "\n".join(line.strip() for line in lines) for lines in (old[first[1] : last[2]], new[first[3] : last[4]])
    )
    return Mutant(module, first[1] + 1, before, after, changed)
