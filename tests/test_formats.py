"""Formats and readers of one's own."""

from __future__ import annotations

import io
import json
import multiprocessing
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused, small
from PIL import Image
from test_pack import png, raw_of, said, turns
from test_shards import write_tar

from datamodules.formats.base import SampleFormat
from datamodules.formats.captions import read_coco
from datamodules.formats.conversations import Conversations
from datamodules.formats.datasets import read_dataset
from datamodules.formats.entries import BadEntry, Cell
from datamodules.formats.files import Source
from datamodules.formats.json_lists import read_json
from datamodules.formats.readers import READERS
from datamodules.formats.tables import chosen_columns, item_of_row, read_table
from datamodules.image_text import ImageTextData
from datamodules.moving import mp4
from datamodules.scenes import make_samples
from datamodules.shards.processes import in_order
from datamodules.shards.read import BrokenSample, Raw
from datamodules.shards.write import shard_jobs, write_shards
from lavi.batch import Sample, Video
from lavi.data.frame_sampling import FrameSampling
from lavi.data.images import open_image
from lavi.errors import UserError
from lavi.fusion.lavi import LaViFusion


class ClassLabels(SampleFormat):
    """A format of one's own: an image, and the number of its class."""

    types = ("cls",)

    def __init__(self, *, names: list[str]) -> None:
        self.names = names

    def decode(self, raw: Raw) -> Sample:
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
        answer = {"role": "assistant", "content": self.names[int(raw["cls"])]}
        return Sample(raw["__key__"], [question, answer], [open_image(raw["png"])])


def read_lines(file: Path) -> Source:
    """A reader of one's own: ``IMAGE QUESTION`` a line."""

    def items() -> Iterator[dict[str, Any]]:
        for line in file.read_text().splitlines():
            image, _, question = line.partition(" ")
            yield {"image": image, "conversations": turns(f"<image>{question}")}

    return Source(file.name, items())


def image_of(kind: str, colour: Any = "red") -> bytes:
    stream = io.BytesIO()
    more = {"save_all": True, "append_images": [Image.new("RGB", (9, 5))]} if kind == "MPO" else {}
    Image.new("RGB", (9, 5), colour).save(stream, kind, **more)
    return stream.getvalue()


def labelled(folder: Path, labels: list[bytes]) -> str:
    folder.mkdir()
    images = [(f"k{number}.png", png(number + 1)) for number in range(len(labels))]
    classes = [(f"k{number}.cls", label) for number, label in enumerate(labels)]
    write_tar(folder / "a.tar", [member for sample in zip(images, classes, strict=True) for member in sample])
    return str(folder)


