"""OpenFlamingo's checkpoints, against its own modules inside a Hugging Face LLaMA.

Its package pins an old torch and is not installed with ours. Where its sources are on the path, its `helpers.py` is the
reference; elsewhere flamingo-pytorch's modules are, which it copied, names included.
"""

import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.models.exchange.folder import read_network_config, write_network
from flamingo_dist.models.vision import VisionConfig
from jobs.exchange import ImportArguments, import_network
from jobs.network_tokenizer import write_tokenizer
from tests.data_pipeline.servers import flaky_server
from tests.jobs.exchange.exchanging import logits, logits_of_ranks

HAS_SOURCES = importlib.util.find_spec("open_flamingo") is not None
VOCAB, WIDTH, LAYERS, EVERY = 60, 32, 4, 2
FEATURES = 24 if HAS_SOURCES else WIDTH
"""flamingo-pytorch's blocks read latents of the language model's width alone."""
EOC, IMAGE, PAD = VOCAB, VOCAB + 1, VOCAB + 2
"""open_flamingo adds them in this order."""


def helpers():
    """open_flamingo's modules: PerceiverResampler(dim=...) and GatedCrossAttentionBlock(dim=..., dim_visual=...)."""
    if HAS_SOURCES:
        path = Path(importlib.util.find_spec("open_flamingo").origin).parent / "src/helpers.py"
        spec = importlib.util.spec_from_file_location("open_flamingo_helpers", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    oracle = pytest.importorskip("flamingo_pytorch", reason="pip install flamingo-pytorch==0.1.2")
    return SimpleNamespace(
        PerceiverResampler=lambda *, dim: oracle.PerceiverResampler(dim=dim, depth=6, num_media_embeds=2),
        GatedCrossAttentionBlock=lambda *, dim, dim_visual: oracle.GatedCrossAttentionBlock(dim=dim),
    )


def reference():
    """LM, resampler and gated blocks with random values."""
    torch.manual_seed(0)
    modules = helpers()
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ).eval()
    torch.nn.init.normal_(lm.model.embed_tokens.weight, std=0.3)
    perceiver = modules.PerceiverResampler(dim=FEATURES)
    blocks = {
        i: modules.GatedCrossAttentionBlock(dim=WIDTH, dim_visual=FEATURES)
        for i in range(LAYERS)
        if (i + 1) % EVERY == 0
    }
    for module in (perceiver, *blocks.values()):
        for name, param in module.named_parameters():
            torch.nn.init.normal_(param, mean=0.8 if "gate" in name or "norm" in name else 0.0, std=0.2)
    if hasattr(perceiver, "media_pos_emb"):
        torch.nn.init.zeros_(perceiver.media_pos_emb)  # open_flamingo has none
    return lm, perceiver, blocks


def grown_table(lm) -> torch.Tensor:
    """The embedding after open_flamingo has added its tokens, with trained rows."""
    new = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4)) * 0.3
    return torch.cat([lm.model.embed_tokens.weight.detach(), new])


@torch.no_grad()
def their_logits(tokens, features_BMSC) -> torch.Tensor:
    """open_flamingo's forward: media located by the `<image>` token, blocks before the last layer of every n."""
    lm, perceiver, blocks = reference()
    table = grown_table(lm)
    features = features_BMSC[:, :, None] if HAS_SOURCES else features_BMSC
    latents, locations = perceiver(features), tokens == IMAGE
    for i, block in blocks.items():

        def attend(_, args, kwargs, block=block):
            return (block(args[0], latents, media_locations=locations), *args[1:]), kwargs

        lm.model.layers[i].register_forward_pre_hook(attend, with_kwargs=True)
    hidden = lm.model(inputs_embeds=torch.nn.functional.embedding(tokens, table)).last_hidden_state
    return hidden @ table.T


def state_dict(*, inside_layers: bool = False) -> dict[str, torch.Tensor]:
    """What open_flamingo saves."""
    lm, perceiver, blocks = reference()
    state = {
        f"perceiver.{name}": value
        for name, value in perceiver.state_dict().items()
        if name != "media_pos_emb"
    }
    for i, block in blocks.items():
        where = (
            f"model.layers.{i}.gated_cross_attn_layer" if inside_layers else f"gated_cross_attn_layers.{i}"
        )
        state.update({f"lang_encoder.{where}.{name}": value for name, value in block.state_dict().items()})
    state["lang_encoder.model.embed_tokens.weight"] = grown_table(lm)
    return state


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    reference()[0].save_pretrained(folder)
    return folder


