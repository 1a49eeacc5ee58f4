"""Streaming from an S3 server and from web servers that fail: nothing lost, nothing repeated, nothing wrong."""

import json
import multiprocessing
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data_pipeline.cache import LocalCache
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.errors import BadDataError
from data_pipeline.feed import LocalFeed
from data_pipeline.index import open_index, write_index
from data_pipeline.storage import Storage, StorageError, parse_options
from data_pipeline.tokenizer import TokenizerConfig
from tests.data_pipeline.corpora import pairs_config, write_pairs
from tests.data_pipeline.servers import FAULTS, FlakyServer, flaky_server
from tests.data_pipeline.test_data_stream import same

BYTES = TokenizerConfig()
TOK = BYTES.load()
COUNT = 40


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "corpus", COUNT, per_shard=7)
    return tmp_path / "corpus"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.storage._FIRST_PAUSE_S", 0.001)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Endpoint of an S3 server in this process, over real sockets."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def gcs() -> Iterator[str]:
    """Endpoint of a Google Cloud Storage server in this process, over real sockets."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


def config(url: str, **changes: Any) -> DatasetConfig:
    return pairs_config(url, **({"batch_size": 8, "read_attempts": 12} | changes))


def assert_one_epoch(stream: DatasetStream, local: DatasetStream) -> None:
    """Every batch equals the local one's, and every key comes once."""
    keys: list[str] = []
    for step in range(COUNT // 8):
        batch = stream.batch(step)
        assert batch.skips == ()
        assert same(batch, local.batch(step))
        keys += batch.keys
    assert sorted(keys) == [f"p{i:03d}" for i in range(COUNT)]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_object_stores_with_an_endpoint(
    scheme: str, corpus: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    endpoint = request.getfixturevalue({"s3": "s3", "gs": "gcs"}[scheme])
    options = json.dumps({"endpoint_url": endpoint})
    fs = fsspec.filesystem(scheme, endpoint_url=endpoint)
    fs.mkdir("corpora")
    for file in sorted(corpus.iterdir()):
        fs.pipe_file(f"corpora/pairs/{file.name}", file.read_bytes())
    local = DatasetStream(config(str(corpus)), TOK, 3)
    for url in (f"{scheme}://corpora/pairs", f"{scheme}://corpora/pairs/*.tar"):
        for folder in ("", str(tmp_path / "cache")):
            remote = DatasetStream(
                config(url, storage_options=options, cache_folder=folder, threads=2), TOK, 3
            )
            assert remote.describe()["shards"] == local.describe()["shards"]
            assert_one_epoch(remote, local)
    # Without an index the tars are scanned in place.
    fs.rm([p for p in fs.ls("corpora/pairs") if p.endswith(".json")])
    fs.invalidate_cache()
    bare = DatasetStream(config(f"{scheme}://corpora/pairs", storage_options=options), TOK, 3)
    assert bare.describe()["shards"] == local.describe()["shards"]
    assert_one_epoch(bare, local)
    fs.rm("corpora/pairs/shard-000001.tar")
    skips = [skip for step in range(5) for skip in bare.batch(step).skips]
    assert {(skip.cause, skip.fatal) for skip in skips} == {("missing shard", True)}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_web_server(corpus: Path, fault: str) -> None:
    with flaky_server(corpus, faults=(fault,)) as server:
        stream = DatasetStream(config(server.url, threads=2), TOK, 3)
        assert_one_epoch(stream, DatasetStream(config(str(corpus)), TOK, 3))
        assert server.met[fault] > 20


def test_all_faults_without_an_index_and_with_a_cache(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "local")
    local = DatasetStream(config(str(tmp_path / "local")), TOK, 3)
    for side in corpus.glob("*.json"):
        side.unlink()
    with flaky_server(corpus) as server:
        changes = {"cache_folder": str(tmp_path / "cache"), "cache_chunk_bytes": 4096}
        urls = f"{server.url}/shard-{{000000..000005}}.tar"
        assert_one_epoch(DatasetStream(config(urls, **changes), TOK, 3), local)
        assert set(FAULTS) <= set(server.met)
        sent = server.bytes_sent
        # The second reader finds the offsets and the bytes on its own disk.
        again = DatasetStream(config(urls, **changes), TOK, 3)
        assert_one_epoch(again, local)
        assert server.bytes_sent - sent < sent / 4, "sizes are asked for, bodies are not"


def test_reads_come_in_chunks_with_a_cache(corpus: Path, tmp_path: Path) -> None:
    """The read-ahead: one request a chunk, however many samples lie in it."""
    with flaky_server(corpus, share=0.0) as server:
        stream = DatasetStream(config(server.url, cache_folder=str(tmp_path / "cache")), TOK, 3)
        server.requests.clear()
        assert_one_epoch(stream, DatasetStream(config(str(corpus)), TOK, 3))
        tars = {path: n for path, n in server.requests.items() if path.endswith(".tar")}
        assert set(tars.values()) == {1}
        assert len(tars) == 6


def test_an_outage_stops_the_run_and_loses_nothing(corpus: Path) -> None:
    with flaky_server(corpus, share=0.0) as server:
        feed = LocalFeed([config(server.url, read_attempts=3)], BYTES, seed=3)
        feed.next(0)
        server.share, server.faults = 1.0, ("503",)
        with pytest.raises(BadDataError, match=r"unreadable shard.*3 attempts.*503"):
            feed.next(1)
        server.share = 0.0
        # The same run, started again when the storage is back, reads what it would have read.
        resumed = LocalFeed([config(server.url)], BYTES, seed=3)
        assert resumed.check_state(feed.state(1)) == 1
        assert same(resumed.next(1)["pairs"], DatasetStream(config(str(corpus)), TOK, 3).batch(1))


def test_a_cut_is_believed_only_when_the_size_says_so(corpus: Path) -> None:
    tar = corpus / "shard-000000.tar"
    whole = tar.read_bytes()
    with flaky_server(corpus, share=0.0) as server:
        storage, url = Storage(attempts=3), f"{server.url}/{tar.name}"
        assert storage.read(url, 100, 600) == whole[100:600]
        assert storage.read(url, len(whole) - 10, len(whole) + 10) == whole[-10:]
        server.share, server.faults = 1.0, ("cut without a length",)
        with pytest.raises(StorageError, match="3 attempts: .* of 500 bytes came"):
            storage.read(url, 100, 600)
        with pytest.raises(FileNotFoundError):
            storage.read(f"{server.url}/absent.tar", 0, 10)


def test_refusals_are_not_tried_again(tmp_path: Path) -> None:
    class ForbiddenError(OSError):
        status = 403

    calls = Counter[str]()

    def refuse(error: Exception) -> None:
        calls[type(error).__name__] += 1
        raise error

    storage = Storage(attempts=5)
    with pytest.raises(StorageError, match="1 attempts"):
        storage.tried(lambda: refuse(ForbiddenError("no")), "x")
    with pytest.raises(ZeroDivisionError):
        storage.tried(lambda: refuse(ZeroDivisionError()), "x")
    with pytest.raises(StorageError, match="5 attempts"):
        storage.tried(lambda: refuse(ConnectionResetError()), "x")
    assert calls == {"ForbiddenError": 1, "ZeroDivisionError": 1, "ConnectionResetError": 5}


def test_index_of_a_web_folder_without_a_listing(corpus: Path) -> None:
    with flaky_server(corpus, share=0.0) as server:
        assert open_index([server.url]).fingerprint == open_index([str(corpus)]).fingerprint
    write_index(str(corpus))


def cache_worker(folder: str, number: int, rounds: int) -> None:
    cache = LocalCache(folder=folder, max_bytes=20_000, chunk_bytes=1000)
    draw = np.random.default_rng(number)
    for _ in range(rounds):
        key = int(draw.integers(60))
        body = bytes([key]) * (500 + 10 * key)
        found = cache.get(str(key))
        assert found in (None, body), "whole and right, or absent"
        if found is None:
            cache.put(str(key), body)
        # Nothing but entries and the lock; the bound holds whenever nobody is writing inside the lock.
        with cache._lock():
            sizes = [e.stat().st_size for e in os.scandir(folder) if e.name != ".lock"]
            assert sum(sizes) <= 20_000, sizes


def test_the_cache_is_bounded_and_safe_among_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=cache_worker, args=(str(tmp_path / "c"), n, 300)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def test_the_cache_drops_what_was_not_used_and_what_is_damaged(tmp_path: Path) -> None:
    cache = LocalCache(folder=str(tmp_path), max_bytes=3100, chunk_bytes=1000)
    for number in range(3):
        cache.put(str(number), bytes(1000))
        os.utime(cache._path(str(number)), (number, number))
    assert cache.get("0") is not None  # now the one used last
    cache.put("3", bytes(1000))
    assert cache.get("1") is None
    assert cache.get("0") == cache.get("3") == bytes(1000)
    path = cache._path("0")
    path.write_bytes(path.read_bytes()[:-9])
    assert cache.get("0") is None
    assert not path.exists()
    cache.put("huge", bytes(9999))
    assert cache.get("huge") is None
    (tmp_path / "file").write_bytes(b"")
    unusable = LocalCache(folder=str(tmp_path / "file" / "x"), max_bytes=10_000)
    unusable.put("a", b"b")
    assert unusable.get("a") is None, "a cache that cannot write costs nothing but itself"


@pytest.mark.parametrize("options", ["{", "[1]", '{"secret": "x"}', '{"key": "x"}'])
def test_bad_options(options: str) -> None:
    with pytest.raises(ValueError, match="storage_options"):
        parse_options(options)
    with pytest.raises(ValueError, match="storage_options"):
        config("memory://x", storage_options=options)


def test_servers_are_named(corpus: Path) -> None:
    with flaky_server(corpus, share=0.0) as server:
        assert isinstance(server, FlakyServer)
        assert server.url.startswith("http://127.0.0.1:")
