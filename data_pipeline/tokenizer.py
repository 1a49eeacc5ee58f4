"""One small tokenizer for all sources: GGUF files, Hugging Face folders, raw bytes for tiny models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from data_pipeline.storage import Storage

_BYTES = 256
_CONTROL_TOKEN = 3  # llama.cpp's token type of control tokens


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Where a tokenizer comes from; small and picklable, so that every reader loads its own."""

    kind: Literal["gguf", "hf", "bytes"] = "bytes"
    """"gguf": inside a GGUF file; "hf": a folder with `tokenizer.json`; "bytes": one token a byte."""
    path: str = ""
    """GGUF file on every machine, or folder at any fsspec URL; empty for "bytes"."""
    vocab_size: int | None = None
    """Vocabulary of the language model, often larger than the tokenizer's; None takes the tokenizer's."""
    bos_id: int | None = None
    """Id that starts a sequence, where the tokenizer's own choice does not fit: a chat model's is the start of
    a turn, which plain captions are not. None takes the tokenizer's."""

    def __post_init__(self) -> None:
        if (self.kind == "bytes") != (not self.path):
            raise ValueError(
                f"tokenizer kind {self.kind!r} with path {self.path!r}: "
                "'gguf' and 'hf' need a path, 'bytes' takes none"
            )

    def load(self) -> Tokenizer:
        """Load the tokenizer."""
        if self.kind == "gguf":
            loaded = Tokenizer.from_gguf(self.path, vocab_size=self.vocab_size)
        elif self.kind == "hf":
            loaded = Tokenizer.from_hf(self.path, vocab_size=self.vocab_size)
        else:
            loaded = Tokenizer.bytes_level(self.vocab_size or _BYTES + 3)
        if self.bos_id is not None:
            loaded.check_id("bos_id", self.bos_id)
            loaded.bos_id = self.bos_id
        return loaded


