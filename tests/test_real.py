"""Real parts: twins that differ in the fusion alone, and tables that say what was recorded."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import real
import tables
from PIL import Image

from datamodules.photographs import NAMES
from lavi.efficiency.record import Record
from lavi.recipe import Recipe

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["concat", "cross_attention"])
def test_twins_differ_in_the_fusion_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lavi, twin = (Recipe.load(f"recipes/real/{one}.yaml").settings for one in ("lavi", name))
    fusions = [settings["model"].pop("fusion")["_target_"] for settings in (lavi, twin)]
    assert len({*fusions, lavi.pop("name"), twin.pop("name")}) == 4
    assert lavi == twin


def test_the_picture_shows_test_photographs_of_the_kinds_that_are_asked_for(tmp_path: Path) -> None:
    for name, level in (("train", 0), ("t10k", 200)):
        labels = np.arange(6000 if name == "train" else 40, dtype=np.uint8) % len(NAMES)
        pixels = np.full((len(labels), 28, 28), level, np.uint8)
        pixels[:, :, :14] = (20 * labels)[:, None, None]  # the left half tells the kind
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 0x803, len(labels), 28, 28) + pixels.tobytes()
        )
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, len(labels)) + labels.tobytes())
    picture = np.asarray(Image.open(io.BytesIO(real.compose(tmp_path))).convert("L"), float)
    half = len(picture) // 2
    lefts, rights = [], []
    for row, column in np.ndindex(2, 2):
        cell = picture[row * half : (row + 1) * half, column * half : (column + 1) * half]
        middle = cell[half // 2]
        lefts.append(middle[half // 4])
        rights.append(middle[3 * half // 4])
    assert np.ptp(rights) < 8
    assert np.argsort(lefts).tolist() == np.argsort([NAMES.index(kind) for kind in real.SHOWN]).tolist()
    assert real.compose(tmp_path) == real.compose(tmp_path)


def test_answers_and_figures_are_shown_as_they_were_recorded() -> None:
    lavi, concat = (Record(method, 14, 64, count, 1) for method, count in (("lavi", 0), ("concat", 64)))
    lavi.accuracy = {"all": 60.0, "family/name": 85.5, "level/hard": 40.0}
    lavi.accuracy_intervals = {"family/name": [83.0, 88.0]}
    lavi.flops, concat.flops = ({"vision_encoder": 2e9, "text_ffn": size} for size in (1e9, 4e9))
    asked = [["what is at the top left?", "boot"], ["is there a bag?", "yes"], *[["how many?", "one"]] * 2]
    lavi.knobs["shown"] = [[question, "sandal", true] for question, true in asked]
    concat.knobs["shown"] = [[question, true, true] for question, true in asked]
    lavi.knobs["shown"][1][1] = "san\ndal | x"
    whole = tables.shown([lavi, concat])
    assert "| question | lavi | concat | true |" in whole
    assert "| what is at the top left? | sandal | boot | boot |" in whole
    short = tables.shown_short([concat, lavi])
    assert "| is there a bag? | san dal \\| x |" in short
    assert short.count("\n") == 2 + tables.IN_README
    figures = tables.KINDS["real.short"]([lavi, concat])
    assert "| name (%) | 85.5 (83.0-88.0) | nan |" in figures
    assert "| saved, without vision encoder (%) | 75.0 | 0.0 |" in figures
    assert "held-out" not in figures
