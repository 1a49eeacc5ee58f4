"""Weights of an NFNet: from the published files, drawn at random, or empty on the meta device."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from flamingo_dist.models.init import ParamTag, draw
from flamingo_dist.models.stored_shapes import differences, shortened
from flamingo_dist.models.vision.nfnet_shape import NFNetShape, TensorSpec
from flamingo_dist.models.weights.source import WeightSource

HAIKU_PREFIX = "NFNet/~/"
"""The published code's name of the network, before the names of its modules."""
CLASSIFIER = ("head.fc.weight", "head.fc.bias", f"{HAIKU_PREFIX}linear/w", f"{HAIKU_PREFIX}linear/b")
"""What a checkpoint may hold beside the encoder."""

ABSENT = (
    "no NFNet weights at {!r}: give DeepMind's haiku file (F6_haiku.npz) or timm's dm_nfnet_f6 as safetensors, or "
    "leave `weights` empty for random ones."
)
"""What is said where there are none."""
Reader = Callable[[TensorSpec], Tensor]
"""Gives one tensor in torch's layout, fp32, each one once."""


def drawn(shape: NFNetShape, seed: int) -> Reader:
    """Return a reader of random weights: every tensor depends on its name and `seed` alone.

    Convolutions keep the scale of their input, gains and skip gains are 1 (training starts skip gains at 0, which
    would leave the blocks without effect), biases 0.
    """

    def read(spec: TensorSpec) -> Tensor:
        fan_in = int(np.prod(spec.shape[1:]))
        std = fan_in**-0.5 if spec.kind in ("conv", "linear") else None
        tag = ParamTag(std=std, value=0.0 if spec.kind == "vector" else 1.0)
        name = f"vision.nfnet.{spec.haiku}"
        return draw(name, tag, torch.Size(spec.shape), seed=seed, tp_rank=0, tp_size=1)

    return read


def empty(spec: TensorSpec) -> Tensor:
    """Return a tensor of that shape without values: on the meta device, or a fake one."""
    return torch.empty(spec.shape)


class Published:
    """Reads the tensors of one published file, and of nothing else."""

    def __init__(self, source: WeightSource, path: str, shape: NFNetShape) -> None:
        """Find the file's layout and check its names and shapes, before any tensor is converted.

        Args:
            source: DeepMind's names, or timm's.
            path: what errors call it.
            shape: the network.

        Raises:
            ValueError: the file lacks tensors, holds others, or holds them in other shapes; the message names them.
        """
        self._source = source
        shapes = source.shapes()
        self._haiku = any(name.startswith(HAIKU_PREFIX) for name in shapes)
        if not self._haiku and not any(name.startswith("stem.conv1.") for name in shapes):
            raise ValueError(
                f"{path} holds neither haiku's names ({HAIKU_PREFIX}stem_conv0/w) nor timm's "
                f"(stem.conv1.weight); it begins with {shortened(list(shapes))}."
            )
        expected = {self._name(spec): self._stored_shape(spec) for spec in shape.tensors()}
        check_tensors(path, expected, {n: s for n, s in shapes.items() if n not in CLASSIFIER})

    def __call__(self, spec: TensorSpec) -> Tensor:
        """Return one tensor in torch's layout, fp32."""
        value = self._source.read(self._name(spec)).float()
        if self._haiku and spec.kind == "conv":
            return value.permute(3, 2, 0, 1)
        if self._haiku and spec.kind == "linear":
            return value.T
        return value.reshape(spec.shape)

    def _name(self, spec: TensorSpec) -> str:
        return HAIKU_PREFIX + spec.haiku if self._haiku else spec.timm

    def _stored_shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Return the shape that the layout stores the tensor in."""
        shape = spec.shape
        if self._haiku:
            if spec.kind == "conv":
                return (shape[2], shape[3], shape[1], shape[0])
            return shape[::-1] if spec.kind == "linear" else shape
        return {"linear": (*shape, 1, 1), "gain": (*shape, 1, 1, 1)}.get(spec.kind, shape)


def check_tensors(
    path: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Check a file's tensors by name and shape.

    Raises:
        ValueError: one is missing, superfluous or of another shape; the message names it.
    """
    apart = differences(found, expected)
    wrong = [f"{n} of shape {list(found[n])} instead of {list(expected[n])}" for n in apart.misshaped]
    faults = []
    if apart.missing:
        faults.append(f"lacks {shortened(apart.missing)}")
    if apart.surplus:
        faults.append(f"holds {shortened(apart.surplus)}, which the encoder does not have")
    if wrong:
        faults.append(f"holds {shortened(wrong)}")
    if faults:
        raise ValueError(f"{path} {'; it '.join(faults)}. Give the weights of the encoder that `name` names.")
