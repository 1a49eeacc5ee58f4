"""Limits, folders and versions of a real machine, with needs that it meets and needs that it does not."""

import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement

from jobs.doctor import disk, host, versions
from jobs.doctor.gpus import check_gpus
from jobs.doctor.report import GPUFacts, Needs, NodeReport

NEEDS = Needs(processes=2, threads=2, use_gpu=True, host_bytes=0, object_bytes=0, run_dir="/nowhere")
GIB = 1 << 30


def test_memory_that_is_there_and_that_is_not():
    available = psutil.virtual_memory().available
    assert host.check_memory(available // 4, available).level == "ok"
    assert host.check_memory(int(available / 1.1), available).level == "warn"
    assert host.check_memory(2 * available, available).level == "fail"


def test_the_limit_of_a_control_group(tmp_path):
    own = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
    (tmp_path / own).mkdir(parents=True, exist_ok=True)
    assert host.memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert host.memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1005\n")
    assert host.memory_limit(tmp_path) == 1000


def test_shared_memory_of_this_machine():
    size = os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    assert host.check_shared_memory(size // 2, size).level == "ok"
    assert host.check_shared_memory(0, 100 * size).level == "warn"
    assert "--shm-size" in host.check_shared_memory(2 * size, size).remedy


def test_the_limit_of_open_files_is_the_hard_one():
    """In a process of its own: a hard limit never rises again."""
    code = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (256, 512)); "
    code += "from jobs.doctor.host import check_open_files as c; print(c().level, c().says)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("warn a process may have 512 files open")


def test_locked_memory_matters_with_infiniband(tmp_path, monkeypatch):
    assert host.check_locked_memory(NEEDS, tmp_path / "none") == []
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    assert [f.level for f in host.check_locked_memory(NEEDS, tmp_path)] == ["fail"]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert [f.level for f in host.check_locked_memory(NEEDS, tmp_path)] == ["ok"]


def test_threads_that_have_no_effect():
    assert host.check_threads(NEEDS, {"OMP_NUM_THREADS": "2"}).level == "ok"
    assert "OMP_NUM_THREADS=16 has no effect" in host.check_threads(NEEDS, {"OMP_NUM_THREADS": "16"}).says


def test_slurm_hints_and_bindings():
    assert host.check_slurm({"SLURM_HINT": "nomultithread"}, 1, 96) == []
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "96"}
    assert [f.level for f in host.check_slurm(job, 96, 192)] == ["ok"]
    found = host.check_slurm({**job, "SLURM_HINT": "nomultithread", "SLURM_THREADS_PER_CORE": "1"}, 1, 96)
    assert [(f.check, f.level) for f in found] == [("SLURM hints", "warn"), ("SLURM CPUs", "fail")]
    assert [f.level for f in host.check_slurm(job, 48, 48)] == ["warn"], "SLURM claims more than there is"
    assert "unset SLURM_HINT SLURM_THREADS_PER_CORE" in found[0].remedy
    assert "96 CPUs of this node, a step may use 1" in found[1].says


def test_output_of_a_job_is_not_held_back():
    assert host.check_buffering({}) == []
    assert [f.level for f in host.check_buffering({"SLURM_JOB_ID": "7"})] == ["warn"]
    assert [f.level for f in host.check_buffering({"SLURM_JOB_ID": "7", "PYTHONUNBUFFERED": "1"})] == ["ok"]


