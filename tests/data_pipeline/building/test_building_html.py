"""Pages to interleaved documents: reading order, references, hostile pages, every byte from the tree."""

import base64
import json
import os
from pathlib import Path

import pytest

from data_pipeline.building.config import HtmlConfig
from data_pipeline.building.html import decode_page, read_page
from data_pipeline.errors import BadSampleError, MissingShardError
from data_pipeline.formatting import ImageItem, parse_document
from data_pipeline.samples import SampleLoader
from tests.data_pipeline.building.building_material import (
    build,
    documents,
    english,
    files,
    page,
    picture,
    plain_picture,
    read_corpus,
    write_tree,
)

HTML = HtmlConfig()


def items(html: str) -> list[str | tuple[str, str]]:
    return read_page(html, HTML).items


def test_text_and_images_come_in_reading_order() -> None:
    found = items(
        """<body><h1>Head</h1><p>One <b>bold</b>
        word.</p><p>Two<img src=a.png alt=" a  cat ">three</p><ul><li>x</li><li>y</li></ul>
        <table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table><pre>k
  v</pre></body>"""
    )
    assert found == [
        "Head\n\nOne bold word.\n\nTwo",
        ("a.png", "a cat"),
        "three\n\nx\ny\n\n1 2\n3\n\nk\nv",
    ]


def test_what_is_no_content_is_left_out() -> None:
    found = items(
        """<body><nav>menu <img src=m.png></nav><script>evil()</script><style>p{}</style><p>a</p>
        <div class="NavHeader x">up</div><div hidden>h</div><p style="display: none">n</p><!-- c -->
        <p aria-hidden="true">q</p><noscript><img src=n.png></noscript><template><p>t</p></template><p>b</p></body>"""
    )
    assert found == ["a\n\nb"]


def test_lazy_images_and_candidates() -> None:
    html = """<img data-src=l.jpg src="data:image/gif;base64,R0"><img srcset="s.png 1x, b.png 2x"><img alt=none>"""
    assert [i[0] for i in items(html) if isinstance(i, tuple)] == ["l.jpg", "b.png", ""]


def test_deep_pages_are_read_and_those_that_would_take_hours_refused() -> None:
    assert items("<div>" * 1_900 + "deep") == ["deep"]
    assert items("<p>one<br>" * 5_000 + "<ul>" + "<li>x" * 5_000)[0].startswith("one")
    with pytest.raises(BadSampleError, match="page too large"):  # the parser takes the square of the depth
        items("<div>" * 1_000_000 + "deep")
    with pytest.raises(BadSampleError, match="page too large"):
        read_page("<br>" * 200, HtmlConfig(max_nodes=100))


@pytest.mark.parametrize(
    ("blob", "charset", "text"),
    [
        ("\ufeffÄ".encode(), None, "Ä"),
        ("Ä".encode("utf-16"), None, "Ä"),
        ("Ä".encode("latin-1"), "ISO-8859-1", "Ä"),
        (b"<meta charset=windows-1251>" + "Ж".encode("cp1251"), None, "<meta charset=windows-1251>Ж"),
        ("Ä".encode(), "no-such-code", "Ä"),
        (b"\xc4 caf\xe9", None, "Ä café"),
        (b"AB", "zlib", "AB"),
    ],
)
def test_bytes_are_decoded_as_browsers_do(blob: bytes, charset: str | None, text: str) -> None:
    assert decode_page(blob, charset) == text


def test_a_tree_becomes_documents_that_training_reads(tmp_path: Path) -> None:
    report = build(write_tree(tmp_path / "tree"), tmp_path / "out")
    assert (report.samples, report.media, report.shards) == (6, 12, 2)
    corpus = read_corpus(tmp_path / "out")
    key, members = next(iter(corpus.items()))
    assert key.startswith("section0/page0-")
    parsed = parse_document(members["json"])
    assert [p if isinstance(p, ImageItem) else p[:7] for p in parsed] == [
        "Chapter",
        ImageItem("0.png"),
        english(100, 5)[:7],
        ImageItem("1.png"),
    ]
    assert members["0.png"] == picture(0), "images keep their bytes"
    from data_pipeline.config import DatasetConfig
    from data_pipeline.dataset import DatasetStream
    from data_pipeline.tokenizer import TokenizerConfig

    data = DatasetConfig(
        name="d",
        kind="interleaved",
        urls=(str(tmp_path / "out"),),
        batch_size=6,
        seq_len=64,
        max_media=2,
        image_size=32,
    )
    batch = DatasetStream(data, TokenizerConfig(), 0).batch(0)
    assert not batch.skips
    assert batch.media_mask_BM.any()
    assert SampleLoader


