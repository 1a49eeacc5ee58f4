"""Corpora built from generated packages: what goes where, what is dropped, and that nothing leaks."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from PIL import Image

from data_pipeline.index import open_index
from jobs.demo import sources
from jobs.demo.corpora import REPORT, Corpora, CorporaConfig, build_corpora
from jobs.demo.emoji import Concept
from jobs.demo.fetch import find_parts
from jobs.demo.manual import PageImage, PageText, read_page
from jobs.demo.samples import mentions, share
from tests.jobs.demo.package_folders import CODES, PAGES, write_parts

CONFIG = CorporaConfig(heldout_fraction=0.2, heldout_clip_fraction=0.3, samples_per_shard=16)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return build_corpora(write_parts(tmp_path_factory.mktemp("cache")), CONFIG)


def read(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and members of a data set, through the index."""
    index = open_index([url])
    for number, entry in enumerate(index.entries):
        with open(entry.url, "rb") as file:
            for record in index.records(number):
                yield record.key, {e: _bytes(file, m.offset, m.size) for e, m in record.members.items()}


def _bytes(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def captions(corpora: Corpora, name: str) -> set[str]:
    return {members["txt"].decode() for _, members in read(corpora.url(name))}


def test_counts_of_every_data_set(corpora: Corpora) -> None:
    held = sum(share("concept", code) < 0.2 for code in CODES)
    held_one = sum(share("concept", code) < 0.2 for code in CODES[:-4])
    datasets = corpora.datasets
    assert datasets["pairs_heldout_concepts"].samples == 2 * held + held_one
    assert datasets["pairs_unseen_style"].samples == len(CODES) - held
    pages_with_pictures = sum(number % 4 != 0 for number in range(PAGES))
    assert datasets["documents"].samples + datasets["documents_heldout"].samples == pages_with_pictures
    for name, entry in datasets.items():
        assert entry.samples == sum(1 for _ in read(corpora.url(name))), name
        assert entry.samples > 0, name


def test_drops_are_counted_by_cause(corpora: Corpora) -> None:
    pairs, documents = corpora.datasets["pairs"].dropped, corpora.datasets["documents"].dropped
    assert pairs["emojione does not draw it"] == 4
    assert pairs["symbol, letter or number"] == 1
    assert pairs["drawn as SVG, for which there is no rasteriser"] == 1
    assert pairs["no caption"] == 1
    assert pairs["shows a held-out concept"] >= 1
    assert "image: navigation" not in documents, "the page's header was skipped before it came to its images"
    for cause in ("under 2500 bytes", "longer than 3 times its width or height", "not in the package"):
        assert documents[f"image: {cause}"] == corpora.datasets["documents"].samples
    videos = corpora.datasets["videos"].dropped
    assert videos["flag"] + corpora.datasets["videos_heldout"].dropped.get("flag", 0) == 1
    assert videos["no name for its code"] == 1


def test_held_out_concepts_are_in_no_training_set(corpora: Corpora) -> None:
    held = captions(corpora, "pairs_heldout_concepts")
    trained = captions(corpora, "pairs")
    assert not held & (trained | captions(corpora, "pairs_unseen_style") | captions(corpora, "videos"))
    assert not any(mentions(caption, label) for caption in trained for label in held)
    assert captions(corpora, "pairs_unseen_style") <= trained, "an unseen style of seen concepts"
    assert not captions(corpora, "videos") & captions(corpora, "videos_heldout")


def test_a_caption_is_on_one_side_only(corpora: Corpora) -> None:
    held = captions(corpora, "pairs_heldout_stamps")
    assert held
    assert not held & captions(corpora, "pairs")


def test_styles_are_kept_apart(corpora: Corpora) -> None:
    styles = {key.split("/")[0] for key, _ in read(corpora.url("pairs"))}
    assert styles == {"fluent", "emojione", "stamp"}
    assert {key.split("/")[0] for key, _ in read(corpora.url("pairs_unseen_style"))} == {"google"}
    assert {k.split("/")[0] for k, _ in read(corpora.url("pairs_heldout_concepts"))} == {
        *("fluent", "emojione", "google")
    }


def test_pair_members(corpora: Corpora) -> None:
    pairs = dict(read(corpora.url("pairs")))
    key, members = next((k, m) for k, m in pairs.items() if k.startswith("fluent/"))
    number = CODES.index(key.removeprefix("fluent/"))
    assert members["txt"].decode() == f"thing {number}"
    assert json.loads(members["json"]) == {"captions": [f"thing {number}", f"thing {number}, object"]}
    assert Image.open(io.BytesIO(members["webp"])).size == (40, 40)
    robots = [m for k, m in pairs.items() if k == "stamp/animals/v1_5"]
    assert all(m["txt"] == b"A robot of version one." for m in robots)


def test_clips_are_animated_and_variants_carry_the_plain_name(corpora: Corpora) -> None:
    clips = dict(read(corpora.url("videos"))) | dict(read(corpora.url("videos_heldout")))
    assert all(Image.open(io.BytesIO(m["webp"])).n_frames == 6 for m in clips.values())
    assert {m["txt"] for k, m in clips.items() if k.startswith("clip/1f44b")} == {b"waving hand"}
    assert not any("1f3fb" in key for key, _ in read(corpora.url("videos_heldout")))


def test_document_members(corpora: Corpora) -> None:
    for key, members in read(corpora.url("documents")):
        number = key.removeprefix("manual/page_")
        items = json.loads(members["json"])["items"]
        assert items == [
            {"text": f"Page {number}\nSee one line.\nAnd & another."},
            {"image": "0.png"},
            {"text": f"Caption {number}\n" * 4 + "The end."},
        ]
        assert list(members) == ["json", "0.png"]


def test_same_parts_same_bytes_and_a_second_build_is_free(corpora: Corpora, tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    again = build_corpora(parts, CONFIG)
    assert again.folder.name == corpora.folder.name
    for path in sorted(corpora.folder.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (again.folder / path.relative_to(corpora.folder)).read_bytes(), path
    report = (again.folder / REPORT).stat().st_mtime_ns
    assert build_corpora(parts, CONFIG) == again
    assert (again.folder / REPORT).stat().st_mtime_ns == report
    other = build_corpora(parts, CorporaConfig())
    assert other.folder != again.folder


def test_an_unfinished_build_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, [sources.STAMPS])
    folder = build_corpora(parts, CONFIG).folder
    (folder / REPORT).unlink()
    assert build_corpora(parts, CONFIG).datasets["pairs"].samples > 0
    assert (folder / REPORT).exists()
    assert not list(folder.parent.glob(".*")), "nothing is left lying about"


def test_missing_parts_leave_their_data_sets_out(tmp_path: Path) -> None:
    corpora = build_corpora(write_parts(tmp_path, [sources.STAMPS, sources.EMOJI_GOOGLE]), CONFIG)
    assert set(corpora.datasets) == {"pairs", "pairs_heldout_stamps"}
    with pytest.raises(KeyError, match="no data set 'videos'; there are pairs, pairs_heldout_stamps"):
        corpora.url("videos")


def test_no_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="none of the parts holds training data"):
        build_corpora(find_parts(tmp_path), CONFIG)


def test_configuration_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="heldout_fraction <= heldout_clip_fraction"):
        CorporaConfig(heldout_fraction=0.2, heldout_clip_fraction=0.1)
    with pytest.raises(ValueError, match="give 1 or more"):
        CorporaConfig(samples_per_shard=0)


def test_raising_the_held_out_share_only_adds() -> None:
    concepts = [Concept(code=c, label=c, tags=(), group=3, variants=()) for c in CODES]
    small = {c.code for c in concepts if c.held_out(0.1)}
    assert small < {c.code for c in concepts if c.held_out(0.3)}


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("A great blue heron.", "blue heron", True),
        ("Two tigers!", "tiger", True),
        ("The Tiger-lily", "tiger", True),
        ("A catfish", "cat", False),
        ("The bird", "the bird", True),
        ("Anything", "", False),
    ],
)
def test_mentions(text: str, phrase: str, expected: bool) -> None:
    assert mentions(text, phrase) is expected


def test_page_reader_keeps_the_order_and_skips_nested_navigation() -> None:
    html = """<body><div class="toc"><div><p>Skip <img src="x.png"></p></div></div>
        <p>One<img src="a.png">two</p><script>var x = "<p>";</script>three</body>"""
    assert read_page(html) == [PageText("One"), PageImage("a.png"), PageText("two\nthree")]
