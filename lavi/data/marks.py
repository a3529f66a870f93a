"""Characters that stand for images and videos in a rendered conversation, and the tokens that templates write there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lavi.errors import UserError

IMAGE = "\ufffc"
"""Stands for an image in rendered text (Unicode's own object replacement character)."""

WORDS = "\ufdd0"
"""Stands before what reads like a control token and was written by people (a code point that Unicode gives no text)."""

VIDEO = "\ufdd1"
"""Stands for a video, where the template writes another token for it than for an image."""


@dataclass(frozen=True)
class MediaTokens:
    """The tokens that a template writes where images and videos stand; none: it takes texts, with marks in them."""

    tokens: dict[str, str]
    """``image`` and ``video`` -> token."""
    ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, str]) -> MediaTokens:
        """Of a tokenizer.

        Raises:
            UserError: it has no such token.
        """
        vocabulary = tokenizer.get_vocab()
        for kind, token in tokens.items():
            if token not in vocabulary:
                raise UserError(
                    f"the tokenizer of {tokenizer.name_or_path} has no token '{token}', which stands for each {kind}."
                )
        return cls(dict(tokens), frozenset(vocabulary[token] for token in tokens.values()))

    def in_parts(self, plain: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        """Messages as the template takes them: as they are, or their contents as lists of parts."""
        if not self.tokens:
            return list(plain)
        return [message | {"content": list(_parts_of(message["content"]))} for message in plain]

    def marked(self, rendered: str) -> str:
        """A rendered conversation with a mark instead of each media token that the template wrote."""
        for kind, token in self.tokens.items():
            rendered = re.sub(f"(?<!{WORDS}){re.escape(token)}", VIDEO if kind == "video" else IMAGE, rendered)
        return rendered

    def written(self, text: str) -> tuple[str, Sequence[int]]:
        """A part of a conversation as the tokenizer gets it, and the index in ``text`` of each of its characters."""
        tokens = {IMAGE: self.tokens.get("image", IMAGE), VIDEO: self.tokens.get("video", VIDEO), WORDS: ""}
        if not any(mark in text for mark in tokens):
            return text, range(len(text))
        out: list[str] = []
        origin: list[int] = []
        for index, character in enumerate(text):
            piece = tokens.get(character, character)
            out.append(piece)
            origin += [index] * len(piece)
        return "".join(out), origin


def marks_in(text: str) -> str:
    """Those of images and videos, in order."""
    return "".join(re.findall(f"[{IMAGE}{VIDEO}]", text))


def _parts_of(content: str) -> Iterator[dict[str, str]]:
    """Text and media of a content with marks, in order."""
    for piece in re.split(f"([{IMAGE}{VIDEO}])", content):
        if piece in (IMAGE, VIDEO):
            yield {"type": "video" if piece == VIDEO else "image"}
        elif piece:
            yield {"type": "text", "text": piece}


def without_marks(text: str) -> str:
    """Without the characters that mean something here."""
    return text.translate(dict.fromkeys(map(ord, (IMAGE, VIDEO, WORDS))))
