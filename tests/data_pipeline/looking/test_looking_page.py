"""The page that shows samples, and the summary of a corpus."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batch import Batch
from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.errors import MissingShardError
from data_pipeline.index import open_index
from data_pipeline.looking.render import PageInfo, render_page
from data_pipeline.looking.summary import class_name, guess_kind, summarise
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import Tokenizer
from tests.data_pipeline.building.building_material import picture
from tests.data_pipeline.corpora import C, S, clip_mp4, clip_webp, features

BYTES = Tokenizer.bytes_level()
HOSTILE = "<script>alert('x')</script>"


def write_documents(folder: Path) -> str:
    items = [
        {"text": f"ab {HOSTILE}"},
        {"image": "0.png"},
        {"text": "cd é"},
        {"image": "1.png"},
        {"text": "e"},
    ]
    with ShardWriter(str(folder), max_samples=2) as writer:
        for number in range(3):
            members = {"0.png": picture(number), "1.png": picture(10 + number)}
            writer.write(f"doc{number}", {"json": json.dumps({"items": items}).encode(), **members})
        writer.write(
            "cut", {"json": json.dumps({"items": items}).encode(), "0.png": picture(1)[:60], "1.png": b""}
        )
    return str(folder)


def config(url: str, **changes: object) -> DatasetConfig:
    given = {
        "kind": "interleaved",
        "batch_size": 4,
        "mode": "eval",
        "seq_len": 80,
        "max_media": 2,
        "image_size": 32,
    }
    return DatasetConfig(name="d", urls=(url,), **(given | changes))  # type: ignore[arg-type]


class Tokens(HTMLParser):
    """Reads the tokens of a page back."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if "title" in given:
            self.tokens.append((given["class"] or "", given["title"] or ""))
        if tag == "img":
            self.images.append(given["src"] or "")


def test_every_token_shows_what_it_sees_and_whether_it_carries_loss(tmp_path: Path) -> None:
    stream = DatasetStream(config(write_documents(tmp_path / "docs")), BYTES, 0)
    batch = stream.batch(0)
    page = render_page(PageInfo(title=HOSTILE, facts={"kind": "x"}), [batch], BYTES)
    assert HOSTILE not in page, "hostile text is escaped"
    assert "<script" not in page
    assert "><</span>" not in page
    assert "&lt;</span>" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=(?!\"data:image/jpeg;base64,)", page), (
        "nothing is loaded from elsewhere"
    )
    read = Tokens()
    read.feed(page)
    lengths = [int(np.flatnonzero(batch.tokens_BT[b] != BYTES.pad_id)[-1]) + 1 for b in range(3)]
    assert len(read.tokens) == sum(lengths)
    for place in range(lengths[0]):
        classes, title = read.tokens[place]
        phi, loss = int(batch.media_index_BT[0, place]), bool(batch.loss_mask_BT[0, place])
        assert title == (
            f"position {place}, id {batch.tokens_BT[0, place]}, sees {f'image {phi}' if phi else 'no image'}, "
            f"{'loss' if loss else 'no loss'}"
        )
        assert (f"s{phi}" in classes.split()) == bool(phi)
        assert ("loss" in classes.split()) == loss
    assert len(read.images) == 6, "two images of three samples, each once and in place"
    assert page.index("data:image/jpeg") > page.index("ab"[0])
    assert "skipped" in page
    assert "corrupt image" in page


def test_pieces_of_characters_and_special_tokens_are_shown(tmp_path: Path) -> None:
    stream = DatasetStream(config(write_documents(tmp_path / "docs")), BYTES, 0)
    page = unescape(render_page(PageInfo(title="t", facts={}), [stream.batch(0)], BYTES))
    for name in ("<image>", "<EOC>", "<BOS>", "c3", "a9"):
        assert f"<span class=special>{name}</span>" in page


def test_features_and_clips_are_shown(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "f")) as writer:
        writer.write("a", {"npy": features(3), "txt": b"a feature"})
    with ShardWriter(str(tmp_path / "v")) as writer:
        writer.write("a", {"mp4": clip_mp4(20), "txt": b"a clip"})
    pair = config(
        str(tmp_path / "f"), kind="pair", batch_size=1, max_media=1, media="features", num_features=S, width=C
    )
    clip = config(str(tmp_path / "v"), kind="video", batch_size=1, max_media=1, frames=4, video_fps=None)
    page = render_page(PageInfo(title="t", facts={}), [DatasetStream(pair, BYTES, 0).batch(0)], BYTES)
    assert f"features [1, {S}, {C}]" in page
    assert page.count("data:image/jpeg") == 1
    page = render_page(PageInfo(title="t", facts={}), [DatasetStream(clip, BYTES, 0).batch(0)], BYTES)
    assert page.count("data:image/jpeg") == 4


