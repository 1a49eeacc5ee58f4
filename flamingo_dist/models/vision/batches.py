"""Encoding many images, so many at a time."""

import torch
from torch import Tensor

from flamingo_dist.models.vision.base import VisionEncoder


def encode_in_batches(vision: VisionEncoder, frames_N3HW: Tensor, most: int) -> Tensor:
    """Encode images in sub-batches.

    Compiled blocks see few different sizes, for each is a compilation: of several sub-batches all have `most` images,
    and one alone has a power of two. Copies of the last image fill it up, and their features are cut off.

    Args:
        vision: the encoder.
        frames_N3HW: uint8 [N, 3, H, W]; N may be 0.
        most: images of a sub-batch at most.

    Returns:
        [N, S, C] in the encoder's dtype.
    """
    count = len(frames_N3HW)
    parts = []
    for few in frames_N3HW.split(most):
        if vision.is_compiled and len(few) > 0:
            size = most if count > most else min(most, 1 << (len(few) - 1).bit_length())
            filling = few[-1:].expand(size - len(few), -1, -1, -1)
            parts.append(vision(torch.cat([few, filling]) if len(filling) > 0 else few)[: len(few)])
        else:
            parts.append(vision(few))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
