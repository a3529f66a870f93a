"""Write the tables of the README and of docs/ from benchmarks/results, so that no figure in them is typed by hand.

    python benchmarks/tables.py            rewrite README.md, CONTRIBUTING.md and docs/
    python benchmarks/tables.py --check    fail if it would change

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a file of records in benchmarks/results,
or NAME.VIEW where there are several tables of one file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import Any

from busy import busy_table
from cached_features import cached_features_table
from changes import changes_table
from compare import LAB, claims_table, compare_table
from compare import speed_table as compare_speed_table
from dataloader import table as dataloader_table
from decode import decode_table
from encoder import encoder_table
from estimates import estimates_table
from generator_cost import generator_table
from grid_code import grid_code_table
from hybrids import hybrids_table
from lab_results import DATA, controls_table, encoder_cost_table, lab_table, records_of
from norm import norm_table
from official_metrics import metrics_table
from prefill import prefill_table
from relevance import relevance_table
from serving import serving_table
from train_step import train_step_table
from verify_claims import estimated_tables, flops_table, speed_table

from lavi.cli.arguments import Parser
from lavi.cli.entry import cli_entry_point
from lavi.efficiency.comparison import side_by_side
from lavi.efficiency.estimate import NOTE
from lavi.efficiency.figures import sweep_rows, sweep_title, turns_rows, waiting_note
from lavi.efficiency.record import Record, read_records
from lavi.report import markdown

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def comparison(records: list[Record]) -> str:
    """The side-by-side table of an evaluation, and what it was measured on."""
    baseline = next((record for record in records if record.is_baseline), None)
    columns, rows = side_by_side(records, baseline)
    record = records[0]
    views = f" and {record.views} views" if record.views > 1 else ""
    note = (
        f"{record.knobs['test_samples']} test samples; one prompt of {record.text_tokens} text tokens{views}, batch 1; "
        f"1 multiply-add = 2 FLOPs; {record.device}, {record.dtype}, {record.attention}, "
        f"torch {record.versions['torch']}."
    )
    return f"{markdown(columns, rows)}\n{' '.join([note, *of_turns(records)])}\n"


def of_turns(records: list[Record]) -> list[str]:
    """What stands below times that were taken in turns."""
    return [NOTE, *filter(None, [waiting_note(records)])] if any(record.turns for record in records) else []


def generators(records: list[Record]) -> str:
    """What each delta generator adds."""
    return markdown(*generator_table(records))


def grid_code(records: list[Record]) -> str:
    """What each way of telling where a token lies is worth."""
    note = (
        f"{records[0].knobs['test_scenes']:,} test scenes; one figure for each seed. {records[0].knobs['steps']} steps "
        "of training, from scratch."
    )
    return f"{markdown(*grid_code_table(records))}\n{note}\n"


ROWS_OF_QUICKSTART = (
    "easy (%)",
    "hard (%)",
    "saved, without vision encoder (%)",
    "first token, times concatenation (interval)",
    "decode, times concatenation (interval)",
)
"""The rows of the quickstart's comparison that the README shows."""
ROWS_OF_REAL = (
    "name (%)",
    "hard (%)",
    "saved, without vision encoder (%)",
)
"""Those of the comparison on real parts."""


def short_comparison(records: list[Record], names: Container[str]) -> str:
    """The rows of :func:`comparison` with these names."""
    baseline = next((record for record in records if record.is_baseline), None)
    columns, rows = side_by_side(records, baseline)
    return markdown(columns, [row for row in rows if row[0] in names])


def short_claims(records: list[Record]) -> str:
    """Of :func:`claims` a large image and a video, with the savings alone."""
    columns, rows = flops_table(counted_alone(records))
    kept = [number for number, column in enumerate(columns) if number < 2 or "saved" in column]
    chosen = [row for row in rows if row[0] in ("1024x1024", "32 frames")]
    return markdown([columns[number] for number in kept], [[row[number] for number in kept] for row in chosen])


def claims(records: list[Record]) -> str:
    """What LaVi-7B saves against LLaVA-OneVision-7B."""
    return markdown(*flops_table(counted_alone(records)))


def counted_alone(records: list[Record]) -> list[Record]:
    """The records of FLOPs, without those of time and memory."""
    return [record for record in records if not record.knobs.keys() & {"timed", "estimated"}]


def estimated(records: list[Record], *, number: int) -> str:
    """Time (0) or memory (1) of the two, estimated."""
    if not any("estimated" in record.knobs for record in records):
        return "Not estimated yet.\n"
    return markdown(*estimated_tables(records)[number])


