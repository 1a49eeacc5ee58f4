"""`flamingo data build`: on real Ray Data, killed and continued, and what the command line says."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.building.corpus import build_corpus
from data_pipeline.errors import MissingShardError
from flamingo_dist.cli import main
from tests.data_pipeline.building.building_material import build, config, files, page, write_tree

ROOT = Path(__file__).resolve().parents[2]


def command(source: Path, output: Path, *options: str) -> list[str]:
    return ["data", "build", "--input", "html", "--sources", str(source), "--output", str(output), *options]


def process(arguments: list[str], **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    whole = [sys.executable, "-m", "flamingo_dist.cli", *arguments]
    return subprocess.Popen(
        whole, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def small_ray() -> Iterator[None]:
    """Ray on two logical CPUs; its sockets need a path far shorter than pytest's."""
    import ray

    folder = tempfile.mkdtemp(prefix="fb", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 << 20,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.distributed
@pytest.mark.usefixtures("small_ray")
def test_ray_writes_the_same_bytes_and_shows_progress(tmp_path: Path) -> None:
    from jobs.build import RayDataRunner

    tree = write_tree(tmp_path / "tree", pages=7)
    build(tree, tmp_path / "here")
    console = Console(file=io.StringIO(), width=120)
    report = build_corpus(config(tree, tmp_path / "ray"), RayDataRunner(console))
    assert report.samples == 7
    assert files(tmp_path / "ray") == files(tmp_path / "here")
    assert "parts: 4 of 4" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "shards: 2 of 2" in console.file.getvalue()  # type: ignore[attr-defined]
    terminal = Console(file=io.StringIO(), width=120, force_terminal=True)
    build_corpus(config(tree, tmp_path / "again"), RayDataRunner(terminal))
    assert "4/4" in terminal.file.getvalue()  # type: ignore[attr-defined]


def _die_once(task: tuple[str, int]) -> int:
    marker, number = task
    if number == 1 and not os.path.exists(marker):
        Path(marker).write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.distributed
@pytest.mark.usefixtures("small_ray")
def test_a_worker_that_is_killed_costs_no_task(tmp_path: Path) -> None:
    from jobs.build import RayDataRunner

    tasks = [(str(tmp_path / "marker"), number) for number in range(4)]
    assert sorted(RayDataRunner()(_die_once, tasks, "parts", 0)) == [0, 1, 2, 3]
    assert (tmp_path / "marker").exists()


def _refuse(task: int) -> int:
    raise MissingShardError(f"store {task} is gone")


@pytest.mark.distributed
@pytest.mark.usefixtures("small_ray")
def test_an_error_of_a_task_arrives_as_itself() -> None:
    from jobs.build import RayDataRunner

    with pytest.raises(MissingShardError) as caught:
        list(RayDataRunner()(_refuse, [3], "parts", 0))
    assert str(caught.value) == "store 3 is gone"
    assert "in _refuse" in caught.value.__notes__[0]


@pytest.mark.distributed
@pytest.mark.usefixtures("small_ray")
def test_the_command_reports_as_a_table_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_tree(tmp_path / "tree", pages=3)
    (tree / "short.html").write_text(page("Too short."))
    arguments = command(tree, tmp_path / "out", "--samples-per-part", "2", "--text.min-words", "40")
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "3 samples, 6 images" in told
    assert "under 40 words" in told
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["documents"]) == (3, {"under 40 words": 1})
    assert main(command(tree, tmp_path / "out")) == 1, "other settings"
    assert "--overwrite" in capsys.readouterr().err
    assert main(command(tmp_path / "none", tmp_path / "o2")) == 1
    assert "no such file or folder" in capsys.readouterr().err
    assert main([*command(tree, tmp_path / "out"), "--overwrite"]) == 0


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 2
    assert main(["data", "--help"]) == 0
    assert "build" in capsys.readouterr().out
    assert main(["data", "brew"]) == 2
    assert "unknown command 'brew'" in capsys.readouterr().err


@pytest.mark.integration  # two starts of a whole build
def test_a_driver_that_is_killed_goes_on_with_equal_bytes(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", pages=40)
    settings = ("--samples-per-part", "1", "--samples-per-shard", "7")
    build(tree, tmp_path / "straight", samples_per_part=1, samples_per_shard=7)
    work = tmp_path / "out" / ".build"
    driver = process([*command(tree, tmp_path / "out", *settings), "--cpus", "1"])
    deadline = time.monotonic() + 150
    while not (work / "part-000002.json").exists():
        assert time.monotonic() < deadline, driver.communicate()
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    assert not (tmp_path / "out" / "index.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in work.glob("part-??????.json")}
    assert 2 < len(kept) < 40
    again = process([*command(tree, tmp_path / "out", *settings), "--cpus", "2"])
    out, errors = again.communicate(timeout=200)
    assert again.returncode == 0, errors
    assert "were done before" in out
    assert files(tmp_path / "out") == files(tmp_path / "straight")
