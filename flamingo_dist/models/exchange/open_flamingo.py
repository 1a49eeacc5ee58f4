"""OpenFlamingo's checkpoints (`.pt`): resampler, gated blocks and the language model's grown embedding.

open_flamingo's training saves the gated blocks inside the language model's blocks; other files name them by
`gated_cross_attn_layers`. Both hold a number for the language model's block that each stands before, so interval and
phase are read from the names. The frozen language model and the vision encoder are not in the file.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_dist.models.exchange.rules import (
    Rule,
    absent,
    check_tensors,
    read_ours,
    same,
    stacked,
    their_shapes,
)
from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.models.gated_block import GatedBlockConfig
from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.resampler import ResamplerConfig
from flamingo_dist.models.vision import VisionConfig

HEAD_DIM = 64
"""Width of a head in open_flamingo's resampler and blocks; their number follows from the tensors."""
_GATED = re.compile(
    r"lang_encoder\.(?:gated_cross_attn_layers\.(\d+)|[\w.]+\.(\d+)\.gated_cross_attn_layer)\.(.+)"
)
_EMBEDDING = re.compile(r"lang_encoder\.[\w.]*(?:embed_tokens|wte|embed_in)\.weight")
_HEAD = re.compile(r"lang_encoder\.[\w.]*(?:lm_head|embed_out)\.weight")
_POSITIONS = re.compile(r"lang_encoder\.[\w.]*embed_positions\.weight")
"""OPT's frozen positions, which open_flamingo saves because their name says "embed"."""


class OpenFlamingoFile:
    """A checkpoint's tensors under one set of names: `perceiver.*`, `gated.<block>.*`, `embedding`, `head`."""

    def __init__(self, path: Path, where: str = "") -> None:
        """Read the file; nothing in it is executed.

        Args:
            path: of a local file.
            where: what errors call it, such as the URL that it is a copy of; empty for the path.

        Raises:
            ValueError: it is no checkpoint of open_flamingo.
        """
        self.where = where or str(path)
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever the unpickler meets
            raise ValueError(f"{self.where} cannot be read as a file of tensors: {error}") from error
        state = held.get("model_state_dict", held) if isinstance(held, dict) else {}
        state = state if isinstance(state, dict) else {}
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in state.items():
            self._take(str(name), tensor)
        self.blocks = sorted({int(n.split(".")[1]) for n in self.tensors if n.startswith("gated.")})
        if not self.blocks or "perceiver.latents" not in self.tensors or "embedding" not in self.tensors:
            raise ValueError(
                f"{self.where} is no checkpoint of open_flamingo: it needs perceiver.*, gated cross-attention "
                f"layers and the language model's input embedding; it holds {sorted(map(str, state))[:5]} ..."
            )
        self.check_matrices("perceiver.latents", "embedding", *(("head",) if "head" in self.tensors else ()))

    def _take(self, name: str, tensor: Any) -> None:
        short = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
        gated = _GATED.fullmatch(short)
        if gated is not None:
            short = f"gated.{gated[1] or gated[2]}.{gated[3]}"
        elif _EMBEDDING.fullmatch(short):
            short = "embedding"
        elif _HEAD.fullmatch(short):
            short = "head"
        elif _POSITIONS.fullmatch(short):
            return
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{self.where}: {name} is no tensor but {type(tensor).__name__}.")
        if not tensor.is_floating_point():
            raise ValueError(
                f"{self.where}: {name} is stored as {tensor.dtype}; weights are floating-point numbers."
            )
        if short in self.tensors and not torch.equal(self.tensors[short], tensor):
            raise ValueError(f"{self.where}: {name} is there twice, with different values.")
        self.tensors[short] = tensor

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every tensor of the resampler and the gated blocks."""
        return {n: t.shape for n, t in self.tensors.items() if n not in ("embedding", "head")}

    def check_matrices(self, *names: str) -> None:
        """Raise `ValueError` unless the tensors of these names have two dimensions, neither of them empty."""
        for name in names:
            shape = tuple(self.tensors[name].shape)
            if len(shape) != 2 or not all(shape):
                raise ValueError(f"{self.where}: {name} has shape {shape}, but must be a matrix.")

    def read(self, name: str) -> Tensor:
        """Return a tensor, of any shape.

        Raises:
            ValueError: it holds values that are not finite.
        """
        return self._finite(self.tensors[name], name)

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """Return rows [N, D] of the tensor `name` in memory of their own.

        Raises:
            ValueError: they hold values that are not finite.
        """
        return self._finite(self.tensors[name][list(numbers)].clone(), name)

    def _finite(self, tensor: Tensor, name: str) -> Tensor:
        if not tensor.isfinite().all():
            raise ValueError(
                f"{self.where}: {name} holds values that are not finite; was the training stable?"
            )
        return tensor


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Rows of the grown embedding that were trained."""

    image: int
    """Id of `<image>`."""
    end_of_chunk: int
    """Id of `<|endofchunk|>`, our `<EOC>`."""


