"""Texts that cannot be written down."""

from __future__ import annotations

HALF_A_CHARACTER = "has half a character in its text (a lone surrogate, as of an emoji that was cut)"


def is_writable(text: str) -> bool:
    """Whether a text can be encoded: JSON may hold one half of a character that is stored as two."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
