"""Configurations of published checkpoints, without their weights: what models are counted from.

A folder of ``configurations`` is named as the checkpoint is on the hub and holds its ``config.json`` (what of it
decides shapes; of a two-tower model, its vision tower's) and ``preprocessor_config.json``. Where no weights are wanted,
the loading code reads these instead of asking the hub, so that a recipe of a published pair is counted, or timed with
random weights, without a network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavi.errors import UserError
from lavi.loading.without_weights import weights_wanted

CONFIGURATIONS = Path(__file__).parent / "configurations"


def check_loaded(loading_info: Mapping[str, Any], source: str, what: str) -> None:
    """That the checkpoint ``source`` had every weight of ``what``; transformers draws at random what it does not find.

    Args:
        loading_info: transformers' ``output_loading_info``, with ``ignore_mismatched_sizes``.

    Raises:
        UserError: weights are missing, or have other shapes than the configuration says.
    """
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(
            f"the checkpoint at '{source}' lacks {len(missing)} weights of its {what} ({missing[0]} ...): give the "
            "folder of a whole one."
        )
    for name, there, here in sorted(loading_info["mismatched_keys"]):
        raise UserError(
            f"the weights at '{source}' do not fit its config.json: {name} of the {what} has shape {list(there)} in "
            f"the one, and {list(here)} by the other."
        )


def configuration_of(source: str) -> str:
    """Where to read the configuration of the checkpoint ``source``: from here, if no weights are wanted.

    No shell expands the ``~`` of a recipe.
    """
    folder = CONFIGURATIONS / source
    here = not weights_wanted() and (folder / "config.json").is_file()
    return str(folder) if here else os.path.expanduser(source)
