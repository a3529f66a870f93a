"""Published vision-language models: the oracle is transformers' own model and processor, on small checkpoints."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import QWEN2, collate, small
from PIL import Image
from safetensors.torch import load_file
from test_tiles import picture
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Idefics3Processor,
)
from vlms import write_vlm

from lavi.batch import Sample, Video
from lavi.checkpoints.load import load
from lavi.checkpoints.model_folder import build, from_pretrained, save_pretrained
from lavi.checkpoints.published_vlm import as_released, published_vlm, start_from_vlm, written_out
from lavi.checkpoints.transformers_vlm import save_as_transformers
from lavi.data.chat import TEMPLATES
from lavi.data.tiling import AnyRes
from lavi.efficiency.figures import baselines
from lavi.efficiency.measure import build_on, count, is_concat
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError
from lavi.evaluation.compare_runs import compare_runs
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.pruning import FastV
from lavi.language.load import LanguageModel
from lavi.loading import vlm
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.reduction.pooling import AveragePooling
from lavi.training.module import VisionLanguageModule
from lavi.training.run import train
from lavi.vision.hf import HFVision
from lavi.vision.reduced import ReducedTower
from lavi.vision.token_merging import TokenMerging
from lavi.visor.fusion import VisorFusion

KINDS = ("llava", "llava_next", "llava_onevision", "idefics3", "smolvlm")
SIZES = [(24, 24), (40, 30), (31, 97), (144, 144), (200, 13), (7, 7)]
"""(width, height): a tile, odd, long, large, narrow, smaller than a tile."""


def question(*sizes: tuple[int, int], text: str = "what colour is the circle?", answer: str | None = "red") -> Sample:
    """A sample about images of these sizes (width, height)."""
    content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Sample("a", messages, [picture(size, seed) for seed, size in enumerate(sizes)])


class Published:
    """A small checkpoint, as transformers opens it and as it comes in here."""

    def __init__(self, kind: str, folder: Path, tokenizer: str) -> None:
        self.kind, self.folder = kind, write_vlm(kind, folder, tokenizer)
        self.theirs = AutoModelForImageTextToText.from_pretrained(self.folder).eval()
        images = AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        if kind == "smolvlm":
            words = AutoTokenizer.from_pretrained(self.folder)
            self.processor = Idefics3Processor(images, words, image_seq_len=1, chat_template=words.chat_template)
        else:
            self.processor = AutoProcessor.from_pretrained(self.folder)
            self.processor.image_processor = images
        self.ours = published_vlm(str(self.folder))

    def inputs(self, sample: Sample, *, prompt: bool = False) -> dict[str, Tensor]:
        """What transformers' processor makes of a conversation."""
        text = self.processor.apply_chat_template(sample.messages, add_generation_prompt=prompt)
        images = {"images": [list(sample.images)]} if sample.images else {}
        return dict(self.processor(text=[text], return_tensors="pt", **images))

    def logits(self, sample: Sample) -> Tensor:
        """Transformers' logits (T, vocabulary) at the tokens of the text.

        Where these stand is known from here; that the ids are the same, and as many in all, is checked.
        """
        inputs, batch = self.inputs(sample), collate(self.ours, [sample])
        ids = inputs["input_ids"][0]
        with torch.no_grad():
            logits = self.theirs(**inputs).logits[0]
            arranged = self.ours.fusion(batch, self.ours.features(batch.pixels), self.ours.language)
        columns = arranged.vision.text_columns[0]
        assert arranged.attention_mask.shape[1] == len(ids)
        assert torch.equal(ids[columns], batch.input_ids[0])
        return logits[columns]


