"""Encoding a corpus once: equal to encoding live, complete, reused where it fits and nowhere else."""

import dataclasses
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from data_pipeline.index import open_index
from data_pipeline.media import decode_features, decode_image, decode_video
from data_pipeline.shards import ShardWriter
from flamingo_dist.models.vision import VisionConfig, build_vision
from jobs import encode, encode_shard
from jobs.encode import EncodeConfig, encode_corpus, find_encoded, media_config
from tests.flamingo_dist.models.vision import vit_folder

VISION = VisionConfig()
CONFIG = EncodeConfig(vision=VISION, batch=3)


def picture(number: int, form: str = "PNG") -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, form)
    return buffer.getvalue()


def clip(number: int, frames: int = 12) -> bytes:
    images = [Image.new("RGB", (20, 20), (20 * i, number, 60)) for i in range(frames)]
    buffer = io.BytesIO()
    images[0].save(buffer, "WEBP", save_all=True, append_images=images[1:], duration=50, lossless=True)
    return buffer.getvalue()


def write_pairs(folder: Path, count: int = 11, bad: tuple[int, ...] = ()) -> str:
    with ShardWriter(str(folder), max_samples=4) as writer:
        for i in range(count):
            blob = b"no picture" if i in bad else picture(i)
            captions = json.dumps({"captions": [f"one {i}"]}).encode()
            writer.write(f"set/p{i}", {"png": blob, "txt": f"picture {i}".encode(), "json": captions})
    return str(folder)


def write_documents(folder: Path) -> str:
    with ShardWriter(str(folder), max_samples=2) as writer:
        for i in range(3):
            items = [{"text": "A"}, {"image": "0.png"}, {"text": "B"}, {"image": "1.jpg"}]
            images = {"0.png": b"\x89PNG broken" if i == 1 else picture(i), "1.jpg": picture(i + 50, "JPEG")}
            writer.write(f"d{i}", {"json": json.dumps({"items": items}).encode(), **images})
    return str(folder)


def write_videos(folder: Path) -> str:
    with ShardWriter(str(folder), max_samples=2) as writer:
        for i in range(3):
            writer.write(f"v{i}", {"webp": clip(i, frames=12 if i else 3), "txt": b"a clip"})
    return str(folder)


