"""The same global batches on any number of ranks and readers, wherever killed; seeks that cost nothing."""

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.actors import Reader
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.feed import LocalFeed, check_saved, make_state
from data_pipeline.index import ShardEntry, ShardIndex
from data_pipeline.order import SampleOrder
from data_pipeline.permutation import Permutation
from data_pipeline.shards import Member, SampleRecord, ShardWriter, encode_side
from data_pipeline.storage import Storage
from data_pipeline.tokenizer import TokenizerConfig
from tests.data_pipeline.corpora import C, S, features

TOK = TokenizerConfig().load()
STEPS = 7


def write_shards(folder: Path, counts: list[int]) -> tuple[str, ...]:
    """One folder a shard, so that shards have the sizes that hypothesis wants."""
    number = 0
    for shard, count in enumerate(counts):
        with ShardWriter(str(folder / f"{shard:02d}")) as writer:
            for _ in range(count):
                writer.write(f"k{number:04d}", {"npy": features(number), "txt": f"text {number}".encode()})
                number += 1
    return tuple(str(folder / f"{shard:02d}") for shard in range(len(counts)))


def dataset(urls: tuple[str, ...], batch: int, name: str = "pairs") -> DatasetConfig:
    return DatasetConfig(
        name=name,
        kind="pair",
        urls=urls,
        batch_size=batch,
        seq_len=16,
        shuffle_shards=2,
        media="features",
        num_features=S,
        width=C,
    )


class Cluster:
    """Readers that may die, and ranks that ask them as the coordinators do."""

    def __init__(self, config: DatasetConfig, seed: int, readers: int, ranks: int) -> None:
        self.config, self.seed, self.ranks = config, seed, ranks
        self.index = DatasetStream(config, TOK, seed).index
        self.readers = [self._start() for _ in range(readers)]

    def _start(self) -> Reader:
        reader = Reader((self.config,), self.seed)
        reader.open_streams(TOK, {self.config.name: self.index})
        return reader

    def kill(self, reader: int) -> None:
        self.readers[reader % len(self.readers)] = self._start()

    def step(self, step: int) -> tuple[tuple[str, ...], np.ndarray]:
        """The keys and tokens of a global batch, put together from the ranks."""
        parts = []
        for rank in range(self.ranks):
            reader = self.readers[(step * self.ranks + rank) % len(self.readers)]
            parts.append(reader.make(self.config.name, step, rank, self.ranks)[0])
        return sum((p.keys for p in parts), ()), np.concatenate([p.tokens_BT for p in parts])