def run_import(path: Path, held, lm_folder: Path, **options) -> Path:
    torch.save(held, path / "checkpoint.pt")
    settings = {"lm": str(lm_folder), "vision": "/clip", "image_id": IMAGE, "end_of_chunk_id": EOC}
    arguments = ImportArguments(
        source=str(path / "checkpoint.pt"), folder=str(path / "ours"), **{**settings, **options}
    )
    return import_network(arguments)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB, (2, 10), generator=generator)
    tokens[0, 2], tokens[0, 6], tokens[1, 0], tokens[1, 5] = IMAGE, IMAGE, IMAGE, IMAGE
    tokens[0, 5], tokens[1, 9] = EOC, EOC
    return tokens, torch.randn(2, 2, 5, FEATURES, generator=generator)


def ours_of(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our ids and media index of their tokens."""
    index = (tokens == IMAGE).cumsum(1).to(torch.int32)
    ids = torch.where(tokens == IMAGE, VOCAB, torch.where(tokens == EOC, VOCAB + 1, tokens))
    return ids, index


def assert_same_logits(found, expected):
    assert found.shape[-1] == VOCAB + 2
    torch.testing.assert_close(found, expected[..., [*range(VOCAB), IMAGE, EOC]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training_file", [False, True])
def test_an_imported_network_has_their_logits(lm_folder, inputs, tmp_path, training_file):
    """Both kinds of file: bare, and as their training saves it."""
    held = state_dict(inside_layers=training_file)
    if training_file:
        held = {"epoch": 1, "model_state_dict": {f"module.{n}": v for n, v in held.items()}}
    folder = run_import(tmp_path, held, lm_folder)
    tokens, features = inputs
    assert_same_logits(logits(folder, *ours_of(tokens), features), their_logits(tokens, features))
    config = read_network_config(str(folder), vision=VisionConfig(name="tiny", tiny_width=FEATURES))
    assert (config.cross_every, config.cross_phase, config.gated_positions()) == (2, "last", [1, 3])
    assert (config.resampler.heads, config.resampler.depth, config.resampler.latents) == (8, 6, 64)
    assert config.lm.weights == str(lm_folder)


def test_a_file_on_a_server_is_the_same_network(lm_folder, tmp_path):
    local = run_import(tmp_path, state_dict(), lm_folder)
    with flaky_server(tmp_path, share=0.2, faults=("503", "reset", "cut")) as server:
        settings = {"lm": str(lm_folder), "vision": "/clip", "image_id": IMAGE, "end_of_chunk_id": EOC}
        url = f"{server.url}/checkpoint.pt"
        again = import_network(ImportArguments(source=url, folder=str(tmp_path / "again"), **settings))
        (tmp_path / "bad.pt").write_bytes(b"nothing")
        with pytest.raises(ValueError, match=re.escape(f"{server.url}/bad.pt cannot be read")):
            import_network(
                ImportArguments(source=f"{server.url}/bad.pt", folder=str(tmp_path / "bad"), **settings)
            )
    for file in local.glob("*.safetensors"):
        assert (again / file.name).read_bytes() == file.read_bytes()
    assert (again / "config.json").read_text() == (local / "config.json").read_text()


@pytest.mark.distributed
def test_two_tensor_parallel_ranks_read_the_same_network(ranks, lm_folder, inputs, tmp_path):
    folder = run_import(tmp_path, state_dict(), lm_folder)
    tokens, features = inputs
    for found in ranks.run(logits_of_ranks, str(folder), *ours_of(tokens), features, world=2, tensor=2):
        assert_same_logits(found, their_logits(tokens, features))


GATE = "lang_encoder.gated_cross_attn_layers.1.attn_gate"
TO_KV = "perceiver.layers.2.0.to_kv.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop(GATE), "missing ['gated.1.attn_gate'] (1 in all)"),
        (lambda s: s.pop(TO_KV), f"missing ['{TO_KV}'] (1 in all)"),
        (lambda s: s.update(stray=torch.zeros(2)), "surplus ['stray'] (1 in all)"),
        (
            lambda s: s.update({TO_KV: torch.zeros(5, FEATURES)}),
            f"{TO_KV} has shape (5, {FEATURES}) instead of",
        ),
        (lambda s: s.pop("lang_encoder.model.embed_tokens.weight"), "input embedding"),
        (
            lambda s: s.update({"module.perceiver.latents": s["perceiver.latents"] + 1}),
            "module.perceiver.latents is there twice",
        ),
        (
            lambda s: s["perceiver.latents"].fill_(math.nan),
            "perceiver.latents holds values that are not finite",
        ),
        (lambda s: s[TO_KV].fill_(math.inf), f"{TO_KV} holds values that are not finite"),
        (
            lambda s: s["lang_encoder.model.embed_tokens.weight"][IMAGE].fill_(math.nan),
            "embedding holds values that are not finite",
        ),
        (
            lambda s: s.update({"perceiver.latents": torch.zeros(64, FEATURES, dtype=torch.int64)}),
            "perceiver.latents is stored as torch.int64",
        ),
        (
            lambda s: s.update({"perceiver.latents": torch.zeros(5)}),
            "perceiver.latents has shape (5,), but must be a matrix",
        ),
        (
            lambda s: s.update({"perceiver.layers.0.1.1.weight": torch.zeros(())}),
            "perceiver.layers.0.1.1.weight has shape (), but must be a matrix",
        ),
        (lambda s: s.update({"perceiver.layers.x.w": torch.zeros(2)}), "surplus ['perceiver.layers.x.w']"),
    ],
)
def test_a_wrong_tensor_is_named(lm_folder, tmp_path, change, says):
    held = state_dict()
    change(held)
    with pytest.raises(ValueError, match=re.escape(says)):
        run_import(tmp_path, held, lm_folder)
    assert not list(tmp_path.glob("*ours*"))


def test_blocks_of_another_depth_are_refused(lm_folder, tmp_path):
    held = {n.replace("layers.3.", "layers.2.") if "gated" in n else n: v for n, v in state_dict().items()}
    with pytest.raises(ValueError, match=r"gated layers before blocks \[1, 2\] of 4"):
        run_import(tmp_path, held, lm_folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lm": ""}, "--lm"),
        ({"vision": ""}, "--vision"),
        ({"image_id": -1}, "--image-id"),
        ({"image_id": EOC}, f"--image-id and --end-of-chunk-id are both {EOC}"),
        ({"image_id": 99}, "<image> is token 99, but the embedding has 63 rows"),
    ],
)
def test_what_the_file_does_not_hold_is_asked_for(lm_folder, tmp_path, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        run_import(tmp_path, state_dict(), lm_folder, **options)


def test_local_paths_are_written_whole_and_urls_as_they_are(lm_folder, tmp_path, monkeypatch):
    """A folder is used from another working directory than the one of the import or the export."""
    monkeypatch.chdir(lm_folder.parent)
    folder = run_import(tmp_path, state_dict(), lm_folder, lm=lm_folder.name, vision="towers/clip")
    stated = json.loads((folder / "config.json").read_text())["model"]
    assert stated["lm"]["weights"] == str(lm_folder)
    assert stated["vision"]["weights"] == str(lm_folder.parent / "towers" / "clip")
    config = read_network_config(str(folder), vision=VisionConfig(name="tiny", tiny_width=FEATURES))
    for given, written in {lm_folder.name: str(lm_folder), "s3://models/lm": "s3://models/lm"}.items():
        place = tmp_path / given.replace("/", "-")
        place.mkdir()
        write_network(place, replace(config, lm=replace(config.lm, weights=given)), [])
        assert json.loads((place / "config.json").read_text())["model"]["lm"]["weights"] == written


def test_a_tokenizer_at_a_url_is_copied(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        memory.pipe_file(f"/copied-tokenizer/{name}", name.encode())
    config = TokenizerConfig(kind="hf", path="memory://copied-tokenizer", vocab_size=9)
    stated = write_tokenizer(tmp_path, config)["tokenizer"]
    assert (stated["path"], stated["vocab_size"]) == ("tokenizer", 9)
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "tokenizer" / "tokenizer_config.json").read_text() == "tokenizer_config.json"


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_file_is_executed(lm_folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
        run_import(tmp_path, {"perceiver.latents": Evil()}, lm_folder)
    assert "executed" not in capsys.readouterr().out
