"""Folders laid out as the fetched packages are, with drawn pictures in them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.demo import sources
from jobs.demo.fetch import STAMP, Parts, find_parts

CODES = [f"1f4{i:02x}" for i in range(60)]
"""Emoji with a picture in both training styles and in the unseen one."""
PAGES = 40


def picture(seed: int, size: tuple[int, int] = (40, 40), form: str = "PNG", mode: str = "RGBA") -> bytes:
    buffer = io.BytesIO()
    # Noise does not compress: pictures over 60 pixels come out larger than an icon may be.
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise) if max(size) > 60 else Image.new("RGB", size, (seed % 256, 9, 7))
    image.convert(mode).save(buffer, form)
    return buffer.getvalue()


def clip(frames: int, seed: int) -> bytes:
    images = [Image.new("RGB", (24, 24), (9 * i % 256, seed % 256, 60)) for i in range(frames)]
    buffer = io.BytesIO()
    images[0].save(buffer, "WEBP", save_all=True, append_images=images[1:], duration=40, lossless=True)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_names(folder: Path) -> None:
    records = [
        {"label": f"thing {i}", "hexcode": code.upper() + "-FE0F" * (i % 2), "tags": [f"thing {i}", "object"]}
        | {"group": 3 + i % 5}
        for i, code in enumerate(CODES)
    ]
    hand = {"label": "waving hand", "hexcode": "1F44B", "tags": ["hello"], "group": 1}
    hand["skins"] = [{"hexcode": "1F44B-1F3FB", "label": "waving hand: light skin tone"}]
    flag = {"label": "flag: Nowhere", "hexcode": "1F1E6-1F1E8", "tags": [], "group": 9}
    letter = {"label": "regional indicator A", "hexcode": "1F1E6"}
    for record in records:
        record.setdefault("skins", [])
    put(folder / "package/en/data.json", json.dumps([letter, *records, hand, flag]))


def write_style(folder: Path, suffix: str, codes: Sequence[str]) -> None:
    form = {".png": "PNG", ".webp": "WEBP"}[suffix]
    for i, code in enumerate([*codes, "1f44b", "1f1e6-1f1e8"]):
        put(folder / f"{code}{suffix}", picture(i, form=form))


def write_stamps(folder: Path) -> None:
    for i in range(50):
        put(folder / f"animals/beast{i}.png", picture(i))
        put(folder / f"animals/beast{i}.txt", f"A beast number {i // 2}.\nde.utf8=Ein Tier {i}.\n")
    put(folder / "animals/v1.5.png", picture(99))
    put(folder / "animals/v1.5.txt", "A  robot of  version one.\nde.utf8=Ein Roboter.\n")
    put(folder / "animals/drawn.txt", "A drawing.\n")
    put(folder / "animals/drawn.svg", "<svg/>")
    put(folder / "animals/nameless.png", picture(3))
    put(folder / "animals/nameless.txt", "de.utf8=Nichts.\n")
    put(folder / "symbols/letter.png", picture(4))
    put(folder / "symbols/letter.txt", "The letter A.\n")
    # Every concept is mentioned, so that those of held-out concepts are met.
    for i in range(len(CODES)):
        put(folder / f"toys/toy{i}.png", picture(i))
        put(folder / f"toys/toy{i}.txt", f"A red Thing {i}!\n")


def page(number: int) -> str:
    figure = '<div class="mediaobject"><img src="images/{}.png" alt="a figure"/><p>Caption {}</p></div>'
    body = "".join(figure.format(name, number) for name in (f"fig{number}", "small", "wide", "gone"))
    return f"""<?xml version="1.0"?><html><head><title>Not text</title><style>p {{}}</style></head><body>
        <div class="navheader"><table><tr><th>Nav {number}</th></tr></table>
        <img src="images/prev.png" alt="Prev"/><hr /></div>
        <h1>Page   {number}</h1><p>See <b>one</b>
        line.<br/>And &amp; another.</p>{body if number % 4 else ""}<p>The end.</p>
        <div class="navfooter">Up</div></body></html>"""


def write_manual(folder: Path) -> None:
    put(folder / "images/prev.png", picture(0, (80, 80)))
    put(folder / "images/small.png", picture(0, (8, 8)))
    put(folder / "images/wide.png", picture(0, (400, 100), mode="RGB"))
    for number in range(PAGES):
        put(folder / f"page.{number}.html", page(number))
        put(folder / f"images/fig{number}.png", picture(number, (90, 80), mode="RGB"))


def write_clips(folder: Path) -> None:
    for i, code in enumerate(CODES):
        put(folder / f"{code}.webp", clip(1 if i % 5 == 0 else 6, i))
    for code in ("1f44b", "1f44b-1f3fb", "1f1e6-1f1e8", "ffff"):
        put(folder / f"{code}.webp", clip(6, 200))


def write_parts(cache: Path, names: Sequence[str] | None = None) -> Parts:
    """Fill `cache` with generated stand-ins of the data packages, all or those named."""
    writers = {
        sources.EMOJI_NAMES: write_names,
        sources.EMOJI_FLUENT: lambda f: write_style(f / "package/assets", ".webp", CODES),
        sources.EMOJI_ONE: lambda f: write_style(f / "gem/assets/png", ".png", CODES[:-4]),
        sources.EMOJI_GOOGLE: lambda f: write_style(f / "package/img/google/64", ".png", CODES),
        sources.STAMPS: lambda f: write_stamps(f / "usr/share/tuxpaint/stamps"),
        sources.MANUAL: lambda f: write_manual(f / "usr/share/gimp/2.0/help/en"),
        sources.EMOJI_CLIPS: lambda f: write_clips(f / "package/assets"),
    }
    for name, write in writers.items():
        if names is not None and name not in names:
            continue
        entry = sources.source(name)
        folder = cache / "parts" / (f"{entry.slug}-{entry.version}" if entry.version else entry.slug)
        write(folder)
        stamp = {"name": name, "version": entry.version or "1-1", "sha256": entry.sha256 or "0" * 64}
        stamp |= {"archive_bytes": 1, "files": 1, "seconds": 0.0, "keep": list(entry.keep)}
        put(folder / STAMP, json.dumps(stamp))
    return find_parts(cache)