layouts = st.tuples(st.integers(1, 7), st.integers(1, 8))  # readers, ranks


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    before=layouts,
    after=layouts,
    stop=st.integers(0, STEPS - 1),
    kills=st.lists(st.tuples(st.integers(0, STEPS - 1), st.integers(0, 6)), max_size=6),
)
def test_any_layout_continues_the_straight_run(
    seed: int,
    counts: list[int],
    before: tuple[int, int],
    after: tuple[int, int],
    stop: int,
    kills: list[tuple[int, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = dataset(write_shards(Path(folder), counts), math.lcm(before[1], after[1]))
        straight = DatasetStream(config, TOK, seed)
        wanted = [straight.batch(step) for step in range(STEPS)]
        first, second = (Cluster(config, seed, *layout) for layout in (before, after))
        saved: dict[str, Any] = {}
        step = 0
        while step < STEPS:
            cluster = first if step < stop else second
            if step == stop:  # the first layout is gone; what it saved is all that is left
                described = {config.name: straight.describe()}
                saved = json.loads(json.dumps(make_state(described, step)))
                step = check_saved(described, saved)
            for _, reader in (k for k in kills if k[0] == step):
                cluster.kill(reader)
            keys, tokens_BT = cluster.step(step)
            assert keys == wanted[step].keys
            np.testing.assert_array_equal(tokens_BT, wanted[step].tokens_BT)
            step += 1
        assert saved["step"] == stop


def test_feeds_of_other_layouts_accept_the_state(tmp_path: Path) -> None:
    config = dataset(write_shards(tmp_path, [5, 3, 8]), 24)
    tokenizer = TokenizerConfig()
    straight = LocalFeed([config], tokenizer, seed=1)
    saved = json.loads(json.dumps(LocalFeed([config], tokenizer, seed=1, dp_rank=2, dp_size=3).state(5)))
    assert saved == straight.state(5), "no layout in the position"
    for size in (1, 2, 4, 8):
        feeds = [LocalFeed([config], tokenizer, seed=1, dp_rank=r, dp_size=size) for r in range(size)]
        assert {feed.check_state(saved) for feed in feeds} == {5}
        keys = sum((feed.next(5)["pairs"].keys for feed in feeds), ())
        assert keys == straight.next(5)["pairs"].keys


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 2**32))
def test_computed_permutations_are_permutations(n: int, seed: int) -> None:
    permutation = Permutation(n, np.random.default_rng(seed))
    images = [permutation(i) for i in range(n)]
    assert sorted(images) == list(range(n))
    again = Permutation(n, np.random.default_rng(seed))
    assert [again(i) for i in range(n)] == images


def test_computed_permutations_look_random() -> None:
    n = 20_000
    permutation = Permutation(n, np.random.default_rng(5))
    images = np.array([permutation(i) for i in range(n)])
    ranks = np.arange(n)
    # 5 standard deviations of a random permutation each.
    assert abs(np.corrcoef(ranks, images)[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 5 / np.sqrt(n)
    assert (images == ranks).sum() < 10, "about one fixed point"
    # Ten by ten cells of (place, image) are filled evenly: chi-squared of 81 degrees of freedom.
    cells, _, _ = np.histogram2d(ranks, images, bins=10)
    assert ((cells - n / 100) ** 2 / (n / 100)).sum() < 81 + 5 * np.sqrt(2 * 81)


class SyntheticStorage(Storage):
    """Side files made when they are read, and a count of the reads."""

    def __init__(self, per_shard: int) -> None:
        super().__init__()
        self.reads: list[str] = []
        blob = features(1)
        text = b"a text"
        self._bytes = blob + text
        members = {"npy": Member(0, len(blob)), "txt": Member(len(blob), len(text))}
        self._side = encode_side([SampleRecord(f"k{i}", members) for i in range(per_shard)], 1 << 20)

    def read_all(self, url: str) -> bytes:
        self.reads.append(url)
        return self._side

    def read(self, url: str, start: int, stop: int, *, size: int | None = None, version: str = "") -> bytes:
        self.reads.append(url)
        return self._bytes[start:stop]


def synthetic_stream(shards: int, per_shard: int) -> tuple[DatasetStream, SyntheticStorage]:
    storage = SyntheticStorage(per_shard)
    entries = (ShardEntry(f"s3://bucket/{i:06d}.tar", per_shard, 1 << 20) for i in range(shards))
    index = ShardIndex(entries, storage=storage)
    return DatasetStream(dataset(("s3://bucket",), 32), TOK, 7, index=index), storage


def calls_in(work: Any) -> int:
    """How many Python and C functions a piece of work calls."""
    count = 0

    def on_call(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_call)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_a_seek_costs_the_same_anywhere_and_with_any_number_of_shards() -> None:
    """Operations are counted, not seconds: the machine may be busy."""
    locate: dict[tuple[int, float], int] = {}
    state: dict[int, int] = {}
    for shards in (10, 1_000, 100_000):
        stream, storage = synthetic_stream(shards, 100)
        n = stream.num_samples
        for share in (0.0, 0.5, 0.9):
            order = SampleOrder(stream.index.counts, seed=7, name="pairs")
            locate[shards, share] = calls_in(
                lambda order=order, n=n, share=share: order.locate(int(share * n))
            )
        state[shards] = len(json.dumps(make_state({"pairs": stream.describe()}, int(0.9 * n / 32))))
        storage.reads.clear()
        assert len(stream.batch(int(0.9 * n / 32)).keys) == 32
        sides = [url for url in storage.reads if url.endswith(".json")]
        assert len(sides) <= 16, "offsets of the shards that are mixed, of no others"
        assert len(storage.reads) - len(sides) == 32, "one range a sample"
    assert max(locate.values()) < 2 * min(locate.values()) < 400
    assert max(state.values()) - min(state.values()) < 32, "the digits of the position"
    assert max(state.values()) < 2048


def test_ten_million_samples_open_without_a_list_of_them() -> None:
    stream, storage = synthetic_stream(1_000, 10_000)
    assert stream.num_samples == 10_000_000
    calls = calls_in(lambda: stream.positions(281_250))
    assert calls < 20
    batch = stream.batch(281_250)  # 90% of the epoch
    assert not batch.skips
    assert len([url for url in storage.reads if url.endswith(".json")]) <= 8


@pytest.fixture(autouse=True)
def no_profile_left() -> Iterator[None]:
    yield
    sys.setprofile(None)
