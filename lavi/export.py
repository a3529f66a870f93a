"""Write the model of a run as a folder that needs none of the checkpoints it was built from.

    python -m lavi.export --checkpoint runs/NAME --out FOLDER
    python -m lavi.export --checkpoint runs/NAME --out FOLDER --format transformers

FOLDER/language is an ordinary transformers checkpoint (adapters merged), FOLDER/vision that of the tower. The whole is
read by `lavi.load("FOLDER")`. A concatenation model that one of transformers' own classes computes (LLaVA-1.5, NeXT,
OneVision, Idefics3) can be written as that instead.
"""

from __future__ import annotations

from lavi.cli.arguments import Parser, path
from lavi.cli.entry import cli_entry_point

FORMATS = ("lavi", "transformers")
FORMAT_HELP = "lavi: any model; transformers: a concatenation model, as transformers' own vision-language class"


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m lavi.export", description=__doc__)
    parser.add_argument("--checkpoint", type=path, required=True, metavar="RUN", help="a run folder of lavi.fit")
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--format", choices=FORMATS, default="lavi", help=FORMAT_HELP)
    parser.add_argument("--trust", action="store_true", help="build whatever the run's recipe names")
    args = parser.read()
    from lavi.checkpoints.load import video_of
    from lavi.checkpoints.model_folder import check_new_folder, save_pretrained
    from lavi.checkpoints.run_folder import load_run
    from lavi.checkpoints.transformers_vlm import save_as_transformers
    from lavi.report import console

    check_new_folder(args.out)
    recipe, model = load_run(args.checkpoint, trust=args.trust)
    if args.format == "transformers":
        opens = f"opens with transformers' {save_as_transformers(model, args.out)}"
    else:
        save_pretrained(model, args.out, video=video_of(recipe))
        opens = "language/ opens with transformers' AutoModelForCausalLM"
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    console().print(f"{args.out}: {size / 2**20:,.1f} MiB; {opens}")


if __name__ == "__main__":
    main()
