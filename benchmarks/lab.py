"""How well does each fusion answer, for what it costs? Trained on the built-in scenes and videos, with several seeds.

    make lab                                                            fusions; stopped, it goes on
    make lab-variants                                                   what varies them, and reducers
    make lab-gpu                                                        one seed of each fusion on a GPU, in minutes
    python benchmarks/lab.py --out benchmarks/results/lab.jsonl --methods concatenation LaVi --seeds 0

Each method trains from the same tower on the same data (recipes/lab), and is scored on held-out ones: easy and hard
question families apart, with its controls, beside the FLOPs of its prompts; last, all are timed in turns. A record is
written as each run ends, and one that is there is not trained again. The table gives means over seeds with 95 %
intervals (Student's t); the picture is the frontier of accuracy against FLOPs and, once timed, milliseconds.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lab_methods import (
    ENOUGH,
    LABELS,
    METHODS,
    PARTS,
    QUESTIONED,
    RUN,
    TILE_ROUTER,
    method_of_variant,
    part_of,
    variants_of,
)
from lab_results import (
    DATA,
    NOISE,
    controls_table,
    draw,
    encoder_cost_table,
    lab_table,
    longest,
    records_of,
    write_tensorboard,
)
from own_records import parser_of, read

from datamodules import scenes
from lavi.checkpoints.feature_cache import check_feature_caches
from lavi.checkpoints.model_folder import build
from lavi.checkpoints.run_folder import LAST, TRAINED, load_run, lock_run_folder
from lavi.cli.arguments import path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.config.files import replacing, sha256_of
from lavi.efficiency.measure import Measurement, measure
from lavi.efficiency.record import Record, read_records, write_records
from lavi.efficiency.scenario import Scenario
from lavi.errors import Busy, UserError, nearest
from lavi.evaluation.compare_runs import score_run
from lavi.recipe import Recipe
from lavi.report import console, table, track
from lavi.training.run import train
from lavi.training.tile_routing import train_tile_router
from lavi.visor import offline

RECIPES, RUNS = Path("recipes/lab"), Path("runs/lab")
SAVE_EVERY = 500
"""Steps of training that a kill loses at most."""


def slug(name: str) -> str:
    """A name as that of a folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-").replace("--", "-")


