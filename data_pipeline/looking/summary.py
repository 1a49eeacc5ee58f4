"""What a corpus comes to: samples, bytes, histograms, and the samples that training would skip."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal

from PIL import Image

from data_pipeline.errors import BadSampleError
from data_pipeline.formatting import ImageItem, parse_document
from data_pipeline.index import ShardIndex, open_index
from data_pipeline.media import (
    FEATURE_EXTENSION,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    MediaConfig,
    decode_image,
    decode_video,
)
from data_pipeline.reading import SampleReader
from data_pipeline.samples import read_captions
from data_pipeline.shards import SampleRecord

Check = Literal["none", "headers", "decode"]
Kind = Literal["pair", "interleaved", "video"]
_EXAMPLES = 5
_THREADS = 8
_DECODED = MediaConfig(image_size=64)


@dataclass
class CorpusSummary:
    """Counts of one corpus."""

    kind: str
    """Kind of its samples."""
    shards: int = 0
    """Shards."""
    samples: int = 0
    """Samples, broken ones included."""
    bytes: int = 0
    """Bytes of the shards."""
    checked: int = 0
    """Samples that were read."""
    members: Counter[str] = field(default_factory=Counter)
    """Members by ending."""
    member_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of the members by ending."""
    media: Counter[int] = field(default_factory=Counter)
    """Samples by the number of their images or clips."""
    words: Counter[int] = field(default_factory=Counter)
    """Samples by the words of their text (documents) or first caption, in classes by powers of two."""
    total_words: int = 0
    """Words of all samples that were read."""
    sides: Counter[int] = field(default_factory=Counter)
    """Images by their shorter side, in classes by powers of two; with a check of headers only."""
    broken: Counter[str] = field(default_factory=Counter)
    """Broken samples and damaged shards, by cause."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """By cause, the first that were met."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; classes are named by their bounds."""
        return {
            **{n: getattr(self, n) for n in ("kind", "shards", "samples", "bytes", "checked", "total_words")},
            "members": dict(sorted(self.members.items())),
            "member_bytes": dict(sorted(self.member_bytes.items())),
            "media": {str(n): count for n, count in sorted(self.media.items())},
            "words": {class_name(n): count for n, count in sorted(self.words.items())},
            "sides": {class_name(n): count for n, count in sorted(self.sides.items())},
            "broken": dict(sorted(self.broken.items())),
            "examples": dict(sorted(self.examples.items())),
        }

    def fault(self, cause: str, where: str, detail: str) -> None:
        """Count a broken sample or shard."""
        self.broken[cause] += 1
        held = self.examples.setdefault(cause, [])
        if len(held) < _EXAMPLES:
            held.append(f"{where}: {detail}"[:300])

    def merge(self, other: CorpusSummary) -> None:
        """Add the counts of one shard."""
        for name in ("checked", "total_words"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("members", "member_bytes", "media", "words", "sides", "broken"):
            getattr(self, name).update(getattr(other, name))
        for cause, examples in other.examples.items():
            held = self.examples.setdefault(cause, [])
            held += examples[: _EXAMPLES - len(held)]


def class_name(number: int) -> str:
    """Name a class of a histogram: 0, 1, 2-3, 4-7, ... for 0, 1, 2, 3, ..."""
    if number < 2:
        return str(number)
    return f"{1 << (number - 1)}-{(1 << number) - 1}"


def guess_kind(index: ShardIndex) -> Kind:
    """Tell the kind of a corpus by the members of its first samples.

    Raises:
        ValueError: when they fit no kind.
    """
    first = next(n for n, entry in enumerate(index.entries) if entry.samples)
    for record in index.records(first)[:20]:
        extensions = set(record.members)
        if any("." in extension for extension in extensions):
            return "interleaved"
        if extensions & {"mp4", "webm", "mkv", "mov", "avi"}:
            return "video"
        if extensions & set(IMAGE_EXTENSIONS) and not extensions & {"webp", "gif"}:
            return "pair"
    raise ValueError(f"{index.entries[first].url}: the members do not tell the kind; give --kind")


def summarise(
    urls: Sequence[str], *, kind: Kind | None = None, check: Check = "headers", limit: int | None = None
) -> CorpusSummary:
    """Read a corpus and count.

    Args:
        urls: as a data set takes them.
        kind: kind of the samples; by default told by the first ones.
        check: "none" reads texts alone, "headers" the sizes of images too, "decode" decodes all media.
        limit: samples of each shard that are read; all by default.

    Raises:
        MissingShardError: the corpus is not there.
        ValueError: it holds no samples, or none of a known kind.
    """
    index = open_index(urls)
    found: Kind = kind or guess_kind(index)
    total = CorpusSummary(
        kind=found,
        shards=len(index.entries),
        samples=index.num_samples,
        bytes=sum(entry.size for entry in index.entries),
    )
    for skip in index.skips:
        total.fault(skip.cause, skip.shard, skip.detail)
    # The index keeps a cache that threads must not share, so records are taken here, a few shards ahead.
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(index.entries), _THREADS):
            numbers = range(start, min(start + _THREADS, len(index.entries)))
            jobs = [(index.entries[n].url, index.records(n)[:limit], found, check) for n in numbers]
            for part in pool.map(lambda job: _summarise_shard(*job), jobs):
                total.merge(part)
    return total


