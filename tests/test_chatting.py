"""A chat: turns, images and videos that are computed once, an answer that is stopped, and mistakes that end nothing."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import av
import pytest
from conftest import answering, collate, image, refused
from test_oracles import FUSIONS

from lavi.batch import Layout, Sample
from lavi.chatting.conversation import Conversation
from lavi.chatting.page import MISTAKE, Page
from lavi.chatting.terminal import HELP, TerminalChat, file_named, say
from lavi.checkpoints.model_folder import build as build_model
from lavi.checkpoints.model_folder import save_pretrained
from lavi.data.frame_sampling import FrameSampling
from lavi.data.processor import TooLong
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe

ROOT = Path(__file__).parent.parent
KINDS = ["lavi-attention", "visor-routed", "fastv", "vica"]
TOKENS = 4


@pytest.fixture(scope="module", params=KINDS)
def model(build: Any, request: pytest.FixtureRequest) -> VisionLanguageModel:
    return answering(build, FUSIONS[request.param]())


@pytest.fixture(scope="module")
def plain(build: Any) -> VisionLanguageModel:
    return answering(build, ConcatFusion())


def answer_to(model: VisionLanguageModel, messages: list[dict[str, Any]], *seeds: int) -> str:
    """The answer to a whole conversation with its images, read at once."""
    whole = Sample("s", messages, [image(seed) for seed in seeds])
    return model.answer(collate(model, [whole], prompt=True), max_new_tokens=TOKENS)[0]


def user(*parts: str | int) -> dict[str, Any]:
    content = [{"type": "image"} if isinstance(part, int) else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


# --- the conversation -------------------------------------------------------------------------------------------------


def test_each_turn_is_answered_as_the_whole_conversation_read_at_once(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With images before the first question and before a later one; the tower runs once for each image."""
    views: list[int] = []
    tower = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda pixels: views.append(len(pixels)) or tower(pixels))
    conversation = Conversation(model, max_new_tokens=TOKENS)
    conversation.show(image(1))
    first = conversation.ask("what is it?")
    second = conversation.ask("and its colour?")
    conversation.show(image(2))
    conversation.show(image(3))
    third = conversation.ask("which is larger?")
    assert views == [1, 1, 1]
    messages = [user(1, "what is it?")]
    assert first == answer_to(model, messages, 1)
    messages += [assistant(first), user("and its colour?")]
    assert second == answer_to(model, messages, 1)
    messages += [assistant(second), user(2, 3, "which is larger?")]
    assert third == answer_to(model, messages, 1, 2, 3)
    assert conversation.messages == [*messages, assistant(third)]
    conversation.restart()
    assert conversation.ask("what is it?") == answer_to(model, [user("what is it?")])


def test_words_come_one_by_one_and_together_are_the_answer(plain: VisionLanguageModel) -> None:
    words: list[str] = []
    answer = Conversation(plain, longest=20).ask("what is it?", words.append)
    assert len(words) > 2
    assert not words[0][0].isspace()
    assert "".join(words).strip() == answer
    beams: list[str] = []
    answer = Conversation(plain, num_beams=2).ask("what is it?", beams.append)
    assert beams == [answer]


class Stop:
    """A listener who presses Ctrl-C when so many pieces of an answer have been said."""

    def __init__(self, after: int) -> None:
        self.after, self.words = after, ""

    def __call__(self, words: str) -> None:
        self.words += words
        self.after -= 1
        if self.after <= 0:
            raise KeyboardInterrupt


def test_an_answer_that_is_stopped_stands_as_far_as_it_was_said(model: VisionLanguageModel) -> None:
    conversation, stop = Conversation(model, longest=40), Stop(after=2)
    conversation.show(image(1))
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("what is it?", stop)
    messages = [user(1, "what is it?"), assistant(stop.words.strip())]
    assert conversation.messages == messages
    conversation.decoding = {"max_new_tokens": TOKENS}
    assert conversation.ask("and its colour?") == answer_to(model, [*messages, user("and its colour?")], 1)


