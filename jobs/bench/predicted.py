"""What a dry run says of the step benchmark's memory, to be held against what a GPU's allocator said."""

from dataclasses import replace

import torch

from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.parallel.topology import Topology
from flamingo_dist.planning.ledger import Ledger
from flamingo_dist.planning.stand_ins import fake_rank
from flamingo_dist.training.config import OptimizerConfig
from flamingo_dist.training.optimizer import make_optimizer
from jobs.bench.networks import make_batch, nll_sum, with_implementation
from jobs.bench.step import StepConfig, update


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
    real = replace(real, media=real.media.to(torch.bfloat16)).counted()
    loss_tokens = real.num_loss_tokens()
    with fake_rank(Topology(world=1, rank=0, tensor=1), like_gpu=True), Ledger() as ledger:
        network = Flamingo(model, dtype=torch.bfloat16, activation_checkpointing=config.recompute)
        optimizer = make_optimizer(network.named_parameters(), OptimizerConfig(lr=1e-4))
        batch, targets_BT = real.each(torch.empty_like), torch.empty_like(real.tokens_BT)
        for step in range(2):
            if step:
                ledger.reset()
            update(nll_sum(network, batch, targets_BT) / loss_tokens, optimizer)
    return ledger.peak_bytes