@pytest.fixture(scope="module", params=KINDS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Published:
    return Published(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint", tokenizer)


@pytest.mark.parametrize("sizes", [(), *((size,) for size in SIZES), ((40, 30), (31, 97)), ((7, 7),) * 3])
def test_logits_are_those_of_transformers(published: Published, sizes: tuple[tuple[int, int], ...]) -> None:
    sample = question(*sizes)
    with torch.no_grad():
        ours = published.ours(collate(published.ours, [sample]))[0]
    torch.testing.assert_close(ours, published.logits(sample), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pad_left", [False, True])
def test_rows_of_a_batch_are_those_of_transformers(published: Published, pad_left: bool) -> None:
    samples = [question((40, 30)), question(text="hello"), question((7, 7), (97, 31), text="which has more things?")]
    batch = collate(published.ours, samples, pad_left=pad_left)
    with torch.no_grad():
        logits = published.ours(batch)
    for row, (start, stop) in enumerate(batch.spans):
        torch.testing.assert_close(logits[row, start:stop], published.logits(samples[row]), atol=1e-4, rtol=1e-4)


def test_answers_are_those_of_transformers(published: Published) -> None:
    prompts = [question((40, 30), answer=None), question((31, 97), (7, 7), text="which?", answer=None)]
    batch = collate(published.ours, prompts, prompt=True, pad_left=True)
    ours = published.ours.generate(batch, max_new_tokens=8, eos_token_id=None)
    for answer, prompt in zip(ours, prompts, strict=True):
        inputs = published.inputs(prompt, prompt=True)
        out = published.theirs.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert answer == out[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_conversation_of_several_turns_has_the_ids_of_transformers(published: Published) -> None:
    messages = [*question((40, 30)).messages, *question((31, 97), text="and here? <image> is a word").messages]
    sample = Sample("a", messages, [picture((40, 30)), picture((31, 97), 1)])
    ids = collate(published.ours, [sample]).input_ids[0].tolist()
    words = published.processor.tokenizer
    assert words.convert_tokens_to_ids("<image>") not in ids  # what people write stays words
    assert "<image> is a word" in words.decode(ids)


def test_a_video_of_llava_onevision_is_that_of_transformers(tmp_path: Path, tokenizer: str) -> None:
    published = Published("llava_onevision", tmp_path / "checkpoint", tokenizer)
    video = Video([picture((40, 30), seed) for seed in range(3)])
    content = [{"type": "video"}, {"type": "text", "text": "which way does it move?"}]
    sample = Sample("a", [{"role": "user", "content": content}], [video])
    batch = collate(published.ours, [sample], prompt=True)
    text = published.processor.apply_chat_template(sample.messages, add_generation_prompt=True)
    tokens = published.ours._lengths(batch)[0] - batch.input_ids.shape[1]
    ids = published.processor.tokenizer(text.replace("<video>", "<video>" * tokens), return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = published.theirs(input_ids=ids, pixel_values_videos=batch.pixels[None]).logits[0]
        ours = published.ours(batch)[0]
    torch.testing.assert_close(ours, theirs[ids[0] != published.theirs.config.video_token_id], atol=1e-4, rtol=1e-4)


def test_media_that_a_template_writes_in_another_order_are_refused(tmp_path: Path, tokenizer: str) -> None:
    """This one writes a message's images and videos first, in its order, and its words behind them."""
    model = published_vlm(str(write_vlm("llava_onevision", tmp_path / "checkpoint", tokenizer)))
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "video"}]
    chat = model.chat
    in_order = chat.encode_prompt([{"role": "user", "content": parts}], images=2)
    assert in_order.image_columns == sorted(in_order.image_columns)
    chat.template = chat.template.replace("if part['type'] != 'text'", "if part['type'] == 'video'")
    with pytest.raises(UserError, match="otherwise than the conversation has them"):
        chat.encode_prompt([{"role": "user", "content": parts}], images=2)


def test_an_export_is_read_again_bit_for_bit(published: Published, tmp_path: Path) -> None:
    save_pretrained(published.ours, tmp_path / "export")
    shutil.move(published.folder, published.folder.with_name("away"))  # it needs the checkpoint no more
    try:
        again = from_pretrained(tmp_path / "export")
    finally:
        shutil.move(published.folder.with_name("away"), published.folder)
    state = again.state_dict()
    assert set(state) == set(published.ours.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in published.ours.state_dict().items())
    batch = collate(published.ours, [question((40, 30))])
    with torch.no_grad():
        assert torch.equal(again(batch), published.ours(batch))


@pytest.mark.parametrize("kind", ["llava", "llava_onevision", "idefics3"])
def test_another_fusion_starts_from_it(kind: str, tmp_path: Path, tokenizer: str) -> None:
    """LaVi has its tower and language model, which is itself at step 0; a fusion with a projector has that, too."""
    folder = str(write_vlm(kind, tmp_path / "checkpoint", tokenizer))
    as_it_is = published_vlm(folder)
    lavi = published_vlm(folder, fusion=LaViFusion(every=2, generator=small()))
    batch = collate(lavi, [question((40, 30))])
    with torch.no_grad():
        bare = lavi.language.hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        assert torch.equal(lavi(batch), bare)
        assert torch.equal(lavi.features(batch.pixels), as_it_is.features(batch.pixels))
    keys = {
        "newline": kind == "llava_onevision",
        "projector": as_it_is.fusion.projector,
        "markers": as_it_is.fusion.markers,
    }
    for fusion in (
        FastV(layer=2, keep=1.0, **keys),
        VisorFusion(cross_attention=[], self_attention=[0, 1, 2, 3], **keys),
    ):
        started = published_vlm(folder, fusion=fusion)
        with torch.no_grad():
            torch.testing.assert_close(started(batch), as_it_is(batch), atol=1e-4, rtol=1e-4)


def test_parts_of_it_are_components_of_a_recipe(tmp_path: Path, tokenizer: str) -> None:
    folder = str(write_vlm("llava_onevision", tmp_path / "checkpoint", tokenizer))
    as_it_is = published_vlm(folder)
    tower, language = HFVision(folder), LanguageModel(folder)
    for part, whole in ((tower, as_it_is.vision), (language, as_it_is.language)):
        assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in part.state_dict().items())


def test_a_reducer_before_it(tmp_path: Path, tokenizer: str) -> None:
    folder = str(write_vlm("llava", tmp_path / "checkpoint", tokenizer))
    model = published_vlm(folder, reducer=AveragePooling(factor=3))
    batch = collate(model, [question((40, 30))])
    assert model._lengths(batch) == [batch.input_ids.shape[1] + 1]
    folder = str(write_vlm("idefics3", tmp_path / "other", tokenizer))
    with pytest.raises(UserError, match="PixelShuffle: it takes no other reducer"):
        published_vlm(folder, reducer=AveragePooling(factor=3))


def test_its_tower_may_work_on_fewer_tokens(tmp_path: Path, tokenizer: str) -> None:
    folder = str(write_vlm("llava_onevision", tmp_path / "checkpoint", tokenizer))
    as_it_is = published_vlm(folder)
    batch = collate(as_it_is, [question((40, 30))])

    def reduced(*reductions: TokenMerging) -> VisionLanguageModel:
        return published_vlm(folder, vision=ReducedTower(tower=HFVision(folder), reductions=[*reductions]))

    whole, merged = reduced(), reduced(TokenMerging(per_block=2))
    with torch.no_grad():
        assert torch.equal(whole(batch), as_it_is(batch))
        assert not torch.equal(merged(batch), as_it_is(batch))
    assert merged.vision.flops(1) < whole.vision.flops(1)
    assert torch.equal(merged.fusion.newline, as_it_is.fusion.newline)
    with pytest.raises(UserError, match="put together by hand"):
        save_pretrained(merged, tmp_path / "saved")


def test_a_recipe_with_such_a_tower_is_counted_with_it_and_saved(tmp_path: Path, tokenizer: str) -> None:
    folder = str(write_vlm("llava_onevision", tmp_path / "checkpoint", tokenizer))
    vision = {
        "_target_": "lavi.vision.reduced.ReducedTower",
        "tower": {"_target_": "lavi.vision.hf.HFVision", "source": folder},
        "reductions": [{"_target_": "lavi.vision.token_merging.TokenMerging", "per_block": 2}],
    }
    node = {"_target_": "lavi.checkpoints.published_vlm.published_vlm", "source": folder}
    recipe, plain = (Recipe({"model": model}, {}, "here") for model in (node | {"vision": vision}, node))
    counted, as_it_was = (build_on(one, "meta") for one in (recipe, as_released(recipe)))
    assert isinstance(counted.vision, ReducedTower)
    assert counted.vision.flops(1) < as_it_was.vision.flops(1)
    assert is_concat(plain)
    assert not is_concat(recipe)  # it is no baseline
    records = [count(one, model, Scenario(9)) for one, model in ((recipe, counted), (plain, as_it_was))]
    assert {record.method for record in records} == {"concat"}
    assert list(baselines(records).values()) == records[1:]
    model = build(recipe)
    save_pretrained(model, tmp_path / "saved")
    batch = collate(model, [question((40, 30))])
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "saved")(batch), model(batch))


