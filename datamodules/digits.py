"""Real scans as an example of your own data: the 1,797 handwritten digits that ship inside scikit-learn.

    python -m datamodules.digits --out data/digits

writes them as PNG files with LLaVA-style JSON (train, validation, test: no scan in two of them) and a tokenizer;
``python -m datamodules.pack`` makes shards of it. Questions: which digit, is it larger than five, which of two images
shows the larger digit.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.tokenizer import train_tokenizer
from lavi.cli.arguments import Parser, path
from lavi.cli.entry import cli_entry_point
from lavi.errors import UserError, reason

SHARES = {"train": 0.8, "validation": 0.08, "test": 0.12}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def turn(question: str, answer: str, family: str, *, images: int) -> list[dict[str, str]]:
    """One question with its answer, LLaVA style."""
    request = {"from": "human", "value": "<image>\n" * images + question}
    return [request, {"from": "gpt", "value": answer, "family": family, "level": "real"}]


def conversations(files: list[str], digits: list[int], rng: random.Random) -> list[dict[str, Any]]:
    """Each scan asked for its digit and its size, and each beside another one."""
    entries = []
    for file, digit in zip(files, digits, strict=True):
        turns = turn("which digit is this?", WORDS[digit], "which_digit", images=1)
        turns += turn("is it larger than five?", "yes" if digit > 5 else "no", "larger_than_five", images=0)
        entries.append({"id": Path(file).stem, "image": file, "conversations": turns})
        other = rng.choice([i for i in range(len(files)) if digits[i] != digit])
        answer = "first" if digit > digits[other] else "second"
        turns = turn("which image shows the larger digit?", answer, "larger_of_two", images=2)
        entries.append({"id": f"{Path(file).stem}-and-another", "image": [file, files[other]], "conversations": turns})
    return entries


def write_digits(out: Path, *, seed: int) -> dict[str, int]:
    """Write images, JSON and tokenizer; returns how many scans each split has.

    Raises:
        UserError: scikit-learn is not installed; ``out`` is there, or cannot be written.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise UserError(
            "the scans ship inside scikit-learn: pip install scikit-learn (or install with the dev extra)."
        ) from None
    if os.path.lexists(out):
        raise UserError(f"{out} exists and is left as it is: choose another --out, or remove it first.")
    try:
        return _write(out, load_digits(), seed=seed)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({reason(error)}): remove what is there of it, and try again."
        ) from None


def _write(out: Path, scans: Any, *, seed: int) -> dict[str, int]:
    (out / "images").mkdir(parents=True)
    files = [f"{index:04d}.png" for index in range(len(scans.images))]
    for file, pixels in zip(files, scans.images, strict=True):
        Image.fromarray((255 - pixels * 15.9375).astype(np.uint8)).save(out / "images" / file)  # 0..16, dark on light
    rng = random.Random(seed)
    order = list(range(len(files)))
    rng.shuffle(order)
    counts, first, texts = {}, 0, set()
    for split, share in SHARES.items():
        part = order[first : first + round(share * len(files))] if split != "test" else order[first:]
        first += len(part)
        entries = conversations([files[i] for i in part], [int(scans.target[i]) for i in part], rng)
        (out / f"{split}.json").write_text(json.dumps(entries))
        counts[split] = len(part)
        texts |= {t["value"].replace("<image>\n", "") for entry in entries for t in entry["conversations"]}
    train_tokenizer(sorted(texts) * 10, out / "tokenizer", vocabulary=320)
    return counts


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m datamodules.digits", description=__doc__)
    parser.add_argument("--out", type=path, default=Path("data/digits"), help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.read()
    print(f"{args.out}: scans {write_digits(args.out, seed=args.seed)}")


if __name__ == "__main__":
    main()
