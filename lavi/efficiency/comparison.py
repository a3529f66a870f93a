"""The side-by-side table of runs: accuracy, controls, cost and time, one column a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lavi.efficiency.measure import saving, saving_of_samples
from lavi.efficiency.record import Record

PERPLEXITY_TIMES = ("before", "after")
"""When a language model's perplexity is taken: as its checkpoint has it, and inside what was trained."""

EXACT = "ExactMatch"
"""The metric of records that name none."""

NOT_COUNTED = "not counted"
"""The knob of a record without FLOPs that says why there are none."""


def side_by_side(
    records: Sequence[Record], baseline: Record | Sequence[Record] | None
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the comparison: one column a method, one row a figure.

    Args:
        baseline: what savings are against: one for all records, or one of each.
    """
    baselines = [baseline] * len(records) if isinstance(baseline, Record | None) else list(baseline)

    def row(name: str, cells: Sequence[str]) -> list[str]:
        return [name, *cells]

    rows = []
    metrics = [r.knobs.get("metric", EXACT) for r in records]
    if set(metrics) != {EXACT}:
        rows.append(row("metric", metrics))
    overall = "held-out accuracy" if set(metrics) == {EXACT} else "held-out score"
    for group in sorted({g for r in records for g in r.accuracy}, key=_group_order):
        cells = [score_cell(r.accuracy, r.accuracy_intervals, group) for r in records]
        rows.append(row(f"{_group_name(group, overall)} (%)", cells))
    for control in dict.fromkeys(name for r in records for name in r.controls):
        for group in ("level/easy", "all"):
            if all(group in r.controls.get(control, {}) for r in records):
                cells = [score_cell(r.controls[control], r.control_intervals.get(control, {}), group) for r in records]
                rows.append(row(f"control, {control}: {_group_name(group, overall)} (%)", cells))
    if any("perplexity" in r.knobs for r in records):
        rows += [
            row(f"perplexity on text, {when} training", [perplexity_cell(r, when) for r in records])
            for when in PERPLEXITY_TIMES
        ]
    if len({r.knobs.get("answers") for r in records}) > 1:
        rows.append(row("answers scored", [str(r.knobs.get("answers", "")) for r in records]))
    rows.append(row("visual tokens in the language model", [str(r.visual_tokens_in_language) for r in records]))
    rows += [row(*cells) for cells in _flops_rows(records, baselines)]
    rows += [row(*cells) for cells in rows_over_samples(records, baselines)]
    for stage in ("vision_encoder", "prefill", "decode", "floor_prefill", "floor_decode"):
        if any(stage in r.milliseconds for r in records):
            rows.append(row(f"ms {stage.replace('_', ' ')}, median (p10-p90)", [time_cell(r, stage) for r in records]))
    for to, what in (("floor", "the floor"), ("concat", "concatenation")):
        for stage in ("vision_encoder", "first_token", "prefill", "decode"):
            if any(r.ratio(to, stage) for r in records):
                label = f"{stage.replace('_', ' ')}, times {what} (interval)"
                rows.append(row(label, [ratio_cell(r, to, stage) for r in records]))
    rows.append(row("peak MiB above weights", [f"{r.mib['peak']:.2f}" if "peak" in r.mib else "-" for r in records]))
    if any(r.error for r in records):
        rows.append(row("not measured", [r.error or "-" for r in records]))
    alone = [str(r.knobs.get("timed alone", "-")) for r in records]
    if any(reason != "-" for reason in alone):
        rows.append(row("timed alone", alone))
    methods = [r.method for r in records]
    names = methods if len(set(methods)) == len(methods) else [str(r.knobs.get("run", r.method)) for r in records]
    return ["", *names], rows


def _flops_rows(records: Sequence[Record], baselines: Sequence[Record | None]) -> list[tuple[str, list[str]]]:
    """Rows of one prompt; none where no record has FLOPs."""
    if not any(record.flops for record in records):
        return []
    without = [f"{record.gflops_language:.4f}" if record.flops else "-" for record in records]
    total = [f"{record.gflops_total:.4f}" if record.flops else "-" for record in records]
    rows = [("GFLOPs, without vision encoder", without), ("GFLOPs, with vision encoder", total)]
    for with_vision, name in ((False, "without"), (True, "with")):
        pairs = [
            saving(record, base, with_vision=with_vision) if base is not None and record.flops and base.flops else None
            for record, base in zip(records, baselines, strict=True)
        ]
        if any(pairs):
            rows.append((f"saved, {name} vision encoder (%)", [f"{pair[0]:.1f}" if pair else "-" for pair in pairs]))
            ceilings = [f"{pair[1]:.1f}" if pair else "-" for pair in pairs]
            rows.append(("  ceiling of that: fusion at no cost (%)", ceilings))
    return rows


def rows_over_samples(records: Sequence[Record], baselines: Sequence[Record | None]) -> list[tuple[str, list[str]]]:
    """Rows of the mean over the prompts of a data set, each of its own size; none where a counted record has none."""
    means = [record.flops_of_samples for record in records]
    if not any(means) or not all(mean for mean, record in zip(means, records, strict=True) if record.flops):
        return []
    what = "mean over samples of at most one image"
    rows = []
    for left_out, name in ((("floor", "vision_encoder"), "without"), (("floor",), "with")):
        sums = [sum(value for part, value in mean.items() if part not in left_out) / 1e9 for mean in means]
        cells = [f"{value:.4f}" if mean else "-" for value, mean in zip(sums, means, strict=True)]
        rows.append((f"GFLOPs, {what}, {name} vision encoder", cells))
    for with_vision, name in ((False, "without"), (True, "with")):
        saved = [
            saving_of_samples(record, base, with_vision=with_vision)[0]
            if base is not None and record.flops_of_samples and base.flops_of_samples
            else None
            for record, base in zip(records, baselines, strict=True)
        ]
        if any(value is not None for value in saved):
            cells = ["-" if value is None else f"{value:.1f}" for value in saved]
            rows.append((f"saved, {what}, {name} vision encoder (%)", cells))
    return rows


def uncounted_note(name: str, record: Record, twin: Record) -> str:
    """A line on why a run has no FLOPs, or saves none; empty where it has both."""
    if why := record.knobs.get(NOT_COUNTED):
        return f"{name} has no FLOPs: {why}"
    why = twin.knobs.get(NOT_COUNTED)
    return f"{name} saves nothing that could be counted, since it has no twin that concatenates: {why}" if why else ""


def score_cell(scores: Mapping[str, float], intervals: Mapping[str, Sequence[float]], group: str) -> str:
    """Percent of a group, with its interval where the record has one."""
    percent = f"{scores.get(group, float('nan')):.1f}"
    return "{} ({:.1f}-{:.1f})".format(percent, *intervals[group]) if group in intervals else percent


def perplexity_cell(record: Record, when: str) -> str:
    """The perplexity of a record's language model on text without images."""
    return f"{record.knobs['perplexity'][when]:.4f}" if "perplexity" in record.knobs else "-"


def time_cell(record: Record, stage: str) -> str:
    """Milliseconds of a stage, with their spread."""
    if stage not in record.milliseconds:
        return "-"
    return "noisy" if record.time_is_noisy(stage) else "{:.2f} ({:.2f}-{:.2f})".format(*record.milliseconds[stage])


def ratio_cell(record: Record, to: str, stage: str) -> str:
    """How many times as long as the floor's or concatenation's a stage takes, with the interval of that."""
    ratio = record.ratio(to, stage)
    if ratio is None:
        return "-"
    return "noisy" if ratio.noisy else f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _group_order(group: str) -> tuple[int, str]:
    return {"all": 0, "level": 1}.get(group.split("/")[0], 2), group


def _group_name(group: str, overall: str) -> str:
    return overall if group == "all" else group.split("/")[-1].replace("_", " ")
