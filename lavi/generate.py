"""Ask a trained run about images and videos: one question, or a chat.

python -m lavi.generate --checkpoint runs/NAME --image photo.jpg
python -m lavi.generate --checkpoint runs/NAME --web
python -m lavi.generate --checkpoint runs/NAME --image photo.jpg --question "what colour is the circle?"
python -m lavi.generate --checkpoint runs/NAME --video clip.mp4 --frames 8 --question "which way does the circle move?"
"""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec
from typing import Any

from lavi.cli.arguments import Parser, path, text, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.errors import UserError


def arguments() -> Namespace:
    """Of the command line.

    Raises:
        UserError: they do not go together, or the page needs what is not installed.
    """
    parser = Parser(prog="python -m lavi.generate", description=__doc__)
    folder = "a run folder of lavi.fit, a folder of lavi.export, or a released vision-language model"
    parser.add_argument("--checkpoint", type=path, required=True, metavar="FOLDER", help=folder)
    visual: dict[str, Any] = {"dest": "visuals", "action": "append", "default": [], "metavar": "FILE"}
    several = "; may be given several times, in the order that the question means"
    parser.add_argument("--image", type=lambda file: ("image", str(path(file))), help=f"an image{several}", **visual)
    parser.add_argument("--video", type=lambda file: ("video", str(path(file))), help=f"a video{several}", **visual)
    frames = "frames of each video, evenly spread (default: those that the run was trained on)"
    parser.add_argument("--frames", type=whole_number(1), metavar="N", help=frames)
    parser.add_argument("--question", type=text, metavar="TEXT", help="one question (default: a chat)")
    longest = "the longest answer, where the context has room for it (default: 64, in a chat 256)"
    parser.add_argument("--max-new-tokens", type=whole_number(1), metavar="N", help=longest)
    parser.add_argument(
        "--beams", type=whole_number(1), default=1, help="beam search with this many beams (not streamed)"
    )
    parser.add_argument("--web", action="store_true", help="the chat as a page in the browser, on this computer alone")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--trust", action="store_true", help="build whatever the recipe in the folder names")
    args = parser.read()
    if args.question is not None and not args.question.strip():
        raise UserError("--question is empty.")
    if args.web and args.question is not None:
        raise UserError("--web is a chat: leave out --question.")
    if args.web and find_spec("gradio") is None:
        raise UserError("--web needs the package `gradio`: pip install 'lavi[web]'.")
    return args


@cli_entry_point
def main() -> None:
    args = arguments()
    device = device_of(args.device)
    from lavi.chatting.conversation import LONGEST_REPLY, Conversation
    from lavi.chatting.terminal import TerminalChat, say
    from lavi.checkpoints.load import load, trained_sampling
    from lavi.data.frame_sampling import FrameSampling
    from lavi.data.images import open_image
    from lavi.data.videos import read_video
    from lavi.model import LONGEST_ANSWER

    model = load(args.checkpoint, device=device, trust=args.trust)
    trained = trained_sampling(args.checkpoint, trust=args.trust)
    sampling = trained if args.frames is None else FrameSampling(frames=args.frames)
    visuals = [open_image(file) if kind == "image" else read_video(file, sampling) for kind, file in args.visuals]
    most = args.max_new_tokens or (LONGEST_ANSWER if args.question is not None else LONGEST_REPLY)
    conversation = Conversation(model, longest=most, num_beams=args.beams)
    if args.web:
        from lavi.chatting.page import Page
        from lavi.chatting.web import serve

        page = Page(conversation, sampling)
        return serve(page, title=args.checkpoint.name, files=[file for _, file in args.visuals])
    conversation.show(*visuals)
    if args.question is None:
        TerminalChat(conversation, sampling).run()
    else:
        conversation.ask(args.question, say)
        print()


if __name__ == "__main__":
    main()
