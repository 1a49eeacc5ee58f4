"""A real two-node SLURM on one machine, from Debian's packages, for tests.

Two ``slurmd`` with names and ports of their own stand for two nodes. Each node offers a few logical
CPUs, however many the machine has. Everything lives in one temporary folder and ends with the object;
nothing of a SLURM that the machine may run otherwise is touched.
"""

import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "scancel", "squeue")
UNFINISHED = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED")
PACKAGES = "slurmctld slurmd slurm-client munge"

# Debian installs the daemons to /usr/sbin, which not every user has on PATH.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing_requirement() -> str | None:
    """Return why SLURM cannot run here, or None if it can."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=SEARCH_PATH)]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} missing; Debian: apt-get install {PACKAGES})"
    if os.geteuid() != 0:
        return "slurmd starts jobs in their owner's name and so must run as root"
    return None


def free_ports(count: int) -> list[int]:
    """Return ports that are free now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def lasting_port() -> int:
    """Return a free port below those that the system hands out, so that it is still free later on."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as candidate:
            candidate.bind(("0.0.0.0", random.randrange(15000, 30000)))
            port: int = candidate.getsockname()[1]
            return port


@dataclass(frozen=True)
class JobResult:
    """How a job ended."""

    job_id: int
    state: str
    exit_code: str
    """Exit code and signal as SLURM writes them, ``0:0`` for success."""
    restarts: int
    output: str


class SlurmCluster:
    """Two SLURM nodes, their controller and their authentication daemon, as child processes."""

    def __init__(self, nodes: tuple[str, ...] = ("n1", "n2"), cpus_per_node: int = 3) -> None:
        self.nodes = nodes
        self.cpus_per_node = cpus_per_node
        # Short: unix sockets (munge, later Ray) must fit into 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))},
            "PATH": SEARCH_PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons and wait until every node is idle."""
        try:
            self._write_configuration()
            self._start_munge()
            self._spawn("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
            for node in self.nodes:
                self._spawn("slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])
            self._wait_until_idle()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Cancel what still runs, then end the daemons, last started first, and remove their folder."""
        if any("slurmctld" in str(process.args) for process in self._processes):
            with contextlib.suppress(OSError, subprocess.SubprocessError, RuntimeError):
                self.cancel_all()
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        for straggler in self._stragglers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(straggler, signal.SIGKILL)
        self._processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def cancel_all(self) -> None:
        """Cancel every job and wait until all nodes are idle."""
        jobs = self.run("squeue", "-h", "-o", "%A", timeout=10).split()
        if jobs:
            self.run("scancel", "--signal=KILL", "--full", *jobs, timeout=10, check=False)
            self.run("scancel", *jobs, timeout=10, check=False)
        self._wait_until_idle()

    def run(self, *command: str, timeout: float = 60, check: bool = True) -> str:
        """Run a SLURM command against this cluster and return its standard output."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stderr}{self.logs()}")
        return done.stdout

    def submit(self, *arguments: str, output: Path, cwd: Path, **environment: str) -> int:
        """Submit a job with ``sbatch`` and return its id; ``environment`` is added to the job's."""
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={output}", *arguments],
            env={**self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"sbatch {' '.join(arguments)} gave {done.returncode}: {done.stderr}")
        return int(done.stdout.strip().split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """Return what ``scontrol`` says of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job_id))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def unfinished(self, job_id: int) -> bool:
        """Return whether a job waits, runs or is being ended."""
        return self.job(job_id)["JobState"] in UNFINISHED

    def wait(self, job_id: int, output: Path, seconds: float = 240) -> JobResult:
        """Wait for a job to end and return how it did; on overtime, cancel it and fail with its output."""
        deadline = time.monotonic() + seconds
        while self.unfinished(job_id):
            if time.monotonic() > deadline:
                job = self.job(job_id)
                self.run("scancel", str(job_id), check=False)
                raise TimeoutError(
                    f"job {job_id} is {job['JobState']} ({job['Reason']}) after {seconds:.0f} s; output:\n"
                    f"{self._read(output)}\n{self.logs()}"
                )
            time.sleep(0.5)
        job = self.job(job_id)
        return JobResult(job_id, job["JobState"], job["ExitCode"], int(job["Restarts"]), self._read(output))

    def logs(self) -> str:
        """Return the last lines of every daemon's log."""
        parts = []
        for log in sorted(self.folder.glob("*.log")):
            parts.append(f"--- {log.name}\n" + "\n".join(self._read(log).splitlines()[-15:]))
        return "\n" + "\n".join(parts)

    @staticmethod
    def _read(path: Path) -> str:
        return path.read_text(errors="replace") if path.exists() else ""

    def _spawn(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=SEARCH_PATH)
        assert path, f"{program} not found although missing_requirement() was asked"
        with open(self.folder / f"{program}-{len(self._processes)}.out.log", "wb") as log:
            # A session of its own: Ctrl-C must reach pytest alone, which then ends the daemons in order.
            process = subprocess.Popen(
                [path, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

    def _start_munge(self) -> None:
        folder = self.folder
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        sock = folder / "munge.socket"
        files = [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
        self._spawn("munged", "--foreground", "--force", "--num-threads=2", f"--socket={sock}", *files)
        deadline = time.monotonic() + 20
        while not sock.exists():
            if time.monotonic() > deadline or self._processes[-1].poll() is not None:
                raise RuntimeError(f"munged does not start: {self.logs()}")
            time.sleep(0.1)

    def _write_configuration(self) -> None:
        controller, *ports = free_ports(1 + len(self.nodes))
        folder = self.folder
        (folder / "state").mkdir()
        # The controller must bear the host's name; cred_expire also sets how long a requeued job has to wait.
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={socket.gethostname().split('.')[0]}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            "SlurmUser=root",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            f"AuthInfo=socket={folder / 'munge.socket'},cred_expire=5",
            "MpiDefault=none",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/linear",
            "SlurmdParameters=config_overrides",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "ReturnToService=2",
            "SchedulerParameters=sched_interval=1,batch_sched_delay=0,requeue_delay=0",
            "KillWait=10",
            f"StateSaveLocation={folder / 'state'}",
            f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
            f"SlurmctldLogFile={folder / 'slurmctld.log'}",
            f"SlurmdSpoolDir={folder / 'spool-%n'}",
            f"SlurmdPidFile={folder / 'slurmd-%n.pid'}",
            f"SlurmdLogFile={folder / 'slurmd-%n.log'}",
        ]
        for node, port in zip(self.nodes, ports, strict=True):
            (folder / f"spool-{node}").mkdir()
            address = f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            lines.append(f"NodeName={node} {address} CPUs={self.cpus_per_node}")
        lines.append(f"PartitionName=test Nodes={','.join(self.nodes)} Default=YES MaxTime=60 State=UP")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _wait_until_idle(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        states: list[str] = []
        while time.monotonic() < deadline:
            for process in self._processes:
                if process.poll() is not None:
                    raise RuntimeError(f"{process.args!r} ended with {process.returncode}: {self.logs()}")
            states = self.run("sinfo", "-h", "-N", "-o", "%T", timeout=20, check=False).split()
            if states == ["idle"] * len(self.nodes):
                return
            time.sleep(0.3)
        raise TimeoutError(f"the nodes are {states or 'unknown'} after {seconds:.0f} s: {self.logs()}")

    def _stragglers(self) -> Iterator[int]:
        """Yield the ids of processes that still carry this cluster's configuration in their environment."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in environ.read_bytes().split(b"\0") and int(environ.parent.name) != os.getpid():
                    yield int(environ.parent.name)


def interrupt(cluster: SlurmCluster, job_id: int, sent: signal.Signals) -> None:
    """Send a signal to a job's batch script alone, as SLURM does ahead of the time limit."""
    cluster.run("scancel", "--batch", f"--signal={sent.name.removeprefix('SIG')}", str(job_id))
