"""From a configuration to a filled network inside a DeepSpeed engine."""

from typing import Any

import torch
from torch import Tensor, nn

from flamingo_dist.models.exchange.folder import NetworkFolder
from flamingo_dist.models.flamingo import Flamingo, FlamingoConfig
from flamingo_dist.models.fp8_product import check_fp8_device
from flamingo_dist.models.init import ParamTag, draw
from flamingo_dist.models.linear import quantise_
from flamingo_dist.models.weights.source import opened_here
from flamingo_dist.parallel.topology import ParallelConfig, Topology, world_device
from flamingo_dist.parallel.zero import (
    building,
    deepspeed_config,
    fill_parameters,
    init_deepspeed,
    make_engine,
    make_frozen_resident,
)
from flamingo_dist.training.config import TrainConfig
from flamingo_dist.training.optimizer import make_optimizer
from flamingo_dist.training.published import HandedOn, PublishedWeights, Values, exchange_columns, read_once


def parameter_values(config: FlamingoConfig, topology: Topology, seed: int) -> Values:
    """Return the function that gives every parameter's first values on this tensor-parallel rank.

    The frozen LM's come from its published weights, the rest from the seed and the parameter's name.
    """
    published = None if config.lm.weights is None else PublishedWeights(config.lm, topology)
    place = {"tp_rank": topology.tensor_rank, "tp_size": topology.tensor}

    def value_of(name: str, param: nn.Parameter) -> Tensor:
        if published is not None and ".extra" in name:
            # Near published rows, apart by a little noise.
            start, spread = published.extra_start(head="head" in name)
            noise = ParamTag(std=0.1 * spread)
            return start + draw(name, noise, param.shape, seed=seed, tp_rank=0, tp_size=1)
        if published is not None and name.startswith("lm."):
            return published.values(name.removeprefix("lm."), param)
        param_tag: ParamTag | None = getattr(param, "flamingo_tag", None)
        if param_tag is None:
            raise RuntimeError(f"parameter {name} has no tag; make it through flamingo_dist.models.init.tag.")
        return draw(name, param_tag, param.shape, seed=seed, **place)

    return value_of


def network_values(
    config: FlamingoConfig, model: Flamingo, topology: Topology, *, otherwise: Values
) -> Values:
    """Return the function that gives the values in the folder `config.weights`, and what it lacks by `otherwise`.

    Raises:
        ValueError: the folder is not there or does not fit the network.
    """
    assert config.weights is not None, "asked for where there is a folder"
    folder = NetworkFolder(
        config.weights,
        tp_rank=topology.tensor_rank,
        tp_size=topology.tensor,
        exchange=exchange_columns if topology.tensor > 1 else None,
    )
    folder.check(model, config)
    read = read_once(folder.values, topology)
    return lambda name, param: (read if folder.holds(name) else otherwise)(name, param)


def build_model(
    config: FlamingoConfig,
    parallel: ParallelConfig,
    topology: Topology,
    *,
    dtype: torch.dtype,
    seed: int,
    ds_config: dict[str, Any] | None = None,
) -> Flamingo:
    """Build and fill the network for this rank.

    Args:
        config: the network.
        parallel: how it is spread.
        topology: this rank's place; Megatron's groups must be initialised for it.
        dtype: parameters' dtype.
        seed: seed of the initialisation.
        ds_config: DeepSpeed's configuration, needed where frozen weights are partitioned.

    Raises:
        ValueError: tensor parallelism does not divide the network, weights do not fit it, or frozen weights cannot be
            partitioned in their storage.
    """
    parallel.check_storage(config.lm.weight_storage)
    if config.lm.matrix_products == "fp8":
        check_fp8_device(world_device())
    topology.check_divisible(config.tensor_sizes())
    if config.lm.weights is None and config.weights is None:
        topology.check_divisible({"lm.vocab_size (random weights)": config.lm.vocab_size})
    with building(parallel, ds_config or {}):
        model = Flamingo(
            config,
            dtype=dtype,
            activation_checkpointing=parallel.activation_checkpointing,
            opening=HandedOn if topology.world > 1 else opened_here,
            split_vision=parallel.split_vision,
        )
    values = parameter_values(config, topology, seed)
    if config.weights is not None:
        values = network_values(config, model, topology, otherwise=values)
    storage = config.lm.weight_storage

    def settle(module: nn.Module) -> None:
        # As soon as a module is filled: host memory holds one layer beside what is on the device, or in the storage.
        if storage != "same":
            quantise_(module, storage, world_device(), products=config.lm.matrix_products)
        # What ZeRO-3 partitions it has placed; it leaves buffers, such as the vision encoder's weights, where they are.
        module._apply(
            lambda tensor: tensor if hasattr(tensor, "ds_id") else tensor.to(world_device()), recurse=False
        )

    fill_parameters(model, values, settle)
    if parallel.frozen == "resident":
        make_frozen_resident(model.lm, dtype)
        make_frozen_resident(model)
    if parallel.fuse_encoder:
        model.vision.fuse()
    if parallel.compile_frozen:
        model.compile_frozen()
    return model


def build_engine(
    config: FlamingoConfig, train: TrainConfig, parallel: ParallelConfig, topology: Topology
) -> Any:
    """Build the network, its optimizer and the DeepSpeed engine around them.

    The order is fixed: freeze, tensor parallelism, activation checkpointing, weights, residency, compilation,
    optimizer, ZeRO.
    """
    init_deepspeed()
    ds_config = deepspeed_config(
        parallel, topology, dtype=train.torch_dtype, clip_norm=train.optimizer.clip_norm
    )
    model = build_model(
        config, parallel, topology, dtype=train.torch_dtype, seed=train.seed, ds_config=ds_config
    )
    optimizer = make_optimizer(model.named_parameters(), train.optimizer)
    return make_engine(model, optimizer, ds_config, units=model.gather_units)
