"""Two processes on the CPU train as one does on both their batches: under DDP and FSDP2, stopped and resumed.

DDP is started as users start it, by ``python -m lavi.fit``, which starts the second process itself; FSDP2 as two
processes from outside, as a cluster does, in forks. The single one runs inside this process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import LAVI, QWEN2, TOWER, ask, collate
from lightning.pytorch.utilities import rank_zero_only
from processes import start_process
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer

from datamodules.batches import Position, ReadBatch
from datamodules.image_text import ImageTextData
from datamodules.shards.read import Slot
from lavi import fit
from lavi.batch import Batch, Sample
from lavi.checkpoints.run_folder import load_run
from lavi.checkpoints.trained_weights import TRAINED
from lavi.data.chat import Chat
from lavi.data.data_module import DataModule
from lavi.data.processor import Processor
from lavi.data.tiling import OneView
from lavi.errors import UserError
from lavi.metrics.answers import ExactMatch
from lavi.metrics.base import AnswerMetric, GroupedMean, Prediction
from lavi.metrics.captions import CIDEr
from lavi.metrics.documents import ANLS
from lavi.metrics.vqa import VQAAccuracy
from lavi.metrics.yes_no import MME, YesNo
from lavi.vision.hf import HFVision

ROOT = Path(__file__).parent.parent
COLOURS = ("red", "green", "blue", "yellow")
STEPS = 6


class Halves(DataModule):
    """Each step has four rows with images and four without: two ranks get one half each, a single one both."""

    splits = ("train",)

    def __init__(self, processor: Processor) -> None:
        super().__init__(processor)
        self.step, self.rank_of_state = 0, -1

    def samples(self, split: str) -> Iterable[Sample]:
        return []

    def stream(self, split: str, *, limit: int | None = None) -> Iterator[Batch]:
        return (read.batch for read in self.read())

    def read(self) -> Iterator[ReadBatch]:
        rank, ranks = self.rank_and_ranks()
        for step in range(self.step, 1000):
            seen = [ask(4 * step + i, "what colours?", answer=" and ".join(COLOURS[:i])) for i in range(1, 5)]
            heard = [ask("which is it" + " or what" * i, answer=COLOURS[step % 4]) for i in range(4)]
            mine = (seen + heard)[rank * 8 // ranks : (rank + 1) * 8 // ranks]
            batch = self.processor.collate([self.processor.encode(sample) for sample in mine])
            yield ReadBatch(batch, position=Position(rank, step + 1, ()))

    def train_dataloader(self) -> DataLoader[ReadBatch]:
        return DataLoader(Endless(self), batch_size=None)

    def on_after_batch_transfer(self, batch: ReadBatch, dataloader_idx: int) -> Batch:
        assert batch.position is not None
        self.step = batch.position.drawn
        return batch.batch

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "rank": self.rank_and_ranks()[0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.rank_of_state = state["step"], state["rank"]


class Endless(IterableDataset[ReadBatch]):
    def __init__(self, data: Halves) -> None:
        self.data = data

    def __iter__(self) -> Iterator[ReadBatch]:
        return self.data.read()


class Watch(pl.Callback):
    """Writes down what each rank meets in each step; stops the last rank, and no other, in one of them.

    Args:
        stop_at: the step behind which it stops.
        refuse_at: the step whose batch its fusion refuses.
    """

    def __init__(self, *, stop_at: int | None = None, refuse_at: int | None = None) -> None:
        self.stop_at, self.refuse_at = stop_at, refuse_at

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        last = trainer.global_rank == trainer.world_size - 1
        if last and self.stop_at is not None and trainer.global_step == self.stop_at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        if last and self.refuse_at is not None and trainer.global_step == self.refuse_at - 1:
            module.model.fusion.forward = refuse

    def on_before_zero_grad(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: object) -> None:
        if "train/loss" not in trainer.callback_metrics:
            return
        data: Any = trainer.datamodule
        met = {
            "step": trainer.global_step,
            "loss": float(trainer.callback_metrics["train/loss"]),
            "state_of_rank": data.rank_of_state,
            "torch_draws": torch.initial_seed(),
        }
        with open(Path(trainer.default_root_dir) / f"rank-{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(met) + "\n")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """All ranks answer: where weights are sharded, none can alone."""
        model: Any = module.eval().model
        asked = [model.processor.encode(ask(1, "what colour?"), prompt=True)]
        said = model.generate(model.processor.collate(asked, pad_left=True), max_new_tokens=5, eos_token_id=None)
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / "said.json").write_text(json.dumps(said))


def refuse(*_: object) -> None:
    raise UserError("this batch cannot be read.")


def met_by(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"rank-{rank}.jsonl").read_text().splitlines()]


def alone(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lavi.fit", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            fit.main()
    return int(left.value.code or 0)


@dataclass
class Single:
    """The recipe, and what a single process made of it."""

    recipe: Path
    run: Path
    first_stage: Path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Single:
    """Stage 1 trains the fusion and the final norm; stage 2 tower, fusion and adapters, on a frozen language model."""
    folder = tmp_path_factory.mktemp("single")
    language = {"_target_": "lavi.language.load.LanguageModel", "config": QWEN2, "tokenizer": tokenizer}
    settings: dict[str, Any] = {
        "model": {
            "_target_": "lavi.model.VisionLanguageModel",
            "vision": {"_target_": "lavi.vision.hf.HFVision", "config": TOWER},
            "language": language,
            "fusion": LAVI,
        },
        "module": {
            "_target_": "lavi.training.module.VisionLanguageModule",
            "learning_rate": {"fusion": 1e-3, "language.hf.model.norm": 1e-2},
        },
        "data": {"_target_": "test_distributed.Halves"},
        "trainer": {
            "max_steps": STEPS,
            "max_epochs": -1,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "gradient_clip_val": 0.1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "callbacks": {"watch": {"_target_": "test_distributed.Watch"}},
    }
    recipe, run, first = folder / "recipe.yaml", folder / "run", folder / "first"
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert alone("--recipe", recipe, "--run", first, "trainer.max_steps=2") == 0
    settings["module"] |= {"learning_rate": {"vision": 1e-4, "fusion": 1e-3, "language": 1e-3}}
    settings["module"] |= {"start_from": str(first), "checkpointing": True}
    language["lora"] = {"rank": 4, "dropout": 0.0}
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert alone("--recipe", recipe, "--run", run) == 0
    return Single(recipe, run, first)


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"} | more


def ddp(folder: Path, *arguments: object) -> list[tuple[int, str, str]]:
    """Status, output and errors of one command, which starts the second rank itself."""
    command = [sys.executable, "-m", "lavi.fit", *map(str, arguments), "trainer.devices=2", "trainer.strategy=ddp"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    return [(done.returncode, done.stdout, done.stderr)]


FSDP2 = "{_target_: lavi.training.sharding.FSDP2}"


def fsdp2(folder: Path, *arguments: object, strategy: str = FSDP2) -> list[tuple[int | None, str, str]]:
    """The same of two commands at once, one a rank."""
    words = [*map(str, arguments), "trainer.devices=2", f"trainer.strategy={strategy}"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    ranks = [
        start_process(partial(fit_in, folder, words), folder / f"said-{rank}", shared | {"LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    return [(rank.wait(), rank.out, rank.err) for rank in ranks]


def fit_in(folder: Path, words: list[str]) -> None:
    os.chdir(folder)
    rank_zero_only.rank = int(os.environ["LOCAL_RANK"])  # type: ignore[attr-defined]  # a new interpreter reads it itself
    sys.argv = ["lavi.fit", *words]
    fit.main()


def has_stopped(ranks: list[tuple[int | None, str, str]], *, step: int) -> None:
    """All ranks stopped together after ``step``; the first alone says so."""
    assert [status for status, *_ in ranks] == [130, 0][: len(ranks)], ranks
    said = " ".join(ranks[0][1].split())
    assert said.count("What trains") == 1
    assert f"stopped at step {step}, saved." in said
    assert all(not out and "Traceback" not in err for _, out, err in ranks[1:])


@pytest.mark.parametrize(("start", "stop"), [(ddp, None), (fsdp2, 3)], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(single: Single, tmp_path: Path, start: Any, stop: int | None) -> None:
    """Also when one rank alone is asked to stop half-way, and the run goes on."""
    (tmp_path / "runs" / "recipe").mkdir(parents=True)  # a name that is taken: both ranks settle on the next
    run = tmp_path / "runs" / "recipe-2"
    ended = start(tmp_path, "--recipe", single.recipe, f"callbacks.watch.stop_at={stop or 'null'}")
    if stop is not None:
        has_stopped(ended, step=stop)
        away = shutil.move(single.first_stage, single.first_stage.with_name("away"))  # the run carries what it brought
        ended = start(tmp_path, "--resume", run, "--trust", "callbacks.watch.stop_at=null")
        shutil.move(away, single.first_stage)
    assert {status for status, *_ in ended} == {0}, ended

    assert {folder.name for folder in run.parent.iterdir()} == {"recipe", "recipe-2"}
    assert not list((tmp_path / "runs" / "recipe").iterdir())
    assert len(list(run.glob("events.out.tfevents*"))) == (1 if stop is None else 2)  # by the first rank alone
    met = [met_by(run, rank) for rank in (0, 1)]
    for one, two in zip(met_by(single.run), met[0], strict=True):
        assert two["step"] == one["step"]
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    for rank in (0, 1):
        place = [-1] * (stop or STEPS) + [rank] * (STEPS - (stop or STEPS))  # resumed at its own place in the data
        assert [m["state_of_rank"] for m in met[rank]] == place
    draws = [m["torch_draws"] for of in met for m in of]
    assert len(set(draws)) == len(draws)  # dropout differs by step and rank

    expected, kept = load_file(single.run / TRAINED), load_file(run / TRAINED)
    assert expected.keys() == kept.keys()
    assert "model.language.hf.model.norm.weight" in kept
    for name, weight in expected.items():
        torch.testing.assert_close(kept[name], weight, atol=1e-5, rtol=0, msg=name)
    assert (run / "said.json").read_text() == (single.run / "said.json").read_text()
    models = [load_run(folder, trust=True)[1] for folder in (single.run, run)]
    batch = collate(models[0], [ask(1, "what colour?", answer="red")])
    with torch.no_grad():
        torch.testing.assert_close(models[0](batch), models[1](batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("strategy", "others"), [("ddp", "another rank stops at step 2"), (FSDP2, "another rank has ended")]
)
def test_a_batch_that_one_rank_refuses_ends_all(single: Single, tmp_path: Path, strategy: str, others: str) -> None:
    ended = fsdp2(tmp_path, "--recipe", single.recipe, "callbacks.watch.refuse_at=3", strategy=strategy)
    assert [status for status, *_ in ended] == [2, 2], ended
    (*_, first), (*_, last) = ended
    assert first.startswith(f"error: {others}")
    assert last.startswith("error: this batch cannot be read.")


def test_another_number_of_ranks_is_refused(single: Single, capsys: pytest.CaptureFixture[str]) -> None:
    with safe_open(single.run / TRAINED, framework="pt") as file:
        header = file.metadata()
    save_file(load_file(single.run / TRAINED), single.run / TRAINED, metadata=header | {"ranks": "2 sharded ranks"})
    assert alone("--resume", single.run, "--trust") == 2
    assert "was trained by 2 sharded ranks, not by 1 rank" in capsys.readouterr().err


# --- real data over ranks ---------------------------------------------------------------------------------------------


class Rank:
    """As much of a trainer as the data asks for, of a process in a group."""

    def __init__(self) -> None:
        self.training, self.global_rank, self.world_size = True, dist.get_rank(), dist.get_world_size()
        self.accumulate_grad_batches = 1


def everywhere(mine: object) -> list[Any]:
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    return of_all


def read_folders(folder: Path, tokenizer: str) -> dict[str, Any]:
    """What each rank reads of each folder of shards, with and without workers."""
    processor = Processor(
        Chat(AutoTokenizer.from_pretrained(tokenizer)), HFVision(config=TOWER), OneView(), lambda _: 0, 256
    )
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for name in sorted(path.name for path in folder.iterdir()):
        for workers in (0, 2):
            if abs(int(name.removeprefix("of-")) - ranks * max(1, workers)) > 1:
                continue
            shards = str(folder / name)
            data = ImageTextData(processor, train=shards, validation=shards, batch_size=3, workers=workers, shuffle=7)
            data.trainer = Rank()  # type: ignore[assignment]
            refused = None
            try:
                loader = iter(data.train_dataloader())
            except UserError as error:
                refused = str(error)
            refusals = everywhere(refused)
            epoch: list[str] = []
            if refused is None:
                for _ in range(12):
                    seen = torch.tensor(float(len(next(loader).batch)))
                    dist.all_reduce(seen)  # what a step does: all ranks, or none
                (stream,) = data.mixed.streams.values()
                slots = [Slot(rank, ranks, worker, max(1, workers)) for worker in range(max(1, workers))]
                epoch = [raw["__key__"] for slot in slots for raw in stream.epoch(0, slot)]
            held = [[read.batch.keys[answer.row] for answer in read.batch.answers] for read in data.val_dataloader()]
            found[f"{name} {workers}"] = {"refused": refusals, "epoch": everywhere(epoch), "held": everywhere(held)}
    return found


@pytest.mark.parametrize("methods", [("fork", "spawn"), ("fork",) * 4], ids=["2", "4"])
def test_ranks_share_shards_without_loss_or_waiting(tokenizer: str, tmp_path: Path, methods: tuple[str, ...]) -> None:
    """One shard fewer than readers is refused on all ranks alike; as many, and one more, are read once each."""
    data = tmp_path / "data"
    keys: dict[str, set[str]] = {}
    ranks = len(methods)
    for count in sorted({ranks - 1, ranks, ranks + 1, 2 * ranks - 1, 2 * ranks, 2 * ranks + 1}):
        keys[f"of-{count:02d}"] = write_said(data / f"of-{count:02d}", shards=count)
    read = partial(read_folders, data, tokenizer)
    for case, found in on_ranks(read, tmp_path, methods)[0].items():
        name, workers = case.split()
        readers = ranks * max(1, int(workers))
        shards = int(name.removeprefix("of-"))
        if shards < readers:
            assert set(found["refused"]) == {found["refused"][0]}
            assert f"{shards} shards cannot feed {readers} readers" in found["refused"][0]
        else:
            assert found["refused"] == [None] * ranks
            read = [key for of_rank in found["epoch"] for key in of_rank]
            assert len(read) == len(set(read))
            assert set(read) == keys[name]
        held = [key for of_rank in found["held"] for batch in of_rank for key in batch]
        assert len(held) == len(set(held))
        assert set(held) == keys[name]
        assert len({len(of_rank) for of_rank in found["held"]}) == 1


# --- metrics over ranks -----------------------------------------------------------------------------------------------


def told(answers: str, references: str, *, questions: int = 2) -> list[Prediction]:
    """Answers, each with its true ones: the ``|`` stands between them, so many about each image."""
    pairs = zip(answers.split("|"), references.split("|"), strict=True)
    return [
        Prediction(answer, tuple(truth.split("/")), str(n // questions), f"f{n % 3}", question=f"is it {answer}?")
        for n, (answer, truth) in enumerate(pairs)
    ]


METRICS: dict[str, tuple[Callable[[], AnswerMetric], list[Prediction]]] = {
    "ExactMatch": (ExactMatch, told("a cat|döner|no", "a cat|doner|no")),
    "VQAAccuracy": (VQAAccuracy, told("two|red", "2/2/2/3/two/2/2/2/2/2|red/blue/red/red/a/b/c/d/e/f")),
    "ANLS": (ANLS, told("hello|15 cm|", "hallo|15 cm|x")),
    "YesNo": (YesNo, told("yes|no|no|yes|maybe", "yes|no|yes|no|no")),
    "MME": (MME, told("yes|no|no|no|yes|yes", "yes|no|yes|no|yes|no")),
    "CIDEr": (CIDEr, told("a dog runs|two cats sit", "a dog runs fast/the dog runs|two cats sit here", questions=1)),
}


def shares_of(ranks: int) -> list[Callable[[list[Any], int], list[Any]]]:
    """Which of all predictions each rank has: every so manyth; or the last rank all of them, and the others none."""
    return [lambda every, rank: every[rank::ranks], lambda every, rank: every if rank == ranks - 1 else []]


def score_shares() -> list[dict[str, float]]:
    """What each metric computes on a rank that has its share of the predictions."""
    found = []
    for share in shares_of(dist.get_world_size()):
        for make, predictions in METRICS.values():
            metric = make()
            for one in share(predictions, dist.get_rank()):
                metric.update([one])
            found.append(metric.compute())
    return found


def test_metrics_of_ranks_are_those_of_all_answers(tmp_path: Path) -> None:
    """On each rank, however the answers are shared out, also where one has none."""
    found = on_ranks(score_shares, tmp_path)
    for on_rank in found:
        for of_all, (make, predictions) in zip(on_rank, 2 * list(METRICS.values()), strict=True):
            metric = make()
            metric.update(predictions)
            assert of_all == pytest.approx(metric.compute())


FAMILIES = [(1.0, ("colour", "easy")), (0.0, ("count", "hard")), (1.0, ("shape", "easy")), (0.5, ("relation", "hard"))]


def grouped_means() -> list[dict[str, float]]:
    """Means by family and level on a rank that has its share of the scores."""
    found = []
    for share in shares_of(dist.get_world_size()):
        metric = GroupedMean()
        for score, group in share(FAMILIES, dist.get_rank()):
            metric.update([score], [group])
        found.append(metric.compute())
    return found


def test_each_rank_knows_the_families_of_all(tmp_path: Path) -> None:
    """Of a family that the others met alone, too."""
    whole = GroupedMean()
    whole.update(*zip(*FAMILIES, strict=True))
    for on_rank in on_ranks(grouped_means, tmp_path):
        assert on_rank == [pytest.approx(whole.compute())] * 2


def in_group(run: Callable[[], object], file: Path) -> None:
    """Run a function in a process that forms a group with others; what it returns is written down."""
    dist.init_process_group("gloo")
    file.write_text(json.dumps(run()))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(run: Callable[[], object], folder: Path, methods: Sequence[str] = ("fork", "fork")) -> list[Any]:
    """What a function returns in each of the processes, which form a group and start so."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(len(methods))}
    files = [folder / f"rank-{rank}.json" for rank in range(len(methods))]
    started = [
        start_process(
            partial(in_group, run, file), folder / f"said-{rank}", shared | {"RANK": str(rank)}, method=method
        )
        for rank, (file, method) in enumerate(zip(files, methods, strict=True))
    ]
    assert [one.wait() for one in started] == [0] * len(methods), [one.err for one in started]
    return [json.loads(file.read_text()) for file in files]


def write_said(folder: Path, *, shards: int) -> set[str]:
    """Shards of text-only conversations, some longer than others; their keys."""
    from test_shards import GOOD, write_tar

    folder.mkdir(parents=True)
    keys = set()
    for shard in range(shards):
        mine = [f"s{shard}-{number}" for number in range(3 + shard * 5 % 7)]
        write_tar(folder / f"shard-{shard:06d}.tar", [(f"{key}.json", json.dumps(GOOD).encode()) for key in mine])
        keys |= set(mine)
    return keys


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
