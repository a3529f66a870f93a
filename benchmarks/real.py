"""What LaVi, cross-attention and concatenation reach on real parts: a released language model, tower and photographs.

    make real              fetches, lays out and trains everything, then runs this
    python benchmarks/real.py --out benchmarks/results/real.jsonl      scores what was trained

All runs are scored on the test photographs and timed in turns (``lavi.evaluate``), with 95 % intervals, and the
perplexity of their language model on text without images before and after training. Then each answers questions about
one picture of four test photographs, docs/photographs.jpg.
"""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

from datamodules.photographs import NAMES, draw, jpeg, photographs, position_name
from lavi.checkpoints.run_folder import load_run
from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.efficiency.record import check_writable, read_records, write_records
from lavi.evaluation.compare_runs import compare_runs

ROOT = Path(__file__).parent.parent
RUNS = ("lavi", "cross_attention", "concat")
TEXT = ROOT / "recipes" / "real" / "text.txt"
PICTURE = ROOT / "docs" / "photographs.jpg"
SHOWN = ("boot", "bag", "dress", "sneaker")
"""What the picture shows, row by row."""
NAMING = "what is this?"
QUESTIONS = {
    "what is at the top left?": "boot",
    "what is at the bottom right?": "sneaker",
    "is there a bag?": "yes",
    "how many dresses are there?": "one",
    "is the boot left or right of the bag?": "left",
}
"""What is asked about it, with the true answers."""


def compose(source: Path) -> bytes:
    """The picture, as JPEG: the first test photograph of each kind that is shown."""
    pools = photographs(source, "test", 0)
    return jpeg(draw([pools[NAMES.index(kind)][0] for kind in SHOWN], 2, random.Random(0)))


def answers(run: Path) -> list[list[str]]:
    """Question, answer of a run's model, true answer: of each quarter of the picture alone, then of the whole."""
    _, model = load_run(run)
    picture = Image.open(PICTURE)
    half = picture.width // 2
    corners = [(column * half, row * half) for row in range(2) for column in range(2)]
    alone = [model.ask(NAMING, picture.crop((x, y, x + half, y + half)), max_new_tokens=16) for x, y in corners]
    whole = model.ask_all(list(QUESTIONS), model.see(picture), max_new_tokens=16)
    asked = [f"{position_name(2, number)}, alone: {NAMING}" for number in range(4)]
    truths = [*SHOWN, *QUESTIONS.values()]
    return [list(row) for row in zip([*asked, *QUESTIONS], [*alone, *whole], truths, strict=True)]


@cli_entry_point
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=path, help="write the records to this file of JSON lines")
    parser.add_argument("--runs", nargs="+", default=RUNS, help="which of runs/real-NAME to score")
    parser.add_argument("--limit", type=whole_number(1), help="score at most this many test samples")
    parser.add_argument(
        "--compose", type=path, metavar="FOLDER", help="draw the picture anew, of Fashion-MNIST in FOLDER"
    )
    parser.add_argument("--answers", action="store_true", help="only the answers anew, the rest as FILE has it")
    args = parser.read()
    if args.answers and not args.out:
        parser.error("--answers needs --out, the file whose answers are made anew")
    if args.out:
        check_writable(args.out)
    if args.compose:
        PICTURE.write_bytes(compose(args.compose))
    runs = [Path("runs") / f"real-{name}" for name in args.runs]
    said = [answers(run) for run in runs]
    device = device_of("auto")
    records = (
        read_records(args.out)
        if args.answers
        else compare_runs(runs, overrides=[], trust=False, limit=args.limit, device=device, out=None, text=TEXT)
    )
    for record, rows in zip(records, said, strict=True):
        record.knobs["shown"] = rows
        print(record.method, *(f"{question} {answer}" for question, answer, _ in record.knobs["shown"]), sep="\n  ")
    if args.out:
        args.out.unlink(missing_ok=True)
        write_records(records, args.out)


if __name__ == "__main__":
    main()
