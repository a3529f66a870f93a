"""A conversation with a model: several turns, and images and videos that are computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from lavi.batch import Visual, visual_part
from lavi.model import LONGEST_ANSWER, Messages, VisionLanguageModel

LONGEST_REPLY = 256
"""Tokens of an answer in a chat, unless its arguments say otherwise."""

Say = Callable[[str], object]
"""Takes the words of an answer as they come."""


class Conversation:
    """What was shown, asked and answered.

    Args:
        model: what answers.
        longest: the most tokens of an answer, where there is room for so many.
        decoding: of all answers, as in :meth:`lavi.model.VisionLanguageModel.generate`.
    """

    def __init__(self, model: VisionLanguageModel, *, longest: int = LONGEST_ANSWER, **decoding: Any) -> None:
        self.model, self.longest, self.decoding = model, longest, decoding
        self.restart()

    def restart(self) -> None:
        """Forget what was shown, asked and answered."""
        self.messages: Messages = []
        self.before_question: list[dict[str, Any]] = []
        """The parts of images and videos that stand before the next question."""
        self.state = self.model.see()

    def another(self) -> Conversation:
        """A new conversation with the same model, of answers as here."""
        return Conversation(self.model, longest=self.longest, **self.decoding)

    def show(self, *visuals: Visual) -> None:
        """Let images and videos stand before the next question, and compute what depends on them alone.

        Raises:
            UserError: as :meth:`lavi.model.VisionLanguageModel.see`.
        """
        state = self.model.see(*self.state.visuals, *visuals, known=self.state)
        self.state, self.before_question = state, [*self.before_question, *map(visual_part, visuals)]

    def ask(self, question: str, say: Say = len) -> str:
        """The answer to a question, about all that was shown and said before it.

        An answer that KeyboardInterrupt ends stands in the conversation as far as it was said; a question of whose
        answer nothing was said does not.

        Args:
            say: takes the words as they come; of beam search, all at the end.

        Raises:
            TooLong: the conversation is longer than the context; the question is no part of it.
            UserError: as :meth:`lavi.model.VisionLanguageModel.generate`.
        """
        message = {"role": "user", "content": [*self.before_question, {"type": "text", "text": question}]}
        batch = self.model.prompts([[*self.messages, message]], self.state)
        words = Words(self.model.chat.tokenizer, say)
        is_streamed = self.decoding.get("num_beams", 1) == 1
        streamed = {"streamer": words} if is_streamed else {}
        try:
            answer = self.model.reply(batch, longest=self.longest, **streamed, **self.decoding)[0]
            if not is_streamed:
                say(answer)
        except KeyboardInterrupt:
            if words.text:
                self._record(message, words.text.strip())
            raise
        self._record(message, answer)
        return answer

    def _record(self, question: dict[str, Any], answer: str) -> None:
        self.messages = [*self.messages, question, {"role": "assistant", "content": answer}]
        self.before_question = []


class Words(TextStreamer):
    """Hands on the words of an answer as they come, without blanks before the first.

    Args:
        say: takes them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Say) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.say, self.text = say, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        new = text if self.text else text.lstrip()
        self.text += new
        if new:
            self.say(new)
