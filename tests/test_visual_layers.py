"""ViCA and ShortV: against concatenation whose visual tokens are put back and hidden layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ask, awaken, collate, summed_loss
from families import EAGER, VARIED
from test_oracles import SAMPLES, assert_rows_are
from torch import Tensor

from lavi.batch import Batch, Layout
from lavi.efficiency.flops import closed_form, counted
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError
from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.shortv import ShortV
from lavi.fusion.vica import ViCA
from lavi.fusion.visual_layers import Mode, VisualLayersFusion, scaled_layers
from lavi.language.context import VisualContext
from lavi.language.subsequence import ArrangedCall, AttentionKind
from lavi.language.surgery import open_decoder
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe

ROOT = Path(__file__).parent.parent
ALL_MODES: list[list[Mode]] = [["read", "whole", "read", "text"], ["text", "read", "whole", "whole"]]
"""Every mode behind every other one, and V that enters late and leaves early."""


class Modes(VisualLayersFusion):
    """Layers of any modes."""

    def __init__(self, *modes: Mode) -> None:
        super().__init__()
        self.wanted = list(modes)

    def modes(self, depth: int) -> list[Mode]:
        return self.wanted


@dataclass(kw_only=True)
class Reference(VisualContext):
    """Concatenation, S tokens in every layer: V is put back behind layers that leave it, or hidden by a mask."""

    modes: tuple[Mode, ...]
    visual: Tensor
    """(B, S)."""
    valid: Tensor
    """(B, S)."""
    attention: AttentionKind

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        mode = self.modes[layer]
        out = call(hidden, **kwargs | {"attention_mask": self.mask(layer, hidden)})
        return out if mode == "whole" else torch.where(self.visual[..., None], hidden, out)

    def mask(self, layer: int, hidden: Tensor) -> Tensor:
        column = torch.arange(self.valid.shape[1])
        allowed = (column <= column[:, None]) & self.valid[:, None, :]  # (B, S, S)
        if (window := self.attention.windows[layer]) is not None:
            allowed &= column > column[:, None] - window
        if self.modes[layer] == "text":
            allowed &= self.visual[:, :, None] | ~self.visual[:, None, :]
        allowed = (allowed | torch.eye(len(column), dtype=torch.bool))[:, None]
        if self.attention.kernel == "eager":
            return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, torch.finfo(hidden.dtype).min)
        return allowed


def pair(build: Any, fusion: Fusion, **config: Any) -> tuple[VisionLanguageModel, VisionLanguageModel]:
    """A model with this fusion, and one that concatenates, of the same weights."""
    model, concat = build(fusion, **config), build(ConcatFusion(), **config)
    awaken(concat.fusion)
    model.fusion.load_state_dict(concat.fusion.state_dict())
    return model, concat


def reference(model: VisionLanguageModel, concat: VisionLanguageModel, batch: Batch) -> Tensor:
    """Logits (B, T, vocabulary) of the modes of ``model`` by concatenation."""
    modes, language = model.fusion.plan.modes, concat.language
    open_decoder(language.hf, range(len(modes)))
    inputs = concat.fusion(batch, concat.features_of(batch), language)
    columns = inputs.vision.text_columns
    assert columns is not None
    is_text = torch.zeros_like(inputs.attention_mask)
    for index, (start, stop) in enumerate(batch.spans):
        is_text[index, columns[index, start:stop]] = True
    context = Reference(
        text_columns=columns,
        modes=modes,
        visual=inputs.attention_mask & ~is_text,
        valid=inputs.attention_mask,
        attention=AttentionKind.of(language.attention, language.hf.config),
    )
    logits: Tensor = language(replace(inputs, vision=context))
    return logits


def assert_is_the_reference(build: Any, fusion: Fusion, **config: Any) -> None:
    model, concat = pair(build, fusion, **config)
    for pad_left in (False, True):
        batch = collate(model, SAMPLES, pad_left=pad_left)
        with torch.no_grad():
            said, expected = model(batch), reference(model, concat, batch)
        assert_rows_are(said, expected, batch)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fusion",
    [lambda: Modes(*["whole"] * 4), lambda: ShortV(layers=[])],
    ids=["whole", "shortv"],
)
@pytest.mark.parametrize("family", VARIED)
def test_with_every_layer_whole_it_is_concatenation_bit_for_bit(build, fusion, family: str) -> None:  # type: ignore[no-untyped-def]
    model, concat = pair(build, fusion(), family=family)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        assert torch.equal(model(batch), concat(batch))


@pytest.mark.parametrize("modes", ALL_MODES, ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_concatenation_with_visual_tokens_put_back_and_hidden(build, family: str, modes: list[Mode]) -> None:
    assert_is_the_reference(build, Modes(*modes), family=family)


@pytest.mark.parametrize(
    "fusion",
    [lambda: ShortV(layers=[1, 3]), lambda: ViCA(layers=[0, 1]), lambda: ViCA(layers=[2, 3])],
)
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3_text"])
def test_so_is_each_method(build, fusion, family: str) -> None:  # type: ignore[no-untyped-def]
    assert_is_the_reference(build, fusion(), family=family)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [3, 12])
def test_a_window_is_counted_in_the_arranged_sequence(build, window: int, attention: str) -> None:
    """Also where all that padding could see lies behind it."""
    family = "mistral" if attention == "sdpa" else "gemma2"
    assert (family in EAGER) == (attention == "eager")
    for modes in ALL_MODES:
        assert_is_the_reference(build, Modes(*modes), family=family, sliding_window=window)


def test_no_query_sees_nothing(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding neither: what some kernels make of such a row is no number, and would spread."""
    model = build(ViCA(layers=[0, 1]), family="mistral", sliding_window=3)
    masks, mask_over_all = [], ArrangedCall.mask_over_all

    def kept(*args: Any, **kwargs: Any) -> Tensor | None:
        masks.append(mask_over_all(*args, **kwargs))
        return masks[-1]

    monkeypatch.setattr(ArrangedCall, "mask_over_all", kept)
    for pad_left in (False, True):
        with torch.no_grad():
            model(collate(model, SAMPLES, pad_left=pad_left))
    assert len(masks) == 4
    assert all(mask.any(-1).all() for mask in masks)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "deepseek_v2"])
