"""Weights by step, and pairs packed into longer rows."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import empty_batch
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.errors import ResumeError
from data_pipeline.feed import LocalFeed
from data_pipeline.packing import shared_limit
from data_pipeline.schedule import WeightSchedule
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import TokenizerConfig
from tests.data_pipeline.corpora import one_of_each, pairs_config, picture

BYTES = TokenizerConfig()
TOK = BYTES.load()
Make = Callable[..., DatasetConfig]


def test_weights_follow_straight_lines() -> None:
    schedule = WeightSchedule(points=((10, 1.0), (20, 0.0), (30, 0.0), (40, 2.0)))
    steps = (0, 10, 15, 20, 25, 30, 35, 40, 1000)
    assert [schedule.at(step) for step in steps] == [1, 1, 0.5, 0, 0, 0, 1, 2, 2]
    assert WeightSchedule(points=((0, 0.3),)).at(7) == 0.3
    with pytest.raises(ValueError, match="no schedule"):
        WeightSchedule().at(0)


@pytest.mark.parametrize(
    "points",
    [((5, 1.0), (5, 2.0)), ((5, 1.0), (3, 2.0)), ((-1, 1.0),), ((0, -1.0),), ((0, float("nan")),)],
)
def test_bad_schedules(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="points"):
        WeightSchedule(points=points)


def test_a_schedule_moves_no_position(pairs: Make) -> None:
    saved = LocalFeed([pairs()], BYTES, seed=3).state(5)
    scheduled = pairs(weight_schedule=WeightSchedule(points=((0, 1.0), (9, 0.1))))
    assert scheduled.weight_at(0) == 1.0
    assert pairs(weight=0.2).weight_at(10**6) == 0.2
    assert LocalFeed([scheduled], BYTES, seed=3).check_state(saved) == 5


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_that_train_wrongly_are_refused(pairs: Make, weight: float) -> None:
    with pytest.raises(ValueError, match=f"weight {weight} of data set .*: must be finite and not negative"):
        pairs(weight=weight)
    assert pairs(weight=0.0).weight_at(3) == 0.0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(9, 400))
def test_shared_limits_are_fair_and_fit(lengths: list[int], room: int) -> None:
    limit = shared_limit(lengths, room)
    assert sum(min(length, limit) for length in lengths) <= room
    # The largest such limit: one more token each would not fit, unless nothing is cut.
    assert limit >= max(lengths) or sum(min(length, limit + 1) for length in lengths) > room


def test_rows_hold_their_samples_apart(pairs: Make) -> None:
    single = DatasetStream(pairs(batch_size=12), TOK, 5)
    stream = DatasetStream(pairs(batch_size=12, pack=3), TOK, 5)
    for step in range(4):
        apart, batch = single.batch(step), stream.batch(step)
        assert batch.keys == apart.keys
        assert batch.tokens_BT.shape == (4, 72)
        assert batch.media.shape[:2] == (4, 3)
        np.testing.assert_array_equal(batch.media.reshape(apart.media.shape), apart.media)
        assert batch.segments_BT is not None
        for number in range(12):
            row, segment = divmod(number, 3)
            here = batch.segments_BT[row] == segment + 1
            length = int(here.sum())
            np.testing.assert_array_equal(batch.tokens_BT[row, here], apart.tokens_BT[number, :length])
            np.testing.assert_array_equal(batch.loss_mask_BT[row, here], apart.loss_mask_BT[number, :length])
            assert (apart.tokens_BT[number, length:] == TOK.pad_id).all(), "nothing was cut"
            index = np.where(apart.media_index_BT[number, :length] > 0, segment + 1, 0)
            np.testing.assert_array_equal(batch.media_index_BT[row, here], index)
        padding = batch.segments_BT == 0
        assert (batch.tokens_BT[padding] == TOK.pad_id).all()
        assert not batch.loss_mask_BT[padding].any()
        assert not batch.media_index_BT[padding].any()


def test_short_rows_cut_the_longest_captions(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path)) as writer:
        for number, text in enumerate(("a" * 60, "bb", "", "c" * 60)):
            writer.write(f"p{number}", {"png": picture(number), "txt": text.encode()})
    config = pairs_config(tmp_path, batch_size=4, pack=4, seq_len=64, row_len=40, shuffle=False)
    config = dataclasses.replace(config, leading_space_p=0.0)
    batch = DatasetStream(config, TOK, 0).batch(0)
    assert batch.segments_BT is not None
    assert np.bincount(batch.segments_BT[0]).tolist() == [0, 17, 6, 0, 17]
    assert batch.keys == ("p0", "p1", "", "p3")
    assert batch.media_mask_BM.tolist() == [[True, True, False, True]]
    assert [skip.cause for skip in batch.skips] == ["empty caption"]
    assert (batch.tokens_BT == TOK.eoc_id).sum() == 1, "a caption that was cut has no end"


def test_packed_batches_divide_and_resume(pairs: Make, tmp_path: Path) -> None:
    config = pairs(batch_size=12, pack=2)
    whole = DatasetStream(config, TOK, 5)
    for ranks in (2, 3, 6):
        parts = [whole.batch(7, rank, ranks) for rank in range(ranks)]
        assert sum((p.keys for p in parts), ()) == whole.batch(7).keys
        np.testing.assert_array_equal(np.concatenate([p.tokens_BT for p in parts]), whole.batch(7).tokens_BT)
    with pytest.raises(ValueError, match="4 data-parallel ranks in rows of 2; use 8 or 16"):
        whole.batch(0, 0, 4)
    saved = json.loads(json.dumps(LocalFeed([config], BYTES, seed=5).state(3)))
    assert LocalFeed([config], BYTES, seed=5).check_state(saved) == 3
    with pytest.raises(ResumeError, match=r"pairs\.pack was 2, is 1"):
        LocalFeed([pairs(batch_size=12)], BYTES, seed=5).check_state(saved)


def test_videos_are_packed_too(tmp_path: Path) -> None:
    videos = dataclasses.replace(one_of_each(tmp_path)[2], pack=2)
    batch = DatasetStream(videos, TOK, 0).batch(0)
    assert batch.media.shape[:3] == (2, 2, 3)
    empty = empty_batch(2, videos.tokens_per_row, videos.media_shape, pixels=True, pad_id=0, pack=2)
    assert empty.tokens_BT.shape == batch.tokens_BT.shape
    assert empty.media.shape == batch.media.shape
    assert empty.keys == ("",) * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack": 3}, "multiple"),
        ({"pack": 2, "row_len": 9}, "row_len 9"),
        ({"row_len": 64}, "only rows of pack > 1"),
        ({"pack": 2, "mode": "eval"}, "mode 'train'"),
        ({"pack": 2, "kind": "interleaved"}, "only pairs and videos"),
        ({"pack": 0}, "pack 0"),
    ],
)
def test_bad_packing(changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"name": "x", "kind": "pair", "urls": ("memory://x",), "batch_size": 4}
    with pytest.raises(ValueError, match=message):
        DatasetConfig(**(settings | changes))  # type: ignore[arg-type]
