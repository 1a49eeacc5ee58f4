"""Small tasks on real shards, and a tiny network with weights wide enough to say different things."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import TokenizerConfig
from jobs.evaluate import command
from jobs.evaluate.results import Outcome
from jobs.evaluate.settings import EvaluateArguments
from jobs.inference_source import Source
from tests import tiny

COLOURS = ("red", "green", "blue", "grey")
_VOCAB = 260


def source(**lm: Any) -> Source:
    network = tiny.network(gate_init=1.0)
    network = replace(
        network,
        lm=replace(network.lm, vocab_size=_VOCAB, **lm),
        gated=replace(network.gated, init_std=1.0),
    )
    return Source(
        model=network,
        tokenizer=TokenizerConfig(kind="bytes", vocab_size=_VOCAB),
        dtype=torch.float32,
        seed=3,
        checkpoint=None,
    )


def noise(seed: int) -> bytes:
    """A picture that no other seed gives."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def record(number: int) -> dict[str, Any]:
    """Texts for every task."""
    colour = COLOURS[number % len(COLOURS)]
    return {
        "captions": [f"a {colour} cat {number}", f"cat number {number}"],
        "question": f"what is {number}?",
        "answers": [{"answer": colour}] * 6 + [{"answer": "cat"}] * 4,
        "label": colour,
    }


def write(folder: Path, numbers: range, **members: bytes) -> str:
    """Write examples eNNN; `members` are further ones of every example, or replace its picture."""
    with ShardWriter(str(folder), max_samples=3) as writer:
        for number in numbers:
            texts = {"json": json.dumps(record(number)).encode()}
            writer.write(f"e{number:03d}", {"png": noise(number), **members, **texts})
    return str(folder)


def evaluate(arguments: EvaluateArguments, network: Source | None = None) -> Outcome:
    """Evaluate the tiny network in place of the one that a folder holds."""
    with patch.object(command, "open_source", return_value=network or source()):
        return command.evaluate(arguments)
