"""Where shards lie: local files, web servers, object stores; all opened as files that can seek.

    data/train                                  a folder with *.tar
    data/train/shard-{000000..000011}.tar       a brace pattern
    https://host/train/                         a folder with an index.json (a web server lists nothing)
    s3://bucket/train/{000..099}.tar            any store that fsspec knows (s3 needs s3fs, gs needs gcsfs ...)

A remote file is read block by block, the next one while this one is used. A block that does not come whole is asked
for again, later and later; what never comes is an error that names the shard, not a shorter shard.

Own code where a library's loses a guarantee: fsspec's ``BackgroundBlockCache`` raises the error of a block that it read
ahead at the next read, also of a block that has come; ``webdataset.shardlists.expand_urls`` puts environment variables
into a URL that a recipe from elsewhere names, and imports torch, without which packing and inspecting start.
"""

from __future__ import annotations

import errno
import glob
import io
import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, TypeVar, cast

import braceexpand
import fsspec

from lavi.errors import UserError, nearest

log = logging.getLogger("lavi")

INDEX = "index.json"
"""Beside the shards of a folder: what each of them holds."""
BLOCK = 8 * 2**20
"""Bytes of a block of a remote file."""
CACHED_BLOCKS = 4
"""Blocks of a remote file that are cached."""
TRIES = 6
"""How often a block is asked for; between two tries 0.5, 1, 2, 4, 8 s pass."""
FIRST_WAIT = 0.5
COMPRESSED = {
    ".tar.gz": "`gunzip`",
    ".tgz": "`gunzip`",
    ".tar.bz2": "`bunzip2`",
    ".tbz2": "`bunzip2`",
    ".tar.xz": "`unxz`",
    ".txz": "`unxz`",
    ".tar.zst": "`unzstd`",
    ".tar.lz4": "`unlz4`",
    ".zip": "`unzip`, then `tar --sort=name -cf shard.tar FILES`",
}
"""Endings of archives that are no shards, and what makes shards of them."""
STORES = ("abfs", "az", "gcs", "gs", "hf", "http", "https", "memory", "oci", "s3", "s3a")
"""Stores that are read from: fsspec knows more, and some of them run programs or reach into archives."""
PIPES = "LAVI_ALLOW_PIPES"
"""Set to 1, it lets ``pipe:`` run a shell. No recipe can: a recipe may come from elsewhere."""

Given = TypeVar("Given")


def find_shards(source: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """The shards of a folder, a file, a brace pattern, or of several of these, in order.

    Raises:
        UserError: nothing there, compressed shards, or a store that is not read from.
    """
    if isinstance(source, os.PathLike):
        return find_shards(os.fspath(source))
    if isinstance(source, Sequence) and not isinstance(source, str) and source:
        return [shard for part in source for shard in find_shards(part)]
    if not isinstance(source, str) or not source:
        raise UserError(f"shards are named by a folder, a file or a pattern, or a list of these, not {source!r}.")
    if "://" in source or source.startswith("pipe:"):
        return _remote_shards(source)
    source = os.path.expanduser(source)
    if os.path.isdir(source):
        return _shards_in(source)
    shards = _expanded(source)
    if missing := [file for file in shards if not os.path.isfile(file)]:
        if glob.has_magic(missing[0]):
            raise UserError(f"no shards at {missing[0]}: name their folder, or count them in braces: {{000..099}}.tar")
        raise UserError(
            f"no shards at {missing[0]}: make the built-in data with `python -m datamodules.scenes`, "
            "or pack your own with `python -m datamodules.pack`."
        )
    return shards


def _shards_in(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"the shard folder {folder} cannot be read ({error.strerror}).") from None
    there = {name for name in names if name.endswith(".tar") and not name.startswith(".")}
    _check_plain([f"{folder}/{name}" for name in names if not (there and name.endswith(".zip"))])
    # One that the index names and that is gone is read as lost: a listing alone would not miss it.
    shards = [f"{folder}/{name}" for name in sorted(there | set((read_index(folder) or {}).get("shards", {})))]
    if not shards:
        raise UserError(
            f"the shard folder {folder} has no .tar file: pack your data with `python -m datamodules.pack`."
        )
    return shards


def _expanded(pattern: str) -> list[str]:
    """The files that a brace pattern names."""
    try:
        files = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"the pattern {pattern} is none ({error}): a brace is not closed, or was not opened.") from None
    _check_plain(files)
    return files


