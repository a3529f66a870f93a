"""What people get wrong: the command line, the exit status, and what the one sentence says.

Each is run as it stands here, in a folder that holds ``tiny.yaml``, a recipe that is right. FIT is
``lavi.fit --recipe tiny.yaml --run out``. Nothing is trained, and what the recipe alone can show is said before a model
is built.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QWEN2, refused

from lavi.errors import UserError
from lavi.language.load import LanguageModel

FIT = "lavi.fit --recipe tiny.yaml --run out "
CONCAT = "model.fusion='{_target_: lavi.fusion.concat.ConcatFusion%s}'"
CONFIG = "model.language.config."

OPTIONS = [
    ("lavi.fit", 2, "one of the arguments --recipe --resume is required"),
    ("lavi.fit --recipe", 2, "--recipe: expected one argument"),
    ("lavi.fit --recipe tiny.yaml --resume out", 2, "not allowed with"),
    ("lavi.fit --resume out --run other", 2, "--run names a new folder"),
    ("lavi.fit --recipe gone.yaml", 2, "there is no recipe gone.yaml"),
    ("lavi.fit --recipe '~no-such-user/x.yaml'", 2, "there is no recipe ~no-such-user/x.yaml"),
    ("lavi.fit --recipe tinny.yaml", 2, "did you mean 'tiny.yaml'?"),
    ("lavi.fit --recipe .", 2, ". is a folder, no recipe: known: tiny.yaml"),
    ("lavi.fit --resume gone", 2, "gone has no last.ckpt"),
    (FIT + "--save-every 0", 2, "--save-every: a whole number from 1, not '0'"),
    (FIT + "--save-every -5", 2, "--save-every: a whole number from 1, not '-5'"),
    (FIT + "--save-every often", 2, "--save-every: a whole number from 1, not 'often'"),
    (FIT + "--max-steps 5", 2, "unrecognized arguments: --max-steps"),
    (FIT + "tiny", 2, "'tiny' is no override: write key=value"),
    ("lavi.evaluate", 2, "--checkpoint"),
    ("lavi.evaluate --checkpoint data.test=x", 2, "--checkpoint needs a run folder"),
    ("lavi.evaluate --checkpoint gone", 2, "gone is not a run folder"),
    ("lavi.evaluate --checkpoint gone --limit 0", 2, "--limit: a whole number from 1, not '0'"),
    ("lavi.evaluate --checkpoint gone --limit -1", 2, "--limit: a whole number from 1, not '-1'"),
    ("lavi.evaluate --checkpoint gone --device nonsense", 2, "the device 'nonsense' cannot be used here"),
    ("lavi.evaluate --checkpoint gone --device meta", 2, "the device 'meta' cannot be used here"),
    ("lavi.evaluate --checkpoint gone --device ''", 2, "the device '' cannot be used here"),
    ("lavi.evaluate --checkpoint ''", 2, "a path cannot be empty"),
    ("lavi.profile --recipe tiny.yaml --show targets --measure", 2, "--show counts nothing: leave out --measure"),
    ("datamodules.pack --json gone.json --images . --columns image=x --out o", 2, "--columns are those of a --csv"),
    ("lavi.evaluate --checkpoint gone --out ''", 2, "--out: a path cannot be empty"),
    ("lavi.evaluate --checkpoint gone --noise 0.1 2", 2, "--noise takes deviations above 0 and at most 1, not 0.1 2"),
    ("lavi.evaluate --checkpoint gone --noise loud", 2, "--noise takes deviations above 0 and at most 1, not loud"),
    ("lavi.evaluate --checkpoint gone --tasks gqa --noise 0.1", 2, "--noise goes with a run's own test split"),
    ("lavi.evaluate --checkpoint gone --tasks gqa --text x.txt", 2, "--text goes with a run's own test split"),
    (
        "lavi.evaluate --checkpoint gone --tasks gqa --max-new-tokens 9",
        2,
        "--max-new-tokens goes with a run's own test",
    ),
    ("lavi.evaluate --checkpoint gone --processes 2", 2, "--processes goes with --tasks"),
    ("lavi.evaluate --checkpoint gone --again", 2, "--again goes with --tasks"),
    ("lavi.evaluate --checkpoint gone --no-timing", 2, "--no-timing goes with --tasks"),
    ("lavi.generate --checkpoint gone --question what?", 2, "gone holds no model, it has no recipe.yaml"),
    ("lavi.generate --checkpoint gone", 2, "gone holds no model, it has no recipe.yaml"),
    ("lavi.evaluate --checkpoint gone --text gone.txt", 2, "the texts gone.txt cannot be read"),
    ("lavi.parts", 2, "the following arguments are required: action"),
    ("lavi.parts fetsch", 2, "invalid choice: 'fetsch'"),
    ("lavi.parts fetch smollm2", 2, "no part is called 'smollm2': did you mean 'smollm2-135m-instruct'?"),
    ("datamodules.photographs --source gone", 2, "train-images-idx3-ubyte cannot be read"),
    ("datamodules.photographs --turns 2", 2, "unrecognized arguments: --turns"),
    ("datamodules.photographs --test 0", 2, "--test: a whole number from 1, not '0'"),
    ("datamodules.scenes --turns 0", 2, "--turns: a whole number from 1, not '0'"),
    ("datamodules.pack --csv gone --out out --per-shard 0", 2, "--per-shard: a whole number from 1, not '0'"),
    ("decode --turns 0", 2, "--turns: a whole number from 1, not '0'"),
    ("serving --requests -1", 2, "--requests: a whole number from 1, not '-1'"),
    ("dataloader --rounds x", 2, "--rounds: a whole number from 1, not 'x'"),
    ("fusion_cost --runs 0", 2, "--runs: a whole number from 1, not '0'"),
    ("lavi.generate --checkpoint gone --question ''", 2, "--question is empty"),
    ("lavi.generate --checkpoint gone --web --question what?", 2, "--web is a chat: leave out --question"),
    ("lavi.generate --checkpoint gone --question what? --beams 0", 2, "--beams: a whole number from 1, not '0'"),
    ("lavi.generate --checkpoint gone --question what? --frames 0", 2, "--frames: a whole number from 1, not '0'"),
    (
        "lavi.generate --checkpoint gone --question what? --max-new-tokens 0",
        2,
        "--max-new-tokens: a whole number from 1",
    ),
    ("lavi.generate --checkpoint gone --question what? --device cpux", 2, "the device 'cpux' cannot be used here"),
    ("lavi.generate --checkpoint gone --question what? data.test=x", 2, "unrecognized arguments: data.test=x"),
    ("lavi.profile --recipe tiny.yaml --text 0", 2, "--text: a whole number from 1, not '0'"),
    ("lavi.profile --recipe tiny.yaml --runs 0", 2, "--runs: a whole number from 1, not '0'"),
    ("lavi.profile --recipe tiny.yaml --runs 3", 2, "--runs are those of --measure: leave it out"),
    ("lavi.profile --recipe tiny.yaml --at image=64x64", 2, "--at is for sweeps of another knob"),
    ("lavi.profile --recipe tiny.yaml --sweep rows=1,2", 2, "there is no knob 'rows'"),
    ("lavi.profile --recipe tiny.yaml --show norms", 2, "--show: invalid choice"),
    ("lavi.visor search --checkpoint gone --out x.json", 2, "gone is not a run folder"),
    ("lavi.visor search --checkpoint gone --out x.json --samples 0", 2, "--samples: a whole number from 1, not '0'"),
    ("lavi.visor search --checkpoint gone --out x.json --most 1", 2, "--most: a whole number from 2, not '1'"),
    ("lavi.visor search --checkpoint gone --out x.json --keep 0", 2, "--keep: a share above 0 and at most 1, not '0'"),
    ("lavi.visor search --checkpoint gone --out x.json --keep nan", 2, "--keep: a share above 0 and at most 1"),
    ("lavi.visor search --checkpoint gone --out x.json --device gpu", 2, "the device 'gpu' cannot be used here"),
    ("lavi.visor label --checkpoint gone --configurations c.json --out x", 2, "there is no file c.json"),
    ("lavi.visor find --checkpoint gone", 2, "invalid choice: 'find'"),
    ("lavi.export --checkpoint gone --out exported", 2, "gone is not a run folder"),
]

OVERRIDES = [
    ("model.fusion.evry=2", 2, "command line: 'model.fusion.evry' is unknown", "did you mean 'every'?"),
    ("model.fusion='{every: 2}'", 2, "name the _target_ there, or change one argument, as in model.fusion.every=..."),
    ("model='{fusion: null}'", 2, "without _target_"),
    ("trainer.max_steps", 2, "write key=value"),
    ("trainer.max_steps=", 2, "'trainer.max_steps=' has no value: write trainer.max_steps=null"),
    ("trainer.max_steps==5", 2, "two equals signs"),
    ("'trainer. max_steps=5'", 2, "write key=value"),
    ("seed=1 seed=2", 2, "'seed' is given twice, as 1 and as 2"),
    ("seed.x=1", 2, "'seed' is 0, and nothing is inside that"),
    ("model.fusion.layers='[1, 2'", 2, "not readable as YAML"),
    ("name='[INST] what?'", 2, "stands in quotes"),
    ("name='\"run\" # 3'", 2, "'#' begins a comment"),
    (
        "module.learning_rate='{fusion: 1e-3, fusion: 1e-4}'",
        2,
        "'module.learning_rate.fusion' stands in line 1 already",
    ),
    ("module.learning_rate='{no: 1e-3}'", 2, "'module.learning_rate' must be dict[str, float | None]"),
    ("model.fusion._target_=lavi.fusion.lavy.LaViFusion", 2, "did you mean 'lavi.fusion.lavi.LaViFusion'?"),
    ("model.fusion._target_=lavi.fusion..lavi", 2, "must be a dotted path to a class"),
    ("model.fusion._target_=lavi.fusion.base.Fusion", 2, "is only a contract"),
    ("model.fusion._target_=lavi.visor.positions.KERNEL", 2, "it is no class"),
    ("extends=other.yaml", 2, "a recipe has no section 'extends'"),
]

SECTIONS = [
    ("name=42", 2, "'name' must be str, not 42: in quotes it is a text"),
    ("name=null", 2, "'name' must be str, not None"),
    ("name=a/b", 2, "'a/b' is no name of a folder", "--run FOLDER"),
    ("name=../x", 2, "'../x' is no name of a folder"),
    ("name=..", 2, "'..' is no name of a folder"),
    ("name='\" \"'", 2, "is no name of a folder"),
    ("seed=abc", 2, "'seed' must be int, not 'abc'"),
    ("seed=null", 2, "'seed' must be int, not None"),
    ("seed=-1", 2, "'seed' must be a whole number from 0"),
    ("seed=010", 2, "'seed' must be int, not '010'"),
    ("seed=1.5", 2, "'seed' must be int, not 1.5"),
    ("model=null", 2, "section 'model' must name a component"),
    ("data='[a]'", 2, "section 'data' must name a component"),
    ("trainer=null", 2, "'trainer' is a mapping"),
    ("trainer='[a]'", 2, "'trainer' is a mapping"),
    ("callbacks='[a]'", 2, "'callbacks' is a mapping of names"),
    ("callbacks.rate=5", 2, "'callbacks.rate' must name a component by _target_, or be null"),
    ("callbacks.rate='{logging_interval: step}'", 2, "'callbacks.rate' must name a component"),
]

TRAINER = [
    ("trainer.accelerator=cud", 2, "refuses what 'trainer' gives it", "'cud'"),
    ("trainer.devices='[0]'", 2, "refuses what 'trainer' gives it", "`devices`"),
    ("trainer.devices=0", 2, "Trainer(devices=0)"),
    ("trainer.strategy=nonsense", 2, "invalid strategy name: `strategy='nonsense'`"),
    ("trainer.strategy=fsdp", 2, "requires a GPU accelerator"),
    ("trainer.precision=nonsense", 2, "'trainer.precision' must be"),
    ("trainer.max_time=long", 2, "`Timer(duration='long')` is not a valid duration"),
    ("trainer.profiler=x", 2, "`profiler`"),
    ("trainer.max_steps=0", 2, "'trainer.max_steps' must be a whole number from 1, or -1, not 0"),
    ("trainer.max_steps=1e3", 2, "'trainer.max_steps' must be int, not 1000.0"),
    ("trainer.max_epochs=0", 2, "'trainer.max_epochs' must be a whole number from 1, or -1, not 0"),
    ("trainer.accumulate_grad_batches=0", 2, "'trainer.accumulate_grad_batches' must be a whole number from 1"),
    ("trainer.gradient_clip_val=-1", 2, "'trainer.gradient_clip_val' must be a number from 0"),
    ("trainer.gradient_clip_val=.nan", 2, "'trainer.gradient_clip_val' must be a number from 0, not nan"),
    ("trainer.limit_train_batches=0", 2, "'trainer.limit_train_batches' must be a number above 0"),
    ("trainer.limit_train_batches=0.5", 2, "share of an epoch", "a whole number of batches"),
    ("trainer.limit_val_batches=0.5", 2, "share of an epoch"),
    ("trainer.overfit_batches=0.5", 2, "share of an epoch"),
    ("trainer.val_check_interval=0.25", 2, "share of an epoch"),
    ("trainer.val_check_interval=0", 2, "'trainer.val_check_interval' must be a number above 0"),
    ("trainer.check_val_every_n_epoch=0", 2, "'trainer.check_val_every_n_epoch' must be a whole number from 1"),
    ("trainer.logger=true", 2, "is set by the program"),
    ("trainer.max_step=3", 2, "did you mean 'max_steps'?"),
]

NUMBERS = [
    ("data.batch_size=0", 2, "'data.batch_size' must be a whole number from 1, not 0"),
    ("data.batch_size=-1", 2, "'data.batch_size' must be a whole number from 1, not -1"),
    ("data.batch_size=2.5", 2, "'data.batch_size' must be int, not 2.5"),
    ("data.batch_size=yes", 2, "'data.batch_size' must be int, not True"),
    ("data.workers=-1", 2, "'data.workers' must be a whole number from 0, not -1"),
    ("data.shuffle=-1", 2, "'data.shuffle' must be a whole number from 0, not -1"),
    ("data.bucket=0", 2, "'data.bucket' must be a whole number from 1, not 0"),
    ("data.packing=0", 2, "'data.packing' must be a whole number from 1, not 0"),
    ("data.validation_samples=-1", 2, "'data.validation_samples' must be a whole number from 1, not -1"),
    ("data.max_skipped=-1", 2, "'data.max_skipped' must be a number from 0 to 1, not -1"),
    ("data.max_skipped=.nan", 2, "'data.max_skipped' must be a number from 0 to 1, not nan"),
    (
        "data.train='{_target_: datamodules.mixture.Mixture, sources: {a: x}, weights: {a: 0}}'",
        2,
        "weights.a' must be a number",
    ),
    ("model.fusion.every=0", 2, "'model.fusion.every' must be a whole number from 1, not 0"),
    (
        "model.fusion.generator.bottleneck=0",
        2,
        "'model.fusion.generator.bottleneck' must be a whole number from 1, not 0",
    ),
    ("model.fusion.generator.heads=0", 2, "'model.fusion.generator.heads' must be a whole number from 1, not 0"),
    ("model.fusion.max_images=0", 2, "'model.fusion.max_images' must be a whole number from 1, not 0"),
    ("model.fusion.fraction=0", 2, "'model.fusion.fraction' must be a number above 0 and at most 1, not 0"),
    (CONCAT % ", budget: 0", 2, "'model.fusion.budget' must be a whole number from 1, not 0"),
    (
        "model.fusion='{_target_: lavi.fusion.pruning.FastV, keep: 0}'",
        2,
        "'model.fusion.keep' must be a number above 0",
    ),
    (
        "model.reducer='{_target_: lavi.reduction.pooling.AveragePooling, factor: 0}'",
        2,
        "'model.reducer.factor' must be",
    ),
    ("model.chat_template=vicunna", 2, "no chat template is called 'vicunna': did you mean 'vicuna'?"),
    ("model.context_length=0", 2, "'model.context_length' must be a whole number from 1, not 0"),
    ("module.learning_rate.fusion=-1", 2, "'module.learning_rate.fusion' must be a number from 0, not -1"),
    ("module.learning_rate.fusion=.nan", 2, "'module.learning_rate.fusion' must be a number from 0, not nan"),
    ("module.learning_rate.fusion=.inf", 2, "'module.learning_rate.fusion' must be a number from 0, not inf"),
    ("module.learning_rate.fusion=fast", 2, "'module.learning_rate' must be dict[str, float | None]"),
    ("module.learning_rate=1e-3", 2, "'module.learning_rate' must be dict[str, float | None], not 0.001"),
    ("module.weight_decay=-0.1", 2, "'module.weight_decay' must be a number from 0, not -0.1"),
    ("module.warmup=2", 2, "'module.warmup' must be a number from 0 to 1, not 2"),
    ("module.muon=0", 2, "'module.muon' must be a number above 0, not 0"),
]

CONFIGURATIONS = [
    (CONFIG + "hiden_size=32", 2, "the language model 'qwen2' has no key 'hiden_size': did you mean 'hidden_size'?"),
    (CONFIG + "temperature=0.5", 2, "the language model 'qwen2' has no key 'temperature'"),
    (CONFIG + "dtype=float16", 2, "the language model 'qwen2' has no key 'dtype'"),
    (CONFIG + "rope_parameters='{rop_theta: 1e4}'", 2, "has no key 'rop_theta': did you mean 'rope_theta'?"),
    (CONFIG + "rope_parameters='{rope_type: linaer}'", 2, "knows no rope_type 'linaer': did you mean 'linear'?"),
    (CONFIG + "rope_parameters='{rope_type: linear}'", 2, "'qwen2' is wrong", "{'factor'}"),
    (CONFIG + "model_type=qwen22", 2, "knows no language model 'qwen22': did you mean 'qwen2'?"),
    (CONFIG + "model_type=gpt2", 2, "the language model 'gpt2' has no key 'intermediate_size'"),
    (CONFIG + "model_type=null", 2, "needs 'model_type'"),
    (CONFIG + "model_type=vit", 2, "'vit' is no decoder-only language model"),
    ("model.vision.config.model_type=qwen2", 2, "the vision tower 'qwen2' does not work here"),
    (CONFIG + "hidden_size=30", 2, "hidden_size=30 is no multiple of num_attention_heads=4"),
    (CONFIG + "num_key_value_heads=3", 2, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
    (CONFIG + "num_attention_heads=0", 2, "cannot have num_attention_heads=0"),
    (CONFIG + "hidden_size=large", 2, "the configuration of the language model 'qwen2' is wrong"),
    ("model.language.lora='{rnk: 4}'", 2, "language.lora has no 'rnk': did you mean 'rank'?"),
    ("model.language.lora='{rank: 0}'", 2, "language.lora.rank is a whole number from 1, not 0"),
    ("model.language.lora='{alpha: .nan}'", 2, "language.lora.alpha is a number above 0, not nan"),
    ("model.vision.config.hiden_size=24", 2, "has no key 'hiden_size': did you mean 'hidden_size'?"),
    ("model.vision.config.to_dict=1", 2, "has no key 'to_dict'"),
    ("model.vision.config.num_attention_heads=5", 2, "hidden_size=24 is no multiple of num_attention_heads=5"),
    ("model.vision.config.patch_size=0", 2, "cannot have patch_size=0"),
    (
        "model.vision='{_target_: lavi.vision.timm.TimmVision, name: test_vit, data_config: {maen: 1}}'",
        2,
        "has no key 'maen': did you mean 'mean'?",
    ),
    (
        "model.vision='{_target_: lavi.vision.openclip.OpenCLIPVision, config: {embed_dm: 8, vision_cfg: {}}}'",
        2,
        "has no key 'embed_dm': did you mean 'embed_dim'?",
    ),
    (
        "model.vision='{_target_: lavi.vision.openclip.OpenCLIPVision, config: {vision_cfg: {layrs: 2}}}'",
        2,
        "vision_cfg has no key 'layrs': did you mean 'layers'?",
    ),
    (
        "model.vision='{_target_: lavi.vision.openclip.OpenCLIPVision, "
        "config: {vision_cfg: {}, preprocess_cfg: {men: 1}}}'",
        2,
        "preprocess_cfg has no key 'men': did you mean 'mean'?",
    ),
]

ONCE_IT_IS_BUILT = [
    ("trainer.precision=bf16-true", 2, "trainer.precision=bf16-true casts every weight", "set bf16-mixed"),
    ("model.fusion.generator.heads=3", 2, "bottleneck (16) must be a multiple of its heads, 3"),
    ("model.fusion.layers='[9]'", 2, "layers [9]", "0 to 3"),
    ("model.fusion.layers='[]'", 2, "layers []"),
    ("model.fusion='{_target_: lavi.fusion.cross_attention.CrossAttentionFusion, heads: 5}'", 2, "5 heads must divide"),
    ("model.reducer='{_target_: lavi.reduction.resampler.PerceiverResampler, heads: 7}'", 2, "7 heads do not divide"),
    ("module.learning_rate='{fusoin: 1}'", 2, "did you mean 'fusion'?"),
    ("module.learning_rate='{fusion: null}'", 2, "names nothing that has parameters to train"),
    (CONFIG + "hidden_act=nonsense", 2, "no 'qwen2' language model can be built from a bare configuration: nonsense"),
    (CONFIG + "vocab_size=200", 2, "tokens, and the language model has only vocab_size=200 embeddings"),
    ("model.language.tokenizer=gone", 2, "tiny.yaml", "no tokenizer at 'gone'"),
    ("model.language.source=gone", 2, "either 'source' (a checkpoint) or 'config'"),
]

WITHOUT_A_GPU = [
    (FIT + "trainer.accelerator=gpu", 2, "refuses what 'trainer' gives it: No supported gpu backend found"),
    ("lavi.evaluate --checkpoint gone --device cuda", 2, "the device 'cuda' cannot be used here", "take cpu, or auto"),
    ("lavi.generate --checkpoint gone --question what? --device cuda:3", 2, "the device 'cuda:3' cannot be used here"),
]

IN_A_RECIPE = {
    "not utf-8": (b"name: t\xfcny\n", "child.yaml is not a text in UTF-8"),
    "empty": (b"", "child.yaml is empty"),
    "nothing but a comment": (b"# soon\n", "child.yaml is empty"),
    "a list": (b"- model\n", "child.yaml is a list"),
    "a tab": (b"trainer:\n\tmax_steps: 3\n", "child.yaml:2", "indent with spaces"),
    "a key twice": (
        b"extends: tiny.yaml\nseed: 1\nname: x\nseed: 2\n",
        "child.yaml:4: 'seed' stands in line 2 already",
    ),
    "an inner key twice": (
        b"extends: tiny.yaml\ntrainer:\n  max_steps: 1\n  max_steps: 2\n",
        "child.yaml:4: 'trainer.max_steps' stands in line 3 already",
    ),
    "several parents": (b"extends: [tiny.yaml]\n", "child.yaml:1: 'extends' names one other recipe", "['tiny.yaml']"),
    "no parent": (b"extends:\n", "child.yaml:1: 'extends' names one other recipe"),
    "a missing parent": (b"extends: tinny.yaml\n", "tinny.yaml (extended by child.yaml)", "did you mean 'tiny.yaml'?"),
    "two documents": (b"extends: tiny.yaml\n---\nseed: 1\n", "child.yaml:2", "another document"),
    "an object of Python": (b"seed: !!python/object:os.system x\n", "child.yaml:1", "not readable as YAML"),
    "it holds itself": (b"model: &a {b: *a}\n", "child.yaml", "not readable as YAML"),
    "a key that is a number": (b"extends: tiny.yaml\n1: 2\n", "child.yaml:2: a recipe has no section '1'"),
    "a time": (b"extends: tiny.yaml\ntrainer: {max_epochs: 12:30:00}\n", "must be int | None, not '12:30:00'"),
}


def test_a_right_command_line_is_not_refused(run, tiny_recipe: Path) -> None:  # type: ignore[no-untyped-def]
    """Else the sentences below could be about anything."""
    status, _, err = run(*shlex.split(FIT), "trainer.max_steps=1", "trainer.limit_val_batches=0")
    assert status == 0, err


EARLY = [
    *OPTIONS,
    *[(FIT + change, *rest) for change, *rest in [*OVERRIDES, *SECTIONS, *TRAINER, *NUMBERS, *CONFIGURATIONS]],
    *WITHOUT_A_GPU * (not torch.cuda.is_available()),
]
LATE = [(FIT + change, *rest) for change, *rest in ONCE_IT_IS_BUILT]


@pytest.mark.parametrize("line", [*EARLY, *LATE], ids=lambda line: line[0].replace(FIT, ""))
def test_mistakes_on_a_command_line(run, tiny_recipe: Path, line: tuple, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def build(recipe: object) -> None:
        raise AssertionError("a model is built before the mistake is said")

    command, status, *words = line
    if line in EARLY:
        monkeypatch.setattr("lavi.training.run.build", build)
    result = run(*shlex.split(command))
    assert result[0] == status, result[2]
    refused(result, *words)


COMMANDS = [
    ".".join(file.relative_to(file.parents[1]).with_suffix("").parts).removeprefix("benchmarks.")
    for folder in ("lavi", "datamodules", "benchmarks")
    for file in sorted((Path(__file__).parent.parent / folder).glob("*.py"))
    if re.search(r"^def main\(", file.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_is_to_be_written(run, command: str) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run(command, "--help")
    assert status == 0
    assert out.startswith("usage: ")
    assert not re.search(r"None|default: (False|\[\])", out)
    assert not re.search(r"\S {4,}--", out)  # lines of an example that were joined


@pytest.mark.parametrize("mistake", IN_A_RECIPE)
def test_mistakes_in_a_recipe(run, tiny_recipe: Path, mistake: str) -> None:  # type: ignore[no-untyped-def]
    content, *words = IN_A_RECIPE[mistake]
    tiny_recipe.with_name("child.yaml").write_bytes(content)
    refused(run("lavi.fit", "--recipe", "child.yaml", "--run", "out"), *words)
    assert not Path("out").exists()


CHECKPOINTS = {
    "a key that no model reads": ({"config.json": ('"hidden_size": 32', '"hiden_size": 5, "hidden_size": 32')}, None),
    "another width": ({"config.json": ('"hidden_size": 32', '"hidden_size": 64')}, "do not fit its config.json"),
    "no number": ({"config.json": ('"hidden_size": 32', '"hidden_size": "x"')}, "no language model at"),
    "cut off": ({"config.json": ("}", "")}, "no language model at"),
    "weights missing": ({"model.safetensors": ("lm_head", "xx_head")}, "lacks 1 weights", "lm_head.weight"),
    "weights that are none": ({"model.safetensors": ("", "")}, "can be built from"),
    "a tokenizer that is none": ({"tokenizer.json": ("{", "")}, "no tokenizer at"),
}


@pytest.fixture(scope="session")
def language_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "language"
    LanguageModel(config=QWEN2 | {"tie_word_embeddings": False}, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mistake", CHECKPOINTS)
def test_checkpoints_of_a_language_model(language_checkpoint: Path, tmp_path: Path, mistake: str) -> None:
    """Of a published checkpoint a configuration may say anything more; all else that does not fit is refused."""
    (changes, *words), folder = CHECKPOINTS[mistake], tmp_path / "language"
    shutil.copytree(language_checkpoint, folder)
    for name, (before, after) in changes.items():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole.replace(before.encode(), after.encode(), 1) if before else b"no weights")
    if words == [None]:
        assert len(LanguageModel(str(folder)).tokenizer)
        return
    with pytest.raises(UserError) as refusal:
        assert len(LanguageModel(str(folder)).tokenizer)
    assert all(word in str(refusal.value) for word in (*words, str(folder))), refusal.value
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "command",
    [
        "lavi.evaluate --checkpoint run {} --limit 3",
        "lavi.evaluate {} --checkpoint run",
        "lavi.visor search --checkpoint run {} --out x.json",
        "lavi.visor search --checkpoint run --out x.json {}",
    ],
)
def test_changes_to_a_recipe_stand_anywhere(run, tiny_recipe: Path, command: str) -> None:  # type: ignore[no-untyped-def]
    Path("run").mkdir()
    Path("run/trained.safetensors").touch()
    tiny_recipe.rename("run/recipe.yaml")
    words = "command line: 'data.tst' is unknown", "did you mean 'test'?"
    refused(run(*shlex.split(command.format("data.tst=x"))), *words)


def test_a_folder_with_an_equals_sign_is_a_run(run, tiny_recipe: Path) -> None:  # type: ignore[no-untyped-def]
    Path("rate=3").mkdir()
    refused(run("lavi.evaluate", "--checkpoint", "rate=3"), "rate=3 is not a run folder")
