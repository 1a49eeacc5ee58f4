"""The tokenizer of a network folder, so that the folder alone is enough to generate."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import TokenizerConfig
from flamingo_dist.inference.prompt import Encode

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
            shutil.copy(Path(config.path) / name, folder / FOLDER / name)
        stated["path"] = FOLDER
    elif config.path:
        stated["path"] = str(Path(config.path).resolve())
    return {"tokenizer": stated}


def read_tokenizer(folder: Path) -> TokenizerConfig | None:
    """Return the tokenizer of the network folder `folder`, or None where it holds none."""
    stated = json.loads((folder / "config.json").read_text()).get("tokenizer")
    if stated is None:
        return None
    path = str(folder / stated["path"]) if stated["path"] else ""
    return TokenizerConfig(**{**stated, "path": path})


def further_tokens(config: TokenizerConfig, first: int, count: int) -> dict[str, int]:
    """Return the names of `count` tokens from id `first` on that a tokenizer of Hugging Face has added, with their ids.

    Args:
        config: of the tokenizer; other kinds have no such names.
        first: id of the network's first token after `<image>` and `<EOC>`.
        count: how many there are.
    """
    if config.kind != "hf":
        return {}
    added = json.loads((Path(config.path) / "tokenizer.json").read_text()).get("added_tokens", ())
    return {token["content"]: token["id"] for token in added if 0 <= token["id"] - first < count}


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
