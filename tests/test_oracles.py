"""What every fusion must hold, whatever it computes (the oracles of LaVi and of concatenation)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ask, assert_same, awaken, collate, likeliest, small, summed_loss
from families import VARIED
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from lavi.batch import Batch, Sample
from lavi.checkpoints.trained_weights import load_trained, saved_tensors
from lavi.checkpoints.weight_files import write_state
from lavi.fusion.arrangement import last_prompt_columns
from lavi.fusion.base import Fusion
from lavi.fusion.casa import CASA
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.deepstack import DeepStackFusion
from lavi.fusion.late_injection import LateInjection
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.pruning import FastV, PruningFusion, PyramidDrop
from lavi.fusion.shortv import ShortV
from lavi.fusion.vica import ViCA
from lavi.language.surgery import close, modulated
from lavi.model import VisionLanguageModel
from lavi.nn.visibility import Visibility
from lavi.training.module import VisionLanguageModule
from lavi.visor.fusion import VisorFusion
from lavi.visor.readers import ModulationReader


def lavi_of(kind: str) -> LaViFusion:
    return LaViFusion(every=2, generator=small(kind))


FUSIONS = {
    **{f"lavi-{kind}": partial(lavi_of, kind) for kind in ("attention", "mlp", "conv", "pooled")},
    "lavi-attention-norm": lambda: LaViFusion(every=1, targets=["attention"], generator=small()),
    "lavi-ffn-norm": lambda: LaViFusion(every=2, targets=["ffn"], generator=small()),
    "lavi-final-norm": lambda: LaViFusion(targets=["final"], generator=small()),
    "lavi-all-norms": lambda: LaViFusion(fraction=0.5, targets=["attention", "ffn", "final"], per_target=True),
    "lavi-scale": lambda: LaViFusion(every=2, parameters="scale", generator=small()),
    "lavi-shift": lambda: LaViFusion(every=2, parameters="shift", generator=small()),
    "lavi-levels": lambda: LaViFusion(every=2, levels=2, generator=small()),  # 24 channels as two levels of 12
    "cross-attention": lambda: CrossAttentionFusion(every=2),
    "cross-attention-alone": lambda: CrossAttentionFusion(layers=[0, 3], ffn=0, heads=2),
    "casa": lambda: CASA(every=2),
    "visor": lambda: VisorFusion(cross_attention=2, self_attention=1),
    "visor-cross": lambda: VisorFusion(cross_attention=2, self_attention=0),
    "visor-self": lambda: VisorFusion(cross_attention=0, self_attention=[1, 2]),
    "visor-modulation": lambda: VisorFusion(cross_attention=[2, 3], self_attention=[0], reader=ModulationReader()),
    "visor-routed": lambda: VisorFusion(
        cross_attention=[0, 2], self_attention=[1, 3], configurations=[[], [1], [3], [1, 3]], router="token"
    ),
    "fastv": lambda: FastV(layer=1, keep=0.5),
    "pyramid-drop": lambda: PyramidDrop(keep=0.6),
    "deepstack": lambda: DeepStackFusion(levels=3),  # 24 channels as three levels of 8
    "late-injection": lambda: LateInjection(first=1, last=2, stages={1: 0.5}),
    "shortv": lambda: ShortV(layers=[0, 2]),
    "vica": lambda: ViCA(layers=[0, 2]),
    "concat": ConcatFusion,
}
KINDS = ("weight", "bias")
IN_TURN = ["concat", "cross-attention", "visor", "fastv"]
"""With LaVi, tried on each family that differs from the others; on those that differ little, one of them in turn."""
VISUAL_LAYERS = ["late-injection", "shortv", "vica"]
# What makes the deltas does not know the family, so the other generators are tried on the kinds of families alone.
SOME = ("olmo2", "gemma3_text", "gpt2", "phi")
CASES = [("qwen2", name) for name in FUSIONS]
CASES += [(family, "lavi-attention") for family in FAMILIES if family != "qwen2"]
CASES += [(family, name) for family in VARIED if family != "qwen2" for name in IN_TURN]
# ViCA and ShortV stand on one mechanism, which tests/test_visual_layers.py tries on every family.
CASES += [(family, VISUAL_LAYERS[i % 3]) for i, family in enumerate(f for f in VARIED if f != "qwen2")]
CASES += [(family, IN_TURN[i % 4]) for i, family in enumerate(f for f in FAMILIES if f not in VARIED)]
CASES += [(family, f"lavi-{kind}") for family in SOME for kind in ("mlp", "conv", "pooled")]
CASES += [(family, name) for family in SOME for name in ("visor-routed", "visor-modulation", "pyramid-drop", "casa")]
CASES += [(family, "deepstack") for family in SOME]
# For models that are trained or answer by beams: LaVi on each family, on those that differ also a fusion with visual
# tokens in some layers, and each fusion on the kinds of families.
ONCE = [case for case in CASES if case[1] in ("lavi-attention", *VISUAL_LAYERS) or case[0] in ("qwen2", *SOME)]
BESIDE = [case for case in CASES if case[1].startswith(("lavi", "cross", "casa"))]
"""The fusions that leave the sequence as it is."""


def name_of(case: tuple[str, str]) -> str:
    return "-".join(case)


@pytest.fixture(params=ONCE, ids=name_of)
def fresh(build, request: pytest.FixtureRequest) -> VisionLanguageModel:  # type: ignore[no-untyped-def]
    """A fusion on a family, as training starts."""
    family, name = request.param
    return build(FUSIONS[name](), family=family)


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def model(build, request: pytest.FixtureRequest) -> Iterator[VisionLanguageModel]:  # type: ignore[no-untyped-def]
    """The same away from the zero start: one for all tests, which leave it as it is."""
    family, name = request.param
    made = build(FUSIONS[name](), family=family)
    awaken(made.fusion)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    yield made
    assert not made.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


SAMPLES = [
    ask(1, "what colour is the circle?", answer="red", key="a"),
    ask("hello", 2, "which image has the red circle?", 3, answer="first", key="b"),
    ask("is there a blue square?", answer="yes", key="c"),
]


def bare_logits(model, batch: Batch) -> Tensor:  # type: ignore[no-untyped-def]
    """What the language model says to the text alone."""
    positions = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return model.language.hf(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions
    ).logits


def row(logits: Tensor, batch: Batch, index: int) -> Tensor:
    start, stop = batch.spans[index]
    return logits[index, start:stop]


def assert_rows_are(said: Tensor, expected: Tensor, batch: Batch) -> None:
    """Logits of two models, row by row, without padding: the same to rounding."""
    for index in range(len(batch)):
        torch.testing.assert_close(row(said, batch, index), row(expected, batch, index), atol=1e-5, rtol=1e-4)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest logit: families scale their logits differently."""
    return float((a - b).abs().amax() / a.abs().amax())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", BESIDE, ids=name_of)
