"""The data contract: what a data module hands to a model. Imports nothing of lavi.

One alphabet of shapes, used in every file: B batch rows, T text tokens, N visual tokens, D language width, Dv vision
width, L decoder layers, F frames.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

if TYPE_CHECKING:  # the commands that write and look at shards start without it
    import torch
    from torch import Tensor

IGNORE = -100
"""The label of a token that is not trained."""


@dataclass(frozen=True)
class Video:
    """Frames of a video, F of them, in order."""

    frames: list[Image.Image]
    seconds: list[float] = field(default_factory=list)
    """When each is shown, from the start of the video, or of the clip; empty: not known."""
    duration: float | None = None
    """Of the whole video, or of the clip that the frames are from, in seconds."""


Visual = Image.Image | Video


@dataclass(frozen=True)
class CachedVisual:
    """An image or a video whose features were computed before (``python -m lavi.cache_features``)."""

    features: Tensor
    """(views, N, Dv): of the vision backbone, not reduced."""
    layout: Layout
    decode: Callable[[], Visual]
    """Gives it as it is, to be shown."""
    seconds: list[float] = field(default_factory=list)
    """Of a video, as :class:`Video` has them."""
    duration: float | None = None
    alone: bool | None = None
    """Whether it was the only one of its conversation, where that decides how it is cut; None: it does not."""


def is_video(visual: Visual | CachedVisual) -> bool:
    """Whether it is a video, and no image."""
    return visual.layout.video if isinstance(visual, CachedVisual) else isinstance(visual, Video)


@dataclass
class Sample:
    """One conversation, decoded.

    ``messages`` are dicts with ``role`` and ``content``; ``content`` is a string, or a list of ``{"type": "image"}``
    and ``{"type": "text", "text": ...}`` parts. An assistant's message may carry ``family`` and ``level`` for the
    per-family accuracy, and ``references``, all answers that count as right. ``images`` stand in the order of the image
    parts; a video's part is ``{"type": "video"}``.
    """

    key: str
    messages: list[dict[str, Any]]
    images: Sequence[Visual | CachedVisual] = ()

    def until(self, stop: int) -> Sample:
        """The conversation before message ``stop``, with the images and videos that it speaks of.

        Images that no part names stand before the first words: they are part of every beginning.
        """
        kept = self.messages[:stop]
        images = self.images[: len(visual_parts(kept))] if visual_parts(self.messages) else self.images
        return Sample(self.key, kept, images)

    @property
    def answers(self) -> list[int]:
        """Which of the messages are answers."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


def visual_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of a conversation's messages that are images and videos, in order."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return [part for part in parts if part["type"] in ("image", "video")]


def visual_part(visual: Visual | CachedVisual) -> dict[str, Any]:
    """What stands for an image or a video in a message's content."""
    return {"type": "video" if is_video(visual) else "image"}


def question_about(visuals: Sequence[Visual], question: str) -> list[dict[str, Any]]:
    """The message of a question behind images and videos, in their order."""
    return [{"role": "user", "content": [*map(visual_part, visuals), {"type": "text", "text": question}]}]


def text_of(content: str | list[dict[str, Any]]) -> str:
    """The words of a message's content."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if part["type"] not in ("image", "video"))


def references_of(answer: dict[str, Any]) -> tuple[str, ...]:
    """All that counts as right for an assistant's message: its ``references``, or its own words."""
    return tuple(answer.get("references") or [text_of(answer["content"])])


class Layout(NamedTuple):
    """How the views of one image belong together."""

    views: int = 1
    tiles: tuple[int, int] | None = None
    """Rows and columns of the tiles that follow the first view, which is the whole image; None: it is all there is."""
    size: tuple[int, int] = (0, 0)
    """Height and width of the image, in pixels."""
    video: bool = False
    """The views are frames."""
    stretched: bool = False
    """The image was stretched to its tiles; else it stands in the middle of them, its aspect kept."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the features of each view, where each image has its own (native resolution); they are the
    first of a view's features, what follows is padding."""

    @property
    def tile_count(self) -> int:
        """How many of the views are tiles."""
        return 0 if self.tiles is None else self.views - 1

    @property
    def fills_tiles(self) -> bool:
        """Whether an image covers all of its tiles: it was stretched to them, or its size is not known."""
        return self.stretched or not all(self.size)

    def tokens_of_view(self, per_view: int) -> int:
        """Of the ``per_view`` features of a view, those that are not padding."""
        return per_view if self.grid is None else self.grid[0] * self.grid[1]


def grids_of_views(layouts: Sequence[Layout]) -> list[tuple[int, int]] | None:
    """The grids of all views of images of these layouts; None: they have that of the backbone."""
    grids = [(layout.grid, layout.views) for layout in layouts]
    return [grid for grid, views in grids if grid is not None for _ in range(views)] or None


class ImageSlot(NamedTuple):
    """Where one image stands: in ``row``, just before the text token of column ``column``."""

    row: int
    column: int
    layout: Layout = Layout()

    @property
    def views(self) -> int:
        return self.layout.views


