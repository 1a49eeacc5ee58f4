"""A dry run: the training code of one rank of a large world, with nothing behind its tensors.

Network, DeepSpeed engine and step are the ones that train; `planning.stand_ins` replaces the other ranks and the
values, `planning.ledger` counts what the rank holds and sends.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from flamingo_dist.parallel.topology import Topology
from flamingo_dist.planning.claims import claim, follow_gradients
from flamingo_dist.planning.collectives import Totals
from flamingo_dist.planning.ledger import Ledger
from flamingo_dist.planning.stand_ins import fake_rank
from flamingo_dist.planning.workload import DatasetShape, Workload
from flamingo_dist.training.batch import RowCounts, TrainBatch
from flamingo_dist.training.build import build_engine
from flamingo_dist.training.config import TrainConfig
from flamingo_dist.training.step import StepResult, TrainStep


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What one rank held and sent."""

    peak: dict[str, int]
    """Bytes by kind when their sum was largest in a step, batches included."""
    standing: dict[str, int]
    """Bytes by kind between two steps."""
    build_peak: int
    """Largest sum while the engine was built, on whatever device the parts were built."""
    sent: Totals
    """Collectives of a step."""
    seconds: dict[str, float]
    """Seconds that it took here: "build", "step"."""


def local_batch(data: DatasetShape, work: Workload, dp: int) -> TrainBatch:
    """Return an empty batch of one data-parallel rank; every position but a row's first counts as carrying loss."""
    rows, vision = data.rows // dp, work.model.vision
    slots = (rows, data.media, data.frames)
    if data.pixels:
        media = torch.empty(*slots, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
    else:
        media = torch.empty(*slots, vision.num_features, vision.width, dtype=torch.float16)
    text = (rows, data.tokens)
    return TrainBatch(
        tokens_BT=torch.empty(text, dtype=torch.int64),
        loss_mask_BT=torch.empty(text, dtype=torch.bool),
        media_index_BT=torch.empty(text, dtype=torch.int32),
        media=media,
        media_mask_BM=torch.empty(rows, data.media, dtype=torch.bool),
        segments_BT=torch.empty(text, dtype=torch.int32) if data.packed else None,
        counts=RowCounts((data.tokens - 1,) * rows, (data.media,) * rows, (data.tokens,) * rows),
    )


def follow(
    ledger: Ledger,
    topology: Topology,
    work: Workload,
    train: TrainConfig,
    batches: Mapping[str, TrainBatch],
) -> tuple[Followed, StepResult]:
    """Build the engine of this rank, step it and return what it held and sent; on real tensors or on fake ones.

    Args:
        ledger: an entered ledger.
        topology: this rank's place; Megatron's groups must be initialised.
        work: network and parallelism.
        train: training settings; its optimizer and dtype count.
        batches: this rank's batch of each data set.

    Returns:
        The figures and the result of the second step. In the first one, on the last data set alone, ZeRO-3 records the
        order of modules, by which it prefetches from the second forward on, and AdamW makes its state.
    """
    started = time.perf_counter()
    engine = build_engine(work.model, train, work.parallel, topology)
    follow_gradients(ledger, engine)
    claim(ledger, engine)
    built, build_peak = time.perf_counter(), ledger.peak_bytes

    def steps(names: Iterable[str]) -> TrainStep:
        weights = dict.fromkeys(names, 1.0)
        return TrainStep(engine, train, topology, weights, work.parallel)

    steps(list(batches)[-1:]).run(0, batches)
    claim(ledger, engine)
    ledger.reset()
    standing, begun = dict(ledger.live), time.perf_counter()
    result = steps(batches).run(1, batches)
    seconds = {"build": built - started, "step": time.perf_counter() - begun}
    figures = Followed(
        peak=_present(ledger.peak),
        standing=_present(standing),
        build_peak=build_peak,
        sent=dict(ledger.sent),
        seconds=seconds,
    )
    return figures, result


def dry_run(work: Workload, train: TrainConfig, topology: Topology, *, like_gpu: bool = True) -> Followed:
    """Build and step one rank of `topology` with fake tensors. Published weights of the LM are not read.

    Frozen blocks are not compiled: what compiled code keeps and sends is the compiler's to decide.

    Args:
        work: network, batches and parallelism; its tensor degree must be the topology's.
        train: training settings.
        topology: the world and this rank's place.
        like_gpu: take the implementations of a GPU.

    Raises:
        ValueError: tensor parallelism does not divide the network, or the data-parallel ranks a batch.
    """
    assert work.parallel.tensor == topology.tensor, "the run and the topology have one tensor degree"
    for data in work.datasets:
        topology.check_batch(data.name, data.rows)
    dp = topology.data
    work = replace(work, model=replace(work.model, lm=replace(work.model.lm, weights=None)))
    work = replace(work, parallel=replace(work.parallel, compile_frozen=False))
    with fake_rank(topology, like_gpu=like_gpu), Ledger() as ledger:
        batches = {data.name: local_batch(data, work, dp) for data in work.datasets}
        for batch in batches.values():
            for tensor in batch.tensors().values():
                ledger.mark(tensor, "batches")
        figures, _ = follow(ledger, topology, work, train, batches)
    return figures


def _present(kinds: Mapping[str, int]) -> dict[str, int]:
    return {kind: size for kind, size in kinds.items() if size}
