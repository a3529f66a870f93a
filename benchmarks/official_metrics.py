"""Do the metrics of lavi.metrics equal the functions that others score with?

    pip install lmms-eval pycocoevalcap
    python benchmarks/official_metrics.py --out benchmarks/results/official_metrics.jsonl

Random questions of each benchmark's form are answered rightly, nearly rightly and wrongly (case, blanks, punctuation,
articles, numbers in words, edits, nothing at all), and scored by lmms-eval's own functions, CIDEr by pycocoevalcap's,
and by ours: the record is the largest difference of any answer, and of any figure of a set. ``--cases FILE`` keeps
some of the answers with the official scores: with tests/official_scores.json the tests hold ours against them where
neither package is installed.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from own_records import keep, parser_of, read

from lavi.cli.arguments import path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.errors import UserError
from lavi.metrics.answers import ContainsAnswer, ExactMatch
from lavi.metrics.base import AnswerMetric, Prediction
from lavi.metrics.captions import CIDEr, words
from lavi.metrics.documents import ANLS, RelaxedAccuracy
from lavi.metrics.vqa import CONTRACTED, VQAAccuracy
from lavi.metrics.yes_no import MME, PERCEPTION, YesNo
from lavi.report import console, table

WORDS = (
    *("red", "a dog", "the Cat", "two", "10,000", "3.5", "5%", "50%", "0", "1,2", "St. John's", "yes", "no", "on/off"),
    *("T-shirt", "what?", "isnt", "dont", "ten", "none", "an apple", "U.S.A.", "Nov 29th", "left-hand side", "-4"),
    *CONTRACTED[:40],
)
Scores = tuple[list[float], dict[str, float]]
"""Of each answer, and of the set."""


def perturbed(text: str, rng: random.Random) -> str:
    """An answer near to a true one, or another."""
    changes: list[Callable[[str], str]] = [
        str,
        str.upper,
        str.title,
        lambda t: f" {t}\n",
        lambda t: f"{t}.",
        lambda t: f"the {t}",
        lambda t: t.replace("'", ""),
        lambda t: t.replace(" ", "  "),
        lambda t: f"It is {t}, I think!",
        lambda t: t[: len(t) // 2] + rng.choice(string.ascii_letters) + t[len(t) // 2 :],
        lambda t: t[1:],
        lambda t: rng.choice(WORDS),
        lambda t: "",
    ]
    return rng.choice(changes)(text)


def numbers(rng: random.Random) -> str:
    """A number as charts have them."""
    value = rng.choice([rng.randint(-50, 50), round(rng.uniform(-5, 100), 2), 0])
    return f"{value}{rng.choice(['', '', '%'])}"


def near(text: str, rng: random.Random) -> str:
    """A number some percent off."""
    try:
        value = float(text.rstrip("%"))
    except ValueError:
        return perturbed(text, rng)
    changed = round(value * rng.choice([1, 0.95, 1.05, 1.051, 0.949, 1.2]), 4)
    return f"{changed:g}{'%' if text.endswith('%') != (rng.random() < 0.1) else ''}"


def questions(
    count: int, rng: random.Random, *, references: int, families: Sequence[str] = ("all",)
) -> list[Prediction]:
    """Open questions with so many references, in pairs about one image."""
    made = []
    for index in range(count):
        truths = tuple(rng.choice(WORDS[:6] if rng.random() < 0.8 else WORDS) for _ in range(references))
        family = families[index // 2 % len(families)]
        made.append(Prediction(perturbed(rng.choice(truths), rng), truths, str(index // 2), family))
    return made


def yes_no(count: int, rng: random.Random, families: Sequence[str]) -> list[Prediction]:
    """Questions to be answered with yes or no."""
    said = ("yes", "no", "Yes", "No.", "Yes, it is", "no idea", "y", "N", "", "maybe", "There is no dog", " yes ")
    return [
        Prediction(
            rng.choice(said), (rng.choice(("yes", "no")),), str(index // 2), families[index // 2 % len(families)]
        )
        for index in range(count)
    ]


def charts(count: int, rng: random.Random) -> list[Prediction]:
    truths = [numbers(rng) if rng.random() < 0.7 else rng.choice(WORDS) for _ in range(count)]
    families = ("human", "augmented")
    return [Prediction(near(t, rng), (t,), str(i), families[i % 2]) for i, t in enumerate(truths)]


def captions(count: int, rng: random.Random) -> list[Prediction]:
    nouns = ("a dog", "two cats", "the red car", "a man with a hat", "grass", "a street at night", "birds")
    verbs = ("runs on", "stands near", "looks at", "is next to")

    def sentence() -> str:
        return f"{rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(nouns)}{rng.choice(['', ' in the rain'])}"

    return [
        Prediction(sentence() if rng.random() < 0.9 else "", tuple(sentence() for _ in range(5)), str(i))
        for i in range(count)
    ]


# --- official functions -----------------------------------------------------------------------------------------------


def by_answer(score: Callable[[Prediction], float]) -> Callable[[Sequence[Prediction]], Scores]:
    """Of a function that scores one answer: all scores, and their mean in percent."""

    def official(answers: Sequence[Prediction]) -> Scores:
        scores = [float(score(one)) for one in answers]
        return scores, {"all": 100 * _mean(scores)}

    return official


@by_answer
def vqav2(one: Prediction) -> float:
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    given = [{"answer": answer, "answer_id": number} for number, answer in enumerate(one.references)]
    return vqav2_process_results({"question_id": 0, "answers": given}, [one.answer])["exact_match"]


@by_answer
def textvqa(one: Prediction) -> float:
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    return textvqa_process_results({"question_id": 0, "answers": list(one.references)}, [one.answer])["exact_match"]


@by_answer
def gqa(one: Prediction) -> float:
    from lmms_eval.api.metrics import exact_match_hf_evaluate

    texts = {"predictions": [one.answer.strip()], "references": [one.references[0].strip()]}
    return exact_match_hf_evaluate(**texts, ignore_case=True, ignore_punctuation=True)["exact_match"]


@by_answer
def docvqa(one: Prediction) -> float:
    from lmms_eval.api.metrics import anls

    return anls(list(one.references), [one.answer])["anls"]


@by_answer
def chartqa(one: Prediction) -> float:
    from lmms_eval.tasks.chartqa.utils import chartqa_process_results

    question = {"type": one.family, "answer": one.references[0]}
    return chartqa_process_results(question, [one.answer])["relaxed_overall"]


@by_answer
def ocrbench(one: Prediction) -> float:
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

    question = {"answer": list(one.references), "dataset": one.family, "question_type": ""}
    return ocrbench_process_results(question, [one.answer])["ocrbench_accuracy"]["score"]


def pope(answers: Sequence[Prediction]) -> Scores:
    from lmms_eval.tasks.pope import utils

    results = [
        utils.pope_process_results({"answer": one.references[0], "question_id": 0}, [one.answer])["pope_accuracy"]
        for one in answers
    ]
    figures = {
        "all": 100 * utils.pope_aggregate_accuracy(results),
        "precision": 100 * utils.pope_aggregate_precision(results),
        "recall, answered": 100 * utils.pope_aggregate_recall(results),
        "f1, answered": 100 * utils.pope_aggregate_f1_score(results),
    }
    return [result["score"] for result in results], figures


def mme(answers: Sequence[Prediction]) -> Scores:
    from lmms_eval.tasks.mme import utils

    results = [
        utils.mme_process_results(
            {"answer": one.references[0], "category": one.family, "question_id": one.sample}, [one.answer]
        )
        for one in answers
    ]
    figures = {
        name: utils.mme_aggregate_results([r[key] for r in results if key in r])
        for name, key in (("perception", "mme_perception_score"), ("cognition", "mme_cognition_score"))
    }
    return [next(iter(result.values()))["score"] for result in results], figures


def coco(answers: Sequence[Prediction]) -> Scores:
    from pycocoevalcap.cider.cider import Cider

    def texts(captions: Sequence[str]) -> list[str]:
        return [" ".join(words(caption)) for caption in captions]

    references = {one.sample: texts(one.references) for one in answers}
    score, scores = Cider().compute_score(references, {one.sample: texts([one.answer]) for one in answers})
    return list(map(float, scores)), {"all": 100 * float(score)}


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


Benchmark = tuple[
    AnswerMetric, Callable[[int, random.Random], list[Prediction]], Callable[[Sequence[Prediction]], Scores]
]

POPE_SPLITS = ("random", "popular", "adversarial")
SUBTASKS = (*PERCEPTION, "code_reasoning", "text_translation")
FORMULAS = "HME100k"


def benchmarks() -> dict[str, Benchmark]:
    """Our metric, its questions, and the official scores."""
    return {
        "VQAv2": (VQAAccuracy(), lambda n, rng: questions(n, rng, references=10), vqav2),
        "TextVQA, VizWiz": (VQAAccuracy(lower_first=True), lambda n, rng: questions(n, rng, references=10), textvqa),
        "GQA": (ExactMatch(punctuation=False), lambda n, rng: questions(n, rng, references=1), gqa),
        "POPE": (YesNo(), lambda n, rng: yes_no(n, rng, POPE_SPLITS), pope),
        "MME": (MME(), lambda n, rng: yes_no(n, rng, SUBTASKS), mme),
        "DocVQA, InfoVQA": (ANLS(), lambda n, rng: questions(n, rng, references=3), docvqa),
        "ChartQA": (RelaxedAccuracy(), charts, chartqa),
        "OCRBench": (
            ContainsAnswer(formulas=[FORMULAS]),
            lambda n, rng: questions(n, rng, references=2, families=("other", FORMULAS)),
            ocrbench,
        ),
        "COCO captions": (CIDEr(), captions, coco),
    }


def compare(name: str, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of one benchmark, and its answers with the official scores."""
    metric, ask, official = benchmarks()[name]
    answers = ask(count, random.Random(name))
    scores, figures = official(answers)
    metric.update(answers)
    ours, our_figures = [one.score for one in metric.predictions()], metric.compute()
    record = {
        "benchmark": name,
        "metric": metric.name,
        "answers": count,
        "mean": 100 * _mean(scores),
        "largest_difference": max(abs(a - b) for a, b in zip(ours, scores, strict=True)),
        "figures": {key: abs(our_figures[key] - value) for key, value in figures.items()},
    }
    cases = {
        "answers": [[one.answer, one.references, one.sample, one.family] for one in answers],
        "scores": scores,
        "figures": figures,
    }
    return record, cases


def metrics_table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["benchmark", "metric", "answers", "mean score (%)", "largest difference of an answer", "of a figure"]
    rows = [
        [
            *(record["benchmark"], record["metric"], str(record["answers"]), f"{record['mean']:.1f}"),
            *(f"{record['largest_difference']:.2g}", f"{max(record['figures'].values()):.2g}"),
        ]
        for record in records
    ]
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--answers", type=whole_number(1), default=4000, help="to each benchmark")
    parser.add_argument("--cases", type=path, metavar="FILE", help="keep 120 answers of each with the official scores")
    args = read(parser)
    try:
        packages = {name: version(name) for name in ("lmms-eval", "pycocoevalcap")}
    except ImportError as error:
        raise UserError(
            f"the official functions are not installed ({error}): pip install lmms-eval pycocoevalcap"
        ) from None
    records = keep((packages | compare(name, args.answers)[0] for name in benchmarks()), args.out)
    if args.cases:
        kept = {name: compare(name, 120)[1] for name in benchmarks()}
        args.cases.write_text(json.dumps({"versions": packages, "benchmarks": kept}, indent=None) + "\n")
    console().print(table(f"lmms-eval {packages['lmms-eval']}", *metrics_table(records)))


if __name__ == "__main__":
    main()
