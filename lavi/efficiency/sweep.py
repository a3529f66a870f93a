"""One knob turned, everything else held: the way from recipes to the records that curves are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lavi.efficiency.measure import build_on, concat_twin, count, is_concat, measure
from lavi.efficiency.point import Scenario
from lavi.efficiency.record import Record
from lavi.errors import UserError, nearest
from lavi.model import VisionLanguageModel
from lavi.recipe import TARGET, Recipe

POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
GRIDS: dict[str, tuple[int, ...]] = {
    "visual_tokens": (0, 1, 9, 36, 64, 144, 192, 576, 729, 1458, 2916, 7290),
    "image": (336, 384, 512, 768, 1024, 1536, 2304),
    "frames": POWERS,
    "batch": POWERS,
    "text": (10, 50, 100, 200, 500, 1000, 2000),
    "layers": (0, 1, 2, 4, 7, 14, 28),
}
"""The knobs, and the values that ``A..B`` stands for (besides A and B themselves)."""

LARGEST_SIDE = 16384
"""Of an image, in pixels."""


@dataclass(frozen=True)
class Sweep:
    """A knob and its values: one of :data:`GRIDS`, or a dotted key of the recipe.

    ``layers`` is how many layers the fusion works in (spread over the stack; a fusion that works in none stays as it
    is). An image is ``(width, height)``.
    """

    knob: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """``visual_tokens=0..7290``, ``image=384x384,640x480``, ``frames=1,8,32``, ``model.fusion.every=1,2,4``.

        Raises:
            UserError: no such knob, or values it cannot have.
        """
        knob, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"a sweep is KNOB=VALUES, such as visual_tokens=0..7290, not '{text}'.")
        if knob not in GRIDS and "." not in knob:
            raise UserError(f"there is no knob '{knob}': {nearest(knob, GRIDS)} (or a dotted key of the recipe).")
        return cls(knob, tuple(dict.fromkeys(v for part in values.split(",") for v in _values(knob, part.strip()))))

    def scenario(self, value: Any, base: Scenario) -> Scenario:
        """The scenario at one value."""
        if self.knob in ("visual_tokens", "image", "frames"):
            nothing: dict[str, Any] = {"visual_tokens": None, "image": None, "frames": None}
            return replace(base, **nothing | {self.knob: value})
        return replace(base, **{self.knob: value}) if self.knob in ("batch", "text") else base

    def label(self, value: Any, scenario: Scenario) -> str:
        """What a point is called."""
        known = self.knob in ("visual_tokens", "image", "frames")
        return str(scenario) if known else f"{scenario}, {self.knob.removeprefix('model.')}={value}"

    def recipe(self, value: Any, recipe: Recipe, layers: int) -> Recipe:
        """The recipe at one value, of a language model of so many ``layers``."""
        if "." in self.knob:
            return recipe.replaced(self.knob, value)
        fusion = recipe.settings["model"]["fusion"]
        if self.knob != "layers" or not recipe.takes("model.fusion", "fraction"):
            return recipe
        if value == 0 or value > layers:
            raise UserError(f"layers={value}: the fusion works in 1 to {layers} layers of this language model.")
        kept = {key: setting for key, setting in fusion.items() if key not in ("every", "layers", "fraction", "where")}
        return recipe.replaced("model.fusion", kept | {TARGET: fusion[TARGET], "fraction": value / layers})

    @property
    def turns_recipe(self) -> bool:
        """Whether each value is another model."""
        return self.knob == "layers" or "." in self.knob


def _values(knob: str, text: str) -> list[Any]:
    if "." in knob:
        return [yaml.safe_load(text)]
    least = 0 if knob == "visual_tokens" else 1
    first, dots, last = text.partition("..")
    ends = [_number(knob, part, least) for part in ((first, last) if dots else (text,))]
    if not dots:
        return ends
    low, high = (end[0] if isinstance(end, tuple) else end for end in ends)
    if low > high:
        raise UserError(f"{knob}={text} runs backwards: write {last}..{first}.")
    between = sorted({low, high, *(value for value in GRIDS[knob] if low <= value <= high)})
    return [(side, side) for side in between] if knob == "image" else between


def _number(knob: str, text: str, least: int) -> Any:
    sides = text.lower().split("x") if knob == "image" else [text]
    try:
        numbers = tuple(int(side) for side in sides)
    except ValueError:
        numbers = ()
    if not numbers or len(numbers) > 2 or min(numbers) < least:
        kind = "sizes such as 640x480" if knob == "image" else f"whole numbers from {least} on"
        raise UserError(f"{knob} takes {kind}, not '{text}'.")
    if knob == "image" and max(numbers) > LARGEST_SIDE:
        raise UserError(f"an image of {text} is beyond what is cut into tiles: {LARGEST_SIDE} pixels a side.")
    return (numbers[0], numbers[-1]) if knob == "image" else numbers[0]


def run(
    recipes: Sequence[Recipe],
    sweep: Sweep,
    base: Scenario,
    *,
    device: torch.device | None = None,
    runs: int = 20,
    outputs: Sequence[int] = (),
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    leave_out: Callable[[UserError], None] | None = None,
) -> Iterator[Record]:
    """Count every recipe at every value; with a ``device``, measure it there too.

    All points are held against the models before the first is counted.

    Args:
        track: draws a progress bar over the points.
        leave_out: is told of a value that a model cannot take, and the sweep goes on without it.

    Raises:
        UserError: a value that one of the models cannot take, without ``leave_out``.
    """
    points = []
    for recipe in recipes:
        model = build_on(recipe, "meta")
        for value in sweep.values:
            made_from = sweep.recipe(value, recipe, len(model.language.layers))
            at = build_on(made_from, "meta") if sweep.turns_recipe else model
            scenario = sweep.scenario(value, base)
            try:
                scenario.at(at).check(at, scenario)
            except UserError as error:
                if leave_out is None:
                    raise
                leave_out(error)
            else:
                points.append((recipe, made_from, at, scenario, value))
    measured: tuple[Recipe | None, VisionLanguageModel | None] = (None, None)
    for recipe, made_from, on_meta, scenario, value in track(points):
        made = count(made_from, on_meta, scenario)
        made.knobs = {"name": name_of(recipe), "knob": sweep.knob, "value": value}
        made.knobs["scenario"] = sweep.label(value, scenario)
        if device is not None:
            if measured[0] is not made_from:
                measured = (None, None)  # the last one's memory first
                measured = (made_from, build_on(made_from, device))
            assert measured[1] is not None
            measure(made, measured[1], scenario, device=device, runs=runs, outputs=outputs)
        yield made


def with_baseline(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes, with the first one's concatenation twin if none of them concatenates: savings are against it."""
    return list(recipes) if any(map(is_concat, recipes)) else [*recipes, concat_twin(recipes[0])]


def name_of(recipe: Recipe) -> str:
    """What a recipe's line is called."""
    return str(recipe.settings.get("name") or Path(recipe.source).stem)
