"""A chat in the terminal: a line in, an answer out, word by word.

Answers go to standard output and everything else to standard error, so that a pipe gets answers alone.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from lavi.batch import Video, Visual
from lavi.chatting.conversation import Conversation
from lavi.cli.arguments import text
from lavi.cli.entry import mendable
from lavi.config.paths import home_path
from lavi.data.frame_sampling import FrameSampling
from lavi.data.images import open_image
from lavi.data.processor import TooLong
from lavi.data.videos import read_video
from lavi.errors import UserError, nearest

HELP = """\
/image FILE   an image, to stand before your next question
/video FILE   a video, likewise
/new          begin a new conversation, without images
/help         this list
/quit         leave, as Ctrl-D does; Ctrl-C ends an answer"""

HOW_TO_LEAVE = "(Ctrl-C once more leaves, as /quit and Ctrl-D do)"

CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)))
"""Control characters, but for tab and new line, are dropped: in an answer they would be commands to the terminal."""


class TerminalChat:
    """Reads lines from standard input until it ends, and answers each.

    Args:
        sampling: the frames of a video that are shown.
    """

    def __init__(self, conversation: Conversation, sampling: FrameSampling) -> None:
        self.conversation, self.sampling = conversation, sampling
        self.in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.was_interrupted = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": lambda file: self._show(open_image(file_named(file, "/image")), file),
            "/video": lambda file: self._show(read_video(file_named(file, "/video"), self.sampling), file),
            "/new": lambda _: self._restart(),
            "/help": lambda _: note(HELP),
        }

    def run(self) -> None:
        """Until ``/quit``, the end of the input, or two Ctrl-C at the prompt.

        Raises:
            KeyboardInterrupt: a second Ctrl-C in a row, where the lines come from a pipe.
        """
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        if self.in_terminal:
            with contextlib.suppress(ImportError):  # not on every system
                import readline  # noqa: F401  (input() edits lines and remembers them from then on)
            note("Ask, or give an image with /image FILE; /help lists all commands.")
        while (line := self._read()) is not None and line != "/quit":
            self._obey(line)

    def _read(self) -> str | None:
        """The next line, without blanks around it; None: there is no more."""
        for _ in range(2):
            try:
                return input("> " if self.in_terminal else "").translate(CONTROLS).strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.in_terminal:
                    raise
                note(f"\n{HOW_TO_LEAVE}")
        return None

    def _obey(self, line: str) -> None:
        """Answer a question or run a command; whatever a user can mend is one sentence, and the chat goes on."""
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)
        except KeyboardInterrupt:
            print(flush=True)
            if self.was_interrupted and not self.in_terminal:  # nobody types there
                raise
            self.was_interrupted = True
            return
        except TooLong as error:
            note(f"error: {error.what}: ask with fewer words, or begin a new conversation with /new.")
        except Exception as error:
            if (sentence := mendable(error)) is None:
                raise
            note(f"error: {sentence}")
        self.was_interrupted = False

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            raise UserError(f"there is no command {name}: {nearest(name, [*self.commands, '/quit'])}")
        self.commands[name](rest.strip())

    def _answer(self, question: str) -> None:
        with noting_interrupts() as interrupted:

            def say_on(words: str) -> None:
                say(words)
                if interrupted.is_set():
                    raise KeyboardInterrupt

            self.conversation.ask(text(question), say=say_on)
        print(flush=True)

    def _show(self, visual: Visual, name: str) -> None:
        self.conversation.show(visual)
        size = f"{len(visual.frames)} frames" if isinstance(visual, Video) else f"{visual.width}x{visual.height}"
        note(f"{name} ({size}) stands before your next question.")

    def _restart(self) -> None:
        self.conversation.restart()
        note("A new conversation.")


@contextlib.contextmanager
def noting_interrupts() -> Iterator[threading.Event]:
    """Ctrl-C raises KeyboardInterrupt as ever, and is noted: what is raised inside a library may be dropped there.

    Handlers of signals belong to the main thread; in another one nothing is noted.
    """
    interrupted = threading.Event()

    def note_and_raise(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, note_and_raise)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def note(words: str) -> None:
    """Say what is no answer."""
    print(words, file=sys.stderr, flush=True)


def say(words: str) -> None:
    """Write a part of an answer at once."""
    print(words.translate(CONTROLS), end="", flush=True)


def file_named(words: str, command: str) -> str:
    """The file that a line names: as it stands there, or in quotes, as terminals write a file that is dropped on them.

    Raises:
        UserError: it names none.
    """
    if not words:
        raise UserError(
            f"{command} needs a file, as in {command} {'clip.mp4' if command == '/video' else 'photo.jpg'}."
        )
    file = home_path(words)
    with contextlib.suppress(ValueError):  # quotes that do not close
        unquoted = shlex.split(words)
        if len(unquoted) == 1 and not file.exists():
            file = home_path(unquoted[0])
    return str(file)
