"""What the lab (:mod:`lab`) trains and scores: each fusion, what varies it, and encoders that cost less."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab_results import DATA

SEEDS = (0, 1, 2)
"""Of the methods that the lab is about; what varies them is trained with one."""
TOWER = "{_target_: lavi.vision.hf.HFVision, source: recipes/scenes/vision_tower}"
LEVELS = "{_target_: lavi.vision.hf.HFVision, source: recipes/scenes/vision_tower, layer: [2, -1]}"
"""The tower of recipes/lab/large_levels.yaml."""
RUN, TILE_ROUTER = "THE-RUN", "tile-router"
"""In changes, the folder of the run that is scored, or begun with; in it, its router of tiles."""
QUESTIONED = 4000
"""Conversations that a router learns from."""
ENOUGH = 0.8
"""Of the probability of the right answer with all layers refining: what the layers that a router should choose keep."""
LABELS = f"labels-likely-{ENOUGH}-of-{QUESTIONED}.jsonl"
"""In the folder of a run: which layers each question needs."""
GENERATOR = "model.fusion.generator={{_target_: lavi.nn.delta_generators.{}, bottleneck: {}}}"


@dataclass(frozen=True)
class Method:
    """A recipe of the lab with changes.

    Args:
        shares: of the recipe's steps, the budgets it is trained with; of less than 1 with the first seed alone.
        seeds: those it is trained with.
        variants: what one trained model is scored as, with the changes of each; by default as it is.
        data: what it is scored on, and trained unless it is ``of`` another: one of :data:`DATA`.
        of: what is scored are the runs of this method, which are trained if they are not there yet.
        routes: the method whose runs it routes, trained from those; they label the questions that it learns from.
        train: what it is trained on instead of the training split of ``data``.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    shares: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = SEEDS
    variants: tuple[tuple[str, tuple[str, ...]], ...] = ()
    data: str = "scenes"
    of: str | None = None
    routes: str | None = None
    train: Path | None = None


SHORT = 0.4
"""The share of the steps of what is tried with one seed: while methods still learn, what helps them is seen best."""


def ablation(recipe: str, *changes: str) -> Method:
    """One key of a method changed: for a part of the steps, as the method itself is, too; one seed."""
    return Method(recipe, changes, shares=(SHORT,), seeds=(0,))


def layer_router_of(name: str, recipe: str, **settings: Any) -> Method:
    """VISOR's router for the runs of a method, trained on questions that those runs have labelled."""
    return Method(recipe, (f"module.start_from={RUN}", f"model.fusion.labels={RUN}/{LABELS}"), routes=name, **settings)


def with_encoder(data: str, name: str, vision: str) -> tuple[str, tuple[str, ...]]:
    """A variant with another vision backbone, on the pixels of ``data``; nothing is trained for it."""
    return name, (f"data.test={DATA[data].features / 'test'}", f"model.vision={vision}")


def merging(tower: str = TOWER, **arguments: Any) -> str:
    """A vision tower that merges tokens between its blocks, as a recipe names it."""
    given = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    reduction = f"{{_target_: lavi.vision.token_merging.TokenMerging, {given}}}"
    return f"{{_target_: lavi.vision.reduced.ReducedTower, tower: {tower}, reductions: [{reduction}]}}"


def on_request(keep: float, ranking: str, tower: str = TOWER) -> str:
    """A backbone that encodes a share of the tiles, as a recipe names it."""
    given = f"tower: {tower}, keep: {keep}, ranking: {{_target_: lavi.vision.{ranking}}}"
    return f"{{_target_: lavi.vision.tiles_on_request.TilesOnRequest, {given}}}"


BY_QUESTION = f"tile_router.TileRouter, source: {RUN}/{TILE_ROUTER}"
DETAIL, SAME = "tiles_on_request.Detail", "tiles_on_request.RandomTiles"