def test_the_start_is_the_language_model_bit_for_bit(build, case: tuple[str, str], dtype: str) -> None:
    model = build(FUSIONS[case[1]](), family=case[0], dtype=dtype)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        assert torch.equal(model(batch), bare_logits(model, batch))


def test_without_an_image_the_language_model_answers(model: VisionLanguageModel) -> None:
    batch = collate(model, SAMPLES).without_images()
    with torch.no_grad():
        model.fusion.route_counts.clear()
        alone, bare = model(batch), bare_logits(model, batch)
        exact = len(model.fusion.route_counts) < 2  # rows that are run in groups round in another order
        for index in range(len(SAMPLES)):
            said, expected = row(alone, batch, index), row(bare, batch, index)
            assert torch.equal(said, expected) if exact else torch.allclose(said, expected, atol=1e-5)
        mixed = model(collate(model, SAMPLES))  # a row without an image, beside rows with one
        torch.testing.assert_close(row(mixed, batch, 2), row(bare, batch, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", BESIDE, ids=name_of)
def test_a_row_without_an_image_is_untouched_bit_for_bit(build, case: tuple[str, str]) -> None:
    model = build(FUSIONS[case[1]](), family=case[0])
    awaken(model.fusion)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        said, bare = model(batch)[2], bare_logits(model, batch)[2]
    assert_same(model, said, bare)


def test_later_tokens_change_no_earlier_logits(model: VisionLanguageModel) -> None:
    batch = collate(model, SAMPLES[:2])
    # What is chosen by the question may depend on all of it, and on nothing that is answered.
    whole = isinstance(model.fusion, PruningFusion) or getattr(model.fusion, "router", None) is not None
    first = max(last_prompt_columns(batch)) + 1 if whole else 8
    changed = copy.deepcopy(batch)
    changed.input_ids[:, first:] = (changed.input_ids[:, first:] + 7) % 300
    with torch.no_grad():
        before, after = model(batch), model(changed)
    torch.testing.assert_close(before[:, :first], after[:, :first], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before[:, first:], after[:, first:], atol=1e-3)


def test_an_image_changes_what_follows_it_and_nothing_before(model: VisionLanguageModel) -> None:
    one, other = (collate(model, [ask("hello there", seed, "what colour?", answer="red")]) for seed in (1, 2))
    column = one.image_slots[0].column
    with torch.no_grad():
        a, b = model(one), model(other)
    torch.testing.assert_close(a[:, :column], b[:, :column], atol=1e-6, rtol=1e-5)
    assert apart(a[:, column:], b[:, column:]) > 1e-3


def test_the_order_of_two_images_matters(model: VisionLanguageModel) -> None:
    first, swapped = (
        collate(model, [ask(*pair, "which image has the red circle?", answer="first")]) for pair in ((1, 2), (2, 1))
    )
    with torch.no_grad():
        assert apart(model(first), model(swapped)) > 1e-4


@pytest.mark.parametrize("fusion", [LaViFusion, CrossAttentionFusion, CASA])
def test_it_matters_where_in_the_image_a_token_lies(build, fusion: type[Fusion]) -> None:
    """Attention alone tells no order of its tokens; the code does, and without a grid there is none."""
    for told in (True, False):
        model = build(fusion(every=2, grid_code=told))  # type: ignore[call-arg]
        awaken(model.fusion)
        batch = collate(model, SAMPLES)
        features = model.features(batch.pixels)
        turned = features.flip(1)
        with torch.no_grad():
            logits = [model.language(model.fusion(batch, f, model.language)) for f in (features, turned)]
        assert (apart(*logits) > 1e-3) == told


def assert_rows_answer_alone(model: VisionLanguageModel) -> None:
    """A batch, padded on either side, answers as its rows one by one."""
    with torch.no_grad():
        alone = [model(collate(model, [sample]))[0] for sample in SAMPLES]
        for pad_left in (False, True):
            batch = collate(model, SAMPLES, pad_left=pad_left)
            together = model(batch)
            for index, expected in enumerate(alone):
                torch.testing.assert_close(row(together, batch, index), expected, atol=2e-5, rtol=1e-4)


def assert_cached_is_full(model: VisionLanguageModel) -> None:
    """Greedy answers with a cache are those of a full forward."""
    prompts = [
        ask(1, "what colour is the circle?"),
        ask("hello", 2, "which image has the red circle?", 3),
        ask("hello"),
    ]
    batch = collate(model, prompts, prompt=True, pad_left=True)
    answers = model.generate(batch, max_new_tokens=6, eos_token_id=None, do_sample=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 6
        assert answer == likeliest(model, prompt, answer)


def test_a_batch_answers_as_its_rows_alone(model: VisionLanguageModel) -> None:
    assert_rows_answer_alone(model)


def test_cached_decoding_equals_the_full_forward(model: VisionLanguageModel) -> None:
    assert_cached_is_full(model)


def test_beams_see_their_own_row(fresh: VisionLanguageModel) -> None:
    model = fresh
    awaken(model.fusion)
    prompts = [ask(1, "what colour is the circle?"), ask(2, "what colour is the circle?"), ask("hello")]

    def beams(*prompts: Sample, cached: bool) -> list[list[int]]:
        batch = collate(model, list(prompts), prompt=True, pad_left=True)
        return model.generate(batch, max_new_tokens=4, num_beams=3, use_cache=cached)

    together = beams(*prompts, cached=True)
    assert together == beams(*prompts, cached=False)
    assert together == [beams(prompt, cached=True)[0] for prompt in prompts]


@pytest.mark.parametrize("name", [name for name in FUSIONS if name.startswith(("lavi", "cross"))])
def test_each_beam_keeps_what_its_row_saw(build, name: str) -> None:
    model = build(FUSIONS[name]())
    awaken(model.fusion)
    batch = collate(model, SAMPLES, pad_left=True)
    with torch.no_grad():
        context = model.fusion(batch, model.features(batch.pixels), model.language).vision
    beams = context.for_generation(3)
    row_of_beam = torch.arange(3 * len(SAMPLES)) // 3  # transformers lays the beams of a row side by side
    for generator, slots in context.visual.items():
        assert torch.equal(beams.visual[generator], slots[row_of_beam])
    assert torch.equal(beams.column, context.column[row_of_beam])


def test_checkpointed_gradients_are_the_gradients(fresh: VisionLanguageModel) -> None:
    """Of two forwards before one backward: nothing of a call may live on a shared object."""
    fresh.train()
    awaken(fresh.fusion)
    batches = [collate(fresh, SAMPLES[:2]), collate(fresh, SAMPLES[1:])]

    def gradients() -> dict[str, Tensor]:
        fresh.zero_grad(set_to_none=True)
        losses = [summed_loss(fresh(batch), batch.labels)[0] for batch in batches]
        torch.stack(losses).sum().backward()
        return {name: p.grad.clone() for name, p in fresh.named_parameters() if p.grad is not None}

    plain = gradients()
    fresh.language.hf.gradient_checkpointing_enable({"use_reentrant": False})
    assert any(getattr(m, "gradient_checkpointing", False) for m in fresh.language.layers)
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-4)


SLOPES = ["lavi-all-norms", "cross-attention", "casa", "visor-modulation", "visor", *VISUAL_LAYERS, "concat"]


@pytest.mark.parametrize("name", SLOPES)
def test_the_gradient_is_the_slope_of_the_loss(build, name: str) -> None:
    """Along a direction in all parameters: nothing that the loss depends on is cut off from it."""
    model = build(FUSIONS[name]()).train()
    awaken(model.fusion)
    batch = collate(model, SAMPLES)
    parameters = [p for part in (model.language, model.fusion) for p in part.parameters()]

    def loss() -> Tensor:
        return summed_loss(model(batch), batch.labels)[0]

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        step = [1e-4 * torch.randn(p.shape, generator=draw) for p in parameters]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, step, strict=True) if g is not None)
        with torch.no_grad():
            sides = []
            for sign in (1, -2):
                torch._foreach_add_(parameters, step, alpha=sign)
                sides.append(float(loss()))
            torch._foreach_add_(parameters, step)
        assert sides[0] - sides[1] == pytest.approx(2 * slope, rel=0.03, abs=1e-3)


