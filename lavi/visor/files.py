"""What VISOR's offline steps leave for its training: viable configurations and labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavi.errors import UserError

Configuration = tuple[int, ...]
"""The layers that refine the visual tokens, ascending."""


class Label(NamedTuple):
    """What one sample needs: the number of a viable configuration; and how many tokens of text it had, if known."""

    number: int
    tokens: int | None


def read_viable(file: Path) -> list[list[int]]:
    """The viable configurations that :func:`lavi.visor.offline.search` wrote.

    Raises:
        UserError: there is no such file, or it is not finished.
    """
    if not file.exists():
        raise UserError(f"there is no file {file}: make it with python -m lavi.visor search.")
    content = read_json(file, "the scores of a search")
    if "viable" not in content:
        raise UserError(f"the search in {file} is not finished: run python -m lavi.visor search once more, it goes on.")
    return list(content["viable"])


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        UserError: it holds none.
    """
    try:
        content = json.loads(file.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold {what}, and is left as it is: name another file.")
    return content


def read_labels(file: Path, viable: Sequence[Configuration]) -> dict[str, Label]:
    """The labels of a file of JSON lines, by the keys of the samples.

    Raises:
        UserError: there is no such file, or it speaks of other configurations.
    """
    if not file.exists():
        raise UserError(f"there is no file {file} of labels: make it with python -m lavi.visor label.")
    numbers = {configuration: number for number, configuration in enumerate(viable)}
    labels = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(
                f"{file}, line {number} is cut off: run python -m lavi.visor label once more, it goes on there."
            ) from None
        if "key" not in record:  # the header
            continue
        configuration = tuple(record["configuration"])
        if configuration not in numbers:
            raise UserError(
                f"{file} labels sample {record['key']} with layers {list(configuration)}, which is not viable here."
            )
        labels[record["key"]] = Label(numbers[configuration], record.get("tokens"))
    return labels