def test_a_released_model_that_gathers_its_tokens_is_a_baseline(tmp_path: Path, tokenizer: str) -> None:
    """SmolVLM as it was released: concatenation behind its pixel shuffle."""
    folder = str(write_vlm("smolvlm", tmp_path / "checkpoint", tokenizer))
    node = {"_target_": "lavi.checkpoints.published_vlm.published_vlm", "source": folder}
    recipe = Recipe({"model": node}, {}, "here")
    record = count(recipe, build_on(as_released(recipe), "meta"), Scenario(9))
    assert record.method != "concat"
    assert list(baselines([record]).values()) == [record]


def test_a_start_reaches_the_tower_within(tmp_path: Path, tokenizer: str) -> None:
    folder = str(write_vlm("llava_onevision", tmp_path / "checkpoint", tokenizer))
    model = published_vlm(folder, vision=ReducedTower(tower=HFVision(folder), reductions=[]))
    expected = {name: tensor.clone() for name, tensor in model.vision.named_parameters()}
    with torch.no_grad():
        for parameter in model.vision.parameters():
            parameter.zero_()
    assert any(name.startswith("vision.tower.tower.") for name in start_from_vlm(model, folder))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.vision.named_parameters())


def test_what_does_not_come_in_is_refused_in_one_sentence(tmp_path: Path, tokenizer: str) -> None:
    folder = write_vlm("llava_onevision", tmp_path / "checkpoint", tokenizer)
    with pytest.raises(UserError, match="give the fusion the same projector, newline and markers"):
        published_vlm(str(folder), fusion=ConcatFusion())
    with pytest.raises(UserError, match="no vision-language model at"):
        published_vlm(str(tmp_path / "nowhere"))
    (folder / "processor_config.json").rename(tmp_path / "processor_config.json")
    with pytest.raises(UserError, match="does not say how its images are prepared"):
        published_vlm(str(folder))
    (tmp_path / "processor_config.json").rename(folder / "processor_config.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projector_hidden_act": "relu"}))
    with pytest.raises(UserError, match="no two linear layers with biases and a GELU"):
        published_vlm(str(folder))
    (folder / "config.json").write_text(json.dumps(config["text_config"]))
    with pytest.raises(UserError, match="is a 'qwen2', no vision-language model that comes in here"):
        published_vlm(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no 'llava_onevision' model can be read from"):
        published_vlm(str(folder))


def test_a_checkpoint_in_shards_is_read_whole_or_not_at_all(tmp_path: Path, tokenizer: str) -> None:
    folder = write_vlm("llava", tmp_path / "checkpoint", tokenizer)
    whole = published_vlm(str(folder)).state_dict()
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and not (tmp_path / "shards" / file.name).exists():
            shutil.copy(file, tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    again = published_vlm(str(tmp_path / "shards")).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    shards[0].unlink()
    with pytest.raises(UserError, match="no 'llava' model can be read from"):
        published_vlm(str(tmp_path / "shards"))


def test_markers_come_for_images_alone(tmp_path: Path, tokenizer: str) -> None:
    model = published_vlm(str(write_vlm("smolvlm", tmp_path / "checkpoint", tokenizer)))
    with pytest.raises(UserError, match="reads no videos"):
        model.ask("what?", Video([Image.new("RGB", (30, 30))]))


def test_what_is_said_of_images_goes_along_or_is_refused(tmp_path: Path, tokenizer: str) -> None:
    folder = str(write_vlm("llava_onevision", tmp_path / "checkpoint", tokenizer))
    said = {"timestamps": True, "image_numbers": True}
    model = published_vlm(folder, **said)
    assert (model.processor.timestamps, model.processor.image_numbers) == (True, True)
    node = {"_target_": "lavi.checkpoints.published_vlm.published_vlm", "source": folder, **said}
    counted = written_out(Recipe({"model": node}, {}, "here")).settings["model"]
    assert said.items() <= counted.items()
    for key in said:
        with pytest.raises(UserError, match="its processor says neither"):
            save_as_transformers(published_vlm(folder, **{key: True}), tmp_path / "back")


def test_a_model_that_asks_by_another_template_has_no_class_of_transformers(tmp_path: Path, tokenizer: str) -> None:
    """Its processor would ask by the tokenizer's: in another form than the model was trained on."""
    model = published_vlm(str(write_vlm("llava_onevision", tmp_path / "checkpoint", tokenizer)))
    model.chat.template = TEMPLATES["chatml"]
    with pytest.raises(
        UserError, match=r"model\.chat_template=null: its processor asks by the tokenizer's own template"
    ):
        save_as_transformers(model, tmp_path / "back")


def test_the_format_of_transformers_is_written_back(published: Published, tmp_path: Path) -> None:
    """Keys and bits of the checkpoint, but for the tower's layers that nobody uses; and it is that model."""
    save_as_transformers(published.ours, tmp_path / "back")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (published.folder, tmp_path / "back"))
    assert set(ours) <= set(theirs)
    assert all("vision" in name and "layers.1." in name for name in set(theirs) - set(ours))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    sample = question((40, 30))
    again = published_vlm(str(tmp_path / "back"))
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in published.ours.state_dict().items()
    }
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "back").eval()
    inputs = published.inputs(sample)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, published.theirs(**inputs).logits, atol=1e-5, rtol=1e-5)
        batch = collate(again, [sample])
        torch.testing.assert_close(again(batch), published.ours(batch), atol=1e-5, rtol=1e-5)


