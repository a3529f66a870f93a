"""The adapter for lmms-eval, run by the harness itself; without it installed, what can be told of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from task_files import TASK, dump, pictures, videos
from vlms import write_vlm

from lavi.evaluation.predictions import read_predictions

REPOSITORY = Path(__file__).parents[1]
HARNESS_TASK = """
task: colours_here
dataset_path: json
dataset_kwargs:
  data_files: {test: FOLDER/q.json}
test_split: test
output_type: generate_until
doc_to_visual: !function colours_utils.picture
doc_to_text: !function colours_utils.question
doc_to_target: kind
generation_kwargs: {max_new_tokens: 4, temperature: 0, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
metadata:
  - version: 0.0
"""
RELEASED = f"""
extends: {REPOSITORY}/recipes/baselines/released_llava_onevision_0_5b.yaml
name: out
model: {{source: released}}
"""
UTILS = """
from PIL import Image


def picture(doc):
    name = doc["image"]
    return [name if name.endswith(".mp4") else Image.open(name)]


def question(doc, lmms_eval_specific_kwargs=None):
    return f"what colour is the {doc['question']}?"
"""


def test_the_harness_finds_the_adapter_by_its_entry_point() -> None:
    (found,) = [one for one in entry_points(group="lmms_eval.models") if one.name == "lavi"]
    assert found.value == "lavi.evaluation.lmms_eval:MANIFEST"
    assert (REPOSITORY / "lavi/evaluation/lmms_eval.py").is_file()


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed: make test-lmms-eval")
@pytest.mark.parametrize("kind", ["run", "llava_onevision", "smolvlm"])
def test_the_harness_gets_our_answers_one_by_one_and_in_batches(
    run: Any, tiny_recipe: Path, tmp_path: Path, tokenizer: str, kind: str
) -> None:
    """Of a run with large random weights, whose answers go on and differ; and of released models."""
    if kind == "run":
        more = ["model.language.config.initializer_range=0.3", "model.language.config.tie_word_embeddings=false"]
        assert run("lavi.fit", "--recipe", tiny_recipe, "--run", "out", *more)[0] == 0
    else:
        write_vlm(kind, Path("released"), tokenizer)
        Path("out.yaml").write_text(RELEASED)
    folder = tmp_path / "tasks" / "colours"
    pictures(folder, *(f"{n}.jpg" for n in range(4)))
    shapes = ("circle", "square", "triangle", "diamond", "circle " * 20_000)  # the last fills any context
    rows = [
        {"question": shapes[n % 5], "answers": ["red"], "kind": "x", "image": str(folder / f"{n % 4}.jpg")}
        for n in range(10)
    ]
    (tmp_path / "colours.yaml").write_text(TASK)
    given = {"run": "out", "llava_onevision": "released", "smolvlm": "out.yaml"}[kind]
    ours = asked_by_us(run, "out" if kind == "run" else "out.yaml", folder, rows)
    assert len(set(ours)) > 2
    assert ours[4] == ours[9] == ""
    assert_the_harness_gets(ours, given, folder)


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed: make test-lmms-eval")
def test_the_harness_gets_our_answers_about_videos(run: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    more = ["model.language.config.initializer_range=0.3", "model.language.config.tie_word_embeddings=false"]
    assert run("lavi.fit", "--recipe", tiny_recipe, "--run", "out", *more)[0] == 0
    folder = tmp_path / "tasks" / "colours"
    videos(folder, "0.mp4", "1.mp4")
    rows = [
        {"question": shape, "answers": ["red"], "kind": "x", "image": str(folder / f"{n % 2}.mp4")}
        for n, shape in enumerate(("circle", "square", "triangle"))
    ]
    of_videos = 'video: "{image}"\n  frames: {_target_: lavi.data.frame_sampling.FrameSampling, frames: 4}'
    (tmp_path / "colours.yaml").write_text(TASK.replace('image: "{image}"', of_videos))
    ours = asked_by_us(run, "out", folder, rows)
    assert len(set(ours)) > 1
    assert_the_harness_gets(ours, "out,frames=4", folder)


def asked_by_us(run: Any, checkpoint: str, folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """What ``lavi.evaluate`` gets for the questions, which are written into the folder."""
    dump(folder / "q.json", rows)
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ["--tasks", "colours.yaml", "--data", folder.parent, "--out", "ours", "--no-timing"]
    status, _, problems = run("lavi.evaluate", "--checkpoint", checkpoint, *where)
    assert status == 0, problems
    return [one.prediction.answer for one in read_predictions(Path("ours/out/colours.jsonl"))[1]]


def assert_the_harness_gets(ours: list[str], given: str, folder: Path) -> None:
    """The same answers, one by one and in batches."""
    tmp_path = folder.parents[1]
    included = tmp_path / "harness"
    included.mkdir()
    (included / "colours_here.yaml").write_text(HARNESS_TASK.replace("FOLDER/q.json", str(folder / "q.jsonl")))
    (included / "colours_utils.py").write_text(UTILS)
    for size in (1, 4):
        command = [
            sys.executable,
            "-m",
            "lmms_eval",
            "--model",
            "lavi",
            "--model_args",
            f"checkpoint={given},device=cpu",
        ]
        command += ["--tasks", "colours_here", "--include_path", str(included), "--batch_size", str(size)]
        command += ["--output_path", f"harness-{size}", "--log_samples"]
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert re.search(r"colours_here.*exact_match", done.stdout), done.stdout[-3000:]
        (samples,) = Path(f"harness-{size}").rglob("*samples_colours_here.jsonl")
        logged = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        assert [row["filtered_resps"] for row in logged] == ours
