"""Slices of safetensors from local files, memory and a web server: values, bytes read, memory held, errors."""

import itertools
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo_dist.models.lm import LanguageModel
from flamingo_dist.models.weights import extra as extra_rows
from flamingo_dist.models.weights import extra_start, lm_shard, open_lm_weights, read_lm_config
from flamingo_dist.models.weights.layout import lm_layout
from flamingo_dist.models.weights.ranges import RangeFile
from flamingo_dist.models.weights.safetensors import SafetensorsSource
from flamingo_dist.parallel.topology import Topology, single_process
from flamingo_dist.parallel.zero import fill_parameters
from flamingo_dist.training.published import PublishedWeights
from tests.data_pipeline.servers import flaky_server
from tests.flamingo_dist.models.lm_oracles import MPT, VOCAB, edit_config, save_oracles
from tests.flamingo_dist.models.measure_loading import CONFIG
from tests.flamingo_dist.models.test_lm import lm_logits, load_lm, our_logits
from tests.flamingo_dist.planning.shapes import fake_world

TOKENS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, save_oracles(folder)


@pytest.mark.parametrize("max_gap", [0, 4096])
def test_slices_equal_the_whole_tensor(tmp_path, monkeypatch, max_gap):
    monkeypatch.setattr("flamingo_dist.models.weights.safetensors.BLOCK_BYTES", 100)
    whole = torch.arange(13 * 11).view(13, 11)
    conv, counter = torch.arange(5.0 * 6 * 3 * 3).view(5, 6, 3, 3), torch.arange(7)
    stored = {"m": whole.bfloat16(), "v": torch.arange(9.0), "d": whole.double(), "conv": conv}
    stored |= {"one": torch.tensor(2.5), "none": torch.zeros(0, 3), "counter": counter}
    save_file(stored, tmp_path / "model.safetensors")
    source = SafetensorsSource(str(tmp_path))
    for file in source.files.values():
        file.max_gap = max_gap
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    for name in ("one", "none", "conv", "v"):
        assert torch.equal(source.read(name), stored[name])
    assert torch.equal(source.read("conv", slice(1, 4), slice(2, 5)), conv[1:4, 2:5])
    with pytest.raises(ValueError, match="tensor counter is stored as I64; weights are read from F64"):
        source.read("counter")
    for rows in (slice(None), slice(3, 7), slice(12, 13), slice(11, 20), slice(5, 5)):
        torch.testing.assert_close(source.read("v", rows), torch.arange(9.0)[rows])
        for columns in (slice(None), slice(0, 5), slice(4, 9), slice(10, 11)):
            assert torch.equal(source.read("m", rows, columns), whole.bfloat16()[rows, columns])
            assert torch.equal(source.read("d", rows, columns), whole.double()[rows, columns])


@pytest.mark.distributed
def test_an_http_server_and_memory_give_the_same_logits(ranks, saved):
    folder, models = saved
    memory = fsspec.filesystem("memory")
    memory.put(str(folder / "qwen2") + "/", "/weights-test/qwen2/", recursive=True)
    with torch.no_grad():
        expected = {name: models[name](TOKENS).logits for name in ("qwen2", "gpt2")}
    with single_process() as topology:
        found = our_logits(topology, "memory://weights-test/qwen2", TOKENS, False)
    torch.testing.assert_close(found, expected["qwen2"], atol=1e-4, rtol=0)
    with flaky_server(folder, share=0.2, faults=("503", "reset", "cut")) as server:
        for found in ranks.run(our_logits, f"{server.url}/gpt2", TOKENS, False, world=2, tensor=2):
            torch.testing.assert_close(found, expected["gpt2"], atol=1e-4, rtol=0)
        assert server.met["503"] + server.met["reset"] + server.met["cut"] > 0