def _check_plain(files: Sequence[str]) -> None:
    """Refuse archives that can be read from their beginning only: a shard is read from anywhere.

    Raises:
        UserError: with how to unpack the first.
    """
    for file in files:
        for ending, how in COMPRESSED.items():
            if file.lower().endswith(ending):
                raise UserError(f"{file} is compressed, and shards are plain .tar files: unpack it first ({how}).")


def _remote_shards(source: str) -> list[str]:
    _check_store(source)
    if source.startswith("pipe:"):
        return list(braceexpand.braceexpand(source))
    if not source.endswith("/"):
        return _expanded(source)
    index = read_index(source)
    if index is None:
        raise UserError(
            f"{source} has no {INDEX} that names its shards: give a pattern, as in {source}{{000..099}}.tar"
        )
    return [source + name for name in sorted(index["shards"])]


def _check_store(url: str) -> None:
    """Refuse what runs a shell, and stores that are not known here.

    Raises:
        UserError: with what may be done.
    """
    if url.startswith("pipe:"):
        if os.environ.get(PIPES) != "1":
            raise UserError(
                f"'{url}' would run a shell command: set {PIPES}=1 in the environment if you mean it and trust it."
            )
        return
    store = url.split("://", 1)[0]
    if store not in STORES:
        raise UserError(f"shards are not read from '{store}://': {nearest(store, STORES)}")
    try:
        fsspec.get_filesystem_class(store)
    except ImportError as error:
        raise UserError(f"'{store}://' needs another package: {str(error).splitlines()[0]}.") from None


