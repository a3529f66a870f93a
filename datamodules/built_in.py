"""What the built-in data share: questions that balance, the writing of splits, and their command."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.shards.write import shard_jobs, write_shards
from datamodules.tokenizer import train_tokenizer
from lavi.cli.arguments import Parser, path, whole_number
from lavi.errors import UserError, reason

# --- questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question about one scene, or about two, with its true answer; ``kind`` groups those that must balance."""

    family: str
    text: str
    answer: str
    kind: str


@dataclass
class Examiner:
    """Picks questions so that, for each kind, all answers are given about equally often."""

    rng: random.Random
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def pick(self, candidates: list[Question]) -> Question | None:
        """One of the candidates whose answer is the rarest so far for its kind of question."""
        if not candidates:
            return None
        self.rng.shuffle(candidates)
        kind = self.rng.choice(sorted({q.kind for q in candidates}))
        chosen = min((q for q in candidates if q.kind == kind), key=self._count)
        self.counts[self._slot(chosen)] += 1
        return chosen

    def _count(self, question: Question) -> int:
        return self.counts[self._slot(question)]

    @staticmethod
    def _slot(question: Question) -> tuple[str, str, str]:
        return question.family, question.kind, question.answer


def conversation(chosen: list[Question], visuals: Sequence[str], levels: dict[str, str]) -> dict[str, Any]:
    """The JSON of a sample: its ``visuals`` ("image", "video"), then each question with its answer."""
    messages: list[dict[str, Any]] = []
    for turn, question in enumerate(chosen):
        parts: list[dict[str, str]] = [{"type": kind} for kind in visuals if turn == 0]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text}]})
        tags = {"family": question.family, "level": levels[question.family]}
        messages.append({"role": "assistant", "content": question.answer, **tags})
    return {"messages": messages}


def ask_one(pools: dict[str, list[Question]], examiner: Examiner, *, first: int) -> list[Question]:
    """One question of family number ``first``, or of the next family that has one."""
    families = list(pools)
    picks = (examiner.pick(pools[family]) for family in families[first:] + families[:first])
    return [next(question for question in picks if question)]


def converse(
    pools: dict[str, list[Question]], examiner: Examiner, rng: random.Random, *, turns: int, weights: Sequence[int]
) -> list[Question]:
    """Several questions in random order, none twice; often several of a family.

    Asking for two things' colours is what tells one from the other.

    Args:
        pools: the questions of each family.
        weights: how often each family is asked.
    """
    pools = dict(pools)
    chosen: list[Question] = []
    for family in rng.choices(list(pools), weights, k=4 * turns):
        if len(chosen) < turns and (question := examiner.pick(pools[family])):
            chosen.append(question)
            pools[family] = [q for q in pools[family] if q.text != question.text]
    return chosen


# --- splits -----------------------------------------------------------------------------------------------------------


def write_splits(
    out: Path,
    *,
    seed: int,
    counts: dict[str, int],
    turns: int,
    workers: int,
    name: str,
    version: int,
    make_samples: Callable[..., Iterator[dict[str, Any]]],
    sentences: Callable[[], Iterable[str]] | None = None,
    more: dict[str, Any] | None = None,
) -> bool:
    """Write the shards of each split, and a tokenizer; returns False if the same data are there already.

    A run that was stopped goes on with what is missing.

    Args:
        counts: samples of each split.
        turns: questions in a training conversation, at most; the other splits have one each.
        name, version: of the data; the same of both, of the seed, the counts and the turns are the same data.
        make_samples: ``make_samples(job, split=, seed=, turns=)`` gives the samples of a shard; picklable.
        sentences: for the tokenizer; None: data for a model that has one write none.
        more: what else tells these data from others.

    Raises:
        UserError: ``out`` holds something else, or cannot be written.
    """
    plan = {name: version, "seed": seed, "counts": counts, "turns": turns, **(more or {})}
    make = {s: partial(make_samples, split=s, seed=seed, turns=turns if s == "train" else 1) for s in counts}
    try:
        if not _is_new(out, plan, counts):
            return False
        for split, count in counts.items():
            jobs = shard_jobs(count, per_shard=max(1, min(1000, count // 8)))
            write_shards(out / split, jobs, make[split], made_by=plan, workers=workers, label=f"{name}: {split}")
        if sentences is not None:
            train_tokenizer(sentences(), out / "tokenizer")
        (out / NOTE).write_text(json.dumps(plan))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({reason(error)}).") from None
    return True


NOTE = "made_by.json"
"""The plan of complete data, beside the splits."""


def _is_new(out: Path, plan: dict[str, Any], splits: Iterable[str]) -> bool:
    """Whether the data of this plan are not there yet, or not complete.

    Raises:
        UserError: ``out`` holds something else.
    """
    note = out / NOTE
    if note.is_file() and note.read_bytes() == json.dumps(plan).encode():
        return False
    ours = {"tokenizer", *(split + ending for split in splits for ending in ("", ".part", ".lock"))}
    if note.is_file() or (out.exists() and any(file.name not in ours for file in out.iterdir())):
        raise UserError(f"{out} holds other data and is left as it is: choose another --out, or remove it first.")
    return True


# --- the command ------------------------------------------------------------------------------------------------------

WriteDataset = Callable[..., bool]
"""``write_dataset(out, seed=, counts=, turns=, workers=)``, with what was chosen besides: False if the same data are
there already."""


def run_command(
    write: WriteDataset,
    *,
    module: str,
    about: str | None,
    out: Path,
    counts: dict[str, int],
    thing: str,
    turns: int | None = 4,
    source: Path | None = None,
    flags: Mapping[str, str] | None = None,
) -> None:
    """The command of built-in data: ``python -m MODULE --out FOLDER``.

    Args:
        about: what ``--help`` says first.
        out, counts: where to, and how many of each split, if the command line does not say otherwise.
        thing: what is drawn, in the singular.
        turns: questions in a training conversation, if the command line does not say otherwise; None: always one.
        source: the folder that it is drawn from, if the command line does not say otherwise; None: from nothing.
        flags: options that are there or not, and what their help says.
    """
    parser = Parser(prog=f"python -m {module}", description=about)
    parser.add_argument("--out", type=path, default=out, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help=f"another seed, other {thing}s")
    for split, count in counts.items():
        what = f"training {thing}s" if split == "train" else f"{split} {thing}s, one question each"
        parser.add_argument(f"--{split}", type=whole_number(1), default=count, help=what)
    if turns is not None:
        parser.add_argument(
            "--turns", type=whole_number(1), default=turns, help="questions in a training conversation, at most"
        )
    if source is not None:
        parser.add_argument("--source", type=path, default=source, help=f"folder that {thing}s are made from")
    for flag, what in (flags or {}).items():
        parser.add_argument(f"--{flag}", action="store_true", help=what)
    parser.add_argument("--workers", type=whole_number(1), default=2, help="processes")
    args = parser.read()
    counts = {split: getattr(args, split) for split in counts}
    own = {name: getattr(args, name) for name in ("turns", "source") if hasattr(args, name)}
    own |= {flag: True for flag in flags or () if getattr(args, flag)}
    written = write(args.out, seed=args.seed, counts=counts, workers=args.workers, **own)
    print(f"{args.out}: {'written' if written else 'there already, left as it is'} ({counts}, seed {args.seed})")