def test_deltas_come_norm_by_norm_the_scale_first(build) -> None:
    """As one generator gives them, and as each norm's own does."""
    hidden, seen = torch.randn(1, 2, 32), Visibility.by(torch.ones(1, 2, 1, dtype=torch.bool))
    for parameters, each in (("both", 2), ("scale", 1), ("shift", 1)):
        for per_target in (False, True):
            fusion = build(
                LaViFusion(
                    every=4, parameters=parameters, per_target=per_target, generator=small("pooled", bottleneck=64)
                )
            ).fusion
            assert list(fusion.generators) == (["3-0", "3-1"] if per_target else ["3"])
            for number, generator in enumerate(fusion.generators.values()):
                values = torch.arange(generator.outputs) + number * generator.outputs
                with torch.no_grad():
                    generator.deltas.bias.copy_(values.repeat_interleave(32))
            visual = {key: torch.zeros(1, 1, 64) for key in fusion.generators}
            result = fusion.plan.deltas(3, hidden, visual, seen)
            assert len(result) == len(fusion.plan.norms[3]) == 2
            numbers = [None if part is None else float(part.unique()) for pair in result for part in pair]
            expected = {"both": [0, 1, 2, 3], "scale": [0, None, 1, None], "shift": [None, 0, None, 1]}[parameters]
            assert numbers == expected
            assert sum(generator.outputs for generator in fusion.generators.values()) == 2 * each


