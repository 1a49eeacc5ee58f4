"""Material for builds, made on the spot: English text, pictures that pass, pages, archives."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.building.config import BuildConfig
from data_pipeline.building.corpus import BuildReport, Runner, build_corpus, run_here
from data_pipeline.index import open_index
from data_pipeline.reading import SampleReader

_ADJECTIVES_TEXT = (
    "old young careful broken wooden quiet orange northern ripe dark bright heavy narrow famous gentle empty "
    "golden rusty curious tall frozen crowded simple distant clever dusty noisy patient modern ancient shallow"
)
_NOUNS_TEXT = (
    "fisherman engineer neighbour museum gardener train painter baker teacher lighthouse boat clock kite map "
    "basket letter engine field recipe lamp bridge photograph harbour market storm mountain kitchen window "
    "library violin station village island forest castle farmer doctor captain river garden horse ladder"
)
_VERBS_TEXT = (
    "watched repaired described carried discovered remembered sketched borrowed returned polished measured "
    "forgot admired followed collected painted opened visited explained lifted guarded noticed moved found"
)
_ADJECTIVES, _NOUNS, _VERBS = (t.split() for t in (_ADJECTIVES_TEXT, _NOUNS_TEXT, _VERBS_TEXT))
_JOINTS = ("before", "while", "because", "although", "after", "until", "and then", "but")


def english(seed: int, sentences: int = 8) -> str:
    """English that passes every rule of quality and repetition."""
    rng = random.Random(seed)

    def clause() -> str:
        things = [f"the {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}" for _ in range(3)]
        return f"{things[0]} {rng.choice(_VERBS)} {things[1]} with {things[2]}"

    made = [f"{clause()} {rng.choice(_JOINTS)} {clause()}." for _ in range(sentences)]
    return " ".join(sentence.capitalize() for sentence in made)


def picture(seed: int, size: tuple[int, int] = (96, 80), form: str = "PNG", **options: Any) -> bytes:
    """A picture with large coloured shapes that depend on the seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, form, **options)
    return buffer.getvalue()


def plain_picture(colour: tuple[int, int, int] = (10, 200, 30), size: tuple[int, int] = (96, 80)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def page(*parts: str, title: str = "A page") -> str:
    """A page; a part that begins with `<` is taken as it is, any other becomes a paragraph."""
    body = "\n".join(part if part.startswith("<") else f"<p>{part}</p>" for part in parts)
    return f"<!doctype html><html><head><meta charset='utf-8'><title>{title}</title></head><body>{body}</body></html>"


def write_tree(root: Path, pages: int = 6) -> Path:
    """A folder of pages with two pictures each."""
    for number in range(pages):
        folder = root / f"section{number % 2}"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for place in range(2):
            (folder / "images" / f"p{number}-{place}.png").write_bytes(picture(10 * number + place))
        html = page(
            "<h1>Chapter</h1>",
            english(number),
            f"<img src='images/p{number}-0.png' alt='first'>",
            english(100 + number, 5),
            f"<img src='images/p{number}-1.png'>",
        )
        (folder / f"page{number}.html").write_text(html)
    return root


def config(source: Path | str, output: Path | str, **changes: Any) -> BuildConfig:
    given: dict[str, Any] = {"input": "html", "samples_per_part": 2, "samples_per_shard": 4}
    return BuildConfig(sources=(str(source),), output=str(output), **(given | changes))


def build(source: Path, output: Path, run: Runner = run_here, **changes: Any) -> BuildReport:
    return build_corpus(config(source, output, **changes), run)


def read_corpus(url: str | Path) -> dict[str, dict[str, bytes]]:
    """All samples of a corpus, by key in its order."""
    index = open_index([str(url)])
    found = {}
    for number, entry in enumerate(index.entries):
        for record in index.records(number):
            reader = SampleReader(entry.url, record, max_bytes=1 << 30)
            assert record.key not in found, f"key {record.key} twice"
            found[record.key] = {extension: reader.get(extension) for extension in record.members}
    return found


def documents(url: str | Path) -> list[dict[str, Any]]:
    """The records of an interleaved corpus."""
    return [json.loads(members["json"]) for members in read_corpus(url).values()]


def files(folder: Path) -> dict[str, bytes]:
    """All bytes of a folder but the report's configuration, which names the folder of the sources."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
