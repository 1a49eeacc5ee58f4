"""Streams and feeds: the batch contract, purity, layouts, evaluation, resume."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.batch import Batch
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.errors import ResumeError
from data_pipeline.feed import LocalFeed
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import Tokenizer, TokenizerConfig
from tests.data_pipeline.corpora import C, S, document, features, pairs_config, write_pairs

BYTES = TokenizerConfig()
TOK = BYTES.load()
Make = Callable[..., DatasetConfig]


def same(a: Batch, b: Batch) -> bool:
    arrays = ("tokens_BT", "loss_mask_BT", "media_index_BT", "media", "media_mask_BM")
    return a.keys == b.keys and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)


def number_of(batch: Batch, b: int) -> int:
    """The number a picture names in red; the middle is never padding."""
    return int(batch.media[b, 0, 0, 0, 4, 4])


def test_pairs_meet_the_contract(pairs: Make) -> None:
    stream = DatasetStream(pairs(), TOK, 0)
    spaces = 0
    for step in range(12):
        batch = stream.batch(step)
        assert batch.media.shape == (4, 1, 1, 3, 8, 8)
        assert batch.media.dtype == np.uint8
        assert batch.media_mask_BM.all()
        assert batch.skips == ()
        for b, key in enumerate(batch.keys):
            number = int(key[1:])
            assert number_of(batch, b) == number
            text = TOK.decode(batch.tokens_BT[b].tolist())
            assert text.lstrip(" ") == f"picture {number}"
            spaces += text.startswith(" ")
            length = 4 + len(text)
            row = batch.tokens_BT[b]
            assert row[:2].tolist() == [TOK.bos_id, TOK.image_id]
            assert row[length - 2 : length].tolist() == [TOK.eoc_id, TOK.eos_id]
            assert (row[length:] == TOK.pad_id).all()
            assert np.flatnonzero(batch.loss_mask_BT[b]).tolist() == list(range(2, length))
            assert batch.media_index_BT[b].tolist() == [0] + [1] * (length - 1) + [0] * (24 - length)
    assert 10 < spaces < 38, "about half of the captions begin with a space"


def test_every_sample_once_an_epoch_and_layouts_agree(pairs: Make) -> None:
    config = pairs(batch_size=6)
    whole = DatasetStream(config, TOK, 5)
    keys = [key for step in range(46) for key in whole.batch(step).keys]
    for epoch in range(12):
        assert sorted(keys[23 * epoch : 23 * (epoch + 1)]) == [f"p{i:03d}" for i in range(23)]
    for size in (2, 3, 6):
        ranks = [DatasetStream(config, TOK, 5) for _ in range(size)]
        for step in (7, 0, 3):
            parts = [stream.batch(step, rank, size) for rank, stream in enumerate(ranks)]
            joined = whole.batch(step)
            np.testing.assert_array_equal(np.concatenate([p.tokens_BT for p in parts]), joined.tokens_BT)
            np.testing.assert_array_equal(np.concatenate([p.media for p in parts]), joined.media)
            assert sum((p.keys for p in parts), ()) == joined.keys


def test_threads_change_nothing(three_kinds: tuple[DatasetConfig, ...]) -> None:
    for config in three_kinds:
        one = DatasetStream(config, TOK, 1)
        many = DatasetStream(dataclasses.replace(config, threads=3), TOK, 1)
        for step in range(4):
            assert same(one.batch(step), many.batch(step))


def test_documents(three_kinds: tuple[DatasetConfig, ...]) -> None:
    stream = DatasetStream(three_kinds[1], TOK, 0)
    modes = set()
    for step in range(10):
        batch = stream.batch(step)
        assert batch.media.shape == (4, 2, 1, 3, 8, 8)
        for b, key in enumerate(batch.keys):
            tags = np.flatnonzero(batch.tokens_BT[b] == TOK.image_id)
            assert batch.media_mask_BM[b].sum() == len(tags) >= 1
            # The text beside a tag says which image of the document stands there.
            for slot, tag in enumerate(tags):
                after = TOK.decode(batch.tokens_BT[b, tag : tag + 10].tolist())
                if len(after) >= 7:
                    assert batch.media[b, slot, 0, 0, 4, 4] == 10 * int(key[1:]) + int(after[6])
            assert (batch.media[b, len(tags) :] == 0).all()
            modes.add(bool(batch.media_index_BT[b, tags[0]] == 1))
    assert modes == {True, False}, "both directions of phi occur with p_next 0.5"


def test_videos(three_kinds: tuple[DatasetConfig, ...]) -> None:
    batch = DatasetStream(three_kinds[2], TOK, 0).batch(0)
    assert batch.media.shape == (4, 1, 3, 3, 8, 8)
    red = batch.media[:, 0, :, 0, 4, 4].astype(int)
    assert (np.diff(red, axis=1) > 0).all(), "frames come in their order"


def test_flips_and_alternate_captions_vary_with_the_epoch(tmp_path: Path) -> None:
    import io

    from PIL import Image

    image = Image.new("RGB", (8, 8))
    image.paste((255, 0, 0), (0, 0, 4, 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    with ShardWriter(str(tmp_path)) as writer:
        alternates = json.dumps({"captions": ["two", "", "three"]}).encode()
        writer.write("a", {"png": buffer.getvalue(), "txt": b"one", "json": alternates})
    config = pairs_config(tmp_path, batch_size=1, leading_space_p=0.0)
    stream = DatasetStream(config, TOK, 0)
    batches = [stream.batch(step) for step in range(40)]
    assert {TOK.decode(b.tokens_BT[0].tolist()) for b in batches} == {"one", "two", "three"}
    assert {int(b.media[0, 0, 0, 0, 0, 0]) for b in batches} == {0, 255}


def test_evaluation_is_fixed_and_plain(pairs: Make) -> None:
    stream = DatasetStream(pairs(mode="eval"), TOK, 0)
    keys = [key for step in range(5) for key in stream.batch(step).keys]
    assert keys == [f"p{i:03d}" for i in range(20)]
    for seed in (1, 2):
        assert same(DatasetStream(pairs(mode="eval"), TOK, seed).batch(2), stream.batch(2))
    assert not any(TOK.decode(row.tolist()).startswith(" ") for row in stream.batch(1).tokens_BT)


def test_evaluation_of_documents_begins_at_the_beginning(three_kinds: tuple[DatasetConfig, ...]) -> None:
    config = dataclasses.replace(three_kinds[1], mode="eval", p_next=1.0)
    batch = DatasetStream(config, TOK, 0).batch(0)
    assert (batch.tokens_BT[:, 0] == TOK.bos_id).all()
    assert (batch.media_index_BT[:, 0] == 0).all(), "the lead text sees nothing: phi points back"


def test_features_of_all_kinds(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "p")) as writer:
        writer.write("a", {"npy": features(7), "txt": b"seven"})
    with ShardWriter(str(tmp_path / "d")) as writer:
        members = {f"{i}.npy": features(i + 1) for i in range(2)}
        writer.write("a", {"json": json.dumps(document(2)).encode(), **members})
    shape = {"media": "features", "num_features": S, "width": C, "batch_size": 1}
    pair = DatasetStream(pairs_config(tmp_path / "p", **shape), TOK, 0).batch(0)
    assert pair.media.shape == (1, 1, 1, S, C)
    assert pair.media.dtype == np.float16
    assert (pair.media == 7).all()
    config = pairs_config(tmp_path / "d", kind="interleaved", max_media=3, seq_len=200, **shape)
    batch = DatasetStream(config, TOK, 0).batch(0)
    assert batch.media[0, :, 0, 0, 0].tolist() == [1, 2, 0]
    assert batch.media_mask_BM[0].tolist() == [True, True, False]


def test_any_fsspec_url() -> None:
    write_pairs("memory://stream-test/pairs", 7, per_shard=3)
    keys = {
        url: DatasetStream(pairs_config(url, batch_size=7, mode="eval"), TOK, 0).batch(0).keys
        for url in (
            "memory://stream-test/pairs",
            "memory://stream-test/pairs/shard-{000000..000002}.tar",
            "memory://stream-test/pairs/*.tar",
        )
    }
    fsspec.filesystem("memory").rm("/stream-test", recursive=True)
    assert set(keys.values()) == {tuple(f"p{i:03d}" for i in range(7))}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_equals_the_straight_run(three_kinds: tuple[DatasetConfig, ...], prefetch: int) -> None:
    straight = LocalFeed(three_kinds, BYTES, seed=3)
    steps = [straight.next(step) for step in range(6)]
    saved = json.loads(json.dumps(straight.state(3)))
    assert saved["datasets"]["pairs"]["position"] == 12
    assert saved["datasets"]["pairs"]["epoch"] == 1
    resumed = LocalFeed(three_kinds, BYTES, seed=3, prefetch=prefetch)
    step = resumed.check_state(saved)
    assert step == 3
    for step in range(3, 6):
        batches = resumed.next(step)
        assert list(batches) == ["pairs", "docs", "videos"]
        assert all(same(batches[name], steps[step][name]) for name in batches)
    assert same(resumed.next(1)["docs"], steps[1]["docs"]), "any step may be asked for"
    resumed.close()


def test_resume_names_every_difference(pairs: Make, tmp_path: Path) -> None:
    saved = LocalFeed([pairs()], BYTES, seed=3).state(5)

    def differences(*configs: DatasetConfig, seed: int = 3, tokenizer: TokenizerConfig = BYTES) -> str:
        with pytest.raises(ResumeError) as caught:
            LocalFeed(configs, tokenizer, seed=seed).check_state(saved)
        return str(caught.value)

    message = differences(pairs(seq_len=32, batch_size=2), seed=4)
    for part in ("pairs.seed was 3, is 4", "pairs.seq_len was 24, is 32", "pairs.batch_size was 4, is 2"):
        assert part in message
    assert "'other' is not in the checkpoint" in differences(pairs(), pairs(name="other"))
    assert "'pairs' of the checkpoint is gone" in differences(pairs(name="other"))
    assert "pairs.tokenizer" in differences(pairs(), tokenizer=TokenizerConfig(vocab_size=300))
    write_pairs(tmp_path / "more", 24)
    assert "pairs.shards" in differences(pairs_config(tmp_path / "more"))
    with pytest.raises(ResumeError, match="not a data position"):
        LocalFeed([pairs()], BYTES, seed=3).check_state({"step": 3})
    # What does not move a position may change: the place of the shards, lambda, the budget.
    write_pairs(tmp_path / "moved", 23)
    moved = pairs_config(tmp_path / "moved", weight=0.5, bad_sample_budget=0.5, threads=2)
    assert LocalFeed([moved], BYTES, seed=3).check_state(saved) == 5


def test_layout_errors(pairs: Make) -> None:
    with pytest.raises(ValueError, match=r"batch_size 4 .* 3 data-parallel ranks; use 3 or 6"):
        LocalFeed([pairs()], BYTES, seed=0, dp_size=3)
    with pytest.raises(ValueError, match="own name"):
        LocalFeed([pairs(), pairs()], BYTES, seed=0)
    with pytest.raises(ValueError, match="no such step or rank"):
        DatasetStream(pairs(), TOK, 0).batch(0, 2, 2)
    with pytest.raises(ValueError, match="seed -1"):
        DatasetStream(pairs(), TOK, -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"urls": "s3://x"}, "give a tuple"),
        ({"urls": ()}, "must be given"),
        ({"seq_len": 4}, "seq_len 4"),
        ({"p_next": 2.0}, "p_next"),
        ({"max_media": 2}, "holds one medium"),
        ({"frames": 2}, "one frame"),
        ({"media": "features"}, "features need both"),
        ({"num_features": 4}, "set media='features'"),
        ({"image_size": 0}, "image_size 0"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"name": "x", "kind": "pair", "urls": ("memory://x",), "batch_size": 1}
    with pytest.raises(ValueError, match=message):
        DatasetConfig(**(settings | changes))  # type: ignore[arg-type]


def test_tokenizers_of_both_forms_agree(pairs: Make) -> None:
    a = DatasetStream(pairs(), BYTES, 0)
    b = DatasetStream(pairs(), Tokenizer.bytes_level(), 0)
    assert same(a.batch(0), b.batch(0))
    assert a.describe() == b.describe()


@pytest.mark.parametrize(("name", "value"), [("kind", "pairs"), ("mode", "training"), ("media", "pixel")])
def test_a_misspelt_choice_is_refused(name: str, value: str) -> None:
    """A recipe is Python: nobody else looks at its strings, and another branch ran without a word."""
    with pytest.raises(ValueError, match=f"{name} '{value}' of data set 'pairs': choose one of"):
        pairs_config("x", **{name: value})
