"""Is the data module the bottleneck? Samples a second, set against bare loops and other pipelines, in one run.

    python benchmarks/dataloader.py --out benchmarks/results/dataloader.jsonl

Synthetic photographs (640 x 480 JPEG) and captions, packed into shards; every contestant reads them with as many
workers, decodes and resizes each image to 384 x 384. Ours also checks what it reads, renders the chat, tokenises it and
makes labels. Contestants take turns, round after round; the figure is the median of the rounds' ratios: a ratio of two
neighbours in time is what a noisy machine can say. Then: frames a second of videos against bare PyAV, samples a second
of few shards and of many, resident memory over many samples, and the packer, with its start and without, against a bare
loop that reads the same files, takes the same checksums and writes them one behind the other in as many processes, and
against copying them, which never leaves the kernel.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import platform
import resource
import statistics
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import webdataset as wds
from packing import packer
from photographs import CAPTION, write_photographs
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from datamodules.image_text import ImageTextData
from datamodules.shards.read import ShardStream, Slot, StreamPosition
from datamodules.shards.sources import find_shards
from datamodules.tokenizer import train_tokenizer
from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.report import markdown
from lavi.vision.hf import HFVision

SIDE = 384
PER_SHARD = 20
"""Samples in each of many shards."""
Prepare = Callable[[Image.Image], torch.Tensor]
"""An image to (3, 384, 384), with the resizing of the tower's own preprocessing."""
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": SIDE,
    "patch_size": 16,
}
DECODER = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


# --- data -------------------------------------------------------------------------------------------------------------


def small_model(folder: Path) -> VisionLanguageModel:
    """A model for its tower's preprocessing and its tokenizer."""
    if not folder.exists():
        train_tokenizer([CAPTION.format(n) for n in range(2000)] * 2, folder, vocabulary=400)
    language = LanguageModel(config=DECODER, tokenizer=str(folder))
    return VisionLanguageModel(vision=HFVision(config=TOWER), language=language, fusion=LaViFusion(every=1))


# --- contestants ------------------------------------------------------------------------------------------------------


class Bare(IterableDataset):
    """A loop over tar files: read, decode, resize; nothing else."""

    def __init__(self, shards: list[str], prepare: Prepare) -> None:
        self.shards, self.prepare = shards, prepare

    def __iter__(self) -> Iterator[tuple[torch.Tensor, str]]:
        info = get_worker_info()
        mine = self.shards[info.id :: info.num_workers] if info else self.shards
        for shard in mine:
            with tarfile.open(shard, "r|") as tar:
                for member in tar:
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith("jpg"):
                        yield self.prepare(Image.open(io.BytesIO(data)).convert("RGB")), member.name


def bare(shards: list[str], batch: int, workers: int, *, prepare: Prepare) -> Iterable[Any]:
    return DataLoader(Bare(shards, prepare), batch_size=batch, num_workers=workers)


def plain_webdataset(shards: list[str], batch: int, workers: int, *, prepare: Prepare) -> Iterable[Any]:
    pipeline = (
        wds.WebDataset(shards, shardshuffle=len(shards), seed=0)
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(prepare, str)
        .batched(batch, collation_fn=default_collate)
    )
    return DataLoader(pipeline, batch_size=None, num_workers=workers)


def without_marks(group: Callable[..., Any]) -> Callable[..., Any]:
    """webdataset 1.0 puts marks between a shard's members, which open_clip 3.3 does not know."""

    @functools.wraps(group)
    def grouped(data: Iterable[dict[str, Any]], **settings: Any) -> Any:
        return group((member for member in data if "fname" in member), **settings)

    return grouped


def open_clip(shards: list[str], batch: int, workers: int, *, prepare: Prepare, tokenizer: Any) -> Iterable[Any]:
    import open_clip_train.data as pipeline

    if not hasattr(pipeline.group_by_keys_nothrow, "__wrapped__"):
        pipeline.group_by_keys_nothrow = without_marks(pipeline.group_by_keys_nothrow)

    def tokens(text: str) -> torch.Tensor:
        return torch.tensor([(tokenizer(text)["input_ids"] + [0] * 32)[:32]])

    folder, last = Path(shards[0]).parent, len(shards) - 1
    args = Namespace(
        train_data=f"{folder}/shard-{{000000..{last:06d}}}.tar",
        train_num_samples=json.loads((folder / "index.json").read_text())["samples"],
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=batch,
        workers=workers,
        world_size=1,
        seed=0,
    )
    return pipeline.get_wds_dataset(args, prepare, is_train=True, tokenizer=tokens).dataloader


