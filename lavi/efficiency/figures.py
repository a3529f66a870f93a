"""Records as tables for the terminal, as a spreadsheet, and as curves: drawn and in TensorBoard."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lavi.efficiency.comparison import ratio_cell, time_cell
from lavi.efficiency.estimate import NOTE
from lavi.efficiency.hardware import fits_in
from lavi.efficiency.measure import saving
from lavi.efficiency.record import Record
from lavi.report import table

UNIT = "1 multiply-add = 2 FLOPs (MACs are half)"

COUNTED = {
    "GFLOPs with vision encoder": "the prompt",
    "GFLOPs without vision encoder": "the prompt",
    "MFLOPs of one more token": "decoding",
}
MEASURED = {
    "ms to the first token": "median",
    "ms of one more token": "median",
    "first token, times the floor": "median of the turns' ratios",
    "one more token, times the floor": "median of the turns' ratios",
    "first token, times concatenation": "median of the turns' ratios",
    "one more token, times concatenation": "median of the turns' ratios",
    "peak MiB above weights": "tower and prompt",
}
CURVES = COUNTED | MEASURED
"""The curves, and what each is of."""

FLOOR = "bare language model"

STAGES = {"ms to the first token": "first_token", "ms of one more token": "decode"}
"""The curves that are times, and the stage each is of."""

RATIOS = {
    "first token, times the floor": ("floor", "first_token"),
    "one more token, times the floor": ("floor", "decode"),
    "first token, times concatenation": ("concat", "first_token"),
    "one more token, times concatenation": ("concat", "decode"),
}
"""The curves that are ratios of times: to what, and of which stage."""

SPREAD = ("low", "high")
"""Ends of what is drawn around a curve: the 10th and 90th percentile of times, the interval of a ratio."""


def line_name(record: Record) -> str:
    """The name of the line that a record is a point of."""
    return str(record.knobs.get("name", record.method))


def point_of(record: Record) -> tuple[Any, ...]:
    """Knob and value of a record: records of one point are compared with each other."""
    return record.knobs.get("knob"), json.dumps(record.knobs.get("value", record.visual_tokens))


def baselines(records: Sequence[Record]) -> dict[tuple[Any, ...], Record]:
    """The first concatenation record of each point."""
    concat: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if record.is_baseline:
            concat.setdefault(point_of(record), record)
    return concat


def curve_values(record: Record) -> dict[str, float | None]:
    """The value of a record on each curve; None where it was not measured, or is noisy."""
    return {
        "GFLOPs with vision encoder": record.gflops_total,
        "GFLOPs without vision encoder": record.gflops_language,
        "MFLOPs of one more token": sum(record.decode_flops.values()) / 1e6 if record.decode_flops else None,
        **{curve: _time(record, stage) for curve, stage in STAGES.items()},
        **{curve: _ratio(record, *of) for curve, of in RATIOS.items()},
        "peak MiB above weights": record.mib.get("peak"),
    }


def floor_values(record: Record) -> dict[str, float | None]:
    """The values of the bare language model on the text alone, behind the same tower."""
    language, vision = record.flops_floor / 1e9, record.flops.get("vision_encoder", 0.0) / 1e9
    return {
        "GFLOPs with vision encoder": language + vision,
        "GFLOPs without vision encoder": language,
        "MFLOPs of one more token": _floor_of_decoding(record),
        **{curve: _time(record, f"floor_{stage}") for curve, stage in STAGES.items()},
        **{curve: 1.0 if to == "floor" and record.ratio(to, stage) else None for curve, (to, stage) in RATIOS.items()},
        "peak MiB above weights": None,
    }


def _time(record: Record, stage: str) -> float | None:
    if stage not in record.milliseconds or record.time_is_noisy(stage):
        return None
    return record.milliseconds[stage][0]


def _ratio(record: Record, to: str, stage: str) -> float | None:
    ratio = record.ratio(to, stage)
    return None if ratio is None or ratio.noisy else ratio.median


def _floor_of_decoding(record: Record) -> float | None:
    parts = [
        record.decode_flops[part] for part in ("text_attention", "text_ffn", "head") if part in record.decode_flops
    ]
    return sum(parts) / 1e6 if parts else None


# --- on the terminal --------------------------------------------------------------------------------------------------


def sweep_tables(records: Sequence[Record]) -> list[Table]:
    """:func:`sweep_rows`, :func:`estimated_rows` and, of what was timed, :func:`turns_rows` for the terminal."""
    if not records:
        return []
    tables = [table(sweep_title(records), *sweep_rows(records))]
    if any(record.estimated_mib for record in records):
        tables.append(table(ESTIMATED, *estimated_rows(records)))
    columns, rows = turns_rows(records)
    return [*tables, table(f"{NOTE} {waiting_note(records)}".strip(), columns, rows)] if rows else tables


def sweep_title(records: Sequence[Record]) -> str:
    """The prompt, the unit and the device of the figures."""
    device = next((record.device for record in records if record.device), "counted, not timed")
    return f"{records[0].text_tokens} text tokens, batch {records[0].batch}; {UNIT}; attention in full; {device}"


def sweep_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns, and one row a record: what it costs, what it saves against concatenation, and the ceiling of that."""
    base = baselines(records)
    large = max(record.gflops_total for record in records) >= 1000
    scale, unit = (1e3, "TFLOPs") if large else (1.0, "GFLOPs")
    timed = any(record.milliseconds or record.error for record in records)
    columns = ["", "method", "crops", "visual tokens", "in the LM", f"vision {unit}", f"LM {unit}"]
    columns += ["saved % (ceiling)", f"all {unit}", "saved % (ceiling)", "MFLOPs a token"]
    columns += ["ms first token", "ms a token", "peak MiB"] if timed else []
    rows = []
    for record in records:
        twin = base.get(point_of(record))
        saved = [_saved(record, twin, with_vision=with_vision) for with_vision in (False, True)]
        values = curve_values(record)
        row = [*_label(record), str(record.views)]
        row += [f"{record.visual_tokens:,}", f"{record.visual_tokens_in_language:,}"]
        row += [_short(record.flops["vision_encoder"] / 1e9 / scale), _short(record.gflops_language / scale), saved[0]]
        row += [_short(record.gflops_total / scale), saved[1], _short(values["MFLOPs of one more token"])]
        if timed:
            for curve, stage in STAGES.items():
                row.append("noisy" if record.time_is_noisy(stage) else _short(values[curve]))
            row += [record.error or _short(values["peak MiB above weights"])]
        rows.append(row)
    return columns, rows


