"""One object that owns the parallel degrees: world = data parallel x tensor parallel."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from flamingo_dist.choices import check_choices
from flamingo_dist.models.recompute import Recompute


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over its processes."""

    tensor: int = 1
    """Tensor-parallel degree; every head count and feed-forward width must be a multiple of it."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """ZeRO stage over the data-parallel group."""
    frozen: Literal["resident", "partitioned"] = "resident"
    """Where frozen weights live: whole (per tensor-parallel slice) on every data-parallel rank, moving no
    byte in a step, or partitioned by ZeRO-3 and gathered layer by layer."""
    activation_checkpointing: Recompute = False
    """Recompute each LM block with its gated block in the backward pass instead of keeping activations. "selective":
    keep the results of the gated blocks' matrix products and attention, recompute the rest."""
    micro_rows: int = 0
    """Most rows of a data set that a rank sends through the network at once; more go through in parts, with a forward
    and a backward each and one update for all. Activations are those of one part; ZeRO-3 gathers weights for each. 0:
    all rows at once."""
    split_vision: bool = False
    """Encode a share of the frames on each tensor-parallel rank and gather the features, instead of encoding all of
    them on every one."""
    compile_frozen: bool = False
    """Run the frozen LM's blocks, in training, and the vision encoder's through torch.compile; needs resident frozen
    weights. The first step of each data set then waits for the compiler."""
    fuse_encoder: bool = False
    """Run what follows an NFNet's convolutions on Triton kernels: less work for the GPU, more for the host, which
    could not keep up with the H200 that was tried (`docs/speed.md`)."""
    collective_timeout_seconds: int = 600
    """A collective that waits longer than this fails the run instead of hanging it."""

    def __post_init__(self) -> None:
        """Reject combinations that mean nothing."""
        check_choices(self, "parallel.")
        if self.micro_rows < 0:
            raise ValueError(
                f"parallel.micro_rows is {self.micro_rows}, but must be at least 1, or 0 for all rows."
            )
        if self.tensor < 1:
            raise ValueError(f"parallel.tensor is {self.tensor}, but must be at least 1.")
        if self.frozen == "partitioned" and self.zero_stage != 3:
            raise ValueError(
                f"parallel.frozen='partitioned' needs parallel.zero_stage=3, not {self.zero_stage}: "
                "lower stages keep every parameter whole. Set parallel.frozen='resident'."
            )
        if self.compile_frozen and self.frozen == "partitioned":
            raise ValueError(
                "parallel.compile_frozen=True needs parallel.frozen='resident', not 'partitioned': compiled code would "
                "keep the weights that ZeRO-3 gathers for a block and frees after it. Set one of the two."
            )

    def check_storage(self, weight_storage: str) -> None:
        """Check that frozen weights can live where they should in the storage that the LM's configuration asks for.

        Raises:
            ValueError: ZeRO-3 would have to partition quantised weights.
        """
        if weight_storage != "same" and self.frozen == "partitioned":
            raise ValueError(
                f"model.lm.weight_storage={weight_storage!r} needs parallel.frozen='resident': ZeRO-3 partitions "
                "parameters of the run's dtype alone. Set parallel.frozen='resident', or weight_storage='same'."
            )


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The degrees of a run and this process's place in them.

    Ranks are laid out as Megatron does: tensor-parallel peers are neighbours,
    `rank = data_rank * tensor + tensor_rank`.
    """

    world: int
    """Processes in all."""
    rank: int
    """This process."""
    tensor: int
    """Tensor-parallel degree."""

    def __post_init__(self) -> None:
        """Check that the degrees fit the world."""
        if self.world % self.tensor:
            divisors = [d for d in range(1, self.world + 1) if self.world % d == 0]
            raise ValueError(
                f"parallel.tensor={self.tensor} does not divide the world of {self.world} processes; "
                f"choose one of {divisors}, or start a multiple of {self.tensor} processes."
            )

    @property
    def data(self) -> int:
        """Data-parallel degree."""
        return self.world // self.tensor

    @property
    def tensor_rank(self) -> int:
        """Place of this process in its tensor-parallel group."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Place of this process in its data-parallel group."""
        return self.rank // self.tensor

    def check_divisible(self, sizes: Mapping[str, int]) -> None:
        """Check that every named size can be cut by tensor parallelism.

        Args:
            sizes: what is cut, by the name of its setting.

        Raises:
            ValueError: naming the sizes that do not divide and the degrees that do.
        """
        bad = {name: size for name, size in sizes.items() if size % self.tensor}
        if bad:
            fitting = [t for t in range(1, self.tensor + 1) if all(size % t == 0 for size in sizes.values())]
            listed = ", ".join(f"{name}={size}" for name, size in bad.items())
            raise ValueError(
                f"parallel.tensor={self.tensor} does not divide {listed}; degrees that fit this model: {fitting}."
            )

    def check_batch(self, dataset: str, batch_size: int) -> None:
        """Check that the global batch of `dataset` can be cut over the data-parallel ranks.

        Raises:
            ValueError: naming the nearest sizes that fit.
        """
        if batch_size % self.data:
            below = batch_size // self.data * self.data
            near = [size for size in (below, below + self.data) if size > 0]
            raise ValueError(
                f"data.{dataset}.batch_size={batch_size} is global and must be a multiple of the "
                f"{self.data} data-parallel ranks; set it to one of {near}."
            )


def init_groups(topology: Topology, *, timeout_seconds: int = 600) -> None:
    """Make Megatron's groups for `topology` over the initialised default process group.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the default group's world is not the topology's.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised; call init_process_group before init_groups."
        )
    if dist.get_world_size() != topology.world:
        raise ValueError(
            f"the process group has {dist.get_world_size()} ranks but the topology {topology.world}."
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor,
        distributed_timeout_minutes=max(1, timeout_seconds // 60),
        create_gloo_process_groups=False,
    )


def destroy_groups() -> None:
    """Undo `init_groups`."""
    parallel_state.destroy_model_parallel()


@contextmanager
def single_process(device_type: str = "cpu") -> Iterator[Topology]:
    """Give a one-process world to code that needs groups, such as generation from a checkpoint.

    Args:
        device_type: on "cuda" collectives go through NCCL, since gloo moves what they take through the CPU.

    Yields:
        The topology, world 1.
    """
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    topology = Topology(world=1, rank=0, tensor=1)
    try:
        init_groups(topology)
        yield topology
    finally:
        destroy_groups()
        dist.destroy_process_group()


class MegatronMPU:
    """The model-parallel unit that DeepSpeed asks for groups, over Megatron's `parallel_state`.

    DeepSpeed's name "model parallel" means tensor parallel here; there is no pipeline.
    """

    def get_model_parallel_rank(self) -> int:
        """Return the tensor-parallel rank."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        """Return the tensor-parallel degree."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_src_rank(self) -> int:
        """Return the global rank of the tensor-parallel group's first member."""
        return parallel_state.get_tensor_model_parallel_src_rank()

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_src_rank = get_model_parallel_src_rank

    def get_data_parallel_rank(self) -> int:
        """Return the data-parallel rank."""
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        """Return the data-parallel degree."""
        return parallel_state.get_data_parallel_world_size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Return the data-parallel group."""
        return parallel_state.get_data_parallel_group()

    def get_pipeline_model_parallel_rank(self) -> int:
        """Return 0: there is one pipeline stage."""
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Return 1: there is one pipeline stage."""
        return 1


def world_device() -> torch.device:
    """Return the device that this process computes on."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
