"""Samples to a batch: where each token, image and answer stands, written out; and what is too long."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QWEN2, ask, image

from lavi.batch import IGNORE, Answer, ImageSlot, Layout, Sample, Video
from lavi.checkpoints.model_folder import build as build_model
from lavi.data.chat import Encoded, Turn
from lavi.data.collator import EncodedSample
from lavi.data.image_numbers import number_images
from lavi.data.processor import Processor, TooLong, one_bad_sample
from lavi.data.tiling import AnyRes
from lavi.data.timestamps import time_instruction
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.vision.openclip import OpenCLIPVision

SMALL, LARGE = Layout(size=(4, 4)), Layout(views=2, video=True)


def ready(key: str, length: int, *, images: dict[int, Layout] | None = None, source: str = "") -> EncodedSample:
    """A sample of ``length`` ids from 10 times its key on; the last two are an answer."""
    images = images or {}
    ids = [10 * int(key) + number for number in range(length)]
    labels = [IGNORE] * (length - 2) + ids[-2:]
    encoded = Encoded(ids, labels, list(images), [Turn(length - 2, length, f"family {key}", "easy")])
    views = sum(layout.views for layout in images.values())
    pixels = torch.full((views, 3, 2, 2), float(key))
    return EncodedSample(key, encoded, pixels, list(images.values()), length, source)


@pytest.fixture(scope="module")
def processor(build: Any) -> Processor:
    return build(ConcatFusion()).processor


FIRST = ready("1", 5, images={1: SMALL, 5: LARGE}, source="a")
SECOND = ready("2", 3, source="b")
THIRD = ready("3", 4, images={0: SMALL})


@pytest.mark.parametrize("left", [False, True])
def test_rows_are_padded_on_one_side(processor: Processor, left: bool) -> None:
    batch = processor.collate([FIRST, SECOND, THIRD], pad_left=left)
    pad, moved = processor.chat.pad_id, [0, 2 * left, 1 * left]
    rows = [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33]]
    for row, ids in enumerate(rows):
        start, stop = moved[row], moved[row] + len(ids)
        assert batch.spans[row] == (start, stop)
        assert batch.input_ids[row, start:stop].tolist() == ids
        assert batch.labels[row, start:stop].tolist() == [IGNORE] * (len(ids) - 2) + ids[-2:]
        assert batch.attention_mask[row].tolist() == [start <= column < stop for column in range(5)]
        padding = ~batch.attention_mask[row]
        assert (batch.input_ids[row][padding] == pad).all()
        assert (batch.labels[row][padding] == IGNORE).all()
    assert batch.image_slots == [
        ImageSlot(0, moved[0] + 1, SMALL),
        ImageSlot(0, moved[0] + 5, LARGE),
        ImageSlot(2, moved[2], SMALL),
    ]
    assert batch.answers == [
        Answer(row, moved[row] + len(ids) - 2, moved[row] + len(ids), f"family {row + 1}", "easy")
        for row, ids in enumerate(rows)
    ]
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 1, 1, 3]
    assert (batch.keys, batch.packed) == (["1", "2", "3"], None)


def test_a_row_may_hold_several_samples(processor: Processor) -> None:
    batch = processor.collate([[SECOND, FIRST], THIRD])
    assert batch.input_ids[0].tolist() == [20, 21, 22, 10, 11, 12, 13, 14]
    assert batch.spans == [(0, 8), (0, 4)]
    assert batch.packed == [[(0, 3), (3, 8)], [(0, 4)]]
    assert [slot.column for slot in batch.image_slots] == [3 + 1, 3 + 5, 0]
    assert [(a.row, a.start, a.stop) for a in batch.answers] == [(0, 1, 3), (0, 6, 8), (1, 2, 4)]
    assert batch.keys == ["2", "1", "3"]
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 1, 1, 3]
    assert processor.collate([[FIRST], [SECOND]]).packed is None


def test_a_sample_that_stands_in_keeps_its_place_and_counts_for_nothing(processor: Processor) -> None:
    filler = ready("4", 4, images={2: SMALL})
    filler.is_filler = True
    batch = processor.collate([SECOND, filler])
    assert batch.input_ids[1].tolist() == [40, 41, 42, 43]
    assert (batch.labels[1] == IGNORE).all()
    assert [answer.row for answer in batch.answers] == [0]
    assert len(batch.image_slots) == len(batch.pixels) == 1


def test_a_sample_is_its_words_and_the_views_of_its_images(build: Any) -> None:
    """An image alone is tiled, several are not; what stands in the sequence is counted by the fusion."""
    for fusion, inside in ((ConcatFusion(), True), (LaViFusion(), False)):
        model = VisionLanguageModel(
            vision=build(ConcatFusion()).vision,
            language=build(ConcatFusion()).language,
            fusion=fusion,
            tiling=AnyRes(max_grid=2),
        )
        processor = model.processor
        alone, both = ask(1, "what?", answer="red", key="x"), ask(1, 2, "which?", answer="first")
        single, pair = processor.encode(alone), processor.encode(both)
        assert single.key == "x"
        assert [layout.views for layout in pair.layouts] == [1, 1]
        assert single.layouts[0].views > 1
        for sample, encoded in ((alone, single), (both, pair)):
            assert len(encoded.pixels) == sum(layout.views for layout in encoded.layouts)
            visual = sum(model.fusion.tokens_in_language(layout, 16) for layout in encoded.layouts)
            assert encoded.length == len(encoded.encoded.ids) + visual
            assert (visual > 0) == inside
            assert processor.measure(sample) == (encoded.encoded, encoded.length)
        assert torch.equal(pair.pixels[1], model.vision.preprocessing(image(2)))
        words = processor.encode(ask("what?", answer="red"))
        assert words.pixels.shape == (0, *model.vision.pixel_shape)
        assert not words.encoded.image_columns


def test_a_prompt_ends_where_its_answer_begins(processor: Processor) -> None:
    sample = ask(1, "what?", answer="red")
    whole, prompt = (
        processor.encode(sample),
        processor.encode(Sample("s", sample.messages[:1], sample.images), prompt=True),
    )
    (turn,) = whole.encoded.turns
    assert prompt.encoded.ids == whole.encoded.ids[: turn.start]
    assert not prompt.encoded.turns
    assert (turn.family, turn.level) == ("all", "all")


def test_a_prompt_on_images_that_were_seen_is_that_prompt_without_pixels(processor: Processor) -> None:
    """What its images take of the context is what they took when they were seen, however they were cut."""
    asked = ask(1, "what?", answer="red", key="x")
    sample = Sample("x", asked.messages[:1], asked.images)
    whole = processor.encode(sample, prompt=True)
    for layouts, visual in ((whole.layouts, 16), ([Layout(views=5, video=True)], 5 * 4)):
        seen = processor.encode_seen(sample, layouts)
        assert (seen.key, seen.encoded, seen.layouts) == ("x", whole.encoded, layouts)
        assert seen.length == len(whole.encoded.ids) + visual
        assert seen.pixels.shape == (0, *processor.preprocessing.pixel_shape)


def test_a_conversation_fills_its_context_and_no_more(processor: Processor) -> None:
    sample = ask(1, "what?", answer="red")
    whole = processor.encode(sample)
    text = len(whole.encoded.ids)
    exact = Processor(
        processor.chat, processor.preprocessing, processor.tiling, processor.count_visual_tokens, whole.length
    )
    assert exact.encode(sample).length == whole.length == text + 16
    exact.context_length -= 1
    words = f"{text} text and 16 visual tokens, more than the context of {text + 15}: shorten it, or raise "
    with pytest.raises(TooLong, match=rf"{words}model\.context_length\.$") as refusal:
        exact.encode(sample)
    assert refusal.value.cause.startswith(f"longer than the context of {text + 15} tokens")
    with pytest.raises(TooLong):
        exact.measure(sample)


def test_an_error_of_one_sample_passes_and_its_cause_is_told() -> None:
    """In the words that are alike for all such samples, if it has some; want of memory is no sample's fault."""
    causes: list[str] = []
    for error in (TooLong(30, 10, 32), ValueError("no  image\nat all."), UserError("its image is cut short.")):
        with one_bad_sample(causes.append):
            raise error
    assert causes == [
        "longer than the context of 32 tokens (data.too_long=cut keeps its first turns)",
        "no image at all",
        "its image is cut short",
    ]
    with pytest.raises(MemoryError), one_bad_sample(causes.append):
        raise MemoryError
    with one_bad_sample(causes.append):
        pass
    assert len(causes) == 3


