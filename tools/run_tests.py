"""Runs the test suite in phases and ends with one summary.

Light tests run in parallel; kernel tests run once under Triton's interpreter and once compiled for a GPU that is not
there, on the pinned Triton and on the older one that torch 2.11 brings, each in processes of its own. Tests that start
processes of their own run one after another; they wait more than they compute, so the phases before them run beside
them, at a lower priority, and show their output when they end. Integration tests (SLURM's daemons, Ray clusters of
several nodes) run on request, those on a GPU need one.

Usage: ``python tools/run_tests.py PHASE ... -- [pytest arguments]``, each PHASE one of light, interpret, dry,
dry-older, distributed (what `make test` runs), integration, slow, cuda.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

OLDER_TRITON = "3.6.0"
"""What torch 2.11 pins, the oldest Triton that kernels have to compile on; it works beside any torch."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What pytest is asked for in one phase."""

    select: list[str]
    """Options that choose the tests."""
    paths: list[str] = field(default_factory=list)
    """Where to look, unless the caller's arguments name a path."""
    mode: str = "reference"
    """KMODE of the kernel tests, see tests/kernels/conftest.py."""
    triton: str | None = None
    """Version of Triton that replaces the installed one."""
    beside: bool = False
    """Whether it fills the cores beside phases that mostly wait; such phases run one after another."""


_KERNELS = ["tests/kernels"]

PHASES: dict[str, Phase] = {
    "light": Phase(select=["-m", "not distributed and not integration and not slow", "-n", "2"], beside=True),
    "interpret": Phase(select=["-m", "modes", "-n", "2"], paths=_KERNELS, mode="interpret", beside=True),
    "dry": Phase(select=["-m", "modes", "-n", "2"], paths=_KERNELS, mode="dry", beside=True),
    "dry-older": Phase(
        select=["-m", "modes", "-n", "2"], paths=_KERNELS, mode="dry", triton=OLDER_TRITON, beside=True
    ),
    "cuda": Phase(select=["-m", "modes"], paths=_KERNELS, mode="cuda"),
    # By file: what a file starts (a Ray cluster, a whole run) its tests share.
    "distributed": Phase(
        select=["-m", "distributed and not integration and not slow", "-n", "2", "--dist", "loadfile"]
    ),
    "slow": Phase(select=["-m", "slow", "-s"]),
    "integration": Phase(select=["-m", "integration"]),
}

NO_TESTS_COLLECTED = 5
"""Exit code of pytest when the selection is empty."""


