"""The command on the corpora of docs/assets.md: real packages where the cache holds them, else files laid out alike."""

import dataclasses
import json
import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.building.config import BuildConfig, CaptionConfig, ImageConfig, VideoConfig
from data_pipeline.building.corpus import BuildReport, build_corpus
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.tokenizer import TokenizerConfig
from tests.data_pipeline.building.building_material import picture, read_corpus
from tests.data_pipeline.corpora import clip_webp

CACHE = Path(os.environ.get("FLAMINGO_CACHE") or "~/.cache/flamingo-dist").expanduser() / "parts"
TRANSLATIONS = "\nde.utf8=Ein Ding.\nfr.utf8=Une chose.\n"


def part(name: str, folder: str) -> Path | None:
    """A folder of a fetched package, or None."""
    return next(iter(sorted(CACHE.glob(f"{name}*/{folder}"))), None)


def stamps(folder: Path) -> Path:
    """Tux Paint's stamps: NAME.png or NAME.svg with NAME.txt, whose first line is English; sounds beside them."""
    if (found := part("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")) is not None:
        return found / "animals" / "birds"
    for number, name in enumerate(("heron", "owl", "duck")):
        target = folder / "birds" / "cartoon" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".png").write_bytes(picture(number, (150, 120)))
        target.with_suffix(".txt").write_text(f"A {name}.{TRANSLATIONS}")
    (folder / "birds" / "drawn.svg").write_text("<svg/>")
    (folder / "birds" / "drawn.txt").write_text(f"A drawn bird.{TRANSLATIONS}")
    return folder / "birds"


def emoji(folder: Path) -> tuple[Path, dict[str, str]]:
    """Emoji named by code point, and their names."""
    images, names = part("lobehub-fluent-emoji-3d", "package/assets"), part("emojibase-data", "package/en")
    if images is not None and names is not None:
        records = json.loads((names / "data.json").read_text(encoding="utf-8"))
        files = {path.stem.lower(): path.name for path in images.glob("*.webp")}
        found = [(files.get(r["hexcode"].lower()), r["label"]) for r in records]
        return images, {name: label for name, label in found if name}
    folder.mkdir()
    for number in range(6):
        (folder / f"1f98{number}.webp").write_bytes(picture(number, (256, 256), "WEBP"))
    return folder, {f"1f98{number}.webp": f"animal {number}" for number in range(4)}


def clips(folder: Path) -> tuple[Path, dict[str, str]]:
    """Animated emoji among still ones."""
    images = part("lobehub-fluent-emoji-anim-1", "package/assets")
    names = part("emojibase-data", "package/en")
    if images is not None and names is not None:
        records = json.loads((names / "data.json").read_text(encoding="utf-8"))
        files = {path.stem.lower(): path.name for path in images.glob("*.webp")}
        found = [(files.get(r["hexcode"].lower()), r["label"]) for r in records]
        return images, {name: label for name, label in found if name}
    folder.mkdir()
    for number in range(3):
        (folder / f"1f98{number}.webp").write_bytes(clip_webp(6))
    (folder / "1f989.webp").write_bytes(picture(1, (64, 64), "WEBP"))
    return folder, {f"1f98{number}.webp": f"moving animal {number}" for number in (0, 1, 2, 9)}


def table(path: Path, captions: dict[str, str], *, most: int = 60) -> str:
    """Captions as `metadata.jsonl` of an image folder; only some, so that the test stays short."""
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in list(captions.items())[:most]]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def training_reads(report: BuildReport, frames: int = 1) -> None:
    """Every sample can be trained on."""
    kind = "video" if frames > 1 else "pair"
    data = DatasetConfig(
        name="real",
        kind=kind,  # type: ignore[arg-type]
        urls=(report.url,),
        batch_size=report.samples,
        seq_len=64,
        image_size=32,
        frames=frames,
        mode="eval",
    )
    batch = DatasetStream(data, TokenizerConfig(), 0).batch(0)
    assert batch.skips == ()
    assert batch.media_mask_BM.all()