def test_the_final_norm_s_deltas_depend_on_what_it_gets(build) -> None:
    """And their gradients with them."""
    model = build(LaViFusion(targets=["final"]))
    awaken(model.fusion)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        context = model.fusion(batch, model.features(batch.pixels), model.language).vision.for_step(
            0, batch.input_ids.shape[1]
        )
    norm = model.language.hf.model.norm
    hidden = torch.randn(*batch.input_ids.shape, model.language.width, requires_grad=True)
    with context.during_stack():
        result = norm(hidden)
    (deltas,) = model.fusion.plan.deltas(4, hidden, context.visual, context.seen)
    with modulated([norm], [deltas]):
        expected = norm(hidden)
    assert not torch.equal(expected, norm(hidden))
    torch.testing.assert_close(result, expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), hidden, retain_graph=True)[0] for out in (result, expected))
    torch.testing.assert_close(ours, theirs)


def test_one_step_makes_a_wrong_image_matter(fresh: VisionLanguageModel) -> None:
    fresh.train()
    batch = collate(fresh, SAMPLES[:1])
    optimizer = torch.optim.SGD(fresh.fusion.parameters(), lr=1.0)
    summed_loss(fresh(batch), batch.labels)[0].backward()
    optimizer.step()
    wrong = collate(fresh, [ask(9, "what colour is the circle?", answer="red")])
    with torch.no_grad():
        assert apart(fresh(batch), fresh(wrong)) > 1e-5


