"""Telling a model which image of a conversation it sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lavi.batch import CachedVisual, Visual, visual_part, visual_parts


def number_images(messages: Sequence[dict[str, Any]], visuals: Sequence[Visual | CachedVisual]) -> list[dict[str, Any]]:
    """The messages with ``Image 2: `` before the second image, and so on, as InternVL and MiniCPM-V are told.

    An image that is alone in its message, with none before it, has no number: so its turn reads the same whether or
    not the conversation goes on with another. Videos have none.

    Args:
        messages: left as they are.
        visuals: images and videos; where no part names them, they stand before the first words of the user.
    """
    numbered, seen = [], 0
    unnamed = [] if visual_parts(messages) else [visual_part(visual) for visual in visuals]
    for message in messages:
        content: str | list[dict[str, Any]] = message["content"]
        if unnamed and message["role"] == "user":
            words = [{"type": "text", "text": content}] if isinstance(content, str) else content
            content, unnamed = [*unnamed, *words], []
        if not isinstance(content, str):
            is_told = seen + sum(part["type"] == "image" for part in content) > 1
            parts = []
            for part in content:
                if part["type"] == "image":
                    seen += 1
                    if is_told:
                        parts.append({"type": "text", "text": f"Image {seen}: "})
                parts.append(part)
            content = parts
        numbered.append(message | {"content": content})
    return numbered
