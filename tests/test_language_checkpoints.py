"""Language models as people have them: checkpoints in shards, tied and untied heads, tokenizers with added tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import QWEN2
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, Qwen2Config

from lavi.errors import UserError
from lavi.language.load import LanguageModel, _load_tokenizer
from lavi.loading.without_weights import without_weights

IDS = torch.arange(12)[None]  # (B, T)


def write(folder: Path, tokenizer: str, *, added: tuple[str, ...] = (), **saving: Any) -> Any:
    """A checkpoint of a small Qwen2 with its tokenizer, as transformers writes it.

    Args:
        added: tokens that the tokenizer gets beside its own.
    """
    own = AutoTokenizer.from_pretrained(tokenizer)
    own.add_tokens(list(added))
    keys = {key: value for key, value in QWEN2.items() if key != "model_type"}
    keys |= {"vocab_size": len(own), "tie_word_embeddings": saving.pop("tied", True)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**keys)).eval()
    model.save_pretrained(folder, **saving)
    own.save_pretrained(folder)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        said: Tensor = model(input_ids=IDS).logits
    return said


def test_a_checkpoint_in_shards_is_read_whole_or_not_at_all(tokenizer: str, tmp_path: Path) -> None:
    model = write(tmp_path, tokenizer, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(logits(LanguageModel(str(tmp_path)).eval().hf), logits(model))
    shards[0].unlink()
    with pytest.raises(UserError, match=f"(?s)^no 'qwen2' language model can be built from .*{shards[0].name}"):
        LanguageModel(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_stays_tied_or_untied(tokenizer: str, tmp_path: Path, tied: bool) -> None:
    """Read and written again: the same keys and the same bits."""
    model = write(tmp_path / "in", tokenizer, tied=tied)
    language = LanguageModel(str(tmp_path / "in")).eval()
    head, embeddings = language.hf.get_output_embeddings(), language.hf.get_input_embeddings()
    assert (head.weight is embeddings.weight) is tied
    assert torch.equal(logits(language.hf), logits(model))
    language.save_pretrained(tmp_path / "out")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "out"))
    assert ("lm_head.weight" in before) is not tied
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_added_tokens_have_embeddings_of_their_own(tokenizer: str, tmp_path: Path) -> None:
    write(tmp_path, tokenizer, added=("<box>", "</box>"))
    language = LanguageModel(str(tmp_path))
    ids = language.tokenizer("<box>red</box>").input_ids
    assert {"<box>", "</box>"} <= {language.tokenizer.decode([token]) for token in ids}
    assert language.embed(torch.tensor([ids])).shape == (1, len(ids), 32)


def test_a_model_around_a_language_model_is_named(tokenizer: str, tmp_path: Path) -> None:
    text = {name: QWEN2[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 500}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Gemma3Config(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    with without_weights(), pytest.raises(UserError, match="a 'gemma3', which holds a language model inside another"):
        LanguageModel(str(tmp_path), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("installed", "advice"),
    [
        ({"protobuf"}, "pip install sentencepiece."),
        (set(), "pip install sentencepiece protobuf."),
        ({"sentencepiece", "protobuf"}, None),
    ],
)
def test_a_tokenizer_that_other_packages_read_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: set[str], advice: str | None
) -> None:
    """Vicuna's is a tokenizer.model alone. Where they are there, or nothing needs them, another cause is looked for."""
    for package in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(f"lavi.language.load.is_{package}_available", lambda package=package: package in installed)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(UserError) as refusal:
        _load_tokenizer(str(tmp_path), None)
    assert ("datamodules.scenes" in str(refusal.value)) is (advice is None)
    assert advice is None or str(refusal.value).endswith(advice)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"datamodules\.scenes"):
        _load_tokenizer(str(tmp_path), None)
