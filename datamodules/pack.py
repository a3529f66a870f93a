"""LLaVA-style JSON and an image folder, packed into shards.

    python -m datamodules.pack --json train.json --images images --out shards/train

The JSON is a list of ``{"id": ..., "image": "file" or ["file", ...], "conversations": [{"from": "human", "value":
"<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}``. Images are stored as they are. An answer may carry
``"family"`` and ``"level"`` beside its value: accuracies are then reported for each.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.shards import IMAGE_TYPES
from datamodules.write import ShardJob, shard_jobs, write_shards
from lavi.errors import HelpFormatter, UserError, front

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_llava(file: Path) -> list[dict[str, Any]]:
    """The entries of a LLaVA-style JSON.

    Raises:
        UserError: not there, not JSON, not a list of conversations.
    """
    if not file.is_file():
        raise UserError(f"there is no {file}: give --json a LLaVA-style JSON file.")
    try:
        entries = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON ({error}).") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file} is not a list of conversations, or an empty one.")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise UserError(f"{file}: entry {index} has no 'conversations'.")
    return entries


def messages_of(entry: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A conversation as messages, each ``<image>`` as an image part.

    Raises:
        UserError: a role that is none, or no answer.
    """
    messages = []
    for turn in entry["conversations"]:
        role = ROLES.get(turn.get("from", ""))
        if role is None or "value" not in turn:
            raise UserError(f"entry '{name}' has a turn without 'value', or from neither of {', '.join(ROLES)}.")
        parts: list[dict[str, str]] = []
        for number, text in enumerate(re.split(r"<image>\n?", turn["value"])):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        plain = all(part["type"] == "text" for part in parts)
        tags = {key: turn[key] for key in ("family", "level") if key in turn}
        messages.append({"role": role, "content": turn["value"] if plain else parts, **tags})
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"entry '{name}' has no answer (no turn from 'gpt').")
    return messages


def make_samples(job: ShardJob, *, entries: list[dict[str, Any]], images: Path) -> Iterator[dict[str, Any]]:
    """The samples of one shard."""
    for index in range(job.start, job.stop):
        entry = entries[index]
        name = str(entry.get("id", index))
        files = entry.get("image", [])
        files = [files] if isinstance(files, str) else files
        # The index makes the key unique; a dot or a slash in it would be read as the start of the member's type.
        sample: dict[str, Any] = {
            "__key__": f"{index:08d}-{re.sub(r'[./]', '_', name)}",
            "json": {"messages": messages_of(entry, name)},
        }
        for number, file in enumerate(files):
            kind = Path(file).suffix.lower().lstrip(".")
            if kind not in IMAGE_TYPES:
                raise UserError(f"entry '{name}': image '{file}' is none of {', '.join(IMAGE_TYPES)}.")
            if not (images / file).is_file():
                raise UserError(f"entry '{name}': there is no image {images / file}.")
            sample[kind if len(files) == 1 else f"{number}.{kind}"] = (images / file).read_bytes()
        yield sample


@front
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.pack", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="the conversations")
    parser.add_argument("--images", type=Path, required=True, help="the folder their image names start from")
    parser.add_argument("--out", type=Path, required=True, help="the shard folder to write; must not exist")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples in a shard")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    if args.per_shard < 1 or args.workers < 1:
        raise UserError("--per-shard and --workers are at least 1.")
    entries = read_llava(args.json)
    make = partial(make_samples, entries=entries, images=args.images)
    jobs = shard_jobs(len(entries), args.per_shard)
    write_shards(
        args.out, jobs, make, made_by={"json": args.json.name}, workers=args.workers, label=f"packing {args.json.name}"
    )
    print(f"{args.out}: {len(entries)} samples in {len(jobs)} shards")


if __name__ == "__main__":
    main()
