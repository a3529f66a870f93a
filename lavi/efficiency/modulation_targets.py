"""A table of a decoder's norms: those that a fusion modulates, and those that cannot be modulated."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn

from lavi.checkpoints.published_vlm import written_out
from lavi.errors import UserError
from lavi.fusion.base import Fusion
from lavi.language.load import LanguageModel
from lavi.language.surgery import NormTarget, kind_of_norm, norm_targets
from lavi.recipe import Recipe
from lavi.reduction.base import Reducer
from lavi.report import table
from lavi.vision.base import VisionBackbone


def show_targets(recipe: Recipe) -> RenderableType:
    """The norms of a recipe's language model, and what its fusion adds; works on the meta device.

    Raises:
        UserError: the recipe's language model or tower cannot be built.
    """
    recipe = written_out(recipe)
    language: LanguageModel = recipe.build("model.language")
    vision: VisionBackbone = recipe.build("model.vision")
    named = recipe.settings["model"].get("reducer") is not None
    reducer: Reducer | None = recipe.build("model.reducer") if named else None
    fusion: Fusion = recipe.build("model.fusion")
    # Found and named before the fusion opens anything: what it refuses is what people come here to see.
    targets = norm_targets(language.hf)
    classes = {target: type(target.norm).__name__ for target in targets}
    title = f"Norms of {type(language.hf).__name__} ({len(language.layers)} layers, width {language.width})"
    inside = _norms_inside(language)
    verdicts, notes = _refusals(targets, language.width)
    try:
        fusion.bind(language, vision.feature_spec if reducer is None else reducer.bind(vision))
    except UserError as error:
        notes.append(f"this recipe cannot be built: {error}")
    else:
        chosen = {(t.layer, t.name) for t in fusion.modulated_norms}
        verdicts |= {target: "chosen" for target in targets if (target.layer, target.name) in chosen}
        notes.append(parameters_added(fusion, language))
        if reducer is not None and (own := sum(p.numel() for p in reducer.parameters())):
            notes.append(f"parameters of the reducer: {own:,}")
    rows = []
    for alike in _alike(targets, verdicts):
        first = alike[0]
        layers = "after the layers" if first.role == "final" else ranges([t.layer for t in alike])
        role = {"both": "attention and ffn", "final": "the head"}.get(first.role, first.role)
        rows.append(
            [layers, first.name, classes[first], f"{first.position} {role}", verdicts.get(first, "left as it is")]
        )
    rows += [[layers, name, kind, "inside a branch", "never touched"] for name, (layers, kind) in inside.items()]
    columns = ["layers", "norm", "class", "what it does (by probing)", "verdict"]
    return Group(table(title, columns, rows), *map(Text, notes))


def _refusals(targets: Sequence[NormTarget], width: int) -> tuple[dict[NormTarget, str], list[str]]:
    """The norms that cannot be modulated, and why, each reason once."""
    verdicts: dict[NormTarget, str] = {}
    notes: dict[str, str] = {}
    for target in targets:
        try:
            kind_of_norm(target, width)
        except UserError as error:
            verdicts[target] = "refused"
            notes.setdefault(target.name, f"refused: {error}")
    return verdicts, list(notes.values())


def _norms_inside(language: LanguageModel) -> dict[str, tuple[str, str]]:
    """Norms deeper than a layer's own children, such as those of queries and keys: (layers, class)."""
    layers: dict[str, list[int]] = {}
    kinds: dict[str, str] = {}
    for index, layer in enumerate(language.layers):
        for name, module in layer.named_modules():
            if "." in name and "norm" in type(module).__name__.lower():
                layers.setdefault(name, []).append(index)
                kinds[name] = type(module).__name__
    return {name: (ranges(of), kinds[name]) for name, of in layers.items()}


def parameters_added(fusion: nn.Module, language: nn.Module) -> str:
    """The parameters a fusion adds, and their share of the language model's."""
    added, base = (sum(p.numel() for p in module.parameters()) for module in (fusion, language))
    return f"parameters added: {added:,} ({100 * added / base:.2f} % of the language model's {base:,})"


def _alike(targets: Sequence[NormTarget], verdicts: dict[NormTarget, str]) -> list[list[NormTarget]]:
    """Norms of the same name, role and verdict, over the layers."""
    groups: dict[tuple[object, ...], list[NormTarget]] = {}
    for target in targets:
        groups.setdefault((target.name, target.role, target.position, verdicts.get(target)), []).append(target)
    return list(groups.values())


def ranges(numbers: Sequence[int]) -> str:
    """``0-2, 4, 6-8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