def test_a_film_says_how_long_it_is_where_that_is_asked_for(processor: Processor) -> None:
    film = Video([image(1), image(2)], seconds=[0.0, 1.5], duration=3.0)
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "red"},
    ]
    sample = Sample("s", messages, [film, image(3)])
    plain = processor.encode(sample)
    timed = Processor(
        processor.chat,
        processor.preprocessing,
        processor.tiling,
        processor.count_visual_tokens,
        processor.context_length,
        timestamps=True,
    ).encode(sample)
    assert len(timed.encoded.ids) > len(plain.encoded.ids)
    text = processor.chat.tokenizer.decode(timed.encoded.ids)
    assert text.index(time_instruction(film).strip()) < text.index("what?")
    assert [layout.views for layout in timed.layouts] == [2, 1]
    assert messages[0]["content"][1] == {"type": "image"}  # the sample stays as it is


def test_each_of_several_images_says_which_it_is_where_that_is_asked_for() -> None:
    """What a turn says of its images does not depend on what comes behind it."""
    pixels = image(1)
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    second = {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image"}]}
    two = {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "image"}]}
    words = {"role": "assistant", "content": "red"}
    said = [{"type": "text", "text": f"Image {number}: "} for number in (1, 2, 3)]
    assert number_images([first, words], [pixels]) == [first, words]
    assert number_images([first, words, second], [pixels] * 2) == [
        first,
        words,
        {"role": "user", "content": [second["content"][0], said[1], {"type": "image"}]},
    ]
    film = Video([pixels])
    assert number_images([two], [pixels, film, pixels])[0]["content"] == [
        *(said[0], {"type": "image"}, {"type": "video"}),
        *(said[1], {"type": "image"}),
    ]
    assert two["content"] == [{"type": "image"}, {"type": "video"}, {"type": "image"}]  # and the sample stays as it is
    unnamed = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "which?"}, words]
    assert number_images(unnamed, [pixels] * 2) == [
        unnamed[0],
        {"role": "user", "content": [said[0], {"type": "image"}, said[1], {"type": "image"}, *part("which?")]},
        words,
    ]
    assert number_images(unnamed, []) == unnamed