def test_a_question_that_is_stopped_before_a_word_was_not_asked(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in the language model it was: nothing of the stopped call is left behind."""
    conversation = Conversation(model, max_new_tokens=TOKENS)
    conversation.show(image(1))
    for layer in model.language.layers:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = layer.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("what?")
        hook.remove()
        assert conversation.messages == []
    assert conversation.ask("what is it?") == answer_to(model, [user(1, "what is it?")], 1)


def test_a_conversation_that_is_too_long_is_left_as_it_was(plain: VisionLanguageModel) -> None:
    conversation = Conversation(plain, longest=8)
    conversation.show(image(1))
    conversation.ask("what is it?")
    before = conversation.messages
    with pytest.raises(TooLong):
        conversation.ask("circle " * 300)
    assert conversation.messages == before
    conversation.show(image(2))
    with pytest.raises(UserError, match="more than the context of 256"):
        conversation.ask("circle " * 300)
    assert len(conversation.before_question) == 1
    conversation.ask("and this?")
    assert conversation.messages[-2] == user(2, "and this?")


# --- the terminal -----------------------------------------------------------------------------------------------------


class Lines(io.StringIO):
    """What is typed; Ctrl-C where a line says so."""

    def readline(self, *size: Any) -> str:
        line = super().readline(*size)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.fixture
def typed(plain: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Any:
    """Runs a chat on lines: the answers, the rest, and the conversation."""
    monkeypatch.chdir(tmp_path)
    image(1).save("a photo.png")
    frames = [image(seed) for seed in range(4)]
    frames[0].save("v.gif", save_all=True, append_images=frames[1:], duration=100)

    def run(*lines: str, terminal: bool = False, **decoding: Any) -> tuple[list[str], list[str], Conversation]:
        typed = Lines("".join(f"{line}\n" for line in lines))
        typed.isatty = sys.stdout.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", typed)
        conversation = Conversation(plain, **{"max_new_tokens": 4} | decoding)
        TerminalChat(conversation, FrameSampling(frames=2)).run()
        out, err = capsys.readouterr()
        return out.splitlines(), err.splitlines(), conversation

    return run


def test_lines_in_answers_out(typed: Any, plain: VisionLanguageModel) -> None:
    """Standard output has the answers alone: no prompts, no colours."""
    out, err, conversation = typed("what is it?", "", "  ", "/image a photo.png", "and this?", "/video v.gif", "so?")
    answers = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
    assert [line.strip() for line in out] == [answer.translate(dict.fromkeys(range(32))) for answer in answers]
    assert len(answers) == 3
    assert err == [
        "a photo.png (40x40) stands before your next question.",
        "v.gif (2 frames) stands before your next question.",
    ]
    assert [part["type"] for part in conversation.messages[4]["content"]] == ["video", "text"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/image", "error: /image needs a file, as in /image photo.jpg."),
        ("/video", "error: /video needs a file, as in /video clip.mp4."),
        ("/image gone.png", "error: there is no image gone.png."),
        ("/image .", "error: . cannot be read as an image (Is a directory)."),
        ("/image text.txt", "error: text.txt is not an image that opens (no format known here)."),
        ("/image 'gone.png", "error: there is no image 'gone.png."),
        ("/image a\0.png", "error: there is no image a.png."),
        ("/image " + "x" * 300, f"error: {'x' * 300}: File name too long: choose a shorter name."),
        (
            "/video 'a photo.png'",
            "error: a photo.png does not open as a video (it is a PNG image), which is mp4, webm,",
        ),
        ("/imgae a.png", "error: there is no command /imgae: did you mean '/image'?"),
        ("/", "error: there is no command /: known: /help, /image, /new, /quit, /video."),
        (
            "circle " * 300,
            "error: the conversation has 615 text and 0 visual tokens, more than the context of 256: ask with fewer "
            "words, or begin a new conversation with /new.",
        ),
    ],
    ids=lambda text: text[:12],
)
def test_a_mistake_is_one_sentence_and_the_chat_goes_on(typed: Any, line: str, sentence: str) -> None:
    Path("text.txt").write_text("words")
    out, err, conversation = typed("what is it?", line, "and?")
    assert len(err) == 1
    assert re.sub(r"\d+ text", "615 text", err[0]).startswith(sentence)
    assert len(out) == 2
    assert len(conversation.messages) == 4


def test_an_error_that_nobody_can_mend_is_not_hidden(typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conversation, "ask", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        typed("what?")


def test_commands(typed: Any) -> None:
    out, err, conversation = typed("what?", "/image a photo.png", "/new", "/help", "and?", "/quit", "never asked")
    assert err[-1 - HELP.count("\n") :] == HELP.splitlines()
    assert "A new conversation." in err
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[0] == user("and?")
    assert len(out) == 2


def test_ctrl_c_ends_an_answer_and_not_the_chat(typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pressed = itertools.chain([False, True], itertools.repeat(False))  # at the second piece of the first answer
    heard: list[str] = []

    def listen(words: str) -> None:
        heard.append(words)
        if next(pressed):
            raise KeyboardInterrupt

    monkeypatch.setattr("lavi.chatting.terminal.say", listen)
    _, err, conversation = typed("one", "two", "three", max_new_tokens=12)
    assert err == []
    assert [message["content"] for message in conversation.messages[::2]] == [
        [{"type": "text", "text": text}] for text in ("one", "two", "three")
    ]
    assert conversation.messages[1]["content"] == "".join(heard[:2]).strip()


def test_a_second_ctrl_c_at_the_prompt_leaves(typed: Any) -> None:
    _, err, conversation = typed("^C", "what?", "^C", "^C", "never asked", terminal=True)
    assert len([line for line in err if "once more leaves" in line]) == 3
    assert len(conversation.messages) == 2


def test_ctrl_c_leaves_a_chat_that_nobody_types(typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two lines at once; else with the second answer in a row that it ends."""
    with pytest.raises(KeyboardInterrupt):
        typed("^C")
    asked: list[str] = []

    def stopped(self: Conversation, question: str, say: Any) -> str:
        asked.append(question)
        if question == "answered":
            return "yes"
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        typed("one", "answered", "two", "three", "four")
    assert asked == ["one", "answered", "two", "three"]


def test_an_answer_gives_the_terminal_no_commands(capsys: Any) -> None:
    say("red\x1b[31m\x07 ci\x9brcle\t1\nü")
    assert capsys.readouterr().out == "red[31m circle\t1\nü"


def test_a_file_is_named_as_it_is_or_in_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b.png", "it's.png", "c.png"):
        Path(name).touch()
    named = {"a b.png": "a b.png", "'a b.png'": "a b.png", r"a\ b.png": "a b.png", "it's.png": "it's.png"}
    named |= {"c.png": "c.png", "a b c.png": "a b c.png", "~/x.png": str(Path.home() / "x.png")}
    assert {words: file_named(words, "/image") for words in named} == named


# --- the page ---------------------------------------------------------------------------------------------------------


def shown(role: str, *parts: str | Path, title: str | None = None) -> dict[str, Any]:
    """A message as gradio has it: paths are files."""
    content: list[dict[str, Any]] = [
        {"type": "file", "file": {"path": str(part)}} if isinstance(part, Path) else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": role, "content": content, "metadata": {"title": title}}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / name for name in ("1.png", "2.png", "bad.png", "film.gif", "film.bin")}
    for seed in (1, 2):
        image(seed).save(files[f"{seed}.png"])
    files["bad.png"].write_text("words")
    image(3).save(files["film.gif"], save_all=True, append_images=[image(4)], duration=100)
    with av.open(str(files["film.bin"]), "w", format="mp4") as container:  # by its first bytes, whatever it is called
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 40, 40, "yuv420p"
        for seed in (3, 4):
            container.mux(stream.encode(av.VideoFrame.from_image(image(seed))))
        container.mux(stream.encode())
    return files


def last(page: Page, history: list[dict[str, Any]], text: str, *files: Path) -> Any:
    """The last that a page shows for a question."""
    answers = list(page.answer({"text": text, "files": [str(file) for file in files]}, history))
    return answers[-1] if answers else None


def test_a_page_is_answered_as_the_conversation_that_it_shows(
    plain: VisionLanguageModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was taken back there; and the tower runs once for each image."""
    views: list[int] = []
    tower = plain.vision.forward
    monkeypatch.setattr(plain.vision, "forward", lambda pixels: views.append(len(pixels)) or tower(pixels))
    page = Page(Conversation(plain, max_new_tokens=TOKENS), FrameSampling(frames=2))
    history = [shown("user", files["1.png"])]  # given on the command line
    first = last(page, history, "what is it?")
    history += [shown("user", "what is it?"), shown("assistant", first)]
    second = last(page, history, "and this?", files["2.png"])
    again = last(page, history, "or this?", files["2.png"])
    assert views == [1, 1]
    messages = [user(1, "what is it?"), assistant(first)]
    assert first == answer_to(plain, messages[:1], 1)
    assert second == answer_to(plain, [*messages, user(2, "and this?")], 1, 2)
    assert again == answer_to(plain, [*messages, user(2, "or this?")], 1, 2)
    retried = {"text": "and this?", "files": [{"path": str(files["2.png"])}]}
    assert list(page.answer(retried, history))[-1] == second
    waiting = [*history, shown("user", files["2.png"], "")]
    assert last(page, history, " ", files["2.png"]) is None
    assert last(page, waiting, "and this?") == second


@pytest.mark.parametrize("name", ["film.gif", "film.bin"])
def test_a_page_shows_videos(plain: VisionLanguageModel, files: dict[str, Path], name: str) -> None:
    page = Page(Conversation(plain, max_new_tokens=TOKENS), FrameSampling(frames=2))
    assert isinstance(last(page, [], "what is it?", files[name]), str)
    assert page.state.layouts == (Layout(views=2, video=True),)


def test_a_mistake_on_a_page_is_one_sentence_and_the_chat_goes_on(
    plain: VisionLanguageModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Page(Conversation(plain, max_new_tokens=TOKENS), FrameSampling())
    mistake = last(page, [], "what?", files["bad.png"])
    assert mistake["content"] == "bad.png is not an image that opens (no format known here)."
    history = [shown("user", files["bad.png"], "what?"), shown("assistant", mistake["content"], title=MISTAKE)]
    assert last(page, history, "what is it?", files["1.png"]) == answer_to(plain, [user(1, "what is it?")], 1)
    given = shown("user", files["1.png"])  # on the command line: a question that failed does not take it along
    assert last(page, [given, *history], "what is it?") == answer_to(plain, [user(1, "what is it?")], 1)
    assert "fewer words, or clear the conversation." in last(page, [], "circle " * 300)["content"]
    stopped = shown("user", files["bad.png"], "what?")  # before the first word of its answer
    assert last(page, [given, stopped], "what is it?") == answer_to(plain, [user(1, "what is it?")], 1)
    monkeypatch.setattr(Conversation, "ask", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last(page, [], "what?")


def test_a_page_that_is_left_stops_its_answer(plain: VisionLanguageModel) -> None:
    """Another may be asked then: only one is answered at a time."""
    ended: list[str] = []
    page = Page(Conversation(plain, longest=200), FrameSampling())
    ask = Conversation.ask

    class Watched(Conversation):
        def ask(self, question: str, say: Any = len) -> str:
            try:
                return ask(self, question, say)
            except KeyboardInterrupt:
                ended.append(question)
                raise

        def another(self) -> Conversation:
            return Watched(self.model, longest=self.longest)

    page.template = Watched(plain, longest=200)
    answers = page.answer({"text": "what?", "files": []}, [])
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    page.template = Conversation(plain, max_new_tokens=TOKENS)
    assert last(page, [], "what is it?") == answer_to(plain, [user("what is it?")])
    assert ended == ["what?"]


def test_a_page_is_for_this_computer_alone(plain: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gradio is asked for; the package itself is an extra, and has no part in it."""
    gradio = MagicMock()
    gradio.ChatInterface.return_value.launch.return_value = (None, "http://127.0.0.1:7860/", None)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.delitem(sys.modules, "lavi.chatting.web", raising=False)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    web = importlib.import_module("lavi.chatting.web")
    page = Page(Conversation(plain), FrameSampling())
    folders: list[Path] = []

    def answers() -> None:
        folders.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        assert folders[0].stat().st_mode & 0o077 == 0  # nobody else's

    gradio.ChatInterface.return_value.block_thread = answers
    monkeypatch.setenv("GRADIO_TEMP_DIR", "everybody's")
    web.serve(page, title="a run", files=["a.png"])
    assert not folders[0].exists()
    asked = gradio.ChatInterface.return_value.launch.call_args.kwargs
    assert {name: asked[name] for name in ("server_name", "share", "allowed_paths", "mcp_server", "pwa")} == {
        "server_name": "127.0.0.1",
        "share": False,
        "allowed_paths": ["a.png"],
        "mcp_server": False,
        "pwa": False,
    }
    assert gradio.ChatInterface.call_args.args == (page.answer,)
    assert gradio.ChatInterface.call_args.kwargs["analytics_enabled"] is False
    assert "share" not in gradio.Chatbot.call_args.kwargs["buttons"]
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    monkeypatch.delitem(sys.modules, "lavi.chatting.web")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat_folder(tiny_recipe: Path, tmp_path: Path) -> Path:
    """An export whose answers do not end by themselves, and an image beside it."""
    drawn = ["initializer_range=0.3", "tie_word_embeddings=false", "max_position_embeddings=4096"]
    model = build_model(Recipe.load(tiny_recipe, [f"model.language.config.{one}" for one in drawn]))
    save_pretrained(model, tmp_path / "exported")
    image(1).save(tmp_path / "a.png")
    return tmp_path / "exported"


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "lavi.generate", "--checkpoint", str(folder), "--image", "a.png", *arguments]
    return {"args": words, "cwd": folder.parent, "env": os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}}


def test_a_chat_through_pipes(chat_folder: Path) -> None:
    lines = b"what is it?\n/image gone.png\n\xff?\nand?\n"
    done = subprocess.run(**command(chat_folder, "--max-new-tokens", "4"), input=lines, capture_output=True)
    assert done.returncode == 0, done.stderr
    # Of all that stands there: what a library says of another one while it is imported is not ours.
    assert done.stderr.endswith(b"error: there is no image gone.png.\n")
    assert done.stdout.count(b"\n") == 3
    assert b"\x1b" not in done.stdout
    assert b">" not in done.stdout


def test_a_page_without_gradio_is_refused_before_the_model_is_read(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavi.generate.find_spec", lambda name: None)
    refused(run("lavi.generate", "--checkpoint", "gone", "--web"), "pip install 'lavi[web]'")


def test_an_interrupt_that_another_library_drops_ends_the_answer(
    plain: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = TerminalChat(Conversation(plain), FrameSampling())

    def ask(question: str, say: Any) -> None:
        say("one ")
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        say("two ")
        say("three")

    monkeypatch.setattr(chat.conversation, "ask", ask)
    before = signal.getsignal(signal.SIGINT)
    chat._obey("and?")
    assert capsys.readouterr().out == "one two \n"
    assert signal.getsignal(signal.SIGINT) is before


def read_until(terminal: int, wanted: bytes, *, seconds: float = 120) -> bytes:
    """What a terminal shows until it shows something; it fails if that does not come."""
    shown, end = b"", time.monotonic() + seconds
    while wanted not in shown:
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], shown
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # it is closed
            pytest.fail(f"the chat has ended: {shown!r}")
    return shown


def test_a_chat_in_a_terminal(chat_folder: Path) -> None:
    """Typed at a prompt; Ctrl-C ends a long answer, the chat goes on, and Ctrl-D leaves it."""
    terminal, inside = pty.openpty()
    chat = subprocess.Popen(
        **command(chat_folder, "--max-new-tokens", "3900"),
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(inside)
    try:
        assert b"/help" in read_until(terminal, b"> ")
        for question in (b"what is it?", b"and?"):
            os.write(terminal, question + b"\n")
            read_until(terminal, question)
            read_until(terminal, b" ")
            os.write(terminal, b"\x03")
            read_until(terminal, b"> ")
        os.write(terminal, b"/new\n")
        read_until(terminal, b"A new conversation.\r\n> ")  # until it listens: Ctrl-D before that would be lost
        os.write(terminal, b"\x04")
        assert chat.wait(timeout=60) == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(terminal)
