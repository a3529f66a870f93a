"""Messages to token ids, labels and the columns of images. Only this module knows chat templates.

The conversation is rendered once, an image standing in it as one object-replacement character. The text between the
images is tokenised once, and labels come from the tokens' character offsets: nothing is tokenised twice and compared
by length, so nothing can mismatch in silence. What people wrote is words, also where it reads like a control token.

An answer is trained as the model will have to give it: behind the prompt that :meth:`Chat.encode_prompt` makes of the
turns before it. Some templates write the last answer otherwise than those before it (Qwen3 puts an empty thinking block
before it): there every answer is trained as the template writes it once the conversation has gone on.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from lavi.batch import IGNORE
from lavi.data.marks import IMAGE, VIDEO, WORDS, MediaTokens, marks_in, without_marks
from lavi.data.text import HALF_A_CHARACTER, is_writable
from lavi.errors import UserError, nearest, one_line

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


def check_template(name: str) -> None:
    """Of the templates above.

    Raises:
        UserError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise UserError(f"no chat template is called '{name}': {nearest(name, TEMPLATES)}")


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
    open_question: int = 0
    """Of a prompt, the token that what waits for its answer begins with: behind the answers that were given."""


@dataclass(frozen=True)
class _Frames:
    """What a template puts around the words of a conversation of certain roles and media, in characters."""

    answers: list[tuple[int, int, int, str]]
    """Of each answer: its turn, what stands before it and before its end, and the end."""
    length: int


