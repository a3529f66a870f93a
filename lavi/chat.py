"""Messages to ids, labels and image places. The only room that knows chat templates.

The conversation is rendered once, an image standing in it as one object-replacement character. The text between the
images is tokenised once, and labels come from the tokens' character offsets: nothing is tokenised twice and compared
by length, so nothing can mismatch in silence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lavi.batch import IGNORE
from lavi.errors import UserError, nearest

IMAGE = "\ufffc"
"""Stands for an image in rendered text (Unicode's own object replacement character)."""

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} "
        "{% elif m['role'] == 'user' %}USER: {{ m['content'] }} "
        "{% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
}
"""Templates for tokenizers that bring none; chosen by name in a recipe."""


@dataclass(frozen=True)
class Turn:
    """The trained tokens of one answer: ``[start, stop)``, with its question family and level."""

    start: int
    stop: int
    family: str
    level: str


@dataclass(frozen=True)
class Encoded:
    """One conversation as the model is trained on it: T ids, T labels, and the token each image stands before."""

    ids: list[int]
    labels: list[int]
    image_columns: list[int]
    turns: list[Turn]


@dataclass(frozen=True)
class _Frames:
    """What a template puts around the words of a conversation of certain roles, in characters."""

    answers: list[tuple[int, int, int]]
    """Of each answer: its turn, what stands before it, and what stands before its end."""
    length: int


class Chat:
    """A tokenizer and its chat template.

    Args:
        tokenizer: a fast one, for its character offsets.
        template: a name in :data:`TEMPLATES`, or None for the tokenizer's own.

    Raises:
        UserError: no template, or a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed.")
        if template is not None and template not in TEMPLATES:
            raise UserError(f"no chat template is called '{template}': {nearest(template, TEMPLATES)}")
        self.tokenizer = tokenizer
        self.template = TEMPLATES[template] if template else tokenizer.chat_template
        if self.template is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: choose one with "
                f"model.chat_template={'|'.join(TEMPLATES)}."
            )
        self._frames: dict[tuple[str, ...], _Frames] = {}

    @property
    def pad_id(self) -> int:
        """Any id serves: padding is known by the mask, never by its id."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def encode(self, messages: Sequence[dict[str, Any]], *, images: int) -> Encoded:
        """A whole conversation, its answers and their end tokens as labels.

        Raises:
            UserError: images and image places disagree, or the template does not extend turn by turn, token by token.
        """
        plain = self._plain(messages, images)
        text = self._render(plain)
        ids, offsets, columns = self._tokenise(text)
        labels = [IGNORE] * len(ids)
        turns = []
        for turn, start, stop in self._answer_spans(plain, text):
            message = messages[turn]
            inside = [t for t, (a, b) in enumerate(offsets) if a >= start and b <= stop and a < b]
            if not inside or any(a < start < b for a, b in offsets):
                raise UserError(
                    f"the answer '{message['content']}' does not start with a token of its own: the chat template's "
                    "prompt ends in the middle of one (often a space too many)."
                )
            for token in inside:
                labels[token] = ids[token]
            turns.append(Turn(inside[0], inside[-1] + 1, message.get("family", "all"), message.get("level", "all")))
        return Encoded(ids, labels, columns, turns)

    def encode_prompt(self, messages: Sequence[dict[str, Any]], *, images: int) -> Encoded:
        """A conversation that waits for its next answer."""
        text = self._render(self._plain(messages, images), prompt=True)
        ids, _, columns = self._tokenise(text)
        return Encoded(ids, [IGNORE] * len(ids), columns, [])

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _plain(self, messages: Sequence[dict[str, Any]], images: int) -> list[dict[str, str]]:
        """Messages with string contents, an :data:`IMAGE` where an image stands."""
        plain = [{"role": m["role"], "content": _flatten(m["content"])} for m in messages]
        marked = sum(m["content"].count(IMAGE) for m in plain)
        if marked == 0 and images:  # images without places stand before the first words of the user
            first = next((m for m in plain if m["role"] == "user"), None)
            if first is None:
                raise UserError("a conversation with images needs a message of role 'user'.")
            first["content"] = IMAGE * images + first["content"]
        elif marked != images:
            raise UserError(f"the conversation has places for {marked} images and comes with {images}.")
        return plain

    def _render(self, plain: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
        rendered = self.tokenizer.apply_chat_template(
            list(plain), chat_template=self.template, tokenize=False, add_generation_prompt=prompt
        )
        return str(rendered)

    def _answer_spans(self, plain: list[dict[str, str]], text: str) -> list[tuple[int, int, int]]:
        """Each answer's turn, and its characters in ``text`` with those of the end token behind it.

        What a template puts around the words is the same for all conversations of the same roles: it is measured once,
        by rendering turn after turn, and held against the text of every later one.
        """
        roles = tuple(message["role"] for message in plain)
        said = [0, *itertools.accumulate(len(message["content"]) for message in plain)]
        frames = self._frames.get(roles)
        if frames is not None:
            spans = [(turn, before + said[turn], after + said[turn + 1]) for turn, before, after in frames.answers]
            fits = all(text.startswith(plain[turn]["content"], start) for turn, start, _ in spans)
            if fits and len(text) == frames.length + said[-1]:
                return spans
        spans = [
            (turn, *self._answer_span(plain, turn, text)) for turn, role in enumerate(roles) if role == "assistant"
        ]
        answers = [(turn, start - said[turn], stop - said[turn + 1]) for turn, start, stop in spans]
        self._frames[roles] = _Frames(answers, len(text) - said[-1])
        return spans

    def _answer_span(self, plain: list[dict[str, str]], turn: int, text: str) -> tuple[int, int]:
        """The characters of an answer and of the end token behind it."""
        before = self._render(plain[:turn], prompt=True)
        after = text if turn + 1 == len(plain) else self._render(plain[: turn + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError("the chat template rewrites earlier turns: answers cannot be told from questions in it.")
        return len(before), len(after.rstrip())

    def _tokenise(self, text: str) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Ids, character offsets, and the token that each image stands before."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        columns: list[int] = []
        start = 0
        for number, piece in enumerate(text.split(IMAGE)):
            if number:
                columns.append(len(ids))
                start += 1
            encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            offsets += [(start + a, start + b) for a, b in encoded["offset_mapping"]]
            start += len(piece)
        return ids, offsets, columns


def _flatten(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content.replace(IMAGE, "")
    return "".join(IMAGE if part.get("type") in ("image", "video") else _text(part) for part in content)


def _text(part: dict[str, Any]) -> str:
    return str(part.get("text", "")).replace(IMAGE, "")
