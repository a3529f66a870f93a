"""Base decoders, such as Qwen2.5-0.5B: the template of their tokenizer ends answers with a token that they do not stop
at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ask, collate
from families import QWEN2
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Config,
)

from lavi.checkpoints.load import load
from lavi.data.chat import TEMPLATES
from lavi.errors import UserError
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.training.startup import as_trained

TEXT_ENDS, TURN_ENDS = "<|endoftext|>", "<|im_end|>"


def write_base(folder: Path, tokenizer: str, *, template: str | None, ends: list[str]) -> str:
    """A checkpoint that stops at these tokens, with a tokenizer that has one for the end of a turn, too."""
    own = AutoTokenizer.from_pretrained(tokenizer)
    own.add_special_tokens({"eos_token": TEXT_ENDS, "additional_special_tokens": ["<|im_start|>", TURN_ENDS]})
    own.chat_template = template
    keys = {key: value for key, value in QWEN2.items() if key != "model_type"} | {"vocab_size": len(own)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**keys))
    model.generation_config = GenerationConfig(eos_token_id=own.convert_tokens_to_ids(ends))
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(tokenizer: str, tmp_path: Path) -> str:
    return write_base(tmp_path / "base", tokenizer, template=TEMPLATES["chatml"], ends=[TEXT_ENDS])


def test_a_base_decoder_trains_and_stops_behind_its_answers(run: Any, tiny_recipe: Path, base: str) -> None:
    language = {"_target_": "lavi.language.load.LanguageModel", "source": base, "config": None, "tokenizer": None}
    settings = {"extends": tiny_recipe.name, "model": {"language": language}}
    child = tiny_recipe.with_name("child.yaml")
    child.write_text(yaml.safe_dump(settings))
    status, out, err = run("lavi.fit", "--recipe", child, "--run", "run", "trainer.max_steps=1")
    assert status == 0, err
    assert "the end token among them" in out
    assert run("lavi.export", "--checkpoint", "run", "--out", "exported")[0] == 0
    for folder in ("run", "exported"):
        model = load(folder)
        ends = model.chat.tokenizer.convert_tokens_to_ids([TEXT_ENDS, TURN_ENDS])
        assert model.end_ids() == ends
        prompt = collate(model, [ask(1, "what?")], pad_left=True, prompt=True)
        for end in ends:
            says = LogitsProcessorList([Says([9, 9, end, 9], behind=prompt.input_ids.shape[1])])
            assert model.generate(prompt, max_new_tokens=4, logits_processor=says) == [[9, 9]]
    alone = AutoModelForCausalLM.from_pretrained("exported/language").generation_config  # and in transformers alone
    assert alone.eos_token_id == ends


class Says(LogitsProcessor):  # type: ignore[misc]
    """Makes a model say these ids behind a prompt of so many."""

    def __init__(self, ids: list[int], *, behind: int) -> None:
        self.ids, self.behind = ids, behind

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = self.ids[input_ids.shape[1] - self.behind]
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([said]), 0.0)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TEMPLATES["chatml"], [TEXT_ENDS, TURN_ENDS]),  # it stops there already
        (None, [TEXT_ENDS]),
        ("{% for m in messages %}{{ m.content }} over. {% endfor %}", [TEXT_ENDS]),  # words, which may be of the answer
        ("{{ raise_exception('no') }}", [TEXT_ENDS]),
    ],
)
def test_what_a_checkpoint_stops_at_stays_where_its_template_adds_nothing(
    tokenizer: str, tmp_path: Path, template: str | None, ends: list[str]
) -> None:
    source = write_base(tmp_path / "base", tokenizer, template=template, ends=ends)
    language = LanguageModel(source)
    assert language.hf.generation_config.eos_token_id == language.tokenizer.convert_tokens_to_ids(ends)


def test_the_templates_that_are_named_end_answers(build: Any, tokenizer: str, tmp_path: Path) -> None:
    """Of a tokenizer that knows no such token as the template writes: what the error says to set does work."""
    parts = build(LaViFusion(every=2))

    def model(language: LanguageModel, template: str | None) -> VisionLanguageModel:
        return VisionLanguageModel(
            vision=parts.vision, language=language, fusion=LaViFusion(every=2), chat_template=template
        )

    def first_batch(of: VisionLanguageModel) -> list[Any]:
        return [collate(of, [ask(1, "what?", answer="red")])]

    language = LanguageModel(config=QWEN2, tokenizer=tokenizer)
    refused = model(language, "chatml")
    with pytest.raises(UserError, match=r"no trained answer ends with an end token \(<\|end\|>\)") as refusal:
        as_trained(refused, first_batch(refused))
    named = re.search(r"set model\.chat_template=(\w+) or (\w+), which does", str(refusal.value))
    assert named is not None
    for template in named.groups():
        advised = model(LanguageModel(config=QWEN2, tokenizer=tokenizer), None if template == "null" else template)
        as_trained(advised, first_batch(advised))
    language.tokenizer.eos_token = language.tokenizer.chat_template = None
    endless = model(language, "vicuna")
    with pytest.raises(UserError, match="take a tokenizer that has an eos_token"):
        as_trained(endless, first_batch(endless))
