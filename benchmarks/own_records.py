"""What benchmarks share whose records are their own: the option for their file, and writing it."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lavi.cli.arguments import Parser, path
from lavi.efficiency.estimate import Estimate
from lavi.efficiency.record import check_writable


def parser_of(description: str | None) -> Parser:
    """A command line with ``--out``."""
    parser = Parser(description=description)
    parser.add_argument("--out", type=path, help="write the records to this file of JSON lines")
    return parser


def read(parser: Parser) -> Namespace:
    """The arguments of this process.

    Raises:
        UserError: an option that is not known, or a value that it cannot have; a file of ``--out`` that cannot be
            written.
    """
    args = parser.read()
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
