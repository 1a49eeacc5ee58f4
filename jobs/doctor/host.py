"""A node's cores, memory, limits and environment."""

import os
import resource
from collections.abc import Mapping
from pathlib import Path

import psutil

from flamingo_dist.planning.hardware import GIB
from jobs.doctor.findings import Finding, fail, ok, warn
from jobs.doctor.report import Needs

OPEN_FILES = 65_536
"""Open files that Ray asks for; it raises the soft limit itself as far as the hard one allows."""
SHARED_MEMORY_SHARE = 0.3
"""Share of the memory that Ray gives its object store unless told otherwise; it lies in /dev/shm."""


def cores() -> int:
    """Return the CPUs that this process may use: an allocation or a binding often gives a part of the machine."""
    return len(os.sched_getaffinity(0))


def offered(environment: Mapping[str, str]) -> int:
    """Return the CPUs that Ray will offer here: those of the SLURM job, as train.sbatch tells it, or of the machine."""
    return int(environment.get("SLURM_CPUS_ON_NODE") or cores())


def check_host(needs: Needs, environment: Mapping[str, str]) -> list[Finding]:
    """Make all checks of this module on this node."""
    limit, memory = memory_limit(), psutil.virtual_memory()
    available = min(memory.available, limit or memory.available)
    return [
        check_memory(needs.host_bytes + needs.object_bytes, available),
        check_shared_memory(needs.object_bytes, min(memory.total, limit or memory.total)),
        check_open_files(),
        *check_locked_memory(needs),
        check_threads(needs, environment),
        *check_slurm(environment, cores(), os.cpu_count() or 1),
        *check_buffering(environment),
    ]


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what this process's control group still lets it allocate, in bytes; None where nothing limits it."""
    left = None
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
    except OSError:
        return None
    for folder in (root / own, *(root / own).parents):
        if not folder.is_relative_to(root):
            break
        try:
            most, used = (folder / "memory.max").read_text(), (folder / "memory.current").read_text()
        except OSError:
            continue
        if most.strip() != "max":
            here = int(most) - int(used)
            left = here if left is None else min(left, here)
    return left


def check_memory(needed: int, available: int) -> Finding:
    """Check the free memory of this host against what the run's processes on it need, in bytes."""
    says = f"{available / GIB:.1f} GiB are free, about {needed / GIB:.1f} GiB are needed"
    if available < needed:
        return fail(
            "host memory", says, "end other processes, take nodes with more memory, or fewer processes a node"
        )
    if available < 1.25 * needed:
        return warn("host memory", says, "leave more room: what is predicted is no upper bound")
    return ok("host memory", says)


def check_shared_memory(needed: int, memory: int, folder: str = "/dev/shm") -> Finding:
    """Check the size of /dev/shm, where Ray keeps the batches.

    Args:
        needed: bytes of the batches that wait on this node.
        memory: bytes of the host's memory.
        folder: where the shared memory is mounted.
    """
    stat = os.statvfs(folder)
    size = stat.f_blocks * stat.f_frsize
    says = f"{folder} has {size / GIB:.2f} GiB; batches that wait take {needed / GIB:.2f} GiB"
    larger = (
        f"mount -o remount,size={int(SHARED_MEMORY_SHARE * memory / GIB) + 1}G {folder}; in Docker --shm-size"
    )
    if size < needed:
        return fail("shared memory", says, larger)
    if size < SHARED_MEMORY_SHARE * memory:
        return warn(
            "shared memory",
            f"{says}; below {SHARED_MEMORY_SHARE:.0%} of the memory Ray falls back on a disk",
            larger,
        )
    return ok("shared memory", says)


def check_open_files() -> Finding:
    """Check the limit of open files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= OPEN_FILES:
        return ok("open files", f"a process may have {'any number of' if hard < 0 else hard} files open")
    return warn(
        "open files",
        f"a process may have {hard} files open; Ray asks for {OPEN_FILES}, and a socket counts as a file",
        f"raise it: ulimit -n {OPEN_FILES} as root, or nofile in /etc/security/limits.conf",
    )


def check_locked_memory(needs: Needs, devices: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    """Check the limit of locked memory, which RDMA registers its buffers under."""
    if not needs.use_gpu or not devices.is_dir() or not any(devices.iterdir()):
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return [ok("locked memory", "unlimited")]
    return [
        fail(
            "locked memory",
            f"at most {soft / GIB:.3f} GiB may be locked: NCCL cannot register its buffers with InfiniBand",
            "ulimit -l unlimited, or memlock unlimited in /etc/security/limits.conf (SLURM: restart slurmd after it)",
        )
    ]


def check_threads(needs: Needs, environment: Mapping[str, str]) -> Finding:
    """Check that OMP_NUM_THREADS is not at odds with the run, which sets it for its processes."""
    given = environment.get("OMP_NUM_THREADS")
    if given is None or given == str(needs.threads):
        return ok("threads", f"{needs.threads} a training process, by resources.threads_per_worker")
    return warn(
        "threads",
        f"OMP_NUM_THREADS={given} has no effect: training processes take resources.threads_per_worker={needs.threads}",
        f"unset it, or set --resources.threads-per-worker {given}",
    )


def check_slurm(environment: Mapping[str, str], usable: int, machine: int) -> list[Finding]:
    """Check SLURM's hints about hardware threads, and how many of the job's CPUs a step may use.

    A hint binds tasks to some of the hardware threads; IDEFICS ran ten times slower under one.

    Args:
        environment: environment variables.
        usable: CPUs that this process may use.
        machine: CPUs that the machine has.
    """
    if "SLURM_JOB_ID" not in environment:
        return []
    hints = {
        k: environment[k] for k in ("SLURM_HINT", "SBATCH_HINT", "SLURM_THREADS_PER_CORE") if k in environment
    }
    found = []
    if hints:
        given = ", ".join(f"{name}={value}" for name, value in hints.items())
        found.append(
            warn(
                "SLURM hints",
                f"{given}: SLURM ties tasks to a part of the hardware threads, which made IDEFICS ten times slower",
                f"submit without --hint and --threads-per-core, and unset {' '.join(hints)}",
            )
        )
    job = int(environment.get("SLURM_CPUS_ON_NODE", "0") or 0)
    if usable < min(job, machine):
        found.append(
            fail(
                "SLURM CPUs",
                f"the job has {job} CPUs of this node, a step may use {usable} of them",
                "start steps with --cpu-bind=none (train.sbatch does) and --cpus-per-task",
            )
        )
    elif machine < job:
        remedy = "correct CPUs= of this node in slurm.conf: processes will share cores"
        found.append(warn("SLURM CPUs", f"SLURM gives {job} CPUs of a node that has {machine}", remedy))
    elif job:
        found.append(ok("SLURM CPUs", f"a step may use {usable} CPUs, the job has {job} of this node"))
    return found


def check_buffering(environment: Mapping[str, str]) -> list[Finding]:
    """Check that a job's output appears at once: a pipe is otherwise written in blocks, minutes late."""
    if "SLURM_JOB_ID" not in environment:
        return []
    if environment.get("PYTHONUNBUFFERED"):
        return [ok("log output", "PYTHONUNBUFFERED is set")]
    return [
        warn(
            "log output",
            "PYTHONUNBUFFERED is not set: lines reach the job's log minutes late, and not at all before a crash",
            "export PYTHONUNBUFFERED=1 (train.sbatch does)",
        )
    ]
