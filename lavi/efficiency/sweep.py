"""Sweeps: recipes counted and measured while one knob takes one value after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from lavi.checkpoints.published_vlm import written_out
from lavi.config.paths import unique_names
from lavi.config.text import Loader
from lavi.efficiency.estimated import note_estimates
from lavi.efficiency.flops import language_flops
from lavi.efficiency.hardware import Device
from lavi.efficiency.latency import TURNS, Track
from lavi.efficiency.measure import Measurement, build_on, concat_twin, count, is_concat, measure
from lavi.efficiency.record import Record
from lavi.efficiency.scenario import Scenario
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

OF_METHODS = ("model.fusion.", "model.reducer.")
"""Keys that only some methods have."""

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
        if knob.startswith("model."):
            return cls(knob, tuple(_settings(text, values)))
        if knob not in GRIDS:
            raise UserError(f"there is no knob '{knob}': {nearest(knob, GRIDS)} (Or a key of the recipe: model.KEY.)")
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
        """The recipe at one value, of a language model of so many ``layers``.

        A recipe that concatenates has no keys of other methods, and stays as it is.
        """
        if "." in self.knob:
            try:
                return recipe.replaced(self.knob, value)
            except UserError:
                if is_concat(recipe) and self.knob.startswith(OF_METHODS):
                    return recipe
                raise
        fusion = recipe.settings["model"]["fusion"]
        if self.knob != "layers" or not recipe.takes("model.fusion", "fraction"):
            return recipe
        if value == 0 or value > layers:
            raise UserError(f"layers={value}: the fusion works in 1 to {layers} layers of this language model.")
        others = {
            key: setting for key, setting in fusion.items() if key not in ("every", "layers", "fraction", "where")
        }
        return recipe.replaced("model.fusion", others | {TARGET: fusion[TARGET], "fraction": value / layers})

    @property
    def turns_recipe(self) -> bool:
        """Whether each value is another model."""
        return self.knob == "layers" or "." in self.knob


def _settings(sweep: str, text: str) -> list[Any]:
    """Values of a key of the recipe, read as in a recipe: ``1e-3`` is a number."""
    try:
        values: list[Any] = yaml.load(f"[{text}]", Loader)
    except yaml.YAMLError:
        raise UserError(
            f"the values of '{sweep}' are not readable as YAML: such as every=1,2 or layers=[0],[0,1]."
        ) from None
    return values


def _values(knob: str, text: str) -> list[Any]:
    least = 0 if knob == "visual_tokens" else 1
    first, dots, last = text.partition("..")
    ends = [_number(knob, part, least) for part in ((first, last) if dots else (text,))]
    if not dots:
        return ends
    if any(isinstance(end, tuple) and end[0] != end[1] for end in ends):
        raise UserError(
            f"{knob}={text}: a range is one of squares, such as image=336..1024; name other sizes one by one."
        )
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


@dataclass(frozen=True)
class SweepPoint:
    """One recipe at one value of a sweep: the recipe as it is there, and its model on meta."""

    name: str
    recipe: Recipe
    on_meta: VisionLanguageModel
    scenario: Scenario


def sweep_records(
    recipes: Sequence[Recipe],
    sweep: Sweep,
    base: Scenario,
    *,
    device: torch.device | None = None,
    runs: int = TURNS,
    outputs: Sequence[int] = (),
    track: Track = iter,
    leave_out: Callable[[UserError], None] | None = None,
    estimate: Sequence[Device] = (),
) -> Iterator[Record]:
    """Count every recipe at every value, value by value; with a ``device``, measure all recipes of a value there, in
    turns.

    All points are checked against the models at once, before the first record.

    Args:
        track: draws a progress bar over the values.
        estimate: devices whose time is estimated, and with them the memory.
        leave_out: is called with the error of a recipe that cannot be counted, or of a value that a model cannot take;
            the sweep goes on without it.

    Raises:
        UserError: the same, without ``leave_out``.
    """
    columns = _points(recipes, sweep, base, leave_out)
    return _records(columns, sweep, device=device, runs=runs, outputs=outputs, track=track, estimate=estimate)


def _records(
    columns: Sequence[tuple[Any, dict[int, SweepPoint]]],
    sweep: Sweep,
    *,
    device: torch.device | None,
    runs: int,
    outputs: Sequence[int],
    track: Track,
    estimate: Sequence[Device],
) -> Iterator[Record]:
    models: dict[int, VisionLanguageModel] = {}

    def model(number: int, recipe: Recipe) -> VisionLanguageModel:
        if number not in models:
            models[number] = build_on(recipe, device or "cpu")
        return models[number]

    for position, (value, points) in enumerate(track(columns)):
        if sweep.turns_recipe:
            models.clear()
        measurements = []
        for number, point in points.items():
            record = count(point.recipe, point.on_meta, point.scenario)
            record.knobs = {"name": point.name, "knob": sweep.knob, "value": value, "position": position}
            record.knobs["scenario"] = sweep.label(value, point.scenario)
            if estimate:
                note_estimates(record, point.on_meta, point.scenario, estimate)
            measurements.append(Measurement(record, point.scenario, partial(model, number, point.recipe)))
        if device is not None:
            measure(measurements, device=device, runs=runs, outputs=outputs)
        yield from (one.record for one in measurements)


def _points(
    recipes: Sequence[Recipe], sweep: Sweep, base: Scenario, leave_out: Callable[[UserError], None] | None
) -> list[tuple[Any, dict[int, SweepPoint]]]:
    """Each value, with the points of the recipes that can take it, by the recipe's number."""
    columns: list[tuple[Any, dict[int, SweepPoint]]] = [(value, {}) for value in sweep.values]
    for number, recipe in enumerate(recipes):
        try:
            model = build_on(recipe, "meta") if sweep.turns_recipe else _countable(recipe)
        except UserError as error:
            if leave_out is None:
                raise
            leave_out(UserError(f"{name_of(recipe)}: {error}"))
            continue
        for value, points in columns:
            scenario = sweep.scenario(value, base)
            try:
                turned = sweep.recipe(value, recipe, len(model.language.layers))
                at = _countable(turned) if sweep.turns_recipe else model
                scenario.shape_for(at).check(at, scenario)
            except UserError as error:
                if leave_out is None:
                    raise
                leave_out(error)
            else:
                points[number] = SweepPoint(name_of(recipe), turned, at, scenario)
    return [(value, points) for value, points in columns if points]


