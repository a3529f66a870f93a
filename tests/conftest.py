"""Small models, data and recipes that all tests share. Nothing is downloaded; nothing is timed."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lavi-hub-")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from copies import Original
from families import EAGER, FAMILIES, HYBRIDS, LOOKING_UP, QWEN2
from processes import kill_all

import lavi.efficiency.operators  # noqa: F401  (formulas that torch 2.11 lacks)
from datamodules.scenes import sentences, write_dataset
from datamodules.tokenizer import train_tokenizer
from lavi.batch import IGNORE, Answer, Sample
from lavi.efficiency import latency
from lavi.fusion.base import Fusion
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.nn.delta_generators import AttentionDeltas, ConvDeltas, DeltaGenerator, MLPDeltas, PooledDeltas
from lavi.vision.hf import HFVision

TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: the garbage collector need not walk through them again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries complain of what they find alive at the end


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    kill_all()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(sentences(), folder)
    return str(folder)


@pytest.fixture(scope="session")
def hub(tokenizer: str) -> None:
    """Published configurations under their hub names."""
    from hub import fill

    fill(Path(os.environ["HF_HOME"]), Path(tokenizer))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small scenes data set: 8 shards a split."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, seed=0, counts={"train": 240, "validation": 48, "test": 48}, turns=3, workers=2)
    return folder


@pytest.fixture(scope="session")
def build(tokenizer: str):  # type: ignore[no-untyped-def]
    """A small model: the same weights whenever the seed is the same, but for the fusion's own."""
    # A tower with a language model, and the random numbers that follow them.
    built: dict[tuple[object, ...], tuple[Original, torch.Tensor]] = {}

    def parts(family: str, seed: int, dtype: str, config: dict[str, Any]) -> tuple[HFVision, LanguageModel]:
        key = (family, seed, dtype, repr(config), torch.get_default_device())
        if key not in built:
            torch.manual_seed(seed)
            vision = HFVision(config=TOWER)
            language = LanguageModel(
                config=(FAMILIES | HYBRIDS | LOOKING_UP)[family] | config,
                tokenizer=tokenizer,
                dtype=dtype,  # type: ignore[arg-type]
                attention="eager" if family in EAGER else "sdpa",
            )
            # Random norms: with all weights at 1 a wrong affine part would go unseen.
            with torch.no_grad():
                for name, parameter in language.hf.named_parameters():
                    if "norm" in name:
                        parameter.add_(0.3 * torch.randn_like(parameter))
            built[key] = Original([vision, language], shared=[language.tokenizer]), torch.get_rng_state()
        original, state = built[key]
        torch.set_rng_state(state)
        vision, language = original.copy()
        return vision, language

    def make(
        fusion: Fusion, *, family: str = "qwen2", seed: int = 0, dtype: str = "float32", **config: Any
    ) -> VisionLanguageModel:
        vision, language = parts(family, seed, dtype, config)
        return VisionLanguageModel(vision=vision, language=language, fusion=fusion).eval()

    return make


GENERATORS: dict[str, type[DeltaGenerator]] = {
    "attention": AttentionDeltas,
    "mlp": MLPDeltas,
    "conv": ConvDeltas,
    "pooled": PooledDeltas,
}


def small(kind: str = "attention", **settings: int) -> DeltaGenerator:
    """A delta generator for small models."""
    return GENERATORS[kind](**{"bottleneck": 16, **settings})


def awaken(fusion: Fusion, seed: int = 1) -> None:
    """Leave the zero start: random numbers in every parameter of the fusion."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def answering(build: Any, fusion: Fusion) -> VisionLanguageModel:
    """A small model whose answers go on, and depend on what it sees."""
    model: VisionLanguageModel = build(fusion, initializer_range=0.3, tie_word_embeddings=False)
    awaken(model.fusion)
    return model


def image(seed: int):  # type: ignore[no-untyped-def]
    """A random image."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8, generator=generator).numpy())


def ask(*parts: str | int, answer: str | None = None, key: str = "s") -> Sample:
    """A sample of one question: strings are text, numbers are images of that seed."""
    content = [{"type": "image"} if isinstance(p, int) else {"type": "text", "text": p} for p in parts]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return Sample(key, messages, [image(p) for p in parts if isinstance(p, int)])


