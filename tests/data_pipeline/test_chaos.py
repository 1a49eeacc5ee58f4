"""Readers killed, stopped and slowed at random while an epoch streams: every key exactly once, without stalls."""

import io
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from PIL import Image

from data_pipeline.actors import RayFeed, RayPipeline, ReaderConfig
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import TokenizerConfig
from jobs.bench_data.measure import cpu_seconds
from tests.data_pipeline.corpora import C, S, features, pairs_config, write_pairs
from tests.data_pipeline.servers import flaky_server

pytestmark = pytest.mark.distributed
BYTES = TokenizerConfig()
RANKS, PREFETCH = 2, 3
EPOCH = 100_000
"""Samples of the long test: some minutes, so that 200 restarts of two seconds are not most of it."""
SETTINGS = ReaderConfig(readers=3, cpus_per_reader=0.4, prefetch=PREFETCH, retries=50, timeout_s=240)


def photograph(number: int, width: int = 1024, height: int = 768) -> bytes:
    """A JPEG that decodes like a photograph of the web and takes little room."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grainy = np.clip(smooth + rng.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grainy).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def tiny_corpus(folder: Path, samples: int, batch: int) -> DatasetConfig:
    """Features of a few bytes: the readers' own work is all there is."""
    return write_corpus(
        folder, samples, {"npy": [features(1)]}, batch, media="features", num_features=S, width=C
    )


def photo_corpus(folder: Path, samples: int, batch: int) -> DatasetConfig:
    """Photographs at the paper's resolution: what an epoch of pairs costs."""
    photos = [photograph(number) for number in range(50)]
    return write_corpus(folder, samples, {"jpg": photos}, batch, image_size=320)


