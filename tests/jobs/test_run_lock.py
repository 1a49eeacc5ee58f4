"""One driver a run folder, whatever becomes of the one before."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest

from jobs import driver, run_lock
from jobs.config import CaptionConfig
from jobs.recipes.smoke import smoke
from jobs.run_lock import LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from jobs.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder):
    """Another process that holds the lock of `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_driver_is_told_who_holds_the_folder_until_that_dies(tmp_path):
    folder = tmp_path / "run"
    with holder(folder) as process:
        says = f"in use by a run on {socket.gethostname()}, process {process.pid}, started 20.*another --name"
        with pytest.raises(ValueError, match=says):
            with locked(folder):
                pytest.fail("it was held")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(folder):
            assert f'"pid": {os.getpid()}' in (folder / LOCK).read_text()
    assert (folder / LOCK).read_text() == "", "nobody"


def test_who_holds_it_may_not_be_told_yet(tmp_path):
    with holder(tmp_path):
        (tmp_path / LOCK).write_text("")
        with pytest.raises(ValueError, match="in use by a run that has just started"):
            with locked(tmp_path):
                pytest.fail("it was held")


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(run_lock.errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="without locks"):
        with locked(tmp_path):
            pass


def test_a_run_does_not_start_in_a_folder_that_is_in_use(tmp_path):
    base = smoke()
    config = replace(
        base, runs_dir=str(tmp_path), data=replace(base.data, held_out={}), captions=CaptionConfig()
    )
    with holder(tmp_path / "smoke"):
        with pytest.raises(ValueError, match="in use by a run on"):
            driver.run(config, driver.LaunchConfig(resume="auto"))
    assert not (tmp_path / "smoke" / "config.json").exists()