def collate(model: VisionLanguageModel, samples: list[Sample], *, pad_left: bool = False, prompt: bool = False):  # type: ignore[no-untyped-def]
    """Samples to a batch of a model."""
    return model.processor.collate([model.processor.encode(s, prompt=prompt) for s in samples], pad_left=pad_left)


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy summed over the trained tokens, and their number, by logits (B, T, vocabulary) of all tokens."""
    targets = labels[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="none")
    return loss[targets != IGNORE].sum(), (targets != IGNORE).sum()


def assert_same(model: VisionLanguageModel, said: torch.Tensor, expected: torch.Tensor) -> None:
    """To the last bit; with experts, to rounding: each multiplies all tokens that are sent to it at once, and how many
    they are, padding among them, decides how it rounds."""
    if any("experts" in name for name, _ in model.language.hf.named_modules()):
        torch.testing.assert_close(said, expected, atol=1e-6, rtol=1e-5)
    else:
        assert torch.equal(said, expected)


def likeliest(model: VisionLanguageModel, prompt: Sample, answer: list[int]) -> list[int]:
    """The likeliest id behind the prompt and behind each of the answer's but the last: by one forward, with no cache
    and no padding. An answer is the greedy one if it equals this."""
    batch = collate(model, [prompt], prompt=True)
    start = batch.input_ids.shape[1]
    ids = torch.cat([batch.input_ids, torch.tensor([answer[:-1]], dtype=torch.long)], dim=1)
    batch.input_ids, batch.labels, batch.attention_mask = ids, ids, torch.ones_like(ids, dtype=torch.bool)
    batch.spans, batch.answers = [(0, ids.shape[1])], [Answer(0, start, ids.shape[1])]
    with torch.no_grad():
        said: list[int] = model(batch)[0, start - 1 :].argmax(-1).tolist()
    return said


def greedy(model: VisionLanguageModel, prompt: Sample, tokens: int) -> list[int]:
    """The likeliest ids, each by one full forward: no cache, no padding."""
    ids: list[int] = []
    for _ in range(tokens):
        ids.append(likeliest(model, prompt, [*ids, 0])[-1])
    return ids


LAVI: dict[str, Any] = {
    "_target_": "lavi.fusion.lavi.LaViFusion",
    "every": 2,
    "generator": {"_target_": "lavi.nn.delta_generators.AttentionDeltas", "bottleneck": 16},
}
"""LaVi for small models, as a recipe names it."""


@pytest.fixture
def tiny_recipe(scenes: Path, tmp_path: Path) -> Path:
    """A recipe that trains in a second."""
    settings = {
        "seed": 0,
        "name": "tiny",
        "model": {
            "_target_": "lavi.model.VisionLanguageModel",
            "vision": {"_target_": "lavi.vision.hf.HFVision", "config": TOWER},
            "language": {
                "_target_": "lavi.language.load.LanguageModel",
                "config": QWEN2,
                "tokenizer": str(scenes / "tokenizer"),
            },
            "fusion": LAVI,
        },
        "module": {
            "_target_": "lavi.training.module.VisionLanguageModule",
            "learning_rate": {"fusion": 1e-3, "language": 1e-3},
        },
        "data": {
            "_target_": "datamodules.image_text.ImageTextData",
            **{split: str(scenes / split) for split in ("train", "validation", "test")},
            "batch_size": 4,
            "shuffle": 20,
        },
        "trainer": {
            "max_steps": 6,
            "max_epochs": -1,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "val_check_interval": 6,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
        },
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs ``python -m MODULE ARGUMENTS`` in this process, inside a folder of the test's own: (status, out, err).

    What it times, it times briefly: the figures are looked at by no test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "SHORTEST", 0.0)
    monkeypatch.setattr(latency, "MOST", 1)

    def is_package(module: str) -> bool:
        spec = importlib.util.find_spec(module)
        return spec is not None and spec.submodule_search_locations is not None

    def call(module: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            importlib.import_module(f"{module}.__main__" if is_package(module) else module).main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return call


def refused(result: tuple[int, str, str], *words: str) -> None:
    """A user's mistake: status 2, one line, no traceback."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0], lines[0]
