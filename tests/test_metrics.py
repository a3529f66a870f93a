"""Metrics of benchmarks: cases computed by hand, and the scores that the official functions gave."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lavi.metrics.judged as judged_module
from lavi.errors import UserError
from lavi.evaluation.intervals import figure_intervals, paired_difference
from lavi.metrics.answers import ContainsAnswer, ExactMatch
from lavi.metrics.base import AnswerMetric, Prediction
from lavi.metrics.captions import CIDEr, cider, words
from lavi.metrics.choices import CircularChoice, OptionLetter, option_letter
from lavi.metrics.documents import ANLS, RelaxedAccuracy
from lavi.metrics.judged import Judge, Judged, LanguageModelJudge, Verdict
from lavi.metrics.vqa import VQAAccuracy, normalised, normalised_words
from lavi.metrics.yes_no import MME, PERCEPTION, YesNo

OFFICIAL = json.loads((Path(__file__).parent / "official_scores.json").read_text())
METRICS: dict[str, AnswerMetric] = {
    "VQAv2": VQAAccuracy(),
    "TextVQA, VizWiz": VQAAccuracy(lower_first=True),
    "GQA": ExactMatch(punctuation=False),
    "POPE": YesNo(),
    "MME": MME(),
    "DocVQA, InfoVQA": ANLS(),
    "ChartQA": RelaxedAccuracy(),
    "OCRBench": ContainsAnswer(formulas=["HME100k"]),
    "COCO captions": CIDEr(),
}


@pytest.mark.parametrize("benchmark", METRICS)
def test_scores_are_those_of_the_official_functions(benchmark: str) -> None:
    """Kept by benchmarks/official_metrics.py: of lmms-eval, and of pycocoevalcap."""
    metric, kept = METRICS[benchmark], OFFICIAL["benchmarks"][benchmark]
    metric.reset()
    for answer, references, sample, family in kept["answers"]:
        metric.update([Prediction(answer, tuple(references), sample, family)])
    ours = [one.score for one in metric.predictions()]
    if benchmark == "COCO captions":  # sums in another order
        assert ours == pytest.approx(kept["scores"], abs=1e-12)
    else:
        assert ours == kept["scores"]
    assert 0.0 < np.mean(ours) < metric.highest  # answers of every kind are among them
    figures = metric.compute()
    assert {name: figures[name] for name in kept["figures"]} == pytest.approx(kept["figures"], abs=1e-11)


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_is_the_mean_over_nine_of_ten_people(agree: int, score: float) -> None:
    references = ["red"] * agree + [f"other {n}" for n in range(10 - agree)]
    assert VQAAccuracy().score("Red", references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The two dogs.", "2 dogs"),
        ("A T-shirt", "t shirt"),
        ("left - right", "left  right".replace("  ", " ")),
        ("10,000", "10000"),
        ("3.5", "3.5"),
        ("isnt", "isn't"),
        ("couldnt've", "couldn't've"),
        ("none", "0"),
        ("on/off", "on off"),
        ("." * 40, "." * 8),  # the official script takes no more than 32 away
        ("somebody'd", "somebodyd"),  # as its table has it, against all others
        ("a car's", "car's"),
        ("an apple and the cat", "apple and cat"),
        ("zero one two three four five six seven eight nine ten", "0 1 2 3 4 5 6 7 8 9 10"),
        ("X-ray", "x ray"),
        ("x-y z- w", "xy z w"),  # a mark that stands at a blank somewhere goes without one everywhere
        ("x-y -z w", "xy z w"),
        ("x-y z-\nw", "xy z w"),
        ("x-y z-\tw", "xy z w"),
        ("red\tcar", "red car"),
    ],
)
def test_answers_are_normalised_as_the_evaluation_server_does(answer: str, plain: str) -> None:
    assert normalised(answer) == plain


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The car's, red?", "car 's red"),
        ("Don't, know", "don't know"),
        ("dont", "don't"),
        ("a,b?c", "abc"),
        ("is it 10,000?", "is it 10000"),
    ],
)
def test_textvqas_script_parts_the_s_first(answer: str, plain: str) -> None:
    assert normalised_words(answer) == plain
    assert VQAAccuracy(lower_first=True).score(answer, [plain]) == 1.0


def test_of_one_persons_answer_vqa_accuracy_is_the_same_or_not() -> None:
    """Of two and more it is not: nobody else may have given the same."""
    metric = VQAAccuracy()
    assert (metric.score("The red one", ["red 1"]), metric.score("blue", ["red"])) == (1.0, 0.0)
    assert metric.score("red", ["red", "blue"]) == pytest.approx((0 + 1 / 3) / 2)
    of_car = [VQAAccuracy(lower_first=first).score("a car 's", ["car's"]) for first in (False, True)]
    assert of_car == [0.0, 1.0]
    assert VQAAccuracy().score("a car 's", ["car's"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("X", "X"),
        ("A. a cat\nor B. a dog", None),
        ("The answer is (A), not (B)", None),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. a red cat", "B"),
        ("b. a red cat", "B"),
        ("B\nA red cat", "B"),
        ("answer: b", "B"),
        ("A, B", None),
        ("A. or B.", None),
        ("A and B", None),
        ("U.S.", None),
        ("D.C.", None),
        ("The answer is B", "B"),
        ("The answer is B because it is red", "B"),
        ("Answer: (B) a cat", "B"),
        ("Answer: B", "B"),
        ("Answer: b.", "B"),
        ("ANSWER IS B.", "B"),
        ("Option B", "B"),
        ("**B.** a red cat", "B"),
        ("B. Vitamin C.", "B"),
        ("The answer is A", "A"),
        ("The answer is A.", "A"),
        ("The answer is A: a cat", "A"),
        ("Option A is right", "A"),
        ("The answer is A since it is red", "A"),
        ("The answer is A - a cat", "A"),
        ("The correct answer is A (a cat)", "A"),
        ('The answer is A "cat"', "A"),
        ("D. Both A and B. The picture shows both.", "D"),
        ("B. J. Smith and K. Jones", "B"),
        ("The answer is A cat.", None),
        ("The answer: A man", None),
        ("The answer is I think B", None),
        ("The answer is A or B", None),
        ("The answer is B and C.", None),
        ("A. a cat or B. a dog", None),
        ("I think (B)", "B"),
        ("A cat.", None),
        ("option C or option D", None),
        ("(A) or (B)", None),
        ("option A is wrong; B", "B"),
        ("The answer is not here. Option C is incorrect.", None),
        ("C.\nBecause (A) and (B) are wrong", "C"),
        ("", None),
        ("a cat", None),
        ("Both", None),
    ],
)
def test_the_letter_that_an_answer_names(answer: str, letter: str | None) -> None:
    assert option_letter(answer) == letter


def test_an_option_may_be_named_by_its_text_and_nothing_is_guessed() -> None:
    metric, references = OptionLetter(), ("B", "a red cat")
    assert [metric.score(said, references) for said in ("b", "B", "A red cat.", "C", "", "cat")] == [1, 1, 1, 0, 0, 0]


def test_an_option_that_looks_like_a_letter_is_told_by_its_text() -> None:
    metric = OptionLetter()
    assert [metric.score(said, ("B", "U.S.")) for said in ("U.S.", "the U.S.", "B", "D.C.")] == [1, 0, 1, 0]


def test_an_option_that_is_a_number_is_told_by_its_text_a_letter_is_an_option() -> None:
    metric = OptionLetter()
    assert [metric.score(said, ("C", "3")) for said in ("3", "3.", "C", "B", "2")] == [1, 1, 1, 0, 0]
    assert [metric.score(said, ("C", "a")) for said in ("A", "a", "C")] == [0, 0, 1]


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("-5", ("B", "5"), 0),
        ("5", ("B", "5"), 1),
        ("-10°C", ("B", "10°C"), 0),
        ("$5", ("A", "5%"), 0),
        ("B+", ("C", "B+"), 1),
        ("B+", ("B", "A+"), 0),
        ("<", ("A", "<"), 1),
        (">", ("A", "<"), 0),
        ('"A red cat."', ("B", "a red cat"), 1),
        ("**B**", ("B", "a red cat"), 1),
        ("(B).", ("B", "a red cat"), 1),
        ("()", ("B", "a red cat"), 0),
        ("STRASSE", ("B", "straße"), 0),
        ("B。", ("B", "a red cat"), 1),
        ("“B”", ("B", "a red cat"), 1),
        ("<B>", ("B", "a red cat"), 1),
        ("{B}", ("B", "a red cat"), 1),
        ("- B", ("B", "a red cat"), 1),
        ("-B", ("B", "-B"), 1),
        ("B?", ("B", "a red cat"), 1),
        ('"a red cat".', ("B", "a red cat"), 1),
        ("(a red cat)", ("B", "a red cat"), 1),
        ("a red cat?", ("B", "a red cat"), 1),
        ("[0, 1)", ("B", "(0, 1]"), 0),
        ("[0, 1)", ("B", "[0, 1)"), 1),
    ],
)
def test_signs_are_part_of_an_option(answer: str, references: tuple[str, ...], score: float) -> None:
    assert OptionLetter().score(answer, references) == score


def test_circular_choices_are_right_where_every_copy_is() -> None:
    metric = CircularChoice()
    for question, copies in enumerate(("rr", "rw", "ww", "wr", "rw", "r", "r", "w")):
        for number, copy in enumerate(copies):
            answer = "A" if copy == "r" else "B"
            metric.update([Prediction(answer, ("A", "x"), str(question), level="copy" if number else "first")])
    figures = metric.compute()
    assert (figures["circular"], figures["single pass"]) == (37.5, 62.5)
    assert figures["all"] == pytest.approx(100 * 7 / 13)
    rarely = metric.figures(metric.predictions(), np.full(13, 0.01))
    assert (rarely["circular"], rarely["single pass"]) == (pytest.approx(37.5), pytest.approx(62.5))
    low, high = figure_intervals(metric, metric.predictions())["circular"]
    assert low < 37.5 < high


def yes_no(pairs: str, family: str = "all") -> list[Prediction]:
    """``"yn -y"``: said yes where no is true, said nothing where yes is."""
    names = {"y": "yes", "n": "no", "-": ""}
    return [Prediction(names[said], (names[true],), str(n), family) for n, (said, true) in enumerate(pairs.split())]


def test_pope_by_hand() -> None:
    """Of three true yes one is found, one denied, one unanswered; one no is called yes."""
    metric = YesNo()
    metric.update(yes_no("yy ny -y yn nn", "random"))
    figures = metric.compute()
    assert figures["all"] == pytest.approx(40.0)
    assert figures["precision"] == pytest.approx(50.0)
    assert figures["recall"] == pytest.approx(100 / 3)
    assert figures["f1"] == pytest.approx(40.0)
    assert figures["recall, answered"] == figures["f1, answered"] == pytest.approx(50.0)
    assert figures["says yes"] == pytest.approx(40.0)
    assert figures["says neither"] == pytest.approx(20.0)
    assert not [name for name in figures if name.startswith("f1/") or name.endswith(", mean")]  # of one family
    metric.update(yes_no("yy", "popular"))
    figures = metric.compute()
    assert figures["f1/random"] == pytest.approx(40.0)
    assert figures["f1/popular"] == pytest.approx(100.0)
    assert figures["f1, mean"] == pytest.approx(70.0)
    assert figures["f1"] == pytest.approx(100 * 2 * (2 / 3 * 0.5) / (2 / 3 + 0.5))


def test_where_nobody_says_yes_there_is_no_precision() -> None:
    metric = YesNo()
    metric.update(yes_no("nn nn"))
    figures = metric.compute()
    assert {figures[name] for name in ("precision", "recall", "f1", "recall, answered", "f1, answered")} == {0.0}
    assert figures["all"] == 100.0


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("yes", "Yes.", 1),
        ("Y.", "yes", 1),
        ("n", "no", 1),
        ("No, it is red", "no", 1),
        ("xxyes", "yes", 0),  # not among the first four
        ("x", "x", 1),
        ("maybe", "maybe", 1),
        ("maybe", "yes", 0),
    ],
)
def test_mme_looks_at_the_beginning_of_an_answer(answer: str, truth: str, score: float) -> None:
    assert MME().score(answer, [truth]) == score


def test_mmes_subtasks_are_of_perception_or_of_cognition() -> None:
    cognition = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
    perception = (
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    )
    for family in cognition + perception:
        metric = MME()
        metric.update([Prediction("Yes", ("yes",), "a", family), Prediction("No", ("no",), "a", family)])
        figures = metric.compute()
        assert (figures["perception"], figures["cognition"]) == ((200, 0) if family in PERCEPTION else (0, 200))


def test_mme_by_hand() -> None:
    """Two images of a subtask: both right, one right: 75 % and 50 %; a second answer that is missing is not right."""
    metric = MME()

    def asked(family: str, sample: str, *right: bool) -> list[Prediction]:
        return [Prediction("Yes" if one else "No", ("yes",), sample, family) for one in right]

    metric.update(asked("count", "a", True, True) + asked("count", "b", True, False))
    metric.update(asked("OCR", "a", True, True) + asked("code_reasoning", "a", True))
    figures = metric.compute()
    assert figures["subtask/count"] == 125.0
    assert figures["subtask/OCR"] == 200.0
    assert figures["subtask/code_reasoning"] == 50.0
    assert (figures["perception"], figures["cognition"], figures["total"]) == (325.0, 50.0, 375.0)


@pytest.mark.parametrize(
    ("answer", "score"), [("Paris", 1.0), (" paris ", 1.0), ("pari", 0.8), ("pxxxx", 0.0), ("", 0.0), ("par", 0.6)]
)
def test_anls_by_hand(answer: str, score: float) -> None:
    assert ANLS().score(answer, ["Paris", "in London"]) == pytest.approx(score, abs=0.08 if " " in answer else 1e-9)


def test_anls_where_nothing_is_true() -> None:
    """An empty answer is all of the truth where nothing is to be read, and any other none of it."""
    assert (ANLS().score("", [""]), ANLS().score("Paris", [""])) == (1.0, 0.0)


def test_anls_counts_a_half_and_takes_lengths_in_capitals() -> None:
    """As the scripts in use do: of ``straße`` they count seven letters."""
    assert ANLS().score("pa", ["pair"]) == 0.5
    assert ANLS().score("straße", ["straxe"]) == ANLS().score("straxe", ["straße"]) == pytest.approx(1 - 1 / 7)


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("50%", "0.5", True),
        ("95.1%", "1", True),
        ("50X%", "0.5", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("Red", "red", True),
        ("", "red", False),
    ],
)
def test_relaxed_accuracy_by_hand(answer: str, truth: str, right: bool) -> None:
    assert RelaxedAccuracy().score(answer, [truth]) == right


def test_an_answer_that_is_contained_is_right_and_formulas_keep_their_case() -> None:
    metric = ContainsAnswer(formulas=["formula"])
    metric.update([Prediction("It reads ＳＴＯＰ here", ("stop",), "0"), Prediction("x + Y", ("x+Y",), "1", "formula")])
    metric.update([Prediction("x + y", ("x+Y",), "2", "formula"), Prediction("", ("go",), "3")])
    assert [one.score for one in metric.predictions()] == [1.0, 1.0, 0.0, 0.0]
    metric.reset()
    metric.update([Prediction("so: x\n+ Y", ("x+\nY",), "0", "formula")])
    assert [one.score for one in metric.predictions()] == [1.0]


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("a red\nlight", "red light", 1),
        ("a red light", "red\nlight", 1),
        ("STOP！", "stop!", 1),
        ("one～two", "one~two", 1),
        ("ａ　ｂ", "a b", 1),
        ("｟", "\x7f", 0),
        ("STRASSE", "straße", 0),
    ],
)
def test_an_answer_is_read_on_one_line_in_half_width(answer: str, truth: str, score: float) -> None:
    assert ContainsAnswer().score(answer, [truth]) == score


def test_cider_by_hand() -> None:
    """Two images: what is said of both tells nothing, what is said of one counts, in all lengths alike."""
    same = [["red", "cat"], ["old", "dog"]]
    scores = cider(same, [[caption] for caption in same])
    assert scores == pytest.approx([5.0, 5.0])  # one and two words of four lengths
    everywhere = [["red", "cat"], ["red", "dog"]]
    assert cider([["red"], ["cat"]], [[caption] for caption in everywhere]) == pytest.approx([0.0, 0.0])
    assert cider([[]], [[["red"]]]) == cider([["red"]], [[["red"]]]) == [0.0]  # of one image nothing is rare
    assert cider([["red"], ["dog"]], [[["red"]], [["dog"]]]) == pytest.approx([2.5, 2.5])
    assert CIDEr().score("red", ["red"]) == 0.0  # until all are there
    assert words("The dog's Straße, 2 m!") == ["the", "dog's", "straße", "2", "m"]


class ShortIsRight(Judge):
    @property
    def name(self) -> str:
        return "short-is-right-1"

    def judge(self, question: str, truth: str, answer: str) -> Verdict:
        assert question == "what?"
        return Verdict(len(answer) <= len(truth), 5 - len(answer))


def test_a_judge_is_named_with_its_scores() -> None:
    metric = Judged(judge=ShortIsRight())
    metric.update(
        [Prediction("cat", ("cats",), "0", question="what?"), Prediction("dogs", ("cat",), "1", question="what?")]
    )
    assert metric.name == "Judged by short-is-right-1"
    figures = metric.compute()
    assert (figures["all"], figures["grade"]) == (50.0, 1.5)
    assert metric.figures(metric.predictions(), np.array([3.0, 1.0])) == {"grade": 1.75}
    metric.reset()
    judged = metric.scored(Prediction("", ("cats",), "0", question="an empty answer is asked of nobody"))
    assert (judged.score, judged.grade) == (0.0, 0.0)
    kept = Prediction("cat", ("cats",), "0", question="nor one that was judged", score=1.0, grade=4.0)
    assert metric.scored(kept) == kept


def test_an_answer_alone_is_judged_without_its_question() -> None:
    class NoQuestion(ShortIsRight):
        def judge(self, question: str, truth: str, answer: str) -> Verdict:
            assert (question, truth) == ("", "cats")
            return Verdict(answer == "cat", 0.0)

    metric = Judged(judge=NoQuestion())
    assert [metric.score(said, ["cats", "dogs"]) for said in ("cat", "dog")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("yes, 4", Verdict(True, 4)),
        ("No. Score: 0", Verdict(False, 0)),
        ("Score: 4, yes", Verdict(True, 4)),
        ("No, there are 5 dogs. 0", Verdict(False, 0)),
        ("yes", Verdict(True, 0)),
        ("yes, 10", Verdict(True, 0)),
        ("yes, 4/5", Verdict(True, 4)),
        ("YES, 4 OUT OF 5", Verdict(True, 4)),
        ("no, 0 out of 5", Verdict(False, 0)),
        ("Yes. Score: 3 (out of 5)", Verdict(True, 3)),
        ("{'pred': 'yes', 'score': 4.8}", Verdict(True, 4.8)),
        ("yes, 5.0", Verdict(True, 5)),
        ("yes, 5.5", Verdict(True, 0)),
        ("perhaps", Verdict(False, 0)),
    ],
)
def test_a_language_model_judges_in_a_form(
    said: str, verdict: Verdict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judge = LanguageModelJudge(source="models/judge")
    asked: list[str] = []
    monkeypatch.setattr(judge, "_say", lambda prompt: asked.append(prompt) or said)
    assert judge.judge("what colour?", "azure", "crimson") == verdict
    assert all(word in asked[0] for word in ("what colour?", "azure", "crimson"))
    before = judge.name
    assert re.fullmatch("models/judge, prompt [0-9a-f]{8}", before)
    none, no_grade = "is no verdict such as 'yes, 4': counted as wrong.", "has no score from 0 to 5: graded 0."
    missing = {"perhaps": none, "yes": no_grade, "yes, 10": no_grade, "yes, 5.5": no_grade}.get(said)
    warned = [("lavi", f"the judge {before} said {said!r}, which {missing}")] if missing else []
    assert [(one.name, one.getMessage()) for one in caplog.records] == warned
    monkeypatch.setattr(judged_module, "PROMPT", "Another: {question} {truth} {answer}")
    assert judge.name != before  # its scores cannot be compared with those of the other prompt


def test_a_judge_works_where_its_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def pipeline(task: str, **given: Any) -> Any:
        made.append({"task": task, **given})

        def say(messages: list[dict[str, str]], **how: Any) -> list[dict[str, str]]:
            (message,) = messages
            assert (message["role"], "what?" in message["content"]) == ("user", True)
            assert how == {"max_new_tokens": 16, "do_sample": False, "return_full_text": False}
            return [{"generated_text": "yes, 5"}]

        return say

    monkeypatch.setattr("transformers.pipeline", pipeline)
    monkeypatch.setattr(judged_module, "_text_generation", cache(judged_module._text_generation.__wrapped__))
    judge = LanguageModelJudge(source="a")
    for one in (judge, deepcopy(judge), LanguageModelJudge(source="a")):  # of several tasks, and of controls
        assert one.judge("what?", "red", "red") == Verdict(True, 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    LanguageModelJudge(source="a").judge("what?", "red", "red")
    assert made == [{"task": "text-generation", "model": "a", "device": device} for device in (-1, 3)]


# --- all of them ------------------------------------------------------------------------------------------------------


def test_what_the_percents_are_of_is_said() -> None:
    """In a sentence such as ``75.0 % right of 5 answers``, and not in that of a metric that counts something else."""
    labels = {"ANLS": "ANLS", "CIDEr": "CIDEr", "Judged": "judged right", "VQAAccuracy": "VQA accuracy"}
    metrics = [*METRICS.values(), OptionLetter(), CircularChoice(), Judged(judge=ShortIsRight())]
    for metric in metrics:
        name = metric.name.split()[0]
        assert metric.label == labels.get(name, "right")
        assert metric.headline == {"CircularChoice": "circular", "MME": "perception"}.get(name, "all")
        assert metric.highest == (10.0 if name == "CIDEr" else 1.0)
        assert metric.wants_whole_answers is (name != "ExactMatch")  # whatever goes on behind a match is wrong


@pytest.mark.parametrize("benchmark", METRICS)
def test_missing_answers_stay_in_the_denominator(benchmark: str) -> None:
    metric, kept = METRICS[benchmark], OFFICIAL["benchmarks"][benchmark]
    metric.reset()
    right = [Prediction(r[0], tuple(r), s, f) for _, r, s, f in kept["answers"]]
    metric.update(right)
    full = metric.compute()["all"]
    metric.reset()
    metric.update(right)
    metric.update(Prediction("", one.references, one.sample, one.family) for one in right)
    assert metric.compute()["all"] == pytest.approx(full / 2, abs=0.05 * full)  # a formula may be empty
    assert len(metric.predictions()) == 2 * len(right)


@pytest.mark.parametrize("benchmark", METRICS)
def test_ranks_exchange_answers_as_tensors(benchmark: str) -> None:
    """What torchmetrics gathers: the states of both ranks joined give the figures of one."""
    metric, kept = METRICS[benchmark], OFFICIAL["benchmarks"][benchmark]
    answers = [Prediction(a, tuple(r), s, f) for a, r, s, f in kept["answers"]]
    metric.reset()
    metric.update(answers)
    whole = metric.compute()
    metric.reset()
    metric.update(answers[:50])
    first = torch.cat(metric.rows)
    metric.reset()
    metric.update(answers[50:])
    second = torch.cat(metric.rows)
    metric.rows = [torch.cat([first, second])]
    assert metric.compute() == whole


def test_nothing_answered_says_nothing() -> None:
    metric = YesNo()
    assert metric.compute() == {}
    assert metric.predictions() == []
    assert figure_intervals(metric, []) == {}


def test_figures_have_intervals_that_draw_images_whole() -> None:
    metric: Any = MME()
    metric.update(Prediction("yes" if n % 3 else "no", ("yes",), str(n), "count") for n in range(60) for _ in range(2))
    figures, ends = metric.compute(), figure_intervals(metric, metric.predictions())
    assert figures["subtask/count"] == pytest.approx(200 * 40 / 60)  # both of an image's answers are alike
    low, high = ends["subtask/count"]
    assert low < figures["subtask/count"] < high
    half = 1.96 * 200 * (2 / 3 * 1 / 3 / 60) ** 0.5
    assert high - low == pytest.approx(2 * half, rel=0.15)


# --- two runs ---------------------------------------------------------------------------------------------------------


def scored(scores: list[float]) -> list[Prediction]:
    return [Prediction("", (), str(n), score=score) for n, score in enumerate(scores)]


def test_two_runs_are_compared_question_by_question() -> None:
    """The same mean difference is sure where it is always there, and is not where it goes to and fro."""
    base = [float(n % 2) for n in range(200)]
    worse = [max(0.0, score - (n % 20 == 1)) for n, score in enumerate(base)]
    sure = paired_difference(scored(base), scored(worse))
    assert sure.mean == pytest.approx(5.0)
    assert sure.interval[0] > 0
    assert sure.p < 0.01
    other = [1 - score if n < 100 else score for n, score in enumerate(base)]
    unsure = paired_difference(scored(base), scored(other))
    assert unsure.interval[0] < 0 < unsure.interval[1]
    assert unsure.p > 0.2
    three = paired_difference(scored([1.0] * 3), scored([0.0] * 3))
    assert three.p == pytest.approx(2 / 8, abs=0.04)  # of eight ways to swap three images two differ as much
    nothing = paired_difference(scored(base), scored(base))
    assert (nothing.mean, nothing.interval, nothing.p) == (0.0, [0.0, 0.0], 1.0)


def test_other_questions_cannot_be_compared() -> None:
    with pytest.raises(UserError, match="on the same questions"):
        paired_difference(scored([1.0, 0.0]), scored([1.0]))
