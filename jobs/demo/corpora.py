"""Write the demonstration's data sets as shards: pairs, documents and videos, each with held-out sets."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp

from rich.console import Console
from rich.table import Table

from data_pipeline.shards import INDEX_VERSION, ShardWriter
from jobs.demo import sources
from jobs.demo.emoji import Concept, add_clips, add_emoji_pairs, load_concepts
from jobs.demo.fetch import Parts
from jobs.demo.manual import add_pages
from jobs.demo.samples import Split, shuffled
from jobs.demo.stamps import add_stamps

BUILDER_VERSION = 1
"""Raise it when the same parts would give other shards."""
REPORT = "corpora.json"

TRAIN = ("pairs", "documents", "videos")
"""The training data sets; the others are held out of training."""


@dataclass(frozen=True, kw_only=True)
class CorporaConfig:
    """What is held out and how the shards are cut."""

    heldout_fraction: float = 0.08
    """Part of the emoji concepts, stamp captions and manual pages that training never sees."""
    heldout_clip_fraction: float = 0.15
    """The same for clips, of which there are fewer; at least `heldout_fraction`."""
    samples_per_shard: int = 128
    """Small shards spread over readers and over encoding tasks."""

    def __post_init__(self) -> None:
        if not 0.0 < self.heldout_fraction <= self.heldout_clip_fraction < 1.0:
            raise ValueError(
                f"heldout_fraction is {self.heldout_fraction} and heldout_clip_fraction "
                f"{self.heldout_clip_fraction}; give 0 < heldout_fraction <= heldout_clip_fraction < 1, so "
                "that a concept held out of the pairs is held out of the clips too"
            )
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {self.samples_per_shard}; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What one data set came to."""

    samples: int
    """Samples written."""
    media: int
    """Images or clips in them."""
    megabytes: float
    """Size of its shards."""
    dropped: Mapping[str, int]
    """What was left out, by cause."""


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """The data sets in the cache."""

    folder: Path
    """One folder of shards for each data set."""
    datasets: Mapping[str, DatasetReport]
    """By name; a data set whose part is missing is absent."""

    def url(self, name: str) -> str:
        """Return the folder of shards of data set `name`; `KeyError` names those that are there."""
        if name not in self.datasets:
            raise KeyError(f"no data set {name!r}; there are {', '.join(self.datasets)}")
        return str(self.folder / name)

    def table(self) -> Table:
        """Return counts and drops as a table for the console."""
        table = Table("data set", "samples", "media", "MB", "left out")
        for name, entry in self.datasets.items():
            causes = "; ".join(f"{n} {cause}" for cause, n in entry.dropped.items())
            table.add_row(name, str(entry.samples), str(entry.media), f"{entry.megabytes:.1f}", causes)
        return table