def test_a_format_of_one_s_own_is_read_and_its_errors_are_counted(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    processor = build(LaViFusion(generator=small())).processor
    folder = labelled(tmp_path / "data", [b"0", b"1", b"7", b"x"])
    data = ImageTextData(processor, train=folder, format=ClassLabels(names=["cat", "dog"]), max_skipped=0.9)
    samples = data.sample_stream("train")
    assert [sample.messages[1]["content"] for sample in samples] == ["cat", "dog"]
    causes = list(samples.left_out)
    assert causes[0] == "it cannot be read (IndexError: list index out of range)"
    assert causes[1].startswith("it cannot be read (ValueError: invalid literal for int()")


def test_a_recipe_names_a_format_of_one_s_own(run, tiny_recipe: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = yaml.safe_load(tiny_recipe.read_text())
    own = {"_target_": "test_formats.ClassLabels", "names": ["red", "blue"]}
    recipe["data"] |= {"train": labelled(tmp_path / "data", [b"0", b"1"] * 4), "validation": None, "format": own}
    recipe["trainer"] |= {"max_steps": 3}
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    status, out, err = run("lavi.fit", "--recipe", tiny_recipe, "--run", "out")
    assert status == 0, err
    assert "what is it?" in out
    recipe["data"]["format"] = {"_target_": "datamodules.mixture.Mixture", "sources": {"a": "x"}}
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    refused(run("lavi.fit", "--recipe", tiny_recipe, "--run", "new"), "'data.format' must be SampleFormat")


def test_a_reader_of_one_s_own_is_packed(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number + 1))
    Path("d.txt").write_text("0.png why?\n2.png how?\ngone.png what?\n")
    command = ("datamodules.pack", "--images", "images", "--out", "out", "--reader")
    refused(run(*command, "test_formats.read_lines", "d.txt"), "1 of 3 entries of d.txt", "there is no image")
    status, _, err = run(*command, "test_formats.read_lines", "d.txt", "--max-skipped", 0.5)
    assert status == 0, err
    assert [said(raw)["messages"][0]["content"][1]["text"] for raw in raw_of()] == ["why?", "how?"]
    assert "reader test_formats.read_lines" in json.loads(Path("out/index.json").read_text())["made_by"]
    refused(run(*command, "test_formats.gone", "d.txt"), "--reader: there is no test_formats.gone")
    refused(run(*command, "gone", "d.txt"), "--reader: there is no gone")
    refused(run(*command, "pathlib.Path", "d.txt"), "--reader: pathlib.Path gives a PosixPath, no datamodules.formats")
    refused(run(*command, "test_formats.read_lines", "gone.txt"), "--reader: there is no gone.txt")
    refused(run(*command, "datamodules.formats.readers.READERS", "d.txt"), "READERS is no function")


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(usual, force=True)


def test_shards_are_packed_alike_however_processes_start(start_method: str, tmp_path: Path) -> None:
    jobs = shard_jobs(6, 3)
    make = partial(make_samples, split="test", seed=0, turns=1)
    written = write_shards(tmp_path / "out", jobs, make, made_by={"test": 1}, workers=2)
    assert (written.samples, written.shards) == (6, 2)
    expected = [sample["__key__"] for job in jobs for sample in make(job)]
    assert [raw["__key__"] for raw in raw_of(tmp_path / "out")] == expected
    assert list(in_order(abs, range(-5, 5), workers=2)) == [abs(number) for number in range(-5, 5)]


def test_the_reader_of_each_option_reads_what_its_name_says(tmp_path: Path) -> None:
    """The same captions, in each of the forms; columns and a split are handed on to those that have them."""
    datasets = pytest.importorskip("datasets")
    files = {kind: tmp_path / f"d.{kind}" for kind in ("json", "coco", "csv", "dataset")}
    files["json"].write_text(json.dumps([{"image": "a.jpg", "captions": ["a cat"]}]))
    files["coco"].write_text(json.dumps({"images": IMAGES, "annotations": CAPTIONS}))
    files["csv"].write_text("file,words\na.jpg,a cat\n")
    one = datasets.Dataset.from_dict({"image": ["a.jpg"], "words": ["a cat"]})
    other = one.map(lambda row: {"words": "a dog"})
    datasets.DatasetDict({"train": other, "test": one}).save_to_disk(files["dataset"])
    assert list(READERS) == list(files)
    for kind, file in files.items():
        columns = {"caption": "words"} if kind in ("csv", "dataset") else {}
        source = READERS[kind](file, columns, "test" if kind == "dataset" else None)
        assert source.name == file.name
        (item,) = source.items
        assert isinstance(item, dict)
        assert item["image"] in ("a.jpg", ["a.jpg"])
        assert item["captions"] == ["a cat"]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_json, read_coco, lambda file: read_table(file, {})], ids=["json", "coco", "csv"])