def ours(shards: list[str], batch: int, workers: int, *, model: VisionLanguageModel) -> Iterable[Any]:
    data = ImageTextData(model.processor, train=shards, batch_size=batch, workers=workers)
    return data.train_dataloader()


def rate(loader: Iterable[Any], samples: int, batch: int) -> float:
    """Samples a second over about ``samples`` of them, from the first batch on: starting processes is not counted."""
    batches = iter(loader)
    next(batches)
    count = samples // batch
    started = time.perf_counter()
    for done, _ in enumerate(batches, start=1):
        if done == count:
            break
    return done * batch / (time.perf_counter() - started)


def compare(contestants: dict[str, Callable[[], Iterable[Any]]], samples: int, batch: int, rounds: int) -> list[dict]:
    """Rates in rounds, and each round's ratios to ours."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants.items())
        for name, make in order if number % 2 else reversed(order):
            rates[name].append(rate(make(), samples, batch))
            print(f"round {number + 1}: {name}: {rates[name][-1]:.0f} samples/s", flush=True)
    return [
        {
            "name": name,
            "samples_per_s": statistics.median(of_rounds),
            "ours_over_it": statistics.median(a / b for a, b in zip(rates["lavi"], of_rounds, strict=True)),
        }
        for name, of_rounds in rates.items()
    ]


# --- questions --------------------------------------------------------------------------------------------------------


def loaders(work: Path, *, samples: int, batch: int, workers: int, rounds: int) -> list[dict[str, Any]]:
    """Against a bare loop, plain webdataset and open_clip's pipeline."""
    model = small_model(work / "tokenizer")
    prepare = model.vision.preprocessing
    shards = write_photographs(work / "photographs", samples * 2, per_shard=max(1, samples // 8))
    tokenizer = model.language.tokenizer
    contestants: dict[str, Callable[[], Iterable[Any]]] = {
        "lavi": lambda: ours(shards, batch, workers, model=model),
        "bare loop": lambda: bare(shards, batch, workers, prepare=prepare),
        "webdataset": lambda: plain_webdataset(shards, batch, workers, prepare=prepare),
        "open_clip": lambda: open_clip(shards, batch, workers, prepare=prepare, tokenizer=tokenizer),
    }
    return [{"question": "images", **one} for one in compare(contestants, samples, batch, rounds)]


def video(work: Path, *, clips: int, frames: int = 8, rounds: int = 5) -> list[dict[str, Any]]:
    """Decoded frames a second against a bare PyAV loop that takes the same frames of the same clips."""
    from lavi.data.frame_sampling import FrameSampling
    from lavi.data.videos import read_video

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for number in range(300):
            noise = np.random.default_rng(number // 30).integers(0, 255, (9, 16, 3), dtype=np.uint8)
            image = Image.fromarray(noise).resize((640, 360), Image.Resampling.BICUBIC)
            out.mux(stream.encode(av.VideoFrame.from_image(image)))
        out.mux(stream.encode())
    data = file.getvalue()
    seconds = read_video(data, FrameSampling(frames=frames)).seconds

    def bare_decode() -> int:
        kept = 0
        with av.open(io.BytesIO(data)) as container:
            times = iter(seconds)
            due = next(times)
            for frame in container.decode(video=0):
                if frame.time is not None and frame.time >= due - 1e-6:
                    frame.to_image()
                    kept += 1
                    due = next(times, None)  # type: ignore[arg-type]
                    if due is None:
                        break
        assert kept == frames
        return kept

    def our_decode() -> int:
        return len(read_video(data, FrameSampling(frames=frames)).frames)

    ratios, speeds = [], []
    for _ in range(rounds):
        taken = []
        for decode in (our_decode, bare_decode):
            started = time.perf_counter()
            count = sum(decode() for _ in range(clips))
            taken.append(count / (time.perf_counter() - started))
        ratios.append(taken[0] / taken[1])
        speeds.append(taken)
    names = ("lavi", "bare PyAV")
    return [
        {
            "question": "video",
            "name": name,
            "frames_per_s": statistics.median(speed[index] for speed in speeds),
            "ours_over_it": 1.0 if index == 0 else statistics.median(ratios),
        }
        for index, name in enumerate(names)
    ]


def many_shards(work: Path, *, samples: int, counts: tuple[int, ...] = (10, 100, 1000)) -> list[dict[str, Any]]:
    """Raw samples a second of few shards and of many, of the same size; and after resuming in the middle."""
    sets = {count: write_photographs(work / f"of-{count}", count * PER_SHARD, PER_SHARD) for count in counts}
    read: dict[int, list[float]] = {count: [] for count in counts}
    resumed: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(7):
        for count, shards in sets.items():
            stream = ShardStream(shards, seed=0, shuffle=counts[0] * PER_SHARD)
            started = time.perf_counter()
            every = (raw for _, raw in stream.records(Slot(), StreamPosition()) if raw is not None)
            sum(1 for _ in itertools.islice(every, samples))  # of few shards: several epochs
            read[count].append((time.perf_counter() - started) / samples)
            positions = (position for position, _ in stream.records(Slot(), StreamPosition()))
            middle = next(itertools.islice(positions, count * PER_SHARD // 2, None))
            started = time.perf_counter()
            next(stream.records(Slot(), middle))
            resumed[count].append(time.perf_counter() - started)
    first = counts[0]
    return [
        {
            "question": "shards",
            "name": f"{count} shards",
            "us_per_sample": 1e6 * statistics.median(read[count]),
            "over_first": statistics.median(a / b for a, b in zip(read[count], read[first], strict=True)),
            "resume_ms": 1e3 * statistics.median(resumed[count]),
        }
        for count in counts
    ]


def memory(work: Path, *, samples: int) -> list[dict[str, Any]]:
    """Resident memory of this process while it reads, without workers: it must not grow with what was read."""
    shards = find_shards(str(work / "photographs"))
    stream = ShardStream(shards, seed=0, shuffle=1000)
    marks = []
    for number, (_, raw) in enumerate(stream.records(Slot(), StreamPosition()), start=1):
        if raw is not None:
            Image.open(io.BytesIO(raw["jpg"])).load() if number % 10 == 0 else None
        if number % (samples // 10) == 0:
            marks.append({"samples": number, "resident_mib": resident() / 2**20})
        if number >= samples:
            break
    return [{"question": "memory", "name": f"after {mark['samples']} samples", **mark} for mark in marks]


def resident() -> int:
    """Bytes of this process in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


COLUMNS: dict[str, tuple[str, str, dict[str, str]]] = {
    "images": ("samples_per_s", "samples/s", {"ours_over_it": "ours : it"}),
    "video": ("frames_per_s", "frames/s", {"ours_over_it": "ours : it"}),
    "shards": ("us_per_sample", "us a sample", {"over_first": "times the first"}),
    "memory": ("resident_mib", "MiB resident", {}),
    "packer": ("mib_per_s", "MiB/s", {"speed_over_bare": "speed : bare loop", "speed_over_copying": "speed : copying"}),
}
"""The columns of each question: the value, its unit, and the ratios."""


def table(records: list[dict[str, Any]]) -> str:
    """All questions, one line a record."""
    rows = []
    marks = [record for record in records if record["question"] == "memory"]
    for record in records:
        if record in marks[1:-1]:
            continue
        value, unit, ratios = COLUMNS[record["question"]]
        compared = ", ".join(f"{record[ratio]:.2f} ({of})" for ratio, of in ratios.items())
        rows.append([f"{record['question']}: {record['name']}", f"{record[value]:,.0f} {unit}", compared])
    where = f"{records[0]['machine']}, {records[0]['workers']} workers; medians; ratios of neighbours in time."
    return f"{markdown(['', 'measured', 'ratio'], rows)}\n{where}\n"


@cli_entry_point
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=path, help="write the records to this file of JSON lines")
    parser.add_argument("--samples", type=whole_number(1), default=2000, help="samples a round")
    parser.add_argument("--batch", type=whole_number(1), default=32)
    parser.add_argument("--workers", type=whole_number(1), default=2)
    parser.add_argument("--rounds", type=whole_number(1), default=5)
    parser.add_argument("--memory-samples", type=whole_number(1), default=100_000)
    args = parser.read()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sized = {"samples": args.samples, "batch": args.batch, "workers": args.workers, "rounds": args.rounds}
        records = loaders(work, **sized)
        records += video(work, clips=20)
        records += many_shards(work, samples=5000)
        records += memory(work, samples=args.memory_samples)
        for times in (1, 3):
            records += packer(work, samples=6 * args.samples // times**2, times=times, workers=args.workers)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    where = {"machine": machine, "workers": args.workers, "torch": torch.__version__}
    for record in records:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in record.items()})
    if args.out:
        args.out.write_text("".join(json.dumps(record | where) + "\n" for record in records))


if __name__ == "__main__":
    main()