def settings_of(name: str, seed: int, share: float, *changes: str, start: Path = Path(RUN)) -> Recipe:
    """The recipe of one run: on cached features, of this share of the steps; ``changes`` are a variant's.

    Args:
        start: the run that it begins with, if it does.
    """
    method = METHODS[METHODS[name].of or name]
    file = RECIPES / f"{method.recipe}.yaml"
    steps = max(1, round(share * Recipe.load(file).settings["trainer"]["max_steps"]))
    splits = {split: DATA[method.data].features / split for split in ("train", "validation", "test")}
    features = [f"data.{split}={path}" for split, path in (splits | {"train": method.train or splits["train"]}).items()]
    own = [f"seed={seed}", f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    of_method = [change.replace(RUN, str(start)) for change in method.changes]
    return Recipe.load(file, [*features, *own, *of_method, *changes])


def digest_of(name: str, seed: int, share: float) -> str:
    """Tells runs and records of a method from those that it had before its recipe was changed.

    On how many devices is no part of it: it is one, said or not.
    """
    recipe = settings_of(name, seed, share)
    recipe.settings["trainer"].pop("devices", None)
    routed = METHODS[name].routes
    before = digest_of(routed, seed, share) if routed else ""
    return hashlib.sha256((recipe.yaml() + before).encode()).hexdigest()[:12]


def run_once(name: str, seed: int, share: float, device: torch.device) -> list[Record]:
    """Train and score one run; one that was stopped goes on, one of another recipe begins anew.

    Returns:
        The records of its variants; none where another process has the run in work.
    """
    method, digest = METHODS[name], digest_of(name, seed, share)
    records, noise = [], NOISE if share >= 1 and method.of is None else ()
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(trained_run(name, seed, share, device))
        except Busy as busy:
            console().print(f"left out: {busy}")
            return []
        steps = settings_of(name, seed, share).settings["trainer"]["max_steps"]
        for variant, changes in method.variants or ((name, ()),):
            overrides = [change.replace(RUN, str(folder)) for change in changes]
            if overrides != list(changes) and not (folder / TILE_ROUTER).is_dir():
                train_tile_router_of(folder, device)
            record = score_run(folder, overrides=overrides, trust=False, limit=None, device=device, noise=noise).record
            record.knobs |= {"method": variant, "seed": seed, "share": share, "steps": steps, "recipe": digest}
            record.knobs |= {"changes": list(changes), "data": method.data}
            records.append(record)
    return records


@contextmanager
def trained_run(name: str, seed: int, share: float, device: torch.device) -> Iterator[Path]:
    """The folder of one run, trained to the end, and locked meanwhile.

    Raises:
        Busy: another process has it in work, or the one that it begins with.
    """
    method, settings = METHODS[name], settings_of(name, seed, share)
    steps = settings.settings["trainer"]["max_steps"]
    runs = RUNS if device.type == "cpu" else RUNS / device.type  # what one has trained is not the other's
    folder = runs / slug(method.of or name) / f"{steps}-steps" / f"seed-{seed}-{digest_of(name, seed, share)}"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_run_folder(folder):
        last = folder / LAST
        if not (folder / TRAINED).is_file() or last.is_file():
            if method.routes is not None:
                with trained_run(method.routes, seed, share, device) as start:
                    label_layers(start, settings.settings["data"]["train"], device)
                settings = settings_of(name, seed, share, start=start)
            if train(settings, folder, resume_from=last if last.is_file() else None, save_every=SAVE_EVERY):
                raise KeyboardInterrupt
            last.unlink(missing_ok=True)  # it is trained to the end: what is left is the run itself
        yield folder


def label_layers(folder: Path, questions: str, device: torch.device) -> None:
    """What each of the ``questions``, a folder of shards, needs of the layers of a run of VISOR's."""
    recipe, model = load_run(folder, overrides=[f"data.train={questions}"])
    model.to(device).eval()
    data = recipe.build("data", processor=model.processor)
    check_feature_caches(model, data, ["train"])
    about = {"run": offline.fingerprint(folder), "questions": sha256_of(Path(questions) / "index.json")[:16]}
    viable, batches = recipe.settings["model"]["fusion"]["configurations"], data.stream("train", limit=QUESTIONED)
    labels = folder / LABELS
    counts = offline.label(model, batches, viable, labels, about=about, keep=ENOUGH, by="likely", device=device)
    console().print(f"{labels}: {', '.join(f'{count} need {list(layers)}' for layers, count in counts.items())}")
    for cause, count in batches.left_out.items():
        console().print(f"left out: {count} x {cause}")


def train_tile_router_of(folder: Path, device: torch.device) -> None:
    """A router of tiles for a run, on its training data."""
    recipe, model = load_run(folder)
    data = recipe.build("data", processor=model.processor)
    for line in train_tile_router(
        recipe, model, data, folder / TILE_ROUTER, split="train", limit=QUESTIONED, device=device
    ):
        console().print(line)


Key = tuple[str, int, float]
"""What tells the lab's records apart: method, seed and share of the steps."""


def key_of(record: Record) -> Key:
    """The key of a record."""
    return record.knobs["method"], record.knobs["seed"], record.knobs["share"]


def known(file: Path | None) -> dict[Key, Record]:
    """The records of a file, those left out whose method's recipe has been changed since."""
    if file is None or not file.is_file():
        return {}
    kept = {}
    for record in read_records(file):
        name = method_of_variant().get(record.knobs.get("method", ""))
        if not name or record.knobs.get("recipe") != digest_of(name, record.knobs["seed"], record.knobs["share"]):
            continue
        if record.knobs.get("changes", []) == list(dict(METHODS[name].variants).get(record.knobs["method"], ())):
            kept[key_of(record)] = record
    return kept


# --- the command ------------------------------------------------------------------------------------------------------


def time_methods(records: Sequence[Record], device: torch.device) -> None:
    """Add milliseconds to a record of each method on scenes, all in turns; weights say nothing of time.

    What is routed takes the route that most questions took.
    """
    first = {of[0].knobs["method"]: of[0] for of in longest(records_of(records, "scenes"))}
    baseline = first.pop(DATA["scenes"].baseline, None)  # times are told in those of the first concatenation
    measurements = []
    for record in filter(None, [baseline, *first.values()]):
        scenario = Scenario(record.text_tokens, image=(scenes.SIDE, scenes.SIDE))
        route = literal_eval(record.knobs["timed route"]) if METHODS[_method_of(record)].routes else None
        measurements.append(Measurement(record, scenario, partial(_model, record), route))
    measure(measurements, device=device, track=partial(track, description="timing in turns"))


def _method_of(record: Record) -> str:
    return method_of_variant()[record.knobs["method"]]


def _model(record: Record) -> Any:
    return build(settings_of(_method_of(record), 0, record.knobs["share"], *record.knobs["changes"])).eval()


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="these alone (default: all those of --part)")
    parser.add_argument("--part", choices=PARTS, default=PARTS[0], help="without --methods: the part of the lab")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: those that each method has")
    parser.add_argument("--shares", nargs="+", type=float, help="of the steps (default: those of each method)")
    parser.add_argument("--picture", type=path, metavar="FILE", help="draw the frontier")
    parser.add_argument("--time", action="store_true", help="time what is there, in turns, and train nothing")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no further run is begun")
    parser.add_argument("--processes", type=whole_number(1), default=1, help="that share the work, and the cores")
    args = read(parser)
    if unknown := [name for name in args.methods or () if name not in METHODS]:
        raise UserError(f"the lab has no method '{unknown[0]}': {nearest(unknown[0], METHODS)}")
    runs = plan(args.methods or list(METHODS), args.seeds, args.shares)
    if not args.methods:
        runs = [run for run in runs if part_of(run[0], run[2]) == args.part]
    device, end = device_of(args.device), time.monotonic() + 60 * args.minutes
    there = known(args.out)
    with helpers(0 if args.time else args.processes - 1):
        for name, seed, share in runs:
            there |= known(args.out)
            if not args.time and any((variant, seed, share) not in there for variant in variants_of(name)):
                if time.monotonic() > end:
                    console().print(f"left out, {args.minutes:g} minutes are over: {name}, seed {seed}")
                    continue
                there = written({key_of(one): one for one in run_once(name, seed, share, device)}, there, args.out)
    there |= known(args.out)
    if args.time:
        time_methods(list(there.values()), device)
        there = written(there, there, args.out)
    for data in DATA:
        records = records_of(list(there.values()), data)
        if records and (varied := DATA[data].varies):
            console().print(table(f"{varied}, its encoder", *encoder_cost_table(list(there.values()), data)))
        elif records:
            console().print(table(data, *lab_table(records)))
            console().print(table(f"{data}, controls", *controls_table(records)))
    if records := records_of(list(there.values()), "scenes"):
        write_tensorboard(records, RUNS / "frontier")
        if args.picture:
            draw(records).savefig(args.picture, dpi=110)


