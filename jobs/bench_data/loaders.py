"""The loaders that are compared.

Other loaders are measured twice: with our decoder, so that loading alone differs, and with Pillow's, as their
users write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import DatasetConfig
from data_pipeline.feed import LocalFeed
from data_pipeline.tokenizer import TokenizerConfig
from jobs.bench_data.decode import SEQ_LEN, Decode
from jobs.bench_data.measure import LoaderTask, Reading

_SHUFFLE_BUFFER = 1000


def _as_list(batch: list[Any]) -> list[Any]:
    """Put samples together as arrays, as every trainer must."""
    return [np.stack([pixels for pixels, _ in batch]), np.stack([tokens for _, tokens in batch])]


def _tars(task: LoaderTask) -> list[str]:
    return sorted(str(path) for path in Path(task.shards).glob("*.tar"))


def _dataset(task: LoaderTask, **changes: Any) -> DatasetConfig:
    return DatasetConfig(
        **changes,
        name="bench",
        kind="pair",
        urls=(task.shards,),
        batch_size=task.batch_size,
        seq_len=SEQ_LEN,
        image_size=task.image_size,
        hflip_p=0.0,
    )


class Ours(Reading):
    """Our reader in the measured process; workers are threads in it."""

    package, resume_kind = "flamingo-dist", "exact"
    changes: Mapping[str, Any] = {}
    """Settings that differ from what all loaders do."""

    def start(self, skip: int) -> Iterator[int]:
        """See `Reading.start`."""
        threads, ahead = max(1, self.task.workers), 2 if self.task.workers else 0
        dataset = _dataset(self.task, threads=threads, **self.changes)
        feed = LocalFeed([dataset], TokenizerConfig(), seed=0, prefetch=ahead)
        for step in range(skip // self.task.batch_size, self.task.samples // self.task.batch_size):
            yield len(feed.next(step)["bench"].keys)


class OursScaled(Ours):
    """The same with JPEGs shrunk by the decoder: not the same pixels, and a row of its own therefore."""

    changes: Mapping[str, Any] = {"jpeg_margin": 1.0}


class OursOnRay(Reading):
    """Our readers as Ray actors, the batches fetched from the object store."""

    package, resume_kind = "ray", "exact"

    def __init__(self, task: LoaderTask) -> None:
        """Start Ray, which a run has running anyhow."""
        super().__init__(task)
        start_ray(task)

    def start(self, skip: int) -> Iterator[int]:
        """See `Reading.start`."""
        from data_pipeline.actors import RayPipeline, ReaderConfig

        readers = ReaderConfig(readers=self.task.workers, cpus_per_reader=1, prefetch=4)
        self.pipeline = RayPipeline(
            [_dataset(self.task)], TokenizerConfig(), seed=0, dp_size=1, config=readers
        )
        feed = self.pipeline.feed(0)
        for step in range(skip // self.task.batch_size, self.task.samples // self.task.batch_size):
            yield len(feed.next(step)["bench"].keys)

    def stop(self) -> None:
        """Stop the actors and wait until they are gone: Ray's node forgets the CPU time of a worker that ended."""
        import psutil

        actors = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::")]
        self.pipeline.shutdown()
        psutil.wait_procs([p for p in actors if "IDLE" not in p.name()], timeout=20)


def start_ray(task: LoaderTask) -> None:
    """Start Ray with one logical CPU a worker, if it does not run yet."""
    import logging
    import tempfile

    import ray

    if not ray.is_initialized():
        ray.init(
            num_cpus=max(1, task.workers),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=tempfile.mkdtemp(prefix="fb", dir="/tmp"),
        )


class WebDataset(Reading):
    """webdataset with torch's DataLoader."""

    package = "webdataset"

    def start(self, skip: int) -> Iterator[int]:
        """See `Reading.start`."""
        import torch
        import webdataset

        decode = Decode(self.task.image_size, self.task.decode)
        tars = _tars(self.task)
        dataset = (
            webdataset.WebDataset(tars, shardshuffle=len(tars), nodesplitter=None)
            .shuffle(_SHUFFLE_BUFFER)
            .map(decode.sample)
            .batched(self.task.batch_size, collation_fn=_as_list, partial=True)
        )
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=self.task.workers)
        seen = 0
        for batch in loader:
            seen += len(batch[0])
            if seen > skip:
                yield len(batch[0])


