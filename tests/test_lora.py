"""LoRA: starts as the bare model, trains its adapters alone, and leaves no trace in an export."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, TOWER, ask, awaken, collate, likeliest, small, summed_loss
from families import EAGER, VARIED
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from callbacks.throughput import Throughput
from lavi.efficiency.flops import closed_form
from lavi.efficiency.scenario import PromptShape
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.training.module import VisionLanguageModule
from lavi.vision.hf import HFVision

SETTINGS = {"rank": 4, "alpha": 8, "dropout": 0.0}
FUSIONS = {"lavi": lambda: LaViFusion(every=2, generator=small()), "concat": ConcatFusion}
SAMPLES = [ask(1, "what colour is the circle?", answer="red"), ask("is there a square?", answer="yes")]


def language_model(tokenizer: str, family: str, **settings: Any) -> LanguageModel:
    """The same weights whatever the settings."""
    torch.manual_seed(0)
    attention: Any = "eager" if family in EAGER else "sdpa"
    return LanguageModel(config=FAMILIES[family], tokenizer=tokenizer, attention=attention, **settings).eval()


def whole(tokenizer: str, family: str, fusion: str, **settings: Any) -> VisionLanguageModel:
    language = language_model(tokenizer, family, **settings)
    torch.manual_seed(0)
    model = VisionLanguageModel(vision=HFVision(config=TOWER), language=language, fusion=FUSIONS[fusion]())
    awaken(model.fusion)
    return model.eval()


def awaken_adapters(language: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if name in language.adapters:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def linears(language: LanguageModel) -> dict[str, Any]:
    """The linear layers inside the decoder layers, under transformers' names; no routers of experts."""
    inside = {id(module) for module in language.layers.modules()}
    linear = {n: m for n, m in language.hf.named_modules() if id(m) in inside and isinstance(m, nn.Linear | Conv1D)}
    return {name: module for name, module in linear.items() if "router" not in name}


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "float32") for family in FAMILIES), *((family, "bfloat16") for family in VARIED)]
)
def test_it_starts_as_the_bare_model_and_ends_as_an_ordinary_one(
    tokenizer: str, family: str, dtype: str, tmp_path: Path
) -> None:
    """Its adapters are on all linear layers of the decoder and nothing else; merged, they are gone."""
    bare = language_model(tokenizer, family, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft would mend what does not fit, and say so
        adapted = language_model(tokenizer, family, dtype=dtype, lora=SETTINGS)
    expected = {f"hf.{name}.lora_{half}.default.weight" for name in linears(bare) for half in "AB"}
    assert adapted.adapters == expected
    assert {p.dtype for n, p in adapted.named_parameters() if n in expected} == {torch.float32}
    ids = torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(adapted.hf(input_ids=ids).logits, bare.hf(input_ids=ids).logits)
        awaken_adapters(adapted)
        learned = adapted.hf(input_ids=ids).logits
        assert not torch.allclose(learned, bare.hf(input_ids=ids).logits, atol=1e-2)
        adapted.save_pretrained(tmp_path)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=adapted.attention)
        assert type(merged) is type(bare.hf)
        assert merged.config.architectures == [type(bare.hf).__name__]
        assert list(merged.state_dict()) == list(bare.hf.state_dict())
        difference = (merged(input_ids=ids).logits - learned).abs().amax() / learned.abs().amax()
    assert difference < (1e-5 if dtype == "float32" else 0.12)
    assert set(adapted.tokenizer.get_vocab()) <= set(AutoTokenizer.from_pretrained(tmp_path).get_vocab())


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_both_fusions_work_through_adapters(tokenizer: str, family: str, fusion: str) -> None:
    """Zero start under vision, too; and once they have learned, decoding with a cache is the full forward."""
    bare = whole(tokenizer, family, fusion)
    adapted = whole(tokenizer, family, fusion, lora=SETTINGS)
    batch = collate(bare, SAMPLES)
    with torch.no_grad():
        assert torch.equal(adapted(batch), bare(batch))
    awaken_adapters(adapted.language)
    prompts = [ask(1, "what colour is the circle?"), ask("hello")]
    prompt = collate(adapted, prompts, prompt=True, pad_left=True)
    answers = adapted.generate(prompt, max_new_tokens=4, eos_token_id=None)
    for sample, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 4
        assert answer == likeliest(adapted, sample, answer)