@dataclass
class PhaseResult:
    """Outcome of one phase, read from pytest's JUnit file."""

    name: str
    exit_code: int
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    durations: list[tuple[float, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the phase passed; an empty selection does."""
        return self.exit_code in (0, NO_TESTS_COLLECTED)


def read_junit(path: Path, result: PhaseResult) -> None:
    """Fill counts, broken tests and durations of a phase from pytest's JUnit file."""
    counts = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    if path.exists():
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            children = {child.tag for child in case}
            if "failure" in children:
                outcome = "failed"
            elif "error" in children:
                outcome = "error"
            else:
                outcome = "skipped" if "skipped" in children else "passed"
            counts[outcome] += 1
            if outcome in ("failed", "error"):
                result.broken.append(f"{outcome.upper()} {name}")
            result.durations.append((float(case.get("time", 0.0)), name))
    result.counts = counts


def cached_triton(version: str) -> Path | None:
    """Return a folder that holds Triton `version`, installed there if it was not; None where it cannot be had.

    Outside the repository and outside the environment, whose own Triton stays as it is.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flamingo-dist"
    folder = cache / f"triton-{version}-py{sys.version_info.major}{sys.version_info.minor}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as fresh:
        wanted = ["--no-deps", "--target", f"{fresh}/triton", f"triton=={version}"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        print(f"installing triton {version} into {folder}", flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"triton {version} cannot be had here:\n{done.stderr.strip()[-2000:]}", flush=True)
            return None
        with contextlib.suppress(OSError):  # another run was faster
            Path(fresh, "triton").rename(folder)
    return folder


def environment_of(phase: Phase) -> dict[str, str] | None:
    """Return the environment that pytest gets in `phase`; None where its Triton is missing."""
    # One thread a process: two workers with a thread pool each would fight over the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "KMODE": phase.mode}
    if phase.triton is not None:
        folder = cached_triton(phase.triton)
        if folder is None:
            return None
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


_running: set["subprocess.Popen[bytes]"] = set()


def _pass_on(signum: int, frame: object) -> None:
    """Whoever ends this script (a CI's time limit) means pytest, which then ends what its fixtures started."""
    for process in list(_running):
        process.send_signal(signal.SIGINT)


def run_phase(name: str, extra: list[str], *, beside: bool = False) -> PhaseResult:
    """Run one phase; its output is shown as it comes, or at the end if others run `beside` it."""
    phase = PHASES[name]
    start = time.monotonic()
    print(f"=== {name} tests" + (" start beside the others" if beside else ""), flush=True)
    environment = environment_of(phase)
    if environment is None:
        needed = os.environ.get("CI") == "true"
        print(f"{'FAILED' if needed else 'skipped'}: {name} needs triton {phase.triton}", flush=True)
        outcome = "error" if needed else "skipped"
        return PhaseResult(name, 1 if needed else 0, time.monotonic() - start, {outcome: 1})
    given = any((ROOT / argument.split("::")[0]).exists() for argument in extra if argument[:1] != "-")
    with tempfile.TemporaryDirectory() as folder:
        junit, shown = Path(folder) / "junit.xml", Path(folder) / "output"
        command = [sys.executable, "-m", "pytest", "-q", *phase.select, f"--junitxml={junit}", *extra]
        command += [] if given else phase.paths
        with shown.open("wb") as output:
            process = subprocess.Popen(
                ["nice", *command] if beside else command,
                cwd=ROOT,
                env=environment,
                stdout=output if beside else None,
                stderr=subprocess.STDOUT if beside else None,
            )
            _running.add(process)
            code = process.wait()
            _running.discard(process)
        result = PhaseResult(name, code, time.monotonic() - start)
        read_junit(junit, result)
        if beside:
            print(f"=== {name} tests\n{shown.read_text(errors='replace')}", end="", flush=True)
    return result


def run_lane(names: list[str], extra: list[str], results: list[PhaseResult], *, beside: bool = False) -> None:
    """Run phases one after another into `results`, up to one that the user interrupts."""
    for name in names:
        results.append(run_phase(name, extra, beside=beside))
        if results[-1].exit_code == 2:
            break


def summary(results: list[PhaseResult], seconds: float) -> str:
    """Return the closing lines: slowest and broken tests, a line a phase, the total in pytest's form."""
    lines = ["", "=== summary"]
    slowest = sorted((entry for result in results for entry in result.durations), reverse=True)[:5]
    lines += [f"slow: {duration:6.1f} s  {name}" for duration, name in slowest if duration >= 1.0]
    order = ("failed", "passed", "skipped", "error")
    total = dict.fromkeys(order, 0)
    for result in results:
        lines += result.broken
        if not result.ok and not result.broken:
            lines.append(f"FAILED phase {result.name}: pytest ended with exit code {result.exit_code}")
        shown = ", ".join(f"{count} {outcome}" for outcome, count in result.counts.items() if count)
        lines.append(f"{result.name}: {shown or 'no tests'} in {result.seconds:.1f} s")
        for outcome, count in result.counts.items():
            total[outcome] += count
    if not all(result.ok for result in results) and not total["failed"] + total["error"]:
        total["error"] += 1  # a phase that crashed must not end in a green-looking line
    shown = ", ".join(f"{total[outcome]} {outcome}" for outcome in order if total[outcome])
    lines.append(f"===== {shown or 'no tests ran'} in {seconds:.2f}s =====")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the named phases and return the exit code of the whole."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, extra = arguments[:split], arguments[split + 1 :]
    unknown = [name for name in names if name not in PHASES]
    if unknown or not names:
        print(f"phases given: {unknown or 'none'}; allowed: {', '.join(PHASES)}", file=sys.stderr)
        return 2
    start = time.monotonic()
    signal.signal(signal.SIGTERM, _pass_on)
    fillers = [name for name in names if PHASES[name].beside]
    others = [name for name in names if not PHASES[name].beside]
    if not others:  # nothing to run beside
        fillers, others = [], fillers
    aside: list[PhaseResult] = []
    results: list[PhaseResult] = []
    lane = threading.Thread(target=run_lane, args=(fillers, extra, aside), kwargs={"beside": True})
    lane.start()
    run_lane(others, extra, results)
    lane.join()
    results = [*aside, *results]
    print(summary(results, time.monotonic() - start), flush=True)
    if not any(sum(result.counts.values()) for result in results):
        print("no tests ran: that is a failure", file=sys.stderr)
        return 1
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
