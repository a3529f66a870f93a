"""Write the model of a run as a folder that needs none of the checkpoints it was built from.

    python -m lavi.export --checkpoint runs/NAME --out FOLDER

FOLDER/language is an ordinary transformers checkpoint (adapters merged), FOLDER/vision that of the tower. The whole is
read by `lavi.load("FOLDER")`.
"""

from __future__ import annotations

from lavi.cli.arguments import Parser, path
from lavi.cli.entry import cli_entry_point


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m lavi.export", description=__doc__)
    parser.add_argument("--checkpoint", type=path, required=True, metavar="RUN", help="a run folder of lavi.fit")
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--trust", action="store_true", help="build whatever the run's recipe names")
    args = parser.read()
    from lavi.checkpoints.model_folder import check_new_folder, save_pretrained
    from lavi.checkpoints.run_folder import load_run
    from lavi.report import console

    check_new_folder(args.out)
    _, model = load_run(args.checkpoint, trust=args.trust)
    save_pretrained(model, args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    console().print(f"{args.out}: {size / 2**20:,.1f} MiB; language/ opens with transformers' AutoModelForCausalLM")


if __name__ == "__main__":
    main()
