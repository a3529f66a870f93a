"""Ask a trained run about images and videos.

python -m lavi.generate --checkpoint runs/NAME --image photo.jpg --question "what colour is the circle?"
python -m lavi.generate --checkpoint runs/NAME --video clip.mp4 --frames 8 --question "which way does the circle move?"
"""

from __future__ import annotations

from typing import Any

from lavi.cli.arguments import Parser, path, text, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.errors import UserError


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m lavi.generate", description=__doc__)
    parser.add_argument("--checkpoint", type=path, required=True, metavar="RUN", help="a run folder of lavi.fit")
    visual: dict[str, Any] = {"dest": "visuals", "action": "append", "default": [], "metavar": "FILE"}
    several = "; may be given several times, in the order that the question means"
    parser.add_argument("--image", type=lambda file: ("image", str(path(file))), help=f"an image{several}", **visual)
    parser.add_argument("--video", type=lambda file: ("video", str(path(file))), help=f"a video{several}", **visual)
    frames = "frames of each video, evenly spread (None: those that the run was trained on)"
    parser.add_argument("--frames", type=whole_number(1), metavar="N", help=frames)
    parser.add_argument("--question", type=text, required=True, metavar="TEXT")
    longest = "the longest answer (None: 64, or less where the context has no room for more)"
    parser.add_argument("--max-new-tokens", type=whole_number(1), metavar="N", help=longest)
    parser.add_argument(
        "--beams", type=whole_number(1), default=1, help="beam search with this many beams (not streamed)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--trust", action="store_true", help="build whatever the run's recipe names")
    args = parser.read()
    if not args.question.strip():
        raise UserError("--question is empty.")
    device = device_of(args.device)
    from transformers import TextStreamer

    from lavi.checkpoints.run_folder import load_run
    from lavi.data.frame_sampling import FrameSampling
    from lavi.data.images import open_image
    from lavi.data.videos import read_video

    recipe, model = load_run(args.checkpoint, trust=args.trust)
    sampling = FrameSampling()
    if args.frames is not None:
        sampling = FrameSampling(frames=args.frames)
    elif (recipe.settings["data"].get("format") or {}).get("video") is not None:
        sampling = recipe.build("data.format.video")
    visuals = [open_image(file) if kind == "image" else read_video(file, sampling) for kind, file in args.visuals]
    model.to(device)
    decoding = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    if args.beams > 1:
        print(model.ask(args.question, *visuals, num_beams=args.beams, **decoding))
        return
    streamer = TextStreamer(model.chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.ask(args.question, *visuals, streamer=streamer, **decoding)


if __name__ == "__main__":
    main()