def test_gradients_are_those_of_the_reference(build, family: str, checkpointed: bool) -> None:
    """Also those that reach V, and behind it the projector, through keys and values alone."""
    for modes in (("read", "text", "read", "text"), *ALL_MODES):
        model, concat = pair(build, Modes(*modes), family=family)
        if checkpointed:
            model.train()
            model.language.hf.gradient_checkpointing_enable({"use_reentrant": False})
        batch = collate(model, SAMPLES)
        gradients = []
        for one, logits in ((model, model(batch)), (concat, reference(model, concat, batch))):
            summed_loss(logits, batch.labels)[0].backward()
            gradients.append({name: part.grad for name, part in one.named_parameters() if part.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], atol=2e-5, rtol=1e-3)
        assert all(gradients[0][f"fusion.{name}"].any() for name, _ in model.fusion.named_parameters())


# --- what it saves ----------------------------------------------------------------------------------------------------


def test_the_cache_of_a_layer_holds_what_its_tokens_to_come_may_see(build) -> None:  # type: ignore[no-untyped-def]
    """In the arranged order, as concatenation's does, where V is as it came."""
    model, concat = pair(build, Modes("read", "text", "read", "whole"))
    batch = collate(model, SAMPLES[:1], prompt=True)
    with torch.no_grad():
        caches = [one.prefill(batch, one.features(batch.pixels))[0].past_key_values for one in (model, concat)]
    text = batch.input_ids.shape[1]
    assert [layer.keys.shape[2] for layer in caches[0].layers] == [text + 16, text, text + 16, text + 16]
    for name in ("keys", "values"):
        torch.testing.assert_close(getattr(caches[0].layers[0], name), getattr(caches[1].layers[0], name))