def build_corpora(
    parts: Parts, config: CorporaConfig | None = None, *, console: Console | None = None
) -> Corpora:
    """Write every data set that `parts` allow; a second run finds them and returns at once.

    The folder's name depends on the parts, the configuration and `BUILDER_VERSION`: shards are never stale.

    Args:
        parts: from `jobs.demo.fetch.fetch_parts`.
        config: splits and shard size.
        console: where the table of counts is printed after a build; nowhere by default.

    Returns:
        The data sets with their counts.

    Raises:
        RuntimeError: no part holds any data.
    """
    config = config or CorporaConfig()
    folder = parts.cache / "corpora" / corpora_version(parts, config)
    held = _read_report(folder)
    if held is not None:
        return held
    splits = collect(parts, config)
    if not any(splits[name].samples for name in TRAIN):
        raise RuntimeError(
            "none of the parts holds training data: fetch the emoji (npm), the stamps or the manual (apt); "
            + "; ".join(f"{name}: {cause}" for name, cause in parts.missing.items())
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        reports = {
            name: _write(staging / name, split, config) for name, split in splits.items() if split.samples
        }
        _write_report(staging, reports)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    corpora = Corpora(folder=folder, datasets=reports)
    if console is not None:
        console.print(corpora.table())
    return corpora


def corpora_version(parts: Parts, config: CorporaConfig) -> str:
    """Return the folder name for shards of these parts under this configuration."""
    checksums = {
        name: part.sha256 for name, part in sorted(parts.found.items()) if name not in sources.MODELS
    }
    text = json.dumps([BUILDER_VERSION, INDEX_VERSION, checksums, asdict(config)], sort_keys=True)
    return f"v{BUILDER_VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def collect(parts: Parts, config: CorporaConfig) -> dict[str, Split]:
    """Read the parts and share their samples out over the data sets.

    Args:
        parts: what there is; data sets whose part is missing stay empty.
        config: which fractions are held out.

    Returns:
        Data set name to its samples, in writing order.
    """
    names = (
        *("pairs", "pairs_unseen_style", "pairs_heldout_concepts", "pairs_heldout_stamps"),
        *("documents", "documents_heldout", "videos", "videos_heldout"),
    )
    splits = {name: Split() for name in names}
    concepts = _concepts(parts)
    fraction = config.heldout_fraction
    heldout = [concept for concept in concepts if concept.held_out(fraction)]
    add_emoji_pairs(
        concepts,
        _styles(parts, {"fluent": sources.EMOJI_FLUENT, "emojione": sources.EMOJI_ONE}),
        _styles(parts, {"google": sources.EMOJI_GOOGLE}),
        fraction,
        train=splits["pairs"],
        unseen_style=splits["pairs_unseen_style"],
        heldout_concepts=splits["pairs_heldout_concepts"],
    )
    if sources.STAMPS in parts.found:
        # The folder of the package that holds them, whatever is above it.
        add_stamps(
            parts.path(sources.STAMPS, "**/stamps"),
            fraction,
            [concept.label for concept in heldout],
            train=splits["pairs"],
            heldout=splits["pairs_heldout_stamps"],
        )
    if sources.MANUAL in parts.found:
        pages = parts.path(sources.MANUAL, "**/help/en")
        add_pages(pages, fraction, train=splits["documents"], heldout=splits["documents_heldout"])
    if sources.EMOJI_CLIPS in parts.found and concepts:
        clips = parts.path(sources.EMOJI_CLIPS, "**/assets")
        share = config.heldout_clip_fraction
        add_clips(concepts, clips, share, train=splits["videos"], heldout=splits["videos_heldout"])
    for split in splits.values():
        split.samples = shuffled(split.samples)
    return splits


def _concepts(parts: Parts) -> list[Concept]:
    if sources.EMOJI_NAMES not in parts.found:
        return []
    return load_concepts(parts.path(sources.EMOJI_NAMES, "**/en/data.json"))


def _styles(parts: Parts, names: Mapping[str, str]) -> dict[str, Path]:
    """Return style name to the folder of its images, for the parts that are there."""
    images = {sources.EMOJI_GOOGLE: "**/google/64", sources.EMOJI_ONE: "**/assets/png"}
    return {
        style: parts.path(name, images.get(name, "**/assets"))
        for style, name in names.items()
        if name in parts.found
    }


def _write(folder: Path, split: Split, config: CorporaConfig) -> DatasetReport:
    """Write one data set and return its counts."""
    with ShardWriter(str(folder), max_samples=config.samples_per_shard) as writer:
        for sample in split.samples:
            writer.write(sample.key, sample.members)
    written = sum(path.stat().st_size for path in folder.iterdir())
    media = sum(sum(e not in {"txt", "json"} for e in sample.members) for sample in split.samples)
    return DatasetReport(
        samples=len(split.samples),
        media=media,
        megabytes=round(written / 1e6, 2),
        dropped={cause: count for cause, count in sorted(split.dropped.items()) if count},
    )


def _write_report(folder: Path, reports: Mapping[str, DatasetReport]) -> None:
    text = json.dumps({name: asdict(entry) for name, entry in reports.items()}, indent=1)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")


def _read_report(folder: Path) -> Corpora | None:
    """Return the finished corpora in `folder`, or None."""
    try:
        stored = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        datasets = {name: DatasetReport(**entry) for name, entry in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return Corpora(folder=folder, datasets=datasets)
