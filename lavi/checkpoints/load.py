"""A trained model from whatever folder holds one: a run, or an export."""

from __future__ import annotations

from pathlib import Path

import torch

from lavi.checkpoints.model_folder import FUSION, from_pretrained
from lavi.checkpoints.run_folder import load_run
from lavi.config.paths import home_path
from lavi.model import VisionLanguageModel


def load(folder: str | Path, *, device: str | torch.device = "cpu", trust: bool = False) -> VisionLanguageModel:
    """The model of a run folder (``lavi.fit``) or of an exported one (``lavi.export``), ready to answer.

    Args:
        device: where its weights go.
        trust: build whatever the folder's recipe names, not only classes of known packages.

    Raises:
        UserError: no such folder, or one that holds no trained model.
    """
    folder = home_path(folder)
    is_export = (folder / FUSION).is_file()
    model = from_pretrained(folder, trust=trust) if is_export else load_run(folder, trust=trust)[1]
    return model.to(device)