def network_config(file: OpenFlamingoFile, lm: LMConfig, vision: VisionConfig) -> FlamingoConfig:
    """Return the network whose trainable part `file` holds.

    Args:
        file: the checkpoint.
        lm: the frozen language model.
        vision: the encoder; its width must be the checkpoint's.

    Raises:
        ValueError: the blocks do not stand in regular intervals, or a shape is not one of open_flamingo's.
    """
    every = file.blocks[0] + 1
    if file.blocks != list(range(every - 1, lm.num_layers, every)):
        raise ValueError(
            f"{file.where} has gated layers before blocks {file.blocks} of {lm.num_layers}; open_flamingo puts them "
            "before the last block of every n. Is this its language model?"
        )
    shapes = file.shapes()
    first = f"gated.{file.blocks[0]}"
    names = ["perceiver.layers.0.0.to_q.weight", "perceiver.layers.0.1.1.weight"]
    names += [f"{first}.attn.to_q.weight", f"{first}.ff.1.weight"]
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(f"{file.where} does not hold this network: missing {missing}.")
    file.check_matrices(*names)
    latents, width = shapes["perceiver.latents"]
    inner, hidden, inner_gated, hidden_gated = (shapes[name][0] for name in names)
    # What is named otherwise is surplus, and a gap is missing.
    layers = {n.split(".")[2] for n in shapes if n.startswith("perceiver.layers.")}
    depth = next(i for i in range(len(layers) + 1) if str(i) not in layers)
    return FlamingoConfig(
        lm=lm,
        vision=vision,
        resampler=ResamplerConfig(
            feature_width=width,
            width=width,
            depth=depth,
            latents=latents,
            heads=inner // HEAD_DIM,
            head_dim=HEAD_DIM,
            ffw_mult=hidden // width,
            activation="gelu",
            frames=shapes["perceiver.frame_embs"][0] if "perceiver.frame_embs" in shapes else 1,
        ),
        gated=GatedBlockConfig(
            width=lm.width,
            media_width=width,
            heads=inner_gated // HEAD_DIM,
            head_dim=HEAD_DIM,
            ffw_hidden=hidden_gated,
            activation="gelu",
        ),
        cross_every=every,
        cross_phase="last",
    )


def rules(config: FlamingoConfig, *, frames: bool) -> list[Rule]:
    """Return how our trainable parameters and the checkpoint's tensors stand for each other, embeddings left out.

    Args:
        config: the network.
        frames: whether the checkpoint has frame embeddings.
    """
    found = [same("resampler.latents", "perceiver.latents"), *_norm("resampler.norm", "perceiver.norm")]
    if frames:
        found.append(same("resampler.frame_embeddings", "perceiver.frame_embs"))
    else:
        found.append(absent("resampler.frame_embeddings", (config.resampler.frames, config.resampler.width)))
    for i in range(config.resampler.depth):
        a, b = f"resampler.layers.{i}.", f"perceiver.layers.{i}."
        found += _norm(f"{a}attn.norm_features", f"{b}0.norm_media")
        found += _norm(f"{a}attn.norm_latents", f"{b}0.norm_latents")
        found += [*_attention(f"{a}attn.", f"{b}0."), *_feed_forward(a, f"{b}1.")]
    for i in config.gated_positions():
        a = b = f"gated.{i}."
        found += [same(f"{a}gate_attn", f"{b}attn_gate"), same(f"{a}gate_ffw", f"{b}ff_gate")]
        found += _norm(f"{a}norm_attn", f"{b}attn.norm")
        found += [*_attention(f"{a}attn.", f"{b}attn."), *_feed_forward(a, f"{b}ff.")]
    return found


def _norm(ours: str, theirs: str) -> Iterator[Rule]:
    return (same(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias"))


def _attention(ours: str, theirs: str) -> Iterator[Rule]:
    yield same(f"{ours}q.weight", f"{theirs}to_q.weight")
    yield stacked((f"{ours}k.weight", f"{ours}v.weight"), f"{theirs}to_kv.weight")
    yield same(f"{ours}out.weight", f"{theirs}to_out.weight")


def _feed_forward(ours: str, theirs: str) -> Iterator[Rule]:
    yield from _norm(f"{ours}norm_ffw", f"{theirs}0")
    yield same(f"{ours}ffw.up.weight", f"{theirs}1.weight")
    yield same(f"{ours}ffw.down.weight", f"{theirs}3.weight")


def trainable_parameters(
    file: OpenFlamingoFile, config: FlamingoConfig, tokens: NewTokens, our_shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """Yield our trainable parameters by name, after all tensors were checked.

    Args:
        file: the checkpoint.
        config: from `network_config`.
        tokens: the trained rows.
        our_shapes: shapes of all trainable parameters.

    Raises:
        ValueError: naming a tensor that is missing, surplus or of another shape, or a token that has no row.
    """
    extra = {"lm.vocabulary.extra.weight": "embedding", "lm.vocabulary.extra_head.weight": "head"}
    known = rules(config, frames="perceiver.frame_embs" in file.tensors)
    wanted = their_shapes(known, {n: s for n, s in our_shapes.items() if n not in extra})
    check_tensors(file.shapes(), wanted, file.where)
    rows = {ours: _new_rows(file, theirs, config.lm, tokens) for ours, theirs in extra.items()}
    yield from rows.items()
    yield from read_ours(known, file)


def _new_rows(file: OpenFlamingoFile, kind: str, lm: LMConfig, tokens: NewTokens) -> Tensor:
    """Return the rows of `<image>` and `<EOC>`, [2, D]."""
    if kind == "head" and (lm.tied or "head" not in file.tensors):
        if not lm.tied:
            # open_flamingo trains no head: with an untied one it draws these rows anew each time it loads.
            return torch.zeros(2, lm.width)
        kind = "embedding"
    table = file.tensors[kind]
    for name, number in (("<image>", tokens.image), ("<|endofchunk|>", tokens.end_of_chunk)):
        if not 0 <= number < table.shape[0]:
            raise ValueError(
                f"{file.where}: {name} is token {number}, but the {kind} has {table.shape[0]} rows."
            )
    if table.shape[1] != lm.width:
        raise ValueError(f"{file.where}: the {kind} is {table.shape[1]} wide, the language model {lm.width}.")
    return file.rows(kind, (tokens.image, tokens.end_of_chunk))
