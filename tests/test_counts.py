"""What shards hold, counted: samples of every kind by hand, and sums of counts."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import pytest
from PIL import Image

from datamodules.shards.counts import Counts, captions_of, spread_of, texts_of, turns_of, type_of


def picture(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "png")
    return stream.getvalue()


CHAT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "red"},
    ]
}
MEDIA = {"0.png": picture(30, 20), "1.png": picture(10, 20), "0.mp4": b"12345", "2.jpg": b"no picture"}


def counted(*samples: tuple[dict[str, Any], dict[str, bytes]]) -> Counts:
    counts = Counts()
    for record, media in samples:
        counts.add(record, media)
    return counts


def test_a_conversation_is_counted() -> None:
    counts = counted((CHAT, MEDIA))
    size = {"png": len(MEDIA["0.png"]) + len(MEDIA["1.png"]), "mp4": 5, "jpg": 10}
    assert counts == Counts(
        samples=1,
        conversations=1,
        turns=2,
        images=3,
        videos=1,
        unreadable=1,
        sizes=Counter(size),
        text=Counter({"16": 1}),  # "what?" and "red" are eight characters
        widths=Counter({"30": 1, "10": 1}),
        heights=Counter({"20": 2}),
    )


def test_captions_are_counted_one_by_one() -> None:
    counts = counted(({"captions": ["a", "a cat", "", 7]}, {}), ({"caption": "a cat on a mat"}, {}), ({}, {}))
    assert (counts.samples, counts.conversations, counts.captions, counts.turns) == (3, 0, 4, 0)
    assert counts.text == {"2": 1, "8": 1, "1": 2, "16": 1}


def test_frames_are_of_videos_and_no_images() -> None:
    media = {f"{n}.png": picture(4, 4) for n in range(5)}
    counts = counted(({"frames": [3, None, "x"]}, media))
    assert (counts.frames, counts.images, counts.videos) == (3, 2, 1)


def test_two_counts_add_up_to_the_counts_of_both() -> None:
    samples = [(CHAT, MEDIA), ({"caption": "a cat"}, {"0.png": picture(30, 7)})]
    counts = counted(samples[0])
    counts += counted(samples[1])
    assert counts == counted(*samples)
    assert Counts.from_json(counts.to_json()) == counts
    assert list(counts.to_json()["sizes"]) == ["jpg", "mp4", "png"]  # in the same order whatever came first
    again = Counts.from_json(counts.to_json())
    again += counts
    assert (again.samples, again.widths["30"]) == (4, 4)


def test_a_summary_tells_texts_by_length_and_sizes_by_their_middle() -> None:
    counts = counted(*[({"caption": "x" * n}, {"0.png": picture(n, 5)}) for n in (1, 3, 9, 20)])
    summary = counts.summary()
    assert list(summary["text"].items()) == [("<2", 1), ("<4", 1), ("<16", 1), ("<32", 1)]
    assert summary["widths"] == {"min": 1, "median": 3, "max": 20}
    assert summary["heights"] == {"min": 5, "median": 5, "max": 5}
    assert summary["samples"] == summary["images"] == 4
    assert spread_of(Counter()) is None
    assert spread_of(Counter({"100": 1, "9": 3})) == {"min": 9, "median": 9, "max": 100}


@pytest.mark.parametrize(
    ("record", "texts", "turns"),
    [
        (CHAT, ["what?", "red"], 2),
        ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}, 3]}, ["why?", "so"], 2),
        ({"messages": "none"}, [], 0),
        ({}, [], 0),
    ],
)
def test_texts_are_found_in_either_form(record: dict[str, Any], texts: list[str], turns: int) -> None:
    assert [text for text in texts_of(record) if text] == texts
    assert len(turns_of(record)) == turns


def test_captions_are_found_in_either_form() -> None:
    assert captions_of({"caption": "a"}) == captions_of({"captions": "a"}) == ["a"]
    assert captions_of({"captions": ["a", "b", 3]}) == ["a", "b"]
    assert captions_of({"caption": 3}) == captions_of({}) == []
    assert type_of("0.jpg") == "jpg"
    assert type_of("0.tar.gz") == "gz"