def test_a_rank_reads_only_its_slices(saved):
    """Bytes of a local file: the rank's own, the headers and what all ranks hold whole; no more."""
    folder, _ = saved
    config = read_lm_config(str(folder / "llama"))
    size = sum(file.stat().st_size for file in (folder / "llama").glob("*.safetensors"))
    with fake_world(2, 2), torch.device("meta"):
        shapes = {name: p.shape for name, p in LanguageModel(config, torch.float32).named_parameters()}
    read = []
    for rank in range(2):
        source = open_lm_weights(config)
        for file in source.files.values():
            file.max_gap = 0
        headers = source.bytes_read
        for name, shape in shapes.items():
            if ".extra" not in name:
                lm_shard(source, name, shape, config, tp_rank=rank, tp_size=2)
        read.append(source.bytes_read - headers)
    norms = 5 * 48 * 4
    assert sum(read) == size - headers + norms
    assert max(read) < 0.51 * size


def fill_over_http(topology: Topology, url: str, name: str) -> tuple[int, dict[str, torch.Tensor]]:
    """Fill an LM as a run does; the exchange of columns makes each rank's bytes one range."""
    config = read_lm_config(f"{url}/{name}")
    published = PublishedWeights(config, topology)
    lm = LanguageModel(config, torch.float32)

    def value_of(name: str, param: torch.nn.Parameter) -> torch.Tensor:
        return torch.zeros(param.shape) if ".extra" in name else published.values(name, param)

    fill_parameters(lm, value_of)
    assert isinstance(published.source, SafetensorsSource)
    return published.source.bytes_read, {"logits": lm_logits(lm, TOKENS, cached=False)}


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "world", "tensor"), [("llama", 4, 2), ("gpt2", 4, 2)])
def test_a_run_reads_every_byte_once_from_a_server(ranks, saved, family, world, tensor):
    """GPT-2's matrices are stored transposed: what is cut by rows are columns there, and the other way round."""
    folder, models = saved
    (file,) = (folder / family).glob("*.safetensors")
    with torch.no_grad():
        expected = models[family](TOKENS).logits
    with flaky_server(folder, share=0.0) as server:
        found = ranks.run(fill_over_http, server.url, family, world=world, tensor=tensor)
        sent = server.bytes_sent
    for _, result in found:
        torch.testing.assert_close(result["logits"], expected, atol=1e-4, rtol=0)
    size = file.stat().st_size
    headers = size - 4 * sum(p.numel() for p in models[family].parameters())
    config = (folder / family / "config.json").stat().st_size
    layout = lm_layout(read_lm_config(str(folder / family)))
    whole = [layout.stored[cut.pieces[0].name] for cut in layout.cuts.values() if cut.how == "whole"]
    norms = 4 * sum(math.prod(shape) for shape in whole)
    # All ranks read headers, a byte to see whether the file is there, and config.json, once for the settings and once
    # to compare them with; every weight is read once, norms and what else is not cut by each tensor-parallel rank.
    assert sent == size + norms * (tensor - 1) + (world - 1) * headers + world * (2 * config + 1)
    assert [read for read, _ in found[tensor:]] == [headers] * (world - tensor)


def break_on_the_first_rank(topology: Topology, path: str) -> str:
    published, calls = PublishedWeights(read_lm_config(path), topology), itertools.count()
    whole = published.source.read

    def read(*args: Any) -> torch.Tensor:
        if topology.data_rank == 0 and next(calls) == 4:
            raise ConnectionError("the storage is gone")
        return whole(*args)

    published.source.read = read  # type: ignore[method-assign]
    lm = LanguageModel(published.config, torch.float32)
    try:
        fill_parameters(
            lm,
            lambda name, param: (
                torch.zeros(param.shape) if ".extra" in name else published.values(name, param)
            ),
        )
    except OSError as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.distributed
def test_a_storage_that_goes_away_ends_all_data_parallel_peers(ranks, saved):
    folder, _ = saved
    found = ranks.run(break_on_the_first_rank, str(folder / "llama"), world=3, timeout=60)
    assert found == ["ConnectionError", "OSError", "OSError"]


def test_peak_memory_is_the_shard_and_one_layer(tmp_path):
    """A process fills one of two ranks, in blocks as from a remote storage: the half, and at most one layer."""
    tensors = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in lm_layout(CONFIG).stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    layer = sum(t.numel() * 2 for n, t in tensors.items() if ".layers.0." in n)
    command = [
        sys.executable,
        "-m",
        "tests.flamingo_dist.models.measure_loading",
        str(tmp_path),
        str(1 << 20),
    ]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    grown, shard = map(int, out.stdout.splitlines()[-1].split())
    assert shard > 2.9 * layer
    assert shard <= grown <= shard + layer, (grown / 2**20, shard / 2**20, layer / 2**20)


