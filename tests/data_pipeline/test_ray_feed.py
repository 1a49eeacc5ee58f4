"""Readers as real Ray actors: sharing, prefetch, killed actors, budgets, resume."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from data_pipeline.actors import RayFeed, RayPipeline, ReaderConfig
from data_pipeline.config import DatasetConfig
from data_pipeline.errors import BadDataError, MissingShardError, ResumeError
from data_pipeline.feed import LocalFeed
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import TokenizerConfig
from tests.data_pipeline.corpora import one_of_each, pairs_config, picture
from tests.data_pipeline.test_data_stream import same

pytestmark = pytest.mark.distributed
BYTES = TokenizerConfig()
QUICK = ReaderConfig(readers=2, cpus_per_reader=0.5, prefetch=2, timeout_s=60)
Start = Callable[..., RayPipeline]


@pytest.fixture
def start(ray_cluster: None) -> Iterator[Start]:
    """Starts pipelines and stops them after the test."""
    running: list[RayPipeline] = []

    def make(datasets: Any, **settings: Any) -> RayPipeline:
        defaults: dict[str, Any] = {"seed": 3, "dp_size": 1, "config": QUICK}
        running.append(RayPipeline(datasets, BYTES, **(defaults | settings)))
        return running[-1]

    yield make
    for pipeline in running:
        pipeline.shutdown()


@pytest.fixture(scope="module")
def shared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPipeline]:
    """A pipeline of 2 x 2 ranks; tests may kill its readers and coordinators, which come back."""
    folder = tmp_path_factory.mktemp("shared")
    pipeline = RayPipeline(one_of_each(folder), BYTES, seed=3, dp_size=2, tp_size=2, config=QUICK)
    yield pipeline
    pipeline.shutdown()


def local_feeds(folder: Path) -> list[LocalFeed]:
    return [LocalFeed(one_of_each(folder), BYTES, seed=3, dp_rank=d, dp_size=2) for d in range(2)]


def first_refusal(feed: RayFeed, steps: range) -> tuple[int, str]:
    """The step at which a feed refuses to go on, and why."""
    for step in steps:
        try:
            feed.next(step)
        except BadDataError as error:
            return step, str(error)
    return steps.stop, ""


@ray.remote(num_cpus=0)
class Rank:
    """A stand-in for a trainer rank: a process of its own that received a feed."""

    def __init__(self, feed: RayFeed) -> None:
        self._feed = feed

    def keys(self, step: int) -> dict[str, tuple[str, ...]]:
        return {name: batch.keys for name, batch in self._feed.next(step).items()}

    def refusal(self, steps: int) -> tuple[int, str]:
        return first_refusal(self._feed, range(steps))


def folder_of(pipeline: RayPipeline) -> Path:
    return Path(pipeline.datasets[0].urls[0]).parent


def test_ray_and_local_feeds_agree(shared: RayPipeline) -> None:
    feeds = {(d, t): shared.feed(d, t) for d in range(2) for t in range(2)}
    local = local_feeds(folder_of(shared))
    for step in (0, 1, 2, 3, 10, 4):  # a jump, as a resume makes it, is served too
        for d in range(2):
            expected = local[d].next(step)
            for t in range(2):
                batches = feeds[d, t].next(step)
                assert list(batches) == ["pairs", "docs", "videos"]
                assert all(same(batches[n], expected[n]) for n in batches)
                assert batches["pairs"].tokens_BT.dtype == np.int64
    state = json.loads(json.dumps(feeds[0, 0].state(4)))
    assert state == local[0].state(4)
    assert feeds[1, 1].check_state(state) == 4
    state["datasets"]["docs"]["seed"] = 4
    with pytest.raises(ResumeError, match=r"docs\.seed was 4, is 3"):
        feeds[0, 1].check_state(state)
    state = json.loads(json.dumps(feeds[0, 0].state(4)))
    then = state["datasets"]["docs"]["evidence"]["sha256"]
    then["sums"] = [number + 5 for number in then["sums"]]  # as if shard number 1 had held something else
    with pytest.raises(ResumeError, match=r"docs: \S+docs/shard-000001.tar was changed since the checkpoint"):
        feeds[0, 1].check_state(state)


def test_peers_share_one_object_and_memory_is_bounded(shared: RayPipeline) -> None:
    coordinator = shared.coordinators[1]
    first = ray.get(coordinator.next.remote(20, 0))["pairs"][0]
    assert ray.get(coordinator.next.remote(20, 1))["pairs"][0] == first
    assert not ray.get(first).media.flags.writeable, "a view of the object store"
    for step in range(21, 26):
        ray.get(coordinator.next.remote(step, 0))
        assert step - 1 in ray.get(coordinator.held.remote()), "the other peer has not taken it"
        ray.get(coordinator.next.remote(step, 1))
        assert ray.get(coordinator.held.remote()) == [step, step + 1, step + 2]


def test_a_killed_reader_costs_nothing(shared: RayPipeline) -> None:
    feed = shared.feed(0)
    expected = local_feeds(folder_of(shared))[0]
    for step in range(30, 38):
        if step in (32, 35):
            ray.kill(shared.readers[step % 2], no_restart=False)
        batches, wanted = feed.next(step), expected.next(step)
        assert all(same(batches[n], wanted[n]) for n in batches)
    assert all(counts["bad"] == 0 for counts in feed.summary().values())


def test_a_killed_coordinator_costs_nothing(shared: RayPipeline) -> None:
    feeds = [shared.feed(1, t) for t in range(2)]
    expected = local_feeds(folder_of(shared))[1]
    for step in range(40, 45):
        wanted = expected.next(step)["docs"]
        assert same(feeds[0].next(step)["docs"], wanted)
        if step == 42:
            ray.kill(shared.coordinators[1], no_restart=False)  # between the peers of one step
        assert same(feeds[1].next(step)["docs"], wanted)


def test_there_is_no_such_rank(shared: RayPipeline) -> None:
    with pytest.raises(ValueError, match="serves 2 data-parallel x 2 tensor-parallel"):
        shared.feed(2)


def write_half_bad(folder: Path) -> DatasetConfig:
    with ShardWriter(str(folder)) as writer:
        for i in range(40):
            writer.write(f"s{i:02d}", {"png": picture(i), "txt": b"" if i >= 20 and i % 2 else b"text"})
    return pairs_config(folder, mode="eval", bad_sample_floor=3)


def test_all_ranks_fail_at_the_same_step(tmp_path: Path, start: Start) -> None:
    config = write_half_bad(tmp_path / "data")
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    pipeline = start([config], dp_size=2, tp_size=2, quarantine=quarantine)
    first, peer, other = pipeline.feed(0, 0), Rank.remote(pipeline.feed(0, 1)), pipeline.feed(1, 0)
    # Ranks that trained together would meet in a collective after each step.
    for step in range(4):
        keys = {name: batch.keys for name, batch in first.next(step).items()}
        assert ray.get(peer.keys.remote(step)) == keys
        assert other.next(step)["pairs"].keys != keys["pairs"]
    stops = [
        first_refusal(first, range(10)),
        ray.get(peer.refusal.remote(10)),
        first_refusal(other, range(10)),
    ]
    assert len({step for step, _ in stops}) == 1
    assert 4 <= stops[0][0] <= 8
    for _, message in stops:
        assert "data set 'pairs'" in message
        assert "x empty caption" in message
        assert "Traceback" not in message
    for _ in range(
        50
    ):  # the readers are still ahead: what they skip between the two looks is in one of them alone
        counts = pipeline.feed(0).summary()["pairs"]
        lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
        if len(lines) == counts["bad"]:
            break
        time.sleep(0.1)
    assert {line["cause"] for line in lines} == {"empty caption"}
    assert len({line["position"] for line in lines}) == len(lines) == counts["bad"] >= 4


def test_skips_are_counted_over_ranks_and_a_dead_reader_stops_them_all(tmp_path: Path, start: Start) -> None:
    config = dataclasses.replace(write_half_bad(tmp_path / "data"), bad_sample_budget=0.5)
    pipeline = start([config], dp_size=2, config=dataclasses.replace(QUICK, readers=1))
    feeds = [pipeline.feed(d) for d in range(2)]
    skips = sum(len(feed.next(step)["pairs"].skips) for step in range(10) for feed in feeds)
    assert skips == 10
    counts = feeds[0].summary()["pairs"]
    assert counts["causes"] == {"empty caption": 10}
    assert 40 <= counts["read"] <= 48, "with what was read ahead"
    ray.kill(pipeline.readers[0], no_restart=True)
    begun = time.monotonic()
    stops = [first_refusal(feed, range(10, 30)) for feed in feeds]
    assert stops[0][0] == stops[1][0] < 30, "the same step on both ranks"
    assert all("reader failed" in message and "ActorDiedError" in message for _, message in stops)
    assert time.monotonic() - begun < 30


def test_errors_come_before_any_actor(pairs: Any, tmp_path: Path, start: Start) -> None:
    with pytest.raises(MissingShardError, match="no such folder"):
        start([pairs_config(tmp_path / "absent")])
    with pytest.raises(ValueError, match="does not divide"):
        start([pairs()], dp_size=3)


def test_starved_readers_time_out(pairs: Any, start: Start) -> None:
    config = ReaderConfig(readers=1, cpus_per_reader=64, timeout_s=1)
    with pytest.raises(TimeoutError, match="lower cpus_per_reader"):
        start([pairs()], config=config).feed(0).next(0)


def test_readers_do_not_import_torch() -> None:
    code = "import sys, data_pipeline.actors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "changes",
    [{"readers": 0}, {"prefetch": -1}, {"timeout_s": 0}, {"cpus_per_reader": -1}, {"slow_after": 0.5}],
)
def test_bad_settings(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        ReaderConfig(**changes)


def test_a_vanished_shard_stops_the_run(shared: RayPipeline) -> None:
    """Comes last: its pipeline never runs again."""
    feed = shared.feed(0)
    feed.next(60)
    for shard in (folder_of(shared) / "docs").glob("*.tar"):
        shard.unlink()
    step, message = first_refusal(feed, range(61, 80))
    assert step < 70
    assert "data set 'docs': missing shard" in message
    assert "vanished" in message
