"""Shards that lie elsewhere: web servers that drop connections and lie, object stores, and what is refused."""

from __future__ import annotations

import errno
import json
import random
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
from test_shards import png, sample, write_tar

from datamodules.shards import sources
from datamodules.shards.read import ShardStream, Slot, read_shard
from datamodules.shards.sources import find_shards, open_shard, read_index
from lavi.errors import UserError


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that a shard takes many of them, and no waiting between tries."""
    monkeypatch.setattr(sources, "BLOCK", 4096)
    monkeypatch.setattr(sources, "FIRST_WAIT", 0.001)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    file = tmp_path / "shard-000000.tar"
    write_tar(file, [member for number in range(40) for member in sample(f"k{number:03d}", image=png(16))])
    (tmp_path / "index.json").write_text(json.dumps({"samples": 40, "shards": {file.name: 40}}))
    return file


Answer = Callable[[BaseHTTPRequestHandler, bytes, tuple[int, int] | None], None]


@pytest.fixture
def serve(shard: Path) -> Iterator[Callable[[Answer], str]]:
    """Serves the folder of the shard; what happens to a request for a shard is the test's."""
    servers = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                file = shard.parent / self.path.lstrip("/")
                if not file.is_file():
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = file.read_bytes()
                asked = self.headers.get("Range")
                first, _, last = (asked or "").removeprefix("bytes=").partition("-")
                span = (int(first), int(last) + 1) if asked else None
                if file.suffix == ".tar":
                    answer(self, data, span)
                else:
                    whole(self, data, None)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()


def whole(request: Any, data: bytes, span: tuple[int, int] | None, *, said: int | None = None, sent: int = -1) -> None:
    """An answer, told to have ``said`` bytes, of which ``sent`` come."""
    body = data[slice(*span)] if span else data
    request.send_response(206 if span else 200)
    request.send_header("Content-Length", str(len(body) if said is None else said))
    request.send_header("Accept-Ranges", "bytes")
    if span:
        request.send_header("Content-Range", f"bytes {span[0]}-{span[0] + len(body) - 1}/{len(data)}")
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body if sent < 0 else body[:sent])
        if 0 <= sent < len(body):
            request.close_connection = True


def keys(url: str) -> list[str]:
    return [raw["__key__"] for raw in read_shard(url)]


ALL = [f"k{number:03d}" for number in range(40)]


def test_archives_are_refused_with_how_to_unpack_them(shard: Path, tmp_path: Path) -> None:
    for name, how in (("b.tar.gz", "gunzip"), ("c.TGZ", "gunzip"), ("d.tar.zst", "unzstd"), ("e.zip", "unzip")):
        with pytest.raises(UserError, match=f"{name} is compressed, and shards are plain .tar files.*{how}"):
            find_shards(str(tmp_path / name))
    with pytest.raises(UserError, match=r"001\.tar\.gz is compressed"):
        find_shards("memory://bucket/{001..003}.tar.gz")
    (tmp_path / "f.zip").touch()  # beside shards it may be anything
    assert find_shards(str(tmp_path)) == [str(shard)]
    (tmp_path / "shard-000001.tgz").touch()  # this one is a shard that would be missing
    with pytest.raises(UserError, match=r"shard-000001\.tgz is compressed"):
        find_shards(str(tmp_path))


