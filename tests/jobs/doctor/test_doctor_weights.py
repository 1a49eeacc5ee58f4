"""The doctor on weights: cut ones, ones of another network, ones in a dtype that training does not read."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from flamingo_dist.models.exchange.folder import write_network
from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.weights.layout import lm_layout
from flamingo_dist.planning.empty import empty_network
from jobs.doctor.command import doctor
from jobs.doctor.findings import Finding
from jobs.doctor.weights import check_all_weights, check_weights
from tests import tiny
from tests.data_pipeline.servers import flaky_server


def test_weights_that_are_whole_cut_or_not_there(tmp_path):
    def say(path: Path) -> tuple[str, str]:
        finding = check_weights("LM weights", str(path))
        return finding.level, finding.says

    assert say(tmp_path)[0] == "fail"
    assert say(tmp_path / "none.gguf")[0] == "fail"
    for name in ("a", "b"):
        save_file({"w": np.zeros((8, 8), np.float32)}, tmp_path / f"{name}.safetensors")
    assert "tensor w is in both" in say(tmp_path)[1]
    save_file({"x": np.zeros((8, 8), np.float32)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "x": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert say(tmp_path)[0] == "ok"
    cut = tmp_path / "a.safetensors"
    os.truncate(cut, cut.stat().st_size - 1)
    assert "cut off" in say(tmp_path)[1]
    cut.unlink()
    assert "a.safetensors is not there" in say(tmp_path)[1]
    (tmp_path / "x.gguf").write_bytes(b"<html>")
    assert "no GGUF file" in say(tmp_path / "x.gguf")[1]


def test_weights_on_a_server_that_lists_nothing(tmp_path):
    for name in ("clip", "single"):
        (tmp_path / name).mkdir()
        save_file({"w": np.zeros((8, 8), np.float32)}, tmp_path / name / "model.safetensors")
    (tmp_path / "F6_haiku.npz").write_bytes(b"x" * 100)
    with flaky_server(tmp_path, share=0.0) as server:

        def say(name: str) -> tuple[str, str]:
            finding = check_weights("vision weights", f"{server.url}/{name}")
            return finding.level, finding.says

        assert {say(n)[0] for n in ("clip", "clip/", "single/model.safetensors", "F6_haiku.npz")} == {"ok"}
        cut = tmp_path / "clip" / "model.safetensors"
        os.truncate(cut, cut.stat().st_size - 1)
        assert "cut off" in say("clip")[1]
        for name in ("none", "none.npz", "none.safetensors"):
            assert say(name)[0] == "fail"


def saved(folder: Path, lm: LMConfig, **kinds: Any) -> str:
    """Write weights of `lm`; `kinds` gives other dtypes by the end of a name."""
    folder.mkdir()
    tensors = {
        name: np.zeros(shape, next((kind for end, kind in kinds.items() if end in name), np.float32))
        for name, shape in lm_layout(lm).stored.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def said(model: FlamingoConfig) -> Finding:
    (finding,) = check_all_weights(model)
    return finding


def test_weights_of_another_language_model(tmp_path: Path) -> None:
    """A LLaMA's recipe, and weights of its own, of an OPT, and of a deeper one."""
    network = tiny.network()
    opt = replace(network.lm, naming="opt", num_kv_heads=4)
    deeper = replace(network.lm, num_layers=4)
    for name, lm, level in (("own", network.lm, "ok"), ("opt", opt, "fail"), ("deeper", deeper, "fail")):
        weights = saved(tmp_path / name, lm)
        finding = said(replace(network, lm=replace(network.lm, weights=weights)))
        assert (finding.check, finding.level) == ("LM weights", level), finding
        assert level == "ok" or "do not fit the LM configuration" in finding.says


def test_weights_that_are_stored_as_integers(tmp_path: Path) -> None:
    network = tiny.network()
    weights = saved(tmp_path / "int8", network.lm, q_proj=np.int8)
    finding = said(replace(network, lm=replace(network.lm, weights=weights)))
    assert finding.level == "fail"
    assert "stored as I8; weights are read from F64, F32, F16, BF16" in finding.says


def test_a_network_folder(tmp_path: Path) -> None:
    network = tiny.network()

    def write(name: str, config: FlamingoConfig, dtype: torch.dtype = torch.float32) -> FlamingoConfig:
        parameters = {
            n: torch.zeros(p.shape, dtype=dtype) for n, p in empty_network(config).named_parameters()
        }
        (tmp_path / name).mkdir()
        write_network(tmp_path / name, config, parameters.items())
        return replace(network, weights=str(tmp_path / name))

    own = said(write("own", network))
    assert (own.check, own.level) == ("network weights", "ok"), own
    other = said(write("other", tiny.network(every=1)))
    assert (other.level, "does not hold this network" in other.says) == ("fail", True)
    assert said(write("integers", network, torch.int32)).level == "fail"
    nowhere = said(replace(network, weights="/nonexistent"))
    assert (nowhere.level, "/nonexistent" in nowhere.says) == ("fail", True)
    assert "--model.weights" in nowhere.remedy


def test_the_command_looks_at_the_network_folder(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["smoke", "--model.weights", "/nonexistent", "--skip", "nodes", "disk", "--json"]
    assert doctor(arguments) == 1
    wrong = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["level"] == "fail"]
    assert [f["check"] for f in wrong] == ["network weights"]
