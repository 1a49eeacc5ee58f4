"""The shard writer: bytes, limits, index, and the webdataset package as an independent reader."""

import hashlib
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.shards import ShardWriter, decode_side, npy_bytes, side_name


def write_numbered(folder: str, count: int, **kwargs: object) -> None:
    with ShardWriter(folder, **kwargs) as writer:  # type: ignore[arg-type]
        for i in range(count):
            writer.write(f"s{i:04d}", {"png": bytes([i]) * (100 + i), "txt": f"caption {i}".encode()})


def test_offsets_point_at_the_bytes(tmp_path: Path) -> None:
    write_numbered(str(tmp_path), 7, max_samples=3)
    index = json.loads((tmp_path / "index.json").read_text())
    assert [s["samples"] for s in index["shards"]] == [3, 3, 1]
    seen = 0
    for shard in index["shards"]:
        blob = (tmp_path / shard["name"]).read_bytes()
        assert hashlib.sha256(blob).hexdigest() == shard["sha256"]
        assert len(blob) == shard["bytes"]
        for sample in decode_side((tmp_path / side_name(shard["name"])).read_bytes())[0]:
            assert sample.key == f"s{seen:04d}"
            text = sample.members["txt"]
            assert blob[text.offset : text.offset + text.size] == f"caption {seen}".encode()
            seen += 1
    assert seen == 7


def test_bytes_are_deterministic_and_tarfile_reads_them(tmp_path: Path) -> None:
    write_numbered(str(tmp_path / "a"), 4)
    write_numbered(str(tmp_path / "b"), 4)
    for name in ("shard-000000.tar", "shard-000000.idx.json", "index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert tar.getnames()[:2] == ["s0000.png", "s0000.txt"]
        assert all(m.mtime == 0 and m.uid == 0 for m in tar)


def test_max_bytes_begins_a_new_shard(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), max_bytes=10_000) as writer:
        for i in range(6):
            writer.write(f"k{i}", {"png": b"x" * 4000})
        writer.write("huge", {"png": b"x" * 50_000})
    index = json.loads((tmp_path / "index.json").read_text())
    assert [s["samples"] for s in index["shards"]] == [1] * 7
    assert all(s["bytes"] <= 10_000 for s in index["shards"][:-1])
    assert index["samples"] == 7


def test_long_and_unicode_names(tmp_path: Path) -> None:
    key = "wiki/" + "ä" * 120
    with ShardWriter(str(tmp_path)) as writer:
        writer.write(key, {"txt": b"hello"})
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tar.getnames() == [f"{key}.txt"]
    ((sample,), size) = decode_side((tmp_path / "shard-000000.idx.json").read_bytes())
    blob = (tmp_path / "shard-000000.tar").read_bytes()
    member = sample.members["txt"]
    assert sample.key == key
    assert size == len(blob)
    assert blob[member.offset : member.offset + member.size] == b"hello"


def test_no_index_when_the_block_fails(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with ShardWriter(str(tmp_path)) as writer:
            writer.write("a", {"txt": b"x"})
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_halfway()
    assert not (tmp_path / "index.json").exists()


def test_refuses_a_finished_folder_unless_told(tmp_path: Path) -> None:
    write_numbered(str(tmp_path), 5, max_samples=2)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ShardWriter(str(tmp_path))
    write_numbered(str(tmp_path), 1, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "index.json",
        "shard-000000.idx.json",
        "shard-000000.tar",
    ]


@pytest.mark.parametrize("key", ["", "a.b", "/abs", "dir/"])
def test_bad_keys(tmp_path: Path, key: str) -> None:
    with ShardWriter(str(tmp_path)) as writer, pytest.raises(ValueError, match="key"):
        writer.write(key, {"txt": b""})


def test_other_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="%d"):
        ShardWriter(str(tmp_path), "shard.tar")
    with ShardWriter(str(tmp_path)) as writer:
        writer.write("a", {"txt": b""})
        with pytest.raises(ValueError, match="twice in a row"):
            writer.write("a", {"txt": b""})
        with pytest.raises(ValueError, match="extensions"):
            writer.write("b", {})
    with pytest.raises(RuntimeError, match="closed"):
        writer.write("c", {"txt": b""})
    with pytest.raises(ValueError, match=r"\[F, S, C\]"):
        npy_bytes(np.zeros((2, 3)))


def test_memory_file_system() -> None:
    write_numbered("memory://writer-test/corpus", 3)
    fs = fsspec.filesystem("memory")
    assert json.loads(fs.cat_file("/writer-test/corpus/index.json"))["samples"] == 3
    fs.rm("/writer-test", recursive=True)


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_numbered(str(tmp_path), 5, max_samples=3)
    urls = [str(tmp_path / f"shard-00000{i}.tar") for i in range(2)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"s{i:04d}" for i in range(5)]
    assert samples[4]["txt"] == b"caption 4"
