"""The questions of benchmarks as they are published: JSON, JSON lines, CSV, TSV, parquet; images and videos beside them
or inside.

    question file --record--> fields --templates--> prompt, image files, true answers
                        ^
    annotation file ----+  joined by a key, where answers lie in a file of their own
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import json
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from datamodules.formats.entries import natural_order
from datamodules.formats.files import allow_long_cells, load_json, read_head, reading
from datamodules.formats.frames import OpenedWhenAsked, from_frames
from datamodules.formats.options import Options, right_letter
from datamodules.shards.read import IMAGE_TYPES
from lavi.batch import Sample, Video, Visual
from lavi.config.files import sha256_of
from lavi.config.types import Count, Positive
from lavi.data.frame_sampling import FrameSampling
from lavi.data.images import open_image
from lavi.data.videos import VIDEO_TYPES, read_video
from lavi.errors import UserError, nearest, one_line
from lavi.evaluation.tasks import QuestionSource, UnreadableError

Record = dict[str, Any]
NUMBER = "#"
"""The field with the number of a question, from 0; ``file`` and ``folder`` are added, too, where it has none."""


class QuestionFile(QuestionSource):
    """Questions in a file (or in several, by a pattern), each a record with fields.

    A template is a text with fields in braces (``"{question}"``, ``"{metadata.kind}"``, ``"{image_id:012d}.jpg"``); a
    path leads to a field inside a record (``answers.*.answer``: of each of a list).

    Args:
        file: below the task's folder; of a pattern (``data/test-*.parquet``) all files, in order.
        within: path to the list of records, in a JSON file that has more than that. A mapping of records is a list,
            with its keys as the field ``key``.
        annotations: a file of records that bring more fields; ``annotations_within`` as ``within``.
        key: the field that is the same in a question and its annotation; ``annotations_key``: its name in these.
        where: only records whose fields have these values; true: any, but not nothing.
        prompt: template of the question; ``{options}`` are the options, lettered, one a line.
        without: words that are left out of the prompt, such as an instruction that the published questions end in.
        answer: path to the true answer, or to all of them.
        answer_is: of questions with options, what the answer is: a letter, the number of an option from 0, or its text.
        options: path to the list of options, or the fields that are one each; of these, empty ones are none.
        image: template of the image's file, or, without braces, path to one or several (or paths): file names below
            ``images``, or the images themselves (bytes, base64).
        images: folder of the images, below the task's.
        video: template of the video's file, or of a folder of its frames; where there is none of that ending, another
            that can be read is taken. ``clip``: the fields with the seconds from which and to which it is seen, or to
            its end where it is shorter;
            ``frames_per_second``: of folders.
        frames: which frames of videos are seen.
        about: template of what answers are about, which are not independent; by default the image or video, or the
            number of the question.
        copies_apart: questions whose field ``index`` differs by a multiple of it are copies of one (MMBench, their
            options turned round): they are about the same, of level ``first`` and ``copy``.
        family: template of the group that a question counts in.
        level: template of the level.

    Raises:
        UserError: arguments that do not belong together.
    """

    def __init__(
        self,
        *,
        file: str,
        prompt: str,
        answer: str,
        answer_is: Literal["letter", "index", "text"] = "letter",
        within: str | None = None,
        annotations: str | None = None,
        annotations_within: str | None = None,
        key: str = "question_id",
        annotations_key: str | None = None,
        where: dict[str, Any] | None = None,
        without: str | None = None,
        options: str | list[str] | None = None,
        image: str | list[str] | None = None,
        images: str = ".",
        video: str | None = None,
        clip: list[str] | None = None,
        frames_per_second: Positive = 3.0,
        frames: FrameSampling | None = None,
        about: str | None = None,
        copies_apart: Count | None = None,
        family: str = "all",
        level: str = "all",
    ) -> None:
        if "{options}" in prompt and options is None:
            raise UserError("the prompt shows {options}: say by 'options' which fields they are.")
        self.file, self.within, self.prompt, self.answer, self.answer_is = file, within, prompt, answer, answer_is
        self.annotations, self.annotations_within = annotations, annotations_within
        self.key, self.annotations_key = key, annotations_key or key
        self.where, self.without, self.options = where or {}, without, options
        self.image, self.images = image, images
        self.video, self.clip, self.frames = video, clip, frames or FrameSampling()
        self.frames_per_second, self.copies_apart = frames_per_second, copies_apart
        self.about, self.family, self.level = about, family, level

    def records(self, folder: Path) -> Iterator[Record]:
        return self._records(folder)

    def count(self, folder: Path, limit: int | None = None) -> int:
        needed = [*self.where, *([self.key] if self.annotations else [])]  # no images
        return sum(1 for _ in islice(self._records(folder, [path.partition(".")[0] for path in needed]), limit))

    def _records(self, folder: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
        """The records, or of parquet files these columns alone."""
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: the task's files belong there (its own file says which).")
        more = self._annotations(folder)
        index = 0
        for file in _files(folder, self.file):
            for record in _read(file, self.within, columns):
                if more is not None:
                    record = record | more.get(_field(record, self.key, str(file)), {})
                if all(_is(record, name, value, str(file)) for name, value in self.where.items()):
                    yield {"file": file.stem, "folder": file.parent.name, **record, NUMBER: index}
                    index += 1
        if not index:
            raise UserError(f"{folder / self.file} has not one question{' that is asked for' if self.where else ''}.")

    def fingerprint(self, folder: Path) -> str:
        names = [self.file, *([self.annotations] if self.annotations else [])]
        return " ".join(sha256_of(file)[:16] for name in names for file in _files(folder, name))

    def sample(self, record: Record, folder: Path) -> Sample:
        options = self._options(record)
        shown = {} if self.options is None else {"options": "" if options is None else options.shown()}
        text = _filled(self.prompt, record | shown)
        text = (text.replace(self.without, "") if self.without else text).strip()
        references = self._references(record) if options is None else options.references()
        answer = {"role": "assistant", "content": references[0], "references": references}
        answer |= {"family": _filled(self.family, record), "level": self._level(record)}
        words = {"type": "text", "text": text}
        about, named = self._about(record), self._named_images(record)
        try:
            visuals = [*(_image(one, folder / self.images) for one in named), *self._videos(record, folder)]
        except UserError as error:
            raise UnreadableError(str(error), Sample(about, [{"role": "user", "content": [words]}, answer])) from None
        marks = [{"type": "video" if isinstance(visual, Video) else "image"} for visual in visuals]
        return Sample(about, [{"role": "user", "content": [*marks, words]}, answer], visuals)

    def _annotations(self, folder: Path) -> dict[Any, Record] | None:
        if self.annotations is None:
            return None
        records = (r for file in _files(folder, self.annotations) for r in _read(file, self.annotations_within))
        return {_field(record, self.annotations_key, self.annotations): record for record in records}

    def _references(self, record: Record) -> list[str]:
        answers = _field(record, self.answer, self.file)  # a text in brackets is an answer, not a list of them
        found = [str(one) for one in (answers if isinstance(answers, list | tuple) else [answers]) if one is not None]
        if not found:
            raise UserError(f"question {record[NUMBER]} has no '{self.answer}': leave it out by 'where'.")
        return found

    def _options(self, record: Record) -> Options | None:
        """The options of a question; None: it has none."""
        if self.options is None:
            return None
        if isinstance(self.options, str):
            listed = _listed(_field(record, self.options, self.file))
        else:
            listed = [_field(record, name, self.file) for name in self.options]
        texts = ["" if _is_nothing(one) else str(one) for one in listed]
        while texts and not texts[-1]:  # before others an empty one keeps its letter
            texts.pop()
        answer = _field(record, self.answer, self.file)
        return Options(texts, right_letter(answer, texts, self.answer_is)) if texts else None

    def _named_images(self, record: Record) -> list[Any]:
        """The names of a question's images, or what holds them."""
        if self.image is None:
            return []
        named = [
            one
            for image in ([self.image] if isinstance(self.image, str) else self.image)
            for one in ([_filled(image, record)] if "{" in image else _listed(_field(record, image, self.file)))
        ]
        return [one for one in named if not _is_nothing(one)]

    def _videos(self, record: Record, folder: Path) -> list[Visual]:
        if self.video is None:
            return []
        ends = [float(record[name]) for name in self.clip or () if not _is_nothing(record.get(name))]
        clip = (ends[0], ends[1]) if len(ends) == 2 else None
        file = _readable(folder / _filled(self.video, record))
        seen: dict[str, Any] = {"clip": clip, "clip_slack": math.inf}  # to the end, as their own scripts have it
        if file.is_dir():
            return [from_frames(_frames_in(file), self.frames, fps=self.frames_per_second, **seen)]
        return [read_video(file, self.frames, **seen)]

    def _level(self, record: Record) -> str:
        if self.copies_apart is None:
            return _filled(self.level, record)
        return "first" if int(record["index"]) < self.copies_apart else "copy"

    def _about(self, record: Record) -> str:
        if self.copies_apart is not None:
            return str(int(record["index"]) % self.copies_apart)
        if self.about is not None:
            return _filled(self.about, record)
        template = self.video or (self.image if isinstance(self.image, str) and "{" in self.image else None)
        return str(record[NUMBER]) if template is None else _filled(template, record)