def test_a_padding_id_that_carries_loss_is_shown() -> None:
    tokenizer = Tokenizer(None, vocab_size=300, bos_id=256, eos_id=257, pad_id=257)
    batch = Batch(
        tokens_BT=np.array([[256, 65, 257, 257]]),
        loss_mask_BT=np.array([[False, True, True, False]]),
        media_index_BT=np.zeros((1, 4), np.int32),
        media=np.zeros((1, 1, 1, 3, 8, 8), np.uint8),
        media_mask_BM=np.zeros((1, 1), np.bool_),
        keys=("k",),
    )
    page = render_page(PageInfo(title="t", facts={}), [batch], tokenizer)
    assert page.count("title=") == 3
    assert "3 tokens, 2 with loss, 3 that see no image, 1 of padding, 0 media" in page


def test_a_summary_counts_what_is_there_and_what_is_broken(tmp_path: Path) -> None:
    url = write_documents(tmp_path / "docs")
    with ShardWriter(f"{url}/more") as writer:
        writer.write("x", {"json": b"{", "0.png": picture(1)})
        writer.write("y", {"json": b'{"items": [{"image": "9.png"}, {"text": "one two three"}]}'})
    summary = summarise([url, f"{url}/more"])
    assert (summary.kind, summary.shards, summary.samples, summary.checked) == ("interleaved", 3, 6, 6)
    assert dict(summary.broken) == {"corrupt image": 1, "bad document": 1, "missing member": 1}
    stored = summary.to_json()
    assert stored["media"] == {"1": 1, "2": 4}
    assert stored["words"] == {"2-3": 1, "4-7": 4}
    assert stored["members"] == {"json": 6, "png": 9}
    assert stored["sides"]["64-127"] == 7, "the header of the cut image can be read"
    assert "cut" in summary.examples["corrupt image"][0]
    json.dumps(stored)
    assert dict(summarise([url], check="none").broken) == {}
    assert summarise([url], limit=1).checked == 2
    assert dict(summarise([url], check="decode").broken) == {"corrupt image": 1}


def test_only_decoding_finds_an_image_that_is_cut(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "p")) as writer:
        writer.write("ok", {"png": picture(1), "txt": b"one"})
        writer.write("cut", {"png": picture(2)[:-400], "txt": b"two"})
        writer.write("mute", {"png": picture(3), "txt": b" "})
    assert dict(summarise([str(tmp_path / "p")]).broken) == {"empty caption": 1}
    summary = summarise([str(tmp_path / "p")], check="decode")
    assert dict(summary.broken) == {"empty caption": 1, "corrupt image": 1}
    assert (summary.kind, dict(summary.media)) == ("pair", {1: 2})


def test_clips_are_summed_up(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "v")) as writer:
        writer.write("a", {"mp4": clip_mp4(10), "txt": b"walks"})
        writer.write("b", {"webp": clip_webp(3), "json": b'{"captions": ["runs far"]}'})
        writer.write("c", {"mp4": b"no", "txt": b"none"})
    assert guess_kind(open_index([str(tmp_path / "v")])) == "video"
    summary = summarise([str(tmp_path / "v")], check="decode")
    assert dict(summary.broken) == {"corrupt video": 1}
    assert summary.total_words == 4


def test_what_cannot_be_summed_up(tmp_path: Path) -> None:
    with pytest.raises(MissingShardError):
        summarise([str(tmp_path / "none")])
    with ShardWriter(str(tmp_path / "t")) as writer:
        writer.write("a", {"txt": b"text alone"})
    with pytest.raises(ValueError, match="give --kind"):
        summarise([str(tmp_path / "t")])
    assert dict(summarise([str(tmp_path / "t")], kind="pair").broken) == {"missing member": 1}


@pytest.mark.parametrize(("number", "name"), [(0, "0"), (1, "1"), (2, "2-3"), (3, "4-7"), (8, "128-255")])
def test_classes(number: int, name: str) -> None:
    assert class_name(number) == name
