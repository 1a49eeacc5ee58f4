"""What ZeRO-3 gathers, keeps and lets go in one forward and backward: DeepSpeed's coordinator, replayed.

DeepSpeed does not gather a unit each time it runs: it keeps one that runs again soon (`Limits.reuse`), and one that its
look-ahead found whole. So the bytes gathered depend on the order and the sizes of all units. The rules are
those of `PartitionedParameterCoordinator` (deepspeed 0.19) once it has recorded the order of modules.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from flamingo_dist.models.flamingo import FlamingoConfig
from flamingo_dist.planning.parameters import count_parameters
from flamingo_dist.planning.parameters import resampler as count_resampler


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Settings of DeepSpeed's `zero_optimization`, in elements; the defaults are those of a run."""

    prefetch: int = 50_000_000
    """`stage3_prefetch_bucket_size`: gathered ahead (`parallel.zero.deepspeed_config`)."""
    live: int = 1_000_000_000
    """`stage3_max_live_parameters`: whole elements up to which it looks ahead."""
    reuse: int = 1_000_000_000
    """`stage3_max_reuse_distance`: a unit that runs again within as many is kept."""


DEFAULT = Limits()


@dataclass(frozen=True, kw_only=True)
class Gathers:
    """Elements gathered by one rank in one forward and backward."""

    frozen: int
    """Of frozen units, all times."""
    trainable: int
    """Of trainable units, all times."""
    calls: int
    """Gathers, about: those of a look-ahead are one."""
    live_at_head: int
    """Whole elements while the losses are computed."""
    live_in_blocks: int
    """Most whole elements while the backward is in the blocks."""


@dataclass(frozen=True)
class _Use:
    """One entry of DeepSpeed's record: a unit that is gathered, or a module around units, which is not."""

    unit: str
    size: int
    frozen: bool = False
    around: frozenset[str] = frozenset()


def _module(*units: _Use) -> list[_Use]:
    """Return the entry of a module around `units`: DeepSpeed takes it for a use of all of them."""
    distinct = {unit.unit: unit.size for unit in units if not unit.around}
    return [_Use("", sum(distinct.values()), around=frozenset(distinct))]


@lru_cache(maxsize=256)
def replay(
    model: FlamingoConfig, tp: int, *, partitioned: bool, checkpointing: bool, limits: Limits = DEFAULT
) -> Gathers:
    """Replay one forward and backward of a data set.

    Args:
        model: the network.
        tp: tensor-parallel degree.
        partitioned: whether frozen weights are partitioned too.
        checkpointing: whether blocks are recomputed.
        limits: DeepSpeed's settings.
    """
    forward, backward = _order(model, tp, partitioned=partitioned, checkpointing=checkpointing)
    return _replay([*forward, *backward], limits, head=len(forward) - 1)


def _order(
    model: FlamingoConfig, tp: int, *, partitioned: bool, checkpointing: bool
) -> tuple[list[_Use], list[_Use]]:
    """Return the uses of units in the order of the forward and of the backward."""
    counts, lm = count_parameters(model, tp), model.lm
    gated = set(model.gated_positions())

    def frozen(name: str, size: int) -> list[_Use]:
        return [_Use(name, size, True)] if partitioned else []

    def block(i: int) -> list[_Use]:
        own = [_Use(f"gated {i}", counts.gated_block)] if i in gated else []
        return own + frozen(f"block {i}", counts.lm_block)

    whole = count_resampler(model.resampler, tp)
    layers = 1 if model.resampler.shared_feature_kv else model.resampler.depth
    parts = [_Use(f"resampler {i}", whole // layers) for i in range(layers)]
    parts += [_Use("media map", counts.media_map)] if counts.media_map else []
    size = counts.vocabulary // (1 if lm.tied else 2)
    table, head_table = frozen("table", size), frozen("table" if lm.tied else "head table", size)
    extra, extra_head = [_Use("extra", counts.extra // 2)], [_Use("extra head", counts.extra // 2)]
    words = _module(*table, *head_table, *extra, *extra_head)
    blocks = [block(i) for i in range(lm.num_layers)]
    forward = [*parts, *words, *table, *extra, *(use for part in blocks for use in part)]
    forward += [*words, *head_table, *extra_head]
    backward = [*_module(*forward), *words, *extra_head, *head_table]
    for part in reversed(blocks):
        # A block's own backward gathers first; then its second forward runs, then the backward of what stands before.
        backward += [*part[-1:], *part, *part[:-1]] if checkpointing else reversed(part)
    return forward, [*backward, *words, *extra, *_module(*parts), *reversed(parts)]


def _replay(order: Sequence[_Use], limits: Limits, *, head: int) -> Gathers:
    live: dict[str, int] = {}
    latest: dict[str, int] = defaultdict(lambda: -1)
    queue = deque((place, use) for place, use in enumerate(order) if not use.around)
    gathered = {True: 0, False: 0}
    calls = live_at_head = live_in_blocks = 0

    def gather(use: _Use) -> int:
        if use.unit in live or use.around:
            return 0
        live[use.unit] = use.size
        gathered[use.frozen] += use.size
        return use.size

    for step, use in enumerate(order):
        calls += bool(gather(use))
        while queue and not use.around and latest[use.unit] < step:
            place, ahead = queue.popleft()
            latest[ahead.unit] = place
        room, ahead_size = min(limits.live - sum(live.values()), limits.prefetch), 0
        while queue and ahead_size < room:
            place, ahead = queue.popleft()
            latest[ahead.unit] = max(latest[ahead.unit], place)
            ahead_size += gather(ahead)
        calls += bool(ahead_size)
        if step == head:
            live_at_head = sum(live.values())
        elif step > head:
            live_in_blocks = max(live_in_blocks, sum(live.values()))
        again = _runs_again(order, step + 1, use.unit, limits.reuse)
        if latest[use.unit] <= step + 1 and not again:
            live.pop(use.unit, None)
    return Gathers(
        frozen=gathered[True],
        trainable=gathered[False],
        calls=calls,
        live_at_head=live_at_head,
        live_in_blocks=live_in_blocks,
    )


def _runs_again(order: Sequence[_Use], start: int, unit: str, reuse: int) -> bool:
    """Return whether the unit, or a module around it, runs within `reuse` elements from `start` on."""
    passed = 0
    for use in order[start:]:
        if passed >= reuse:
            return False
        if use.unit == unit or unit in use.around:
            return True
        passed += use.size
    return False
