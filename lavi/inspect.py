"""Look inside a trained run: what an image does to each word of a question, and where the answer comes from.

    python -m lavi.inspect --checkpoint runs/NAME --image photo.jpg --question "what colour is it?" --out page.html

writes one HTML page that needs no other file: how strongly each token's norms are modulated (by layer and by what the
norm feeds), which patches each word reads, which patches the answer depends on, how alike the layers' states are (CKA),
and VISOR's choice of layers. For a run's pictures in TensorBoard: callbacks.modulation.Modulation in its recipe.
"""

from __future__ import annotations

from pathlib import Path

from lavi.cli.arguments import Parser, path, text, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m lavi.inspect", description=__doc__)
    folder = "a run folder of lavi.fit, a folder of lavi.export, or a released vision-language model"
    parser.add_argument("--checkpoint", type=path, required=True, metavar="FOLDER", help=folder)
    parser.add_argument("--image", type=path, action="append", required=True, metavar="FILE", help="one, or several")
    parser.add_argument("--question", type=text, required=True, metavar="TEXT", help="about the images")
    parser.add_argument("--answer", type=text, metavar="TEXT", help="look into this answer (default: the model's own)")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=32, help="of the model's own answer")
    parser.add_argument("--out", type=path, default=Path("inspection.html"), help="the page to write")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--trust", action="store_true", help="build whatever the recipe in the folder names")
    args = parser.read()
    device = device_of(args.device)
    from lavi.checkpoints.load import load
    from lavi.data.images import open_image
    from lavi.inspection.answer import inspect_answer
    from lavi.inspection.page import write_page
    from lavi.report import console

    images = [open_image(file) for file in args.image]
    model = load(args.checkpoint, trust=args.trust).to(device)
    inspected = inspect_answer(model, args.question, images, answer=args.answer, max_new_tokens=args.max_new_tokens)
    write_page(inspected, args.out, run=args.checkpoint.name)
    console().print(f"{inspected.question} {inspected.answer}")
    console().print(f"written: {args.out}")


if __name__ == "__main__":
    main()
