"""What a run will ask of a node, from its configuration and the planner's predictions."""

import math
import re
from pathlib import Path

from data_pipeline.config import DatasetConfig
from flamingo_dist.planning.hardware import GIB, Assumptions
from flamingo_dist.planning.parameters import count_parameters
from flamingo_dist.planning.plan import rank_memory
from jobs.config import RunConfig
from jobs.doctor.report import Needs
from jobs.plan import workload

PROCESS_BYTES = 600 << 20
"""Host memory of a training process beside its tensors: interpreter, torch, DeepSpeed, Megatron, Ray (505 MiB after
its imports, measured without a GPU)."""
READER_BYTES = 300 << 20
"""Host memory of a reader: interpreter, numpy, Pillow, PyAV, Ray (130 to 190 MiB measured in the smoke run)."""


def needs_of(run: RunConfig, nodes: int, run_dir: str) -> Needs:
    """Return what a run asks of each of its nodes.

    Args:
        run: the run, whose degrees fit one another.
        nodes: how many share it.
        run_dir: its folder.
    """
    processes = math.ceil(run.resources.workers / nodes)
    caches: dict[str, int] = {}
    for dataset in run.data.train.values():
        if dataset.cache_folder:
            caches[dataset.cache_folder] = max(caches.get(dataset.cache_folder, 0), dataset.cache_bytes)
    return Needs(
        nodes=nodes,
        processes=processes,
        threads=run.resources.threads_per_worker,
        use_gpu=run.resources.use_gpu,
        host_bytes=host_bytes(run, processes, nodes),
        object_bytes=object_bytes(run, processes),
        run_dir=run_dir,
        paths=local_paths(run),
        caches=caches,
    )


def local_paths(run: RunConfig) -> tuple[str, ...]:
    """Return the files and folders of this machine that the run reads: no URLs, patterns by their folder."""
    urls = [url for dataset in {**run.data.train, **run.data.held_out}.values() for url in dataset.urls]
    model, vision = run.model, run.model.vision
    wanted = [model.weights or "", model.lm.weights or "", vision.weights, vision.statistics]
    wanted.append(run.data.tokenizer.path)
    # A pattern's folder has to do: what it stands for is the data's own check.
    wanted += [str(Path(url).parent) if re.search(r"[{*?\[]", url) else url for url in urls]
    return tuple(dict.fromkeys(path for path in wanted if path and "://" not in path))


def checkpoint_bytes(run: RunConfig) -> int:
    """Return the predicted bytes of a checkpoint: trainable weights and AdamW's two moments, fp32, each once.

    What all tensor-parallel ranks hold alike counts for each; it is a thousandth.
    """
    return 12 * count_parameters(run.model, run.parallel.tensor).trainable * run.parallel.tensor


def host_bytes(run: RunConfig, processes: int, nodes: int) -> int:
    """Return the host memory of the run's processes on a node.

    Args:
        run: the run.
        processes: training processes of the node.
        nodes: nodes of the run.
    """
    tensor, data = run.parallel.tensor, run.resources.workers // run.parallel.tensor
    # Each process keeps its share of a checkpoint, which is written from there.
    needed = checkpoint_bytes(run) * processes // run.resources.workers
    if not run.resources.use_gpu:
        kinds, _ = rank_memory(
            workload(run), Assumptions(), tp=tensor, dp=data, residency=run.parallel.frozen
        )
        needed += int(processes * GIB * sum(size for kind, size in kinds.items() if kind != "reserve"))
    readers = math.ceil(run.data.readers.readers / nodes)
    return needed + processes * PROCESS_BYTES + readers * READER_BYTES


def object_bytes(run: RunConfig, processes: int) -> int:
    """Return the bytes of the batches that are read ahead for the processes of a node, and the ones in use."""
    data = run.resources.workers // run.parallel.tensor
    ranks = math.ceil(processes / run.parallel.tensor)
    step = sum(batch_bytes(dataset, data) for dataset in run.data.train.values())
    return ranks * (run.data.readers.prefetch + 1) * step


def batch_bytes(dataset: DatasetConfig, data: int) -> int:
    """Return the bytes of a data set's batch of one data-parallel rank, of `data` in all."""
    rows = dataset.batch_size // (data * dataset.pack)
    media = math.prod(dataset.media_shape) * (1 if dataset.media == "pixels" else 2)
    token_bytes = 8 + 1 + 4 + (4 if dataset.pack > 1 else 0)  # ids, loss mask, media index, segments
    return rows * (media + dataset.tokens_per_row * token_bytes)
