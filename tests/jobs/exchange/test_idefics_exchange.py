"""IDEFICS in and out, against transformers on random weights in its real layout."""

import json
import re
import shutil
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionModel,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    PreTrainedTokenizerFast,
)

from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.inference.prompt import prompt_of_texts
from flamingo_dist.models.exchange import idefics
from flamingo_dist.models.exchange.folder import read_network_config, read_stated
from flamingo_dist.models.exchange.tensors import write_tensors
from flamingo_dist.models.exchange.vision_tower import Tower, tower_of
from flamingo_dist.models.vision import VisionConfig
from flamingo_dist.models.weights.safetensors import SafetensorsSource
from flamingo_dist.parallel.topology import single_process
from jobs.exchange import (
    ExportArguments,
    ImportArguments,
    export_network,
    idefics_tensors,
    import_network,
)
from jobs.generate import GenerateArguments, generate_captions
from jobs.held_out import prompt_ids
from jobs.network_source import Network
from jobs.network_tokenizer import encoding, further_tokens, read_tokenizer
from tests.data_pipeline.servers import flaky_server
from tests.jobs.exchange.exchanging import build, logits, logits_of, logits_of_ranks, rewrite

VOCAB, WIDTH, FEATURES, EXTRA = 60, 32, 24, 2
TOWER = {
    "embed_dim": FEATURES,
    "image_size": 16,
    "patch_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
HAS_CLIP = "clip" in get_args(VisionConfig.__annotations__["name"]) or "clip" in str(
    VisionConfig.__annotations__["name"]
)


def random_idefics(**options) -> IdeficsForVisionText2Text:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "additional_vocab_size": EXTRA,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "use_resampler": True,
        "qk_layer_norms": True,
        "alpha_type": "vector",
        "cross_layer_interval": 2,
        "vision_config": TOWER,
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": True,
        },
    }
    model = IdeficsForVisionText2Text(IdeficsConfig(**{**settings, **options})).eval()
    for name, param in model.named_parameters():
        if "alpha" in name:
            torch.nn.init.uniform_(param, 0.3, 1.5)
        else:  # norms and biases too, so that a swapped pair shows
            torch.nn.init.normal_(param, mean=1.0 if "norm" in name or ".ln." in name else 0.0, std=0.15)
    return model


@pytest.fixture(scope="module")
def theirs():
    return random_idefics()


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "idefics"
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(saved):
    return import_network(ImportArguments(source=str(saved), folder=str(saved.parent / "ours")))


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB, (2, 9), generator=generator)
    tokens[0, 2], tokens[1, 0], tokens[0, 5] = VOCAB, VOCAB, VOCAB + 1  # <image>, <image>, <EOC>
    index = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 2, 2, 2]], dtype=torch.int32)
    return tokens, index, torch.randn(2, 2, 3, 16, 16, generator=generator)


def swap(ids: torch.Tensor) -> torch.Tensor:
    """Their ids of our tokens: `<image>` and the other additional token change places."""
    return torch.where(ids == VOCAB, VOCAB + 1, torch.where(ids == VOCAB + 1, VOCAB, ids))


@torch.no_grad()
def their_logits(model, tokens, index, pixels) -> torch.Tensor:
    attends = torch.nn.functional.one_hot(index.long(), 3)[..., 1:]
    ids = swap(tokens) if model.config.additional_vocab_size else tokens
    out = model(
        input_ids=ids.clone(),
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        image_attention_mask=attends,
        use_cache=False,
    ).logits
    return torch.cat([out[..., :VOCAB], out[..., VOCAB : VOCAB + 2].flip(-1), out[..., VOCAB + 2 :]], -1)


@torch.no_grad()
def their_features(model, pixels) -> torch.Tensor:
    """What IDEFICS passes to its resampler: all tokens of the last block, no final norm."""
    hidden = model.model.vision_model(pixels.flatten(0, 1)).last_hidden_state
    return hidden.unflatten(0, pixels.shape[:2])


def test_an_imported_network_has_their_logits(theirs, imported, inputs):
    tokens, index, pixels = inputs
    expected = their_logits(theirs, *inputs)
    found = logits(imported, tokens, index, their_features(theirs, pixels))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    config = read_network_config(str(imported), vision=VisionConfig(name="tiny", tiny_width=FEATURES))
    assert (config.cross_every, config.cross_phase, config.gated.gate) == (2, "first", "vector")
    assert config.gated.qk_norm
    assert config.resampler.qk_norm