def test_a_run_starts_from_it(tmp_path: Path, tokenizer: str) -> None:
    """Tower, language model and projector come over into a model that was built from other ones."""
    folder, other = (
        str(write_vlm("llava_onevision", tmp_path / name, tokenizer, seed)) for seed, name in enumerate(("a", "b"))
    )
    keys = {"newline": True, "self_attention": [0, 1, 2, 3], "cross_attention": []}
    parts = {"vision": HFVision(other), "language": LanguageModel(other), "fusion": VisorFusion(**keys)}
    media = {"image": "<image>", "video": "<video>"}
    model = VisionLanguageModel(**parts, tiling=AnyRes(), media_tokens=media)
    module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3}, start_from=folder)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.setup("fit")
    as_it_is, batch = published_vlm(folder), collate(model, [question((40, 30))])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(batch), as_it_is(batch), atol=1e-4, rtol=1e-4)
    assert {name.split(".")[1] for name in module.inherited} == {"vision", "language", "fusion"}
    assert start_from_vlm(model, folder) == set()  # nothing is saved beside a run that is what it started from

    small_language = LanguageModel(config=QWEN2, tokenizer=tokenizer)
    lavi = VisionLanguageModel(vision=HFVision(folder), language=small_language, fusion=LaViFusion(every=2))
    with pytest.raises(UserError, match="take the checkpoint as the source of model"):
        start_from_vlm(lavi, folder)


