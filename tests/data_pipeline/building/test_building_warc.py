"""Real web archives, written by warcio: pages with images from the archive's own records."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_pipeline.building.config import HtmlConfig, ImageConfig
from tests.data_pipeline.building.building_material import (
    build,
    documents,
    english,
    files,
    page,
    picture,
    plain_picture,
    read_corpus,
)

HTML = "text/html; charset=utf-8"


def response(
    writer: WARCWriter,
    url: str,
    body: bytes,
    content_type: str = "image/png",
    status: str = "200 OK",
    headers: Sequence[tuple[str, str]] = (),
) -> None:
    lines = StatusAndHeaders(status, [("Content-Type", content_type), *headers], protocol="HTTP/1.1")
    writer.write_record(
        writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=lines)
    )


def write_warc(path: Path, *, gzip: bool = True, pages: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=gzip)
        writer.write_record(writer.create_warcinfo_record(path.name, {"software": "test"}))
        for number in range(pages):
            html = page(english(number), f"<img src='/img/{number}.png#x'>", english(50 + number, 3))
            # An image may stand before its page or after it.
            if number % 2:
                response(writer, f"http://site.org/img/{number}.png", picture(number))
            response(writer, f"https://site.org/p/{number}.html", html.encode(), HTML)
            if not number % 2:
                response(writer, f"https://site.org/img/{number}.png", picture(number))
        request = StatusAndHeaders("GET / HTTP/1.1", [("Host", "site.org")], is_http_request=True)
        writer.write_record(writer.create_warc_record("https://site.org/", "request", http_headers=request))
    return path


@pytest.mark.parametrize("gzip", [True, False])
def test_pages_and_their_images_come_from_the_records(tmp_path: Path, gzip: bool) -> None:
    path = write_warc(tmp_path / "w" / ("a.warc.gz" if gzip else "a.warc"), gzip=gzip)
    report = build(tmp_path / "w", tmp_path / "out", input="warc")
    assert (report.samples, report.media) == (3, 3)
    corpus = read_corpus(tmp_path / "out")
    assert [m["0.png"] for m in corpus.values()] == [picture(n) for n in range(3)]
    assert [d["url"] for d in documents(tmp_path / "out")] == [
        f"https://site.org/p/{n}.html" for n in range(3)
    ]
    assert [i.get("text", "")[:20] for i in documents(tmp_path / "out")[0]["items"]] == [
        english(0)[:20],
        "",
        english(50, 3)[:20],
    ]
    assert next(iter(corpus)).startswith("site_org/p/0-")
    build(path, tmp_path / "one", input="warc")
    assert (tmp_path / "one" / "shard-000000.tar").read_bytes() == (
        tmp_path / "out" / "shard-000000.tar"
    ).read_bytes()


def body_of(tmp_path: Path, *tags: str, add: Any = lambda writer: None, **changes: Any) -> Any:
    """Build an archive of one page with some tags; returns report and members."""
    path = tmp_path / "w" / "a.warc.gz"
    path.parent.mkdir()
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        response(writer, "http://a.org/ok.png", picture(99))
        response(
            writer, "http://a.org/d/page.html", page(english(1), "<img src=/ok.png>", *tags).encode(), HTML
        )
        add(writer)
    report = build(tmp_path / "w", tmp_path / "out", input="warc", **changes)
    (members,) = read_corpus(tmp_path / "out").values()
    return report, [blob for extension, blob in members.items() if extension != "json"]


def test_images_that_the_archive_does_not_hold_are_never_fetched(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(1))

    def add(writer: WARCWriter) -> None:
        response(writer, "http://a.org/404.png", picture(2), status="404 Not Found")
        response(writer, "http://a.org/text.png", picture(3), "text/plain")
        response(writer, "http://a.org/plain.png", plain_picture())
        response(writer, "http://a.org/cut.png", picture(4)[:100])

    tags = [
        f'<img src="{src}">'
        for src in (
            "/404.png",
            "/text.png",
            "/plain.png",
            "/cut.png",
            f"file://{secret}",
            "http://127.0.0.1:9/x.png",
            "",
        )
    ]
    report, images = body_of(tmp_path, *tags, add=add)
    assert images == [picture(99)]
    assert report.tally.images == {
        "not in the sources": 4,
        "single colour": 1,
        "corrupt image": 1,
        "bad address": 1,
    }


def test_base_addresses_resources_revisits_and_encodings(tmp_path: Path) -> None:
    import gzip

    def add(writer: WARCWriter) -> None:
        response(writer, "http://cdn.org/x/rel.png", picture(1))
        resource = writer.create_warc_record(
            "http://cdn.org/res.png",
            "resource",
            payload=io.BytesIO(picture(2)),
            warc_content_type="image/png",
        )
        writer.write_record(resource)
        response(
            writer,
            "http://cdn.org/packed.png",
            gzip.compress(picture(3)),
            headers=[("Content-Encoding", "gzip")],
        )
        first = writer.create_warc_record(
            "http://cdn.org/first.png",
            "response",
            payload=io.BytesIO(picture(4)),
            http_headers=StatusAndHeaders("200 OK", [("Content-Type", "image/png")], protocol="HTTP/1.1"),
        )
        writer.write_record(first)
        again = writer.create_revisit_record(
            "http://cdn.org/again.png",
            first.rec_headers.get_header("WARC-Payload-Digest"),
            "http://cdn.org/first.png",
            "2026-01-01T00:00:00Z",
        )
        writer.write_record(again)

    tags = ["<base href='//cdn.org/x/'>", "<img src=rel.png>", "<img src=/res.png>", "<img src=/packed.png>"]
    tags += ["<img src=/again.png>", "<img src=http://a.org/ok.png>"]
    report, images = body_of(tmp_path, *tags, add=add)
    assert images == [picture(n) for n in (1, 2, 3, 4, 99)]
    assert report.tally.images == {"not in the sources": 1}, "/ok.png belongs to the base's host"


def test_bombs_in_records_are_cut_off(tmp_path: Path) -> None:
    import gzip

    def add(writer: WARCWriter) -> None:
        packed = gzip.compress(b"\0" * (1 << 24))
        response(writer, "http://a.org/bomb.png", packed, headers=[("Content-Encoding", "gzip")])
        response(writer, "http://a.org/big.html", packed, HTML, headers=[("Content-Encoding", "gzip")])

    report, _ = body_of(
        tmp_path,
        "<img src=/bomb.png>",
        add=add,
        html=HtmlConfig(max_bytes=1 << 16),
        image=ImageConfig(max_bytes=1 << 16),
    )
    assert report.tally.images == {"over 65536 bytes": 1}
    assert report.tally.documents == {"page too large": 1}


@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_a_damaged_archive_gives_what_stands_before_the_damage(tmp_path: Path, damage: str) -> None:
    whole = write_warc(tmp_path / "whole" / "b.warc.gz", pages=6).read_bytes()
    (tmp_path / "w").mkdir()
    place = len(whole) * 2 // 3
    broken = whole[:place] if damage == "cut" else whole[:place] + b"\xff" * 64 + whole[place + 64 :]
    (tmp_path / "w" / "b.warc.gz").write_bytes(broken)
    write_warc(tmp_path / "w" / "c.warc.gz", pages=1)
    report = build(tmp_path / "w", tmp_path / "out", input="warc")
    assert 2 <= report.samples - 1 < 6
    if damage == "garbled":
        assert (
            sum(report.tally.documents[c] for c in ("damaged archive", "damaged page", "no image left")) >= 1
        )


def test_a_file_that_is_no_archive_is_counted(tmp_path: Path) -> None:
    write_warc(tmp_path / "w" / "a.warc.gz")
    (tmp_path / "w" / "b.warc").write_bytes(b"<html>no archive</html>")
    report = build(tmp_path / "w", tmp_path / "out", input="warc")
    assert report.samples == 3
    assert report.tally.documents == {"damaged archive": 1}


def test_archives_are_parts_of_their_own(tmp_path: Path) -> None:
    write_warc(tmp_path / "w" / "a.warc.gz", pages=2)
    write_warc(tmp_path / "w" / "sub" / "b.warc.gz", pages=2)
    from data_pipeline.building.config import DedupConfig

    report = build(tmp_path / "w", tmp_path / "out", input="warc", dedup=DedupConfig(documents=False))
    assert report.samples == 4, "the same page in two archives has two keys"
    assert build(tmp_path / "w", tmp_path / "out2", input="warc").tally.documents == {
        "near-duplicate document": 2
    }
    assert files(tmp_path / "out2") != files(tmp_path / "out")