@pytest.mark.distributed
def test_two_tensor_parallel_ranks_read_the_same_network(ranks, theirs, imported, inputs):
    tokens, index, pixels = inputs
    given = (tokens, index, their_features(theirs, pixels))
    for found in ranks.run(logits_of_ranks, str(imported), *given, world=2, tensor=2):
        torch.testing.assert_close(found, logits(imported, *given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"additional_vocab_size": 0, "alpha_type": "float", "qk_layer_norms": False}]
)
def test_other_options(tmp_path, inputs, options):
    _, index, pixels = inputs
    tokens = inputs[0].clamp(max=VOCAB - 1)
    model = random_idefics(**options)
    model.save_pretrained(tmp_path / "hub")
    ours = import_network(ImportArguments(source=str(tmp_path / "hub"), folder=str(tmp_path / "ours")))
    found = logits(ours, tokens, index, their_features(model, pixels))
    assert not found[..., VOCAB:].any()  # tokens that IDEFICS lacks
    torch.testing.assert_close(
        found[..., :VOCAB], their_logits(model, tokens, index, pixels)[..., :VOCAB], atol=1e-5, rtol=1e-5
    )


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """An instruct model as it is published: a third additional token, `<end_of_utterance>`, and its tokenizer's ids."""
    folder = tmp_path_factory.mktemp("instruct")
    model = random_idefics(additional_vocab_size=3)
    model.save_pretrained(folder / "hub")
    names = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    added = [{"content": name, "id": VOCAB + number, "special": True} for number, name in enumerate(names)]
    (folder / "hub" / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    ours = import_network(ImportArguments(source=str(folder / "hub"), folder=str(folder / "ours")))
    return model, folder / "hub", ours


@pytest.fixture
def dialogue(inputs):
    """Inputs that hold all three additional tokens."""
    tokens, index, pixels = inputs
    tokens = tokens.clone()
    tokens[:, 7] = VOCAB + 2
    return tokens, index, pixels


def test_an_instruct_model_has_a_further_token(instruct, dialogue, tmp_path):
    model, _, ours = instruct
    tokens, index, pixels = dialogue
    expected = their_logits(model, *dialogue)
    found = logits(ours, tokens, index, their_features(model, pixels))
    assert found.shape[-1] == VOCAB + 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    config = read_network_config(str(ours), vision=VisionConfig(name="tiny", tiny_width=FEATURES))
    assert config.lm.further_tokens == 1
    back = export_network(ExportArguments(source=str(ours), folder=str(tmp_path / "back"), to="idefics"))
    assert json.loads((back / "config.json").read_text())["additional_vocab_size"] == 3
    again = AutoModelForImageTextToText.from_pretrained(back).eval()
    torch.testing.assert_close(their_logits(again, *dialogue), expected, atol=0, rtol=0)


@pytest.mark.distributed
def test_two_tensor_parallel_ranks_hold_a_further_token(ranks, instruct, dialogue):
    model, _, ours = instruct
    tokens, index, pixels = dialogue
    given = (tokens, index, their_features(model, pixels))
    for found in ranks.run(logits_of_ranks, str(ours), *given, world=2, tensor=2):
        torch.testing.assert_close(found, their_logits(model, *dialogue), atol=1e-5, rtol=1e-5)


def test_a_further_token_is_a_target_and_ends_what_is_generated(instruct, dialogue):
    model, _, ours = instruct
    tokens, index, pixels = dialogue
    with single_process() as topology, torch.no_grad():
        network = build(ours, topology, width=FEATURES)
        features = their_features(model, pixels)[:, :, None]
        targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
        found = network(
            tokens, index, features, torch.ones(2, 2, dtype=torch.bool), targets_BT=targets
        ).nll_BT
    assert network.resampler.latents.requires_grad
    assert network.lm.vocabulary.extra.weight.shape == (3, WIDTH)
    expected = torch.nn.functional.cross_entropy(
        their_logits(model, *dialogue).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
    )
    torch.testing.assert_close(found.flatten(), expected, atol=1e-5, rtol=1e-5)
    ids = prompt_ids(TokenizerConfig(kind="bytes").load(), network.config.lm)
    assert ids.stop_ids[-1] == VOCAB + 2


WORDS = ["<unk>", "<s>", "</s>", "User", ":", "what", "is", "this", "?", "Assistant", "a", "cat", "dog"]


@pytest.fixture(scope="module")
def published(instruct, tmp_path_factory):
    """An instruct model with a tokenizer and its processor, as transformers has them."""
    hub = tmp_path_factory.mktemp("published") / "hub"
    shutil.copytree(instruct[1], hub)
    known = {
        word: number for number, word in enumerate([*WORDS, *(f"w{i}" for i in range(VOCAB - len(WORDS)))])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    images = IdeficsImageProcessorPil(image_size=16)
    tokenizer.save_pretrained(hub)
    images.save_pretrained(hub)
    processor = IdeficsProcessor(image_processor=images, tokenizer=tokenizer, image_size=16)
    return processor, import_network(ImportArguments(source=str(hub), folder=str(hub.parent / "ours")))


def test_a_dialogue_is_continued_as_transformers_does(instruct, published, tmp_path):
    """The same prompt, token for token, and the same greedy answer from the folder alone."""
    model, (processor, ours) = instruct[0], published
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for number, file in enumerate(files):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    first = "User: what is this? <image><end_of_utterance> Assistant: a cat<end_of_utterance>"
    second = "User: what? <image><end_of_utterance> Assistant:"
    given = GenerateArguments(
        run=str(ours), image=(str(files[1]),), shot=(f"{files[0]}={first}",), prompt=second, max_new_tokens=6
    )
    pieces: list[object] = []
    for text, file in zip((first, second), files, strict=True):
        before, after = text.split("<image>")
        pieces += [before, Image.open(file), after]
    inputs = processor(text=[pieces], return_tensors="pt", add_end_of_utterance_token=False)
    with torch.no_grad():
        stops = [WORDS.index("</s>"), VOCAB, VOCAB + 2]
        answer = model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=stops,
            bad_words_ids=[[VOCAB + 1], [WORDS.index("<s>")]],
        )[0, inputs["input_ids"].shape[1] :]
    kept = [int(token) for token in answer if token not in stops]
    assert kept
    (found,) = generate_captions(given)
    assert found == (str(files[1]), processor.tokenizer.decode(kept))

    stated = read_tokenizer(str(ours), read_stated(str(ours)) or {})
    config = read_network_config(str(ours))
    ids = prompt_ids(stated.load(), config.lm, wrapped=True)
    encode = encoding(stated.load().encode, further_tokens(stated, [VOCAB + 2]))
    prompt = prompt_of_texts([first, second], ids=ids, encode=encode)
    assert swap(torch.tensor(prompt.tokens)).tolist() == inputs["input_ids"][0].tolist()


def test_a_checkpoint_on_a_server_is_imported_from_there(published, tmp_path):
    """Settings, tokenizer and tensors, through a server that fails now and then."""
    _, ours = published
    with flaky_server(ours.parent, share=0.06, faults=("503", "reset", "cut")) as server:
        url = f"{server.url}/hub"
        again = import_network(ImportArguments(source=url, folder=str(tmp_path / "again")))
        assert sum(server.met.values()) > 0
        with pytest.raises(ValueError, match="nothing is neither a folder with a config.json"):
            import_network(ImportArguments(source=f"{server.url}/nothing", folder=str(tmp_path / "none")))
    names = {file.relative_to(ours) for file in ours.rglob("*") if file.is_file()}
    assert {file.relative_to(again) for file in again.rglob("*") if file.is_file()} == names
    for name in names:
        assert (again / name).read_bytes() == (ours / name).read_bytes(), name


def test_a_tokenizer_of_another_order_is_refused(instruct, tmp_path):
    _, hub, _ = instruct
    shutil.copytree(hub, tmp_path / "hub")
    file = tmp_path / "hub" / "tokenizer.json"
    file.write_text(file.read_text().replace(f'"id": {VOCAB + 1},', f'"id": {VOCAB + 7},'))
    with pytest.raises(
        ValueError, match=f"<image> is token {VOCAB + 7}; in IDEFICS' layout it is {VOCAB + 1}"
    ):
        import_network(ImportArguments(source=str(tmp_path / "hub"), folder=str(tmp_path / "ours")))


def test_the_tower_is_a_clip_vision_model(theirs, imported, inputs):
    pixels = inputs[2]
    model, report = CLIPVisionModel.from_pretrained(imported / "vision", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    hidden = model.eval()(pixels.flatten(0, 1)).last_hidden_state.detach()
    torch.testing.assert_close(hidden.unflatten(0, (2, 2)), their_features(theirs, pixels))
    stated = json.loads((imported / "config.json").read_text())["model"]["vision"]
    assert stated == {"name": "clip", "class_token": True, "weights": "vision", "image_size": 16}


@pytest.mark.skipif(not HAS_CLIP, reason="this version has no CLIP encoder")
def test_pixels_go_through_the_imported_tower(theirs, imported, inputs):
    tokens, index, _ = inputs
    raw = torch.randint(0, 256, (2, 2, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    with single_process() as topology, torch.no_grad():
        model = build(imported, topology)
        mask = torch.ones(2, 2, dtype=torch.bool)
        found = model(tokens, index, raw[:, :, None].to(torch.uint8), mask).logits_BTV
        normalised = model.vision.normalise(raw.flatten(0, 1).to(torch.uint8)).unflatten(0, (2, 2))
    torch.testing.assert_close(found, their_logits(theirs, tokens, index, normalised), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not HAS_CLIP, reason="this version has no CLIP encoder")
def test_the_command_exports_what_transformers_loads(theirs, imported, inputs, tmp_path):
    arguments = ExportArguments(source=str(imported), folder=str(tmp_path / "back"), to="idefics")
    again = AutoModelForImageTextToText.from_pretrained(export_network(arguments)).eval()
    torch.testing.assert_close(their_logits(again, *inputs), their_logits(theirs, *inputs))


def tower(imported) -> Tower:
    return Tower(
        stated={**TOWER, "hidden_act": "gelu"},
        source=SafetensorsSource(str(imported / "vision")),
        prefix="vision_model.",
    )


def export(network: Network, tower: Tower, folder) -> IdeficsForVisionText2Text:
    folder.mkdir()
    stated = idefics.idefics_config(network.config, tower.stated)
    (folder / "config.json").write_text(json.dumps(stated))
    write_tensors(folder, idefics_tensors(network, tower), shard_bytes=20_000)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model, IdeficsForVisionText2Text)
    return model.eval()


def test_a_network_of_ours_exported_has_our_logits(theirs, imported, inputs, tmp_path):
    """With a frame embedding, as training gives it, which moves into the tower."""
    tokens, index, pixels = inputs
    with single_process() as topology, torch.no_grad():
        ours = build(imported, topology, width=FEATURES)
        for param in ours.parameters():
            param.add_(torch.randn(param.shape) * 0.02)
        expected = logits_of(ours, tokens, index, their_features(theirs, pixels))
        # Frozen weights are buffers where they are resident.
        state = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    assert state["resampler.frame_embeddings"].any()
    network = Network(
        config=ours.config,
        shapes={},
        trainable=frozenset(),
        read=state.__getitem__,
        card="",
        more={},
        tokenizer=None,
    )
    again = export(network, tower(imported), tmp_path / "idefics")
    assert len(list((tmp_path / "idefics").glob("*.safetensors"))) > 1
    torch.testing.assert_close(their_logits(again, *inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("part", "option", "value", "says"),
    [
        ("gated", "activation", "sqrelu", "gated.activation='sqrelu' does not exist in IDEFICS"),
        ("gated", "norm", "layer", "gated.norm='layer'"),
        ("gated", "attend_all", True, "gated.attend_all=True"),
        ("lm", "num_kv_heads", 2, "lm.num_kv_heads=2"),
        ("resampler", "activation", "gelu", "resampler.activation='gelu'"),
        ("resampler", "ffw_mult", 2, "resampler.ffw_mult=2"),
        (None, "cross_phase", "last", "cross_phase='last'"),
    ],
)
def test_what_idefics_has_not_is_named(imported, part, option, value, says):
    config = read_network_config(str(imported), vision=VisionConfig(name="tiny", tiny_width=FEATURES))
    changed = value if part is None else replace(getattr(config, part), **{option: value})
    config = replace(config, **{part or option: changed})
    with pytest.raises(ValueError, match=re.escape(says)):
        idefics.idefics_config(config, TOWER)
    with pytest.raises(ValueError, match="vision.name='tiny' does not exist in IDEFICS"):
        tower_of(config.vision)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_resampler": False}, "use_resampler=False has no counterpart"),
        (
            {"additional_vocab_size": 1},
            "additional_vocab_size=1 has no counterpart here; it must be 0, or 2 or more",
        ),
        ({"cross_layer_interval": 3}, "cross_layer_interval=3 has no counterpart"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' has no counterpart"),
    ],
)
def test_an_option_that_we_lack_is_named(saved, tmp_path, options, says):
    folder = tmp_path / "hub"
    shutil.copytree(saved, folder)
    stated = json.loads((folder / "config.json").read_text()) | options
    (folder / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=says):
        import_network(ImportArguments(source=str(folder), folder=str(tmp_path / "ours")))
    assert not list(tmp_path.glob("*ours*"))


BLOCK = "model.gated_cross_attn_layers.1.cross_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop(BLOCK), f"missing ['{BLOCK}'] (1 in all)"),
        (
            lambda s: s.pop("model.vision_model.pre_layrnorm.bias"),
            "missing ['model.vision_model.pre_layrnorm.bias']",
        ),
        (lambda s: s.update(stray=torch.zeros(2)), "surplus ['stray'] (1 in all)"),
        (lambda s: s.update({BLOCK: torch.zeros(31, 32)}), f"{BLOCK} has shape (31, 32) instead of (32, 32)"),
    ],
)
def test_a_wrong_tensor_is_named(saved, tmp_path, change, says):
    folder = tmp_path / "hub"
    shutil.copytree(saved, folder)
    rewrite(folder, change)
    with pytest.raises(ValueError, match=re.escape(says)):
        import_network(ImportArguments(source=str(folder), folder=str(tmp_path / "ours")))
