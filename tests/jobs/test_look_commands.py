"""`flamingo data inspect` and `flamingo data info` from the command line."""

import json
from pathlib import Path

import pytest

from data_pipeline.shards import ShardWriter
from flamingo_dist.cli import main
from tests.data_pipeline.building.building_material import picture


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    with ShardWriter(str(tmp_path / "pairs")) as writer:
        for number in range(3):
            writer.write(f"k{number}", {"png": picture(number), "txt": f"caption {number}".encode()})
    return tmp_path / "pairs"


def test_inspect_a_folder(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "page.html"
    assert main(["data", "inspect", str(pairs), "--output", str(out), "--samples", "2", "--start", "1"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    page = out.read_text()
    assert [key for key in ("k0", "k1", "k2") if f"<h2>{key}</h2>" in page] == ["k1", "k2"]
    assert "kind pair" in page


def test_inspect_a_recipes_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLAMINGO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "page.html"
    arguments = ["data", "inspect", "--recipe", "smoke", "--output", str(out), "--samples", "3"]
    assert main([*arguments, "--dataset", "documents", "--mode", "train"]) == 0
    assert "mode train" in out.read_text()
    assert out.read_text().count("<div class=sample>") == 3
    assert main(arguments) == 1
    assert "recipe smoke has documents, pairs, videos, held_out" in capsys.readouterr().err
    assert main(["data", "inspect", "--recipe", "tea"]) == 1
    assert "unknown recipe 'tea'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["data", "inspect"])
    assert caught.value.code == 2
    assert "give one of the two" in capsys.readouterr().err


def test_info(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(pairs)]) == 0
    told = capsys.readouterr().out
    assert "3 samples of kind pair in 1 shards" in " ".join(told.split())
    assert "no broken sample" in told
    assert main(["data", "info", str(pairs), "--json", "--check", "decode"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert (stored["samples"], stored["words"], stored["broken"]) == (3, {"2-3": 3}, {})
    assert main(["data", "info", str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err