def read_index(folder: str) -> dict[str, Any] | None:
    """The index of a folder of shards (a path, or a URL ending in a slash); None where there is none.

    Raises:
        UserError: it is no index.
    """
    file = f"{folder.rstrip('/')}/{INDEX}" if folder else INDEX
    try:
        text = _read_bytes(file)
    except FileNotFoundError:
        return None
    except OSError as error:  # a store may answer so of a file that is not there
        log.warning("%s cannot be read: samples that are lost will not be counted (%s)", file, error)
        return None
    try:
        index = json.loads(text)
        sound = all(isinstance(samples_of(entry), int) for entry in index["shards"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{file} is not a shard index: remove it, or pack the data again.")
    return cast(dict[str, Any], index)


def samples_of(entry: Any) -> int:
    """Of one shard's entry in an index: its number of samples, or a record with it."""
    return cast(int, entry["samples"] if isinstance(entry, dict) else entry)


def _read_bytes(file: str) -> bytes:
    if "://" not in file:
        return Path(file).read_bytes()
    store, path = fsspec.core.url_to_fs(file)
    return cast(bytes, retry(lambda: store.cat_file(path), file, may_be_missing=True))


def open_shard(shard: str) -> BinaryIO:
    """A shard as a file that can seek.

    Raises:
        OSError: it is not there, or does not come whole after :data:`TRIES` tries.
    """
    if shard.startswith("pipe:"):
        return _piped(shard.removeprefix("pipe:"))
    if "://" not in shard:
        return open(shard, "rb", buffering=2**18)
    return io.BufferedReader(RemoteFile(shard), 2**18)


def _piped(command: str) -> BinaryIO:
    whole = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    ended = subprocess.run(command, shell=True, stdout=whole, check=False)
    if ended.returncode:
        whole.close()
        raise OSError(f"'{command}' ended with status {ended.returncode}")
    whole.seek(0)
    return cast(BinaryIO, whole)


def retry(ask: Callable[[], Given], what: str, *, may_be_missing: bool = False) -> Given:
    """Ask again, later and later, until it works.

    Args:
        may_be_missing: believe at once that a file is not there. Asked for a file's size, some clients say so of every
            connection that was dropped.

    Raises:
        OSError: it never did.
    """
    wait = FIRST_WAIT
    for left in reversed(range(TRIES)):
        try:
            return ask()
        # A store raises what its client library raises: of many kinds, not all of them OSErrors.
        except Exception as error:
            hopeless = isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.ENOSPC
            if hopeless or (may_be_missing and isinstance(error, FileNotFoundError)):
                raise
            if not left:
                raise OSError(f"{what} did not come in {TRIES} tries ({type(error).__name__}: {error})") from None
            log.info("%s: %s; trying again in %g s", what, error, wait)
            time.sleep(wait)
            wait *= 2
    raise AssertionError


class RemoteFile(io.RawIOBase):
    """A file of a store, read in blocks of :data:`BLOCK` bytes.

    Args:
        url: where it is; fsspec reads its credentials and settings where it always does.

    Raises:
        OSError: it is not there, or a block does not come whole.
    """

    def __init__(self, url: str) -> None:
        self.url, self.at = url, 0
        self.whole: BinaryIO | None = None
        self.fetching = Lock()
        self.blocks: dict[int, bytes] = {}
        self.ahead: tuple[int, Future[bytes]] | None = None
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lavi-read-ahead")
        self.store, self.path = fsspec.core.url_to_fs(url, **_settings(url))
        self.size: int | None = retry(lambda: self.store.info(self.path), url).get("size")
        if self.size is None:
            self._fetch_whole()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert self.size is not None
        self.at = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence] + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        assert self.size is not None
        if self.at >= self.size:
            return 0
        number, first = divmod(self.at, BLOCK)
        some = self._block(number)[first : first + len(buffer)]
        buffer[: len(some)] = some
        self.at += len(some)
        return len(some)

    def close(self) -> None:
        if not self.closed:
            self.reader.shutdown(wait=False, cancel_futures=True)
            if self.whole is not None:
                self.whole.close()
        super().close()

    def _block(self, number: int) -> bytes:
        """A block; the last few are kept, since a tar is read to the next header and then back to a member."""
        if number not in self.blocks:
            ready = self.ahead is not None and self.ahead[0] == number
            self.blocks[number] = self.ahead[1].result() if self.ahead and ready else self._ask(number)
            while len(self.blocks) > CACHED_BLOCKS:
                del self.blocks[next(iter(self.blocks))]
        following = number + 1
        if following not in self.blocks and (self.ahead is None or self.ahead[0] < following):
            self.ahead = following, self.reader.submit(self._ask, following)
        return self.blocks[number]

    def _ask(self, number: int) -> bytes:
        assert self.size is not None
        start, stop = number * BLOCK, min((number + 1) * BLOCK, self.size)
        if start >= stop:
            return b""
        if self.whole is None:
            got = retry(lambda: self._range(start, stop), self.url)
            if got is not None:
                return got
            self._fetch_whole()
        assert self.whole is not None
        return os.pread(self.whole.fileno(), stop - start, start)  # the read-ahead may be reading, too

    def _range(self, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop); None from a server that sends the whole file whatever it is asked for."""
        got = cast(bytes, self.store.cat_file(self.path, start=start, end=stop))
        if len(got) > stop - start:
            return None
        if len(got) < stop - start:
            raise OSError(f"bytes {start} to {stop} came as {len(got)}, the file is said to have {self.size}")
        return got

    def _fetch_whole(self) -> None:
        with self.fetching:
            if self.whole is None:
                self.whole = self._fetched()

    def _fetched(self) -> BinaryIO:
        whole = tempfile.TemporaryFile()  # noqa: SIM115  # closed with this

        def fetch() -> None:
            whole.seek(0)
            whole.truncate()
            self.store.get_file(self.path, whole)
            if self.size is not None and whole.tell() != self.size:
                raise OSError(f"came as {whole.tell()} bytes, and is said to have {self.size}")

        retry(fetch, self.url)
        whole.flush()
        self.size = whole.tell()
        return cast(BinaryIO, whole)


def _settings(url: str) -> dict[str, Any]:
    """Of the store's client: a web server that falls silent must not hang a run."""
    if not url.startswith("http"):
        return {}
    from aiohttp import ClientTimeout

    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