def test_adapters_alone_train_unless_another_part_is_named(tokenizer: str) -> None:
    model = whole(tokenizer, "qwen2", "lavi", lora=SETTINGS | {"targets": ["q_proj", "mlp.up_proj"]})
    adapters = {f"language.{name}" for name in model.language.adapters}
    fusion = {f"fusion.{name}" for name, _ in model.fusion.named_parameters()}
    layers = [f"language.hf.model.layers.{index}" for index in range(4)]
    assert adapters == {
        f"{layer}.{target}.lora_{half}.default.weight"
        for layer in layers
        for target in ("self_attn.q_proj", "mlp.up_proj")
        for half in "AB"
    }
    assert (
        set(VisionLanguageModule(model, learning_rate={"fusion": 1e-3, "language": 1e-4}).part_of) == adapters | fusion
    )
    norm = {"language.hf.model.norm.weight"}
    named = VisionLanguageModule(model, learning_rate={"language": 1e-4, "language.hf.model.norm": 1e-5})
    assert set(named.part_of) == adapters | norm
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters | norm
    layer = VisionLanguageModule(model, learning_rate={layers[0]: 1e-4})
    assert set(layer.part_of) == {name for name in adapters if name.startswith(layers[0])}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_each_adapter_also_when_recomputed(tokenizer: str, fusion: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = whole(tokenizer, "qwen2", fusion, lora=SETTINGS)
        awaken_adapters(model.language)
        rates = {"fusion": 1e-3, "language": 1e-4}
        module = VisionLanguageModule(model, learning_rate=rates, checkpointing=checkpointing)
        module.train()
        batch = collate(model, SAMPLES)
        summed_loss(model(batch), batch.labels)[0].backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(module.part_of)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert gradient.abs().amax() > 0 or "lora" not in name, name
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


def test_dropout_is_on_the_adapters_in_training_only(tokenizer: str) -> None:
    model = whole(tokenizer, "qwen2", "lavi", lora=SETTINGS | {"dropout": 0.5})
    awaken_adapters(model.language)
    module = VisionLanguageModule(model, learning_rate={"language": 1e-4})
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        module.train()
        assert not torch.equal(model(batch), model(batch))
        module.eval()
        assert torch.equal(model(batch), model(batch))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnak": 4}, r"language.lora has no 'rnak': did you mean 'rank'\?"),
        ({"targets": ["q_porj"]}, r"names 'q_porj', which no decoder layer has: did you mean 'q_proj'\?"),
        ({"targets": ["lm_head"]}, "names 'lm_head', which no decoder layer has"),
        ({"targets": "q_proj"}, "is a list of linear layers"),
        ({"rank": 0}, "is a whole number from 1, not 0"),
        ({"alpha": "big"}, "is a number above 0, not 'big'"),
        ({"dropout": 1}, "is a share from 0 to below 1, not 1"),
    ],
)
def test_what_is_wrong_is_said(tokenizer: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        language_model(tokenizer, "qwen2", lora=settings)


def test_weights_beside_adapters_do_not_train_and_are_not_counted_so(tokenizer: str) -> None:
    """Gradients pass through them: two forward passes' worth, where weights that train are three's."""
    steps = []
    for settings in ({"lora": SETTINGS}, {}):
        model = whole(tokenizer, "qwen2", "lavi", **settings)
        module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3, "language": 1e-3})
        batch = collate(model, [ask(1, "what colour?", answer="red")])
        steps.append(Throughput().flops(module, batch) - closed_form(model, PromptShape(0)).prefill["vision_encoder"])
    adapted, trained = steps
    assert 0.6 < adapted / trained < 0.9
