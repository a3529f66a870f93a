"""One record format for every measurement: a JSON line. TensorBoard, tables and plots are views of these."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lavi.efficiency.estimate import LARGEST_WAIT, Estimate
from lavi.errors import UserError


@dataclass
class Record:
    """One method at one point: what was counted, and what was measured on the device in use.

    ``text_tokens``, ``visual_tokens``, ``views`` (through the tower) are of one row, everything else of all
    ``batch`` rows. ``flops`` and ``decode_flops``: FLOPs by component, of the prompt and of one token more;
    ``flops_of_samples``: of the prompts of a data set as they were, their mean, and that of their ``floor``.
    ``milliseconds``: stage -> [median, p10, p90], a floor's stages as ``floor_STAGE``; ``turns``: their number;
    ``intervals``: [low, high] of the median. ``ratios``: to ``floor`` and ``concat`` (concatenation in front of the
    same decoder, timed in the same turns), stage -> [median, low, high] of the ratios of each turn. ``waited``: the
    share of the timing in which other processes had the cores. Noisy figures have all of these, too. ``mib``: memory
    by class. ``joules``: of a stage, as a GPU counted them; of its floor likewise.
    ``estimated_mib`` and ``estimated_milliseconds`` (device -> stage): of no device, from the operators' shapes
    (:mod:`lavi.efficiency.estimated`).
    ``accuracy``: percent by group; ``accuracy_intervals``: [low, high] of that (95 %, bootstrap over samples);
    ``controls`` likewise. ``knobs``: what a sweep changed, and whatever else tells records apart. ``error``: why a
    point could not be measured. What was not measured is empty; records of before timing in turns have no turns,
    intervals and ratios.
    ``baseline``: whether it is what savings are against, concatenation of all tokens as a model was released or as its
    recipe has it; None in records of before, whose method says so.
    """

    method: str
    text_tokens: int
    visual_tokens: int
    visual_tokens_in_language: int
    views: int
    batch: int = 1
    baseline: bool | None = None
    flops: dict[str, float] = field(default_factory=dict)
    flops_floor: float = 0.0
    flops_causal_discount: float = 0.0
    decode_flops: dict[str, float] = field(default_factory=dict)
    flops_of_samples: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    waited: float = 0.0
    mib: dict[str, float] = field(default_factory=dict)
    joules: dict[str, float] = field(default_factory=dict)
    estimated_mib: dict[str, float] = field(default_factory=dict)
    estimated_milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    controls: dict[str, dict[str, float]] = field(default_factory=dict)
    accuracy_intervals: dict[str, list[float]] = field(default_factory=dict)
    control_intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    device: str = ""
    dtype: str = ""
    attention: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    seed: int | None = None
    recipe: str = ""

    @property
    def is_baseline(self) -> bool:
        """Whether savings are against it."""
        return self.method == "concat" if self.baseline is None else self.baseline

    @property
    def gflops_language(self) -> float:
        """Billions of FLOPs of all but the vision encoder."""
        return sum(v for k, v in self.flops.items() if k != "vision_encoder") / 1e9

    @property
    def gflops_total(self) -> float:
        return sum(self.flops.values()) / 1e9

    def ratio(self, to: str, stage: str) -> Estimate | None:
        """How many times as long a stage takes as that of ``floor`` or ``concat``; None if they took no turns."""
        if stage not in self.ratios.get(to, {}):
            return None
        median, low, high = self.ratios[to][stage]
        return Estimate(median, low, high, self.turns[stage])

    def time_is_noisy(self, stage: str) -> bool:
        """Whether the milliseconds of a stage say nothing; of records without turns nobody knows."""
        if stage not in self.turns:
            return False
        low, high = self.intervals[stage]
        middle = Estimate(self.milliseconds[stage][0], low, high, self.turns[stage])
        return middle.noisy or self.waited > LARGEST_WAIT

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Record:
        return cls(**json.loads(line))


def write_records(records: Iterable[Record], file: Path) -> None:
    """Append records to a file of JSON lines.

    Raises:
        UserError: it cannot be written.
    """
    lines = [record.to_json() + "\n" for record in records]
    try:
        with open(file, "a") as stream:
            stream.writelines(lines)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): name a file in a folder that can.") from None


def check_writable(file: Path) -> None:
    """Before the work whose records are meant for a file: try to open it.

    Raises:
        UserError: it cannot be written.
    """
    new = not file.exists()
    write_records([], file)
    if new:
        file.unlink()


def read_records(file: Path) -> list[Record]:
    """All records of a file."""
    return [Record.from_json(line) for line in file.read_text().splitlines() if line]


def device_name(device: torch.device) -> str:
    """What was measured on: the GPU's name, or ``CPU`` with its architecture and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


def current_commit() -> str:
    """The commit of the code that measured, if it runs from a checkout; ``+`` marks uncommitted changes."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
