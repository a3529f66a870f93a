"""The rules by which a sample is used: one set, whoever reads."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_shards import GOOD, png, sample, write_tar
from transformers import AutoTokenizer

from datamodules.image_text import ImageTextData
from lavi.data.chat import Chat
from lavi.data.processor import Processor
from lavi.data.tiling import OneView
from lavi.errors import UserError
from lavi.fusion.lavi import LaViFusion

LONG = {"messages": [{"role": "user", "content": "circle " * 400}, GOOD["messages"][1]]}
LATER = {
    "conversations": [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "<image>\nand here?"},
        {"from": "gpt", "value": "blue"},
    ]
}
BEGINS_WITH_GPT = {"conversations": [{"from": "gpt", "value": "Hello!"}, *LATER["conversations"][:2]]}
TWO_QUESTIONS = {"conversations": [{"from": "human", "value": "a"}, *LATER["conversations"][:2]]}
SURROGATE = b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}'
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def small(tokenizer: str) -> Processor:
    """Of a model with a tower and a tokenizer, whose template takes questions and answers in turns alone."""
    from conftest import QWEN2, TOWER, small

    from lavi.language.load import LanguageModel
    from lavi.model import VisionLanguageModel
    from lavi.vision.hf import HFVision

    language = LanguageModel(config=QWEN2, tokenizer=tokenizer)
    model = VisionLanguageModel(vision=HFVision(config=TOWER), language=language, fusion=LaViFusion(generator=small()))
    strict = AutoTokenizer.from_pretrained(tokenizer)
    strict.chat_template = ALTERNATES
    model.processor.chat = Chat(strict)
    return model.processor


def later(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.json", json.dumps(LATER).encode()), (f"{key}.0.png", png()), (f"{key}.1.png", png())]


MIXED = [
    *sample("good"),
    *later("later"),
    *sample("long", LONG),
    *sample("gpt", BEGINS_WITH_GPT),
    *sample("two", TWO_QUESTIONS),
    *sample("surrogate", SURROGATE),
    *sample("none", image=b"no image"),
    *sample("last"),
]


def causes_of(skipped: Counter[str]) -> dict[str, int]:
    known = (
        "longer than the context",
        "refuses the conversation (roles must alternate)",
        "lone surrogate",
        "not an image",
    )
    return {name: sum(n for cause, n in skipped.items() if name in cause) for name in known}


def test_whoever_reads_uses_the_same_samples(small: Processor, tmp_path: Path) -> None:
    """Training, held-out batches and decoded samples: the same are left out, each counted by its cause."""
    write_tar(tmp_path / "a.tar", MIXED)
    data = ImageTextData(small, train=str(tmp_path), batch_size=1, shuffle=0, max_skipped=1.0)
    held_out = data.stream("train")
    batches = list(held_out)
    assert [batch.keys for batch in batches] == [["good"], ["later"], ["last"]]
    samples = data.sample_stream("train")
    for _ in range(2):  # as often as one likes
        assert [one.key for one in samples] == ["good", "later", "last"]
        assert samples.left_out == held_out.skipped.causes
        assert causes_of(samples.left_out) == dict(zip(causes_of(Counter()), (1, 2, 1, 1), strict=True))
    training = iter(data.train_dataloader())
    reads = [next(training) for _ in range(3)]
    assert [read.batch.keys for read in reads] == [["good"], ["later"], ["last"]]
    assert {skip.key for read in reads for skip in read.skipped} == {"long", "gpt", "two", "surrogate", "none"}
    assert [one.key for one in data.sample_stream("train", limit=2)] == ["good", "later"]


def test_long_conversations_are_left_out_and_not_broken(small: Processor, tmp_path: Path) -> None:
    """However many there are, they stop no run."""
    write_tar(tmp_path / "a.tar", [m for n in range(40) for m in sample(f"{n}", LONG)] + sample("short"))
    data = ImageTextData(small, train=str(tmp_path), batch_size=1, shuffle=0)
    (batch,) = data.stream("train")
    assert batch.keys == ["short"]
    read = next(iter(data.train_dataloader()))
    assert read.batch.keys == ["short"]
    assert [skip.key for skip in read.skipped] == [str(n) for n in range(40)]
    assert len({skip.cause for skip in read.skipped}) == 1


def test_where_all_are_too_long_it_is_said_with_what_to_do(small: Processor, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("1", LONG) + sample("2", LONG))
    data = ImageTextData(small, train=str(tmp_path), shuffle=0)
    for read in (data.stream("train"), data.samples("train"), data.train_dataloader()):
        with pytest.raises(UserError, match=r"none of the \d samples .* longer than the context of 256 .*too_long=cut"):
            list(read)


def test_whatever_a_sample_does_to_other_code_it_is_one_broken_sample(
    small: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, count = type(small.preprocessing).__call__, [0]

    def preprocess(self: Any, image: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise ZeroDivisionError("a side of\nlength 0")
        return usual(self, image)

    monkeypatch.setattr(type(small.preprocessing), "__call__", preprocess)
    write_tar(tmp_path / "a.tar", [m for n in range(4) for m in sample(f"{n}")])
    data = ImageTextData(small, train=str(tmp_path), batch_size=4, shuffle=0, max_skipped=0.5)
    (read,) = data.stream("train").read()
    assert read.batch.keys == ["0", "2", "3"]
    assert read.skipped == [("1", "it cannot be read (ZeroDivisionError: a side of length 0)", 1)]


def test_want_of_memory_is_no_fault_of_a_sample(
    small: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preprocess(self: Any, image: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(type(small.preprocessing), "__call__", preprocess)
    write_tar(tmp_path / "a.tar", sample("1"))
    with pytest.raises(MemoryError):
        list(ImageTextData(small, train=str(tmp_path), max_skipped=1.0).stream("train"))


def test_a_rank_whose_own_part_is_too_long_goes_on_with_the_others(small: Processor, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [m for n in range(4) for m in sample(f"{n}", GOOD if n % 2 else LONG)])
    data = ImageTextData(small, train=str(tmp_path), batch_size=1, shuffle=0)
    first = data.stream("train")
    first.ranks = 2
    assert [batch.keys for batch in first] == [["1"], ["3"]]
    assert all(batch.answers == [] for batch in first)  # they stand in for what this rank lacks


def test_an_image_that_no_square_holds_is_one_broken_sample(small: Processor, tmp_path: Path) -> None:
    tall = Image.new("L", (4, 20000))
    stream = io.BytesIO()
    tall.save(stream, "PNG")
    write_tar(tmp_path / "a.tar", sample("tall", image=stream.getvalue()) + sample("good"))
    squares = dataclasses.replace(small, tiling=OneView(pad_to_square=True))
    (read,) = ImageTextData(squares, train=str(tmp_path), max_skipped=1.0).stream("train").read()
    assert read.batch.keys == ["good"]
    assert "cannot be padded to a square" in read.skipped[0].cause
