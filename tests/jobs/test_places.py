"""Relative paths are meant from where the command is given, whatever process reads them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.tokenizer import TokenizerConfig
from jobs import driver
from jobs.config import CaptionConfig, RunConfig
from jobs.places import absolute, absolute_checkpoint, with_absolute_paths
from jobs.recipes.large import flamingo_3b
from jobs.recipes.smoke import smoke


def paths_below(value: object) -> list[str]:
    """All strings in plain JSON that name the folder "mine"."""
    if isinstance(value, dict):
        return [path for item in value.values() for path in paths_below(item)]
    if isinstance(value, list):
        return [path for item in value for path in paths_below(item)]
    return [value] if isinstance(value, str) and "mine" in value else []


def relative() -> RunConfig:
    """A run that names a relative path wherever it can."""
    base, small = flamingo_3b(), smoke()
    vision = replace(base.model.vision, weights="mine/nfnet.npz", statistics="mine/s.safetensors")
    lm = replace(base.model.lm, weights="mine/lm")
    held_out = replace(
        small.data.held_out["held_out"],
        urls=("mine/held-{0..3}.tar", "s3://mine/x"),
        batch_size=16,
        image_size=vision.image_size,
        pad_colour=vision.pad_colour,
    )
    train = replace(base.data.train["align"], urls=("./mine/*.tar",), cache_folder="mine/cache")
    data = replace(
        base.data,
        train={"align": train},
        held_out={"held_out": held_out},
        tokenizer=TokenizerConfig(kind="hf", path="mine/tokenizer", vocab_size=32_000),
        cache="mine/features",
    )
    return replace(base, model=replace(base.model, weights="mine/network", lm=lm, vision=vision), data=data)


def test_every_path_of_a_run_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = with_absolute_paths(relative())
    paths = paths_below(found.to_json())
    assert len(paths) == 10
    assert {path for path in paths if not path.startswith(f"{tmp_path}/mine/")} == {"s3://mine/x"}
    assert found.data.held_out["held_out"].urls[0] == f"{tmp_path}/mine/held-{{0..3}}.tar"
    assert found.data.train["align"].urls == (f"{tmp_path}/mine/*.tar",)
    assert with_absolute_paths(found) == found
    assert with_absolute_paths(smoke()) == smoke()


@pytest.mark.parametrize("place", ["", "/a/b", "hf://a/b", "simplecache::s3://a", "{/a,/b}/{0..3}.tar"])
def test_what_is_no_relative_path_stays(place):
    assert absolute(place) == place


def test_home_and_resume(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("~/x") == str(Path.home() / "x")
    assert [absolute_checkpoint(w) for w in (None, "auto", "latest", "12")] == [None, "auto", "latest", "12"]
    assert absolute_checkpoint("runs/x/checkpoints/step-00000002") == str(
        tmp_path / "runs/x/checkpoints/step-00000002"
    )


def test_the_run_folder_holds_absolute_paths(monkeypatch, tmp_path):
    """As far as the start of Ray."""

    class StopError(Exception):
        pass

    def cluster(*_: object) -> None:
        raise StopError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "ray_cluster", cluster)
    base = smoke()
    pairs = replace(base.data.train["pairs"], urls=("mine",))
    data = replace(base.data, train={"pairs": pairs}, held_out={})
    config = replace(base, runs_dir="out", data=data, captions=CaptionConfig())
    with pytest.raises(StopError):
        driver.run(config)
    stored = json.loads((tmp_path / "out" / "smoke" / "config.json").read_text())
    assert stored["data"]["train"]["pairs"]["urls"] == [str(tmp_path / "mine")]