class Tokenizer:
    """Text to ids and back, with the two ids that Flamingo adds behind the language model's vocabulary.

    Text is always plain text here: a caption that spells `<|im_end|>` becomes the pieces of that string and
    never the control token, so no sample can forge the structure of a sequence.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | None,
        *,
        vocab_size: int,
        bos_id: int,
        eos_id: int,
        pad_id: int,
    ) -> None:
        """Wrap a backend; use the `from_*` constructors.

        Args:
            backend: a tokenizer of the `tokenizers` package; None for one token a byte.
            vocab_size: vocabulary size of the language model.
            bos_id: id that begins a sequence.
            eos_id: id that ends a sequence.
            pad_id: id of padding; carries no loss, so it may equal another.

        Raises:
            ValueError: when an id does not fit the vocabulary.
        """
        self._backend = backend
        self.vocab_size, self.bos_id, self.eos_id, self.pad_id = vocab_size, bos_id, eos_id, pad_id
        self.image_id, self.eoc_id = vocab_size, vocab_size + 1
        for name, number in {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id}.items():
            self.check_id(name, number)
        if backend is not None:
            backend.encode_special_tokens = True
            # Control tokens, which text never gives, may lie outside: fine-tuners add a padding token.
            control = {
                number for number, token in backend.get_added_tokens_decoder().items() if token.special
            }
            last = max(
                (n for n in backend.get_vocab(with_added_tokens=True).values() if n not in control), default=0
            )
            if last >= vocab_size:
                raise ValueError(
                    f"text gives ids up to {last}, outside the vocabulary of {vocab_size}, where <image> and <EOC> "
                    "lie; check vocab_size, or take the language model's own tokenizer"
                )

    def check_id(self, name: str, number: int) -> None:
        """Raise `ValueError` unless `number`, which is called `name`, is an id of the language model's vocabulary."""
        if not 0 <= number < self.vocab_size:
            raise ValueError(
                f"{name} {number} is outside the vocabulary of {self.vocab_size}; check vocab_size"
            )

    @classmethod
    def from_gguf(cls, path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
        """Build the byte-pair encoding that a GGUF file carries (SmolLM2 and other GPT-2-style vocabularies).

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file carries another kind of tokenizer.
        """
        from gguf import GGUFReader  # costs a second at import; byte-level readers do without

        if not Path(path).is_file():
            raise FileNotFoundError(f"no GGUF file at {path}")
        fields = GGUFReader(str(path)).fields
        meta = {k: field.contents() for k, field in fields.items() if k.startswith("tokenizer.ggml.")}
        if meta.get("tokenizer.ggml.model") != "gpt2":
            raise ValueError(
                f"{path} carries a {meta.get('tokenizer.ggml.model')!r} tokenizer; only byte-level BPE "
                "('gpt2') is read from GGUF: use a folder with tokenizer.json instead"
            )
        tokens = meta["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
        backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if meta.get("tokenizer.ggml.pre") == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        kinds = meta["tokenizer.ggml.token_type"]
        backend.add_special_tokens([t for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL_TOKEN])
        eos = int(meta["tokenizer.ggml.eos_token_id"])
        return cls(
            backend,
            vocab_size=vocab_size or len(tokens),
            bos_id=int(meta.get("tokenizer.ggml.bos_token_id", eos)),
            eos_id=eos,
            pad_id=int(meta.get("tokenizer.ggml.padding_token_id", eos)),
        )

    @classmethod
    def from_hf(cls, folder: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
        """Load `tokenizer.json` and the names of the special tokens from `tokenizer_config.json`.

        Models without a BOS token (GPT-2, Qwen) begin sequences with EOS, as is usual; PAD falls back on EOS
        too.

        Args:
            folder: at any fsspec URL; credentials and endpoints come from the environment.
            vocab_size: vocabulary of the language model; None takes the tokenizer's.

        Raises:
            FileNotFoundError: when one of the two files is absent.
            OSError: when the storage does not give them.
            ValueError: when a file cannot be read, or the configuration names no EOS token.
        """
        backend, settings = _read_hf(str(folder))
        ids: dict[str, int | None] = {}
        for name in ("bos", "eos", "pad"):
            token = settings.get(f"{name}_token")
            token = token["content"] if isinstance(token, dict) else token
            ids[name] = None if token is None else backend.token_to_id(token)
        eos = ids["eos"]
        if eos is None:
            raise ValueError(
                f"{folder}/tokenizer_config.json names no eos_token that tokenizer.json knows; add it"
            )
        return cls(
            backend,
            vocab_size=vocab_size or backend.get_vocab_size(with_added_tokens=True),
            bos_id=eos if ids["bos"] is None else ids["bos"],
            eos_id=eos,
            pad_id=eos if ids["pad"] is None else ids["pad"],
        )

    @classmethod
    def bytes_level(cls, vocab_size: int = _BYTES + 3) -> Tokenizer:
        """One token a UTF-8 byte, then BOS, EOS, PAD: for tiny random language models.

        Raises:
            ValueError: for a vocabulary below 259.
        """
        if vocab_size < _BYTES + 3:
            raise ValueError(
                f"vocab_size {vocab_size}: bytes and three special tokens need at least {_BYTES + 3}"
            )
        return cls(None, vocab_size=vocab_size, bos_id=_BYTES, eos_id=_BYTES + 1, pad_id=_BYTES + 2)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The backend's own pickle forgets this setting, and text could forge control tokens again.
        if self._backend is not None:
            self._backend.encode_special_tokens = True

    @property
    def fingerprint(self) -> str:
        """Short hash of the vocabulary, the merges and the special ids."""
        body = "" if self._backend is None else self._backend.to_str()
        numbers = (self.vocab_size, self.bos_id, self.eos_id, self.pad_id)
        return hashlib.sha256(f"{numbers}{body}".encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Encode plain text; adds no special tokens and never yields one."""
        utf8 = text.encode("utf-8", errors="replace")  # JSON can smuggle in lone surrogates
        if self._backend is None:
            return list(utf8)
        return list(self._backend.encode(utf8.decode("utf-8"), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; special ids, `<image>` and `<EOC>` are left out."""
        if self._backend is None:
            return bytes(i for i in ids if i < _BYTES).decode("utf-8", errors="replace")
        plain = [int(i) for i in ids if i < self.vocab_size]
        return str(self._backend.decode(plain, skip_special_tokens=True))


def _read_hf(folder: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer and its settings, or raise an error with the name of the file that is absent or damaged."""
    blobs, storage = {}, Storage()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            blobs[name] = storage.read_all(f"{folder.rstrip('/')}/{name}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"no {name} in {folder}; save the tokenizer there with save_pretrained, or name its folder"
            ) from error
    try:
        backend = tokenizers.Tokenizer.from_buffer(blobs["tokenizer.json"])
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{folder}/tokenizer.json cannot be read as a tokenizer: {error}") from error
    try:
        settings = json.loads(blobs["tokenizer_config.json"])
    except ValueError as error:
        raise ValueError(f"{folder}/tokenizer_config.json cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{folder}/tokenizer_config.json holds {type(settings).__name__} instead of a JSON object"
        )
    return backend, settings