def speed(records: list[Record]) -> str:
    """What was measured of the two."""
    timed = [record for record in records if record.knobs.get("timed")]
    note = f"Medians. {timed[0].device}, {timed[0].dtype}, {timed[0].attention}, torch {timed[0].versions['torch']}."
    return f"{markdown(*speed_table(timed))}\n{' '.join([note, *of_turns(timed)])}\n"


def compared(records: list[Record]) -> str:
    """All methods against LLaVA-OneVision-0.5B."""
    return markdown(*compare_table(records, read_records(LAB)))


def compared_speed(records: list[Record]) -> str:
    """The same on the clock."""
    timed = [record for record in records if record.milliseconds]
    what = "Small models (a decoder of 24 layers)" if timed[0].knobs["timed"] == "small" else "Full size"
    note = (
        f"{what} at {timed[0].knobs['scenario']}, medians. {timed[0].device}, {timed[0].dtype}, {timed[0].attention}."
    )
    return f"{markdown(*compare_speed_table(timed))}\n{' '.join([note, *of_turns(timed)])}\n"


SCENES_HARD = DATA["scenes"].hard
"""The hard question families of the scenes."""


def visor_scenes(records: list[Record]) -> str:
    """What VISOR reached on the scenes: accuracy beside what it costs."""
    columns = [
        "",
        "easy %",
        "hard %",
        *(f"{family} %" for family in SCENES_HARD),
        "GFLOPs without encoder",
        "of concat %",
    ]
    base = next(record for record in records if record.is_baseline)
    rows = []
    for record in records:
        scores = [record.accuracy.get(group, float("nan")) for group in ("level/easy", "level/hard")]
        scores += [record.accuracy.get(f"family/{family}", float("nan")) for family in SCENES_HARD]
        cost = [f"{record.gflops_language:.4f}", f"{100 * record.gflops_language / base.gflops_language:.0f}"]
        rows.append([str(record.knobs["name"]), *(f"{score:.1f}" for score in scores), *cost])
    return f"{markdown(columns, rows)}\n{base.knobs['test_samples']} test samples.\n"


NOT_YET = "Not measured yet.\n"
"""In the place of a table whose records are not there."""
IN_README = 2
"""Questions about the picture that a README shows."""


def one_cell(answer: str) -> str:
    """An answer as a cell of a table."""
    return " ".join(answer.split()).replace("|", "\\|")


def shown(records: list[Record]) -> str:
    """What trained models answered about the picture of docs/."""
    columns = ["question", *(record.method.replace("_", "-") for record in records), "true"]
    asked = [record.knobs["shown"] for record in records]
    rows = [[row[0][0], *(one_cell(answer) for _, answer, _ in row), row[0][2]] for row in zip(*asked, strict=True)]
    return markdown(columns, rows)


def shown_short(records: list[Record]) -> str:
    """The first of these questions, and LaVi's answers alone."""
    lavi = next(record for record in records if record.method == "lavi")
    rows = [[question, one_cell(answer)] for question, answer, _ in lavi.knobs["shown"][:IN_README]]
    return markdown(["question", "LaVi's answer"], rows)


def sweep(records: list[Record]) -> str:
    """A sweep, as ``lavi.profile`` shows it."""
    columns, rows = turns_rows(records)
    turns = f"\n{markdown(columns, rows)}" if rows else ""
    return f"{markdown(*sweep_rows(records))}{turns}\n{' '.join([f'{sweep_title(records)}.', *of_turns(records)])}\n"


def busy(records: list[Record]) -> str:
    """The same ratios on a quiet and on a busy machine."""
    return f"{markdown(*busy_table(records))}\n{records[0].device}. {NOTE}\n"


def noticed_mutants(modules: list[dict[str, Any]]) -> str:
    """How many of the faults that ``make mutants`` plants the tests notice."""
    mutants, survived, equivalent = (
        sum(module[name] for module in modules) for name in ("mutants", "survived", "equivalent")
    )
    noticed = 100 * (1 - survived / (mutants - equivalent))
    lowest = min(module["percent"] for module in modules)
    return (
        f"Of {mutants - equivalent:,} such faults in {len(modules)} modules, {noticed:.1f} % are noticed, and in no "
        f"module fewer than {lowest:.1f} %.\n"
    )


def lab(records: list[Record], *data: str, of: Callable[[list[Record]], tuple[list[str], list[list[str]]]]) -> str:
    """What fusions reached in the lab on scenes, on large ones or on videos."""
    chosen = records_of(records, *data)
    return markdown(*of(chosen)) if chosen else NOT_YET


def encoder_cost(records: list[Record], *, data: str) -> str:
    """What smaller encoders of a method cost in the lab."""
    return markdown(*encoder_cost_table(records, data)) if records_of(records, data) else NOT_YET


