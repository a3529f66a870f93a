"""What benchmarks share whose records are their own: the option for their file, and writing it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lavi.efficiency.estimate import Estimate
from lavi.efficiency.record import check_writable


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A command line with ``--out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the records to this file of JSON lines")
    return parser


def read(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of this process.

    Raises:
        UserError: the file of ``--out`` cannot be written.
    """
    args = parser.parse_args()
    if args.out:
        check_writable(args.out)
    return args


def ends(of: Estimate) -> list[float]:
    """Median, low and high of an estimate, as a record has them."""
    return [of.median, of.low, of.high]


def with_interval(ends: Sequence[float]) -> str:
    """The same as a cell of a table."""
    return "{:.2f} ({:.2f}-{:.2f})".format(*ends)


def keep(records: Iterable[dict[str, Any]], out: Path | None) -> list[dict[str, Any]]:
    """All records, each written as it comes: of a run that is stopped those before it stay. The file begins anew."""
    if out:
        out.write_text("")
    kept = []
    for record in records:
        kept.append(record)
        if out:
            with open(out, "a") as stream:
                stream.write(json.dumps(record) + "\n")
    return kept