def test_mosaic_gpt_and_exports_without_a_root(saved, tmp_path):
    """MPT-1B's names, and GPT-2 as its hub export has it: no root, buffers beside the weights."""
    folder, models = saved
    mosaic = {"norm_1": "ln_1", "norm_2": "ln_2", "norm_f": "ln_f", "ffn.up_proj": "mlp.mlp_up"}
    mosaic |= {"ffn.down_proj": "mlp.mlp_down"}
    renamed = {}
    for name, value in load_file(folder / "mpt" / "model.safetensors").items():
        for theirs, ours in mosaic.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    (tmp_path / "mosaic").mkdir()
    save_file(renamed, tmp_path / "mosaic" / "model.safetensors")
    stated = {**MPT, "model_type": "mosaic_gpt", "mlp_ratio": 4, "alibi": True, "attn_qk_ln": False}
    (tmp_path / "mosaic" / "config.json").write_text(json.dumps(stated))
    shutil.copytree(folder / "gpt2", tmp_path / "hub")
    bare = {
        n.removeprefix("transformer."): v for n, v in load_file(folder / "gpt2" / "model.safetensors").items()
    }
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "hub" / "model.safetensors")
    with single_process() as topology, torch.no_grad():
        for name, oracle in (("mosaic", "mpt"), ("hub", "gpt2")):
            lm = load_lm(topology, read_lm_config(str(tmp_path / name)))
            expected = models[oracle](TOKENS).logits
            torch.testing.assert_close(lm_logits(lm, TOKENS, False), expected, atol=1e-4, rtol=0)


