"""A trained model from where one lies: a run, an export, or a published vision-language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import yaml

from lavi.checkpoints.model_folder import FUSION, RECIPE, from_pretrained
from lavi.checkpoints.published_vlm import published_vlm
from lavi.checkpoints.run_folder import load_run
from lavi.config.devices import device_of
from lavi.config.paths import home_path
from lavi.data.frame_sampling import FrameSampling
from lavi.errors import UserError
from lavi.loading.vlm import names_vlm
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe


def load(folder: str | Path, *, device: str | torch.device = "cpu", trust: bool = False) -> VisionLanguageModel:
    """The model of a run folder (``lavi.fit``), of an exported one (``lavi.export``) or of a published checkpoint.

    It is ready to answer.

    Args:
        folder: of a run, of an export, or of a vision-language model that transformers has saved; or its hub name.
        device: where its weights go; ``auto``: to a GPU if there is one.
        trust: build whatever the folder's recipe names, not only classes of known packages.

    Raises:
        UserError: no such folder, or one that holds no trained model; a device that is not there.
    """
    source = str(folder)
    folder, target = home_path(folder), device_of(device)
    if not (folder / RECIPE).is_file() and names_vlm(source):
        return published_vlm(source).eval().to(target)
    if not (folder / RECIPE).is_file():
        raise UserError(
            f"{folder} holds no model, it has no {RECIPE}: give a folder that lavi.fit or lavi.export has written, or "
            "a released vision-language model (a folder of transformers, or a reachable hub name)."
        )
    is_export = (folder / FUSION).is_file()
    model = from_pretrained(folder, trust=trust) if is_export else load_run(folder, trust=trust)[1]
    return model.to(target)


def video_of(recipe: Recipe) -> dict[str, Any] | None:
    """The frames of a video that a recipe names; None: it does not."""
    video: dict[str, Any] | None = (recipe.settings["data"].get("format") or {}).get("video")
    return video


def trained_sampling(folder: str | Path, *, trust: bool = False) -> FrameSampling:
    """The frames of a video that the run of a folder was trained on; the default, if nothing there says."""
    folder = home_path(folder)
    if not (folder / RECIPE).is_file():  # a released model
        return FrameSampling()
    if (folder / FUSION).is_file():  # an export: no whole recipe
        settings = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
        recipe = Recipe({"data": settings.get("data", {})}, {}, str(folder / RECIPE), trusted=trust)
    else:
        recipe = Recipe.load(folder / RECIPE, [], trusted=trust)
    if video_of(recipe) is None:
        return FrameSampling()
    return cast(FrameSampling, recipe.build("data.format.video"))
