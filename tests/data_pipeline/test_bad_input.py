"""Bad input: each kind is a clear error or a counted skip, nothing is lost, nothing hangs."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batch import Batch, Skip
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.errors import BadDataError, MissingShardError
from data_pipeline.feed import LocalFeed
from data_pipeline.index import open_index, write_index
from data_pipeline.ledger import Ledger
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import TokenizerConfig
from tests.data_pipeline.corpora import pairs_config, picture, write_pairs

BYTES = TokenizerConfig()
TOK = BYTES.load()
Make = Callable[..., DatasetConfig]


def jpeg() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return buffer.getvalue()


def write(folder: Path, **samples: dict[str, bytes]) -> None:
    with ShardWriter(str(folder)) as writer:
        for key, members in samples.items():
            writer.write(key, members)


def strip_index(folder: Path) -> None:
    for path in folder.glob("*.json"):
        path.unlink()


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def assert_empty_slot(batch: Batch, b: int) -> None:
    assert batch.keys[b] == ""
    assert (batch.tokens_BT[b] == TOK.pad_id).all()
    for array in (batch.loss_mask_BT, batch.media_index_BT, batch.media, batch.media_mask_BM):
        assert not array[b].any()


GOOD = {"png": picture(5), "txt": b"good"}
BAD_SAMPLES: dict[str, tuple[dict[str, bytes], str]] = {
    "corrupt jpeg": ({"jpg": jpeg()[:900], "txt": b"half"}, "corrupt image"),
    "no image at all": ({"png": b"not an image", "txt": b"x"}, "corrupt image"),
    "empty image": ({"png": b"", "txt": b"x"}, "corrupt image"),
    "empty caption": ({"png": picture(1), "txt": b""}, "empty caption"),
    "blank caption": ({"png": picture(1), "txt": b" \n\t"}, "empty caption"),
    "blank alternates": ({"png": picture(1), "json": b'{"captions": ["", " "]}'}, "empty caption"),
    "caption not utf-8": ({"png": picture(1), "txt": b"\xff\xfe\xfa"}, "bad text"),
    "broken json": ({"png": picture(1), "json": b'{"captions": ['}, "bad document"),
    "no caption": ({"png": picture(1)}, "missing member"),
    "no medium": ({"txt": b"alone"}, "missing member"),
    "features among pixels": ({"npy": b"x", "txt": b"x"}, "missing member"),
    "too many bytes": ({"png": picture(1), "txt": b"x" * 5000}, "too large"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_empties_its_slot_only(tmp_path: Path, name: str) -> None:
    members, cause = BAD_SAMPLES[name]
    write(tmp_path, a=GOOD, b=members, c=GOOD)
    config = pairs_config(tmp_path, mode="eval", batch_size=3, max_bytes=4000)
    batch = DatasetStream(config, TOK, 0).batch(0)
    assert batch.keys == ("a", "", "c")
    assert_empty_slot(batch, 1)
    (skip,) = batch.skips
    assert (skip.key, skip.cause, skip.dataset, skip.position) == ("b", cause, "pairs", 1)
    assert skip.shard.endswith("shard-000000.tar")
    assert skip.detail
    assert not skip.fatal


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"json": b"{"}, "bad document"),
        ({"json": json.dumps({"items": [{"text": "x"}, {"image": "0.png"}]}).encode()}, "missing member"),
        ({"json": json.dumps({"items": [{"image": "0.png"}]}).encode(), "0.png": picture(1)}, "no text"),
        (
            {"json": json.dumps({"items": [{"text": "x"}, {"image": "0.png"}]}).encode(), "0.png": b"x"},
            "corrupt image",
        ),
        (  # the good image before the bad one goes too
            {
                "json": json.dumps(
                    {"items": [{"image": "0.png"}, {"image": "1.png"}, {"text": "x"}]}
                ).encode(),
                "0.png": picture(1),
                "1.png": b"x",
            },
            "corrupt image",
        ),
    ],
)
def test_bad_documents(tmp_path: Path, members: dict[str, bytes], cause: str) -> None:
    write(tmp_path, a=members)
    config = pairs_config(tmp_path, kind="interleaved", batch_size=1, max_media=3)
    batch = DatasetStream(config, TOK, 0).batch(0)
    assert_empty_slot(batch, 0)
    assert batch.skips[0].cause == cause


def test_bad_video(tmp_path: Path) -> None:
    write(tmp_path, a={"mp4": b"\0" * 400, "txt": b"x"})
    batch = DatasetStream(pairs_config(tmp_path, kind="video", frames=2, batch_size=1), TOK, 0).batch(0)
    assert batch.skips[0].cause == "corrupt video"


def test_skips_are_counted_and_written_down_once(tmp_path: Path) -> None:
    write(tmp_path / "data", a=GOOD, b=BAD_SAMPLES["empty caption"][0], c=BAD_SAMPLES["corrupt jpeg"][0])
    config = pairs_config(tmp_path / "data", mode="eval", batch_size=3)
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    feed = LocalFeed([config], BYTES, seed=0, quarantine=quarantine)
    for step in (0, 1, 1):
        feed.next(step)
    counts = feed.summary()["pairs"]
    assert (counts["read"], counts["bad"]) == (9, 4)
    assert counts["causes"] == {"empty caption": 2, "corrupt image": 2}
    assert list(counts["sources"].values()) == [4]
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(line["key"], line["position"]) for line in lines] == [("b", 1), ("c", 2), ("b", 4), ("c", 5)]
    # A run that is continued adds only what it meets anew.
    LocalFeed([config], BYTES, seed=0, quarantine=quarantine).next(1)
    assert len(quarantine.read_text().splitlines()) == 4


def test_a_quarantine_cut_by_a_crash_is_gone_on_with(tmp_path: Path) -> None:
    """Cut in the middle of a character, it could not be read any more, and the next line was written onto its end."""
    file = tmp_path / "quarantine.jsonl"
    config = pairs_config(tmp_path)
    first, second, third = (Skip(key=f"ä{n}", shard="s", cause="c", position=n) for n in range(3))
    Ledger([config], file).record("pairs", 3, [first, second])
    blob = file.read_bytes()
    file.write_bytes(blob[: blob.rindex("ä".encode()) + 1])
    Ledger([config], file).record("pairs", 3, [first, second, third])
    lines = file.read_text(errors="replace").splitlines()
    assert [json.loads(line)["key"] for line in (lines[0], *lines[2:])] == ["ä0", "ä1", "ä2"]
    assert len(lines) == 4


def test_the_budget_stops_the_run(tmp_path: Path) -> None:
    samples = {f"s{i}": BAD_SAMPLES["empty caption"][0] if i % 2 else GOOD for i in range(8)}
    write(tmp_path, **samples)
    settings = {"mode": "eval", "batch_size": 2}
    floor = LocalFeed([pairs_config(tmp_path, bad_sample_floor=2, **settings)], BYTES, seed=0)
    floor.next(0)
    floor.next(1)
    with pytest.raises(BadDataError, match=r"3 bad samples of 6 read.*3 x empty caption; last: sample 's5'"):
        floor.next(2)
    share = LocalFeed(
        [pairs_config(tmp_path, bad_sample_floor=0, bad_sample_budget=0.5, **settings)], BYTES, seed=0
    )
    for step in range(20):
        share.next(step)


def test_truncated_tar_without_index(tmp_path: Path) -> None:
    write_pairs(tmp_path, 10, per_shard=10)
    strip_index(tmp_path)
    tar = tmp_path / "shard-000000.tar"
    with tarfile.open(tar) as opened:
        fifth = opened.getmember("p005.txt")
    whole = tar.read_bytes()
    cuts = {
        fifth.offset_data + 3: 5,  # inside the caption: sample 5 lost its text
        fifth.offset + 100: 6,  # inside the header: sample 5 keeps its image and is judged when it is met
        fifth.offset: 6,
        len(whole) - 1024: 10,  # everything is there but the end mark
    }
    for size, samples in cuts.items():
        tar.write_bytes(whole[:size])
        index = open_index([str(tmp_path)])
        assert index.num_samples == samples, size
        (skip,) = index.skips
        assert skip.cause == "truncated shard"
        assert f"{samples} samples" in skip.detail
        feed = LocalFeed([pairs_config(tmp_path, mode="eval", batch_size=1)], BYTES, seed=0)
        assert feed.summary()["pairs"]["causes"] == {"truncated shard": 1}
        assert feed.next(4)["pairs"].keys == ("p004",)
    tar.write_bytes(whole)
    assert open_index([str(tmp_path)]).skips == ()
    tar.write_bytes(whole[: fifth.offset])
    with pytest.raises(ValueError, match="truncated shard"):
        write_index(str(tmp_path))


def test_truncated_tar_with_index(tmp_path: Path) -> None:
    write_pairs(tmp_path, 6, per_shard=3)
    with tarfile.open(tmp_path / "shard-000001.tar") as opened:
        cut(tmp_path / "shard-000001.tar", opened.getmember("p004.txt").offset_data + 2)
    feed = LocalFeed([pairs_config(tmp_path, mode="eval", batch_size=6)], BYTES, seed=0)
    batch = feed.next(0)["pairs"]
    assert batch.keys == ("p000", "p001", "p002", "p003", "", "")
    assert [s.cause for s in batch.skips] == ["truncated shard"] * 2
    assert feed.summary()["pairs"]["bad"] == 3, "two samples and the shard itself"


def test_damage_in_the_middle_of_a_tar(tmp_path: Path) -> None:
    write_pairs(tmp_path, 6, per_shard=6)
    strip_index(tmp_path)
    tar = tmp_path / "shard-000000.tar"
    blob = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        header = opened.getmember("p003.png").offset
    blob[header : header + 512] = b"\x7f" * 512
    tar.write_bytes(blob)
    index = open_index([str(tmp_path)])
    assert index.num_samples == 3
    assert f"byte {header}" in index.skips[0].detail


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100, b"\0" * 10240])
def test_tars_without_samples(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="no samples in"):
        open_index([str(tmp_path)])


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_pairs(tmp_path, 9, per_shard=3)
    (tmp_path / "shard-000001.tar").unlink()
    for url in (str(tmp_path), f"{tmp_path}/shard-{{000000..000002}}.tar", f"{tmp_path}/shard-000001.tar"):
        with pytest.raises(MissingShardError, match=r"missing shard: .*shard-000001\.tar"):
            open_index([url])
    with pytest.raises(MissingShardError, match="no such folder"):
        open_index([str(tmp_path / "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingShardError, match=r"no \.tar shard"):
        open_index([str(tmp_path / "empty")])
    with pytest.raises(MissingShardError, match="no shard matches"):
        open_index([f"{tmp_path}/x-*.tar"])
    with pytest.raises(ValueError, match="unpack them"):
        open_index(["s3://bucket/a.tar.gz"])
    with pytest.raises(ValueError, match="no urls"):
        open_index([])


def test_a_shard_that_vanishes_stops_the_run(pairs: Make, tmp_path: Path) -> None:
    feed = LocalFeed([pairs(mode="eval")], BYTES, seed=0)
    feed.next(0)
    shutil.rmtree(tmp_path / "pairs")
    with pytest.raises(BadDataError, match=r"missing shard at sample 'p004': .*vanished"):
        feed.next(1)


def test_a_shard_that_changed_is_an_error(tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    with (tmp_path / "shard-000000.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match="changed after it was indexed"):
        open_index([str(tmp_path)])


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other", "version": 1, "shards": []}'])
def test_foreign_index(tmp_path: Path, text: str) -> None:
    write_pairs(tmp_path, 3)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="not an index of version 1"):
        open_index([str(tmp_path)])


def test_foreign_tars_are_scanned_and_can_be_indexed(tmp_path: Path) -> None:
    """A tar made with tarfile: folders, a member without extension, upper case, dots in extensions."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, blob in {
            "./x/one.PNG": picture(1),
            "./x/one.txt": b"one",
            "README": b"?",
            "x/two.0.png": picture(2),
            "x/two.json": b"{}",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    scanned = open_index([str(tmp_path)])
    assert [(r.key, sorted(r.members)) for r in scanned.records(0)] == [
        ("x/one", ["png", "txt"]),
        ("x/two", ["0.png", "json"]),
    ]
    written = write_index(str(tmp_path))
    assert written.records(0) == scanned.records(0)
    assert written.fingerprint == scanned.fingerprint
    assert open_index([f"{tmp_path}/a.tar"]).fingerprint == scanned.fingerprint


def test_a_position_does_not_depend_on_bad_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "good", **{f"s{i}": GOOD for i in range(8)})
    write(tmp_path / "bad", **{f"s{i}": GOOD if i != 3 else {"png": b"", "txt": b"x"} for i in range(8)})
    keys = {}
    for name in ("good", "bad"):
        stream = DatasetStream(pairs_config(tmp_path / name, batch_size=2), TOK, 0)
        keys[name] = np.concatenate([stream.batch(step).keys for step in range(8)])
    assert sorted(keys["good"][keys["good"] != keys["bad"]]) == ["s3", "s3"]