ESTIMATED = (
    "Estimated from the operators' shapes: nothing was measured. Memory: storages, and no allocator's gaps; time: a "
    "roofline, eager, one operator behind the other"
)


def estimated_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns, and one row a record: the memory it would need, the smallest GPU that has it, its times on devices."""
    devices = list(dict.fromkeys(name for record in records for name in record.estimated_milliseconds))
    columns = ["", "method", "decoder in", "weights GiB", "MiB above weights", "fits in"]
    columns += [f"{stage} {name}" for name in devices for stage in ("ms first token", "ms a token")]
    rows = []
    for record in records:
        mib = record.estimated_mib
        if not mib:
            continue
        row = [*_label(record), record.dtype, f"{mib['weights'] / 1024:.2f}", f"{mib['peak']:.0f}"]
        row.append(fits_in(mib["weights"] + mib["peak"]))
        times = [record.estimated_milliseconds[name] for name in devices]
        row += [_short(of[stage]) for of in times for stage in ("first_token", "decode")]
        rows.append(row)
    return columns, rows


def turns_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns, and one row for each stage of a record that was timed in turns: its spread, and what it is compared with
    the floor and with concatenation."""
    columns = ["", "method", "stage", "ms (p10-p90)", "times the floor", "times concatenation", "turns"]
    rows = []
    for record in records:
        for stage in STAGES.values():
            if stage in record.turns:
                ratios = [ratio_cell(record, to, stage) for to in ("floor", "concat")]
                cells = [stage.replace("_", " "), time_cell(record, stage), *ratios, str(record.turns[stage])]
                rows.append([*_label(record), *cells])
    return columns, rows


def waiting_note(records: Sequence[Record]) -> str:
    """A sentence on how busy the machine was with other processes; empty if it was not."""
    share = max((record.waited for record in records), default=0.0)
    return f"Other processes had the cores for up to {share:.0%} of the time." if share >= 0.05 else ""


