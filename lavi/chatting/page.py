"""What a page in the browser asks of a model: each call brings all that the page shows, and is answered word by word.

The page may take a turn back, or change it; so nothing is kept here but what was computed of images.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lavi.batch import Visual, visual_part
from lavi.chatting.conversation import Conversation
from lavi.cli.entry import mendable
from lavi.data.frame_sampling import FrameSampling
from lavi.data.images import open_image, what_it_is
from lavi.data.processor import TooLong
from lavi.data.videos import is_video, read_video

MISTAKE = "error"
"""The title of what the page shows in the place of an answer."""

FIRST_BYTES = 512
"""Of a file, to tell a video by."""


class Page:
    """Answers for a page, one at a time.

    Args:
        template: all conversations are with its model, and of answers as there.
        sampling: the frames of a video that are shown.
    """

    def __init__(self, template: Conversation, sampling: FrameSampling) -> None:
        self.template, self.sampling = template, sampling
        self.state = template.state
        """What the last conversation showed: of the same pixels nothing is computed again."""
        self.answering = threading.Lock()  # in a layer's norms stand the deltas of one call

    def answer(self, message: dict[str, Any], history: Sequence[dict[str, Any]]) -> Iterator[str | dict[str, Any]]:
        """The answer so far, whenever there is more of it; in its place one sentence, if a user can mend something.

        Args:
            message: what is asked, ``{"text": ..., "files": [...]}``; a file is a path or, if the page asks once more,
                ``{"path": ...}``.
            history: what the page shows before it, messages as gradio has them.
        """
        if not message["text"].strip():  # images alone wait for their question
            return
        files = [file if isinstance(file, dict) else {"path": file} for file in message["files"]]
        asked: list[dict[str, Any]] = [{"type": "file", "file": file} for file in files]
        asked.append({"type": "text", "text": message["text"]})
        try:
            conversation = self._conversation([*history, {"role": "user", "content": asked}])
            question = conversation.messages.pop()["content"]
            conversation.before_question, text = question[:-1], question[-1]["text"]
            yield from self._words(conversation, text)
        except TooLong as error:
            yield mistake(f"{error.what}: ask with fewer words, or clear the conversation.")
        except Exception as error:
            if (sentence := mendable(error)) is None:
                raise
            yield mistake(sentence)

    def _conversation(self, shown: Sequence[dict[str, Any]]) -> Conversation:
        """What a page shows, its last message among what was said; a question that was not answered is left out."""
        conversation, visuals = self.template.another(), list[Visual]()
        for turn in turns(shown):
            content: list[dict[str, Any]] = []
            for part in turn["content"]:
                if part["type"] == "file":
                    visuals.append(self._open(part["file"]["path"]))
                    content.append(visual_part(visuals[-1]))
            words = [part["text"] for part in turn["content"] if part["type"] == "text" and part["text"].strip()]
            content.append({"type": "text", "text": "\n".join(words)})
            conversation.messages.append({"role": turn["role"], "content": content})
        with self.answering:
            self.state = conversation.state = conversation.model.see(*visuals, known=self.state)
        return conversation

    def _open(self, file: str) -> Visual:
        name = Path(file).name  # the page keeps a copy under a long path
        with open(file, "rb") as opened:
            kind = what_it_is(opened.read(FIRST_BYTES)) or ""
        if is_video(file) or kind.endswith("video"):
            return read_video(file, self.sampling, name=name)
        return open_image(file, name=name)

    def _words(self, conversation: Conversation, question: str) -> Iterator[str]:
        """The answer so far, whenever there is more of it; it ends when nobody takes it any more."""
        pieces: SimpleQueue[str | Exception | None] = SimpleQueue()
        is_left = threading.Event()

        def say(words: str) -> None:
            if is_left.is_set():
                raise KeyboardInterrupt
            pieces.put(words)

        def work() -> None:
            try:
                with self.answering:
                    conversation.ask(question, say)
            except KeyboardInterrupt:
                pass
            except Exception as error:  # noqa: BLE001  (it is raised where the words are taken)
                pieces.put(error)
            finally:
                pieces.put(None)

        threading.Thread(target=work, daemon=True).start()
        so_far = ""
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                so_far += piece
                yield so_far
        finally:
            is_left.set()


def mistake(sentence: str) -> dict[str, Any]:
    """What the page shows in the place of an answer."""
    return {"role": "assistant", "content": sentence, "metadata": {"title": MISTAKE}}


def _has_text(message: dict[str, Any]) -> bool:
    content = message["content"]
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return any(text.strip() for text in texts)


def turns(shown: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as gradio has them to turns of user and assistant; a question that was not answered is left out.

    Files that are shown one message after the other are one turn with the question behind them.
    """
    kept: list[dict[str, Any]] = []
    for message in shown:
        mistaken = (message.get("metadata") or {}).get("title") == MISTAKE
        asked = bool(kept) and kept[-1]["role"] == "user"
        if asked and (mistaken or (message["role"] == "user" and _has_text(kept[-1]))):  # stopped before its first word
            kept.pop()
        if not mistaken:
            kept.append(message)
    told: list[dict[str, Any]] = []
    for message in kept:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        if told and told[-1]["role"] == message["role"]:
            told[-1]["content"] += parts
        else:
            told.append({"role": message["role"], "content": parts})
    return told