def part(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


def test_the_model_reads_the_numbers_of_images(build, tiny_recipe: Path) -> None:  # type: ignore[no-untyped-def]
    """Each before its image, where a recipe says so."""
    plain = build(ConcatFusion()).processor
    numbered = build_model(Recipe.load(tiny_recipe, ["model.image_numbers=true"])).processor
    sample = ask(1, 2, "which?", answer="red")
    encoded = numbered.encode(sample).encoded
    first, second = encoded.image_columns
    tokenizer = numbered.chat.tokenizer
    assert tokenizer.decode(encoded.ids[:first]).endswith("Image 1: ")
    assert tokenizer.decode(encoded.ids[first:second]) == "Image 2: "
    assert tokenizer.decode(encoded.ids).replace("Image 1: Image 2: ", "") == tokenizer.decode(
        plain.encode(sample).encoded.ids
    )
    alone = ask(1, "which?")
    assert plain.encode(alone).encoded == numbered.encode(alone).encoded


def of_open_clip(tokenizer: str) -> VisionLanguageModel:
    sizes = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8}
    return VisionLanguageModel(
        vision=OpenCLIPVision(config={"embed_dim": 16, "vision_cfg": sizes}),
        language=LanguageModel(config=QWEN2, tokenizer=tokenizer),
        fusion=ConcatFusion(newline=True),
        tiling=AnyRes(max_grid=2),
    )


def test_it_goes_to_another_process_without_a_weight(build, tokenizer: str) -> None:  # type: ignore[no-untyped-def]
    """Whatever starts that: what arrives encodes as what was sent."""
    film = Video([image(seed) for seed in range(2)], [0.0, 1.0], 2.0)
    filmed = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]}]
    filmed.append({"role": "assistant", "content": "red"})
    for model in (build(LaViFusion(every=2)), build(ConcatFusion()), of_open_clip(tokenizer)):
        processor = model.processor
        processor.encode(ask(1, "what?", answer="red"))  # what is computed once is sent with it, or computed again
        sent = pickle.dumps(processor)
        assert b"torch.nn" not in sent
        assert b"Fusion" not in sent
        arrived = pickle.loads(sent)
        for sample in (ask(1, "what is", 2, "this?", answer="red"), Sample("film", filmed, [film])):
            here, there = processor.encode(sample), arrived.encode(sample)
            assert (here.encoded, here.layouts, here.length) == (there.encoded, there.layouts, there.length)
            assert torch.equal(here.pixels, there.pixels)