REFUSED = {
    "llama": [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"model_type": "mamba"}, "'mamba' model; known are llama, qwen2"),
    ],
    "qwen2": [({"use_sliding_window": True}, "use_sliding_window=True")],
    "opt": [
        ({"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ({"word_embed_proj_dim": 8}, "word_embed_proj_dim=8"),
    ],
    "gpt2": [({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True")],
    "mpt": [({"attn_config": {"alibi": False}}, "alibi=False"), ({"logit_scale": 0.5}, "logit_scale=0.5")],
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_computed_is_refused(saved, tmp_path, family):
    folder, _ = saved
    for number, (change, words) in enumerate(REFUSED[family]):
        place = tmp_path / str(number)
        shutil.copytree(folder / family, place)
        edit_config(place, **change)
        with pytest.raises(ValueError, match=re.escape(words)):
            read_lm_config(str(place))


def test_damaged_files_are_named(saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder / "opt", tmp_path / "opt")
    config, file = read_lm_config(str(tmp_path / "opt")), tmp_path / "opt" / "model.safetensors"
    whole = file.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    stated = json.loads(whole[8 : 8 + header])
    stated["model.decoder.final_layer_norm.bias"]["data_offsets"][1] -= 4
    moved = json.dumps(stated, separators=(",", ":")).encode().ljust(header)
    for damaged, says in {
        whole[:-100]: "cut off or damaged: it has",
        whole + b"0": "cut off or damaged: it has",
        whole[:50]: "cut off: it has 50 bytes",
        whole[:5]: "no safetensors file",
        struct.pack("<Q", 1 << 60) + whole[8:]: "no safetensors file",
        whole[:8]
        + b"x" * header
        + whole[8 + header :]: "cannot be read as safetensors: its header cannot be read as JSON",
        whole[:8] + moved + whole[8 + header :]: "its header puts tensor",
    }.items():
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"model.safetensors .*{says}"):
            open_lm_weights(config)
    file.unlink()
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
        open_lm_weights(config)
    with pytest.raises(ValueError, match=r"nowhere has no config.json"):
        read_lm_config(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("[]", "its header holds list '[]' instead of a JSON object"),
        ("null", "its header holds NoneType"),
        ("[" * 200_000, "its header cannot be read as JSON"),
        ({"shape": [1], "data_offsets": [0, 4]}, "of tensor w, but must say dtype, shape and data_offsets"),
        ([1], "its header says [1] of tensor w"),
        ({"dtype": "F32", "shape": [1], "data_offsets": "x"}, "of tensor w, but must say"),
        ({"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}, "of tensor w, but must say"),
        ({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, "of tensor w, but must say"),
    ],
)
def test_a_malformed_header_is_named(tmp_path, header, says):
    text = (header if isinstance(header, str) else json.dumps({"w": header})).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/model.safetensors") + ".*" + re.escape(says)):
        SafetensorsSource(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"w": 3}}']
)
def test_a_malformed_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/model.safetensors.index.json (cannot|holds|is no index)"
    ):
        SafetensorsSource(str(tmp_path))


def test_a_remote_file_that_is_cut_off_is_seen_when_asked_or_read(tmp_path):
    """Its header is whole, and whether it is there to its end would cost every rank a request."""
    save_file({"w": torch.arange(100.0)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-40])
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/cut-test/model.safetensors", whole[:-40])
    with flaky_server(tmp_path, share=0.0) as server:
        for url in ("memory://cut-test", server.url):
            source = SafetensorsSource(url, attempts=1)
            with pytest.raises(ValueError, match=rf"cut off or damaged: it has {len(whole) - 40} bytes"):
                source.check_whole()
            with pytest.raises(OSError, match=r"model.safetensors gave 360 of 400 bytes .*cut off"):
                source.read("w")
    with pytest.raises(ValueError, match=r"model.safetensors is cut off or damaged"):
        SafetensorsSource(str(tmp_path))


def test_folders_of_other_names_and_files_that_hold_the_same(tmp_path):
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/", "/names-test/", recursive=True)
    for url in (str(tmp_path), "memory://names-test"):
        assert SafetensorsSource(url).shapes() == {"a": (2,), "b": (2,)}
    save_file({"a": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"tensor a is in both .*a.safetensors and .*b.safetensors"):
        SafetensorsSource(str(tmp_path))
    index = {"weight_map": {"a": "a.safetensors", "x": "gone.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"gone.safetensors is not there"):
        SafetensorsSource(str(tmp_path))


def test_a_file_is_read_as_a_stream_from_a_server_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("flamingo_dist.models.weights.ranges.STREAM_BYTES", 1000)
    whole = np.random.default_rng(0).bytes(10_000)
    (tmp_path / "file").write_bytes(whole)
    with flaky_server(tmp_path, share=0.3, faults=("503", "reset", "cut")) as server:
        stream = RangeFile(f"{server.url}/file").opened()
        assert stream.read(10) + stream.read() == whole
        assert stream.read(1) == b""
        stream.seek(-20, os.SEEK_END)
        assert stream.read() == whole[-20:]
        stream.seek(7)
        stream.seek(3, os.SEEK_CUR)
        assert stream.read(4) == whole[10:14]
        assert server.met["503"] > 0
        with pytest.raises(FileNotFoundError):
            RangeFile(f"{server.url}/none").opened()


def test_a_server_without_ranges_is_sliced(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(200)))
    with flaky_server(tmp_path, share=1.0, faults=("whole file",)) as server:
        buffer = bytearray(20)
        RangeFile(f"{server.url}/file").read_into(memoryview(buffer), 50)
    assert buffer == bytes(range(50, 70))


def test_extra_rows_start_near_the_mean_whatever_the_block(saved, monkeypatch):
    folder, models = saved
    config = replace(read_lm_config(str(folder / "llama")), extra_like=(None, 7))
    source = open_lm_weights(config)
    for head in (False, True):
        rows = (models["llama"].lm_head if head else models["llama"].model.embed_tokens).weight.detach()
        for elements in (1 << 25, 48, 10 * 48):
            monkeypatch.setattr(extra_rows, "BLOCK_ELEMENTS", elements)
            start, spread = extra_start(source, config, head=head)
            torch.testing.assert_close(start, torch.stack([rows.mean(0), rows[7]]), atol=1e-6, rtol=0)
            assert spread == pytest.approx(float(rows.std(0).mean()), rel=1e-5)


def test_paths_are_given_as_url_or_path(saved):
    folder, _ = saved
    path = folder / "mpt"
    assert isinstance(path, Path)
    for url in (str(path), f"{path}/", f"file://{path}", str(path / "model.safetensors")):
        config = read_lm_config(url)
        assert config.weights == url
        assert open_lm_weights(config).shapes()
