"""Settings that stand beside published weights against the run's: what names and shapes do not prove."""

import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from flamingo_dist.models.lm_config import LMConfig, RopeScaling
from flamingo_dist.models.weights import open_lm_weights, read_lm_config
from tests.flamingo_dist.models.lm_oracles import edit_config, save_oracles


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_oracles(folder)
    return folder


STRETCHED = RopeScaling(factor=8.0, low_freq=1.0, high_freq=2.0, original_positions=16)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        (
            "llama",
            {"rope_base": 7.0},
            "rope_base is 7 in the run, 5000 in {url}/config.json; set model.lm.rope_base=",
        ),
        ("llama", {"norm_eps": 1e-3}, "norm_eps is 0.001 in the run, 1e-06 in"),
        ("llama", {"num_heads": 3, "num_kv_heads": 1, "head_dim": 16}, "num_heads is 3 in the run, 6 in"),
        ("llama", {"norm": "layer_no_bias"}, "norm is layer_no_bias in the run, rms in"),
        ("llama", {"tied": True}, "tied is True in the run, False in"),
        ("llama3", {"rope_scaling": RopeScaling()}, "rope_scaling.factor is 1 in the run, 8 in"),
        ("llama3", {"rope_scaling": STRETCHED}, "rope_scaling.high_freq is 2 in the run, 4 in"),
        ("opt", {"activation": "gelu_tanh"}, "activation is gelu_tanh in the run, relu in"),
        ("mpt", {"alibi_max": 4.0}, "alibi_max is 4 in the run, 8 in"),
        ("mpt clipped", {"clip_qkv": None}, "clip_qkv is None in the run, 0.7 in"),
    ],
)
def test_another_setting_is_refused_by_name(saved, family, changes, says):
    url = str(saved / family)
    config = read_lm_config(url)
    open_lm_weights(config)
    with pytest.raises(ValueError, match=re.escape(says.format(url=url))):
        open_lm_weights(replace(config, **changes))


def test_all_that_differ_are_named_together_also_at_a_url(saved):
    fsspec.filesystem("memory").put(f"{saved / 'llama'}/", "/stated-test/llama/", recursive=True)
    for url in ("memory://stated-test/llama", "memory://stated-test/llama/model.safetensors"):
        config = replace(read_lm_config(url), rope_base=1e4, norm_eps=1e-5)
        with pytest.raises(
            ValueError, match=r"norm_eps .*; rope_base .*; set model.lm.norm_eps=1e-06 model.lm.rope"
        ) as e:
            open_lm_weights(config)
        assert "memory://stated-test/llama/config.json" in str(e.value)


def test_settings_of_the_run_and_those_without_effect_may_differ(saved, tmp_path):
    own: dict[str, Any] = {"weight_storage": "int8", "extra_like": (None, 3), "further_tokens": 1}
    for family, changes in {
        "llama": {"alibi_max": 4.0, "max_positions": 9, "position_offset": 1},
        "opt": {"rope_base": 7.0, "alibi_max": 4.0},
        "mpt": {"rope_base": 7.0, "max_positions": 9},
    }.items():
        open_lm_weights(replace(read_lm_config(str(saved / family)), **own, **changes))
    shutil.copytree(saved / "llama", tmp_path / "padded")
    config = read_lm_config(str(tmp_path / "padded"))
    edit_config(tmp_path / "padded", vocab_size=90, dtype="float16", max_position_embeddings=7)
    open_lm_weights(config)


def test_a_head_counts_where_it_is_stored(saved, tmp_path):
    """Exports without the statement and without a head are tied whatever the default is."""
    shutil.copytree(saved / "llama", tmp_path / "headless")
    config = read_lm_config(str(tmp_path / "headless"))
    file = tmp_path / "headless" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "lm_head.weight"}, file)
    open_lm_weights(replace(config, tied=True))
    shutil.copytree(saved / "llama3", tmp_path / "both")
    config, file = read_lm_config(str(tmp_path / "both")), tmp_path / "both" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 0}, file)
    open_lm_weights(config)
    open_lm_weights(replace(config, tied=False))


