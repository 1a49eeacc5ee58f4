"""Readers killed at random while an epoch streams: every key exactly once, memory bounded."""

import random
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import ray

from data_pipeline.actors import RayFeed, RayPipeline, ReaderConfig
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import TokenizerConfig
from tests.data_pipeline.corpora import C, S, features

pytestmark = pytest.mark.distributed
BYTES = TokenizerConfig()
RANKS, PREFETCH = 2, 3


def corpus(folder: Path, samples: int, batch: int) -> DatasetConfig:
    blob = features(1)
    with ShardWriter(str(folder), max_samples=max(10, samples // 40)) as writer:
        for number in range(samples):
            writer.write(f"k{number:06d}", {"npy": blob, "txt": f"text {number}".encode()})
    return DatasetConfig(
        name="pairs",
        kind="pair",
        urls=(str(folder),),
        batch_size=batch,
        seq_len=24,
        media="features",
        num_features=S,
        width=C,
    )


def reader_memory() -> int:
    """Bytes of the largest reader process."""
    sizes = [0]
    for process in psutil.process_iter(["name", "cmdline", "memory_info"]):
        if any("ray::Reader" in part for part in process.info["cmdline"] or []):
            sizes.append(process.info["memory_info"].rss)
    return max(sizes)


def epoch(pipeline: RayPipeline, config: DatasetConfig, samples: int, kills: int) -> tuple[list[str], float]:
    """Stream an epoch on all ranks, with kills at random moments of it; return its keys and seconds."""
    steps = samples // config.batch_size
    draw = random.Random(0)
    due = Counter(draw.randrange(1, steps) for _ in range(kills))
    feeds: list[RayFeed] = [pipeline.feed(rank) for rank in range(RANKS)]
    keys: list[str] = []
    started = time.monotonic()
    for step in range(steps):
        for _ in range(due[step]):
            ray.kill(draw.choice(pipeline.readers), no_restart=False)
        for rank, feed in enumerate(feeds):
            batch = feed.next(step)["pairs"]
            assert batch.skips == ()
            keys += batch.keys
            if step % 10 == 0:
                held = ray.get(pipeline.coordinators[rank].held.remote())
                assert len(held) <= PREFETCH + 2, "back-pressure"
    return keys, time.monotonic() - started


def run(folder: Path, samples: int, batch: int, kills: int) -> tuple[float, float]:
    config = corpus(folder / "corpus", samples, batch)
    settings = ReaderConfig(readers=3, cpus_per_reader=0.5, prefetch=PREFETCH, retries=1000, timeout_s=120)
    pipeline = RayPipeline([config], BYTES, seed=3, dp_size=RANKS, config=settings)
    try:
        calm_keys, calm = epoch(pipeline, config, samples, 0)
        before = reader_memory()
        keys, wild = epoch(pipeline, config, samples, kills)
        assert keys == calm_keys
        straight = DatasetStream(config, BYTES, 3)
        assert keys[:batch] == list(straight.batch(0).keys)
        assert Counter(keys) == Counter(f"k{number:06d}" for number in range(samples))
        assert reader_memory() < before + (100 << 20)
        counts = pipeline.feed(0).summary()["pairs"]
        assert counts["bad"] == 0
    finally:
        pipeline.shutdown()
    return calm, wild


def test_a_few_kills(ray_cluster: None, tmp_path: Path) -> None:
    run(tmp_path, 1200, 40, 6)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hundred_kills(ray_cluster: None, tmp_path: Path) -> None:
    """The wall time is told, not judged: with tiny samples on few cores a restart is dearer than an epoch."""
    calm, wild = run(tmp_path, 20_000, 100, 200)
    print(f"epoch of 20,000 samples: {calm:.1f} s without kills, {wild:.1f} s with 200")
