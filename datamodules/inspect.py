"""What is in your shards, and whether it is whole.

    python -m datamodules.inspect data/train
    python -m datamodules.inspect data/train --sheet sheet.png --limit 1000
    python -m datamodules.inspect data/train --check

Counts samples, images, videos, turns; texts by their length and images by their size; names broken samples and keys
that come twice. ``--check`` decodes every image and video besides, and sums whole shards as their index does. The exit
status is 1 if something is broken.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from datamodules.formats.conversations import Conversations, parse_record, visual_members
from datamodules.shards.counts import Counts, texts_of
from datamodules.shards.read import BrokenSample, Raw, ShardStream, index_entry, read_shard
from datamodules.shards.sources import find_shards
from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.files import sha256_of
from lavi.errors import UserError, one_line, reason
from lavi.report import console, table, track

SHOWN = 24
"""Samples on a contact sheet."""
THUMBNAIL = (320, 240)
"""Width and height of a sample on it, in pixels."""
CAUSES = 20
"""Causes that are shown; damage at random has a new one each time."""
BAR = 40
"""Characters of the longest bar."""


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Contents:
    """What shards hold, counted sample by sample."""

    counts: Counts = field(default_factory=Counts)
    broken: dict[str, list[str]] = field(default_factory=dict)
    """Keys by cause."""
    lost: Counter[str] = field(default_factory=Counter)
    """Samples by cause: a shard cut short has lost several."""
    keys: Counter[str] = field(default_factory=Counter)
    tokens: list[int] = field(default_factory=list)
    sheet: list[Raw] = field(default_factory=list)
    """Samples drawn at random."""

    @property
    def repeated(self) -> list[str]:
        """Keys that come more than once."""
        return [key for key, times in self.keys.items() if times > 1]

    def note(self, error: BrokenSample) -> None:
        """Count a broken sample."""
        name = Path(error.key).name if error.key.endswith(".tar") else error.key  # a shard's key is where it lies
        self.broken.setdefault(error.cause, []).append(name)
        self.lost[error.cause] += error.lost


def scan(records: Iterable[Raw], *, check: bool, tokenizer: Any = None, sheet: int = 0) -> Contents:
    """Go through raw samples.

    Args:
        check: decode images and videos, too.
        tokenizer: one of transformers'; counts tokens.
        sheet: how many samples to keep for a contact sheet.
    """
    contents = Contents()
    rng, conversations = random.Random(0), Conversations()
    for raw in records:
        try:
            record = conversations.check(raw)
            if check:
                conversations.decode(raw)
        except BrokenSample as error:
            contents.note(error)
            continue
        finally:
            if "__broken__" not in raw:
                contents.keys[raw["__key__"]] += 1
        contents.counts.add(record, {name: raw[name] for name in visual_members(raw)})
        if tokenizer is not None:
            contents.tokens.append(sum(len(tokenizer(text).input_ids) for text in texts_of(record)))
        _keep(contents.sheet, raw, sheet, contents.counts.samples, rng)
    return contents


def _keep(reservoir: list[Raw], raw: Raw, size: int, number: int, rng: random.Random) -> None:
    """Reservoir sampling: sample ``number``, counted from 1, stays with probability ``size / number``."""
    if len(reservoir) < size:
        reservoir.append(raw)
    elif size and (index := rng.randrange(number)) < size:
        reservoir[index] = raw


def check_sums(shards: list[str]) -> Iterator[BrokenSample | None]:
    """For each local shard the error, if its checksum is not that of its index."""
    for shard in shards:
        file, entry = Path(shard), index_entry(shard) if "://" not in shard else None
        expected = entry.get("sha256") if isinstance(entry, dict) else None
        whole = expected is None or _sum(file) == expected
        yield None if whole else BrokenSample(file.name, "the shard has another sha256 than its index says")


def _sum(file: Path) -> str | None:
    try:
        return sha256_of(file)
    except OSError:
        return None


# --- tables -----------------------------------------------------------------------------------------------------------


def summary_tables(contents: Contents, shards: list[str]) -> Iterator[RenderableType]:
    """Tables of what shards hold."""
    counts = contents.counts
    size = sum(Path(shard).stat().st_size for shard in shards if Path(shard).is_file())
    rows = [
        ["shards", f"{len(shards):,}"],
        ["bytes of the shards", f"{size:,}"],
        ["good samples", f"{counts.samples:,}"],
    ]
    counted = ("conversations", "turns", "captions", "images", "videos", "frames")
    rows += [[name, f"{value:,}"] for name in counted if (value := getattr(counts, name))]
    rows += [[f"bytes of {kind}", f"{number:,}"] for kind, number in sorted(counts.sizes.items())]
    if contents.tokens:
        ordered = sorted(contents.tokens)
        rows.append(["tokens", f"{sum(ordered):,}"])
        rows.append(["tokens of a sample: median, most", f"{ordered[len(ordered) // 2]:,}, {ordered[-1]:,}"])
    yield table("shards", ["", "number"], rows)
    if counts.text:
        yield _bars(
            "characters of a text", {f"< {limit}": counts.text[limit] for limit in sorted(counts.text, key=int)}
        )
    for name in ("widths", "heights"):
        if counted := getattr(counts, name):
            yield _bars(f"{name} of images, in pixels", _grouped(counted))
    if counts.unreadable:
        yield f"{counts.unreadable} images have no header that is known: --check names them."
    if contents.repeated:
        shown = [[key, str(contents.keys[key])] for key in contents.repeated[:3]]
        yield table(f"{len(contents.repeated)} keys come more than once", ["key", "times"], shown)
    if contents.broken:
        causes = [
            [cause, str(number), ", ".join(contents.broken[cause][:3])] for cause, number in contents.lost.most_common()
        ]
        yield table("broken", ["cause", "samples", "the first"], causes[:CAUSES])
        if causes[CAUSES:]:
            yield f"and {len(causes) - CAUSES} more causes"


def _ordered(values: Counter[str]) -> dict[str, int]:
    return {f"< {limit}": values[limit] for limit in sorted(values, key=int)}


def _grouped(values: Counter[str]) -> dict[str, int]:
    """Pixels by the power of two that they stay below."""
    grouped = Counter[str]()
    for value, times in values.items():
        grouped[str(1 << int(value).bit_length())] += times
    return _ordered(grouped)


def _bars(title: str, counted: dict[str, int]) -> RenderableType:
    longest = max(counted.values())
    bars = table(title, ["", "number"], [])
    bars.add_column("", justify="left")
    for name, number in counted.items():
        bars.add_row(name, f"{number:,}", "█" * max(1, round(BAR * number / longest)))
    return bars


# --- the contact sheet ------------------------------------------------------------------------------------------------


def check_sheet(file: Path) -> None:
    """Refuse a sheet that cannot be written, before all samples are read.

    Raises:
        UserError: its type is not known, or nothing can be written there.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lower().lstrip(".") not in known:
        raise UserError(f"--sheet: {file} cannot be written as '{file.suffix}': name it .png, .pdf or .svg.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        open(file, "ab").close()
        if not file.stat().st_size:
            file.unlink()
    except OSError as error:
        raise UserError(f"--sheet: {file} cannot be written ({reason(error)}).") from None


def draw_sheet(contents: Contents, file: Path) -> None:
    """Draw thumbnails with their keys and first texts, and histograms below.

    Raises:
        UserError: there is nothing to show, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    if not contents.sheet:
        raise UserError(f"there is no good sample to draw on {file}.")
    columns = min(6, len(contents.sheet))
    rows = -(-len(contents.sheet) // columns)
    figure = Figure(figsize=(3 * columns, 3.4 * rows + 2.6), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.4 * rows, 2.6]).flat
    axes = above.subplots(rows, columns, squeeze=False).flat
    for axis, raw in itertools.zip_longest(axes, sorted(contents.sheet, key=lambda raw: raw["__key__"])):
        axis.set(xticks=[], yticks=[], frame_on=False)
        if raw is not None:
            _draw(axis, raw)
    _draw_histograms(below, contents.counts)
    try:
        figure.savefig(file, dpi=80)
    except (OSError, ValueError) as error:
        raise UserError(f"--sheet: {file} cannot be written ({reason(error)}).") from None


def _draw(axis: Any, raw: Raw) -> None:
    from PIL import Image, ImageOps

    from lavi.data import images

    pictures = [ImageOps.contain(picture, THUMBNAIL) for picture in pictures_of(raw)]
    strip = images.side_by_side(pictures) if pictures else Image.new("RGB", THUMBNAIL, "white")
    axis.imshow(ImageOps.pad(strip, THUMBNAIL, color="white"))
    words = [_shortened(text, 44) for text in itertools.islice(texts_of(parse_record(raw)), 2)]
    # A text is no formula: a $ is a $.
    axis.set_xlabel("\n".join([_shortened(raw["__key__"], 44), *words]), fontsize=7, parse_math=False)


def pictures_of(raw: Raw) -> list[Any]:
    """The images of a sample; of each video the first frame, one from the middle and the last. Four at most."""
    from lavi.data import images
    from lavi.data.frame_sampling import FrameSampling
    from lavi.data.videos import is_video, read_video

    pictures: list[Any] = []
    for name in visual_members(raw)[:4]:
        try:
            if is_video(name):
                frames = read_video(raw[name], FrameSampling(frames=16), name=name).frames
                pictures += [frames[0], frames[len(frames) // 2], frames[-1]]
            else:
                pictures.append(images.open_image(raw[name], name=name))
        except UserError:  # counted by --check; a sheet shows what there is to see
            continue
    return pictures[:4]


def _shortened(text: str, length: int) -> str:
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[: length - 1]}…"


def _draw_histograms(figure: Any, counts: Counts) -> None:
    shown = {
        "characters of a text": _ordered(counts.text),
        "widths, in pixels": _grouped(counts.widths),
        "heights, in pixels": _grouped(counts.heights),
    }
    for axis, (title, counted) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        axis.bar(list(counted), list(counted.values()))
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=6)


# --- the command ------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: str) -> Any:
    """A tokenizer of transformers.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - tokenizers raises what its Rust side says as a bare Exception
        raise UserError(f"--tokenizer: {folder} has no tokenizer ({one_line(error)}).") from None


def inspect(args: argparse.Namespace) -> int:
    """Read shards, print tables, draw a sheet; 1 if something is broken."""
    shards = find_shards(args.shards)
    if args.sheet:
        check_sheet(args.sheet)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    records = itertools.islice((raw for shard in shards for raw in read_shard(shard)), args.limit)
    total = ShardStream(shards).samples
    tracked = track(records, "reading", total=min(total, args.limit or total) if total else args.limit, unit="sample")
    contents = scan(tracked, check=args.check, tokenizer=tokenizer, sheet=SHOWN if args.sheet else 0)
    if args.check:
        for error in track(check_sums(shards), "summing", total=len(shards), unit="shard"):
            if error is not None:
                contents.note(error)
    for part in summary_tables(contents, shards):
        console().print(part)
    if args.sheet:
        draw_sheet(contents, args.sheet)
        print(f"{args.sheet}: {len(contents.sheet)} samples")
    return int(bool(contents.broken or contents.repeated or contents.counts.unreadable))


@cli_entry_point
def main() -> int:
    parser = Parser(prog="python -m datamodules.inspect", description=__doc__)
    parser.add_argument("shards", help="a folder, a file, or a pattern such as data/shard-{000000..000009}.tar")
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="look at so many samples only")
    parser.add_argument("--sheet", type=path, metavar="FILE", help=f"draw {SHOWN} of them (png, pdf or svg)")
    parser.add_argument("--check", action="store_true", help="decode everything, and sum whole shards")
    parser.add_argument("--tokenizer", type=os.path.expanduser, metavar="FOLDER", help="count its tokens")
    args = parser.read()
    return inspect(args)


if __name__ == "__main__":
    main()