def test_a_template_that_only_the_processor_has_is_read(tmp_path: Path, tokenizer: str) -> None:
    """As transformers wrote it in 2024: a file of its own, and none beside the tokenizer."""
    folder = write_vlm("llava", tmp_path / "checkpoint", tokenizer)
    template = published_vlm(str(folder)).chat.template
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        published_vlm(str(folder))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert published_vlm(str(folder)).chat.template == template


def test_a_head_of_its_own_is_no_start_for_a_tied_one(tmp_path: Path, tokenizer: str) -> None:
    folder = str(write_vlm("llava", tmp_path / "checkpoint", tokenizer))
    own = published_vlm(folder)
    config = own.language.hf.config.to_diff_dict() | {"model_type": "llama"}
    config = {key: value for key, value in config.items() if key not in ("dtype", "transformers_version")}

    def model(*, tied: bool) -> VisionLanguageModel:
        language = LanguageModel(config=config | {"tie_word_embeddings": tied}, tokenizer=folder)
        return VisionLanguageModel(
            vision=HFVision(folder, layer=-2), language=language, fusion=LaViFusion(every=2), chat_template="chatml"
        )

    assert start_from_vlm(model(tied=False), folder)
    with pytest.raises(UserError, match=r"set model\.language\.config\.tie_word_embeddings=false"):
        start_from_vlm(model(tied=True), folder)


def test_a_checkpoint_of_transformers_is_loaded_as_a_run_is(tmp_path: Path, tokenizer: str) -> None:
    folder = write_vlm("llava", tmp_path / "checkpoint", tokenizer)
    model = load(folder)
    assert not model.training
    assert model.ask("what?", picture((40, 30))) == published_vlm(str(folder)).ask("what?", picture((40, 30)))


