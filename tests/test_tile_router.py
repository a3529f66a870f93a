"""Tiles chosen by the question: what the router reads, what it learns from, and where its weights go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOWER, ask, awaken, collate
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lavi.batch import Batch, Layout, Sample
from lavi.checkpoints.feature_cache import check_features_suffice
from lavi.checkpoints.model_folder import build as build_model
from lavi.checkpoints.model_folder import from_pretrained, save_pretrained
from lavi.data.tiling import AnyRes
from lavi.errors import UserError
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.training.tile_routing import TileQuestion, questions_about_tiles, train_tile_router
from lavi.vision.hf import HFVision
from lavi.vision.tile_router import TileRouter
from lavi.vision.tiles_on_request import Overview, TileRanking, TilesOnRequest

TWO_BY_TWO = Layout(views=5, tiles=(2, 2), size=(64, 64))
Make = Callable[..., VisionLanguageModel]


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.byte().numpy())


def about(seed: int, *words: str, size: tuple[int, int] = (64, 64), answers: tuple[str, ...] = ()) -> Sample:
    """Questions about one picture."""
    one = ask(1, words[0], answer=answers[0] if answers else None)
    messages = list(one.messages)
    for word, answer in zip(words[1:], answers[1:], strict=True):
        messages += [{"role": "user", "content": word}, {"role": "assistant", "content": answer}]
    return Sample(f"s{seed}", messages, [picture(seed, size)])


@pytest.fixture
def make(tiny_recipe: Path) -> Make:
    """A model whose images are cut into tiles."""

    def build(vision: dict[str, Any] | None = None, fusion: str = "lavi.fusion.lavi.LaViFusion") -> Any:
        settings: dict[str, Any] = Recipe.load(tiny_recipe).settings
        settings["model"] |= {
            "vision": vision or {"_target_": "lavi.vision.hf.HFVision", "config": TOWER},
            "fusion": {"_target_": fusion},
            "tiling": {"_target_": "lavi.data.tiling.AnyRes", "max_grid": 2},
        }
        model = build_model(Recipe(settings, source="here")).eval()
        awaken(model.fusion)
        return model

    return build


def routed(router: Path | None = None, keep: float = 0.25) -> dict[str, Any]:
    """A backbone that encodes what a router, or the last letter of a question, asks for."""
    ranking: dict[str, Any] = {"_target_": "test_tile_router.ByQuestion"}
    if router is not None:
        ranking = {"_target_": "lavi.vision.tile_router.TileRouter", "source": str(router)}
    return {
        "_target_": "lavi.vision.tiles_on_request.TilesOnRequest",
        "tower": {"_target_": "lavi.vision.hf.HFVision", "config": TOWER},
        "keep": keep,
        "ranking": ranking,
    }


class ByQuestion(TileRanking):
    """Another tile for another question; what it was asked is noted."""

    reads_questions = True

    def __init__(self) -> None:
        self.asked: list[Tensor | None] = []

    def rank(self, overview: Overview) -> Tensor:
        self.asked.append(overview.question)
        seed = 0 if overview.question is None else int(overview.question.sum() * 1e6) % 1000
        return torch.rand(len(overview.tiles), generator=torch.Generator().manual_seed(seed))


# --- what is asked ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_image_is_ranked_by_what_is_asked_before_the_first_answer(make: Make) -> None:
    model = make()
    model.vision = TilesOnRequest(tower=model.vision, keep=0.25, ranking=ByQuestion())
    samples = [
        about(1, "what?", "and the colour?", answers=("red", "blue")),
        ask("no image here", answer="yes"),
        about(2, "is it red?", answers=("no",)),
    ]
    batch = collate(model, samples)
    model.features_of(batch)
    prompts = collate(model, [about(1, "what?"), about(2, "is it red?")], prompt=True)
    asked = model.vision.ranking.asked[:]
    model.features_of(prompts)
    again = model.vision.ranking.asked[len(asked) :]
    assert len(asked) == len(again) == 2
    for trained, prompt in zip(asked, again, strict=True):
        assert trained is not None
        torch.testing.assert_close(trained, prompt)
    first = batch.answers[0]
    assert torch.equal(asked[0], model.language.embed(batch.input_ids[0, batch.spans[0][0] : first.start]))


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["lavi.fusion.lavi.LaViFusion", "lavi.fusion.concat.ConcatFusion"])
def test_a_batch_is_its_questions_one_by_one(make: Make, fusion: str) -> None:
    model = make(fusion=fusion)
    model.vision = TilesOnRequest(tower=model.vision, keep=0.25, ranking=ByQuestion())
    words = ["what?", "what colour is it?", "is there a letter in it?", "how many?"]
    samples = [about(1, word) for word in words]
    batch = collate(model, samples, prompt=True, pad_left=True)
    together = model.features_of(batch).split(5)
    chosen = set()
    for sample, features in zip(samples, together, strict=True):
        alone = model.features_of(collate(model, [sample], prompt=True))
        torch.testing.assert_close(features, alone, atol=1e-5, rtol=1e-4)
        chosen.add(tuple((features - together[0]).abs().amax((1, 2)) > 1e-3))
    assert len(chosen) > 1  # of the same picture other tiles
    assert model.answer(batch, max_new_tokens=3) == [model.ask(word, picture(1), max_new_tokens=3) for word in words]


@torch.no_grad()
def test_what_was_seen_is_encoded_anew_for_each_question(make: Make) -> None:
    model = make()
    model.vision = TilesOnRequest(tower=model.vision, keep=0.25, ranking=ByQuestion())
    state = model.see(picture(1), picture(2))
    assert not state.features
    words = ["what?", "what colour is it?", "how many?"]
    batch = model.prompts([ask(1, 2, word).messages for word in words], state)
    assert batch.features is None
    assert model.reply(batch, max_new_tokens=3) == [model.ask(word, state=state, max_new_tokens=3) for word in words]
    later = model.see(picture(2), known=state)
    assert len(later.pixels) == 1


def test_features_are_not_kept_for_other_questions(make: Make) -> None:
    model = make()
    model.vision = TilesOnRequest(tower=model.vision, keep=0.25, ranking=ByQuestion())
    with pytest.raises(UserError, match="encodes an image anew for each question"):
        check_features_suffice(model)


# --- the router -------------------------------------------------------------------------------------------------------


def overview_of(tiles: int) -> Overview:
    draw = torch.Generator().manual_seed(3)
    shown = torch.randn(tiles, 16, 32, generator=draw)
    windows = torch.rand(tiles, 4, generator=draw)
    return Overview(shown[0], shown, windows, torch.randn(7, 24, generator=draw))


@torch.no_grad()
def test_the_router_matches_words_with_places_by_its_formula() -> None:
    router = TileRouter(width=32, question_width=24, match_width=8)
    given = overview_of(3)
    words = router.question(given.question)
    padded = torch.cat([torch.zeros(1, 8), words, torch.zeros(1, 8)])
    weight, bias = router.together.weight, router.together.bias
    near = torch.stack([sum(weight[:, :, k] @ padded[at + k] for k in range(3)) + bias for at in range(7)])
    words = words + torch.nn.functional.gelu(near)
    share = router.importance(words)[:, 0].exp()
    share = share / share.sum()
    for tile, score in enumerate(router.rank(given)):
        places = router.picture(given.tiles[tile]) + router.place(given.windows[tile])
        best = ((words @ places.T) / 8**0.5).exp().sum(-1).log()
        torch.testing.assert_close(score, (best * share).sum() * 7, atol=1e-5, rtol=1e-4)


def test_both_counters_agree_on_the_router() -> None:
    tower = HFVision(config=TOWER)
    router = TileRouter(width=tower.width, question_width=24)
    vision = TilesOnRequest(tower=tower, keep=0.25, ranking=router)
    shown = torch.randn(4, vision.tokens, tower.width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        router.rank(Overview(shown[0], shown, torch.rand(4, 4), None))
    assert router.flops(4, vision.tokens) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert vision.flops(5, TWO_BY_TWO) == tower.flops(2) + router.flops(4, vision.tokens)
    assert vision.flops(1, Layout()) == tower.flops(1)


@torch.no_grad()
def test_a_model_with_a_router_is_exported_with_it(make: Make, tmp_path: Path) -> None:
    width = make().language.width
    TileRouter(width=TOWER["hidden_size"], question_width=width).save_pretrained(tmp_path / "router")
    model = make(routed(tmp_path / "router"))
    assert not any(parameter.requires_grad for parameter in model.vision.ranking.parameters())
    save_pretrained(model, tmp_path / "exported")
    (tmp_path / "router" / "router.safetensors").unlink()
    again = from_pretrained(tmp_path / "exported")
    batch = collate(model, [about(1, "what?"), about(2, "how many?")], prompt=True)
    assert torch.equal(again.features_of(batch), model.features_of(batch))
    assert again.vision.variant == model.vision.variant


def test_what_is_no_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a source"):
        TileRouter()
    with pytest.raises(UserError, match="holds no tile router"):
        TileRouter(source=str(tmp_path))
    TileRouter(width=32, question_width=24).save_pretrained(tmp_path)
    (tmp_path / "router.json").write_text('{"width": 16, "question_width": 24, "match_width": 64}')
    with pytest.raises(UserError, match="no weights of such a router"):
        TileRouter(source=str(tmp_path))


# --- what it learns from ----------------------------------------------------------------------------------------------


def mixed(model: VisionLanguageModel) -> Batch:
    """Conversations about one picture of four tiles, of two, of one; about two pictures; about none."""
    samples = [
        about(1, "what?", "and the colour?", answers=("red", "blue")),
        about(2, "is it red?", answers=("no",), size=(64, 32)),
        about(3, "is it red?", answers=("yes",), size=(20, 20)),
        Sample("two", ask(1, 2, "which?", answer="first").messages, [picture(4), picture(5)]),
        ask("hello", answer="yes"),
    ]
    return collate(model, samples)


@torch.no_grad()
def test_a_tile_is_worth_what_the_answer_is_with_it_alone(make: Make) -> None:
    """Against a backbone that encodes just that tile."""
    model = make()
    batch = mixed(model)
    assert [layout.views for layout in batch.layouts][:3] == [5, 3, 2]
    found = questions_about_tiles(model, batch)
    assert [len(one.likely) for one in found] == [4, 4, 2]
    for index, one in enumerate(found):
        answer = batch.answers[index]
        for tile in range(len(one.likely)):
            model.vision = TilesOnRequest(tower=model.vision, keep=0.25, ranking=One(tile))
            scores = model.token_scores(batch)
            model.vision = model.vision.tower
            row, column = scores.positions.unbind(1)
            its = (row == answer.row) & (answer.start <= column) & (column < answer.stop)
            expected = scores.log_probability[its].sum().exp()
            torch.testing.assert_close(one.likely[tile], expected, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(one.wanted.sum(), torch.tensor(1.0))
    start, (first, second) = batch.spans[0][0], batch.answers[:2]
    embed = model.language.embed
    assert torch.equal(found[0].overview.question, embed(batch.input_ids[0, start : first.start]))
    assert torch.equal(found[1].overview.question, embed(batch.input_ids[0, first.stop : second.start]))


class One(TileRanking):
    """This tile."""

    def __init__(self, tile: int) -> None:
        self.tile = tile

    def rank(self, overview: Overview) -> Tensor:
        return (torch.arange(len(overview.tiles)) == self.tile).float()


@torch.no_grad()
def test_features_that_were_kept_serve_as_pixels_do(make: Make) -> None:
    model = make()
    batch = mixed(model)
    kept = replace(batch, backbone_features=model.encode(batch.pixels, batch.layouts), pixels=batch.pixels[:0])
    for here, there in zip(questions_about_tiles(model, batch), questions_about_tiles(model, kept), strict=True):
        torch.testing.assert_close(here.likely, there.likely)


def test_a_router_learns_where_what_is_asked_for_is(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question names a direction; one tile, another each time, has features that lie along it."""
    model = make()
    draw = torch.Generator().manual_seed(0)
    directions, words = torch.randn(4, 16, generator=draw), torch.randn(4, model.language.width, generator=draw)

    def questions(model: Any, batch: Any) -> list[TileQuestion]:
        asked = []
        for _ in range(16):
            what, where = (int(torch.randint(4, (), generator=draw)) for _ in range(2))
            tiles = torch.randn(4, 9, 16, generator=draw)
            tiles[where, int(torch.randint(9, (), generator=draw))] = 3 * directions[what]
            question = torch.cat([torch.randn(3, model.language.width, generator=draw), words[what : what + 1]])
            likely = torch.full((4,), 0.05).index_fill(0, torch.tensor([where]), 0.9)
            asked.append(TileQuestion(Overview(tiles[0], tiles, torch.rand(4, 4), question), likely))
        return asked

    monkeypatch.setattr("lavi.training.tile_routing.questions_about_tiles", questions)
    torch.manual_seed(0)
    batch = mixed(model)
    figures = [of for _, of in train_tile_router(model, [batch] * 150, device=torch.device("cpu"), learning_rate=5e-3)]
    assert figures[0]["best"] == pytest.approx(0.9)
    assert sum(of["likely"] for of in figures[:5]) / 5 < 0.5
    assert sum(of["likely"] for of in figures[-20:]) / 20 > 0.8


def test_data_without_tiles_are_refused(make: Make) -> None:
    model = make()
    model.tiling = AnyRes(max_grid=1)
    model.__dict__.pop("processor", None)
    with pytest.raises(UserError, match="nothing to route"):
        list(
            train_tile_router(
                model, [collate(model, [about(1, "what?", answers=("red",))])], device=torch.device("cpu")
            )
        )
