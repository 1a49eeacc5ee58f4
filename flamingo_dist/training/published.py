"""Published weights on all ranks of a run, each byte read from the storage by one of them."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from flamingo_dist.models.lm_config import LMConfig
from flamingo_dist.models.weights import extra_start, lm_shard, open_lm_weights
from flamingo_dist.models.weights.source import ALL, WeightSource
from flamingo_dist.parallel.topology import Topology, world_device

Values = Callable[[str, nn.Parameter], Tensor]
"""Gives a parameter's values on this rank, by its name and itself."""


def read_once(values: Values, topology: Topology) -> Values:
    """Have each byte read once: of data-parallel peers, which need the same, the first reads and hands on.

    Where ZeRO-3 has partitioned a parameter, it does that itself and asks the first alone.

    Args:
        values: reads them.
        topology: this rank's place.

    Returns:
        A collective: every tensor-parallel peer asks for the same parameter, and every data-parallel peer too if the
        parameter is not partitioned by ZeRO-3. It raises OSError where the first of the data-parallel peers could not
        read, and on that rank its own error.
    """

    def value_of(name: str, param: nn.Parameter) -> Tensor:
        if hasattr(param, "ds_id") or topology.data == 1:
            return values(name, param)
        return _handed_on(
            (lambda: values(name, param)) if topology.data_rank == 0 else None,
            name,
            param.shape,
            param.dtype,
            group=parallel_state.get_data_parallel_group(),  # its ranks are ordered as `data_rank`
        )

    return value_of


class PublishedWeights:
    """The LM's weights for this rank: tensor-parallel peers read different slices, data-parallel peers `read_once`."""

    def __init__(self, config: LMConfig, topology: Topology) -> None:
        """Open the weights and check names and shapes, on every rank alike.

        Raises:
            ValueError: they are not there or do not fit the configuration.
        """
        self.config, self.topology = config, topology
        self.source = open_lm_weights(config)
        self._extra: dict[bool, tuple[Tensor, float]] = {}

    def values(self, name: str, param: nn.Parameter) -> Tensor:
        """Return this rank's values of the LM's parameter `name`, of the parameter's shape; see `read_once`."""
        return read_once(self._read, self.topology)(name, param)

    def extra_start(self, *, head: bool) -> tuple[Tensor, float]:
        """Return start values fp32 [X, D] of the trainable rows, and how much published rows differ."""
        own_head = (
            head and not self.config.tied
        )  # a tied head's rows are the embedding's, and are not read again
        if own_head not in self._extra:
            self._extra[own_head] = extra_start(self.source, self.config, head=own_head)
        return self._extra[own_head]

    def _read(self, name: str, param: nn.Parameter) -> Tensor:
        tensor = self.topology.tensor
        exchange = exchange_columns if tensor > 1 else None
        return lm_shard(
            self.source,
            name,
            param.shape,
            self.config,
            tp_rank=self.topology.tensor_rank,
            tp_size=tensor,
            exchange=exchange,
        )


class HandedOn:
    """Weights that every rank holds whole: the first rank of the world reads them and hands each tensor on.

    Opening and reading are collectives: every rank asks for the same tensors in the same order.
    """

    def __init__(self, open_source: Callable[[], WeightSource]) -> None:
        """Open the source on the first rank.

        Raises:
            FileNotFoundError: there is none, on every rank alike.
            ValueError: it cannot be read, on every rank alike.
        """
        self._source: WeightSource | None = None
        said: list[tuple[str, object]] = [("", None)]
        if dist.get_rank() == 0:
            try:
                self._source = open_source()
                said = [("", dict(self._source.shapes()))]
            except Exception as error:  # of any library; the other ranks must not wait for what will not come
                said = [("absent" if isinstance(error, FileNotFoundError) else "wrong", str(error))]
        dist.broadcast_object_list(said, src=0, device=world_device())
        kind, found = said[0]
        if kind:
            raise FileNotFoundError(found) if kind == "absent" else ValueError(found)
        assert isinstance(found, dict), "the first rank sends shapes or an error"
        self._shapes: dict[str, tuple[int, ...]] = found

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every stored tensor, by its name."""
        return self._shapes

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Return the slice `[rows, columns]` of the tensor `name`, fp32 on the CPU.

        Raises:
            OSError: the first rank could not read it; on that rank its own error.
        """
        source, empty = self._source, torch.empty(self._shapes[name], device="meta")
        empty = empty[rows] if rows != ALL else empty
        empty = empty[:, columns] if columns != ALL else empty
        return _handed_on(
            None if source is None else (lambda: source.read(name, rows, columns)),
            name,
            empty.shape,
            torch.float32,
        ).cpu()


def _handed_on(
    read: Callable[[], Tensor] | None,
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return what the group's first rank reads, on the run's device; if it cannot, all raise, and nobody waits.

    Args:
        read: gives the tensor, on the first rank; None elsewhere.
        name: of the tensor, for the message.
        shape: of the tensor.
        dtype: of the result.
        group: whose ranks share it; None for all.

    Raises:
        OSError: the first rank could not read; there, its own error is raised.
    """
    value, trouble = None, None
    if read is None:
        value = torch.empty(shape, dtype=dtype, device=world_device())
    else:
        try:
            # GPT-2's matrices are read as views of transposed ones, and a broadcast sends memory as it lies.
            value = read().to(world_device(), dtype).contiguous()
        except Exception as error:  # of any storage
            trouble = error
    failed = torch.tensor(int(trouble is not None), device=world_device())
    dist.broadcast(failed, group_src=0, group=group)
    if trouble is not None:
        raise trouble
    if failed.item():
        raise OSError(f"the rank that reads {name!r} for this one could not; its own message says why.")
    assert value is not None, "there is a value where there was no trouble"
    dist.broadcast(value, group_src=0, group=group)
    return value


def exchange_columns(rows_RC: Tensor) -> Tensor:
    """Turn this rank's rows of a matrix into its columns, over the tensor-parallel group.

    Columns of a stored matrix are scattered bytes, rows are one range.

    Args:
        rows_RC: this rank's even share of the rows, whole, [R / TP, C]; TP divides C.

    Returns:
        Its even share of the columns of all rows, [R, C / TP], on the run's device.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    parts = rows_RC.unflatten(1, (size, -1)).transpose(0, 1).contiguous().to(world_device())
    received = torch.empty_like(parts)
    # As bytes: whatever the stored dtype is, every backend can move it.
    dist.all_to_all_single(
        received.view(torch.uint8),
        parts.view(torch.uint8),
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    return received.flatten(0, 1)
