"""Files on any file system: whole or absent when written, within a folder and a size when read."""

from __future__ import annotations

import base64
import binascii
import os
import posixpath
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_pipeline.building.documents import refuse
from data_pipeline.errors import BadSampleError
from data_pipeline.files import write_whole
from data_pipeline.storage import Storage, StorageError

_DATA_URI = re.compile(r"data:image/[a-z0-9.+\-]+((?:;[a-z0-9=\-]+)*?)(;base64)?,", re.I)
_MAX_PATH = 1024


def put_file(fs: Any, path: str, blob: bytes) -> None:
    """Write a file that is whole or absent, whenever the process is killed."""
    if isinstance(fs, LocalFileSystem):
        write_whole(path, blob)
    else:
        fs.pipe_file(path, blob)  # object stores publish an object when it is complete


def move_file(fs: Any, source: str, target: str) -> None:
    """Move a finished file to its place, over whatever an earlier attempt left there."""
    if isinstance(fs, LocalFileSystem):
        os.replace(source, target)
    else:
        fs.mv(source, target)


class Folder:
    """A folder that references must not lead out of: not by `..`, not by a link."""

    def __init__(self, url: str) -> None:
        """Open the folder; nothing is read."""
        self._storage = Storage()
        self.fs, path = fsspec.core.url_to_fs(url)
        self.path = str(path).rstrip("/")
        self._real = os.path.realpath(self.path) if isinstance(self.fs, LocalFileSystem) else ""

    def inside(self, relative: str) -> str:
        """Return the path of a file of the folder.

        Args:
            relative: path below the folder.

        Raises:
            BadSampleError: "path traversal" for one that leads out of it, "bad address" for one that is none.
        """
        if "\0" in relative or len(relative) > _MAX_PATH:
            raise BadSampleError("bad address", repr(relative[:80]))
        clean = posixpath.normpath(relative.replace("\\", "/"))
        if clean.startswith(("../", "/")) or clean in ("..", "."):
            raise BadSampleError("path traversal", relative)
        path = f"{self.path}/{clean}"
        if self._real:
            real = os.path.realpath(path)
            if not real.startswith(self._real.rstrip("/") + "/"):
                raise BadSampleError("path traversal", f"{relative} is a link to {real}")
        return path

    def read(self, relative: str, max_bytes: int) -> bytes:
        """Read a file of the folder.

        Raises:
            BadSampleError: for a path that leads out, "not in the sources", or a file that is too large; fatal
                ones when the storage fails: an outage must stop a build, not thin out its corpus.
        """
        path = self.inside(relative)
        try:
            info = self.fs.info(path)
        except OSError as error:  # no such file, a file as a folder, a name that the system cannot hold
            raise BadSampleError("not in the sources", relative) from error
        if info["type"] != "file":
            raise BadSampleError("not in the sources", f"{relative} is no file")
        if int(info["size"]) > max_bytes:
            raise BadSampleError(f"over {max_bytes} bytes", f"{relative}: {info['size']}")
        try:
            blob: bytes = self._storage.tried(lambda: self.fs.cat_file(path), path)
        except FileNotFoundError as error:
            raise BadSampleError("vanished", f"{path} was there a moment ago", fatal=True) from error
        except StorageError as error:
            raise BadSampleError("unreadable", str(error), fatal=True) from error
        return blob

    def exists(self, relative: str) -> bool:
        """Whether the folder has such a file."""
        try:
            return bool(self.fs.isfile(self.inside(relative)))
        except (BadSampleError, OSError, ValueError):
            return False

    def reader(self, relative: str, max_bytes: int) -> Callable[[], bytes]:
        """Make what reads a file when it is wanted."""
        return lambda: self.read(relative, max_bytes)


def data_uri(src: str, max_bytes: int) -> Callable[[], bytes]:
    """Make what decodes an image that a page holds in its own text."""

    def load() -> bytes:
        head = _DATA_URI.match(src[:200])
        if head is None:
            raise BadSampleError("bad address", src[:80])
        if len(src) > 2 * max_bytes:
            raise BadSampleError(f"over {max_bytes} bytes", f"a data address of {len(src)} characters")
        body = src[head.end() :]
        if not head.group(2):
            return unquote_to_bytes(body)
        try:
            return base64.b64decode(unquote(body), validate=False)
        except (binascii.Error, ValueError) as error:
            raise BadSampleError("corrupt image", f"base64: {error}") from error

    return load


def tree_reader(folder: Folder, page: str, src: str, max_bytes: int) -> Callable[[], bytes]:
    """Make what reads the image that a page of a folder refers to.

    An address with a host is looked for where a mirror keeps it (`host/path`), and never fetched.

    Args:
        folder: the root of the pages.
        page: the page's path below it, or below its `<base>`.
        src: the reference.
        max_bytes: largest image.
    """
    if src[:5].lower() == "data:":
        return data_uri(src, max_bytes)
    try:
        parts = urlsplit(src)
        host = parts.hostname or ""
    except ValueError as error:
        return refuse("bad address", f"{src[:80]}: {error}")
    path = unquote(parts.path)
    if not path:
        return refuse("bad address", repr(src[:80]))
    if parts.scheme not in ("", "http", "https"):
        return refuse("bad address", f"of the kind {parts.scheme}: {src[:80]}")
    if parts.netloc:
        mirrored = f"{host}/{path.lstrip('/')}"
        if not folder.exists(mirrored):
            return refuse("remote image", src[:200])
        return folder.reader(mirrored, max_bytes)
    relative = path.lstrip("/") if path.startswith("/") else posixpath.join(posixpath.dirname(page), path)
    return folder.reader(relative, max_bytes)