class Chat:
    """A tokenizer and its chat template.

    Args:
        tokenizer: a fast one, for its character offsets.
        template: a name in :data:`TEMPLATES`, or None for the tokenizer's own.
        media_tokens: what the tokenizer's own template writes where an image or a video stands, by ``image`` and
            ``video``: of published vision-language models, whose templates take contents as lists of parts.

    Raises:
        UserError: no template, or a slow tokenizer; a media token that the tokenizer does not have.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        *,
        media_tokens: Mapping[str, str] | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed.")
        if template is not None:
            check_template(template)
        self.tokenizer = tokenizer
        self.template = TEMPLATES[template] if template else tokenizer.chat_template
        if self.template is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: choose one with "
                f"model.chat_template={'|'.join(TEMPLATES)}."
            )
        self._media = MediaTokens.of(tokenizer, {} if template else media_tokens or {})
        self._begin = _added_in_front(tokenizer) if template or self._media.tokens else []
        """Ids that the tokenizer puts before each text, such as ``<s>``. Its own template has them, a named one does
        not, and that of a vision-language model may."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self._media.tokens.values())
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or r"(?!)")
        self._control_or_media = re.compile(f"[{IMAGE}{VIDEO}]|{self._control.pattern}")
        self._frames: dict[tuple[tuple[str, int, int], ...], _Frames] = {}
        if self._media.tokens and self._begin and tokenizer.bos_token and self._starts_with(tokenizer.bos_token):
            self._begin = []

    def _starts_with(self, token: str) -> bool:
        try:
            return self._render(_turns("a"), prompt=True).startswith(token)
        except UserError:  # it takes no conversation of words alone
            return False

    @property
    def pad_id(self) -> int:
        """Any id serves: padding is known by the mask, never by its id."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def encode(self, messages: Sequence[dict[str, Any]], *, images: int) -> Encoded:
        """A whole conversation, its answers and their end tokens as labels.

        Raises:
            UserError: more or fewer images than image parts, text that is none, or a template that refuses the
                conversation or cannot be trained on.
        """
        plain = self._plain(messages, images)
        text = self._render_whole(plain)
        ids, offsets, columns = self._tokenise(text)
        labels = [IGNORE] * len(ids)
        turns = []
        for turn, start, stop in self._answer_spans(plain, text):
            message = messages[turn]
            inside = [t for t, (a, b) in enumerate(offsets) if a >= start and b <= stop and a < b]
            if not inside or any(a < start < b for a, b in offsets):
                raise UserError(
                    "an answer does not start with a token of its own: the chat template's prompt ends in the middle "
                    "of one (often a space too many)."
                )
            for token in inside:
                labels[token] = ids[token]
            turns.append(Turn(inside[0], inside[-1] + 1, message.get("family", "all"), message.get("level", "all")))
        return Encoded(ids, labels, columns, turns)

    def encode_prompt(self, messages: Sequence[dict[str, Any]], *, images: int) -> Encoded:
        """A conversation that waits for its next answer."""
        plain = self._plain(messages, images)
        text = self._render(plain, prompt=True)
        ids, offsets, columns = self._tokenise(text)
        return Encoded(ids, [IGNORE] * len(ids), columns, [], self._behind_answers(plain, text, offsets))

    def _behind_answers(self, plain: list[dict[str, str]], text: str, offsets: Sequence[tuple[int, int]]) -> int:
        """The first token behind the last answer of a prompt; 0 where there is none, or the template hides it."""
        if all(message["role"] != "assistant" for message in plain):
            return 0
        try:
            stop = self._answer_spans(plain, text)[-1][2]
        except UserError:  # what cannot be trained on can be answered
            return 0
        return next((token for token, (start, _) in enumerate(offsets) if start >= stop), 0)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _plain(self, messages: Sequence[dict[str, Any]], images: int) -> list[dict[str, str]]:
        """Messages with string contents, an :data:`IMAGE` where an image stands."""
        plain = [{"role": m["role"], "content": self._as_words(self._flatten(m["content"]))} for m in messages]
        marked = sum(m["content"].count(mark) for m in plain for mark in (IMAGE, VIDEO))
        if marked == 0 and images:  # images that no part names stand before the first words of the user
            first = next((m for m in plain if m["role"] == "user"), None)
            if first is None:
                raise UserError("a conversation with images needs a message of role 'user'.")
            first["content"] = IMAGE * images + first["content"]
        elif marked != images:
            raise UserError(f"the conversation has parts for {marked} images and comes with {images}.")
        return plain

    def _flatten(self, content: str | list[dict[str, Any]]) -> str:
        if isinstance(content, str):
            return without_marks(content)
        marks = {"image": IMAGE, "video": VIDEO if "video" in self._media.tokens else IMAGE}
        return "".join(marks.get(part.get("type", ""), "") or _text(part) for part in content)

    def _as_words(self, text: str) -> str:
        """Marks what reads like a control token.

        Raises:
            UserError: a lone surrogate, which no tokenizer takes.
        """
        if not is_writable(text):
            raise UserError(f"the conversation {HALF_A_CHARACTER}.")
        return self._control.sub(lambda match: WORDS + match[0], text)

    def _render(self, plain: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                self._media.in_parts(plain), chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        # A template is a program from elsewhere: what it does not foresee raises anything.
        except Exception as error:  # noqa: BLE001
            raise UserError(f"the chat template refuses the conversation ({one_line(error)}).") from None
        text = self._media.marked(str(rendered))
        if marks_in(text) != "".join(marks_in(message["content"]) for message in plain):
            raise UserError("the chat template writes images and videos otherwise than the conversation has them.")
        return text

    # --- templates that write the last answer otherwise ---------------------------------------------------------------

    @cached_property
    def _rewrites(self) -> bool:
        """Whether the template writes an answer otherwise once the conversation goes on."""
        turns = _turns("abcd")
        try:
            return not self._render(turns).startswith(self._render(turns[:2]))
        except UserError:  # it refuses more than one question
            return False

    @cached_property
    def _closing(self) -> str:
        """What the template writes behind an answer, before the next turn begins.

        Raises:
            UserError: nothing.
        """
        turns = _turns("abc")
        before, last, gone_on = self._render(turns[:1], prompt=True), self._render(turns[:2]), self._render(turns)
        if not gone_on.startswith(f"{before}b"):
            raise UserError(_REWRITES)
        behind = zip(gone_on[len(before) + 1 :], last[last.rindex("b") + 1 :], strict=False)
        closing = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], behind))
        if not closing.strip():
            raise UserError(_REWRITES)
        return closing

    def _render_whole(self, plain: list[dict[str, str]]) -> str:
        """A conversation as it is trained: every answer as the template writes it when the next question is asked.

        Raises:
            UserError: the template leaves out a part of the last answer then.
        """
        if not self._rewrites or plain[-1]["role"] != "assistant":
            return self._render(plain)
        gone_on = self._render([*plain, {"role": "user", "content": "a"}])
        _, stop = self._answer_span(plain, len(plain) - 1, gone_on)
        return gone_on[:stop] + self._closing[len(self._closing.rstrip()) :]

    def _closed_answer(self, answer: str, text: str, start: int) -> int:
        """Where an answer that starts in ``text`` at ``start`` ends, the end token behind it included.

        Raises:
            UserError: a part of it is not there.
        """
        words = answer.strip()
        first = text.find(words, start)
        if not text[start:first].isspace() and first != start:
            raise UserError("the chat template leaves out a part of an answer, such as what was thought before it.")
        behind = first + len(words)
        stop = text.find(self._closing.rstrip(), behind)
        if stop < 0 or (stop > behind and not text[behind:stop].isspace()):
            raise UserError(_REWRITES)
        return stop + len(self._closing.rstrip())

    def _answer_spans(self, plain: list[dict[str, str]], text: str) -> list[tuple[int, int, int]]:
        """Each answer's turn, and its characters in ``text`` with those of the end token behind it.

        What a template puts around the words is the same for all conversations of the same roles and media: it is
        measured once, by rendering turn after turn, and checked against the text of every later one.
        """
        roles = tuple(message["role"] for message in plain)
        kinds = tuple((m["role"], m["content"].count(IMAGE), m["content"].count(VIDEO)) for m in plain)
        offsets = [0, *itertools.accumulate(len(message["content"]) for message in plain)]
        frames = self._frames.get(kinds)
        if frames is not None:
            spans = [
                (turn, before + offsets[turn], after + offsets[turn + 1]) for turn, before, after, _ in frames.answers
            ]
            fits = all(
                text[start:stop] == plain[turn]["content"] + end
                for (turn, start, stop), (*_, end) in zip(spans, frames.answers, strict=True)
            )
            if fits and len(text) == frames.length + offsets[-1]:
                return spans
        spans = [
            (turn, *self._answer_span(plain, turn, text)) for turn, role in enumerate(roles) if role == "assistant"
        ]
        if all(message["content"] == message["content"].strip() for message in plain):  # templates may strip them
            answers = [
                (
                    turn,
                    start - offsets[turn],
                    stop - offsets[turn + 1],
                    text[start + len(plain[turn]["content"]) : stop],
                )
                for turn, start, stop in spans
            ]
            self._frames[kinds] = _Frames(answers, len(text) - offsets[-1])
        return spans

    def _answer_span(self, plain: list[dict[str, str]], turn: int, text: str) -> tuple[int, int]:
        """The characters of an answer and of the end token behind it."""
        before = self._render(plain[:turn], prompt=True)
        if self._rewrites:
            if not text.startswith(before):
                raise UserError(_REWRITES)
            return len(before), self._closed_answer(plain[turn]["content"], text, len(before))
        after = text if turn + 1 == len(plain) else self._render(plain[: turn + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(_REWRITES)
        return len(before), len(after.rstrip())

    def _tokenise(self, text: str) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Ids, character offsets, and the token that each image stands before."""
        ids = list(self._begin)
        offsets = [(0, 0)] * len(ids)
        columns: list[int] = []
        start = 0
        for number, piece in enumerate([text] if self._media.tokens else text.split(IMAGE)):
            if number:
                columns.append(len(ids))
                start += 1
            for at, part in self._parts(piece):
                part_ids, spans = self._tokenise_part(part)
                for token, (a, b) in zip(part_ids, spans, strict=True):
                    if token in self._media.ids and part[a:b] in (IMAGE, VIDEO):  # an image or a video stands here
                        columns.append(len(ids))
                        continue
                    ids.append(token)
                    offsets.append((start + at + a, start + at + b))
            start += len(piece)
        return ids, offsets, columns

    def _parts(self, text: str) -> Iterator[tuple[int, str]]:
        """Where each part of a text starts, and the part: control tokens are apart from words that read like them."""
        if WORDS not in text:
            yield 0, text
            return
        controls = [m.span() for m in self._control_or_media.finditer(text) if text[max(0, m.start() - 1)] != WORDS]
        edges = [0, *itertools.chain.from_iterable(controls), len(text)]
        for start, stop in itertools.pairwise(edges):
            if start < stop:
                yield start, text[start:stop]

    def _tokenise_part(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of one of the :meth:`_parts`."""
        as_words = WORDS in text
        written, origin = self._media.written(text)
        encoded = self.tokenizer(
            written, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=as_words
        )
        # Offsets of what was written, back to those of the text: marks and media are one character there.
        spans = [(origin[a], origin[b - 1] + 1 if b > a else origin[a]) for a, b in encoded["offset_mapping"]]
        return encoded["input_ids"], spans


_REWRITES = (
    "the chat template rewrites earlier turns: answers cannot be told from questions in it; take a named one, as with "
    "model.chat_template=chatml."
)


def _turns(words: str) -> list[dict[str, str]]:
    """User and assistant in turns, a letter each."""
    return [{"role": role, "content": word} for role, word in zip(itertools.cycle(("user", "assistant")), words)]


def _added_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a tokenizer puts before each text of its own accord."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    starts = [at for at in range(len(whole)) if whole[at : at + len(bare)] == bare]
    return whole[: starts[-1]] if starts else []


def _text(part: dict[str, Any]) -> str:
    return without_marks(str(part.get("text", "")))
