"""Configuration of a build: what is read, what is filtered, how the shards are cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

InputKind = Literal["html", "warc", "obelics", "mmc4", "pairs", "videos", "frames"]
DOCUMENT_INPUTS = ("html", "warc", "obelics", "mmc4")
VIDEO_INPUTS = ("videos", "frames")


@dataclass(frozen=True, kw_only=True)
class HtmlConfig:
    """How a web page is read."""

    skip_tags: tuple[str, ...] = (
        *("head", "script", "style", "template", "noscript", "iframe", "object", "svg", "canvas"),
        *("nav", "footer", "form", "button", "select", "textarea", "dialog", "audio", "video"),
    )
    """Elements that are left out with all that is in them."""
    skip_classes: tuple[str, ...] = (
        *("nav", "navbar", "navheader", "navfooter", "navigation", "menu", "sidebar", "breadcrumb"),
        *("breadcrumbs", "toc", "footnotes", "footer", "cookie-banner", "comments", "advertisement"),
        *("social", "share", "related"),
    )
    """Elements of these classes are left out with all that is in them."""
    max_bytes: int = 16 << 20
    """Largest page in bytes."""
    max_nodes: int = 500_000
    """Most elements and texts of a page; a hostile page of a few megabytes can hold millions."""
    max_depth: int = 2_000
    """Elements that may stand open at once before a page is too large: parsing takes time with the square of it."""

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.max_nodes, self.max_depth) < 1:
            raise ValueError(
                f"html.max_bytes {self.max_bytes}, html.max_nodes {self.max_nodes}, html.max_depth {self.max_depth}: "
                "all must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which documents are kept for their text (paper: English, filters alike MassiveWeb's)."""

    languages: tuple[str, ...] = ("en",)
    """ISO 639-1 codes that are kept; empty keeps all."""
    min_language_probability: float = 0.5
    """Least probability of the detected language."""
    explicit: bool = True
    """Leave out explicit pages (paper), by listed words and by the host's name."""
    max_explicit: float = 0.01
    """Largest share of listed words of a page that is not explicit."""
    quality: bool = True
    """Apply the quality rules of MassiveWeb (Gopher, appendix A.1.1)."""
    repetition: bool = True
    """Apply the repetition rules of MassiveWeb."""
    min_words: int = 50
    """Least words of a document (Gopher: 50)."""
    max_words: int = 100_000
    """Most words of a document (Gopher: 100,000)."""
    max_chars: int = 5_000_000
    """Most characters of a document, whatever the rules; holds with `quality` off too."""

    def __post_init__(self) -> None:
        if isinstance(cast(object, self.languages), str):
            raise ValueError(f"text.languages {self.languages!r}: give a tuple, as ({self.languages!r},)")
        if not 0 <= self.min_language_probability <= 1:
            raise ValueError(
                f"text.min_language_probability {self.min_language_probability}: must lie in [0, 1]"
            )
        if not 0 <= self.max_explicit <= 1:
            raise ValueError(f"text.max_explicit {self.max_explicit}: must lie in [0, 1]")
        if not 0 <= self.min_words <= self.max_words or self.max_chars < 1:
            raise ValueError(
                f"text.min_words {self.min_words}, text.max_words {self.max_words}, text.max_chars "
                f"{self.max_chars}: give 0 <= min_words <= max_words, and max_chars of 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Which images are kept (paper: no side under 64 px, aspect ratio at most 3, not of a single colour)."""

    min_side: int = 64
    """Least pixels of the shorter side."""
    max_aspect: float = 3.0
    """Largest ratio of the longer to the shorter side."""
    colour_range: int = 4
    """An image whose every channel spans fewer levels than this is of a single colour; 0 keeps those."""
    min_bytes: int = 0
    """Least bytes of an image file."""
    max_bytes: int = 32 << 20
    """Largest image file in bytes."""
    max_pixels: int = 89_000_000
    """Largest width x height; beyond it an image is refused before it is decoded."""
    skip_names: tuple[str, ...] = ()
    """File names without ending that are decoration, as ("prev", "next")."""
    max_per_document: int = 64
    """Images of a document that are kept; those after them are left out."""
    max_document_bytes: int = 256 << 20
    """Bytes of all images of a document; those after them are left out."""

    def __post_init__(self) -> None:
        if self.min_side < 1 or not self.max_aspect >= 1 or not 0 <= self.colour_range <= 256:
            raise ValueError(
                f"image.min_side {self.min_side}, image.max_aspect {self.max_aspect}, image.colour_range "
                f"{self.colour_range}: give at least 1, at least 1, and 0 to 256"
            )
        least = (self.max_pixels, self.max_per_document, self.max_document_bytes, self.max_bytes)
        if min(least) < 1 or not 0 <= self.min_bytes <= self.max_bytes:
            raise ValueError(
                f"image.max_pixels, max_per_document, max_document_bytes, max_bytes are {least} and min_bytes "
                f"{self.min_bytes}: the first four must be at least 1, min_bytes at most max_bytes"
            )


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Which captions of pairs and clips are kept."""

    min_words: int = 1
    """Least words."""
    max_chars: int = 2000
    """Most characters; a longer one is a page, not a caption."""
    first_line: bool = False
    """Only the first line of a `.txt` is the caption, as where translations stand below it."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes that are kept; empty keeps all. Detection is weak on a few words."""

    def __post_init__(self) -> None:
        if self.min_words < 1 or self.max_chars < 1:
            raise ValueError(
                f"caption.min_words {self.min_words}, caption.max_chars {self.max_chars}: at least 1 each"
            )


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Which clips are kept, and how frame sequences become clips."""

    min_seconds: float = 0.0
    """Shortest clip."""
    max_seconds: float = 600.0
    """Longest clip (paper: 22 s on average)."""
    max_bytes: int = 256 << 20
    """Largest clip in bytes."""
    max_frames: int = 10_000
    """Most frames of a sequence."""
    fps: float = 8.0
    """Frames a second of clips made from frame sequences."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_seconds <= self.max_seconds or not self.fps > 0:
            raise ValueError(
                f"video.min_seconds {self.min_seconds}, video.max_seconds {self.max_seconds}, video.fps "
                f"{self.fps}: give 0 <= min_seconds <= max_seconds and fps above 0"
            )
        if self.max_bytes < 1 or self.max_frames < 1:
            raise ValueError(
                f"video.max_bytes {self.max_bytes}, video.max_frames {self.max_frames}: at least 1 each"
            )


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Which near-duplicates are left out."""

    against: tuple[str, ...] = ()
    """Evaluation sets: folders of images, or folders and tars of shards. Images near one of theirs are left
    out (paper: pairs against ImageNet, COCO, OKVQA, VQAv2, Flickr30K, VisDial)."""
    hash_distance: int = 4
    """Bits of 64 in which the perceptual hashes of near-duplicates differ at most."""
    documents: bool = True
    """Leave out documents that are near-duplicates of an earlier one (MinHash)."""
    jaccard: float = 0.8
    """Least estimated Jaccard similarity of near-duplicate documents (MassiveText: 0.8)."""
    shingle: int = 5
    """Words of a shingle."""
    permutations: int = 128
    """Length of a MinHash signature; a multiple of `bands`."""
    bands: int = 16
    """Bands of the signature; documents that agree on one are compared."""

    def __post_init__(self) -> None:
        if not 0 <= self.hash_distance <= 15:
            raise ValueError(f"dedup.hash_distance {self.hash_distance}: give 0 to 15 bits of 64")
        if not 0 < self.jaccard <= 1 or self.shingle < 1:
            raise ValueError(
                f"dedup.jaccard {self.jaccard}, dedup.shingle {self.shingle}: give a number in (0, 1], "
                "and at least 1 word"
            )
        if self.bands < 1 or self.permutations % self.bands or self.permutations < 1:
            raise ValueError(
                f"dedup.permutations {self.permutations}, dedup.bands {self.bands}: bands must divide "
                "permutations, as 128 and 16"
            )


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """One corpus to be built."""

    input: InputKind
    """html: folders of pages with their images; warc: web archives; obelics, mmc4: their published records;
    pairs: img2dataset's output; videos: video2dataset's output; frames: folders of numbered frames."""
    sources: tuple[str, ...]
    """Folders or files, on any file system that fsspec reads."""
    output: str
    """Folder of the corpus."""
    images: tuple[str, ...] = ()
    """Where the images of obelics and mmc4 records lie: folders (a mirror host/path or the image's name), or
    tars and folders that img2dataset wrote. Nothing is ever fetched from the network."""
    captions: str = ""
    """pairs, videos: a table with the columns `file_name` (below the source) and `text` or `caption`, as
    `metadata.jsonl` or `metadata.csv` of Hugging Face's ImageFolder; in place of files beside the media."""
    html: HtmlConfig = field(default_factory=HtmlConfig)
    """Reading of pages."""
    text: TextConfig = field(default_factory=TextConfig)
    """Filters of documents."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Filters of images."""
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    """Filters of captions."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """Filters of clips."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Near-duplicates."""
    min_similarity: float = 0.0
    """mmc4: images whose similarity to their sentence is below are left out (OpenFlamingo: 0.24)."""
    samples_per_part: int = 256
    """Pages, records or clips that are one task, where a source can be cut; a WARC or a tar is one task."""
    samples_per_shard: int = 10_000
    """Samples after which a new shard begins."""
    bytes_per_shard: int = 1 << 30
    """Bytes that a shard does not pass, unless one sample alone is larger."""

    def __post_init__(self) -> None:
        for name in ("sources", "images"):
            if isinstance(cast(object, getattr(self, name)), str):
                raise ValueError(f"{name} {getattr(self, name)!r}: give a tuple of URLs")
        if not self.sources or not self.output:
            raise ValueError(f"sources {self.sources!r}, output {self.output!r}: both must be given")
        if min(self.samples_per_part, self.samples_per_shard, self.bytes_per_shard) < 1:
            raise ValueError(
                f"samples_per_part {self.samples_per_part}, samples_per_shard {self.samples_per_shard}, "
                f"bytes_per_shard {self.bytes_per_shard}: all must be at least 1"
            )
        if self.images and self.input not in ("obelics", "mmc4"):
            raise ValueError(
                f"images {self.images!r} with input {self.input!r}: only obelics and mmc4 take it"
            )

        if self.captions and self.input not in ("pairs", "videos"):
            raise ValueError(
                f"captions {self.captions!r} with input {self.input!r}: only pairs and videos take it"
            )

    @property
    def kind(self) -> str:
        """Kind of the samples, as `DatasetConfig.kind` names it."""
        if self.input in DOCUMENT_INPUTS:
            return "interleaved"
        return "video" if self.input in VIDEO_INPUTS else "pair"

    def identity(self) -> dict[str, Any]:
        """Return what decides the bytes of the corpus, as plain JSON values: all but where it is written."""
        import dataclasses

        fields = dataclasses.asdict(self)
        fields.pop("output")
        return fields