def _label(record: Record) -> list[str]:
    """The first cells of a row: scenario and line."""
    return [str(record.knobs.get("scenario", f"{record.visual_tokens} visual tokens")), line_name(record)]


def _saved(record: Record, base: Record | None, *, with_vision: bool) -> str:
    if base is None:
        return "-"
    saved, ceiling = saving(record, base, with_vision=with_vision)
    return f"{saved:.1f} ({ceiling:.1f})"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


# --- in files ---------------------------------------------------------------------------------------------------------


def write_csv(records: Sequence[Record], file: Path) -> None:
    """One row a record, one column a figure; FLOPs by component, and MACs beside their totals.

    Noisy figures stand there, too; their columns are named under ``noisy``.
    """
    rows = []
    for record in records:
        row: dict[str, Any] = {
            "name": line_name(record),
            "method": record.method,
            "scenario": record.knobs.get("scenario", ""),
        }
        row |= {key: getattr(record, key) for key in ("text_tokens", "batch", "views", "visual_tokens")}
        row["visual_tokens_in_language"] = record.visual_tokens_in_language
        row |= {f"flops {part}": value for part, value in record.flops.items()}
        row |= {
            "flops": record.gflops_total * 1e9,
            "macs": record.gflops_total * 1e9 / 2,
            "flops floor": record.flops_floor,
        }
        row |= {f"decode flops {part}": value for part, value in record.decode_flops.items()}
        row |= {f"ms {stage}": times[0] for stage, times in record.milliseconds.items()}
        for to, ratios in record.ratios.items():
            for stage, ends in ratios.items():
                row |= {f"{stage} / {to}{end}": value for end, value in zip(("", " low", " high"), ends, strict=True)}
        row |= {f"MiB {kind}": value for kind, value in record.mib.items()} | {"noisy": "; ".join(_noisy(record))}
        row |= {f"joules {stage}": value for stage, value in record.joules.items()}
        row |= {f"estimated MiB {kind}": value for kind, value in record.estimated_mib.items()}
        for name, times_of_device in record.estimated_milliseconds.items():
            row |= {f"estimated ms {stage} {name}": value for stage, value in times_of_device.items()}
        rows.append(row | {key: getattr(record, key) for key in ("error", "device", "dtype", "attention", "recipe")})
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)


def _noisy(record: Record) -> list[str]:
    """The columns of a record's noisy figures."""
    ratios = [(to, stage) for to, stages in record.ratios.items() for stage in stages]
    times = [f"ms {stage}" for stage in record.turns if record.time_is_noisy(stage)]
    return times + [f"{stage} / {to}" for to, stage in ratios if (it := record.ratio(to, stage)) and it.noisy]


