"""Which folders are checkpoints of a run, and what a damaged manifest says."""

from pathlib import Path

import pytest

from flamingo_dist.training.checkpoint_folder import (
    CheckpointError,
    begin,
    complete,
    find_checkpoint,
    list_checkpoints,
    read_manifest,
    set_aside_newer,
    step_folder,
)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text("{}")


def test_a_copy_beside_the_checkpoints_is_left_alone(tmp_path):
    """It counted as one: a resume from an older step ended in `invalid literal for int()`, and it could be deleted."""
    write(tmp_path, "step-00000100", "step-00000100-keep", "step-00000200", "step-00000200-keep")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000100", "step-00000200"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "step-00000200"
    assert [p.name for p in set_aside_newer(tmp_path, 100)] == ["abandoned-step-00000200"]
    begin(step_folder(tmp_path, 300))
    complete(step_folder(tmp_path, 300), {}, keep=1)
    left = ["abandoned-step-00000200", "step-00000100-keep", "step-00000200-keep", "step-00000300"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_steps_of_nine_digits_come_last(tmp_path):
    write(tmp_path, "step-100000000", "step-99999999")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]


@pytest.mark.parametrize("text", ['{"format": 2, "st', "[]", ""])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/manifest.json (cannot be read|holds list)"):
        read_manifest(tmp_path)