class Mosaic(Reading):
    """mosaicml-streaming on MDS shards of the same bytes, with torch's DataLoader."""

    package, resume_kind = "mosaicml-streaming", "state"

    def __init__(self, task: LoaderTask) -> None:
        """Convert the shards once; not timed."""
        super().__init__(task)
        from streaming import MDSWriter

        from data_pipeline.index import open_index
        from data_pipeline.reading import SampleReader

        self.folder = Path(task.scratch) / f"mds-{task.samples}"
        if (self.folder / "index.json").exists():
            return
        index = open_index([task.shards])
        with MDSWriter(out=str(self.folder), columns={"jpg": "bytes", "txt": "bytes"}) as writer:
            for number, entry in enumerate(index.entries):
                for record in index.records(number):
                    reader = SampleReader(entry.url, record, max_bytes=1 << 30)
                    writer.write({"jpg": reader.get("jpg"), "txt": reader.get("txt")})

    def start(self, skip: int) -> Iterator[int]:
        """See `Reading.start`."""
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        decode = Decode(self.task.image_size, self.task.decode)

        class Decoded(StreamingDataset):
            def __getitem__(self, at: Any) -> Any:
                return decode.sample(super().__getitem__(at))

        dataset = Decoded(
            local=str(self.folder), shuffle=True, batch_size=self.task.batch_size, num_canonical_nodes=1
        )
        loader = StreamingDataLoader(
            dataset, batch_size=self.task.batch_size, num_workers=self.task.workers, collate_fn=_as_list
        )
        if skip:
            state = {
                "epoch": 0,
                "sample_in_epoch": skip,
                "num_canonical_nodes": 1,
                "shuffle_seed": 9176,
                "initial_physical_nodes": 1,
            }
            loader.load_state_dict(state)
        for batch in loader:
            yield len(batch[0])


class Energon(Reading):
    """Megatron-Energon on the same tars, prepared by its own tool.

    Its loader can save and restore a state. That state comes from a loader that was read up to there, so for a
    position that nobody read up to, as here, it reads through.
    """

    package = "megatron-energon"

    def __init__(self, task: LoaderTask) -> None:
        """Link the tars into a folder and have Energon index them; not timed."""
        super().__init__(task)
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors import BaseWebdatasetFactory

        self.folder = Path(task.scratch) / f"energon-{task.samples}"
        if not (self.folder / ".nv-meta" / "dataset.yaml").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            for tar in _tars(task):
                (self.folder / Path(tar).name).symlink_to(Path(tar).resolve())
            BaseWebdatasetFactory.prepare_dataset(
                EPath(self.folder),
                [Path(tar).name for tar in _tars(task)],
                split_parts_ratio=[("train", 1.0)],
                workers=1,
            )
            (self.folder / ".nv-meta" / "dataset.yaml").write_text(
                "sample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample\n"
                "field_map:\n  image: jpg\n  caption: txt\ndecoder: null\n"
            )

    def start(self, skip: int) -> Iterator[int]:
        """See `Reading.start`."""
        from megatron import energon

        decode = Decode(self.task.image_size, self.task.decode)
        size = self.task.batch_size

        class Encoder(energon.DefaultTaskEncoder):
            @energon.stateless
            def encode_sample(self, sample: Any) -> Any:
                text = sample.caption
                return decode(sample.image, text.encode() if isinstance(text, str) else text)

            def batch(self, samples: list[Any]) -> Any:
                return _as_list(samples)

        worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=self.task.workers)
        dataset = energon.get_train_dataset(
            str(self.folder),
            worker_config=worker,
            batch_size=size,
            shuffle_buffer_size=_SHUFFLE_BUFFER,
            max_samples_per_sequence=None,
            task_encoder=Encoder(),
        )
        loader = energon.get_savable_loader(dataset)
        seen = 0
        for batch in loader:  # endless
            seen += len(batch[0])
            if seen > skip:
                yield len(batch[0])
            if seen >= self.task.samples // size * size:
                return


class RayData(Reading):
    """Ray Data's own WebDataset reader."""

    package = "ray"

    def __init__(self, task: LoaderTask) -> None:
        """Start Ray, which a job has running anyhow."""
        super().__init__(task)
        start_ray(task)

    def start(self, skip: int) -> Iterator[int]:
        """See `Reading.start`."""
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        decode = Decode(self.task.image_size, self.task.decode)
        rows = ray.data.read_webdataset(_tars(self.task), decoder=None).map(decode.row)
        seen = 0
        for batch in rows.iter_batches(
            batch_size=self.task.batch_size, local_shuffle_buffer_size=_SHUFFLE_BUFFER, batch_format="numpy"
        ):
            seen += len(batch["tokens"])
            if seen > skip:
                yield len(batch["tokens"])


LOADERS: dict[str, Callable[[LoaderTask], Reading]] = {
    "ours": Ours,
    "ours_scaled": OursScaled,
    "ours_on_ray": OursOnRay,
    "webdataset": WebDataset,
    "mosaicml_streaming": Mosaic,
    "megatron_energon": Energon,
    "ray_data": RayData,
}
NEEDS = {
    "webdataset": "webdataset",
    "mosaicml_streaming": "streaming",
    "megatron_energon": "megatron.energon",
    "ray_data": "ray.data",
}
"""Module that must be there, by loader."""
OUR_DECODE = ("ours", "ours_scaled", "ours_on_ray")
"""Loaders that decode by our function alone."""
ON_RAY = ("ours_on_ray", "ray_data")
"""Loaders that have no mode without worker processes."""