def test_stamps_become_pairs(tmp_path: Path) -> None:
    source = stamps(tmp_path / "stamps")
    config = BuildConfig(
        input="pairs",
        sources=(str(source),),
        output=str(tmp_path / "out"),
        caption=CaptionConfig(first_line=True),
        image=ImageConfig(min_side=16, max_aspect=6),
    )
    report = build_corpus(config)
    pngs = {path.stem: path for path in source.rglob("*.png") if path.with_suffix(".txt").exists()}
    assert 3 <= report.samples <= len(pngs)
    assert report.samples + sum(report.tally.documents.values()) == report.tally.counts["read"] + sum(
        count for cause, count in report.tally.documents.items() if cause == "no medium"
    )
    for members in read_corpus(report.url).values():
        caption = members["txt"].decode()
        assert "\n" not in caption
        assert ".utf8=" not in caption
        assert any(members["png"] == path.read_bytes() for path in pngs.values())
    training_reads(report)


def test_emoji_become_pairs_by_a_table(tmp_path: Path) -> None:
    source, names = emoji(tmp_path / "emoji")
    captions = table(tmp_path / "metadata.jsonl", names)
    config = BuildConfig(
        input="pairs", sources=(str(source),), output=str(tmp_path / "out"), captions=captions
    )
    report = build_corpus(config)
    wanted = dict(list(names.items())[:60])
    assert report.samples == len(wanted)
    assert report.tally.documents["no caption in the table"] == len(list(source.glob("*.webp"))) - len(wanted)
    built = read_corpus(report.url)
    assert {members["webp"]: members["txt"].decode() for members in built.values()} == {
        (source / name).read_bytes(): text for name, text in wanted.items()
    }
    training_reads(report)
    # The same table as CSV gives the same bytes; another table is another corpus.
    rows = ["file_name,caption"] + [f'{name},"{text}"' for name, text in wanted.items()]
    (tmp_path / "metadata.csv").write_text("\r\n".join(rows) + "\r\n")
    again = dataclasses.replace(
        config, captions=str(tmp_path / "metadata.csv"), output=str(tmp_path / "again")
    )
    assert read_corpus(build_corpus(again).url) == built
    (tmp_path / "broken.jsonl").write_text('{"file_name": "a.webp"}\n')
    with pytest.raises(ValueError, match="row 0: .* needs file_name, and text or caption"):
        build_corpus(
            dataclasses.replace(
                config, captions=str(tmp_path / "broken.jsonl"), output=str(tmp_path / "broken")
            )
        )


def test_animated_emoji_become_clips(tmp_path: Path) -> None:
    source, names = clips(tmp_path / "clips")
    config = BuildConfig(
        input="videos",
        sources=(str(source),),
        output=str(tmp_path / "out"),
        captions=table(tmp_path / "metadata.jsonl", names, most=30),
        image=ImageConfig(min_side=16),
        video=VideoConfig(min_seconds=0.5),
    )
    report = build_corpus(config)
    assert (report.kind, report.samples >= 3) == ("video", True)
    assert report.tally.documents["length outside 0.5 to 600 s"] >= 1, "still ones"
    for members in read_corpus(report.url).values():
        assert getattr(Image.open(BytesIO(members["webp"])), "n_frames", 1) > 1
    training_reads(report, frames=4)


def test_frames_of_a_clip_become_the_clip(tmp_path: Path) -> None:
    """An animation taken apart into numbered frames, as the command's `frames` reads them."""
    source, names = clips(tmp_path / "clips")
    animated = [
        name
        for name in list(names)[:30]
        if getattr(Image.open(source / name), "n_frames", 1) > 1  # type: ignore[arg-type]
    ][:2]
    for name in animated:
        folder = tmp_path / "frames" / Path(name).stem
        folder.mkdir(parents=True)
        with Image.open(source / name) as clip:
            for number in range(min(12, clip.n_frames)):  # type: ignore[attr-defined]
                clip.seek(number)
                clip.convert("RGB").save(folder / f"{number}.png")
        (folder / "caption.txt").write_text(names[name])
    config = BuildConfig(
        input="frames",
        sources=(str(tmp_path / "frames"),),
        output=str(tmp_path / "out"),
        image=ImageConfig(min_side=16),
    )
    report = build_corpus(config)
    assert (report.samples, report.kind) == (2, "video")
    assert sorted(m["txt"].decode() for m in read_corpus(report.url).values()) == sorted(
        names[name] for name in animated
    )
    training_reads(report, frames=4)