def test_room_for_checkpoints(tmp_path):
    free = disk.free_bytes(tmp_path)
    folder = tmp_path / "runs/new"

    def level(checkpoint: int, present: int = 0) -> str:
        (finding,) = disk.check_run_folder(folder, checkpoint, 3, present)
        return finding.level

    assert level(free // 10) == "ok"
    assert level(int(free / 4.4)) == "warn"
    assert level(free) == "fail"
    assert level(free, present=int(3.5 * free)) == "ok", "checkpoints that are there are replaced"
    (finding,) = disk.check_run_folder(folder, free, 3, 0)
    assert "--train.keep-checkpoints" in finding.remedy
    assert not folder.exists()


def test_a_run_folder_that_cannot_be_written_to():
    (finding,) = disk.check_run_folder(Path("/proc/none/run"), 1, 1, 0)
    assert finding.level == "fail"
    assert "/proc cannot be written to" in finding.says


def test_a_run_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link"):
        (finding,) = disk.check_run_folder(tmp_path / name / "run", 1, 1, 0)
        assert (finding.check, finding.level) == ("run folder", "fail")
        assert f"{tmp_path / name} is no folder" in finding.says
        assert "--runs-dir" in finding.remedy


def test_a_mark_that_this_node_does_not_see(tmp_path):
    folder = tmp_path / "runs/new"
    with disk.marked(folder) as mark:
        assert disk.check_shared(folder, mark).level == "ok"
        assert disk.check_shared(tmp_path, mark).level == "fail"
    assert not (tmp_path / "runs").exists(), "the doctor leaves nothing behind"


def test_files_that_this_node_does_not_see(tmp_path):
    assert disk.check_paths([]) == []
    assert disk.check_paths([str(tmp_path)])[0].level == "ok"
    (finding,) = disk.check_paths([str(tmp_path), str(tmp_path / "weights.gguf")])
    assert (finding.level, finding.says) == ("fail", f"cannot be read here: {tmp_path}/weights.gguf")


def test_caches_and_temporary_folder(tmp_path):
    free = disk.free_bytes(tmp_path)
    levels = [f.level for f in disk.check_caches({str(tmp_path): free // 2, str(tmp_path / "new"): 2 * free})]
    assert levels == ["ok", "warn"]
    assert disk.check_temporary(tmp_path / "new").check == "temporary folder"


def test_versions_outside_of_their_ranges():
    wanted = [
        Requirement("torch>=2.11,<=2.13.0"),
        Requirement("ray[train]>=2.60,<2.62"),
        Requirement("no-such>1"),
    ]
    found = versions.check_versions(wanted[:2], {"torch": "2.13.0+cpu", "ray": "2.60.0"})
    assert [f.level for f in found] == ["ok"]
    (finding,) = versions.check_versions(wanted, {"torch": "2.14.0", "ray": "2.60.0"})
    assert finding.level == "fail"
    assert "torch 2.14.0 is outside" in finding.says
    assert "no-such is missing" in finding.says


def test_ranges_come_from_the_project():
    names = {each.name for each in versions.requirements()}
    assert {"torch", "deepspeed", "megatron-core"} <= names
    assert "pytest" not in names
    assert (
        versions.check_versions(versions.requirements(), versions.installed(sorted(names)))[0].level == "ok"
    )


def test_nodes_with_different_versions():
    reports = [
        NodeReport(node=f"n{i}", host="h", cores=1, versions={"torch": v, "ray": "2.60.0"})
        for i, v in enumerate(["2.13.0", "2.12.1", "2.13.0"])
    ]
    (finding,) = versions.check_same_versions(reports)
    assert finding.says == "torch 2.13.0 on n0 n2, 2.12.1 on n1"
    assert versions.check_same_versions([reports[0], reports[2]])[0].level == "ok"


def test_gpus_of_a_node():
    gpu = GPUFacts(name="NVIDIA H100", total_gib=79.1, free_gib=78.9)
    assert check_gpus((gpu,), built_for_gpus=True)[0].level == "ok"
    busy = dataclasses.replace(gpu, free_gib=40.0)
    assert "GPU 1 (40.0 of 79.1 GiB free)" in check_gpus((gpu, busy), built_for_gpus=True)[0].says
    assert check_gpus((), built_for_gpus=True)[0].level == "fail"
    assert check_gpus((), built_for_gpus=False)[0].level == "fail"


@pytest.mark.parametrize("level", ["warn", "fail"])
def test_what_is_wrong_has_a_remedy(level):
    from jobs.doctor.findings import Finding

    with pytest.raises(AssertionError, match="a remedy"):
        Finding(check="x", level=level, says="wrong")
