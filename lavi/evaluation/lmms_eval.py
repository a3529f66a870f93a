"""Runs of lavi as a model of lmms-eval, by that harness's own entry point (``lmms_eval.models``).

    uv pip install 'lavi[lmms-eval]' --override overrides.txt    (docs/evaluation.md says what stands in it, and why)
    lmms-eval --model lavi --model_args checkpoint=runs/NAME --tasks gqa --batch_size 8

``checkpoint`` is a run folder or an export; a released model, by its folder or hub name, or the recipe of one
(recipes/baselines/released_*.yaml). More arguments: ``device``, ``frames`` (of a video), ``trust``. Decoding is as the
harness's task says.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessage, ChatMessages
from PIL import Image

from lavi.batch import Sample, Video, Visual
from lavi.checkpoints.load import load
from lavi.config.devices import device_of
from lavi.data.collator import EncodedSample
from lavi.data.frame_sampling import FrameSampling
from lavi.data.images import open_image, upright_rgb
from lavi.data.videos import read_video
from lavi.errors import UserError, one_line
from lavi.evaluation.compare_runs import RECIPES, open_run
from lavi.report import track

log = logging.getLogger("lavi")
MANIFEST = ModelManifest(model_id="lavi", chat_class_path=f"{__name__}.LaviForLmmsEval")

AUTO_ROWS = 8
"""Rows of a batch, where the harness is to choose (``auto``)."""
LONGEST = 64
"""Tokens of an answer, where the task does not say."""


class LaviForLmmsEval(lmms):
    """A run that answers the harness's chat messages."""

    is_simple = False

    def __init__(
        self,
        checkpoint: str,
        *,
        batch_size: int | str = 1,
        device: str = "auto",
        frames: int | str = 32,
        trust: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.device = device_of(device)
        if Path(checkpoint).suffix in RECIPES:
            self.model = open_run(Path(checkpoint), overrides=[], trust=trust)[1].to(self.device)
        else:
            self.model = load(checkpoint, device=self.device, trust=trust)
        self.rows = int(batch_size) if str(batch_size).isdigit() else AUTO_ROWS
        self.sampling = FrameSampling(frames=int(frames))

    @property
    def batch_size(self) -> int:
        """What the harness asks for."""
        return self.rows

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests; those that decode alike go together.

        What cannot be asked, since its image cannot be read or it is too long, is answered by nothing and said at the
        end.

        Raises:
            UserError: not one can be asked.
        """
        answers: dict[int, str] = {}
        left_out: Counter[str] = Counter()
        order = sorted(range(len(requests)), key=lambda index: str(requests[index].args[2]))
        batches = [
            batch[start : start + self.rows]
            for _, alike in groupby(order, key=lambda index: str(requests[index].args[2]))
            for batch in [list(alike)]
            for start in range(0, len(batch), self.rows)
        ]
        for batch in track(batches, "lavi: answering", total=len(batches)):
            encoded = {index: self._encoded(requests[index].args, left_out) for index in batch}
            asked = {index: prompt for index, prompt in encoded.items() if prompt is not None}
            said = self._answer(list(asked.values()), requests[batch[0]].args[2]) if asked else []
            answers |= dict.fromkeys(batch, "") | dict(zip(asked, said, strict=True))
            for index in asked:
                self.cache_hook.add_partial("generate_until", requests[index].args[:1], answers[index])
        if answers and left_out.total() == len(answers):
            raise UserError(f"not one question could be asked: {next(iter(left_out))}")
        for cause, count in left_out.items():
            log.warning(
                "%d of %d questions could not be asked, their answers are empty: %s", count, len(answers), cause
            )
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lavi answers by generating: choose a task whose output_type is generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("lavi answers single rounds: choose a task whose output_type is generate_until.")

    def _encoded(self, arguments: Sequence[Any], left_out: Counter[str]) -> EncodedSample | None:
        """A prompt; None: it cannot be asked, and ``left_out`` counts why."""
        try:
            return self.model.processor.encode(self._sample(arguments), prompt=True)
        except (UserError, OSError) as error:
            left_out[one_line(error)] += 1
            return None

    def _sample(self, arguments: Sequence[Any]) -> Sample:
        _, to_messages, _, number, task, split = arguments
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number])).messages
        visuals: list[Visual] = []
        ours = [{"role": one.role, "content": self._content(one, visuals)} for one in messages]
        return Sample(str(number), ours, visuals)

    def _content(self, message: ChatMessage, visuals: list[Visual]) -> list[dict[str, Any]]:
        """The parts of a message; its images and videos are added to ``visuals``."""
        parts: list[dict[str, Any]] = []
        for part in message.content:
            if part.type == "text":
                parts.append({"type": "text", "text": part.text})
                continue
            visuals.append(self._visual(part))
            parts.append({"type": "video" if isinstance(visuals[-1], Video) else "image"})
        return parts

    def _visual(self, part: Any) -> Visual:
        if part.type == "video":
            start, stop = (getattr(part, name, None) for name in ("start_time", "end_time"))  # 0.7 has no clips
            clip = None if start is None or stop is None else (float(start), float(stop))
            return read_video(part.url, self.sampling, clip=clip)
        if part.type != "image":
            raise NotImplementedError(f"lavi sees images and videos, no {part.type}.")
        return upright_rgb(part.url) if isinstance(part.url, Image.Image) else open_image(part.url)

    @torch.no_grad()
    def _answer(self, prompts: Sequence[EncodedSample], wanted: dict[str, Any]) -> list[str]:
        longest = int(wanted.get("max_new_tokens", LONGEST))
        room = min(self.model.room_behind(one.length) for one in prompts)
        if room < longest and len(prompts) > 1:  # one that fills the context shortens no other answer
            return [answer for prompt in prompts for answer in self._answer([prompt], wanted)]
        batch = self.model.processor.collate(list(prompts), pad_left=True).to(self.device)
        decoding: dict[str, Any] = {"max_new_tokens": min(longest, room)}
        if float(wanted.get("temperature") or 0) > 0 and wanted.get("do_sample", True):
            decoding |= {"do_sample": True, "temperature": float(wanted["temperature"])}
            decoding |= {"top_p": wanted["top_p"]} if wanted.get("top_p") else {}
        else:
            decoding["do_sample"] = False
        if int(wanted.get("num_beams") or 1) > 1:
            decoding["num_beams"] = int(wanted["num_beams"])
        return [_until(answer, wanted.get("until")) for answer in self.model.answer(batch, **decoding)]


def _until(answer: str, ends: str | Sequence[str] | None) -> str:
    """An answer before the first of the texts that end it."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        answer = answer.split(end)[0] if end else answer
    return answer
