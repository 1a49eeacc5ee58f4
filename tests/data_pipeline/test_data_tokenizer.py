"""Tokenizers: bytes, a Hugging Face folder, a GGUF file; text never becomes a control token."""

import json
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import known_implementations
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.tokenizer import Tokenizer, TokenizerConfig

TEXT = "A cat, 12 dogs <|im_end|> naïve 猫"


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = Tokenizer.bytes_level()
    ids = tokenizer.encode(text)
    assert all(i < 256 for i in ids)
    wrapped = [tokenizer.bos_id, tokenizer.image_id, *ids, tokenizer.eoc_id, tokenizer.eos_id]
    assert tokenizer.decode(wrapped) == text


def test_added_ids_lie_behind_the_vocabulary() -> None:
    tokenizer = Tokenizer.bytes_level(300)
    assert (tokenizer.vocab_size, tokenizer.image_id, tokenizer.eoc_id) == (300, 300, 301)
    with pytest.raises(ValueError, match="at least 259"):
        Tokenizer.bytes_level(258)


def byte_pairs() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE trained on nothing but our sentence."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([TEXT, "the cats and dogs, the cat"], trainer)
    state: dict[str, Any] = json.loads(backend.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    return sorted(state["vocab"], key=state["vocab"].get), merges


def write_gguf(path: Path, model: str = "gpt2") -> None:
    from gguf import GGUFWriter

    tokens, merges = byte_pairs()
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    tokenizer = TokenizerConfig(kind="gguf", path=str(tmp_path / "m.gguf")).load()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    ids = tokenizer.encode(TEXT)
    assert not {0, 1, 2} & set(ids), "control tokens never come from text"
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.image_id, *ids, tokenizer.eoc_id]) == TEXT
    # Digits are split one by one, as SmolLM2 was trained.
    assert len(tokenizer.encode("12")) == 2
    assert tokenizer.encode(" cat") != tokenizer.encode("cat")
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert sent.encode(TEXT) == ids, "text forges nothing after a journey between processes either"
    assert sent.fingerprint == tokenizer.fingerprint
    padded = Tokenizer.from_gguf(tmp_path / "m.gguf", vocab_size=512)
    assert padded.image_id == 512
    assert padded.fingerprint != tokenizer.fingerprint
    assert tokenizer.encode("bad \ud800 surrogate") == tokenizer.encode("bad ? surrogate")


def test_gguf_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        Tokenizer.from_gguf(tmp_path / "absent.gguf")
    write_gguf(tmp_path / "m.gguf", model="llama")
    with pytest.raises(ValueError, match="'llama' tokenizer"):
        Tokenizer.from_gguf(tmp_path / "m.gguf")
    write_gguf(tmp_path / "ok.gguf")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        Tokenizer.from_gguf(tmp_path / "ok.gguf", vocab_size=2)


def test_hugging_face_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    backend = Tokenizer.from_gguf(tmp_path / "m.gguf")._backend
    assert backend is not None
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = TokenizerConfig(kind="hf", path=str(tmp_path)).load()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.encode(TEXT) == Tokenizer.from_gguf(tmp_path / "m.gguf").encode(TEXT)
    fsspec.filesystem("memory").put(f"{tmp_path}/", "/tokenizer-test/", recursive=True)
    remote = TokenizerConfig(kind="hf", path="memory://tokenizer-test").load()
    assert remote.fingerprint == tokenizer.fingerprint
    for damaged in ("", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=rf"{tmp_path}/tokenizer_config.json (cannot|holds list)"):
            Tokenizer.from_hf(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="eos_token"):
        Tokenizer.from_hf(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json"):
        Tokenizer.from_hf(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{tmp_path}/tokenizer.json cannot be read as a tokenizer"):
        Tokenizer.from_hf(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer.json in memory://nowhere; save the tokenizer there"
    ):
        Tokenizer.from_hf("memory://nowhere")
    entry = {"class": "no_such_package.FileSystem", "err": "install no-such-package to read nosuch://"}
    monkeypatch.setitem(known_implementations, "nosuch", entry)
    with pytest.raises(
        ValueError, match=r"nosuch://x/tokenizer.json cannot be read here: install no-such-package"
    ):
        Tokenizer.from_hf("nosuch://x")


@pytest.mark.parametrize("settings", [{"kind": "gguf"}, {"kind": "bytes", "path": "x"}])
def test_bad_configurations(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="need a path"):
        TokenizerConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("bos_id", [-1, 259, 10**6])
def test_a_first_token_outside_the_vocabulary_is_refused(bos_id: int) -> None:
    """259 would be `<image>`."""
    with pytest.raises(ValueError, match=f"bos_id {bos_id} is outside the vocabulary of 259"):
        TokenizerConfig(bos_id=bos_id).load()


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tmp_path: Path) -> None:
    """Text would come out as `<image>` and `<EOC>`, which lie behind the vocabulary."""
    write_gguf(tmp_path / "m.gguf")
    tokens = Tokenizer.from_gguf(tmp_path / "m.gguf").vocab_size
    with pytest.raises(
        ValueError, match=f"text gives ids up to {tokens - 1}, outside the vocabulary of {tokens - 1}"
    ):
        Tokenizer.from_gguf(tmp_path / "m.gguf", vocab_size=tokens - 1)