LAB_SHORT = ("method", "seeds", "easy %", "hard %", "saved %")
LAB_WHOLE_ONLY = ("concatenation, newlines", "concatenation, images numbered")
"""What only the whole table has."""


def short_lab(records: list[Record]) -> str:
    """The lab's scenes in few columns: methods that had all their steps."""
    whole = [record for record in records_of(records, "scenes") if record.knobs["share"] == 1.0]
    chosen = [record for record in whole if record.knobs["method"] not in LAB_WHOLE_ONLY]
    if not chosen:
        return NOT_YET
    columns, rows = lab_table(chosen)
    numbers = [columns.index(name) for name in LAB_SHORT]
    return markdown([*LAB_SHORT], [[row[number] for number in numbers] for row in rows])


OWN_RECORDS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "dataloader": dataloader_table,
    "mutants": noticed_mutants,
    "cached_features": lambda records: f"{markdown(*cached_features_table(records))}\n{records[0]['device']}.\n",
    "estimates": lambda records: f"{markdown(*estimates_table(records))}\n{records[-1]['device']}.\n",
    "decode": lambda records: f"{markdown(*decode_table(records))}\n{records[0]['device']}.\n",
    "prefill": lambda records: f"{markdown(*prefill_table(records))}\n{records[0]['device']}.\n",
    "official_metrics": lambda records: f"{markdown(*metrics_table(records))}\nlmms-eval {records[0]['lmms-eval']}.\n",
    "relevance": lambda records: markdown(*relevance_table(records)),
    "encoder": lambda records: f"{markdown(*encoder_table(records))}\n{records[0]['device']}.\n",
    "norm": lambda records: f"{markdown(*norm_table(records))}\n{records[0]['device']}.\n",
    "serving": lambda records: f"{markdown(*serving_table(records))}\n{records[0]['device']}.\n",
    "train_step": lambda records: f"{markdown(*train_step_table(records))}\n{records[0]['device']}.\n",
}
"""Tables of records in which nothing of a model was measured."""

KINDS: dict[str, Callable[[list[Record]], str]] = {
    "busy": busy,
    "generators": generators,
    "grid_code": grid_code,
    "hybrids": lambda records: markdown(*hybrids_table(records, read_records(LAB))),
    "lab": lambda records: lab(records, "scenes", of=lab_table),
    "lab.controls": lambda records: lab(records, "scenes", of=controls_table),
    "lab.dropped": partial(encoder_cost, data="dropped"),
    "lab.large": lambda records: lab(records, "large", "levels", of=lab_table),
    "lab.merging": partial(encoder_cost, data="encoder"),
    "lab.short": short_lab,
    "lab.tiles": partial(encoder_cost, data="tiles"),
    "lab.videos": lambda records: lab(records, "videos", of=lab_table),
    "quickstart.short": partial(short_comparison, names=ROWS_OF_QUICKSTART),
    "real.short": partial(short_comparison, names=ROWS_OF_REAL),
    "real.shown": shown,
    "real.shown_short": shown_short,
    "verify_claims": claims,
    "verify_claims.short": short_claims,
    "verify_claims.speed": speed,
    "verify_claims.time": partial(estimated, number=0),
    "verify_claims.memory": partial(estimated, number=1),
    "fusion_cost": sweep,
    "compare": compared,
    "compare.claims": lambda records: markdown(*claims_table(records)),
    "compare.speed": compared_speed,
    "visor_scenes": visor_scenes,
    "visor_scenes_scratch": visor_scenes,
}
"""How a file of records becomes a table; :func:`comparison` if it is not named."""


OF_SEVERAL: dict[str, Callable[[], str]] = {"changes": lambda: markdown(*changes_table())}
"""Tables of the records of several benchmarks."""


def render(text: str) -> str:
    """The text with every table rendered anew."""

    def fill(marker: re.Match[str]) -> str:
        file = ROOT / "benchmarks" / "results" / f"{marker[2].partition('.')[0]}.jsonl"
        if across := OF_SEVERAL.get(marker[2]):
            table = across()
        elif not file.exists():
            table = NOT_YET
        elif own := OWN_RECORDS.get(marker[2]):
            table = own([json.loads(line) for line in file.read_text().splitlines()])
        else:
            table = KINDS.get(marker[2], comparison)(read_records(file))
        return marker[1] + table + marker[3]

    return TABLE.sub(fill, text)


@cli_entry_point
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something would change")
    args = parser.read()
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages = {page: page.read_text() for page in files}
    changed = {page: rendered for page, text in pages.items() if (rendered := render(text)) != text}
    if args.check:
        sys.exit(bool(changed))
    for page, text in changed.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