def draw_curves(records: Sequence[Record], file: Path) -> None:
    """The curves of one sweep: a line a method, the bare language model dashed below them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _lines(records)
    panels = [curve for curve in CURVES if any(y is not None for points in lines.values() for _, y in points[curve])]
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(5 * min(3, len(panels)), 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    labels = {x_value(record): _tick(record) for record in records}
    for number, curve in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, min(3, len(panels)), number)
        for line, points in lines.items():
            drawn = [(x, y) for x, y in points[curve] if y is not None]
            style = {"linestyle": "--", "color": "black"} if line == FLOOR else {"marker": "o"}
            axes.plot([x for x, _ in drawn], [y for _, y in drawn], label=line, **style)  # type: ignore[arg-type]
        axes.set_title(f"{curve} ({CURVES[curve]})", fontsize=10)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yscale("log")
        axes.set_xticks(list(labels), list(labels.values()), fontsize=7, rotation=45)
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_xlabel(str(records[0].knobs.get("knob", "visual tokens")))
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{records[0].text_tokens} text tokens; {UNIT}", fontsize=9)
    figure.savefig(file, dpi=110)


def _lines(records: Sequence[Record]) -> dict[str, dict[str, list[tuple[float, float | None]]]]:
    """Each line's points of each curve, in the order of x; the floor is that of the first method's own parts."""
    lines: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    of_floor = _floor_of(records)
    for record in sorted(records, key=x_value):
        of = [(line_name(record), curve_values(record))]
        if line_name(record) == of_floor:
            of.append((FLOOR, floor_values(record)))
        for line, values in of:
            points = lines.setdefault(line, {curve: [] for curve in CURVES})
            for curve, value in values.items():
                points[curve].append((x_value(record), value))
    return lines


def _floor_of(records: Sequence[Record]) -> str | None:
    """The line whose floor is drawn; None: there is the baseline alone."""
    return next((line_name(record) for record in records if not record.is_baseline), None)


def x_value(record: Record) -> float:
    """The x of a record: its knob's value; of an image, the side of a square of the same area; of a value that is no
    number, its position in the sweep."""
    value = record.knobs.get("value", record.visual_tokens)
    if record.knobs.get("knob") == "image":
        return math.sqrt(value[0] * value[1])
    return float(value) if isinstance(value, int | float) else float(record.knobs.get("position", 0))


def _tick(record: Record) -> str:
    value = record.knobs.get("value", record.visual_tokens)
    return "x".join(map(str, value)) if record.knobs.get("knob") == "image" else str(value)


# --- in TensorBoard ---------------------------------------------------------------------------------------------------


def write_curves(records: Sequence[Record], folder: Path, curves: Iterable[str] = CURVES) -> None:
    """One TensorBoard run a line, so that they overlay; x is the knob. A layout shows all curves on one page.

    The page draws them with their spread (10th to 90th percentile of a time, the interval of a ratio): TensorBoard
    smooths every other chart, and a smoothed curve of a few points is a wrong one. What is noisy is left out.
    """
    from torch.utils.tensorboard import SummaryWriter

    if not records:
        return
    knob = records[0].knobs.get("knob", "visual_tokens")
    title = f"efficiency over {knob}"
    layout = {
        curve: ["Margin", [f"{title}/{curve}", *(f"{title}, {end}/{curve}" for end in SPREAD)]]
        if curve in STAGES or curve in RATIOS
        else ["Margin", [f"{title}/{curve}"] * 3]
        for curve in CURVES
    }
    for line, points in _lines(records).items():
        with SummaryWriter(str(folder / f"efficiency-{line.replace(' ', '-')}")) as writer:
            for curve in curves:
                for x, value in points[curve]:
                    if value is not None:
                        writer.add_scalar(f"{title}/{curve}", value, round(x))
                for at, end in enumerate(SPREAD, start=1):
                    for x, value in _spread(records, line, curve, at):
                        writer.add_scalar(f"{title}, {end}/{curve}", value, round(x))
            writer.add_custom_scalars({title: layout})


def _spread(records: Sequence[Record], line: str, curve: str, at: int) -> list[tuple[float, float]]:
    """The lower (``at`` 1) or upper (2) end of what is drawn around a curve."""
    points = []
    name = _floor_of(records) if line == FLOOR else line
    for record in sorted(records, key=x_value):
        if line_name(record) != name or (floor_values if line == FLOOR else curve_values)(record)[curve] is None:
            continue
        if curve in STAGES:
            stage = STAGES[curve]
            points.append((x_value(record), record.milliseconds[f"floor_{stage}" if line == FLOOR else stage][at]))
        elif curve in RATIOS:
            to, stage = RATIOS[curve]
            points.append((x_value(record), 1.0 if line == FLOOR else record.ratios[to][stage][at]))
    return points


def write_savings(records: Sequence[Record], folder: Path) -> None:
    """What each method saves at the largest point it shares with the baseline, as hyperparameters: runs sort by it."""
    from torch.utils.tensorboard import SummaryWriter

    base = baselines(records)
    for line in dict.fromkeys(map(line_name, records)):
        shared = [record for record in records if line_name(record) == line and point_of(record) in base]
        if not shared:
            continue
        last = max(shared, key=x_value)
        saved = {
            f"saved %/{kind} vision encoder": saving(last, base[point_of(last)], with_vision=kind == "with")[0]
            for kind in ("with", "without")
        }
        what: dict[str, Any] = {
            "method": last.method,
            "recipe": last.recipe,
            "scenario": last.knobs.get("scenario", ""),
        }
        with SummaryWriter(str(folder / f"efficiency-{line.replace(' ', '-')}")) as writer:
            writer.add_hparams(what, saved, run_name=".")