def test_every_parameter_is_in_every_graph(fresh: VisionLanguageModel) -> None:
    """A rank whose batch has no image must not hang the others."""
    fresh.train()
    awaken(fresh.fusion)
    batch = collate(fresh, SAMPLES[2:])
    added: dict[str, Tensor] = {}
    loss = summed_loss(fresh(batch, added), batch.labels)[0]
    torch.stack([loss, *added.values()]).sum().backward()
    missing = [name for name, p in fresh.fusion.named_parameters() if p.grad is None]
    assert not missing


LOOKS = {  # what each generator has beside the norm of V and the projection to deltas
    "attention": {"text_norm.weight", "query.weight", "key_value.weight"},
    "pooled": {"down.weight", "down.bias"},
    "mlp": {"down.weight", "down.bias", "text_norm.weight", "query.weight"}
    | {f"{axis}.0.{part}.{kind}" for axis in ("over_tokens", "over_channels") for part in "013" for kind in KINDS},
    "conv": {"down.weight", "down.bias", "text_norm.weight", "query.weight"}
    | {f"{kind_of}.0.{kind}" for kind_of in ("depthwise", "pointwise") for kind in KINDS},
}


# What is saved are the fusion's own parameters: names that no family changes.
@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ("qwen2", *SOME)], ids=name_of)
def test_saved_and_loaded_it_says_the_same(build, case: tuple[str, str], tmp_path: Path) -> None:
    """Of exactly the weights that were trained: their names are what old checkpoints hold."""
    family, name = case
    model = build(FUSIONS[name](), family=family)
    awaken(model.fusion)
    module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3})
    kept = {key: tensor for key, tensor in module.state_dict().items() if key in saved_tensors(module)}
    if (kind := name.removeprefix("lavi-")) in LOOKS:
        own = {"vision_norm.weight", "vision_norm.bias", "deltas.weight", "deltas.bias"} | LOOKS[kind]
        expected = {f"model.fusion.generators.{layer}.{key}" for layer in (1, 3) for key in own}
        expected |= {f"model.fusion.view_embedding.{table}.weight" for table in ("image", "row", "column", "frame")}
        expected |= {"model.fusion.grid_code.amplitude"}
        assert set(kept) == expected
    elif name == "concat":
        assert set(kept) == {f"model.fusion.projector.layers.{layer}.{key}" for layer in (0, 2) for key in KINDS}
    write_state(kept, tmp_path / "trained.safetensors")
    other = VisionLanguageModule(build(FUSIONS[name](), family=family), learning_rate={"fusion": 1e-3})
    load_trained(other, tmp_path / "trained.safetensors")
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        assert torch.equal(other.eval().model(batch), module.eval().model(batch))


def test_closing_gives_the_language_model_back(fresh: VisionLanguageModel) -> None:
    opened = fresh.language.hf
    plain = AutoModelForCausalLM.from_config(opened.config)
    assert list(opened.state_dict()) == list(plain.state_dict())
    opened.load_state_dict(plain.state_dict())  # the original checkpoint still loads
    close(opened)
    assert [type(m) for m in opened.modules()] == [type(m) for m in plain.modules()]


def test_reentrant_free_checkpointing_of_the_whole_model(fresh: VisionLanguageModel) -> None:
    fresh.train()
    awaken(fresh.fusion)
    batch = collate(fresh, SAMPLES)
    direct = fresh(batch)
    torch.testing.assert_close(checkpoint(fresh, batch, use_reentrant=False), direct)
