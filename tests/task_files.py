"""Small files in the shape of each benchmark's own: a few records, pictures of one colour, a video of a second."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

TASK = """
name: colours
questions:
  _target_: datamodules.questions.QuestionFile
  file: q.json
  prompt: "what colour is the {question}?"
  answer: answers
  image: "{image}"
  family: "{kind}"
metric: {_target_: lavi.metrics.answers.ExactMatch}
max_new_tokens: 4
"""
"""A task of one's own, on files that a test writes: what colour is a shape?"""
COLOURS = ("red", "green", "blue", "white")


def jpeg(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(stream, "JPEG")
    return stream.getvalue()


def pictures(folder: Path, *names: str) -> None:
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(colour))


def videos(folder: Path, *names: str) -> None:
    import av

    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for n in range(16):
                frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), COLOURS[n % 4]))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def dump(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def stored(colour: str) -> dict[str, Any]:
    """An image as `datasets` keeps it in parquet."""
    return {"bytes": jpeg(colour), "path": "x.jpg"}


def vqav2(folder: Path) -> None:
    asked = [{"image_id": 9, "question": "What colour?", "question_id": 90}]
    asked += [{"image_id": 9, "question": "How many?", "question_id": 91}]
    dump(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": asked})
    answers = [{"answer": word, "answer_confidence": "yes", "answer_id": n} for n, word in enumerate(["red"] * 10)]
    given = [{"question_id": i, "answers": answers, "answer_type": "other", "image_id": 9} for i in (91, 90)]
    dump(folder / "v2_mscoco_val2014_annotations.json", {"annotations": given})
    pictures(folder / "val2014", "COCO_val2014_000000000009.jpg")


def gqa(folder: Path) -> None:
    types = {"structural": "query", "semantic": "attr"}
    record = {"imageId": "n1", "question": "What colour is it?", "answer": "red", "types": types, "isBalanced": True}
    dump(
        folder / "testdev_balanced_questions.json",
        {"201": record, "202": record | {"question": "Is it?", "answer": "no"}},
    )
    pictures(folder / "images", "n1.jpg")


def vizwiz(folder: Path) -> None:
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    record = {
        "image": "V_1.jpg",
        "question": "What is it?",
        "answers": answers,
        "answer_type": "other",
        "answerable": 0,
    }
    dump(folder / "val.json", [record])
    pictures(folder / "val", "V_1.jpg")


def textvqa(folder: Path) -> None:
    record = {"question_id": 3, "question": "what does it say?", "image_id": "ab", "answers": ["stop"] * 10}
    dump(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [record]})
    pictures(folder / "train_images", "ab.jpg")


def pope(folder: Path) -> None:
    pictures(folder / "val2014", "c.jpg")
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": "c.jpg", "text": "Is there a dog?", "label": a}
            for n, a in ((1, "yes"), (2, "no"))
        ]
        (folder / f"coco_pope_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def mme(folder: Path) -> None:
    row = {"question_id": "count/1.jpg", "image": stored("red"), "category": "count"}
    rows = [row | {"question": f"Is it {n}? Please answer yes or no.", "answer": a} for n, a in ((1, "Yes"), (2, "No"))]
    parquet(folder / "data/test-00000-of-00001.parquet", rows)


def scienceqa(folder: Path) -> None:
    row = {"question": "Which?", "choices": ["iron", "wood"], "answer": 1, "hint": "", "subject": "natural science"}
    parquet(folder / "data/test-00000-of-00001.parquet", [row | {"image": None}, row | {"image": stored("blue")}])


def mmbench(folder: Path) -> None:
    folder.mkdir(parents=True)
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split"]
    image = base64.b64encode(jpeg("green") + bytes(400)).decode()
    row = ["7", "Which?", "nan", "iron", "wood", "nan", "", "B", "nature", image, "x", "dev"]
    turned = ["1000007", "Which?", "nan", "wood", "iron", "nan", "", "A", "nature", image, "x", "dev"]
    with open(folder / "mmbench_dev_20230712.tsv", "w", newline="") as stream:
        csv.writer(stream, delimiter="\t").writerows([names, row, turned])


def seed(folder: Path) -> None:
    record = {
        "answer": "C",
        "data_id": "1454426_2591111986",
        "question": "Which?",
        "question_id": "101",
        "question_type_id": 1,
    }
    record |= {f"choice_{letter}": word for letter, word in zip("abcd", ("one", "two", "three", "four"), strict=True)}
    video = record | {"data_type": "video", "data_id": "v.mp4"}
    dump(folder / "SEED-Bench.json", {"questions": [video, record | {"data_type": "image"}], "question_type": {}})
    pictures(folder / "SEED-Bench-image", "1454426_2591111986")


def docvqa(folder: Path) -> None:
    record = {
        "questionId": 337,
        "question": "what date?",
        "image": "documents/x_1.png",
        "docId": 2,
        "answers": ["1/8/93", "8 Jan"],
    }
    dump(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [record]})
    pictures(folder, "documents/x_1.png")


