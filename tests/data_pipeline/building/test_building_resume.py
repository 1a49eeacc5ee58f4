"""A killed build goes on where it was, with equal bytes; another build is never mixed in."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.building.config import ImageConfig
from data_pipeline.building.corpus import Step, build_corpus
from data_pipeline.index import open_index
from tests.data_pipeline.building.building_material import (
    build,
    config,
    documents,
    english,
    files,
    page,
    picture,
    read_corpus,
    write_tree,
)


class KilledError(BaseException):
    """Ends a build as SIGKILL would, as far as its files are concerned."""


def killed_after(count: int) -> Any:
    """A runner that dies after some steps."""
    left = itertools.count(count, -1)

    def run(step: Step, tasks: list[Any], what: str, done: int) -> Iterable[int]:
        for task in tasks:
            if next(left) <= 0:
                raise KilledError
            yield step(task)

    return run


def in_any_order(seed: int) -> Any:
    """A runner that takes tasks in another order and some of them twice, as a cluster that loses workers does."""

    def run(step: Step, tasks: list[Any], what: str, done: int) -> Iterable[int]:
        again = [*tasks, *tasks[::2]]
        random.Random(seed).shuffle(again)
        return [step(task) for task in again]

    return run


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("resume") / "tree", pages=7)


@pytest.fixture(scope="module")
def straight(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("straight")
    assert build(tree, folder).shards == 2
    return files(folder)


@settings(max_examples=8, deadline=None)
@given(kills=st.lists(st.integers(0, 5), max_size=3), seed=st.integers(0, 1000))
def test_kills_anywhere_and_any_order_give_the_same_bytes(
    tree: Path,
    straight: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    kills: list[int],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    for count in kills:
        try:
            build(tree, folder, killed_after(count))
        except KilledError:
            assert not (folder / "index.json").exists(), "an unfinished corpus must not look complete"
    build(tree, folder, in_any_order(seed))
    assert files(folder) == straight


def test_the_size_of_parts_and_shards_moves_no_sample(tree: Path, tmp_path: Path) -> None:
    report = build(tree, tmp_path / "a", samples_per_part=3, samples_per_shard=100)
    build(tree, tmp_path / "b", samples_per_part=1, bytes_per_shard=40_000)
    assert documents(tmp_path / "a") == documents(tmp_path / "b")
    index = open_index([str(tmp_path / "b")])
    assert report.samples == index.num_samples == 7
    assert len(index.entries) > 2
    assert all(entry.size <= 40_000 or entry.samples == 1 for entry in index.entries)


def test_a_finished_corpus_is_found_and_nothing_is_done(tree: Path, tmp_path: Path) -> None:
    first = build(tree, tmp_path / "out")
    again = build(tree, tmp_path / "out", killed_after(0))
    assert again.reused
    assert (again.samples, again.tally.counts) == (first.samples, first.tally.counts)
    with pytest.raises(ValueError, match="other sources or with other settings"):
        build(tree, tmp_path / "out", image=ImageConfig(min_side=65))
    report = build_corpus(config(tree, tmp_path / "out", samples_per_shard=7), overwrite=True)
    assert (report.shards, report.reused) == (1, False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "build.json",
        "index.json",
        "shard-000000.idx.json",
        "shard-000000.tar",
    ]


def test_a_build_killed_between_the_index_and_the_clearing_is_finished(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path / "out")
    (tmp_path / "out" / ".build").mkdir()
    (tmp_path / "out" / ".build" / "state.json").write_text("{}")
    assert build(tree, tmp_path / "out").reused
    assert not (tmp_path / "out" / ".build").exists()


def test_an_unfinished_build_is_never_mixed_with_another(tree: Path, tmp_path: Path) -> None:
    own = write_tree(tmp_path / "tree", pages=4)
    with pytest.raises(KilledError):
        build(own, tmp_path / "out", killed_after(1))
    (own / "new.html").write_text(page(english(77), "<img src=section0/images/p0-0.png>"))
    with pytest.raises(ValueError, match="unfinished build with other settings, sources"):
        build(own, tmp_path / "out")
    assert build_corpus(config(own, tmp_path / "out"), overwrite=True).samples == 5
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "theirs.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"theirs\.tar and no build of ours"):
        build(tree, tmp_path / "foreign")


def test_files_of_the_same_name_in_two_sources_have_two_keys(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.png").write_bytes(picture(number))
        (tmp_path / name / "page.html").write_text(page(english(number), "<img src=p.png>"))
    given = config(tmp_path / "a", tmp_path / "out")
    both = dataclasses.replace(given, sources=(str(tmp_path / "a"), str(tmp_path / "b")))
    assert build_corpus(both).samples == 2
    assert [m["0.png"] for m in read_corpus(tmp_path / "out").values()] == [picture(0), picture(1)]


def test_nothing_left_says_why(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "p.html").write_text(page(english(1)))
    with pytest.raises(ValueError, match=r"not one sample .*'no image left': 1"):
        build(tmp_path / "tree", tmp_path / "out")


_SCRIPT = """
import sys, time
from tests.data_pipeline.building.building_material import build
from pathlib import Path
def slow(step, tasks, what, done):
    for task in tasks:
        yield step(task)
        print(what, flush=True)
        time.sleep(float(sys.argv[3]))
build(Path(sys.argv[1]), Path(sys.argv[2]), slow, samples_per_part=1)
"""


@pytest.mark.distributed
def test_sigkill_of_the_process(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path / "straight", samples_per_part=1)
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    work = tmp_path / "out" / ".build"
    kept = work / "part-000000.json"
    for lines, pause in ((1, 30), (8, 0.2)):  # killed while it builds parts, then while it writes shards
        command = [sys.executable, "-c", _SCRIPT, str(tree), str(tmp_path / "out"), str(pause)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        ) as process:
            assert process.stdout is not None
            told = [process.stdout.readline() for _ in range(lines if pause == 30 else 7)]
            process.send_signal(signal.SIGKILL)
        if pause == 30:
            assert told == ["parts\n"]
            before = kept.stat().st_mtime_ns
            # What a kill in the middle of a write leaves behind.
            (work / ".part-000001-dead").mkdir()
            (work / "part-000001.tar").write_bytes(b"half")
            (work / "part-000001.json.dead.tmp").write_bytes(b"{")
    assert told[-1] == "shards\n", "the second attempt had six parts to build, not seven"
    assert kept.stat().st_mtime_ns == before
    assert not (tmp_path / "out" / "index.json").exists()
    build(tree, tmp_path / "out", samples_per_part=1)
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_the_report_holds_what_decides_the_bytes(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "build.json").read_text())
    assert stored["format"] == "flamingo-build"
    assert stored["config"]["sources"] == [str(tree)]
    assert "output" not in stored["config"]
    assert set(stored["versions"]) == {
        "format",
        "minhash",
        "selectolax",
        "py3langid",
        "glin-profanity",
        "warcio",
        "pillow",
        "av",
    }
