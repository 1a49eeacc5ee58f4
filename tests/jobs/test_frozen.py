"""What published weights hold is told from a few of their bytes, wherever they lie."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.config import RunConfig
from jobs.driver import describe
from jobs.frozen import PROBE_BYTES, frozen_contents
from jobs.recipes.smoke import smoke


def run_with(weights: str | None) -> RunConfig:
    base = smoke()
    return replace(base, model=replace(base.model, lm=replace(base.model.lm, weights=weights)))


def folder_of(path: Path, *, flipped: int | None = None) -> str:
    path.mkdir()
    for number in (1, 2):
        blob = bytearray(5 * PROBE_BYTES)
        if flipped is not None and number == 2:
            blob[flipped] = 1
        (path / f"model-0000{number}-of-00002.safetensors").write_bytes(blob)
    return str(path)


def test_weights_may_move_but_not_change(tmp_path):
    first = frozen_contents(run_with(folder_of(tmp_path / "a")))["model.lm.weights"]
    moved = frozen_contents(run_with((tmp_path / "a").rename(tmp_path / "b").as_uri()))["model.lm.weights"]
    assert moved == first
    middle = 5 * PROBE_BYTES // 2
    other = frozen_contents(run_with(folder_of(tmp_path / "c", flipped=middle)))["model.lm.weights"]
    (tmp_path / "b" / "model-00002-of-00002.safetensors").write_bytes(b"short")
    shorter = frozen_contents(run_with(str(tmp_path / "b")))["model.lm.weights"]
    assert len({first, other, shorter}) == 3
    single = frozen_contents(run_with(str(tmp_path / "c" / "model-00001-of-00002.safetensors")))
    assert single["model.lm.weights"] not in (first, other, "random")


def test_random_weights_are_none(tmp_path):
    assert set(frozen_contents(run_with(None)).values()) == {"random"}


def test_a_run_says_what_its_weights_hold_or_that_they_cannot_be_read(tmp_path):
    said = describe(run_with(folder_of(tmp_path / "a")))
    assert said["frozen"]["model.lm.weights"] != "random"
    assert said["model"] == run_with(None).identity()["model"]
    with pytest.raises(ValueError, match="published weights cannot be read: .*gone.gguf"):
        describe(run_with(str(tmp_path / "gone.gguf")))
