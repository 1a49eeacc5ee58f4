"""`parallel.compile_frozen`: losses and gradients of eager blocks, one graph a shape, nothing compiled elsewhere."""

import shutil
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters

from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.models.vision import VisionConfig, build_vision
from flamingo_dist.models.vision.batches import encode_in_batches
from flamingo_dist.parallel.topology import ParallelConfig, Topology, single_process
from flamingo_dist.training.build import build_model
from tests import tiny
from tests.flamingo_dist.models.vision import vit_folder
from tests.flamingo_dist.training.test_parity import whole_weights

INDUCTOR = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
compile_frozen = Flamingo.compile_frozen


def network(**lm: Any) -> Any:
    config = tiny.network(gate_init=0.5, layers=2, every=2)
    return replace(config, lm=replace(config.lm, **lm))


def train(topology: Topology, parallel: ParallelConfig, backend: str, lm: dict[str, Any]) -> dict[str, Any]:
    """Two steps over two data sets of other shapes."""
    counters.clear()
    torch._dynamo.reset()
    with patch.object(Flamingo, "compile_frozen", lambda model: compile_frozen(model, backend)):
        step = tiny.make_step(topology, parallel, tiny.train_config(2), network(**lm))
    results = [step.run(i, tiny.batches(i, topology)) for i in range(2)]
    return {
        "loss": [dict(r.loss) for r in results],
        "norm": [r.grad_norm for r in results],
        "weights": whole_weights(step, topology),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def check(ranks: Any, parallel: ParallelConfig, world: int, backend: str, **lm: Any) -> None:
    """Compiled against eager blocks on the same layout: traced alone, the same to the last bit."""
    compiled = replace(parallel, compile_frozen=True)
    eager, ours = (
        ranks.run(train, p, backend, lm, world=world, tensor=p.tensor)[0] for p in (parallel, compiled)
    )
    # A graph for each data set: all blocks share it, and the second step makes none.
    assert (eager["graphs"], ours["graphs"], ours["breaks"]) == (0, 2, 0)
    if backend == "aot_eager":
        assert (ours["loss"], ours["norm"]) == (eager["loss"], eager["norm"])
    for loss, want in zip(ours["loss"], eager["loss"], strict=True):
        assert loss == pytest.approx(want, abs=2e-5)
    assert ours["norm"] == pytest.approx(eager["norm"], rel=1e-4)
    for name, value in eager["weights"].items():
        torch.testing.assert_close(ours["weights"][name], value, atol=2e-4, rtol=1e-4, msg=name)


LAYOUTS = {
    "tensor parallel, recomputed": (
        2,
        ParallelConfig(tensor=2, zero_stage=3, activation_checkpointing=True),
        {"positions": "relative"},
    ),
    "ZeRO-3, partly recomputed": (
        2,
        ParallelConfig(zero_stage=3, activation_checkpointing="selective"),
        {},
    ),
    "tensor parallel, one byte a weight": (
        2,
        ParallelConfig(tensor=2, zero_stage=2),
        {"weight_storage": "int8", "bias": "all"},
    ),
    "fp8 products": (
        1,
        ParallelConfig(zero_stage=0, activation_checkpointing=True),
        {"weight_storage": "fp8", "matrix_products": "fp8"},
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_blocks_train_alike(ranks, name):
    world, parallel, lm = LAYOUTS[name]
    check(ranks, parallel, world, "aot_eager", **lm)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "stage", "lm"),
    [
        (INDUCTOR, 3, {}),
        ("aot_eager", 0, {}),
        ("aot_eager", 1, {"positions": "alibi", "clip_qkv": 1.0}),
        ("aot_eager", 2, {"qk_norm": "width", "norm": "layer", "bias": "all"}),
        (INDUCTOR, 3, {"weight_storage": "fp8"}),
    ],
    ids=str,
)
def test_other_language_models_and_inductors_kernels_train_alike(ranks, backend, stage, lm):
    check(ranks, ParallelConfig(tensor=2, zero_stage=stage, activation_checkpointing=True), 2, backend, **lm)


@pytest.mark.distributed
def test_probes_and_generation_compile_nothing():
    torch._dynamo.reset()
    with single_process() as topology:
        parallel = ParallelConfig(zero_stage=0)
        model = build_model(network(), parallel, topology, dtype=torch.float32, seed=7)
        model.compile_frozen("aot_eager")
        counters.clear()
        batch = tiny.batch("docs", 0)
        with torch.no_grad():
            tiny.forward(model, batch, targets_BT=batch.targets())
        tiny.forward(model, batch, cache=model.new_cache())
        assert counters["stats"]["unique_graphs"] == 0
        tiny.forward(model, batch, targets_BT=batch.targets())
        assert counters["stats"]["unique_graphs"] == 1


def images(count: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, 64, 64), generator=gen).to(torch.uint8)


def test_an_encoders_blocks_compile_for_few_sizes_of_a_sub_batch():
    config = VisionConfig(name="nfnet-tiny", image_size=64)
    eager, compiled = build_vision(config), build_vision(config)
    torch._dynamo.reset()
    counters.clear()
    first = list(compiled.repeated_blocks())[:2]
    with patch.object(compiled, "repeated_blocks", lambda: first):
        compiled.compile_blocks("aot_eager")
    graphs = []
    for count in (7, 3, 4, 2, 1, 9, 5, 6, 8, 0):
        pixels = images(count)
        got, want = (encode_in_batches(vision, pixels, 4) for vision in (compiled, eager))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    # Two blocks of two kinds: sub-batches of four, of two and of one.
    assert graphs == [2, 2, 2, 4, 6, 6, 6, 6, 6, 6]
    assert not counters["graph_break"]


def test_one_sub_batch_is_filled_up_no_further_than_the_others():
    sizes = []
    vision = build_vision(VisionConfig(name="nfnet-tiny", image_size=64))
    vision.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    for compiled, want in (False, [[5], [6, 6, 1]]), (True, [[6], [6, 6, 6]]):
        vision.is_compiled = compiled
        for count, parts in zip((5, 13), want, strict=True):
            encode_in_batches(vision, images(count), 6)
            assert sizes == parts
            sizes.clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_a_transformers_blocks_compile(name, tmp_path):
    vit_folder.save(name, tmp_path)
    config = VisionConfig(name=name, weights=str(tmp_path))
    eager, compiled = build_vision(config), build_vision(config)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile_blocks("aot_eager")
    size = config.image_size
    for count in (4, 3, 5):
        pixels = torch.full((count, 3, size, size), 7, dtype=torch.uint8)
        torch.testing.assert_close(compiled(pixels), eager(pixels), atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def test_partitioned_weights_are_refused():
    with pytest.raises(ValueError, match="compile_frozen=True needs parallel.frozen='resident'"):
        ParallelConfig(frozen="partitioned", compile_frozen=True)