@contextmanager
def helpers(count: int) -> Iterator[None]:
    """So many more processes of this command meanwhile, each with its part of the cores; then they have ended.

    Raises:
        UserError: one of them failed.
    """
    threads = max(1, torch.get_num_threads() // (count + 1))
    torch.set_num_threads(threads)
    RUNS.mkdir(parents=True, exist_ok=True)
    logs = [RUNS / f"process-{number}.log" for number in range(2, count + 2)]
    with ExitStack() as stack:
        started = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--processes", "1"],
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            for log in logs
        ]
        try:
            yield
        finally:
            failed = [log for process, log in zip(started, logs, strict=True) if process.wait()]
    if failed:
        raise UserError(f"a process of the lab ended with an error: read {failed[0]}.")


def plan(
    names: Sequence[str], seeds: Sequence[int] | None, shares: Sequence[float] | None
) -> list[tuple[str, int, float]]:
    """The runs: method, seed and share of the steps. Each method's first seed comes before the second of any."""
    runs = [
        (name, seed, share)
        for name in names
        for seed in (METHODS[name].seeds if seeds is None else seeds)
        for share in shares or METHODS[name].shares
        if seed == METHODS[name].seeds[0] or share >= 1.0 or shares
    ]
    return sorted(runs, key=lambda run: run[1])


def written(new: dict[Key, Record], there: dict[Key, Record], out: Path | None) -> dict[Key, Record]:
    """All records, with the new ones; they are in the file, beside those that other processes wrote meanwhile."""
    if out is None:
        return there | new
    RUNS.mkdir(parents=True, exist_ok=True)
    with FileLock(RUNS / "records.lock"):
        there = there | known(out) | new
        with replacing(out) as part:
            part.unlink(missing_ok=True)  # of a run that was killed
            write_records(there.values(), part)
    return there


if __name__ == "__main__":
    main()
