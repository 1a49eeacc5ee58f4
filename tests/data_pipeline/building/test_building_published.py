"""OBELICS and MMC4 records as they are published, with images from local stores."""

import base64
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import MissingShardError
from data_pipeline.shards import ShardWriter
from tests.data_pipeline.building.building_material import build, documents, english, picture, read_corpus


def mirror(folder: Path, count: int = 6) -> Path:
    """Images as `wget -x` leaves them."""
    (folder / "img.org" / "a").mkdir(parents=True)
    for number in range(count):
        (folder / "img.org" / "a" / f"{number}.png").write_bytes(picture(number))
    return folder


def obelics_row(number: int) -> dict[str, Any]:
    return {
        "images": [None, f"https://img.org/a/{number}.png", None, "https://img.org/a/gone.png"],
        "texts": [english(number), None, english(100 + number, 3), None],
        "metadata": json.dumps([None, {"document_url": "x"}, None, None]),
        "general_metadata": json.dumps({"url": f"http://page.org/{number}.html", "warc_filename": "w"}),
    }


def mmc4_row(number: int) -> dict[str, Any]:
    sentences = english(number).split(". ")
    infos = [
        {
            "image_name": f"a{number}.png",
            "raw_url": "http://x.org/y.png",
            "matched_text_index": 1,
            "matched_sim": 0.3,
        },
        {
            "image_name": "low.png",
            "raw_url": "http://x.org/l.png",
            "matched_text_index": 2,
            "matched_sim": 0.1,
        },
        {
            "image_name": "gone.png",
            "raw_url": "http://x.org/g.png",
            "matched_text_index": 2,
            "matched_sim": 0.5,
        },
    ]
    return {"url": f"http://page.org/{number}", "text_list": sentences, "image_info": infos}


def test_obelics_as_json_lines_and_as_parquet(tmp_path: Path) -> None:
    store = str(mirror(tmp_path / "store"))
    rows = [obelics_row(n) for n in range(5)]
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "p").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / "rows.parquet", row_group_size=2)
    report = build(tmp_path / "j", tmp_path / "outj", input="obelics", images=(store,))
    build(tmp_path / "p", tmp_path / "outp", input="obelics", images=(store,))
    assert documents(tmp_path / "outj") == documents(tmp_path / "outp")
    assert (report.samples, report.media) == (5, 5)
    assert report.tally.images == {"not in the sources": 5}
    document = documents(tmp_path / "outj")[3]
    assert document["url"] == "http://page.org/3.html"
    assert document["items"] == [{"text": english(3)}, {"image": "0.png"}, {"text": english(103, 3)}]
    assert next(iter(read_corpus(tmp_path / "outj"))).startswith("page_org/0_html-")


def test_obelics_with_images_in_the_record(tmp_path: Path) -> None:
    row = {"texts": [english(1), None], "images": [None, {"bytes": picture(1), "path": "a.png"}]}
    (tmp_path / "p").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p" / "rows.parquet")
    build(tmp_path / "p", tmp_path / "out", input="obelics")
    (members,) = read_corpus(tmp_path / "out").values()
    assert members["0.png"] == picture(1)


@pytest.mark.parametrize("packing", ["jsonl", "jsonl.gz", "jsonl.zip"])
def test_mmc4_in_the_packings_it_is_published_in(tmp_path: Path, packing: str) -> None:
    store = tmp_path / "store"
    store.mkdir()
    for number in range(3):
        (store / f"a{number}.png").write_bytes(picture(number))
    (store / "low.png").write_bytes(picture(50))
    text = "\n".join(json.dumps(mmc4_row(n)) for n in range(3)).encode()
    (tmp_path / "m").mkdir()
    target = tmp_path / "m" / f"docs_no_face_shard_0_v2.{packing}"
    if packing == "jsonl.zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("docs_no_face_shard_0_v2.jsonl", text)
    else:
        target.write_bytes(gzip.compress(text, mtime=0) if packing.endswith("gz") else text)
    report = build(tmp_path / "m", tmp_path / "out", input="mmc4", images=(str(store),), min_similarity=0.24)
    assert (report.samples, report.media) == (3, 3)
    assert report.tally.images == {"similarity under 0.24": 3, "not in the sources": 3}
    assert report.tally.counts["images read"] == 9
    sentences = english(1).split(". ")
    assert documents(tmp_path / "out")[1]["items"] == [
        {"text": sentences[0]},
        {"image": "0.png"},
        {"text": f"{sentences[1]}\n\n{' '.join(sentences[2:])}"},
    ]
    both = build(tmp_path / "m", tmp_path / "all", input="mmc4", images=(str(store),))
    assert both.media == 6


