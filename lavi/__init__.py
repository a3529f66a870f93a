"""lavi: efficient vision-language models, and what they honestly cost.

    import lavi

    model = lavi.load("runs/quickstart")              # a run folder, or an exported one
    model.ask("what colour is the circle?", image)    # PIL images, or lavi.Video

What is named here is imported when it is first used: ``import lavi`` alone loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavi.batch import Batch, Sample, Video
    from lavi.chatting.conversation import Conversation
    from lavi.checkpoints.load import load
    from lavi.checkpoints.model_folder import save_pretrained
    from lavi.errors import UserError
    from lavi.model import VisionLanguageModel
    from lavi.recipe import Recipe

__version__ = "0.1.0"

_HOMES = {
    "Batch": "lavi.batch",
    "Conversation": "lavi.chatting.conversation",
    "Recipe": "lavi.recipe",
    "Sample": "lavi.batch",
    "UserError": "lavi.errors",
    "Video": "lavi.batch",
    "VisionLanguageModel": "lavi.model",
    "load": "lavi.checkpoints.load",
    "save_pretrained": "lavi.checkpoints.model_folder",
}
"""The module of each name."""

__all__ = [
    "Batch",
    "Conversation",
    "Recipe",
    "Sample",
    "UserError",
    "Video",
    "VisionLanguageModel",
    "__version__",
    "load",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lavi' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
