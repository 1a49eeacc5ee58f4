"""A shard that holds something else than before, at the same size: named at a resume, or where it is read."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.dataset import DatasetStream
from data_pipeline.errors import BadDataError, ResumeError
from data_pipeline.feed import LocalFeed, check_saved, make_state
from data_pipeline.index import ShardEntry, ShardIndex, open_index, write_index
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import TokenizerConfig
from tests.data_pipeline.corpora import pairs_config, picture

BYTES = TokenizerConfig()
TOK = BYTES.load()


def write_texts(folder: Path, texts: list[str], *, mtime: int | None = None) -> None:
    """Pairs, two a shard; with `mtime` by tarfile, without an index."""
    if mtime is None:
        with ShardWriter(str(folder), max_samples=2, overwrite=True) as writer:
            for number, text in enumerate(texts):
                writer.write(f"k{number}", {"png": picture(number), "txt": text.encode()})
        return
    folder.mkdir(exist_ok=True)
    for shard in range(0, len(texts), 2):
        with tarfile.open(folder / f"shard-{shard // 2:06d}.tar", "w") as tar:
            for number in range(shard, shard + 2):
                for extension, blob in {"png": picture(number), "txt": texts[number].encode()}.items():
                    info = tarfile.TarInfo(f"k{number}.{extension}")
                    info.size, info.mtime = len(blob), mtime
                    tar.addfile(info, io.BytesIO(blob))


def texts(**changes: str) -> list[str]:
    return [changes.get(f"k{number}", f"text {number}") for number in range(8)]


def saved_by(folder: Path, **changes: Any) -> dict[str, Any]:
    feed = LocalFeed([pairs_config(folder, **changes)], BYTES, seed=3)
    saved: dict[str, Any] = json.loads(json.dumps(feed.state(2)))
    return saved


def resume(folder: Path | str, saved: dict[str, Any], **changes: Any) -> int:
    return LocalFeed([pairs_config(folder, **changes)], BYTES, seed=3).check_state(saved)


def flip(tar: Path, old: bytes, new: bytes, *, keep_time: bool = False) -> None:
    """Change bytes of a shard in place."""
    times = tar.stat()
    blob = tar.read_bytes()
    assert blob.count(old) == 1
    tar.write_bytes(blob.replace(old, new))
    when = times.st_mtime_ns if keep_time else times.st_mtime_ns + 10**9
    os.utime(tar, ns=(when, when))


def test_a_shard_that_was_written_and_indexed_anew_is_named(tmp_path: Path) -> None:
    write_texts(tmp_path, texts())
    saved = saved_by(tmp_path)
    before = [file.stat().st_size for file in sorted(tmp_path.glob("*.tar"))]
    write_texts(tmp_path, texts(k5="TEXT 5"))
    assert [file.stat().st_size for file in sorted(tmp_path.glob("*.tar"))] == before
    with pytest.raises(ResumeError, match=r"pairs: \S+shard-000002.tar was changed .*other checksum"):
        resume(tmp_path, saved)
    write_texts(tmp_path, texts(k5="TEXT 5", k1="TEXT 1"))
    with pytest.raises(ResumeError, match=r"pairs: several shards were changed .*other checksum"):
        resume(tmp_path, saved)


@pytest.mark.parametrize("change", ["a longer text", "another time"])
def test_a_shard_without_an_index_is_known_by_its_tar_headers(tmp_path: Path, change: str) -> None:
    write_texts(tmp_path, texts(), mtime=1000)
    saved = saved_by(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "other")
    if change == "another time":
        write_texts(tmp_path / "other", texts(k5="TEXT 5"), mtime=1001)
        for name in ("shard-000000.tar", "shard-000001.tar", "shard-000003.tar"):
            shutil.copy(tmp_path / name, tmp_path / "other" / name)
    else:
        write_texts(tmp_path / "other", texts(k5="a much longer text 5"), mtime=1000)
    with pytest.raises(
        ResumeError, match=r"pairs: \S+other/shard-000002.tar was changed .*other tar headers"
    ):
        resume(tmp_path / "other", saved)


def test_copies_indices_and_older_positions_go_on(tmp_path: Path) -> None:
    write_texts(tmp_path / "a", texts(), mtime=1000)
    saved = saved_by(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # with times of their own
    assert resume(tmp_path / "b", saved) == 2
    write_index(str(tmp_path / "b"))
    assert resume(tmp_path / "b", saved) == 2, "indexed in between"
    assert resume(f"{tmp_path}/b/*.tar", saved) == 2, "side files alone"
    assert resume(tmp_path / "a", saved_by(tmp_path / "b")) == 2, "the index was lost"
    (tmp_path / "c").mkdir()
    assert resume(tmp_path / "a", without_evidence(saved)) == 2, "saved by an earlier version"


def without_evidence(saved: dict[str, Any]) -> dict[str, Any]:
    datasets = {
        name: {k: v for k, v in d.items() if k != "evidence"} for name, d in saved["datasets"].items()
    }
    assert datasets != saved["datasets"]
    return {**saved, "datasets": datasets}


def test_an_index_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    write_texts(tmp_path, texts())
    index = json.loads((tmp_path / "index.json").read_text())
    for shard in index["shards"]:
        shard.pop("headers")
    (tmp_path / "index.json").write_text(json.dumps(index))
    for path in tmp_path.glob("*.idx.json"):
        side = json.loads(path.read_text())
        path.write_text(json.dumps({k: side[k] for k in ("version", "bytes", "extensions", "samples")}))
    stream = DatasetStream(pairs_config(tmp_path, batch_size=8), TOK, 0)
    assert not stream.batch(0).skips
    assert resume(tmp_path, saved_by(tmp_path)) == 2
    assert open_index([f"{tmp_path}/*.tar"]).num_samples == 8


def test_a_shard_that_is_newer_than_its_index_is_compared_with_it(tmp_path: Path) -> None:
    write_texts(tmp_path, texts())
    assert resume(tmp_path, saved_by(tmp_path)) == 2
    flip(tmp_path / "shard-000002.tar", b"text 5", b"TEXT 5")
    for url in (str(tmp_path), f"{tmp_path}/*.tar"):
        with pytest.raises(ValueError, match=r"shard-000002.tar holds other bytes than its index says"):
            open_index([url])
    flip(tmp_path / "shard-000002.tar", b"TEXT 5", b"text 5")
    assert open_index([str(tmp_path)]).num_samples == 8, "newer, but the same"


@pytest.mark.parametrize("index_with", [ShardWriter, write_index], ids=lambda make: make.__name__)
def test_a_change_that_no_time_tells_is_seen_when_it_is_read(tmp_path: Path, index_with: Any) -> None:
    write_texts(tmp_path, texts())
    if index_with is write_index:
        write_index(str(tmp_path))
    flip(tmp_path / "shard-000002.tar", b"text 5", b"TEXT 5", keep_time=True)
    stream = DatasetStream(pairs_config(tmp_path, batch_size=8), TOK, 0)
    batch = stream.batch(0)
    ((skip),) = batch.skips
    assert (skip.key, skip.cause) == ("k5", "changed sample")
    assert skip.shard.endswith("shard-000002.tar")
    assert "write_index" in skip.detail
    assert sorted(batch.keys) == sorted(["", *(f"k{n}" for n in range(8) if n != 5)])


def test_a_cache_gives_nothing_of_the_shard_that_was_there_before(tmp_path: Path) -> None:
    cache = {"cache_folder": str(tmp_path / "cache"), "batch_size": 8, "mode": "eval"}
    for text in ("text 5", "TEXT 5"):
        write_texts(tmp_path / "corpus", texts(k5=text))
        stream = DatasetStream(pairs_config(tmp_path / "corpus", **cache), TOK, 0)
        tokens_T = stream.batch(0).tokens_BT[5]
        assert TOK.decode([t for t in tokens_T.tolist() if t < 256]).strip("\0").endswith(text)


def test_what_a_position_holds_of_the_shards_does_not_grow_with_them() -> None:
    sizes = []
    for shards in (1, 10_000):
        entries = [ShardEntry(f"s3://b/{i}.tar", 2, 9, f"{i:016x}", f"{i + 7:016x}") for i in range(shards)]
        description = DatasetStream(pairs_config("s3://b"), TOK, 0, index=ShardIndex(entries)).describe()
        sizes.append(len(json.dumps(make_state({"pairs": description}, 0))))
        changed = [*entries[:-1], ShardEntry(entries[-1].url, 2, 9, "f" * 16, entries[-1].sha256)]
        other = DatasetStream(pairs_config("s3://b"), TOK, 0, index=ShardIndex(changed)).describe()
        with pytest.raises(ResumeError, match=f"pairs: shard number {shards - 1} was changed"):
            check_saved({"pairs": other}, make_state({"pairs": description}, 0))
    assert abs(sizes[1] - sizes[0]) < 200


@pytest.mark.parametrize("known_by", ["checksum", "size"])
def test_a_side_file_of_another_shard_stops_the_run(tmp_path: Path, known_by: str) -> None:
    """A shard is written and indexed anew while a run reads it: its offsets would be those of the other shard."""
    write_texts(tmp_path, texts())
    feed = LocalFeed([pairs_config(tmp_path, mode="eval", batch_size=2)], BYTES, seed=0)
    feed.next(0)
    if known_by == "checksum":
        write_texts(tmp_path, texts(k2="TEXT 2"))
    else:
        write_texts(tmp_path, texts(k2="text 2" * 200))
        for side in tmp_path.glob("*.idx.json"):
            side.write_text(json.dumps(json.loads(side.read_text()) | {"sha256": ""}))
    with pytest.raises(BadDataError, match=r"unreadable shard.*shard-000001.tar.*was indexed anew"):
        feed.next(1)