def test_a_released_model_is_scored_counted_and_timed_from_its_recipe(
    tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_vlm("smolvlm", tmp_path / "checkpoint", str(scenes / "tokenizer")))
    recipe = {
        "model": {"_target_": "lavi.checkpoints.published_vlm.published_vlm", "source": folder},
        "module": {"_target_": "lavi.training.module.VisionLanguageModule", "learning_rate": {"fusion": 1e-3}},
        "data": {
            "_target_": "datamodules.image_text.ImageTextData",
            **{split: str(scenes / split) for split in ("train", "test")},
        },
    }
    pruned = copy.deepcopy(recipe)
    pruned["model"]["fusion"] = {
        "_target_": "lavi.fusion.pruning.FastV",
        "layer": 2,
        "projector": {"_target_": "lavi.nn.projectors.LinearProjector"},
        "markers": {"_target_": "lavi.fusion.tile_markers.TileMarkers"},
    }
    files = [tmp_path / "released.yaml", tmp_path / "pruned.yaml"]
    for file, settings in zip(files, (recipe, pruned), strict=True):
        file.write_text(yaml.safe_dump(settings))
    as_it_is, less = compare_runs(
        files, overrides=[], trust=False, limit=3, device=torch.device("cpu"), out=tmp_path / "records.jsonl"
    )
    assert (as_it_is.knobs["run"], less.knobs["run"]) == ("released", "pruned")
    assert less.gflops_language < as_it_is.gflops_language
    assert "released" in capsys.readouterr().out


def test_a_run_from_a_released_model_is_loaded_without_trust(tmp_path: Path, scenes: Path) -> None:
    """Its recipe names no class but :func:`published_vlm`."""
    source = write_vlm("llava", tmp_path / "checkpoint", str(scenes / "tokenizer"))
    settings = {
        "model": {"_target_": "lavi.checkpoints.published_vlm.published_vlm", "source": str(source)},
        "module": {"_target_": "lavi.training.module.VisionLanguageModule", "learning_rate": {"fusion": 1e-3}},
        "data": {"_target_": "datamodules.image_text.ImageTextData", "train": str(scenes / "train")},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "run").mkdir()
    assert train(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "run", save_every=1) == 0
    model = load(tmp_path / "run")
    assert model.ask("what?", picture((40, 30))) is not None


def test_a_recipe_of_an_untrained_model_is_not_scored(tiny_recipe: Path) -> None:
    with pytest.raises(UserError, match="whose model is not trained"):
        compare_runs([tiny_recipe], overrides=[], trust=False, limit=1, device=torch.device("cpu"), out=None)


def test_a_checkpoint_is_read_once_for_all_of_its_parts(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(write_vlm("llava", tmp_path / "checkpoint", tokenizer))
    read, sources = vlm._read, list[str]()
    monkeypatch.setattr(vlm, "_read", lambda source, config: (sources.append(source), read(source, config))[1])
    model = published_vlm(folder, attention="eager")
    assert sources == [folder]
    assert model.language.hf.config._attn_implementation == model.language.attention == "eager"
    batch = collate(model, [question((40, 30))])
    with torch.no_grad():
        torch.testing.assert_close(model(batch), published_vlm(folder)(batch), atol=1e-4, rtol=1e-4)


def test_a_released_model_answers_in_the_terminal(run, tmp_path: Path, tokenizer: str) -> None:  # type: ignore[no-untyped-def]
    folder = write_vlm("llava_onevision", tmp_path / "checkpoint", tokenizer)
    picture((40, 30)).save(tmp_path / "a.png")
    status, said, err = run("lavi.generate", "--checkpoint", folder, "--image", "a.png", "--question", "what?")
    assert status == 0, err
    assert said.strip() == published_vlm(str(folder)).ask("what?", Image.open(tmp_path / "a.png"))


def test_rotary_frequencies_are_of_fp32_in_every_precision(tmp_path: Path, tokenizer: str) -> None:
    """As transformers loads them: rounded to bf16, far tokens would stand elsewhere."""
    folder = write_vlm("llava", tmp_path / "checkpoint", tokenizer)
    hf = published_vlm(str(folder), dtype="bfloat16").language.hf
    assert {parameter.dtype for parameter in hf.parameters()} == {torch.bfloat16}
    rotary = {buffer.dtype for name, buffer in hf.named_buffers() if name.endswith("inv_freq")}
    assert rotary == {torch.float32}


def test_a_checkpoint_in_the_home_folder_is_found(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vlm("llava", tmp_path / "checkpoint", tokenizer)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert vlm.names_vlm("~/checkpoint")
    assert published_vlm("~/checkpoint").ask("what?", picture((40, 30))) is not None
