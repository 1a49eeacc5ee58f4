"""Generation, probe and scoring on the real network: cached = uncached, and every layout gives the same."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flamingo_dist.evaluation.candidates import CandidateConfig, score_candidates
from flamingo_dist.evaluation.probe import probe
from flamingo_dist.inference.generate import GenerationConfig, generate
from flamingo_dist.inference.prompt import Prompt, PromptIds, few_shot_prompt
from flamingo_dist.models.flamingo import Flamingo
from flamingo_dist.parallel.topology import MegatronMPU, ParallelConfig, Topology, single_process
from flamingo_dist.training.build import build_engine, build_model
from tests.ranks import RankPool
from tests.tiny import EOC, IMAGE, batch, local, network, train_config

IDS = PromptIds(bos=1, image=IMAGE, eoc=EOC, eos=2)
CANDIDATES = [[5, EOC], [7, 8, EOC], [9, 10, 11, EOC]]
# Wide random weights in the gated blocks: with the usual ones every text would be one token over and over.
NET = replace(network(gate_init=1.0), gated=replace(network(gate_init=1.0).gated, init_std=1.0))


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with single_process() as alone:
        yield alone


@pytest.fixture(scope="module")
def model(topology: Topology) -> Flamingo:
    return build_model(NET, ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=7)


def prompts(count: int) -> tuple[list[Prompt], Tensor, Tensor]:
    """Prompts of no, one or two shots, with their media."""
    found = [
        few_shot_prompt(
            [{"caption": "ab" * (row + shot)} for shot in range(row % 3)],
            ids=IDS,
            encode=lambda text: [3 + byte % 50 for byte in text.encode()],
        )
        for row in range(count)
    ]
    generator = torch.Generator().manual_seed(0)
    media = torch.randint(0, 256, (count, 3, 2, 3, 16, 16), generator=generator).to(torch.uint8)
    mask = torch.tensor([[slot < prompt.num_media for slot in range(3)] for prompt in found])
    return found, media * mask[:, :, None, None, None, None], mask


def texts(model: Any, rows: slice, all_done: Any = None, **changes: Any) -> list[list[int]]:
    found, media, mask = prompts(7)
    config = GenerationConfig(
        stop_ids=IDS.stop_ids, suppressed_ids=IDS.never_generated, max_new_tokens=5, batch_size=2, **changes
    )
    return generate(
        model,
        [prompt.tokens for prompt in found][rows],
        [prompt.media_index for prompt in found][rows],
        media[rows],
        mask[rows],
        config,
        **({} if all_done is None else {"all_done": all_done}),
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_cached_equals_uncached(model: Flamingo, beams: int) -> None:
    cached = texts(model, slice(None), beams=beams, use_cache=True)
    assert cached == texts(model, slice(None), beams=beams, use_cache=False)
    assert len({tuple(text) for text in cached}) > 2


def test_generation_looks_at_the_images(model: Flamingo) -> None:
    with model.gates_off():
        blind = texts(model, slice(None))
    assert blind != texts(model, slice(None))


def test_exchanged_latents_are_exchanged_media(model: Flamingo) -> None:
    """The probe's shuffled loss, without the shortcut of reusing latents."""
    whole = batch("pairs", 0)
    result = probe(model, [whole])
    with torch.no_grad():
        output = model(
            whole.tokens_BT,
            whole.media_index_BT,
            whole.media.roll(-1, 0),
            whole.media_mask_BM.roll(-1, 0),
            targets_BT=whole.targets(),
        )
    assert result.shuffled == pytest.approx(float(output.nll_BT.sum()) / whole.num_loss_tokens(), rel=1e-5)
    assert result.tokens == whole.num_loss_tokens()
    assert len({result.true, result.shuffled, result.blank, result.gates_off}) == 4


def test_closed_gates_make_no_difference(topology: Topology) -> None:
    shut = build_model(network(), ParallelConfig(zero_stage=0), topology, dtype=torch.float32, seed=7)
    result = probe(shut, [batch("docs", 0)])
    assert result.true == result.shuffled == result.blank == result.gates_off


def everything(topology: Topology, zero_stage: Any, frozen: Any) -> dict[str, Any]:
    """All of it on one rank; the data-parallel ranks have unequal numbers of prompts."""
    parallel = ParallelConfig(tensor=topology.tensor, zero_stage=zero_stage, frozen=frozen)
    engine = build_engine(NET, train_config(), parallel, topology)
    group = MegatronMPU().get_data_parallel_group()

    def reduce_sum(value: Tensor) -> Tensor:
        dist.all_reduce(value, group=group)
        return value

    def all_done(done: bool) -> bool:
        flag = torch.tensor(int(done))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
        return bool(flag)

    rows = slice(None) if topology.data == 1 else (slice(0, 1), slice(1, None))[topology.data_rank]
    found, media, mask = prompts(4)
    return {
        "data_rank": topology.data_rank,
        "greedy": texts(engine, rows, all_done),
        "beam": texts(engine, rows, all_done, beams=3),
        "probe": probe(
            engine, [local(batch("pairs", step), topology) for step in range(2)], reduce_sum=reduce_sum
        ),
        "scores": score_candidates(engine, found, media, mask, CANDIDATES, CandidateConfig(rows=5)),
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "tensor", "zero_stage", "frozen"), [(2, 1, 3, "partitioned"), (4, 2, 3, "resident")]
)
def test_every_layout_gives_the_same(
    ranks: RankPool, model: Flamingo, world: int, tensor: int, zero_stage: int, frozen: str
) -> None:
    results = ranks.run(everything, zero_stage, frozen, world=world, tensor=tensor)
    found, media, mask = prompts(4)
    for kind, changes in (("greedy", {}), ("beam", {"beams": 3})):
        by_data_rank = {result["data_rank"]: result[kind] for result in results}
        joined = [text for rank in sorted(by_data_rank) for text in by_data_rank[rank]]
        assert joined == texts(model, slice(None), **changes)
        assert all(result[kind] == by_data_rank[result["data_rank"]] for result in results), "peers agree"
    scores = score_candidates(model, found, media, mask, CANDIDATES)
    # Two samples of a rank lend each other their media, so the reference shuffles within the same parts.
    degree = world // tensor
    parts = [Topology(world=degree, rank=rank, tensor=1) for rank in range(degree)]
    expected = probe(model, [local(batch("pairs", step), part) for step in range(2) for part in parts])
    for result in results:
        assert torch.allclose(result["scores"], scores, rtol=1e-4)
        assert result["probe"].as_dict() == pytest.approx(expected.as_dict(), rel=1e-4)
