"""Tiles chosen by the question: what the router reads, what it learns from, and where its weights go."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOWER, ask, awaken, collate
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lavi.batch import Answer, Batch, ImageSlot, Layout, Sample
from lavi.checkpoints.feature_cache import check_features_suffice
from lavi.checkpoints.model_folder import build as build_model
from lavi.checkpoints.model_folder import from_pretrained, save_pretrained
from lavi.efficiency.record import read_records
from lavi.errors import UserError
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.training.module import VisionLanguageModule
from lavi.training.tile_routing import TileQuestion, TileRouterTraining, check_encodes_all_tiles, questions_about_tiles
from lavi.vision.hf import HFVision
from lavi.vision.tile_router import TileRouter
from lavi.vision.tiles_on_request import Detail, RankingInput, TileRanking, TilesOnRequest

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

    def rank(self, given: RankingInput) -> Tensor:
        self.asked.append(given.question)
        seed = 0 if given.question is None else int(given.question.sum() * 1e6) % 1000
        return torch.rand(len(given.tiles), generator=torch.Generator().manual_seed(seed))


# --- what is asked ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_image_is_ranked_by_what_is_asked_first_once_it_is_shown(make: Make) -> None:
    """In training; and in a prompt by what waits for its answer, the same tokens as the router learned from."""
    model = make()
    learned = questions_about_tiles(model, collate(model, [about(1, "what?", "and that?", answers=("red", "blue"))]))
    model.vision = TilesOnRequest(tower=model.vision, keep=0.25, ranking=ByQuestion())

    def asked(samples: list[Sample], **how: Any) -> list[Tensor]:
        model.vision.ranking.asked.clear()
        model.features_of(collate(model, samples, **how))
        return model.vision.ranking.asked[:]

    two = about(1, "what?", "and that?", answers=("red", "blue"))
    later = ask("hello", answer="yes").messages + two.messages
    trained = asked([two, ask("no image here", answer="yes"), Sample("later", later, two.images)])
    open_turns = [Sample("p", two.messages[:count], two.images) for count in (1, 3)]
    prompts = asked([*open_turns, Sample("p", later[:3], two.images)], prompt=True, pad_left=True)
    first, second = (one.given.question for one in learned)
    assert len(trained) == 2
    for said, expected in zip([*trained, *prompts], [first, None, first, second, None], strict=True):
        if expected is not None:
            assert torch.equal(said, expected)
    assert torch.equal(trained[1], prompts[2])  # behind the answer that was given before the image was shown
    assert len(trained[1]) < len(later[0]["content"]) + len(first)


def test_a_question_lies_between_answers_of_its_own_conversation() -> None:
    ids = torch.zeros(1, 20, dtype=torch.long)
    slots = [ImageSlot(0, 3), ImageSlot(0, 8), ImageSlot(0, 13)]
    answers = [Answer(0, 1, 3), Answer(0, 9, 11), Answer(0, 12, 13)]
    packed = [[(0, 6), (6, 16), (16, 20)]]
    batch = Batch(ids, ids, ids.bool(), torch.empty(0), [(0, 20)], slots, answers, packed=packed)
    assert [batch.question_columns(answer) for answer in answers] == [(0, 1), (6, 9), (11, 12)]
    # Shown behind the last answer, before all, and behind the last answer of another conversation.
    assert [batch.asked_columns(slot) for slot in slots] == [(3, 6), (6, 9), (13, 16)]
    waiting = replace(batch, answers=[], open_questions=[[2, 10, 17]])
    assert [waiting.asked_columns(slot) for slot in slots] == [(2, 6), (10, 16), (10, 16)]
    assert replace(waiting, open_questions=[]).asked_columns(slots[1]) == (6, 16)


@torch.no_grad()
def test_conversations_in_one_row_have_questions_of_their_own(make: Make) -> None:
    model = make(fusion="lavi.fusion.concat.ConcatFusion")
    samples = [
        ask("no image here", answer="yes"),
        about(1, "what?", answers=("red",)),
        about(2, "how?", answers=("no",)),
    ]
    encode = model.processor.encode
    packed = model.processor.collate([[encode(sample) for sample in samples]])
    together = questions_about_tiles(model, packed)
    alone = [questions_about_tiles(model, collate(model, [sample])) for sample in samples]
    assert [len(found) for found in alone] == [0, 1, 1]
    for here, (there,) in zip(together, alone[1:], strict=True):
        assert torch.equal(here.given.question, there.given.question)
        torch.testing.assert_close(here.answer_probability, there.answer_probability, atol=1e-5, rtol=1e-3)


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
    state = model.see(picture(1))
    assert not state.features
    words = ["what?", "what colour is it?", "is there a letter in it?", "how many?"]
    batch = model.prompts([about(1, word).messages for word in words], state)
    features = model.features_of(batch)
    expected = collate(model, [about(1, word) for word in words], prompt=True, pad_left=True)
    torch.testing.assert_close(features, model.features_of(expected), atol=1e-5, rtol=1e-4)
    of_each = features.split(5)
    assert any(not torch.allclose(one, of_each[0], atol=1e-3) for one in of_each)
    assert model.reply(batch, max_new_tokens=3) == [model.ask(word, state=state, max_new_tokens=3) for word in words]


def test_where_all_tiles_are_kept_no_question_is_read(make: Make) -> None:
    model = make()
    model.vision = TilesOnRequest(tower=model.vision, keep=1.0, ranking=ByQuestion())
    assert not model.vision.reads_questions
    check_encodes_all_tiles(model)
    with torch.no_grad():
        model.features_of(collate(model, [about(1, "what?")], prompt=True))
    assert not model.vision.ranking.asked


def test_features_are_not_kept_for_other_questions(make: Make) -> None:
    model = make()
    model.vision = TilesOnRequest(tower=model.vision, keep=0.25, ranking=ByQuestion())
    with pytest.raises(UserError, match="encodes an image anew for each question"):
        check_features_suffice(model)


# --- the router -------------------------------------------------------------------------------------------------------


def input_of(tiles: int) -> RankingInput:
    draw = torch.Generator().manual_seed(3)
    shown = torch.randn(tiles, 16, 32, generator=draw)
    windows = torch.rand(tiles, 4, generator=draw)
    return RankingInput(shown[0], shown, windows, torch.randn(7, 24, generator=draw))


@torch.no_grad()
def test_the_router_matches_words_with_places_by_its_formula() -> None:
    router = TileRouter.untrained(width=32, question_width=24, match_width=8)
    given = input_of(3)
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
    router = TileRouter.untrained(width=tower.width, question_width=24)
    vision = TilesOnRequest(tower=tower, keep=0.25, ranking=router)
    shown = torch.randn(4, vision.tokens, tower.width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        router.rank(RankingInput(shown[0], shown, torch.rand(4, 4), None))
    assert router.flops(4, vision.tokens) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert vision.flops(5, TWO_BY_TWO) == tower.flops(2) + router.flops(4, vision.tokens)
    assert vision.flops(1, Layout()) == tower.flops(1)
    assert TilesOnRequest(tower=tower, keep=1.0, ranking=router).flops(5, TWO_BY_TWO) == tower.flops(5)


@torch.no_grad()
def test_a_model_with_a_router_is_exported_with_it(make: Make, tmp_path: Path) -> None:
    width = make().language.width
    TileRouter.untrained(width=TOWER["hidden_size"], question_width=width).save_pretrained(tmp_path / "router")
    model = make(routed(tmp_path / "router"))
    assert not any(parameter.requires_grad for parameter in model.vision.ranking.parameters())
    save_pretrained(model, tmp_path / "exported")
    (tmp_path / "router" / "router.safetensors").unlink()
    again = from_pretrained(tmp_path / "exported")
    batch = collate(model, [about(1, "what?"), about(2, "how many?")], prompt=True)
    assert torch.equal(again.features_of(batch), model.features_of(batch))
    assert again.vision.variant == model.vision.variant


def test_what_is_no_router_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no tile router"):
        TileRouter(source=str(tmp_path))
    TileRouter.untrained(width=TOWER["hidden_size"], question_width=12).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads questions of width 12"):
        make(routed(tmp_path))
    TileRouter.untrained(width=7, question_width=24).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="trained on features of width 7"):
        make(routed(tmp_path))
    (tmp_path / "router.json").write_text('{"width": 16, "question_width": 24, "match_width": 64}')
    with pytest.raises(UserError, match="no weights of such a router"):
        TileRouter(source=str(tmp_path))


@torch.no_grad()
def test_a_router_works_in_half_precision_and_without_weights(make: Make, tmp_path: Path) -> None:
    width = make().language.width
    TileRouter.untrained(width=TOWER["hidden_size"], question_width=width).save_pretrained(tmp_path)
    vision = make(routed(tmp_path)).vision.to(torch.bfloat16)
    shown = torch.randn(5, *vision.pixel_shape).to(torch.bfloat16)
    for questions in (None, [torch.randn(7, width)]):
        assert vision(shown, [TWO_BY_TWO], questions).dtype == torch.bfloat16
    (tmp_path / "router.safetensors").unlink()
    with torch.device("meta"):
        on_meta = TilesOnRequest(tower=HFVision(config=TOWER), keep=0.25, ranking=TileRouter(source=str(tmp_path)))
        assert on_meta(torch.empty(5, *vision.pixel_shape), [TWO_BY_TWO]).shape == (5, vision.tokens, vision.width)


def test_the_router_stays_as_it_is_where_the_tower_trains(make: Make, tmp_path: Path) -> None:
    width = make().language.width
    TileRouter.untrained(width=TOWER["hidden_size"], question_width=width).save_pretrained(tmp_path)
    model = make(routed(tmp_path))
    module = VisionLanguageModule(model=model, learning_rate={"vision": 1e-3, "fusion": 1e-3})
    assert all(parameter.requires_grad for parameter in model.vision.tower.parameters())
    assert not any(parameter.requires_grad for parameter in model.vision.ranking.parameters())
    assert not any("ranking" in name for name in module.part_of)


@dataclass
class Weighted(TileRanking):
    """With an argument."""

    weight: float

    def rank(self, given: RankingInput) -> Tensor:
        return self.weight * given.tiles.mean((1, 2))


def test_a_ranking_of_ones_own_is_exported_with_its_arguments(tmp_path: Path) -> None:
    tower = HFVision(config=TOWER)
    for ranking, said in ((Weighted(0.5), {"weight": 0.5}), (Detail(), {})):
        saved = TilesOnRequest(tower=tower, keep=0.5, ranking=ranking).save_pretrained(tmp_path)
        assert {key: value for key, value in saved["ranking"].items() if key != "_target_"} == said
    TilesOnRequest(tower=tower, keep=0.5, ranking=ByQuestion()).save_pretrained(tmp_path)

    class Silent(Detail):
        def __init__(self, threshold: float) -> None:
            self.threshold = threshold

    with pytest.raises(UserError, match="Silent cannot be saved"):
        TilesOnRequest(tower=tower, keep=0.5, ranking=Silent(0.9)).save_pretrained(tmp_path)


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
    assert [len(one.answer_probability) for one in found] == [4, 4, 2]
    for index, one in enumerate(found):
        answer = batch.answers[index]
        for tile in range(len(one.answer_probability)):
            model.vision = TilesOnRequest(tower=model.vision, keep=0.25, ranking=One(tile))
            scores = model.token_scores(batch)
            model.vision = model.vision.tower
            row, column = scores.positions.unbind(1)
            its = (row == answer.row) & (answer.start <= column) & (column < answer.stop)
            expected = scores.log_probability[its].mean().exp()
            torch.testing.assert_close(one.answer_probability[tile], expected, atol=1e-5, rtol=1e-3)
    start, (first, second) = batch.spans[0][0], batch.answers[:2]
    embed = model.language.embed
    assert torch.equal(found[0].given.question, embed(batch.input_ids[0, start : first.start]))
    assert torch.equal(found[1].given.question, embed(batch.input_ids[0, first.stop : second.start]))


class One(TileRanking):
    """This tile."""

    def __init__(self, tile: int) -> None:
        self.tile = tile

    def rank(self, given: RankingInput) -> Tensor:
        return (torch.arange(len(given.tiles)) == self.tile).float()


@torch.no_grad()
def test_only_what_is_asked_once_one_image_is_shown_is_about_its_tiles(make: Make) -> None:
    model = make()
    model.tiling.tile_several = True
    two = Sample("two", ask(1, 2, "which?", answer="first").messages, [picture(4), picture(5)])
    batch = collate(model, [two])
    assert [layout.views for layout in batch.layouts] == [5, 5]
    assert questions_about_tiles(model, batch) == []
    one = about(1, "what?", answers=("red",))
    later = collate(model, [Sample("later", ask("hello", answer="yes").messages + one.messages, one.images)])
    assert len(later.answers) == 2
    assert len(questions_about_tiles(model, later)) == 1


@torch.no_grad()
def test_features_that_were_kept_serve_as_pixels_do(make: Make) -> None:
    model = make()
    batch = mixed(model)
    kept = replace(batch, backbone_features=model.encode(batch.pixels, batch.layouts), pixels=batch.pixels[:0])
    for here, there in zip(questions_about_tiles(model, batch), questions_about_tiles(model, kept), strict=True):
        torch.testing.assert_close(here.answer_probability, there.answer_probability)


def test_a_router_learns_where_what_is_asked_for_is() -> None:
    """Each question names a direction; one tile, another each time, has features that lie along it."""
    torch.manual_seed(0)
    directions, words = torch.randn(4, 16), torch.randn(4, 24)
    training = TileRouterTraining(TileRouter.untrained(width=16, question_width=24), learning_rate=5e-3)
    for _ in range(150):
        asked = []
        for _ in range(16):
            what, where = torch.randint(4, (2,)).tolist()
            tiles = torch.randn(4, 9, 16)
            tiles[where, int(torch.randint(9, ()))] = 3 * directions[what]
            question = torch.cat([torch.randn(3, 24), words[what : what + 1]])
            probability = torch.full((4,), 0.05).index_fill(0, torch.tensor([where]), 0.9)
            asked.append(TileQuestion(RankingInput(tiles[0], tiles, torch.rand(4, 4), question), probability))
        training.learn(asked)
    chosen = [of["chosen"] for of in training.figures]
    assert training.figures[0]["best"] == pytest.approx(0.9)
    assert sum(chosen[:5]) / 5 < 0.5
    assert sum(chosen[-20:]) / 20 > 0.8
    assert "2,400 questions" in training.summary()


def test_a_tile_gains_what_it_adds_to_the_mean_one() -> None:
    for probability, gain in (
        ([0.1, 0.9, 0.5, 0.5], [0, 0.4, 0, 0]),
        ([0.2, 0.6, 0.6, 0.2], [0, 0.2, 0.2, 0]),
        ([0.7, 0.74, 0.7, 0.7], [0, 0.03, 0, 0]),
        ([0.7, 0.71, 0.7, 0.7], [0, 0, 0, 0]),
    ):
        asked = TileQuestion(input_of(4), torch.tensor(probability))
        torch.testing.assert_close(asked.gain, torch.tensor(gain, dtype=torch.float))


def test_where_the_overview_is_enough_nothing_is_learned() -> None:
    """What is left of a difference is rounding; beside a question that needs a tile it adds nothing either."""
    enough = torch.full((4,), 0.7) + 1e-3 * torch.randn(4, generator=torch.Generator().manual_seed(0))
    training = TileRouterTraining(TileRouter.untrained(width=32, question_width=24))
    before = [parameter.clone() for parameter in training.router.parameters()]
    training.learn([TileQuestion(input_of(4), enough)] * 3)
    assert all(map(torch.equal, before, training.router.parameters()))
    needs = TileQuestion(input_of(3), torch.tensor([0.1, 0.9, 0.1]))
    training.learn([needs])
    alone = [parameter.grad.clone() for parameter in training.router.parameters()]
    training.optimizer.zero_grad()
    training.router.load_state_dict(dict(zip(training.router.state_dict(), before, strict=True)))
    training.learn([needs, TileQuestion(input_of(4), enough)])
    for gradient, parameter in zip(alone, training.router.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient / 2)


def test_a_model_that_encodes_some_tiles_teaches_nothing(make: Make) -> None:
    model = make()
    model.vision = TilesOnRequest(tower=model.vision, keep=0.25)
    with pytest.raises(UserError, match="a router learns from a model that encodes all tiles"):
        check_encodes_all_tiles(model)
    model.vision.keep = 1.0
    check_encodes_all_tiles(model)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [[], ["module.learning_rate.vision=1e-4"]], ids=["frozen", "trained"])
def test_from_a_run_to_a_router_to_scores(run: Any, tiny_recipe: Path, trained: list[str]) -> None:
    """A tower that was trained is found within the backbone that goes around it; less is encoded."""
    tiled = ["model.tiling={_target_: lavi.data.tiling.AnyRes, max_grid: 2}", *trained]
    assert run("lavi.fit", "--recipe", tiny_recipe, "--run", "out", *tiled)[0] == 0
    router = "it's, a router"
    status, said, problems = run("lavi.route_tiles", "--checkpoint", "out", "--out", router, "--samples", "40")
    assert status == 0, problems
    assert "with the router's choice" in said
    (given,) = shlex.split(re.search(r"^('model.vision=.*)$", said, re.MULTILINE)[1])
    encoder = []
    for changes in ([], [given]):
        status, _, problems = run("lavi.evaluate", "--checkpoint", "out", *changes)
        assert status == 0, problems
        encoder.append(read_records(Path("out/evaluation.jsonl"))[-1].flops_of_samples["vision_encoder"])
    assert 0.3 * encoder[0] < encoder[1] < 0.8 * encoder[0]
    status, _, problems = run("lavi.route_tiles", "--checkpoint", "out", "--out", router)
    assert status == 2
    assert f"{router} exists" in problems
    status, _, problems = run("lavi.route_tiles", "--checkpoint", "out", "--out", "other", "model.tiling=null")
    assert status == 2
    assert "there is nothing to choose" in problems
    assert not Path("other").exists()
