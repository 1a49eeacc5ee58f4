"""Encoding shared among tensor-parallel ranks: each holds the whole encoder and the same images."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from flamingo_dist.models.linear import tp_size


def encode_split(encode: Callable[[Tensor], Tensor], frames_N3HW: Tensor) -> Tensor:
    """Encode this rank's share of the frames and gather the others' features.

    Args:
        encode: from frames [n, 3, H, W] to features [n, S, C], for any n from 0.
        frames_N3HW: uint8 [N, 3, H, W], equal on all ranks of the tensor-parallel group.

    Returns:
        [N, S, C] in the dtype of the features, equal to the last bit on all ranks of the group.
    """
    ranks = tp_size()
    if ranks == 1:
        return encode(frames_N3HW)
    count, share = len(frames_N3HW), -(-len(frames_N3HW) // ranks)
    begin = parallel_state.get_tensor_model_parallel_rank() * share
    own_NSC = encode(frames_N3HW[begin : begin + share])
    if len(own_NSC) < share:  # the last ranks may have less: a gather wants equal parts
        own_NSC = torch.cat([own_NSC, own_NSC.new_zeros(share - len(own_NSC), *own_NSC.shape[1:])])
    whole_NSC = own_NSC.new_empty(ranks * share, *own_NSC.shape[1:])
    dist.all_gather_into_tensor(whole_NSC, own_NSC, group=parallel_state.get_tensor_model_parallel_group())
    return whole_NSC[:count]
