"""The steps of a build, and the files by which a killed build knows where it was.

`OUTPUT/.build` holds the parts and the shards' entries until the corpus is finished; `build.json` is the report;
`index.json`, written last, makes the corpus complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import fsspec

from data_pipeline.building.config import BuildConfig
from data_pipeline.building.dedup import ALGORITHM
from data_pipeline.building.documents import Tally
from data_pipeline.building.evaluation import evaluation_hashes, pack_hashes
from data_pipeline.building.merge import Layout, ShardTask, lay_out, write_shard
from data_pipeline.building.parts import EVALUATION, PartTask, build_part, found_parts, read_part
from data_pipeline.building.plan import FORMAT_VERSION, Part, fingerprint, plan_parts
from data_pipeline.building.storage import put_file
from data_pipeline.shards import INDEX_NAME, encode_index, side_name

REPORT_NAME = "build.json"
WORK_NAME = ".build"
_STATE = "state.json"
_LIBRARIES = ("selectolax", "py3langid", "glin-profanity", "warcio", "pillow", "av")

Step = Callable[[Any], int]
Runner = Callable[[Step, list[Any], str, int], Iterable[int]]
"""Runs a step over tasks, wherever: (function, tasks, what is counted, how many are done already) -> numbers."""


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build came to."""

    url: str
    """Folder of the corpus."""
    kind: str
    """Kind of its samples, as `DatasetConfig.kind` names it."""
    samples: int
    """Samples written."""
    media: int
    """Images or clips in them."""
    words: int
    """Words in them."""
    shards: int
    """Shards written."""
    bytes: int
    """Bytes of the shards."""
    tally: Tally
    """What was read and what was left out, by cause."""
    reused: bool = False
    """True where the corpus was there already."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the same input gives the same ones."""
        numbers = {
            name: getattr(self, name) for name in ("kind", "samples", "media", "words", "shards", "bytes")
        }
        return numbers | self.tally.to_json()


def run_here(step: Step, tasks: list[Any], what: str, done: int) -> Iterator[int]:
    """Run a step over tasks one after another in this process."""
    del what, done
    return map(step, tasks)


def build_corpus(config: BuildConfig, run: Runner = run_here, *, overwrite: bool = False) -> BuildReport:
    """Build a corpus, or go on where an earlier run was killed, or find it built.

    Args:
        config: what is read, filtered and written.
        run: runs the tasks; `jobs.build` has one on Ray Data.
        overwrite: removes a corpus or an unfinished build that is in the output folder.

    Returns:
        Counts of what was kept and left out.

    Raises:
        MissingShardError: a source is not there.
        ValueError: no sample is left, or the output folder holds something else.
    """
    fs, output = fsspec.core.url_to_fs(config.output)
    fs.makedirs(output, exist_ok=True)
    if overwrite:
        clear(fs, output)
    held = read_report(config)
    if held is not None:
        _remove_work(fs, output)
        return held
    parts = plan_parts(config)
    mark = fingerprint(config, parts, versions())
    work = _open_work(fs, output, config, mark)
    _build_parts(fs, work, config, parts, mark, run)
    layout = lay_out([read_part(fs, work, part.number) for part in parts], config, _url(fs, work))
    if not layout.samples:
        causes = {**layout.tally.documents, **{f"image: {c}": n for c, n in layout.tally.images.items()}}
        raise ValueError(
            f"not one sample of {', '.join(config.sources)} is left: {causes}. The parts are kept in {work}; "
            "relax the filters that say why, and pass overwrite=True (--overwrite)"
        )
    entries = _write_shards(fs, work, layout, run)
    return _publish(fs, output, config, layout, entries)


def versions() -> dict[str, str]:
    """Return the versions that decide what a build keeps."""
    found = {"format": str(FORMAT_VERSION), "minhash": ALGORITHM}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "?"
    return found


def read_report(config: BuildConfig) -> BuildReport | None:
    """Return the report of a finished corpus, or None where there is none.

    Raises:
        ValueError: the folder holds a corpus that was built otherwise.
    """
    fs, output = fsspec.core.url_to_fs(config.output)
    if not fs.exists(f"{output}/{INDEX_NAME}"):
        return None
    stored: dict[str, Any] = {}
    if fs.exists(f"{output}/{REPORT_NAME}"):
        stored = json.loads(fs.cat_file(f"{output}/{REPORT_NAME}"))
    if stored.get("config") != json.loads(json.dumps(config.identity())):
        raise ValueError(
            f"{config.output} holds a corpus that was built from other sources or with other settings; "
            "choose another output, or pass overwrite=True (--overwrite)"
        )
    numbers = {name: stored[name] for name in ("kind", "samples", "media", "words", "shards", "bytes")}
    return BuildReport(url=config.output, tally=Tally.from_json(stored), reused=True, **numbers)


