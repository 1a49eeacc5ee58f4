"""From the data pipeline's numpy batches to the trainer's tensors."""

import numpy as np
import torch

from data_pipeline.batch import Batch
from flamingo_dist.training.batch import TrainBatch


def to_train_batch(batch: Batch, device: torch.device) -> TrainBatch:
    """Return the pipeline's numpy batch as tensors on `device`.

    Batches from Ray are read-only views of the object store, shared with tensor-parallel peers. A step writes
    into none, but torch wants memory that it could write to, so they are copied once here.
    """

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    made = TrainBatch(
        tokens_BT=tensor(batch.tokens_BT),
        loss_mask_BT=tensor(batch.loss_mask_BT),
        media_index_BT=tensor(batch.media_index_BT),
        media=tensor(batch.media),
        media_mask_BM=tensor(batch.media_mask_BM),
        segments_BT=None if batch.segments_BT is None else tensor(batch.segments_BT),
    )
    # From page-locked memory a GPU copies while the host goes on.
    return (made.pinned() if device.type == "cuda" else made).to(device)