def test_a_layer_that_reads_computes_keys_and_values_alone(build) -> None:  # type: ignore[no-untyped-def]
    """By the use of the weights: a module that is skipped is called, too."""
    model = build(ViCA(layers=[1]))
    batch = collate(model, [ask(1, "what colour is the circle?")], prompt=True)
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"]
    layers = model.language.layers[:2]
    weights = {id(layer.get_submodule(name).weight): (n, name) for n, layer in enumerate(layers) for name in names}
    tokens: dict[tuple[int, str], list[int]] = defaultdict(list)
    linear = torch.nn.functional.linear

    def spied(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in weights:
            tokens[weights[id(weight)]].append(hidden.shape[1])
        return linear(hidden, weight, bias)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", spied)
        model(batch)
    text = batch.input_ids.shape[1]
    expected = {(number, name): [text] for number in (0, 1) for name in names}
    expected |= {(1, f"self_attn.{name}"): [16, text] for name in ("k_proj", "v_proj")}
    assert tokens == expected


def test_a_projection_of_queries_is_the_module_it_was(build) -> None:  # type: ignore[no-untyped-def]
    """Also after an error, and where somebody else had put a forward of their own in its place."""
    model = build(ShortV(layers=[0, 1]))
    first, second = (model.language.layers[number].self_attn.q_proj for number in (0, 1))
    seen: list[int] = []
    own = second.forward
    second.forward = lambda hidden: (seen.append(hidden.shape[1]), own(hidden))[1]
    batch = collate(model, SAMPLES[:1])
    with torch.no_grad():
        model(batch)
    text = batch.input_ids.shape[1]
    assert seen == [16, text]
    assert "forward" not in vars(first)
    model.language.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(batch)
    assert "forward" not in vars(first)


def test_without_an_image_no_layer_is_run_twice(build) -> None:  # type: ignore[no-untyped-def]
    model = build(ViCA(layers=[1]))
    runs: list[int] = []
    model.language.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        model(collate(model, SAMPLES[2:]))
    assert runs == [1]


@pytest.mark.parametrize("family", ["qwen2", "phi3", "deepseek_v2"])
def test_reading_costs_what_it_computes(build, family: str) -> None:
    """Keys and values of V, with its queries where one matrix makes all three; and scores over V's keys."""
    with torch.device("meta"):
        model = build(Modes("read", "text", "whole", "read"), family=family)
    fusion, attention = model.fusion, model.language.layers[0].self_attn
    names = {
        "qwen2": ["k_proj", "v_proj"],
        "phi3": ["qkv_proj"],
        "deepseek_v2": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"],
    }[family]
    size = sum(attention.get_submodule(name).weight.numel() for name in names)
    per_pair = {"qwen2": 2 * 32, "phi3": 2 * 32, "deepseek_v2": 4 * (12 + 8)}[family]
    assert fusion.costs(10, Layout(), 16)["reading"].flops == 2 * (2 * 16 * size + 2 * 10 * 16 * per_pair)
    for seen, past in ((None, 0), (Layout(), 9)):
        assert fusion.costs(10, seen, 16, past=past)["reading"].flops == 0
    assert fusion.visual_by_layer(16, 4) == [0, 0, 16, 0]
    assert fusion.cached_by_layer(16, 4) == [16, 0, 16, 16]
    shape = Scenario(text=50, visual_tokens=64).shape_for(model)
    closed, by_operator = closed_form(model, shape), counted(model, shape)
    # Older transformers multiply matrices for the angles of positions, which no formula counts.
    assert closed.language == pytest.approx(by_operator["language"] + by_operator["fusion"], rel=2e-4)
    assert sum(closed.decode.values()) == pytest.approx(by_operator["decode"], rel=2e-4)


# --- which layers -----------------------------------------------------------------------------------------------------


def test_the_papers_name_layers_of_thirty_two(build) -> None:  # type: ignore[no-untyped-def]
    shortv, vica = (build(make(), num_hidden_layers=32).fusion.plan for make in (ShortV, ViCA))
    assert vica.layers_in("read") == [0, 1, 7, 8, 9, 10, 11, 14]
    assert len(vica.layers_in("text")) == 24
    assert len(shortv.layers_in("read")) == 19
    assert shortv.layers_in("whole") == [1, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16]


@pytest.mark.parametrize("name", ["shortv", "vica"])
def test_the_recipes_take_the_same_depths_of_twenty_four(name: str) -> None:
    fusion: Any = Recipe.load(ROOT / "recipes" / "baselines" / f"{name}_0_5b.yaml").build("model.fusion")
    assert fusion.layers == scaled_layers(fusion.paper_layers, 24)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ShortV, r"names layers of 32, and this language model has 4: .* for example .*\[0, 2, 3\]"),
        (ViCA, r"names layers of 32, and this language model has 4: .* for example .*\[0, 1, 2\]"),
        (lambda: ViCA(layers=[1, 4]), r"ViCA cannot read in layers \[4\]: the language model has 0 to 3"),
        (lambda: ShortV(layers=[-1]), r"ShortV cannot read in layers \[-1\]"),
    ],
)
def test_what_cannot_be_is_refused(build, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        build(make())


@pytest.mark.parametrize("way", ["nothing", "flat", "lookup"])
def test_a_family_that_caches_otherwise_is_refused(build, monkeypatch: pytest.MonkeyPatch, way: str) -> None:  # type: ignore[no-untyped-def]
    """Whatever the layers do instead: never silently."""
    language = build(ConcatFusion()).language
    attention = type(language.layers[0].self_attn)
    forward = attention.forward

    class Flat:
        def __init__(self, cache: Any) -> None:
            self.cache = cache

        def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, ...]:
            flat = self.cache.update(keys.transpose(1, 2).flatten(2), values.transpose(1, 2).flatten(2), layer)
            return tuple(part.unflatten(2, (2, -1)).transpose(1, 2) for part in flat)

    def other(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if way == "lookup" and self.layer_idx == 1:
            past_key_values.get_seq_length()
        instead = {"nothing": None, "flat": Flat(past_key_values)}.get(way, past_key_values)
        cache = instead if self.layer_idx == 1 else past_key_values
        return forward(self, *args, past_key_values=cache, **kwargs)

    monkeypatch.setattr(attention, "forward", other)
    with pytest.raises(UserError, match=r"hands them to its cache, which layers \[1\] of .*Qwen2.* do otherwise"):
        build(ViCA(layers=[0, 1]))
    build(Modes("text", "text", "whole", "whole"))


def test_flash_attention_reads_nothing(build, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """It lines queries up with the last keys, whichever columns they have."""
    monkeypatch.setattr(AttentionKind, "of", lambda kernel, config: AttentionKind("flash_attention_2", (None,) * 4))
    with pytest.raises(UserError, match=r"ViCA .* set language.attention=sdpa"):
        build(ViCA(layers=[0]))
    build(Modes("text", "text", "whole", "whole"))
