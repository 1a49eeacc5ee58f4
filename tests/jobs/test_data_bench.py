"""`flamingo data bench`, small: what it measures, tells and writes."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flamingo_dist.cli import main
from jobs.bench_data.command import BenchConfig, render
from jobs.bench_data.corpus import jpeg, write_corpus
from jobs.bench_data.decode import DECODES, media_config
from jobs.bench_data.loaders import LOADERS
from jobs.bench_data.measure import LoaderResult, LoaderTask, failed, measure
from jobs.bench_data.seeks import measure_seek

LOADER_TASK = LoaderTask(
    loader="ours",
    shards="",
    samples=1000,
    short_shards="",
    short_samples=200,
    batch_size=4,
    image_size=32,
    workers=2,
    scratch="",
)


def task(folder: Path, loader: str, samples: int, workers: int = 0, decode: str = "ours") -> LoaderTask:
    return LoaderTask(
        loader=loader,
        shards=str(write_corpus(folder, samples)),
        samples=samples,
        short_shards=str(write_corpus(folder, samples // 4)),
        short_samples=samples // 4,
        batch_size=4,
        image_size=32,
        workers=workers,
        scratch=str(folder / "scratch"),
        decode=decode,
    )


def test_loaders_read_a_whole_epoch(tmp_path: Path) -> None:
    for loader, workers, decode in (("ours", 0, "ours"), ("ours", 2, "ours"), ("webdataset", 0, "pillow")):
        wanted = task(tmp_path, loader, 160, workers, decode)
        result = measure(wanted, LOADERS[loader])
        assert result.error == ""
        assert result.samples == 160
        assert result.per_core > 0
        assert 0 < result.first_batch_s <= result.seconds
        assert result.short_cpu_seconds > 0
        assert (result.workers, result.decode, result.short_samples) == (workers, decode, 40)
        assert result.resume == ("exact" if loader == "ours" else "reads through")
        # What is left after 90% of the epoch.
        assert sum(LOADERS[loader](wanted).start(144)) == 16


def test_both_decoders_give_the_same_pictures() -> None:
    config = media_config(64)
    for size in ((640, 480), (200, 333)):
        blob = jpeg(3, *size)
        ours, pillows = (DECODES[name](blob, config) for name in ("ours", "pillow"))
        assert ours.shape == pillows.shape == (3, 64, 64)
        assert np.abs(ours.astype(int) - pillows).max() <= 2


def test_the_price_of_a_sample_is_that_of_the_longer_epoch() -> None:
    """A start of three seconds, a hundredth a sample, whatever was read ahead before the first batch came."""
    result = replace(
        failed(LOADER_TASK, ""),
        samples=1000,
        seconds=8.0,
        cpu_seconds=13.0,
        short_samples=200,
        short_seconds=4.0,
        short_cpu_seconds=5.0,
        first_batch_s=3.9,
    )
    assert result.per_core == pytest.approx(100)
    assert result.per_second == pytest.approx(200)
    assert result.start_cpu_seconds == pytest.approx(3)


def test_a_loader_that_fails_is_told_not_raised(tmp_path: Path) -> None:
    class Broken:
        def __init__(self, task: LoaderTask) -> None:
            raise ImportError("no such thing")

    result = measure(task(tmp_path, "ours", 40), Broken)  # type: ignore[arg-type]
    assert result.error == "ImportError: no such thing"
    assert "no such thing" in render(BenchConfig(), [result], [])


def test_the_command_writes_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--samples",
        "80",
        "--batch-size",
        "8",
        "--image-size",
        "32",
        "--repeats",
        "1",
        "--workers",
        "0",
    ]
    options += ["--loaders", "ours", "--seek-shards", "10", "1000", "--out", str(tmp_path)]
    assert main(["data", "bench", *options]) == 0
    assert "wrote" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "loaders.csv").open())
    assert (row["loader"], row["samples"], row["error"]) == ("ours", "80", "")
    assert LoaderResult.__dataclass_fields__.keys() < row.keys()
    seeks = list(csv.DictReader((tmp_path / "seeks.csv").open()))
    assert [seek["shards"] for seek in seeks] == ["10", "10", "1000", "1000", "1000", "1000", "1000"]
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("`flamingo data bench --samples 80")
    assert "| ours |" in table
    assert (tmp_path / "rates.png").stat().st_size > 1000


def test_seeks_read_as_little_anywhere() -> None:
    results = [measure_seek(shards, 100, share) for shards in (100, 10_000) for share in (0.0, 0.9)]
    assert {result.samples for result in results} == {10_000, 1_000_000}
    assert all(result.reads <= 48 for result in results)
    assert max(r.state_bytes for r in results) - min(r.state_bytes for r in results) < 32


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="unknown; choose from"):
        BenchConfig(loaders=("other",))
    with pytest.raises(ValueError, match="decodes .* unknown"):
        BenchConfig(decodes=("other",))
    with pytest.raises(ValueError, match="ten batches"):
        BenchConfig(samples=10)
    assert main(["data"]) == 2
    assert main(["data", "--help"]) == 0
    assert main(["data", "nothing"]) == 2
    assert "unknown command" in capsys.readouterr().err
