"""One driver a run folder: two of one name would delete each other's checkpoints while they are written."""

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock.json"
"""File in a run folder that its driver holds a lock on; it says who that is or was."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems say that have no locks."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder for the time of the block; the system lets go of it if the process dies.

    Raises:
        ValueError: another driver holds it, with its host, process and start.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{run_dir} is in use by a run {_holder(path)}; wait for its end, stop it, or choose "
                f"another --name; if that process is gone with its machine, delete {path}."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{run_dir} lies on a file system without locks ({error.strerror}): see to it yourself that no other "
                "run has this name.",
                stacklevel=4,
            )
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}) + "\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _holder(path: Path) -> str:
    """Return who says that it holds the lock at `path`."""
    try:
        told = json.loads(path.read_text())
        return f"on {told['host']}, process {told['pid']}, started {told['started']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is about to write
        return "that has just started"