def write_corpus(
    folder: Path, samples: int, members: dict[str, list[bytes]], batch: int, **settings: Any
) -> DatasetConfig:
    ((extension, blobs),) = members.items()
    with ShardWriter(str(folder), max_samples=max(10, samples // 40)) as writer:
        for number in range(samples):
            blob, text = blobs[number % len(blobs)], f"text {number}".encode()
            writer.write(f"k{number:06d}", {extension: blob, "txt": text})
    return DatasetConfig(
        name="pairs", kind="pair", urls=(str(folder),), batch_size=batch, seq_len=24, **settings
    )


def reader_processes() -> list[psutil.Process]:
    """The living readers of this test's own Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ray::Reader" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def reader_memory() -> int:
    """Bytes of the largest reader."""
    return max((process.memory_info().rss for process in reader_processes()), default=0)


def no_harm(step: int) -> None:
    pass


class Killer:
    """Sends SIGKILL to living readers at random moments of an epoch."""

    def __init__(self, kills: int, steps: int) -> None:
        self._draw = random.Random(0)
        self._due = Counter(self._draw.randrange(1, steps) for _ in range(kills))
        self._last, self._owed = steps - 1, 0
        self.killed = 0
        self.cpu_seconds = 0.0
        """What the killed ones had used, which nobody else remembers."""

    def __call__(self, step: int) -> None:
        self._owed += self._due[step]
        while self._owed:
            living = reader_processes()
            if not living and step < self._last:
                return  # all are starting; the next step has this one's too
            if not living:
                time.sleep(0.1)
                continue
            victim = self._draw.choice(living)
            used = victim.cpu_times()
            os.kill(victim.pid, signal.SIGKILL)
            self.cpu_seconds += used.user + used.system
            self._owed -= 1
            self.killed += 1


def epoch(
    pipeline: RayPipeline, config: DatasetConfig, samples: int, harm: Callable[[int], None] = no_harm
) -> tuple[list[str], float]:
    """Stream an epoch on all ranks, with `harm` before each step; return its keys and seconds."""
    feeds: list[RayFeed] = [pipeline.feed(rank) for rank in range(RANKS)]
    keys: list[str] = []
    started = time.monotonic()
    for step in range(samples // config.batch_size):
        harm(step)
        for rank, feed in enumerate(feeds):
            batch = feed.next(step)["pairs"]
            assert batch.skips == ()
            keys += batch.keys
            if step % 10 == 0:
                held = ray.get(pipeline.coordinators[rank].held.remote())
                assert len(held) <= PREFETCH + 2, "back-pressure"
    return keys, time.monotonic() - started


@contextmanager
def readers(config: DatasetConfig, settings: ReaderConfig = SETTINGS) -> Iterator[RayPipeline]:
    pipeline = RayPipeline([config], BYTES, seed=3, dp_size=RANKS, config=settings)
    try:
        yield pipeline
    finally:
        pipeline.shutdown()


def chaos(
    config: DatasetConfig, samples: int, kills: int, settings: ReaderConfig = SETTINGS
) -> dict[str, tuple[float, float]]:
    """Stream an epoch in peace and one under fire; return wall and CPU seconds of both."""
    with readers(config, settings) as pipeline:
        used = [cpu_seconds()]
        calm_keys, calm = epoch(pipeline, config, samples)
        used.append(cpu_seconds())
        before = reader_memory()
        killer = Killer(kills, samples // config.batch_size)
        keys, wild = epoch(pipeline, config, samples, killer)
        used.append(cpu_seconds())
        assert killer.killed == kills
        assert keys == calm_keys
        assert keys[: config.batch_size] == list(DatasetStream(config, BYTES, 3).batch(0).keys)
        assert Counter(keys) == Counter(f"k{number:06d}" for number in range(samples))
        assert reader_memory() < before + (100 << 20)
        assert pipeline.feed(0).summary()["pairs"]["bad"] == 0
    return {"wall": (calm, wild), "CPU": (used[1] - used[0], used[2] - used[1] + killer.cpu_seconds)}


def test_a_few_kills(ray_cluster: None, tmp_path: Path) -> None:
    chaos(tiny_corpus(tmp_path / "corpus", 1200, 40), 1200, 6)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hundred_kills(ray_cluster: None, tmp_path: Path) -> None:
    """An epoch of real decoding takes at most twice as long when 200 readers are killed in it."""
    config = photo_corpus(tmp_path / "corpus", EPOCH, 40)
    try:
        # More readers than two cores keep busy: they work on while others start.
        spent = chaos(config, EPOCH, 200, replace(SETTINGS, readers=5))
    finally:
        shutil.rmtree(tmp_path / "corpus")  # ten gigabytes
    for name, (calm, wild) in spent.items():
        print(
            f"{EPOCH:,} samples, {name}: {calm:.1f} s in peace, {wild:.1f} s with 200 kills: {wild / calm:.2f}"
        )
    calm, wild = spent["wall"]
    assert wild <= 2 * calm


def test_a_stopped_reader_stalls_nothing(ray_cluster: None, tmp_path: Path) -> None:
    """SIGSTOP: a reader that hangs in its storage, as slow as can be. It would hold up a step for ever."""
    config = tiny_corpus(tmp_path / "corpus", 1200, 40)
    with readers(config, replace(SETTINGS, timeout_s=60)) as pipeline:
        calm_keys, _ = epoch(pipeline, config, 1200)
        stopped: list[psutil.Process] = []

        def stop(step: int) -> None:
            if step == 3:
                stopped.append(reader_processes()[0])
                os.kill(stopped[0].pid, signal.SIGSTOP)

        try:
            keys, _ = epoch(pipeline, config, 1200, stop)
            asked_twice = sum(ray.get([c.asked_twice.remote() for c in pipeline.coordinators]))
            assert stopped[0].status() == psutil.STATUS_STOPPED, "it was never waited for"
        finally:
            for process in stopped:
                os.kill(process.pid, signal.SIGCONT)
        assert keys == calm_keys
        # What the stopped one held, and what a busy machine made late beside it.
        asked = RANKS * 1200 // config.batch_size
        assert 1 <= asked_twice <= asked // 2, "what it held was asked for once more, not all"
        counts = pipeline.feed(0).summary()["pairs"]
        assert counts["bad"] == 0


def test_straggling_requests_are_made_again(ray_cluster: None, tmp_path: Path) -> None:
    """Two requests that the storage does not answer for minutes hold up two readers, and no step."""
    write_pairs(tmp_path / "corpus", 160, per_shard=160)
    (shard,) = (tmp_path / "corpus").glob("*.tar")
    with flaky_server(tmp_path, faults=("minutes",), share=0.0, most=2) as server:
        config = pairs_config(f"{server.url}/corpus/{shard.name}", batch_size=8)
        with readers(config, replace(SETTINGS, timeout_s=100)) as pipeline:

            def straggle(step: int) -> None:
                server.share = 0.2 if step >= 4 else 0.0

            keys, _ = epoch(pipeline, config, 160, straggle)
            asked_twice = sum(ray.get([c.asked_twice.remote() for c in pipeline.coordinators]))
    assert sorted(keys) == [f"p{number:03d}" for number in range(160)]
    assert server.met["minutes"] == 2
    assert asked_twice >= 2
