"""What the open web puts into corpora, on purpose or not: each is handled, or skipped, counted and named."""

import io
import json
import os
import pickle
import struct
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.errors import BadDataError, BadSampleError
from data_pipeline.feed import LocalFeed
from data_pipeline.index import open_index, write_index
from data_pipeline.media import MediaConfig, decode_image, decode_video
from data_pipeline.scan import scan_tar
from data_pipeline.shards import ShardWriter, npy_bytes
from data_pipeline.tokenizer import TokenizerConfig
from tests.data_pipeline.corpora import clip_mp4, clip_webp, pairs_config, picture

BYTES = TokenizerConfig()
TOK = BYTES.load()
SMALL = MediaConfig(image_size=16)


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_bomb(side: int) -> bytes:
    """A valid PNG of one colour whose few kilobytes unpack to side * side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def audio_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    return buffer.getvalue()


def lying_video(width: int, height: int) -> bytes:
    """An AVI whose header gives this size where frames have 32 x 32."""
    blob = bytearray(clip_mp4(6, codec="mpeg4", form="avi"))
    place = blob.index(b"strf") + 8
    blob[place + 4 : place + 12] = struct.pack("<ii", width, height)
    return bytes(blob)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return os.system, (f"touch {self.path}",)  # type: ignore[return-value]


def raw_tar(path: Path, members: list[tuple[bytes | str, bytes]], *, kind: bytes = tarfile.REGTYPE) -> None:
    """A tar by tarfile, with names as they come."""
    with tarfile.open(
        path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, blob in members:
            text = name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
            info = tarfile.TarInfo(text)
            info.size, info.type = len(blob), kind
            if kind != tarfile.REGTYPE:
                info.size, info.linkname = 0, "/etc/passwd"
            tar.addfile(info, io.BytesIO(blob))


def eval_config(folder: Path, **changes: Any) -> DatasetConfig:
    return pairs_config(folder, **({"mode": "eval", "batch_size": 1} | changes))


# Images


def test_cmyk_is_not_inverted() -> None:
    blob = encode(Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK"), "JPEG", quality=100)
    np.testing.assert_allclose(decode_image(blob, SMALL)[:, 8, 8], [200, 40, 40], atol=6)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form: str) -> None:
    grey = Image.fromarray(np.full((16, 16), 0x6464, np.uint16))
    assert decode_image(encode(grey, form), SMALL)[:, 8, 8].tolist() == [100, 100, 100]


def test_an_animated_image_is_its_first_frame() -> None:
    assert decode_image(clip_webp(5), SMALL)[:, 8, 8].tolist() == [0, 80, 160]
    frames = [Image.new("RGB", (16, 16), (i, i, i)) for i in (50, 90)]
    gif = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(gif, SMALL)[0, 8, 8] == 50


def test_the_name_of_an_image_does_not_matter(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path)) as writer:
        writer.write("a", {"jpg": picture(7), "txt": b"a png"})
        writer.write("b", {"png": encode(Image.new("RGB", (8, 8), (9, 9, 9)), "JPEG"), "txt": b"a jpeg"})
        writer.write("c", {"jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "txt": b"a program"})
    batch = DatasetStream(eval_config(tmp_path, batch_size=3), TOK, 0).batch(0)
    assert batch.keys == ("a", "b", "")
    assert [skip.cause for skip in batch.skips] == ["corrupt image"]


def test_bombs_cost_nothing() -> None:
    huge = png_bomb(30_000)
    assert len(huge) < 200_000
    for limit in (89_000_000, 10**12):
        started = time.monotonic()
        with pytest.raises(BadSampleError, match="too large"):
            decode_image(huge, MediaConfig(image_size=16, max_pixels=limit))
        assert time.monotonic() - started < 5
    text = io.BytesIO()
    image = Image.new("RGB", (8, 8))
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("a", "x" * (80 << 20), zip=True)
    image.save(text, "PNG", pnginfo=info)
    with pytest.raises(BadSampleError, match="corrupt image"):
        decode_image(text.getvalue(), SMALL)


@pytest.mark.parametrize("cut", [0.0, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_cut_images(form: str, cut: float) -> None:
    whole = encode(Image.effect_noise((96, 96), 80).convert("RGB"), form)
    with pytest.raises(BadSampleError, match="corrupt image"):
        decode_image(whole[: int(len(whole) * cut)], SMALL)


def test_decoding_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    hasty = MediaConfig(image_size=16, max_seconds=1e-9)
    for decode in (
        lambda: decode_image(picture(1), hasty),
        lambda: decode_video(clip_mp4(10), "mp4", 2, hasty),
        lambda: decode_video(clip_webp(4), "webp", 2, hasty),
    ):
        with pytest.raises(BadSampleError, match="too slow"):
            decode()
    # In the middle of a video: the clock runs a second at each look.
    ticks = iter(range(1000))
    monkeypatch.setattr("data_pipeline.media.time.monotonic", lambda: float(next(ticks)))
    with pytest.raises(BadSampleError, match=r"not decoded within 15"):
        decode_video(clip_mp4(40), "mp4", 2, MediaConfig(image_size=16, max_seconds=15))
    assert next(ticks) < 20, "given up at once"


# Videos


def test_the_name_of_a_video_does_not_matter() -> None:
    assert decode_video(clip_mp4(8), "gif", 2, SMALL).shape == (2, 3, 16, 16)
    assert decode_video(clip_webp(8), "mp4", 2, SMALL).shape == (2, 3, 16, 16)


def test_videos_without_frames_or_with_a_lying_header() -> None:
    empty = clip_mp4(3)
    moov = empty.index(b"stsz") + 12
    no_frames = empty[:moov] + struct.pack(">I", 0) + empty[moov + 4 :]
    for blob in (audio_only(), no_frames[: empty.index(b"mdat") + 4], b"\x1aE\xdf\xa3" + bytes(200)):
        with pytest.raises(BadSampleError, match="corrupt video"):
            decode_video(blob, "mp4", 2, SMALL)
    # The frames' own size counts, whatever the header says.
    just, short = (MediaConfig(image_size=16, max_pixels=n) for n in (32 * 32, 32 * 32 - 1))
    for blob in (clip_mp4(6), lying_video(8, 8), lying_video(64, 16_000)):
        assert decode_video(blob, "avi", 2, just).shape == (2, 3, 16, 16)
        with pytest.raises(BadSampleError, match="too large"):
            decode_video(blob, "avi", 2, short)


def test_endless_videos_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.media._MAX_VIDEO_FRAMES", 20)
    with pytest.raises(BadSampleError, match="more than 20 frames"):
        decode_video(clip_mp4(40), "mp4", 2, SMALL)


# Texts


def test_long_and_dirty_texts(tmp_path: Path) -> None:
    texts = {
        "long": b"word " * 4000,
        "nuls": b"\0a\0 cat\0",
        "only-nuls": b"\0\0",
        "latin": "caf\xe9".encode("latin-1"),
        "utf16": "a cat".encode("utf-16"),
        "lone": json.dumps({"captions": ["\ud800 cat"]}).encode(),
        "control": b"a\x07\x1b[2J cat",
        "tags": b"<image><EOC><|im_end|>",
    }
    with ShardWriter(str(tmp_path)) as writer:
        for key, text in texts.items():
            writer.write(key, {"png": picture(1), "json" if key == "lone" else "txt": text})
        writer.write("novel", {"png": picture(1), "txt": b"x" * ((8 << 20) + 1)})
    feed = LocalFeed([eval_config(tmp_path, batch_size=9, seq_len=32)], BYTES, seed=0)
    batch = feed.next(0)["pairs"]
    assert batch.keys == ("long", "nuls", "", "", "", "lone", "control", "tags", "")
    assert feed.summary()["pairs"]["causes"] == {"empty caption": 1, "bad text": 2, "too large": 1}
    assert TOK.decode(batch.tokens_BT[0].tolist()) == ("word " * 6)
    assert TOK.eoc_id not in batch.tokens_BT[0], "a caption that was cut has no end"
    assert TOK.decode(batch.tokens_BT[1].tolist()) == "a cat"
    assert (batch.tokens_BT[7] == TOK.image_id).sum() == 1
    assert not batch.loss_mask_BT[[2, 3, 4, 8]].any()


def test_nuls_in_documents(tmp_path: Path) -> None:
    document = {"items": [{"text": "a\0b"}, {"image": "0.png"}, {"text": "\0"}]}
    with ShardWriter(str(tmp_path)) as writer:
        writer.write("d", {"json": json.dumps(document).encode(), "0.png": picture(1)})
    config = eval_config(tmp_path, kind="interleaved", max_media=2)
    batch = DatasetStream(config, TOK, 0).batch(0)
    wanted = [TOK.bos_id, ord("a"), ord("b"), TOK.eoc_id, TOK.image_id, TOK.eoc_id]
    assert batch.tokens_BT[0, :6].tolist() == wanted


# Tars


def test_reordered_tars(tmp_path: Path) -> None:
    members: list[tuple[bytes | str, bytes]] = [(f"s{i}.png", picture(i)) for i in range(4)]
    members += [(f"s{i}.txt", f"number {i}".encode()) for i in (2, 0, 3, 1)]
    raw_tar(tmp_path / "a.tar", members)
    stream = DatasetStream(eval_config(tmp_path, batch_size=4), TOK, 0)
    batch = stream.batch(0)
    assert batch.keys == ("s0", "s1", "s2", "s3")
    for i in range(4):
        assert TOK.decode(batch.tokens_BT[i].tolist()) == f"number {i}"
        assert batch.media[i, 0, 0, 0, 4, 4] == i


def test_samples_of_one_name_stay_two(tmp_path: Path) -> None:
    pair: list[tuple[bytes | str, bytes]] = [("a.png", picture(1)), ("a.txt", b"one")]
    raw_tar(tmp_path / "a.tar", [*pair, ("a.png", picture(2)), ("a.txt", b"two")])
    batch = DatasetStream(eval_config(tmp_path, batch_size=2), TOK, 0).batch(0)
    assert batch.keys == ("a", "a")
    assert [TOK.decode(row.tolist()) for row in batch.tokens_BT] == ["one", "two"]


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    evil = ("../../evil.png", "/etc/evil.png", "a/../../evil.png")
    raw_tar(folder / "a.tar", [("ok.png", picture(1)), ("ok.txt", b"ok"), *((n, b"x") for n in evil)])
    raw_tar(folder / "b.tar", [("link.png", b"")], kind=tarfile.SYMTYPE)
    raw_tar(folder / "c.tar", [("hard.png", b"")], kind=tarfile.LNKTYPE)
    feed = LocalFeed([eval_config(folder)], BYTES, seed=0, quarantine=tmp_path / "quarantine.jsonl")
    assert feed.next(0)["pairs"].keys == ("ok",)
    assert feed.summary()["pairs"]["causes"] == {"unsafe name": 3, "unsafe member": 2}
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {*evil, "link.png", "hard.png"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "quarantine.jsonl"]
    with pytest.raises(ValueError, match="unsafe"):
        write_index(str(folder))


def test_documents_cannot_name_files(tmp_path: Path) -> None:
    items = [{"text": "x"}, {"image": "../../../etc/passwd.png"}]
    with ShardWriter(str(tmp_path)) as writer:
        writer.write("d", {"json": json.dumps({"items": items}).encode()})
    batch = DatasetStream(eval_config(tmp_path, kind="interleaved", max_media=2), TOK, 0).batch(0)
    assert [skip.cause for skip in batch.skips] == ["missing member"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    raw_tar(tmp_path / "a.tar", [(b"caf\xe9.png", picture(1)), (b"caf\xe9.txt", b"ok")])
    assert DatasetStream(eval_config(tmp_path), TOK, 0).batch(0).keys == ("caf\\xe9",)
    json.dumps(write_index(str(tmp_path)).records(0)[0].key).encode()


def test_a_size_below_zero_ends_the_scan() -> None:
    info = tarfile.TarInfo("a.png")
    header = bytearray(info.tobuf())
    header[124:136] = b"\xff" * 11 + b"\x00"  # base-256, negative
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    blob = bytes(header) + bytes(1024)
    records, skips, _ = scan_tar(io.BytesIO(blob), len(blob), "x.tar")
    assert records == []
    assert [skip.cause for skip in skips] == ["truncated shard"]


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Trap(marker))
    with ShardWriter(str(tmp_path / "data")) as writer:
        writer.write("beside", {"png": picture(1), "txt": b"ok", "pkl": bomb, "pyd": bomb, "pth": bomb})
        writer.write("alone", {"pkl": bomb, "txt": b"x"})
        writer.write("as-image", {"png": bomb, "txt": b"x"})
        writer.write("as-text", {"png": picture(1), "txt": bomb})
    batch = DatasetStream(eval_config(tmp_path / "data", batch_size=3), TOK, 0).batch(0)
    assert batch.keys == ("beside", "", "")
    features = io.BytesIO()
    np.save(features, np.array([Trap(marker)], object), allow_pickle=True)
    with ShardWriter(str(tmp_path / "npy")) as writer:
        writer.write("a", {"npy": features.getvalue(), "txt": b"x"})
        writer.write("b", {"npy": npy_bytes(np.ones((1, 4, 6))), "txt": b"x"})
    config = eval_config(tmp_path / "npy", batch_size=2, media="features", num_features=4, width=6)
    batch = DatasetStream(config, TOK, 0).batch(0)
    assert batch.keys == ("", "b")
    assert not marker.exists()


def test_damaged_offsets_stop_the_run(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path)) as writer:
        writer.write("a", {"png": picture(1), "txt": b"ok"})
    side = tmp_path / "shard-000000.idx.json"
    whole = side.read_bytes()
    for broken in (whole[:-9], b"{}", b"[]", whole.replace(b'"version":1', b'"version":9')):
        side.write_bytes(broken)
        feed = LocalFeed([eval_config(tmp_path)], BYTES, seed=0)
        with pytest.raises(BadDataError, match=r"unreadable shard.*side file.*write_index"):
            feed.next(0)


# The account


def test_everything_bad_is_counted_named_and_fatal_past_the_budget(tmp_path: Path) -> None:
    good = {"png": picture(5), "txt": b"good"}
    bad: dict[str, tuple[dict[str, bytes], str]] = {
        "bomb": ({"png": png_bomb(12_000), "txt": b"x"}, "too large"),
        "cut": ({"png": picture(1)[:50], "txt": b"x"}, "corrupt image"),
        "blank": ({"png": picture(1), "txt": b" "}, "empty caption"),
        "latin": ({"png": picture(1), "txt": b"\xe9"}, "bad text"),
        "alone": ({"txt": b"x"}, "missing member"),
    }
    with ShardWriter(str(tmp_path / "data"), max_samples=4) as writer:
        for number in range(3):
            writer.write(f"good{number}", good)
        for key, (members, _) in bad.items():
            writer.write(key, members)
    quarantine = tmp_path / "quarantine.jsonl"
    settings: dict[str, Any] = {"batch_size": 8, "max_pixels": 100_000_000}
    feed = LocalFeed([eval_config(tmp_path / "data", **settings)], BYTES, seed=0, quarantine=quarantine)
    feed.next(0)
    summary = feed.summary()["pairs"]
    assert (summary["read"], summary["bad"]) == (8, 5)
    assert summary["causes"] == Counter(cause for _, cause in bad.values())
    assert sorted(summary["sources"].values()) == [1, 4], "by shard"
    rows = {row["key"]: row for row in map(json.loads, quarantine.read_text().splitlines())}
    assert {key: row["cause"] for key, row in rows.items()} == {key: cause for key, (_, cause) in bad.items()}
    assert all(row["shard"].endswith(".tar") and row["detail"] for row in rows.values())
    strict = LocalFeed([eval_config(tmp_path / "data", bad_sample_floor=4, **settings)], BYTES, seed=0)
    with pytest.raises(BadDataError, match=r"5 bad samples of 8 read, more than the 4"):
        strict.next(0)
    assert open_index([str(tmp_path / "data")]).num_samples == 8