def read(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    index = open_index([url])
    for number, entry in enumerate(index.entries):
        blob = Path(entry.url).read_bytes()
        for record in index.records(number):
            yield record.key, {e: blob[m.offset : m.offset + m.size] for e, m in record.members.items()}


def stored(members: dict[str, bytes], name: str = "npy", frames: int = 1) -> np.ndarray:
    return decode_features(members[name], frames, VISION.num_features, VISION.width)


def live(pixels_F3HW: np.ndarray) -> np.ndarray:
    return build_vision(VISION)(torch.from_numpy(pixels_F3HW)).half().numpy()


@pytest.mark.parametrize("name", ["nfnet-tiny", "clip", "siglip", "dinov2"])
def test_every_encoder_stores_what_it_gives_live(tmp_path: Path, name: str) -> None:
    if name != "nfnet-tiny":
        vit_folder.save(name, tmp_path / "vit")
    weights = "" if name == "nfnet-tiny" else str(tmp_path / "vit")
    vision = VisionConfig(name=name, weights=weights, dtype="bfloat16")
    config = EncodeConfig(vision=vision, batch=3)
    source = write_pairs(tmp_path / "pairs", count=3)
    report = encode_corpus(source, str(tmp_path / "out"), config, use_ray=False)
    for (_, before), (_, after) in zip(read(source), read(report.url), strict=True):
        pixels = decode_image(before["png"], config.media)
        expected = build_vision(vision)(torch.from_numpy(pixels[None])).half().numpy()
        found = decode_features(after["npy"], 1, vision.num_features, vision.width)
        np.testing.assert_allclose(
            found, expected, atol=0.05, rtol=0.05
        )  # batches of other sizes, in bfloat16
    assert encode_corpus(source, str(tmp_path / "out"), config, use_ray=False).reused


def test_features_equal_a_live_encoding(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs")
    report = encode_corpus(source, str(tmp_path / "out"), CONFIG, use_ray=False)
    assert (report.samples, report.images, report.skips, report.reused) == (11, 11, (), False)
    before, after = dict(read(source)), dict(read(report.url))
    assert list(after) == list(before), "same keys in the same order"
    assert [e.samples for e in open_index([report.url]).entries] == [4, 4, 3], "same shards"
    for key, members in after.items():
        assert list(members) == ["npy", "txt", "json"]
        assert (members["txt"], members["json"]) == (before[key]["txt"], before[key]["json"])
        pixels = decode_image(before[key]["png"], media_config(VISION))[None]
        np.testing.assert_allclose(stored(members), live(pixels), atol=1e-3)


def test_documents_keep_their_order_and_lose_bad_samples_alone(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "docs")
    report = encode_corpus(source, str(tmp_path / "out"), CONFIG, use_ray=False)
    after = dict(read(report.url))
    assert list(after) == ["d0", "d2"]
    assert report.causes == {"corrupt image": 1}
    assert report.skips[0].key == "d1"
    assert report.skips[0].shard.endswith("shard-000000.tar")
    for members in after.values():
        assert list(members) == ["json", "0.npy", "1.npy"]
        names = [item["image"] for item in json.loads(members["json"])["items"] if "image" in item]
        assert names == ["0.npy", "1.npy"]
    first = decode_image(dict(read(source))["d0"]["1.jpg"], media_config(VISION))[None]
    np.testing.assert_allclose(stored(after["d0"], "1.npy"), live(first), atol=1e-3)


def test_videos_have_frames_over_the_whole_clip(tmp_path: Path) -> None:
    source = write_videos(tmp_path / "videos")
    config = EncodeConfig(vision=VISION, frames=4)
    report = encode_corpus(source, str(tmp_path / "out"), config, use_ray=False)
    assert (report.samples, report.images) == (3, 12)
    before = dict(read(source))
    for key, members in read(report.url):
        pixels = decode_video(before[key]["webp"], "webp", 4, config.media)
        np.testing.assert_allclose(stored(members, frames=4), live(pixels), atol=1e-3)
    features = stored(dict(read(report.url))["v2"], frames=4)
    assert all((features[i] != features[i + 1]).any() for i in range(3)), "four different moments"


def test_webp_is_a_still_where_one_frame_is_asked_for(tmp_path: Path) -> None:
    report = encode_corpus(write_videos(tmp_path / "v"), str(tmp_path / "out"), CONFIG, use_ray=False)
    assert {stored(members).shape[0] for _, members in read(report.url)} == {1}


def test_bad_media_are_counted_and_left_out(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", bad=(4, 5, 6, 7, 9))
    report = encode_corpus(source, str(tmp_path / "out"), CONFIG, use_ray=False)
    assert [key for key, _ in read(report.url)] == [f"set/p{i}" for i in (0, 1, 2, 3, 8, 10)]
    assert report.causes == {"corrupt image": 5}
    assert "left out: 5 corrupt image" in report.line()
    again = encode_corpus(source, str(tmp_path / "out"), CONFIG, use_ray=False)
    assert again == dataclasses.replace(report, reused=True), "a found corpus tells what it lacks"


def test_a_corpus_of_bad_media_is_an_error(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", count=2, bad=(0, 1))
    with pytest.raises(RuntimeError, match=r"no sample of .* could be encoded: {'corrupt image': 2}"):
        encode_corpus(source, str(tmp_path / "out"), CONFIG, use_ray=False)
    assert find_encoded(source, str(tmp_path / "out"), CONFIG) is None


def test_a_cut_shard_loses_its_end_alone(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs")
    shard = tmp_path / "pairs/shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:6000])
    report = encode_corpus(source, str(tmp_path / "out"), CONFIG, use_ray=False)
    keys = [key for key, _ in read(report.url)]
    assert keys[:5] == [f"set/p{i}" for i in range(5)]
    assert keys[-3:] == ["set/p8", "set/p9", "set/p10"]
    assert "truncated shard" in report.causes


def test_features_that_overflow_float16_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_vision(VISION)
    first = decode_image(picture(0), media_config(VISION))

    def overflow(pixels: torch.Tensor) -> torch.Tensor:
        hit = (pixels == torch.from_numpy(first)).flatten(1).all(1)
        return torch.where(hit[:, None, None], 1e6, encoder(pixels))

    monkeypatch.setattr(encode_shard, "_encoder", lambda config: overflow)
    report = encode_corpus(write_pairs(tmp_path / "p"), str(tmp_path / "out"), CONFIG, use_ray=False)
    assert report.causes == {"features not finite in float16": 1}
    assert "set/p0" not in dict(read(report.url))


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are encoded from now on."""
    calls: list[str] = []

    def counted(task: Any) -> Any:
        calls.append(task.name)
        return encode_shard.encode_shard(task)

    monkeypatch.setattr(encode, "encode_shard", counted)
    return calls


def test_reused_where_it_fits_and_never_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_pairs(tmp_path / "pairs"), str(tmp_path / "out")
    first = encode_corpus(source, out, CONFIG, use_ray=False)
    calls = count_calls(monkeypatch)
    moved = str(shutil.copytree(tmp_path / "pairs", tmp_path / "elsewhere"))
    for url, config in ((source, CONFIG), (moved, CONFIG), (source, dataclasses.replace(CONFIG, batch=7))):
        found = encode_corpus(url, out, config, use_ray=False)
        assert (found.reused, found.url, calls) == (True, first.url, [])
        assert find_encoded(url, out, config) == found
    changed = write_pairs(tmp_path / "changed", bad=(3,))
    others = [
        (changed, CONFIG),
        (source, dataclasses.replace(CONFIG, vision=VisionConfig(tiny_seed=1))),
        (source, dataclasses.replace(CONFIG, frames=2)),
        (source, dataclasses.replace(CONFIG, video_fps=1.0)),
    ]
    urls = {encode_corpus(url, out, config, use_ray=False).url for url, config in others}
    assert len(urls | {first.url}) == 5


def test_a_cut_off_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_pairs(tmp_path / "pairs", bad=(0,)), str(tmp_path / "out")

    def fails_at_the_last(task: Any) -> Any:
        if task.shard == 2:
            raise OSError("disk full")
        return encode_shard.encode_shard(task)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_shard", fails_at_the_last)
        with pytest.raises(OSError, match="disk full"):
            encode_corpus(source, out, CONFIG, use_ray=False)
    assert find_encoded(source, out, CONFIG) is None, "an unfinished folder is no corpus"
    calls = count_calls(monkeypatch)
    report = encode_corpus(source, out, CONFIG, use_ray=False)
    assert calls == ["shard-000002.tar"]
    assert (report.samples, report.causes) == (10, {"corrupt image": 1})
    assert len(dict(read(report.url))) == 10
    names = sorted(path.name for path in Path(report.url).iterdir())
    assert names == ["encode.json", "index.json"] + [
        f"shard-00000{i}.{e}" for i in range(3) for e in ("idx.json", "tar")
    ]


def test_other_file_systems_and_bare_tars(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    for path in (tmp_path / "pairs").glob("*.json"):
        path.unlink()
    pattern = str(tmp_path / "pairs" / "shard-{000000..000002}.tar")
    report = encode_corpus(pattern, "memory://features", CONFIG, use_ray=False)
    assert report.samples == open_index([report.url]).num_samples == 11


def test_progress_is_drawn(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    encode_corpus(write_pairs(tmp_path / "p"), str(tmp_path / "o"), CONFIG, use_ray=False, console=console)
    assert "11/11" in console.file.getvalue()


def test_configuration_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="give 1 or more"):
        EncodeConfig(vision=VISION, frames=0)


@pytest.fixture
def small_ray() -> Iterator[None]:
    """Ray on two logical CPUs; its sockets need a path far shorter than pytest's."""
    import ray

    folder = tempfile.mkdtemp(prefix="fe", dir="/tmp")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 << 20,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.distributed
@pytest.mark.usefixtures("small_ray")
def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    import ray

    source = write_pairs(tmp_path / "pairs", bad=(2,))
    here = encode_corpus(source, str(tmp_path / "here"), CONFIG, use_ray=False)
    there = encode_corpus(source, str(tmp_path / "ray"), CONFIG)
    assert ray.is_initialized(), "a Ray that ran before goes on"
    assert (there.samples, there.causes) == (here.samples, here.causes)
    for path in Path(here.url).glob("*.tar"):
        assert path.read_bytes() == (Path(there.url) / path.name).read_bytes()
    assert (Path(here.url) / "index.json").read_bytes() == (Path(there.url) / "index.json").read_bytes()
