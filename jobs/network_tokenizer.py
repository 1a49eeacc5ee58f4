"""The tokenizer of a network folder, so that the folder alone is enough to generate."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import TokenizerConfig

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