def test_a_file_that_is_not_there_and_one_that_cannot_be_read_are_told_apart(read: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^there is no .*gone\.$"):
        read(tmp_path / "gone")
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be read \(Is a directory\)\.$"):
        read(tmp_path)


def test_files_that_are_no_lists_say_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    for text, words in (
        ("[]", "is not a list of conversations, or an empty one"),
        ("[{]", r"is not JSON \(Expecting property name"),
        ("no JSON", r"is not JSON \(Expecting value"),
        ('{"a": 1}', ""),
    ):
        file.write_text(text)
        if words:
            with pytest.raises(UserError, match=rf"^{file} {words}"):
                list(read_json(file).items)
        else:
            assert list(read_json(file).items) == [{"a": 1}]
    file.write_text('\n{"a": 1}\n\nno JSON\n{"a": 2}\n')
    first, bad, second = read_json(file).items
    assert (first, second) == ({"a": 1}, {"a": 2})
    assert isinstance(bad, BadEntry)
    assert str(bad) == "entry of line 4 is not JSON"
    assert (read_json(file).name, read_json(file).total) == ("d.json", None)
    file.write_text("\ufeff\n [1, 2]")
    assert (read_json(file).name, read_json(file).total, list(read_json(file).items)) == ("d.json", 2, [1, 2])


IMAGES, CAPTIONS = [{"id": 1, "file_name": "a.jpg"}], [{"id": 5, "image_id": 1, "caption": "a cat"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"images": IMAGES}, "it has no lists 'images' and 'annotations'"),
        ({"annotations": CAPTIONS}, "it has no lists 'images' and 'annotations'"),
        ({"images": IMAGES, "annotations": [1]}, "it has no lists 'images' and 'annotations'"),
        ([IMAGES, CAPTIONS], "it has no lists 'images' and 'annotations'"),
        ({"images": [{"file_name": "a.jpg"}], "annotations": CAPTIONS}, "lists images whose 'id' is no number"),
        ({"images": IMAGES, "annotations": [{"image_id": 1}]}, "has annotations without 'caption'"),
    ],
)
def test_what_is_no_coco_file_says_why(content: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_coco(tmp_path / "c.json")


def test_coco_captions_are_grouped_by_image(tmp_path: Path) -> None:
    annotations = [*CAPTIONS, {"id": 6, "image_id": 1, "caption": "it"}, {"id": 7, "image_id": [1], "caption": "x"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": IMAGES, "annotations": annotations}))
    source = read_coco(tmp_path / "c.json")
    bad, item = source.items
    assert (source.name, source.total) == ("c.json", 1)
    assert str(bad) == "entry '7' describes an image that is not listed"
    assert item == {"id": 1, "image": "a.jpg", "captions": ["a cat", "it"]}


# --- tables -----------------------------------------------------------------------------------------------------------


def items_of(text: str, tmp_path: Path, *, name: str = "d.csv", **columns: str) -> list[Any]:
    (tmp_path / name).write_bytes(text.encode())
    return list(read_table(tmp_path / name, columns).items)


def test_cells_keep_their_newlines_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    text = '\ufeffquestion,answer\r\n"two\nlines?","yes,\r\n""both"""\r\n\r\nwhy?,so\r\n'
    first, second = items_of(text, tmp_path)
    assert first["conversations"] == turns("two\nlines?", 'yes,\r\n"both"')
    assert second["conversations"] == turns("why?", "so")
    assert (first["id"], second["id"]) == ("1", "3")  # the blank line is a row without cells
    assert (
        items_of("question\tanswer\nwhat, then?\tso\n", tmp_path, name="d.TAB")[0]["conversations"][0]["value"]
        == "what, then?"
    )


def test_a_header_is_read_as_it_stands_and_short_rows_are_no_items(tmp_path: Path) -> None:
    assert items_of('"a\r\nb"\r\nwords\r\n', tmp_path, caption="a\r\nb")[0]["captions"] == ["words"]
    (short,) = items_of("image,caption\na.png\n", tmp_path)
    assert short.cause == "has another number of cells"
    assert str(short) == "entry of row 1 has 1 cells, the header 2"


def test_an_empty_table_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "blank.csv").write_text("\nquestion,answer\n")
    with pytest.raises(UserError, match=r"blank\.csv has no header: its first line names the columns\.$"):
        read_table(tmp_path / "blank.csv", {})
    (tmp_path / "d.csv").write_text("question,x\n")
    with pytest.raises(UserError, match=r"d\.csv has the columns question, x: question and answer"):
        read_table(tmp_path / "d.csv", {})
    (tmp_path / "d.csv").write_bytes(b"question,answer\n\xff,b\n")
    with pytest.raises(UserError, match=r"d\.csv is no text in UTF-8 \(invalid start byte at byte 16\)"):
        list(read_table(tmp_path / "d.csv", {}).items)


def test_a_question_with_its_own_mark_gets_no_second_one(tmp_path: Path) -> None:
    rows = ("a.jpg,,what <image> is it?,x", "a.jpg,v.mp4,what?,x", ",v.mp4,<video> what?,x", ",,what?,x")
    text = "\n".join(["image,video,question,answer", *rows])
    questions = [item["conversations"][0]["value"] for item in items_of(text, tmp_path)]
    assert questions == ["what <image> is it?", "<image>\n<video>\nwhat?", "<video> what?", "what?"]


def test_a_file_is_an_image_or_a_video_by_its_type(tmp_path: Path) -> None:
    text = "id,file,caption\n,a.jpg,x\nv,b.mp4,y\n"
    assert items_of(text, tmp_path) == [
        {"id": "1", "image": ["a.jpg"], "video": [], "captions": ["x"]},
        {"id": "v", "image": [], "video": ["b.mp4"], "captions": ["y"]},
    ]


def test_columns_are_those_named_then_those_known() -> None:
    table = ["Image", "caption", "text", "question", "answer", "IMAGE"]
    assert chosen_columns(table, {}, "t")["image"] == "Image"  # the first of a name
    assert chosen_columns(table, {}, "t")["caption"] == "caption"
    assert chosen_columns(table, {"caption": "text"}, "t")["caption"] == "text"
    assert "caption" not in chosen_columns(["question", "answer", "text"], {"question": "text"}, "t")
    assert chosen_columns(["messages"], {}, "t") == {"messages": "messages"}
    with pytest.raises(UserError, match=r"--columns: 'imag' is no kind of column, did you mean 'image'\?"):
        chosen_columns(table, {"imag": "x"}, "t")
    with pytest.raises(UserError, match=r"--columns: t has no column 'txt', did you mean 'text'\?"):
        chosen_columns(table, {"caption": "txt"}, "t")
    with pytest.raises(UserError, match=r"^t has the columns question, x: .* as in --columns question=...,answer=...$"):
        chosen_columns(["question", "x"], {}, "t")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "?", "answer": ["a"]}, "entry 'n' has an answer that is a list, and no text"),
        ({"question": {"a": 1}, "answer": "a"}, "entry 'n' has a question that is a mapping, and no text"),
        ({"question": "?", "answer": " "}, "entry 'n' has no answer"),
        ({"question": None, "answer": "a"}, "entry 'n' has no question"),
        ({"caption": [["a"]]}, "entry 'n' has a caption that is a list, and no text"),
        ({"question": "?", "answer": None, "caption": "c", "id": ""}, {"image": [], "video": [], "captions": ["c"]}),
        ({"messages": [1], "question": "?", "answer": "a"}, {"image": [], "video": [], "conversations": [1]}),
        ({"caption": None}, {"image": [], "video": [], "captions": []}),
        ({"caption": ("a", None)}, {"image": [], "video": [], "captions": ["a", None]}),
    ],
)
def test_a_row_is_an_item_or_a_bad_entry(row: dict[str, Any], expected: Any) -> None:
    item = item_of_row(row, name="n")
    if isinstance(expected, str):
        assert isinstance(item, BadEntry)
        assert str(item) == expected
    else:
        assert item == {"id": "n"} | expected


