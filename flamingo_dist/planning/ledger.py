"""What a rank holds and sends while it runs: live storages by kind, their peak, and every collective.

It works on real and on fake tensors alike, so that a dry run can be compared with a real one.
`torch.distributed._tools.mem_tracker` is the library's tool of this kind. It refuses a second forward of a module
within its time (a step has one for each data set), and knows neither ZeRO's partitions nor its gather buffers.
"""

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from flamingo_dist.planning.collectives import (
    CONTROL_ELEMENTS,
    Collective,
    Group,
    Totals,
    Volume,
    add,
    payload,
    size_of,
    wire_share,
)

DEVICE = torch.ops.prim.device.default
# Who makes a storage tells what it is for: the innermost of these frames decides. "" stands for all functions of
# the file that are not named.
SITES: dict[str, dict[str, str]] = {
    "flamingo_dist/models/vision/base.py": {"forward": "vision_work"},
    "flamingo_dist/models/flamingo.py": {"encode_pixels": "vision_work", "_nll": "logits"},
    "deepspeed/runtime/zero/partition_parameters.py": {"": "gather_buffers"},
    "deepspeed/runtime/zero/stage3.py": {"": "reduce_buckets", "step": "update", "backward": "backward"},
    "deepspeed/runtime/zero/stage_1_and_2.py": {
        "": "reduce_buckets",
        "step": "update",
        "backward": "backward",
    },
    "deepspeed/runtime/engine.py": {"forward": "activations", "backward": "backward", "step": "update"},
}
GATHERS = ("_all_gather_dtype", "_all_gather_sequential")
"""Functions of DeepSpeed's partition_parameters.py that gather their argument `params`."""
_sites: dict[str, dict[str, str] | None] = {}


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _kind_of_caller() -> str:
    """Return the kind of what the running code makes."""
    for frame in _frames(sys._getframe(2)):
        path = frame.f_code.co_filename
        if path not in _sites:
            _sites[path] = next((kinds for end, kinds in SITES.items() if path.endswith(end)), None)
        kinds = _sites[path]
        if kinds is not None:
            kind = kinds.get(frame.f_code.co_name, kinds.get(""))
            if kind is not None:
                return kind
    return "other"


class _Entry:
    """One live storage."""

    __slots__ = ("kind", "reference", "size")

    def __init__(self, size: int, kind: str, reference: Any) -> None:
        self.size, self.kind, self.reference = size, kind, reference


class Ledger(TorchDispatchMode):
    """Follows storages and collectives of this process while it is entered."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch's guard against tracing this would cost as much as the rest, and nothing is traced."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, int] = defaultdict(int)
        """Bytes of live storages by kind."""
        self.peak: dict[str, int] = {}
        """`live` when its sum was largest since `reset`."""
        self.sent: Totals = defaultdict(Volume)
        """Collectives since `reset`."""
        self._entries: dict[int, _Entry] = {}
        self._total = self._peak_total = 0

    @property
    def peak_bytes(self) -> int:
        """Largest sum of live storages since `reset`."""
        return self._peak_total

    def reset(self) -> None:
        """Forget the peak and the collectives; what lives stays."""
        self.peak, self._peak_total = dict(self.live), self._total
        self.sent = defaultdict(Volume)

    def mark(self, tensor: Tensor, kind: str, *, only: str | None = None) -> None:
        """Say what the storage behind `tensor` (any shape) is for; with `only`, if it was for that till now."""
        entry = self._entry(tensor, lambda: kind)
        if entry.kind != kind and only in (None, entry.kind):
            self.live[entry.kind] -= entry.size
            self.live[kind] += entry.size
            entry.kind = kind

    def _entry(self, tensor: Tensor, kind: Callable[[], str]) -> _Entry:
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._entries.get(key)
        size = storage.nbytes()
        if entry is None:
            name = kind() if size else "other"

            def forget(_: object, key: int = key) -> None:
                gone = self._entries.pop(key)
                self.live[gone.kind] -= gone.size
                self._total -= gone.size

            entry = self._entries[key] = _Entry(0, name, weakref.ref(storage, forget))
        if entry.size != size:
            self.live[entry.kind] += size - entry.size
            self._total += size - entry.size
            entry.size = size
        return entry

    def _follow(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                self._entry(value, _kind_of_caller)
        elif isinstance(value, list | tuple):
            for item in value:
                self._follow(item)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` and enter what it made or sent."""
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # more than half of all calls
        sent = payload(func, args)
        if sent is not None:
            self._count(*sent)
        result = func(*args, **(kwargs or {}))
        self._follow(result)
        if self._total > self._peak_total:
            self._peak_total = self._total
            self.peak = dict(self.live)
        return result

    def _count(self, operation: str, tensors: list[Tensor], group: Any) -> None:
        size, ranks = size_of(tensors), group.size()
        name = _group_name(group)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        elements = sum(t.numel() for t in tensors)
        for purpose, share in _purposes(operation, name, elements).items():
            kind = Collective(operation=operation, purpose=purpose, group=name, ranks=ranks, dtype=dtype)
            wire = share * size * wire_share(operation, ranks)
            add(self.sent[kind], Volume(calls=share, payload_bytes=share * size, wire_bytes=wire))


def _group_name(group: Any) -> Group:
    """Return which of Megatron's groups `group` is."""
    name = group.group_name
    if name == parallel_state.get_tensor_model_parallel_group().group_name:
        return "tensor"
    if name == parallel_state.get_data_parallel_group().group_name:
        return "data"
    return "world"


def _purposes(operation: str, group: Group, elements: int) -> dict[str, float]:
    """Return what a collective is for, in shares that add up to 1."""
    for frame in _frames(sys._getframe(2)):
        if frame.f_code.co_name in GATHERS:
            wanted = [(p.ds_numel, p.requires_grad) for p in frame.f_locals["params"]]
            trained = sum(n for n, grad in wanted if grad) / sum(n for n, _ in wanted)
            shares = {"trainable_gather": trained, "frozen_gather": 1 - trained}
            return {name: share for name, share in shares.items() if share}
    if group == "world" or (operation == "all_reduce" and elements <= CONTROL_ELEMENTS):
        return {"control": 1.0}
    if group == "tensor":
        return {"tensor_gather" if operation == "all_gather" else "tensor_all_reduce": 1.0}
    return {"trainable_gather" if operation == "all_gather" else "gradient_reduce": 1.0}