def test_references_stay_inside_the_tree(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    (root / "a").mkdir(parents=True)
    (root / "mirror.org" / "i").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(picture(1))
    (root / "ok.png").write_bytes(picture(2))
    (root / "a" / "sp ace.png").write_bytes(picture(3))
    (root / "mirror.org" / "i" / "m.png").write_bytes(picture(4))
    os.symlink(tmp_path / "secret.png", root / "link.png")
    inline = base64.b64encode(picture(5)).decode()
    sources = (
        *("../../secret.png", "..%2f..%2fsecret.png", "/../secret.png", "../link.png", "..\\..\\secret.png"),
        *(
            f"file://{tmp_path}/secret.png",
            f"{tmp_path}/secret.png",
            "http://elsewhere.org/x.png",
            "a\0b.png",
        ),
        *("http://[bad/x.png", "javascript:alert(1)", "", "x" * 5000 + ".png", "."),
        *("../ok.png", "/ok.png?v=2#top", "sp%20ace.png", "https://mirror.org/i/m.png"),
        f"data:image/png;base64,{inline}",
    )
    html = page(english(1), *(f'<img src="{s}">' for s in sources))
    (root / "a" / "page.html").write_text(html)
    report = build(root, tmp_path / "out")
    (members,) = read_corpus(tmp_path / "out").values()
    kept = [members[e] for e in members if e != "json"]
    assert kept == [picture(n) for n in (2, 3, 4, 5)], "the second reference to ok.png shares its file"
    assert json.loads(members["json"])["items"][1:3] == [{"image": "0.png"}, {"image": "0.png"}]
    assert report.tally.images == {
        "path traversal": 5,
        "bad address": 5,
        "remote image": 1,
        "not in the sources": 3,
    }


def test_images_are_filtered_and_texts_joined(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    bad = {
        "small.png": picture(1, (63, 90)),
        "long.png": picture(2, (400, 100)),
        "plain.png": plain_picture(),
        "cut.png": picture(3)[:200],
        "text.png": b"not an image",
        "tiff.png": picture(4, form="TIFF"),
    }
    for name, blob in {**bad, "ok.dat": picture(5, form="JPEG")}.items():
        (root / name).write_bytes(blob)
    tags = [f"<img src={name}>" for name in bad]
    (root / "p.html").write_text(page(english(1), *tags, english(2), "<img src=ok.dat>"))
    report = build(root, tmp_path / "out")
    (document,) = documents(tmp_path / "out")
    assert document["items"] == [{"text": f"{english(1)}\n\n{english(2)}"}, {"image": "0.jpg"}]
    assert report.tally.images == {
        "side under 64 pixels": 1,
        "aspect ratio over 3": 1,
        "single colour": 1,
        "corrupt image": 1,
        "no image of a known format": 2,
    }
    assert "long.png 400 x 100" in report.tally.examples["image: aspect ratio over 3"][0]


def test_documents_are_filtered_and_every_image_is_accounted_for(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", pages=3)
    image = "<img src=section0/images/p0-0.png>"
    (root / "de.html").write_text(
        page("Der alte Mann ging langsam durch den Wald und sah die Vögel. " * 9, image)
    )
    (root / "short.html").write_text(page("The end of it and that is all.", image))
    (root / "bare.html").write_text(page(english(7)))
    (root / "gone.html").write_text(page(english(8), "<img src=gone.png>"))
    (root / "empty.html").write_text("")
    (root / "again.html").write_text(page(*[english(9, 3)] * 6, image))
    (root / "copy.html").write_bytes(
        (root / "section0" / "page0.html").read_bytes().replace(b"images/", b"section0/images/")
    )
    report = build(root, tmp_path / "out", samples_per_part=3)
    assert dict(report.tally.documents) == {
        "language": 1,
        "under 50 words": 1,
        "no image left": 2,
        "no text": 1,
        "repetition: line": 1,
        "near-duplicate document": 1,
    }
    assert report.samples == 3
    counts = report.tally.counts
    assert counts["read"] == 10
    assert counts["images read"] == (
        counts["images kept"]
        + counts["images repeated in a document"]
        + counts["images of documents left out for their text"]
        + sum(report.tally.images.values())
    )
    stored = json.loads((tmp_path / "out" / "build.json").read_text())
    assert stored["documents"] == dict(sorted(report.tally.documents.items()))
    assert stored["samples"] == 3


def test_oversized_pages_and_images_are_refused_unread(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", pages=2)
    (root / "big.html").write_text(page(english(3)) + " " * 100_000)
    (root / "section0" / "images" / "p0-0.png").write_bytes(picture(0) + b"\0" * 200_000)
    from data_pipeline.building.config import ImageConfig

    report = build(
        root,
        tmp_path / "out",
        html=HtmlConfig(max_bytes=50_000),
        image=ImageConfig(max_bytes=100_000, max_pixels=96 * 80),
    )
    assert report.tally.documents == {"page too large": 1}
    assert report.tally.images == {"over 100000 bytes": 1}
    (root / "section0" / "images" / "p0-0.png").write_bytes(picture(0, (97, 80)))
    again = build(root, tmp_path / "out2", image=ImageConfig(max_pixels=96 * 80))
    assert again.tally.images == {"too many pixels": 1}


def test_a_tree_on_another_file_system(tmp_path: Path) -> None:
    import fsspec

    local = write_tree(tmp_path / "tree", pages=2)
    memory = fsspec.filesystem("memory")
    for name, blob in files(local).items():
        memory.pipe_file(f"/tree-a/{name}", blob)
    memory.pipe_file("/secret.png", picture(50))
    from data_pipeline.building.corpus import build_corpus
    from data_pipeline.building.storage import Folder
    from tests.data_pipeline.building.building_material import config

    for way_out in ("../secret.png", "x/../../secret.png", "/secret.png", ".."):
        with pytest.raises(BadSampleError, match="path traversal"):
            Folder("memory://tree-a").read(way_out, 1 << 20)
    assert Folder("memory://tree-a").read("section0/../section0/images/p0-0.png", 1 << 20) == picture(0)
    build_corpus(config("memory://tree-a", "memory://out-a"))
    build(local, tmp_path / "out")
    here = files(tmp_path / "out")
    for name in ("shard-000000.tar", "shard-000000.idx.json", "index.json"):
        assert memory.cat_file(f"/out-a/{name}") == here[name], "keys do not depend on where the sources lie"
    assert not memory.exists("/out-a/.build")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingShardError, match="no such file or folder"):
        build(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a.txt").write_text("x")
    with pytest.raises(MissingShardError, match="holds nothing that input 'html' reads"):
        build(tmp_path / "tree", tmp_path / "out")