def test_mmc4_with_images_in_the_record(tmp_path: Path) -> None:
    row = mmc4_row(0)
    row["image_info"] = [
        {"image_base64": base64.b64encode(picture(7)).decode(), "matched_text_index": 0, "matched_sim": 0.4},
        {"image_base64": "%%%", "matched_text_index": 0, "matched_sim": 0.4},
    ]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.jsonl").write_text(json.dumps(row))
    report = build(tmp_path / "m", tmp_path / "out", input="mmc4")
    (members,) = read_corpus(tmp_path / "out").values()
    assert members["0.png"] == picture(7)
    assert sum(report.tally.images.values()) == 1


def test_images_from_tars_that_img2dataset_wrote(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "store"), "%05d.tar") as writer:
        for number in range(5):
            url = f"https://img.org/a/{number}.png"
            meta = {"url": url, "key": f"{number:09d}", "status": "success"}
            writer.write(
                f"{number:09d}", {"jpg": picture(number, form="JPEG"), "json": json.dumps(meta).encode()}
            )
        writer.write("bad", {"jpg": b"", "json": b"{"})
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "rows.jsonl").write_text("\n".join(json.dumps(obelics_row(n)) for n in range(5)))
    report = build(tmp_path / "j", tmp_path / "out", input="obelics", images=(str(tmp_path / "store"),))
    assert report.media == 5
    assert next(iter(read_corpus(tmp_path / "out").values()))["0.jpg"] == picture(0, form="JPEG")


def test_broken_records_are_counted_and_passed_over(tmp_path: Path) -> None:
    store = str(mirror(tmp_path / "store"))
    lines = [
        json.dumps(obelics_row(0)),
        "{",
        "[1, 2]",
        json.dumps({"texts": ["a"], "images": []}),
        json.dumps({"texts": None, "images": None}),
        json.dumps({}),
        "[" * 100_000,
        "",
        json.dumps(
            {**obelics_row(1), "images": [None, "https://img.org/../../secret.png", 7, {"bytes": None}]}
        ),
        json.dumps({**obelics_row(2), "general_metadata": "{"}),
    ]
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "a.jsonl").write_text("\n".join(lines))
    report = build(tmp_path / "j", tmp_path / "out", input="obelics", images=(store,))
    assert report.samples == 2
    assert report.tally.documents == {"broken record": 6, "no image left": 1}
    assert report.tally.images["path traversal"] == 1
    assert report.tally.images["bad address"] == 2


def test_a_cut_file_gives_what_stands_before_the_cut(tmp_path: Path) -> None:
    store = str(mirror(tmp_path / "store"))
    buffer = io.BytesIO()
    for number in range(6):
        buffer.write(gzip.compress((json.dumps(obelics_row(number)) + "\n").encode()))
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "a.jsonl.gz").write_bytes(buffer.getvalue()[:-200])
    report = build(tmp_path / "j", tmp_path / "out", input="obelics", images=(store,))
    assert report.samples == 5
    assert report.tally.documents == {"damaged file": 1}


def test_mmc4_indices_beyond_the_text_are_broken(tmp_path: Path) -> None:
    row = mmc4_row(0)
    row["image_info"][0]["matched_text_index"] = 99
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="'broken record': 1"):
        build(tmp_path / "m", tmp_path / "out", input="mmc4")


def test_stores_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "a.jsonl").write_text(json.dumps(obelics_row(0)))
    with pytest.raises((MissingShardError, FileNotFoundError)):
        build(tmp_path / "j", tmp_path / "out", input="obelics", images=(str(tmp_path / "none"),))
