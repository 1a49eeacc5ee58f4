import pytest

from flamingo_dist.parallel.topology import ParallelConfig, Topology
from tests import tiny


def test_neighbours_are_tensor_parallel_peers():
    ranks = [Topology(world=8, rank=r, tensor=2) for r in range(8)]
    assert [t.tensor_rank for t in ranks] == [0, 1] * 4
    assert [t.data_rank for t in ranks] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {t.data for t in ranks} == {4}


def test_a_degree_that_does_not_divide_the_world_names_those_that_do():
    with pytest.raises(ValueError, match=r"tensor=3 does not divide the world of 8 .* one of \[1, 2, 4, 8\]"):
        Topology(world=8, rank=0, tensor=3)


def test_a_degree_that_does_not_divide_the_heads_names_what_fits():
    sizes = tiny.network().tensor_sizes()
    Topology(world=2, rank=0, tensor=2).check_divisible(sizes)
    with pytest.raises(
        ValueError, match=r"tensor=4 does not divide lm.num_kv_heads=2.*fit this model: \[1, 2\]"
    ):
        Topology(world=4, rank=0, tensor=4).check_divisible(sizes)


def test_a_batch_that_does_not_divide_names_the_nearest():
    topology = Topology(world=4, rank=0, tensor=1)
    topology.check_batch("pairs", 8)
    with pytest.raises(ValueError, match=r"data.pairs.batch_size=6 .* one of \[4, 8\]"):
        topology.check_batch("pairs", 6)
    with pytest.raises(ValueError, match=r"one of \[4\]"):
        topology.check_batch("pairs", 3)


def test_partitioned_weights_need_stage_three():
    with pytest.raises(ValueError, match="frozen='partitioned' needs parallel.zero_stage=3, not 2"):
        ParallelConfig(frozen="partitioned", zero_stage=2)


def groups(topology: Topology) -> tuple[list[int], list[int], int]:
    import torch.distributed as dist

    from flamingo_dist.parallel.topology import MegatronMPU

    mpu = MegatronMPU()
    assert mpu.get_model_parallel_rank() == topology.tensor_rank
    assert mpu.get_data_parallel_rank() == topology.data_rank
    assert mpu.get_data_parallel_world_size() == topology.data
    assert (mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()) == (0, 1)
    return (
        dist.get_process_group_ranks(mpu.get_model_parallel_group()),
        dist.get_process_group_ranks(mpu.get_data_parallel_group()),
        mpu.get_model_parallel_src_rank(),
    )


@pytest.mark.distributed
def test_groups_are_those_that_the_topology_says(ranks):
    assert ranks.run(groups, world=4, tensor=2) == [
        ([0, 1], [0, 2], 0),
        ([0, 1], [1, 3], 0),
        ([2, 3], [0, 2], 2),
        ([2, 3], [1, 3], 2),
    ]
