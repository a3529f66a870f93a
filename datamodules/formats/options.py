"""Lettered options of a question: as a prompt shows them, and which of them is right."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, NamedTuple

from lavi.errors import UserError

LETTERS = string.ascii_uppercase


class Options(NamedTuple):
    """A question's options, and the letter of the right one."""

    texts: list[str]
    right: str

    def shown(self) -> str:
        """``A. a cat`` and so on, one a line; options that have letters already keep them."""
        lettered = [(letter, text) for letter, text in zip(LETTERS, self.texts, strict=False) if text]
        if all(text.startswith(f"{letter}. ") for letter, text in lettered):
            return "\n".join(text for _, text in lettered)
        return "\n".join(f"{letter}. {text}" for letter, text in lettered)

    def references(self) -> list[str]:
        """The right letter, and the option's text, without a letter of its own."""
        text = self.texts[LETTERS.index(self.right)]
        return [self.right, text.removeprefix(f"{self.right}. ")]


def right_letter(answer: Any, texts: Sequence[str], answer_is: str) -> str:
    """The letter of the right option.

    Args:
        answer_is: what ``answer`` is: a ``letter``, the number of an option from 0 (``index``), or its ``text``.

    Raises:
        UserError: the answer names none of them.
    """
    said = str(answer).strip()
    by_letter = dict(zip(LETTERS, (text.strip() for text in texts), strict=False))
    letter = ""
    if answer_is == "index" and said.isdigit() and int(said) < len(by_letter):
        letter = LETTERS[int(said)]
    elif answer_is == "letter":
        letter = said.upper()
    elif answer_is == "text":
        letter = next((one for one, of in by_letter.items() if of == said), "")
    if by_letter.get(letter):
        return letter
    raise UserError(f"the answer {answer!r} is no {answer_is} of the options {', '.join(map(repr, texts))}.")