def clear(fs: Any, output: str) -> None:
    """Remove a corpus or an unfinished build; the index goes first, so that no half of one looks complete."""
    for name in (INDEX_NAME, REPORT_NAME):
        if fs.exists(f"{output}/{name}"):
            fs.rm(f"{output}/{name}")
    fs.invalidate_cache()
    for path in fs.ls(output, detail=False):
        if str(path).endswith((".tar", ".idx.json")):
            fs.rm(path)
    _remove_work(fs, output)


def _open_work(fs: Any, output: str, config: BuildConfig, mark: str) -> str:
    """Make the work folder, or find that of the same build; returns its path."""
    work = f"{output}/{WORK_NAME}"
    if not fs.exists(f"{work}/{_STATE}"):
        names = [str(path).rpartition("/")[2] for path in fs.ls(output, detail=False)]
        foreign = [name for name in names if name.endswith(".tar")]
        if foreign:
            raise ValueError(
                f"{config.output} holds {foreign[0]} and no build of ours; choose another output, or pass "
                "overwrite=True (--overwrite), which removes its shards"
            )
        fs.makedirs(work, exist_ok=True)
        put_file(fs, f"{work}/{_STATE}", json.dumps({"fingerprint": mark}).encode())
    stored = json.loads(fs.cat_file(f"{work}/{_STATE}"))
    if stored.get("fingerprint") != mark:
        raise ValueError(
            f"{config.output} holds an unfinished build with other settings, sources or library versions; "
            "restore those to go on with it, or pass overwrite=True (--overwrite) to begin anew"
        )
    return work


def _build_parts(fs: Any, work: str, config: BuildConfig, parts: list[Part], mark: str, run: Runner) -> None:
    """Build the parts that are not there yet."""
    if config.dedup.against and not fs.exists(f"{work}/{EVALUATION}"):
        hashes = evaluation_hashes(config.dedup.against)
        put_file(fs, f"{work}/{EVALUATION}", pack_hashes(hashes, config.dedup.hash_distance))
    done = set(found_parts(fs, work, (part.number for part in parts)))
    url = _url(fs, work)
    tasks = [
        PartTask(part=part, config=config, work=url, run=mark) for part in parts if part.number not in done
    ]
    for _ in run(build_part, tasks, "parts", len(done)):
        pass
    missing = {part.number for part in parts} - set(found_parts(fs, work, (part.number for part in parts)))
    assert not missing, f"parts {sorted(missing)[:5]} were reported as built and are not in {work}"


def _write_shards(fs: Any, work: str, layout: Layout, run: Runner) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; returns the entries of all for the index."""

    def is_done(task: ShardTask) -> bool:
        output = fsspec.core.url_to_fs(task.output)[1]
        files = (f"{work}/{task.done_name}", f"{output}/{task.name}", f"{output}/{side_name(task.name)}")
        return all(fs.exists(path) for path in files)

    todo = [task for task in layout.tasks if not is_done(task)]
    for _ in run(write_shard, todo, "shards", len(layout.tasks) - len(todo)):
        pass
    fs.invalidate_cache()
    return [json.loads(fs.cat_file(f"{work}/{task.done_name}")) for task in layout.tasks]


def _publish(
    fs: Any, output: str, config: BuildConfig, layout: Layout, entries: list[dict[str, Any]]
) -> BuildReport:
    """Write the report and, last, the index that makes the corpus complete; then remove the parts."""
    report = BuildReport(
        url=config.output,
        kind=config.kind,
        samples=layout.samples,
        media=layout.media,
        words=layout.words,
        shards=len(entries),
        bytes=sum(entry["bytes"] for entry in entries),
        tally=layout.tally,
    )
    stored = {
        "format": "flamingo-build",
        **report.to_json(),
        "versions": versions(),
        "config": config.identity(),
    }
    put_file(fs, f"{output}/{REPORT_NAME}", json.dumps(stored, indent=1, ensure_ascii=False).encode())
    put_file(fs, f"{output}/{INDEX_NAME}", encode_index(entries))
    _remove_work(fs, output)
    return report


def _remove_work(fs: Any, output: str) -> None:
    """Remove the parts."""
    fs.invalidate_cache()
    if fs.exists(f"{output}/{WORK_NAME}"):
        fs.rm(f"{output}/{WORK_NAME}", recursive=True)


def _url(fs: Any, path: str) -> str:
    """Return a URL that opens the same file system."""
    return str(fs.unstrip_protocol(path))