class Answer(NamedTuple):
    """One trained answer: the labels of ``row`` in columns ``[start, stop)``, its question family and level."""

    row: int
    start: int
    stop: int
    family: str = "all"
    level: str = "all"


@dataclass
class Batch:
    """What a model sees.

    Text is the text alone: an image has a position in it and no tokens of its own; a fusion decides what stands there.
    The layout (``spans``, ``image_slots``) stays on the host, so that arranging a sequence never waits for a device.

    Shapes: ``input_ids`` (B, T) int64; ``labels`` (B, T) int64, :data:`IGNORE` where nothing is trained;
    ``attention_mask`` (B, T) bool; ``pixels`` (sum of views, C, H, W) float, rows in order, images in order;
    ``spans`` B pairs [start, stop) of the columns that hold text, the rest is padding.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    pixels: Tensor
    spans: list[tuple[int, int]]
    image_slots: list[ImageSlot]
    answers: list[Answer] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    packed: list[list[tuple[int, int]]] | None = None
    """The columns [start, stop) of each conversation of each row, where rows hold several; None: a row is one."""
    open_questions: list[list[int]] = field(default_factory=list)
    """Of a prompt, the column that the open question begins with, of each conversation of each row. Empty: the first
    column of the conversation."""
    features: Tensor | None = None
    """(views, N, Dv), reduced: what a model has computed of the images before, in the order of pixels, which are then
    left out. None: it has not."""
    backbone_features: Tensor | None = None
    """(views, N, Dv): features of the vision backbone that were read in the place of pixels, not reduced."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def conversations(self) -> list[list[tuple[int, int]]]:
        """The columns [start, stop) of each conversation of each row."""
        return self.packed if self.packed is not None else [[span] for span in self.spans]

    def conversation_of(self, slot: ImageSlot) -> tuple[int, int]:
        """The row of an image, and the number of its conversation in it."""
        return self.conversation_at(slot.row, slot.column)

    def conversation_at(self, row: int, column: int) -> tuple[int, int]:
        """The row, and the number of the conversation in it that a column is of."""
        starts = [start for start, _ in self.conversations[row]]
        return row, max(0, bisect_right(starts, column) - 1)

    def answers_in(self, row: int, number: int) -> list[Answer]:
        """The answers of one conversation of a row, in their order."""
        start, stop = self.conversations[row][number]
        return sorted(one for one in self.answers if one.row == row and start <= one.start < stop)

    def question_columns(self, answer: Answer) -> tuple[int, int]:
        """The columns [start, stop) of what stands before an answer, behind the one before it in its conversation."""
        row, number = self.conversation_at(answer.row, answer.start)
        before = [one.stop for one in self.answers_in(row, number) if one.start < answer.start]
        return max(before, default=self.conversations[row][number][0]), answer.start

    def asked_columns(self, slot: ImageSlot) -> tuple[int, int]:
        """The columns [start, stop) of what is asked first once an image is shown; of a prompt, what is asked last."""
        row, number = self.conversation_of(slot)
        start, stop = self.conversations[row][number]
        answers = self.answers_in(row, number)
        behind = [one for one in answers if one.start >= slot.column]
        if behind:
            return self.question_columns(behind[0])
        if answers:
            return answers[-1].stop, stop
        return (self.open_questions[row][number] if self.open_questions else start), stop

    @property
    def text_lengths(self) -> list[int]:
        """Tokens of text of each row, without padding."""
        return [stop - start for start, stop in self.spans]

    @property
    def layouts(self) -> list[Layout]:
        """Of each image in turn: how its views belong together."""
        return [slot.layout for slot in self.image_slots]

    @property
    def grids(self) -> list[tuple[int, int]] | None:
        """Of each view in turn, at native resolution; None: all views have the grid of the backbone."""
        return grids_of_views(self.layouts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``; the layout stays on the host."""
        names = ("input_ids", "labels", "attention_mask", "pixels", "features", "backbone_features")
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **{n: tensor.to(device, non_blocking=non_blocking) for n, tensor in tensors.items()})

    def without_images(self) -> Batch:
        """The no-image control: the same questions, nothing to see."""
        return replace(self, pixels=self.pixels[:0], image_slots=[], features=None, backbone_features=None)


@dataclass(frozen=True)
class VisualState:
    """Images and videos as a model sees them: what depends on them alone, for all that is asked about them.

    Made by ``VisionLanguageModel.see``; it serves the model that made it, for as long as its weights stay as they are.
    """

    visuals: tuple[Visual, ...]
    """In their order; images upright."""
    layouts: tuple[Layout, ...]
    pixels: tuple[Tensor, ...]
    """(views, C, H, W) of each, as they were prepared for the vision backbone."""
    features: tuple[Tensor, ...]
    """(views, N, Dv) of each: of the vision backbone, reduced. Empty where the backbone reads questions: then there is
    one for each question."""

    def features_of(self, pixels: Tensor, layout: Layout) -> Tensor | None:
        """(views, N, Dv) of an image or a video of just these pixels, laid out like this; None: it holds none."""
        for own, own_layout, features in zip(self.pixels, self.layouts, self.features, strict=False):
            if own_layout == layout and own.shape == pixels.shape and bool((own == pixels).all()):
                return features
        return None
