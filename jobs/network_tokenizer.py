"""The tokenizer of a network folder, so that the folder alone is enough to generate."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.inference.prompt import Encode
from flamingo_dist.models.vision.files import read_json
from flamingo_dist.models.weights.ranges import RangeFile, absolute, inside, join_url

FOLDER = "tokenizer"
"""Folder inside the network folder."""
_FILES = ("tokenizer.json", "tokenizer_config.json")


def write_tokenizer(folder: Path, config: TokenizerConfig | None) -> dict[str, Any]:
    """Copy a tokenizer's files into `folder` and return what `config.json` says of it, {} where none is known.

    A GGUF file is left where it is: it holds a whole language model.
    """
    if config is None:
        return {}
    stated = dataclasses.asdict(config)
    if config.kind == "hf":
        (folder / FOLDER).mkdir()
        for name in _FILES:
            RangeFile(join_url(config.path, name)).copy_to(folder / FOLDER / name)
        stated["path"] = FOLDER
    elif config.path:
        stated["path"] = absolute(config.path)
    return {"tokenizer": stated}


def read_tokenizer(folder: str, stated: Mapping[str, Any]) -> TokenizerConfig | None:
    """Return the tokenizer of a network folder, or None where it holds none.

    Args:
        folder: at any fsspec URL.
        stated: what its `config.json` states.
    """
    tokenizer = stated.get("tokenizer")
    if tokenizer is None:
        return None
    path = tokenizer["path"]
    return TokenizerConfig(**{**tokenizer, "path": inside(folder, path) if path else ""})


def added_tokens(folder: str) -> dict[str, int]:
    """Return the ids of the tokens that the tokenizer in a Hugging Face folder has added, by name; {} without one.

    Args:
        folder: at any fsspec URL.
    """
    held = read_json(folder, _FILES[0]) or {}
    return {token["content"]: token["id"] for token in held.get("added_tokens", ())}


def further_tokens(config: TokenizerConfig, ids: Collection[int]) -> dict[str, int]:
    """Return the names that a tokenizer has for a network's further tokens, with their ids.

    Args:
        config: of the tokenizer; only one of Hugging Face has such names.
        ids: of the further tokens, `PromptIds.further`.
    """
    if config.kind != "hf" or not ids:
        return {}
    return {name: number for name, number in added_tokens(config.path).items() if number in ids}


def encoding(encode: Encode, names: Mapping[str, int]) -> Encode:
    """Return `encode` for text that may hold the names of tokens: for a user's own prompt, never for data.

    Args:
        encode: text to ids, without special tokens.
        names: ids by name.
    """
    if not names:
        return encode
    border = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def split(text: str) -> list[int]:
        parts = (part for part in border.split(text) if part)
        return [token for part in parts for token in ([names[part]] if part in names else encode(part))]

    return split
