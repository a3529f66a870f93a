"""The prompt that a model is counted and timed with: a scenario as people name it, and its shapes in one model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lavi.batch import Batch, ImageSlot, Layout
from lavi.errors import UserError
from lavi.model import VisionLanguageModel

Prompt = tuple[int, Layout | None]
"""Text tokens, and the layout of the one image or video; None: there is none."""


@dataclass(frozen=True)
class Scenario:
    """A prompt of ``text`` tokens with one image or video before the second of them; ``batch`` such rows.

    At most one of:
        visual_tokens: an image of so many visual tokens, whatever number the tower gives; a reducer gets whole views,
            the least that have so many.
        image: an image of (width, height) pixels, cut into views by the model's own tiling.
        frames: a video of so many frames.
    """

    text: int = 50
    batch: int = 1
    visual_tokens: int | None = None
    image: tuple[int, int] | None = None
    frames: int | None = None

    def __str__(self) -> str:
        if self.image is not None:
            return f"{self.image[0]}x{self.image[1]}"
        if self.frames is not None:
            return f"{self.frames} frame{'s' if self.frames > 1 else ''}"
        return f"{self.visual_tokens or 0} visual tokens"

    def shape_for(self, model: VisionLanguageModel) -> PromptShape:
        """The shapes that this scenario has in a model."""
        tokens = model.feature_spec.tokens
        if not tokens:  # a control that shows none
            layout = Layout(views=self.frames or 1, video=self.frames is not None)
            if self.image is not None:
                _, layout = model.tiling.cut(Image.new("RGB", self.image), model.vision.preprocessing, alone=True)
            encoded = layout.views if self.visual_tokens != 0 else 0
            return PromptShape(self.text, self.batch, encoded=encoded, encoded_layout=layout if encoded else None)
        if self.image is not None:
            _, layout = model.tiling.cut(Image.new("RGB", self.image), model.vision.preprocessing, alone=True)
            return PromptShape(self.text, self.batch, layout, layout.tokens_of_view(tokens), layout.views)
        if self.frames is not None:
            return PromptShape(self.text, self.batch, Layout(views=self.frames, video=True), tokens, self.frames)
        if self.visual_tokens:
            encoded = math.ceil(self.visual_tokens / model.vision.tokens)
            if model.reducer is not None:
                return PromptShape(self.text, self.batch, Layout(), encoded * tokens, encoded)
            return PromptShape(self.text, self.batch, Layout(), self.visual_tokens, encoded)
        return PromptShape(self.text, self.batch)


@dataclass(frozen=True)
class PromptShape:
    """The shapes of a scenario in one model."""

    text: int
    """T, text tokens of one row."""
    batch: int = 1
    """B, rows."""
    layout: Layout | None = None
    """How the views of a row's image belong together; None: it has none."""
    per_view: int = 0
    """N, the visual tokens of a view."""
    encoded: int = 0
    """Views of a row that go through the tower."""
    encoded_layout: Layout | None = None
    """How they belong together, where the row does not see them; None: as :attr:`layout` says."""

    @classmethod
    def of_prompt(cls, prompt: Prompt, model: VisionLanguageModel) -> PromptShape:
        """The shapes of a prompt that was read, in a model that cuts images as they were cut."""
        text, layout = prompt
        if layout is None:
            return cls(text)
        if not model.feature_spec.tokens:  # a control that shows none
            return cls(text, encoded=layout.views, encoded_layout=layout)
        return cls(text, 1, layout, layout.tokens_of_view(model.feature_spec.tokens), layout.views)

    @property
    def views(self) -> int:
        """Views of a row whose features reach the fusion."""
        return self.layout.views if self.layout else 0

    def visual_tokens_in_language(self, model: VisionLanguageModel) -> int:
        """Visual tokens of a row that stand in the language model's sequence."""
        return model.fusion.tokens_in_language(self.layout, self.per_view) if self.layout else 0

    def check(self, model: VisionLanguageModel, name: object) -> None:
        """Check that the prompt fits into the positions of the language model.

        Raises:
            UserError: it is longer than they are.
        """
        visual, room = self.visual_tokens_in_language(model), model.language.context_length
        if self.text + visual > room:
            fusion = type(model.fusion).__name__
            raise UserError(
                f"{name} is {self.text} text and {visual} visual tokens with {fusion}, more than the {room} positions "
                f"of its language model ({model.language.hf.config.model_type}): leave it out."
            )

    def inputs(self, model: VisionLanguageModel, device: torch.device | str) -> tuple[Batch, Tensor]:
        """A batch of ones, and the features (views of all rows, N, Dv) that its images have."""
        ids = torch.ones(self.batch, self.text, dtype=torch.long, device=device)
        column = min(1, self.text - 1)
        batch = Batch(
            input_ids=ids,
            labels=ids,
            attention_mask=torch.ones(self.batch, self.text, dtype=torch.bool, device=device),
            pixels=torch.zeros(0, *model.vision.pixel_shape, device=device),
            spans=[(0, self.text)] * self.batch,
            image_slots=[ImageSlot(row, column, self.layout) for row in range(self.batch)] if self.layout else [],
        )
        return batch, torch.zeros(
            self.batch * self.views, max(self.per_view, 1), model.feature_spec.width, device=device
        )

    @property
    def layouts(self) -> list[Layout]:
        """Of the images of all rows, as the tower is told."""
        layout = self.encoded_layout or self.layout
        return [layout] * self.batch if layout else []

    def pixels(self, model: VisionLanguageModel, device: torch.device | str) -> Tensor:
        """Pixels that the tower encodes: (views of all rows, C, H, W), noise, in which no patch repeats another."""
        made = torch.empty(self.batch * self.encoded, *model.vision.pixel_shape, device=device)
        return made if made.is_meta else made.normal_(generator=torch.Generator(device).manual_seed(0))
