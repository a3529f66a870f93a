"""What Python has beside the commands: a model from a folder, a question about pictures, an answer word by word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ask, awaken, collate, image
from PIL import Image
from transformers import GenerationConfig, TextIteratorStreamer

import lavi
from lavi.batch import Sample, Video
from lavi.checkpoints.model_folder import RECIPE
from lavi.checkpoints.run_folder import load_run
from lavi.data.images import open_image
from lavi.fusion.concat import ConcatFusion
from lavi.model import LONGEST_ANSWER, VisionLanguageModel

QUESTION = "what colour is the circle?"


@pytest.fixture
def folders(run, tiny_recipe: Path) -> list[Path]:  # type: ignore[no-untyped-def]
    """A run, and its export."""
    assert run("lavi.fit", "--recipe", tiny_recipe, "--run", "trained", "trainer.max_steps=1")[0] == 0
    assert run("lavi.export", "--checkpoint", "trained", "--out", "exported")[0] == 0
    return [Path("trained"), Path("exported")]


def rename_fusion(folder: Path, target: str) -> None:
    settings = yaml.safe_load((folder / RECIPE).read_text())
    settings["model"]["fusion"]["_target_"] = target
    (folder / RECIPE).write_text(yaml.safe_dump(settings))


def test_a_run_and_its_export_load_as_the_same_model(folders: list[Path], tmp_path: Path) -> None:
    trained = load_run(folders[0])[1]
    for folder in (folders[0], str(folders[1])):
        model = lavi.load(folder, device="auto" if not torch.cuda.is_available() else "cpu")
        assert isinstance(model, VisionLanguageModel)
        assert not model.training
        batch = collate(model, [ask(1, QUESTION, answer="red")])
        with torch.no_grad():
            torch.testing.assert_close(model(batch), trained(batch))
    for folder in folders:
        rename_fusion(folder, "lavi.fusions.LaViFusion")
        with pytest.raises(lavi.UserError, match=r"no module 'lavi.fusions': did you mean 'lavi.fusion.lavi.LaViFusi"):
            lavi.load(folder)
        rename_fusion(folder, "elsewhere.LaViFusion")
        with pytest.raises(lavi.UserError, match="which is outside"):
            lavi.load(folder)
        with pytest.raises(lavi.UserError, match="no module 'elsewhere'"):
            lavi.load(folder, trust=True)


@pytest.mark.parametrize(
    ("folder", "device", "reason"),
    [
        ("gone", "cpu", r"gone holds no model, it has no recipe.yaml: give a folder that lavi.fit or lavi.export has"),
        (".", "cpu", r"\. holds no model"),
        ("gone", "gpu", "the device 'gpu' cannot be used here"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    folder: str, device: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lavi.UserError, match=reason):
        lavi.load(folder, device=device)


@pytest.fixture(scope="module")
def model(build: Any) -> VisionLanguageModel:
    """Its answers go on and depend on what it sees."""
    model = build(ConcatFusion(), initializer_range=0.3, tie_word_embeddings=False)
    awaken(model.fusion)
    return model


def test_a_question_is_asked_of_pictures_in_their_order(model: VisionLanguageModel) -> None:
    film = Video([image(3), image(4)], [0.0, 1.0], 2.0)
    parts = [{"type": kind} for kind in ("image", "video", "image")] + [{"type": "text", "text": QUESTION}]
    by_hand = collate(
        model, [Sample("s", [{"role": "user", "content": parts}], [image(1), film, image(2)])], prompt=True
    )
    answer = model.ask(QUESTION, image(1), film, image(2), max_new_tokens=6)
    assert answer == model.answer(by_hand, max_new_tokens=6)[0]
    assert answer != model.ask(QUESTION, image(2), film, image(1), max_new_tokens=6)
    assert (
        model.ask(QUESTION, max_new_tokens=6)
        == model.answer(collate(model, [ask(QUESTION)], prompt=True), max_new_tokens=6)[0]
    )


def test_an_answer_comes_word_by_word(model: VisionLanguageModel) -> None:
    streamer = TextIteratorStreamer(model.chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = model.ask(QUESTION, image(1), streamer=streamer)
    pieces = [piece for piece in streamer if piece]
    assert len(pieces) > 1
    assert "".join(pieces).strip() == answer


def test_an_answer_is_as_long_as_asked_for_or_as_there_is_room(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int | None] = []
    monkeypatch.setattr(model, "answer", lambda batch, **decoding: [lengths.append(decoding.get("max_new_tokens"))])
    for question in (QUESTION, "circle " * 180):
        model.ask(question, image(1))
        model.ask(question, image(1), max_new_tokens=3)
    model.ask(QUESTION, image(1), generation_config=GenerationConfig(max_new_tokens=2))
    length = model.processor.encode(ask(1, "circle " * 180), prompt=True).length
    room = model.language.context_length - length + 1
    assert lengths == [LONGEST_ANSWER, 3, room, 3, None]
    assert room < LONGEST_ANSWER


@pytest.mark.parametrize("name", ["turned.jpg", "clear.png"])
def test_a_picture_that_is_open_is_what_its_file_is(model: VisionLanguageModel, name: str, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter
    picture = image(1).resize((60, 40))
    picture.putalpha(picture.convert("L"))
    if name == "turned.jpg":
        picture.convert("RGB").save(tmp_path / name, exif=turned)
    else:
        picture.save(tmp_path / name)
    picture = Image.open(tmp_path / name)
    before = picture.copy()
    pixels = model.prompt(QUESTION, picture).pixels
    assert torch.equal(pixels, model.prompt(QUESTION, open_image(tmp_path / name)).pixels)
    raw = Sample("s", ask(1, QUESTION).messages, [before])
    assert not torch.equal(pixels, collate(model, [raw], prompt=True).pixels)
    assert (picture.mode, picture.size, picture.tobytes()) == (before.mode, before.size, before.tobytes())
