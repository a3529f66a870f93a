"""Rows of several conversations: each answers as if it were alone in its row."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ask, awaken, small, summed_loss
from families import LOOKING_UP, VARIED
from hypothesis import given
from hypothesis import strategies as st

from datamodules.batches import pack_rows
from datamodules.image_text import ImageTextData
from lavi.batch import IGNORE, Batch
from lavi.data.chat import Encoded
from lavi.data.collator import EncodedSample
from lavi.errors import UserError
from lavi.fusion.casa import CASA
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.deepstack import DeepStackFusion
from lavi.fusion.evs import EVS
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.pruning import FastV
from lavi.fusion.vica import ViCA
from lavi.language.load import NOT_PACKED
from lavi.model import VisionLanguageModel
from lavi.visor.fusion import VisorFusion

FUSIONS: dict[str, Any] = {
    "concat": ConcatFusion,
    "lavi": lambda: LaViFusion(every=2, generator=small()),
    "lavi-pooled": lambda: LaViFusion(every=2, generator=small("pooled")),
    "cross-attention": lambda: CrossAttentionFusion(every=2),
    "casa": lambda: CASA(every=2),
    "evs": lambda: EVS(keep=0.5),
    "deepstack": lambda: DeepStackFusion(levels=3),
}
CASES = [(family, name) for family in VARIED if family not in NOT_PACKED for name in ("concat", "lavi")]
CASES += [(family, "concat") for family in FAMILIES if family not in (*VARIED, *NOT_PACKED)]
CASES += [(family, name) for family in LOOKING_UP for name in ("lavi", "cross-attention")]
CASES += [("qwen2", name) for name in FUSIONS if name not in ("concat", "lavi")]

SAMPLES = [
    ask(1, "what colour is the circle?", answer="red", key="a"),
    ask("hello", 2, "which image has the red circle?", 3, answer="first", key="b"),
    ask("is there a blue square?", answer="yes", key="c"),
    ask(4, 5, "which image has the cross?", answer="second", key="d"),
    ask("what?", 6, answer="small", key="e"),
]
ROWS = [[0, 1, 2], [3, 4]]


def alone_and_packed(model: VisionLanguageModel) -> tuple[list[Batch], Batch]:
    ready = [model.processor.encode(sample) for sample in SAMPLES]
    return [model.processor.collate([one]) for one in ready], model.processor.collate(
        [[ready[number] for number in row] for row in ROWS]
    )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_conversation_answers_as_if_it_were_alone(build, case: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    """Text, positions, images, the numbers of images: nothing of a neighbour in the row is seen."""
    family, name = case
    model = build(FUSIONS[name](), family=family)
    awaken(model.fusion)
    alone, together = alone_and_packed(model)
    assert together.packed is not None
    assert len(together) == 2
    with torch.no_grad():
        logits = model(together)
        for row, numbers in enumerate(ROWS):
            for (start, stop), number in zip(together.packed[row], numbers, strict=True):
                torch.testing.assert_close(logits[row, start:stop], model(alone[number])[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", NOT_PACKED)
def test_a_family_that_would_not_is_refused(build, family: str) -> None:  # type: ignore[no-untyped-def]
    model = build(ConcatFusion(), family=family)
    with pytest.raises(UserError, match=r"data\.packing=null"):
        model(alone_and_packed(model)[1])


@pytest.mark.parametrize("name", FUSIONS)
def test_the_loss_is_that_of_the_conversations_one_by_one(build, name: str) -> None:  # type: ignore[no-untyped-def]
    model = build(FUSIONS[name]())
    awaken(model.fusion)
    alone, together = alone_and_packed(model)
    with torch.no_grad():
        total, tokens = summed_loss(model(together), together.labels)
        parts = [summed_loss(model(batch), batch.labels) for batch in alone]
    assert tokens == sum(count for _, count in parts)
    torch.testing.assert_close(total, sum(loss for loss, _ in parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fusion",
    [lambda: VisorFusion(cross_attention=2, self_attention=1), lambda: FastV(layer=1), lambda: ViCA(layers=[1])],
    ids=["visor", "fastv", "vica"],
)
def test_a_fusion_that_would_mix_them_refuses(build, fusion: Any) -> None:  # type: ignore[no-untyped-def]
    model = build(fusion())
    _, together = alone_and_packed(model)
    with pytest.raises(UserError, match=r"reads rows of one conversation each: set data.packing=null"):
        model(together)


def ready(length: int, key: str) -> EncodedSample:
    return EncodedSample(key, Encoded([0] * length, [IGNORE] * length, [], []), torch.zeros(0, 3, 8, 8), [], length)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_rows_hold_every_sample_once_and_no_more_than_fits(lengths: list[int]) -> None:
    samples = [ready(length, str(number)) for number, length in enumerate(lengths)]
    rows = pack_rows(samples, 50)
    assert Counter(one.key for row in rows for one in row) == Counter(one.key for one in samples)
    assert all(sum(one.length for one in row) <= 50 for row in rows)
    assert len(rows) <= 2 * -(-sum(lengths) // 50) + 1  # first fit: at most one row is half empty


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_training_batches_lose_nothing_and_resume(build, scenes: Path, workers: int) -> None:  # type: ignore[no-untyped-def]
    processor = build(ConcatFusion()).processor

    def data() -> ImageTextData:
        settings = {"packing": 200, "batch_size": 2, "bucket": 10, "shuffle": 25, "workers": workers}
        return ImageTextData(processor, train=str(scenes / "train"), **settings)

    from test_shards import read_batches

    whole = read_batches(data(), 70)
    first, second = data(), data()
    begun = read_batches(first, 17)
    second.load_state_dict(first.state_dict())
    assert begun + read_batches(second, 53) == whole
    keys = [key for batch in whole for key in batch]
    assert len(keys) > 70 * 2 * 2  # more than two conversations a row
    assert len(set(keys)) == 240


def test_packed_batches_are_full(build, scenes: Path) -> None:  # type: ignore[no-untyped-def]
    processor = build(ConcatFusion()).processor
    data = ImageTextData(processor, train=str(scenes / "train"), packing=200, batch_size=4, bucket=5)
    sizes = [len(read.batch) for read in itertools.islice(data.train_dataloader(), 30)]
    assert sum(size == 4 for size in sizes) > 22


def test_long_and_short_conversations_share_batches(build, scenes: Path) -> None:  # type: ignore[no-untyped-def]
    """Rows are filled longest first; cut as they come, a batch would hold nothing but long ones, or short ones."""
    processor = build(LaViFusion(every=1)).processor
    data = ImageTextData(processor, train=str(scenes / "train"), packing=100, batch_size=4, bucket=10)
    batches = [read.batch for read in itertools.islice(data.train_dataloader(), 40)]
    lengths = [[stop - start for row in batch.packed or [] for start, stop in row] for batch in batches]
    means = [statistics.mean(batch) for batch in lengths]
    assert statistics.pstdev(means) < 0.5 * statistics.pstdev(itertools.chain(*lengths))


def test_flash_attention_would_mix_them_and_refuses(build) -> None:  # type: ignore[no-untyped-def]
    model = build(ConcatFusion())
    _, together = alone_and_packed(model)
    model.language.attention = "flash_attention_2"
    with pytest.raises(UserError, match=r"'flash_attention_2' would let .* see each other: set data.packing=null"):
        model(together)


def test_a_sample_longer_than_a_row_is_left_out_by_name(build, scenes: Path) -> None:  # type: ignore[no-untyped-def]
    processor = build(ConcatFusion()).processor
    data = ImageTextData(processor, train=str(scenes / "train"), packing=20)
    with pytest.raises(UserError, match=r"longer than the context of 20 tokens"):
        next(iter(data.train_dataloader()))
