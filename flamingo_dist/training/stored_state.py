"""Reading the tensors of a checkpoint: any part of them, in one process, without the others."""

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load

from flamingo_dist.models.init import ParamTag
from flamingo_dist.models.linear import tp_size
from flamingo_dist.models.stored_shapes import complaint, differences
from flamingo_dist.parallel.topology import MegatronMPU
from flamingo_dist.training.checkpoint_folder import STATE, CheckpointError, check_files, read_manifest
from flamingo_dist.training.fragments import Fragment, LoadFragments, Slice
from flamingo_dist.training.optimizer_state import WEIGHT, place_of, stored_name, trainable

_DESCRIBING = {
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}
"""What a description of tensors is made of, by module."""


class _Unpickler(pickle.Unpickler):
    """Makes descriptions of tensors alone: a checkpoint may come from anywhere, and a pickle calls what it names."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of torch's descriptions.

        Raises:
            pickle.UnpicklingError: the pickle names anything else.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _DESCRIBING.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


class _Reader(FileSystemReader):
    """torch's reader, whose description of the tensors is read without running what it holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the description of a checkpoint's tensors."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def stored_shapes(path: Path) -> dict[str, torch.Size]:
    """Return the shape of every tensor that the checkpoint at `path` stores, by its stored name.

    Raises:
        CheckpointError: there is no readable list of them.
    """
    try:
        listed: Mapping[str, Any] = _Reader(path / STATE).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{path}: {STATE}/.metadata cannot be read ({error}).") from error
    return {name: entry.size for name, entry in listed.items()}


def check_stored(path: Path, wanted: Mapping[str, torch.Size], *, kinds: Iterable[str] = ()) -> None:
    """Check that a checkpoint stores exactly the tensors that are wanted.

    Args:
        path: the checkpoint's folder.
        wanted: shapes of whole tensors by stored name.
        kinds: first parts of the names to compare; empty compares all.

    Raises:
        CheckpointError: naming what is missing, surplus or of another shape.
    """
    chosen = tuple(f"{kind}/" for kind in kinds) or ("",)
    stored = {name: shape for name, shape in stored_shapes(path).items() if name.startswith(chosen)}
    apart = differences(stored, wanted)
    if any(apart):
        raise CheckpointError(f"{path} does not fit the network: {complaint(stored, wanted, apart)}.")


def read_fragments(path: Path, fragments: dict[str, Fragment]) -> None:
    """Fill `fragments` in place from the checkpoint at `path`; each process reads for itself.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    chosen = {name: fragment for name, fragment in fragments.items() if fragment.flat_N.numel()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(
                chosen,
                storage_reader=_Reader(path / STATE),
                planner=LoadFragments(),
                no_dist=True,
            )
    except CheckpointException as error:
        causes = "; ".join(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values())
        raise CheckpointError(f"{path}: {causes}") from None


def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Fill the trainable weights of `model`, which is not partitioned by ZeRO, from a checkpoint.

    Any tensor-parallel layout may read, whatever layout wrote: each rank reads its slice.

    Raises:
        CheckpointError: there is no checkpoint, a file of it is damaged, or its tensors are not the model's.
    """
    check_files(checkpoint, read_manifest(checkpoint))
    fragments = {}
    for name, param in trainable(model).items():
        tp_rank = MegatronMPU().get_model_parallel_rank() if tp_size() > 1 else 0
        place = place_of(param, tp_rank=tp_rank, tp_size=tp_size())
        fragments[stored_name(WEIGHT, name)] = Fragment(param.detach().view(-1), 0, place)
    check_stored(checkpoint, {name: f.size() for name, f in fragments.items()}, kinds=[WEIGHT])
    read_fragments(checkpoint, fragments)


def read_whole(path: Path, name: str, shape: torch.Size) -> Tensor:
    """Return the whole fp32 weight of the parameter `name` from the checkpoint at `path`, of shape `shape`."""
    place = Slice(shape=tuple(shape), tag=ParamTag(), tp_rank=0, tp_size=1)
    value = torch.empty(shape)
    read_fragments(path, {stored_name(WEIGHT, name): Fragment(value.view(-1), 0, place)})
    return value