def test_weights_alone_are_taken_and_an_unknown_family_warns(saved, tmp_path):
    shutil.copytree(saved / "llama", tmp_path / "alone")
    config = replace(read_lm_config(str(tmp_path / "alone")), rope_base=7.0)
    edit_config(tmp_path / "alone", model_type="mistral")
    with pytest.warns(
        UserWarning, match=r"alone/config.json states a 'mistral' model, .*only names and shapes"
    ):
        open_lm_weights(config)
    (tmp_path / "alone" / "config.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        open_lm_weights(config)
        open_lm_weights(replace(config, weights=str(tmp_path / "alone" / "model.safetensors")))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("", r"config.json cannot be read as JSON \(0 bytes\): JSONDecodeError"),
        ("{not json", r"config.json cannot be read as JSON"),
        ("[1]", r"config.json holds list '\[1\]' instead of a JSON object"),
        ({"hidden_size": "x"}, "states hidden_size='x', but it must be a whole number from 1 on"),
        ({"rms_norm_eps": "small"}, "states rms_norm_eps='small', but it must be a number"),
        ({"rope_parameters": [1]}, r"states rope_parameters=\[1\], but it must be an object"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "not state rope_parameters.low_freq_factor",
        ),
    ],
)
def test_a_malformed_config_is_named(saved, tmp_path, change, says):
    shutil.copytree(saved / "llama", tmp_path / "lm")
    config = read_lm_config(str(tmp_path / "lm"))
    if isinstance(change, str):
        (tmp_path / "lm" / "config.json").write_text(change)
    else:
        edit_config(tmp_path / "lm", **change)
    for read in (lambda: read_lm_config(str(tmp_path / "lm")), lambda: open_lm_weights(config)):
        with pytest.raises(ValueError, match=rf"{tmp_path}/lm.*{says}"):
            read()


HEADS, KV, WIDTH = 4, 2, 32


def gguf_file(path: Path, *, kv_heads: int | None = KV, head_dim: int | None = None, **more: Any) -> Path:
    """Write a LLaMA of one block; `more` are tensors by name, or `scaling`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    scaling = more.pop("scaling", None)
    if kv_heads is not None:
        writer.add_head_count_kv(kv_heads)
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(4.0)
    inner, groups = HEADS * (head_dim or WIDTH // HEADS), (kv_heads or HEADS) * (head_dim or WIDTH // HEADS)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (20, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (inner, WIDTH),
        "blk.0.attn_k.weight": (groups, WIDTH),
        "blk.0.attn_v.weight": (groups, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, inner),
        "blk.0.ffn_gate.weight": (48, WIDTH),
        "blk.0.ffn_up.weight": (48, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, 48),
        **more,
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(path: Path) -> LMConfig:
    config = read_lm_config(str(path))
    open_lm_weights(config)
    return config


def test_a_gguf_file_states_its_settings_too(tmp_path):
    config = opened(gguf_file(tmp_path / "lm.gguf"))
    assert (config.num_kv_heads, config.head_dim, config.vocab_size) == (KV, 8, 20)
    open_lm_weights(replace(config, norm_eps=1e-5))  # the file holds it in fp32
    with pytest.raises(ValueError, match=r"rope_base is 7 in the run, 10000 in .*lm.gguf; set"):
        open_lm_weights(replace(config, rope_base=7.0))


def test_a_gguf_file_may_leave_out_key_value_heads_and_have_wide_ones(tmp_path):
    assert opened(gguf_file(tmp_path / "a.gguf", kv_heads=None)).num_kv_heads == HEADS
    config = opened(gguf_file(tmp_path / "b.gguf", head_dim=16))
    assert config.head_dim == 16
    source = open_lm_weights(replace(config, weights=str(tmp_path / "b.gguf")))
    assert source.read("model.layers.0.self_attn.k_proj.weight").shape == (KV * 16, WIDTH)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"scaling": gguf.RopeScalingType.LINEAR}, "rotary positions scaled by 'linear' is not supported"),
        ({"scaling": gguf.RopeScalingType.YARN}, "rotary positions scaled by 'yarn' is not supported"),
        ({"rope_freqs.weight": (4,)}, "holds the tensor rope_freqs.weight (Llama 3's stretched positions"),
        (
            {"blk.0.attn_q.bias": (32,)},
            "holds the tensor blk.0.attn_q.bias, which is none of a plain LLaMA's",
        ),
        ({"blk.0.ffn_gate_inp.weight": (4, WIDTH)}, "holds the tensor blk.0.ffn_gate_inp.weight"),
    ],
)
def test_what_is_not_computed_of_a_gguf_file_is_refused(tmp_path, more, says):
    path = gguf_file(tmp_path / "lm.gguf", **more)
    with pytest.raises(ValueError, match=re.escape(f"{path}") + ".*" + re.escape(says)):
        read_lm_config(str(path))


@pytest.mark.parametrize("size", [0, 10, 400, 900, 5000])
def test_a_gguf_file_that_is_cut_off_is_named(tmp_path, size):
    path = gguf_file(tmp_path / "lm.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{path} cannot be read as GGUF; is it whole\?"):
        read_lm_config(str(path))
