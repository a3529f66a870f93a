"""GGUF files and quantized weights: they answer as the weights that they hold do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import lightning.pytorch as pl
import pytest
import torch
import transformers
from conftest import TOWER, ask, collate, small
from families import QWEN2
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

import lavi.loading.compressed as compressed
from lavi.checkpoints.model_folder import build, from_pretrained, save_pretrained
from lavi.checkpoints.trained_weights import TRAINED
from lavi.efficiency.flops import language_flops
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.training.module import VisionLanguageModule
from lavi.vision.hf import HFVision

of_the_extra = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="the extra gguf asks for transformers 5.18"
)

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
"""Qwen2's names in transformers and in GGUF."""


def write_gguf(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, architecture: str = "qwen2"
) -> dict[str, Tensor]:
    """A GGUF file of a Qwen2: matrices whose rows are multiples of 32 in Q8_0, the rest in float32.

    Returns:
        The weights that the file holds, under transformers' names.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if token in special else 1 for token, _ in tokens])
    writer.add_token_merges([" ".join(m) if not isinstance(m, str) else m for m in merges_of(tokenizer)])
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(int(tokenizer.eos_token_id))
    held = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = name
        for ours, others in NAMES.items():
            theirs = theirs.replace(ours, others)
        values = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            blocks = gguf.quantize(values, kind)
            writer.add_tensor(theirs, blocks, raw_dtype=kind)
            values = gguf.dequantize(blocks, kind)
        else:
            writer.add_tensor(theirs, values)
        held[name] = torch.from_numpy(values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def merges_of(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    merges: list[Any] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return merges


WIDER = {"hidden_size": 64, "intermediate_size": 128}
"""A block of 4-bit weights is 64 long."""


@pytest.fixture
def qwen2(tokenizer: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    own = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    own.add_tokens(["<|endoftext|>"], special_tokens=True)  # transformers gives it to each tokenizer of a Qwen2
    torch.manual_seed(0)
    keys = {key: value for key, value in QWEN2.items() if key != "model_type"} | WIDER
    return AutoModelForCausalLM.from_config(Qwen2Config(**keys | {"vocab_size": len(own)})).eval(), own


def test_a_gguf_file_answers_as_the_weights_that_it_holds(qwen2: Any, tmp_path: Path) -> None:
    model, tokenizer = qwen2
    model.load_state_dict(write_gguf(tmp_path / "tiny.gguf", model, tokenizer), strict=False)
    language = LanguageModel(str(tmp_path), gguf_file="tiny.gguf").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(language.hf(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not any("quantization" in key for key in language.hf.config.to_dict())
    assert language.tokenizer("what is this?").input_ids == tokenizer("what is this?").input_ids


@of_the_extra
def test_a_model_from_a_gguf_file_is_trained_and_saved_as_any_other(qwen2: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", *qwen2)
    language = LanguageModel(str(tmp_path), gguf_file="tiny.gguf", lora={"rank": 2})
    model = VisionLanguageModel(
        vision=HFVision(config=TOWER),
        language=language,
        fusion=ConcatFusion(),
        chat_template="chatml" if language.tokenizer.chat_template is None else None,
    )
    module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3, "language": 1e-3})
    module.model.token_scores(collate(model, [ask(1, "what?", answer="red")])).loss.backward()
    language.save_pretrained(tmp_path / "out")
    again = LanguageModel(str(tmp_path / "out")).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.hf(input_ids=ids).logits, language.eval().hf(input_ids=ids).logits)


@of_the_extra
def test_an_export_of_a_gguf_model_needs_the_file_no_more(qwen2: Any, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, *qwen2)
    parts = {
        "vision": {"_target_": "lavi.vision.hf.HFVision", "config": TOWER},
        "language": {
            "_target_": "lavi.language.load.LanguageModel",
            "source": str(tmp_path),
            "gguf_file": file.name,
        },
        "fusion": {"_target_": "lavi.fusion.concat.ConcatFusion"},
        "chat_template": "chatml",
    }
    model = build(Recipe({"model": {"_target_": "lavi.model.VisionLanguageModel", **parts}}, {}, "recipe.yaml")).eval()
    save_pretrained(model, tmp_path / "out")
    file.unlink()
    again, ids = from_pretrained(tmp_path / "out").eval(), torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.language.hf(input_ids=ids).logits, model.language.hf(input_ids=ids).logits)


def test_what_is_no_gguf_file_of_a_known_family_is_refused(qwen2: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", *qwen2, architecture="rwkv6")
    with pytest.raises(UserError, match=r"no language model at .*rwkv6"):
        LanguageModel(str(tmp_path), gguf_file="other.gguf")
    with pytest.raises(UserError, match=r"no language model at .*missing\.gguf"):
        LanguageModel(str(tmp_path), gguf_file="missing.gguf")
    with pytest.raises(UserError, match="name it as 'source'"):
        LanguageModel(config=QWEN2, tokenizer=str(tmp_path), gguf_file="other.gguf")


QUANTIZED = ("bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8")


@pytest.fixture
def checkpoint(qwen2: Any, tmp_path: Path) -> str:
    for part in qwen2:
        part.save_pretrained(tmp_path / "qwen2")
    return str(tmp_path / "qwen2")


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_quantized_weights_stay_near_and_frozen(checkpoint: str, quantization: Any, tmp_path: Path) -> None:
    plain, fewer = (LanguageModel(checkpoint, quantization=kind).eval() for kind in (None, quantization))
    model = VisionLanguageModel(
        vision=HFVision(config=TOWER),
        language=fewer,
        fusion=LaViFusion(every=2, generator=small()),
        chat_template="chatml",
    )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        said, expected = fewer.hf(input_ids=ids).logits.float(), plain.hf(input_ids=ids).logits
    assert not torch.equal(said, expected)
    assert (said - expected).norm() < (0.2 if "4bit" in quantization else 0.05) * expected.norm()
    assert language_flops(fewer, tokens=[12] * 4) == language_flops(plain, tokens=[12] * 4)
    module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3})
    if quantization == "bitsandbytes-4bit":
        with pytest.raises(UserError, match="pass no gradient on where the device is a CPU: take 8 bits"):
            pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1).fit(
                module, DataLoader([], batch_size=None)
            )
    else:
        module.model.token_scores(collate(model, [ask(1, "what?", answer="red")])).loss.backward()
        assert any(p.grad is not None for p in model.fusion.parameters())
    assert not any(p.requires_grad for p in fewer.parameters())
    with pytest.raises(UserError, match="no ordinary checkpoint: load the language model without"):
        fewer.save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match="stay frozen: leave 'language' out"):
        VisionLanguageModule(model, learning_rate={"fusion": 1e-3, "language.hf.model.norm": 1e-3})


@pytest.mark.parametrize("names", [["model.fusion.x"], ["model.fusion.x", "model.language.hf.y"]])
def test_a_start_that_leaves_quantized_weights_alone(
    checkpoint: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that trained the fusion alone is one."""
    language = LanguageModel(checkpoint, quantization="bitsandbytes-8bit")
    parts = {"vision": HFVision(config=TOWER), "language": language, "fusion": LaViFusion(every=2, generator=small())}
    model = VisionLanguageModel(**parts, chat_template="chatml")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / TRAINED)
    monkeypatch.setattr("lavi.training.module.load_start", lambda module, run: set(names))
    module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3}, start_from=str(tmp_path))
    if len(names) == 1:
        module.load_start()
        assert module.inherited == set(names)
    else:
        with pytest.raises(UserError, match="would write into quantized weights"):
            module.load_start()


def test_what_cannot_be_quantized_is_refused(checkpoint: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="name it as 'source'"):
        LanguageModel(config=QWEN2, tokenizer=tokenizer, quantization="torchao-int8")
    with pytest.raises(UserError, match="neither with gguf_file nor with lora"):
        LanguageModel(checkpoint, quantization="torchao-int8", lora={"rank": 2})
    monkeypatch.setattr(compressed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lavi\[quantization\]'"):
        LanguageModel(checkpoint, quantization="bitsandbytes-4bit")