# --- files ------------------------------------------------------------------------------------------------------------


def _files(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"there is no {folder / pattern}.")
    return files


def _read(file: Path, within: str | None, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of a file, by its ending; of a parquet file these columns alone."""
    ending = file.suffix.lower()
    if ending == ".parquet":
        yield from _parquet(file, columns)
    elif ending in (".csv", ".tsv"):
        yield from _table(file, "\t" if ending == ".tsv" else ",")
    elif ending == ".jsonl":
        yield from _lines(file)
    else:
        yield from _json(file, within)


def _json(file: Path, within: str | None) -> Iterator[Record]:
    try:
        content = load_json(file)
    except UserError:
        if not _is_lines(file):
            raise
        yield from _lines(file)
        return
    if within is not None:
        content = _field(content, within, str(file))
    elif isinstance(content, dict) and _is_lines(file) and len({type(value) for value in content.values()}) > 1:
        content = [content]  # JSON lines, of which there is one: a mapping has values of one kind
    if isinstance(content, dict):
        content = [
            {"key": key} | (value if isinstance(value, dict) else {"value": value}) for key, value in content.items()
        ]
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise UserError(f"{file} holds no list of records: name where in it they are by 'within'.")
    yield from content


def _is_lines(file: Path) -> bool:
    """Whether the first line of a file is an object by itself: JSON lines, whatever the file is called."""
    with open(file, encoding="utf-8-sig") as stream:
        try:
            return isinstance(json.loads(stream.readline()), dict)
        except ValueError:
            return False


def _lines(file: Path) -> Iterator[Record]:
    read_head(file)
    with reading(file), open(file, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}:{number} is not JSON ({error}).") from None
                if not isinstance(record, dict):
                    raise UserError(f"{file}:{number} is no record with fields: {line.strip()[:60]}")
                yield record


def _table(file: Path, delimiter: str) -> Iterator[Record]:
    read_head(file)
    allow_long_cells()  # an image may be one, in base64
    try:
        with reading(file), open(file, encoding="utf-8-sig", newline="") as stream:
            yield from csv.DictReader(stream, delimiter=delimiter)
    except csv.Error as error:
        raise UserError(f"{file} is no table of text ({error}).") from None


def _parquet(file: Path, columns: Sequence[str] | None) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise UserError("parquet files need the package `datasets`: pip install 'lavi[datasets]'.") from None
    read_head(file, "a parquet file")
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} cannot be read to its end ({one_line(error)}).") from None


# --- fields -----------------------------------------------------------------------------------------------------------


def _field(record: Any, path: str, where: str) -> Any:
    """What a path leads to.

    Raises:
        UserError: there is no such field.
    """
    value = record
    for number, name in enumerate(names := path.split(".")):
        if name == "*":
            rest = ".".join(names[number + 1 :])
            return [_field(one, rest, where) if rest else one for one in _listed(value)]
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, Sequence) and not isinstance(value, str) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            known = [str(key) for key in value] if isinstance(value, Mapping) else []
            raise UserError(f"{where}: a record has no field '{path}': {nearest(name, known)}")
    return value


class _Fields(string.Formatter):
    """Fills a template from a record; nothing but its fields can be reached."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        value = _field(kwargs, field_name, "the template")
        return "" if _is_nothing(value) else value, field_name


def _filled(template: str, record: Record) -> str:
    try:
        return _Fields().vformat(template, (), record)
    except ValueError as error:
        raise UserError(f"{template!r} cannot be filled ({error}).") from None


def _listed(value: Any) -> list[Any]:
    """A value, or several; a list that was written as a text is one."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return [value]
    return list(value) if isinstance(value, list | tuple) else [value]


def _is(record: Record, name: str, wanted: Any, where: str) -> bool:
    """Whether a field has the value that is wanted; of true, whether it has any."""
    if wanted is True:
        return not _is_nothing(record.get(name))
    return bool(_field(record, name, where) == wanted)


def _is_nothing(value: Any) -> bool:
    return value is None or value == "" or value == [] or value != value or value == "nan"


# --- images and videos ------------------------------------------------------------------------------------------------


def _readable(file: Path) -> Path:
    """A video's file as it is named, or one beside it with another ending that can be read."""
    if file.exists():
        return file
    others = (file.with_suffix(f".{ending}") for ending in VIDEO_TYPES)
    return next((other for other in others if other.exists()), file)


def _frames_in(folder: Path) -> Sequence[Image.Image]:
    """The images of a folder, in order of their names.

    Raises:
        UserError: it has none.
    """
    images = (file for file in folder.iterdir() if file.suffix.lower().lstrip(".") in IMAGE_TYPES)
    files = sorted(images, key=lambda file: natural_order(file.name))
    if not files:
        raise UserError(f"{folder} has no frames.")
    return OpenedWhenAsked(files, open_image)


def _image(value: Any, folder: Path) -> Image.Image:
    """An image: its bytes, a mapping with them or with a path, base64, or a file's name."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return open_image(value)
    name = str(value)
    if len(name) > 512:  # no file has such a name
        try:
            return open_image(base64.b64decode(name, validate=True), name="an image in base64")
        except binascii.Error:
            raise UserError(f"an image that is no file and no base64: {name[:40]}...") from None
    return open_image(folder / name)