def fewer_tiles(of: str, data: str, *others: tuple[str, str], suffix: str = "", tower: str = TOWER) -> Method:
    """A method's runs, scored with a part of the tiles encoded.

    Args:
        of: the method; what its first variant changes, these change, too.
        others: more encoders, by name.
        suffix: appended to each name.
        tower: the method's own.
    """
    encoders = {
        f"{count} of 4, {name}": on_request(count / 4, ranking, tower)
        for count in (2, 1)
        for name, ranking in {"by the question": BY_QUESTION, "of most detail": DETAIL}.items()
    }
    variants = [with_encoder(data, name, vision) for name, vision in [*encoders.items(), *others]]
    alone = ("model.tiling=null", f"data.test={DATA[data].features / 'test'}")
    variants.append(("none: the whole picture alone", alone))
    own = METHODS[of].variants[0][1] if METHODS[of].variants else ()
    named = tuple((name + suffix, (*changes, *own)) for name, changes in variants)
    return Method(METHODS[of].recipe, of=of, data=data, seeds=(0,), variants=named)


def merged(tower: str = TOWER) -> tuple[tuple[str, str], tuple[str, str]]:
    """Encoders of large pictures that merge tokens: in all tiles, in the one of the question."""
    encoder = merging(tower, per_block=16)
    return (
        ("all, 16 of 64 tokens merged behind each block", encoder),
        ("1 of 4, by the question, 16 merged behind each block", on_request(0.25, BY_QUESTION, encoder)),
    )


