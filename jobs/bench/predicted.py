"""What a dry run says of the step benchmark's memory, to be held against what a GPU's allocator said."""

import torch

from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.parallel.topology import Topology
from flamingo_dist.planning.ledger import Ledger
from flamingo_dist.planning.stand_ins import fake_rank
from flamingo_dist.training.batch import TrainBatch
from flamingo_dist.training.config import OptimizerConfig
from flamingo_dist.training.optimizer import make_optimizer
from jobs.bench.networks import make_batch, with_implementation
from jobs.bench.step import StepConfig


def predicted_peak(config: StepConfig, name: str, contender: str) -> int:
    """Return the bytes that the benchmark's second step of a network holds at most, without a GPU.

    Args:
        config: of the benchmark; its device does not count.
        name: of the network.
        contender: "triton" or "reference".
    """
    implementation = {"triton": "auto", "reference": "reference"}[contender]
    model = with_implementation(config.model(name), implementation, gate_init=0.5)
    real = make_batch(model, config.size(model), seed=0)
    targets = real.targets()
    loss_tokens = int((targets >= 0).sum())
    with (
        fake_rank(Topology(world=1, rank=0, tensor=1), {tuple(targets.shape): loss_tokens}, like_gpu=True),
        Ledger() as ledger,
    ):
        network = Flamingo(model, dtype=torch.bfloat16, activation_checkpointing=config.recompute)
        optimizer = make_optimizer(network.named_parameters(), OptimizerConfig(lr=1e-4))
        batch, wanted = _empty_like(real), torch.empty_like(targets, device="cpu")
        for step in range(2):
            if step:
                ledger.reset()
            out = network(
                batch.tokens_BT,
                batch.media_index_BT,
                batch.media,
                batch.media_mask_BM,
                targets_BT=wanted,
            )
            assert out.nll_BT is not None, "targets were given"
            loss = out.nll_BT.sum() / loss_tokens
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del out, loss
    return ledger.peak_bytes


def _empty_like(batch: TrainBatch) -> TrainBatch:
    """Return a batch of the same shapes and dtypes without values, features in bf16 as the benchmark has them."""
    return TrainBatch(
        tokens_BT=torch.empty(batch.tokens_BT.shape, dtype=torch.int64),
        loss_mask_BT=torch.empty(batch.loss_mask_BT.shape, dtype=torch.bool),
        media_index_BT=torch.empty(batch.media_index_BT.shape, dtype=torch.int32),
        media=torch.empty(batch.media.shape, dtype=torch.bfloat16),
        media_mask_BM=torch.empty(batch.media_mask_BM.shape, dtype=torch.bool),
    )