def test_the_home_is_found_without_a_shell(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("~", "~/shard-{000000..000000}.tar", [tmp_path]):
        assert find_shards(source) == [str(shard)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a{0..3", "the pattern a{0..3 is none"),
        ("*.tar", "name their folder, or count them in braces"),
        ("", "shards are named by a folder"),
        ([], "shards are named by a folder"),
        ([3], "shards are named by a folder"),
        ("a" * 5000, "no shards at"),
    ],
)
def test_what_names_no_shards_is_a_sentence(source: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        find_shards(source)


def test_an_index_of_other_bytes_is_none(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="is not a shard index"):
        find_shards(str(tmp_path))


def test_a_full_disk_is_not_waited_for() -> None:
    asked = []

    def ask() -> None:
        asked.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        sources.retry(ask, "it")
    assert len(asked) == 1


def test_a_sound_server_is_read_like_a_disk(serve: Any, shard: Path) -> None:
    url = serve(whole)
    assert find_shards(url) == [f"{url}shard-000000.tar"]
    assert [raw | {"__shard__": 0} for raw in read_shard(f"{url}shard-000000.tar")] == [
        raw | {"__shard__": 0} for raw in read_shard(str(shard))
    ]


def test_no_block_is_fetched_twice(serve: Any, shard: Path) -> None:
    asked: list[Any] = []

    def counts(request: Any, data: bytes, span: tuple[int, int] | None) -> None:
        if request.command == "GET":
            asked.append(span)
        whole(request, data, span)

    assert keys(f"{serve(counts)}shard-000000.tar") == ALL
    assert len(asked) <= -(-shard.stat().st_size // 4096) + 1
    assert len(asked) == len(set(asked))


def test_dropped_connections_lose_nothing(serve: Any) -> None:
    rng = random.Random(0)

    def drops(request: Any, data: bytes, span: tuple[int, int] | None) -> None:
        if rng.random() < 0.4:  # some before a byte came, some in the middle of a block
            whole(request, data, span, sent=rng.choice([0, 100, 2000]))
        else:
            whole(request, data, span)

    assert keys(f"{serve(drops)}shard-000000.tar") == ALL


def test_a_part_that_comes_short_is_asked_for_again(serve: Any) -> None:
    """The answer is whole by its own account, and is less than was asked for."""
    rng = random.Random(1)

    def shortens(request: Any, data: bytes, span: tuple[int, int] | None) -> None:
        less = rng.choice([0, 0, 1024])
        whole(request, data, span and (span[0], max(span[0] + 1, min(span[1], len(data)) - less)))

    assert keys(f"{serve(shortens)}shard-000000.tar") == ALL


def test_a_server_that_is_down_for_a_while_loses_nothing(serve: Any) -> None:
    answers = iter([503, 500, 429])

    def recovers(request: Any, data: bytes, span: tuple[int, int] | None) -> None:
        code = next(answers, None)
        if code is None:
            whole(request, data, span)
        else:
            request.send_response(code)
            request.send_header("Content-Length", "0")
            request.end_headers()

    assert keys(f"{serve(recovers)}shard-000000.tar") == ALL


def test_a_server_without_ranges_is_read_whole(serve: Any) -> None:
    assert keys(f"{serve(lambda request, data, span: whole(request, data, None))}shard-000000.tar") == ALL


@pytest.mark.parametrize("more", [-12_000, 12_000], ids=["too little", "too much"])
def test_a_lie_about_the_length_is_counted_not_believed(serve: Any, more: int) -> None:
    """HEAD says another length than the file has: what cannot be read is lost by name and number."""

    def lies(request: Any, data: bytes, span: tuple[int, int] | None) -> None:
        if request.command == "HEAD" or span is None:
            whole(request, data, span, said=len(data) + more)
        else:
            whole(request, data, span)

    url = f"{serve(lies)}shard-000000.tar"
    *good, last = read_shard(url)
    assert [raw["__key__"] for raw in good] == ALL[: len(good)]
    assert last["__lost__"] == max(1, 40 - len(good))
    assert "shard-000000.tar" in last["__key__"]


def test_what_never_comes_is_lost_with_its_number(serve: Any) -> None:
    def dies(request: Any, data: bytes, span: tuple[int, int] | None) -> None:
        if span is not None and span[0] >= 20_000:
            whole(request, data, span, sent=10)
        else:
            whole(request, data, span)

    *good, last = read_shard(f"{serve(dies)}shard-000000.tar")
    assert 0 < len(good) < 40
    assert last["__lost__"] == 40 - len(good)
    assert "did not come in 6 tries" in last["__broken__"]


def test_a_shard_that_is_not_there_is_lost_with_its_number(serve: Any, shard: Path) -> None:
    url = serve(whole)
    shard.unlink()
    (lost,) = read_shard(f"{url}shard-000000.tar")
    assert lost["__lost__"] == 40


def test_object_stores_are_read_and_resumed(shard: Path) -> None:
    store = fsspec.filesystem("memory")
    for number in range(3):
        store.pipe_file(f"/bucket/shard-{number:06d}.tar", shard.read_bytes())
    index = {"samples": 120, "shards": {f"shard-{number:06d}.tar": {"samples": 40} for number in range(3)}}
    store.pipe_file("/bucket/index.json", json.dumps(index).encode())
    assert read_index("memory://bucket/") == index
    shards = find_shards("memory://bucket/shard-{000000..000002}.tar")
    assert shards == find_shards("memory://bucket/")
    stream = ShardStream(shards, seed=1, shuffle=25)
    assert stream.samples == 120
    read = list(stream.epoch(0, Slot()))
    assert sorted(raw["__key__"] for raw in read) == sorted(ALL * 3)
    with open_shard(shards[0]) as file:
        assert file.seek(-1024, 2) > 0
        assert file.read() == bytes(1024)


def test_a_shell_is_refused_unless_the_environment_allows_it(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = f"pipe:cat '{shard}'"
    monkeypatch.delenv(sources.PIPES, raising=False)
    with pytest.raises(UserError, match=r"would run a shell command: set LAVI_ALLOW_PIPES=1"):
        find_shards(pipe)
    monkeypatch.setenv(sources.PIPES, "1")
    assert keys(find_shards(pipe)[0]) == ALL
    (lost,) = read_shard("pipe:exit 3")
    assert "ended with status 3" in lost["__broken__"]


@pytest.mark.parametrize("url", ["ssh://host/a.tar", "github://owner:repo@/a.tar", "reference://x", "s4://b/a.tar"])
def test_other_stores_are_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"shards are not read from '.*://': (did you mean|known)"):
        find_shards(url)