def infovqa(folder: Path) -> None:
    record = {"questionId": 1, "question": "what share?", "image_local_name": "2.jpeg", "answers": ["10%"]}
    dump(folder / "infographicsVQA_val_v1.0_withQT.json", {"data": [record]})
    pictures(folder / "images", "2.jpeg")


def chartqa(folder: Path) -> None:
    for kind in ("human", "augmented"):
        dump(folder / f"test/test_{kind}.json", [{"imgname": "4.png", "query": "How many?", "label": "14"}])
    pictures(folder / "test/png", "4.png")


def ocrbench(folder: Path) -> None:
    record = {
        "dataset_name": "IIIT5K",
        "type": "Regular Text Recognition",
        "image_path": "a/1.jpg",
        "question": "what?",
    }
    dump(
        folder / "OCRBench.json",
        [record | {"answers": ["CENTRE"]}, record | {"dataset_name": "HME100k", "answers": "x+1"}],
    )
    pictures(folder / "images", "a/1.jpg")


def mmmu(folder: Path) -> None:
    row = {"id": "v_1", "question": "See <image 1>.", "options": "['$6', '$7']", "answer": "B", "subfield": "Cost"}
    row |= {"question_type": "multiple-choice", "image_1": stored("red"), "image_2": stored("blue")}
    row |= {f"image_{n}": None for n in range(3, 8)}
    parquet(folder / "Accounting/validation-00000-of-00001.parquet", [row])
    opened = row | {"options": "[]", "answer": "5.5", "question_type": "open"}
    parquet(folder / "Physics/validation-00000-of-00001.parquet", [opened])


def captioned(name: str, image: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        sentences = [{"raw": f"A dog number {n}.", "tokens": []} for n in range(5)]
        record = {"filepath": "val2014", "filename": "x.jpg", "sentences": sentences}
        dump(folder / name, {"images": [record | {"split": "train"}, record | {"split": "test"}]})
        pictures(folder, image)

    return write


def open_videos(name: str, file: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        dump(folder / "test_q.json", [{"video_name": name, "question": "what is it?", "question_id": f"{name}_1"}])
        dump(folder / "test_a.json", [{"answer": "a dog", "type": 3, "question_id": f"{name}_1"}])
        videos(folder / "videos", file)

    return write


def egoschema(folder: Path) -> None:
    record = {"q_uid": "e1", "google_drive_id": "x", "question": "What?"} | {
        f"option {n}": f"C does {n}." for n in range(5)
    }
    dump(folder / "questions.json", [record | {"q_uid": "e0"}, record])
    dump(folder / "subset_answers.json", {"e1": 0})
    videos(folder / "videos", "e1.mp4")


def mvbench(folder: Path) -> None:
    record = {"video": "a.mp4", "question": "What?", "candidates": ["yes", "no"], "answer": "no"}
    dump(folder / "json/action_sequence.json", [record | {"start": 0.0, "end": 1.0}])
    dump(folder / "json/episodic_reasoning.json", [record | {"video": "clip_1", "start": 1.0, "end": 2.0}])
    dump(folder / "json/state_change.json", [record | {"video": "a.avi"}])  # written as mp4
    videos(folder / "video", "action_sequence/a.mp4", "state_change/a.mp4")
    pictures(folder / "video/episodic_reasoning/clip_1", *(f"{n:05d}.jpg" for n in range(9)))


def video_mme(folder: Path) -> None:
    options = ["A. one", "B. two", "C. three", "D. four"]
    row = {"video_id": "001", "duration": "short", "videoID": "fFj", "question_id": "001-1", "task_type": "Counting"}
    parquet(folder / "videomme/test-0.parquet", [row | {"question": "How many?", "options": options, "answer": "C"}])
    videos(folder / "data", "fFj.mp4")


def next_qa(folder: Path) -> None:
    folder.mkdir(parents=True)
    names = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
    (folder / "test.csv").write_text(f"{names}\n44,16,32,32,why is it?,4,6,CW,one,two,three,four,five\n")
    videos(folder / "videos", "44.mp4")


WRITERS: dict[str, Callable[[Path], None]] = {
    "vqav2": vqav2,
    "gqa": gqa,
    "vizwiz": vizwiz,
    "textvqa": textvqa,
    "pope": pope,
    "mme": mme,
    "scienceqa": scienceqa,
    "mmbench": mmbench,
    "seed": seed,
    "docvqa": docvqa,
    "infovqa": infovqa,
    "chartqa": chartqa,
    "ocrbench": ocrbench,
    "mmmu": mmmu,
    "coco_captions": captioned("dataset_coco.json", "val2014/x.jpg"),
    "flickr30k": captioned("dataset_flickr30k.json", "flickr30k-images/x.jpg"),
    "msvd_qa": open_videos("-4wsuPCjDBc_5_15", "-4wsuPCjDBc_5_15.mp4"),
    "msrvtt_qa": open_videos("video7010", "video7010.mp4"),
    "activitynet_qa": open_videos("1QIUV7WYKXg", "v_1QIUV7WYKXg.mp4"),
    "egoschema": egoschema,
    "mvbench": mvbench,
    "video_mme": video_mme,
    "next_qa": next_qa,
}
