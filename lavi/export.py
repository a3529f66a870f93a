"""Write the model of a run as a folder that needs none of the checkpoints it was built from.

    python -m lavi.export --checkpoint runs/NAME --out FOLDER

FOLDER/language is an ordinary transformers checkpoint (adapters merged), FOLDER/vision that of the tower. The whole is
read by `lavi.model.VisionLanguageModel.from_pretrained("FOLDER")`.
"""

from __future__ import annotations

from lavi.arguments import Parser, path
from lavi.errors import front


@front
def main() -> None:
    parser = Parser(prog="python -m lavi.export", description=__doc__)
    parser.add_argument("--checkpoint", type=path, required=True, metavar="RUN", help="a run folder of lavi.fit")
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--trust", action="store_true", help="build whatever the run's recipe names")
    args = parser.read()
    from lavi.checkpoint import load_run
    from lavi.pretrained import check_new_folder
    from lavi.report import console

    check_new_folder(args.out)
    _, model = load_run(args.checkpoint, trust=args.trust)
    model.save_pretrained(args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    console().print(f"{args.out}: {size / 2**20:,.1f} MiB; language/ opens with transformers' AutoModelForCausalLM")


if __name__ == "__main__":
    main()