def _countable(recipe: Recipe) -> VisionLanguageModel:
    """The model of a recipe on meta.

    Raises:
        UserError: it cannot be built there, or FLOPs of its decoder have no formula.
    """
    model = build_on(recipe, "meta")
    language_flops(model.language, tokens=[1] * len(model.language.layers))
    return model


def with_baseline(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes, with the first one's concatenation twin if none of them concatenates: savings are against it."""
    recipes = with_own_names(recipes)
    twins = [] if any(map(is_concat, recipes)) else [concat_twin(recipes[0])]
    return [written_out(recipe) for recipe in recipes] + twins


def name_of(recipe: Recipe) -> str:
    """What a recipe's line is called."""
    return str(recipe.settings.get("name") or Path(recipe.source).stem)


def with_own_names(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes; those that have one name, as one that extends another may, are called as their files.

    Raises:
        UserError: a recipe is named twice.
    """
    names = [name_of(recipe) for recipe in recipes]
    if len(set(names)) == len(names):
        return list(recipes)
    files = unique_names([Path(recipe.source).resolve().with_suffix("") for recipe in recipes])
    own = [file if names.count(name) > 1 else name for name, file in zip(names, files, strict=True)]
    if len(set(own)) < len(own):  # a file is called as another recipe is
        own = files
    return [
        replace(recipe, settings=recipe.settings | {"name": name}) for recipe, name in zip(recipes, own, strict=True)
    ]
