"""`flamingo data inspect` and `flamingo data info`: samples as a page, a corpus as a table."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from data_pipeline.config import DatasetConfig
from data_pipeline.dataset import DatasetStream
from data_pipeline.index import open_index
from data_pipeline.looking.render import PageInfo, render_page
from data_pipeline.looking.summary import Check, CorpusSummary, Kind, guess_kind, summarise
from data_pipeline.tokenizer import TokenizerConfig

_BAR = 30


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Arguments of `flamingo data inspect`."""

    url: Annotated[str, tyro.conf.Positional] = ""
    """Folder, tar or pattern of shards; or leave it out and name a recipe."""
    recipe: str = ""
    """A recipe whose data set is shown with all its settings."""
    dataset: str = ""
    """Name of the recipe's data set; needed where it has several."""
    output: str = "inspect.html"
    """The page that is written."""
    samples: int = 8
    """Samples shown."""
    start: int = 0
    """Position in the endless order of the data set at which they begin."""
    seed: int = 0
    """Seed of the order and of the augmentation."""
    mode: Literal["train", "eval"] = "eval"
    """train: order, windows and augmentation of training; eval: the order of the shards, nothing drawn."""
    kind: Literal["auto", "pair", "interleaved", "video"] = "auto"
    """Kind of the samples under `url`."""
    seq_len: int = 256
    """Tokens a sample, for `url`."""
    max_media: int = 5
    """Images a document, for `url`."""
    frames: int = 8
    """Frames a clip, for `url`."""
    image_size: int = 224
    """Pixels, for `url`."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer, for `url`."""

    def __post_init__(self) -> None:
        if bool(self.url) == bool(self.recipe):
            raise ValueError(
                f"url {self.url!r}, --recipe {self.recipe!r}: give one of the two, as "
                "`flamingo data inspect FOLDER` or `flamingo data inspect --recipe smoke --dataset pairs`"
            )
        if self.samples < 1 or self.start < 0:
            raise ValueError(f"--samples {self.samples}, --start {self.start}: at least 1 and 0")


@dataclass(frozen=True, kw_only=True)
class InfoArguments:
    """Arguments of `flamingo data info`."""

    url: Annotated[str, tyro.conf.Positional]
    """Folder, tar or pattern of shards."""
    kind: Literal["auto", "pair", "interleaved", "video"] = "auto"
    """Kind of the samples."""
    check: Check = "headers"
    """none: texts alone; headers: the sizes of images too; decode: decode all media, to find every broken one."""
    limit: int | None = None
    """Samples of each shard that are read; all by default."""
    json: bool = False
    """Print JSON."""


def inspect(arguments: InspectArguments) -> Path:
    """Write a page that shows samples, and return its path.

    Args:
        arguments: which samples, and how.

    Raises:
        ValueError: no such recipe or data set, or a data set that cannot be read.
        MissingShardError: the shards are not there.
    """
    config, tokenizer = _data_set(arguments)
    stream = DatasetStream(replace(config, batch_size=1), tokenizer, arguments.seed)
    batches = [stream.batch(step) for step in range(arguments.start, arguments.start + arguments.samples)]
    facts = {
        "kind": config.kind,
        "mode": config.mode,
        "samples": str(stream.num_samples),
        "shards": str(len(stream.index.entries)),
        "T": str(config.seq_len),
        "M": str(config.max_media),
        "F": str(config.frames),
        "positions": f"{arguments.start} to {arguments.start + arguments.samples - 1}",
        "seed": str(arguments.seed),
    }
    title = arguments.url or f"{arguments.recipe}: {config.name}"
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        render_page(PageInfo(title=title, facts=facts), batches, stream.tokenizer), encoding="utf-8"
    )
    return path


def _data_set(arguments: InspectArguments) -> tuple[DatasetConfig, TokenizerConfig]:
    """Return the data set that is shown, with its tokenizer."""
    if arguments.url:
        kind: Kind = guess_kind(open_index([arguments.url])) if arguments.kind == "auto" else arguments.kind
        config = DatasetConfig(
            name="inspect",
            kind=kind,
            urls=(arguments.url,),
            batch_size=1,
            mode=arguments.mode,
            seq_len=arguments.seq_len,
            max_media=arguments.max_media if kind == "interleaved" else 1,
            frames=arguments.frames if kind == "video" else 1,
            image_size=arguments.image_size,
        )
        return config, arguments.tokenizer
    from jobs.recipes import find_recipe

    name, recipe = find_recipe(arguments.recipe)
    if recipe.prepare is not None:
        recipe.prepare()
    data = recipe.config().data
    sets = {**data.train, **data.held_out}
    chosen = arguments.dataset or (next(iter(sets)) if len(sets) == 1 else "")
    if chosen not in sets:
        raise ValueError(f"--dataset {arguments.dataset!r}: recipe {name} has {', '.join(sets)}")
    return replace(sets[chosen], mode=arguments.mode), data.tokenizer


def info(arguments: InfoArguments, console: Console | None = None) -> CorpusSummary:
    """Print what a corpus comes to.

    Args:
        arguments: which corpus.
        console: where the tables are printed.

    Raises:
        ValueError: the corpus holds no samples or its kind cannot be told.
        MissingShardError: the shards are not there.
    """
    kind: Kind | None = None if arguments.kind == "auto" else arguments.kind
    summary = summarise([arguments.url], kind=kind, check=arguments.check, limit=arguments.limit)
    if arguments.json:
        print(json.dumps({"url": arguments.url, **summary.to_json()}, indent=1, ensure_ascii=False))
    else:
        _print_summary(arguments.url, summary, console or Console())
    return summary


def _print_summary(url: str, summary: CorpusSummary, console: Console) -> None:
    read = summary.checked
    media = sum(n * count for n, count in summary.media.items())
    what = {"interleaved": "images", "pair": "images", "video": "clips"}[summary.kind]
    console.print(
        f"{url}: {summary.samples} samples of kind {summary.kind} in {summary.shards} shards, "
        f"{summary.bytes / 1e6:.1f} MB; {read} read: {media} {what}, {summary.total_words} words"
    )
    members = Table("members", "count", "MB", "mean kB")
    for ending, count in summary.members.most_common():
        size = summary.member_bytes[ending]
        members.add_row(f".{ending}", str(count), f"{size / 1e6:.1f}", f"{size / count / 1e3:.1f}")
    console.print(members)
    stored = summary.to_json()
    text = "words of a document" if summary.kind == "interleaved" else "words of a caption"
    histograms = {f"{what} of a sample": "media", text: "words", "shorter side of an image": "sides"}
    for title, name in histograms.items():
        if stored[name]:
            console.print(_histogram(title, stored[name]))
    broken = Table("broken", "count", "for example")
    for cause, count in summary.broken.most_common():
        broken.add_row(cause, str(count), summary.examples[cause][0][:100])
    console.print(broken if broken.row_count else "no broken sample")


def _histogram(title: str, counts: dict[str, int]) -> Table:
    """Draw counts as bars."""
    table = Table(title, "count", "")
    most = max(counts.values())
    for name, count in counts.items():
        table.add_row(name, str(count), "█" * max(1, round(_BAR * count / most)))
    return table