# --- datasets ---------------------------------------------------------------------------------------------------------


def test_image_cells_that_are_paths_name_their_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"^there is no folder .*gone\.$"):
        read_dataset(tmp_path / "gone", {})
    datasets.Dataset.from_dict({"image": ["a.png", None], "caption": ["x", "y"]}).save_to_disk(tmp_path / "disk")
    source = read_dataset(tmp_path / "disk", {})
    assert (source.name, source.total) == ("disk", 2)
    assert [item["image"] for item in source.items] == [["a.png"], []]  # type: ignore[index]


@pytest.mark.parametrize("name", ["a.parquet", "data-00000-of-00001.arrow"])
def test_files_of_datasets_that_were_not_fetched_are_named(name: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer"):
        read_dataset(tmp_path, {})


def test_datasets_that_fail_without_a_word_are_refused_by_the_kind_of_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(folder: str) -> None:
        raise ValueError

    monkeypatch.setattr(datasets, "load_from_disk", fail)
    with pytest.raises(UserError, match=r"is neither written by save_to_disk nor a folder .* \(ValueError\)\.$"):
        read_dataset(tmp_path, {})


def test_keys_that_datasets_fill_up_with_nothing_are_left_out(tmp_path: Path) -> None:
    """Of objects of different keys Arrow makes objects of all keys."""
    datasets = pytest.importorskip("datasets")
    messages = [
        {"role": "user", "content": "what?", "more": {"seen": None, "asked": 1}},
        {"role": "assistant", "content": "red", "family": "colour"},
    ]
    datasets.Dataset.from_dict({"messages": [messages]}).save_to_disk(tmp_path / "disk")
    (item,) = read_dataset(tmp_path / "disk", {}).items
    del messages[0]["more"]["seen"]  # type: ignore[attr-defined]
    assert item["conversations"] == messages  # type: ignore[index]


def test_image_cells_that_hold_images_say_what_they_hold(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    held = [image_of(kind) for kind in ("PNG", "JPEG", "MPO", "WEBP")]
    cells = [[{"bytes": data, "path": None} for data in (*held, b"none")], [{"bytes": None, "path": "a.png"}]]
    datasets.Dataset.from_dict({"images": cells, "caption": ["x", "y"]}).save_to_disk(tmp_path / "disk")
    first, second = read_dataset(tmp_path / "disk", {}).items
    assert first["image"] == [  # type: ignore[index]
        Cell(kind, len(data), zlib.crc32(data), 0, "images", number)
        for number, (kind, data) in enumerate(
            zip(("png", "jpg", "jpg", "webp", "not an image"), (*held, b"none"), strict=True)
        )
    ]
    assert second["image"] == ["a.png"]  # type: ignore[index]


# --- conversations ----------------------------------------------------------------------------------------------------


def test_causes_end_without_a_full_stop_wherever_they_are_told() -> None:
    format = Conversations()
    raw = {"__key__": "k", "json": json.dumps({"conversations": [{"from": "parrot", "value": "hi"}]}).encode()}
    for read in (format.decode, format.check):
        with pytest.raises(BrokenSample) as error:
            read(raw)
        assert error.value.cause.startswith("has a turn without 'value'")
        assert not error.value.cause.endswith(".")


def test_parts_lose_what_no_template_reads() -> None:
    content = [{"type": "image", "text": 5, "url": "x"}, {"type": "text", "text": "what?", "more": 1}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    raw = {"__key__": "k", "json": json.dumps({"messages": messages}).encode(), "png": png(2)}
    assert Conversations().decode(raw).messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what?"}]


def test_a_caption_of_a_video_asks_for_it_and_gets_its_sampled_frames() -> None:
    raw = {
        "__key__": "k",
        "txt": b"it grows dark",
        "mp4": mp4([Image.new("RGB", (32, 32), (n, n, n)) for n in range(9)]),
    }
    sample = Conversations(video=FrameSampling(frames=4), caption_prompt="What happens?").decode(raw)
    assert sample.messages == [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": "it grows dark"},
    ]
    (video,) = sample.images
    assert isinstance(video, Video)
    assert len(video.frames) == 4


def test_images_and_videos_stand_where_each_is_asked_for() -> None:
    """Whichever comes first among the members: each kind is in its own order."""
    parts = [{"type": kind} for kind in ("video", "image", "video")]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    clips = [mp4([Image.new("RGB", (16, 16), (n, n, n)) for _ in range(4)]) for n in (0, 200)]
    raw = {"__key__": "k", "json": json.dumps({"messages": messages}).encode()}
    raw |= {"0.png": png(2), "1.mp4": clips[0], "2.mp4": clips[1]}
    first, picture, second = Conversations().decode(raw).images
    assert isinstance(first, Video)
    assert isinstance(second, Video)
    assert isinstance(picture, Image.Image)
    assert [round(video.frames[0].getpixel((0, 0))[0], -2) for video in (first, second)] == [0, 200]  # type: ignore[index]


def test_a_clip_of_extracted_frames_is_those_frames() -> None:
    messages = [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "a"}]
    pictures = {f"{n}.png": image_of("PNG", (n, n, n)) for n in range(10)}

    def video(**record: Any) -> Video:
        told = {"messages": messages, "frames": [10], "clip": [5, 8]} | record
        raw = {"__key__": "k", "json": json.dumps(told).encode(), **pictures}
        (shown,) = Conversations(video=FrameSampling(frames=10)).decode(raw).images
        assert isinstance(shown, Video)
        return shown

    seen = video(fps=1)
    assert [frame.getpixel((0, 0))[0] for frame in seen.frames] == [5, 6, 7]  # type: ignore[index]
    assert (seen.seconds, seen.duration) == ([0.0, 1.0, 2.0], 3.0)
    with pytest.raises(BrokenSample, match="pack it with its 'fps'"):
        video()
    with pytest.raises(BrokenSample, match="lies outside its frames, which last 10"):
        video(fps=1, clip=[5, 30])
    with pytest.raises(BrokenSample, match="lies outside"):
        video(fps=1, clip=[12, 13])


def test_parts_that_number_their_images_otherwise_than_they_stand_are_refused() -> None:
    """The list of images has the order in which they are shown; another order would show each in another's place."""

    def decoded(*numbers: Any) -> list[Any]:
        parts = [{"type": "image", "index": number} for number in numbers]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
        raw = {"__key__": "k", "json": json.dumps({"messages": messages}).encode(), "0.png": png(2), "1.png": png(2)}
        return Conversations().decode(raw).images

    with pytest.raises(BrokenSample, match="its parts number their images"):
        decoded(1, 0)
    for numbers in ((0, 1), (1, 2), (0, 0), (None, None)):  # from any number on, or anew in each message
        assert len(decoded(*numbers)) == 2


def test_image_members_are_of_a_few_formats_whatever_their_names_say() -> None:
    """Pillow reads TIFF; a member of a shard may come from anywhere."""
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        image = Conversations().decode({"__key__": "k", "txt": b"red", "jpg": image_of(kind)}).images[0]
        assert isinstance(image, Image.Image)
        assert image.size == (9, 5)
    for kind in ("TIFF", "PPM", "ICO"):
        with pytest.raises(BrokenSample, match="its member 'jpg'"):
            Conversations().decode({"__key__": "k", "txt": b"red", "jpg": image_of(kind)})