METHODS: dict[str, Method] = {
    "concatenation": Method("concat", shares=(SHORT, 1.0)),
    "LaVi": Method("lavi", shares=(SHORT, 1.0)),
    "concatenation, more steps": Method("concat", shares=(1.6,), seeds=(0, 1)),
    "concatenation, newlines": Method("concat", ("model.fusion.newline=true",), seeds=(1,)),
    "concatenation, images numbered": Method("concat", ("model.image_numbers=true",), seeds=(1,)),
    "cross-attention": Method("cross_attention", seeds=(0,)),
    "VISOR": Method(
        "visor",
        variants=(
            ("VISOR, both refining", ()),
            ("VISOR, layer 2 refining", ("model.fusion.configuration=[2]",)),
            ("VISOR, none refining", ("model.fusion.configuration=none",)),
        ),
    ),
    "VISOR, routed": layer_router_of(
        "VISOR", "visor_router", train=Path("data/lab-single-features/train"), seeds=(0, 1)
    ),
    "LaVi, MLP": ablation("lavi", GENERATOR.format("MLPDeltas", 32)),
    "LaVi, convolutions": ablation("lavi", GENERATOR.format("ConvDeltas", 32)),
    "LaVi, pooled": ablation("lavi", GENERATOR.format("PooledDeltas", 32)),
    "LaVi, scale alone": ablation("lavi", "model.fusion.parameters=scale"),
    "LaVi, shift alone": ablation("lavi", "model.fusion.parameters=shift"),
    "LaVi, attention's norms": ablation("lavi", "model.fusion.targets=[attention]"),
    "LaVi, feed-forward's norms": ablation("lavi", "model.fusion.targets=[ffn]"),
    "LaVi, every second layer": ablation("lavi", "model.fusion.every=2"),
    "LaVi, bottleneck 16": ablation("lavi", GENERATOR.format("AttentionDeltas", 16)),
    "LaVi, not from zero": ablation("lavi", "model.fusion.generator.initial_std=0.02"),
    "ViCA, layers 0 and 2 reading": ablation(
        "concat", "model.fusion={_target_: lavi.fusion.vica.ViCA, layers: [0, 2]}"
    ),
    "ShortV, layers 0 and 3 reading": ablation(
        "concat", "model.fusion={_target_: lavi.fusion.shortv.ShortV, layers: [0, 3]}"
    ),
    "late injection, from layer 2": ablation(
        "concat", "model.fusion={_target_: lavi.fusion.late_injection.LateInjection, first: 2}"
    ),
    "concatenation, pooled 2 x 2": ablation(
        "concat", "model.reducer={_target_: lavi.reduction.pooling.AveragePooling, factor: 2}"
    ),
    "concatenation, random quarter": ablation(
        "concat", "model.reducer={_target_: lavi.reduction.controls.RandomTokens, keep: 16}"
    ),
    "concatenation, DivPrune quarter": ablation(
        "concat", "model.reducer={_target_: lavi.reduction.diverse.DivPrune, keep: 16}"
    ),
    "concatenation, CDPruner quarter": ablation(
        "concat", "model.reducer={_target_: lavi.reduction.diverse.CDPruner, keep: 16}"
    ),
    "concatenation, DART quarter": ablation(
        "concat", "model.reducer={_target_: lavi.reduction.diverse.DART, keep: 16}"
    ),
    "LaVi, merging in the tower": Method(
        "lavi",
        of="LaVi",
        data="encoder",
        variants=(
            with_encoder("encoder", "8 of 64 tokens merged behind each block", merging(per_block=8)),
            with_encoder("encoder", "16 merged behind each block", merging(per_block=16)),
            with_encoder("encoder", "32 merged behind the first block", merging(per_block=[32])),
            with_encoder(
                "encoder", "32 merged behind the first block, 16 behind the second", merging(per_block=[32, 16])
            ),
        ),
    ),
    "32 merged behind the first block, 16 behind the second, LaVi trained with it": Method("merged", data="merged"),
    "concatenation of large pictures": Method("large_concat", seeds=(0,), data="large"),
    "LaVi of large pictures": Method("large", seeds=(0,), data="large"),
    "LaVi of large pictures, tiles dropped": Method("large", ("module.tile_dropout=0.5",), seeds=(0,), data="large"),
    "LaVi of large pictures, levels of the tower": Method("large_levels", seeds=(0,), data="levels"),
    "VISOR of large pictures": Method(
        "large_visor",
        seeds=(0,),
        data="large",
        variants=(
            ("VISOR of large pictures, layer 2 refining", ("model.fusion.configuration=[2]",)),
            ("VISOR of large pictures, none refining", ("model.fusion.configuration=none",)),
            ("VISOR of large pictures, both refining", ()),
        ),
    ),
    "concatenation of frames": Method("video_concat", seeds=(0,), data="videos"),
    "LaVi of frames": Method("video_lavi", seeds=(0,), data="videos"),
}
METHODS |= {
    "LaVi of large pictures, fewer tiles": fewer_tiles(
        "LaVi of large pictures",
        "tiles",
        ("2 of 4, the same in all pictures", on_request(0.5, SAME)),
        ("1 of 4, the same in all pictures", on_request(0.25, SAME)),
        *merged(),
    ),
    "LaVi of large pictures, tiles dropped, fewer tiles": fewer_tiles(
        "LaVi of large pictures, tiles dropped", "dropped", suffix=", tiles dropped in training"
    ),
    "LaVi of large pictures, levels of the tower, fewer tiles": fewer_tiles(
        "LaVi of large pictures, levels of the tower", "levels tiles", *merged(LEVELS), suffix=", levels", tower=LEVELS
    ),
    "VISOR of large pictures, fewer tiles": fewer_tiles(
        "VISOR of large pictures", "VISOR tiles", *merged(), suffix=", VISOR"
    ),
}
"""Methods of :data:`METHODS` with encoders that they were not trained with."""


PARTS = ("fusions", "variants", "large")
"""Of the lab, each for an evening: fusions with all their steps, what varies them, and large pictures."""
FUSIONS = (
    *("concatenation", "LaVi", "cross-attention", "VISOR", "VISOR, routed"),
    *("concatenation of frames", "LaVi of frames"),
)


def part_of(name: str, share: float) -> str:
    """The part of the lab, one of :data:`PARTS`, that a method with this share of its steps belongs to."""
    if DATA[METHODS[name].data].large:
        return "large"
    return "fusions" if name in FUSIONS and share >= 1.0 else "variants"


def variants_of(name: str) -> list[str]:
    """What a method is scored as."""
    return [variant for variant, _ in METHODS[name].variants] or [name]


def method_of_variant() -> dict[str, str]:
    """The method that each variant is of."""
    return {variant: name for name in METHODS for variant in variants_of(name)}