def _summarise_shard(url: str, records: Sequence[SampleRecord], kind: Kind, check: Check) -> CorpusSummary:
    """Count the samples of one shard."""
    part = CorpusSummary(kind=kind)
    for record in records:
        part.checked += 1
        for extension, member in record.members.items():
            ending = extension.rpartition(".")[2]
            part.members[ending] += 1
            part.member_bytes[ending] += member.size
        try:
            reader = SampleReader(url, record, max_bytes=_DECODED.max_bytes)
            text, media = _contents(reader, kind)
            part.media[len(media)] += 1
            words = len(text.split())
            part.words[words.bit_length()] += 1
            part.total_words += words
            if check != "none":
                for member_name in dict.fromkeys(media):
                    _check_medium(reader, member_name, kind, check, part)
        except BadSampleError as error:
            part.fault(error.cause, f"{url} {record.key}", error.detail)
    return part


def _contents(reader: SampleReader, kind: Kind) -> tuple[str, list[str]]:
    """Return a sample's text and the names of its media; a corpus of features has them in place of images."""
    if kind == "interleaved":
        items = parse_document(reader.get("json"))
        text = "\n".join(item for item in items if isinstance(item, str))
        return text, [_stored(reader, item.member) for item in items if isinstance(item, ImageItem)]
    wanted = (*(IMAGE_EXTENSIONS if kind == "pair" else VIDEO_EXTENSIONS), FEATURE_EXTENSION)
    media = next((extension for extension in wanted if reader.has(extension)), None)
    if media is None:
        raise BadSampleError("missing member", f"no medium among {sorted(reader.record.members)}")
    return read_captions(reader)[0], [media]


def _stored(reader: SampleReader, member: str) -> str:
    """Return the name under which a document's image is stored."""
    features = f"{member.rpartition('.')[0]}.{FEATURE_EXTENSION}"
    return features if not reader.has(member) and reader.has(features) else member


def _check_medium(reader: SampleReader, member: str, kind: Kind, check: Check, part: CorpusSummary) -> None:
    """Check one medium.

    Raises:
        BadSampleError: when training would skip it.
    """
    blob = reader.get(member)
    ending = member.rpartition(".")[2]
    if ending == FEATURE_EXTENSION:
        return
    if kind == "video":
        if check == "decode":
            decode_video(blob, ending, 2, _DECODED)
        return
    if check == "decode":
        decode_image(blob, _DECODED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(BytesIO(blob)) as image:
                part.sides[min(image.size).bit_length()] += 1
        except Exception as error:  # Pillow's plugins raise anything
            raise BadSampleError(
                "corrupt image", f"{member}: {type(error).__name__}: {error}"[:200]
            ) from error
